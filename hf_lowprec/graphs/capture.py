# SPDX-License-Identifier: Apache-2.0
"""Recording what a function launches, to launch it again: the one place that touches CUDA graphs.

All of a list's graphs share a pool and a side stream, as torch asks for. Captures are `thread_local`, since the
threads of a data loader go on pinning memory meanwhile, and the backward pass is captured in autograd's thread. torch
registers the default generator with every graph, so dropout draws new numbers at each replay.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class GraphError(RuntimeError):
    """CUDA graphs were asked for and cannot be had; or a replay would have been wrong. The message says which."""


class CaptureError(GraphError):
    """A capture failed while it was on: torch does not promise that training goes on after that."""


class Recording(Protocol):
    def replay(self) -> None: ...


Function = Callable[[], list[Tensor | None]]


class Capturer(Protocol):
    """device: where tensors must be."""

    device: torch.device

    def record(self, function: Function) -> tuple[Recording, list[Tensor | None]]:
        """What launches again what `function` launches, and the tensors that it returned, which a replay writes.

        Nothing has run before the first replay. Raises RuntimeError.
        """
        ...


class CudaCapturer:
    """Raises GraphError: there is no CUDA device."""

    def __init__(self, device: torch.device) -> None:
        if not torch.cuda.is_available():
            raise GraphError("graphs of layers need a CUDA device, and torch.cuda.is_available() is False")
        if device.type != "cuda":
            raise GraphError(f"graphs of layers need a model on a CUDA device; this one is on {device}: move it first")
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        with torch.cuda.device(self.device):
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()
        # A pool whose last graph is gone takes no other one, so one stays.
        self._keeper, _ = self.record(lambda: [torch.zeros(1, device=self.device)])

    def record(self, function: Function) -> tuple[Recording, list[Tensor | None]]:
        collects = gc.isenabled()
        gc.disable()  # what it frees may be a graph or an event, which a capture forbids
        try:
            with torch.cuda.device(self.device):
                graph = torch.cuda.CUDAGraph()
                how = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
                with torch.cuda.graph(graph, **how):  # type: ignore[arg-type]
                    out = function()
                return graph, out
        finally:
            if collects:
                gc.enable()
