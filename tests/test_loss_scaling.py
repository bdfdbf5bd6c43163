# SPDX-License-Identifier: Apache-2.0
"""Loss scales of recipes in plain PyTorch: torch's state machine step by step, and what skips a step."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

import hf_lowprec
from hf_lowprec import optim
from hf_lowprec.loss_scaling import StaticGradScaler, make_scaler
from hf_lowprec.monitor import statistics
from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import LossScale, Recipe, RecipeError

STATIC = {"method": "static", "init": 1000.0}
BF16 = {"name": "mine", "loss_scale": STATIC}
# E5M2 gradients without a scale: those beyond 57344 saturate.
UNSCALED = {
    "name": "mine", "loss_scale": STATIC,
    **{gemm: {slot: {"format": "e5m2", "scaling": {"method": "none"}} for slot in slots}
       for gemm, slots in (("fprop", ("input", "weight")), ("dgrad", ("grad_output", "weight")),
                           ("wgrad", ("input", "grad_output")))},
}  # fmt: skip


def step(scaler: torch.amp.GradScaler, param: nn.Parameter, optimizer: torch.optim.Optimizer, bad: bool) -> None:
    optimizer.zero_grad()
    scaler.scale((param * (torch.inf if bad else 0.5)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()


def automaton(policy: LossScale, overflows: list[bool]) -> list[float]:
    """The scale before every step, by torch's documentation, and nothing of torch."""
    scale, clean, out = policy.init, 0, []
    for bad in overflows:
        out.append(scale)
        clean = 0 if bad else clean + 1
        if policy.method == "dynamic" and bad:
            scale *= policy.backoff_factor
        elif policy.method == "dynamic" and clean == policy.growth_interval:
            scale, clean = scale * policy.growth_factor, 0
    return out


POLICIES = [
    LossScale(method="static", init=1000.0),
    LossScale(method="static", init=1.0),
    LossScale(method="dynamic", init=4.0, growth_interval=3),
    LossScale(method="dynamic", init=2.0**20, growth_factor=4.0, backoff_factor=0.25, growth_interval=2),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.method}-{p.init:g}")
def test_the_scale_walks_as_it_should_and_bad_steps_change_nothing(policy):
    overflows = [random.Random(7).random() < 0.3 for _ in range(40)]
    overflows = [*overflows[:20], *[False] * 10, *overflows[20:]]
    param = nn.Parameter(torch.zeros(3))
    scaler, optimizer = make_scaler(policy, "cpu"), torch.optim.SGD([param], lr=1.0)
    for bad, scale in zip(overflows, automaton(policy, overflows), strict=True):
        before = param.detach().clone()
        assert scaler.get_scale() == scale
        step(scaler, param, optimizer, bad)
        assert torch.equal(param.detach(), before if bad else before - 0.5), "the gradient is unscaled exactly"


@pytest.mark.parametrize("name", ["fp16"])
def test_presets_are_torchs_defaults(name):
    """65536, doubled after 2000 clean steps, halved on overflow: as torch.amp.GradScaler() has it."""
    ours, torchs = make_scaler(PRESETS[name].loss_scale, "cpu"), torch.amp.GradScaler("cpu")
    assert ours.state_dict() == torchs.state_dict()
    params = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    for scaler in (ours, torchs):
        scaler.set_growth_interval(3)
    overflows = [False, True, True, False, False, False, False, True, False, False, False, False, False, False]
    optimizers = [torch.optim.SGD([p], lr=1.0) for p in params]
    for bad in overflows:
        for scaler, param, optimizer in zip((ours, torchs), params, optimizers, strict=True):
            step(scaler, param, optimizer, bad)
        assert ours.state_dict() == torchs.state_dict() and torch.equal(*params)


def test_no_loss_scale_is_a_scaler_that_does_nothing():
    model = nn.Sequential(nn.Linear(32, 32))
    hf_lowprec.convert(model, "fp8-lm")
    scaler, loss = hf_lowprec.grad_scaler(model), torch.ones(())
    assert not scaler.is_enabled() and scaler.scale(loss) is loss
    assert "loss scale" not in hf_lowprec.convert(model, "fp8-lm").summary()


def test_clipping_sees_unscaled_gradients():
    norms, after = [], []
    for recipe in ({"name": "mine"}, BF16):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32))
        hf_lowprec.convert(model, recipe)
        scaler, optimizer = hf_lowprec.grad_scaler(model), torch.optim.SGD(model.parameters(), lr=0.1)
        loss = model(torch.randn(4, 32, generator=torch.Generator().manual_seed(1))).square().sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        scaler.step(optimizer)
        scaler.update()
        after.append(model[0].weight.detach())
    assert norms[0] > 1
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(after[1], after[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("amplitude", [1.0, 1e6])
def test_an_8_bit_format_that_saturates_skips_no_step(amplitude):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    hf_lowprec.convert(model, UNSCALED)
    scaler, optimizer = hf_lowprec.grad_scaler(model), optim.SGD(model.parameters(), lr=1e-9, states="fp32")
    x, before = torch.randn(4, 32), model[0].weight.detach().clone()
    scaler.scale((model(x) * amplitude).sum()).backward()
    saturated = [value for key, value in statistics(model).items() if "saturated" in key or "overflow" in key]
    assert saturated and (max(saturated) > 0) == (amplitude > 1)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1000 and optimizer.skipped_steps == 0
    assert not torch.equal(model[0].weight, before)


def gradient(recipe: Any, small: float) -> torch.Tensor:
    """Of a weight under float16 autocast, where the loss is `small`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    hf_lowprec.convert(model, recipe)
    scaler, optimizer = hf_lowprec.grad_scaler(model), torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(torch.randn(8, 32, generator=torch.Generator().manual_seed(1))).float().mean() * small
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grad = model[0].weight.grad
    assert grad is not None
    return grad / small


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_fp16_gradients_that_would_underflow_do_not(method):
    """What loss scales are for (arXiv 1710.03740): float16 ends at 6e-8."""
    exact = gradient("bf16", 1.0)
    lost = gradient("bf16", 1e-8)
    kept = gradient({"name": "mine", "base": "fp16", "loss_scale": {"method": method, "init": 65536.0}}, 1e-8)
    assert (lost - exact).norm() > 0.5 * exact.norm()
    assert (kept - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("policy", POLICIES[::2], ids=lambda p: p.method)
def test_resume(policy):
    overflows = [False, False, True, False, False, False, True, False]
    param = nn.Parameter(torch.zeros(3))
    scaler, optimizer = make_scaler(policy, "cpu"), torch.optim.SGD([param], lr=1.0)
    for bad in overflows[:4]:
        step(scaler, param, optimizer, bad)
    resumed = make_scaler(policy, "cpu")
    resumed.load_state_dict(scaler.state_dict())
    for bad in overflows[4:]:
        for one in (scaler, resumed):
            step(one, param, optimizer, bad)
        assert one.state_dict() == scaler.state_dict()


def test_a_static_scale_is_the_recipes_whatever_was_saved():
    scaler = StaticGradScaler("cpu", 1000.0)
    scaler.load_state_dict(StaticGradScaler("cpu", 8.0).state_dict())
    assert scaler.get_scale() == 1000.0
    param = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([param], lr=1.0)
    scaler.scale(param.sum()).backward()
    assert torch.equal(param.grad, torch.full((3,), 1000.0))
    scaler.step(optimizer)
    scaler.update(new_scale=16.0)
    assert scaler.get_scale() == 16.0


def test_float16_parameters_and_unconverted_models_are_refused():
    model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(ValueError, match="convert the model before asking"):
        hf_lowprec.grad_scaler(model)
    hf_lowprec.convert(model, BF16)
    with pytest.raises(ValueError, match=r"0\.weight is float16.*load the model in float32"):
        hf_lowprec.grad_scaler(model.half())


def test_the_report_says_who_scales():
    model = nn.Sequential(nn.Linear(32, 32))
    report = hf_lowprec.convert(model, BF16)
    assert report.summary().endswith("loss scale static, by hf_lowprec.grad_scaler(model)")
    hf_lowprec.grad_scaler(model)
    assert report.summary().endswith("loss scale static 1000")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init": 5.0}, "method 'none' does not read"),
        ({"method": "static", "growth_interval": 10}, "method 'static' does not read"),
        ({"method": "static", "init": 0.0}, "init: positive"),
        ({"method": "dynamic", "growth_factor": 1.0}, "growth_factor above 1"),
        ({"method": "dynamic", "backoff_factor": 1.0}, "backoff_factor"),
        ({"method": "dynamic", "growth_interval": 0}, "growth_interval"),
    ],
)
def test_scales_that_mean_nothing_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict({"name": "mine", "loss_scale": fields})


@pytest.mark.parametrize("states", ["fp8-lm", "8bit"])
def test_under_our_own_optimizers(states):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    hf_lowprec.convert(model, BF16)
    scaler, optimizer = hf_lowprec.grad_scaler(model), optim.AdamW(model.parameters(), lr=1e-2, states=states)
    x, losses = torch.randn(16, 64), []
    for bad in (False, True, False, False):
        optimizer.zero_grad()
        before = model[0].weight.detach().clone()
        loss = (model(x) - x).square().mean()
        scaler.scale(loss * torch.inf if bad else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model[0].weight, before) == bad
        losses.append(loss.item())
    assert losses[-1] < losses[0] and optimizer.state[model[0].weight]["step"] == 3


def test_hfp8s_automatic_scale_comes_down_to_what_e5m2_holds():
    """Its gradients overflow to Inf; of saturated ones nobody would hear, and the scale would stay where it is."""
    found = {}
    for overflow in ("inf", "saturate"):
        recipe = PRESETS["hfp8"].to_dict() | {"name": "mine", "loss_scale": {"method": "dynamic", "init": 2.0**40}}
        for gemm in ("dgrad", "wgrad"):
            recipe[gemm]["grad_output"]["overflow"] = overflow
        if overflow == "inf":
            assert recipe["dgrad"] == PRESETS["hfp8"].to_dict()["dgrad"]
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 64, bias=False))
        hf_lowprec.convert(model, recipe)
        optimizer = hf_lowprec.attach_optimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        scaler, x, losses = hf_lowprec.grad_scaler(model), torch.randn(32, 64), []
        for _ in range(30):
            optimizer.zero_grad()
            loss = (model(x) - x).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        found[overflow] = scaler.get_scale(), losses
    assert found["saturate"][0] == 2.0**40
    scale, losses = found["inf"]
    assert 2.0**10 < scale < 2.0**30 and losses[0] == losses[5] and losses[-1] < 0.5 * losses[0]
