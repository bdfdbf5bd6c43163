# SPDX-License-Identifier: Apache-2.0
"""Whether layers gain from graphs, and can have them: seen in eager passes before any is captured. No CUDA in here.

Graphs that nobody asked for must not take anything away: neither memory nor an error of their own. So before a list is
captured by itself (`graph_layers(when="waiting")`), two steps of its eager passes are watched:

- Does the GPU wait for the host? A mark is put into the GPU's queue when a layer begins, forward and backward. If the
  GPU has passed it by the time the host has issued the layer, it is less than one layer behind. Where it computes
  longer than the host takes to issue, it falls further behind with every layer.
- Does a forward wait for the device, or store things in its modules? A capture would fail, replays would not do it.
- Do gradients come once per pass, last layer first? Graphs keep activations for that order alone.
- Is there memory for what graphs keep?
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from hf_lowprec.graphs import calls
from hf_lowprec.graphs.snapshot import attributes, stored

BUSY_GPU = "the GPU is busy all the time"
ORDER = "gradients do not come once per pass, last layer first"
# Share of the marks that the GPU must have passed. A pass that begins with an empty queue, as after a look at the
# loss, has some of them in its forward even where the backward pass keeps the GPU busy.
MARKS = 0.5
# Packages whose layers are known to branch on what `snapshot` sees alone.
KNOWN = ("torch", "transformers", "peft", "liger_kernel", "hf_lowprec")


class Mark(Protocol):
    def reached(self) -> bool:
        """Whether the GPU has come to it; does not wait."""
        ...


class Gauge(Protocol):
    """What a rehearsal asks of a device."""

    def mark(self) -> Mark:
        """Put into the queue now."""
        ...

    def waits(self) -> AbstractContextManager[list[str]]:
        """Lists, afterwards, what in the body has waited for the device."""
        ...

    def lacks(self, nbytes: int) -> int:
        """Bytes missing for `nbytes` more, and for another pass's activations; 0: there is room."""
        ...


class Rehearsal:
    """Eager passes of one kind through a list of layers.

    why: what speaks against capturing them, as far as was seen, or None.
    """

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge
        self._lag = _Lag(gauge)
        self._passes = 0
        self._went: list[int] = []  # layers with outputs that need gradients, in the order of this pass
        self._back = _Back(self._lag)
        self.why: str | None = None

    def begin(self) -> None:
        """Another pass begins."""
        self._close()
        self._passes += 1
        self._lag.rest()
        self._went, self._back = [], _Back(self._lag)

    def _close(self) -> None:
        if self._went and self._back.came != self._went[::-1]:
            self.why = self.why or ORDER

    def call(self, index: int, layer: nn.Module, run: Callable[[], Any]) -> Any:
        """Layer `index` of the pass, by `run`."""
        self._lag.layer()
        out = self._searched(layer, run) if self._passes == 1 else run()
        try:
            results, _ = calls.flatten(out, "the results")
        except calls.Opaque as error:
            self.why = self.why or str(error)
            return out
        first = next((tensor for tensor in results if tensor.requires_grad), None)
        if first is not None:
            self._went.append(index)
            first.register_hook(partial(self._back.gradient, index))
        return out

    def _searched(self, layer: nn.Module, run: Callable[[], Any]) -> Any:
        before = attributes(layer)
        with self._gauge.waits() as waits:
            out = run()
        if waits:
            self.why = self.why or f"its forward waits for the device ({waits[0]})"
        where = stored(before, attributes(layer))
        if where is not None:
            self.why = self.why or f"its forward stores {where}"
        return out

    def verdict(self, nbytes: int) -> str | None:
        """Why the layers are not to be captured, or None.

        nbytes: what their graphs will keep beside activations.
        """
        self._close()
        if self.why is not None:
            return self.why
        if not self._lag.waits:
            return BUSY_GPU
        lacking = self._gauge.lacks(nbytes)
        return f"{lacking / 2**20:.0f} MiB of memory are missing for them" if lacking else None


class _Lag:
    """How often the GPU was less than a layer behind."""

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge
        self._asked = self._reached = 0
        self._mark: Mark | None = None

    def rest(self) -> None:
        """What comes next does not follow the layer before."""
        self._mark = None

    def layer(self) -> None:
        """A layer begins."""
        if self._mark is not None:
            self._asked += 1
            self._reached += self._mark.reached()
        self._mark = self._gauge.mark()

    @property
    def waits(self) -> bool:
        return self._reached > MARKS * self._asked


class _Back:
    """The backward pass of one pass. came: layers whose outputs got their gradients."""

    def __init__(self, lag: _Lag) -> None:
        self._lag = lag
        self.came: list[int] = []

    def gradient(self, index: int, grad: Tensor) -> None:
        if not self.came:
            self._lag.rest()
        self._lag.layer()
        self.came.append(index)


def unknown(layers: Iterable[nn.Module]) -> str | None:
    """Why layers of these classes are not captured unasked: a forward may branch on what nobody sees, as a global."""
    for layer in layers:
        for module in layer.modules():
            package = type(module).__module__.partition(".")[0]
            if package not in KNOWN:
                return f"{type(module).__name__} is of {package}, whose layers are captured where asked for only"
    return None


def several_devices(layers: Iterable[nn.Module]) -> str | None:
    devices: set[Hashable] = {p.device for layer in layers for p in layer.parameters()}
    return "layers on several devices" if len(devices) > 1 else None
