# SPDX-License-Identifier: Apache-2.0
"""Every test starts as a new process would."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No accelerate state, nothing requested, no GPU."""
    from accelerate.state import AcceleratorState

    for name in ("HF_LOWPREC_RECIPE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.setenv(name, "")  # remembers the value of before, also if there was none
        monkeypatch.delenv(name)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
    gc.collect()
