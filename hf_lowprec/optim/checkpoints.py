# SPDX-License-Identifier: Apache-2.0
"""Loading an optimizer's state dict: everything is checked before anything changes."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_lowprec.optim import overrides as by_name
from hf_lowprec.optim import states as st
from hf_lowprec.optim.shard_dicts import own_state, shared_state
from hf_lowprec.optim.shards import agree, is_sharded, is_vector, local_of

if TYPE_CHECKING:
    from hf_lowprec.optim.base import LowPrecOptimizer
    from hf_lowprec.optim.plan import Plan

Group = dict[str, Any]
State = defaultdict[Tensor, dict[str, Tensor]]

# Keys of torch's groups with no use here, and the names, which are those that the optimizer was built with.
DROPPED = ("amsgrad", "foreach", "fused", "capturable", "differentiable", "param_names")
_FIXED = ("algorithm", "states", "master", "decoupled_weight_decay")  # what a checkpoint must agree on
_COUNTERS = ("skipped_steps", "skipped_elements")

# Called with an optimizer before it saves or loads. It knows Parameters, not models: `stepping`, a layer above, puts
# here what finds the converted models they belong to, so that their amax histories travel in the checkpoint.
BEFORE_CHECKPOINT: list[Callable[[Optimizer], object]] = []


def before(optimizer: Optimizer) -> None:
    for hook in BEFORE_CHECKPOINT:
        hook(optimizer)


def load(optimizer: LowPrecOptimizer, state_dict: dict[str, Any]) -> None:
    """`LowPrecOptimizer.load_state_dict`; see there."""
    before(optimizer)
    state_dict = state_dict.copy()
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        state_dict = hook(optimizer, state_dict) or state_dict
    groups = _checked_groups(optimizer, state_dict)
    state = _checked_state(optimizer, state_dict["state"], groups)
    shared = {name: groups[0].pop(name) for name in _COUNTERS if name in groups[0]}
    counters = shared | {name: state_dict[name] for name in _COUNTERS if name in state_dict}
    for name, value in counters.items():
        if not isinstance(value, Tensor) or value.shape != () or value.dtype != torch.int64:
            raise ValueError(f"{name} should be a 0-d int64 tensor")

    for group, loaded in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: value for key, value in loaded.items() if key not in ("params", *DROPPED)})
    optimizer.state.clear()  # in place: an optimizer that this one has adopted shares it
    optimizer.state.update(state)
    for name, value in counters.items():
        setattr(optimizer, name, value.to(getattr(optimizer, name).device, copy=True))
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def share(plan: Plan, state_dict: dict[str, Any]) -> None:
    """Makes the state dict of sharded parameters one for torch.distributed.checkpoint, which takes `state` and
    `param_groups` and drops the rest, in place. All ranks do it together."""
    agree(plan.sharded, {}, torch.ones((), dtype=torch.bool, device=plan.sharded[0].param.device))
    for item in plan.sharded:
        if item.state:
            state_dict["state"][item.index] = shared_state(item)
    state_dict["param_groups"][0].update({name: state_dict[name] for name in _COUNTERS if name in state_dict})


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.numel() > 0 and a.shape == b.shape)


def _checked_groups(optimizer: LowPrecOptimizer, state_dict: dict[str, Any]) -> list[Group]:
    """The loaded groups, each with the `overrides` that its parameters will have."""
    if missing := {"state", "param_groups"} - set(state_dict):
        raise ValueError(f"not an optimizer's state_dict: it lacks {', '.join(sorted(missing))}")
    groups: list[Group] = deepcopy(state_dict["param_groups"])
    ours, theirs = ([len(g["params"]) for g in source] for source in (optimizer.param_groups, groups))
    if ours != theirs:
        raise ValueError(f"parameters per group: the optimizer has {ours}, the checkpoint {theirs}")
    for mine, loaded in zip(optimizer.param_groups, groups, strict=True):
        if loaded.get("amsgrad"):
            raise ValueError("the checkpoint was written with amsgrad=True, which these states do not keep")
        if "states" not in loaded:
            optimizer.from_foreign({})  # raises where no other library's states could be taken over
        for key in _FIXED:
            if key in loaded and key in mine and loaded[key] != mine[key]:
                raise ValueError(
                    f"the checkpoint was written with {key}={loaded[key]!r}, this optimizer has {mine[key]!r}; "
                    "build it like the one that was saved"
                )
        loaded["overrides"] = _checked_overrides(mine, loaded)
    return groups


def _checked_overrides(mine: Group, loaded: Group) -> list[str | None]:
    """The checkpoint decides what marks would; what the constructor overrode must agree."""
    own: list[str | None] = mine["overrides"]
    if "states" not in loaded:  # torch's
        return by_name.with_marks(own, mine)
    theirs: Any = loaded.get("overrides", own)
    if not isinstance(theirs, list) or len(theirs) != len(own):
        raise ValueError("overrides: the checkpoint's do not fit its parameters; the file is corrupt")
    same = by_name.names_of_marks(mine)
    for label, a, b in zip(_labels(mine, loaded), own, theirs, strict=True):
        if a != b and not {a, b} <= same:
            default = mine["states"]
            raise ValueError(
                f"parameter {label}: the checkpoint was written with states {b or default!r}, this optimizer has "
                f"{a or default!r}; build it with the overrides of the one that was saved"
            )
    return list(theirs)


def _labels(mine: Group, loaded: Group) -> list[Any]:
    labels: list[Any] = mine["param_names"] if "param_names" in mine else loaded["params"]
    return labels


def _checked_state(optimizer: LowPrecOptimizer, loaded_state: dict[Any, Any], groups: list[Group]) -> State:
    owners = {
        key: (param, f"state of parameter {label}", position, {**mine, **loaded}, "states" not in loaded)
        for mine, loaded in zip(optimizer.param_groups, groups, strict=True)
        for position, (key, param, label) in enumerate(
            zip(loaded["params"], mine["params"], _labels(mine, loaded), strict=True)
        )
    }
    state: State = defaultdict(dict)
    quantised: set[str] = set()
    for key, values in loaded_state.items():
        if key not in owners:
            raise ValueError(f"the checkpoint has a state for {key!r}, which is in none of its groups")
        if not values:  # somebody looked up a parameter that has not been stepped: `state` is a defaultdict
            continue
        param, label, position, group, foreign = owners[key]
        by_name.check_marked(group, group["overrides"], position)
        states = by_name.of_parameter(group, position, param.numel(), vector=is_vector(param))
        if foreign:
            values = optimizer.from_foreign(values)
            moments = optimizer.moments(group, values)
            state[param] = st.from_torch(values, states, param, label, moments)
            if any(quant is not None for quant in st.layout(states, param.dtype, moments).values()):
                quantised.add(group["overrides"][position] or group["states"])
        else:
            moments = optimizer.moments(group, values)
            values = own_state(values, states, param, moments)
            st.check_state(values, states, local_of(param), label, moments, sharded=is_sharded([param]))
            own = optimizer.state.get(param, {})
            state[param] = {
                k: own[k] if k in own and _same_memory(v, own[k]) else v.to(param.device, copy=True)
                for k, v in values.items()
            }
    if quantised:
        names = ", ".join(sorted(quantised))
        warnings.warn(f"states of a torch optimizer were loaded and quantised to {names}", stacklevel=4)
    return state
