# SPDX-License-Identifier: Apache-2.0
"""Where the range of a tensor should end, and how its bits should split: by least squared error, or by its quantiles.

    mse         the range and split of the least squared error, among amax * 2^k for k = 1, 7/8, ... -6 and then,
                around the best of these, in steps of 1/32
    output      the same of errors times how much they count: of an input's feature the squared length of its column of
                the weight, of a weight's column the energy of its feature (`Magnitudes.counts`, `Histogram`). That is
                the error of the layer's output, if errors of different elements do not know of each other
    minmax      the range ends at the amax
    percentile  at the least magnitude that so many percent of the elements do not exceed

The last two choose a free split by squared error, too. No value is read by the host, so a model can look for its
ranges in its first training step. A tensor is looked at by magnitudes: itself, a sample of it, or a histogram
(`Histogram`), of bounded memory whatever passes through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hf_lowprec.numerics.flexible import flexible

Estimator = Literal["mse", "output", "minmax", "percentile"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
_COARSE = (8, -49, -1, 8)  # arange and denominator: made on the device, as a copy would wait for it
_FINE = (-2, 3, 1, 32)
_AT_ONCE = {"cpu": 1 << 19}  # elements in one evaluation: what a cache holds
_AT_ONCE_ELSEWHERE = 1 << 25
_BINS = 1 << 15
_PARTS = 4


class Found(NamedTuple):
    """maxval: float32 [R, 1]; man: 0-dim float32; error: the sum of squared errors, 0-dim float64."""

    maxval: Tensor
    man: Tensor
    error: Tensor


class Magnitudes(NamedTuple):
    """What a search looks at: R rows, each with a range of its own.

    values: float32 [R, S], >= 0. counts: float32 [1, S], how often each occurs or how much it counts; None: once.
    amax: float32 [R, 1], over all elements, sampled or not.
    """

    values: Tensor
    counts: Tensor | None
    amax: Tensor


def column_energy(x: Tensor) -> Tensor:
    """Sum of squares over all but the last dimension, without non-finite elements: float64 [K]; ones for zeros."""
    flat = x.detach().reshape(-1, x.shape[-1])
    energy = torch.where(flat.isfinite(), flat, 0).double().square().sum(0)
    return torch.where(energy.any(), energy, 1.0)


def magnitudes_of(x: Tensor, *, rows: bool, most: int | None = None, weights: Tensor | None = None) -> Magnitudes:
    """Of a tensor; `rows`: each row of the matrix [R, C] by itself. Non-finite elements count as 0.

    weights: how much the elements count by their place in the last dimension, [K].
    most: look at no more than about so many elements in a row (the amax is that of all), evenly spaced.
    """
    x = x.detach()
    flat = x.reshape(x.shape[0], -1) if rows else x.reshape(1, -1)
    if not flat.shape[1]:
        flat = flat.new_zeros(flat.shape[0], 1)
    magnitude = torch.where(flat.isfinite(), flat.abs(), 0).float()
    amax = magnitude.amax(1, keepdim=True)
    stride = 1 if most is None else flat.shape[1] // most | 1  # odd: a power of two would pick few columns
    counts = None
    if weights is not None:
        share = (weights / weights.amax()).float()
        place = torch.arange(0, flat.shape[1], stride, device=x.device) % len(share)
        counts = share[place][None]
    return Magnitudes(magnitude[:, ::stride], counts, amax)


def squared_error(seen: Magnitudes, maxval: Tensor, man: Tensor, bits: int) -> Tensor:
    """Sum of squared errors of each row under each candidate maxval [R, C]: float64 [R, C]."""
    r, s = seen.values.shape
    at_once = _AT_ONCE.get(seen.values.device.type, _AT_ONCE_ELSEWHERE)
    width = max(1, at_once // max(r * s, 1))
    out = []
    for some in maxval.split(width, 1):
        values = seen.values[:, None, :]
        errors = (flexible(values, some[:, :, None], man, bits) - values).square()
        if seen.counts is not None:
            errors = errors * seen.counts[:, None, :]
        out.append(errors.sum(2, dtype=torch.float64))
    return torch.cat(out, 1)


def search(
    seen: Magnitudes, bits: int, mans: Sequence[int], estimator: Estimator = "mse", percentile: float = 99.99
) -> Found:
    """The best range of each row and the best split, of those in `mans`, for all rows together.

    A row of zeros takes the amax of all rows: what it will hold is not known yet. Where all rows are zero, so is what
    is found.

    Raises ValueError: unknown estimator, or a percentile that is none.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    least_error = estimator in ("mse", "output")
    whole = seen.amax.amax()
    amax = torch.where(seen.amax > 0, seen.amax, whole)
    base = quantile(seen, percentile, amax) if estimator == "percentile" else amax
    coarse = base * _steps(_COARSE, base.device) if least_error else base
    found: list[tuple[Tensor, Tensor]] = []
    widths = []
    for m in mans:
        man = torch.full((), float(m), device=base.device)
        error, at = squared_error(seen, coarse, man, bits).min(1, keepdim=True)
        maxval = coarse.gather(1, at)
        if least_error:
            fine = maxval * _steps(_FINE, base.device)
            better, at = squared_error(seen, fine, man, bits).min(1, keepdim=True)
            maxval = torch.where(better < error, fine.gather(1, at), maxval)
            error = torch.minimum(better, error)
        found.append((maxval, error.sum()))
        widths.append(man)
    errors = torch.stack([error for _, error in found])
    best = errors.argmin()
    maxvals = torch.stack([maxval for maxval, _ in found])
    chosen = torch.stack(widths).index_select(0, best[None])[0]
    return Found(maxvals.index_select(0, best[None])[0], chosen, errors.min())


def _steps(octaves: tuple[int, int, int, int], device: torch.device) -> Tensor:
    start, stop, step, denominator = octaves
    return torch.exp2(torch.arange(start, stop, step, device=device) / denominator)


def quantile(seen: Magnitudes, percentile: float, amax: Tensor) -> Tensor:
    """The least magnitude that `percentile` % of each row do not exceed, [R, 1], and at least the smallest above 0.

    Raises ValueError: not above 0 and at most 100.
    """
    if not 0.0 < percentile <= 100.0:
        raise ValueError(f"percentile: above 0, at most 100, got {percentile}")
    values, order = seen.values.sort(1)
    if seen.counts is None:
        upto = torch.arange(1, values.shape[1] + 1, device=values.device, dtype=torch.float64).expand_as(values)
    else:
        upto = seen.counts.double().expand_as(values).gather(1, order).cumsum(1)
    enough = upto >= upto[:, -1:] * (percentile / 100.0)
    first = enough.to(torch.int32).argmax(1, keepdim=True)
    least = torch.where(values > 0, values, torch.inf).amin(1, keepdim=True)
    found = torch.maximum(values.gather(1, first), least)
    return torch.where(found.isfinite(), torch.minimum(found, amax), amax)


class Histogram:
    """How often each magnitude occurred in the tensors that `add` saw: 2^15 bins of int64, 256 KiB, on one device.

    A bin holds the magnitudes whose float32 begins with the same 16 bits: 128 bins to an octave, from the smallest to
    the largest number, so that nothing is rescaled and the order of the batches does not matter. Of bfloat16 tensors
    it is exact. Of others the elements of a bin are taken to be spread over it evenly, at 4 places: for formats of
    8 bits squared errors are within 5 % of the tensor's own (tests/numerics/test_search.py).

    weights: how much the features [K] (the last dimension) count, float, >= 0; taken as whole numbers up to 65536, so
        that sums do not depend on the order. None: all the same.
    energy: with weights, the sum of squares of each feature, float64 [K].
    """

    def __init__(self, device: torch.device, weights: Tensor | None = None) -> None:
        self.weights = self.energy = None
        if weights is not None:
            share = weights.detach().to(device, torch.float64)
            share = share / share.amax().clamp(min=torch.finfo(torch.float64).tiny)
            self.weights = (share * (1 << 16)).round().clamp(min=1).to(torch.int64)
            self.energy = torch.zeros_like(share)
        self.counts = torch.zeros(_BINS, dtype=torch.int64, device=device)
        self.amax = torch.zeros((), device=device)
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        self.exact = True  # only bfloat16 so far

    def add(self, x: Tensor) -> None:
        """Count the elements of `x`. No host synchronisation."""
        x = x.detach()
        self.exact &= x.dtype == torch.bfloat16
        flat = x.reshape(-1).float().abs()
        finite = flat.isfinite()
        self.nonfinite += (~finite).sum()
        flat = torch.where(finite, flat, 0.0)
        if flat.numel():
            self.amax = torch.maximum(self.amax, flat.amax())
        bins = (flat.view(torch.int32) >> 16).to(torch.int64)
        # Integers: the order in which a GPU adds them changes nothing.
        many = finite.to(torch.int64)
        if self.weights is not None and self.energy is not None:
            many = many * self.weights.expand(x.shape).reshape(-1)
            self.energy += flat.view(-1, x.shape[-1]).double().square().sum(0)
        self.counts.scatter_add_(0, bins, many)

    def magnitudes(self) -> Magnitudes:
        """For `search`; reads from the device which bins are empty."""
        # Far below the amax nothing is left but zero, in any format of 8 bits and range.
        bins = (self.counts > 0).nonzero()[:, 0]
        counts = self.counts[bins].double()
        low = (bins << 16).to(torch.int32).view(torch.float32)
        if self.exact:
            values = low[None]
        else:
            high = ((bins + 1) << 16).to(torch.int32).view(torch.float32)
            places = (torch.arange(_PARTS, device=low.device) + 0.5) / _PARTS
            values = (low[:, None] + (high - low)[:, None] * places).reshape(1, -1)
            values = torch.where(low.repeat_interleave(_PARTS)[None] > 0, values, 0.0)
            values = torch.minimum(values, self.amax)
            counts = (counts / _PARTS).repeat_interleave(_PARTS)
        if not values.shape[1]:
            values, counts = values.new_zeros(1, 1), counts.new_zeros(1)
        return Magnitudes(values, counts.float()[None], self.amax.reshape(1, 1))
