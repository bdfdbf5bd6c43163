# SPDX-License-Identifier: Apache-2.0
"""Products of integer formats, exactly: codes as int8, sums in int32.

A format without exponent bits, and a codebook of whole numbers, is a set of integers times one unit. A GEMM of two
such operands is a GEMM of integers, which tensor cores and processors have, and whose sums no order can change.
Float32 would hold them up to 2^24 only, which 8-bit operands reach with 1041 products.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from hf_lowprec.formats import Codebook, Format, get_format
from hf_lowprec.numerics.containers import to_integers

_EXACT = 1 << 24  # float32 holds every integer up to here


def integer_unit_of(format_name: str) -> float:
    """The value of integer 1, a power of two."""
    fmt = get_format(format_name)
    return fmt.tiny if isinstance(fmt, Format) else 1.0


def integers(codes: Tensor, format_name: str) -> Tensor:
    """int8 of the shape of `codes`, which `numerics.encode` gave: values = integers * unit."""
    fmt = get_format(format_name)
    if isinstance(fmt, Codebook):
        if fmt.values == (-1.0, 1.0):
            return (codes << 1).to(torch.int8).sub_(1)
        table = torch.tensor(fmt.values, dtype=torch.int8, device=codes.device)
        return table[codes.to(torch.int32)]
    if fmt.bits == 8:
        return to_integers(codes)
    half = 1 << fmt.man
    magnitude = (codes & (half - 1)).to(torch.int8)
    return torch.where(codes >= half, -magnitude, magnitude)


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T of int8 [M, K] and [N, K], exactly, int32 [M, N].

    Raises OverflowError: K of more than 2^31 / 128^2 = 131072 could leave int32.
    """
    if a.shape[1] > 1 << 17:
        raise OverflowError(f"a sum of {a.shape[1]} products of 8-bit integers may leave int32; at most {1 << 17}")
    if a.device.type == "cpu" and not _processor_is_exact():
        return in_float32(a, b)
    if not a.numel() or not b.numel():
        return torch.zeros((a.shape[0], b.shape[0]), dtype=torch.int32, device=a.device)
    if a.device.type != "cuda":
        if a.shape[1] == 1:  # torch 2.13 takes a column for a row there and reads what was never written
            a, b = torch.nn.functional.pad(a, (0, 1)), torch.nn.functional.pad(b, (0, 1))
        return torch._int_mm(a, b.t())
    # cuBLASLt: more than 16 rows, and the other sizes in multiples of 8. Zeros add nothing.
    m, n = a.shape[0], b.shape[0]
    a, b = _padded(a, max(32, -(-m // 8) * 8)), _padded(b, -(-n // 8) * 8)
    return torch._int_mm(a, b.t())[:m, :n]


def _padded(x: Tensor, rows: int) -> Tensor:
    down, right = rows - x.shape[0], -x.shape[1] % 8
    return torch.nn.functional.pad(x, (0, right, 0, down)) if down or right else x


def in_float32(a: Tensor, b: Tensor) -> Tensor:
    """`integer_product` by float32 products short enough to be exact."""
    step = _EXACT // (1 << 14)
    out = torch.zeros((a.shape[0], b.shape[0]), dtype=torch.int32, device=a.device)
    with torch.autocast(a.device.type, enabled=False):
        for start in range(0, a.shape[1], step):
            out += (a[:, start : start + step].float() @ b[:, start : start + step].float().t()).to(torch.int32)
    return out


@cache
def _processor_is_exact() -> bool:
    """Processors without VNNI add pairs of products in saturating int16, which some libraries let through."""
    worst = torch.full((32, 64), 127, dtype=torch.int8)
    both = torch.cat([worst, -worst])
    return torch.equal(torch._int_mm(both, both.t()), in_float32(both, both))
