# SPDX-License-Identifier: Apache-2.0
"""hf_lowprec::norm and norm_backward: RMSNorm and LayerNorm over the last axis, one pass each way.

Forward keeps nothing for backward but what it returns as `stats`: one or two float32 numbers a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowprec.numerics import norm as truth
from hf_lowprec.ops.registry import LIBRARY, direct

LIBRARY.define(
    "norm(Tensor x, Tensor? weight, Tensor? bias, float eps, bool center, bool plus_one, ScalarType mid,"
    " ScalarType out) -> (Tensor y, Tensor stats)"
)
LIBRARY.define(
    "norm_backward(Tensor grad, Tensor x, Tensor stats, Tensor? weight, bool plus_one, ScalarType mid,"
    " bool needs_x, ScalarType? weight_dtype, ScalarType? bias_dtype)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
)


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    plus_one: bool,
    mid: torch.dtype,
    out: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """y = out(mid((x - mean) * rstd) * w + bias) of x [..., C]; float32 between the two roundings.

    Args:
        center: subtract the mean (LayerNorm), else not (RMSNorm).
        plus_one: w = 1 + weight (Gemma), else weight. Without a weight w is 1.
        mid: what the normalised value is rounded to before the weight multiplies it; float32: not at all.
        out: dtype of y.

    Returns: y, and stats, float32 [1, rows] (rstd) or [2, rows] (rstd, mean).
    """
    kernel = direct("norm", x) or torch.ops.hf_lowprec.norm
    y, stats = kernel(x, weight, bias, eps, center, plus_one, mid, out)
    return y, stats


def norm_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    plus_one: bool,
    mid: torch.dtype,
    needs_x: bool,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `norm`; those of weight and bias are float32 sums, rounded once, in an order that never changes.

    Args:
        needs_x, weight_dtype, bias_dtype: what is wanted, in which dtype (grad_x has x's); the rest is empty.
    """
    kernel = direct("norm_backward", grad) or torch.ops.hf_lowprec.norm_backward
    grads: tuple[Tensor, Tensor, Tensor] = kernel(
        grad, x, stats, weight, plus_one, mid, needs_x, weight_dtype, bias_dtype
    )
    return grads


def default_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    plus_one: bool,
    mid: torch.dtype,
    out: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return truth.norm(x, weight, bias, eps=eps, center=center, plus_one=plus_one, mid=mid, out=out)


def default_norm_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    plus_one: bool,
    mid: torch.dtype,
    needs_x: bool,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weight, grad_bias = truth.norm_backward(grad, x, stats, weight, plus_one=plus_one, mid=mid)
    return (
        grad_x.to(x.dtype) if needs_x else x.new_empty(0),
        grad_weight.to(weight_dtype) if weight_dtype is not None else x.new_empty(0),
        grad_bias.to(bias_dtype) if bias_dtype is not None else x.new_empty(0),
    )


LIBRARY.impl("norm", default_norm, "CompositeExplicitAutograd")
LIBRARY.impl("norm_backward", default_norm_backward, "CompositeExplicitAutograd")


def _fake_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    plus_one: bool,
    mid: torch.dtype,
    out: torch.dtype,
) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1]).shape[0]
    return x.new_empty(x.shape, dtype=out), x.new_empty((2 if center else 1, rows), dtype=torch.float32)


def _fake_norm_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    plus_one: bool,
    mid: torch.dtype,
    needs_x: bool,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs_x else 0),
        x.new_empty(0) if weight_dtype is None else x.new_empty(x.shape[-1], dtype=weight_dtype),
        x.new_empty(0) if bias_dtype is None else x.new_empty(x.shape[-1], dtype=bias_dtype),
    )


torch.library.register_fake("hf_lowprec::norm", _fake_norm)
torch.library.register_fake("hf_lowprec::norm_backward", _fake_norm_backward)
