# SPDX-License-Identifier: Apache-2.0
"""Around `optimizer.step()`: amax histories, gradients seen through E4M3, and state that rides in the optimizer's."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core import (
    ReferenceLinear,
    assert_same_state,
    batch,
    bits_of,
    close_in,
    mlp,
    same_bits,
    train_step,
)
from torch import Tensor, nn

import hf_lowprec
from hf_lowprec import optim
from hf_lowprec.conversion import session_of
from hf_lowprec.formats import get_format
from hf_lowprec.presets import PRESETS
from hf_lowprec.stepping import STATE_KEY, attach_optimizer, carry_state


def linear(recipe: str = "fp8-lm", n: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, n))
    hf_lowprec.convert(model, recipe)
    return model


def scaling_state(model: nn.Module) -> dict[str, Any]:
    return session_of(model).scaling.state_dict()


# --- delayed scaling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp8-lm", "fp8-lm-o1", "te-delayed"])
def test_delayed_scaling_follows_the_reference(name: str) -> None:
    """Twenty steps of growing and shrinking tensors, longer than fp8-lm's history of 16."""
    model, reference = linear(name), ReferenceLinear(PRESETS[name])
    module: Any = model[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scales = set()
    for step in range(20):
        size = 100.0 if step == 1 else 2.0 ** (step % 5)
        x, grad = size * batch(6, 32, seed=step), 1e-4 * size * batch(6, 16, seed=50 + step)
        x.requires_grad_()
        optimizer.zero_grad()
        out = module(x)
        out.backward(grad)
        weight, bias = module.weight.detach(), module.bias.detach()
        expected = reference.run(x.detach(), weight, bias, grad, torch.float32)
        close_in(out.detach(), expected[0])
        close_in(x.grad, expected[1])
        close_in(module.weight.grad, expected[2])
        optimizer.step()
        reference.end_step()
        for role, operand in zip(("input", "weight", "grad_output"), module._lowprec.operands, strict=True):
            if operand.scale is None:
                assert role == "weight" and name != "te-delayed", "fp8-lm scales weights by their current amax"
                continue
            assert same_bits(operand.scale, reference.scale[role]), (step, role)
            assert float(operand.amax) == 0.0
            history = scaling_state(model)["0"][role]["history"]
            assert history[0] == 0 and sorted(history.tolist())[-1] == max(history)
            recent = reference.history[role][: PRESETS[name].fprop.input.scaling.history - 1]
            assert torch.equal(history.sort(descending=True)[0][: len(recent)], torch.tensor(sorted(recent)[::-1]))
        scales.add(float(module._lowprec.operands[0].scale))
    if name == "te-delayed":
        assert len(scales) == 2, "the outlier stays in a history of 1024"
    else:
        assert len(scales) >= 3, "the outlier leaves a history of 16"


def test_first_use_scales_just_in_time() -> None:
    """Without a history, a tensor of any magnitude is scaled by itself, and is not flushed or clipped."""
    for size in (1e-6, 1.0, 1e6):
        model = linear("fp8-lm")
        exact = nn.functional.linear(size * batch(5, 32), model[0].weight)
        out = model(size * batch(5, 32)) - model[0].bias
        assert (out - exact).norm() < 0.06 * exact.norm(), size


def test_gradient_accumulation_takes_the_largest_amax_and_rolls_once() -> None:
    whole, parts = linear(), linear()
    x = batch(8, 32)
    x[5] *= 50  # in a micro-batch that is neither the first nor the last
    train_step(whole, torch.optim.SGD(whole.parameters(), lr=0.0), x)
    train_step(parts, torch.optim.SGD(parts.parameters(), lr=0.0), x, micro_batches=4)
    a, b = scaling_state(whole)["0"]["input"], scaling_state(parts)["0"]["input"]
    assert same_bits(a["scale"], b["scale"]) and same_bits(a["history"], b["history"])
    assert int((b["history"] != 0).sum()) == 1
    assert float(b["history"].max()) == float(x.abs().max())


def test_two_optimizers_on_one_model_roll_once_per_step() -> None:
    models = [mlp(), mlp()]
    for model in models:
        hf_lowprec.convert(model, "te-delayed")
    one, two = models
    single = [torch.optim.SGD(one.parameters(), lr=0.1)]
    double = [torch.optim.SGD(two.up.parameters(), lr=0.1),
              torch.optim.SGD([*two.down.parameters(), *two.norm.parameters()], lr=0.1)]  # fmt: skip
    for step in range(4):
        for model, optimizers in ((one, single), (two, double)):
            model(batch(5, 32, seed=step)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert_same_state(scaling_state(one), scaling_state(two))
    assert int((scaling_state(two)["up"]["input"]["history"] != 0).sum()) == 4


def test_a_step_of_another_model_changes_nothing() -> None:
    model, other = linear(), nn.Linear(4, 4)
    model(batch(5, 32)).sum().backward()
    before = scaling_state(model)
    other(torch.ones(1, 4)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert_same_state(before, scaling_state(model))


def test_layers_that_did_not_run_keep_their_scale() -> None:
    model = nn.ModuleDict({"a": nn.Linear(32, 16), "b": nn.Linear(32, 16)})
    hf_lowprec.convert(model, "fp8-lm")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for name in ("a", "b", "b", "b"):
        model[name](batch(5, 32)).sum().backward()
        optimizer.step()
    state = scaling_state(model)
    assert [int((state[n]["input"]["history"] != 0).sum()) for n in ("a", "b")] == [1, 3]
    assert float(state["a"]["input"]["scale"]) == float(state["b"]["input"]["scale"]) > 0


def test_conversion_after_the_optimizer_has_stepped_and_after_revert() -> None:
    """What an optimizer follows is looked up again when conversions come and go."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_step(model, optimizer, batch(5, 32))
    for _ in range(3):
        hf_lowprec.convert(model, "fp8-lm")
        train_step(model, optimizer, batch(5, 32))
        assert float(model[0]._lowprec.operands[0].scale) > 0, "the new conversion was not stepped"
        assert int(session_of(model).gradients.count) == 1
        hf_lowprec.revert(model)
        gc.collect()
        train_step(model, optimizer, batch(5, 32))


def test_a_model_is_freed_with_its_last_reference() -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_step(model, optimizer, batch(5, 32))
    gone = weakref.ref(session_of(model))
    del model, optimizer
    gc.collect()
    assert gone() is None


def test_closures() -> None:
    model, plain = linear(), linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(batch(5, 32)).square().mean()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) > 0
    train_step(plain, torch.optim.SGD(plain.parameters(), lr=0.1), batch(5, 32))
    assert same_bits(model[0].weight, plain[0].weight)
    assert_same_state(session_of(model).state_dict(), session_of(plain).state_dict())


# --- weight gradients and mu ----------------------------------------------------------------------------------------


def through_e4m3(grad: Tensor, mu: float = 1.0) -> Tensor:
    """s = 2^floor(log2(448 / amax)); sat(g s mu) in E4M3; over s mu."""
    factor = 1.0
    while float(grad.abs().max()) * factor > 448:
        factor /= 2
    while float(grad.abs().max()) * factor * 2 <= 448:
        factor *= 2
    return (grad * factor * mu).clamp(-448, 448).to(torch.float8_e4m3fn).float() / (factor * mu)


def test_the_optimizer_sees_quantised_gradients_and_the_caller_keeps_its_own() -> None:
    model = mlp()
    hf_lowprec.convert(model, "fp8-lm")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(batch(5, 32)).square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    values = {n: g.clone() for n, g in grads.items()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is grads[name] and same_bits(parameter.grad, values[name]), name
        quantised = name in ("up.weight", "down.weight")
        seen = through_e4m3(values[name]) if quantised else values[name]
        assert same_bits(parameter.detach(), before[name] - 0.5 * seen), name
        assert quantised is not same_bits(seen, values[name])


def test_mu_halves_for_the_layer_that_saturates_and_scales_its_gradient() -> None:
    model = linear(n=64)
    session, optimizer = session_of(model), torch.optim.SGD(model.parameters(), lr=1.0)
    weight = model[0].weight
    for mu, after in ((1.0, 0.5), (0.5, 0.5 * 2 ** (1 / 1000))):
        # Half of all elements share the largest magnitude: with mu = 1 their codes are 448. With 1/2 none is.
        grad = torch.where(batch(64, 32) > 0, 7.0, -0.013)
        before, weight.grad = weight.detach().clone(), grad
        model[0].bias.grad = torch.zeros(64)
        optimizer.step()
        assert same_bits(weight.detach(), before - through_e4m3(grad, mu))
        assert float(session.gradients.mu) == pytest.approx(after, rel=1e-6)


@pytest.mark.parametrize("name", ["te-delayed", "te-current", "fp8-amax", "fp8-cscale"])
def test_recipes_without_communication_leave_gradients_alone(name: str) -> None:
    model = linear(name)
    assert session_of(model).gradients is None
    before = model[0].weight.detach().clone()
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.5), batch(5, 32))
    assert same_bits(model[0].weight.detach(), before - 0.5 * model[0].weight.grad)


def test_a_failing_step_gives_the_gradients_back() -> None:
    model = linear()

    class Failing(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            raise ZeroDivisionError

    model(batch(5, 32)).sum().backward()
    own = model[0].weight.grad
    value = own.clone()
    failing, working = Failing(model.parameters(), lr=0.1), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            failing.step()
    working.step()
    assert int(session_of(model).gradients.count) == 3
    assert model[0].weight.grad is own and same_bits(own, value)


@pytest.mark.parametrize("reverted_first", [True, False])
def test_an_optimizer_of_ours_whose_step_raised_is_free_after_revert(reverted_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    hf_lowprec.convert(model, "fp8-lm")
    optimizer = optim.SGD(model.parameters(), lr=1.0, states="fp32")

    def failing() -> None:
        if reverted_first:
            hf_lowprec.revert(model)
            assert optimizer.swaps == [], "`revert` undoes it by itself"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(failing)
    assert optimizer.swaps == []
    hf_lowprec.revert(model)
    weight = model[0].weight
    before, weight.grad = weight.detach().clone(), batch(64, 64)
    optimizer.step()
    assert same_bits(weight.detach(), before - weight.grad)


def test_revert_gives_back_the_gradients_of_a_step_that_raised() -> None:
    class Failing(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            raise ZeroDivisionError

    model = linear()
    model(batch(5, 32)).sum().backward()
    own = model[0].weight.grad
    with pytest.raises(ZeroDivisionError):
        Failing(model.parameters(), lr=0.1).step()
    assert model[0].weight.grad is not own
    hf_lowprec.revert(model)
    assert model[0].weight.grad is own


# --- attaching ------------------------------------------------------------------------------------------------------


def test_adam_is_adopted_and_others_are_kept() -> None:
    model = linear()
    for cls, adopted in ((torch.optim.AdamW, optim.AdamW), (torch.optim.Adam, optim.Adam)):
        optimizer = cls(model.parameters(), lr=1e-3)
        new = attach_optimizer(model, optimizer)
        assert type(new) is adopted and new.param_groups is optimizer.param_groups
        assert "exp_avg e4m3fn, exp_avg_sq e5m10" in session_of(model).report.summary()
        assert attach_optimizer(model, new) is new
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    assert attach_optimizer(model, sgd) is sgd
    assert "optimizer SGD kept (only Adam and AdamW" in session_of(model).report.summary()
    model = linear("fp8-lm-o1")
    adamw = torch.optim.AdamW(model.parameters())
    assert attach_optimizer(model, adamw) is adamw
    assert "optimizer AdamW kept (as asked)" in session_of(model).report.summary()


def test_keep_names_the_reason() -> None:
    model = linear()
    adamw = torch.optim.AdamW(model.parameters())
    assert attach_optimizer(model, adamw, keep="sharded") is adamw
    assert "optimizer AdamW kept (sharded)" in session_of(model).report.summary()


@pytest.mark.parametrize(
    ("recipe", "dtype", "make", "expected"),
    [
        # weight + gradient + exp_avg + exp_avg_sq (+ master); every Parameter, biases included
        ("fp8-lm", torch.float32, torch.optim.AdamW, 4 + 4 + 1 + 2),
        ("fp8-lm", torch.bfloat16, torch.optim.AdamW, 2 + 2 + 1 + 2 + 2),
        ("fp8-lm-o1", torch.float32, torch.optim.AdamW, 4 + 4 + 4 + 4),
        ("fp8-lm-o1", torch.bfloat16, torch.optim.AdamW, 2 + 2 + 2 + 2),
        ("bf16-sr", torch.bfloat16, torch.optim.AdamW, 2 + 2 + 4 + 4),
        ("fp8-lm", torch.float32, torch.optim.SGD, 4 + 4),
    ],
)
def test_bytes_per_parameter(recipe: str, dtype: torch.dtype, make: Any, expected: float) -> None:
    model = nn.Sequential(nn.Linear(128, 64)).to(dtype)
    report = hf_lowprec.convert(model, recipe)
    optimizer = attach_optimizer(model, make(model.parameters(), lr=1e-3))
    # the bias is small and keeps float32 moments; scales and counters are a few bytes per tensor
    assert report.bytes_per_parameter == pytest.approx(expected, rel=0.01)
    assert f"{report.bytes_per_parameter:.2f} bytes per parameter" in report.summary()
    model(batch(5, 128, dtype=dtype)).sum().backward()
    optimizer.step()
    ours = isinstance(optimizer, optim.LowPrecOptimizer)
    states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor) and (ours or v.dim())]
    held = sum(t.numel() * t.element_size() for t in [*states, *model.parameters()])
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters())
    assert held + gradients == report.bytes_per_parameter * report.parameters, "the report is what is really held"


def test_embeddings_are_marked() -> None:
    """By `convert`, for optimizers that nobody attaches, and by attaching, for embeddings that came later."""
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64))
    hf_lowprec.convert(model, "te-current")
    first = optim.AdamW(model.parameters(), states="8bit")
    assert first.state_bytes()[id(model[0].weight)] >= 8 * 6400 > 4 * 6400 > first.state_bytes()[id(model[1].weight)]
    model[0] = nn.Embedding(200, 64)  # resize_token_embeddings
    later = optim.AdamW(model.parameters(), states="8bit")
    assert attach_optimizer(model, later) is later
    assert later.state_bytes()[id(model[0].weight)] >= 8 * 12800


def test_bytes_per_parameter_of_several_optimizers() -> None:
    """Each counts for its own Parameters; one over the same Parameters takes the place of an earlier one."""
    model = nn.Sequential(nn.Linear(128, 64, bias=False), nn.Linear(64, 384, bias=False))  # 8192 and 24576 elements
    report = hf_lowprec.convert(model, "fp8-lm")
    first = attach_optimizer(model, torch.optim.AdamW(model[0].parameters()))
    assert report.bytes_per_parameter == pytest.approx(4 + 0.25 * (4 + 3), rel=1e-3)  # and counters and scales
    second = attach_optimizer(model, torch.optim.SGD(model[1].parameters(), lr=0.1, momentum=0.9))
    for _ in range(2):
        assert report.bytes_per_parameter == pytest.approx(8 + 0.25 * 3 + 0.75 * 4, rel=1e-3)
        assert "AdamW with exp_avg e4m3fn" in report.optimizer and "SGD kept" in report.optimizer
        assert attach_optimizer(model, second) is second
    third = attach_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert report.bytes_per_parameter == 8 and "AdamW with" not in report.optimizer
    assert first.state_dict() and third is not second


def test_bytes_per_parameter_invents_nothing() -> None:
    class Mine(torch.optim.Adam):
        pass

    for make in (torch.optim.Adafactor, torch.optim.RMSprop, Mine):
        model = nn.Sequential(nn.Linear(32, 16))
        report = hf_lowprec.convert(model, "fp8-lm")
        optimizer = attach_optimizer(model, make(model.parameters(), lr=1e-3))
        assert report.bytes_per_parameter == 4 + 4, "weights and gradients"
        assert f"{type(optimizer).__name__} kept" in report.summary() and "its states not counted" in report.summary()
    model = nn.Sequential(nn.Linear(32, 16))
    report = hf_lowprec.convert(model, "te-delayed")
    optimizer = attach_optimizer(model, torch.optim.AdamW(model.parameters(), amsgrad=True))
    assert report.bytes_per_parameter == 4 + 4 + 3 * 4 and "not counted" not in report.summary()


# --- checkpoints ----------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=1e-3),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2),
}


def start(recipe: str, kind: str, dtype: torch.dtype) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = mlp().to(dtype)
    hf_lowprec.convert(model, recipe)
    return model, attach_optimizer(model, OPTIMIZERS[kind](model.parameters()))


def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        train_step(model, optimizer, (1 + step) * batch(6, 32, seed=step, dtype=dtype), micro_batches=2)


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("recipe", "kind"),
    [("fp8-lm", "SGD"), ("fp8-lm", "RMSprop"), ("fp8-lm", "AdamW"), ("fp8-lm-o1", "AdamW"), ("te-delayed", "AdamW")],
)
def test_resume_is_bit_identical(recipe: str, kind: str, dtype: torch.dtype) -> None:
    model, optimizer = start(recipe, kind, dtype)
    go_on(model, optimizer, range(3))
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    go_on(model, optimizer, range(3, 6))
    resumed, new = start(recipe, kind, dtype)
    resumed.load_state_dict(saved["model"])
    new.load_state_dict(saved["optimizer"])
    go_on(resumed, new, range(3, 6))
    assert_same_state(model.state_dict(), resumed.state_dict())
    assert_same_state(optimizer.state_dict()["state"], new.state_dict()["state"])
    assert_same_state(session_of(model).state_dict(), session_of(resumed).state_dict())


def plain(recipe: str = "fp8-lm", seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """As in a script without accelerate: nobody attaches the optimizer."""
    model = mlp(seed)
    hf_lowprec.convert(model, recipe)
    return model, optim.AdamW(model.parameters(), lr=1e-2, states="fp8-lm")


def test_our_optimizer_loads_before_its_first_step_though_never_attached() -> None:
    model, optimizer = plain()
    assert STATE_KEY in optimizer.state_dict(), "saved before the first step"
    go_on(model, optimizer, range(3))
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    go_on(model, optimizer, range(3, 6))
    resumed, new = plain(seed=1)
    resumed.load_state_dict(saved["model"])
    new.load_state_dict(saved["optimizer"])
    assert_same_state(saved["optimizer"][STATE_KEY], session_of(resumed).state_dict())
    go_on(resumed, new, range(3, 6))
    assert_same_state(model.state_dict(), resumed.state_dict())
    assert_same_state(session_of(model).state_dict(), session_of(resumed).state_dict())
    _, other = plain("te-delayed")
    with pytest.raises(ValueError, match="written with recipe 'fp8-lm', the model trains with 'te-delayed'"):
        other.load_state_dict(saved["optimizer"])
    assert not other.state


def test_a_script_that_keeps_the_adopted_optimizer_saves_through_it() -> None:
    model = mlp()
    hf_lowprec.convert(model, "fp8-lm")
    held = torch.optim.AdamW(model.parameters(), lr=1e-2)
    new = attach_optimizer(model, held)
    go_on(model, new, range(2))
    assert_same_state(new.state_dict(), held.state_dict())
    resumed = mlp()
    hf_lowprec.convert(resumed, "fp8-lm")
    reference = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    attach_optimizer(resumed, reference)
    reference.load_state_dict(through_file(held.state_dict()))
    assert_same_state(session_of(model).state_dict(), session_of(resumed).state_dict())


def test_without_the_state_a_resumed_run_differs() -> None:
    """Or else the test above would pass with nothing saved."""
    model, optimizer = start("te-delayed", "SGD", torch.float32)
    go_on(model, optimizer, range(3))
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    go_on(model, optimizer, range(3, 6))
    resumed, new = start("te-delayed", "SGD", torch.float32)
    resumed.load_state_dict(saved["model"])
    del saved["optimizer"][STATE_KEY]
    new.load_state_dict(saved["optimizer"])
    go_on(resumed, new, range(3, 6))
    with pytest.raises(AssertionError):
        assert_same_state(model.state_dict(), resumed.state_dict())


def test_saved_state_is_a_copy_keyed_by_layer_name() -> None:
    model, optimizer = start("fp8-lm", "SGD", torch.float32)
    go_on(model, optimizer, range(2))
    state = optimizer.state_dict()[STATE_KEY]
    assert state["recipe"] == PRESETS["fp8-lm"].to_dict()
    assert list(state["layers"]) == ["up", "down"]
    assert state["layers"]["up"]["input"].keys() == {"scale", "amax", "counts", "history"}
    assert state["layers"]["up"]["weight"].keys() == {"counts"}
    before = bits_of(state)
    go_on(model, optimizer, range(2, 4))
    assert_same_state(before, state)


def test_amax_between_two_steps_survives() -> None:
    """A checkpoint in the middle of an accumulation."""
    model, optimizer = start("fp8-lm", "SGD", torch.float32)
    model(batch(5, 32)).sum().backward()
    assert float(model.up._lowprec.operands[0].amax) > 0
    resumed, new = start("fp8-lm", "SGD", torch.float32)
    new.load_state_dict(through_file(optimizer.state_dict()))
    assert_same_state(scaling_state(model), scaling_state(resumed))


def test_state_of_two_models_in_one_optimizer() -> None:
    def pair() -> tuple[list[nn.Module], torch.optim.Optimizer]:
        models: list[nn.Module] = [mlp(0), mlp(1, hidden=64)]
        for model in models:
            hf_lowprec.convert(model, "fp8-lm")
        optimizer = torch.optim.SGD([p for m in models for p in m.parameters()], lr=0.1)
        for model in models:
            attach_optimizer(model, optimizer)
        return models, optimizer

    models, optimizer = pair()
    (models[0](batch(5, 32)) + models[1](3 * batch(5, 32))).sum().backward()
    optimizer.step()
    others, new = pair()
    new.load_state_dict(through_file(optimizer.state_dict()))
    for a, b in zip(models, others, strict=True):
        assert_same_state(session_of(a).state_dict(), session_of(b).state_dict())
        assert float(a.up._lowprec.operands[0].scale) > 0
    with pytest.raises(ValueError, match="2 models; this optimizer updates 1"):
        start("fp8-lm", "SGD", torch.float32)[1].load_state_dict(optimizer.state_dict())


def test_converted_anew_the_optimizer_carries_the_new_state() -> None:
    model, optimizer = start("fp8-lm", "SGD", torch.float32)
    hf_lowprec.revert(model)
    assert STATE_KEY not in optimizer.state_dict()
    hf_lowprec.convert(model, "te-delayed")
    attach_optimizer(model, optimizer)
    state = optimizer.state_dict()
    assert state[STATE_KEY]["recipe"]["name"] == "te-delayed"
    optimizer.load_state_dict(state)


def test_carrying_twice_registers_hooks_once() -> None:
    model, optimizer = start("fp8-lm", "SGD", torch.float32)
    hooks = len(optimizer._optimizer_state_dict_post_hooks)
    carry_state(session_of(model), optimizer)
    attach_optimizer(model, optimizer)
    assert len(optimizer._optimizer_state_dict_post_hooks) == hooks == 1


def test_schedulers_drive_the_adopted_optimizer() -> None:
    model = linear()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    new = attach_optimizer(model, optimizer)
    train_step(model, new, batch(5, 32))
    scheduler.step()
    assert new.param_groups[0]["lr"] == 0.5
    copy.deepcopy(new.state_dict())


def test_scale_leaves_the_format_its_maximum() -> None:
    """Power-of-two scales that just hold the amax: the largest code is within a factor 2 of the format's maximum."""
    model = linear()
    x = batch(5, 32)
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), x)
    scale = float(model[0]._lowprec.operands[0].scale)
    largest = get_format("e4m3fn").max
    assert torch.frexp(torch.tensor(scale))[0] == 0.5
    assert largest / 2 < float(x.abs().max()) / scale <= largest
