# SPDX-License-Identifier: Apache-2.0
"""eXmY: every layout of 2 to 9 bits, what some of them are in disguise, and exponents aligned with the data."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from gfloat import decode_float
from oracles import gfloat_info, gfloat_round
from torch import Tensor

from hf_lowprec.formats import Format, get_format
from hf_lowprec.numerics import decode, encode, expand_scale, quantize, quantize_dequantize
from hf_lowprec.presets.exmy import aligned

LAYOUTS = [(exp, bits - 1 - exp) for bits in range(2, 10) for exp in range(min(bits, 8))]
SEVEN = [f"exmy:e{exp}m{6 - exp}" for exp in range(7)]


def data(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 48, generator=generator) * torch.exp2(3 * torch.randn(64, 1, generator=generator))
    return torch.cat([x, torch.zeros(1, 48)])


def ids(layout: tuple[int, int]) -> str:
    return f"e{layout[0]}m{layout[1]}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=ids)
def test_every_code_is_gfloats(layout: tuple[int, int]) -> None:
    fmt = Format(*layout)
    codes = torch.arange(1 << fmt.bits).to(torch.uint8 if fmt.bits <= 8 else torch.int16)
    values = decode(codes, fmt, torch.float64).numpy()
    np.testing.assert_array_equal(values, [decode_float(gfloat_info(fmt), c).fval for c in range(1 << fmt.bits)])
    assert torch.equal(encode(torch.from_numpy(values), fmt), codes)


@pytest.mark.parametrize("group", ["", "/row"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=ids)
def test_the_top_binade_is_that_of_the_largest_element(layout: tuple[int, int], group: str) -> None:
    fmt, quant = Format(*layout), aligned(f"exmy:{ids(layout)}{group}")
    x = data()
    scale = quantize(x, quant).scale.float()
    amax = x.abs().amax(1, keepdim=True) if group else x.abs().max()
    z = torch.where(amax > 0, amax / scale, 2.0**fmt.emax)
    assert bool(((z >= 2.0**fmt.emax) & (z < 2.0 ** (fmt.emax + 1))).all())
    # And the values are those of the format in gfloat, saturating.
    y = quantize_dequantize(x, quant)
    theirs = gfloat_round(fmt, (x / scale).double().numpy(), "nearest", saturate=True)
    np.testing.assert_array_equal(y.numpy(), (theirs * expand_scale(scale, x.shape, quant.scaling).numpy()))


@pytest.mark.parametrize("man", range(1, 8))
def test_one_exponent_bit_is_an_integer(man: int) -> None:
    """e1mY = e0m(Y+1) up to the scale, and so the same quantiser, bit for bit."""
    one, none = Format(1, man), Format(0, man + 1)
    ratio = one.max / none.max
    assert one.values() == tuple(ratio * v for v in none.values())
    for group in ("", "/row"):
        a, b = (quantize_dequantize(data(), aligned(f"exmy:e{e}m{m}{group}")) for e, m in ((1, man), (0, man + 1)))
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_no_exponent_bits_are_mxint8_without_its_minus_two() -> None:
    ours = set(get_format("e0m7").values())
    theirs = {n / 64 for n in range(-128, 128)}
    assert theirs - ours == {-2.0} and ours <= theirs
    assert decode_float(gfloat_info(Format(0, 7)), 127).fval == 127 / 64 == max(ours)


@pytest.mark.parametrize("exp", range(1, 8))
def test_no_mantissa_bits_are_powers_of_two_and_zero(exp: int) -> None:
    values = Format(exp, 0).values()
    positive = [v for v in values if v > 0]
    assert len(values) == 2 ** (exp + 1) - 1 and 0.0 in values
    assert [b / a for a, b in pairwise(positive)] == [2.0] * (len(positive) - 1)
    assert all(float(np.log2(v)).is_integer() for v in positive)


def test_two_bits_are_ternary() -> None:
    assert Format(0, 1).values() == (-1.0, 0.0, 1.0) and Format(1, 0).values() == (-2.0, 0.0, 2.0)


def test_seven_bits_trade_range_for_precision() -> None:
    """On numbers of one size integers win, over many binades exponents do; every layout of 7 bits runs."""
    flat, wide = torch.rand(64, 64) + 0.5, torch.exp2(20 * torch.rand(64, 64))
    error = {}
    for name in SEVEN:
        for kind, x in (("flat", flat), ("wide", wide)):
            y = quantize_dequantize(x, aligned(name))
            error[name, kind] = float(((y - x) / x).abs().mean())
    assert min(SEVEN, key=lambda n: error[n, "flat"]) in ("exmy:e0m6", "exmy:e1m5")
    assert min(SEVEN, key=lambda n: error[n, "wide"]) in ("exmy:e5m1", "exmy:e4m2")


def test_no_nan_and_so_the_whole_group() -> None:
    x = data()
    x[3, 4] = float("inf")
    assert quantize_dequantize(x, aligned("exmy:e4m3")).isnan().all(), "one exponent: nobody else could say so"
    rows = quantize_dequantize(x, aligned("exmy:e4m3/row"))
    assert rows[3].isnan().all() and torch.equal(rows[4:], quantize_dequantize(x[4:], aligned("exmy:e4m3/row")))
    assert aligned("exmy:e4m3").format == "e4m3none", "not IEEE's e4m3, whose top exponent is Inf and NaN"


@pytest.mark.parametrize("snap", ["ocp", "rceil", "ceil", "even"])
def test_other_alignments(snap: str) -> None:
    quant = aligned("exmy:e3m1/row")
    quant = replace(quant, scaling=replace(quant.scaling, snap=snap))
    y = quantize_dequantize(data(), quant)
    assert float((y - data()).abs().max()) < float(data().abs().max())
