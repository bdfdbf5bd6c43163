# SPDX-License-Identifier: Apache-2.0
"""Values of the codebooks in `formats.FORMATS`, by their formulas; standard library only."""

from __future__ import annotations

import struct
from itertools import pairwise
from statistics import NormalDist


def _float32(values: list[float]) -> tuple[float, ...]:
    """Ascending, rounded to float32: codebooks are used as float32 tables."""
    return struct.unpack(f"{len(values)}f", struct.pack(f"{len(values)}f", *sorted(values)))


def nf4() -> tuple[float, ...]:
    """NormalFloat, QLoRA (arXiv 2305.14314), section 3: quantiles of N(0, 1), 7 below zero, 8 above, scaled to +-1."""
    edge = ((1 - 1 / 30) + (1 - 1 / 32)) / 2

    def side(n: int) -> list[float]:
        return [NormalDist().inv_cdf(edge + (0.5 - edge) * i / n) for i in range(n)]

    positive, negative = side(8), side(7)
    return _float32([v / positive[0] for v in positive] + [0.0] + [-v / negative[0] for v in negative])


def dynamic_tree(signed: bool, decades: int = 7) -> tuple[float, ...]:
    """Dynamic tree quantisation, 8-bit optimizers (arXiv 2110.02861), section 2.2.

    Decade i of `decades` holds 2^i values per sign (2^(i+1) unsigned): the midpoints of equal steps of
    [0.1, 1] * 10^(i - decades + 1). Then 0 and 1: 2^(decades+1) values in all.

    Every step is rounded to float32 as in bitsandbytes' table, which it equals bit for bit.
    """
    values = [0.0, 1.0]
    for i in range(decades):
        edges = _steps(0.1, 1.0, 1 << (i if signed else i + 1))
        unit = _round32(10.0 ** (i - decades + 1))
        decade = [_round32(unit * _round32((low + high) / 2)) for low, high in pairwise(edges)]
        values += decade + ([-v for v in decade] if signed else [])
    return _float32(values)


def _steps(start: float, end: float, n: int) -> list[float]:
    """start, ... end in n equal steps of float32, counted from the nearer end, each rounded once."""
    start = _round32(start)
    step = _round32(_round32(end - start) / n)
    return [_round32(start + step * j if j <= (n - 1) // 2 else end - step * (n - j)) for j in range(n + 1)]


def _round32(x: float) -> float:
    (rounded,) = struct.unpack("f", struct.pack("f", x))
    return float(rounded)


def linear_unsigned(bits: int) -> tuple[float, ...]:
    """1/n, 2/n, ... 1 with n = 2^bits: second moments of 4 bits (arXiv 2309.01507, section 3.2), without a zero."""
    n = 1 << bits
    return _float32([(i + 1) / n for i in range(n)])


def nearest_boundaries(values: tuple[float, ...]) -> tuple[float, ...]:
    """float32 b of which a float32 x reaches (b <= x) as many as its nearest value's index, ties to the even index.

    values: float32 numbers, ascending.
    """
    out = []
    for low, (a, b) in enumerate(pairwise(values)):
        middle = (a + b) / 2  # exact: neighbours of a codebook share most of float64's bits
        (rounded,) = struct.unpack("f", struct.pack("f", middle))
        if rounded < middle or (rounded == middle and low % 2 == 0):
            rounded = _next_float32(rounded)
        out.append(rounded)
    return tuple(out)


def _next_float32(x: float) -> float:
    """The least float32 above the float32 `x`."""
    (bits,) = struct.unpack("i", struct.pack("f", x if x else 0.0))
    (above,) = struct.unpack("f", struct.pack("i", bits + 1 if bits >= 0 else bits - 1))
    return float(above)
