# SPDX-License-Identifier: Apache-2.0
"""When the layers of a list are captured: the life of one kind of pass through them. No CUDA in here.

    warming     eager, until a number of optimizer steps have passed without any change: by then kernels are compiled
                and tuned, delayed scales are known, and low-precision copies of weights are kept
    capturing   one pass through the layers, forward and backward, which captures each as it comes
    captured    replayed
    given up    eager: captured often enough, and something changed each time

Whatever changes a layer takes all graphs of the list with it, since they share memory in the order of their capture
(`graphs.order`); it is warming again.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, Literal, Protocol, TypeVar

from hf_lowprec.graphs.rehearsal import Rehearsal

MOST_DROPS = 5
_MOST_RESTARTS = 5  # optimizer steps in which a layer was another than in the one before, until that is said


class _Graph(Protocol):
    ended: int | None


G = TypeVar("G", bound=_Graph)
Way = Literal["eager", "capture", "replay"]


class Record(Generic[G]):
    """One kind of pass: the layers that take part, by index, each with the key of its call and what it was like.

    graphs: by index, of layers that were captured. why: what happened last. drops: how often graphs were dropped.
    quiet: optimizer steps without a change. rehearsal: watches the eager passes of them, if that was asked for.
    """

    def __init__(self, steps: int) -> None:
        self.stage: Literal["warming", "capturing", "captured", "given up"] = "warming"
        self.graphs: dict[int, G] = {}
        self.why = "warming up"
        self.drops = 0
        self._steps = steps
        self._seen: dict[int, tuple[Hashable, int]] = {}
        self.quiet = 0
        self.rehearsal: Rehearsal | None = None
        self._step: int | None = None
        self._restarts: set[int | None] = set()
        self._misfits: set[int] = set()
        self._second = False  # another pass before the one that captures is complete

    def begin(self, step: int, *, idle: bool, allowed: bool) -> None:
        """A pass begins.

        step: of the optimizer. idle: no backward pass is to come. allowed: there may be one more captured kind.
        """
        self._second = False
        if self.stage == "warming":
            if step != self._step:
                self._step = step
                self.quiet += bool(self._seen)
            if self.quiet >= self._steps and idle and allowed:
                self.stage = "capturing"
        elif self.stage == "capturing":
            if all(graph.ended is not None for graph in self.graphs.values()) and self.graphs:
                self.stage, self.why = "captured", "captured"
            elif idle:
                self.drop("a forward pass without its backward pass")
            else:
                self._second = True

    def way(self, index: int, key: Hashable, version: int, changed: str) -> Way:
        """How a call of layer `index` is to run.

        version: of what the layer is like (`graphs.snapshot`). changed: what made it another one.
        """
        now = (key, version)
        known = self._seen.get(index)
        if self.stage == "warming":
            if known != now:
                self._seen[index] = now
                self.quiet, self.rehearsal = 0, None
                if known is not None:
                    self._restarts.add(self._step)
                    if len(self._restarts) > _MOST_RESTARTS:
                        self.why = f"{changed} keeps changing"
            return "eager"
        if self.stage == "given up" or self._second:
            return "eager"
        if known != now:
            self.drop(f"{changed} changed" if known is not None else "another layer takes part")
            self._seen[index] = now
            return "eager"
        if index in self.graphs:
            return "replay" if self.stage == "captured" else "eager"
        return "capture" if self.stage == "capturing" else "eager"

    def misfit(self, step: int, why: str) -> None:
        """A call could not be replayed for how the graphs are linked; if that goes on, they are captured anew."""
        self._misfits.add(step)
        if len(self._misfits) > 1:
            self.drop(why)

    def drop(self, why: str) -> None:
        """Forget all graphs."""
        self.graphs.clear()
        self._misfits.clear()
        self.drops += 1
        self.quiet, self._step = 0, None
        self.why = why
        self.stage = "warming"
        if self.drops > MOST_DROPS:
            self.give_up(f"captured {self.drops} times, and each time: {why}")

    def give_up(self, why: str) -> None:
        """Eager from now on."""
        self.stage, self.why = "given up", why
