# SPDX-License-Identifier: Apache-2.0
"""The gated-MLP kernels in Triton's interpreter.

Values are held to float64; the quantise stage is exact: codes, scales, amax and counters are those that the
plain-torch operator gives for the kernel's own h. Large shapes and bfloat16, to which the interpreter truncates, have
their turn on the GPU (tests/gpu/test_glu_gpu.py).
"""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import interpreter
import pytest
import torch
import torch.nn.functional as F

from hf_lowprec import numerics, ops
from hf_lowprec.ops.glu import default_glu, default_glu_again, default_glu_backward
from hf_lowprec.ops.quantize import default_quantize
from hf_lowprec.recipe import NONE, Quant, Scaling

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


def key(format: str = "e4m3fn", **scaling: Any) -> str:
    return ops.quant_key(Quant(format=format, scaling=Scaling(**scaling)))


def tiled(*block: int, format: str = "e4m3fn", **scaling: Any) -> str:
    return key(format, granularity="tile", block=block, **scaling)


DELAYED, CURRENT = key(method="delayed", history=4, snap="rceil"), key(snap="rceil")
TILED = tiled(16, 256, snap="rceil")


def run(gate: torch.Tensor, up: torch.Tensor | None, act: str, function: Any = None, **kw: Any) -> list[torch.Tensor]:
    from hf_lowprec.kernels.glu import glu

    names = ("write", "quant", "scale", "amax", "counts", "seed", "ready", "saved")
    given = {"write": True, "ready": False, **kw}
    return (function or glu)(gate, up, act, *(given.get(name) for name in names))


def check_values() -> int:
    """Error of float32 results against float64, beside that of torch's own functions."""
    from hf_lowprec.kernels.glu import glu_backward

    x = torch.cat([torch.linspace(-30, 30, 6001), torch.linspace(-110, 110, 401), torch.randn(2000)])
    for act in numerics.ACTIVATIONS:
        truth, slope = numerics.activation(act, x.double()), numerics.activation_slope(act, x.double())
        (h,) = run(x, None, act)
        grad = torch.empty_like(x)
        glu_backward(torch.ones_like(x), x, None, None, None, act, None, grad, None)
        leaf = x.clone().requires_grad_()
        TORCH[act](leaf).sum().backward()
        for ours, torchs, exact in ((h, TORCH[act](x), truth), (grad, leaf.grad, slope)):
            error, own = (ours.double() - exact).abs(), (torchs.double() - exact).abs()
            # Ulps of 1 or of x, whichever is larger: an activation is at most as large as x (relu2 as its square).
            unit = torch.maximum(x.double().abs().clamp(min=1.0), exact.abs()) * 2.0**-23
            assert (error <= 4 * unit).all(), act
            assert error.square().mean() <= 1.2**2 * own.square().mean(), act
    return len(numerics.ACTIVATIONS)


def check_quantise_stage() -> int:
    """Everything that is made of h, gate and up, from the kernel's own h."""
    checked = 0
    cases: list[tuple[tuple[int, ...], str, str, float | None]] = [
        ((3, 5), "silu", DELAYED, None),
        ((2, 3, 40), "silu", DELAYED, float("nan")),
        ((33, 130), "gelu_tanh", CURRENT, float("inf")),
        ((17, 64), "sigmoid", key("e5m10", method="static", exponent=-2), None),
        ((1, 1), "relu2", ops.quant_key(Quant(format="e5m2", scaling=NONE)), None),
        ((70, 300), "silu", DELAYED, -float("inf")),
    ]
    for shape, act, quant, special in cases:
        for layout in ("apart", "packed", "no gate"):
            generator = torch.Generator().manual_seed(sum(shape))
            both = torch.randn((*shape[:-1], 2 * shape[-1]), generator=generator) * 30
            if special is not None:
                both[..., 0] = special
            gate, up = both.chunk(2, -1)
            if layout == "apart":
                gate, up = gate.contiguous(), up.contiguous()
            rest = None if layout == "no gate" else up
            for start in (0.0, 0.25) if quant is DELAYED else (None,):
                for ready in (False, True) if start else (False,):
                    scale = None if start is None else torch.tensor(start)
                    amax, counts = torch.tensor(1.5), torch.ones(4, dtype=torch.int64)
                    h, q, s, *more = run(
                        gate, rest, act, quant=quant, scale=scale, amax=amax, counts=counts, ready=ready,
                        saved=CURRENT,
                    )  # fmt: skip
                    assert h.shape == gate.shape
                    seen, counted = torch.tensor(1.5), torch.ones(4, dtype=torch.int64)
                    flat = h.reshape(-1, shape[-1])
                    qt, st = default_quantize(flat, quant, scale, False, seen, counted, None)
                    assert_same_codes(q, qt)
                    assert torch.equal(s, st) and torch.equal(amax, seen) and torch.equal(counts, counted)
                    for kept in (gate,) if rest is None else (gate, up):
                        qt, st = default_quantize(kept, CURRENT, None, False, None, None, None)
                        assert_same_codes(more.pop(0), qt)
                        assert torch.equal(more.pop(0), st)
                    assert not more
                    checked += 1
    return checked


def assert_same_codes(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype
    nan = b.float().isnan()
    assert torch.equal(nan, a.float().isnan())
    integer = {1: torch.uint8, 2: torch.int16}[a.dtype.itemsize]
    assert torch.equal(a.view(integer)[~nan], b.view(integer)[~nan])


def check_sampled_counts() -> int:
    """More elements than the counters look at, in a packed layout."""
    both = torch.randn(50, 2 * 3000, generator=torch.Generator().manual_seed(3)) * 3000
    gate, up = both.chunk(2, -1)
    counts, expected = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    quant = key("e5m10", method="static", exponent=5)
    h, *_ = run(gate, up, "silu", quant=quant, counts=counts)
    default_quantize(h, quant, None, False, None, expected, None)
    assert torch.equal(counts, expected) and 0 < counts[0] < gate.numel() and counts[1] > 0 and counts[2] > 0
    return 1


def check_backward() -> int:
    from hf_lowprec.kernels.glu import glu_backward

    checked = 0
    for act in ("silu", "gelu_tanh", "relu2"):
        for shape in ((3, 5), (2, 9, 300)):
            for packed in (False, True):
                for saved in (None, CURRENT, TILED, tiled(64, 64)):
                    gate, up, grad = torch.randn((3, *shape), generator=torch.Generator().manual_seed(7)).unbind()
                    gate_scale = up_scale = None
                    if packed and saved is None:
                        gate, up = torch.cat([gate, up], -1).chunk(2, -1)
                    if saved is not None:
                        _, gate, gate_scale, up, up_scale = run(gate, up, act, saved=saved)
                    results = []
                    for function in (default_glu_backward, glu_backward):
                        out = torch.full((*shape[:-1], 2 * shape[-1]), torch.nan)
                        parts = out.chunk(2, -1) if packed else (torch.empty(shape), torch.empty(shape))
                        function(grad, gate, gate_scale, up, up_scale, act, saved, *parts)
                        results.append(parts)
                    for truth, ours in zip(*results, strict=True):
                        assert ((ours - truth).abs() <= 2e-6 * truth.abs().clamp(min=1.0)).all()
                        checked += 1
    return checked


def check_agreement() -> int:
    """The operator as a whole: float16 in, all outputs, to the last bit of float16."""
    gate, up = torch.randn(2, 20, 48, generator=torch.Generator().manual_seed(5)).half().unbind()
    ours, truth = (run(gate, up, "silu", f, quant=CURRENT, saved=CURRENT) for f in (None, default_glu))
    for a, b in zip(ours, truth, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.allclose(a.float(), b.float(), rtol=2**-10, atol=0)
    return len(ours)


def special(x: torch.Tensor) -> None:
    """Inf and NaN, zeros and subnormal numbers, over parts of a matrix or of its tiles, in place."""
    rows, cols = x.shape
    x[0, 0], x[rows // 2, cols // 2], x[-1, -1] = float("inf"), float("nan"), -float("inf")
    if rows > 32:
        x[16:32, : min(cols, 256)] = 0
        x[32:, : min(cols, 256)] = float("nan")
    x[-1, : cols // 3] = x[-1, : cols // 3] * 2.0**-130


def check_tiles() -> int:
    """A scale per tile: codes and scales are numerics' own, at any shape, layout and dtype, and all else is what it is
    without them."""
    from hf_lowprec.ops.quantize import parse_quant
    from hf_lowprec.ops.registry import kernel_counts

    policies = (
        TILED, tiled(64, 64, format="e5m2", snap="rceil"), tiled(1, 1024), tiled(32, 128, format="e5m10", margin=2),
        tiled(16, 256, method="static", exponent=3),
    )  # fmt: skip
    dtypes, layouts = (torch.float32, torch.float16, torch.bfloat16), ("apart", "packed", "no gate")
    checked = 0
    for number, shape in enumerate(((3, 5), (2, 9, 300), (37, 515), (600,))):
        for (place, saved), layout in product(enumerate(policies), layouts):
            dtype = dtypes[(number + place + layouts.index(layout)) % 3]
            both = torch.randn((*shape[:-1], 2 * shape[-1]), generator=torch.Generator().manual_seed(sum(shape))) * 30
            both[..., ::3] *= 2.0**-9
            gate, up = both.to(dtype).chunk(2, -1)
            if len(shape) == 2:
                special(gate)
                special(up[: shape[0] // 2])
            if layout == "apart":
                gate, up = gate.contiguous(), up.contiguous()
            rest = None if layout == "no gate" else up
            found = run(gate, rest, "silu", quant=CURRENT, saved=saved)
            assert all(map(torch.equal, map(bits, found), map(bits, run(gate, rest, "silu", quant=CURRENT))))
            for kept in (gate,) if rest is None else (gate, up):
                matrix = kept.reshape(-1, shape[-1])
                truth = numerics.quantize(matrix, parse_quant(saved))
                codes, scale, *more = found[3:]
                found[3:] = more
                assert_same_codes(codes, truth.qdata.view(shape))
                assert torch.equal(scale, truth.scale)
                checked += 1
            assert len(found) == 3
    assert "glu in several passes" not in kernel_counts()
    gate, up = torch.randn(2, 7, 40, generator=torch.Generator().manual_seed(1)).unbind()
    for saved in (tiled(3, 8), tiled(8, 8), tiled(128, 128)):  # of which no program takes one
        for a, b in zip(*(run(gate, up, "silu", f, saved=saved) for f in (None, default_glu)), strict=True):
            assert a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-6, atol=0)
            checked += 1
    assert kernel_counts()["glu in several passes"] == 3
    args = {"quant": key(granularity="column"), "saved": TILED}  # of which the fused kernel knows the second
    for a, b in zip(*(run(gate, up, "silu", f, **args) for f in (None, default_glu)), strict=True):
        assert a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=2**-3, atol=1e-6)
        checked += 1
    return checked


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.dtype.itemsize])


def check_again() -> int:
    """h of what was kept: halves that were packed, an odd width, no gate, a scale per tensor or tile, and float16 to
    its last bit."""
    from hf_lowprec.kernels.glu import glu_again
    from hf_lowprec.ops.registry import kernel_counts

    checked = 0
    for act in ("silu", "gelu_tanh", "sigmoid"):
        for shape in ((3, 5), (2, 9, 300)):
            for gated in (True, False):
                gate, up = torch.randn((2, *shape), generator=torch.Generator().manual_seed(3)).unbind()
                for dtype, saved in product((torch.float32, torch.float16), (CURRENT, TILED)):
                    kept = run(gate, up if gated else None, act, write=False, saved=saved)
                    args = (*kept, *(() if gated else (None, None)), act, saved)
                    ours, truth = glu_again(*args, dtype), default_glu_again(*args, dtype)
                    assert ours.dtype == truth.dtype and ours.shape == truth.shape
                    off = (ours.float() - truth.float()).abs()
                    assert (off <= (2e-6 if dtype == torch.float32 else 2**-10) * truth.abs().clamp(min=1.0)).all()
                    checked += 1
    assert kernel_counts()["fused glu again"] == checked
    return checked


def test_interpreter_agrees_with_the_operator() -> None:
    assert [int(n) for n in interpreter.run(__file__).split()[1:]] == [8, 36, 1, 96, 7, 48, 122]


@pytest.mark.parametrize(("function", "loaded"), [("forward", [16, 16]), ("backward", [8, 8, 16]), ("again", [8, 8])])
def test_tiles_compile_for_an_h100(function: str, loaded: list[int]) -> None:
    """8 elements a thread: bytes of its loads, and nothing that goes between layouts through shared memory."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_lowprec.kernels.quantize import plan_of
    from hf_lowprec.kernels.triton import glu, glu_backward

    kernel: Any = {"forward": glu._forward_kernel, "backward": glu_backward._backward_kernel}.get(function)
    kernel = kernel or glu_backward._again_kernel
    tile, plan = (16, 256), plan_of(CURRENT)
    names = [name for name in kernel.arg_names if name.endswith("_ptr") and name != "partial_ptr"]
    pointers = {name: "*bf16" for name in names} | {n: "*fp32" for n in names if "scale" in n or n == "amax_ptr"}
    codes = ("q_ptr", "gate_q_ptr", "up_q_ptr") if function == "forward" else ("gate_ptr", "up_ptr")
    pointers |= {name: "*fp8e4nv" for name in codes} | {"given_ptr": "*fp32", "counts_ptr": "*i64"}
    integers = [p.name for p in kernel.params if not p.is_constexpr and not p.name.endswith("_ptr")]
    policy = dict(zip(("FMT_MAX", "HALF_TINY", "TOP_EXP", "TOP_MAN", "MARGIN", "POW2"), plan.constants, strict=True))
    constants = {
        "ACT": "silu", "SCALE": "ready", "CONSTANT": 1.0, **policy, "SAVED": "tile", "KEPT_CONSTANT": 1.0,
        **{f"KEPT_{name.removeprefix('FMT_')}": value for name, value in policy.items()}, "REVERSE": False,
        "PARTIALS": 512, "SAMPLES": 512, "TILED": True, "ROWS": tile[0], "COLS": tile[1], "partial_ptr": None,
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = {name: pointers.get(name, "i32") for name in kernel.arg_names if name not in constants}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    even = [*names, *(name for name in integers if name in ("cols", "stride", "grad_stride"))]
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": glu.warps_of(tile, True)}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert options["num_warps"] == 16 and made.metadata.shared <= 128
    loads = re.findall(r"ld\.global\.v(\d)\.b(\d+)", made.asm["ptx"])
    assert sorted(int(v) * int(w) // 8 for v, w in loads) == loaded, loads


if __name__ == "__main__":
    torch.set_num_threads(1)
    interpreter.mend()
    checks = (
        check_values,
        check_quantise_stage,
        check_sampled_counts,
        check_backward,
        check_agreement,
        check_again,
        check_tiles,
    )
    print("checked", *(check() for check in checks))
