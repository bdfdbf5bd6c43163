# SPDX-License-Identifier: Apache-2.0
"""The general method of rounding: floats as integers that count in units of a format's codes.

Between zero and a format's largest value, consecutive codes are consecutive integers, and so are the bits of |x| in a
float32. `count_codes` shifts those bits so that exponent field 1 is the format's lowest binade; the code is then the
high bits, and rounding is an addition below them (see `rounding`). `code_values` is the way back.

Everything here knows no overflow: codes beyond `Format.max_code` come back as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowprec.formats import Codebook, Format
from hf_lowprec.recipe import Rounding


class Carrier(NamedTuple):
    """The float type in which a format is computed."""

    dtype: torch.dtype
    integer: torch.dtype
    man: int
    bias: int
    magnitude: int  # mask of all bits but the sign


_TOWARD_ZERO = Rounding(mode="zero")
F32 = Carrier(torch.float32, torch.int32, 23, 127, 0x7FFFFFFF)
F64 = Carrier(torch.float64, torch.int64, 52, 1023, 0x7FFFFFFFFFFFFFFF)


def carrier_of(fmt: Format | Codebook, dtype: torch.dtype) -> Carrier:
    """float32, unless the input is float64, or the format leaves float32's normal range, or is a codebook."""
    if dtype == torch.float64 or isinstance(fmt, Codebook):
        return F64
    return F32 if fmt.emin >= 1 - F32.bias and fmt.emax <= F32.bias else F64


def random_bits(rounding: Rounding, fmt: Format | Codebook) -> int:
    """r of stochastic rounding: all the bits that float32 drops, unless the recipe says fewer."""
    if rounding.bits is not None:
        return rounding.bits
    return F32.man - (fmt.man if isinstance(fmt, Format) else 0)


def count_codes(x: Tensor, fmt: Format, rounding: Rounding, words: Tensor | None) -> Tensor:
    """Codes of |x| without sign, rounded, unbounded above; Inf and NaN count beyond `fmt.max_code`.

    x: in the carrier's dtype. words: for stochastic rounding, `random_bits` bits per element.
    """
    c = F32 if x.dtype == torch.float32 else F64
    drop = c.man - fmt.man
    units = x.contiguous().view(c.integer) & c.magnitude
    # code = (units >> drop) - offset
    if fmt.subnormal == "flush":
        offset = (fmt.emin + c.bias - 1) << fmt.man
    else:
        offset = 1 << fmt.man if fmt.subnormal == "normal0" else 0
        units = _rebase(units, fmt.emin + c.bias, c, sticky=rounding.mode == "nearest")
    if rounding.mode == "nearest":
        units = units + (((units >> drop) - offset) & 1) + ((1 << (drop - 1)) - 1)
    elif rounding.mode == "away":
        units = units + (1 << (drop - 1))
    elif words is not None:
        units = units + (words.to(c.integer) << (drop - random_bits(rounding, fmt)))
    codes = (units >> drop) - offset
    if fmt.subnormal == "flush":
        return codes.masked_fill_(codes < 1 << fmt.man, 0)
    if fmt.subnormal == "normal0":
        codes.clamp_(min=0)
        return _fill_hole(codes, x.abs(), fmt, rounding, words) if fmt.has_zero else codes
    return codes


def _rebase(magnitude: Tensor, low: int, c: Carrier, *, sticky: bool) -> Tensor:
    """Bits of |x| as if exponent field `low` were field 1; what falls off sets the last bit if `sticky`."""
    if low <= 1:
        return magnitude
    field = magnitude >> c.man
    significand = (magnitude & ((1 << c.man) - 1)) | (field.clamp(max=1) << c.man)
    shift = field.clamp_(min=1).neg_().add_(low).clamp_(0, c.man + 2)
    shifted = significand >> shift
    if sticky:
        shifted |= (shifted << shift) != significand
    # In the normal range the first is the larger (field `low` makes them equal), below it the second.
    return torch.maximum(magnitude - ((low - 1) << c.man), shifted)


def _fill_hole(codes: Tensor, x: Tensor, fmt: Format, rounding: Rounding, words: Tensor | None) -> Tensor:
    """`normal0`: between zero and `tiny` there is nothing, although the binade's grid would have a value there."""
    if rounding.mode == "nearest":
        up = x > fmt.tiny / 2
    elif rounding.mode == "away":
        up = x >= fmt.tiny / 2
    elif words is not None:
        count = 1 << random_bits(rounding, fmt)
        up = x.double() * count >= (count - words.double()) * fmt.tiny  # every product is exact in float64
    else:
        up = torch.zeros_like(x, dtype=torch.bool)
    return torch.where(x < fmt.tiny, up.to(codes.dtype), codes)


def code_values(codes: Tensor, fmt: Format) -> Tensor:
    """Magnitudes of finite codes without sign, in the float type of the size of `codes`."""
    c = F32 if codes.dtype == torch.int32 else F64
    field = fmt.emin + c.bias - (fmt.subnormal != "normal0")
    normal = ((codes << (c.man - fmt.man)) + (field << c.man)).view(c.dtype)
    if fmt.subnormal == "normal0":
        return normal.masked_fill_(codes == 0, 0.0) if fmt.has_zero else normal
    if field == 0:
        return normal  # the format's subnormals are the carrier's
    # Below code 2^man this reads (1 + f) / 2 * 2^emin where f * 2^emin is meant: twice itself minus 2^emin.
    return (normal - 2.0**fmt.emin).clamp_(max=0.0).add_(normal)


def codes_of(values: Tensor, fmt: Format | Codebook, *, checked: bool = True) -> Tensor:
    """Codes of values that are already on the format's grid: uint8 for at most 8 bits, else int16.

    values: in the carrier's dtype. NaN gets `fmt.nan_code`; if the format has none, some code, unless `checked`.
    Raises ValueError: `checked`, which reads a flag back to the host, a NaN, and the format has none.
    """
    container = torch.uint8 if fmt.bits <= 8 else torch.int16
    nan = values.isnan()
    if checked and not fmt.has_nan and bool(nan.any()):
        raise ValueError(f"{fmt} has no NaN; scale with a non-finite scale, or remove the non-finite elements first")
    if isinstance(fmt, Codebook):
        table = torch.tensor(fmt.values, dtype=values.dtype, device=values.device)
        return torch.bucketize(values, table, out_int32=True).to(container)
    codes = count_codes(values, fmt, _TOWARD_ZERO, None)
    if fmt.has_inf:
        codes.masked_fill_(values.isinf(), fmt.inf_code)
    if fmt.signed:
        codes |= values.signbit().to(codes.dtype) << (fmt.bits - 1)
    if fmt.has_nan:
        codes.masked_fill_(nan, fmt.nan_code)
    return codes.to(container)


def round_to_codebook(x: Tensor, book: Codebook, rounding: Rounding, words: Tensor | None) -> Tensor:
    """Every mode between the two neighbours in the table, saturating: float64 in, float64 out."""
    table = torch.tensor(book.values, dtype=torch.float64, device=x.device)
    high = torch.bucketize(x, table).clamp_(1, len(book.values) - 1)
    below, above = x - table[high - 1], table[high] - x
    if rounding.mode == "nearest":
        up = (above < below) | ((above == below) & (high % 2 == 0))
    elif rounding.mode == "away":
        up = (above < below) | ((above == below) & (x > 0))
    elif words is not None:
        count = 1 << random_bits(rounding, book)
        up = torch.floor(below / (above + below) * count) + words >= count
    else:
        up = (above <= 0) | (x < 0)
    return torch.where(up & (below > 0), table[high], table[high - 1])


_TABLES: dict[tuple[Format | Codebook, torch.device, torch.dtype], Tensor] = {}


def value_table(fmt: Format | Codebook, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The value of every code, by the scalar specification."""
    key = (fmt, device, dtype)
    # Dynamo reads a table that is there as any global; of those that it makes, one graph can have one (torch 2.13).
    return _TABLES[key] if key in _TABLES else _make_value_table(*key)


def _make_value_table(fmt: Format | Codebook, device: torch.device, dtype: torch.dtype) -> Tensor:
    count = 1 << fmt.bits if isinstance(fmt, Format) else len(fmt.values)
    values = torch.tensor([fmt.decode(code) for code in range(count)], dtype=torch.float64)
    return _TABLES.setdefault((fmt, device, dtype), values.to(dtype).to(device))


# Or Dynamo traces 65536 calls of decode. It is what `torch.compiler.assume_constant_result` sets; the decorator itself
# would import all of Dynamo, two seconds in every process that converts a model.
_make_value_table.__dict__["_dynamo_marked_constant"] = True
