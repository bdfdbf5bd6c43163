# SPDX-License-Identifier: Apache-2.0
"""Values of the codebooks in `formats.FORMATS`, by their formulas; standard library only."""

from __future__ import annotations

import struct
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


def dynamic_tree(signed: bool) -> tuple[float, ...]:
    """Dynamic tree quantisation, 8-bit optimizers (arXiv 2110.02861), section 2.2, as bitsandbytes tabulates it.

    Decade i of 7 holds 2^i values per sign (2^(i+1) unsigned): the midpoints of equal steps of [0.1, 1] * 10^(i-6).
    Then 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        n = 1 << (i if signed else i + 1)
        decade = [10.0 ** (i - 6) * (0.1 + 0.9 * (j + 0.5) / n) for j in range(n)]
        values += decade + ([-v for v in decade] if signed else [])
    return _float32(values)
