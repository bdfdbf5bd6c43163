# SPDX-License-Identifier: Apache-2.0
"""One thread per test process: the suite runs on small machines, and sums are then the same from run to run."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
# The models of the tests are too small to gain on any GPU, where the measured rule would leave them in bf16.
os.environ["HF_LOWPREC_BREAK_EVEN"] = "0"
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.fixture
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts of benchmarks/ import each other by their bare names, which nothing else should see."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in list(sys.modules):
        if (BENCHMARKS / f"{name}.py").is_file():
            sys.modules.pop(name)


@pytest.fixture
def no_sessions() -> Iterator[None]:
    """For tests that look at global state: models of earlier tests are gone."""
    gc.collect()
    yield
