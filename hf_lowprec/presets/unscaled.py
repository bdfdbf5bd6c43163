# SPDX-License-Identifier: Apache-2.0
"""Recipes that change the model instead of scaling its tensors: unit scaling and u-muP."""

from __future__ import annotations

from hf_lowprec.recipe import NONE, Accumulation, Gemm, Quant, Recipe, Transform

_X, _G = Quant(format="e4m3fn", scaling=NONE), Quant(format="e5m2", scaling=NONE)
_UNIT_SCALING = Recipe(
    name="unit-scaling",
    paper="Unit Scaling: Out-of-the-Box Low-Precision Training, arXiv 2303.11257",
    fprop=Gemm(input=_X, weight=_X, accumulation=Accumulation(fast=True)),
    dgrad=Gemm(grad_output=_G, weight=_X),
    wgrad=Gemm(input=_X, grad_output=_G),
    transform=Transform(method="unit"),
)

RECIPES = (
    _UNIT_SCALING,
    Recipe(
        name="u-mup",
        paper="u-muP: The Unit-Scaled Maximal Update Parametrization, arXiv 2407.17465",
        fprop=_UNIT_SCALING.fprop,
        dgrad=_UNIT_SCALING.dgrad,
        wgrad=_UNIT_SCALING.wgrad,
        transform=Transform(method="u-mup", critical=True),
    ),
)
