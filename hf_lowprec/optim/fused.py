# SPDX-License-Identifier: Apache-2.0
"""Steps of many parameters in a few launches: what the optimizer's items are to `kernels.optimizer`.

The kernels give the bits of `optim/algorithms.py`. Between two steps a table per list of items is kept, and looked
after as cheaply as Python allows: the same items, the same state tensors and the same addresses of Parameters and
gradients mean that nothing has to be sent to the device.
"""

from __future__ import annotations

import importlib.util
import operator
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_lowprec.kernels.optimizer import Row, Tables, group_numbers, kind_of, row
from hf_lowprec.optim.algorithms import Item, adam_ratio
from hf_lowprec.optim.slots import is_predicted
from hf_lowprec.optim.weights import layout
from hf_lowprec.recipe import States

if TYPE_CHECKING:
    from hf_lowprec.optim.base import LowPrecOptimizer

_GRAD_DTYPE = operator.attrgetter("grad_dtype")
_MOMENTS = {
    "adam": ("exp_avg", "exp_avg_sq"),
    "stable_adam": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
    "sgd": ("momentum_buffer",),
}


_BATCHES = 16  # lists of items whose tables are kept


def covers(algorithm: str, states: States, param: Tensor, grad: Tensor) -> bool:
    """Whether there is a kernel for a parameter with these effective states; if not, it runs op by op."""
    if param.device != grad.device or hasattr(param, "to_local") or not _available(param.device):
        return False
    slots = layout(states, param.dtype, _MOMENTS[algorithm])
    return kind_of(algorithm, param.dtype, grad.dtype, slots, states.update) is not None


@cache
def _available(device: torch.device) -> bool:
    """Triton is installed and the GPU is one of NVIDIA's from Ampere on."""
    if device.type != "cuda" or torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


class Fused:
    """The steps of one optimizer. Raises in `step` where a step could not be captured: see `kernels.optimizer`."""

    def __init__(self, optimizer: LowPrecOptimizer) -> None:
        self._optimizer = optimizer
        self._known: dict[tuple[int, int], _Batch] = {}

    def invalidate(self) -> None:
        """Forgets all tables: items or states are others now. Graphs that were captured keep theirs."""
        self._known = {}

    def step(self, algorithm: str, items: Sequence[Item], clip: Tensor | None, finite: Tensor | None) -> Tensor:
        """One step of `items`, which hold their gradients, all of one device. Returns whether it was finite.

        clip: float32 0-d. finite: 0-d bool that decides; None: the kernels look at the gradients themselves and count
        a skipped step.
        """
        key = (id(items[0]), len(items))
        batch = self._known.get(key)
        if batch is None or not batch.same(items):
            batch = self._known[key] = _Batch(algorithm, items)
            # Gradients that come and go (experts): the oldest list is made again. Gradient release has lists of one.
            lists = [known for known in self._known if known[1] > 1]
            if len(lists) > _BATCHES:
                del self._known[lists[0]]
        optimizer = self._optimizer
        # Triton launches on the current device, whatever the tensors say.
        with torch.cuda.device(batch.device) if batch.device.type == "cuda" else nullcontext():
            return batch.step(
                clip, finite, optimizer.nonfinite == "element", optimizer.skipped_steps, optimizer.skipped_elements
            )


class _Batch:
    """A list of items and their tables."""

    def __init__(self, algorithm: str, items: Sequence[Item]) -> None:
        self.algorithm, self.items = algorithm, list(items)
        self.device = items[0].param.device
        self._groups: list[dict[str, Any]] = []
        numbers: dict[int, int] = {}
        for item in items:
            if numbers.setdefault(id(item.group), len(numbers)) == len(self._groups):
                self._groups.append(item.group)
        self._group_of = [numbers[id(item.group)] for item in items]
        self._tables: Tables | None = None
        self._grads: list[int] = []
        self._hyper: list[tuple[int, ...]] = []
        self._keeps: list[bool] = []
        self._read()

    def same(self, items: Sequence[Item]) -> bool:
        return all(map(operator.is_, items, self.items))

    def _read(self) -> None:
        """Takes states and Parameters as they are now for known."""
        self._params = [item.param for item in self.items]
        self._states = [item.state for item in self.items]
        self._tensors = list(chain.from_iterable(map(dict.values, self._states)))
        for tensor in chain(self._params, self._tensors):
            if tensor.device != self.device:
                raise RuntimeError(
                    f"a Parameter or a state lies on {tensor.device}, others on {self.device}: states move with "
                    "load_state_dict(state_dict()) after the model has moved"
                )
        self._addresses = list(map(Tensor.data_ptr, self._params))
        self._probes = [list(state.values())[min(1, len(state) - 1)] for state in self._states]
        self._probed = list(map(Tensor.data_ptr, self._probes))
        self._dtypes = list(map(_GRAD_DTYPE, self.items))
        # Kernels and states count in row-major order; a Parameter that does not lie so is copied to and fro.
        self._copies = {
            i: param.detach().contiguous() for i, param in enumerate(self._params) if not param.is_contiguous()
        }

    def _unchanged(self) -> bool:
        tensors = chain.from_iterable(map(dict.values, self._states))
        return (
            list(map(Tensor.data_ptr, self._params)) == self._addresses
            # One tensor of each state: to move states through `.data` moves them all.
            and list(map(Tensor.data_ptr, self._probes)) == self._probed
            and list(map(_GRAD_DTYPE, self.items)) == self._dtypes
            and sum(map(len, self._states)) == len(self._tensors)
            and all(map(operator.is_, tensors, self._tensors))
        )

    def step(
        self, clip: Tensor | None, finite: Tensor | None, elementwise: bool, skipped_steps: Tensor,
        skipped_elements: Tensor,
    ) -> Tensor:  # fmt: skip
        grads = [item.grad for item in self.items]
        if not all(map(Tensor.is_contiguous, grads)):
            grads = [grad.contiguous() for grad in grads]
        addresses = list(map(Tensor.data_ptr, grads))
        groups = [_group_numbers(self.algorithm, group, self.device) for group in self._groups]
        # SGD without momentum leaves a momentum that it once had alone.
        keeps = [bool(group.get("momentum", True)) for group in self._groups]
        if self._tables is None or keeps != self._keeps or not self._unchanged():
            self._read()
            rows = [
                _row(self.algorithm, item, self._copies.get(i, item.param), group, keeps[group])
                for i, (item, group) in enumerate(zip(self.items, self._group_of, strict=True))
            ]
            self._tables = Tables(self.algorithm, rows, addresses, groups, self.device)
            self._grads, self._hyper, self._keeps = addresses, groups, keeps
        if addresses != self._grads:
            self._tables.set_grads(addresses)
            self._grads = addresses
        if groups != self._hyper:
            self._tables.set_groups(groups)
            self._hyper = groups
        for i, copy in self._copies.items():
            copy.copy_(self._params[i].detach())
        out = self._tables.step(
            clip=clip,
            finite=finite,
            elementwise=elementwise,
            coupled=any(row[6] and row[5] for row in groups),
            quick=all(_quick(group) for group in self._groups),
            skipped_steps=skipped_steps,
            skipped_elements=skipped_elements,
        )
        for i, copy in self._copies.items():
            self._params[i].detach().copy_(copy)
        return out


def _row(algorithm: str, item: Item, param: Tensor, group: int, keeps: bool) -> Row:
    """keeps: whether its moments take part."""
    moments = item.moments if keeps else ()
    slots = {name: slot for name, slot in item.slots.items() if name in moments or name == "master"}
    kind = kind_of(algorithm, param.dtype, item.grad.dtype, slots, item.states.update)
    assert kind is not None  # `covers` said so
    state = item.state
    names = (*moments, "", "")[:2]
    first, second = ((_codes(state, name), state.get(f"{name}_scale")) for name in names)
    return row(
        kind,
        param=param,
        first=first,
        second=second,
        master=(_codes(state, "master"), state.get("master_scale")),
        amaxes=[state.get(f"{name}_amax") if is_predicted(slots.get(name)) else None for name in (*names, "master")],
        step=state["step"],
        group=group,
        index=item.index,
        grad_dtype=item.grad.dtype,
    )


def _codes(state: Mapping[str, Tensor], slot: str) -> Tensor | None:
    return next((state[key] for key in (f"{slot}_qdata", f"{slot}_residual", slot) if key in state), None)


def _quick(group: Mapping[str, Any]) -> bool:
    """Whether `triton/roots.py` may take its short way."""
    return bool(0 <= group.get("eps", 0.0) <= 1 and 1 - group.get("betas", (0.0, 0.0))[1] >= 2.0**-40)


def _group_numbers(algorithm: str, group: dict[str, Any], device: torch.device) -> tuple[int, ...]:
    lr, decay = group["lr"], group["weight_decay"]
    if isinstance(lr, Tensor) and lr.device != device:
        lr = float(lr)
    betas = (group["momentum"], group["dampening"]) if algorithm == "sgd" else group["betas"]
    ratio = 1.0
    if algorithm in ("adam", "stable_adam") and (betas[0] == 0 or betas[0] ** 2 < betas[1]):
        ratio = adam_ratio(betas)
    return group_numbers(
        lr=lr if isinstance(lr, Tensor) else float(lr),
        betas=betas,
        eps=group.get("eps", 0.0),
        decay=decay,
        coupled=algorithm == "sgd" or (algorithm == "adam" and not group["decoupled_weight_decay"]),
        maximize=group["maximize"],
        nesterov=bool(group.get("nesterov", False)),
        ratio=ratio,
    )
