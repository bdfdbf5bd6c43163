# SPDX-License-Identifier: Apache-2.0
"""One quantised tensor for all who read it: q, k and v; gate and up; a norm or an activation and the linear behind it.

`share_input` tells linears that they read the same tensor: their input state becomes one, and the first of them that
sees a tensor quantises it for all. `hand_over` is for producers that quantise what they have just computed, in the
same pass over memory.

Whose copy it is decides the identity of the tensor object, its `_version` and its memory, never the order or number
of calls: a linear that meets another tensor, alone, once more, or in a recomputation, quantises for itself, and
nothing is wrong. Under torch.compile each does. Writes that raise no version (through `.data` or numpy) are not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowprec import ops
from hf_lowprec.functional import quantize_input
from hf_lowprec.modules.state import LayerState
from hf_lowprec.operands import OperandState, Quantized


class HandOver:
    """A tensor's quantised form, for as long as that tensor lives and is not written."""

    def __init__(self) -> None:
        # One attribute, so that another thread sees all of it or none.
        self._held: tuple[weakref.ref[Tensor], tuple[Any, ...], Quantized] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, _: dict[str, Any]) -> None:
        HandOver.__init__(self)

    @property
    def value(self) -> Quantized | None:
        held = self._held
        return None if held is None else held[2]

    def put(self, tensor: Tensor, value: Quantized) -> None:
        # Weakly, or the copy would outlive a tensor that nobody asks about.
        self._held = (weakref.ref(tensor, self._forget), _contents(tensor), value)

    def get(self, tensor: Tensor) -> Quantized | None:
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
        self._slot = HandOver()
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
    group = SharedInput(states)
    for state in states:
        state.shared = group
    group.set_operand(states[0].operands[0])


def hand_over(state: LayerState, x: Tensor, quantized: Quantized) -> None:
    """`quantized` is Q(x) by `state.input_operand()`: the linear of `state`, and those that share its input, use it.

    The producer has noted amax and counts if gradients are enabled now. `x` is the tensor object that the linear will
    be called with. Eager mode only.
    """
    if state.shared is None:
        state.shared = SharedInput([state])
    state.shared.put(x, quantized, torch.is_grad_enabled())
