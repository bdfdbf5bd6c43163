# SPDX-License-Identifier: Apache-2.0
"""The look-up by which kernels find codes of the dynamic trees, against the nearest value by the definition."""

from __future__ import annotations

import pytest
import torch

from hf_lowprec.codebooks import dynamic_tree, nearest_boundaries
from hf_lowprec.formats import get_format
from hf_lowprec.kernels.cells import bits_float, dynamic_cells, float_bits, signed32
from hf_lowprec.numerics.codes import round_to_codebook
from hf_lowprec.recipe import Rounding

BOOKS = {"dynamic8": (True, 7), "dynamic8u": (False, 7), "dynamic4": (True, 3)}


def numbers(signed: bool, decades: int) -> torch.Tensor:
    """Every boundary and value with its neighbours, the ends of the range, and random bits in [0, 4)."""
    values = dynamic_tree(signed, decades)
    near = torch.tensor([*nearest_boundaries(values), *values, 0.0, 1e-45, 1e-38, 3.999])
    bits = near.abs().view(torch.int32)
    around = torch.cat([bits + k for k in range(-4, 5)]).clamp(min=0)
    anywhere = torch.randint(0, float_bits(4.0), (300_000,), generator=torch.Generator().manual_seed(0))
    return torch.cat([around, anywhere.to(torch.int32)]).view(torch.float32)


def by_cells(x: torch.Tensor, signed: bool, decades: int) -> torch.Tensor:
    """What `triton.codecs.nearest` computes, for x in [0, 4)."""
    cells = dynamic_cells(signed, decades)
    bits = x.clamp(min=cells.first).view(torch.int32)
    number = (bits >> cells.low) - cells.base
    entries = torch.tensor(signed32(cells.entries), dtype=torch.int32)
    return ((entries[number].long() + (bits.long() << 24 - cells.low)) & 0xFFFFFFFF) >> 24


@pytest.mark.parametrize("name", BOOKS)
def test_a_look_up_finds_the_nearest_code_of_every_float32(name: str) -> None:
    signed, decades = BOOKS[name]
    book, x = get_format(name), numbers(signed, decades)
    values = torch.tensor(book.values)
    zero = book.values.index(0.0)
    truth = torch.bucketize(round_to_codebook(x.double(), book, Rounding(), None).float(), values)
    found = by_cells(x, signed, decades)
    if not signed:
        found = torch.where(x > 0, found, 0)
        truth = torch.where(x > 0, truth.clamp(min=1), truth)  # what is not 0 never becomes 0
        assert torch.equal(found, truth)
        return
    assert torch.equal(zero + found, truth)
    least = dynamic_cells(signed, decades).least
    negative = (-x).clamp(min=least)
    truth = torch.bucketize(round_to_codebook(-x.double(), book, Rounding(), None).float(), values)
    assert torch.equal(zero - by_cells(-negative, signed, decades), truth)


def test_tables_fit_where_the_kernels_expect_them() -> None:
    sizes = [len(dynamic_cells(*book).entries) for book in BOOKS.values()]
    assert [a <= b for a, b in zip(sizes, (1536, 2944, 112), strict=True)] == [True] * 3
    assert bits_float(float_bits(0.1)) == pytest.approx(0.1) and float_bits(1.0) == 0x3F800000
