# SPDX-License-Identifier: Apache-2.0
"""16 bits: bfloat16, bfloat16 with stochastic rounding, and float16 with a loss scale."""

from __future__ import annotations

from hf_lowprec.recipe import LossScale, Recipe, Rounding, States

RECIPES = (
    Recipe(name="bf16", paper="A Study of BFLOAT16 for Deep Learning Training, arXiv 1905.12322"),
    Recipe(
        name="bf16-sr",
        paper="Revisiting BFloat16 Training, arXiv 2010.06192",
        states=States(update=Rounding(mode="stochastic")),
    ),
    Recipe(
        name="fp16",
        paper="Mixed Precision Training, arXiv 1710.03740",
        base="fp16",
        loss_scale=LossScale(method="dynamic"),
    ),
)
