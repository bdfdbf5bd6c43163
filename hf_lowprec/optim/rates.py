# SPDX-License-Identifier: Apache-2.0
"""A learning rate per Parameter, in an optimizer whose groups have one each.

Schedulers, loggers and checkpoints hold on to the groups as the script made them. So they stay, and only while `step`
runs the optimizer sees finer ones: each group once per factor, with its hyperparameters as they are at that moment,
`lr` times the factor. `state` is kept by Parameter and knows nothing of it.

Decay: W = W (1 - lr weight_decay) with the group's own lr for all of its Parameters, whatever their factors, so
`weight_decay` is divided by the factor. (Under `native` learning rates it is independent of lr as in u-muP: it is
divided by the largest lr of the schedule, too.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from hf_lowprec.optim.base import LowPrecOptimizer

_SPLIT = "_hf_lowprec_split"  # on an optimizer: its groups and their parts
_INSIDE = "_hf_lowprec_whole"  # on an optimizer within `step`: its own groups
_OURS = ("adam", "stable_adam", "lion")
_TORCH = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)


def check(optimizer: Optimizer) -> None:
    """Raises TypeError for an optimizer whose first step is not its learning rate."""
    known = optimizer.algorithm in _OURS if isinstance(optimizer, LowPrecOptimizer) else type(optimizer) in _TORCH
    if not known:
        raise TypeError(
            f"{type(optimizer).__name__}: the learning rates of a model at unit scale are known for Adam's kin "
            "(torch.optim.AdamW, Adam, NAdam, RAdam, Adamax; hf_lowprec.optim.AdamW, Adam, StableAdamW, Lion), whose "
            "step is as large as the learning rate; use one of these, or keep the weights as they are with "
            "convert(model, recipe, init=False)"
        )


class _Part:
    """Those Parameters of a group that share a factor, as a group."""

    def __init__(self, group: dict[str, Any], positions: list[int], factor: float, independent: bool) -> None:
        self.whole, self.positions, self.factor = group, positions, factor
        self.independent, self.peak = independent, 0.0
        self.group: dict[str, Any] = {}

    def refresh(self) -> dict[str, Any]:
        lists = {key: self.group.get(key) for key in ("params", "overrides", "param_names") if key in self.whole}
        self.group.update(self.whole)
        for key, old in lists.items():
            new = [self.whole[key][i] for i in self.positions]
            same = old is not None and len(old) == len(new) and all(a is b for a, b in zip(old, new, strict=True))
            self.group[key] = old if same else new  # plans compare identities
        self.group["lr"] = self.whole["lr"] * self.factor
        if self.whole.get("weight_decay"):
            self.group["weight_decay"] = self.whole["weight_decay"] / (self.factor * self._largest())
        return self.group

    def _largest(self) -> float:
        """The largest learning rate of the schedule, or so far where there is none; 1 if the decay goes with it."""
        if not self.independent:
            return 1.0
        self.peak = max(self.peak, float(self.whole.get("initial_lr", self.whole["lr"])))
        return self.peak or 1.0  # a learning rate of 0 decays nothing

    def write_back(self) -> None:
        """What a step wrote into the group: marks of embeddings, and flags that torch keeps there."""
        theirs = self.group.get("overrides")
        if theirs is not None and theirs != [self.whole["overrides"][i] for i in self.positions]:
            names = list(self.whole["overrides"])
            for i, name in zip(self.positions, theirs, strict=True):
                names[i] = name
            self.whole["overrides"] = names


def foresee(optimizer: Optimizer) -> None:
    """Says that `split` will be called: an optimizer of ours then takes no look ahead of its steps."""
    if isinstance(optimizer, LowPrecOptimizer):
        optimizer.regroups = True


def split(optimizer: Optimizer, factors: Mapping[int, float], *, independent: bool) -> None:
    """From here to `rejoin` the optimizer's groups are by factor. factors: by id of the Parameter; 1 where missing.

    Raises TypeError: `check`.
    """
    rejoin(optimizer)
    foresee(optimizer)
    whole = optimizer.param_groups
    key = tuple((id(g), tuple(map(id, g["params"]))) for g in whole), tuple(sorted(factors.items())), independent
    known = optimizer.__dict__.get(_SPLIT)
    if known is None or known[0] != key:
        check(optimizer)
        parts = []
        for group in whole:
            by_factor: dict[float, list[int]] = {}
            for i, param in enumerate(group["params"]):
                by_factor.setdefault(factors.get(id(param), 1.0), []).append(i)
            parts += [_Part(group, positions, factor, independent) for factor, positions in by_factor.items()]
        if known is None:
            optimizer.register_state_dict_pre_hook(rejoin)  # a step that raised has left the groups split
        known = optimizer.__dict__[_SPLIT] = key, parts
    optimizer.__dict__[_INSIDE] = whole
    optimizer.param_groups = [part.refresh() for part in known[1]]


def rejoin(optimizer: Optimizer) -> None:
    """The end of `split`; nothing happens to an optimizer that is not split."""
    whole = optimizer.__dict__.pop(_INSIDE, None)
    if whole is not None:
        for part in optimizer.__dict__[_SPLIT][1]:
            part.write_back()
        optimizer.param_groups = whole
