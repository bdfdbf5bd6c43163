# SPDX-License-Identifier: Apache-2.0
"""Codes of float32 numbers by one look-up: the fast way to round to a format of at most 8 bits.

Rounding is a step function. The high 16 bits of a float32 (it, as a bfloat16) are its *cell*; where no cell holds more
than one step, one 32-bit word per cell is enough. With `low` the other 16 bits,

    word = (code at the cell's start) * 2^16  +  (2^16 - low bits at which the step is)         0 if there is no step
    code = (word[cell] + low) >> 16

because the sum carries into the code exactly from the step on. The table holds word - cell * 2^16, so that all of the
float can be added instead of its low half. Where codes fall as |x| grows (the negative side of a codebook), the table
counts up from -code, and the code is a magnitude.

It costs eight passes over a slice where a binary search costs a hundred, and runs as it is on every device and under
torch.compile. `build` derives the table from the rounding itself, one comparison of functions at every cell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_CELLS = 1 << 16
_LOW = _CELLS - 1


class Lookup(NamedTuple):
    """words: int32 [2^16]; falling: whether negative numbers have falling codes. See the module docstring."""

    words: Tensor
    falling: bool


def build(codes: Callable[[Tensor], Tensor]) -> Lookup | None:
    """The table of a step function from float32 [n] to codes (integers below 256) [n], on the CPU.

    The function is monotonic on either side of zero, and one code for every NaN. None: a cell has more than one step,
    or a step is not to the next code.
    """
    start = torch.arange(_CELLS, dtype=torch.int32) << 16
    first = codes(start.view(torch.float32)).int()
    steps = codes((start | _LOW).view(torch.float32)).int() - first
    negative = start < 0
    falling = bool((steps[negative] < 0).any())
    if falling:
        steps, first = torch.where(negative, -steps, steps), torch.where(negative, -first, first)
    if int(steps.min()) < 0 or int(steps.max()) > 1:
        return None
    # The low bits of the last float before the step, by bisection; only a few hundred cells have one.
    where = steps.nonzero().view(-1)
    before, after = torch.zeros_like(start[where]), torch.full_like(start[where], _LOW)
    for _ in range(16):
        middle = (before + after) >> 1
        same = codes((start[where] | middle).view(torch.float32)).int() == first[where].abs()
        before, after = torch.where(same, middle, before), torch.where(same, after, middle)
    words = first.long() << 16
    words[where] += _CELLS - after.long()
    words -= start.long()
    wrapped = (words + (1 << 31)) % (1 << 32) - (1 << 31)
    return Lookup(wrapped.to(torch.int32), falling)


def look_up(x: Tensor, table: Lookup) -> Tensor:
    """int32 codes of float32 `x`, contiguous, in its shape; `table.words` on its device."""
    bits = x.view(-1).view(torch.int32)
    codes = table.words.index_select(0, (bits >> 16).bitwise_and_(_LOW))
    codes.add_(bits).bitwise_right_shift_(16)
    return (codes.abs_() if table.falling else codes).view(x.shape)
