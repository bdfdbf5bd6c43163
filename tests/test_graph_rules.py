# SPDX-License-Identifier: Apache-2.0
"""What decides about graphs of layers, piece by piece: keys of calls, snapshots, records, order, memory, weights."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graph_cases import Layer
from torch import nn

import hf_lowprec
from hf_lowprec.graphs import calls
from hf_lowprec.graphs.memory import Owned, Slot, bare, memories
from hf_lowprec.graphs.order import Order, Pending
from hf_lowprec.graphs.record import MOST_DROPS, Record
from hf_lowprec.graphs.snapshot import Snapshot, attributes, stored
from hf_lowprec.modules import weights_changed
from hf_lowprec.modules.weight_cache import same_place
from hf_lowprec.operands import Quantized

CPU = torch.device("cpu")
Pair = namedtuple("Pair", "first second")


# --- calls ----------------------------------------------------------------------------------------------------------


def test_flatten_and_back() -> None:
    x, y = torch.ones(2), torch.zeros(3)
    value = ((x, None, [y, True]), {"p": Pair(x, 1.5), "d": {"t": torch.bfloat16}})
    leaves, spec = calls.flatten(value)
    assert [id(leaf) for leaf in leaves] == [id(x), id(y), id(x)]
    assert isinstance(hash(spec), int)
    back = calls.unflatten(spec, iter(leaves))
    assert back[0][0] is x and back[0][2][0] is y and back[1]["p"] == Pair(x, 1.5) and type(back[1]["p"]) is Pair
    assert back[1]["d"] == {"t": torch.bfloat16}


def key(*args: Any, **kwargs: Any) -> Any:
    return calls.call_of(args, kwargs, CPU).key


def test_keys() -> None:
    x = torch.ones(2, 3)
    assert key(x, a=1) == key(torch.zeros(2, 3), a=1)
    others = [
        key(x, a=True), key(x, a=1.0), key(x, a=2), key(x, b=1), key(x), key(x, 1), key(torch.ones(3, 2), a=1),
        key(x.double(), a=1), key(torch.ones(3, 2).t(), a=1), key(torch.ones(2, 3, requires_grad=True), a=1),
        key(x, a=None),
    ]  # fmt: skip
    assert key(x, a=1) not in others and len(set(others)) == len(others)
    with torch.autocast("cpu", torch.bfloat16):
        assert key(x, a=1) != calls.call_of((x,), {"a": 1}, CPU)._replace(key=others[0]).key
        inside = key(x, a=1)
    assert inside != key(x, a=1)


@pytest.mark.parametrize(("value", "said"), [
    (object(), "which a graph cannot hold"), ({1: 2}, "keys are no names"), (torch.ones(2).to_sparse(), "sparse"),
    (torch.ones(2, device="meta"), "a tensor on meta"),
])  # fmt: skip
def test_what_no_graph_holds(value: Any, said: str) -> None:
    with pytest.raises(calls.Opaque, match=said):
        key(torch.ones(2), thing=value)


def test_when_any_call_is_eager() -> None:
    assert calls.refusal("cpu") is None
    with torch.no_grad():
        assert calls.refusal("cpu") == "no gradients"
    with torch.autograd.graph.save_on_cpu():
        assert "saved tensors" in str(calls.refusal("cpu"))
    with torch.device("cpu"):
        assert calls.refusal("cpu") is None
    with torch.autograd.detect_anomaly(check_nan=False):
        assert "anomaly" in str(calls.refusal("cpu"))
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        assert "mode" in str(calls.refusal("cpu"))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert calls.refusal("cpu") == "hooks on all modules"
    handle.remove()
    seen = []
    x = torch.ones(2, requires_grad=True)
    (x * 1).register_hook(lambda g: seen.append(calls.refusal("cpu")))
    y = x * 1
    y.register_hook(lambda g: seen.append(calls.refusal("cpu")))
    y.sum().backward()
    assert seen == ["no gradients"]
    with torch.enable_grad():
        assert calls.refusal("cpu") is None


# --- snapshots ------------------------------------------------------------------------------------------------------


def test_a_layer_that_stays_as_it_is() -> None:
    layer = Layer(4)
    layer.options = {"a": [1, 2]}
    snapshot = Snapshot(layer)
    assert snapshot.change() is None and snapshot.refusal is None and len(snapshot.parameters) == 6
    with torch.no_grad():
        layer.up.weight.add_(1)
    layer.eval().train()
    layer.options = {"a": [1, 2]}
    assert snapshot.change() is None


@pytest.mark.parametrize(("change", "said"), [
    (lambda m: setattr(m.up.weight, "data", m.up.weight.data.clone()), "memory of up.weight"),
    (lambda m: m.up.weight.requires_grad_(False), "up.weight trains"),
    (lambda m: setattr(m, "up", nn.Linear(4, 8)), "other parts"),
    (lambda m: m.options["a"].append(3), "options"),
    (lambda m: m.up.eval(), "up.training"),
    (lambda m: m.up.register_forward_hook(print), "hooks on up"),
    (lambda m: setattr(m, "new", 1), "attributes of the layer"),
    (lambda m: setattr(m.up, "__class__", type("Other", (nn.Linear,), {})), "up is another class"),
    (lambda m: setattr(m.config, "mode", "b"), "config.mode"),
    (lambda m: m.half(), "memory of norm.weight"),
])  # fmt: skip
def test_changes_of_a_layer(change: Any, said: str) -> None:
    layer = Layer(4)
    layer.options = {"a": [1, 2]}
    layer.config = type("Config", (), {})()
    layer.config.mode = "a"
    snapshot = Snapshot(layer)
    change(layer)
    assert said in str(snapshot.change())


def test_changes_of_converted_linears() -> None:
    layer = nn.Sequential(nn.Linear(32, 32))
    hf_lowprec.convert(layer, "te-delayed")
    snapshot = Snapshot(layer)
    assert snapshot.change() is None
    layer[0]._lowprec.ready = (True, True, True)
    assert snapshot.change() == "how 0 multiplies"
    snapshot = Snapshot(layer)
    with hf_lowprec.high_precision(layer):
        assert snapshot.change() == "how 0 multiplies"
    assert snapshot.change() is None


def test_layers_that_are_refused() -> None:
    layer = Layer(4)
    for p in layer.parameters():
        p.requires_grad_(False)
    assert Snapshot(layer).refusal == "nothing in it trains"
    layer = Layer(4)
    layer.extra = torch.ones(2, requires_grad=True)
    assert "no Parameter" in str(Snapshot(layer).refusal)
    layer = Layer(4)
    layer.gradient_checkpointing = True
    assert Snapshot(layer).refusal == "gradient checkpointing"
    assert Snapshot(layer.eval()).refusal is None
    layer = Layer(4)
    layer.forward = layer.forward
    assert "replaced" in str(Snapshot(layer).refusal)
    layer = Layer(4)
    layer.up.weight.untyped_storage().resize_(0)
    assert "comes and goes" in str(Snapshot(layer).refusal)
    layer = Layer(4)
    layer.register_forward_hook(print)  # outside of its forward
    assert Snapshot(layer).refusal is None


def test_what_a_forward_stores() -> None:
    layer = Layer(4)
    layer.shape = 1000
    before = attributes(layer)
    layer.shape = 999 + 1
    assert stored(before, attributes(layer)) is None
    layer.up.seen = torch.ones(1)
    assert stored(before, attributes(layer)) == "up.seen"


# --- records --------------------------------------------------------------------------------------------------------


@dataclass
class Graph:
    begun: int = 1
    ended: int | None = None


def pass_through(record: Record[Graph], step: int, version: int = 0, idle: bool = True) -> list[str]:
    record.begin(step, idle=idle, allowed=True)
    ways = []
    for index in range(2):
        ways.append(record.way(index, "key", version, "it"))
        if ways[-1] == "capture":
            record.graphs[index] = Graph()
    return ways


def finish(record: Record[Graph]) -> None:
    for graph in record.graphs.values():
        graph.ended = 2


def test_the_life_of_a_record() -> None:
    record: Record[Graph] = Record(2)
    eager, capture, replay = ["eager"] * 2, ["capture"] * 2, ["replay"] * 2
    assert [pass_through(record, step) for step in (0, 0, 1, 1)] == [eager] * 4
    assert pass_through(record, 2, idle=False) == eager
    assert pass_through(record, 2) == capture
    assert pass_through(record, 2, idle=False) == eager  # the first one has not gone back
    finish(record)
    assert pass_through(record, 2) == replay
    assert pass_through(record, 3, version=1) == eager and record.drops == 1 and not record.graphs
    assert [pass_through(record, step, version=1) for step in (4, 5)] == [eager, capture]


def test_a_capture_without_a_backward_pass_is_dropped() -> None:
    record: Record[Graph] = Record(1)
    pass_through(record, 0)
    assert pass_through(record, 1) == ["capture"] * 2
    assert pass_through(record, 1) == ["eager"] * 2 and record.drops == 1 and not record.graphs


def test_a_record_is_given_up() -> None:
    record: Record[Graph] = Record(1)
    for round in range(MOST_DROPS + 1):
        for step in (0, 1):
            pass_through(record, 10 * round + step, version=round)
        finish(record)
    pass_through(record, 99, version=99)
    assert record.stage == "given up" and "it changed" in record.why


def test_misfits() -> None:
    record: Record[Graph] = Record(1)
    for step in (0, 1):
        pass_through(record, step)
    record.misfit(1, "why")
    record.misfit(1, "why")
    assert record.drops == 0
    record.misfit(2, "why")
    assert record.drops == 1


# --- order ----------------------------------------------------------------------------------------------------------


def test_the_order_of_replays() -> None:
    """forward 1, 2, 3 captured at 1, 2, 3; backward 3, 2, 1 at 4, 5, 6."""
    one, two, three = Graph(1, 6), Graph(2, 5), Graph(3, 4)
    order = Order()
    a = Pending(one)
    order.begin(a)
    assert order.allows(2) and order.allows(3) and not order.allows(1) and not order.allows(None)
    c = Pending(three)
    order.begin(c)
    assert not order.allows(2)  # its temporaries may lie where what 3 keeps does
    order.end(a)  # 1 goes back before 3
    assert c.lost
    order.end(c)
    assert order.idle
    b = Pending(two)
    order.begin(b)
    assert not order.idle
    del b
    assert order.idle


def test_a_first_capture_has_everything_before_it() -> None:
    order = Order()
    first = Graph(order.now())
    call = Pending(first)
    order.begin(call)
    assert order.allows(None) and order.allows(order.now())


# --- memory ---------------------------------------------------------------------------------------------------------


def test_who_holds_what_is_handed_out() -> None:
    owned = Owned()
    static = owned.add(torch.ones(4))
    (memory,) = memories([static, None, static[:2]])
    linked = owned.add(static.detach())
    assert not owned.lent([memory])
    handed = static.detach()
    assert owned.lent([memory])
    del handed
    assert not owned.lent([memory]) and linked is not None
    weight = torch.ones(4, requires_grad=True)
    product = static.detach() * weight  # autograd keeps it
    assert owned.lent([memory])
    product.sum().backward()
    assert not owned.lent([memory])


def test_slots() -> None:
    x = torch.randn(3, 4)
    slot = Slot.own(x)
    assert slot.has(x) and torch.equal(slot.tensor, x) and slot.tensor.data_ptr() != x.data_ptr()
    x.add_(1)
    assert not slot.has(x)
    slot.write(x)
    assert torch.equal(slot.tensor, x) and slot.has(x) and not slot.has(x.clone())
    transposed, expanded = torch.randn(4, 3).t(), torch.randn(1, 4).expand(3, 4)
    assert Slot.own(transposed).tensor.stride() == (1, 3)
    slot = Slot.own(expanded)
    assert slot.tensor.stride() == (0, 1)
    twice = (expanded[:1] * 2).expand(3, 4)
    slot.write(twice)
    assert torch.equal(slot.tensor, twice)
    slot = Slot.dense(expanded)
    slot.write(x)
    assert torch.equal(slot.tensor, x)
    leaf = slot.tensor.detach().requires_grad_()
    assert Slot.link(leaf).has(leaf.detach())


# --- copies of weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["fp8-lm", "te-current", "te-delayed"])
def test_held_copies_stay_where_they_are_and_follow_the_weight(recipe: str) -> None:
    models = [nn.Sequential(nn.Linear(32, 32, bias=False)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    states: list[Any] = []
    for model in models:
        hf_lowprec.convert(model, recipe)
        states.append(model[0]._lowprec)
        states[-1].weight_cache.followed = True

    def copy(i: int) -> Any:
        state, weight = states[i], models[i][0].weight
        return state.weight_cache.get(weight, state.spec, state.operands[1], ready=False, training=True)

    first = Quantized(*copy(0))
    addresses = [t.data_ptr() for t in first[:3] if t is not None]
    states[0].weight_cache.hold()
    for _ in range(2):
        for model in models:
            with torch.no_grad():
                model[0].weight.mul_(1.7)
        weights_changed()
        held, fresh = copy(0), copy(1)
        assert same_place(held, first) and [t.data_ptr() for t in held if t is not None] == addresses
        pairs = list(zip(held, fresh, strict=True))
        del held
        for a, b in pairs:
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a.float(), b.float())
    states[0].weight_cache.drop()
    pending = copy(0)  # as a backward pass that is to come holds it
    assert same_place(pending, first)
    states[0].weight_cache.drop()
    assert not same_place(copy(0), first) and states[0].weight_cache.holds(first)
    del pending
    assert same_place(copy(0), first)
    states[0].weight_cache.release()
    second = Quantized(*copy(0))
    states[0].weight_cache.drop()
    assert not same_place(copy(0), second)


# --- what a replay would not do -------------------------------------------------------------------------------------


def test_what_lies_in_containers_and_objects_is_compared() -> None:
    layer = Layer(4)
    layer.tensors = {"a": [torch.ones(4)]}
    layer.args = SimpleNamespace(scale=1.0)
    for change, said in (
        (lambda: layer.tensors["a"].__setitem__(0, torch.zeros(4)), "what is in the layer.tensors"),
        (lambda: setattr(layer.args, "scale", 0.5), "the layer.args.scale"),
    ):
        snapshot = Snapshot(layer)
        assert snapshot.change() is None
        change()
        assert snapshot.change() == said


def test_a_state_that_lies_where_another_lay_is_another() -> None:
    layer = nn.Sequential(nn.Linear(32, 32))
    hf_lowprec.convert(layer, "te-delayed")
    snapshot = Snapshot(layer)
    for _ in range(20):  # of which some have the address of the first
        layer[0]._lowprec.to(CPU)
        assert snapshot.change() == "how 0 multiplies"


def test_what_a_forward_puts_into_containers_and_objects() -> None:
    layer = Layer(4)
    layer.losses, layer.args, layer.counts = [], SimpleNamespace(seen=None), {"calls": 0}
    for change, said in (
        (lambda: layer.losses.append(torch.ones(1)), "losses"),
        (lambda: setattr(layer.args, "seen", torch.ones(1)), "args"),
        (lambda: layer.counts.update(calls=1), "counts"),
    ):
        before = attributes(layer)
        assert stored(before, attributes(layer)) is None
        change()
        assert stored(before, attributes(layer)) == said


def test_slots_forget_from_pass_to_pass() -> None:
    """`.data` and fused optimizers write without a sign."""
    x = torch.ones(3)
    slot = Slot.own(x)
    x.data.add_(1)
    assert slot.has(x)
    slot.forget()
    assert not slot.has(x)


def test_memory_without_what_it_is_a_view_of() -> None:
    base = torch.arange(12.0).view(3, 4)
    out = bare(base[1:, 1])
    assert out._base is None and torch.equal(out, base[1:, 1]) and out.data_ptr() == base[1:, 1].data_ptr()
