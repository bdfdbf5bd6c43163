# SPDX-License-Identifier: Apache-2.0
"""What `recipe.States` may say together of how a weight is updated: checks, below `recipe`, so that they take Any."""

from __future__ import annotations

from typing import Any


def check_update(states: Any) -> None:
    """Raises ValueError: `weight`, `arithmetic` and `master` of `recipe.States` that contradict each other."""
    if states.weight is not None:
        _check_weight(states.weight, states.master)
        if hasattr(states.master, "residual") and states.weight.scaling.method == "current":
            raise ValueError("weight: beside a round-off, which the amax does not know, its scale is constant")
    elif hasattr(states.master, "residual"):
        raise ValueError("master: a round-off is that of `weight`, the format of the Parameter")
    if states.arithmetic is not None:
        _check_arithmetic(states)


def _check_weight(quant: Any, master: Any) -> None:
    if master is None or hasattr(master, "bits"):
        raise ValueError("weight: needs a master beside the Parameter: a Quant, 'float32' or a round-off")
    scaling = quant.scaling
    if quant.states_only or scaling.granularity != "tensor" or scaling.method not in ("none", "static", "current"):
        raise ValueError("weight: one scale per tensor, from its own amax or constant; no compand, no nonzero")
    if scaling.method == "current" and scaling.snap == "exact":
        raise ValueError("weight: a Parameter holds values times powers of two exactly; choose snap rceil")
    if quant.rounding.mode == "stochastic":
        raise ValueError("weight: must be found again from the master, so it is not rounded stochastically")


def _check_arithmetic(states: Any) -> None:
    quant = states.arithmetic
    if quant.states_only or quant.scaling.method != "none":
        raise ValueError("arithmetic: results of operations have no scale (method 'none'), no compand, no nonzero")
    if states.weight is not None:
        raise ValueError("arithmetic: not together with `weight`, whose master holds more than either format")
    for slot in ("exp_avg", "master"):
        kept = getattr(states, slot)
        same = getattr(kept, "format", None) == quant.format and kept.scaling.method == "none"
        if not same and kept != "float32" and (slot == "master" or kept is not None):
            raise ValueError(f"{slot}: must hold what arithmetic in {quant.format} gives: unscaled, or in float32")
