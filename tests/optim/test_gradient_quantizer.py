# SPDX-License-Identifier: Apache-2.0
"""GradientQuantizer: FP8-LM's mu as design settles it, on synthetic counts, on real tensors, on two ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from hf_lowprec.optim import AdamW, GradientQuantizer, GradientSwap
from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import Communication, Quant, Rounding, Scaling

FP8_LM = PRESETS["fp8-lm"].communication
assert FP8_LM is not None
PLAIN = Communication(gradient=FP8_LM.gradient)


def quantizer(n: int = 1, communication: Communication = FP8_LM, world_size: int | None = 1) -> GradientQuantizer:
    return GradientQuantizer(communication, n, world_size=world_size)


def count(n: int) -> torch.Tensor:
    return torch.tensor(n)


# --- the state machine, on synthetic counts ------------------------------------------------------------------------


def test_1000_clean_steps_double_mu_exactly():
    q = quantizer(world_size=2)
    for _ in range(1000):
        q.observe(0, count(0), numel=1000)
    assert q.k.item() == 1000 and q.mu.item() == 2.0


def test_a_saturated_step_halves_mu_exactly():
    q = quantizer(world_size=2)
    q.k.fill_(137)
    before = q.mu.item()
    q.observe(0, count(50), numel=1000)
    assert q.mu.item() == before / 2 and q.saturated.item() == 49


@pytest.mark.parametrize(
    "extremes, numel, step",
    [(1, 10, 1), (2, 10, -1000), (2, 99_999, -1000), (2, 100_000, 1), (11, 1_000_000, 1), (12, 1_000_000, -1000)],
)
def test_one_code_per_tensor_is_no_saturation_and_the_threshold_is_1e5(extremes, numel, step):
    q = quantizer(world_size=2)
    q.observe(0, count(extremes), numel)
    assert q.k.item() == step


@pytest.mark.parametrize("world_size, upper", [(1, 0), (2, 16_000)])
def test_mu_is_clamped_at_both_ends(world_size, upper):
    q = quantizer(world_size=world_size)
    q.k.fill_(upper)
    q.observe(0, count(0), 1000)
    assert q.k.item() == upper and q.mu.item() == 2.0 ** (upper // 1000)
    q.k.fill_(-15_500)
    q.observe(0, count(900), 1000)
    assert q.k.item() == -16_000 and q.mu.item() == 2.0**-16


def test_a_mu_of_several_ranks_is_used_as_1_on_one():
    q = quantizer()
    q.k.fill_(5000)
    assert q.mu.item() == 1.0


def test_an_invalid_gradient_does_not_move_mu():
    q = quantizer(world_size=2)
    q.observe(0, count(900), 1000, valid=torch.tensor(False))
    assert q.k.item() == 0 and q.count.item() == 1


def test_parameters_have_their_own_mu():
    q = quantizer(3, world_size=2)
    q.observe(1, count(900), 1000)
    q.observe(2, count(0), 1000)
    assert q.k.tolist() == [0, -1000, 1] and q.count.tolist() == [0, 1, 1]


# --- tensors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mu_k", [0, -1000, -500, -1])
@pytest.mark.parametrize("magnitude", [1e-30, 3e-7, 1.0, 7e8])
def test_the_formula_against_torchs_own_cast(mu_k, magnitude):
    torch.manual_seed(0)
    grad = torch.randn(64, 32) * magnitude
    q = quantizer()
    q.k.fill_(mu_k)
    s = 2.0 ** math.floor(math.log2(448 / grad.abs().max().item()))
    inverse = torch.tensor(1 / s) / q.mu  # 1 / (s mu), float32
    code = (grad * (1 / inverse)).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(q.quantize(0, grad), code.float() * inverse)


def test_growing_mu_saturates_and_comes_back():
    q = quantizer(world_size=2)
    q.k.fill_(3000)
    grad = torch.linspace(-1, 1, 1000)
    out = q.quantize(0, grad)
    assert out.abs().max() == 448 * 2.0**-8 / 8 and q.k.item() == 2000 and q.saturated.item() > 700
    q.quantize(0, grad)
    q.quantize(0, grad)
    assert q.k.item() == 0
    q.quantize(0, grad)
    assert q.k.item() in (1, -1000)


def test_gaussian_gradients_keep_mu_at_1_on_one_process():
    q = quantizer()
    for seed in range(5):
        q.quantize(0, torch.randn(512, 512, generator=torch.Generator().manual_seed(seed)))
    assert q.mu.item() == 1.0 and q.saturated.item() < 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4, 5), (0, 3)])
def test_dtype_and_shape_stay(dtype, shape):
    grad = torch.ones(shape, dtype=dtype)
    out = quantizer().quantize(0, grad)
    assert out.dtype == dtype and torch.equal(out, grad) and out is not grad


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_elements_become_nan_and_spoil_nothing_else(bad):
    grad = torch.linspace(-3, 3, 50)
    clean = quantizer(communication=PLAIN).quantize(0, grad)
    grad[7] = bad
    q = quantizer(world_size=2)
    out = q.quantize(0, grad)
    keep = torch.arange(50) != 7
    assert out[7].isnan() and torch.equal(out[keep], clean[keep]) and q.k.item() == 0


def test_zero_gradients_stay_zero_and_teach_nothing():
    q = quantizer(world_size=2)
    assert (q.quantize(0, torch.zeros(4, 4)) == 0).all() and q.k.item() == 0 and q.saturated.item() == 0


@pytest.mark.parametrize(
    "quant",
    [
        Quant(format="e5m2"),
        Quant(format="e4m3fn", rounding=Rounding(mode="stochastic")),
        Quant(format="e3m4", scaling=Scaling(granularity="block", block=(32,))),
        Quant(format="e4m3fn", scaling=Scaling(granularity="block", block=(32,), snap="rceil", store="e8m0")),
        Quant(format="e4m3fn", scaling=Scaling(granularity="row")),
        Quant(format="e5m10", scaling=Scaling(method="none")),
        Quant(format="e5m2", scaling=Scaling(method="static", exponent=-4)),
        Quant(format="e6m9"),
    ],
    ids=lambda q: f"{q.format}-{q.scaling.granularity}-{q.scaling.method}-{q.rounding.mode}",
)
def test_any_quant_runs(quant):
    torch.manual_seed(0)
    q = quantizer(communication=Communication(gradient=quant, auto_scale=True))
    for grad in (torch.randn(5, 40), torch.randn(7)):
        out = q.quantize(0, grad)
        assert (out - grad).norm() / grad.norm() < 0.2


def test_without_auto_scale_mu_stays_1():
    q = quantizer(communication=PLAIN, world_size=2)
    q.quantize(0, torch.ones(100))
    assert q.mu.item() == 1.0 and q.k.item() == 0 and q.saturated.item() == 0


def test_refusals():
    with pytest.raises(ValueError, match="delayed"):
        quantizer(communication=Communication(gradient=Quant(format="e5m2", scaling=Scaling(method="delayed"))))
    with pytest.raises(RuntimeError, match="sparse=False"):
        quantizer().quantize(0, torch.eye(3).to_sparse())


def test_state_dict_round_trip_and_refusals():
    q = quantizer(2, world_size=2)
    q.observe(1, count(900), 1000)
    other = quantizer(2, world_size=2)
    other.load_state_dict({k: v.clone() for k, v in q.state_dict().items()})
    assert other.k.tolist() == [0, -1000] and other.saturated.tolist() == [0, 899] and other.count.tolist() == [0, 1]
    good = q.state_dict()
    broken = [
        {**good, "k": torch.zeros(3, dtype=torch.int32)},
        {**good, "k": good["k"].long()},
        {**good, "k": good["k"] - 16_000},
        {k: v for k, v in good.items() if k != "count"},
        {**good, "saturated": [0, 0]},
    ]
    for state in broken:
        with pytest.raises(ValueError, match="gradient quantizer"):
            other.load_state_dict(state)
        assert other.k.tolist() == [0, -1000]


# --- in front of an optimizer --------------------------------------------------------------------------------------


def linear() -> tuple[nn.Linear, GradientSwap]:
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    return model, GradientSwap(quantizer(1), {model.weight: 0})


def test_the_optimizer_sees_quantised_gradients_and_the_caller_his_own():
    model, swap = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    detach = swap.attach(optimizer)
    seen = {}
    optimizer.register_step_pre_hook(lambda *_: seen.update(w=model.weight.grad, b=model.bias.grad))
    model(torch.randn(16, 8)).square().sum().backward()
    weight_grad, bias_grad = model.weight.grad, model.bias.grad
    copies = weight_grad.clone(), bias_grad.clone()
    optimizer.step()
    assert model.weight.grad is weight_grad and model.bias.grad is bias_grad
    assert torch.equal(weight_grad, copies[0]) and torch.equal(bias_grad, copies[1])
    assert torch.equal(seen["w"], quantizer().quantize(0, weight_grad)) and not torch.equal(seen["w"], weight_grad)
    assert seen["b"] is bias_grad, "a parameter without a number is left alone"
    detach()
    optimizer.step()
    assert swap.quantizer.count.item() == 1


def test_as_torchs_global_hooks():
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    model, swap = linear()
    handles = register_optimizer_step_pre_hook(swap.pre_step), register_optimizer_step_post_hook(swap.post_step)
    try:
        before = model.weight.detach().clone()
        model(torch.ones(2, 8)).square().sum().backward()
        own = model.weight.grad
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0).step()  # a stranger
    finally:
        for handle in handles:
            handle.remove()
    assert model.weight.grad is own and torch.equal(before - quantizer().quantize(0, own), model.weight)


def test_closures_are_quantised_after_they_ran():
    model, swap = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    swap.attach(optimizer)
    before, x = model.weight.detach().clone(), torch.randn(16, 8)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(before - quantizer().quantize(0, model.weight.grad), model.weight)
    assert swap.quantizer.count.item() == 1


def test_a_step_that_raised_leaves_no_quantised_gradient_behind():
    model, swap = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    swap.attach(optimizer)
    model(torch.randn(3, 8)).sum().backward()
    own = model.weight.grad
    failing = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    failing.remove()
    optimizer.step()
    assert model.weight.grad is own


def test_a_non_finite_gradient_skips_our_optimizers_step():
    model, swap = linear()
    optimizer = AdamW(model.parameters())
    swap.attach(optimizer)
    model(torch.randn(3, 8)).sum().backward()
    model.weight.grad[0, 0] = torch.inf
    before = model.weight.detach().clone()
    optimizer.step()
    assert torch.equal(before, model.weight) and optimizer.skipped_steps.item() == 1
    assert model.weight.grad[0, 0] == torch.inf and swap.quantizer.k.item() == 0


# --- two ranks -----------------------------------------------------------------------------------------------------


def _rank(rank: int, file: str, results: mp.SimpleQueue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    q = GradientQuantizer(FP8_LM, 2)
    for step in range(6):
        grad = torch.randn(4, 64, generator=torch.Generator().manual_seed(10 * step + rank))
        dist.all_reduce(grad)
        out = q.quantize(0, grad)
    q.k[1] = 15_999
    for _ in range(3):
        q.observe(1, torch.tensor(0), 1000)
    k = q.k.tolist()
    agreed = [torch.empty_like(out) for _ in range(2)]
    dist.all_gather(agreed, out)
    results.put((rank, k, torch.equal(agreed[0], agreed[1])))
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_ranks_agree_and_may_go_to_2_to_the_16(tmp_path):
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(_rank, args=(str(tmp_path / "store"), results), nprocs=2)
    (_, k0, equal0), (_, k1, equal1) = sorted(results.get() for _ in range(2))
    assert k0 == k1 and equal0 and equal1
    assert k0[1] == 16_000 and k0[0] != 0
