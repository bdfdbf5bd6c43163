# SPDX-License-Identifier: Apache-2.0
"""A linear layer whose operands have searched or learned ranges (arXiv 2208.09225), straight through its quantisers.

    fprop:  output      = Q(input)    @ Q(weight).T  (+ bias)     in float32, rounded once to the base precision
    dgrad:  grad_input  = grad_output @ Q(weight)                 in the base precision, 0 outside the input's range
    wgrad:  grad_weight = grad_output.T @ Q(input)                likewise, 0 outside the weight's range

and the gradients of ranges and mantissa widths (`numerics.flexible.gradients`) from those of Q(input) and Q(weight).
Nothing quantised is saved: backward quantises again, which gives the same bits. Apart from `functional`, whose linear
knows nothing of ranges that train.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_lowprec.operands import base_dtype, shaped
from hf_lowprec.ops import flexible as ops


class Range(NamedTuple):
    """How one operand is quantised: n = `bits`; maxval 0-dim, or [N, 1] for the rows of a weight [N, K]; man 0-dim."""

    maxval: Tensor
    man: Tensor
    bits: int


class _Call(NamedTuple):
    dtype: torch.dtype
    input_bits: int
    weight_bits: int
    weight_is_kn: bool
    counts: Tensor | None


def flexible_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_range: Range,
    weight_range: Range,
    *,
    weight_is_kn: bool,
    counts: Tensor | None = None,
) -> Tensor:
    """`F.linear` of Q(input) and Q(weight).

    Args:
        input: [..., K]. weight: [N, K], or [K, N] with `weight_is_kn`. bias: [N] or None.
        counts: int64 [4] of grad_output, raised in backward: elements looked at, 0, 0, non-finite.

    Returns: [..., N] in the autocast dtype, or in the input's dtype without autocast.

    Raises RuntimeError: dtypes of input and weight differ outside autocast.
    """
    dtype = base_dtype(input, weight)
    call = _Call(dtype, input_range.bits, weight_range.bits, weight_is_kn, counts)
    out: Tensor = _FlexibleLinear.apply(input, weight, bias, *input_range[:2], *weight_range[:2], call)
    return out


class _FlexibleLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, input_maxval: Tensor, input_man: Tensor,
        weight_maxval: Tensor, weight_man: Tensor, call: _Call,
    ) -> Tensor:  # fmt: skip
        out = ops.flexible_mm(
            input.reshape(-1, input.shape[-1]), input_maxval, input_man, call.input_bits,
            _nk(weight, call), weight_maxval, weight_man, call.weight_bits, bias, dtype=call.dtype,
        )  # fmt: skip
        ctx.save_for_backward(input, weight, input_maxval, input_man, weight_maxval, weight_man)
        ctx.call, ctx.bias_dtype = call, None if bias is None else bias.dtype
        return shaped(out, (*input.shape[:-1], out.shape[1]))

    @staticmethod
    @once_differentiable  # the gradient of a straight-through estimate is none
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, input_maxval, input_man, weight_maxval, weight_man = ctx.saved_tensors
        call: _Call = ctx.call
        needs = ctx.needs_input_grad
        grads = grad_output.reshape(-1, grad_output.shape[-1]).to(call.dtype)
        if call.counts is not None and grads.numel():
            ops.flexible_count(grads, None, None, call.input_bits, call.counts)
        out: list[Tensor | None] = [None] * 8
        x = input.reshape(-1, input.shape[-1])
        w = _nk(weight, call)
        by_input, by_weight = needs[0] or needs[3] or needs[4], needs[1] or needs[5] or needs[6]
        exact = call.dtype == torch.float32  # what gradients are taken of, besides what is multiplied
        qw = ops.flexible(w, weight_maxval, weight_man, call.weight_bits, call.dtype) if by_input else None
        qx = ops.flexible(x, input_maxval, input_man, call.input_bits, call.dtype) if by_weight else None
        if qw is not None:
            grad_x, out[3], out[4] = ops.flexible_gradients(
                grads @ qw, x, input_maxval, input_man, call.input_bits, input.dtype, qx if exact else None
            )
            out[0] = grad_x.reshape(input.shape)
        if qx is not None:
            grad_weight, out[5], out[6] = ops.flexible_gradients(
                grads.t() @ qx, w, weight_maxval, weight_man, call.weight_bits, weight.dtype, qw if exact else None
            )
            out[1] = _nk(grad_weight, call)
        if needs[2]:
            out[2] = grads.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return tuple(grad if need else None for grad, need in zip(out, needs, strict=True))


def count(x: Tensor, used: Range, counts: Tensor) -> None:
    """Raise `counts` (int64 [4]) as `ops.quantize` does: elements looked at, beyond the range, to zero, non-finite."""
    x = x.detach()
    ops.flexible_count(x.reshape(-1, x.shape[-1]), used.maxval, used.man, used.bits, counts)


def _nk(weight: Tensor, call: _Call) -> Tensor:
    return weight.t() if call.weight_is_kn else weight
