# SPDX-License-Identifier: Apache-2.0
"""hf_lowprec::norm and norm_backward on CUDA: kernels for float32, bfloat16 and float16 rows up to
`MAX_WIDTH` wide, plain torch for the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowprec.kernels.triton import norm as triton_norm
from hf_lowprec.ops.norm import default_norm, default_norm_backward
from hf_lowprec.ops.registry import count

_INPUTS = (torch.float32, torch.bfloat16, torch.float16)


def _covered(x: Tensor, weight: Tensor | None, other: Tensor | None) -> bool:
    return (
        x.dtype in _INPUTS
        and (weight is None or weight.dtype in _INPUTS)
        and (other is None or other.dtype in _INPUTS)
        and x.shape[-1] <= triton_norm.MAX_WIDTH
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
    if not _covered(x, weight, bias) or mid not in _INPUTS or out not in _INPUTS:
        return default_norm(x, weight, bias, eps, center, plus_one, mid, out)
    count("fused norm")
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    return triton_norm.norm(x.contiguous(), weight, bias, eps, center, plus_one, mid, out)


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
    if not _covered(x, weight, grad) or mid not in _INPUTS:
        return default_norm_backward(grad, x, stats, weight, plus_one, mid, needs_x, weight_dtype, bias_dtype)
    return triton_norm.norm_backward(
        grad.contiguous(),
        x.contiguous(),
        stats,
        None if weight is None else weight.contiguous(),
        plus_one,
        mid,
        needs_x,
        weight_dtype,
        bias_dtype,
    )
