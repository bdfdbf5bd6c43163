# SPDX-License-Identifier: Apache-2.0
"""OCP Microscaling v1.0 (arXiv 2310.10537): blocks of 32 along each GEMM's own reduction axis, E8M0 scales.

Quantising and transposing do not commute here: fprop and dgrad sum over different axes of a weight, so each has its
own copy, made from the high-precision tensor, and likewise for inputs and output gradients.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from hf_lowprec.recipe import Gemm, Quant, Recipe, Rounding, Scaling

_OCP = "Microscaling Data Formats for Deep Learning, arXiv 2310.10537"
_AWAY, _NEAREST = Rounding(mode="away"), Rounding()


def _mx(name: str, paper: str, fmt: str, weight: str, snap: Literal["ocp", "rceil"], rounding: Rounding) -> Recipe:
    scaling = Scaling(granularity="block", block=(32,), snap=snap, store="e8m0")
    q = Quant(format=fmt, scaling=scaling, rounding=rounding)
    w = replace(q, format=weight)
    return Recipe(
        name=name,
        paper=paper,
        fprop=Gemm(input=q, weight=w),
        dgrad=Gemm(grad_output=q, weight=w),
        wgrad=Gemm(input=q, grad_output=q),
        weight_cache="none",
    )


# OCP's scale rule, and ties away from zero: what the paper's training runs did (microxcaling's `round="nearest"`).
# MXFP8 is NVIDIA's: E4M3 in all six slots, the scale rounded up, so that nothing saturates (arXiv 2506.08027).
RECIPES = (
    _mx("mxfp8", "Recipes for Pre-training LLMs with MXFP8, arXiv 2506.08027", "e4m3fn", "e4m3fn", "rceil", _NEAREST),
    _mx("mxfp6", _OCP, "e3m2", "e3m2", "ocp", _AWAY),
    _mx("mxfp6-e2m3", _OCP, "e2m3", "e2m3", "ocp", _AWAY),
    _mx("mxfp4", _OCP, "e3m2", "e2m1", "ocp", _AWAY),
    _mx("mxint8", _OCP, "e0m7", "e0m7", "ocp", _AWAY),
)
