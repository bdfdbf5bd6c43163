# SPDX-License-Identifier: Apache-2.0
"""Sums narrower than float32: chunked accumulation, hybrid FP8, stochastic accumulators."""

from __future__ import annotations

from hf_lowprec.recipe import NONE, Accumulation, Gemm, LossScale, Quant, Recipe, Rounding, RoundOff, States

_SR = Rounding(mode="stochastic")
_FP16 = Quant(format="e6m9", scaling=NONE)
# Wang et al. 2018: momentum and master in 1-6-9, each of SGD's three AXPYs rounded stochastically.
WANG_STATES = States(exp_avg=_FP16, master=_FP16, arithmetic=Quant(format="e6m9", scaling=NONE, rounding=_SR))
# HFP8 (Sun et al. 2019): weights in 1-4-3, and what that rounds away in 1-6-9. Stochastically: to nearest, steps of
# 1e-5 |w| lose 70 % of their way, and of 1e-6 |w| 97 % (tests/optim/test_weight_formats.py).
HFP8_STATES = States(
    weight=Quant(format="e4m3b11fnuz", scaling=NONE),
    master=RoundOff(residual=Quant(format="e6m9", scaling=NONE, rounding=_SR)),
)

_E5M2 = Quant(format="e5m2", scaling=NONE)
# HFP8's forward format, with ml_dtypes' NaN in place of -0: without one, nothing could say that an element overflowed.
_E4M3 = Quant(format="e4m3b11fnuz", scaling=NONE)
# The automatic loss scale must hear that a gradient left the format: saturated ones would let it grow for ever.
_E5M2_INF = Quant(format="e5m2", scaling=NONE, overflow="inf")
_CHUNKED = Accumulation(format="e6m9", chunk=64, outer="e6m9")
_SR13 = Accumulation(format="e6m5", rounding=Rounding(mode="stochastic", bits=13))


def _gemms(forward: Quant, gradient: Quant, sums: Accumulation) -> dict[str, Gemm]:
    return {
        "fprop": Gemm(input=forward, weight=forward, accumulation=sums),
        "dgrad": Gemm(grad_output=gradient, weight=forward, accumulation=sums),
        "wgrad": Gemm(input=forward, grad_output=gradient, accumulation=sums),
    }


RECIPES = (
    Recipe(
        name="hfp8",
        paper="Hybrid 8-bit Floating Point (HFP8) Training and Inference for Deep Neural Networks, NeurIPS 2019",
        **_gemms(_E4M3, _E5M2_INF, _CHUNKED),  # type: ignore[arg-type]
        states=HFP8_STATES,
        loss_scale=LossScale(method="dynamic"),
    ),
    Recipe(
        name="fp8-chunked",
        paper="Training Deep Neural Networks with 8-bit Floating Point Numbers, arXiv 1812.08011",
        **_gemms(_E5M2, _E5M2, _CHUNKED),  # type: ignore[arg-type]
        states=WANG_STATES,
        loss_scale=LossScale(method="static", init=1000.0),
    ),
    Recipe(
        name="sr-mac",
        paper="A Stochastic Rounding-Enabled Low-Precision Floating-Point MAC for DNN Training, arXiv 2404.14010",
        **_gemms(_E5M2, _E5M2_INF, _SR13),  # type: ignore[arg-type]
        # Without one nothing trains: output gradients fall below E5M2 (benchmarks/results/recipes.json,
        # e5m2-unscaled). The authors' library (mptorch) hands its trainer a GradScaler.
        loss_scale=LossScale(method="dynamic"),
    ),
)
