# SPDX-License-Identifier: Apache-2.0
"""Graphs of layers with a stand-in for CUDA's: the whole flow, gradients, accumulation, and what must run eagerly."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from core import llama
from graph_cases import FakeCapturer, Layer, Stack, batch, fake_graphs, stack
from torch import Tensor, nn

import hf_lowprec
from hf_lowprec.graphs import GraphError, graph_layers, ungraph_layers
from hf_lowprec.graphs.lists import GraphedLayer, repeated_layers
from hf_lowprec.stepping import attach_optimizer

Loss = Callable[[int], Tensor]


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, steps: int, start: int = 0, micro: int = 2
) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        for m in range(micro):
            value = loss(step * micro + m)
            value.backward()
            losses.append(value.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


class Twins:
    """A model with graphs and the same without, trained alike."""

    def __init__(self, make: Callable[[], nn.Module] = stack, loss: Any = None, **options: Any) -> None:
        self.models = [make(), make()]
        self.graphs = fake_graphs(self.models[0], **options)
        self.optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in self.models]
        self.loss = loss or (lambda model, i: model(batch(i)))
        self.step = 0

    def train(self, steps: int, micro: int = 2) -> None:
        a, b = (
            train(m, o, lambda i, m=m: self.loss(m, i), steps, self.step, micro)
            for m, o in zip(self.models, self.optimizers, strict=True)
        )
        self.step += steps
        assert a == b
        self.same()

    def same(self) -> None:
        for (name, p), q in zip(self.models[0].named_parameters(), self.models[1].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0, msg=name)


@pytest.fixture
def twins() -> Iterator[Twins]:
    pair = Twins()
    pair.train(4)
    assert pair.graphs.captured == 3 and pair.graphs.replays > 0
    yield pair


def test_training_is_the_same_with_clipping_and_accumulation(twins: Twins) -> None:
    before = twins.graphs.replays
    twins.train(3, micro=3)
    assert twins.graphs.replays == before + 3 * 3 * 3
    assert set(twins.graphs.eager) == {"warming up"}


def test_nothing_is_captured_before_enough_quiet_steps() -> None:
    pair = Twins(warmup_steps=3)
    pair.train(3)
    assert pair.graphs.captured == 0
    pair.train(1)
    assert pair.graphs.captured == 3


def test_without_optimizer_steps_nothing_is_captured() -> None:
    model = stack()
    graphs = fake_graphs(model)
    for i in range(6):
        model(batch(i)).backward()
    assert graphs.captured == 0


def test_gradients_are_nobody_elses_memory(twins: Twins) -> None:
    """The first micro-batch's gradients become `.grad`, which the next replay must not write."""
    model = twins.models[0]
    model(batch(1)).backward()
    first = {n: p.grad.clone() for n, p in model.named_parameters()}
    held = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model(batch(2)).backward()
    for name, grad in held.items():
        assert torch.equal(grad, first[name]), name


def test_gradients_by_torch_autograd_grad(twins: Twins) -> None:
    got = []
    for model in twins.models:
        model(batch(1)).backward()  # .grad exists: what is added to it must not be what is returned
        parameters = list(model.parameters())
        one = torch.autograd.grad(model(batch(2)), parameters)
        torch.autograd.grad(model(batch(3)), parameters)
        got.append(one)
    for a, b in zip(*got, strict=True):
        assert torch.equal(a, b)


def test_hooks_on_parameters_see_and_keep_gradients(twins: Twins) -> None:
    kept: list[list[Tensor]] = [[], []]
    for model, seen in zip(twins.models, kept, strict=True):
        model.layers[1].up.weight.register_hook(lambda g, seen=seen: seen.append(g))
    twins.train(2)
    for a, b in zip(*kept, strict=True):
        assert torch.equal(a, b)


def test_another_length_runs_eagerly_and_is_captured_in_time(twins: Twins) -> None:
    twins.loss = lambda model, i: model(batch(i, length=8 if i % 2 else 5))
    twins.train(1)
    assert twins.graphs.lists[0].kinds == 1
    twins.train(4)
    assert twins.graphs.lists[0].kinds == 2


@pytest.mark.filterwarnings("ignore:.*runs without its graph")
def test_there_is_a_bound_on_kinds() -> None:
    pair = Twins(max_kinds=1, loss=lambda model, i: model(batch(i, length=8 if i % 2 else 5)))
    pair.train(6)
    assert pair.graphs.lists[0].kinds == 1
    assert any("more than 1" in reason for reason in pair.graphs.eager)


@pytest.mark.filterwarnings("ignore:.*runs without its graph")
def test_two_forward_passes_before_a_backward_pass(twins: Twins) -> None:
    twins.loss = lambda model, i: model(batch(i)) - model(batch(i + 100))
    twins.train(2)
    assert twins.graphs.eager["an earlier pass has its backward pass still to come"] == 2 * 2 * 3


def test_backward_passes_in_the_order_of_forward_passes(twins: Twins) -> None:
    for model in twins.models:
        one, two = model(batch(1)), model(batch(2))
        one.backward()
        two.backward()
    for p, q in zip(twins.models[0].parameters(), twins.models[1].parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_forward_pass_that_is_dropped(twins: Twins) -> None:
    for model in twins.models:
        model(batch(7))
        del model
    before = twins.graphs.replays
    twins.train(1)
    assert twins.graphs.replays == before + 6


def test_a_result_that_is_kept_is_not_overwritten(twins: Twins) -> None:
    kept: list[Tensor] = []
    layer = twins.models[0].layers[1]
    handle = layer.register_forward_hook(lambda m, args, out: kept.append(out))
    twins.train(1, micro=1)
    handle.remove()
    (out,), before = kept, kept[0].detach().clone()
    del kept[:]
    twins.train(1, micro=1)
    assert torch.equal(out.detach(), before)
    assert twins.graphs.eager["a result of an earlier pass is still in use"] == 1
    del out
    replays = twins.graphs.replays
    twins.train(1, micro=1)
    assert twins.graphs.replays == replays + 3


def test_evaluation_runs_eagerly(twins: Twins) -> None:
    before = twins.graphs.replays
    with torch.no_grad():
        twins.models[0](batch(1))
    for model in twins.models:
        model.eval()
        model(batch(1))
    assert twins.graphs.replays == before
    assert twins.graphs.eager["no gradients"] == 3 and twins.graphs.eager["in evaluation mode"] == 3
    for model in twins.models:
        model.train()
    twins.train(1)
    assert twins.graphs.replays == before + 6


def test_weights_written_by_hand(twins: Twins) -> None:
    for model in twins.models:
        with torch.no_grad():
            model.layers[0].up.weight.mul_(1.5)
        model.layers[2].down.weight.data.add_(0.25)
    twins.train(1)


@pytest.mark.parametrize("change", ["data", "replaced", "frozen", "attribute", "layer", "dtype", "training"])
@pytest.mark.filterwarnings("ignore:.*runs without its graph")
def test_a_model_that_changes_is_captured_anew(twins: Twins, change: str) -> None:
    for i, model in enumerate(twins.models):
        layer = model.layers[1]
        if change == "data":
            layer.up.weight.data = layer.up.weight.data * 2
        elif change == "replaced":
            layer.down = copy.deepcopy(layer.down)
            twins.optimizers[i].add_param_group({"params": list(layer.down.parameters())})
        elif change == "frozen":
            layer.up.weight.requires_grad_(False)
        elif change == "attribute":
            layer.scale = 0.5
        elif change == "layer":
            torch.manual_seed(5)
            model.layers[1] = Layer(16)
            twins.optimizers[i].add_param_group({"params": list(model.layers[1].parameters())})
        elif change == "dtype":
            layer.up.bias.data = layer.up.bias.data.clone()
        elif change == "training":
            layer.norm.eval()
    replays = twins.graphs.replays
    twins.train(1, micro=1)
    expected = {"layer": 1}.get(change, 1)  # the first layer may have run before the change was seen
    assert twins.graphs.replays <= replays + expected
    twins.train(4)
    assert twins.graphs.captured >= 2


def test_a_layer_that_keeps_changing_is_given_up() -> None:
    pair = Twins(warmup_steps=1)
    with pytest.warns(UserWarning, match="captured 6 times"):
        for round in range(14):
            for model in pair.models:
                model.layers[0].scale = 1.0 + round
            pair.train(2)
    assert pair.graphs.captured == 0


def test_hooks_inside_run_eagerly_and_are_said(twins: Twins) -> None:
    seen = []
    handle = twins.models[0].layers[1].up.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match=r"layers\.1 runs without its graph: hooks on up"):
        twins.train(5)
    assert len(seen) == 10 and twins.graphs.captured == 2
    handle.remove()
    twins.train(4)
    assert len(seen) == 10 and twins.graphs.captured == 3


class FakeCache:
    pass


def test_an_argument_that_a_graph_cannot_hold() -> None:
    pair = Twins(loss=lambda model, i: model(batch(i), past_key_values=FakeCache()))
    with pytest.warns(UserWarning, match="use_cache=False"):
        pair.train(4)
    assert pair.graphs.captured == 0


def test_masks_are_copied_once_per_pass_and_may_change(twins: Twins) -> None:
    def loss(model: nn.Module, i: int) -> Tensor:
        mask = (batch(1000 + i)[:, :, :1] > 0).float().expand(2, 8, 16)
        return model(batch(i), mask=mask)

    twins.loss = loss
    twins.train(5)
    assert twins.graphs.lists[0].kinds == 2


def test_gradients_twice_are_refused(twins: Twins) -> None:
    loss = twins.models[0](batch(1))
    loss.backward(retain_graph=True)
    with pytest.raises(GraphError, match="asked for twice"):
        loss.backward()
    loss = twins.models[0](batch(1))
    with pytest.raises(GraphError, match="gradients of gradients"):
        loss.backward(create_graph=True)


def test_weights_written_before_the_backward_pass_are_refused(twins: Twins) -> None:
    loss = twins.models[0](batch(1))
    with torch.no_grad():
        twins.models[0].layers[1].up.weight.mul_(2)
    with pytest.raises(GraphError, match=r"layers\.1: its weights were written"):
        loss.backward()


def test_a_loss_in_the_middle_of_the_model(twins: Twins) -> None:
    """Backward passes of early layers overwrite what later ones kept: an error, never wrong gradients."""
    kept: list[Tensor] = []
    model = twins.models[0]
    model.layers[0].register_forward_hook(lambda m, args, out: kept.append(out))
    loss = model(batch(1))
    kept[0].sum().backward(retain_graph=True)
    with pytest.raises(GraphError, match=r"overwritten|twice"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:.*runs without its graph")
def test_reentrant_checkpointing_around_layers(twins: Twins) -> None:
    from torch.utils.checkpoint import checkpoint

    def loss(model: nn.Module, i: int, reentrant: bool = True) -> Tensor:
        x = model.embed(batch(i))
        for layer in model.layers:
            x = checkpoint(layer, x, use_reentrant=reentrant)
        return model.head(x).square().mean()

    twins.loss = loss
    twins.train(2)
    twins.loss = lambda model, i: loss(model, i, reentrant=False)
    twins.train(2)


def test_gradient_checkpointing_of_transformers() -> None:
    def loss(model: nn.Module, i: int) -> Tensor:
        ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(i))
        return model(input_ids=ids, labels=ids).loss

    pair = Twins(make=lambda: llama(use_cache=False), loss=loss)
    pair.train(4)
    assert pair.graphs.captured == 2 and pair.graphs.replays > 0
    for model in pair.models:
        model.gradient_checkpointing_enable()
    before = pair.graphs.replays
    with pytest.warns(UserWarning, match="gradient checkpointing"):
        pair.train(2)
    assert pair.graphs.replays == before
    for model in pair.models:
        model.gradient_checkpointing_disable()
    pair.train(4)
    assert pair.graphs.replays > before


def test_copies_and_pickles_have_no_graphs(twins: Twins) -> None:
    model = twins.models[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(isinstance(m, GraphedLayer) for m in other.modules())
        assert type(other.layers[0]) is Layer and other.__dict__["_hf_lowprec_graphs"] is None
        assert torch.equal(other(batch(3)), model(batch(3)))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = stack()
    fresh.load_state_dict(torch.load(file))
    twins.train(1)


def test_a_layers_class_is_its_own(twins: Twins) -> None:
    layer = twins.models[0].layers[0]
    assert isinstance(layer, Layer) and type(layer).__name__ == "Layer"
    ungraph_layers(twins.models[0])
    assert type(layer) is Layer
    twins.train(1)


def test_load_state_dict(twins: Twins) -> None:
    weights = {k: v * 0.5 for k, v in twins.models[0].state_dict().items()}
    for model in twins.models:
        model.load_state_dict(weights)
    before = twins.graphs.replays
    twins.train(1)
    assert twins.graphs.replays == before + 6


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GraphError, match="need a CUDA device"):
        graph_layers(stack())
    with pytest.raises(GraphError, match="nothing to graph"):
        fake_graphs(nn.Sequential(nn.Linear(4, 4)))
    model = llama()
    hf_lowprec.convert(model, "fp8-flex")
    with pytest.raises(GraphError, match="searches or learns"):
        fake_graphs(model)
    with pytest.raises(ValueError, match="at least 1"):
        fake_graphs(stack(), warmup_steps=0)


class Stores(Layer):
    """An auxiliary result in an attribute, which its owner takes away."""

    last: Tensor | None = None

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        self.last = x.detach().mean()
        self.width = 100_000 + x.shape[-1]
        return super().forward(x, **kwargs)


class Waits(Layer):
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x, **kwargs)


class Breaks(FakeCapturer):
    def record(self, function: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.mark.parametrize(("cls", "capturer", "said"), [
    (Stores, FakeCapturer, "stores last"), (Waits, Breaks, r"captured \(forward\): operation not permitted"),
])  # fmt: skip
def test_a_layer_that_cannot_be_captured(cls: type, capturer: type, said: str) -> None:
    model = Stack()
    model.layers = nn.ModuleList(cls(16) for _ in range(2))
    graph_layers(model, capturer=capturer, device_type="cpu", warmup_steps=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(GraphError, match=said):
        train(model, optimizer, lambda i: _takes_last(model, i), 4)


def _takes_last(model: Any, i: int) -> Tensor:
    loss = model(batch(i))
    for layer in model.layers:
        layer.last = None
    return loss


def test_a_layer_that_stores_what_nobody_takes() -> None:
    model = Stack()
    model.layers = nn.ModuleList(Stores(16) for _ in range(2))
    graphs = fake_graphs(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="last keeps changing"):
        train(model, optimizer, lambda i: model(batch(i)), 9)
    assert graphs.captured == 0


def test_which_layers_are_found() -> None:
    assert list(repeated_layers(llama())) == ["model.layers"]
    assert list(repeated_layers(stack())) == ["layers"]
    model = nn.Module()
    model.linears = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    assert not repeated_layers(model)


@pytest.mark.filterwarnings("ignore:.*runs without its graph")
def test_layers_that_run_twice_in_a_pass() -> None:
    """Shared layers: the second call finds the first one pending."""

    def loss(model: Any, i: int) -> Tensor:
        x = model.embed(batch(i))
        for layer in (*model.layers, *model.layers):
            x = layer(x)
        return model.head(x).square().mean()

    pair = Twins(loss=loss)
    pair.train(6)


@pytest.mark.filterwarnings("ignore:.*runs without its graph")
def test_layers_that_are_skipped(twins: Twins) -> None:
    def loss(model: Any, i: int) -> Tensor:
        x = model.embed(batch(i))
        position = (torch.full((8, 1), 0.75), torch.full((8, 1), 0.25))
        for number, layer in enumerate(model.layers):
            if (i + number) % 3:
                x = layer(x, position=position, use_cache=False)
        return model.head(x).square().mean()

    twins.loss = loss
    twins.train(6)


@pytest.mark.parametrize("recipe", ["fp8-lm", "te-current", "te-delayed", "bf16", "mxfp8", "bitnet-b1.58"])
def test_recipes_train_bit_for_bit(recipe: str, no_sessions: None) -> None:
    results = []
    for graphed in (True, False):
        model = llama(use_cache=False).to(torch.bfloat16)
        if recipe != "bf16":
            hf_lowprec.convert(model, recipe)
        graphs = fake_graphs(model) if graphed else None
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if recipe != "bf16":
            optimizer = attach_optimizer(model, optimizer)

        def loss(i: int, model: nn.Module = model) -> Tensor:
            ids = torch.randint(0, 32, (2, 16), generator=torch.Generator().manual_seed(i))
            return model(input_ids=ids, labels=ids).loss

        losses = train(model, optimizer, loss, 8)
        session = model.__dict__.get("_hf_lowprec")
        state = {} if session is None else session.scaling.state_dict()
        results.append((losses, model.state_dict(), state))
        if graphs is not None:
            assert graphs.captured == 2 and graphs.replays > 0, graphs.eager
            if session is not None:
                assert "CUDA graphs: 2 of 2 layers of model.layers" in session.report.summary()
    (a, weights, state), (b, others, states) = results
    assert a == b
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name
    for name, roles in state.items():
        for role, tensors in roles.items():
            for key, tensor in tensors.items():
                assert torch.equal(tensor, states[name][role][key]), f"{name} {role} {key}"


def test_adapters_that_are_switched_off_and_on(no_sessions: None) -> None:
    peft = pytest.importorskip("peft")

    def make() -> Any:
        model = llama(use_cache=False).to(torch.bfloat16)
        hf_lowprec.convert(model, "te-current")
        torch.manual_seed(1)
        return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0))

    def loss(model: Any, i: int) -> Tensor:
        ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(i))
        return model(input_ids=ids, labels=ids).loss

    pair = Twins(make=make, loss=loss)
    pair.optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2) for m in pair.models]
    pair.train(5)
    assert pair.graphs.captured == 2 and pair.graphs.replays > 0, pair.graphs.eager
    a, b = (loss(model, 7).item() for model in pair.models)
    off = []
    for model in pair.models:
        with model.disable_adapter():
            off.append(loss(model, 7).item())  # grad mode is on: a replay would have the adapters in it
    assert a == b and off[0] == off[1] != a
    pair.train(5)
    assert pair.graphs.captured == 2


def test_ddp_of_one_process(tmp_path: Any) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        pair = Twins()
        pair.models = [nn.parallel.DistributedDataParallel(model) for model in pair.models]
        pair.train(6)
        assert pair.graphs.captured == 3 and pair.graphs.replays > 0, pair.graphs.eager
        pair.models = [
            nn.parallel.DistributedDataParallel(m.module, gradient_as_bucket_view=True) for m in pair.models
        ]
        pair.train(3)
    finally:
        dist.destroy_process_group()


def test_weights_that_are_cast_after_the_step(monkeypatch: pytest.MonkeyPatch, no_sessions: None) -> None:
    """Where our optimizers cast all weights at once, graphs find them where they were."""
    from test_emission import Table

    from hf_lowprec.modules import emission, weight_cache

    monkeypatch.setattr(emission, "table_for", lambda device: Table())
    into_held: list[bool] = []
    own = weight_cache.WeightCache._into_held

    def spy(self: Any, new: Any) -> Any:
        into_held.append(self._held is not None)
        return own(self, new)

    monkeypatch.setattr(weight_cache.WeightCache, "_into_held", spy)
    results = []
    for graphed in (True, False):
        model = llama(use_cache=False).to(torch.bfloat16)
        hf_lowprec.convert(model, "fp8-lm")
        graphs = fake_graphs(model) if graphed else None
        optimizer = attach_optimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-2))

        def loss(i: int, model: nn.Module = model) -> Tensor:
            ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(i))
            return model(input_ids=ids, labels=ids).loss

        losses = train(model, optimizer, loss, 6)
        del into_held[:]
        losses += train(model, optimizer, loss, 4, start=6)
        assert not any(into_held)  # nothing was copied
        results.append((losses, [p.detach().clone() for p in model.parameters()]))
        if graphs is not None:
            assert graphs.captured == 2 and graphs.replays >= 2 * 2 * 4 and set(graphs.eager) == {"warming up"}
    assert results[0][0] == results[1][0]
    assert all(torch.equal(p, q) for p, q in zip(results[0][1], results[1][1], strict=True))


def test_an_eager_pass_whose_loss_lives_on_keeps_its_weights(no_sessions: None) -> None:
    """Its copies of weights are not overwritten, and the graphs are replayed again once it is gone."""
    results = []
    for graphed in (True, False):
        model = llama(use_cache=False).to(torch.bfloat16)
        hf_lowprec.convert(model, "te-current")
        graphs = fake_graphs(model) if graphed else None
        optimizer = attach_optimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-2))

        def loss(i: int, length: int = 8, model: nn.Module = model) -> Tensor:
            ids = torch.randint(0, 32, (2, length), generator=torch.Generator().manual_seed(i))
            return model(input_ids=ids, labels=ids).loss

        losses = train(model, optimizer, loss, 5)
        before = 0 if graphs is None else graphs.replays
        old = loss(90, length=6)  # eager
        losses += train(model, optimizer, loss, 1, start=5, micro=1)  # writes the weights
        between = 0 if graphs is None else graphs.replays
        losses += train(model, optimizer, loss, 1, start=6, micro=1)
        del old
        losses += train(model, optimizer, loss, 2, start=7)
        results.append((losses, [p.detach().clone() for p in model.parameters()]))
        if graphs is not None:
            assert between == before + 2 and graphs.captured == 2, graphs.eager  # its copies were still current
            assert graphs.replays == between + 2 * 2 * 2, graphs.eager
            assert graphs.lists[0]._record.drops == 0
    assert results[0][0] == results[1][0]
    assert all(torch.equal(p, q) for p, q in zip(results[0][1], results[1][1], strict=True))


def test_revert_ends_graphs(no_sessions: None) -> None:
    model = llama(use_cache=False)
    hf_lowprec.convert(model, "te-current")
    fake_graphs(model)
    hf_lowprec.revert(model)
    assert not any(isinstance(m, GraphedLayer) for m in model.modules())


def test_high_precision_is_no_replay(no_sessions: None) -> None:
    model = llama(use_cache=False)
    hf_lowprec.convert(model, "te-current")
    graphs = fake_graphs(model)
    optimizer = attach_optimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    ids = torch.arange(16).view(2, 8)
    train(model, optimizer, lambda i: model(input_ids=ids, labels=ids).loss, 5)
    before = graphs.replays
    assert before
    low = model(input_ids=ids, labels=ids).loss
    with hf_lowprec.high_precision(model):
        high = model(input_ids=ids, labels=ids).loss
    assert low.item() != high.item() and graphs.replays == before + 2


class Appends(Layer):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        self.losses.append(x.square().mean())
        return super().forward(x, **kwargs)


class Draws(Layer):
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return x * 1 if random.random() < 0.5 else super().forward(x, **kwargs)


class Writes(Layer):
    def forward(self, x: Tensor, mask: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        mask.add_(1)
        return super().forward(x, **kwargs)


@pytest.mark.parametrize(("cls", "said"), [
    (Appends, "stores losses"), (Draws, "random numbers on the host"), (Writes, "writes an argument in place"),
])  # fmt: skip
def test_what_replays_would_silently_not_do(cls: type, said: str) -> None:
    model = Stack()
    model.layers = nn.ModuleList(cls(16) for _ in range(2))
    fake_graphs(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(i: int) -> Tensor:
        value = model(batch(i), mask=torch.ones(2, 8, 16))
        for layer in model.layers:
            getattr(layer, "losses", []).clear()
        return value

    with pytest.raises(GraphError, match=said):
        train(model, optimizer, loss, 4)


@pytest.mark.parametrize("fused", [False, True])
def test_parameters_and_lasting_tensors_among_the_arguments(fused: bool) -> None:
    """What a fused optimizer or `.data` writes between two passes has no other version."""

    class Owner(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(16))
            self.mask = torch.ones(2, 8, 16)

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Owner()

    def loss(model: Any, i: int) -> Tensor:
        model.mask.data.copy_(batch(1000 + i) > 0)
        x = model.embed(batch(i))
        for layer in model.layers:
            x = layer(x, model.mask, position=(model.gain, model.gain))
        return model.head(x).square().mean()

    pair = Twins(make=make, loss=loss)
    pair.optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, fused=fused) for m in pair.models]
    pair.train(6)
    assert pair.graphs.replays >= 3 * 3 * 2 and set(pair.graphs.eager) == {"warming up"}


def test_a_model_and_a_part_of_it() -> None:
    model = llama(use_cache=False)
    fake_graphs(model)
    with pytest.raises(GraphError, match=r"layers\.0 has graphs already"):
        fake_graphs(model.model)
    ungraph_layers(model)
    fake_graphs(model.model)


def test_dropped_graphs_leave_no_memory(twins: Twins) -> None:
    (record,) = [r for r in twins.graphs.lists[0]._records.values() if r.graphs]
    gone = [weakref.ref(out) for graph in record.graphs.values() for out in graph.outputs]
    twins.models[0].layers[1].scale = twins.models[1].layers[1].scale = 0.5
    twins.train(1)
    gc.collect()
    assert not record.graphs and not any(ref() for ref in gone)
