# SPDX-License-Identifier: Apache-2.0
"""Sums narrower than float32: against apytypes' accumulator, gfloat's rounding, and `round_to_format` step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gfloat import RoundMode, round_ndarray
from oracles import gfloat_info

from hf_lowprec.formats import Format, get_format, get_sum_format
from hf_lowprec.numerics import accumulate, counter_hash, round_to_format
from hf_lowprec.recipe import Accumulation, Rounding

apy = pytest.importorskip("apytypes")

SEED = 2**40 + 12345
SR13 = Rounding(mode="stochastic", bits=13)


def values(shape: tuple[int, ...], fmt: str = "e5m2", spread: int = 0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if spread:
        x *= 2.0 ** torch.randint(-spread, spread, shape, generator=generator)
    return round_to_format(x, fmt)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def step_by_step(a: torch.Tensor, b: torch.Tensor, how: Accumulation, seed: int) -> torch.Tensor:
    """The definition, with one call of `round_to_format` per addition."""
    (m, k), n = a.shape, len(b)
    index = torch.arange(m * n).view(m, n)

    def rounded(z: torch.Tensor, name: str, step: int) -> torch.Tensor:
        words = counter_hash(seed, (index << 32) | step) if how.rounding.mode == "stochastic" else None
        return round_to_format(z, get_sum_format(name), how.rounding, "saturate", words=words)

    assert how.format is not None
    length, total = how.chunk or k, torch.zeros(m, n)
    for c in range(-(-k // length)):
        s = torch.zeros(m, n)
        for i in range(c * length, min(k, (c + 1) * length)):
            s = rounded(s + a[:, i, None] * b[:, i], how.format, i)
        total = s if how.chunk is None else total + s
        if how.outer is not None:
            total = rounded(total, how.outer, 2**31 + c)
    return total + 0.0


@pytest.mark.parametrize("name", ["e6m9", "e6m5", "e5m10", "e8m7", "tc14", "e6m9flush", "e4m3"])
@pytest.mark.parametrize("mode", ["nearest", "away", "zero", "stochastic"])
def test_every_addition_is_round_to_format(name: str, mode: str) -> None:
    a, b = values((4, 40)), values((5, 40), spread=14, seed=1)
    for chunk, outer in ((None, None), (16, None), (16, "e6m9"), (7, name), (1, "e6m9"), (100, "e6m9")):
        for bits in (4, 9, None) if mode == "stochastic" else (None,):
            how = Accumulation(format=name, rounding=Rounding(mode=mode, bits=bits), chunk=chunk, outer=outer)
            assert same_bits(accumulate(a, b, how, seed=SEED), step_by_step(a, b, how, SEED)), how


def test_pieces_and_batches_do_not_change_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = values((2, 3, 11, 40)), values((2, 3, 9, 40), seed=1)
    for how in (
        Accumulation(format="e6m9", chunk=8, outer="e6m9"),
        Accumulation(format="e6m5", rounding=SR13),
        Accumulation(format="e6m5", rounding=SR13, chunk=8, outer="e6m5"),
    ):
        whole = accumulate(a, b, how, seed=SEED)
        for at_once in (1, 30, 99, 250):
            monkeypatch.setattr("hf_lowprec.numerics.accumulation._AT_ONCE", at_once)
            assert same_bits(accumulate(a, b, how, seed=SEED), whole)
        monkeypatch.undo()
        if how.rounding.mode == "nearest":
            assert same_bits(accumulate(a[1, 2], b[1, 2], how), whole[1, 2])
        # Zeros behind K, as padded operands have them, change nothing.
        wide = (torch.nn.functional.pad(x, (0, 13)) for x in (a, b))
        assert same_bits(accumulate(*wide, how, seed=SEED), whole)
        assert same_bits(accumulate(a, b, how, seed=torch.tensor(SEED)), whole)


@pytest.mark.parametrize("name", ["e6m5", "e6m9", "e5m10"])
def test_nearest_is_apytypes(name: str) -> None:
    """Bit for bit, but for subnormals, which apytypes has in every format: none occur here."""
    fmt = get_format(name)
    assert isinstance(fmt, Format)
    a, b = values((6, 50), spread=3), values((8, 50), spread=3, seed=1)
    x, y = (apy.APyFloatArray.from_float(t.double().numpy(), exp_bits=5, man_bits=2) for t in (a, b.t()))
    with apy.APyFloatAccumulatorContext(
        exp_bits=fmt.exp, man_bits=fmt.man, quantization=apy.QuantizationMode.TIES_EVEN
    ):
        theirs = (x @ y).to_numpy()
    ours = accumulate(a, b, Accumulation(format=name))
    assert np.array_equal(ours.double().numpy(), theirs)
    assert not np.array_equal(theirs, (a @ b.t()).double().numpy())


@pytest.mark.parametrize("bits", [1, 4, 9, 13])
def test_stochastic_is_gfloat_addition_by_addition(bits: int) -> None:
    """StochasticFastest, given the same words."""
    fmt = get_format("e6m9")
    assert isinstance(fmt, Format)
    a, b = values((4, 30)), values((5, 30), seed=1)
    index, s = torch.arange(20).view(4, 5) << 32, np.zeros((4, 5))
    for k in range(30):
        words = (counter_hash(SEED, index | k) & ((1 << bits) - 1)).numpy()
        z = np.float32(s) + np.float32((a[:, k, None] * b[:, k]).numpy())
        s = round_ndarray(
            gfloat_info(fmt), np.float64(z), RoundMode.StochasticFastest, sat=True, srbits=words, srnumbits=bits
        )
    how = Accumulation(format="e6m9", rounding=Rounding(mode="stochastic", bits=bits))
    assert np.array_equal(accumulate(a, b, how, seed=SEED).double().numpy(), s)


def test_stochastic_sums_are_unbiased() -> None:
    """The mean is the exact sum within four standard errors, where nearest rounding is far off."""
    count, k = 2000, 600
    a, b = values((1, k)).abs(), values((1, k), seed=1).abs()
    exact = float((a.double() @ b.double().t()).item())
    how = Accumulation(format="e6m5", rounding=Rounding(mode="stochastic"))
    sums = accumulate(a.expand(count, 1, k), b.expand(count, 1, k), how, seed=SEED).double()
    error = float(sums.std()) / count**0.5
    assert abs(float(sums.mean()) - exact) < 4 * error < 0.01 * exact
    assert abs(float(accumulate(a, b, Accumulation(format="e6m5"))) - exact) > 0.3 * exact


def test_words_of_different_outputs_and_steps_are_independent() -> None:
    """Correlation of the 13 low bits over outputs and steps, the ones beside each other included."""
    index = torch.arange(4096).view(-1, 1) << 32
    words = (counter_hash(SEED, index | torch.arange(64)) & 0x1FFF).double() / 0x1FFF
    words -= 0.5
    assert abs(float(words.mean())) < 4 * (1 / 12 / words.numel()) ** 0.5
    for shifted in (words[1:], words[2:], words[64:]):
        other = words[: len(shifted)]
        assert abs(float((shifted * other).mean())) < 4 / 12 / shifted.numel() ** 0.5
    for step in (1, 2, 16):
        pairs = words[:, step:] * words[:, :-step]
        assert abs(float(pairs.mean())) < 4 / 12 / pairs.numel() ** 0.5


def test_stated_results() -> None:
    how = Accumulation(format="e6m9", chunk=4, outer="e6m9")
    a, b = torch.ones(3, 8), torch.ones(2, 8)
    assert accumulate(a[:, :0], b[:, :0], how).eq(0).all()
    assert accumulate(a[:0], b, how).shape == (0, 2)
    a[1, 5], b[1, 0] = torch.inf, torch.nan
    out = accumulate(a, b, how)
    assert out.isnan().tolist() == [[False, True], [True, True], [False, True]] and out[0, 0] == 8
    big = torch.full((1, 8), 57344.0)
    assert accumulate(big, -big, how).item() == -get_format("e6m9").max
    assert accumulate(big, big, Accumulation(format="e6m5", rounding=SR13), seed=1).item() == get_format("e6m5").max
    tiny = torch.full((1, 8), 2.0**-16)
    assert accumulate(tiny, tiny, Accumulation(format="e6m5")).item() == 0.0  # 2^-32 each: flushed
    assert accumulate(tiny, tiny, Accumulation(format="e6m9")).item() == 2.0**-29
    minus = accumulate(-tiny, tiny, Accumulation(format="e6m5"))
    assert minus.item() == 0.0 and not minus.signbit().any()


def test_errors() -> None:
    a = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"a is \[..., M, K\]"):
        accumulate(a, a[:, :3], Accumulation(format="e6m9"))
    with pytest.raises(ValueError, match=r"torch.matmul"):
        accumulate(a, a, Accumulation())
    with pytest.raises(ValueError, match="needs a seed"):
        accumulate(a, a, Accumulation(format="e6m5", rounding=SR13))


def test_formats_of_sums() -> None:
    tc14 = get_sum_format("tc14")
    assert (tc14.exp, tc14.man, str(tc14)) == (8, 13, "e8m13ieee") and get_sum_format(str(tc14)) == tc14
    assert get_sum_format("e6m9") == get_format("e6m9")
    for name in ("nf4", "e8m0u", "e4m3normal0", "e0m8u", "e8m13", "e8m23ieee"):
        with pytest.raises(ValueError):
            get_sum_format(name)


def relative_error(how: Accumulation, n: int) -> float:
    """benchmarks/accumulation_table.py at small N: sums of uniform E5M2 values."""
    a = round_to_format(torch.rand(64, 1, n, generator=torch.Generator().manual_seed(7)), "e5m2")
    b, exact = torch.ones_like(a), a.double().sum(-1, keepdim=True)
    return float(((accumulate(a, b, how, seed=SEED).double() - exact).abs() / exact).mean())


def test_nearest_sums_stall_and_chunks_or_random_bits_do_not() -> None:
    """arXiv 1812.08011, figure 3, and arXiv 2404.14010: what the recipes are for."""
    e6m9, chunked = Accumulation(format="e6m9"), Accumulation(format="e6m9", chunk=64, outer="e6m9")
    e6m5 = Accumulation(format="e6m5")
    errors = {n: relative_error(e6m9, n) for n in (1024, 4096)}
    assert errors[1024] < 0.02 and 0.45 < errors[4096] < 0.55, "1024 is where a value below 1 rounds away"
    assert relative_error(chunked, 4096) < 0.005
    assert 0.85 < relative_error(e6m5, 1024) < 0.9
    stochastic = {
        bits: relative_error(Accumulation(format="e6m5", rounding=Rounding(mode="stochastic", bits=bits)), 4096)
        for bits in (4, 7, 13)
    }
    assert stochastic[4] > 0.5 > 0.2 > stochastic[7] > 0.09 > stochastic[13]
    assert relative_error(Accumulation(format="e6m5", rounding=SR13, chunk=64, outer="e6m5"), 4096) < 0.05
