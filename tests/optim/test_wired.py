# SPDX-License-Identifier: Apache-2.0
"""Gradients through a communication format in front of our own optimizers: what a swap of `p.grad` gives, to the bit.

The reference quantises gradients by hand, one at a time, hands them over in `p.grad` and takes them back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_lowprec
from hf_lowprec import optim
from hf_lowprec.conversion import session_of
from hf_lowprec.optim import GradientQuantizer, GradientSwap
from hf_lowprec.optim.freed import FreedGradient
from hf_lowprec.recipe import Communication, Quant, Rounding, Scaling

POLICY = Communication(gradient=Quant(format="e4m3fn", scaling=Scaling(snap="rceil")), auto_scale=True)
SHAPES = [(64, 65), (4096,), (7, 5), (0, 3), (33, 130)]

Made = tuple[list[nn.Parameter], Any, GradientQuantizer]


def make(cls: str = "AdamW", communication: Communication = POLICY, **options: Any) -> Made:
    """Parameters of which every second one has a number, in two groups."""
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.bfloat16, torch.float32, torch.float16]
    params = [
        nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(dtypes[i % 3]))
        for i, shape in enumerate(SHAPES * 2)
    ]
    groups: list[Any] = [{"params": params[::3], "lr": 1e-2}, {"params": [p for i, p in enumerate(params) if i % 3]}]
    quantizer = GradientQuantizer(communication, len(params), world_size=2)
    quantizer.k += torch.arange(len(params), dtype=torch.int32) * 211 - 500
    return params, getattr(optim, cls)(groups, **{"states": "8bit", "master": "sr", **options}), quantizer


def numbered(params: list[nn.Parameter]) -> dict[Tensor, int]:
    return {p: len(params) - 1 - i for i, p in enumerate(params) if i % 5 != 2}


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        grad = torch.randn(p.shape, generator=generator) * 10.0 ** torch.randn(p.shape, generator=generator)
        p.grad = (grad * 1e-2).to(p.dtype)


@contextmanager
def by_hand(params: list[nn.Parameter], quantizer: GradientQuantizer) -> Iterator[None]:
    own = {p: p.grad for p in params}
    for p, number in numbered(params).items():
        if p.grad is not None:
            p.grad = quantizer.quantize(number, p.grad)
    yield
    for p, grad in own.items():
        p.grad = grad


def assert_same(a: Made, b: Made) -> None:
    for p, q in zip(a[0], b[0], strict=True):
        assert torch.equal(p, q)
        assert a[1].state[p].keys() == b[1].state[q].keys()
        for key, value in a[1].state[p].items():
            assert torch.equal(value, b[1].state[q][key]), key
    for name in ("skipped_steps", "skipped_elements"):
        assert torch.equal(getattr(a[1], name), getattr(b[1], name))
    for name in ("k", "saturated", "count"):
        assert torch.equal(getattr(a[2], name), getattr(b[2], name)), name


def missing(params: list[nn.Parameter], step: int) -> None:
    params[step].grad = params[step + 3].grad = None


def spoiled(params: list[nn.Parameter], step: int) -> None:
    if step == 1:
        params[0].grad.view(-1)[5] = torch.nan
        params[4].grad.view(-1)[-1] = -torch.inf


def zero(params: list[nn.Parameter], step: int) -> None:
    params[0].grad.zero_()


@pytest.mark.parametrize("change", [None, missing, spoiled, zero])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        ("AdamW", {}),
        ("AdamW", {"states": "fp8-lm", "master": "default"}),
        ("AdamW", {"nonfinite": "element"}),
        ("Lion", {}),
        ("SGD", {"momentum": 0.9, "lr": 0.1}),
        ("StableAdamW", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_the_bits_of_a_swap(cls: str, options: dict[str, Any], change: Callable[..., None] | None) -> None:
    wired, plain = make(cls, **options), make(cls, **options)
    GradientSwap(wired[2], numbered(wired[0])).attach(wired[1])
    for step in range(3):
        for params, _, _ in (wired, plain):
            set_gradients(params, step)
            if change is not None:
                change(params, step)
        own = [p.grad for p in wired[0]]
        clip = torch.tensor(0.37) if step == 2 else None
        wired[1].step(clip=clip)
        with by_hand(plain[0], plain[2]):
            plain[1].step(clip=clip)
        assert all(p.grad is grad for p, grad in zip(wired[0], own, strict=True))
        assert_same(wired, plain)
    assert int(wired[2].count.max()) == 3


def test_gradients_are_quantised_after_a_closure() -> None:
    wired, plain = make(), make()
    GradientSwap(wired[2], numbered(wired[0])).attach(wired[1])
    wired[1].step(lambda: set_gradients(wired[0], 0))
    set_gradients(plain[0], 0)
    with by_hand(plain[0], plain[2]):
        plain[1].step()
    assert_same(wired, plain)


def test_grad_scaler() -> None:
    """A step that it leaves out moves no mu; one that it takes sees unscaled gradients."""
    wired, plain = make(), make()
    GradientSwap(wired[2], numbered(wired[0])).attach(wired[1])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    for step, bad in enumerate((False, True, False)):
        for params, _, _ in (wired, plain):
            set_gradients(params, step)
            for p in params:
                if p.dtype is torch.float16:  # which the scaler refuses
                    p.grad = None
        factor = scaler.scale(torch.ones(())).item()
        for p in wired[0]:
            if p.grad is not None:
                p.grad.mul_(factor)
        if bad:
            wired[0][1].grad.view(-1)[0] = torch.inf
        scaler.step(wired[1])
        scaler.update()
        if not bad:
            with by_hand(plain[0], plain[2]):
                plain[1].step()
        assert_same(wired, plain)


def test_two_formats_come_one_after_the_other() -> None:
    wired, plain = make(), make()
    other = Communication(gradient=Quant(format="e5m2"))
    first, second = (GradientQuantizer(other, len(SHAPES) * 2) for _ in range(2))
    GradientSwap(first, numbered(wired[0])).attach(wired[1])
    GradientSwap(wired[2], numbered(wired[0])).attach(wired[1])
    for params, _, _ in (wired, plain):
        set_gradients(params, 0)
    wired[1].step()
    with by_hand(plain[0], second), by_hand(plain[0], plain[2]):
        plain[1].step()
    assert_same(wired, plain)
    assert torch.equal(first.count, second.count)


def test_stochastic_rounding_draws_what_it_drew() -> None:
    communication = Communication(gradient=Quant(format="e4m3fn", rounding=Rounding(mode="stochastic")))
    wired, plain = make(communication=communication), make(communication=communication)
    GradientSwap(wired[2], numbered(wired[0])).attach(wired[1])
    for step in range(2):
        for params, _, _ in (wired, plain):
            set_gradients(params, step)
        wired[1].step()
        with by_hand(plain[0], plain[2]):
            plain[1].step()
    assert_same(wired, plain)


def test_attach_and_detach() -> None:
    params, optimizer, quantizer = make()
    swap = GradientSwap(quantizer, numbered(params))
    for _ in range(2):
        detach = swap.attach(optimizer)
        set_gradients(params, 0)
        optimizer.step()
        detach()
        detach()
        optimizer.step()
    assert int(quantizer.count.max()) == 2 and optimizer.swaps == []


def test_global_hooks_tell_it_for_one_step_only() -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    params, optimizer, quantizer = make()
    swap = GradientSwap(quantizer, numbered(params))
    handles = register_optimizer_step_pre_hook(swap.pre_step), register_optimizer_step_post_hook(swap.post_step)
    set_gradients(params, 0)
    try:
        optimizer.step()
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert int(quantizer.count.max()) == 2


def test_a_step_that_raised_leaves_no_swap() -> None:
    """Told by a recipe, in a step or (gradient release) in backward. What was attached stays."""
    params, optimizer, quantizer = make()
    attached, told = (GradientSwap(quantizer, numbered(params)) for _ in range(2))
    attached.attach(optimizer)
    told.tell(optimizer)
    attached.tell(optimizer)
    assert optimizer.swaps == [attached, told]
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert optimizer.swaps == [attached]


def test_close_detaches_what_never_came_to_its_step() -> None:
    params, optimizer, quantizer = make()
    swap = GradientSwap(quantizer, numbered(params))
    swap.tell(optimizer)
    swap.close()
    swap.close()
    assert optimizer.swaps == []


def test_gradient_release_with_an_attached_swap() -> None:
    """In backward, without a recipe that would tell it."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(64, 80), nn.Linear(80, 3))]
    models.append(copy.deepcopy(models[0]))
    made = []
    for model in models:
        optimizer = optim.AdamW(model.parameters(), states="8bit", nonfinite="element")
        quantizer = GradientQuantizer(POLICY, 2)
        GradientSwap(quantizer, {model[0].weight: 0, model[1].weight: 1}).attach(optimizer)
        made.append((list(model.parameters()), optimizer, quantizer))
    optim.release_gradients(made[1][1])
    for step in range(3):
        for model, (params, optimizer, _) in zip(models, made, strict=True):
            model(torch.randn(5, 64, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            assert all(isinstance(p.grad, FreedGradient) for p in params) is (optimizer is made[1][1])
            optimizer.step()
            optimizer.zero_grad()
    assert_same(*made)
    assert made[0][2].count.tolist() == [3, 3]


def test_resume_goes_on_with_the_same_mu() -> None:
    def trained(steps: range, state: tuple[Any, Any] | None = None) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 80), nn.Linear(80, 16))
        hf_lowprec.convert(model, "fp8-lm")
        optimizer = hf_lowprec.attach_optimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        if state is not None:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        for step in steps:
            x = torch.randn(5, 64, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    whole, _ = trained(range(6))
    half, optimizer = trained(range(3))
    again, _ = trained(range(3, 6), copy.deepcopy((half.state_dict(), optimizer.state_dict())))
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    a, b = (session_of(model).state_dict()["gradients"] for model in (whole, again))
    assert all(torch.equal(a[name], b[name]) for name in a) and a["count"].tolist() == [6, 6]


def test_loading_keeps_the_tensors_that_kernels_know() -> None:
    quantizer = GradientQuantizer(POLICY, 2)
    before = quantizer.k, quantizer.saturated, quantizer.count
    quantizer.load_state_dict({"k": before[0] - 3, "saturated": before[1] + 4, "count": before[2] + 5})
    assert all(a is b for a, b in zip(before, (quantizer.k, quantizer.saturated, quantizer.count), strict=True))
    assert quantizer.k.tolist() == [-3, -3] and quantizer.count.tolist() == [5, 5]
