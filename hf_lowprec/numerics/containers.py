# SPDX-License-Identifier: Apache-2.0
"""How codes lie in memory: the dtype of a stored code, integers in two's complement, two 4-bit codes to a byte.

`numerics.encode` gives every format the same containers (uint8 or int16, sign and magnitude). Stored states differ in
two cases: formats without exponent are the integers that they mean (`e0m7` int8, `e0m8u` uint8), which a processor
converts by itself, and formats of 4 bits share bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowprec.formats import Codebook, Format


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
    """Whether two codes share a byte."""
    return fmt.bits == 4


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
