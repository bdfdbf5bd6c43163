# SPDX-License-Identifier: Apache-2.0
"""hf_lowprec::quantize on CUDA: fused kernels for per-tensor FP8 and FP16, plain torch on the GPU for the rest."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowprec.formats import get_format
from hf_lowprec.kernels.triton.cast import FormatConstants, cast
from hf_lowprec.kernels.triton.cast import current_scale as triton_current_scale
from hf_lowprec.ops.quantize import (
    default_current_scale,
    default_quantize,
    parse_quant,
    sample_stride,
    storage_dtype,
)

_INPUTS = (torch.float32, torch.bfloat16, torch.float16)


class _Plan(NamedTuple):
    """How a policy runs in the fused kernels; parsed once per policy, not once per call."""

    dtype: torch.dtype
    constants: FormatConstants
    method: str
    constant_scale: float


@cache
def _plan(quant: str) -> _Plan | None:
    """None: the fused kernels do not cover the policy."""
    policy = parse_quant(quant)
    scaling = policy.scaling
    covered = (
        policy.format in ("e4m3fn", "e5m2", "e5m10")
        and policy.rounding.mode == "nearest"
        and policy.overflow == "saturate"
        and scaling.granularity == "tensor"
        and scaling.store == "float32"
        and scaling.snap in ("exact", "rceil")
    )
    if not covered:
        return None
    fmt = get_format(policy.format)
    constants = FormatConstants.of(fmt.max, fmt.tiny, scaling.margin, scaling.snap == "rceil")
    return _Plan(storage_dtype(policy.format), constants, scaling.method, 2.0**scaling.exponent)


def quantize(
    input: Tensor,
    quant: str,
    scale: Tensor | None,
    fixed: bool,
    amax: Tensor | None,
    counts: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    plan = _plan(quant)
    if plan is None or input.dtype not in _INPUTS:
        return default_quantize(input, quant, scale, fixed, amax, counts, seed)
    given = scale if fixed or plan.method == "delayed" else None
    if not fixed and plan.method in ("none", "static"):
        given, fixed = torch.full((), plan.constant_scale, dtype=torch.float32, device=input.device), True
    qdata, used = cast(
        input.contiguous(),
        plan.dtype,
        given,
        plan.constants,
        fixed=fixed,
        amax=None if fixed else amax,
        counts=counts,
        sample_stride=sample_stride(input.numel()),
    )
    return qdata, used.clone() if used is scale else used


def current_scale(input: Tensor, quant: str) -> Tensor:
    plan = _plan(quant)
    if plan is None or input.dtype not in _INPUTS or plan.method in ("none", "static"):
        return default_current_scale(input, quant)
    return triton_current_scale(input.contiguous(), plan.constants)
