# SPDX-License-Identifier: Apache-2.0
"""One thread, and processes for shards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from sharding import Pair, one_process


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of steps on tensors of a few hundred elements: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two ranks, started by the first call."""
    pair = Pair(str(tmp_path_factory.mktemp("pair")))
    yield pair
    pair.stop()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process as the only rank."""
    if not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    with one_process(str(tmp_path_factory.mktemp("alone"))):
        yield
