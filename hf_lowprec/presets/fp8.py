# SPDX-License-Identifier: Apache-2.0
"""FP8 with tensor cores: FP8-LM, TransformerEngine's scalings, Perez et al."""

from __future__ import annotations

from dataclasses import replace
from typing import TypedDict

from hf_lowprec.recipe import (
    NONE,
    Accumulation,
    Communication,
    Gemm,
    LossScale,
    Quant,
    Recipe,
    Rounding,
    Scaling,
    States,
)

_POW2 = Scaling(snap="rceil")
_SPLIT, _FAST = Accumulation(), Accumulation(fast=True)


class _Gemms(TypedDict):
    fprop: Gemm
    dgrad: Gemm
    wgrad: Gemm


def _fp8(forward: Scaling, gradient: Scaling, weight: Scaling) -> _Gemms:
    """E4M3 forward, E5M2 output gradients (arXiv 2209.05433); fast accumulation in fprop only."""
    x, w = Quant(format="e4m3fn", scaling=forward), Quant(format="e4m3fn", scaling=weight)
    g = Quant(format="e5m2", scaling=gradient)
    return {
        "fprop": Gemm(input=x, weight=w, accumulation=_FAST),
        "dgrad": Gemm(grad_output=g, weight=w, accumulation=_SPLIT),
        "wgrad": Gemm(input=x, grad_output=g, accumulation=_SPLIT),
    }


_D16 = Scaling(method="delayed", history=16, snap="rceil")
_D1024 = Scaling(method="delayed", history=1024)
_STATIC = Scaling(method="static", exponent=0)
_SR = Rounding(mode="stochastic")

# The paper's states, scaled by the exact amax: two passes over a tensor. Table 6 calls them #2a.
_PAPER_STATES = States(
    exp_avg=Quant(format="e4m3fn", scaling=_POW2),
    exp_avg_sq=Quant(format="e5m10", scaling=_POW2),
    master=Quant(format="e5m10", scaling=_POW2, rounding=_SR),
)
# What we run. One pass: scales from a bound on the amax (`optim.bounds`). The first moment is rounded stochastically:
# at 4 codes and below, 0.9 m rounds back to m, and momentum that no gradient renews would never decay while its second
# moment does (benchmarks/LOG.md, "Momentum that sticks"). A second moment that is not 0 never becomes 0, where the
# update would divide by eps alone. The master's margin costs FP16 nothing: weights seldom span 2^26.
_PREDICTED = Scaling(method="predicted", snap="rceil")
FP8_LM_STATES = States(
    exp_avg=Quant(format="e4m3fn", scaling=_PREDICTED, rounding=_SR),
    exp_avg_sq=Quant(format="e5m10", scaling=_PREDICTED, nonzero=True),
    master=Quant(format="e5m10", scaling=replace(_PREDICTED, margin=4), rounding=_SR),
    min_numel=4096,
)
# O3: the Parameters of GEMMs hold the master's E4M3 values, with the scale that the GEMM's own cast finds again.
FP8_LM_O3_STATES = replace(FP8_LM_STATES, weight=Quant(format="e4m3fn", scaling=_POW2))
# Ours, as is `saved`. A scale of the whole tensor has to be known before the first code is written, and costs a pass
# over gate and up; that of a tile is found in the registers of the program that writes its codes, 4 bytes for 4096.
_TILES = replace(_POW2, granularity="tile", block=(16, 256))
_FP8_LM = Recipe(
    name="fp8-lm",
    paper="FP8-LM: Training FP8 Large Language Models, arXiv 2310.18313",
    **_fp8(_D16, _D16, _POW2),
    states=FP8_LM_STATES,
    communication=Communication(gradient=Quant(format="e4m3fn", scaling=_POW2), auto_scale=True),
    saved=Quant(format="e4m3fn", scaling=_TILES),
)

RECIPES = (
    _FP8_LM,
    replace(_FP8_LM, name="fp8-lm-o1", states=None),
    replace(_FP8_LM, name="fp8-lm-o3", states=FP8_LM_O3_STATES),
    Recipe(
        name="te-delayed",
        paper="FP8 Formats for Deep Learning, arXiv 2209.05433; TransformerEngine DelayedScaling",
        **_fp8(_D1024, _D1024, _D1024),
    ),
    Recipe(
        name="te-current",
        paper="FP8 Formats for Deep Learning, arXiv 2209.05433; TransformerEngine Float8CurrentScaling",
        **_fp8(Scaling(), Scaling(), Scaling()),
    ),
    Recipe(
        name="fp8-amax",
        paper="Training and inference of LLMs using 8-bit floating point, arXiv 2309.17224, FP8-AMAX",
        **_fp8(_POW2, _POW2, _POW2),
    ),
    Recipe(
        name="fp8-cscale",
        paper="Training and inference of LLMs using 8-bit floating point, arXiv 2309.17224, FP8-CSCALE",
        **_fp8(_STATIC, _STATIC, _STATIC),
        # The paper trains in FP16 with a loss scale; a constant needs one in bf16, too: output gradients of a language
        # model lie below E5M2 (recipes.json, e5m2-unscaled).
        loss_scale=LossScale(method="static", init=1024.0),
    ),
)

# FP8-LM's decoupling study (arXiv 2310.18313, table 6); #4 is refused by States.
DECOUPLING: dict[str, States] = {
    "#0": States(),
    "#1": States(),
    "#2a": _PAPER_STATES,
    "#2b": replace(_PAPER_STATES, master=Quant(format="e8m7", scaling=NONE, rounding=_SR)),
    "#3": replace(_PAPER_STATES, master=Quant(format="e4m3fn", scaling=_POW2, rounding=_SR)),
}
