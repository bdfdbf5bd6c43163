# SPDX-License-Identifier: Apache-2.0
"""Bounds on what a step writes, known before it: where a state's scale is `predicted`, it comes from one.

A scale from the new values themselves needs two passes over them. With A, what a slot can hold at most
(`states.stored_amax`), and G, the largest magnitude of the gradient as the algorithm uses it, the formula of an update
with magnitudes in place of values gives B; all in float32, in the order written:

    exp_avg (Adam)       B = (A * b1 + G * (1 - b1)) * (1 + 2^-man)               Lion: b2 in place of b1
    exp_avg_sq           B = (A * b2 + (G * (1 - b2)) * G) * (1 + 2^-man)
    momentum_buffer      B = (A * momentum + G * (1 - dampening)) * (1 + 2^-man)  first step: G
    master               B = A + U * 2, U the largest update: lr * K for Adam (`adam_ratio`), lr for Lion,
                         lr * (bound of the direction) for SGD

The factor is for the rounding of what was stored, man the bits of the slot's mantissa; the 2 for that of the moments.
Coupled weight decay adds wd * A_master to G; a Parameter that is its own master keeps no A, so there it is refused.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_lowprec.optim import states as st

if TYPE_CHECKING:
    from hf_lowprec.optim.algorithms import Group, Item, Moments, Scalars


def float32(value: float) -> float:
    """The nearest float32, as a Python float."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def coupled(algorithm: str, group: Group) -> bool:
    """Whether weight decay joins the gradient."""
    return algorithm == "sgd" or (algorithm == "adam" and not group["decoupled_weight_decay"])


def check_predictable(algorithm: str, item: Item) -> None:
    """Raises ValueError where a predicted scale of `item` has no bound under its group's hyperparameters."""
    group, predicted = item.group, item.predicted
    if not predicted:
        return
    if coupled(algorithm, group) and group["weight_decay"] and "master" not in predicted:
        raise ValueError(
            "coupled weight decay adds weights to the gradient, whose largest magnitude a predicted scale then does "
            "not know; use states='fp8-lm-exact', or decoupled decay"
        )
    if algorithm in ("adam", "stable_adam") and "master" in predicted:
        adam_ratio(group["betas"])


def adam_ratio(betas: tuple[float, float]) -> float:
    """K, the largest |m| / sqrt(v) of Adam by Cauchy-Schwarz, at least 1: (1-b1) / sqrt((1-b2) (1 - b1^2 / b2)).

    Raises ValueError where there is none: b1^2 >= b2.
    """
    b1, b2 = betas
    if b1 * b1 >= b2 and b1:
        raise ValueError(
            f"betas {betas}: a predicted scale of the master needs beta1^2 < beta2, without which an update has no "
            "bound; use states='fp8-lm-exact', which scales by the new values themselves"
        )
    return max(1.0, (1 - b1) / math.sqrt((1 - b2) * (1 - (b1 * b1 / b2 if b1 else 0.0))))


def _adam_bounds(a: Callable[[str], Tensor], g: Tensor, s: Scalars, item: Item) -> Moments:
    out = (
        {"update": _like(g, s["lr"] * float32(adam_ratio(item.group["betas"])))} if "master" in item.predicted else {}
    )
    if "exp_avg" in item.predicted:
        out["exp_avg"] = a("exp_avg") * s["b1"] + g * s["omb1"]
    if "exp_avg_sq" in item.predicted:
        out["exp_avg_sq"] = a("exp_avg_sq") * s["b2"] + (g * s["omb2"]) * g
    return out


def _lion_bounds(a: Callable[[str], Tensor], g: Tensor, s: Scalars, item: Item) -> Moments:
    out = {"update": _like(g, s["lr"])}
    if "exp_avg" in item.predicted:
        out["exp_avg"] = a("exp_avg") * s["b2"] + g * s["omb2"]
    return out


def _sgd_bounds(a: Callable[[str], Tensor], g: Tensor, s: Scalars, item: Item) -> Moments:
    if not item.group["momentum"]:
        return {"update": g * s["lr"]}
    m = a("momentum_buffer") * s["momentum"] + g * s["damped"]
    direction = m * s["momentum"] + g if item.group["nesterov"] else m
    return {"momentum_buffer": m, "update": direction * s["lr"]}


def _like(g: Tensor, value: Any) -> Tensor:
    """A float32 0-d tensor, without a copy from the host."""
    return value.to(g) if isinstance(value, Tensor) else torch.full_like(g, value)


_BOUNDS: dict[str, Callable[[Callable[[str], Tensor], Tensor, Scalars, Item], Moments]] = {
    "adam": _adam_bounds,
    "stable_adam": _adam_bounds,
    "lion": _lion_bounds,
    "sgd": _sgd_bounds,
}


def bounds(algorithm: str, item: Item, s: Scalars, g_amax: Tensor) -> Moments:
    """B of every predicted slot, float32 0-d, from the amaxes that the state holds and that of g; no look at a tensor.

    A moment: the formula of its update with magnitudes, times (1 + 2^-mantissa) for the rounding of the state before.
    The master: A + 2 * (largest update), which leaves room for the ratio of rounded moments.
    A moment that the master's bound needs and that is kept in float32 (small tensors, SGD) is looked at.
    """
    predicted = item.predicted
    if not predicted:
        return {}

    def amax(slot: str) -> Tensor:
        quant = item.quant(slot)
        if quant is not None and st.is_predicted(quant):
            return st.stored_amax(item.state, slot, quant)
        value = st.read(item.state, slot, quant, torch.float32, item.param.shape)
        found = value.abs().amax() if value.numel() else value.new_zeros(())
        return found if item.shard is None else item.shard.maximum(found)

    if coupled(algorithm, item.group) and item.group["weight_decay"]:
        g_amax = g_amax + amax("master") * s["wd"]
    out, limits = {}, _BOUNDS[algorithm](amax, g_amax, s, item)
    for slot in predicted:
        if slot == "master":
            out[slot] = amax(slot) + limits["update"] * 2.0
        else:
            quant = item.quant(slot)
            assert quant is not None
            out[slot] = limits[slot] * st.rounding_bound(quant)
    return {slot: value.float() for slot, value in out.items()}
