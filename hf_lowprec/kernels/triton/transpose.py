# SPDX-License-Identifier: Apache-2.0
"""Transpose of one-byte matrices, with zero padding. Moves 2 bytes an element."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowprec.kernels.triton.launch import Launcher, integer_key

_BLOCK = 64


@triton.jit
def _copy_kernel(
    x_ptr, out_ptr, rows, cols, stride_row, stride_col, out_cols, BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr
):
    """out[r, c] = x[r, c] for c < cols, 0 for cols <= c < out_cols. Reads run along rows, writes along columns."""
    r = tl.program_id(0) * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    c = tl.program_id(1) * BLOCK_COL + tl.arange(0, BLOCK_COL)
    source = x_ptr + r[None, :].to(tl.int64) * stride_row + c[:, None].to(tl.int64) * stride_col
    tile = tl.load(source, mask=(r[None, :] < rows) & (c[:, None] < cols), other=0)
    target = out_ptr + r[:, None].to(tl.int64) * out_cols + c[None, :]
    tl.store(target, tl.trans(tile), mask=(r[:, None] < rows) & (c[None, :] < out_cols))


_launch = Launcher(_copy_kernel)


def transpose(x: Tensor, *, pad_to: int = 1) -> Tensor:
    """`x` [R, C] of a one-byte dtype, any strides -> the same values, contiguous [R, C rounded up to `pad_to`].

    Columns beyond C are zero. Meant for a transposed view: x = y.t() of a contiguous y.
    """
    rows, cols = x.shape
    out_cols = -(-cols // pad_to) * pad_to
    out = torch.empty((rows, out_cols), dtype=x.dtype, device=x.device)
    integers = rows, cols, x.stride(0), x.stride(1), out_cols
    key = (x.data_ptr() % 16, *map(integer_key, integers))
    grid = -(-rows // _BLOCK), -(-out_cols // _BLOCK), 1
    args = (x.view(torch.uint8), out.view(torch.uint8), *integers, _BLOCK, _BLOCK)
    _launch(key, x.get_device(), grid, args)
    return out
