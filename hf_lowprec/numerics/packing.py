# SPDX-License-Identifier: Apache-2.0
"""Codes of any width in memory, exactly that many bits each: planes of 8, 4, 2 and 1 bits (arXiv 2405.13938).

A width B is the sum of powers of two, 7 = 4 + 2 + 1. The B bits of a code are cut accordingly, the highest first, and
each cut is stored as a plane of its own, so that bytes are addressed, shifted and masked alike throughout a plane:

    plane of w bits for n codes (n a multiple of 8):   n w / 8 bytes
    code number  i * (n w / 8) + j                     bits [i w, (i + 1) w) of byte j

Neighbouring bytes hold neighbouring codes, so that both directions are a few shifts over contiguous memory. Planes
follow each other, the one with the highest bits first; n is the number of codes rounded up to a multiple of 8, the
codes beyond are 0. Everything goes by the last axis: a matrix is packed row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 8  # codes that fill whole bytes in every plane
MAX_BITS = 16


def planes_of(bits: int) -> tuple[int, ...]:
    """The widths of the planes, falling: 7 is (4, 2, 1), 9 is (8, 1). Raises ValueError: not 1 to 16."""
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"codes have 1 to {MAX_BITS} bits, got {bits}")
    widths = [8] * (bits // 8) + [w for w in (4, 2, 1) if bits % 8 & w]
    return tuple(widths)


def packed_size(n: int, bits: int) -> int:
    """Bytes of n packed codes: n bits / 8 where n is a multiple of 8."""
    return -(-n // GROUP) * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n] below 2^bits (uint8, or int16 whose 16 bits they are) as uint8 [..., packed_size(n, bits)]."""
    n = codes.shape[-1]
    whole = -(-n // GROUP) * GROUP
    if whole != n:
        codes = torch.cat([codes, codes.new_zeros((*codes.shape[:-1], whole - n))], -1)
    out = torch.empty((*codes.shape[:-1], packed_size(n, bits)), dtype=torch.uint8, device=codes.device)
    low, start = bits, 0
    for width in planes_of(bits):
        low -= width
        size = whole * width // 8
        # An arithmetic shift of int16 repeats the sign, which the mask drops.
        lanes = ((codes >> low) & ((1 << width) - 1)).to(torch.uint8).unflatten(-1, (8 // width, size))
        plane = out[..., start : start + size]
        plane.copy_(lanes.select(-2, 0))
        for lane in range(1, 8 // width):
            plane.bitwise_or_(lanes.select(-2, lane) << (lane * width))
        start += size
    return out


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack`: codes [..., n], uint8 for at most 8 bits, else int16.

    Raises ValueError: `packed` is not as long as n codes are.
    """
    if packed.shape[-1] != packed_size(n, bits):
        raise ValueError(f"{n} codes of {bits} bits are {packed_size(n, bits)} bytes, got {packed.shape[-1]}")
    whole = -(-n // GROUP) * GROUP
    dtype = torch.uint8 if bits <= 8 else torch.int16
    out = torch.empty((*packed.shape[:-1], whole), dtype=dtype, device=packed.device)
    low, start = bits, 0
    for width in planes_of(bits):
        low -= width
        size = whole * width // 8
        plane, lanes = packed[..., start : start + size], out.unflatten(-1, (8 // width, size))
        for lane in range(8 // width):
            cut = ((plane >> (lane * width)) & ((1 << width) - 1)).to(dtype) << low
            target = lanes.select(-2, lane)
            if start:
                target.bitwise_or_(cut)
            else:
                target.copy_(cut)
        start += size
    return out[..., :n]


__all__ = ["GROUP", "pack", "packed_size", "planes_of", "unpack"]
