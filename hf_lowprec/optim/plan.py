# SPDX-License-Identifier: Apache-2.0
"""What an optimizer knows of its parameters between two steps: over thousands of them a step costs little Python.

A plan holds one `Item` per parameter: its state, the states it really keeps, its slots. It is made anew when anything
it was made from has changed: the groups, their parameters, states or masters, and the state dicts, compared by
identity (2000 parameters take 0.1 ms). What lies in the state dicts is not looked at: whoever replaces tensors there
keeps shapes and dtypes.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_lowprec.optim import overrides
from hf_lowprec.optim import states as st
from hf_lowprec.optim.algorithms import Item
from hf_lowprec.optim.bounds import check_predictable
from hf_lowprec.optim.shards import check_shardable, is_vector, local_of, shard_of

if TYPE_CHECKING:
    from hf_lowprec.optim.base import LowPrecOptimizer

Group = dict[str, Any]


class Plan:
    """items: of every parameter, in the order of `state_dict`. sharded: those of DTensors.

    routes: what `Item.route` counts, (device, kernels).
    """

    def __init__(self, optimizer: LowPrecOptimizer) -> None:
        self.items: list[Item] = []
        self.routes: list[tuple[torch.device, bool]] = []
        self._groups: list[tuple[Group, list[Tensor], tuple[Any, ...]]] = []
        self._watched: dict[tuple[Any, ...], Item] = {}
        self._by_param: dict[int, Item] = {}
        for group in optimizer.param_groups:
            self._groups.append((group, list(group["params"]), _key(optimizer, group)))
            for position, param in enumerate(group["params"]):
                self.items.append(make_item(optimizer, group, position, param, len(self.items)))
        self.sharded = [item for item in self.items if item.shard is not None]
        self.note_states(optimizer)

    def note_states(self, optimizer: LowPrecOptimizer) -> None:
        """Takes the state dicts and overrides as they are now for known."""
        self._keys, self._values = list(optimizer.state), list(optimizer.state.values())
        self._groups = [(group, params, _key(optimizer, group)) for group, params, _ in self._groups]

    def current(self, optimizer: LowPrecOptimizer) -> bool:
        """Whether nothing has changed."""
        return (
            len(self._groups) == len(optimizer.param_groups)
            and all(
                mine is group and key == _key(optimizer, group) and _same(params, group["params"])
                for group, (mine, params, key) in zip(optimizer.param_groups, self._groups, strict=True)
            )
            and _same(self._keys, optimizer.state)
            and _same(self._values, optimizer.state.values())
        )

    def of(self, param: Tensor) -> Item:
        """The item of `param`. Raises KeyError: not one of the optimizer's."""
        if not self._by_param:
            self._by_param = {id(item.key): item for item in self.items}
        return self._by_param[id(param)]

    def watch(self, item: Item) -> None:
        """Has `check` look at the hyperparameters of items like this one."""
        if item.predicted:
            self._watched.setdefault((id(item.group), *item.predicted), item)

    def check(self, algorithm: str) -> None:
        """Raises ValueError: hyperparameters, as they are now, under which a predicted scale has no bound."""
        for item in self._watched.values():
            check_predictable(algorithm, item)

    def route(self, device: torch.device, covered: bool) -> int:
        """The number of (device, covered)."""
        if (device, covered) not in self.routes:
            self.routes.append((device, covered))
        return self.routes.index((device, covered))


def make_item(optimizer: LowPrecOptimizer, group: Group, position: int, param: Tensor, index: int) -> Item:
    """The item of one parameter. Raises ValueError: a master that its dtype cannot have."""
    state = optimizer.state.get(param, {})
    marked = not state and overrides.is_embedding(param)
    states = overrides.of_parameter(group, position, param.numel(), marked=marked, vector=is_vector(param))
    item = Item(local_of(param), state, states, group, position, index, moments=optimizer.moments(group, state))
    item.slots = st.layout(states, param.dtype, item.moments)
    item.key, item.shard = param, shard_of(param)
    if item.shard is not None:
        item.start = item.shard.start
        check_shardable(item)
    return item


def _key(optimizer: LowPrecOptimizer, group: Group) -> tuple[Any, ...]:
    return group["states"], group["master"], tuple(group["overrides"]), optimizer.moments(group)


def _same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))
