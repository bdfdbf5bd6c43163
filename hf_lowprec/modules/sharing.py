# SPDX-License-Identifier: Apache-2.0
"""One quantised tensor for all who read it: q, k and v; gate and up; a norm or an activation and the linear behind it.

`share_input` tells linears that they read the same tensor: their input state becomes one, and the first of them that
sees a tensor quantises it for all. `hand_over` is for producers that quantise what they have just computed, in the
same pass over memory.

Whose copy it is decides the identity of the tensor object, its `_version` and its memory, never the order or number
of calls: a linear that meets another tensor, alone, once more, or in a recomputation, quantises for itself, and
nothing is wrong. Under torch.compile each does. Writes that raise no version (through `.data` or numpy) are not seen.

`offer` is for producers that can make what they have computed again, out of tensors that they keep for backward in
any case: linears of a recipe with `saved_inputs: remade` then keep no codes. An offer is found as a quantised form is,
and a linear that finds none keeps codes; both are counted (`report.kernels`).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from hf_lowprec import ops
from hf_lowprec.functional import quantize_input
from hf_lowprec.modules.state import LayerState
from hf_lowprec.operands import OperandState, Quantized, Remake, Source
from hf_lowprec.ops.registry import count

REMADE, KEPT = "linear, input remade in backward", "linear, input kept as codes for want of a source"
T = TypeVar("T")


class HandOver(Generic[T]):
    """A tensor's quantised form, or its source, for as long as that tensor lives and is not written."""

    def __init__(self) -> None:
        # One attribute, so that another thread sees all of it or none.
        self._held: tuple[weakref.ref[Tensor], tuple[Any, ...], T] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, _: dict[str, Any]) -> None:
        HandOver.__init__(self)

    @property
    def value(self) -> T | None:
        held = self._held
        return None if held is None else held[2]

    def put(self, tensor: Tensor, value: T) -> None:
        # Weakly, or the copy would outlive a tensor that nobody asks about.
        self._held = (weakref.ref(tensor, self._forget), _contents(tensor), value)

    def get(self, tensor: Tensor) -> T | None:
        held = self._held
        if held is None or held[0]() is not tensor or held[1] != _contents(tensor):
            return None
        return held[2]

    def drop(self) -> None:
        self._held = None

    def _forget(self, reference: weakref.ref[Tensor]) -> None:
        held = self._held
        if held is not None and held[0] is reference:
            self.drop()


def _contents(tensor: Tensor) -> tuple[Any, ...]:
    """Another one once the tensor was written, or was given other memory by `tensor.data = ...`.

    A replayed CUDA graph writes tensors without raising versions: what it computes stays within it.
    """
    version = 0 if tensor.is_inference() else tensor._version  # inference tensors have none
    try:
        memory = tensor.data_ptr()
    except RuntimeError:  # fake tensors and wrappers have none
        memory = 0
    return version, memory, tensor.shape, tensor.stride(), _capturing(tensor)


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class SharedInput:
    """The linears that read one tensor, and its quantised form while they do."""

    def __init__(self, members: Sequence[LayerState]) -> None:
        self.members = list(members)
        self._slot: HandOver[Quantized] = HandOver()
        self._observed = False
        self._taken: set[int] = set()

    def quantize(self, member: LayerState, x: Tensor, *, observe: bool, columns: bool) -> Quantized:
        """Q(x), and transposed if `columns` and wgrad reads it so; what another member made if there is any."""
        found = self._slot.get(x)
        if found is None or (observe and not self._observed):
            found = quantize_input(
                x, member.spec, member.operands[0], ready=member.ready[0], observe=observe, columns=columns
            )
            if not x.is_inference():  # has no version: nobody would see that it was written in between
                self.put(x, found, observe)
        elif columns and found.transposed is None and member.spec.shared_input:
            found = found._replace(transposed=ops.transposed(found.rows))
            self._slot.put(x, found)
        self._taken.add(id(member))
        if len(self._taken) == len(self.members):
            self.drop()
        return found

    def put(self, x: Tensor, quantized: Quantized, observed: bool) -> None:
        self._slot.put(x, quantized)
        self._observed = observed
        self._taken.clear()

    def drop(self) -> None:
        self._slot.drop()
        self._taken.clear()

    def set_operand(self, operand: OperandState) -> None:
        for member in self.members:
            member.operands = (operand, *member.operands[1:])


class RemadeInput(SharedInput):
    """Likewise, of a recipe that keeps no codes for wgrad where backward can make them again."""

    def __init__(self, members: Sequence[LayerState]) -> None:
        super().__init__(members)
        self._offered: HandOver[Source] = HandOver()

    def quantize(self, member: LayerState, x: Tensor, *, observe: bool, columns: bool) -> Quantized:
        """Q(x), if `columns` with its source, or transposed where there is none."""
        found = self._slot.get(x)
        if found is None or (observe and not self._observed):
            source = self._source(x) if columns else None
            found = quantize_input(
                x, member.spec, member.operands[0], ready=member.ready[0], observe=observe,
                columns=columns and source is None,
            )  # fmt: skip
            if source is not None:
                found = found._replace(source=source)
            if not x.is_inference():
                self.put(x, found, observe)
        elif columns and found.source is None and found.transposed is None:  # made for somebody who keeps nothing
            source = self._source(x)
            transposed = None if source is not None else ops.transposed(found.rows)
            found = found._replace(transposed=transposed, source=source)
            self._slot.put(x, found)
        if columns:
            count(KEPT if found.source is None else REMADE)
        self._taken.add(id(member))
        if len(self._taken) == len(self.members):
            self.drop()
        return found

    def offer(self, x: Tensor, source: Source) -> None:
        self._offered.put(x, source)

    def drop(self) -> None:
        super().drop()
        self._offered.drop()

    def _source(self, x: Tensor) -> Source | None:
        source = self._offered.get(x)
        if source is None and kept_by_attention(x):
            source = Source(Remake(_itself), (x,))
        return source


def _itself(tensors: Sequence[Tensor]) -> Tensor:
    (x,) = tensors
    return x


_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "TransposeBackward0", "AliasBackward0")


def kept_by_attention(x: Tensor) -> bool:
    """Whether the memory of `x` is the output of torch's attention, which its backward keeps.

    By the autograd nodes between: views share memory, a `contiguous` that copies is none. Attention by its own
    operators only; where torch computes it by matrix products, the output is not kept.
    """
    node = x.grad_fn
    for _ in range(8):
        if node is None:
            return False
        name = node.name()
        if name not in _VIEWS:
            return name.startswith("ScaledDotProduct")
        node = node.next_functions[0][0]
    return False


def share_input(states: Sequence[LayerState]) -> None:
    """Let linears that read the same tensor quantise it once. Idempotent.

    Raises ValueError: their recipes quantise the input differently, or some share with others already.
    """
    states = list(dict.fromkeys(states))
    known = states[0].shared
    if known is not None and known.members == states:
        return
    if any(state.shared is not None and len(state.shared.members) > 1 for state in states):
        raise ValueError("some of these layers share their input with others already")
    first = states[0].spec
    wanted = (first.fprop_input, first.wgrad_input, first.common_input)
    if any((s.spec.fprop_input, s.spec.wgrad_input, s.spec.common_input) != wanted for s in states):
        raise ValueError("layers that quantise their input differently cannot share it")
    if not first.common_input:
        return  # a policy whose quantised form is not the tensor's alone
    group = _group(states)
    for state in states:
        state.shared = group
    group.set_operand(states[0].operands[0])


def _group(states: Sequence[LayerState]) -> SharedInput:
    return RemadeInput(states) if states[0].spec.remade else SharedInput(states)


def hand_over(state: LayerState, x: Tensor, quantized: Quantized) -> None:
    """`quantized` is Q(x) by `state.input_operand()`: the linear of `state`, and those that share its input, use it.

    The producer has noted amax and counts if gradients are enabled now. `x` is the tensor object that the linear will
    be called with. Eager mode only.
    """
    if state.shared is None:
        state.shared = _group([state])
    state.shared.put(x, quantized, torch.is_grad_enabled())


def offer(state: LayerState, x: Tensor, source: Source) -> None:
    """`source` makes `x` again, bit for bit: the linear of `state`, and those that share its input, may save its
    tensors, which the producer's own backward keeps, in place of the codes of `x`."""
    if isinstance(state.shared, RemadeInput):
        state.shared.offer(x, source)
