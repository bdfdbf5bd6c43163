# SPDX-License-Identifier: Apache-2.0
"""Device memory that follows the host, without anybody waiting, CUDA graphs included."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor


class Mirror:
    """Parts of one int64 tensor on the device, and how they get new contents without anybody waiting.

    A CUDA graph copies at every replay from the pinned memory that it saw when it was captured. That memory is
    allocated before (during a capture nothing may be), given to the graph for good, and never written again. A graph
    writes all parts, so that what other steps wrote in between does not concern it.
    """

    def __init__(self, parts: Sequence[Tensor], device: torch.device) -> None:
        # Each part begins at 16 bytes, which is what kernels are compiled for.
        self._host = torch.cat([torch.nn.functional.pad(part.reshape(-1), (0, part.numel() % 2)) for part in parts])
        self._whole = torch.empty_like(self._host, device=device)
        self._sizes = [part.numel() for part in parts]
        self._begins = [0, *itertools.accumulate(size + size % 2 for size in self._sizes)]
        self._pinned = device.type == "cuda"
        self._spare: Tensor | None = None
        self._graphs: list[Tensor] = []
        self._send(0, len(self._host))

    def part(self, number: int) -> Tensor:
        begin = self._begins[number]
        return self._whole[begin : begin + self._sizes[number]]

    def write(self, number: int, values: Tensor) -> None:
        """New contents of one part. While a graph is captured they are only noted, for `capture`."""
        begin = self._begins[number]
        end = begin + self._sizes[number]
        self._host[begin:end] = values.reshape(-1)
        if not capturing(self._whole.device):
            self._send(begin, end)

    def ready(self) -> None:
        """Makes sure that a capture finds memory, and undoes what replays of captured graphs have written here."""
        if self._graphs:
            self._send(0, len(self._host))
        if self._pinned and self._spare is None:
            self._spare = torch.empty_like(self._host, pin_memory=True)

    def capture(self) -> None:
        """Has the graph that is being captured write everything. Raises RuntimeError: no memory was made ready."""
        if self._spare is None:
            raise RuntimeError("an optimizer step was captured twice without a step between: run one")
        staged, self._spare = self._spare, None
        self._graphs.append(staged.copy_(self._host))
        self._whole.copy_(staged, non_blocking=True)

    def _send(self, begin: int, end: int) -> None:
        # A fresh pinned block each time: torch gives it out again only after the copy.
        some = self._host[begin:end]
        self._whole[begin:end].copy_(some.pin_memory() if self._pinned else some, non_blocking=self._pinned)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def int64(values: Sequence[int]) -> Tensor:
    """int64 [n] of Python ints, without a look at each."""
    if not len(values):
        return torch.zeros(0, dtype=torch.int64)
    return torch.frombuffer(array("q", values), dtype=torch.int64)
