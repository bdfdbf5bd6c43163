# SPDX-License-Identifier: Apache-2.0
"""Sums narrower than float32: chunked accumulation, hybrid FP8, stochastic accumulators."""

from __future__ import annotations

from hf_lowprec.recipe import NONE, Quant, Recipe, Rounding, RoundOff, States

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

RECIPES: tuple[Recipe, ...] = ()
