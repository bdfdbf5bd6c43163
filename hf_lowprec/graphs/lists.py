# SPDX-License-Identifier: Apache-2.0
"""The repeated layers of a model, each call of which is run eagerly, captured, or replayed.

A graphed layer is its own class with another `forward`, as converted modules are; its name, its weights, its hooks and
whoever holds it notice nothing. Copies and pickles of it are of the class that it had, without graphs.
"""

from __future__ import annotations

import copyreg
import logging
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import nn

from hf_lowprec import stepping
from hf_lowprec.conversion import follows_measurements, unwrapped
from hf_lowprec.graphs import calls
from hf_lowprec.graphs.capture import CaptureError, Capturer, CudaCapturer, GraphError
from hf_lowprec.graphs.gauge import CudaGauge
from hf_lowprec.graphs.layer import BUSY, ELSEWHERE, LayerGraph, Shared
from hf_lowprec.graphs.order import Order
from hf_lowprec.graphs.record import Record
from hf_lowprec.graphs.rehearsal import Gauge, Rehearsal, several_devices, unknown
from hf_lowprec.graphs.snapshot import RUNNER, Snapshot
from hf_lowprec.modules.linear import LowPrecMixin, forward_is_replaced, set_class
from hf_lowprec.modules.weight_cache import steps
from hf_lowprec.operands import Quantized
from hf_lowprec.session import Session, session_of

_LOG = logging.getLogger("hf_lowprec")

OWNER = "_hf_lowprec_graphs"  # in a model's __dict__
_KEPT = 64  # kinds of calls that are counted
_PAUSE = 200  # optimizer steps until it is asked again whether the GPU waits
_PATIENCE = 50  # optimizer steps in which graphs that nobody asked for must have been captured
# Nothing to say about: a training run has them.
_USUAL = ("no gradients", "recomputed in a backward pass", "in evaluation mode", "warming up", "captured")

NewCapturer = Callable[[torch.device], Capturer]
NewGauge = Callable[[torch.device], Gauge]


class _Runner:
    """One layer's place in its list. `version` counts what the layer was like."""

    def __init__(self, owner: LayerList, index: int, name: str) -> None:
        self.owner = owner
        self.index = index
        self.name = name
        self.snapshot: Snapshot | None = None
        self.version = 0
        self.changed = "the kind of its calls"
        self.copied: list[nn.Module] = []  # linears that read a kept copy of their weight in the last eager call

    def look(self, layer: nn.Module) -> Snapshot:
        """What the layer is like now."""
        changed = None if self.snapshot is None else self.snapshot.change()
        if self.snapshot is None or changed is not None:
            self.snapshot = Snapshot(layer)
            self.changed = changed or self.changed
            self.version += 1
        return self.snapshot

    def eagerly(self, layer: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The layer's own forward; notes whose copies it reads."""
        assert self.snapshot is not None
        linears: list[Any] = self.snapshot.states()
        for linear in linears:
            linear._lowprec.weight_cache.asked = False
        out = forward(layer, *args, **kwargs)
        self.copied = [linear for linear in linears if linear._lowprec.weight_cache.asked]
        return out


class LayerList:
    """The layers of one nn.ModuleList, whose graphs share memory."""

    def __init__(self, name: str, layers: list[nn.Module], how: _Options) -> None:
        self.name = name
        self.how = how
        self.replays = 0
        self.eager: Counter[str] = Counter()  # reason -> calls
        self._layers = [weakref.ref(layer) for layer in layers]
        self._order = Order()
        self._capturer: Capturer | None = None
        self._records: OrderedDict[Hashable, Record[LayerGraph]] = OrderedDict()
        self._record: Record[LayerGraph] | None = None
        self._last = -1
        self._said: set[str] = set()
        self._since: int | None = None  # the optimizer step of the first pass
        self._off: str | None = None  # why no call is looked at, of graphs that nobody asked for
        self._until: int | None = None  # the optimizer step from which on they are, or for ever

    @property
    def size(self) -> int:
        return len(self._layers)

    @property
    def captured(self) -> int:
        """How many layers have a graph, of any kind of call."""
        return len({index for record in self._records.values() for index in record.graphs})

    @property
    def kinds(self) -> int:
        return sum(bool(record.graphs) for record in self._records.values())

    def run(self, runner: _Runner, layer: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of `layer`. Raises GraphError: it cannot be captured."""
        if self._off is not None:
            if self._until is None or steps() < self._until:
                return forward(layer, *args, **kwargs)
            self._off = self._until = self._since = None
        reason, call = self._reason(runner, layer), None
        if reason is None:
            snapshot = runner.snapshot
            assert snapshot is not None
            try:
                call = calls.call_of(args, kwargs, snapshot.parameters[0].device)
            except calls.Opaque as error:
                reason = str(error)
        if call is None:
            assert reason is not None
            self._note(reason, runner)
            return forward(layer, *args, **kwargs)
        assert runner.snapshot is not None
        record = self._enter(runner.index, call.key)
        way = record.way(runner.index, call.key, runner.version, f"{runner.name}: {runner.changed}")
        if way == "capture":
            try:
                graph = self._capture(record, runner, layer, forward, call, runner.snapshot)
            except GraphError as error:
                if self.how.gauge is None or isinstance(error, CaptureError):
                    raise
                self._stop(str(error))
                return forward(layer, *args, **kwargs)
            if graph is not None:
                record.graphs[runner.index] = graph
                graph.refreshed()
                return graph(call.leaves)
            self._note("an earlier pass has its backward pass still to come", runner)
        elif way == "replay":
            graph = record.graphs[runner.index]
            reason = graph.conflict(call.leaves)
            stale = graph.refreshed() if reason is None else None
            if reason is None and stale is None:
                self.replays += 1
                return graph(call.leaves)
            if reason == ELSEWHERE:
                record.misfit(steps(), reason)
            elif stale is not None and stale != BUSY:
                record.drop(stale)
            self._note(reason or stale or record.why, runner)
        else:
            self._note(record.why, runner)
        if record.rehearsal is None:
            return runner.eagerly(layer, forward, args, kwargs)
        return record.rehearsal.call(runner.index, layer, lambda: runner.eagerly(layer, forward, args, kwargs))

    def _reason(self, runner: _Runner, layer: nn.Module) -> str | None:
        """Why this call must run eagerly, whatever its arguments, or None."""
        if not layer.training:  # its modules are others then, but for a while
            return "in evaluation mode"
        if not torch.is_grad_enabled():
            return "no gradients"
        snapshot = runner.look(layer)
        if snapshot.refusal is not None:
            return snapshot.refusal
        device = snapshot.parameters[0].device
        if device.type != self.how.device_type:
            return f"on the {device.type.upper()}"
        if self._capturer is not None and device != self._capturer.device:
            return "layers on several devices"
        return calls.refusal(device.type)

    def _enter(self, index: int, key: Hashable) -> Record[LayerGraph]:
        """The record of the pass that this call belongs to."""
        if index > self._last and self._record is not None:
            self._last = index
            return self._record
        self._last = index
        record = self._records.get((index, key))
        if record is None:
            while len(self._records) >= _KEPT:
                idle = next((k for k, r in self._records.items() if not r.graphs), None)
                if idle is None:
                    break
                del self._records[idle]
            record = self._records[index, key] = Record(self.how.warmup_steps)
        self._record = record
        for graph in record.graphs.values():
            graph.shared.begin()
            break
        allowed = bool(record.graphs) or self.kinds < self.how.max_kinds
        stage = record.stage
        record.begin(steps(), idle=self._order.idle, allowed=allowed)
        if not allowed:
            record.why = f"more than {self.how.max_kinds} kinds of calls"
        elif self.how.gauge is not None:
            self._rehearse(record, self.how.gauge, began=stage == "warming" and record.stage == "capturing")
        return record

    def _rehearse(self, record: Record[LayerGraph], gauge: NewGauge, *, began: bool) -> None:
        """Of graphs that nobody asked for: watch the passes before, and decide when captures would begin."""
        self._since = steps() if self._since is None else self._since
        if began:
            rehearsal, record.rehearsal = record.rehearsal, None
            why = "nothing was seen of it" if rehearsal is None else rehearsal.verdict(self._gradient_bytes())
            if why is not None:
                record.give_up(why)
            if why is None:
                _LOG.info("CUDA graphs of %s: captured from now on", self.name)
            elif rehearsal is not None and rehearsal.why is not None:
                self._stop(why)
            elif not self.captured:  # a question of size: asked again some time, and no look at calls until then
                self._stop(why)
                self._until = steps() + _PAUSE
        elif record.stage == "warming" and record.quiet:
            if record.rehearsal is None:
                device = next(p.device for layer in self._alive() for p in layer.parameters())
                record.rehearsal = Rehearsal(gauge(device))
            record.rehearsal.begin()
        elif record.stage == "warming" and not self.captured and steps() - self._since > _PATIENCE:
            self._stop(f"no call was like those of {self.how.warmup_steps} steps before")

    def _alive(self) -> list[nn.Module]:
        return [layer for reference in self._layers if (layer := reference()) is not None]

    def _gradient_bytes(self) -> int:
        trained = {id(p): p for layer in self._alive() for p in layer.parameters() if p.requires_grad}
        return sum(p.numel() * p.element_size() for p in trained.values())

    def _stop(self, why: str) -> None:
        _LOG.info("CUDA graphs of %s: none, %s", self.name, why)
        self.clear()
        self._off = why

    def insist(self) -> None:
        """Graphs were asked for, after they had been left to a rehearsal."""
        self.clear()
        self._off = self._until = None

    def _capture(
        self, record: Record[LayerGraph], runner: _Runner, layer: nn.Module, forward: Callable[..., Any],
        call: calls.Call, snapshot: Snapshot,
    ) -> LayerGraph | None:  # fmt: skip
        if not self._order.allows(None):
            return None
        if self._capturer is None:
            self._capturer = self.how.capturer(snapshot.parameters[0].device)
        first = next(iter(record.graphs.values()), None)
        shared = Shared(self._capturer, self._order) if first is None else first.shared
        copies: list[tuple[nn.Module, Quantized]] = []
        for linear in runner.copied:
            state: Any = linear._lowprec
            weight = linear._parameters.get("weight")
            if weight is None:
                continue  # computed at each call, and cast there
            kept = state.weight_cache.get(
                weight, state.spec, state.operands[1], ready=state.ready[1], training=linear.training
            )
            if kept is not None:
                state.weight_cache.hold()
                copies.append((linear, Quantized(*kept)))  # so that the one given out is held by passes alone
        return LayerGraph(runner.name, layer, forward, call, snapshot, shared, copies)

    def _note(self, reason: str, runner: _Runner) -> None:
        self.eager[reason] += 1
        if reason in _USUAL or reason in self._said or self.eager[reason] < 3 * self.size:
            return
        if self.how.gauge is not None and not reason.endswith(calls.NO_CACHE):  # nobody asked, nothing to be done
            return
        self._said.add(reason)
        warnings.warn(f"{runner.name} runs without its graph: {reason}", stacklevel=2)

    def clear(self) -> None:
        """Drop all graphs."""
        self._records.clear()
        self._record, self._last, self._capturer = None, -1, None
        for layer in self._alive():
            for linear in layer.modules():
                if isinstance(linear, LowPrecMixin):
                    linear._lowprec.weight_cache.release()

    def summary(self) -> str:
        if self.how.gauge is not None and not self.captured:
            given_up = next((r.why for r in reversed(self._records.values()) if r.stage == "given up"), None)
            why = self._off or given_up
            return f"{self.name} if the GPU waits for the host" if why is None else f"none of {self.name}: {why}"
        out = f"{self.captured} of {self.size} layers of {self.name}"
        if self.kinds > 1:
            out += f" for {self.kinds} kinds of calls"
        unusual = [(reason, count) for reason, count in self.eager.most_common() if reason not in _USUAL]
        if unusual:
            out += f" ({unusual[0][1]} calls eager: {unusual[0][0]})"
        return out


class _Options:
    """gauge: where graphs are taken only if they gain; None: where they were asked for."""

    def __init__(
        self, warmup_steps: int, max_kinds: int, capturer: NewCapturer, gauge: NewGauge | None, device_type: str
    ) -> None:
        self.warmup_steps, self.max_kinds = warmup_steps, max_kinds
        self.capturer, self.gauge, self.device_type = capturer, gauge, device_type


class Bound(NamedTuple):
    """Of a call of a linear, below which it runs in the base precision: as reported, and as `LayerState.least`."""

    tokens: int
    elements: int


class LayerGraphs:
    """Returned by `graph_layers`; `str()` of it is a line for the log.

    lists: one per nn.ModuleList of repeated layers. Their `eager` counts calls that ran without a graph by reason,
    `replays` those that ran with one, `captured` the layers that have a graph.
    """

    def __init__(self, lists: list[LayerList], bounds: dict[str, Bound] | None = None) -> None:
        self.lists = lists
        self._bounds = bounds or {}

    @property
    def captured(self) -> int:
        return sum(one.captured for one in self.lists)

    @property
    def replays(self) -> int:
        return sum(one.replays for one in self.lists)

    @property
    def eager(self) -> dict[str, int]:
        return dict(sum((one.eager for one in self.lists), Counter()))

    def clear(self) -> None:
        """Drop all graphs and their memory; they are captured anew. A backward pass that is to come still works."""
        for one in self.lists:
            one.clear()

    @property
    def lifted(self) -> dict[str, int]:
        """Linear -> tokens of a call from which on it gained without graphs (`break_even`): no bound with them."""
        return {name: bound.tokens for name, bound in self._bounds.items()}

    @property
    def bounds(self) -> dict[str, Bound]:
        """What `ungraph_layers` puts back."""
        return self._bounds

    @property
    def automatic(self) -> bool:
        """Whether nobody has asked for them (`graph_layers(when="waiting")`)."""
        return any(one.how.gauge is not None for one in self.lists)

    def insist(self) -> None:
        """From now on as with `graph_layers(when="always")`."""
        for one in self.lists:
            if one.how.gauge is not None:
                one.insist()
        for one in self.lists:
            one.how.gauge = None

    def __str__(self) -> str:
        return ", ".join(one.summary() for one in self.lists)

    def __reduce__(self) -> Any:  # copies and pickles of a model have none
        return _none, ()


def _none() -> None:
    return None


class GraphedLayer:
    """The shared body; the runner is attached by `graph_layers`."""

    _original: ClassVar[Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = self._original.forward
        runner: _Runner | None = self.__dict__.get(RUNNER)
        if torch.compiler.is_compiling() or runner is None:
            return forward(self, *args, **kwargs)
        return runner.owner.run(runner, self, forward, args, kwargs)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if reduced[0] is not copyreg.__newobj__ or reduced[1][0] is not type(self):  # type: ignore[attr-defined, index]
            return reduced
        state = {key: value for key, value in reduced[2].items() if key != RUNNER}  # type: ignore[index, union-attr]
        return (_blank, (self._original, *reduced[1][1:]), state, *reduced[3:])  # type: ignore[index]


def _blank(original: Any, *args: Any) -> Any:
    return original.__new__(original, *args)


_CLASSES: dict[type, type] = {}


def _graphed_class(original: type) -> type:
    cls = _CLASSES.get(original)
    if cls is None:
        names = {key: getattr(original, key) for key in ("__module__", "__qualname__", "__doc__")}  # FSDP asks by name
        cls = type(original.__name__, (GraphedLayer, original), {"_original": original, **names})
        _CLASSES[original] = cls
    return cls


def graph_layers(
    model: nn.Module,
    *,
    when: Literal["always", "waiting"] = "always",
    warmup_steps: int = 3,
    max_kinds: int = 4,
    capturer: NewCapturer | None = None,
    gauge: NewGauge | None = None,
    device_type: str = "cuda",
) -> LayerGraphs:
    """Train the repeated layers of `model` by CUDA graphs: each layer's forward is one launch, its backward another.

    For models and micro-batches whose steps wait for the host. Works with and without `convert`, which comes first if
    it comes. Layers run eagerly until `warmup_steps` optimizer steps of torch.optim have passed without a change, then
    are captured in the middle of a step. Whatever a graph cannot stand for runs eagerly: `str()` of the result says
    what and why. Idempotent.

    Args:
        when: `waiting`: only if the warm-up shows that the GPU waits for the host, that the layers can be captured and
            that there is memory for it; otherwise they go on eagerly, and the result says why. Layers of packages
            that are not known are refused then. A later call with `always` insists.
        max_kinds: shapes and other kinds of calls that are captured; any further ones run eagerly.
        capturer, gauge, device_type: for tests.

    Raises ValueError: `when`, `warmup_steps`, `max_kinds`. Raises GraphError: no CUDA device; no repeated layers; a
    recipe with ranges that are searched or learned; FSDP. In training: a layer that cannot be captured.
    """
    if capturer is None and not torch.cuda.is_available():
        raise GraphError("graphs of layers need a CUDA device, and torch.cuda.is_available() is False")
    if warmup_steps < 1 or max_kinds < 1:
        raise ValueError(f"warmup_steps={warmup_steps}, max_kinds={max_kinds}: at least 1 of each")
    if when not in ("always", "waiting"):
        raise ValueError(f"when={when!r}: always or waiting")
    if when == "waiting" and warmup_steps < 2:
        raise ValueError(f"when='waiting' watches a step before it decides: warmup_steps={warmup_steps}, at least 2")
    model = unwrapped(model)
    existing: LayerGraphs | None = model.__dict__.get(OWNER)
    if existing is not None:
        if when == "always":
            existing.insist()
        return existing
    session = session_of(model)
    if session is not None and session.recipe.flexible:
        raise GraphError(
            f"recipe {session.recipe.name!r} searches or learns ranges, whose gradients take another way than those "
            "of Parameters: train it without graphs of layers"
        )
    sharded = next((m for m in model.modules() if any("FullySharded" in c.__name__ or c.__name__ == "FSDPModule"
                                                      for c in type(m).__mro__)), None)  # fmt: skip
    if sharded is not None:
        raise GraphError(
            "FSDP moves weights from pass to pass, and graphs read fixed addresses: choose one of the two"
        )
    found = repeated_layers(model)
    if not found:
        raise GraphError(
            f"{type(model).__name__} has no nn.ModuleList of two or more layers with weights: nothing to graph"
        )
    theirs = next((n for layers in found.values() for n, m in layers.items() if isinstance(m, GraphedLayer)), None)
    if theirs is not None:
        raise GraphError(
            f"{theirs} has graphs already, by `graph_layers` of a model that is a part of this one, or has it as a "
            "part: call it for one of them"
        )
    members = [layer for layers in found.values() for layer in layers.values()]
    against = (unknown(members) or several_devices(members)) if when == "waiting" else None
    if against is not None:
        raise GraphError(against)
    watch = None if when == "always" else gauge or CudaGauge
    how = _Options(warmup_steps, max_kinds, capturer or CudaCapturer, watch, device_type)
    bounds = None if session is None or when == "waiting" else _lift_rule(session)
    lists = []
    for name, layers in found.items():
        owner = LayerList(name, list(layers.values()), how)
        lists.append(owner)
        for index, (full, layer) in enumerate(layers.items()):
            layer.__dict__[RUNNER] = _Runner(owner, index, full)
            set_class(layer, _graphed_class(type(layer)))
    graphs = model.__dict__[OWNER] = LayerGraphs(lists, bounds)
    if session is not None:
        session.report.graphs = graphs
        session.on_end(lambda: ungraph_layers(model))
    stepping.install_hooks()
    return graphs


def ungraph_layers(model: nn.Module) -> None:
    """Undo `graph_layers`; nothing happens to any other model."""
    model = unwrapped(model)
    graphs: LayerGraphs | None = model.__dict__.pop(OWNER, None)
    if graphs is not None:
        graphs.clear()
    for module in model.modules():
        if isinstance(module, GraphedLayer) and type(module) in _CLASSES.values():
            set_class(module, module._original)
            module.__dict__.pop(RUNNER, None)
    session = session_of(model)
    if session is not None:
        session.report.graphs = None
        if graphs is not None:
            _set_rule(session, graphs.bounds)


def _lift_rule(session: Session) -> dict[str, Bound]:
    """Low precision for calls of any number of tokens: what a small call loses without graphs is the host's time.

    A `min_tokens` that the user chose stays. Returns what was measured.
    """
    if not follows_measurements(session):
        return {}
    layers = session.scaling.layers
    measured = {name: Bound(tokens, layers[name].least) for name, tokens in session.report.least_tokens.items()}
    _set_rule(session, dict.fromkeys(measured, Bound(0, 0)))
    return measured


def _set_rule(session: Session, bounds: dict[str, Bound]) -> None:
    # By their states: a module may have been wrapped or removed since the conversion.
    for name, bound in bounds.items():
        session.scaling.layers[name].least = bound.elements
    known = {**session.report.least_tokens, **{name: bound.tokens for name, bound in bounds.items()}}
    session.report.least_tokens = {name: tokens for name, tokens in known.items() if tokens}


def repeated_layers(model: nn.Module) -> dict[str, dict[str, nn.Module]]:
    """The outermost nn.ModuleLists of at least two modules with weights of matrices: name -> full names and layers."""
    found: dict[str, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if type(module) is not nn.ModuleList or any(name.startswith(f"{outer}.") for outer in found):
            continue
        layers = {f"{name}.{key}": child for key, child in module.named_children()}
        blocks = [layer for layer in layers.values() if _is_block(layer)]
        if len(blocks) >= 2 and len(blocks) == len({id(layer) for layer in module}) == len(module):
            found[name] = layers
    return found


def _is_block(layer: nn.Module) -> bool:
    """A module with a forward of its own and parts: no linear, no container."""
    own_forward = getattr(type(layer), "forward", None)
    if not layer._modules or isinstance(layer, LowPrecMixin) or own_forward is nn.Module.forward:
        return False
    if isinstance(layer, nn.ModuleList | nn.ModuleDict) or forward_is_replaced(layer):
        return False
    return any(p.dim() >= 2 for p in layer.parameters())
