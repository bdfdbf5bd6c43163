# SPDX-License-Identifier: Apache-2.0
"""In training weights are cast once per optimizer step, and every way to change a weight is noticed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core import batch, llama, mlp, same_bits, token_ids
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hf_lowprec
from hf_lowprec import ops
from hf_lowprec.modules import weights_changed
from hf_lowprec.modules.linear import LowPrecMixin
from hf_lowprec.modules.state import LayerState
from hf_lowprec.modules.weight_cache import WeightCache


class Casts:
    """Casts of weights, by layout, since the last look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[bool, bool]] = []
        self.partials = 0
        self.transposes = 0
        cast, transposed = ops.cast_transpose, ops.transposed

        def counting(x: Tensor, *args: Any, rows: bool = True, columns: bool = True, **kwargs: Any) -> Any:
            if isinstance(x, nn.Parameter):
                self.seen.append((rows, columns))
                self.partials += kwargs.get("partials") is not None
            return cast(x, *args, rows=rows, columns=columns, **kwargs)

        def counting_transposed(qdata: Tensor) -> Tensor:
            self.transposes += 1
            return transposed(qdata)

        monkeypatch.setattr(ops, "cast_transpose", counting)
        monkeypatch.setattr(ops, "transposed", counting_transposed)

    def take(self) -> list[tuple[bool, bool]]:
        seen, self.seen = self.seen, []
        return seen


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> Casts:
    return Casts(monkeypatch)


def model_of(recipe: str = "te-current", policy: str = "both", followed: bool = True) -> nn.Module:
    """followed: as after a first step, from which on copies are kept."""
    model = mlp()
    hf_lowprec.convert(model, recipe, fuse=False)
    for layer in layers(model):
        layer.weight_cache.policy = policy
        if followed:
            layer.weight_cache.close_step()
    return model


def layers(model: nn.Module) -> list[LayerState]:
    return [module._lowprec for module in model.modules() if isinstance(module, LowPrecMixin)]


def fresh(model: nn.Module, recipe: str = "te-current") -> nn.Module:
    """The same weights in a model that has kept nothing."""
    other = model_of(recipe, policy="none")
    other.load_state_dict(model.state_dict())
    return other.train(model.training)


BOTH, ROWS, COLUMNS = (True, True), (True, False), (False, True)
EACH_USE = [ROWS, ROWS, COLUMNS, COLUMNS]


@pytest.mark.parametrize(("policy", "expected"), [("both", [BOTH] * 2), ("one", [ROWS] * 2), ("none", EACH_USE * 3)])
def test_once_per_step(policy: str, expected: list[tuple[bool, bool]], casts: Casts) -> None:
    """Three micro-batches; `none`, and before the first step everything, casts in every forward and backward pass."""
    model = model_of(policy=policy, followed=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(3):
        for seed in range(3):
            model(batch(4, 32, seed=seed)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert casts.take() == (expected if step else EACH_USE * 3)


def test_training_by_hand_without_an_optimizer() -> None:
    """No step tells that the weights have changed; a step of another model's optimizer says nothing about this one."""
    model, other = model_of(followed=False), model_of("fp8-lm", followed=False)
    x, target = batch(16, 32), batch(16, 32, seed=1)
    other(x).square().mean().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    losses = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        assert same_bits(loss.detach(), (fresh(model)(x) - target).square().mean().detach())
        loss.backward()
        for p in model.parameters():
            p.data -= 1.0 * p.grad
            p.grad = None
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0], losses


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_moving_averages_are_evaluated(grad: bool) -> None:
    """Swapped in and out through `.data`, more than once within one evaluation."""
    model, x = model_of(followed=False), batch(5, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
    own = [p.detach().clone() for p in model.parameters()]
    in_training = model(x).detach()
    model.eval()
    with torch.set_grad_enabled(grad):
        for values in (own, average, own, average, own):
            for p, value in zip(model.parameters(), values, strict=True):
                p.data.copy_(value)
            out = model(x).detach()
            assert same_bits(out, fresh(model)(x).detach()) and same_bits(out, in_training) is (values is own)
    assert same_bits(model.train()(x).detach(), in_training)


def test_no_grad_in_the_middle_of_training_reads_the_weight() -> None:
    model, x = model_of(), batch(5, 32)
    model(x)
    _data_write(model)
    with torch.no_grad():
        assert same_bits(model(x), fresh(model)(x))


@pytest.mark.parametrize("recipe", ["fp8-lm", "te-delayed", "te-current", "fp8-cscale"])
@pytest.mark.parametrize("policy", ["both", "one"])
def test_kept_weights_change_nothing(recipe: str, policy: str) -> None:
    kept, other = model_of(recipe, policy), model_of(recipe, "none")
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, fused=True) for m in (kept, other)]
    for step in range(4):
        for micro in range(2):
            x = batch(5, 32, seed=2 * step + micro)
            losses = []
            for model in (kept, other):
                loss = model(x).square().mean()
                loss.backward()
                losses.append(loss.detach())
            assert same_bits(*losses)
        for (name, a), b in zip(kept.named_parameters(), other.parameters(), strict=True):
            assert same_bits(a.grad, b.grad), name
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(layers(kept), layers(other), strict=True):
        assert all(x is None or same_bits(x, y) for x, y in zip(a.operands[1][:2], b.operands[1][:2], strict=True))


def _data_write(model: nn.Module) -> None:
    model.up.weight.data.view(-1)[:] = 2 * model.up.weight.detach().view(-1)


def _after_a_step(model: nn.Module) -> None:
    """Of an optimizer that has nothing to do with the model (a trainer's policy beside its reference)."""
    _data_write(model)
    other = nn.Parameter(torch.zeros(2))
    other.grad = torch.ones(2)
    torch.optim.SGD([other], lr=1.0).step()


def _fused_adamw(model: nn.Module) -> None:
    weight = model.up.weight
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.5, fused=True).step()
    weight.grad = None


def _in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.up.weight.mul_(2)


def _load(model: nn.Module, assign: bool) -> None:
    state = model.state_dict()
    model.load_state_dict({**state, "up.weight": 2 * state["up.weight"]}, assign=assign)


def _other_data(model: nn.Module) -> None:
    model.up.weight.data = 2 * model.up.weight.detach()


def _moving_average(model: nn.Module) -> None:
    """Weights swapped for an evaluation."""
    model.eval()
    _data_write(model)


def _moved(model: nn.Module) -> None:
    _data_write(model)
    model.to(torch.float64).to(torch.float32)


def _invalidated(model: nn.Module) -> None:
    _data_write(model)
    hf_lowprec.invalidate(model)


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "fused AdamW": _fused_adamw,
    ".data, then a step of another optimizer": _after_a_step,
    ".data, then invalidate": _invalidated,
    "in place": _in_place,
    "load_state_dict": lambda model: _load(model, False),
    "load_state_dict, assigned": lambda model: _load(model, True),
    "other .data": _other_data,
    ".data around eval()": _moving_average,
    "moved": _moved,
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change: str, grad: bool) -> None:
    model = model_of()
    x = batch(5, 32)
    with torch.set_grad_enabled(grad):
        stale = model(x).detach()
        assert all((layer.weight_cache.quantized is not None) is grad for layer in layers(model))
    CHANGES[change](model)
    with torch.set_grad_enabled(grad):
        out, expected = model(x).detach(), fresh(model)(x).detach()
    assert same_bits(out, expected) and not same_bits(out, stale)


def test_a_write_that_nobody_sees() -> None:
    """What the documentation says `invalidate` is for; without this the tests above would test nothing."""
    model = model_of()
    x = batch(5, 32)
    stale = model(x)
    _data_write(model)
    assert same_bits(model(x), stale)


def test_weights_changed_outdates_all_models(casts: Casts) -> None:
    one, two = model_of(), model_of("fp8-lm")
    one(batch(5, 32)), two(batch(5, 32))
    casts.take()
    weights_changed()
    one(batch(5, 32)), two(batch(5, 32))
    assert casts.take() == [BOTH] * 4


@pytest.mark.parametrize("training", [True, False])
def test_generation_keeps_nothing(training: bool, casts: Casts) -> None:
    model = llama()
    report = hf_lowprec.convert(model, "fp8-lm", fuse=False)
    for layer in layers(model):
        layer.weight_cache.close_step()
    model.train(training)
    model.generate(token_ids(2, 8), max_new_tokens=5, do_sample=False)
    assert casts.take() == [ROWS] * 5 * len(report.converted)
    assert all(layer.weight_cache.quantized is None for layer in layers(model))


def test_training_after_an_evaluation_looks_again(casts: Casts) -> None:
    model = model_of("te-delayed")
    with torch.no_grad():
        model(batch(5, 32))
    assert casts.take() == [ROWS] * 2
    assert not any(float(layer.operands[1].amax) for layer in layers(model)), "an evaluation leaves no trace"
    model(batch(5, 32))
    assert casts.take() == [BOTH] * 2, "looked at again, for the amax"
    assert all(float(layer.operands[1].amax) > 0 for layer in layers(model))
    model(batch(5, 32))
    assert not casts.take() and not casts.transposes


def test_checkpointing_casts_once(casts: Casts) -> None:
    for reentrant in (True, False):
        model, plain = model_of(), model_of(policy="none")
        x = batch(5, 32).requires_grad_()
        casts.take()
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
        assert len(casts.take()) == (4 if reentrant else 2), "a reentrant one starts without gradients"
        plain(batch(5, 32)).sum().backward()
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            assert same_bits(a.grad, b.grad)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_keep_nothing(how: str) -> None:
    model = model_of()
    x = batch(5, 32)
    out = model(x)
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert all(layer.weight_cache.quantized is None for layer in layers(copied))
    _data_write(copied)
    _data_write(model)
    assert same_bits(model(x), out) and not same_bits(copied(x), out)


def test_revert_leaves_nothing() -> None:
    model = model_of()
    model(batch(5, 32))
    hf_lowprec.revert(model)
    assert not hasattr(model.up, "_lowprec")
    assert same_bits(model(batch(5, 32)), mlp()(batch(5, 32)))


def test_compiled_models_keep_nothing() -> None:
    torch.compiler.reset()
    model = model_of()
    torch.compile(model, fullgraph=True, backend="aot_eager")(batch(5, 32)).sum().backward()
    assert all(layer.weight_cache.quantized is None for layer in layers(model))


def test_memory_that_comes_and_goes_is_not_copied() -> None:
    """FSDP frees a gathered weight behind its layer: from the first step on its layer keeps nothing."""
    model = model_of()
    model(batch(5, 32)).sum().backward()
    up, down = layers(model)
    up.weight_cache._entry.storage.resize_(0)
    torch.optim.SGD([model.down.weight], lr=0.0).step()
    hf_lowprec.conversion.session_of(model).scaling.roll()
    assert up.weight_cache.policy == "none" and down.weight_cache.policy == "both"


def test_an_amax_that_the_optimizer_knows(casts: Casts) -> None:
    model = model_of("fp8-lm")
    expected = model(batch(5, 32)).detach()
    for _ in range(2):
        weights_changed()
        for module in (model.up, model.down):
            module._lowprec.weight_cache.note_amax(module.weight, module.weight.detach().abs().max())
        casts.partials = 0
        assert same_bits(model(batch(5, 32)).detach(), expected) and casts.partials == 2
    _in_place(model)  # another weight since
    hf_lowprec.invalidate(model)
    casts.partials = 0
    assert same_bits(model(batch(5, 32)).detach(), fresh(model, "fp8-lm")(batch(5, 32)).detach())
    assert not casts.partials


def test_bytes_that_are_kept() -> None:
    sizes = {}
    for policy in ("both", "one", "none"):
        model = model_of(policy=policy)
        model(batch(5, 32)).sum().backward()
        kept = [layer.weight_cache.quantized for layer in layers(model)]
        sizes[policy] = sum(t.numel() for q in kept if q is not None for t in q if t is not None and t.dim())
    weights = model.up.weight.numel() + model.down.weight.numel()
    assert sizes == {"both": 2 * weights, "one": weights, "none": 0}


def test_the_recipe_chooses() -> None:
    for policy in ("both", "one", "none"):
        model = mlp()
        recipe = {**hf_lowprec.Recipe.to_dict(hf_lowprec.PRESETS["fp8-lm"]), "name": "mine", "weight_cache": policy}
        hf_lowprec.convert(model, recipe)
        assert {layer.weight_cache.policy for layer in layers(model)} == {policy}


def test_conv1d_keeps_its_own_layout(casts: Casts) -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    outs = []
    for policy in ("both", "one", "none"):
        torch.manual_seed(0)
        model = nn.Sequential(pytorch_utils.Conv1D(48, 32))
        hf_lowprec.convert(model, "te-current")
        model[0]._lowprec.weight_cache.policy = policy
        model[0]._lowprec.weight_cache.close_step()
        x = batch(5, 32).requires_grad_()
        out = model(x)
        out.square().sum().backward()
        assert model[0].weight.grad.is_contiguous(), "no copy where it is accumulated"
        outs.append((out.detach(), x.grad, model[0].weight.grad))
    for other in outs[1:]:
        assert all(map(same_bits, outs[0], other))
    assert casts.take() == [BOTH, ROWS, COLUMNS, ROWS]


def test_only_one_scale_for_the_tensor_is_kept() -> None:
    cache = WeightCache()
    cache.close_step()
    rows = hf_lowprec.Recipe.from_dict(
        {"name": "rows", "fprop": {slot: {"format": "e4m3fn", "scaling": {"granularity": "row"}}
                                   for slot in ("input", "weight")}}
    )  # fmt: skip
    state = LayerState.create(rows, 0, weight_is_kn=False, emulate=True)
    weight = nn.Parameter(batch(16, 32))
    assert cache.get(weight, state.spec, state.operands[1], ready=False, training=True) is None
