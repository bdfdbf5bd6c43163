# SPDX-License-Identifier: Apache-2.0
"""Ranges and mantissa widths as tensors: the bits of ordinary formats, the paper's formula, its gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_lowprec import numerics
from hf_lowprec.numerics.flexible import (
    flexible,
    format_of,
    gradients,
    layout,
    least_man,
    rounded_man,
    scale_of,
    splits,
)
from hf_lowprec.recipe import Quant

SETTINGS = [(e, 7 - e, maxval) for e in (5, 4, 3, 2) for maxval in (0.037, 1.0, 5.7, 4096.3)]


def noise(n: int, seed: int = 0) -> Tensor:
    """Normal numbers over 16 octaves, and zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * torch.exp2(torch.randint(-12, 4, (n,), generator=generator).float())
    x[:2] = torch.tensor([0.0, -0.0])
    return x


def by_bias(x: Tensor, e: int, m: int, maxval: float) -> Tensor:
    """The quantiser with a real-valued exponent bias, in float64, written from the formulas of arXiv 2208.09225."""
    bias = 2.0**e - math.log2(maxval) + math.log2(2 - 2.0**-m) - 1
    clipped = x.double().clamp(-maxval, maxval)
    p = torch.floor(torch.log2(clipped.abs()) + bias).clamp(min=1.0)
    step = torch.exp2(p - m - bias)
    return torch.round(clipped / step) * step


@pytest.mark.parametrize(("e", "m", "maxval"), SETTINGS)
def test_equals_the_formula_with_a_bias(e: int, m: int, maxval: float) -> None:
    """0 differences: both give the same value of the grid, in float64, where no tie is decided by rounding errors."""
    x = noise(20000, seed=e).double() * maxval
    fmt = format_of(m, 8)
    scale = maxval / fmt.max
    ours = numerics.round_to_format(x / scale, fmt) * scale
    theirs = by_bias(x, e, m, maxval)
    smallest = fmt.tiny * scale
    assert int(((ours - theirs).abs() > 1e-9 * theirs.abs() + 1e-6 * smallest).sum()) == 0
    # The float32 version: the same but for elements within float32's error of a tie.
    low = flexible(x.float(), torch.tensor(maxval), torch.tensor(float(m)), 8)
    differ = (low.double() - theirs).abs() > 1e-5 * theirs.abs() + smallest * 1e-5
    assert float(differ.double().mean()) < 1e-4


@pytest.mark.parametrize("bits", [3, 4, 6, 8, 9, 12])
def test_every_split_is_the_ordinary_format(bits: int) -> None:
    x = noise(4000)
    maxval = torch.tensor(2.7)
    for m in range(least_man(bits), bits):
        fmt = format_of(m, bits)
        expected = numerics.quantize_dequantize(x, Quant(format=str(fmt)), scale=maxval / fmt.max)
        found = flexible(x, maxval, torch.tensor(float(m)), bits)
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32)), f"{fmt}: bits, signs of zero included"
    assert format_of(bits - 1, bits).exp == 0, "the last split is the integers"


def test_rows_have_ranges_of_their_own_and_dtypes_pass() -> None:
    x = noise(96).view(4, 24)
    maxval = torch.tensor([[0.5], [1.0], [3.0], [70.0]])
    whole = flexible(x, maxval, torch.tensor(3.0), 8)
    for row in range(4):
        assert torch.equal(whole[row], flexible(x[row], maxval[row], torch.tensor(3.0), 8))
    half = x.bfloat16()
    assert torch.equal(
        flexible(half, maxval, torch.tensor(3.0), 8), flexible(half.float(), maxval, torch.tensor(3.0), 8)
    )


def test_edges() -> None:
    man, maxval = torch.tensor(3.0), torch.tensor(2.0)
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 2.0, -0.0, 0.0])
    q = flexible(x, maxval, man, 8)
    assert q[:3].isnan().all() and q[3:6].tolist() == [2.0, -2.0, 2.0], "no finite number overflows on the way"
    assert math.copysign(1.0, q[6]) == -1.0 and math.copysign(1.0, q[7]) == 1.0
    assert not flexible(torch.zeros(3), torch.zeros(()), man, 8).any(), "a range that was not found yet"
    assert float(scale_of(torch.tensor(1e-45), layout(man, 8))) == 2.0**-126


def test_widths_are_whole_and_within_what_there_is() -> None:
    wide = torch.tensor([-3.0, 0.4, 2.5, 3.5, 6.6, 99.0])
    assert rounded_man(wide, 8).tolist() == [1, 1, 2, 4, 7, 7]
    assert (list(splits(8)), list(splits(3)), list(splits(12))) == ([*range(1, 7)], [1], [*range(4, 11)])
    for bits, man in ((8, 0), (8, 8), (12, 3)):
        with pytest.raises(ValueError, match=f"{bits} bits hold"):
            format_of(man, bits)


def smooth(x: Tensor, residue: Tensor, p: Tensor, maxval: Tensor, man: Tensor, bits: int) -> Tensor:
    """The quantiser where `round(u)` is u + residue and p is held: differentiable in maxval and M (float64)."""
    bias = torch.exp2(bits - 1 - man) - maxval.log2() + torch.log2(2 - torch.exp2(-man)) - 1
    clipped = torch.where(x.abs() <= maxval, x, x.sign() * maxval)
    step = torch.exp2(p - man - bias)
    return (clipped / step + residue) * step


@pytest.mark.parametrize(("bits", "m", "maxval"), [(8, 3, 1.7), (8, 2, 0.2), (8, 5, 3.3), (6, 2, 1.1), (4, 1, 0.9)])
def test_gradients_are_finite_differences_of_the_straight_through_quantiser(bits: int, m: int, maxval: float) -> None:
    x = noise(300, seed=m).double()
    e = bits - 1 - m
    bias = 2.0**e - math.log2(maxval) + math.log2(2 - 2.0**-m) - 1
    clipped = x.clamp(-maxval, maxval)
    p = torch.floor(torch.log2(clipped.abs()) + bias).clamp(min=1.0)
    u = clipped / torch.exp2(p - m - bias)
    residue = torch.round(u) - u
    grad = torch.randn(300, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def loss(maxval: float, man: float) -> float:
        at = torch.tensor(maxval, dtype=torch.float64), torch.tensor(man, dtype=torch.float64)
        return float((grad * smooth(x, residue, p, *at, bits)).sum())

    h = 1e-6
    by_maxval = (loss(maxval + h, m) - loss(maxval - h, m)) / (2 * h)
    by_man = (loss(maxval, m + h) - loss(maxval, m - h)) / (2 * h)
    q = by_bias(x, e, m, maxval).float()
    found = gradients(grad, x, q, torch.tensor(maxval), torch.tensor(float(m)), bits)
    scale = float(grad.abs().sum()) * maxval
    assert float(found.maxval) == pytest.approx(by_maxval, rel=1e-3, abs=1e-6 * scale)
    assert float(found.man) == pytest.approx(by_man, rel=1e-3, abs=1e-5 * scale)
    assert torch.equal(found.x, torch.where(x.abs() <= maxval, grad, 0.0).float())


def test_gradients_of_rows_and_of_what_is_not_finite() -> None:
    x = torch.tensor([[0.3, 5.0, -5.0], [0.3, 0.1, float("inf")]])
    grad = torch.tensor([[1.0, 2.0, 4.0], [1.0, 1.0, 8.0]])
    maxval, man = torch.tensor([[1.0], [2.0]]), torch.tensor(3.0)
    q = flexible(x, maxval, man, 8)
    found = gradients(grad, x, q, maxval, man, 8)
    error = (q - x)[:, 0] / maxval[:, 0]
    expected = torch.stack([error[0] + 2.0 - 4.0, error[1] + (q - x)[1, 1] / 2.0])
    assert torch.allclose(found.maxval[:, 0], expected) and found.maxval.shape == maxval.shape
    assert found.x.tolist() == [[1.0, 0.0, 0.0], [1.0, 1.0, 8.0]] and found.man.shape == ()
