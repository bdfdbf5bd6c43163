# SPDX-License-Identifier: Apache-2.0
"""One thread per test process: the suite runs on small machines, and sums are then the same from run to run."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.fixture
def no_sessions() -> Iterator[None]:
    """For tests that look at global state: models of earlier tests are gone."""
    gc.collect()
    yield
