# SPDX-License-Identifier: Apache-2.0
"""A float32 master in two parts: a Parameter, and what it lacks.

A bfloat16 Parameter and its low bits: integers, no arithmetic that could round.

    16 bits   p = (bits + 0x8000) >> 16                    half away from zero; bits: the float32 seen as an int32
              r = bits - (p << 16)                         int16; the master is (p << 16) + r, exactly
     8 bits   b = bits rounded to a multiple of 2^8        e8m15: 24 bits in all; stochastically, or ties to even
              p = (b + 0x8000) >> 16
              r = (b - (p << 16)) >> 8                     int8; the master is (p << 16) + (r << 8) = b

p is bfloat16(master), ties away from zero, and nothing else: the model sees an ordinary bfloat16 Parameter.

A finite master never becomes infinite: the half unit below 2^128, which p cannot round up, is held as the largest p
and the largest r, at most half a unit of p too small. A non-finite one is p alone.

Where somebody edits the Parameter and leaves r, the master is off by at most half a unit of p (as a float32 that was
just written to bfloat16). An edit may make what `split` never gives: a negative r beside a zero counts as 0, and so
does any r beside Inf or NaN; as integers they would make a NaN of a pruned weight.

A Parameter of any format Q, and what rounding to it leaves (HFP8, NeurIPS 2019), in a format R of its own:

    p = Q(t)            res = R(t - p)                  float32 differences
    t = p + res,        or p where Q(p + res / 2) != p: somebody has edited it

|res| is at most half a unit of p (more where Q saturates, whose rest res also holds), so that half of it never changes
Q. An edit to another value of Q that is far smaller than what was there, or to no value of Q, counts as it is; one to
a value of Q of the same size keeps its residual, and is off by less than a unit of p.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_TOP = 0x7F7F  # the largest finite bfloat16
_INF = 0x7F80


def residual_dtype(bits: int) -> torch.dtype:
    return torch.int8 if bits == 8 else torch.int16


def split(master: Tensor, bits: int, words: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(Parameter bfloat16, residual int8 or int16) of a float32 master, in its shape.

    words: int32 of which the low 8 bits round an 8-bit residual stochastically; None rounds it to nearest.
    """
    exact = master.detach().contiguous().view(torch.int32)
    b = exact
    if bits == 8:
        half = ((exact >> 8) & 1) + 0x7F if words is None else words & 0xFF
        b = (exact + half) & ~0xFF
    param = (b + 0x8000) >> 16
    # A magnitude that has become infinite is the largest finite one; the sign is bit 15 of the int16 and stays.
    top = torch.where(param < 0, _TOP - 0x8000, _TOP).to(torch.int32)
    param = torch.where((param & 0x7FFF) >= _INF, top, param)
    low = (b - (param << 16)) >> (16 - bits)
    limit = 1 << (bits - 1)
    low = low.clamp_(-limit, limit - 1)
    finite = master.isfinite()
    plain = master.to(torch.bfloat16)
    qparam = torch.where(finite, param.to(torch.int16), plain.view(torch.int16)).view(torch.bfloat16)
    return qparam, torch.where(finite, low, 0).to(residual_dtype(bits))


def join(param: Tensor, residual: Tensor) -> Tensor:
    """The float32 master of a bfloat16 Parameter and its residual (int8 or int16 of its shape)."""
    high = param.detach().contiguous().view(torch.int16).to(torch.int32) << 16
    low = residual.to(torch.int32) << (8 if residual.dtype == torch.int8 else 0)
    magnitude = high & 0x7FFF0000
    low = torch.where(magnitude == 0, low.clamp(min=0), low).masked_fill_(magnitude >= _INF << 16, 0)
    return high.add_(low).view(torch.float32)


def rejoin(param: Tensor, residual: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """The master of a Parameter and its residual, both in float32 (or float64), under `rounded`, which is Q."""
    return torch.where(rounded(param + residual * 0.5) == param, param + residual, param)
