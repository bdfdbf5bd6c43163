# SPDX-License-Identifier: Apache-2.0
"""The tensors at fixed addresses that graphs read and write, and who else holds them. No CUDA in here.

A layer's input is the output of the layer before it, in most calls: the graph then reads it where it lies. Tensors
that all layers read (rotary embeddings, masks) are copied once per pass for all of them; in each pass, since fused
optimizers and `.data` write them without a sign. What is left, such as the input of the first layer, is copied before
each replay.

What a graph hands out (outputs, gradients of inputs) is overwritten by its next replay. Whether somebody still holds
it is told by the reference count of its memory, and a layer whose results are still in use runs eagerly.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

_use_count = torch._C._storage_Use_Count  # type: ignore[attr-defined]


class Slot:
    """An argument of a graph.

    tensor: at its fixed address, as the layer gets it, detached. linked: it is another graph's result.
    """

    def __init__(self, tensor: Tensor, target: Tensor, *, linked: bool) -> None:
        self.tensor = tensor
        self.linked = linked
        self._target = target  # what is written; smaller than `tensor` where that is expanded
        self._source: weakref.ref[Tensor] | None = None
        self._version = 0

    @classmethod
    def own(cls, like: Tensor) -> Slot:
        """New memory, of the strides of `like`, with its contents. Later contents have these strides, too."""
        narrow = _narrow(like.detach())
        target = torch.empty_like(narrow)
        slot = cls(target.expand(like.shape) if target.shape != like.shape else target, target, linked=False)
        slot.write(like)
        return slot

    @classmethod
    def dense(cls, like: Tensor) -> Slot:
        """New memory without repetition, for contents of any strides."""
        target = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        slot = cls(target, target, linked=False)
        slot.write(like)
        return slot

    @classmethod
    def link(cls, result: Tensor) -> Slot:
        return cls(result, result, linked=True)

    def forget(self) -> None:
        """Another pass begins: the same tensor may have other contents."""
        self._source = None

    def lies_at(self, value: Tensor) -> bool:
        return value.data_ptr() == self.tensor.data_ptr()

    def has(self, value: Tensor) -> bool:
        """Whether the contents are those of `value` already."""
        if self.lies_at(value):
            return True
        source = None if self._source is None else self._source()
        return source is value and self._version == value._version

    @torch.no_grad()
    def write(self, value: Tensor) -> None:
        value_now = value.detach()
        self._target.copy_(value_now if value.shape == self._target.shape else _narrow(value_now))
        self._source, self._version = weakref.ref(value), value._version


def _narrow(tensor: Tensor) -> Tensor:
    """Without repetition along expanded axes."""
    if 0 not in tensor.stride():
        return tensor
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


class Owned:
    """Counts our own references to memory that is handed out."""

    def __init__(self) -> None:
        self._ours: Counter[int] = Counter()

    def add(self, tensor: Tensor) -> Tensor:
        """A reference that lasts as long as the graphs."""
        self._ours[_memory(tensor)] += 1
        return tensor

    def lent(self, memories: Iterable[int]) -> bool:
        """Whether others hold one of these."""
        return any(_use_count(memory) > self._ours[memory] + _EXTRA for memory in memories)


def _extra() -> int:
    """What one tensor's memory counts beside that tensor, once it was asked for its identity."""
    tensor = torch.empty(1)
    return int(_use_count(_memory(tensor))) - 1


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


_EXTRA = _extra()


def bare(tensor: Tensor) -> Tensor:
    """The same memory; what `tensor` is a view of would count as somebody else who holds it."""
    if not tensor._is_view():
        return tensor
    out = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return out.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload, no-any-return]


def memories(tensors: Iterable[Tensor | None]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_memory(tensor) for tensor in tensors if tensor is not None))
