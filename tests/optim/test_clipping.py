# SPDX-License-Identifier: Apache-2.0
"""`optimizer.clip_grad_norm_`: torch's norm and torch's clipped step, without a pass of its own over the gradients."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import MAKE, bits, parameters, same, set_gradients, snapshot, weights

from hf_lowprec.kernels import kinds, wires
from hf_lowprec.kernels import optimizer as tables
from hf_lowprec.optim import AdamW, algorithms, clip_factor, clipping

SIZES = [(130, 130), (7,), (64, 65), (0,)]


def made(
    name: str = "AdamW", states: str = "8bit", dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[list[nn.Parameter], Any]:
    params = parameters(SIZES, dtype)
    groups = [{"params": params[::2], "weight_decay": 0.0}, {"params": [*params[1::2], nn.Parameter(torch.ones(5))]}]
    return params, MAKE[name](groups, lr=1e-3, states=states, **options)


def norm_of(params: list[nn.Parameter]) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad.double() for p in params if p.grad is not None])


# --- the norm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("sizes", [SIZES, [(3,)], [(5, 7, 16384)], [(16384,), (16385,)], [(0,)]], ids=str)
def test_the_norm_is_torchs(dtype: torch.dtype, sizes: list[tuple[int, ...]]) -> None:
    params = parameters(sizes, dtype)
    optimizer = AdamW([*params, nn.Parameter(torch.ones(3))])
    set_gradients(params, 0)
    for p in params:
        p.grad *= 0.1 ** torch.rand(p.shape).mul(3).to(dtype)
    before = [p.grad.clone() for p in params]
    norm = optimizer.clip_grad_norm_(0.25)
    assert norm.dtype == torch.float32 and norm.shape == ()
    torch.testing.assert_close(norm, norm_of(params).float(), rtol=1e-6, atol=0)
    assert all(torch.equal(p.grad, b) for p, b in zip(params, before, strict=True)), "p.grad stays as it is"
    assert torch.equal(norm, AdamW(params).clip_grad_norm_(9.0)), "the same bits, whatever the groups"
    if dtype == torch.float32:
        plain = torch.nn.utils.clip_grad_norm_(params, 0.25)
        torch.testing.assert_close(norm, plain, rtol=1e-4, atol=0)  # a CPU's float32 sum is off by that much


def test_the_order_of_summation_is_the_kernels() -> None:
    assert (clipping.CHUNK, clipping.TILE, clipping.ROW) == (kinds.CHUNK, wires.AMAX_TILE, tables.NORM_BLOCK)


@pytest.mark.parametrize("max_norm", [0.25, torch.tensor(0.25), 3, 1e300, math.inf, 0.0])
def test_the_factor_is_torchs(max_norm: Any) -> None:
    norm = torch.tensor([0.7, 0.25, 1e-30, 0.0])
    for one in norm:
        expected = min(1.0, float(max_norm) / (float(one) + 1e-6))
        assert float(clipping.factor_of(one, max_norm)) == pytest.approx(expected, rel=1e-6)
    for one in (math.nan, math.inf):
        assert clipping.factor_of(torch.tensor(one), max_norm).isnan()


def test_without_gradients() -> None:
    _, optimizer = made()
    assert optimizer.clip_grad_norm_(1.0) == 0
    optimizer.step()
    assert not optimizer.state


# --- the step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", ["fp32", "fp8-lm", "8bit"])
@pytest.mark.parametrize("name", MAKE)
def test_it_is_step_with_a_factor_and_torchs_clip(name: str, states: str, dtype: torch.dtype) -> None:
    """The same bits as `step(clip=)` of that factor; of float32 gradients clipped by torch, up to the norm's rounding:
    made exact here by giving torch the factor that is the step's."""
    ours, factors, torchs, plain = (made(name, states, dtype) for _ in range(4))
    for step in range(4):
        for params, _ in (ours, factors, torchs, plain):
            set_gradients(params, step)
        limit = 0.3 * float(norm_of(ours[0]))
        ours[1].clip_grad_norm_(limit)
        look = ours[1]._waiting.look
        ours[1].step()
        factors[1].step(clip=look.factor)
        torch._foreach_mul_([p.grad for p in torchs[0]], look.factor)
        torchs[1].step()
        plain[1].step()
    assert torch.equal(bits(weights(ours[0])), bits(weights(factors[0])))
    assert same(snapshot(ours[1]), snapshot(factors[1]))
    if dtype == torch.float32:
        assert torch.equal(weights(ours[0]), weights(torchs[0]))
    else:
        torch.testing.assert_close(weights(ours[0]), weights(torchs[0]), rtol=2e-2, atol=2e-4)
    assert name == "Lion" or not torch.equal(weights(ours[0]), weights(plain[0]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("nonfinite", ["step", "element"])
def test_a_norm_that_is_not_finite_skips_the_step(bad: float, nonfinite: str) -> None:
    params, optimizer = made(nonfinite=nonfinite)
    for step in range(3):
        set_gradients(params, step)
        if step == 1:
            params[2].grad[3, 3] = bad
            before, kept = weights(params).clone(), snapshot(optimizer)
        norm = optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        assert norm.isfinite() == (step != 1) and optimizer.skipped_steps == (step > 0)
        if step == 1:
            assert torch.equal(weights(params), before) and same(snapshot(optimizer), kept)
    assert not torch.equal(weights(params), before)


def test_the_step_takes_the_look_that_was(monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = made()
    looks: list[int] = []
    look = algorithms.gradient_amax
    monkeypatch.setattr(algorithms, "gradient_amax", lambda items: looks.append(len(items)) or look(items))
    for removed in (False, True, False):
        set_gradients(params, 0)
        optimizer.clip_grad_norm_(1.0)
        if removed:
            params[0].grad = None
        optimizer.step()
        assert looks == ([4, 3] if removed else [4])
        looks.clear()


def test_a_factor_of_the_step_comes_on_top() -> None:
    one, other = made(), made()
    for params, optimizer in (one, other):
        set_gradients(params, 0)
        optimizer.clip_grad_norm_(0.5)
    factor = one[1]._waiting.look.factor
    one[1].step(clip=torch.tensor(0.5, dtype=torch.float64))
    other[1].zero_grad()
    set_gradients(other[0], 0)
    other[1].step(clip=factor * 0.5)
    assert torch.equal(weights(one[0]), weights(other[0]))


def test_a_closure_that_clips() -> None:
    one, other = made(), made()

    def closure() -> None:
        set_gradients(one[0], 1)
        one[1].clip_grad_norm_(0.1)

    one[1].step(closure)
    set_gradients(other[0], 1)
    other[1].clip_grad_norm_(0.1)
    other[1].step()
    assert torch.equal(weights(one[0]), weights(other[0]))


# --- what happens between clip and step -----------------------------------------------------------------------------


def clipped(dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], Any]:
    params, optimizer = made(dtype=dtype)
    set_gradients(params, 0)
    optimizer.step()
    set_gradients(params, 1)
    optimizer.clip_grad_norm_(0.1)
    return params, optimizer


def in_place(params: list[nn.Parameter], optimizer: Any) -> None:
    params[0].grad.add_(1)


def replaced(params: list[nn.Parameter], optimizer: Any) -> None:
    params[2].grad = params[2].grad * 2


def moved(params: list[nn.Parameter], optimizer: Any) -> None:
    params[0].grad.data = params[0].grad.data.clone()


def all_replaced(params: list[nn.Parameter], optimizer: Any) -> None:
    for p in params:
        p.grad = p.grad * 2


def a_new_one(params: list[nn.Parameter], optimizer: Any) -> None:
    unused = optimizer.param_groups[1]["params"][-1]
    unused.grad = torch.ones_like(unused)


def zeroed(params: list[nn.Parameter], optimizer: Any) -> None:
    nn.ParameterList(params).zero_grad(set_to_none=False)


@pytest.mark.parametrize(
    "write", [in_place, replaced, moved, all_replaced, a_new_one, zeroed], ids=lambda write: write.__name__
)
def test_gradients_written_in_between_are_refused(write: Callable[..., None]) -> None:
    """Nobody knows what the writer meant: torch would have shown clipped gradients, and these are not."""
    params, optimizer = clipped()
    write(params, optimizer)
    before = weights(params).clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"between clip_grad_norm_ and step.*apply_clip.*HF_LOWPREC_CLIP=0"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="between clip_grad_norm_ and step"):
            optimizer.apply_clip()
    assert torch.equal(weights(params), before)
    optimizer.zero_grad()
    set_gradients(params, 2)
    optimizer.step()
    assert not torch.equal(weights(params), before)


def test_gradients_written_after_apply_clip_are_torchs() -> None:
    ours, theirs = clipped(), clipped()
    factor = ours[1]._waiting.look.factor.clone()
    theirs[1].zero_grad()
    set_gradients(theirs[0], 1)
    torch._foreach_mul_([p.grad for p in theirs[0]], factor)
    ours[1].apply_clip()
    ours[1].apply_clip()
    for params, optimizer in (ours, theirs):
        params[0].grad.add_(1)
        params[2].grad = params[2].grad * 2
        optimizer.step()
    assert torch.equal(weights(ours[0]), weights(theirs[0]))


def test_a_gradient_that_was_dropped() -> None:
    ours, theirs = clipped(), clipped()
    factor = ours[1]._waiting.look.factor.clone()
    ours[0][0].grad = None
    ours[1].step()
    theirs[1].zero_grad()
    set_gradients(theirs[0], 1)
    theirs[0][0].grad = None
    theirs[1].step(clip=factor)
    assert torch.equal(weights(ours[0]), weights(theirs[0]))


def test_a_second_clip_is_torchs() -> None:
    params, optimizer = clipped()
    first = optimizer.clip_grad_norm_(0.05)
    assert float(first) == pytest.approx(0.1, rel=1e-3), "of gradients that were clipped before"
    assert float(optimizer._waiting.look.factor) == pytest.approx(0.5, rel=1e-3)
    params[0].grad.add_(1)
    with pytest.raises(RuntimeError, match="between clip_grad_norm_ and step"):
        optimizer.clip_grad_norm_(0.05)


def test_other_gradients_after_a_step_that_was_left_out() -> None:
    """`if not norm.isfinite(): model.zero_grad(); continue`"""
    params, optimizer = clipped()
    nn.ParameterList(params).zero_grad()
    set_gradients(params, 2)
    norm = optimizer.clip_grad_norm_(1e9)
    torch.testing.assert_close(norm, norm_of(params).float(), rtol=1e-6, atol=0)
    optimizer.step()


def test_zero_grad_and_step_forget_it() -> None:
    for forget in ("zero_grad", "step"):
        params, optimizer = clipped()
        getattr(optimizer, forget)()
        assert optimizer._waiting is None
        set_gradients(params, 2)
        optimizer.step()


def test_a_new_group_is_not_clipped() -> None:
    params, optimizer = clipped()
    grad = params[0].grad.clone()
    new = nn.Parameter(torch.ones(3))
    new.grad = torch.ones(3)
    optimizer.add_param_group({"params": [new]})
    assert params[0].grad.norm() < grad.norm() and (new.grad == 1).all()
    optimizer.step()


def test_no_gradient_is_kept_alive_and_autograds_own_are_known() -> None:
    model = nn.Linear(64, 65)
    optimizer = AdamW(model.parameters())
    for _ in range(2):
        model(torch.randn(3, 64)).square().sum().backward()
        optimizer.clip_grad_norm_(0.1)
        gc.collect()  # nobody but C++ holds the gradients
        assert optimizer._waiting is not None and optimizer._waiting.unchanged()
        reference = weakref.ref(model.weight.grad)
        model.zero_grad()
        assert reference() is None and optimizer._waiting.gone()


def test_copies_and_pickles_have_no_clip() -> None:
    _, optimizer = clipped()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin._waiting is None
    optimizer.step()


# --- what torch does ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [1.0, math.inf])
def test_other_norms_are_clip_factors(norm_type: float) -> None:
    ours, theirs = made(), made()
    for params, _ in (ours, theirs):
        set_gradients(params, 0)
    norm = ours[1].clip_grad_norm_(0.01, norm_type)
    factor, expected = clip_factor(theirs[0], 0.01, norm_type)
    assert torch.equal(norm, expected)
    ours[1].step()
    theirs[1].step(clip=factor)
    assert torch.equal(weights(ours[0]), weights(theirs[0]))


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = AdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.clip_grad_norm_(1.0)


def test_released_gradients_are_refused() -> None:
    from hf_lowprec.optim import release_gradients

    model = nn.Linear(8, 8)
    optimizer = AdamW(model.parameters(), nonfinite="element")
    release_gradients(optimizer)
    model(torch.ones(1, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="freed"):
        optimizer.clip_grad_norm_(1.0)
