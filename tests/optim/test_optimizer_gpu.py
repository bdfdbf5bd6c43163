# SPDX-License-Identifier: Apache-2.0
"""The optimizer on a GPU: no host synchronisation, the CPU's results, resume bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hf_lowprec.optim import AdamW, GradientQuantizer, GradientSwap
from hf_lowprec.recipe import PRESETS

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
