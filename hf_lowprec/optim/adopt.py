# SPDX-License-Identifier: Apache-2.0
"""Taking over from an optimizer that a script has built already, so that schedulers and hooks notice nothing."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_lowprec.optim import overrides as by_name
from hf_lowprec.optim import states as st
from hf_lowprec.optim.base import LowPrecOptimizer
from hf_lowprec.optim.checkpoints import DROPPED
from hf_lowprec.optim.shards import is_vector
from hf_lowprec.recipe import Quant, States

_ADOPTED_BY = "_hf_lowprec_adopted_by"  # on an adopted optimizer: the one it forwards to


def adopt(
    optimizer: Optimizer, states: str | States, kinds: dict[type[Optimizer], type[LowPrecOptimizer]]
) -> LowPrecOptimizer:
    """`AdamW.adopt`, `SGD.adopt`; see there. kinds: which class takes over from which."""
    if type(optimizer) not in kinds:
        known_kinds = " or ".join(kind.__qualname__ for kind in kinds)
        raise TypeError(f"adopt takes a torch.optim.{known_kinds}, not a {type(optimizer).__qualname__}")
    decoupled = isinstance(optimizer, torch.optim.AdamW)
    stable = kinds[type(optimizer)].algorithm == "stable_adam"
    if stable:
        _check_stable(optimizer, decoupled)
    elif not decoupled and any(group["weight_decay"] for group in optimizer.param_groups):
        states = _exact(states)
    name = st.states_name(states)
    known: LowPrecOptimizer | None = optimizer.__dict__.get(_ADOPTED_BY)
    if known is not None:
        if known.defaults["states"] == name:
            return known
        raise ValueError(
            f"the optimizer was adopted with states {known.defaults['states']}; build a new one for {name}"
        )
    st.check_adoptable(optimizer)
    cls = kinds[type(optimizer)]
    extra = {"states": name, "master": "default", "algorithm": cls.algorithm}
    new = cls.__new__(cls)
    new.__dict__.update(optimizer.__dict__)  # groups and hooks are shared, not copied
    new.__dict__.pop("step", None)  # a scheduler's wrapper, bound to the old optimizer
    new.__dict__.pop("_step_supports_amp_scaling", None)  # a claim of the fused one
    new.nonfinite, new._patterns = "step", ()
    new._begin()
    state, overrides = _taken_over(new, optimizer, extra)

    new._patch_step_function()
    new.state, new.defaults = state, dict(optimizer.defaults)
    for group in (new.defaults, *new.param_groups):
        for key in DROPPED:
            if key != "param_names":
                group.pop(key, None)
        if cls.algorithm == "adam":
            group.setdefault("decoupled_weight_decay", decoupled)
        group.update(extra)
    for group, names in zip(new.param_groups, overrides, strict=True):
        group["overrides"] = names
    new._start_counters()
    _forward(optimizer, new)
    return new


def _check_stable(optimizer: Optimizer, decoupled: bool) -> None:
    """Raises ValueError where the hyperparameters would mean something else to StableAdamW."""
    for group in optimizer.param_groups:
        if group["weight_decay"] and not group.get("decoupled_weight_decay", decoupled):
            raise ValueError(
                "StableAdamW decays weights apart from the gradient, this torch.optim.Adam adds weight_decay="
                f"{group['weight_decay']} to it: use torch.optim.AdamW, or weight_decay=0"
            )
        if not group["eps"] > 0:
            raise ValueError(f"eps: {group['eps']} is not > 0, and StableAdamW divides by its square where v is 0")


def _debiased(held: Mapping[str, Any], betas: tuple[float, float]) -> Mapping[str, Any]:
    """Adam's moments as StableAdamW keeps them: it corrects the betas, so that its moments are the corrected ones."""
    step = float(held.get("step", 0.0))
    if not step:
        return held
    moments = zip(("exp_avg", "exp_avg_sq"), betas, strict=True)
    return {**held, **{name: held[name] / (1 - beta**step) for name, beta in moments}}


def _exact(states: str | States) -> States:
    """Predicted scales as exact ones: coupled weight decay adds to the gradient what no bound knows before the pass.

    Without their margin, which is room for what a bound does not see.
    """
    resolved = st.resolve_states(states)
    changes: dict[str, Any] = {}
    for slot in ("exp_avg", "exp_avg_sq", "master"):
        quant = getattr(resolved, slot)
        if st.is_predicted(quant):
            assert isinstance(quant, Quant)
            changes[slot] = replace(quant, scaling=replace(quant.scaling, method="current", margin=0))
    return replace(resolved, **changes)


def _taken_over(
    new: LowPrecOptimizer, old: Optimizer, extra: dict[str, Any]
) -> tuple[defaultdict[Tensor, dict[str, Tensor]], list[list[str | None]]]:
    """The states that `old` has, quantised, and every group's overrides; changes nothing."""
    state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
    overrides: list[list[str | None]] = []
    for group in old.param_groups:
        planned = {**group, **extra}
        names = planned["overrides"] = by_name.with_marks([None] * len(group["params"]), planned)
        for position, param in enumerate(group["params"]):
            held = old.state.get(param)
            if held:
                stable = new.algorithm == "stable_adam"
                held = _debiased(held, group["betas"]) if stable else new.from_foreign(held)
                by_name.check_marked(planned, names, position)
                states = by_name.of_parameter(planned, position, param.numel(), vector=is_vector(param))
                state[param] = st.from_torch(held, states, param, "adopted optimizer", new.moments(planned, held))
        overrides.append(names)
    return state, overrides


def _forward(old: Optimizer, new: LowPrecOptimizer) -> None:
    """Makes `old` act as `new` for a script that holds on to it, e.g. to save; LR schedulers may know either.

    torch's LRScheduler wraps the `step` of its optimizer to set `_opt_called`, marks it `_wrapped_by_lr_sched`, and
    warns of a wrong call order when either is missing. This step sets the one on both and carries the other.
    """

    @functools.wraps(type(new).step)
    def step(*args: Any, **kwargs: Any) -> Any:
        for optimizer in (old, new):
            optimizer._opt_called = True  # type: ignore[attr-defined]
        return type(new).step(new, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    old.step = new.step = step  # type: ignore[method-assign]
    for name in ("state", "state_dict", "load_state_dict", "zero_grad", "add_param_group"):
        setattr(old, name, getattr(new, name))
    old.__dict__.pop("_step_supports_amp_scaling", None)  # GradScaler unscales for this step, as for any other
    old.__dict__[_ADOPTED_BY] = new
