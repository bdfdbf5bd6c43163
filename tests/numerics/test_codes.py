# SPDX-License-Identifier: Apache-2.0
"""Exhaustive: every code of every format decodes as gfloat says, and encodes back to itself."""

import numpy as np
import pytest
import torch
from oracles import CATALOGUE, MORE, gfloat_values

from hf_lowprec.formats import FORMATS, Codebook, Format
from hf_lowprec.numerics import decode, encode


def assert_same_floats(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Bit for bit, all NaNs alike."""
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
    keep = ~np.isnan(ours)
    np.testing.assert_array_equal(ours[keep].view(np.int64), theirs[keep].view(np.int64))


@pytest.mark.parametrize("fmt", CATALOGUE + MORE, ids=str)
def test_every_code_decodes_as_gfloat_says(fmt: Format) -> None:
    scalar = np.array([fmt.decode(code) for code in range(1 << fmt.bits)])
    assert_same_floats(scalar, gfloat_values(fmt))
    codes = torch.arange(1 << fmt.bits).to(torch.uint8 if fmt.bits <= 8 else torch.int16)
    assert_same_floats(decode(codes, fmt).numpy(), scalar)


@pytest.mark.parametrize("fmt", CATALOGUE + MORE, ids=str)
def test_every_value_encodes_to_its_code(fmt: Format) -> None:
    codes = torch.arange(1 << fmt.bits, dtype=torch.int32)
    values = decode(codes, fmt, torch.float64)
    ours = encode(values, fmt, overflow="inf" if fmt.has_inf else "saturate") if fmt.has_nan else encode(values, fmt)
    ours = ours.to(torch.int32) & 0xFFFF
    expected = torch.where(values.isnan(), fmt.nan_code if fmt.has_nan else 0, codes)
    if fmt.subnormal == "flush":  # the codes that it does not use are zeros
        unused = (codes & ((1 << (fmt.exp + fmt.man)) - 1)) < 1 << fmt.man
        zero = codes >> (fmt.bits - 1) << (fmt.bits - 1) if fmt.has_negative_zero else 0
        expected = torch.where(unused & ~values.isnan(), zero, expected)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("fmt", CATALOGUE + MORE, ids=str)
def test_scalar_encode_inverts_decode(fmt: Format) -> None:
    values = fmt.values()
    assert values == tuple(sorted(set(values)))
    assert (values[0], values[-1]) == (fmt.min, fmt.max)
    assert all(fmt.decode(fmt.encode(v)) == v for v in values)
    assert min(v for v in values if v > 0) == fmt.tiny


@pytest.mark.parametrize("book", [f for f in FORMATS.values() if isinstance(f, Codebook)], ids=str)
def test_codebooks_round_trip(book: Codebook) -> None:
    codes = torch.arange(len(book.values)).to(torch.uint8)
    values = decode(codes, book)
    assert values.tolist() == list(book.values)
    assert torch.equal(encode(values, book), codes)


def test_sixteen_bit_codes_live_in_int16() -> None:
    codes = encode(torch.tensor([-1.0, 1.0]), "e6m9")
    assert codes.dtype == torch.int16 and codes[0] < 0
    assert decode(codes, "e6m9").tolist() == [-1.0, 1.0]


def test_decode_refuses_what_is_no_code() -> None:
    with pytest.raises(IndexError):
        decode(torch.tensor([16], dtype=torch.uint8), "e2m1")
    with pytest.raises(TypeError, match="integers"):
        decode(torch.zeros(2), "e2m1")
    with pytest.raises(ValueError, match="no NaN"):
        encode(torch.tensor([float("inf")]), "e2m1")


@pytest.mark.slow
def test_every_code_of_every_format_of_at_most_16_bits() -> None:
    """All exponent and mantissa widths x specials x subnormals x sign that name a format within float64."""
    checked = 0
    for exp in range(11):
        for man in range(16 - exp):
            for specials in ("none", "fn", "ieee", "fnuz"):
                for subnormal in ("gradual", "flush", "normal0"):
                    for signed in (True, False):
                        try:
                            fmt = Format(exp, man, specials=specials, subnormal=subnormal, signed=signed)
                        except ValueError:
                            continue
                        ours = np.array([fmt.decode(code) for code in range(1 << fmt.bits)])
                        assert_same_floats(ours, gfloat_values(fmt))
                        checked += 1
    assert checked > 1000
