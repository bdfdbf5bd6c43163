# SPDX-License-Identifier: Apache-2.0
"""The correctly rounded square root, against numpy's, which is the processor's own."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_lowprec.numerics import sqrt_rn


def expected(x: Tensor) -> Tensor:
    return torch.from_numpy(np.sqrt(x.numpy()))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_every_significand_of_two_binades() -> None:
    """All others are these, times a power of four."""
    for bits in torch.arange(0x3F000000, 0x40000000, dtype=torch.int32).split(1 << 21):
        x = bits.view(torch.float32)
        assert same_bits(sqrt_rn(x), expected(x))


def test_ends_of_the_range_and_buffers() -> None:
    special = torch.tensor([0.0, -0.0, torch.inf, 2.0**-149, 2.0**-126, 3.4028234663852886e38])
    spread = torch.arange(0, 0x7F800000, 1009, dtype=torch.int32).view(torch.float32)
    for x in (special, spread):
        out, *wide = (torch.empty_like(x, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.float64))
        assert sqrt_rn(x, out=out, wide=(wide[0], wide[1])) is out
        assert same_bits(out, expected(x)) and same_bits(sqrt_rn(x), expected(x))
    assert bool(sqrt_rn(torch.tensor([-1.0, torch.nan])).isnan().all())
