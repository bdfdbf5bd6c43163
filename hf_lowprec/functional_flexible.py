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

from hf_lowprec.numerics.flexible import flexible, gradients, layout, scale_of
from hf_lowprec.operands import base_dtype, shaped
from hf_lowprec.ops.quantize import sample_stride


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
        qx = flexible(input.reshape(-1, input.shape[-1]), input_maxval, input_man, call.input_bits)
        qw = flexible(_nk(weight, call), weight_maxval, weight_man, call.weight_bits)
        with torch.autocast(input.device.type, enabled=False):
            out = qx @ qw.t()
            if bias is not None:
                out = out + bias.float()
        ctx.save_for_backward(input, weight, input_maxval, input_man, weight_maxval, weight_man)
        ctx.call, ctx.bias_dtype = call, None if bias is None else bias.dtype
        return shaped(out.to(call.dtype), (*input.shape[:-1], qw.shape[0]))

    @staticmethod
    @once_differentiable  # the gradient of a straight-through estimate is none
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, input_maxval, input_man, weight_maxval, weight_man = ctx.saved_tensors
        call: _Call = ctx.call
        needs = ctx.needs_input_grad
        grads = grad_output.reshape(-1, grad_output.shape[-1]).to(call.dtype)
        if call.counts is not None and grads.numel():
            _count(grads, None, None, call.counts)
        out: list[Tensor | None] = [None] * 8
        x = input.reshape(-1, input.shape[-1])
        w = _nk(weight, call)
        qx = flexible(x, input_maxval, input_man, call.input_bits)
        qw = flexible(w, weight_maxval, weight_man, call.weight_bits)
        if needs[0] or needs[3] or needs[4]:
            found = gradients(grads @ qw.to(call.dtype), x, qx, input_maxval, input_man, call.input_bits)
            out[0] = found.x.to(input.dtype).reshape(input.shape)
            out[3], out[4] = found.maxval.to(input_maxval.dtype), found.man.to(input_man.dtype)
        if needs[1] or needs[5] or needs[6]:
            found = gradients(grads.t() @ qx.to(call.dtype), w, qw, weight_maxval, weight_man, call.weight_bits)
            out[1] = _nk(found.x, call).to(weight.dtype)
            out[5], out[6] = found.maxval.to(weight_maxval.dtype), found.man.to(weight_man.dtype)
        if needs[2]:
            out[2] = grads.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return tuple(grad if need else None for grad, need in zip(out, needs, strict=True))


def count(x: Tensor, used: Range, counts: Tensor) -> None:
    """Raise `counts` (int64 [4]) as `ops.quantize` does: elements looked at, beyond the range, to zero, non-finite."""
    x = x.detach()
    rows = x.reshape(-1, x.shape[-1])
    if not rows.numel():
        return
    form = layout(used.man, used.bits)
    step = form.lowest_binade * (form.magic / (1.5 * 2.0**23))  # of the lowest binade: the smallest value
    maxval = used.maxval.detach().expand(rows.shape[0], 1)
    tiny = (scale_of(used.maxval, form) * step).expand(rows.shape[0], 1)
    row = torch.arange(0, rows.numel(), sample_stride(rows.numel()), device=x.device) // rows.shape[1]
    _count(rows, maxval[row, 0], tiny[row, 0] / 2, counts)


def _count(rows: Tensor, most: Tensor | None, lost: Tensor | None, counts: Tensor) -> None:
    """most, lost: of each element looked at, the largest magnitude that fits and the largest that becomes 0."""
    size = rows.reshape(-1)[:: sample_stride(rows.numel())].float().abs()
    finite = size.isfinite()
    nothing = torch.zeros((), dtype=torch.int64, device=rows.device)
    seen = [
        torch.full((), size.numel(), dtype=torch.int64, device=rows.device),
        nothing if most is None else ((size > most) & finite).sum(),
        nothing if lost is None else ((size > 0) & (size <= lost)).sum(),
        (~finite).sum(),
    ]
    counts.add_(torch.stack(seen))


def _nk(weight: Tensor, call: _Call) -> Tensor:
    return weight.t() if call.weight_is_kn else weight
