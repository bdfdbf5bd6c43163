# SPDX-License-Identifier: Apache-2.0
"""Which sizes of a model's GEMMs suit tensor cores, and what padding would help.

A GEMM [M, K] x [K, N] reads its operands in pieces of 16 bytes: tensor cores run at all, or at full rate, where K and
N are multiples of 8 in 16-bit formats and of 16 in 8-bit ones. Tiles of a whole 128 bytes, 64 and 128 elements, leave
no remainder to be computed with half-empty tiles (NVIDIA, Matrix Multiplication Background User's Guide). M is batch
times sequence, which the model does not fix; the vocabulary is N of the output embedding, and often the one odd size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

NEEDED = {32: 4, 16: 8, 8: 16}  # bits of the operands -> multiple that K and N must have
PREFERRED = {32: 32, 16: 64, 8: 128}
_WORTH = 0.02  # of its size that a dimension may grow to reach the preferred multiple


class Gemm(NamedTuple):
    """A linear as its GEMM sees it: name, K = in_features, N = out_features, bits of an operand's element."""

    name: str
    inputs: int
    outputs: int
    bits: int


class Advice(NamedTuple):
    """A size that misses a multiple.

    where: names of the GEMMs that have it, with the side: `model.embed (out)`.
    missed: the multiple that it misses: the needed one (`serious`), or the preferred one.
    padded: the size to go to: the next preferred multiple where that costs little, else the next needed one; None: the
        size meets what is needed, and reaching the preferred multiple would cost more than 2 %.
    """

    size: int
    bits: int
    where: tuple[str, ...]
    missed: int
    serious: bool
    padded: int | None

    def __str__(self) -> str:
        if self.padded is None:
            return f"suits tensor cores; no multiple of {self.missed}, the next is {100 * self.growth:.1f} % larger"
        words = "" if self.serious else "suits tensor cores; "
        cost = 100 * (self.padded / self.size - 1)
        return f"{words}no multiple of {self.missed}: pad to {self.padded} (+{cost:.2g} %)"

    @property
    def growth(self) -> float:
        """By how much of itself the size grows to the next multiple of what it misses."""
        return _up(self.size, self.missed) / self.size - 1


def advise(gemms: Iterable[Gemm]) -> list[Advice]:
    """One entry per size and bits that miss a multiple, the serious ones first, then by size."""
    where: dict[tuple[int, int], dict[str, None]] = {}
    for gemm in gemms:
        for side, size in (("in", gemm.inputs), ("out", gemm.outputs)):
            where.setdefault((size, gemm.bits), {})[f"{gemm.name} ({side})"] = None
    found = []
    for (size, bits), names in where.items():
        needed, preferred = NEEDED[bits], PREFERRED[bits]
        if size % preferred == 0:
            continue
        serious = size % needed != 0
        cheap = _up(size, preferred) <= size * (1 + _WORTH)
        padded = _up(size, preferred) if cheap else _up(size, needed) if serious else None
        found.append(Advice(size, bits, tuple(names), needed if serious else preferred, serious, padded))
    return sorted(found, key=lambda advice: (not advice.serious, -advice.size))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
