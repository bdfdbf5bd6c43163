# SPDX-License-Identifier: Apache-2.0
"""One captured layer, and its replays as a function of autograd.

Forward is one graph and backward another. In the manner of `torch.cuda.make_graphed_callables`, but captured in the
middle of a training step: forward when the layer is called, backward when autograd comes to it, so that the order of
captures is that of the step by itself, and the very inputs are at hand.

Parameters come in by aliases that autograd knows nothing of: their own accumulation nodes belong to the training
stream, and would pull it into the capture. Their gradients go out through autograd, so that hooks, DDP and
accumulation work as ever: as a copy, or, where they are going to be added to what is there, as they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowprec.functional import applier
from hf_lowprec.graphs import calls, memory
from hf_lowprec.graphs.capture import CaptureError, Capturer, GraphError, Recording
from hf_lowprec.graphs.memory import Owned, Slot
from hf_lowprec.graphs.order import Order, Pending
from hf_lowprec.graphs.snapshot import Snapshot, attributes, host_random, stored
from hf_lowprec.modules.weight_cache import same_place
from hf_lowprec.operands import Quantized

BUSY = "an earlier pass still holds a copy of a weight"
ELSEWHERE = "its input comes from another place than when it was captured"


class Shared:
    """What the graphs of one kind of pass know of each other.

    results: outputs, by address; grads: gradients of inputs, by address. inputs: slots of all other arguments; those
    without gradients several layers may read.
    """

    def __init__(self, capturer: Capturer, order: Order) -> None:
        self.capturer = capturer
        self.order = order
        self.owned = Owned()
        self.results: dict[int, Tensor] = {}
        self.grads: dict[int, Tensor] = {}
        self.inputs: list[Slot] = []

    def slot(self, value: Tensor) -> Slot:
        """For an argument: a result of another graph, what others read already, or new memory."""
        found = self.results.get(value.data_ptr())
        if found is not None and _alike(found, value):
            return Slot.link(self.owned.add(found.detach()))
        if not value.requires_grad:
            for slot in self.inputs:
                if slot.has(value) and _alike(slot.tensor, value) and not slot.tensor.requires_grad:
                    return slot
        slot = Slot.own(value)
        self.inputs.append(slot)
        return slot

    def begin(self) -> None:
        """Another pass begins."""
        for slot in self.inputs:
            slot.forget()

    def grad_slot(self, value: Tensor) -> Slot:
        found = self.grads.get(value.data_ptr())
        if found is not None and _alike(found, value):
            return Slot.link(self.owned.add(found.detach()))
        return Slot.dense(value)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


class LayerGraph:
    """A layer for one kind of call. Made by a call, which it captures and does not run.

    begun, ended: times of the two captures (`graphs.order`).
    Raises GraphError: it cannot be captured.
    """

    ended: int | None

    def __init__(
        self, name: str, layer: nn.Module, forward: Callable[..., Any], call: calls.Call, snapshot: Snapshot,
        shared: Shared, copies: Sequence[tuple[nn.Module, Quantized]],
    ) -> None:  # fmt: skip
        self.name = name
        self.shared = shared
        self.copies = list(copies)
        self.slots = [shared.slot(leaf) for leaf in call.leaves]
        self._leaves = [
            slot.tensor.requires_grad_() if leaf.requires_grad else slot.tensor
            for slot, leaf in zip(self.slots, call.leaves, strict=True)
        ]
        self.parameters = snapshot.parameters
        stand_ins = {id(p): nn.Parameter(p.detach()) for p in self.parameters}
        self._stand_ins = [stand_ins[id(p)] for p in self.parameters]
        self._places = [(owner, key, p, stand_ins[id(p)]) for owner, key, p in snapshot.parameter_owners()]
        self._given: list[Quantized] = []  # copies of weights for the next pass, as they were given out
        self._live: list[Tensor] = []  # outputs that autograd can go back from, until backward is captured
        self._spec: Any = None
        self._origin: list[int] = []  # of each tensor that is returned: the argument that it is (>= 0), or ~output

        spec = call.spec

        def run() -> list[Tensor | None]:
            with self._standing_in(), _without_autocast_cache():
                return self._outputs(forward, layer, spec)

        before, drawn = attributes(layer), host_random(shared.capturer.device)
        self.begun, self.ended = shared.order.now(), None
        for module, quantized in self.copies:
            module._lowprec.weight_cache.lent = quantized  # type: ignore[union-attr]
        try:
            self._forward, outputs = self._record(run, "forward")
        finally:
            for module, _ in self.copies:
                module._lowprec.weight_cache.lent = None  # type: ignore[union-attr]
        where = stored(before, attributes(layer))
        if where is not None:
            raise GraphError(f"{name} cannot be captured: its forward stores {where}, which replays would not")
        if drawn != host_random(shared.capturer.device):
            raise GraphError(
                f"{name} cannot be captured: its forward draws random numbers on the host, and replays would all do "
                "as the first draw had it: train without graphs of layers (HF_LOWPREC_GRAPHS=0)"
            )
        self.outputs: list[Tensor] = [shared.owned.add(out) for out in outputs if out is not None]
        shared.results.update((out.data_ptr(), out) for out in self.outputs)
        self.differentiable = [out.requires_grad for out in self._live]
        self._backward: Recording | None = None
        self._grad_slots: list[Slot | None] = []
        self._grads: list[Tensor | None] = []
        self._handed = memory.memories(self.outputs)

    # --- capture ----------------------------------------------------------------------------------------------------

    def _record(self, function: Any, what: str) -> tuple[Recording, list[Tensor | None]]:
        try:
            return self.shared.capturer.record(function)
        except calls.Opaque as error:
            raise GraphError(f"{self.name} cannot be captured: {error}") from error
        except RuntimeError as error:
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CaptureError(
                f"{self.name} cannot be captured ({what}): {text}. What waits for the device, as routing by values "
                "does, and what writes its input in place does not go into a graph: train without graphs of layers "
                "(HF_LOWPREC_GRAPHS=0)"
            ) from error

    @contextmanager
    def _standing_in(self) -> Iterator[None]:
        try:
            for owner, key, _, stand_in in self._places:
                owner[key] = stand_in
            yield
        finally:
            for owner, key, parameter, _ in self._places:
                owner[key] = parameter

    def _outputs(self, forward: Callable[..., Any], layer: nn.Module, spec: Any) -> list[Tensor | None]:
        args, kwargs = calls.unflatten(spec, iter(self._leaves))
        versions = [leaf._version for leaf in self._leaves]
        returned, self._spec = calls.flatten(forward(layer, *args, **kwargs), "the results")
        if versions != [leaf._version for leaf in self._leaves]:
            raise calls.Opaque("its forward writes an argument in place")
        given = {id(leaf): i for i, leaf in enumerate(self._leaves)}
        self._live, self._origin = [], []
        for tensor in returned:
            if id(tensor) in given:
                self._origin.append(given[id(tensor)])
            else:
                self._origin.append(~len(self._live))
                self._live.append(tensor)
        return [tensor.detach() for tensor in self._live]

    def _capture_backward(self, grads: Sequence[Tensor]) -> None:
        wanted = [leaf for leaf in self._leaves if leaf.requires_grad] + self._stand_ins
        self._grad_slots = [
            self.shared.grad_slot(grad) if needs else None
            for grad, needs in zip(grads, self.differentiable, strict=True)
        ]

        def run() -> list[Tensor | None]:
            outputs, self._live = self._live, []
            grads = torch.autograd.grad(
                [out for out in outputs if out.requires_grad], wanted,
                [slot.tensor for slot in self._grad_slots if slot is not None], allow_unused=True,
            )  # fmt: skip
            return [None if grad is None else memory.bare(grad) for grad in grads]

        ended = self.shared.order.now()
        self._backward, self._grads = self._record(run, "backward")
        self.ended = ended
        inputs = len(wanted) - len(self._stand_ins)
        for grad in self._grads[:inputs]:
            if grad is not None:
                self.shared.grads[self.shared.owned.add(grad).data_ptr()] = grad
        self._handed = memory.memories([*self.outputs, *self._grads[:inputs]])

    # --- replay -----------------------------------------------------------------------------------------------------

    def conflict(self, leaves: Sequence[Tensor]) -> str | None:
        """Why a call must not be replayed now, or None."""
        order = self.shared.order
        if not order.allows(self.begun):
            return "an earlier pass has its backward pass still to come"
        if self.shared.owned.lent(self._handed):
            return "a result of an earlier pass is still in use"
        for slot, leaf in zip(self.slots, leaves, strict=True):
            if slot.has(leaf):
                continue
            if slot.linked:
                return ELSEWHERE
            if any(slot in call.graph.slots for call in order.pending()):  # type: ignore[attr-defined]
                return "an earlier pass still reads other arguments"
        return None

    def refreshed(self) -> str | None:
        """Bring low-precision copies of the weights up to date. Why that cannot be, for now (BUSY) or for good."""
        self._given = []
        for module, quantized in self.copies:
            state: Any = module._lowprec
            weight: Any = module._parameters["weight"]
            now = state.weight_cache.get(
                weight, state.spec, state.operands[1], ready=state.ready[1], training=module.training
            )
            if now is None or not same_place(now, quantized):
                return BUSY if state.weight_cache.holds(quantized) else "a copy of a weight lies elsewhere"
            self._given.append(now)
        return None

    def __call__(self, leaves: Sequence[Tensor]) -> Any:
        """The layer's results; the caller has asked `conflict`."""
        for slot, leaf in zip(self.slots, leaves, strict=True):
            if not slot.has(leaf):
                slot.write(leaf)
        pending = _Pass(self, self._given)
        self._given = []
        trained = [leaf for leaf in leaves if leaf.requires_grad]
        outputs = _apply(pending, *trained, *self.parameters)
        returned = (leaves[i] if i >= 0 else outputs[~i] for i in self._origin)
        return calls.unflatten(self._spec, returned)

    def play_forward(self) -> tuple[Tensor, ...]:
        self._forward.replay()
        return tuple(out.detach() for out in self.outputs)

    def play_backward(self, node: Any, grads: Sequence[Tensor]) -> list[Tensor | None]:
        if self._backward is None:
            self._capture_backward(grads)
        else:
            for slot, grad in zip(self._grad_slots, grads, strict=True):
                if slot is None or slot.lies_at(grad):
                    continue
                if slot.linked and self.shared.owned.lent(memory.memories([slot.tensor])):
                    raise GraphError(
                        f"{self.name}: the gradient of its output was replaced by a hook that also keeps it; keep a "
                        "clone, or train without graphs of layers (HF_LOWPREC_GRAPHS=0)"
                    )
                slot.write(grad)
        assert self._backward is not None
        self._backward.replay()
        inputs = len(self._grads) - len(self.parameters)
        own = [None if grad is None else grad.detach() for grad in self._grads[:inputs]]
        return [*own, *_outgoing(node, inputs, self.parameters, self._grads[inputs:])]


def _outgoing(
    node: Any, first: int, parameters: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients as autograd may have them: it takes what it is given for `.grad` where there is none, and the next
    replay would write that. Only what is certain to be added to a `.grad` at once goes out as it lies."""
    out: list[Tensor | None] = list(grads)
    adds = _accumulates(node, first)
    copied = [
        i
        for i, (p, grad) in enumerate(zip(parameters, grads, strict=True))
        if grad is not None and not (adds and p.grad is not None and not p._backward_hooks)
    ]
    if copied:
        static: list[Any] = [grads[i] for i in copied]
        fresh = [torch.empty_like(grad) for grad in static]
        torch._foreach_copy_(fresh, static)
        for i, grad in zip(copied, fresh, strict=True):
            out[i] = grad
    return out


def _accumulates(node: Any, first: int) -> bool:
    """Whether this is a `.backward()` that adds to `.grad` of Parameters; torch.autograd.grad hands gradients out."""
    accumulate = node.next_functions[first][0]
    try:
        return bool(torch._C._will_engine_execute_node(accumulate))
    except RuntimeError:
        return False


class _Pass(Pending):
    """One forward pass of a graph: what its node in autograd's graph holds."""

    graph: LayerGraph

    def __init__(self, graph: LayerGraph, copies: list[Quantized]) -> None:
        super().__init__(graph)
        self.done = False
        self.copies = copies  # which nobody writes over while they are held here
        self.versions = [parameter._version for parameter in graph.parameters]


class _Graphed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Pass, *tensors: Tensor) -> tuple[Tensor, ...]:
        graph = call.graph
        outputs = graph.play_forward()
        ctx.call = call
        ctx.mark_non_differentiable(
            *(out for out, needs in zip(outputs, graph.differentiable, strict=True) if not needs)
        )
        graph.shared.order.begin(call)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call: _Pass = ctx.call
        name = call.graph.name
        if torch.is_grad_enabled():
            raise GraphError(f"{name}: gradients of gradients (create_graph=True) do not go through a graph")
        if call.done:
            raise GraphError(
                f"{name}: its gradients are asked for twice, and a graph keeps its activations for one backward pass: "
                "call backward once, or train without graphs of layers (HF_LOWPREC_GRAPHS=0)"
            )
        if call.lost:
            raise GraphError(
                f"{name}: its activations were overwritten by backward passes of layers before it, which ran first: "
                "train without graphs of layers (HF_LOWPREC_GRAPHS=0)"
            )
        if call.versions != [parameter._version for parameter in call.graph.parameters]:
            raise GraphError(
                f"{name}: its weights were written between its forward and its backward pass, which reads them: write "
                "them after it, or train without graphs of layers (HF_LOWPREC_GRAPHS=0)"
            )
        call.graph.shared.order.end(call)
        call.done = True
        grads_in = call.graph.play_backward(ctx, grads)
        call.copies = []
        return (None, *grads_in)


_apply = applier(_Graphed)


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Autocast's copies of weights would outlive the capture, in the graph's memory; and a graph has to cast anew."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
