# SPDX-License-Identifier: Apache-2.0
"""The packing codec against a loop over bits, for every width and number of codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_lowprec.formats import Format
from hf_lowprec.numerics import decode, encode
from hf_lowprec.numerics.packing import pack, packed_size, planes_of, unpack

WIDTHS = range(1, 17)
SIZES = [0, 1, 7, 8, 9, 16, 31, 100]


def codes_of(bits: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, shape, generator=generator)
    return codes.to(torch.uint8) if bits <= 8 else codes.to(torch.int16)


def by_bits(codes: list[int], bits: int) -> list[int]:
    """The layout once more, a bit at a time."""
    n = -(-len(codes) // 8) * 8
    out, low = [], bits
    for width in planes_of(bits):
        low -= width
        plane = [0] * (n * width // 8)
        for number, code in enumerate(codes):
            lane, byte = divmod(number, len(plane))
            for bit in range(width):
                plane[byte] |= (code >> (low + bit) & 1) << (lane * width + bit)
        out += plane
    return out


@pytest.mark.parametrize("bits", WIDTHS)
def test_is_the_layout_bit_by_bit(bits: int) -> None:
    for n in SIZES:
        codes = codes_of(bits, n, seed=n)
        packed = pack(codes, bits)
        assert packed.dtype == torch.uint8
        assert packed.tolist() == by_bits([c & 0xFFFF for c in codes.tolist()], bits)
        assert packed.numel() == packed_size(n, bits) == -(-n // 8) * bits
        back = unpack(packed, bits, n)
        assert back.dtype == codes.dtype and torch.equal(back, codes)


def test_widths_are_sums_of_powers_of_two() -> None:
    assert {bits: planes_of(bits) for bits in (2, 3, 4, 5, 6, 7, 8, 9, 12, 16)} == {
        2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,), 9: (8, 1), 12: (8, 4), 16: (8, 8),
    }  # fmt: skip
    for bits in (0, 17):
        with pytest.raises(ValueError, match="1 to 16 bits"):
            planes_of(bits)


@pytest.mark.parametrize("bits", range(2, 10))
def test_a_multiple_of_8_wastes_no_bit(bits: int) -> None:
    assert pack(codes_of(bits, 8 * 37), bits).numel() * 8 == 8 * 37 * bits


def test_rows_are_packed_by_themselves() -> None:
    codes = codes_of(5, 3, 4, 19)
    packed = pack(codes, 5)
    assert packed.shape == (3, 4, packed_size(19, 5))
    assert torch.equal(packed[1, 2], pack(codes[1, 2], 5)) and torch.equal(unpack(packed, 5, 19), codes)
    strided = codes.transpose(0, 1)
    assert torch.equal(pack(strided, 5), packed.transpose(0, 1))


def test_sixteen_bits_of_an_int16() -> None:
    codes = torch.tensor([-1, -32768, 32767, 0, 1], dtype=torch.int16)
    assert torch.equal(unpack(pack(codes, 16), 16, 5), codes)


def test_lengths_are_checked() -> None:
    packed = pack(codes_of(7, 16), 7)
    for n, width in ((17, 7), (8, 7), (16, 6)):
        with pytest.raises(ValueError, match="bytes, got 14"):
            unpack(packed, width, n)
    assert torch.equal(unpack(packed, 7, 9), codes_of(7, 16)[:9]), "the same bytes, fewer codes asked for"


@pytest.mark.parametrize(("exp", "man"), [(3, 1), (0, 2), (2, 3), (6, 0), (1, 4), (5, 3)])
def test_values_through_the_codec(exp: int, man: int) -> None:
    fmt = Format(exp, man)
    codes = encode(fmt.max / 2 * torch.randn(3, 333, generator=torch.Generator().manual_seed(1)), fmt)
    packed = pack(codes.view(-1), fmt.bits)
    assert packed.numel() == packed_size(999, fmt.bits)
    back = unpack(packed, fmt.bits, 999).view(3, 333)
    assert torch.equal(decode(back, fmt), decode(codes, fmt))
