# SPDX-License-Identifier: Apache-2.0
"""When a graph may be replayed, given that graphs share memory. No CUDA in here.

Graphs that are captured one after another share a pool: memory that one has freed by the time the next is captured
serves again. What a layer keeps between its forward and its backward pass is free outside of the stretch from the
capture of the one to the capture of the other. So while that layer's backward pass is still to come, only graphs that
were captured within this stretch leave its activations alone. In a training step that is every graph that runs:
forward 1 to N, backward N to 1, as they were captured. Two forward passes before a backward pass, a branch of the
model that is skipped, a second backward pass: each of these breaks the order, and is seen here.
"""

from __future__ import annotations

import weakref
from typing import Protocol


class Stamped(Protocol):
    """begun, ended: times of the captures of forward and backward; ended is None before there is one."""

    begun: int
    ended: int | None


class Pending:
    """A forward pass of one layer whose backward pass is to come. Lives as long as autograd may ask for that.

    lost: its activations were overwritten.
    """

    def __init__(self, graph: Stamped) -> None:
        self.graph = graph
        self.lost = False


class Order:
    def __init__(self) -> None:
        self._clock = 0
        self._pending: dict[int, weakref.ref[Pending]] = {}

    def now(self) -> int:
        """The time of a capture."""
        self._clock += 1
        return self._clock

    def pending(self) -> list[Pending]:
        """Those that autograd has dropped are none."""
        return [call for reference in list(self._pending.values()) if (call := reference()) is not None]

    @property
    def idle(self) -> bool:
        return not self.pending()

    def allows(self, captured: int | None) -> bool:
        """Whether replaying a graph that was captured then (None: is captured now) leaves what is pending alone."""
        return all(_apart(call.graph, captured) for call in self.pending())

    def begin(self, call: Pending) -> None:
        number = id(call)
        self._pending[number] = weakref.ref(call, lambda _: self._pending.pop(number, None))

    def end(self, call: Pending) -> None:
        """Its backward pass comes now. What else is pending may be lost by that."""
        self._pending.pop(id(call), None)
        for other in self.pending():
            if not _apart(other.graph, call.graph.ended):
                other.lost = True


def _apart(graph: Stamped, captured: int | None) -> bool:
    if captured is None:
        return graph.ended is None
    return graph.begun < captured and (graph.ended is None or captured < graph.ended)
