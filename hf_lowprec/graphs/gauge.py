# SPDX-License-Identifier: Apache-2.0
"""What a rehearsal asks of a GPU (`graphs.rehearsal`). Nothing here waits for the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_WAITED = "called a synchronizing CUDA operation"  # torch's words in its synchronisation debug mode,
_MODE = "Synchronization debug mode is a prototype"  # and those about it


class CudaMark:
    def __init__(self) -> None:
        self._event = torch.cuda.Event()
        self._event.record()

    def reached(self) -> bool:
        return bool(self._event.query())


class CudaGauge:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> CudaMark:
        with torch.cuda.device(self._device):
            return CudaMark()

    @contextmanager
    def waits(self) -> Iterator[list[str]]:
        """By torch's synchronisation debug mode, unless the user has it on. Other threads count, too."""
        found: list[str] = []
        if torch.cuda.get_sync_debug_mode():
            yield found
            return
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode("default")
        for warning in said:
            if _WAITED in str(warning.message):
                found.append(f"{warning.filename.rpartition('/')[2]}:{warning.lineno}")
            elif _MODE not in str(warning.message):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

    def lacks(self, nbytes: int) -> int:
        """Each capture begins with giving cached memory back, so that counts as free."""
        free, _ = torch.cuda.mem_get_info(self._device)
        allocated = torch.cuda.memory_allocated(self._device)
        cached = torch.cuda.memory_reserved(self._device) - allocated
        pass_ = torch.cuda.max_memory_allocated(self._device) - allocated
        return max(0, nbytes + pass_ - free - cached)
