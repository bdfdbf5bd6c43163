# SPDX-License-Identifier: Apache-2.0
"""Parameters of which every rank holds some rows: FSDP2's DTensors (`torch.distributed.fsdp.fully_shard`).

A rank steps its rows as a tensor of its own. What makes that the same step as of the whole tensor, bit for bit and for
any number of ranks:

    blocks             never cross rows of dimension 0, so that rows have whole blocks wherever they lie
    random words       are drawn by the index in the whole tensor (`Shard.start`)
    scales per tensor  come from amaxes over all ranks
    skipped steps      a gradient that is not finite on one rank stops all of them

Before a step, the largest gradients, the amaxes that predicted states hold and the verdict on finiteness are reduced
in one small collective (`agree`); nobody waits for the device. After a step the amaxes in the states are of a rank's
own rows, until the next `agree`; `state_dict` calls it, too. Two things need a collective per tensor: scales from the
new values themselves (`fp8-lm-exact` and the ablations), and StableAdamW's mean, a float64 sum whose last bits depend
on the number of ranks (they vanish when the learning rate is rounded to float32; a float64 Parameter shows them).

A rank may have no rows of a tensor. It takes part in every collective all the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement

from hf_lowprec.recipe import Quant

if TYPE_CHECKING:
    from hf_lowprec.optim.algorithms import Item


@dataclass(frozen=True, eq=False)
class Shard:
    """The rows of a tensor that this rank holds.

    shape: of the whole tensor. row, rows: the first of them and their number.
    mesh, placements: the DTensor's. group: the ranks that share the rows; None if this one has them all.
    """

    shape: torch.Size
    row: int = 0
    rows: int = 0
    mesh: Any = None
    placements: tuple[Any, ...] = ()
    group: Any = None

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return self.shape[1:].numel()

    @property
    def start(self) -> int:
        """Flat index, in the whole tensor, of the first element here."""
        return self.row * self.columns

    def alone(self) -> Shard:
        """The same rows, but nobody to talk to: for values that all ranks know."""
        return replace(self, group=None)

    def maximum(self, amax: Tensor) -> Tensor:
        """The largest of every rank's `amax` (float32, not negative, any shape); NaN beats all."""
        if self.group is None:
            return amax
        bits = amax.to(torch.float32).abs().contiguous().view(torch.int32)  # MAX of floats may lose a NaN
        return self._reduced(bits, dist.ReduceOp.MAX).view(torch.float32)

    def total(self, value: Tensor) -> Tensor:
        """The sum of every rank's `value`."""
        return value if self.group is None else self._reduced(value.clone(), dist.ReduceOp.SUM)

    def norm(self, value: Tensor, norm_type: float) -> Tensor:
        """The norm of all ranks' rows; `value` is that of the rows here."""
        if self.group is None:
            return value
        if norm_type == math.inf:
            return self.maximum(value)
        return self.total(value.double() ** norm_type).pow(1 / norm_type).to(value.dtype)

    def _reduced(self, value: Tensor, op: Any) -> Tensor:
        there = value.to(self.mesh.device_type)  # elsewhere under CPU offloading
        dist.all_reduce(there, op, group=self.group)
        return there.to(value.device)

    def wrap(self, value: Tensor) -> Tensor:
        """`value` [rows, ...] as the DTensor of all rows, without a copy."""
        value = value.contiguous()
        shape = torch.Size([self.shape[0] if self.shape else 1, *value.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(value, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)

    def unwrap(self, value: Tensor) -> Tensor:
        """The rows that belong here of `value`, a DTensor or the whole tensor."""
        if not isinstance(value, DTensor):
            return value[self.row : self.row + self.rows]
        here = value.device_mesh is self.mesh or value.device_mesh == self.mesh  # to compare them is slow
        if not here or value.placements != self.placements:
            value = value.redistribute(self.mesh, self.placements)
        return local_of(value)


def is_vector(param: Tensor) -> bool:
    """Whether rows of `param` are single elements, too short for blocks."""
    return param.ndim == 1 and isinstance(param, DTensor)


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def shard_of(param: Tensor) -> Shard | None:
    """Where the rows of `param` lie; None: it is an ordinary tensor.

    Raises TypeError: sharded along another dimension, or along dimension 0 in any other way than FSDP2's.
    """
    if not isinstance(param, DTensor):
        return None
    mesh, placements = param.device_mesh, tuple(param.placements)
    cut = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    rows = param.shape[0] if param.ndim else 1
    if not cut:
        return Shard(param.shape, 0, rows, mesh, placements)
    if len(cut) > 1 or type(placements[cut[0]]) is not ShardPlacement or placements[cut[0]].dim != 0:  # type: ignore[attr-defined]
        raise TypeError(
            f"a parameter with placements {placements}: low-precision states follow FSDP2's shards, whole rows of "
            "dimension 0 on one dimension of the mesh; use torch.optim with tensor parallelism"
        )
    ranks, rank = mesh.size(cut[0]), mesh.get_local_rank(cut[0])
    chunk = -(-rows // ranks)  # as torch.chunk
    first = min(chunk * rank, rows)
    count = min(chunk, rows - first)
    if local_of(param).shape[0] != count:
        raise TypeError(
            f"rank {rank} of {ranks} holds {local_of(param).shape[0]} of {rows} rows, not {count} as FSDP2's do"
        )
    return Shard(param.shape, first, count, mesh, placements, mesh.get_group(cut[0]) if ranks > 1 else None)


def by_ranks(tensors: Mapping[Any, Tensor]) -> list[tuple[Shard, list[Any]]]:
    """Keys of the DTensors whose rows the same ranks share, and the shard of one of them; all ranks in one order."""
    groups: dict[Any, list[Any]] = {}
    for key, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            groups.setdefault((tensor.device_mesh, tensor.placements), []).append(key)
    found = ((shard_of(tensors[keys[0]]), keys) for keys in groups.values())
    return [(shard, keys) for shard, keys in found if shard is not None]


def check_shardable(item: Item) -> None:
    """Raises ValueError for a slot whose scales cannot be cut into rows."""
    assert item.shard is not None
    for name, quant in item.slots.items():
        if not isinstance(quant, Quant):
            continue
        scaling = quant.scaling
        whole = scaling.granularity in ("column", "tile") or (scaling.granularity == "row" and item.param.ndim < 2)
        curve = scaling.granularity == "tensor" and scaling.method == "current" and quant.compand != "none"
        if whole or curve:
            what = f"compand {quant.compand!r} of a whole tensor" if curve else f"{scaling.granularity} scaling"
            raise ValueError(f"{name}: no {what} on a sharded parameter; use blocks, or one scale per tensor")


def local_of(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, detached; another tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    if not torch.is_grad_enabled():  # a step asks for hundreds, and does so without
        return tensor.to_local().detach()
    with torch.no_grad():
        return tensor.to_local().detach()


def rows_of(item: Item, grad: Tensor) -> Tensor:
    """This rank's rows of a sharded item's gradient; looks again where the rows of the Parameter are, too."""
    assert item.shard is not None
    local = local_of(item.key)
    if local.data_ptr() != item.param.data_ptr():  # FSDP2 pads and reallocates, e.g. after load_state_dict
        item.param = local
    return item.shard.unwrap(grad)


def agree(members: Sequence[Item], amax: Mapping[int, Tensor], finite: Tensor) -> tuple[dict[int, Tensor], Tensor]:
    """Reduces over all ranks what a step needs to know beforehand; the amaxes that predicted states hold, in place.

    members: every sharded item of the optimizer, with and without a gradient: all ranks name the same ones in the same
        order. amax: by `Item.index`, the largest magnitude of this rank's part of a gradient, float32 0-d.
    finite: 0-d bool, this rank's verdict on its gradients.

    Returns the amaxes of whole gradients, and the verdict of all ranks.
    """
    groups: dict[Any, list[Item]] = {}
    for item in members:
        assert item.shard is not None
        if item.shard.group is not None:
            groups.setdefault(item.shard.group, []).append(item)
    out = dict(amax)
    # A verdict travels on to the next group; the largest, which has all ranks, hears everything and comes last.
    for some in sorted(groups.values(), key=lambda items: dist.get_world_size(items[0].shard.group)):  # type: ignore[union-attr]
        finite = _agree(some, out, finite)
    return out, finite


def _agree(items: Sequence[Item], amax: dict[int, Tensor], finite: Tensor) -> Tensor:
    shard, nothing = items[0].shard, torch.zeros((), dtype=torch.float32, device=items[0].param.device)
    assert shard is not None
    held = [item.state.get(f"{slot}_amax") for item in items for slot in item.predicted]
    verdict = torch.where(finite.to(nothing.device), nothing, torch.inf)
    given = [*(amax.get(item.index, nothing) for item in items), *(nothing if a is None else a for a in held)]
    reduced = shard.maximum(torch.stack([*given, verdict])).unbind()
    amax.update({item.index: new for item, new in zip(items, reduced, strict=False) if item.index in amax})
    pairs = [(own, new) for own, new in zip(held, reduced[len(items) : -1], strict=True) if own is not None]
    if pairs:
        own, new = zip(*pairs, strict=True)
        torch._foreach_copy_(own, new)
    return reduced[-1].isfinite().to(finite.device)
