# SPDX-License-Identifier: Apache-2.0
"""Thousands of steps on tensors of a few hundred elements: more than one thread only waits for the others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
