# SPDX-License-Identifier: Apache-2.0
"""Weights cast right after a step of our optimizers are, to the last bit and counter, those that each layer would cast
in its next forward pass. On a GPU a table of kernels casts them; here plain torch does."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from core import assert_same_state, batch, llama, mlp, same_bits, token_ids
from test_weight_cache import CHANGES, Casts, fresh, layers
from torch import Tensor, nn

import hf_lowprec
from hf_lowprec import optim
from hf_lowprec.conversion import session_of
from hf_lowprec.modules import emission
from hf_lowprec.monitor import per_layer
from hf_lowprec.ops.cast_weights import PlainTable
from hf_lowprec.presets import PRESETS


class Table(PlainTable):
    """Notes the runs of all."""

    runs: ClassVar[list[list[Any]]] = []

    def run(self, casts: Any, counts: Tensor, seen: Tensor) -> None:
        super().run(casts, counts, seen)
        self.runs.append(list(casts))


@pytest.fixture
def emits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[Any]]]:
    monkeypatch.setattr(emission, "table_for", lambda device: Table())
    monkeypatch.setattr(Table, "runs", [])
    yield Table.runs


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> Casts:
    return Casts(monkeypatch)


def made(recipe: str | dict[str, Any] = "fp8-lm", dtype: torch.dtype = torch.float32, policy: str = "both",
         **options: Any) -> tuple[nn.Module, optim.LowPrecOptimizer]:  # fmt: skip
    model = mlp().to(dtype)
    hf_lowprec.convert(model, recipe, fuse=False)
    begin(model, policy)
    return model, optim.AdamW(model.parameters(), lr=0.1, **options)


def begin(model: nn.Module, policy: str = "both") -> None:
    """As after a first step, from which on copies are kept."""
    for layer in layers(model):
        layer.weight_cache.policy = policy
        layer.weight_cache.close_step()


def forward(model: nn.Module, x: Tensor) -> Tensor:
    return model(x.to(model.up.weight.dtype)).float().square().mean()


def need(model: nn.Module) -> None:
    """As the first layer does that needs its copy after a step."""
    for layer in layers(model):
        if layer.weight_cache._awaited is not None:
            layer.weight_cache._awaited[0]()


def train(model: nn.Module, optimizer: Any, step: int, micro: int = 2) -> Tensor:
    for i in range(micro):
        loss = forward(model, batch(5, 32, seed=10 * step + i))
        loss.backward()
    optimizer.step()
    need(model)
    optimizer.zero_grad()
    return loss


def addresses(model: nn.Module) -> list[int]:
    return [t.data_ptr() for layer in layers(model) for t in layer.weight_cache.quantized or () if t is not None]


def states(model: nn.Module) -> dict[str, Any]:
    return session_of(model).state_dict()


RECIPES = ["fp8-lm", "te-delayed", "te-current", "fp8-amax", "fp8-cscale"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("policy", ["both", "one"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_training_is_the_same_bit_for_bit(
    recipe: str, policy: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, casts: Casts
) -> None:
    """Losses, weights, scales, histories and counters, after every step, after every forward pass, and on the way."""
    (ours, first), (lazy, second) = made(recipe, dtype, policy), made(recipe, dtype, policy)
    for step in range(4):
        for i in range(2):
            casts.take()
            a, b = (forward(model, batch(5, 32, seed=10 * step + i)) for model in (ours, lazy))
            assert same_bits(a.detach(), b.detach())
            assert len(casts.take()) == (0 if i else 2 if step else 4), "only those of the other"
            for x, y in zip(layers(ours), layers(lazy), strict=True):
                kept, expected = x.weight_cache.quantized, y.weight_cache.quantized
                assert all(p is q is None or same_bits(p, q) for p, q in zip(kept, expected, strict=True))
            if (step + i) % 3:
                assert_same_state(states(ours), states(lazy))
                assert per_layer(ours) == per_layer(lazy)
            a.backward(), b.backward()
        second.step()  # before the other: any step outdates all copies
        with monkeypatch.context() as patch:
            patch.setattr(emission, "table_for", lambda device: Table())
            first.step()
            need(ours)
        assert_same_state(states(ours), states(lazy))
        for p, q in zip(ours.parameters(), lazy.parameters(), strict=True):
            assert same_bits(p, q)
        first.zero_grad(), second.zero_grad()


def test_copies_stay_where_they_are(emits: list[list[Any]]) -> None:
    """In a loop that keeps its loss to the next one; and what a step has cast lies in what the layer multiplies."""
    model, optimizer = made()
    seen = []
    for step in range(4):
        loss = train(model, optimizer, step)
        seen.append(addresses(model))
        assert loss.requires_grad
    assert len(seen[0]) == 6 and all(other == seen[0] for other in seen)
    assert [len(run) for run in emits] == [2] * 4
    assert addresses(model) == [
        t.data_ptr() for cast in emits[-1] for t in (cast.qdata, cast.scale, cast.transposed)
    ]  # fmt: skip


def test_a_graph_that_is_still_to_go_backward_keeps_its_copies(emits: list[list[Any]]) -> None:
    gradients = []
    for emitting in (True, False):
        if not emitting:
            emission.table_for = lambda device: None  # type: ignore[assignment]  # the fixture undoes it
        model, _ = made("te-current")
        linears = [p for p in model.parameters() if p.dim() == 2]  # the norm's weight torch itself asks for again
        optimizer = optim.AdamW(linears, lr=0.1)
        train(model, optimizer, 0)
        x = batch(5, 32, seed=3).requires_grad_()
        waiting, kept = model(x).sum(), model(x).square().sum()
        kept.backward(retain_graph=True)
        before = addresses(model)
        train(model, optimizer, 1)
        x.grad = None
        waiting.backward(), kept.backward(retain_graph=True), kept.backward()
        gradients.append(x.grad)
        assert not emitting or not set(before) & set(addresses(model))
        del waiting, kept
    assert same_bits(*gradients)


def test_nobody_else_knows_the_copies(emits: list[list[Any]]) -> None:
    model, optimizer = made()
    train(model, optimizer, 0)
    held = model.up._lowprec.weight_cache.quantized
    codes, before = held.qdata.clone(), addresses(model)
    train(model, optimizer, 1)
    assert same_bits(held.qdata, codes), "somebody looks at it"
    after = addresses(model)
    assert not set(after[:3]) & set(before[:3]) and after[3:] == before[3:]


@pytest.mark.parametrize("nonfinite", ["step", "element"])
def test_skipped_steps(nonfinite: str, emits: list[list[Any]], casts: Casts) -> None:
    model, optimizer = made("te-current", states="8bit", nonfinite=nonfinite)
    train(model, optimizer, 0)
    forward(model, batch(5, 32)).backward()
    model.up.weight.grad[0, 0] = float("nan")
    optimizer.step()
    need(model)
    assert int(optimizer.skipped_steps) == (nonfinite == "step") and len(emits) == 2
    casts.take()
    x = batch(5, 32)
    assert same_bits(model(x), fresh(model)(x)) and len(casts.take()) == 2, "the other's"


@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_a_step_are_noticed(change: str, emits: list[list[Any]]) -> None:
    model, optimizer = made("te-current")
    train(model, optimizer, 0)
    x = batch(5, 32)
    stale = model(x).detach()
    CHANGES[change](model)
    out = model(x).detach()
    assert same_bits(out, fresh(model)(x).detach()) and not same_bits(out, stale)


def test_a_write_through_data_right_after_a_step(emits: list[list[Any]]) -> None:
    """It has no sign. Weights are cast after it, with the amax from before it. One in place has."""
    model, optimizer = made("te-current")
    forward(model, batch(5, 32)).backward()
    optimizer.step()
    x = batch(5, 32)
    model.up.weight.data.clamp_(-0.01, 0.01)
    clamped = fresh(model, "te-current")(x)
    out = model(x)
    assert len(emits) == 1 and torch.allclose(out, clamped, rtol=0.1, atol=0.02 * float(clamped.abs().max()))
    hf_lowprec.invalidate(model)
    assert same_bits(model(x), clamped)
    train(model, optimizer, 1)
    with torch.no_grad():
        model.up.weight.clamp_(-0.01, 0.01)
    assert same_bits(model(x), fresh(model, "te-current")(x))


def test_an_unused_copy_leaves_no_trace(emits: list[list[Any]]) -> None:
    """Counters and amaxes of a delayed scale know what layers have used, as if these had cast it."""
    trained = []
    for emitting in (True, False):
        if not emitting:
            emission.table_for = lambda device: None  # type: ignore[assignment]
        model, optimizer = made("te-delayed")
        for step in range(3):
            train(model, optimizer, step)
        model.eval(), model.train()
        train(model, optimizer, 3)
        model.down.weight.grad = torch.ones_like(model.down.weight)
        optimizer.step()  # no forward pass since
        forward(model, batch(3, 32))
        hf_lowprec.monitor.statistics(model, reset=True)
        hf_lowprec.invalidate(model)
        train(model, optimizer, 4)
        trained.append((states(model), per_layer(model)))
    assert trained[0][1] == trained[1][1]
    assert_same_state(trained[0][0], trained[1][0])


def test_evaluation_keeps_nothing(emits: list[list[Any]]) -> None:
    model, optimizer = made()
    train(model, optimizer, 0)
    gone = [weakref.ref(layer.weight_cache.quantized.qdata) for layer in layers(model)]
    del emits[:]
    model.eval()
    gc.collect()
    assert not any(ref() for ref in gone)
    model(batch(5, 32)).sum().backward()
    optimizer.step()
    assert not emits and not addresses(model), "a step of a model in eval mode"


def test_a_checkpoint_right_after_a_step_resumes(emits: list[list[Any]]) -> None:
    model, optimizer = made("te-delayed")
    for step in range(2):
        train(model, optimizer, step)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    other, resumed = made("te-delayed")
    train(other, resumed, 7)
    forward(other, batch(5, 32))  # uses copies that loading outdates
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for step in (2, 3):
        losses = [train(*both, step).detach() for both in ((model, optimizer), (other, resumed))]
        assert same_bits(*losses)
        assert_same_state(states(model), states(other))


def test_copies_of_a_model_keep_nothing(emits: list[list[Any]]) -> None:
    model, optimizer = made()
    train(model, optimizer, 0)
    copied = copy.deepcopy(model)
    assert not addresses(copied) and addresses(model)
    assert same_bits(copied(batch(5, 32)), model(batch(5, 32)))


def test_layers_in_their_own_layout_and_weights_that_two_share(emits: list[list[Any]], casts: Casts) -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    weights = []
    for emitting in (True, False):
        if not emitting:
            emission.table_for = lambda device: None  # type: ignore[assignment]
        torch.manual_seed(0)
        model = nn.Sequential(pytorch_utils.Conv1D(48, 32), nn.Linear(48, 48), nn.Linear(48, 48))
        hf_lowprec.convert(model, "te-current", fuse=False)
        model[2].weight = model[1].weight  # `convert` leaves weights alone that are shared by then
        begin(model)
        optimizer = optim.AdamW(model.parameters(), lr=0.1)
        for step in range(3):
            casts.take()
            model(batch(5, 32, seed=step)).square().mean().backward()
            assert bool(casts.take()) is not (emitting and step > 0)
            optimizer.step()
            optimizer.zero_grad()
        weights.append([p.detach() for p in model.parameters()])
    assert len(emits[-1]) == 3 and emits[-1][0].qdata.shape == (32, 48)
    assert all(map(same_bits, *weights))


def test_whose_weights_are_left_to_their_layers(emits: list[list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = made()
    theirs = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(2):
        train(model, theirs, step)
    assert not emits, "torch's own optimizers"
    model.down.weight.requires_grad_(False)
    train(model, optimizer, 0)
    assert [cast.weight is model.up.weight for cast in emits.pop()] == [True], "frozen weights"
    model.down.weight.requires_grad_(True)
    model.up.weight.data = model.up.weight.detach().t().contiguous().t()
    train(model, optimizer, 1)
    assert [cast.weight is model.down.weight for cast in emits.pop()] == [True], "weights that do not lie in rows"
    monkeypatch.setattr(Table, "finds_amax", False)
    train(model, optimizer, 2)
    assert not emits, "an amax that nobody knows"
    constant, optimizer = made("fp8-cscale")
    train(constant, optimizer, 0)
    assert len(emits.pop()) == 2, "nobody asks for it"
    for recipe in ("mxfp8", "fp8-lm"):
        model, optimizer = made(recipe, policy="none" if recipe == "fp8-lm" else "both")
        train(model, optimizer, 0)
        assert not emits, "policy none, scales of blocks"


def test_gradient_release_leaves_weights_to_their_layers(emits: list[list[Any]]) -> None:
    model, optimizer = made(states="8bit", nonfinite="element")
    optim.release_gradients(optimizer)
    for step in range(2):
        forward(model, batch(5, 32, seed=step)).backward()
        optimizer.step()
    assert not emits


def test_random_rounding_is_left_to_the_layers(emits: list[list[Any]]) -> None:
    recipe = PRESETS["te-current"].to_dict()
    for gemm, slots in (("fprop", ("weight",)), ("dgrad", ("weight",))):
        for slot in slots:
            recipe[gemm][slot]["rounding"] = {"mode": "stochastic"}
    model, optimizer = made({**recipe, "name": "mine"})
    train(model, optimizer, 0)
    assert not emits and model.up._lowprec.spec.shared_weight


def test_two_models_of_one_optimizer_and_two_optimizers_of_one_model(emits: list[list[Any]], casts: Casts) -> None:
    one, two = (made()[0] for _ in range(2))
    both = optim.AdamW([*one.parameters(), *two.parameters()], lr=0.1)
    for step in range(2):
        casts.take()
        for model in (one, two):
            forward(model, batch(5, 32, seed=step)).backward()
        assert len(casts.take()) == (0 if step else 4)
        both.step()
        need(one), need(two)
    assert [len(run) for run in emits] == [2] * 4
    del emits[:]
    parts = [optim.AdamW(part.parameters(), lr=0.1) for part in (one.up, one.down)]
    forward(one, batch(5, 32)).backward()
    for part in parts:
        part.step()
    need(one)
    assert not emits, "each step drops the copies that the other would have written again"
    casts.take()
    x = batch(5, 32)
    assert same_bits(one(x), fresh(one, "fp8-lm")(x)) and len(casts.take()) == 4, "two are of `fresh`"


def test_a_model_and_its_copies_are_freed(emits: list[list[Any]]) -> None:
    model, optimizer = made()
    train(model, optimizer, 0)
    gone: list[Any] = [weakref.ref(layer) for layer in layers(model)] + [weakref.ref(session_of(model))]
    gone += [weakref.ref(layer.weight_cache.quantized.qdata) for layer in layers(model)]
    del emits[:], model, optimizer  # which carries the model's state
    gc.collect()
    assert not any(ref() for ref in gone)


def test_revert(emits: list[list[Any]]) -> None:
    model, optimizer = made()
    train(model, optimizer, 0)
    hf_lowprec.revert(model)
    del emits[:]
    train(model, optimizer, 1)
    assert not emits


def test_a_whole_model_with_linears_that_share_their_input(emits: list[list[Any]]) -> None:
    """Fused modules and tied embeddings; all linears' weights in one table."""
    losses = []
    for emitting in (True, False):
        if not emitting:
            emission.table_for = lambda device: None  # type: ignore[assignment]
        model = llama(tie_word_embeddings=True).bfloat16()
        report = hf_lowprec.convert(model, "fp8-lm")
        optimizer = hf_lowprec.attach_optimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        for step in range(4):
            ids = token_ids(2, 9, seed=step)
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    assert [len(run) for run in emits] == [len(report.converted)] * 2, (
        "none after the first, before which none is kept, nor after the last, behind which nobody needs them"
    )
    assert all(map(same_bits, losses[:4], losses[4:]))


def test_copies_that_nobody_uses_are_not_made(emits: list[list[Any]]) -> None:
    model, optimizer = made()
    train(model, optimizer, 0)
    x = batch(5, 32)
    for _ in range(3):  # `up` stands still
        (model.down(torch.nn.functional.gelu(torch.ones(3, 48))) + 1).square().mean().backward()
        optimizer.step()
        need(model)
    assert [len(run) for run in emits] == [2, 1, 1, 1] and emits[-1][0].weight is model.down.weight
    for step in range(2):
        train(model, optimizer, step)
    assert [len(run) for run in emits[4:]] == [2, 2], "as soon as it moves again"
    del emits[:]
    other = nn.Parameter(torch.zeros(2))
    other.grad = torch.ones(2)
    theirs = torch.optim.SGD([other], lr=1.0)
    for step in range(3):
        forward(model, batch(5, 32, seed=step)).backward()
        optimizer.step()
        theirs.step()  # outdates what was noted
        assert same_bits(model.down(torch.ones(3, 48)), fresh(model, "fp8-lm").down(torch.ones(3, 48)))
    assert same_bits(model.up(x), fresh(model, "fp8-lm").up(x))


def test_compiled_models_emit_nothing(emits: list[list[Any]]) -> None:
    torch.compiler.reset()
    model, optimizer = made()
    compiled = torch.compile(model, backend="aot_eager")
    for step in range(2):
        compiled(batch(5, 32, seed=step)).square().mean().backward()
        optimizer.step()
    assert not emits and not addresses(model)


def test_captured_steps_cast_into_copies_that_are_there(
    emits: list[list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = made()
    train(model, optimizer, 0)
    train(model, optimizer, 1)
    before = addresses(model)
    monkeypatch.setattr(emission, "capturing", lambda device: True)
    train(model, optimizer, 2)
    assert len(emits) == 3 and addresses(model) == before
    held = model.up._lowprec.weight_cache.quantized
    train(model, optimizer, 3)
    assert len(emits) == 3 and not addresses(model), "new memory would be the graph's"
    monkeypatch.undo()
    del held
    first, optimizer = made()
    monkeypatch.setattr(emission, "table_for", lambda device: Table())
    monkeypatch.setattr(emission, "capturing", lambda device: True)
    train(first, optimizer, 0)
    assert not addresses(first), "no table yet"
