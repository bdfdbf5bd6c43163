# SPDX-License-Identifier: Apache-2.0
"""What an optimizer knows of its parameters between two steps: over thousands of them a step costs little Python.

A plan holds one `Item` per parameter: its state, the states it really keeps, its slots. It is made anew when anything
it was made from has changed: the groups, their parameters, states or masters, and the state dicts, compared by
identity (2000 parameters take 0.1 ms). What lies in the state dicts is not looked at: whoever replaces tensors there
keeps shapes and dtypes.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_lowprec.optim import overrides
from hf_lowprec.optim import states as st
from hf_lowprec.optim.algorithms import Item
from hf_lowprec.optim.bounds import check_predictable
from hf_lowprec.optim.shards import check_shardable, is_vector, local_of, rows_of, shard_of

if TYPE_CHECKING:
    from hf_lowprec.optim.base import LowPrecOptimizer
    from hf_lowprec.optim.gradient import GradientQuantizer, GradientSwap

Group = dict[str, Any]


class Plan:
    """items: of every parameter, in the order of `state_dict`. sharded: those of DTensors.

    routes: what `Item.route` counts, (device, kernels). wired: whether some gradients pass through a communication
        format; fused: whether kernels can do that in the step itself.
    again: what the last step was, if the next one may be the same but for values (`fused.Again`).
    """

    def __init__(self, optimizer: LowPrecOptimizer) -> None:
        self.items: list[Item] = []
        self.routes: list[tuple[torch.device, bool]] = []
        self.wired, self.fused = False, True
        self.again: Any = None
        self._groups: list[tuple[Group, list[Tensor], tuple[Any, ...]]] = []
        self._watched: dict[tuple[Any, ...], Item] = {}
        self._by_param: dict[int, Item] = {}
        self._swaps: list[tuple[GradientQuantizer, dict[Tensor, int]]] = []
        for group in optimizer.param_groups:
            self._groups.append((group, list(group["params"]), _key(optimizer, group)))
            for position, param in enumerate(group["params"]):
                self.items.append(make_item(optimizer, group, position, param, len(self.items)))
        self._places = {id(group): i for i, (group, _, _) in enumerate(self._groups)}
        self.sharded = [item for item in self.items if item.shard is not None]
        self._keys, self._values = list(optimizer.state), list(optimizer.state.values())

    def note_states(self, optimizer: LowPrecOptimizer, new: Sequence[Item]) -> None:
        """Takes the states that `new` items were given last, and their groups' overrides, for known."""
        if len(self._keys) + len(new) == len(optimizer.state):
            self._keys += [item.key for item in new]
            self._values += [item.state for item in new]
        else:  # some had an empty one already
            self._keys, self._values = list(optimizer.state), list(optimizer.state.values())
        for item in new:
            i = self._places[id(item.group)]
            group, params, key = self._groups[i]
            if key[0][item.position] != group["overrides"][item.position]:  # a mark was written down
                self._groups[i] = group, params, _key(optimizer, group)

    def current(self, optimizer: LowPrecOptimizer) -> bool:
        """Whether nothing has changed."""
        return (
            len(self._groups) == len(optimizer.param_groups)
            and all(
                mine is group and _unchanged(key, optimizer, group) and _same(params, group["params"])
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

    def follow(self, swaps: Sequence[GradientSwap]) -> bool:
        """Notes which gradients pass through whose format. Returns whether that is another than before."""
        if len(swaps) == len(self._swaps) and all(
            swap.quantizer is quantizer and swap.index is index
            for swap, (quantizer, index) in zip(swaps, self._swaps, strict=True)
        ):
            return False
        self._swaps = [(swap.quantizer, swap.index) for swap in swaps]
        devices: dict[GradientQuantizer, set[torch.device]] = {}
        for item in self.items:
            item.wires = tuple((quantizer, index[item.key]) for quantizer, index in self._swaps if item.key in index)
            for quantizer, _ in item.wires:
                devices.setdefault(quantizer, set()).add(item.param.device)
        self.wired = bool(devices)
        # The kernels advance a mu where it is; and a format after another is nothing that anybody asked for yet.
        self.fused = all(len(some) == 1 and quantizer.carried for quantizer, some in devices.items()) and all(
            len(item.wires) <= 1 for item in self.items
        )
        return True

    def route(self, device: torch.device, covered: bool) -> int:
        """The number of (device, covered)."""
        if (device, covered) not in self.routes:
            self.routes.append((device, covered))
        return self.routes.index((device, covered))


def make_item(optimizer: LowPrecOptimizer, group: Group, position: int, param: Tensor, index: int) -> Item:
    """The item of one parameter. Raises ValueError: a master that its dtype cannot have."""
    state = optimizer.state.get(param, {})
    marked = not state and overrides.is_embedding(param)
    gemm = bool(overrides.is_gemm_weight(param))
    states = overrides.of_parameter(group, position, param.numel(), marked=marked, vector=is_vector(param), gemm=gemm)
    item = Item(local_of(param), state, states, group, position, index, moments=optimizer.moments(group, state))
    item.slots = st.layout(states, param.dtype, item.moments)
    item.key, item.shard = param, shard_of(param)
    if item.shard is not None:
        item.start = item.shard.start
        check_shardable(item)
    return item


def quantise(items: Iterable[Item]) -> None:
    """Has the gradients that `items` hold pass through their communication formats, op by op."""
    left = [(item, item.wires, item.grad if item.shard is None else item.key.grad) for item in items if item.wires]
    while left:
        parts: dict[tuple[int, torch.device], list[tuple[Item, Any, Tensor]]] = {}
        for item, wires, grad in left:
            parts.setdefault((id(wires[0][0]), item.param.device), []).append((item, wires, grad))
        left = []
        for part in parts.values():
            quantizer = part[0][1][0][0]
            done = quantizer.quantize_all({wires[0][1]: grad for _, wires, grad in part})
            for item, wires, _ in part:
                grad = done[wires[0][1]]
                item.grad = grad if item.shard is None else rows_of(item, grad)
                if wires[1:]:
                    left.append((item, wires[1:], grad))


def _key(optimizer: LowPrecOptimizer, group: Group) -> tuple[Any, ...]:
    return list(group["overrides"]), group["states"], group["master"], optimizer.moments(group)


def _unchanged(key: tuple[Any, ...], optimizer: LowPrecOptimizer, group: Group) -> bool:
    return key[0] == group["overrides"] and key[1:] == (group["states"], group["master"], optimizer.moments(group))


def _same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))
