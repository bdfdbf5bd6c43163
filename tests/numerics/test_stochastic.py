# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding: gfloat's bits given its words, the right mean, and words that depend on (seed, index) alone."""

import numpy as np
import pytest
import torch
from oracles import edge_inputs, gfloat_codes, half_inputs, random_inputs, without_nan

from hf_lowprec.formats import FORMATS, Format, get_format
from hf_lowprec.numerics import counter_hash, encode, round_to_format, rounding
from hf_lowprec.numerics.codes import carrier_of, random_bits
from hf_lowprec.numerics.hashing import folded
from hf_lowprec.numerics.rounding import _general
from hf_lowprec.recipe import Rounding

NAMES = ["e4m3fn", "e5m2", "e5m10", "e8m7", "e2m1", "e6m5", "e6m9", "e4m3b8", "e0m7", "e8m0u"]


def sr(bits: int | None = None) -> Rounding:
    return Rounding(mode="stochastic", bits=bits)


@pytest.mark.parametrize("bits", [1, 4, 9, 13, "all"])
@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e5m10", "e8m7", "e2m1", "e6m5", "e6m9", "e4m3b8", "e0m7"])
def test_gfloat_rounds_alike_given_the_words(name: str, bits: int | str) -> None:
    fmt = FORMATS[name]
    assert isinstance(fmt, Format)
    r = 23 - fmt.man if bits == "all" else int(bits)
    x = np.concatenate([half_inputs()[::3], edge_inputs(fmt), random_inputs(1 << 12)])
    x = without_nan(fmt, x)
    words = np.random.default_rng(1).integers(0, 1 << 31, len(x))
    got = encode(torch.from_numpy(x), fmt, sr(r), "saturate_inf", words=torch.from_numpy(words))
    want = gfloat_codes(fmt, x, "stochastic", saturate=True, srbits=words % (1 << r), srnumbits=r)
    np.testing.assert_array_equal(got.to(torch.int64).numpy() & 0xFFFF, want)


@pytest.mark.parametrize("name", [*NAMES, "e4m3b11", "e2m3b5", "e3m0", "e6m5gradual"])
@pytest.mark.parametrize("bits", [3, None])
def test_the_short_way_has_the_bits_of_the_general_one(
    name: str, bits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices with and without values beyond the format, a short last slice, subnormals, Inf and NaN."""
    monkeypatch.setattr(rounding, "_CHUNK", 1 << 14)
    fmt = get_format(name)
    x = torch.randn((1 << 16) + 77, generator=torch.Generator().manual_seed(0))
    x[1 << 15 :] *= torch.exp2(torch.arange(len(x) - (1 << 15)) % 80 - 40.0)
    edges = torch.from_numpy(edge_inputs(fmt, limit=300))
    x[-len(edges) :] = edges
    r = random_bits(sr(bits), fmt)
    words = counter_hash(9, len(x)) & ((1 << r) - 1)
    want = _general(x.to(carrier_of(fmt, x.dtype).dtype), fmt, sr(bits), "saturate", words).float()
    for got in (round_to_format(x, fmt, sr(bits), seed=9), round_to_format(x, fmt, sr(bits), words=words.long())):
        same = (got.view(torch.int32) == want.view(torch.int32)) | (got.isnan() & want.isnan())
        assert same.all()


def test_float64_input_takes_the_same_words() -> None:
    x = torch.randn(4000)
    words = counter_hash(3, 4000)
    for bits in (4, 13, None):
        assert torch.equal(
            round_to_format(x.double(), "e4m3fn", sr(bits), words=words).float(),
            round_to_format(x, "e4m3fn", sr(bits), words=words),
        )


@pytest.mark.parametrize("bits", [1, 4, 9, 13, 20])
def test_mean_is_x_truncated_to_r_bits(bits: int) -> None:
    """Up with probability floor(2^r d) / 2^r: the mean over words is x with its dropped part cut to r bits."""
    n = 1 << 14
    fmt = FORMATS["e4m3fn"]
    for i, value in enumerate([1.03, -3.3, 0.0151, 0.0007, 300.1]):
        size = abs(value)
        ulp = max(2.0 ** np.floor(np.log2(size)), fmt.min_normal) / 8
        truncated = np.floor(size / ulp * 2**bits) / 2**bits * ulp
        got = round_to_format(torch.full((n,), value), fmt, sr(bits), seed=100 + i).double().abs()
        d = truncated / ulp % 1
        sigma = ulp * np.sqrt(d * (1 - d) / n)
        assert abs(got.mean().item() - truncated) <= 4 * sigma + 1e-12
        assert set(got.unique().tolist()) <= {np.floor(size / ulp) * ulp, (np.floor(size / ulp) + 1) * ulp}


def test_normal0_rounds_up_in_proportion_below_its_least_value() -> None:
    fmt = get_format("e4m3b11normal0")
    x = torch.full((1 << 16,), fmt.tiny * 0.3)
    up = (round_to_format(x, fmt, sr(), seed=5) == fmt.tiny).double().mean().item()
    assert abs(up - 0.3) < 4 * np.sqrt(0.3 * 0.7 / (1 << 16))


def test_codebook_rounds_up_in_proportion() -> None:
    book = FORMATS["nf4"]
    low, high = book.values[9], book.values[10]
    x = torch.full((1 << 16,), low + 0.25 * (high - low))
    got = round_to_format(x, book, sr(), seed=5)
    assert set(got.unique().tolist()) == {low, high}
    assert abs((got == high).double().mean().item() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / (1 << 16))


@pytest.mark.parametrize("name", NAMES)
def test_values_on_the_grid_stay(name: str) -> None:
    fmt = get_format(name)
    assert isinstance(fmt, Format)
    values = torch.tensor([v for v in fmt.values() if v])
    assert torch.equal(round_to_format(values, fmt, sr(), seed=1), values)


def test_slices_and_layout_do_not_change_the_words() -> None:
    x = torch.randn(400, 500)  # several slices of the CPU path
    whole = round_to_format(x, "e4m3fn", sr(9), seed=11)
    words = counter_hash(11, x.numel())
    assert torch.equal(round_to_format(x, "e4m3fn", sr(9), words=words), whole)
    assert torch.equal(round_to_format(x.t().contiguous().t(), "e4m3fn", sr(9), seed=11), whole)
    assert not torch.equal(round_to_format(x, "e4m3fn", sr(9), seed=12), whole)


# --- the words ------------------------------------------------------------------------------------------------------


def reference_word(seed: int, i: int) -> int:
    """The docstring's formula in Python integers."""
    low = 0xFFFFFFFF

    def mix(h: int) -> int:
        h ^= h >> 16
        h = h * 0x7FEB352D & low
        h ^= h >> 15
        h = h * 0x846CA68B & low
        return h ^ h >> 16

    k0 = mix(seed & low ^ 0x9E3779B9)
    k1 = mix(seed >> 32 & low ^ k0)
    h = i & low ^ k0
    h ^= h >> 16
    h = h * 0x7FEB352D & low
    h ^= k1 ^ mix(i >> 32)
    h ^= h >> 15
    h = h * 0x846CA68B & low
    return h ^ h >> 16


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 5, 2**63 - 1, -1])
def test_counter_hash_is_its_formula(seed: int) -> None:
    indices = [0, 1, 2, 12345, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7]
    want = [reference_word(seed & 2**64 - 1, i) for i in indices]
    for given in (seed, torch.tensor(seed)):
        got = counter_hash(given, torch.tensor(indices))
        assert got.dtype == torch.int32
        assert (got.to(torch.int64) & 0xFFFFFFFF).tolist() == want


@pytest.mark.parametrize("n", [1, 100, 150000])
@pytest.mark.parametrize("start", [0, 1000, 3 << 18, 2**31 - 50, 2**31, 2**32 - 50, 2**32, 2**35 + 1])
def test_counter_hash_of_a_range(start: int, n: int) -> None:
    want = counter_hash(9, torch.arange(start, start + n))
    assert torch.equal(counter_hash(9, n, start=start), want)
    if start >> 32 == (start + n - 1) >> 32:
        assert torch.equal(counter_hash(torch.tensor(9), n, start=start), want)
    buffers = torch.empty(n, dtype=torch.int32), torch.empty(n, dtype=torch.int32), folded(n)
    assert counter_hash(9, n, start=start, buffers=buffers) is buffers[0] and torch.equal(buffers[0], want)


def test_counter_hash_bits_are_balanced_and_seeds_unrelated() -> None:
    n = 1 << 16
    words = torch.stack([counter_hash(seed, n) for seed in (0, 1, 2, 2**32)])
    bits = (words[:, :, None] >> torch.arange(32, dtype=torch.int32)) & 1
    sigma = 0.5 / np.sqrt(n)
    assert ((bits.float().mean(1) - 0.5).abs() < 5 * sigma).all()  # 128 bit positions
    for a in range(4):
        for b in range(a):
            same = (bits[a] == bits[b]).float().mean(0)
            assert ((same - 0.5).abs() < 5 * sigma).all()
            assert not torch.equal(words[a].sort().values, words[b].sort().values)  # no reordering of one sequence
