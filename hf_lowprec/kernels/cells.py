# SPDX-License-Identifier: Apache-2.0
"""Tables by which one look-up finds the code of a float32 in a codebook; standard library only.

The bits of a positive float32 are ordered like the numbers. Cut off their lowest digits, and what remains numbers the
cells of a table, so small that none holds more than one of the boundaries at which the nearest code changes. A cell's
entry, added to the bits of x, carries into the code above from the boundary on; the code ends up in the top byte:

    number = (bits >> low) - base
    code   = (entries[number] + bits) >> low            modulo 2^32
    entry  = code at the cell's start << low, minus the bits' own high part, plus 2^low - (boundary - high part)
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from hf_lowprec.codebooks import dynamic_tree, nearest_boundaries

_END = 4.0  # x / scale reaches 1; 4 where the scale is held at 2^126


class Cells(NamedTuple):
    """first: start of the first cell; least: the least x (negative) that has not the lowest code; see the module."""

    first: float
    low: int
    base: int
    least: float
    entries: tuple[int, ...]


def float_bits(x: float) -> int:
    """The bits of a float32 as an int32."""
    (bits,) = struct.unpack("i", struct.pack("f", x))
    return int(bits)


def bits_float(bits: int) -> float:
    (x,) = struct.unpack("f", struct.pack("i", bits))
    return float(x)


@cache
def dynamic_cells(signed: bool, decades: int = 7) -> Cells:
    """Cells of the dynamic tree. Signed: of the distance from the code of 0, which is the same for x and -x, but that
    the top value 1 has no negative: below `least` all have the lowest code. Unsigned: codes from 1 on, 0 is for x = 0.
    """
    values = dynamic_tree(signed, decades)
    boundaries = nearest_boundaries(values)
    zero = values.index(0.0)
    positive = [float_bits(b) for b in boundaries[zero:]]
    if not signed:
        positive = positive[1:]
    least = bits_float(positive[-1] - 1)
    fine = 23 - (decades if signed is False else decades - 1)  # the top decade has 2^decades values, half of it signed
    return _cells(positive, 0 if signed else 1, fine, -least if signed else 0.0)


def _cells(boundaries: list[int], code: int, low: int, least: float) -> Cells:
    """boundaries: bits, ascending; code: that of everything below the first. Raises ValueError: a cell with two."""
    start = (boundaries[0] - 1) >> low << low
    entries = []
    for begin, end in pairwise(range(start, float_bits(_END) + 1, 1 << low)):
        before, after = bisect_right(boundaries, begin), bisect_right(boundaries, end - 1)
        if after - before > 1:
            raise ValueError(f"{after - before} boundaries between {bits_float(begin)} and {bits_float(end)}")
        carry = (1 << low) - (boundaries[before] - begin) if after > before else 0
        entries.append(((code + before << low) - begin + carry << 24 - low) & 0xFFFFFFFF)
    return Cells(bits_float(start), low, start >> low, least, tuple(entries))


def signed32(words: tuple[int, ...]) -> list[int]:
    """32-bit words as Python ints in [-2^31, 2^31)."""
    return [word - (1 << 32) if word >> 31 else word for word in words]
