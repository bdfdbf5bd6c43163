# SPDX-License-Identifier: Apache-2.0
"""Parts of elementwise kernels on [rows, cols] tensors with a row stride: tiles, rounding to 16 bits, codes.

No min/max here propagates NaN: beside one-byte stores Triton miscompiles it (triton-lang/triton#11111).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# The interpreter, which runs on a CPU, knows no PTX.
_INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
# float32 as bfloat16 stores it, two at a time: the compiler would convert one by one, at an eighth of the speed.
_AS_BF16 = tl.constexpr("{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xFFFF0000; }")


@triton.jit
def tile_at(number, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(first row, first column) of a tile; columns run fastest."""
    across = tl.cdiv(cols, COLS)
    return (number // across).to(tl.int64) * ROWS, (number % across).to(tl.int64) * COLS


@triton.jit
def within(row, col, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Which of its elements exist. A single row always does."""
    inside = (col + tl.arange(0, COLS) < cols)[None, :]
    if ROWS > 1:
        inside = (row + tl.arange(0, ROWS) < rows)[:, None] & inside
    return inside


@triton.jit
def pointers(base, row, col, stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """To its elements in a tensor whose rows are `stride` elements apart."""
    corner = base + row * stride + col
    if ROWS > 1:
        each = corner + (tl.arange(0, ROWS).to(tl.int64) * stride)[:, None] + tl.arange(0, COLS)[None, :]
    else:
        each = corner + tl.arange(0, COLS)[None, :]
    return each


@triton.jit
def tally(counts_ptr, magnitude, seen, first, samples, FMT_MAX: tl.constexpr, HALF_TINY: tl.constexpr):
    """Add to `ops.quantize`'s counters what becomes of sampled elements; magnitude: |x| / scale."""
    finite = magnitude < float("inf")
    saturated = tl.sum((seen & finite & (magnitude > FMT_MAX)).to(tl.int64), 0)
    underflow = tl.sum((seen & (magnitude > 0) & (magnitude <= HALF_TINY)).to(tl.int64), 0)
    nonfinite = tl.sum((seen & (finite == 0)).to(tl.int64), 0)
    if first == 0:
        tl.atomic_add(counts_ptr, samples.to(tl.int64))
    # All programs add to the same three numbers; nearly all have nothing to add and must not queue for it.
    if saturated > 0:
        tl.atomic_add(counts_ptr + 1, saturated)
    if underflow > 0:
        tl.atomic_add(counts_ptr + 2, underflow)
    if nonfinite > 0:
        tl.atomic_add(counts_ptr + 3, nonfinite)


@triton.jit
def finite(x):
    """x, or NaN where it is infinite: x * 0 + x, one instruction."""
    return x * 0.0 + x


@triton.jit
def larger(a, x):
    """Elementwise max of `a` and the finite |x|."""
    if _INTERPRETED:  # whose maximum of a number and NaN is NaN
        magnitude = tl.abs(x)
        out = tl.where((magnitude < float("inf")) & (magnitude > a), magnitude, a)
    else:  # the number
        out = tl.maximum(a, tl.abs(finite(x)))
    return out


@triton.jit
def encode(x, inverse, DTYPE: tl.constexpr, FMT_MAX: tl.constexpr):
    """Codes of x * inverse: saturating, NaN where it is not finite. The conversion to float8 saturates by itself."""
    y = finite(x * inverse)
    if DTYPE == tl.float16 or _INTERPRETED:
        y = tl.where(y > FMT_MAX, FMT_MAX, tl.where(y < -FMT_MAX, -FMT_MAX, y))
    return y.to(DTYPE)


@triton.jit
def stored(x, DTYPE: tl.constexpr):
    """x as DTYPE stores it, float32."""
    if DTYPE == tl.bfloat16 and not _INTERPRETED:
        y = tl.inline_asm_elementwise(_AS_BF16, "=&f,=f,f,f", [x], dtype=tl.float32, is_pure=True, pack=2)
    else:
        y = x.to(DTYPE).to(tl.float32)
    return y
