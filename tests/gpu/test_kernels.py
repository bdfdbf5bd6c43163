# SPDX-License-Identifier: Apache-2.0
"""Kernels against the plain-torch truth, on the GPU: casts bit for bit, GEMMs to a stated tolerance."""

from __future__ import annotations

import pytest
import torch

from hf_lowprec import numerics, ops
from hf_lowprec.ops.quantize import default_quantize
from hf_lowprec.recipe import NONE, Quant, Rounding, Scaling

pytestmark = pytest.mark.gpu

# ||out - truth|| / ||truth|| of one GEMM on N(0,1) operands. float32 output and split accumulation show the tensor
# core's own error; the fast accumulator keeps about 14 bits; a bfloat16 output adds its rounding (2^-9 / sqrt(3)).
GEMM_TOLERANCE = {(torch.float32, False): 5e-4, (torch.float32, True): 2e-3, (torch.bfloat16, False): 2.5e-3}

SHAPES = [(1, 16), (7, 32), (257, 129), (500, 4096), (5, 123, 123), (4097,)]
SCALINGS = {
    "current-exact": Scaling(),
    "current-rceil": Scaling(snap="rceil"),
    "delayed": Scaling(method="delayed", history=16, snap="rceil"),
    "margin": Scaling(method="delayed", history=4, margin=2),
    "static": Scaling(method="static", exponent=-3),
    "none": NONE,
}


def _input(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(
        torch.randint(-20, 12, shape, generator=generator).float()
    )
    return x.to(dtype)


def _assert_same_codes(a: torch.Tensor, b: torch.Tensor) -> None:
    nan = a.float().isnan()
    assert torch.equal(nan, b.float().isnan())
    assert torch.equal(a.float().view(torch.int32)[~nan], b.float().view(torch.int32)[~nan])


# Every combination is compiled anew, so the full table of scalings runs for one dtype and format only.
CASTS = [(torch.bfloat16, "e4m3fn", scaling) for scaling in SCALINGS] + [
    (dtype, format, scaling)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for format in ("e4m3fn", "e5m2", "e5m10")
    for scaling in ("delayed", "current-exact")
    if (dtype, format) != (torch.bfloat16, "e4m3fn")
]


@pytest.mark.parametrize(("dtype", "format", "scaling"), CASTS, ids=lambda value: str(value).removeprefix("torch."))
def test_cast_is_bit_for_bit(dtype: torch.dtype, format: str, scaling: str) -> None:
    quant = Quant(format=format, scaling=SCALINGS[scaling])
    for seed, shape in enumerate(SHAPES):
        for special in (None, float("nan"), float("inf"), "zero"):
            x = _input(shape, dtype, seed)
            if special == "zero":
                x = torch.zeros_like(x)
            elif special is not None:
                x.view(-1)[x.numel() // 3], x.view(-1)[0] = special, -special
            for start in [0.0, 0.25] if SCALINGS[scaling].method == "delayed" else [None]:
                args = []
                for device in ("cpu", "cuda"):
                    scale = None if start is None else torch.tensor(start, device=device)
                    amax = None if start is None else torch.tensor(1.5, device=device)
                    counts = torch.ones(4, dtype=torch.int64, device=device)
                    args.append((x.to(device), ops.quant_key(quant), scale, False, amax, counts, None))
                expected, got = default_quantize(*args[0]), torch.ops.hf_lowprec.quantize(*args[1])
                _assert_same_codes(expected[0], got[0].cpu())
                assert torch.equal(expected[1], got[1].cpu())
                if start is None:
                    assert torch.equal(expected[1], ops.current_scale(args[1][0], args[1][1]).cpu())
                for cpu, gpu in zip(args[0][4:6], args[1][4:6], strict=True):
                    assert cpu is None or torch.equal(cpu, gpu.cpu())
                if format == "e4m3fn":
                    fixed = torch.ops.hf_lowprec.quantize(args[1][0], args[1][1], got[1], True, None, None, None)
                    _assert_same_codes(expected[0], fixed[0].cpu())


def test_cast_beyond_int32_elements() -> None:
    n = 2**31 + 4097
    x = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    x[-1], x[-2] = 3.0, -448.0
    quant = ops.quant_key(Quant(format="e4m3fn", scaling=Scaling(snap="rceil")))
    qdata, scale = ops.quantize(x, quant)
    assert scale.item() == 1.0
    assert qdata[-2:].float().tolist() == [-448.0, 3.0]
    assert not qdata[: n - 2].view(torch.uint8).any()


@pytest.mark.parametrize("shape", [(16, 16), (17, 33), (64, 1), (1, 5), (1000, 129), (4096, 2048)], ids=str)
def test_transpose(shape: tuple[int, int]) -> None:
    from hf_lowprec.kernels.triton.transpose import transpose

    x = torch.randint(0, 255, shape, dtype=torch.uint8, device="cuda")
    assert torch.equal(transpose(x.t()), x.t().contiguous())
    padded = transpose(x.t(), pad_to=16)
    assert padded.shape == (shape[1], -(-shape[0] // 16) * 16)
    assert torch.equal(padded[:, : shape[0]], x.t()) and not padded[:, shape[0] :].any()


@pytest.mark.parametrize("fast", [False, True], ids=["split", "fast"])
@pytest.mark.parametrize("formats", [("e4m3fn", "e4m3fn"), ("e5m2", "e4m3fn")], ids=str)
@pytest.mark.parametrize("k", [16, 512, 4096, 16384])
def test_scaled_mm_against_emulation(k: int, formats: tuple[str, str], fast: bool) -> None:
    torch.manual_seed(k)
    quants = [ops.quant_key(Quant(format=f)) for f in formats]
    a, b = torch.randn(129, k, device="cuda"), torch.randn(64, k, device="cuda")
    (qa, sa), (qb, sb) = ops.quantize(a, quants[0]), ops.quantize(b, quants[1])
    bias = torch.randn(64, device="cuda")
    for dtype in (torch.float32, torch.bfloat16):
        truth = ops.scaled_mm(qa, sa, quants[0], qb, sb, quants[1], bias, dtype=torch.float32, emulate=True)
        out = ops.scaled_mm(qa, sa, quants[0], qb, sb, quants[1], bias, dtype=dtype, fast=fast)
        error = numerics.relative_error(truth, out.float()).item()
        limit = GEMM_TOLERANCE[(torch.float32, fast)] + (
            GEMM_TOLERANCE[(torch.bfloat16, False)] if dtype != torch.float32 else 0
        )
        assert out.dtype == dtype and error < limit, (k, formats, fast, dtype, error)


@pytest.mark.parametrize("tokens", [0, 1, 7, 16, 33])
def test_any_number_of_tokens(tokens: int) -> None:
    quant = ops.quant_key(Quant(format="e4m3fn"))
    g, x = torch.randn(tokens, 32, device="cuda"), torch.randn(tokens, 48, device="cuda")
    (qg, sg), (qx, sx) = ops.quantize(g, quant), ops.quantize(x, quant)
    native = ops.scaled_mm(qg.t(), sg, quant, qx.t(), sx, quant, dtype=torch.float32)
    truth = ops.scaled_mm(qg.t(), sg, quant, qx.t(), sx, quant, dtype=torch.float32, emulate=True)
    torch.testing.assert_close(native, truth, rtol=1e-3, atol=1e-3 * max(1.0, truth.abs().max().item()))


@pytest.mark.parametrize("fmt", ["e4m3fn", "e5m2", "e6m9", "e5m10", "e2m1", "e3m2"])
def test_stochastic_rounding_gives_the_same_bits_as_the_cpu(fmt: str) -> None:
    x = _input((10007,), torch.float32, 3)
    for bits in (4, 13):
        rounding = Rounding(mode="stochastic", bits=bits)
        cpu = numerics.round_to_format(x, fmt, rounding, seed=12345678901)
        gpu = numerics.round_to_format(x.cuda(), fmt, rounding, seed=12345678901)
        assert torch.equal(cpu.view(torch.int32), gpu.cpu().view(torch.int32))
