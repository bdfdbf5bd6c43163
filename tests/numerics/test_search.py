# SPDX-License-Identifier: Apache-2.0
"""Ranges and splits by squared error, by the amax, by quantiles; from tensors and from histograms of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_lowprec.numerics.flexible import flexible, splits
from hf_lowprec.numerics.search import Histogram, column_energy, magnitudes_of, quantile, search, squared_error


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(n: int = 1 << 14) -> Tensor:
    x = normal(n)
    x[:: n // 16] *= 60
    return x


def error(x: Tensor, maxval: Tensor, man: Tensor) -> float:
    return float((flexible(x, maxval, man, 8) - x).double().square().sum())


SAMPLES = {"normal": normal(1 << 14), "uniform": torch.rand(1 << 14) * 2 - 1, "outliers": with_outliers()}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("man", [2, 3, 6])
def test_mse_is_close_to_the_best_range_there_is(name: str, man: int) -> None:
    """Within 2 %; within 25 % (1 dB) where 16 outliers make up the error, each of which prefers another range."""
    x = SAMPLES[name]
    found = search(magnitudes_of(x, rows=False), 8, [man])
    every = x.abs().max() * torch.exp2(torch.arange(-6 * 64, 64) / 64.0)
    errors = squared_error(magnitudes_of(x, rows=False), every[None], torch.tensor(float(man)), 8)
    assert float(found.error) <= (1.25 if name == "outliers" else 1.02) * float(errors.min())
    assert error(x, found.maxval[0, 0], torch.tensor(float(man))) == pytest.approx(float(found.error), rel=1e-6)


def test_the_split_is_the_one_of_the_least_error() -> None:
    """More outliers, more exponent bits (arXiv 2208.09225, section 3)."""
    for name, least, most in (("uniform", 6, 6), ("normal", 5, 5), ("outliers", 3, 4)):
        seen = magnitudes_of(SAMPLES[name], rows=False)
        free = search(seen, 8, list(splits(8)))
        alone = {man: float(search(seen, 8, [man]).error) for man in splits(8)}
        assert float(free.man) == min(alone, key=alone.__getitem__) and least <= float(free.man) <= most
        assert float(free.error) == min(alone.values())


def test_estimators_in_the_order_that_theory_has() -> None:
    """With outliers an 8-bit integer cannot afford its amax; where it stops, the squared error knows better."""
    x = SAMPLES["outliers"]
    seen = magnitudes_of(x, rows=False)
    errors = {e: float(search(seen, 8, [6], e, 99.9).error) for e in ("mse", "percentile", "minmax")}
    assert errors["mse"] < 0.95 * errors["minmax"] and errors["minmax"] < errors["percentile"], "99.9 % cuts outliers"
    float8 = float(search(seen, 8, [3]).error)
    assert float8 < 0.1 * errors["mse"], "and no range makes it as good as E4M3"
    assert float(search(seen, 8, [3], "minmax").maxval) == float(x.abs().max())


def test_rows_are_searched_by_themselves() -> None:
    x = normal(5, 300) * torch.tensor([[1e-4], [1.0], [50.0], [0.0], [1e4]])
    whole = search(magnitudes_of(x, rows=True), 8, [3])
    for row in (0, 1, 2, 4):
        alone = search(magnitudes_of(x[row], rows=False), 8, [3])
        assert float(whole.maxval[row, 0]) == float(alone.maxval)
    assert float(whole.maxval[3]) >= float(x.abs().max()) / 2, "a row of zeros may hold anything yet"
    assert float(search(magnitudes_of(x * 0, rows=True), 8, [3]).maxval.max()) == 0.0


def test_quantiles() -> None:
    x = normal(3, 1000)
    seen = magnitudes_of(x, rows=True)
    for percentile in (50.0, 99.0, 100.0):
        found = quantile(seen, percentile, seen.amax)
        assert (x.abs() <= found).sum(1).tolist() == [round(10 * percentile)] * 3, "the least that suffices"
    sparse = torch.zeros(1000)
    sparse[0] = 3.0
    assert float(search(magnitudes_of(sparse, rows=False), 8, [3], "percentile", 99.0).maxval) == 3.0
    for percentile in (0.0, 100.1):
        with pytest.raises(ValueError, match="percentile: above 0, at most 100"):
            search(seen, 8, [3], "percentile", percentile)
    with pytest.raises(ValueError, match=r"estimator: one of mse, output, minmax, percentile, got 'max'"):
        search(seen, 8, [3], "max")  # type: ignore[arg-type]


# --- histograms -----------------------------------------------------------------------------------------------------


def histogram_of(x: Tensor, parts: int, *, backwards: bool = False) -> Histogram:
    histogram = Histogram(x.device)
    chunks = list(x.chunk(parts))
    for chunk in reversed(chunks) if backwards else chunks:
        histogram.add(chunk)
    return histogram


@pytest.mark.parametrize("name", SAMPLES)
def test_histogram_errors_are_within_5_percent(name: str) -> None:
    """Of 16 384 elements, where each outlier has a bin of its own; the more elements there are, the less."""
    x = SAMPLES[name]
    seen, binned = magnitudes_of(x, rows=False), histogram_of(x, 7).magnitudes()
    at = x.abs().max() * torch.exp2(torch.arange(-16, 4) / 4.0)[None]
    for man in splits(8):
        exact, near = (squared_error(s, at, torch.tensor(float(man)), 8) for s in (seen, binned))
        assert float((near / exact - 1).abs().max()) < 0.05


def test_histogram_of_bfloat16_is_exact_and_blind_to_the_order() -> None:
    x = with_outliers().bfloat16()
    binned = histogram_of(x, 5)
    again = histogram_of(x, 3, backwards=True)
    assert torch.equal(binned.counts, again.counts) and torch.equal(binned.amax, again.amax)
    assert int(binned.counts.sum()) == x.numel() and binned.exact
    a, b = search(binned.magnitudes(), 8, list(splits(8))), search(magnitudes_of(x, rows=False), 8, list(splits(8)))
    assert float(a.maxval) == float(b.maxval) and float(a.man) == float(b.man)
    assert float(a.error) == pytest.approx(float(b.error), rel=1e-5)
    assert binned.counts.nbytes == 1 << 18, "whatever passes through"


def test_histogram_of_nothing_and_of_what_is_not_finite() -> None:
    histogram = Histogram(torch.device("cpu"))
    assert float(search(histogram.magnitudes(), 8, [3]).maxval) == 0.0
    histogram.add(torch.tensor([1.0, float("nan"), -float("inf"), 0.0]))
    histogram.add(torch.zeros(0, 3))
    assert (int(histogram.counts.sum()), int(histogram.nonfinite), float(histogram.amax)) == (2, 2, 1.0)


def test_weights_say_how_much_features_count() -> None:
    """As if each feature occurred so many times; in a tensor, a sample of it, and a histogram."""
    x = normal(64, 32)
    x[:, 0] *= 30
    often = torch.ones(32)
    often[1:] = 256.0
    repeated = torch.cat([x[:, :1].repeat(1, 1), x[:, 1:].repeat(1, 256)], 1)
    expected = search(magnitudes_of(repeated, rows=False), 8, [6])
    found = search(magnitudes_of(x, rows=False, weights=often), 8, [6])
    assert (
        float(found.maxval)
        == float(expected.maxval)
        < 0.5 * float(search(magnitudes_of(x, rows=False), 8, [6]).maxval)
    )
    histogram = Histogram(x.device, often)
    histogram.add(x[:20])
    histogram.add(x[20:])
    assert float(search(histogram.magnitudes(), 8, [6], "output").maxval) == pytest.approx(
        float(found.maxval), rel=0.1
    )
    assert torch.allclose(histogram.energy, x.double().square().sum(0))
    some = magnitudes_of(x, rows=False, most=100, weights=often)
    assert some.counts.shape == some.values.shape and len(some.values[0]) < 130
    assert int((some.counts < 1).sum()) == int(torch.isin(some.values, x[:, 0].abs()).sum())
    assert column_energy(x * 0).tolist() == [1.0] * 32
