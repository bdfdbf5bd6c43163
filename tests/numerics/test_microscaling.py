# SPDX-License-Identifier: Apache-2.0
"""Blocks of 32 with E8M0 scales against torchao, gfloat, vectors of microxcaling's rules, and a table of SQNRs."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from gfloat.block import compute_scale_amax
from oracles import gfloat_codes, gfloat_round
from torch import Tensor

from hf_lowprec.formats import FORMATS, Format
from hf_lowprec.numerics import ScaledTensor, dequantize, quantize, quantize_dequantize
from hf_lowprec.recipe import Quant, Rounding, Scaling

INF, NAN = float("inf"), float("nan")
ELEMENTS = ["e4m3fn", "e5m2", "e3m2", "e2m3", "e2m1", "e0m7"]
SNAPS = ["ocp", "rceil", "ceil", "even"]


def mx(name: str, snap: str = "ocp", mode: str = "nearest") -> Quant:
    scaling = Scaling(granularity="block", block=(32,), snap=snap, store="e8m0")
    return Quant(format=name, scaling=scaling, rounding=Rounding(mode=mode))


def blocks(n: int = 4096, low: int = -100, high: int = 100, seed: int = 0) -> Tensor:
    """Gaussian blocks of sizes over many binades; some with one outlier, some sparse, some of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 32, generator=generator)
    x *= torch.exp2(torch.randint(low, high, (n, 1), generator=generator).float())
    x[: n // 8, 3] *= 1000
    x[n // 8 : n // 4] *= torch.rand(n // 8, 32, generator=generator) < 0.1
    x[n // 4] = 0
    x[n // 4 + 1] = -0.0
    return x


def codes(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


# --- torchao --------------------------------------------------------------------------------------------------------


def torchao(x: Tensor, name: str, snap: str) -> tuple[Tensor, Tensor]:
    """(E8M0 codes [blocks, 1], values)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: Any = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    dtypes = {
        "e4m3fn": torch.float8_e4m3fn,
        "e5m2": torch.float8_e5m2,
        "e3m2": "fp6_e3m2",
        "e2m3": "fp6_e2m3",
        "e2m1": torch.float4_e2m1fn_x2,
    }
    mode = getattr(module.ScaleCalculationMode, {"ocp": "FLOOR"}.get(snap, snap.upper()))
    scale, data = module.to_mx(x, dtypes[name], 32, mode)
    return codes(scale).view(-1, 1), module.to_dtype(data, scale, dtypes[name], 32, torch.float32)


@pytest.mark.parametrize("snap", SNAPS)
@pytest.mark.parametrize("name", ELEMENTS[:-1])
def test_equals_torchao_bit_for_bit(name: str, snap: str) -> None:
    x, quant = blocks(), mx(name, snap)
    ours = quantize(x, quant)
    scale, values = torchao(x, name, snap)
    assert torch.equal(codes(ours.scale), scale)
    assert torch.equal(dequantize(ours, quant).view(torch.int32), values.view(torch.int32))


def test_torchao_loses_blocks_whose_scale_is_the_smallest() -> None:
    """torchao 0.18 flushes 2^-127: it scales such blocks by 2^-126, or (RCEIL) drops them. Ours stay what they are."""
    x = torch.zeros(1, 32)
    x[0, 0] = 2.0**-120
    for snap, theirs in (("ocp", 2.0**-121), ("rceil", 0.0)):
        scale, values = torchao(x, "e4m3fn", snap)
        assert int(scale) == 0 and float(values[0, 0]) == theirs
        assert torch.equal(quantize_dequantize(x, mx("e4m3fn", snap)), x)


def test_torchao_rounds_a_logarithm_next_to_a_power_of_two() -> None:
    """RCEIL in its eager path: an amax one ulp beyond 448 * 2^k needs the next scale, and does not get it."""
    amax = torch.nextafter(448 * torch.exp2(torch.arange(-60.0, 60.0)), torch.tensor(INF))
    x = torch.zeros(len(amax), 32)
    x[:, 7] = amax
    ours = codes(quantize(x, mx("e4m3fn", "rceil")).scale).to(torch.int32)
    assert ours.flatten().tolist() == list(range(127 - 60 + 1, 127 + 60 + 1))
    theirs = torchao(x, "e4m3fn", "rceil")[0].to(torch.int32)
    assert 100 < int((ours - theirs == 1).sum()) < 120 and int((ours - theirs).max()) == 1


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_torchao_and_ours_of_what_is_not_finite(bad: float) -> None:
    """Ours: that element is NaN where the format has one, else the whole block. torchao: NaN blocks, but Inf stays."""
    x = torch.ones(2, 32)
    x[0, 0] = bad
    for name in ("e4m3fn", "e2m1"):
        ours = quantize(x, mx(name))
        y = dequantize(ours, mx(name))
        assert y[0, 0].isnan() and torch.equal(y[1], x[1])
        if name == "e4m3fn":
            assert torch.equal(y[0, 1:], x[0, 1:]), "the others are scaled as if it were not there"
        else:
            assert y[0].isnan().all() and codes(ours.scale).flatten().tolist() == [255, 125]
        scale, theirs = torchao(x, name, "ocp")
        if bad != bad:
            assert int(scale[0]) == 255 and theirs[0].isnan().all()
        else:
            assert theirs[0, 0] == bad and not theirs[0, 1:].any(), "everything beside it becomes 0"


# --- gfloat ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["nearest", "away"])
@pytest.mark.parametrize("name", ELEMENTS)
def test_equals_gfloat_code_for_code(name: str, mode: str) -> None:
    x, fmt = blocks(2048, seed=1), FORMATS[name]
    assert isinstance(fmt, Format)
    ours = quantize(x, mx(name, "ocp", mode))
    scale = np.array([compute_scale_amax(fmt.emax, row) for row in x.double().numpy()])
    exponents = np.log2(scale).astype(int) + 127
    np.testing.assert_array_equal(codes(ours.scale).flatten().numpy(), exponents)
    theirs = gfloat_codes(fmt, x.double().numpy() / scale[:, None], mode, saturate=True)
    found = codes(ours.qdata) if ours.qdata.is_floating_point() else ours.qdata
    np.testing.assert_array_equal(found.numpy().astype(np.int64), theirs)


@pytest.mark.parametrize("name", ELEMENTS)
def test_stochastic_rounding_in_blocks_is_gfloats(name: str) -> None:
    """Word by word: 5 random bits, the block's own scale."""
    x, fmt = blocks(512, -10, 10, seed=2), FORMATS[name]
    assert isinstance(fmt, Format)
    words = torch.randint(0, 32, x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    quant = mx(name)
    quant = Quant(format=name, scaling=quant.scaling, rounding=Rounding(mode="stochastic", bits=5))
    ours = quantize(x, quant, words=words)
    z = (x / ours.scale.float()).double().numpy()
    theirs = gfloat_round(fmt, z, "stochastic", saturate=True, srbits=words.numpy(), srnumbits=5)
    y = dequantize(ScaledTensor(ours.qdata, torch.ones_like(ours.scale.float())), quant)
    np.testing.assert_array_equal(y.numpy(), theirs.astype(np.float32))


def test_stochastic_rounding_in_blocks_has_no_bias() -> None:
    """RCEIL, under which nothing saturates: amax 1.9 has scale 1/2, so that steps are at most 1/2."""
    x = torch.linspace(-1.9, 1.9, 64).view(2, 32)
    scaling = Scaling(granularity="block", block=(32,), snap="rceil", store="e8m0")
    quant = Quant(format="e2m1", scaling=scaling, rounding=Rounding(mode="stochastic"))
    draws = torch.stack([quantize_dequantize(x, quant, seed=seed) for seed in range(500)])
    assert float((draws.mean(0) - x).abs().max()) < 4 * 0.25 / 500**0.5
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(draws[5], quantize_dequantize(x, quant, seed=5))


# --- microxcaling ---------------------------------------------------------------------------------------------------

# By hand from the rules that microxcaling documents for `_quantize_mx` (no package of it exists): shared exponent
# floor(log2 amax) - emax; element: step 2^(max(floor(log2 |a|), emin) - mbits); `nearest` = sign(a) floor(|a| / step +
# 1/2) step, ties away from zero; `even` ties to even; then clamped to the largest value. One block each, the rest 0.
# (format, inputs, nearest, even)
MICROXCALING = [
    # amax 6: scale 2^(2 - 2) = 1. Steps 1/2 below 2, 1 below 4, 2 below 8.
    ("e2m1", [6, 0.25, 0.75, 1.25, -1.75, 2.5, -3.5, 5, 0.24, 4.99],
             [6, 0.5, 1.0, 1.5, -2, 3, -4, 6, 0, 4], [6, 0, 1, 1, -2, 2, -4, 4, 0, 4]),
    # amax 7.9 has the exponent of 4: it saturates to 6 under OCP's rule.
    ("e2m1", [7.9, -7.9, 5.5], [6, -6, 6], [6, -6, 6]),
    # amax 3: scale 2^(1 - 2) = 1/2, everything as above in halves.
    ("e2m1", [3, 0.125, -0.625, 1.25, 2.5], [3, 0.25, -0.75, 1.5, 3], [3, 0, -0.5, 1, 2]),
    # amax 28: scale 2^(4 - 4) = 1. Steps 1/16 below 1/2, 1/4 in [1, 2), 4 in [16, 32).
    ("e3m2", [28, 0.03125, 1.125, -1.375, 18, 22, 26, 0.28125],
             [28, 0.0625, 1.25, -1.5, 20, 24, 28, 0.3125], [28, 0, 1, -1.5, 16, 24, 24, 0.25]),
    ("e3m2", [31, 30], [28, 28], [28, 28]),
    # amax 7.5: scale 2^(2 - 2) = 1. Steps 1/8 below 2, 1/4 below 4, 1/2 below 8.
    ("e2m3", [7.5, 0.0625, 1.0625, 2.125, -4.25, 6.75], [7.5, 0.125, 1.125, 2.25, -4.5, 7], [7.5, 0, 1, 2, -4, 7]),
    # amax 448: scale 2^(8 - 8) = 1. Step 32 in [256, 512), 2^-9 below 2^-6.
    ("e4m3fn", [448, 272, 304, 2**-10, -1.0625], [448, 288, 320, 2**-9, -1.125], [448, 256, 320, 0, -1]),
    ("e4m3fn", [500, 480], [448, 448], [448, 448]),
    # amax 57344: scale 1. Step 8192 in [32768, 65536), 1/4 in [1, 2).
    ("e5m2", [57344, 36864, -1.125, 1.375], [57344, 40960, -1.25, 1.5], [57344, 32768, -1, 1.5]),
    # amax 1: scale 1. Step 1/64 everywhere, largest 127/64; -2 is not used.
    ("e0m7", [1, 0.5 / 64, -1.5 / 64, 2.5 / 64, 0.4 / 64], [1, 1 / 64, -2 / 64, 3 / 64, 0],
             [1, 0, -2 / 64, 2 / 64, 0]),
    ("e0m7", [1.999, -1.999], [127 / 64, -127 / 64], [127 / 64, -127 / 64]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "away", "even"), MICROXCALING)
@pytest.mark.parametrize("shift", [0, -37, 50])
def test_microxcalings_rules(name: str, given: list[float], away: list[float], even: list[float], shift: int) -> None:
    x = torch.zeros(1, 32)
    x[0, : len(given)] = torch.tensor(given) * 2.0**shift
    for mode, wanted in (("away", away), ("nearest", even)):
        y = quantize_dequantize(x, mx(name, "ocp", mode))
        assert (y[0, : len(given)] * 2.0**-shift).tolist() == torch.tensor(wanted, dtype=torch.float32).tolist()
        assert not y[0, len(given) :].any()


@pytest.mark.parametrize("mode", ["nearest", "away", "zero"])
@pytest.mark.parametrize("name", [*ELEMENTS, "e4m3none", "e6m5", "nf4"])
def test_the_short_way_has_the_bits_of_the_long_one(name: str, mode: str) -> None:
    """Values without codes are decoded codes: of non-finite elements, a given scale, 16 bits and strides, too."""
    x = blocks(400, -20, 20, seed=4)
    for quant in (mx(name, "rceil", mode), Quant(format=name, rounding=Rounding(mode=mode))):
        for y in (x, x.bfloat16(), x.t().contiguous().t()):
            wanted = dequantize(quantize(y, quant), quant).to(y.dtype)
            assert torch.equal(raw(quantize_dequantize(y, quant)), raw(wanted))
        y = x.clone()
        y[5, 6], y[70, 1] = INF, NAN
        wanted = dequantize(quantize(y, quant), quant)
        found = quantize_dequantize(y, quant)
        assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(
            raw(found.nan_to_num(0)), raw(wanted.nan_to_num(0))
        )
        scale = quantize(x, quant).scale.float() * 2
        assert torch.equal(
            quantize_dequantize(x, quant, scale=scale), dequantize(quantize(x, quant, scale=scale), quant)
        )
        y = quantize_dequantize(torch.tensor([[1.0, NAN]]), quant, scale=torch.ones(1, 1))
        assert y[0, 1].isnan(), "also where the format has no NaN and the scale is not its own"


def raw(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.itemsize])


# --- scales ---------------------------------------------------------------------------------------------------------


def test_the_worked_example_of_150() -> None:
    """a = 150 in E4M3: 2^-1 holds it under RCEIL (150 / 448 < 1/2), CEIL takes 2^0."""
    x = torch.zeros(1, 32)
    x[0, 9] = -150.0
    found = {snap: int(codes(quantize(x, mx("e4m3fn", snap)).scale)) for snap in SNAPS}
    assert found == {"ocp": 126, "rceil": 126, "ceil": 127, "even": 126}


@pytest.mark.parametrize("snap", SNAPS)
def test_zero_blocks_and_the_ends_of_e8m0(snap: str) -> None:
    x = torch.zeros(4, 32)
    x[1, 0], x[2, 0], x[3, 0] = 2.0**-149, 3.4e38, 2.0**-126
    for name in ELEMENTS:
        ours = quantize(x, mx(name, snap))
        assert codes(ours.scale).flatten().tolist()[:2] == [0, 0], "2^-127, and no lower"
        y = dequantize(ours, mx(name, snap))
        assert not y[0].any() and not y.isnan().any()
        smallest = FORMATS[name].tiny * 2.0**-127
        assert abs(float(y[3, 0]) - 2.0**-126) <= smallest / 2, "as near as the element format is at that scale"


# name: floor, even, rceil, ceil: mean SQNR of a Gaussian block in dB, its size uniform over binades
SQNR = {
    "e4m3fn": (31.05, 31.38, 31.74, 31.74),
    "e5m2": (25.57, 25.78, 25.78, 25.78),
    "e2m3": (31.17, 31.21, 31.16, 29.28),
    "e2m1": (18.92, 19.14, 18.79, 17.30),
}


@pytest.mark.parametrize("name", SQNR)
def test_sqnr_of_gaussian_blocks(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1 << 15, 32, generator=generator) * torch.exp2(8 * torch.rand(1 << 15, 1, generator=generator))
    for snap, wanted in zip(("ocp", "even", "rceil", "ceil"), SQNR[name], strict=True):
        error = (quantize_dequantize(x, mx(name, snap)) - x).double().square().sum(1)
        found = (10 * torch.log10(x.double().square().sum(1) / error)).mean()
        assert float(found) == pytest.approx(wanted, abs=0.05), snap


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_short_blocks_under_autocast(dtype: torch.dtype) -> None:
    """A block that is filled up is no business of autocast, which on a CPU concatenates no float16 and no float64."""
    x = torch.randn(5, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = quantize_dequantize(x, mx("e4m3fn"))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantize_dequantize(x, mx("e4m3fn")), wanted)
