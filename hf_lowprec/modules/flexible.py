# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose operands have searched or learned ranges (arXiv 2208.09225).

`maxval` and, where the split is free, `man` (the mantissa width) of each operand are nn.Parameters that train by their
gradients; under method `search` they stay as `calibrate` set them. They are no Parameters of the module: checkpoints
keep the names that stock loaders know, `model.parameters()` and with it the script's optimizer, DDP and FSDP see the
weights alone. `optim.ranges` reduces their gradients over ranks and steps them beside whatever optimizer steps the
weights, and they travel in its state dict with the other low-precision state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowprec.formats import Format, get_format
from hf_lowprec.functional_flexible import Range, count, flexible_linear
from hf_lowprec.modules.linear import VARIANTS, LowPrecLinear
from hf_lowprec.modules.state import LayerState
from hf_lowprec.numerics.flexible import format_of, least_man, mans_of, rounded_man
from hf_lowprec.numerics.search import Estimator, Found, Magnitudes, column_energy, magnitudes_of, search
from hf_lowprec.recipe import Quant, Recipe

# What a layer looks at in its first batch; `calibrate` looks at everything.
_SAMPLE_OF_INPUT = 1 << 14
_SAMPLE_OF_ROW = 1 << 9


@dataclass(eq=False)
class Operand:
    """The range of one operand, and how its bits split.

    maxval: float32, 0-dim, or [N, 1] for the N output channels of a weight; 0 until it is found. man: float32, 0-dim.
    found: whether the host knows that maxval is not 0. The first tensors may be zeros, from which nothing is found.
    """

    quant: Quant
    maxval: nn.Parameter
    man: nn.Parameter
    found: bool = False
    _news: tuple[torch.cuda.Event, Tensor] | None = None  # the least maxval, on its way from a GPU

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_news": None}  # an event cannot be copied

    @classmethod
    def create(cls, quant: Quant, channels: int) -> Operand:
        fmt = get_format(quant.format)
        assert isinstance(fmt, Format)
        learned = quant.scaling.method == "learned"
        shape = (channels, 1) if quant.scaling.granularity == "row" else ()
        with torch.device("cpu"):
            maxval = nn.Parameter(torch.zeros(shape, dtype=torch.float32), requires_grad=learned)
            man = torch.full((), float(fmt.man), dtype=torch.float32)
            return cls(quant, maxval, nn.Parameter(man, requires_grad=learned and quant.split == "free"))

    @property
    def bits(self) -> int:
        return get_format(self.quant.format).bits

    @property
    def rows(self) -> bool:
        return self.quant.scaling.granularity == "row"

    @property
    def widths(self) -> tuple[int, int]:
        """The least and the most that `man` may be."""
        return least_man(self.bits), self.bits - 1

    @property
    def mans(self) -> list[int]:
        """The mantissa widths to choose from."""
        fmt = get_format(self.quant.format)
        assert isinstance(fmt, Format)
        return mans_of(fmt, free=self.quant.split == "free")

    @property
    def format(self) -> Format:
        """As it is now; waits for the device."""
        return format_of(int(rounded_man(self.man, self.bits)), self.bits)

    @property
    def range(self) -> Range:
        return Range(self.maxval, self.man, self.bits)

    @torch.no_grad()
    def fit(self, seen: Magnitudes, estimator: Estimator = "output", percentile: float = 99.99) -> Found:
        """Search range and split and keep them; a maxval of 1 where there is nothing but zeros."""
        found = search(seen, self.bits, self.mans, estimator, percentile)
        self.maxval.copy_(torch.where(found.maxval > 0, found.maxval, 1.0).reshape(self.maxval.shape))
        self.man.copy_(found.man)
        self.found = True
        return found

    @torch.no_grad()
    def find(self, seen: Magnitudes) -> None:
        """`fit`, unless that was done, and not from zeros. Nobody waits for a GPU: it is asked what it found before.

        A compiled graph cannot ask, and takes the first tensor whatever it holds.
        """
        if torch.compiler.is_compiling():
            self.fit(seen)
            return
        if self._news is not None and self._news[0].query():
            self.found, self._news = bool(self._news[1] > 0), None
            if self.found:
                return
        found = search(seen, self.bits, self.mans)
        new = self.maxval == 0
        self.maxval.copy_(torch.where(new, found.maxval.reshape(self.maxval.shape), self.maxval))
        self.man.copy_(torch.where(new.all(), found.man, self.man))
        least = self.maxval.amin()
        if not least.is_cuda:
            self.found = bool(least > 0)
        elif self._news is None and not torch.cuda.is_current_stream_capturing():
            arrived, value = torch.cuda.Event(), torch.empty((), pin_memory=True)
            value.copy_(least, non_blocking=True)
            arrived.record()
            self._news = arrived, value

    def to(self, device: torch.device) -> None:
        for parameter in (self.maxval, self.man):
            parameter.data = parameter.data.to(device)
            if parameter.grad is not None:
                parameter.grad = parameter.grad.to(device)


@dataclass(eq=False)
class Flexible:
    """What a layer of a flexible recipe has besides its `LayerState`."""

    input: Operand
    weight: Operand
    weight_is_kn: bool

    @classmethod
    def create(cls, recipe: Recipe, channels: int, *, weight_is_kn: bool) -> Flexible:
        """channels: output features. Raises AssertionError: not a flexible recipe."""
        assert recipe.fprop.input is not None and recipe.fprop.weight is not None
        operands = Operand.create(recipe.fprop.input, 1), Operand.create(recipe.fprop.weight, channels)
        return cls(*operands, weight_is_kn)

    @property
    def operands(self) -> dict[str, Operand]:
        return {"input": self.input, "weight": self.weight}

    def parameters(self) -> list[nn.Parameter]:
        """Those that train."""
        return [p for o in (self.input, self.weight) for p in (o.maxval, o.man) if p.requires_grad]

    def fit_weight(
        self, weight: Tensor, estimator: Estimator, percentile: float = 99.99, energy: Tensor | None = None
    ) -> Found:
        """Search the weight's ranges in all of it. energy: how much its columns count, [K]."""
        seen = magnitudes_of(self._nk(weight), rows=self.weight.rows, weights=energy)
        return self.weight.fit(seen, estimator, percentile)

    def importance(self, weight: Tensor) -> Tensor:
        """How much errors of the input's features count for the output: float64 [K]."""
        return column_energy(self._nk(weight))

    def find(self, input: Tensor, weight: Tensor) -> None:
        """Ranges for what has none yet, from a sample of the first batch and of each row of the weight.

        Raises RuntimeError: the recipe searches, which is `calibrate`'s to do.
        """
        for operand in (self.input, self.weight):
            if not operand.found and operand.quant.scaling.method == "search":
                raise RuntimeError(
                    "this layer has no ranges yet: its recipe searches them (method 'search') and never trains them; "
                    "call hf_lowprec.calibrate(model, data), or load_calibration(model, path), before the first "
                    "forward pass"
                )
        if not self.weight.found:
            most = _SAMPLE_OF_ROW if self.weight.rows else _SAMPLE_OF_INPUT
            energy = column_energy(input)
            self.weight.find(magnitudes_of(self._nk(weight), rows=self.weight.rows, most=most, weights=energy))
        if not self.input.found and input.numel():
            importance = self.importance(weight)
            self.input.find(magnitudes_of(input, rows=False, most=_SAMPLE_OF_INPUT, weights=importance))

    def _nk(self, weight: Tensor) -> Tensor:
        return weight.t() if self.weight_is_kn else weight

    def to(self, device: torch.device) -> None:
        self.input.to(device)
        self.weight.to(device)

    # --- checkpoints: beside the layer's other state (`modules.state`) ----------------------------------------------

    def tensors(self, role: str) -> dict[str, Tensor]:
        operand = self.operands.get(role)
        return {} if operand is None else {"maxval": operand.maxval, "man": operand.man}

    def loaded(self) -> None:
        """Values were copied into `tensors`."""
        for operand in (self.input, self.weight):
            operand.found = bool((operand.maxval > 0).all())


class FlexibleMixin:
    """The forward of a flexible recipe, over that of the class that `convert` gives any other."""

    _lowprec: LayerState
    weight: Tensor
    bias: Any

    def forward(self, input: Tensor) -> Tensor:
        state = self._lowprec
        if not state.enabled:
            return super().forward(input)  # type: ignore[misc, no-any-return]
        if state.operands[0].counts.device != input.device:
            state.to(input.device)
        flexible = state.flexible
        assert flexible is not None
        if not (flexible.input.found and flexible.weight.found):
            flexible.find(input, self.weight)
        observe = torch.is_grad_enabled()
        if observe:
            count(input, flexible.input.range, state.operands[0].counts)
            weight = self.weight.t() if flexible.weight_is_kn else self.weight
            count(weight, flexible.weight.range, state.operands[1].counts)
        return flexible_linear(
            input, self.weight, self.bias, flexible.input.range, flexible.weight.range,
            weight_is_kn=flexible.weight_is_kn, counts=state.operands[2].counts if observe else None,
        )  # fmt: skip


class FlexibleLinear(FlexibleMixin, LowPrecLinear):  # type: ignore[misc]
    """`nn.Linear` with searched or learned ranges. Made by `hf_lowprec.convert`, not by hand."""


def flexible_class(low_precision: type) -> type:
    """The class of a flexible recipe's layers for what is `low_precision` under other recipes."""
    chosen: type = FlexibleLinear
    if low_precision is not LowPrecLinear:
        from hf_lowprec.modules.conv1d import FlexibleConv1D

        chosen = FlexibleConv1D
    VARIANTS[chosen] = low_precision
    return chosen
