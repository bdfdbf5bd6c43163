# SPDX-License-Identifier: Apache-2.0
"""The gated-MLP kernels on the GPU: codes bit for bit, values against float64, modules against unfused ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import hf_lowprec
from hf_lowprec import numerics, ops
from hf_lowprec.conversion import session_of
from hf_lowprec.modules.glu import GLU, LowPrecGLU, fuse_glu
from hf_lowprec.ops.glu import as_matrix, default_glu_backward, glu, glu_backward
from hf_lowprec.ops.quantize import default_quantize, parse_quant
from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import Quant, Scaling

pytestmark = pytest.mark.gpu

TORCH = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}
SCALINGS = {
    "delayed": Scaling(method="delayed", history=16, snap="rceil"),
    "current": Scaling(),
    "static": Scaling(method="static", exponent=-2),
}
SAVED = ops.quant_key(Quant(format="e4m3fn", scaling=Scaling(snap="rceil")))


def tiles(*block: int, format: str = "e4m3fn", **scaling: Any) -> str:
    return ops.quant_key(Quant(format=format, scaling=Scaling(granularity="tile", block=block, **scaling)))


TILES = tiles(16, 256, snap="rceil")
SHAPES = [(1, 16), (7, 40), (3, 5, 130), (257, 129), (128, 4096), (515, 14336)]


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, any NaN for any NaN."""
    nan = a.float().isnan()
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    equal = a.contiguous().view(integer) == b.contiguous().view(integer)
    return a.dtype == b.dtype and a.shape == b.shape and bool((equal | (nan & b.float().isnan())).all())


def inputs(shape: tuple[int, ...], dtype: torch.dtype, packed: bool, special: float | None = None) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    both = torch.randn((*shape[:-1], 2 * shape[-1]), device="cuda", generator=generator) * 8
    if special is not None:
        both.view(-1)[::997] = special
    halves = both.to(dtype).chunk(2, -1)
    return list(halves) if packed else [half.contiguous() for half in halves]


@pytest.mark.parametrize("saved", [SAVED, TILES], ids=["tensor", "tile"])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_quantise_stage_is_exact(dtype: torch.dtype, scaling: str, saved: str) -> None:
    """Codes, scales, amax and counters are those that the plain-torch operator gives for the kernel's own h."""
    quant = ops.quant_key(Quant(format="e4m3fn", scaling=SCALINGS[scaling]))
    for i, shape in enumerate(SHAPES):
        for packed in (False, True):
            gate, up = inputs(shape, dtype, packed, (None, float("nan"), float("inf"))[i % 3])
            rest = None if i == 1 else up
            for start, ready in (
                ((0.0, False), (0.25, False), (0.25, True)) if scaling == "delayed" else ((None, False),)
            ):
                noted = []
                for _ in range(2):
                    amax, counts = torch.tensor(1.5, device="cuda"), torch.ones(4, dtype=torch.int64, device="cuda")
                    noted.append((None if start is None else torch.tensor(start, device="cuda"), amax, counts))
                (scale, amax, counts), (scale2, amax2, counts2) = noted
                out = glu(
                    gate, rest, "silu", quant=quant, scale=scale, amax=amax, counts=counts, ready=ready,
                    saved=saved,
                )  # fmt: skip
                q, s = default_quantize(out.h.view(-1, shape[-1]), quant, scale2, False, amax2, counts2, None)
                assert same(out.quantized[0], q) and same(out.quantized[1], s), (shape, packed, start, ready)
                assert same(amax, amax2) and torch.equal(counts, counts2)
                for kept, of in ((out.gate, gate), (out.up, rest)):
                    if of is not None:
                        q, s = default_quantize(as_matrix(of), saved, None, False, None, None, None)
                        assert same(kept[0], q.view(of.shape)) and same(kept[1], s)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_tiles_are_exact(dtype: torch.dtype) -> None:
    """Codes and scales are those of numerics on the CPU: Inf and NaN stay in their tile. h does not depend on it."""
    policies = (
        TILES, tiles(64, 64, format="e5m2", snap="rceil"), tiles(1, 4096), tiles(32, 128, format="e5m10", margin=2),
        tiles(8, 128, snap="rceil"), tiles(16, 256, method="static", exponent=3),
    )  # fmt: skip
    for shape in (*SHAPES[:-1], (3, 64, 1000), (4096,), (33, 14336)):
        for packed in (False, True):
            gate, up = inputs(shape, dtype, packed)
            if len(shape) == 2 and shape[0] > 100:
                gate[0, 0], gate[40, 50], gate[16:32] = float("inf"), float("nan"), 0.0
                up[32:64, :128], up[64:80] = float("nan"), up[64:80] * 2.0**-100
            for policy in policies:
                for rest in (up, None):
                    out = glu(gate, rest, "silu", quant=SAVED, saved=policy)
                    plain = glu(gate, rest, "silu", quant=SAVED)
                    assert same(out.h, plain.h) and all(map(same, out.quantized, plain.quantized))
                    for kept, of in ((out.gate, gate), (out.up, rest)):
                        if of is not None:
                            truth = numerics.quantize(as_matrix(of).cpu(), parse_quant(policy))
                            assert same(kept[0].cpu(), truth.qdata.view(shape)), (shape, packed, policy)
                            assert same(kept[1].cpu(), truth.scale), (shape, packed, policy)


def kernels_of(function: Callable[[], Any]) -> list[str]:
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        function()
        torch.cuda.synchronize()
    names = [e.name for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in names if not name.startswith(("Memcpy", "Memset"))]


@pytest.mark.parametrize("packed", [False, True])
def test_a_scale_per_tile_costs_no_launch(packed: bool) -> None:
    gate, up = inputs((300, 1024), torch.bfloat16, packed)
    delayed = ops.quant_key(Quant(format="e4m3fn", scaling=SCALINGS["delayed"]))
    scale, amax = (torch.full((), 0.25, device="cuda") for _ in range(2))
    seen = {}
    for saved in (None, SAVED, TILES):
        call = partial(glu, gate, up, "silu", quant=delayed, scale=scale, amax=amax, ready=True, saved=saved)
        call()
        seen[saved] = kernels_of(call)
    assert len(seen[TILES]) == len(seen[None]) == 1 and len(seen[SAVED]) == 2, seen


def test_an_mlp_of_fp8_lm_reads_gate_and_up_once() -> None:
    model = nn.Sequential(MLP()).to("cuda", torch.bfloat16)
    hf_lowprec.convert(model, "fp8-lm", fuse=False)
    fuse_glu(model[0], GLU("gate_proj", "up_proj", "down_proj", "silu"), PRESETS["fp8-lm"].saved)
    x = torch.randn(96, 256, device="cuda").bfloat16()
    for _ in range(3):
        model(x.clone().requires_grad_()).sum().backward()
        torch.cuda.synchronize()  # so that the host learns of the delayed scales
        session_of(model).scaling.roll()
    leaf = x.clone().requires_grad_()
    model(leaf)  # casts the weights, whose scale is current
    names = kernels_of(lambda: model(leaf))
    assert sum("_forward_kernel" in name for name in names) == 1, names
    assert not any("_amax_kernel" in name for name in names), names


@pytest.mark.parametrize("act", numerics.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_no_worse_than_torch(act: str, dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-30, 30, 60001), torch.linspace(-100, 100, 4001)]).to("cuda", dtype)
    u = torch.randn(x.shape, device="cuda").to(dtype)
    grad = torch.randn(x.shape, device="cuda").to(dtype)
    exact = [t.double().requires_grad_() for t in (x, u)]
    truth = numerics.activation(act, exact[0]) * exact[1]
    truths = [truth.detach(), *torch.autograd.grad(truth, exact, grad.double())]
    eager = [t.clone().requires_grad_() for t in (x, u)]
    h = TORCH[act](eager[0]) * eager[1]
    theirs = [h.detach(), *torch.autograd.grad(h, eager, grad)]
    ours = [glu(x, u, act).h, torch.empty_like(x), torch.empty_like(x)]
    glu_backward(grad, x, u, act, ours[1], ours[2])
    for a, b, t in zip(ours, theirs, truths, strict=True):
        fine = t.isfinite() & a.isfinite() & b.isfinite()
        e, f = ((v.double() - t)[fine].square().mean().sqrt().item() for v in (a, b))
        assert e <= 1.2 * f + 1e-12, (act, dtype, e, f)
        # One rounding to the dtype, and 4 float32 ulps of the largest factor.
        factor = torch.stack([v.double().abs().clamp(min=1) for v in (x, u, grad)]).amax(0) ** 2
        bound = 0.5001 * torch.finfo(dtype).eps * t.abs() + 4 * 2.0**-23 * factor + torch.finfo(dtype).tiny
        assert bool(((a.double() - t).abs() <= bound)[fine].all()), (act, dtype)


@pytest.mark.parametrize("saved", [None, SAVED, TILES], ids=["as it is", "tensor", "tile"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_backward(dtype: torch.dtype, saved: str | None) -> None:
    for shape in SHAPES:
        for packed in (False, True):
            gate, up = inputs(shape, dtype, packed)
            grad = torch.randn(shape, device="cuda").to(dtype)
            scales: dict[str, Any] = {}
            if saved is not None:
                out = glu(gate, up, "silu", saved=saved)
                (gate, gs), (up, us) = out.gate, out.up
                scales = {"gate_scale": gs, "up_scale": us, "saved": saved}
            results = []
            for ours in (True, False):
                both = torch.full((*shape[:-1], 2 * shape[-1]), torch.nan, device="cuda", dtype=dtype)
                parts = both.chunk(2, -1) if packed else [torch.empty_like(grad) for _ in range(2)]
                if ours:
                    glu_backward(grad, gate, up, "silu", *parts, **scales)
                else:
                    default_glu_backward(
                        grad, gate, scales.get("gate_scale"), up, scales.get("up_scale"), "silu", saved, *parts
                    )
                results.append(parts)
            for a, b in zip(*results, strict=True):
                assert ((a.float() - b.float()).abs() <= 2 * torch.finfo(dtype).eps * b.float().abs() + 2e-5).all()


class MLP(nn.Module):
    def __init__(self, width: int = 256, hidden: int = 512) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("recipe", ["fp8-lm", "te-delayed", "te-current", "fp8-cscale"])
def test_fused_module_agrees_with_the_unfused_one(recipe: str) -> None:
    """bfloat16, over the first steps, without and with the delayed scales known to the host."""
    models = []
    for fuse in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(MLP()).to("cuda", torch.bfloat16)
        hf_lowprec.convert(model, recipe, fuse=False)
        if fuse:
            fuse_glu(model[0], GLU("gate_proj", "up_proj", "down_proj", "silu"))
        models.append(model)
    assert isinstance(models[0][0], LowPrecGLU)
    for step in range(5):
        generator = torch.Generator("cuda").manual_seed(step)
        x = torch.randn(96, 256, device="cuda", generator=generator).bfloat16()
        found = []
        for model in models:
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            out = model(leaf)
            out.backward(
                torch.randn(96, 256, device="cuda", generator=torch.Generator("cuda").manual_seed(9)).bfloat16()
            )
            found.append([out.detach(), leaf.grad, *(p.grad for p in model.parameters())])
            session_of(model).scaling.roll()
            torch.cuda.synchronize()
        for a, b in zip(*found, strict=True):
            assert bool(a.isfinite().all())
            assert (a.float() - b.float()).norm() <= 0.06 * b.float().norm(), step
