# SPDX-License-Identifier: Apache-2.0
"""The optimizer on a GPU: no host synchronisation, the CPU's results, resume bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_lowprec.optim import AdamW, GradientQuantizer, GradientSwap, release_gradients
from hf_lowprec.presets import PRESETS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def parameters(device: str) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 96), (96,), (7, 5)]
    tensors = [torch.randn(s, generator=generator).to(d) for s in shapes for d in (torch.float32, torch.bfloat16)]
    return [nn.Parameter(t.to(device)) for t in tensors]


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype).to(p.device)


@pytest.mark.parametrize("lr", ["float", "cpu", "cuda"])
@pytest.mark.parametrize("states", ["fp8-lm", "bf16-sr", "fp32"])
def test_a_step_never_waits_for_the_gpu(lr, states):
    params = parameters("cuda")
    rate = 1e-3 if lr == "float" else torch.tensor(1e-3, device=lr)
    optimizer = AdamW(params, lr=rate, states=states)
    quantizer = GradientQuantizer(PRESETS["fp8-lm"].communication, len(params), world_size=1)
    GradientSwap(quantizer, {p: i for i, p in enumerate(params)}).attach(optimizer)
    for step in range(3):
        set_gradients(params, step)
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first one moves tables and counters
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(state["step"] == 3 for state in optimizer.state.values())


@pytest.mark.parametrize("states", ["fp8-lm", "bf16-sr"])
def test_the_gpu_gives_the_cpus_result(states):
    results = {}
    for device in ("cpu", "cuda"):
        params = parameters(device)
        optimizer = AdamW(params, lr=1e-3, states=states)
        for step in range(4):
            set_gradients(params, step)
            optimizer.step()
        results[device] = [p.detach().float().cpu() for p in params]
    for cpu, gpu in zip(results["cpu"], results["cuda"], strict=True):
        # fused multiply-adds may move a value across a rounding boundary: rarely, and then by one unit
        assert (cpu != gpu).float().mean() < 0.02 or torch.allclose(cpu, gpu, rtol=0, atol=1e-6)
        torch.testing.assert_close(gpu, cpu, rtol=2**-7, atol=1e-3)


def test_resume_is_bit_identical():
    params = parameters("cuda")
    optimizer = AdamW(params)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    twin = AdamW(twins)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"] = {k: {n: v.cpu() for n, v in s.items()} for k, s in saved["state"].items()}
    twin.load_state_dict(saved)
    for step in range(3, 6):
        for group, o in ((params, optimizer), (twins, twin)):
            set_gradients(group, step)
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


def test_a_bad_gradient_is_skipped_on_the_device():
    params = parameters("cuda")
    optimizer = AdamW(params)
    set_gradients(params, 0)
    params[2].grad[3] = torch.inf
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert optimizer.skipped_steps.device.type == "cuda" and optimizer.skipped_steps.item() == 1


# --- gradients through a communication format -----------------------------------------------------------------------


def wired(device: str, make: Callable[..., torch.optim.Optimizer], **options: Any) -> Any:
    """Parameters, an optimizer, and the quantizer of all their gradients but one."""
    params = parameters(device)
    quantizer = GradientQuantizer(PRESETS["fp8-lm"].communication, len(params), world_size=2)
    quantizer.k += torch.arange(len(params), dtype=torch.int32) * 321 - 700
    optimizer = make(params, lr=1e-3, **options)
    GradientSwap(quantizer, {p: i for i, p in enumerate(params) if i != 2}).attach(optimizer)
    return params, optimizer, quantizer


def spoil(params: list[nn.Parameter], step: int) -> None:
    if step == 1:
        params[0].grad.view(-1)[3] = torch.inf
        params[1].grad.view(-1)[3] = torch.nan
    if step == 2:
        params[3].grad = None
        params[4].grad.zero_()


def assert_same(cpu: Any, cuda: Any) -> None:
    for p, q in zip(cpu[0], cuda[0], strict=True):
        assert torch.equal(p, q.cpu())
    for name in ("k", "saturated", "count"):
        assert torch.equal(getattr(cpu[2], name), getattr(cuda[2], name).cpu()), name


@pytest.mark.parametrize("options", [{}, {"states": "fp8-lm"}, {"nonfinite": "element"}], ids=str)
def test_wired_steps_give_the_cpus_bits(options, monkeypatch):
    cpu, cuda = wired("cpu", AdamW, **options), wired("cuda", AdamW, **options)
    monkeypatch.setattr(cuda[2], "quantize_all", lambda grads: pytest.fail("op by op"))
    for step in range(4):
        for params, optimizer, _ in (cpu, cuda):
            set_gradients(params, step)
            spoil(params, step)
            optimizer.step(clip=torch.tensor(0.37, device=params[0].device))
        assert_same(cpu, cuda)
    assert int(cuda[1].skipped_steps) == ("nonfinite" not in options)


def test_torchs_optimizer_sees_the_cpus_gradients_in_few_launches():
    seen = {}
    for device in ("cpu", "cuda"):
        params, optimizer, quantizer = wired(device, torch.optim.AdamW, foreach=True)
        rows = seen[device] = []
        optimizer.register_step_pre_hook(lambda *_, params=params, rows=rows: rows.append([p.grad for p in params]))
        for step in range(4):
            set_gradients(params, step)
            spoil(params, step)
            own = [p.grad for p in params]
            optimizer.step()
            assert all(p.grad is grad for p, grad in zip(params, own, strict=True))
        seen[device, "mu"] = [getattr(quantizer, name).cpu() for name in ("k", "saturated", "count")]
    for a, b in zip(seen["cpu"], seen["cuda"], strict=True):
        for x, y in zip(a, b, strict=True):
            assert (x is None) == (y is None)
            assert x is None or torch.equal(x.nan_to_num(nan=77.0), y.cpu().nan_to_num(nan=77.0))
    assert all(torch.equal(a, b) for a, b in zip(seen["cpu", "mu"], seen["cuda", "mu"], strict=True))


@pytest.mark.parametrize("own", [True, False], ids=["ours", "torch"])
def test_the_number_of_kernels_does_not_grow_with_the_gradients(own):
    """Of the quantisation, found as what a step launches more than one without it."""
    launches = {}
    for count in (10, 200):
        for quantised in (False, True):
            params = [nn.Parameter(torch.randn(64, 96, device="cuda").bfloat16()) for _ in range(count)]
            optimizer = AdamW(params) if own else torch.optim.SGD(params, lr=1e-3, foreach=True)
            if quantised:
                quantizer = GradientQuantizer(PRESETS["fp8-lm"].communication, count, world_size=1)
                GradientSwap(quantizer, {p: i for i, p in enumerate(params)}).attach(optimizer)
            for p in params:
                p.grad = torch.randn_like(p)
            for _ in range(2):
                optimizer.step()
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                optimizer.step()
                torch.cuda.synchronize()
            on_device = torch.autograd.DeviceType.CUDA
            launches[count, quantised] = sum(event.device_type == on_device for event in profile.events())
    more = {count: launches[count, True] - launches[count, False] for count in (10, 200)}
    assert more[200] == more[10] <= 6 and (not own or launches[200, True] <= 8), launches


def test_gradient_release_quantises_as_a_step_does():
    made = [wired("cuda", AdamW, nonfinite="element") for _ in range(2)]
    release_gradients(made[1][1])
    for step in range(3):
        for params, optimizer, _ in made:
            loss = sum((p.float() * (i + step + 1)).sin().sum() for i, p in enumerate(params))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(made[0][0], made[1][0], strict=True):
        assert torch.equal(p, q)
    for name in ("k", "saturated", "count"):
        assert torch.equal(getattr(made[0][2], name), getattr(made[1][2], name))


def test_a_captured_step_moves_mu():
    params, optimizer, quantizer = wired("cuda", AdamW, states="8bit")
    plain, twin, twins_quantizer = wired("cuda", AdamW, states="8bit")
    for some in (params, plain):
        set_gradients(some, 0)
    optimizer.step()
    twin.step()
    optimizer.step()
    twin.step()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(3):
        graph.replay()
        twin.step()
    for p, q in zip(params, plain, strict=True):
        assert torch.equal(p, q)
    assert torch.equal(quantizer.k, twins_quantizer.k) and torch.equal(quantizer.count, twins_quantizer.count)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_learning_rate_of_any_dtype_on_the_gpu(dtype):
    """It is read by every step anew, and nobody waits for it."""
    results = {}
    for device in ("cpu", "cuda"):
        params, rate = parameters(device), torch.tensor(1e-3, dtype=dtype, device=device)
        optimizer = AdamW(params, lr=rate, states="8bit")
        for step in range(3):
            set_gradients(params, step)
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            try:
                rate.mul_(0.5)
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        results[device] = [p.detach().cpu() for p in params]
    assert all(torch.equal(a, b) for a, b in zip(results["cpu"], results["cuda"], strict=True))


def test_the_amax_of_new_weights():
    params, optimizer, _ = wired("cuda", AdamW, states="fp8-lm")
    optimizer.note_amax()
    for step in range(3):
        set_gradients(params, step)
        if step == 2:
            params[0].grad.view(-1)[0] = torch.nan  # a step that is skipped knows it, too
            with torch.no_grad():
                params[0].mul_(3)
        optimizer.step()
        for p in params:
            assert float(optimizer.weight_amax(p)) == float(p.detach().abs().max())
