# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for CUDA graphs on the CPU, and training loops for tests of `hf_lowprec.graphs`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowprec.graphs import LayerGraphs, graph_layers
from hf_lowprec.graphs.capture import Function


class Replays:
    """Runs a function again and writes its results where those of the first time lie, as a graph's replay does.

    The first replay does nothing: unlike a capture, `record` has run the function.
    """

    def __init__(self, function: Function, results: list[Tensor | None]) -> None:
        self.function, self.results, self.fresh = function, results, True
        self.grad = torch.is_grad_enabled()

    def replay(self) -> None:
        if self.fresh:
            self.fresh = False
            return
        with torch.set_grad_enabled(self.grad):
            fresh = self.function()
        for old, new in zip(self.results, fresh, strict=True):
            if old is not None:
                assert new is not None
                with torch.no_grad():
                    old.copy_(new)


class FakeCapturer:
    device = torch.device("cpu")

    def __init__(self, device: torch.device) -> None:
        assert device == self.device
        self.recorded = 0

    def record(self, function: Function) -> tuple[Replays, list[Tensor | None]]:
        results = function()
        self.recorded += 1
        return Replays(function, results), results


class FakeMark:
    def __init__(self, reached: bool) -> None:
        self._reached = reached

    def reached(self) -> bool:
        return self._reached


class FakeGauge:
    """`waiting`: what marks answer. `waits`, `lacking`: what is found of each layer, and missing."""

    def __init__(self, waiting: bool = True, waits: list[str] | None = None, lacking: int = 0) -> None:
        self.waiting, self.found, self.lacking = waiting, waits or [], lacking
        self.asked: list[int] = []

    def __call__(self, device: torch.device) -> FakeGauge:
        assert device == torch.device("cpu")
        return self

    def mark(self) -> FakeMark:
        return FakeMark(self.waiting)

    @contextmanager
    def waits(self) -> Iterator[list[str]]:
        yield list(self.found)

    def lacks(self, nbytes: int) -> int:
        self.asked.append(nbytes)
        return self.lacking


def fake_graphs(model: nn.Module, **kwargs: Any) -> LayerGraphs:
    return graph_layers(model, capturer=FakeCapturer, device_type="cpu", **{"warmup_steps": 2, **kwargs})


class Layer(nn.Module):
    """A residual layer whose call has what those of transformers have."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.scale = 1.0

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, position: tuple[Tensor, Tensor] | None = None,
        use_cache: bool = False, past_key_values: Any = None,
    ) -> Tensor:  # fmt: skip
        h = self.norm(x) * self.scale
        if position is not None:
            h = h * position[0] + h.roll(1, -1) * position[1]
        if mask is not None:
            h = h * mask
        return x + self.down(torch.nn.functional.gelu(self.up(h)))


class Stack(nn.Module):
    def __init__(self, layers: int = 3, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        position = (torch.full((x.shape[1], 1), 0.75), torch.full((x.shape[1], 1), 0.25))
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, position=position, use_cache=False, **kwargs)
        return self.head(x).square().mean()


def stack(**kwargs: Any) -> Stack:
    torch.manual_seed(0)
    return Stack(**kwargs)


def batch(number: int, length: int = 8, width: int = 16) -> Tensor:
    return torch.randn(2, length, width, generator=torch.Generator().manual_seed(number))
