# SPDX-License-Identifier: Apache-2.0
"""A step on the CPU: the truth, over one slice of a parameter after another.

An elementwise algorithm with states in blocks does to a slice of whole blocks what it does to the tensor. A slice and
the dozen temporaries of a step stay in a core's second-level cache, where a pass costs a tenth of a nanosecond per
element; over a whole tensor each of the fifty passes goes to memory. Nothing else differs: a slice is an `Item` whose
tensors are views, and `Item.start` tells stochastic rounding where it begins.

Predicted scales are of the whole tensor: each slice reads with the old scale, writes with the new one (all the same,
as it comes from the bound), and notes its own amax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_lowprec.formats import get_format
from hf_lowprec.numerics.blocks import parameter_names
from hf_lowprec.numerics.containers import group_of
from hf_lowprec.optim.slots import padded_width
from hf_lowprec.recipe import Quant, Residual

if TYPE_CHECKING:
    from hf_lowprec.optim.algorithms import Item

# Elements. Measured for `8bit` AdamW: half of it pays for Python calls, twice as much for page faults of temporaries
# that malloc gives back.
SLICE = 1 << 16


def slices(item: Item, *sizes: int) -> Iterator[Item]:
    """`item`, whose gradient is there, as items of consecutive slices, to be updated one by one.

    sizes: falling; as many slices of each as there is room for, then the rest.

    Slices are whole blocks, but for a last short one. It is the item itself where it is small, not contiguous, or has
    a state whose scale needs a look at all new values, or (a shard) whose blocks are not all of one length.
    """
    numel, align = item.param.numel(), alignment(item)
    cuts = _cuts(numel, align, sizes) if align and item.param.is_contiguous() else []
    if len(cuts) <= 2:
        yield item
        return
    param, grad = item.param.detach().view(-1), item.grad.reshape(-1)
    views = [view for name, slot in item.slots.items() for view in _views(item.state, name, slot)]
    whole = {key: value for key, value in item.state.items() if value.dim() == 0}
    own = [f"{name}_{what}" for name in item.predicted for what in ("scale", "amax")]
    last: list[dict[str, Tensor]] = []
    for start, stop in pairwise(cuts):
        state = whole | {key: flat[start // per * width : -(-stop // per) * width] for key, flat, per, width in views}
        last.append({key: whole[key].clone() for key in own})
        yield replace(
            item, param=param[start:stop], grad=grad[start:stop], state=state | last[-1], start=item.start + start
        )
    for key in own:
        whole[key].copy_(torch.stack([values[key] for values in last]).amax())  # the scales are all the same


def _cuts(numel: int, align: int, sizes: tuple[int, ...]) -> list[int]:
    """Where slices begin, and the end."""
    cuts, whole = [0], numel // align * align
    for size in sizes:
        step = max(size // align, 1) * align
        cuts.extend(range(cuts[-1] + step, whole + 1, step))
    for stop in (whole, numel):
        if stop > cuts[-1]:
            cuts.append(stop)
    return cuts


def alignment(item: Item) -> int:
    """Of what slices are multiples: whole blocks, whole bytes; 0 if it cannot be sliced."""
    align = 1
    if item.states.weight is not None and item.states.weight.scaling.method == "current":
        return 0
    for slot in item.slots.values():
        if not isinstance(slot, Quant):
            continue
        if item.shard is not None and padded_width(slot, item.shard.columns):
            return 0
        if slot.scaling.granularity == "block":
            align = math.lcm(align, slot.scaling.block[0])
        elif slot.scaling.granularity != "tensor" or slot.scaling.method not in ("none", "static", "predicted"):
            return 0
        align = math.lcm(align, group_of(get_format(slot.format))[0])
    return align


def _views(
    state: dict[str, Tensor], name: str, slot: Quant | Residual | str | None
) -> Iterator[tuple[str, Tensor, int, int]]:
    """(key, flat tensor, elements of the Parameter, their entries) of what a slot has more than one of."""
    if isinstance(slot, Quant):
        yield f"{name}_qdata", state[f"{name}_qdata"].view(-1), *group_of(get_format(slot.format))
        if slot.scaling.granularity == "block":
            for what in parameter_names(slot):
                yield f"{name}_{what}", state[f"{name}_{what}"], slot.scaling.block[0], 1
    else:
        key = f"{name}_residual" if isinstance(slot, Residual) else name
        yield key, state[key].view(-1), 1, 1
