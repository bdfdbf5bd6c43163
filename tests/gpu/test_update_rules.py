# SPDX-License-Identifier: Apache-2.0
"""Rounded AXPYs and FP8 weights on a GPU, op by op: the bits of the CPU, and no wait for the device."""

from __future__ import annotations

import pytest
import torch
from core import same_bits
from torch import nn

import hf_lowprec
from hf_lowprec import optim
from hf_lowprec.presets.fp8 import FP8_LM_O3_STATES
from hf_lowprec.presets.narrow import HFP8_STATES, WANG_STATES
from hf_lowprec.recipe import States

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
RULES = {"wang": WANG_STATES, "o3": FP8_LM_O3_STATES, "hfp8": HFP8_STATES}
SHAPES = [(64, 65), (7, 13), (5,), (300, 257)]


def build(
    device: str, dtype: torch.dtype, states: States, name: str
) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter((torch.randn(s, generator=generator) * 0.02).to(device, dtype)) for s in SHAPES]
    optim.mark_gemm_weights(nn.ParameterList(params), params[:2])
    options = {"momentum": 0.9} if name == "SGD" else {}
    decay = 0.0 if states is FP8_LM_O3_STATES else 0.01
    return params, getattr(optim, name)(params, lr=1e-2, weight_decay=decay, states=states, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "Lion"])
@pytest.mark.parametrize("rule", RULES)
def test_bits_are_those_of_the_cpu(rule, name, dtype):
    sets = [build(device, dtype, RULES[rule], name) for device in ("cpu", "cuda")]
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        grads = [torch.randn(s, generator=generator) * 0.01 for s in SHAPES]
        for params, optimizer in sets:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.to(p.device, p.dtype)
            if step:  # the first one makes states
                torch.cuda.set_sync_debug_mode("error" if params[0].is_cuda else "default")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(sets[0][0], sets[1][0], strict=True):
        assert same_bits(a.detach(), b.detach().cpu())
        for key, value in sets[0][1].state[a].items():
            assert same_bits(value, sets[1][1].state[b][key].cpu()), key


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_fp16_trains_with_a_loss_scale(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).cuda()
    hf_lowprec.convert(model, {"name": "mine", "base": "fp16", "loss_scale": {"method": method, "init": 2.0**16}})
    scaler, optimizer = hf_lowprec.grad_scaler(model), torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, losses = torch.randn(64, 64, device="cuda"), []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = (model(x).float() - x).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
