# SPDX-License-Identifier: Apache-2.0
"""Every algorithm against an independent one: torch.optim, the papers' equations in float64, torch-optimi."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from training import MAKE, NAMES, bits, parameters, set_gradients, slow_beside, weights

from hf_lowprec.optim import SGD, Adam, AdamW, Lion, StableAdamW, algorithms
from hf_lowprec.recipe import Residual

STEPS = 60


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int = STEPS) -> None:
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()


def assert_same_path(ours: Any, theirs: Any, dtype: torch.dtype = torch.float32, rtol: float = 1e-6) -> None:
    """Two constructors, the same gradients: weights agree at every step, to `rtol` of a tensor's largest."""
    mine, other = parameters(dtype=dtype), parameters(dtype=dtype)
    a, b = ours(mine), theirs(other)
    for step in range(STEPS):
        set_gradients(mine, step)
        set_gradients(other, step)
        a.step()
        b.step()
        for p, q in zip(mine, other, strict=True):
            error = (p - q).abs().max().item()
            assert error <= rtol * max(1.0, q.abs().max().item()), (step, tuple(p.shape), error)


# --- torch.optim ----------------------------------------------------------------------------------------------------

ADAM = [
    {},
    {"betas": (0.5, 0.9), "weight_decay": 0.1},
    {"maximize": True, "weight_decay": 0.05, "eps": 1e-3},
    {"betas": (0.0, 0.99)},
    {"betas": (0.9, 0.0), "eps": 1e-2},
]
SGDS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.5, "dampening": 0.5, "weight_decay": 0.01, "maximize": True},
    {"weight_decay": 0.1, "maximize": True},
]


@pytest.mark.parametrize("options", ADAM, ids=str)
@pytest.mark.parametrize("ours, theirs", [(AdamW, torch.optim.AdamW), (Adam, torch.optim.Adam)])
def test_adam_is_torchs(ours, theirs, options):
    options = {"lr": 3e-3, "weight_decay": 0.0, **options}
    assert_same_path(lambda p: ours(p, states="fp32", **options), lambda p: theirs(p, foreach=False, **options))


@pytest.mark.parametrize("options", SGDS, ids=str)
def test_sgd_is_torchs(options):
    options = {"lr": 3e-3, **options}
    assert_same_path(
        lambda p: SGD(p, states="fp32", **options), lambda p: torch.optim.SGD(p, foreach=False, **options)
    )


@pytest.mark.parametrize("ours, theirs", [(AdamW, torch.optim.AdamW), (Adam, torch.optim.Adam)])
def test_float64_parameters_are_computed_in_float64(ours, theirs):
    options = {"lr": 3e-3, "weight_decay": 0.1}
    assert_same_path(
        lambda p: ours(p, states="fp32", **options),
        lambda p: theirs(p, foreach=False, **options),
        torch.float64,
        1e-14,
    )


@pytest.mark.parametrize("kind", ["decoupled", "coupled", "sgd"])
def test_weight_decay_and_first_steps_by_hand(kind):
    """Two steps with a constant gradient, where torch is not asked."""
    p = nn.Parameter(torch.tensor([2.0]))
    if kind == "sgd":
        optimizer = SGD([p], lr=0.5, momentum=0.5, dampening=0.5, weight_decay=0.1, states="fp32")
    else:
        optimizer = (AdamW if kind == "decoupled" else Adam)(
            [p], lr=0.5, betas=(0.5, 0.5), eps=0.0, weight_decay=0.1, states="fp32"
        )
    w, m, v = 2.0, 0.0, 0.0
    for t in (1, 2):
        p.grad = torch.tensor([1.0])
        optimizer.step()
        g = 1.0 if kind == "decoupled" else 1.0 + 0.1 * w
        if kind == "sgd":
            m = g if t == 1 else 0.5 * m + 0.5 * g
            w -= 0.5 * m
        else:
            m, v = 0.5 * m + 0.5 * g, 0.5 * v + 0.5 * g * g
            w = (w * (1 - 0.5 * 0.1) if kind == "decoupled" else w) - 0.5 * (m / (1 - 0.5**t)) / math.sqrt(
                v / (1 - 0.5**t)
            )
        assert p.item() == pytest.approx(w, rel=1e-6)


@pytest.mark.parametrize("name", MAKE)
def test_lr_is_read_each_step_as_a_float_or_a_tensor(name):
    results = []
    for kind in ("float", "tensor", "constant"):
        params = parameters()
        lr = torch.tensor(1e-2) if kind == "tensor" else 1e-2
        optimizer = MAKE[name](params, lr=lr, states="fp32", weight_decay=0.1)
        run(optimizer, params, 3)
        if kind == "tensor":
            lr.fill_(1e-3)
        elif kind == "float":
            optimizer.param_groups[0]["lr"] = torch.tensor(1e-3).item()
        run(optimizer, params, 3)
        results.append(weights(params))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(results[0], results[2], rtol=1e-3, atol=1e-3)


# --- equations ------------------------------------------------------------------------------------------------------


def test_lion_is_the_papers_ten_lines():
    lr, (b1, b2), wd = 3e-3, (0.9, 0.99), 0.1

    class Reference:
        def __init__(self, params):
            self.params, self.m = params, [torch.zeros_like(p, dtype=torch.float64) for p in params]

        @torch.no_grad()
        def step(self):
            for p, m in zip(self.params, self.m, strict=True):
                g = p.grad.double()
                p.copy_(p.double() * (1 - lr * wd) - lr * torch.sign(b1 * m + (1 - b1) * g))
                m.mul_(b2).add_(g, alpha=1 - b2)

    # a sign that differed would show as 2 lr, 1000 times the bound; rounding after each operation walks that far
    assert_same_path(lambda p: Lion(p, lr=lr, weight_decay=wd, states="fp32"), Reference, rtol=5e-6)


class StableReference:
    """arXiv 2304.13013, algorithm 2, in float64."""

    def __init__(self, params, lr=3e-3, betas=(0.9, 0.99), eps=1e-6, wd=0.1):
        self.params, self.lr, self.betas, self.eps, self.wd = params, lr, betas, eps, wd
        self.w = [p.detach().double() for p in params]
        self.m, self.v = ([torch.zeros_like(w) for w in self.w] for _ in range(2))
        self.t, self.rms = 0, []

    @torch.no_grad()
    def step(self):
        self.t += 1
        b1, b2 = (b * (1 - b ** (self.t - 1)) / (1 - b**self.t) for b in self.betas)
        for p, w, m, v in zip(self.params, self.w, self.m, self.v, strict=True):
            g = p.grad.double()
            m.mul_(b1).add_((1 - b1) * g)
            v.mul_(b2).add_((1 - b2) * g * g)
            rms = math.sqrt((g * g / v.clamp(min=self.eps**2)).mean().item())
            self.rms.append(rms)
            eta = self.lr / max(1.0, rms)
            w.sub_(eta * self.wd * w)
            w.sub_(eta * m / (v.sqrt() + self.eps))
            p.copy_(w)


def test_stable_adamw_is_the_papers_algorithm():
    seen = []

    def reference(params):
        seen.append(StableReference(params))
        return seen[-1]

    assert_same_path(lambda p: StableAdamW(p, lr=3e-3, weight_decay=0.1, states="fp32"), reference, rtol=2e-6)
    clipped = sum(rms > 1.05 for rms in seen[0].rms) / len(seen[0].rms)
    assert 0.05 < clipped < 0.95, "the gradients must clip some updates, and not all"


def test_stable_adamw_is_optimis():
    optimi = pytest.importorskip("optimi")
    options = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    assert_same_path(
        lambda p: StableAdamW(p, states="fp32", **options),
        lambda p: optimi.StableAdamW(p, foreach=False, triton=False, **options),
        rtol=2e-6,
    )


def test_lion_is_optimis():
    optimi = pytest.importorskip("optimi")
    options = {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
    assert_same_path(
        lambda p: Lion(p, states="fp32", **options),
        lambda p: optimi.Lion(p, foreach=False, triton=False, **options),
    )


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 1 - 2**-20])
def test_power_of_beta(beta):
    t = torch.tensor([0, 1, 2, 3, 7, 100, 12345, 2**20 + 1, 2**31 - 1], dtype=torch.float64)
    for result, exponent in zip(algorithms.power(beta, t).tolist(), t.tolist(), strict=True):
        # two roundings of half an ulp per bit, the errors of a square double with it
        assert result == pytest.approx(beta ** int(exponent), rel=2.0**-52 * max(1, exponent), abs=1e-300)


def test_step_counts_beyond_a_float32s_mantissa_do_no_harm():
    params = parameters()
    optimizer = AdamW(params, states="fp32")
    run(optimizer, params, 1)
    for state in optimizer.state.values():
        state["step"].fill_(2.0**24)
    before = weights(params)
    run(optimizer, params, 2)
    assert weights(params).isfinite().all() and not torch.equal(before, weights(params))


# --- every state, every algorithm ------------------------------------------------------------------------------------


LEARNERS = [name for name in MAKE if name != "Adam"]  # without decay, AdamW
INITIAL = 48.0


def regression(name: str, dtype: torch.dtype, **options: Any) -> float:
    """Least squares by a decaying learning rate, of a tensor that named states quantise; INITIAL at the start."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 48, generator=generator)
    y = x @ torch.randn(48, 96, generator=generator)
    weight = nn.Parameter(torch.zeros(48, 96, dtype=dtype))
    optimizer = MAKE[name]([weight], weight_decay=0.0, **options)
    rate = optimizer.param_groups[0]["lr"]
    for step in range(120):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / 120)
        optimizer.zero_grad()
        (x @ weight.float() - y).square().mean().backward()
        optimizer.step()
    return (x @ weight.detach().float() - y).square().mean().item()


@pytest.fixture(scope="module")
def full_precision() -> dict[str, float]:
    return {name: regression(name, torch.float32, states="fp32") for name in LEARNERS}


def allowed(name: str, states: str) -> float:
    """Loss above that of float32 everywhere. Lion's steps keep their size, so it ends in noise; 4 bits are few."""
    return (1.5e-3 if name == "Lion" or states == "4bit" else 1e-4) * INITIAL


@pytest.mark.parametrize(
    "dtype", slow_beside([torch.bfloat16], [torch.float32, torch.float16]), ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize("states", NAMES)
@pytest.mark.parametrize("name", LEARNERS)
def test_every_state_trains(name, states, dtype, full_precision):
    options: dict[str, Any] = {"states": states}
    if (states == "compact" and dtype == torch.float16) or states == "fp32":
        options["master"] = "fp32"  # a residual needs a bfloat16 Parameter; fp32 alone is the control below
    loss = regression(name, dtype, **options)
    assert full_precision[name] < 1e-3 * INITIAL, "the reference learns"
    assert loss < full_precision[name] + allowed(name, states), (loss, full_precision[name])


@pytest.mark.parametrize("master", ["fp32", "fp16-scaled", "bf16+8", "bf16+16", "sr"])
@pytest.mark.parametrize("name", slow_beside(["AdamW"], [name for name in LEARNERS if name != "AdamW"]))
def test_every_master_trains(name, master, full_precision):
    assert regression(name, torch.bfloat16, states="8bit", master=master) < full_precision[name] + allowed(
        name, "8bit"
    )


def test_control_nearest_rounding_without_a_master_fails_that_bound(full_precision):
    loss = regression("AdamW", torch.bfloat16, states="8bit", master=None)
    assert loss > full_precision["AdamW"] + allowed("AdamW", "8bit")


@pytest.mark.parametrize("name", MAKE)
def test_masters_order_by_their_bits(name):
    """How far 16-bit weights stray from float32 ones under the same gradients."""
    far = {}
    reference = parameters([(64, 65)], torch.bfloat16)
    full = [nn.Parameter(p.detach().float()) for p in reference]
    plain = MAKE[name](full, lr=1e-3, states="fp32")
    for master in ("fp32", "bf16+16", "bf16+8", "sr"):
        params = parameters([(64, 65)], torch.bfloat16)
        optimizer = MAKE[name](params, lr=1e-3, states="fp32", master=master)
        for step in range(30):
            set_gradients(params, step)
            optimizer.step()
        item = optimizer._plan_now().items[0]
        far[master] = algorithms.st.read_weight(item.state, item.param, item.states)
        assert (master in ("bf16+16", "bf16+8")) == isinstance(item.slots.get("master"), Residual)
    for step in range(30):
        set_gradients(params, step)
        full[0].grad = params[0].grad.float()
        plain.step()
    error = {master: (value - full[0]).abs().mean().item() for master, value in far.items()}
    assert error["fp32"] == 0 and error["bf16+16"] == 0
    assert 0 < error["bf16+8"] < 0.05 * error["sr"]


def test_seeds_are_those_of_the_step_that_is_made():
    """Rounding draws from t of this step: two optimizers whose counts differ round differently."""
    outcomes = []
    for count in (0, 0, 5):
        params = parameters([(64, 65)], torch.bfloat16)
        optimizer = SGD(params, lr=1e-3, states="fp32", master="sr")
        run(optimizer, params, 1)
        optimizer.state[params[0]]["step"].fill_(count)
        set_gradients(params, 1)
        optimizer.step()
        outcomes.append(bits(params[0]))
    assert torch.equal(outcomes[0], outcomes[1]) and not torch.equal(outcomes[0], outcomes[2])
