# SPDX-License-Identifier: Apache-2.0
"""Codes of any `Format` and their scales as numbers, in one pass: `numerics.dequantize` of a matrix, bit for bit.

What emulated GEMMs read: codes of any strides, so that a transposed operand is decoded as it is read; a scale for the
tensor, per row, per block of k along the rows, or none. In float32, or in bfloat16 where that holds the same numbers,
so that tensor cores can multiply them.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowprec.kernels.triton.formats import Constants, covered, decoded, plain
from hf_lowprec.kernels.triton.launch import Launcher
from hf_lowprec.recipe import Quant

_TENSOR, _ROW, _BLOCK = 0, 1, 2


@triton.jit
def _decode_kernel(
    raw_ptr, out_ptr, scale_ptr, rows, cols, stride_row, stride_col, stride_scale,
    PER: tl.constexpr, E8M0: tl.constexpr, RUN: tl.constexpr, MAN: tl.constexpr, EMIN: tl.constexpr,
    MAX_CODE: tl.constexpr, SUBNORMAL: tl.constexpr, SIGN: tl.constexpr, NAN_CODE: tl.constexpr,
    INF_CODE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out [rows, cols] contiguous = value * scale; without scale_ptr the values alone."""
    across = tl.cdiv(cols, COLS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    col = (tl.program_id(0) % across).to(tl.int64) * COLS + tl.arange(0, COLS).to(tl.int64)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    at = row[:, None] * stride_row + col[None, :] * stride_col
    raw = tl.load(raw_ptr + at, mask=inside, other=0).to(tl.int32) & (0xFFFF if SIGN > 128 else 0xFF)
    value, finite = decoded(raw, MAN, EMIN, MAX_CODE, SUBNORMAL, SIGN, NAN_CODE)
    special = float("nan")
    if INF_CODE >= 0:
        infinite = tl.where((raw & SIGN) != 0, -float("inf"), float("inf"))
        special = tl.where((raw & (SIGN - 1)) == INF_CODE, infinite, float("nan"))
    value = tl.where(finite, value, special)
    if scale_ptr is not None:
        if PER == 0:
            scale = tl.load(scale_ptr)
        elif PER == 1:
            scale = tl.load(scale_ptr + row * stride_scale, mask=row < rows, other=0)[:, None]
        else:
            scale = tl.load(scale_ptr + row[:, None] * stride_scale + (col // RUN)[None, :], mask=inside, other=0)
        if E8M0:
            exponent = scale.to(tl.int32)
            bits = tl.where(exponent == 0, 1 << 22, tl.where(exponent == 255, 0x7FC00000, exponent << 23))
            scale = bits.to(tl.float32, bitcast=True)
        value = value * scale
    tl.store(out_ptr + row[:, None] * cols + col[None, :], value, mask=inside)


_decode = Launcher(_decode_kernel)


@cache
def decodes(quant: Quant) -> bool:
    """Whether the kernel covers a policy."""
    return (
        covered(quant.format) is not None and plain(quant) and quant.scaling.granularity in ("tensor", "row", "block")
    )


@cache
def fits_bfloat16(quant: Quant, scaled: bool) -> bool:
    """Whether bfloat16 holds all values of a policy, times their scales if `scaled`; needs `decodes(quant)`.

    A significand of 8 bits does; a scale must be a power of two then. Only what is no multiple of 2^-133, bfloat16's
    least subnormal, is rounded: small codes under scales near 2^-126.
    """
    fmt = covered(quant.format)
    assert fmt is not None
    bare = fmt.man <= 7 and fmt.emax <= 127 and fmt.emin - fmt.man >= -133
    s = quant.scaling
    if s.method == "static":  # always a power of two
        return bare and (not scaled or abs(s.exponent) <= 64)
    return bare and (not scaled or s.store == "e8m0" or s.snap != "exact" or s.method == "none")


def decode(qdata: Tensor, scale: Tensor | None, quant: Quant, dtype: torch.dtype = torch.float32) -> Tensor:
    """[R, K], contiguous, of codes [R, K]; times their scale (of `numerics.scale_shape`) unless it is None.

    Columns of `qdata` may be fewer than those that the scale was made for. Needs `decodes(quant)`. dtype: float32, or
    bfloat16, to whose nearest values the numbers are rounded.
    """
    rows, cols = qdata.shape
    out = torch.empty((rows, cols), dtype=dtype, device=qdata.device)
    if not out.numel():
        return out
    raw = qdata.view(torch.uint8 if qdata.dtype.itemsize == 1 else torch.int16)
    e8m0, stride, many = False, 0, scale is not None and scale.numel() != 1
    if scale is not None:
        if many:
            scale = scale.reshape(rows, -1).contiguous()
            stride = scale.stride(0)
        e8m0 = scale.dtype == torch.float8_e8m0fnu
        if e8m0:
            scale = scale.view(torch.uint8)
    cut = _cut(quant, rows, cols, *raw.stride(), stride, many, e8m0)
    aligned = None if scale is None else (scale.dtype, scale.data_ptr() % 16)
    key = (cut, dtype, raw.data_ptr() % 16, out.data_ptr() % 16, aligned)
    arguments = (raw, out, scale, rows, cols, *cut.strides, *cut.constants)
    _decode(key, qdata.get_device(), (cut.programs, 1, 1), arguments, num_warps=4)
    return out


class _Cut:
    """How a matrix of codes is cut into programs, and what the kernel is compiled for; one object each."""

    def __init__(self, programs: int, strides: tuple[int, int, int], constants: tuple[Any, ...]) -> None:
        self.programs, self.strides, self.constants = programs, strides, constants


@lru_cache(maxsize=4096)
def _cut(
    quant: Quant, rows: int, cols: int, stride_row: int, stride_col: int, stride_scale: int, many: bool, e8m0: bool
) -> _Cut:
    fmt = covered(quant.format)
    assert fmt is not None
    per, run = _TENSOR, 1
    if many:
        per = _ROW if quant.scaling.granularity == "row" else _BLOCK
        run = quant.scaling.block[0] if per == _BLOCK else 1
    tile = (64, 32) if stride_col != 1 and stride_row == 1 else (8, 256)
    codes = (*Constants.of(fmt)[:6], fmt.inf_code if fmt.has_inf else -1)
    programs = triton.cdiv(rows, tile[0]) * triton.cdiv(cols, tile[1])
    return _Cut(programs, (stride_row, stride_col, stride_scale), (per, e8m0, run, *codes, *tile))
