# SPDX-License-Identifier: Apache-2.0
"""The three GEMMs of a linear layer: their operand slots, their sums, and what comes before them."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator
from pydantic.dataclasses import dataclass

from hf_lowprec.formats import Format, get_format, get_sum_format
from hf_lowprec.recipe.quant import CONFIG, Quant, Rounding, refuse_states_only


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Accumulation:
    """How a GEMM sums its products: in `format` (None = float32), optionally in chunks whose sums add in `outer`.

    format: every addition, one product after the other, rounds to it (`numerics.accumulation`); `"tc14"` is the
        tensor core's 14 bits. None: float32, in whatever order is fastest.
    rounding: of every addition that rounds, those of chunk sums included.
    chunk: products per chunk (CL of arXiv 1812.08011, section 3.1); None: one sum over all of them.
    outer: the format in which the sums of chunks add; None: float32.
    fast: let the tensor core keep its partial sums (about 14 bits on Hopper) instead of promoting them to float32.
    """

    format: str | None = None
    rounding: Rounding = Rounding()
    chunk: int | None = None
    outer: str | None = None
    fast: bool = False

    @field_validator("format", "outer")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        return None if name is None else str(get_sum_format(name))

    @model_validator(mode="after")
    def _check(self) -> Accumulation:
        if self.format is None:
            if self.rounding != Rounding() or self.chunk is not None or self.outer is not None:
                raise ValueError("rounding, chunk, outer: float32 sums are neither rounded nor chunked; name a format")
            return self
        if self.fast:
            raise ValueError("fast: is for sums of the tensor core, `format` names sums of our own; choose one")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError("chunk: at least 1")
        if self.outer is not None and self.chunk is None:
            raise ValueError("outer: adds the sums of chunks; say how long a chunk is")
        bits = self.rounding.bits or 1
        if any(bits > 23 - get_sum_format(name).man for name in (self.format, self.outer) if name is not None):
            raise ValueError(f"rounding: {bits} random bits are more than a float32 has below the sum's last one")
        return self


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Gemm:
    """One GEMM's two operand slots (None = base precision) and its accumulation.

    With one slot the quantised operand is read back into the base precision, in which the product then runs.
    """

    input: Quant | None = None
    weight: Quant | None = None
    grad_output: Quant | None = None
    accumulation: Accumulation = Accumulation()

    @model_validator(mode="after")
    def _check(self) -> Gemm:
        for slot in ("input", "weight", "grad_output"):
            refuse_states_only(slot, getattr(self, slot))
        if self.accumulation.format is not None:
            self._check_sums([q for q in (self.input, self.weight, self.grad_output) if q is not None])
        if self.one_sided and self.accumulation != Accumulation():
            raise ValueError("accumulation: a product with one quantised operand runs in the base precision")
        return self

    @staticmethod
    def _check_sums(operands: list[Quant]) -> None:
        """Sums narrower than float32 are defined where products are exact and scales multiply whole sums."""
        if len(operands) < 2:
            raise ValueError(
                "accumulation: products of the base precision add in float32; name the operands' formats, e.g. "
                "{format: e5m10, scaling: {method: none}}"
            )
        for quant in operands:
            constant = quant.scaling.method in ("none", "static")
            if not constant and quant.scaling.granularity not in ("tensor", "row"):
                per = quant.scaling.granularity
                raise ValueError(f"accumulation: a scale per {per} changes within a sum; one per tensor or row")
            if quant.scaling.inverse:
                raise ValueError("accumulation: scales multiply whole sums, and a factor with 'inverse' divides")
        formats = [get_format(quant.format) for quant in operands]
        if not all(isinstance(fmt, Format) for fmt in formats):
            raise ValueError("accumulation: the products of a codebook are not exact in float32")
        a, b = formats[0], formats[-1]
        assert isinstance(a, Format) and isinstance(b, Format)
        if a.man + b.man > 22 or a.max * b.max >= 2.0**127 or a.tiny * b.tiny < 2.0**-126:
            raise ValueError(f"accumulation: products of {a} and {b} are not exact in float32; e5m10 or e6m9 are")

    @property
    def quantised(self) -> bool:
        return any(q is not None for q in (self.input, self.weight, self.grad_output))

    @property
    def one_sided(self) -> bool:
        return sum(q is not None for q in (self.input, self.weight, self.grad_output)) == 1


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class InputNorm:
    """A norm without weights inside every converted linear, of the input before it is quantised (BitNet's SubLN).

    kind: `layer` (x - mean) / sqrt(var + eps), `rms` x / sqrt(mean(x^2) + eps), over the last dimension.
    """

    kind: Literal["layer", "rms"] = "layer"
    eps: float = 1e-5

    @model_validator(mode="after")
    def _check(self) -> InputNorm:
        if not self.eps > 0:
            raise ValueError("eps: above 0, as a row of equal elements has no variance")
        return self
