# SPDX-License-Identifier: Apache-2.0
"""Scale and cast a matrix to FP8 in the two layouts that GEMMs read, in one pass: [R, C] and [C, R padded].

A program takes a tile. Four rows that lie side by side become the four bytes of a word, so that what is transposed,
through shared memory, are words: no transposed store is one byte wide, which would be slow, and which Triton has
miscompiled (triton-lang/triton#11111). Bytes moved for b-byte input: n (b + 2); see `cast.py` for the scales.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowprec.kernels.triton.cast import (
    DELAYED,
    GIVEN,
    INTERPRETED,
    MOST_PROGRAMS,
    SAMPLES,
    CastPlan,
    count_sample,
    if_finite,
    in_range,
    needed_amax,
    raise_amax,
    used_scale,
)
from hf_lowprec.kernels.triton.launch import Launcher, integer_key
from hf_lowprec.ops.quantize import sample_stride


class Tile(NamedTuple):
    rows: int
    columns: int
    warps: int


# Those that were measured; every one is tested. The first is the best of them or near it at 2048 x 2048 and
# 8192 x 4096 bfloat16 (H200; 0.84 of copy speed at the latter, with amax and counters).
TILES = (
    Tile(64, 128, 4), Tile(64, 64, 8), Tile(64, 64, 4), Tile(64, 128, 8), Tile(128, 64, 8), Tile(128, 64, 4),
    Tile(32, 128, 4), Tile(128, 32, 4), Tile(128, 128, 8),
)  # fmt: skip
TILE = TILES[0]


def _word(kind: str) -> tl.constexpr:
    """PTX: four floats as the bytes of a word, the first lowest."""
    cvt = f"cvt.rn.satfinite.{kind}x2.f32"
    return tl.constexpr(f"{{ .reg .b16 l, h; {cvt} l, $2, $1; {cvt} h, $4, $3; mov.b32 $0, {{l, h}}; }}")


_WORD_E4M3, _WORD_E5M2 = _word("e4m3"), _word("e5m2")


@triton.jit
def _word_of(y0, y1, y2, y3, Q: tl.constexpr):
    if INTERPRETED:
        b0 = y0.to(Q).to(tl.uint8, bitcast=True).to(tl.int32)
        b1 = y1.to(Q).to(tl.uint8, bitcast=True).to(tl.int32)
        b2 = y2.to(Q).to(tl.uint8, bitcast=True).to(tl.int32)
        b3 = y3.to(Q).to(tl.uint8, bitcast=True).to(tl.int32)
        word = b0 | (b1 << 8) | (b2 << 16) | (b3 << 24)
    else:
        word = tl.inline_asm_elementwise(
            _WORD_E4M3 if Q == tl.float8e4nv else _WORD_E5M2, "=r,f,f,f,f", [y0, y1, y2, y3], dtype=tl.int32,
            is_pure=True, pack=1,
        )  # fmt: skip
    return word


@triton.jit
def cast_tile(
    x_ptr, rows_ptr, columns_ptr, tile, across, n_rows, n_columns, stride, words, inverse, largest,
    FMT_MAX: tl.constexpr, Q: tl.constexpr, AMAX: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """Casts one tile; returns `largest` [TILE_R / 4, TILE_C], raised by its magnitudes if AMAX.

    across: tiles in a row. words: in a row of `columns`. A layout whose pointer is None is not written.
    """
    quad = tl.arange(0, TILE_R // 4)
    row = tile // across * TILE_R
    c = tile % across * TILE_C + tl.arange(0, TILE_C)
    # 64 bits once per tile; within it 32 are enough.
    x_tile = x_ptr + row.to(tl.int64) * stride
    offset = quad[:, None] * (4 * stride) + c[None, :]
    across_ok = (c < n_columns)[None, :]
    left = n_rows - row - 4 * quad
    ok0 = (left > 0)[:, None] & across_ok
    ok1 = (left > 1)[:, None] & across_ok
    ok2 = (left > 2)[:, None] & across_ok
    ok3 = (left > 3)[:, None] & across_ok
    x0 = tl.load(x_tile + offset, mask=ok0, other=0.0)
    x1 = tl.load(x_tile + offset + stride, mask=ok1, other=0.0)
    x2 = tl.load(x_tile + offset + 2 * stride, mask=ok2, other=0.0)
    x3 = tl.load(x_tile + offset + 3 * stride, mask=ok3, other=0.0)
    x0 = x0.to(tl.float32)
    x1 = x1.to(tl.float32)
    x2 = x2.to(tl.float32)
    x3 = x3.to(tl.float32)
    if AMAX:
        largest = tl.maximum(largest, tl.abs(if_finite(x0)))
        largest = tl.maximum(largest, tl.abs(if_finite(x1)))
        largest = tl.maximum(largest, tl.abs(if_finite(x2)))
        largest = tl.maximum(largest, tl.abs(if_finite(x3)))
    x0 = in_range(x0, inverse, FMT_MAX, Q)
    x1 = in_range(x1, inverse, FMT_MAX, Q)
    x2 = in_range(x2, inverse, FMT_MAX, Q)
    x3 = in_range(x3, inverse, FMT_MAX, Q)
    if rows_ptr is not None:
        rows_tile = rows_ptr + row.to(tl.int64) * n_columns
        offset = quad[:, None] * (4 * n_columns) + c[None, :]
        tl.store(rows_tile + offset, x0.to(Q), mask=ok0)
        tl.store(rows_tile + offset + n_columns, x1.to(Q), mask=ok1)
        tl.store(rows_tile + offset + 2 * n_columns, x2.to(Q), mask=ok2)
        tl.store(rows_tile + offset + 3 * n_columns, x3.to(Q), mask=ok3)
    if columns_ptr is not None:
        w = row // 4 + quad
        target = columns_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        target += c[:, None].to(tl.int64) * words + w[None, :]
        word = tl.trans(_word_of(x0, x1, x2, x3, Q))
        tl.store(target, word, mask=(c < n_columns)[:, None] & (w < words)[None, :])
    return largest


@triton.jit(
    do_not_specialize=["samples", "sample_stride"],
    do_not_specialize_on_alignment=["given_ptr", "scale_ptr", "amax_ptr", "counts_ptr", "partial_ptr"],
)
def _cast_transpose_kernel(
    x_ptr, rows_ptr, columns_ptr, partial_ptr, given_ptr, scale_ptr, amax_ptr, counts_ptr, n_rows, n_columns, stride,
    pads, samples, sample_stride,
    FMT_MAX: tl.constexpr, HALF_TINY: tl.constexpr, TOP_EXP: tl.constexpr, TOP_MAN: tl.constexpr,
    MARGIN: tl.constexpr, POW2: tl.constexpr, METHOD: tl.constexpr, READY: tl.constexpr, Q: tl.constexpr,
    PARTIALS: tl.constexpr, SAMPLES: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """rows = cast(x / scale) of x [n_rows, n_columns]; columns [n_columns, 16 pads] its transpose, in words."""
    pid = tl.program_id(0)
    scale = used_scale(partial_ptr, given_ptr, METHOD, READY, FMT_MAX, TOP_EXP, TOP_MAN, MARGIN, POW2, PARTIALS)
    if scale_ptr is not None:
        if pid == 0:
            tl.store(scale_ptr, scale)
    inverse = tl.div_rn(1.0, scale)
    across = tl.cdiv(n_columns, TILE_C)
    largest = tl.zeros([TILE_R // 4, TILE_C], dtype=tl.float32)
    for tile in range(pid, across * tl.cdiv(n_rows, TILE_R), tl.num_programs(0)):
        largest = cast_tile(
            x_ptr, rows_ptr, columns_ptr, tile, across, n_rows, n_columns, stride, 4 * pads, inverse, largest,
            FMT_MAX, Q, amax_ptr is not None, TILE_R, TILE_C,
        )  # fmt: skip
    if amax_ptr is not None:
        raise_amax(amax_ptr, tl.max(tl.max(largest, 1), 0))
    if counts_ptr is not None:
        count_sample(
            x_ptr, counts_ptr, pid, tl.num_programs(0), n_columns, stride, samples, sample_stride, inverse, FMT_MAX,
            HALF_TINY, False, SAMPLES,
        )  # fmt: skip


class _Prepared(NamedTuple):
    """What follows from the kind of a call: all but its tensors. `key` stands for it in the launcher."""

    key: int
    grid: tuple[int, int, int]
    shape: tuple[int, int]  # of the transposed result
    tail: tuple[Any, ...]  # of the kernel's arguments, behind the tensors
    warps: int


TYPES = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}
_launch = Launcher(_cast_transpose_kernel)
_PREPARED: dict[tuple[Any, ...], _Prepared] = {}
_MOST_PREPARED = 1 << 16  # shapes without end: start anew


def _prepare(kind: tuple[Any, ...], plan: CastPlan) -> _Prepared:
    """kind: as `cast_transpose` puts it together."""
    _, r, c, stride, x_dtype, aligned, method, ready, length, *others, tile, most = kind
    pads = -(-r // 16)
    programs = min(-(-r // tile.rows) * -(-c // tile.columns), most)
    every = sample_stride(r * c)
    integers = (r, c, stride, pads, -(-r * c // every), every)
    tail = (*integers, *plan.constants, method, ready, TYPES[plan.dtype], length, SAMPLES, *tile[:2])
    specialised = tuple(map(integer_key, integers[:4]))
    # Calls that differ in integers only run the same compiled kernel.
    key = _launch.number((plan.number, x_dtype, aligned, specialised, method, ready, length, *others, tile))
    if len(_PREPARED) >= _MOST_PREPARED:
        _PREPARED.clear()
    found = _PREPARED[kind] = _Prepared(key, (programs, 1, 1), (c, pads * 16), tail, tile.warps)
    return found


def cast_transpose(
    x: Tensor,
    plan: CastPlan,
    method: int,
    given: Tensor | None,
    *,
    ready: bool,
    partials: Tensor | None,
    amax: Tensor | None,
    counts: Tensor | None,
    rows: bool,
    columns: bool,
    tile: Tile | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(rows, columns, scale) of a float32, bfloat16 or float16 tensor; see `cast.cast`.

    x: contiguous [..., C], or a matrix whose rows are contiguous.
    """
    c = x.shape[-1]
    r = x.numel() // c
    stride = c if x.is_contiguous() else x.stride(0)
    device = x.device
    partial = None
    if method != GIVEN and not (method == DELAYED and ready):
        partial = needed_amax(x, method, given, ready, partials)
    kind = (
        plan.number, r, c, stride, x.dtype, x.data_ptr() % 16, method, ready,
        0 if partial is None else partial.numel(), rows, columns, amax is None, counts is None, tile or TILE,
        MOST_PROGRAMS,
    )  # fmt: skip
    how = _PREPARED.get(kind) or _prepare(kind, plan)
    out_rows = torch.empty((r, c), dtype=plan.dtype, device=device) if rows else None
    out_columns = torch.empty(how.shape, dtype=plan.dtype, device=device) if columns else None
    scale = None if method == GIVEN else torch.empty((), dtype=torch.float32, device=device)
    args = (x, out_rows, out_columns, partial, given, scale, amax, counts, *how.tail)
    _launch(how.key, x.get_device(), how.grid, args, num_warps=how.warps)
    if scale is None:
        assert given is not None
        scale = given
    return out_rows, out_columns, scale
