# SPDX-License-Identifier: Apache-2.0
"""Steps of many parameters in a few launches: what the optimizer's items are to `kernels.optimizer`.

The kernels give the bits of `optim/algorithms.py`. Between two steps a table per list of items is kept, and looked
after as cheaply as Python allows: the same items, the same state tensors and the same addresses of Parameters and
gradients mean that nothing has to be sent to the device.
"""

from __future__ import annotations

import gc
import importlib.util
import operator
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hf_lowprec.kernels.mirror import capturing
from hf_lowprec.kernels.optimizer import Row, Tables, group_numbers, kind_of, row
from hf_lowprec.optim.algorithms import Item, adam_ratio
from hf_lowprec.optim.clipping import Look
from hf_lowprec.optim.slots import is_predicted, padded_width
from hf_lowprec.optim.weights import layout
from hf_lowprec.recipe import Quant, Residual, States

if TYPE_CHECKING:
    from hf_lowprec.optim.base import LowPrecOptimizer
    from hf_lowprec.optim.gradient import GradientQuantizer

_GRAD_DTYPE = operator.attrgetter("grad_dtype")
_GRAD, _DTYPE, _LAYOUT, _VERSION = map(operator.attrgetter, ("grad", "dtype", "layout", "_version"))
_PARAM = operator.attrgetter("param")
_NUMBERS = ("momentum", "dampening", "eps", "weight_decay", "decoupled_weight_decay", "maximize", "nesterov")
_MOMENTS = {
    "adam": ("exp_avg", "exp_avg_sq"),
    "stable_adam": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
    "sgd": ("momentum_buffer",),
}


_BATCHES = 16  # lists of items whose tables are kept


def takes(algorithm: str, item: Item) -> bool:
    """Whether there is a kernel for an item, which holds its gradient. Ranks that share a tensor agree on it."""
    if item.shard is not None and not _stands_alone(algorithm, item):
        return False
    return covers(algorithm, item.states, item.param, item.grad)


def _stands_alone(algorithm: str, item: Item) -> bool:
    """Whether the rows of a shard are to the kernels a tensor like another: in whole blocks and bytes, and without
    StableAdamW's mean, which is of all ranks."""
    assert item.shard is not None
    quants = [quant for quant in item.slots.values() if isinstance(quant, Quant)]
    return algorithm != "stable_adam" and not any(padded_width(quant, item.shard.columns) for quant in quants)


def covers(algorithm: str, states: States, param: Tensor, grad: Tensor) -> bool:
    """Whether there is a kernel for a parameter with these effective states; if not, it runs op by op."""
    if states.op_by_op or param.device != grad.device or not available(param.device):
        return False
    slots = layout(states, param.dtype, _MOMENTS[algorithm])
    return kind_of(algorithm, param.dtype, grad.dtype, slots, states.update) is not None


@cache
def available(device: torch.device) -> bool:
    """Whether kernels run there: Triton is installed and the GPU is one of NVIDIA's from Ampere on."""
    if device.type != "cuda" or torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


class Fused:
    """The steps of one optimizer. Raises in `step` where a step could not be captured: see `kernels.optimizer`."""

    def __init__(self, optimizer: LowPrecOptimizer) -> None:
        self._optimizer = optimizer
        self._known: dict[tuple[int, int], _Batch] = {}  # by `_key`
        self._lists: list[tuple[int, int]] = []  # the keys of those of more than one, oldest first
        self._rows: dict[int, tuple[_Batch, int]] = {}  # by id of a Parameter: its last batch, and its row there
        self._latest: _Batch | None = None

    def invalidate(self) -> None:
        """Forgets all tables: items or states are others now. Graphs that were captured keep theirs."""
        self._known, self._lists, self._rows, self._latest = {}, [], {}, None

    def weight_amax(self, param: Tensor) -> Tensor | None:
        """`LowPrecOptimizer.weight_amax`."""
        batch, row = self._rows.get(id(param), (None, 0))
        return None if batch is None else batch.weight_amaxes[row]

    def unknown(self, items: Sequence[Item]) -> None:
        """Others write to these Parameters."""
        for item in items if self._rows else ():
            self._rows.pop(id(item.key), None)

    def step(
        self, algorithm: str, items: Sequence[Item], clip: Tensor | None, finite: Tensor | None,
        amaxes: Tensor | None = None, look: Look | None = None,
    ) -> Tensor:  # fmt: skip
        """One step of `items`, which hold their gradients, all of one device. Returns whether it was finite.

        clip: float32 0-d. finite: 0-d bool that decides; None: the kernels look at the gradients themselves and count
        a skipped step. Then they also pass gradients through their communication formats (`Plan.fused`).
        amaxes: float32 [items], of the gradients on all ranks; only with `finite`. None: the kernels find them.
        look: the last one at these gradients, which have not changed since.
        """
        plan = self._optimizer._plan
        wired = finite is None and plan is not None and plan.wired and plan.fused
        batch = self._batch(algorithm, items, wired)
        grads = [item.grad for item in items]
        return self.run(batch, grads, list(map(Tensor.data_ptr, grads)), clip, finite, amaxes, look)

    def look(self, algorithm: str, items: Sequence[Item], limit: float | Tensor) -> Look:
        """A look at the gradients that `items` hold, all of one device, ahead of their step; their norm on the way.

        limit: what it is to be clipped to, a number or float32 0-d on the device."""
        plan = self._optimizer._plan
        batch = self._batch(algorithm, items, plan is not None and plan.wired and plan.fused)
        grads = [item.grad for item in items]
        return self.look_at(batch, grads, list(map(Tensor.data_ptr, grads)), limit)

    def look_at(
        self, batch: _Batch, grads: list[Tensor], addresses: list[int], limit: float | Tensor, *,
        unchanged: bool = False,
    ) -> Look:  # fmt: skip
        """`look` at a batch that is known to be the one. unchanged: so is it."""
        with torch.cuda.device(batch.device) if batch.device.type == "cuda" else nullcontext():
            return batch.look(grads, addresses, limit, unchanged)

    def run(
        self, batch: _Batch, grads: list[Tensor], addresses: list[int], clip: Tensor | None, finite: Tensor | None,
        amaxes: Tensor | None = None, look: Look | None = None, *, unchanged: bool = False,
    ) -> Tensor:  # fmt: skip
        """`step` of a batch that is known to be the one, with gradients at these addresses. unchanged: so is it."""
        optimizer = self._optimizer
        if optimizer.notes_amax and batch is not self._latest:
            self._latest = batch
            whole = ((row, item) for row, item in enumerate(batch.items) if item.shard is None)
            self._rows.update({id(item.key): (batch, row) for row, item in whole})
        # Triton launches on the current device, whatever the tensors say.
        with torch.cuda.device(batch.device) if batch.device.type == "cuda" else nullcontext():
            return batch.step(
                grads, addresses, clip, finite, amaxes, optimizer.nonfinite == "element",
                optimizer.skipped_steps, optimizer.skipped_elements, look, unchanged,
            )  # fmt: skip

    def again(self, everything: Sequence[Item], items: Sequence[Item]) -> Again | None:
        """What the next step may compare itself with, after a step of `items`, all with a gradient of `everything`."""
        batch = self._known[_key(items)]
        return None if batch.copies else Again(batch, everything)

    def _batch(self, algorithm: str, items: Sequence[Item], wired: bool) -> _Batch:
        key = _key(items)
        batch = self._known.get(key)
        if batch is None or not batch.same(items, wired):
            batch = self._known[key] = _Batch(algorithm, items, wired, self._optimizer.notes_amax)
            # Gradients that come and go (experts): the oldest list is made again. Gradient release has lists of one.
            if len(items) > 1 and key not in self._lists:
                self._lists.append(key)
                if len(self._lists) > _BATCHES:
                    del self._known[self._lists.pop(0)]
        return batch


def _key(items: Sequence[Item]) -> tuple[int, int]:
    return len(items), hash(tuple(map(id, items)))


class Again:
    """The gradients of a step that may be the last one over again: at other addresses, and nothing else."""

    def __init__(self, batch: _Batch, everything: Sequence[Item]) -> None:
        self.batch = batch
        self._keys = [item.key for item in batch.items]
        self._dtypes = list(map(_GRAD_DTYPE, batch.items))
        mine = set(map(id, self._keys))
        self._idle = [item.key for item in everything if id(item.key) not in mine]

    def gradients(self) -> tuple[list[Tensor], list[int]] | None:
        """Of all Parameters of the batch, and their addresses; None: somebody has to look at them one by one."""
        grads: list[Any] = list(map(_GRAD, self._keys))
        try:
            addresses = list(map(Tensor.data_ptr, grads))
        except (TypeError, RuntimeError):  # None; sparse
            return None
        if (
            list(map(_DTYPE, grads)) != self._dtypes
            or any(map(operator.is_not, map(_GRAD, self._idle), repeat(None)))
            or not self.batch.unedited()
            or not self.batch.unchanged()
        ):
            return None
        return grads, addresses


class _Batch:
    """A list of items and their tables.

    wired: their gradients pass through communication formats in the kernels. amax: `weight_amaxes` holds the largest
    magnitude of each Parameter after a step, 0-d each.
    """

    def __init__(self, algorithm: str, items: Sequence[Item], wired: bool, amax: bool) -> None:
        self.algorithm, self.items, self.wired, self.amax = algorithm, list(items), wired, amax
        self.weight_amaxes: Sequence[Tensor] = ()
        self.device = items[0].param.device
        groups = {id(item.group): item.group for item in items}
        numbers = {key: number for number, key in enumerate(groups)}
        self._group_of = [numbers[id(item.group)] for item in items]
        self._groups = [_Group(algorithm, group, self.device) for group in groups.values()]
        quantizers = [quantizer for item in items for quantizer, _ in item.wires] if wired else []
        self._quantizers: list[GradientQuantizer] = list({id(q): q for q in quantizers}.values())
        self._sharded = any(item.shard is not None for item in items)
        self._tables: Tables | None = None
        self._grads: list[int] = []
        self._hyper: list[tuple[int, ...]] = []
        self._keeps: list[bool] = []
        self._coupled = self._quick = False
        self._versions: list[int] | None = None
        self._read()

    def same(self, items: Sequence[Item], wired: bool) -> bool:
        return wired is self.wired and all(map(operator.is_, items, self.items))

    def _read(self) -> None:
        """Takes states and Parameters as they are now for known."""
        self._params = [item.param for item in self.items]
        self._states = [item.state for item in self.items]
        self._held = gc.get_referents(*self._states)
        for tensor in chain(self._params, *map(dict.values, self._states)):
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
        self.copies = {
            i: param.detach().contiguous() for i, param in enumerate(self._params) if not param.is_contiguous()
        }
        for quantizer in self._quantizers:
            quantizer.to(self.device)
        self._marks = [quantizer.marks() for quantizer in self._quantizers]
        # Parameters that follow a master: operators on a DTensor count on it, those on its rows on them.
        followers = [item for item in self.items if _follows(item)]
        self._watched = list(chain.from_iterable({id(p): p for p in (i.param, i.key)}.values() for i in followers))
        self._versions = None

    def unedited(self) -> bool:
        """Whether torch has counted no edit, since the last step, of a Parameter that follows a master."""
        return list(map(_VERSION, self._watched)) == self._versions

    def unchanged(self) -> bool:
        """Whether Parameters, states and wires are where the tables have them."""
        params = list(map(_PARAM, self.items)) if self._sharded else self._params  # `shards.rows_of` changes them
        return (
            list(map(Tensor.data_ptr, params)) == self._addresses
            # One tensor of each state: to move states through `.data` moves them all.
            and list(map(Tensor.data_ptr, self._probes)) == self._probed
            and list(map(_GRAD_DTYPE, self.items)) == self._dtypes
            and _identical(gc.get_referents(*self._states), self._held)
            and [quantizer.marks() for quantizer in self._quantizers] == self._marks
        )

    def step(
        self, grads: list[Tensor], addresses: list[int], clip: Tensor | None, finite: Tensor | None,
        amaxes: Tensor | None, elementwise: bool, skipped_steps: Tensor, skipped_elements: Tensor, look: Look | None,
        unchanged: bool,
    ) -> Tensor:  # fmt: skip
        grads, tables, unchanged = self._ready(grads, addresses, unchanged)
        for i, copy in self.copies.items():
            copy.copy_(self._params[i].detach())
        trusted = unchanged or self.unedited()
        versions, self._versions = self._versions, None  # of a step that raises nobody knows what it has done
        out = tables.step(
            clip=clip,
            finite=finite,
            amaxes=amaxes,
            elementwise=elementwise,
            coupled=self._coupled,
            quick=self._quick,
            skipped_steps=skipped_steps,
            skipped_elements=skipped_elements,
            trusted=trusted,
            looked=look is not None and look.tables is tables and look.addresses == self._grads,
        )
        for i, copy in self.copies.items():
            self._params[i].detach().copy_(copy)
        if not capturing(self.device):  # which runs nothing
            self._versions = versions if trusted and not self.copies else list(map(_VERSION, self._watched))
        return out

    def look(self, grads: list[Tensor], addresses: list[int], limit: float | Tensor, unchanged: bool) -> Look:
        grads, tables, _ = self._ready(grads, addresses, unchanged)
        norm, factor = tables.look(limit)
        return Look(norm, factor, tables=tables, addresses=self._grads)

    def _ready(self, grads: list[Tensor], addresses: list[int], unchanged: bool) -> tuple[list[Tensor], Tables, bool]:
        """Tables that say what there is. Returns the gradients as they are read, too, and `unchanged`, if that still
        holds."""
        if not all(map(Tensor.is_contiguous, grads)):
            grads = [grad.contiguous() for grad in grads]
            addresses = list(map(Tensor.data_ptr, grads))
        if 0 in addresses and any(grad.numel() for grad, address in zip(grads, addresses, strict=True) if not address):
            raise RuntimeError("a gradient without memory: used and freed by gradient release of another optimizer?")
        groups = [group.numbers() for group in self._groups]
        # SGD without momentum leaves a momentum that it once had alone.
        keeps = [bool(group.values.get("momentum", True)) for group in self._groups]
        if self._tables is None or keeps != self._keeps or not (unchanged or self.unchanged()):
            self._read()
            self._tables = self._make(addresses, groups, keeps)
            unchanged = False
            self._grads, self._keeps = addresses, keeps
        elif addresses != self._grads:
            self._tables.set_grads(addresses)
            self._grads = addresses
        if groups != self._hyper:
            self._tables.set_groups(groups)
            self._hyper = groups
            self._coupled = any(row[6] and row[5] for row in groups)
            self._quick = all(_quick(group.values) for group in self._groups)
        return grads, self._tables, unchanged

    def _make(self, grads: list[int], groups: list[tuple[int, ...]], keeps: list[bool]) -> Tables:
        rows = [
            _row(self.algorithm, item, self.copies.get(i, item.param), group, keeps[group])
            for i, (item, group) in enumerate(zip(self.items, self._group_of, strict=True))
        ]
        wires: list[Any] = []
        if self.wired:
            wires = [_wire(item) for item in self.items]
        tables = Tables(self.algorithm, rows, grads, groups, self.device, wires=wires, amax=self.amax)
        self.weight_amaxes = tables.weight_amax.unbind() if self.amax else ()
        return tables


class _NoComparison(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise LookupError


def _identical(found: list[Any], known: list[Any]) -> bool:
    """Whether these are the same objects in the same order. Lists compare elements that are not identical by their
    `==`, and only these: it is five times as fast as to ask for each pair."""
    try:
        with _NoComparison():
            return found == known
    except LookupError:
        return False


def _follows(item: Item) -> bool:
    """Whether a separate master alone says what its Parameter holds."""
    master = item.slots.get("master")
    return master is not None and not isinstance(master, Residual)


def _wire(item: Item) -> Any:
    if not item.wires:
        return None
    quantizer, number = item.wires[0]
    return quantizer.wire(number, item.key.numel())


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
        start=item.start,
    )


def _codes(state: Mapping[str, Tensor], slot: str) -> Tensor | None:
    return next((state[key] for key in (f"{slot}_qdata", f"{slot}_residual", slot) if key in state), None)


def _quick(group: Mapping[str, Any]) -> bool:
    """Whether `triton/roots.py` may take its short way."""
    return bool(0 <= group.get("eps", 0.0) <= 1 and 1 - group.get("betas", (0.0, 0.0))[1] >= 2.0**-40)


class _Group:
    """The numbers of a group's hyperparameters, computed again only when one has changed."""

    def __init__(self, algorithm: str, group: dict[str, Any], device: torch.device) -> None:
        self.algorithm, self.values, self._device = algorithm, group, device
        self._known: tuple[Any, ...] = ()
        self._numbers: tuple[int, ...] = ()
        self._rate: Tensor | None = None

    def numbers(self) -> tuple[int, ...]:
        group, lr = self.values, self._learning_rate()
        rate = ("at", lr.data_ptr(), lr.dtype) if isinstance(lr, Tensor) else lr
        # What is not a plain number here (a 0-d tensor may be) is compared by value, as the numbers hold it.
        known = (rate, tuple(group.get("betas", ())), *map(group.get, _NUMBERS))
        if known != self._known:
            self._known, self._numbers = known, self._compute(lr)
        return self._numbers

    def _learning_rate(self) -> float | Tensor:
        """A number, or a tensor on the device of the step."""
        lr = self.values["lr"]
        if not isinstance(lr, Tensor) or lr.device.type == "cpu":
            return float(lr)
        if lr.device == self._device and lr.dtype in (torch.float32, torch.float64):
            return lr
        if self._rate is None:  # another GPU's, or a dtype that kernels do not read: nobody waits for its value
            self._rate = torch.empty((), dtype=torch.float64, device=self._device)
        return self._rate.copy_(lr.detach().reshape(()), non_blocking=True)

    def _compute(self, lr: float | Tensor) -> tuple[int, ...]:
        group, algorithm = self.values, self.algorithm
        betas = (group["momentum"], group["dampening"]) if algorithm == "sgd" else group["betas"]
        ratio = 1.0
        if algorithm in ("adam", "stable_adam") and (betas[0] == 0 or betas[0] ** 2 < betas[1]):
            ratio = adam_ratio(betas)
        return group_numbers(
            lr=lr,
            betas=betas,
            eps=group.get("eps", 0.0),
            decay=group["weight_decay"],
            coupled=algorithm == "sgd" or (algorithm == "adam" and not group["decoupled_weight_decay"]),
            maximize=group["maximize"],
            nesterov=bool(group.get("nesterov", False)),
            ratio=ratio,
        )
