# SPDX-License-Identifier: Apache-2.0
"""hf_lowprec::quantize on CUDA: fused kernels for per-tensor FP8 and FP16, plain torch on the GPU for the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowprec.formats import get_format
from hf_lowprec.kernels.triton.cast import cast
from hf_lowprec.ops.quantize import default_quantize, parse_quant, sample_stride, storage_dtype
from hf_lowprec.recipe import Quant

_INPUTS = (torch.float32, torch.bfloat16, torch.float16)


def fused(policy: Quant, dtype: torch.dtype) -> bool:
    """Whether the fused kernels cover `policy`."""
    return (
        dtype in _INPUTS
        and policy.format in ("e4m3fn", "e5m2", "e5m10")
        and policy.rounding.mode == "nearest"
        and policy.overflow == "saturate"
        and policy.scaling.granularity == "tensor"
        and policy.scaling.store == "float32"
        and policy.scaling.snap in ("exact", "rceil")
    )


def quantize(
    input: Tensor,
    quant: str,
    scale: Tensor | None,
    fixed: bool,
    amax: Tensor | None,
    counts: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    policy = parse_quant(quant)
    if not fused(policy, input.dtype):
        return default_quantize(input, quant, scale, fixed, amax, counts, seed)
    fmt, scaling = get_format(policy.format), policy.scaling
    given = scale if fixed or scaling.method == "delayed" else None
    if not fixed and scaling.method in ("none", "static"):
        given, fixed = torch.full((), 2.0**scaling.exponent, dtype=torch.float32, device=input.device), True
    qdata, used = cast(
        input.contiguous(),
        storage_dtype(policy.format),
        given,
        fixed=fixed,
        amax=None if fixed else amax,
        counts=counts,
        sample_stride=sample_stride(input.numel()),
        fmt_max=fmt.max,
        tiny=fmt.tiny,
        pow2=scaling.snap == "rceil",
        margin=scaling.margin,
    )
    return qdata, used.clone() if used is scale else used
