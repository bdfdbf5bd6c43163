# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings of q and k in one kernel each way, by a rule that has the bits of a model's own function.

In eager mode the function is some 14 kernels forward and 20 backward. What is saved for backward is cos and sin, which
all layers share.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowprec import kernels as _kernels  # noqa: F401  (registers the CUDA implementations of `ops`)
from hf_lowprec.functional import applier, first_order
from hf_lowprec.ops.rotary import rotary, rotary_backward


class Rule(NamedTuple):
    """How q and k of one dtype are turned; arguments of the operators.

    dim: of heads. mid, out: what products and sums are rounded to, and the dtype of the result. grad_mid: what the
    gradients' terms are rounded to. joined: columns beyond those of cos pass through.
    """

    dim: int
    mid: torch.dtype
    out: torch.dtype
    grad_mid: torch.dtype
    joined: bool


def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """q and k rotated; tensors whose shapes `ops.rotary.fits`, on one device, cos and sin without gradients."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        out: tuple[Tensor, Tensor] = _apply(q, k, cos, sin, rule)
        return out
    return rotary(q, k, cos, sin, rule.dim, rule.mid, rule.out, rule.joined)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        ctx.call = rule.dim, rule.grad_mid, q.dtype, q.stride(), k.stride()
        turned = rotary(q, k, cos, sin, rule.dim, rule.mid, rule.out, rule.joined)
        needs_q, needs_k = ctx.needs_input_grad[:2]
        if not (needs_q and needs_k):
            ctx.mark_non_differentiable(turned[0] if needs_k else turned[1])
        return turned

    @staticmethod
    @first_order  # as the linear layers: no second derivatives
    def backward(ctx: Any, grad_q: Tensor | None, grad_k: Tensor | None) -> tuple[Tensor | None, ...]:
        needs_q, needs_k = ctx.needs_input_grad[:2]
        wants_q, wants_k = needs_q and grad_q is not None, needs_k and grad_k is not None
        if not (wants_q or wants_k):
            return None, None, None, None, None
        cos, sin = ctx.saved_tensors
        q, k = rotary_backward(grad_q if wants_q else None, grad_k if wants_k else None, cos, sin, *ctx.call)
        return q if wants_q else None, k if wants_k else None, None, None, None


_apply = applier(_Rotary)
