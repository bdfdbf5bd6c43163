# SPDX-License-Identifier: Apache-2.0
"""quantize, dequantize and quantize_dequantize: one arithmetic, every granularity, stated results for bad elements."""

import pytest
import torch

from hf_lowprec.formats import get_format
from hf_lowprec.numerics import (
    amax_per_group,
    dequantize,
    encode,
    quantize,
    quantize_dequantize,
    scale_from_amax,
    sqnr,
)
from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import Quant, Rounding, Scaling

INF, NAN = float("inf"), float("nan")


def mx(name: str, snap: str = "ocp", k: int = 32) -> Quant:
    return Quant(format=name, scaling=Scaling(granularity="block", block=(k,), snap=snap, store="e8m0"))


QUANTS = [
    Quant(format="e4m3fn"),
    Quant(format="e5m2", scaling=Scaling(snap="rceil")),
    Quant(format="e4m3fn", scaling=Scaling(granularity="row")),
    Quant(format="e4m3fn", scaling=Scaling(granularity="column", snap="rceil")),
    Quant(format="e4m3fn", scaling=Scaling(granularity="tile", block=(3, 16))),
    Quant(format="e3m1", scaling=Scaling(granularity="row", snap="ocp")),
    Quant(format="e5m10", scaling=Scaling(snap="rceil")),
    Quant(format="e6m9", scaling=Scaling(method="none")),
    Quant(format="nf4", scaling=Scaling(granularity="block", block=(16,))),
    Quant(format="e4m3fn", scaling=Scaling(method="static", exponent=-2)),
    mx("e4m3fn"),
    mx("e2m1"),
    mx("e3m2", "even"),
    mx("e0m7", "rceil"),
    mx("e2m1", k=5),  # does not divide the axis
]


def naive(x: torch.Tensor, quant: Quant) -> torch.Tensor:
    """Group by group, in the open."""
    fmt, scaling = get_format(quant.format), quant.scaling
    x = x.float()
    out = torch.empty_like(x)
    m, n = x.shape
    block = {
        "tensor": (m, n),
        "row": (1, n),
        "column": (m, 1),
        "block": (1, *scaling.block),
        "tile": scaling.block,
    }[scaling.granularity]
    for i in range(0, m, block[0]):
        for j in range(0, n, block[1]):
            group = x[i : i + block[0], j : j + block[1]]
            scale = scale_from_amax(group.abs().amax(), fmt, scaling)
            values = [fmt.decode(fmt.encode(v)) for v in (group * (1 / scale)).flatten().tolist()]
            out[i : i + block[0], j : j + block[1]] = torch.tensor(values).view(group.shape) * scale
    return out


@pytest.mark.parametrize("quant", QUANTS, ids=lambda q: f"{q.format}-{q.scaling.granularity}-{q.scaling.snap}")
def test_quantize_is_the_naive_loop(quant: Quant) -> None:
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 64)
    x[1, 3:9] = 0
    scaled = quantize(x, quant)
    assert scaled.qdata.shape == x.shape
    want = naive(x, quant)
    assert torch.equal(dequantize(scaled, quant), want)
    assert torch.equal(quantize_dequantize(x, quant), want)
    half = x.bfloat16()
    assert torch.equal(dequantize(quantize(half, quant), quant, torch.bfloat16), quantize_dequantize(half, quant))
    assert quantize_dequantize(half, quant).dtype == torch.bfloat16


@pytest.mark.parametrize("quant", QUANTS, ids=lambda q: f"{q.format}-{q.scaling.granularity}-{q.scaling.snap}")
def test_large_tensors_go_in_slices(quant: Quant) -> None:
    """Larger than a slice of the CPU path, whose length no row or block divides."""
    x = torch.randn(101, 1920)
    whole = quantize_dequantize(x, quant)
    scaled = quantize(x, quant)
    assert torch.equal(dequantize(scaled, quant), whole)
    if quant.scaling.granularity in ("row", "block"):
        rows = torch.cat([quantize_dequantize(row[None], quant) for row in x[:5]])
        assert torch.equal(rows, whole[:5])
        assert torch.equal(quantize(x[3:4], quant).qdata.view(torch.uint8), scaled.qdata[3:4].view(torch.uint8))


def test_storage() -> None:
    x = torch.randn(4, 64)
    assert quantize(x, QUANTS[0]).qdata.dtype == torch.float8_e4m3fn
    assert quantize(x, Quant(format="e5m10")).qdata.dtype == torch.float16
    fp4 = quantize(x, mx("e2m1"))
    assert (fp4.qdata.dtype, fp4.scale.dtype, fp4.scale.shape) == (torch.uint8, torch.float8_e8m0fnu, (4, 2))
    assert torch.equal(fp4.qdata, encode(x / fp4.scale.float().repeat_interleave(32, 1), "e2m1"))
    assert quantize(x, Quant(format="e6m9", scaling=Scaling(method="none"))).qdata.dtype == torch.int16


def test_blocks_along_another_axis() -> None:
    x = torch.randn(64, 3, 5)
    quant = mx("e4m3fn")
    moved = quantize_dequantize(x.movedim(0, -1).contiguous(), quant).movedim(-1, 0)
    assert torch.equal(quantize_dequantize(x, quant, reduction_axis=0), moved)
    scaled = quantize(x, quant, reduction_axis=0)
    assert scaled.scale.shape == (2, 3, 5)
    assert torch.equal(dequantize(scaled, quant, reduction_axis=0), moved)


def test_mx_blocks_and_their_transpose_are_two_quantisations() -> None:
    """The same tensor along its two axes gives different values: both copies come from the source."""
    x = torch.randn(64, 64) * torch.logspace(-3, 3, 64)
    assert not torch.equal(
        quantize_dequantize(x, mx("e4m3fn")), quantize_dequantize(x, mx("e4m3fn"), reduction_axis=0)
    )


def test_a_given_scale_is_used() -> None:
    x = torch.tensor([1.0, 100.0, 1000.0])
    quant = PRESETS["fp8-lm"].fprop.input
    assert quant is not None
    with pytest.raises(ValueError, match="delayed"):
        quantize(x, quant)
    scaled = quantize(x, quant, scale=torch.tensor(0.25))
    assert scaled.scale == 0.25
    assert dequantize(scaled, quant).tolist() == [1.0, 96.0, 112.0]  # a tie, and 448 * 0.25


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("quant", [QUANTS[0], QUANTS[2], mx("e4m3fn")], ids=lambda q: q.scaling.granularity)
def test_a_bad_element_is_nan_alone(quant: Quant, bad: float) -> None:
    x = torch.randn(6, 64)
    x[2, 7] = 0.0
    clean = quantize_dequantize(x, quant)
    x[2, 7] = bad
    got = quantize_dequantize(x, quant)
    scaled = quantize(x, quant)
    assert torch.equal(dequantize(scaled, quant).isnan(), got.isnan())
    assert got[2, 7].isnan() and got.isnan().sum() == 1
    got[2, 7] = 0.0
    assert torch.equal(got, clean)


@pytest.mark.parametrize("bad", [INF, NAN])
def test_a_format_without_nan_loses_the_block(bad: float) -> None:
    """OCP MX v1.0: the scale is NaN. `nonfinite="group"` asks the same of any format, as microxcaling does."""
    x = torch.randn(2, 64)
    x[1, 40] = bad
    for quant, how in ((mx("e2m1"), "element"), (mx("e4m3fn"), "group")):
        scaled = quantize(x, quant, nonfinite=how)
        assert scaled.scale.view(torch.uint8)[1, 1] == 255
        for got in (dequantize(scaled, quant), quantize_dequantize(x, quant, nonfinite=how)):
            assert got[1, 32:].isnan().all() and got.isnan().sum() == 32
    fixed = Quant(format="e2m1", scaling=Scaling(method="none"))
    with pytest.raises(ValueError, match="no NaN"):
        quantize(x, fixed)


def test_zero_blocks_and_empty_tensors() -> None:
    for quant in QUANTS:
        assert torch.equal(quantize_dequantize(torch.zeros(6, 64), quant), torch.zeros(6, 64))
        assert quantize_dequantize(torch.empty(0, 64), quant).shape == (0, 64)
        scaled = quantize(torch.empty(0, 64), quant)
        assert dequantize(scaled, quant).shape == (0, 64)
    assert quantize(torch.zeros(1, 32), mx("e2m1")).scale.view(torch.uint8).item() == 0


def test_stochastic_rounding_with_a_scale() -> None:
    quant = Quant(format="e4m3fn", scaling=Scaling(snap="rceil"), rounding=Rounding(mode="stochastic"))
    x = torch.full((1 << 15,), 1.0)
    x[0], x[1:] = 448.0, 1.03
    got = quantize_dequantize(x, quant, seed=4)
    assert got[1:].unique().tolist() == [1.0, 1.125]
    assert got[1:].double().mean().item() == pytest.approx(1.03, abs=4 * 0.125 * 0.5 / 2**7.5)
    assert torch.equal(dequantize(quantize(x, quant, seed=torch.tensor(4)), quant), got)
    with pytest.raises(ValueError, match="seed"):
        quantize(x, quant)


@pytest.mark.parametrize(
    ("name", "floor", "even", "rceil", "ceil"),
    [
        ("e4m3fn", 31.05, 31.38, 31.74, 31.74),
        ("e5m2", 25.57, 25.78, 25.78, 25.78),
        ("e2m3", 31.17, 31.21, 31.16, 29.28),
        ("e2m1", 18.92, 19.14, 18.79, 17.30),
    ],
)
def test_mx_error_on_gaussian_blocks(name: str, floor: float, even: float, rceil: float, ceil: float) -> None:
    """Mean SQNR per block of 32, dB; the order of the rules is the point: RCEIL for 8 bits, EVEN for FP4."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16384, 32, generator=generator) * 2 ** torch.rand(16384, 1, generator=generator)
    for snap, want in (("ocp", floor), ("even", even), ("rceil", rceil), ("ceil", ceil)):
        y = quantize_dequantize(x, mx(name, snap))
        blocks = 20 * torch.log10(x.norm(dim=1) / (x - y).norm(dim=1))
        assert blocks.mean().item() == pytest.approx(want, abs=0.05), snap


def test_torchao_gives_the_same_mx_values() -> None:
    mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    x = torch.randn(512, 64) * 2.0 ** torch.randint(-30, 30, (512, 1))
    types = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e2m1": torch.float4_e2m1fn_x2}
    for name, dtype in types.items():
        for snap, mode in (("ocp", "FLOOR"), ("even", "EVEN"), ("ceil", "CEIL"), ("rceil", "RCEIL")):
            theirs = mx_tensor.MXTensor.to_mx(x, dtype, 32, getattr(mx_tensor.ScaleCalculationMode, mode))
            assert torch.equal(quantize_dequantize(x, mx(name, snap)), theirs.dequantize(torch.float32)), (name, snap)


def test_presets_have_the_error_their_format_promises() -> None:
    x = torch.randn(256, 256)
    for name in ("te-current", "fp8-amax"):
        recipe = PRESETS[name]
        assert recipe.fprop.input is not None and recipe.dgrad.grad_output is not None
        assert sqnr(x, quantize_dequantize(x, recipe.fprop.input)) > 31
        assert sqnr(x, quantize_dequantize(x, recipe.dgrad.grad_output)) > 25
    assert amax_per_group(x, Scaling()) == x.abs().max()
