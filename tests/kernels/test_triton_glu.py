# SPDX-License-Identifier: Apache-2.0
"""The gated-MLP kernels in Triton's interpreter.

Values are held to float64; the quantise stage is exact: codes, scales, amax and counters are those that the
plain-torch operator gives for the kernel's own h. Large shapes and bfloat16, to which the interpreter truncates, have
their turn on the GPU (tests/gpu/test_glu_gpu.py).
"""

from __future__ import annotations

from typing import Any

import interpreter
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


DELAYED, CURRENT = key(method="delayed", history=4, snap="rceil"), key(snap="rceil")


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
                for saved in (None, CURRENT):
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


def check_again() -> int:
    """h of what was kept: halves that were packed, an odd width, no gate, and float16 to its last bit."""
    from hf_lowprec.kernels.glu import glu_again
    from hf_lowprec.ops.registry import kernel_counts

    checked = 0
    for act in ("silu", "gelu_tanh", "sigmoid"):
        for shape in ((3, 5), (2, 9, 300)):
            for gated in (True, False):
                gate, up = torch.randn((2, *shape), generator=torch.Generator().manual_seed(3)).unbind()
                kept = run(gate, up if gated else None, act, write=False, saved=CURRENT)
                args = (*kept, *(() if gated else (None, None)), act, CURRENT)
                for dtype in (torch.float32, torch.float16):
                    ours, truth = glu_again(*args, dtype), default_glu_again(*args, dtype)
                    assert ours.dtype == truth.dtype and ours.shape == truth.shape
                    off = (ours.float() - truth.float()).abs()
                    assert (off <= (2e-6 if dtype == torch.float32 else 2**-10) * truth.abs().clamp(min=1.0)).all()
                    checked += 1
    assert kernel_counts()["fused glu again"] == checked
    return checked


def test_interpreter_agrees_with_the_operator() -> None:
    assert [int(n) for n in interpreter.run(__file__).split()[1:]] == [8, 36, 1, 48, 7, 24]


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
    )
    print("checked", *(check() for check in checks))
