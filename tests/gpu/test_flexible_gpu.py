# SPDX-License-Identifier: Apache-2.0
"""fp8-flex on a GPU: the numbers of the CPU, ranges found and trained without waiting for the device."""

from __future__ import annotations

import pytest
import torch
from core import batch, mlp

import hf_lowprec
from hf_lowprec.conversion import session_of
from hf_lowprec.numerics.flexible import flexible, least_man, splits
from hf_lowprec.numerics.search import magnitudes_of, search

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("bits", [4, 8, 9])
def test_values_are_those_of_the_cpu(bits: int) -> None:
    x = batch(64, 1000) * torch.exp2(torch.randint(-20, 10, (64, 1000)).float())
    maxval = x.abs().amax(1, keepdim=True) * 0.7
    for man in range(least_man(bits), bits):
        width = torch.tensor(float(man))
        a, b = flexible(x, maxval, width, bits), flexible(x.cuda(), maxval.cuda(), width.cuda(), bits)
        assert torch.equal(a.view(torch.int32), b.cpu().view(torch.int32))


def test_the_search_finds_what_the_cpu_finds() -> None:
    x = batch(16, 512)
    a, b = (search(magnitudes_of(t, rows=True), 8, list(splits(8))) for t in (x, x.cuda()))
    assert float(a.man) == float(b.man) and torch.allclose(a.maxval, b.maxval.cpu(), rtol=0.1)
    assert float(b.error) == pytest.approx(float(a.error), rel=1e-3)


def test_no_step_waits_for_the_device() -> None:
    model = mlp().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    hf_lowprec.convert(model, "fp8-flex")
    x = batch(64, 32).cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):  # the first finds the ranges
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    model(x)  # by now the host may know
    assert all(bool((p > 0).all()) for p in hf_lowprec.learned_parameters(model))
    assert all(layer.flexible.input.found for layer in session_of(model).scaling.layers.values())


def test_calibration_is_repeatable() -> None:
    found = []
    for _ in range(2):
        model = mlp().cuda()
        hf_lowprec.calibrate(model, [batch(64, 32, seed=i) for i in range(3)])
        found.append([p.detach().clone() for p in hf_lowprec.learned_parameters(model)])
    assert all(map(torch.equal, *found))
