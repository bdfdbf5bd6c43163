# SPDX-License-Identifier: Apache-2.0
"""How codes lie in memory: the dtype of a stored code, integers in two's complement, codes that share bytes.

`numerics.encode` gives every format the same containers (uint8 or int16, sign and magnitude). Stored states differ in
two cases. Formats of 8 bits without exponent are the integers that they mean (`e0m7` int8, `e0m8u` uint8), which a
processor converts by itself. And formats of other widths than 8 and 16 bits share bytes:

    4 bits     2 codes to a byte, the first in the low nibble
    B bits     8 codes to B bytes, in the planes of `numerics.packing`

so that whole groups of codes, wherever they are cut out of a tensor, are whole bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowprec.formats import Codebook, Format
from hf_lowprec.numerics import packing


def integer_unit(fmt: Format | Codebook) -> float:
    """The value of integer 1 for a format that is stored as 8-bit integers, 0 for any other."""
    return fmt.tiny if isinstance(fmt, Format) and fmt.exp == 0 and fmt.bits == 8 else 0.0


def native_dtype(fmt: Format | Codebook) -> torch.dtype | None:
    """torch's own dtype of the format, if it has one."""
    if fmt.torch_dtype_name is None:
        return None
    dtype: torch.dtype = getattr(torch, fmt.torch_dtype_name)
    return dtype


def code_dtype(fmt: Format | Codebook) -> torch.dtype:
    """dtype of one stored code before packing."""
    native = native_dtype(fmt)
    if native is not None:
        return native
    if integer_unit(fmt):
        return torch.int8 if fmt.min < 0 else torch.uint8
    return torch.uint8 if fmt.bits <= 8 else torch.int16


def is_packed(fmt: Format | Codebook) -> bool:
    """Whether codes share bytes."""
    return fmt.bits not in (8, 16)


def group_of(fmt: Format | Codebook) -> tuple[int, int]:
    """(codes, elements of the stored tensor) that begin and end together: (2, 1) for 4 bits, (8, B) for B bits."""
    if not is_packed(fmt):
        return 1, 1
    return (2, 1) if fmt.bits == 4 else (packing.GROUP, fmt.bits)


def stored_size(n: int, fmt: Format | Codebook) -> int:
    """Elements of the stored tensor for n codes."""
    codes, stored = group_of(fmt)
    return -(-n // codes) * stored


def pack_codes(codes: Tensor, fmt: Format | Codebook) -> Tensor:
    """n codes of a format that `is_packed`, any shape, as uint8 [stored_size(n)]."""
    if fmt.bits == 4:
        return pack_nibbles(codes)
    flat = codes.reshape(-1)
    if missing := -flat.numel() % packing.GROUP:
        flat = torch.cat([flat, flat.new_zeros(missing)])
    return packing.pack(flat.view(-1, packing.GROUP), fmt.bits).view(-1)


def unpack_codes(packed: Tensor, n: int, fmt: Format | Codebook) -> Tensor:
    """The inverse of `pack_codes`: uint8 [n], or int16 for more than 8 bits."""
    if fmt.bits == 4:
        return unpack_nibbles(packed, n)
    return packing.unpack(packed.view(-1, fmt.bits), fmt.bits, packing.GROUP).reshape(-1)[:n]


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes below 16, n of them, as uint8 [ceil(n / 2)]: the first of a pair in the low nibble."""
    flat = codes.reshape(-1)
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    pairs = flat.view(-1, 2)
    return (pairs[:, 1] << 4).bitwise_or_(pairs[:, 0])


def unpack_nibbles(packed: Tensor, n: int) -> Tensor:
    """The inverse of `pack_nibbles`: uint8 [n]."""
    return torch.stack([packed & 15, packed >> 4], -1).view(-1)[:n]


def to_integers(codes: Tensor) -> Tensor:
    """Codes of `e0m7` in sign and magnitude (uint8) as int8 in two's complement; -0 becomes 0."""
    magnitude = (codes & 127).to(torch.int8)
    return torch.where(codes > 127, -magnitude, magnitude)


def from_integers(integers: Tensor) -> Tensor:
    """The inverse of `to_integers`."""
    sign = (integers < 0).to(torch.uint8) << 7
    return integers.abs().to(torch.uint8) | sign


def lift_zeros(codes: Tensor, x: Tensor, fmt: Format | Codebook) -> None:
    """In place, before packing: where `x` is not 0, the code of a zero becomes the smallest one of the sign of `x`."""
    if isinstance(fmt, Codebook) or integer_unit(fmt):
        if isinstance(fmt, Codebook) and 0.0 not in fmt.values:
            return
        zero = fmt.values.index(0.0) if isinstance(fmt, Codebook) else 0
        if fmt.min >= 0:
            codes.clamp_(min=(x > 0).to(codes.dtype))
        else:
            codes += (x.sign().to(torch.int8) * (codes == zero)).to(codes.dtype)
        return
    bits = codes.view({1: torch.uint8, 2: torch.int16}[codes.itemsize])
    lost = ((bits & ((1 << (fmt.exp + fmt.man)) - 1)) == 0).logical_and_(x).to(bits.dtype)
    if fmt.signed and not fmt.has_negative_zero:  # otherwise a zero already has the sign
        bits |= (lost & (x < 0)) << (fmt.bits - 1)
    bits |= lost << (fmt.man if fmt.subnormal == "flush" else 0)
