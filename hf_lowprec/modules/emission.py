# SPDX-License-Identifier: Apache-2.0
"""Weights cast once per optimizer step for all layers at once, into the copies that `WeightCache` keeps.

A cast of each weight in its layer's forward pass costs a launch per layer and step. Here the first layer that needs
its copy after a step has a launch cast all weights of a device, to the same bits, with the amaxes that the step has
noted; the others find theirs. What keeps these is the cache alone: a table holds addresses. Their memory is written
again after the next step if nobody else holds it by then (a graph whose backward pass is still to come does), so that
in a plain loop the addresses stay.

A weight is left to its layer where nobody used its copy in the step before (the first step, a compiled model), where
the cache would keep nothing (policy `none`, shards, frozen weights), where a kernel does not cover it (scales other
than one per tensor, random rounding, weights that do not lie in rows), and where its scale may come from an amax that
nobody knows (of a weight that no kernel has stepped).

In a CUDA graph of the step nothing is cast into new memory, which would hold rubbish until the first replay: where it
would be needed, or the step before did not cast these weights, layers cast their own.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowprec.kernels.cast_weights import WeightTable
from hf_lowprec.kernels.mirror import capturing
from hf_lowprec.kernels.wires import native
from hf_lowprec.modules.state import LayerState
from hf_lowprec.modules.weight_cache import News
from hf_lowprec.operands import Quantized
from hf_lowprec.ops import parse_quant
from hf_lowprec.ops.cast_weights import WeightCast, new_copies

Copies = list[Quantized | None]


def table_for(device: torch.device) -> Any:
    """What casts weights there; None: each layer casts its own. On a CPU launches cost nothing."""
    return WeightTable(device) if native(device) else None


class Emission:
    """The weights of one model that one optimizer steps. layers: their states, kept by the model alone."""

    def __init__(self, layers: Sequence[tuple[LayerState, Tensor]]) -> None:
        self._layers = [(weakref.ref(layer), weight) for layer, weight in layers]
        self._places: dict[torch.device, _Place | None] = {}

    def copies(self) -> Copies:
        """Of weights to be cast again, the copies: memory for `defer`. To be asked before the step drops them."""
        layers = [ref() for ref, _ in self._layers]
        return [None if layer is None else layer.weight_cache.worth_keeping for layer in layers]

    def defer(self, copies: Copies) -> None:
        """After a step, whose amaxes the layers' caches were told: the first layer that needs its copy has all cast.

        Until then weights may be written through `.data`. A step that is being captured casts now: its replays have no
        forward pass behind them that could. copies: of `copies`.
        """
        now = False
        for (ref, weight), copy in zip(self._layers, copies, strict=True):
            layer = ref()
            if layer is not None and copy is not None:
                layer.weight_cache.await_cast(self._run, copy)
                now = now or capturing(weight.device)
        layer = copy = None  # `_run` counts who holds a copy
        copies.clear()
        if now:
            self._run()

    @torch.no_grad()
    def _run(self) -> None:
        layers = [ref() for ref, _ in self._layers]
        copies = [None if layer is None else layer.weight_cache.take_memory() for layer in layers]
        counts = list(map(sys.getrefcount, copies))
        for i, (_, weight) in enumerate(self._layers):
            layer, copy = layers[i], copies[i]
            if layer is None or copy is None or not weight.requires_grad:
                continue
            wanted = layer.weight_cache.wanted(weight, layer.spec)
            place = self._place(weight.device)
            quant = layer.spec.fprop_weight
            if wanted == "none" or place is None or quant is None or not place.table.takes(weight, quant):
                continue
            amax = layer.weight_cache.noted_amax(weight)
            if amax is None and not place.table.finds_amax and parse_quant(quant).scaling.method in _FROM_AMAX:
                continue
            alone = counts[i] == _ALONE + layer.weight_cache.gives(copy)
            if not alone or not _fits(copy, weight, wanted == "both"):
                copies[i] = copy = None  # its memory can serve for another
                copy = place.new_copy(weight, quant, wanted == "both")
            place.add(layer, weight, quant, amax, copy)
        copies.clear()
        for place in self._places.values():
            if place is not None:
                place.run()

    def _place(self, device: torch.device) -> _Place | None:
        if device not in self._places:
            table = table_for(device)
            self._places[device] = None if table is None else _Place(table, device)
        return self._places[device]


_FROM_AMAX = ("current", "delayed")
# References to an object in a list, as `map` has it counted. (3.14 counts others than 3.11.)
[_ALONE] = map(sys.getrefcount, [Quantized(None, torch.zeros(()))])


def _fits(quantized: Quantized, weight: Tensor, both: bool) -> bool:
    qdata = quantized.qdata
    return (
        qdata is not None
        and qdata.shape == weight.shape
        and qdata.get_device() == weight.get_device()
        and (quantized.transposed is not None) is both
    )


class _Place:
    """One device: its table, and what the casts of a step see."""

    def __init__(self, table: Any, device: torch.device) -> None:
        self.table, self._device = table, device
        self._counts = torch.zeros(0, 4, dtype=torch.int64, device=device)
        self._seen = torch.zeros(0, device=device)
        self._news: list[News] = []
        self._clear()

    def _clear(self) -> None:
        self._layers: list[LayerState] = []
        self._copies: list[Quantized] = []
        self._casts: list[WeightCast] = []
        self._missed = False

    def new_copy(self, weight: Tensor, quant: str, both: bool) -> Quantized | None:
        """None while a CUDA graph is being captured."""
        if capturing(self._device):
            self._missed = True
            return None
        qdata, transposed, scale = new_copies(weight, quant, transposed=both)
        return Quantized(qdata, scale, transposed)

    def add(self, layer: LayerState, weight: Tensor, quant: str, amax: Tensor | None, copy: Quantized | None) -> None:
        if copy is not None:
            assert copy.qdata is not None
            given = layer.operands[1].scale
            self._layers.append(layer)
            self._copies.append(copy)
            self._casts.append(WeightCast(weight, quant, given, amax, copy.qdata, copy.transposed, copy.scale))

    def run(self) -> None:
        try:
            if self._casts and not self._missed:
                self._run()
        finally:
            self._clear()  # the model alone keeps its layers and copies

    def _run(self) -> None:
        if len(self._news) != len(self._casts):
            if capturing(self._device):  # the table, too, is one of other weights
                return
            self._counts = torch.zeros(len(self._casts), 4, dtype=torch.int64, device=self._device)
            self._seen = torch.zeros(len(self._casts), device=self._device)
            self._news = list(map(News, self._counts.unbind(), self._seen.unbind()))
        self.table.run(self._casts, self._counts, self._seen)
        for layer, copy, cast, news in zip(self._layers, self._copies, self._casts, self._news, strict=True):
            layer.weight_cache.keep(cast.weight, copy, news)
