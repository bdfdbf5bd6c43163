# SPDX-License-Identifier: Apache-2.0
"""States of shards on their way in and out of checkpoints.

In a state dict they are DTensors placed like their Parameter, so that torch.distributed.checkpoint saves every row
once and hands rows out to any number of ranks. Dimension 0 of all of them counts the Parameter's rows:

    codes, residuals, float32 slots     the Parameter's shape
    scales (, powers, centers)          [rows, blocks of a row]
    packed codes                        uint8 [rows, bytes of a row]
    float8                              uint8, its bytes: gloo gathers no float8
    int16                               uint8 [..., 2], its bytes: neither gloo nor NCCL moves int16
    step, scales per tensor, amaxes     0-d, ordinary tensors, the same on all ranks

Where rows are whole blocks, a state that was saved without sharding holds the same numbers in the same order, and both
read each other's; otherwise a ValueError says which tensor does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowprec.optim.algorithms import Item
from hf_lowprec.optim.shards import Shard, local_of, shard_of
from hf_lowprec.optim.slots import padded_width, row_widths
from hf_lowprec.optim.weights import blank_state, layout
from hf_lowprec.recipe import Quant, States


def shared_state(item: Item) -> dict[str, Tensor]:
    """The state of a sharded item as a state dict has it; no copies."""
    shard = item.shard
    assert shard is not None
    widths = _widths(item.slots, shard)
    out = {}
    for key, value in item.state.items():
        if not value.dim():
            out[key] = value
            continue
        if key in widths and value.dim() == 1:
            value = value.view(shard.rows, widths[key])
        out[key] = shard.wrap(_as_bytes(value))
    return out


def own_state(values: Mapping[str, Any], states: States, param: Tensor, moments: tuple[str, ...]) -> dict[str, Any]:
    """The rows that belong here of a loaded state (DTensors, or whole tensors), shaped as `init_state` has them.

    states: effective. Raises nothing: what does not fit is left for `check_state` to name.
    """
    shard, local = shard_of(param), local_of(param)
    wanted = blank_state(states, local.dtype, tuple(local.shape), moments, sharded=shard is not None)
    whole = shard or Shard(param.shape, 0, param.shape[0] if param.ndim else 1)
    widths = _widths(layout(states, local.dtype, moments), whole)
    return {key: _fit(value, wanted[key], whole, widths.get(key)) if key in wanted else value
            for key, value in values.items()}  # fmt: skip


def _fit(value: Any, like: Tensor, shard: Shard, width: int | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not like.dim():
        return value.full_tensor() if isinstance(value, DTensor) else value
    if value.shape == like.shape and value.dtype == like.dtype and shard.mesh is None:
        return value
    total = shard.shape[0] if shard.shape else 1
    if width and not isinstance(value, DTensor) and value.shape == (total * width,):
        value = value.view(total, width)
    if value.dim():
        value = shard.unwrap(value) if shard.mesh is not None else local_of(value)
    value = _from_bytes(value, like)
    if width and value.shape == (shard.rows, width):
        value = value.reshape(like.shape)
    return value


def _widths(slots: Mapping[str, Any], shard: Shard) -> dict[str, int]:
    """By key, the entries per row of flat tensors whose rows are whole blocks."""
    out: dict[str, int] = {}
    for name, quant in slots.items():
        if isinstance(quant, Quant) and not padded_width(quant, shard.columns):
            out.update(row_widths(name, quant, shard.columns))
    return out


def _as_bytes(value: Tensor) -> Tensor:
    if value.dtype.itemsize == 1 and value.is_floating_point():
        return value.view(torch.uint8)
    return value.unsqueeze(-1).view(torch.uint8) if value.dtype == torch.int16 else value


def _from_bytes(value: Tensor, like: Tensor) -> Tensor:
    if value.dtype != torch.uint8 or like.dtype == torch.uint8:
        return value
    if like.dtype.itemsize == 1:
        return value.view(like.dtype)
    if like.dtype == torch.int16 and value.dim() and value.shape[-1] == 2:
        return value.contiguous().view(torch.int16).squeeze(-1)
    return value
