# SPDX-License-Identifier: Apache-2.0
"""The correctly rounded square root, against numpy's, which is the processor's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from hf_lowprec.numerics import roots, sqrt_rn


def expected(x: Tensor) -> Tensor:
    return torch.from_numpy(np.asarray(np.sqrt(x.numpy())))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


@pytest.fixture(params=["numpy", "float64"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "float64":
        monkeypatch.setattr(roots, "_numpy", lambda: None)


def test_every_significand_of_two_binades() -> None:
    """All others are these, times a power of four."""
    for bits in torch.arange(0x3F000000, 0x40000000, dtype=torch.int32).split(1 << 21):
        x = bits.view(torch.float32)
        assert same_bits(sqrt_rn(x), expected(x))


def test_ends_of_the_range_and_outputs() -> None:
    special = torch.tensor([0.0, -0.0, torch.inf, 2.0**-149, 2.0**-126, 3.4028234663852886e38])
    spread = torch.arange(0, 0x7F800000, 1009, dtype=torch.int32).view(torch.float32)
    for x in (special, spread, torch.tensor(2.0), spread[:600].view(2, 300).t(), spread[:0]):
        right, out = expected(x), torch.empty_like(x)
        assert sqrt_rn(x, out=out) is out
        assert same_bits(out, right) and same_bits(sqrt_rn(x), right)
        assert sqrt_rn(x, out=x) is x and same_bits(x, right)
    assert bool(sqrt_rn(torch.tensor([-1.0, torch.nan])).isnan().all())


def test_subclasses_and_gradients() -> None:
    """Tensors that numpy cannot look into."""
    x = torch.tensor([2.0], requires_grad=True)
    sqrt_rn(x).backward()
    assert float(x.grad) == pytest.approx(0.5 / 2**0.5)
    with FakeTensorMode():
        assert sqrt_rn(torch.empty(3)).shape == (3,)
