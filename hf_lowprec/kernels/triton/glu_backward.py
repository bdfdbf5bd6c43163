# SPDX-License-Identifier: Apache-2.0
"""act(gate) * up, backward: the gradients of gate and up from that of h and what was kept of gate and up, in one pass;
and h itself of what was kept, in another.

Arithmetic is float32, each result is rounded once. Layouts as in `glu.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowprec.kernels.triton.activations import with_slope
from hf_lowprec.kernels.triton.cast import integer_key
from hf_lowprec.kernels.triton.elementwise import pointers, tile_at, within
from hf_lowprec.kernels.triton.glu import _hidden, alignment, flat_tile, layout_of, tiles_of, warps_of
from hf_lowprec.kernels.triton.launch import Launcher


@triton.jit
def _load_scale(scale_ptr, number, TILED: tl.constexpr):
    if TILED:
        scale_ptr += number
    return tl.load(scale_ptr)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["gate_scale_ptr", "up_scale_ptr"])
def _backward_kernel(
    grad_ptr, gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr, grad_gate_ptr, grad_up_ptr, rows, cols, stride,
    grad_stride, ACT: tl.constexpr, TILED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """stride: of gate and up; grad_stride: of grad_gate and grad_up. TILED: each tile has its scales."""
    DTYPE: tl.constexpr = grad_ptr.dtype.element_ty
    GATED: tl.constexpr = up_ptr is not None
    gate_scale = 1.0
    up_scale = 1.0
    number = tl.program_id(0)
    if gate_scale_ptr is not None:
        gate_scale = _load_scale(gate_scale_ptr, number, TILED)
        if GATED:
            up_scale = _load_scale(up_scale_ptr, number, TILED)
    row, col = tile_at(number, cols, ROWS, COLS)
    inside = within(row, col, rows, cols, ROWS, COLS)
    g = tl.load(pointers(grad_ptr, row, col, cols, ROWS, COLS), mask=inside, other=0.0).to(tl.float32)
    x = tl.load(pointers(gate_ptr, row, col, stride, ROWS, COLS), mask=inside, other=0.0).to(tl.float32)
    y, slope = with_slope(x * gate_scale, ACT, DTYPE == tl.float32)
    if GATED:
        u = tl.load(pointers(up_ptr, row, col, stride, ROWS, COLS), mask=inside, other=0.0).to(tl.float32)
        tl.store(pointers(grad_up_ptr, row, col, grad_stride, ROWS, COLS), (g * y).to(DTYPE), mask=inside)
        g = g * (u * up_scale)
    tl.store(pointers(grad_gate_ptr, row, col, grad_stride, ROWS, COLS), (g * slope).to(DTYPE), mask=inside)


_backward = Launcher(_backward_kernel)


def backward(
    grad: Tensor,
    gate: Tensor,
    gate_scale: Tensor | None,
    up: Tensor | None,
    up_scale: Tensor | None,
    act: str,
    grad_gate: Tensor,
    grad_up: Tensor | None,
    tile: tuple[int, int] | None,
) -> None:
    """`ops.glu_backward` on a GPU, for non-empty tensors; with scales, gate and up are codes of float8 or float16.

    tile: (rows, columns) that share a scale; None: all do.
    """
    grad = grad.contiguous()
    # Halves of a packed tensor may be halves on one side only: as a matrix either has its stride.
    gate, up, layout = layout_of(gate, up, matrix=tile is not None or not grad_gate.is_contiguous())
    rows, cols, stride = layout
    grad_stride = cols if rows == 1 and grad_gate.is_contiguous() else grad_gate.view(-1, cols).stride(0)
    tiled, tile = tile is not None, tile or flat_tile(layout)
    key = (
        act, grad.dtype, gate.dtype, *alignment(grad, gate, up, grad_gate, grad_up), gate_scale is None, tiled, tile,
        integer_key(cols), integer_key(stride), integer_key(grad_stride),
    )  # fmt: skip
    args = (
        grad, gate, up, gate_scale, up_scale, grad_gate, grad_up, rows, cols, stride, grad_stride, act, tiled,
        *tile,
    )  # fmt: skip
    _backward(key, grad.get_device(), (tiles_of(rows, cols, tile), 1, 1), args, num_warps=warps_of(tile, tiled))


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["gate_scale_ptr", "up_scale_ptr"])
def _again_kernel(
    gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr, h_ptr, rows, cols, stride,
    ACT: tl.constexpr, TILED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = h_ptr.dtype.element_ty
    GATED: tl.constexpr = up_ptr is not None
    number = tl.program_id(0)
    row, col = tile_at(number, cols, ROWS, COLS)
    inside = within(row, col, rows, cols, ROWS, COLS)
    x = tl.load(pointers(gate_ptr, row, col, stride, ROWS, COLS), mask=inside, other=0.0).to(tl.float32)
    x = x * _load_scale(gate_scale_ptr, number, TILED)
    u = x
    if GATED:
        u = tl.load(pointers(up_ptr, row, col, stride, ROWS, COLS), mask=inside, other=0.0).to(tl.float32)
        u = u * _load_scale(up_scale_ptr, number, TILED)
    h = _hidden(x, u, inside, ACT, GATED, DTYPE)
    tl.store(pointers(h_ptr, row, col, cols, ROWS, COLS), h.to(DTYPE), mask=inside)


_again = Launcher(_again_kernel)


def again(
    gate: Tensor,
    gate_scale: Tensor,
    up: Tensor | None,
    up_scale: Tensor | None,
    act: str,
    dtype: torch.dtype,
    tile: tuple[int, int] | None,
) -> Tensor:
    """`ops.glu_again` on a GPU, of codes of float8 or float16, not empty; tile as in `backward`."""
    h = torch.empty(gate.shape, dtype=dtype, device=gate.device)
    gate, up, layout = layout_of(gate, up, matrix=tile is not None)
    rows, cols, stride = layout
    tiled, tile = tile is not None, tile or flat_tile(layout)
    key = (act, dtype, gate.dtype, *alignment(gate, up, h), tiled, tile, integer_key(cols), integer_key(stride))
    args = (gate, up, gate_scale, up_scale, h, rows, cols, stride, act, tiled, *tile)
    _again(key, gate.get_device(), (tiles_of(rows, cols, tile), 1, 1), args, num_warps=warps_of(tile, tiled))
    return h
