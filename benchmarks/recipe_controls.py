# SPDX-License-Identifier: Apache-2.0
"""Negative controls of `recipe_study.py`: what the papers say degrades, and the mechanism at kernel level.

    e5m2-unscaled            every slot E5M2, no scale, no loss scale: output gradients underflow (arXiv 2209.05433)
    e6m9-unchunked           arXiv 1812.08011 without its chunks: a 1-6-9 sum, rounded to nearest, stops growing
    e6m5-nearest             arXiv 2404.14010 without stochastic rounding: the same, from 64 equal terms on
    e4m3-second-moment       FP8-LM's table 6, variant #4: a second moment in E4M3 with one scale per tensor

A language model of a few hundred steps need not show the damage; `mechanism` has the cause of each in numbers.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_lowprec.monitor import slot_error
from hf_lowprec.numerics import quantize_dequantize, round_to_format
from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import NONE, Accumulation, Gemm, Quant, Recipe, RecipeError, Rounding, Scaling

CONTROLS = ("e5m2-unscaled", "e6m9-unchunked", "e6m5-nearest", "e4m3-second-moment")
_E5M2 = Quant(format="e5m2", scaling=NONE)
_NEAREST = Rounding()
_SECOND_MOMENT = Quant(format="e4m3fn", scaling=Scaling(snap="rceil"))


def unscaled(name: str, sums: Accumulation | None = None, like: Recipe | None = None) -> Recipe:
    """E5M2 in every slot without a scale; the rest from `like`."""
    sums = sums or Accumulation()
    return replace(
        like or Recipe(name=name),
        name=name,
        fprop=Gemm(input=_E5M2, weight=_E5M2, accumulation=sums),
        dgrad=Gemm(grad_output=_E5M2, weight=_E5M2, accumulation=sums),
        wgrad=Gemm(input=_E5M2, grad_output=_E5M2, accumulation=sums),
    )


def control_recipe(name: str) -> Recipe | None:
    """The control as a recipe: its model's, but for the one thing that is left out. None: no recipe can say it."""
    if name == "e5m2-unscaled":
        return unscaled(name)
    if name == "e6m9-unchunked":
        return unscaled(name, Accumulation(format="e6m9"), PRESETS.get("fp8-chunked"))
    if name == "e6m5-nearest":
        return unscaled(name, Accumulation(format="e6m5"), PRESETS.get("sr-mac"))
    return None


def refused_states() -> str:
    """Why States has no second moment of that kind, in its own words. Raises AssertionError if it takes it now."""
    try:
        Recipe.from_dict({"name": "x", "states": {"exp_avg_sq": {"format": "e4m3fn", "scaling": {"snap": "rceil"}}}})
    except RecipeError as error:
        return str(error)
    raise AssertionError("States takes an 8-bit second moment with one scale per tensor")


class RoundedSecondMoment(torch.optim.AdamW):
    """torch's AdamW whose second moment lives in E4M3 with one scale per tensor. `States` refuses to be told so."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for state in self.state.values():
            state["exp_avg_sq"].copy_(quantize_dequantize(state["exp_avg_sq"], _SECOND_MOMENT))
        return loss


def control_optimizer(name: str, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """`optimizer` with what the control changes about it."""
    if name != "e4m3-second-moment":
        return optimizer
    keys = ("params", "weight_decay", "lr", "betas", "eps")
    return RoundedSecondMoment([{key: group[key] for key in keys} for group in optimizer.param_groups])


# --- mechanism ------------------------------------------------------------------------------------------------------


@functools.cache
def mechanism(length: int = 4096) -> dict[str, dict[str, float]]:
    """Each control's cause in numbers, through `numerics` alone; the second number is what the paper does instead.

    e5m2-unscaled: share of output gradients of RMS 1e-6 that become zero, without and with the tensor's own scale.
    e6m9-unchunked, e6m5-nearest: mean relative error of sums of `length` products of uniform E5M2 numbers.
    e4m3-second-moment: share of second moments that become zero, of gradients that span three decades (the update then
        divides by eps alone), with one scale per tensor in E4M3 and in FP16.
    """
    draw = torch.Generator().manual_seed(0)
    g = 1e-6 * torch.randn(1 << 16, generator=draw)
    # Log-normal: about three decades between the 7th and the 93rd percentile.
    spread = torch.exp(2.3 * torch.randn(1 << 16, generator=draw))
    v = (1e-4 * spread * torch.randn(1 << 16, generator=draw)).square()
    products = torch.ones(64, length)
    for _ in range(2):
        products *= round_to_format(torch.rand(64, length, generator=draw), "e5m2")
    chunked = torch.stack([added(chunk, "e6m9") for chunk in products.split(64, 1)], 1)
    rceil, sr13 = Scaling(snap="rceil"), Rounding(mode="stochastic", bits=13)
    return {
        "e5m2-unscaled": {
            "without a scale": slot_error(g, _E5M2).underflow,
            "with the tensor's own": slot_error(g, Quant(format="e5m2", scaling=rceil)).underflow,
        },
        "e6m9-unchunked": {
            "one sum": sum_error(added(products, "e6m9"), products),
            "chunks of 64": sum_error(added(chunked, "e6m9"), products),
        },
        "e6m5-nearest": {
            "nearest": sum_error(added(products, "e6m5"), products),
            "stochastic, 13 bits": sum_error(added(products, "e6m5", sr13), products),
        },
        "e4m3-second-moment": {
            "e4m3fn": slot_error(v, _SECOND_MOMENT).underflow,
            "e5m10": slot_error(v, Quant(format="e5m10", scaling=rceil)).underflow,
        },
    }


def added(products: Tensor, fmt: str, rounding: Rounding = _NEAREST) -> Tensor:
    """Sums over the last axis, one product after the other, every addition rounded to `fmt`."""
    total = torch.zeros(products.shape[:-1])
    for i, product in enumerate(products.unbind(-1)):
        total = round_to_format(total + product, fmt, rounding, seed=i if rounding.mode == "stochastic" else None)
    return total


def sum_error(sums: Tensor, products: Tensor) -> float:
    exact = products.double().sum(-1)
    return float(((sums - exact).abs() / exact).mean())
