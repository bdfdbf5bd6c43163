# SPDX-License-Identifier: Apache-2.0
"""fp8-flex on a GPU: the numbers of the CPU, ranges found and trained without waiting for the device."""

from __future__ import annotations

import math

import pytest
import torch
from core import batch, mlp
from torch import Tensor

import hf_lowprec
from hf_lowprec.conversion import session_of
from hf_lowprec.numerics.flexible import flexible, least_man, splits
from hf_lowprec.numerics.search import magnitudes_of, search
from hf_lowprec.ops import flexible as ops

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


def same(a: Tensor, b: Tensor) -> bool:
    """Bits, signs of zeros included; any NaN is like any other."""
    bits = torch.int16 if a.dtype.itemsize == 2 else torch.int32
    a, b = a.cpu(), b.cpu()
    x, y = (torch.where(t.isnan(), 0, t).contiguous().view(bits) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(x, y)


def wide(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of 30 octaves, with what is special here and there."""
    x = batch(*shape) * torch.exp2(torch.randint(-20, 10, shape).float())
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-42, 3e38])
    return torch.where(torch.rand(shape) < 0.05, special[torch.randint(0, 8, shape)], x).to(dtype)


@pytest.mark.parametrize("each_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(300, 1000), (1, 1), (65, 7), (513, 130)])
def test_kernels_are_the_truth(shape: tuple[int, int], dtype: torch.dtype, each_row: bool) -> None:
    """Contiguous and transposed, all widths of 8 bits, ranges from none to the largest."""
    ranges = torch.tensor([0.0, 1e-45, 2.0**-100, 0.037, 1.0, 30.0, 3e38])
    for man in range(1, 8):
        width = torch.tensor(float(man))
        maxval = ranges[torch.arange(shape[0]) % 7].reshape(-1, 1) if each_row else ranges[man - 1]
        for x in (wide(*shape, dtype=dtype), wide(*shape[::-1], dtype=dtype).t()):
            there = x.cuda(), maxval.cuda(), width.cuda(), 8
            for out in (torch.float32, torch.bfloat16):
                assert same(ops.flexible(*there, out), ops.flexible(x, maxval, width, 8, out)), (man, out)
            grad = batch(*shape).bfloat16()
            found = ops.flexible_gradients(grad.cuda(), *there, dtype)
            again = ops.flexible_gradients(grad.cuda(), *there, dtype)
            truth = ops.flexible_gradients(grad, x, maxval, width, 8, dtype)
            assert same(found[0], truth[0]) and all(map(same, found, again)), "the same from run to run"
            assert found[0].stride() == truth[0].stride() or 1 in shape
            x_finite = torch.where(x.isfinite(), x, 0)
            some = x_finite.cuda(), maxval.clamp(min=0.037, max=30.0).cuda(), width.cuda(), 8
            found = ops.flexible_gradients(grad.cuda(), *some, dtype)
            q = flexible(x_finite, *[t.cpu() for t in some[1:3]], 8).double()
            size = x_finite.double().abs()
            limit = some[1].cpu().double()
            error = torch.where(size <= limit, q - x_finite.double(), 0.0)
            terms = grad.double() * torch.where(size > limit, x_finite.double().sign(), error / limit)
            axes = (1,) if maxval.numel() > 1 else (0, 1)
            off = (found[1].cpu().double().reshape(-1) - terms.sum(axes).reshape(-1)).abs()
            assert (off <= 2.0**-16 * terms.abs().sum(axes).reshape(-1) + 1e-37).all()
            ln2, e = math.log(2.0), 7 - man
            slope = ln2 * (ln2 * 2.0**e - 1.0 - 1.0 / (2.0 ** (man + 1) - 1.0))
            terms = grad.double() * error * slope
            assert abs(float(found[2]) - float(terms.sum())) <= 2.0**-16 * float(terms.abs().sum()) + 1e-37
            counts, expected = torch.zeros(4, dtype=torch.int64).cuda(), torch.zeros(4, dtype=torch.int64)
            ops.flexible_count(*there, counts)
            ops.flexible_count(x, maxval, width, 8, expected)
            ops.flexible_count(x.cuda(), None, None, 8, counts)
            ops.flexible_count(x, None, None, 8, expected)
            assert counts.tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 6, 9])
def test_products_on_tensor_cores(bits: int, dtype: torch.dtype) -> None:
    """Within the bound that `ops.flexible_mm` states, under autocast too; 9 bits as float32."""
    for man in range(least_man(bits), bits):
        width = torch.tensor(float(man))
        x, w, bias = batch(300, 520), batch(130, 520), torch.randn(130)
        x_range, w_range = (x.abs().amax() * 0.8, width, bits), (w.abs().amax(1, keepdim=True) * 0.8, width, bits)
        qx, qw = (flexible(t, *r).double() for t, r in ((x, x_range), (w, w_range)))
        exact = qx @ qw.t() + bias.double()
        on_gpu = [[t.cuda(), r[0].cuda(), r[1].cuda(), bits] for t, r in ((x, x_range), (w, w_range))]
        with torch.autocast("cuda", torch.float16):
            found = ops.flexible_mm(*on_gpu[0], *on_gpu[1], bias.cuda(), dtype=dtype).cpu().double()
        bound = 522 * 2.0**-22 * (qx.abs() @ qw.abs().t()) + exact.abs() * torch.finfo(dtype).eps
        assert ((found - exact).abs() <= bound).all(), man


def test_launches_of_a_step() -> None:
    """Kernels of one linear and step: 6 forward, 10 backward, and a few that cuBLAS may add to its products."""
    linear = torch.nn.Sequential(torch.nn.Linear(256, 256)).cuda()
    hf_lowprec.convert(linear, "fp8-flex")
    linear(batch(64, 256).cuda())  # finds the ranges
    x = batch(64, 256).cuda().requires_grad_()

    parameters = [x, *linear.parameters(), *hf_lowprec.learned_parameters(linear)]

    def step() -> None:
        for p in parameters:
            p.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            linear(x).backward(grad)

    grad = batch(64, 256).cuda().bfloat16()
    for _ in range(3):
        step()
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    events = (e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    names = [e.name for e in events if "Memset" not in e.name and "Memcpy" not in e.name]
    assert len(names) <= 20, names
    for kernel, many in {"_flexible_kernel": 4, "_finish": 1, "_gradients": 2, "_sums_kernel": 2, "_count": 3}.items():
        assert sum(kernel in name for name in names) == many, (kernel, names)
