# SPDX-License-Identifier: Apache-2.0
"""Which lists of parameters the fused step keeps tables for. The kernels are stubbed here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from hf_lowprec import optim
from hf_lowprec.optim import fused


class Batch:
    made = 0

    def __init__(self, algorithm: str, items: Sequence[Any], wired: bool, amax: bool) -> None:
        type(self).made += 1
        self.items, self.device = list(items), torch.device("cpu")

    def same(self, items: Sequence[Any], wired: bool) -> bool:
        return all(a is b for a, b in zip(items, self.items, strict=True))

    def step(self, *args: Any) -> torch.Tensor:
        return torch.ones((), dtype=torch.bool)


def test_lists_that_come_and_go_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_Batch", Batch)
    params = [torch.nn.Parameter(torch.zeros(8)) for _ in range(40)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = optim.AdamW(params)
    items = optimizer._collect()
    steps = fused.Fused(optimizer)
    for count in range(2, 40):
        steps.step("adam", items[:count], None, None)
    assert len(steps._known) == fused._BATCHES
    Batch.made = 0
    for _ in range(3):  # gradient release: every parameter is a list of its own, and all of them stay
        for item in items:
            steps.step("adam", [item], None, None)
    assert Batch.made == len(items)
