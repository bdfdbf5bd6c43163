# SPDX-License-Identifier: Apache-2.0
"""Formats whose range and mantissa width are tensors: `numerics.flexible` in one pass, its layout computed by each
program from the width that it reads.

    flexible    x -> q, or q before its scale: bytes of x and of what is written
    finish      sums of products of such -> the product
    gradients   grad, x -> the gradient of x and partial sums for range and width; q never leaves the registers
    sums        these partial sums, added in one order
    count       what becomes of a sample

No fused multiply-add may be formed (launches say `enable_fp_fusion=False`), divisions are IEEE's: q and the gradient
of x have the truth's bits. A matrix may have any strides; what is written is contiguous, but the gradient of a
transposed view, which is transposed like it. Minima and maxima are comparisons, which let NaN pass as torch's do.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowprec.kernels.triton.launch import Launcher, integer_key
from hf_lowprec.numerics.flexible import least_man
from hf_lowprec.ops.quantize import sample_stride

_LN2 = tl.constexpr(0.6931471805599453)
_SAMPLES = 512  # elements that a program counts at a time
_REDUCED = 1024  # partial sums that are added at a time
_TILE = 2048
_MOST_PROGRAMS = 2048


@triton.jit
def _power(exponent):
    """2^exponent, -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _width(man_ptr, BITS: tl.constexpr, LEAST: tl.constexpr):
    """`numerics.flexible.rounded_man`."""
    man = tl.load(man_ptr)
    man = tl.where(man < LEAST, 1.0 * LEAST, tl.where(man > BITS - 1, 1.0 * (BITS - 1), man))
    return ((man + 12582912.0) - 12582912.0).to(tl.int32)  # 1.5 * 2^23: to the nearest whole number, ties to even


@triton.jit
def _layout(man_ptr, BITS: tl.constexpr, LEAST: tl.constexpr):
    """(largest, lowest binade, highest binade, 2^-M) of `numerics.flexible.layout`."""
    m = _width(man_ptr, BITS, LEAST)
    e = BITS - 1 - m
    integer = (e == 0).to(tl.int32)
    m -= integer
    e += integer
    top = (e * 0 + 1) << (e - 1)
    ulp = _power(-m)
    return (2.0 - ulp) * _power(top), _power(2 - top), _power(top), ulp


@triton.jit
def _scale(maxval, largest):
    """`numerics.flexible.scale_of`."""
    scale = tl.div_rn(maxval, largest)
    return tl.where(scale < 2.0**-126, 2.0**-126, tl.where(scale > 2.0**126, 2.0**126, scale))


@triton.jit
def _clamped(x, low, high):
    """NaN stays."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _rounded(x, maxval, scale, largest, lowest, highest, ulp):
    """q / scale of `numerics.flexible.flexible`."""
    z = _clamped(x, -maxval, maxval) * tl.div_rn(1.0, scale)
    p = (z.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    magic = _clamped(p, lowest, highest) * (ulp * 12582912.0)
    r = _clamped((z + magic) - magic, -largest, largest)
    r = ((r.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | (x.to(tl.int32, bitcast=True) & -0x80000000)).to(
        tl.float32, bitcast=True
    )
    return r + 0.0 * x


@triton.jit
def _limits(maxval_ptr, row, rows, EACH_ROW: tl.constexpr):
    """The range of rows, [ROWS, 1], or of all."""
    if EACH_ROW:
        maxval = tl.load(maxval_ptr + row, mask=row < rows, other=1.0)[:, None]
    else:
        maxval = tl.load(maxval_ptr)
    return maxval


@triton.jit
def _flexible_kernel(
    x_ptr, out_ptr, maxval_ptr, man_ptr, rows, cols, stride_row, stride_col, BITS: tl.constexpr, LEAST: tl.constexpr,
    EACH_ROW: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out [rows, cols] contiguous: q, or without SCALED q / scale."""
    across = tl.cdiv(cols, COLS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    col = (tl.program_id(0) % across).to(tl.int64) * COLS + tl.arange(0, COLS).to(tl.int64)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    at = row[:, None] * stride_row + col[None, :] * stride_col
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    largest, lowest, highest, ulp = _layout(man_ptr, BITS, LEAST)
    maxval = _limits(maxval_ptr, row, rows, EACH_ROW)
    scale = _scale(maxval, largest)
    out = _rounded(x, maxval, scale, largest, lowest, highest, ulp)
    if SCALED:
        out = out * scale
    tl.store(out_ptr + row[:, None] * cols + col[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _finish_kernel(
    sums_ptr, out_ptr, x_maxval_ptr, x_man_ptr, w_maxval_ptr, w_man_ptr, bias_ptr, rows, cols,
    X_BITS: tl.constexpr, X_LEAST: tl.constexpr, W_BITS: tl.constexpr, W_LEAST: tl.constexpr, EACH_COL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out = sums * s_x * s_w + bias, contiguous [rows, cols]; w's rows are the columns."""
    across = tl.cdiv(cols, COLS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    col = (tl.program_id(0) % across).to(tl.int64) * COLS + tl.arange(0, COLS).to(tl.int64)
    here = col < cols
    inside = (row < rows)[:, None] & here[None, :]
    at = row[:, None] * cols + col[None, :]
    x_largest, _, _, _ = _layout(x_man_ptr, X_BITS, X_LEAST)
    w_largest, _, _, _ = _layout(w_man_ptr, W_BITS, W_LEAST)
    out = tl.load(sums_ptr + at, mask=inside, other=0.0) * _scale(tl.load(x_maxval_ptr), x_largest)
    if EACH_COL:
        out = out * _scale(tl.load(w_maxval_ptr + col, mask=here, other=1.0), w_largest)[None, :]
    else:
        out = out * _scale(tl.load(w_maxval_ptr), w_largest)
    if bias_ptr is not None:
        out = out + tl.load(bias_ptr + col, mask=here, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradients_kernel(
    grad_ptr, x_ptr, out_ptr, by_maxval_ptr, by_man_ptr, maxval_ptr, man_ptr, rows, cols, grad_row, grad_col,
    stride_row, stride_col, out_row, out_col, parts, per_part, BITS: tl.constexpr, LEAST: tl.constexpr,
    EACH_ROW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program (rows, part) goes through `per_part` columns.

    by_maxval: [parts, rows] with EACH_ROW, else one of each program. by_man: one of each program, without the slope.
    """
    part = tl.program_id(0) % parts
    row = (tl.program_id(0) // parts).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    here = row < rows
    largest, lowest, highest, ulp = _layout(man_ptr, BITS, LEAST)
    maxval = _limits(maxval_ptr, row, rows, EACH_ROW)
    scale = _scale(maxval, largest)
    inverse = tl.div_rn(1.0, tl.where(maxval < 2.0**-126, 2.0**-126, maxval))
    for_maxval = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for_man = tl.zeros([ROWS, COLS], dtype=tl.float32)
    start = part.to(tl.int64) * per_part
    for first in range(0, per_part, COLS):
        col = start + first + tl.arange(0, COLS).to(tl.int64)
        inside = here[:, None] & (col < cols)[None, :]
        x = tl.load(x_ptr + row[:, None] * stride_row + col[None, :] * stride_col, mask=inside, other=0.0)
        grad = tl.load(grad_ptr + row[:, None] * grad_row + col[None, :] * grad_col, mask=inside, other=0.0)
        x, grad = x.to(tl.float32), grad.to(tl.float32)
        q = _rounded(x, maxval, scale, largest, lowest, highest, ulp) * scale
        size = tl.abs(x)
        outside = (size > maxval) & (size < float("inf"))
        error = tl.where(size <= maxval, q - x, 0.0)
        sign = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
        for_maxval += grad * tl.where(outside, sign, error * inverse)
        for_man += grad * error
        out = tl.where(outside, 0.0, grad).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row[:, None] * out_row + col[None, :] * out_col, out, mask=inside)
    if EACH_ROW:
        tl.store(by_maxval_ptr + part.to(tl.int64) * rows + row, tl.sum(for_maxval, 1), mask=here)
    else:
        tl.store(by_maxval_ptr + tl.program_id(0), tl.sum(tl.sum(for_maxval, 1), 0))
    tl.store(by_man_ptr + tl.program_id(0), tl.sum(tl.sum(for_man, 1), 0))


@triton.jit
def _sum(from_ptr, many, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, many, BLOCK):
        which = first + tl.arange(0, BLOCK)
        total += tl.load(from_ptr + which, mask=which < many, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["programs", "rows", "parts"])
def _sums_kernel(
    by_maxval_ptr, by_man_ptr, maxval_ptr, out_man_ptr, man_ptr, programs, rows, parts, BITS: tl.constexpr,
    LEAST: tl.constexpr, EACH_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The partial sums of `_gradients_kernel` -> maxval_ptr ([rows] or [1]) and out_man_ptr; the slope by M comes in
    here."""
    if EACH_ROW:
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        at = by_maxval_ptr + row
        for _ in range(0, parts):
            total += tl.load(at, mask=row < rows, other=0.0)
            at += rows
        tl.store(maxval_ptr + row, total, mask=row < rows)
    else:
        tl.store(maxval_ptr, _sum(by_maxval_ptr, programs, BLOCK))
    if tl.program_id(0) == 0:
        m = _width(man_ptr, BITS, LEAST)
        slope = _LN2 * (_LN2 * _power(BITS - 1 - m) - 1.0 - tl.div_rn(1.0, _power(m + 1) - 1.0))
        tl.store(out_man_ptr, _sum(by_man_ptr, programs, BLOCK) * slope)


@triton.jit(do_not_specialize=["samples", "every"])
def _count_kernel(
    x_ptr, counts_ptr, maxval_ptr, man_ptr, cols, stride_row, stride_col, samples, every, BITS: tl.constexpr,
    LEAST: tl.constexpr, EACH_ROW: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Every `every`-th element of the matrix; without maxval_ptr what is not finite alone."""
    which = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)
    seen = which < samples
    place = which.to(tl.int64) * every
    row = place // cols
    size = tl.abs(tl.load(x_ptr + row * stride_row + place % cols * stride_col, mask=seen, other=0.0).to(tl.float32))
    finite = size < float("inf")
    if maxval_ptr is not None:
        largest, lowest, _, ulp = _layout(man_ptr, BITS, LEAST)
        if EACH_ROW:
            maxval = tl.load(maxval_ptr + row, mask=seen, other=1.0)
        else:
            maxval = tl.load(maxval_ptr)
        lost = _scale(maxval, largest) * (lowest * ulp) * 0.5
        beyond = tl.sum((seen & finite & (size > maxval)).to(tl.int64), 0)
        under = tl.sum((seen & (size > 0) & (size <= lost)).to(tl.int64), 0)
        if beyond > 0:
            tl.atomic_add(counts_ptr + 1, beyond)
        if under > 0:
            tl.atomic_add(counts_ptr + 2, under)
    nonfinite = tl.sum((seen & (finite == 0)).to(tl.int64), 0)
    if tl.program_id(0) == 0:
        tl.atomic_add(counts_ptr, samples.to(tl.int64))
    if nonfinite > 0:
        tl.atomic_add(counts_ptr + 3, nonfinite)


# --- launches -------------------------------------------------------------------------------------------------------

_flexible, _finish, _gradients = Launcher(_flexible_kernel), Launcher(_finish_kernel), Launcher(_gradients_kernel)
_sums, _count = Launcher(_sums_kernel), Launcher(_count_kernel)


class Tile(NamedTuple):
    """A program's part of a matrix."""

    rows: int
    cols: int


def _tile(cols: int, stride_row: int, stride_col: int) -> Tile:
    """Wide along the dimension in which elements lie side by side."""
    if stride_col != 1 and stride_row == 1:
        return Tile(64, 32)
    wide = max(16, min(512, triton.next_power_of_2(cols)))
    return Tile(_TILE // wide, wide)


class _Cut(NamedTuple):
    """How a kernel goes over a matrix: its integers after the pointers, and what stands for them in keys."""

    programs: int
    tile: Tile
    integers: tuple[int, ...]
    key: tuple[Any, ...]


def _cut(programs: int, tile: Tile, integers: tuple[int, ...]) -> _Cut:
    return _Cut(programs, tile, integers, (tile, *map(integer_key, integers)))


@lru_cache(maxsize=4096)
def _cut_of_pass(rows: int, cols: int, stride_row: int, stride_col: int, flat: bool) -> _Cut:
    """flat: rows do not differ, and lie one after another."""
    if flat:
        rows, cols, stride_row, stride_col = 1, rows * cols, rows * cols, 1
        tile = Tile(1, _TILE)
    else:
        tile = _tile(cols, stride_row, stride_col)
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(cols, tile.cols)
    return _cut(programs, tile, (rows, cols, stride_row, stride_col))


@lru_cache(maxsize=4096)
def _cut_of_gradients(
    rows: int, cols: int, grad: tuple[int, int], x: tuple[int, int], out: tuple[int, int], flat: bool
) -> _Cut:
    """Columns are shared between as many programs as a GPU keeps busy, no more."""
    if flat:
        rows, cols = 1, rows * cols
        tile, grad, x, out = Tile(1, _TILE), (cols, 1), (cols, 1), (cols, 1)
    else:
        tile = _tile(cols, *x)
    down, across = triton.cdiv(rows, tile.rows), triton.cdiv(cols, tile.cols)
    turns = triton.cdiv(across, max(1, min(across, _MOST_PROGRAMS // down)))
    parts = triton.cdiv(across, turns)
    return _cut(down * parts, tile, (rows, cols, *grad, *x, *out, parts, turns * tile.cols))


def _aligned(*tensors: Tensor | None) -> tuple[Any, ...]:
    """dtype and alignment, all of a pointer that a kernel is compiled for."""
    return tuple(None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors)


def flexible(x: Tensor, maxval: Tensor, man: Tensor, bits: int, dtype: torch.dtype, *, scaled: bool = True) -> Tensor:
    """q of `x` [R, C] (any strides, not empty) in `dtype`, contiguous; not `scaled`: q / s, s of `scale_of`."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    each_row = maxval.numel() > 1
    cut = _cut_of_pass(*x.shape, *x.stride(), not each_row and x.is_contiguous())
    constants = (bits, least_man(bits), each_row, scaled, *cut.tile)
    pointers = (x, out, maxval, man)
    _flexible(
        (constants, cut.key, _aligned(*pointers)), x.get_device(), (cut.programs, 1, 1),
        (*pointers, *cut.integers, *constants), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def finish(
    sums: Tensor, x_maxval: Tensor, x_man: Tensor, x_bits: int, w_maxval: Tensor, w_man: Tensor, w_bits: int,
    bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """sums [M, N], float32 and contiguous, times s_x times s_w [N] plus bias [N], in `dtype`."""
    rows, cols = sums.shape
    out = torch.empty((rows, cols), dtype=dtype, device=sums.device)
    each_col = w_maxval.numel() > 1
    tile = _tile(cols, cols, 1)
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(cols, tile.cols)
    constants = (x_bits, least_man(x_bits), w_bits, least_man(w_bits), each_col, *tile)
    pointers = (sums, out, x_maxval, x_man, w_maxval, w_man, bias)
    key = (constants, integer_key(rows), integer_key(cols), _aligned(*pointers))
    _finish(
        key, sums.get_device(), (programs, 1, 1), (*pointers, rows, cols, *constants), num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


def gradients(
    grad: Tensor, x: Tensor, maxval: Tensor, man: Tensor, bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.flexible_gradients` of matrices that are not empty."""
    out = torch.empty_like(x, dtype=dtype)
    by_maxval, by_man = (torch.empty(t.shape, dtype=torch.float32, device=x.device) for t in (maxval, man))
    each_row = maxval.numel() > 1
    flat = not each_row and x.is_contiguous() and grad.is_contiguous()
    cut = _cut_of_gradients(*x.shape, grad.stride(), x.stride(), out.stride(), flat)  # type: ignore[arg-type]
    rows, parts = cut.integers[0], cut.integers[-2]
    many = parts * rows if each_row else cut.programs
    partial = torch.empty(cut.programs + many, dtype=torch.float32, device=x.device)
    for_man, for_maxval = partial[: cut.programs], partial[cut.programs :]
    device, shape = x.get_device(), (bits, least_man(bits), each_row)
    constants = (*shape, *cut.tile)
    pointers = (grad, x, out, for_maxval, for_man, maxval, man)
    _gradients(
        (constants, cut.key, _aligned(*pointers)), device, (cut.programs, 1, 1),
        (*pointers, *cut.integers, *constants), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    sums = (for_maxval, for_man, by_maxval, by_man, man)
    _sums(
        (shape, _aligned(*sums)), device, (triton.cdiv(rows, _REDUCED) if each_row else 1, 1, 1),
        (*sums, cut.programs, rows, parts, *shape, _REDUCED), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out, by_maxval, by_man


def count(x: Tensor, maxval: Tensor | None, man: Tensor | None, bits: int, counts: Tensor) -> None:
    """`ops.flexible_count` of a matrix [R, C] that is not empty."""
    n = x.numel()
    every = sample_stride(n)
    samples = triton.cdiv(n, every)
    integers = (x.shape[1], *x.stride())
    constants = (bits, least_man(bits), maxval is not None and maxval.numel() > 1, _SAMPLES)
    pointers = (x, counts, maxval, man)
    _count(
        (constants, tuple(map(integer_key, integers)), _aligned(*pointers)), x.get_device(),
        (triton.cdiv(samples, _SAMPLES), 1, 1), (*pointers, *integers, samples, every, *constants), num_warps=4,
    )  # fmt: skip
