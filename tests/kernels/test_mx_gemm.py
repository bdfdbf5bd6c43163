# SPDX-License-Identifier: Apache-2.0
"""The path of GPUs with MX tensor cores, as far as a machine without one goes: the layout of scales by its formula and
against torchao's, the call against what torch itself demands of such operands, and a GEMM that reads that layout."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_lowprec import ops
from hf_lowprec.kernels import microscaling
from hf_lowprec.numerics import quantize
from hf_lowprec.presets import PRESETS

QUANT = PRESETS["mxfp8"].fprop.input
SHAPES = [(1, 1), (128, 4), (129, 5), (17, 3), (300, 9), (256, 8)]


def scales(r: int, c: int) -> Tensor:
    codes = torch.randint(0, 255, (r, c), generator=torch.Generator().manual_seed(r), dtype=torch.uint8)
    return codes.view(torch.float8_e8m0fnu)


@pytest.mark.parametrize("shape", SHAPES)
def test_swizzle_is_its_formula(shape: tuple[int, int]) -> None:
    """Byte by byte: tiles of 128 x 4 in row-major order; in a tile (r % 32) * 16 + (r // 32) * 4 + c."""
    r, c = shape
    scale = scales(r, c)
    out = microscaling.swizzled(scale).view(torch.uint8).tolist()
    tiles = -(-c // 4)
    assert len(out) == -(-r // 128) * tiles * 512
    wanted = {}
    for i in range(r):
        for j in range(c):
            tile = i // 128 * tiles + j // 4
            wanted[tile * 512 + i % 32 * 16 + i % 128 // 32 * 4 + j % 4] = int(scale.view(torch.uint8)[i, j])
    assert len(wanted) == r * c
    assert all(out[at] == value for at, value in wanted.items())
    assert all(out[at] == 127 for at in range(len(out)) if at not in wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_swizzle_is_torchaos(shape: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        utils: Any = pytest.importorskip("torchao.prototype.mx_formats.utils")
    scale = scales(*shape).view(torch.uint8)
    theirs, ours = utils.to_blocked(scale), microscaling.swizzled(scale.view(torch.float8_e8m0fnu))
    whole = utils.to_blocked(torch.ones_like(scale)).bool()  # where theirs is filled up, with another value
    assert torch.equal(ours.view(torch.uint8)[whole], theirs[whole]) and ours.numel() == theirs.numel()


def tensor_core(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What the hardware computes, from the bytes that it is given; b is [K, N]."""

    def values(q: Tensor, scale: Tensor) -> Tensor:
        blocks = torch.empty(q.shape[0], q.shape[1] // 32)
        tiles = -(-blocks.shape[1] // 4)
        raw = scale.view(torch.uint8)
        for i in range(blocks.shape[0]):
            for j in range(blocks.shape[1]):
                byte = raw[(i // 128 * tiles + j // 4) * 512 + i % 32 * 16 + i % 128 // 32 * 4 + j % 4]
                blocks[i, j] = 2.0 ** (int(byte) - 127)
        return q.float() * blocks.repeat_interleave(32, 1)

    return (values(a, a_scale) @ values(b.t(), b_scale).t()).to(dtype)


@pytest.mark.parametrize("k", [32, 48, 100, 160])
@pytest.mark.parametrize("bias", [True, False])
def test_a_gemm_that_reads_this_layout_is_the_emulated_one(
    k: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def scaled_mm(
        a: Tensor, b: Tensor, sa: Tensor, ra: Any, sb: Tensor, rb: Any, wa: Any, wb: Any, **rest: Any
    ) -> Any:
        functional = torch.nn.functional
        assert ra == rb == functional.ScalingType.BlockWise1x32 and wa == wb == functional.SwizzleType.SWIZZLE_32_4_4
        assert a.shape[1] % 32 == 0 and a.is_contiguous() and b.t().is_contiguous()
        calls.append(rest["output_dtype"])
        out = tensor_core(a, b, sa, sb, torch.float32)
        return (out if rest["bias"] is None else out + rest["bias"].float()).to(rest["output_dtype"])

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm)
    generator = torch.Generator().manual_seed(0)
    a = quantize(torch.randn(130, k, generator=generator), QUANT)
    b = quantize(torch.randn(16, k, generator=generator), QUANT)
    extra = torch.randn(16, generator=generator).bfloat16() if bias else None
    out = microscaling.mx_scaled_mm(*a, *b, extra, torch.bfloat16)
    key = ops.quant_key(QUANT)
    wanted = ops.scaled_mm(*a, key, *b, key, extra, dtype=torch.bfloat16)
    assert calls == [torch.bfloat16] and torch.allclose(out.float(), wanted.float(), rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 32), (33, 48, 100), (130, 256, 16), (7, 32, 1)])
def test_torch_accepts_the_operands(
    m: int, n: int, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own shape, stride and scale checks of a block-scaled GEMM, of tensors that claim to be on a GPU."""
    functional, swap = torch.nn.functional, False
    real = functional.scaled_mm

    def on_gpu(*args: Any, **rest: Any) -> Tensor:
        with FakeTensorMode():
            fakes = [
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") if isinstance(x, Tensor) else x
                for x in args
            ]
            if swap:
                fakes[2], fakes[4] = fakes[4].new_empty(512 * 99), fakes[2]
            return real(*fakes, **rest)  # type: ignore[no-any-return]

    monkeypatch.setattr(functional, "scaled_mm", on_gpu)
    a, b = (quantize(torch.randn(rows, k), QUANT) for rows in (m, n))
    out = microscaling.mx_scaled_mm(*a, *b, None, dtype)
    assert out.shape == (m, n) and out.dtype == dtype
    swap = True
    with pytest.raises((RuntimeError, ValueError), match="scale"):
        microscaling.mx_scaled_mm(*a, *b, None, dtype)
