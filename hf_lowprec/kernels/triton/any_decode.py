# SPDX-License-Identifier: Apache-2.0
"""Codes of any `Format` and their scales as float32, in one pass: `numerics.dequantize` of a matrix, bit for bit.

What emulated GEMMs read: codes of any strides, so that a transposed operand is decoded as it is read; a scale for the
tensor, per row, per block of k along the rows, or none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowprec.kernels.triton.formats import Constants, covered, decoded, plain
from hf_lowprec.kernels.triton.launch import on_its_device
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


def decodes(quant: Quant) -> bool:
    """Whether the kernel covers a policy."""
    return (
        covered(quant.format) is not None and plain(quant) and quant.scaling.granularity in ("tensor", "row", "block")
    )


@on_its_device
def decode(qdata: Tensor, scale: Tensor | None, quant: Quant) -> Tensor:
    """float32 [R, K], contiguous, of codes [R, K]; times their scale (of `numerics.scale_shape`) unless it is None.

    Columns of `qdata` may be fewer than those that the scale was made for. Needs `decodes(quant)`.
    """
    fmt = covered(quant.format)
    assert fmt is not None
    rows, cols = qdata.shape
    out = torch.empty((rows, cols), dtype=torch.float32, device=qdata.device)
    if not out.numel():
        return out
    per, run = _TENSOR, 1
    if scale is not None and scale.numel() != 1:
        per = _ROW if quant.scaling.granularity == "row" else _BLOCK
        run = quant.scaling.block[0] if per == _BLOCK else 1
        scale = scale.reshape(rows, -1)
    e8m0 = scale is not None and scale.dtype == torch.float8_e8m0fnu
    raw = qdata.view(torch.uint8 if qdata.dtype.itemsize == 1 else torch.int16)
    turned = raw.stride(1) != 1 and raw.stride(0) == 1
    tile = (64, 32) if turned else (8, 256)
    _decode_kernel[(triton.cdiv(rows, tile[0]) * triton.cdiv(cols, tile[1]),)](
        raw, out, scale.view(torch.uint8) if e8m0 and scale is not None else scale, rows, cols, raw.stride(0),
        raw.stride(1), 0 if scale is None or per == _TENSOR else scale.stride(0),
        per, e8m0, run, *Constants.of(fmt)[:6], fmt.inf_code if fmt.has_inf else -1, *tile, num_warps=4,
    )  # fmt: skip
    return out
