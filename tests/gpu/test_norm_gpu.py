# SPDX-License-Identifier: Apache-2.0
"""Norm kernels on the GPU: against float64 and the modules' own results, in every launch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_norm_kind import CLASSES, hf
from torch import Tensor, nn

from hf_lowprec import numerics, ops
from hf_lowprec.modules.norm import fuse_norm, norm_kind
from hf_lowprec.numerics import norm as truth
from hf_lowprec.ops.norm import norm, norm_backward

pytestmark = pytest.mark.gpu

B, H, S = torch.bfloat16, torch.float16, torch.float32
WIDTHS = [4, 64, 100, 128, 576, 2048, 2560, 3072, 4096, 5120, 8192, 14336, 16384]


def random(*shape: int, dtype: torch.dtype = S, seed: int = 0, mean: float = 0.5) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(shape, generator=generator, device="cuda") * 2 + mean).to(dtype)


def rows_of(width: int) -> int:
    return max(3, min(1003, 2_000_000 // width))


@pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", [S, B, H], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_against_float64(width: int, dtype: torch.dtype, center: bool) -> None:
    """No further from float64 than torch's own layer_norm and rms_norm, which also compute in float32."""
    x, weight, bias = random(rows_of(width), width, dtype=dtype), *(random(width, dtype=dtype, seed=s) for s in (1, 2))
    grad = random(*x.shape, dtype=dtype, seed=3)
    bias = bias if center else None
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    functional: Any = torch.nn.functional
    if center:
        own = functional.layer_norm(leaves[0], (width,), *leaves[1:], 1e-5)
    else:
        own = functional.rms_norm(leaves[0], (width,), leaves[1], 1e-5)
    own.backward(grad)
    y, stats = norm(x, weight, bias, 1e-5, center, False, S, dtype)
    grads = norm_backward(grad, x, stats, weight, False, S, True, dtype, dtype if center else None)
    options: dict[str, Any] = {"plus_one": False, "mid": torch.float64, "compute": torch.float64}
    best, best_stats = truth.norm(x, weight, bias, eps=1e-5, center=center, out=torch.float64, **options)
    best_grads = truth.norm_backward(grad, x, best_stats, weight, **options)
    torch.testing.assert_close(stats.double(), best_stats, rtol=1e-6, atol=1e-6)
    theirs = [own.detach(), *(leaf.grad for leaf in leaves)]
    for ours, torchs, exact in zip((y, *grads), theirs, (best, *best_grads), strict=False):
        assert torchs is not None and ours.dtype == torchs.dtype
        error, other = (numerics.relative_error(exact, t.double()) for t in (ours, torchs))
        assert error <= 1.05 * other + 1e-7, (error, other)
    again = norm_backward(grad, x, stats, weight, False, S, True, dtype, dtype if center else None)
    assert all(torch.equal(a, b) for a, b in zip(again, grads, strict=True))


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtypes", [(S, S), (B, B), (B, S), (S, B), (H, H)], ids=str)
@pytest.mark.parametrize("path", ["LayerNorm", *CLASSES])
def test_modules(path: str, dtypes: tuple[torch.dtype, torch.dtype], autocast: bool) -> None:
    """The module's own dtype and value, whatever it does with dtypes and autocast; its own error, where it refuses."""
    pytest.importorskip("transformers")
    width = 512
    module = (nn.LayerNorm(width) if path == "LayerNorm" else hf(path, width)).to("cuda", dtypes[1])
    for i, p in enumerate(module.parameters()):
        p.data.copy_(random(width, seed=i))
    ours = copy.deepcopy(module)
    kind = norm_kind(ours)
    assert kind is not None
    state = fuse_norm(ours, kind)
    state.least = 0
    x = random(64, width, dtype=dtypes[0])
    with torch.autocast("cuda", B, enabled=autocast):
        try:
            y = _run(module, x)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                _run(ours, x)
            return
        got = _run(ours, x)
    # 1 + weight in the weight's dtype is another function in bf16, and this class' autocast casts the weight first
    if path != "nemotron.NemotronLayerNorm1P":
        assert all(state.rules.values()) and len(state.rules) == 1
    for a, b in zip(got, y, strict=True):
        assert a.dtype == b.dtype
        half = B if B in dtypes or autocast else H if H in dtypes else S
        assert numerics.relative_error(b.double(), a.double()) <= (1e-6 if half == S else torch.finfo(half).eps)
    if got[0].dtype != S:
        assert (got[0] != y[0]).double().mean() <= 0.01


def _run(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(torch.cos(torch.arange(y.numel(), device="cuda")).reshape(y.shape).to(y.dtype))
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
def test_every_launch(center: bool) -> None:
    from hf_lowprec.kernels.triton import norm as kernels

    checked = 0
    for width in (128, 2048, 5120):
        block = 1 << (width - 1).bit_length()
        x, grad = random(301, width, dtype=B), random(301, width, dtype=B, seed=1)
        weight = random(width, dtype=B, seed=2)
        bias = weight if center else None
        y, stats = norm(x, weight, bias, 1e-5, center, False, B, B)
        grads = norm_backward(grad, x, stats, weight, False, B, True, S, S)
        launches = [
            kernels.Launch(rows, block, stages, warps, resident)
            for rows in (1, 4)
            for warps in (4, 8, 16)
            for stages, resident in ((1, 0), (1, 2), (2, 1), (3, 3))
            if 4 <= rows * block / (32 * warps) <= 64 and (stages - 1) * rows * block <= 32768
        ]
        for launch in launches:
            y2, stats2 = kernels.norm(x, weight, bias, 1e-5, center, False, B, B, launch)
            torch.testing.assert_close(stats2, stats, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(y2, y, rtol=1 / 64, atol=1e-2)
            assert (y2 != y).double().mean() <= 0.01
            if launch.resident:
                again = kernels.norm_backward(grad, x, stats, weight, False, B, True, S, S, launch)
                for a, b in zip(again, grads, strict=True):
                    torch.testing.assert_close(a, b, rtol=1 / 64 if a.dtype == B else 1e-4, atol=2e-3)
            checked += 1
    assert checked >= 40


def test_operators_reach_the_kernels() -> None:
    x, weight = random(40, 64, dtype=B), random(64, dtype=B)
    before = ops.kernel_counts()
    y, stats = norm(x, weight, None, 1e-5, False, False, B, B)
    norm_backward(y, x, stats, weight, False, B, True, B, None)
    assert ops.kernel_counts()["fused norm"] == before["fused norm"] + 1


def test_rows_too_wide_for_the_kernels_are_left_to_torch() -> None:
    x, weight = random(3, 20000, dtype=B), random(20000, dtype=B)
    before = ops.kernel_counts()["fused norm"]
    y, stats = norm(x, weight, None, 1e-5, False, False, S, B)
    expected, expected_stats = truth.norm(x, weight, None, eps=1e-5, center=False, plus_one=False, mid=S, out=B)
    assert torch.equal(y, expected) and torch.equal(stats, expected_stats)
    grad_x, grad_weight, _ = norm_backward(x, x, stats, weight, False, S, True, B, None)
    exact = truth.norm_backward(x, x, stats, weight, plus_one=False, mid=S)
    assert torch.equal(grad_x, exact[0].to(B)) and torch.equal(grad_weight, exact[1].to(B))
    assert ops.kernel_counts()["fused norm"] == before


def test_addresses_that_are_not_aligned() -> None:
    memory = random(8193, dtype=B)
    for first in (0, 1, 8):
        x = memory[first : first + 8192 - 64].view(-1, 64)
        weight = memory[first + 1 : first + 65]
        args = (1e-5, False, False, B, B)
        y, stats = norm(x, weight, None, *args)
        expected, _ = norm(x.clone(), weight.clone(), None, *args)
        assert torch.equal(y, expected)
        grads = norm_backward(x, x, stats, weight, False, B, True, B, None)
        straight = norm_backward(x.clone(), x.clone(), stats, weight.clone(), False, B, True, B, None)
        assert all(torch.equal(a, b) for a, b in zip(grads, straight, strict=True))


def test_more_than_int32_elements() -> None:
    width = 4096
    rows = 2**31 // width + 3
    x = torch.zeros(rows, width, dtype=B, device="cuda")
    x[-2:] = random(2, width, dtype=B)
    weight = random(width, dtype=B)
    y, stats = norm(x, weight, None, 1e-5, False, False, B, B)
    few, few_stats = norm(x[-2:].clone(), weight, None, 1e-5, False, False, B, B)
    assert torch.equal(y[-2:], few) and not y[:-2].any() and torch.equal(stats[0, -2:], few_stats[0])
    grad_x, grad_weight, _ = norm_backward(x, x, stats, weight, False, B, True, S, None)
    few_x, few_weight, _ = norm_backward(x[-2:].clone(), x[-2:].clone(), few_stats, weight, False, B, True, S, None)
    assert torch.equal(grad_x[-2:], few_x)
    torch.testing.assert_close(grad_weight, few_weight)


def test_cuda_graph() -> None:
    module = nn.LayerNorm(256).to("cuda", B)
    kind = norm_kind(module)
    assert kind is not None
    state = fuse_norm(module, kind)
    state.least = 0
    x = random(32, 256, dtype=B)
    expected = module(x)  # the dtypes are known from here on
    assert state.rules
    state.rules.clear()
    for known in (False, True):
        if known:
            module(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            y = module(x)
        graph.replay()
        torch.testing.assert_close(y, expected, rtol=1 / 64, atol=1e-2)
        assert bool(state.rules) == known


def test_a_llama_trains_as_with_its_own_norms() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to("cuda", B)
    ours = copy.deepcopy(model)
    fused = 0
    for module in ours.modules():
        kind = norm_kind(module)
        if kind is not None:
            fuse_norm(module, kind)
            fused += 1
    assert fused == 7
    ids = torch.randint(0, 128, (4, 64), device="cuda")
    losses, gradients = [], []
    for m in (model, ours):
        loss = m(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.float().flatten() for p in m.parameters()]))
    assert abs(losses[0] - losses[1]) < 2e-3 * losses[0]
    assert numerics.relative_error(*(g.double() for g in gradients)) < 0.02
    compiled = torch.compile(ours, fullgraph=True)
    assert abs(compiled(input_ids=ids, labels=ids).loss.item() - losses[0]) < 5e-3 * losses[0]
