# SPDX-License-Identifier: Apache-2.0
"""One tensor in low precision: format, scaling, rounding. Data, no arithmetic."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, field_validator, model_validator
from pydantic.dataclasses import dataclass

from hf_lowprec.formats import Codebook, Format, get_format

CONFIG = ConfigDict(extra="forbid")
FLEXIBLE = ("search", "learned")  # methods of Scaling that find a range, and a format if it is free


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Rounding:
    """How a value between two codes picks one of them.

    mode: `nearest` (ties to even), `away` (ties away from zero), `zero` (truncate), `stochastic`.
    bits: stochastic only: random bits per rounding; None uses all the bits that are dropped.
    """

    mode: Literal["nearest", "away", "zero", "stochastic"] = "nearest"
    bits: int | None = None

    @model_validator(mode="after")
    def _check(self) -> Rounding:
        if self.bits is not None and (self.mode != "stochastic" or not 1 <= self.bits <= 23):
            raise ValueError("bits: only for mode 'stochastic', from 1 to 23")
        return self


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Scaling:
    """Which elements share a scale, and where the scale comes from. The scale multiplies codes: x ~ qdata * scale.

    granularity: `tensor`, `row`, `column`, `block` (`block=(k,)` along the GEMM's reduction axis), `tile` (`(m, n)`).
    method: `none` (scale 1), `static` (2**exponent), `current` (this tensor's amax), `delayed` (amax history),
        `predicted` (optimizer states: a bound on the amax that is known before the pass over the tensor),
        `search` (`calibrate` finds it, with the least squared error, and it stays) or `learned` (trained by gradients
        from there, or from a search over the first batch; arXiv 2208.09225): the operands of fprop, both of them.
    history, algorithm: delayed only: amax of `history` steps, their `max` or the `most_recent`.
    margin: powers of two of headroom that the scale leaves.
    snap: how the scale is rounded: `exact`; `rceil`, `ocp`, `ceil`, `even` are powers of two (OCP MX v1.0 and its
        variants; `rceil` never overflows the format).
    store: `float32`; `e8m0` (needs a power-of-two snap); `float16` or `bfloat16` (optimizer states; rounded up, so
        that no value leaves the format).
    group: who shares a delayed amax: `local` or `data_parallel` ranks.
    statistic: what a current scale follows from: the largest magnitude (`amax`) or the `mean` one.
    target: the value of the format that the statistic is scaled to. None: the largest for `amax`, 1 for `mean`.
    floor: a statistic below it counts as it.
    inverse: keep factor = target / statistic instead: qdata = round(x * factor), x ~ qdata / factor.
    """

    granularity: Literal["tensor", "row", "column", "block", "tile"] = "tensor"
    block: tuple[int, ...] = ()
    method: Literal["none", "static", "current", "delayed", "predicted", "search", "learned"] = "current"
    exponent: int = 0
    history: int = 1
    algorithm: Literal["max", "most_recent"] = "max"
    margin: int = 0
    snap: Literal["exact", "rceil", "ocp", "ceil", "even"] = "exact"
    store: Literal["float32", "e8m0", "float16", "bfloat16"] = "float32"
    group: Literal["local", "data_parallel"] = "data_parallel"
    statistic: Literal["amax", "mean"] = "amax"
    target: float | None = None
    floor: float = 0.0
    inverse: bool = False

    @property
    def plain(self) -> bool:
        """Scaled by the amax alone, to the largest value, as every kernel and every optimizer state takes it."""
        return (self.statistic, self.target, self.floor, self.inverse) == ("amax", None, 0.0, False)

    @model_validator(mode="after")
    def _check(self) -> Scaling:
        if not self.plain and self.method != "current":
            raise ValueError("statistic, target, floor, inverse: only for method 'current'")
        if self.floor < 0 or (self.target is not None and not self.target > 0):
            raise ValueError("floor: at least 0; target: above 0")
        if (self.statistic == "mean" or self.inverse) and (self.snap != "exact" or self.margin):
            raise ValueError("statistic 'mean', inverse: the factor is exact; no snap, no margin")
        if self.statistic == "mean" and self.granularity in ("block", "tile"):
            raise ValueError("statistic: 'mean' is over a tensor, a row or a column")
        if self.inverse and self.store != "float32":
            raise ValueError("inverse: the factor is stored as float32")
        wanted = {"block": 1, "tile": 2}.get(self.granularity, 0)
        if len(self.block) != wanted or any(b < 1 for b in self.block):
            raise ValueError(f"block: {self.granularity!r} takes {wanted} positive sizes, got {self.block}")
        if self.method == "delayed" and self.granularity != "tensor":
            raise ValueError("granularity: delayed scaling keeps one amax history per tensor")
        if self.method == "predicted" and self.granularity != "tensor":
            raise ValueError("granularity: predicted scaling bounds the amax of a whole tensor")
        if self.method != "delayed" and (self.history != 1 or self.algorithm != "max"):
            raise ValueError("history, algorithm: only for method 'delayed'")
        if self.history < 1:
            raise ValueError("history: at least 1")
        if self.method in FLEXIBLE:
            if self.granularity not in ("tensor", "row"):
                raise ValueError(f"granularity: a range is {self.method} per tensor or per row")
            if self.margin or self.snap != "exact" or self.store != "float32":
                raise ValueError(f"margin, snap, store: method {self.method!r} finds the range itself, in float32")
        if self.exponent and self.method != "static":
            raise ValueError("exponent: only for method 'static'")
        if self.store == "e8m0" and self.snap == "exact":
            raise ValueError("store: e8m0 holds powers of two only; choose snap rceil, ocp, ceil or even")
        return self


NONE = Scaling(method="none")


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Quant:
    """One tensor in low precision: format, scaling, rounding, and what becomes of finite values beyond the format.

    compand, optimizer states only: the function under which a block is quantised (`numerics.compand`): `softsign` and
        `sqrt` (FlashOptim, arXiv 2602.23349), `expand` (COAT, arXiv 2410.19313, dynamic range expansion).
    nonzero, optimizer states only: a value other than 0 never becomes 0, but the smallest code of its sign.
    split, methods `search` and `learned` only: `free` finds, with the range, how the format's bits divide into
        exponent and mantissa, one split per tensor; `fixed` keeps the format's own.
    center, GEMM operands only: the group's mean is subtracted first, and not added back.
    """

    format: str
    scaling: Scaling = Scaling()
    rounding: Rounding = Rounding()
    overflow: Literal["saturate", "inf", "nan", "error"] = "saturate"
    compand: Literal["none", "softsign", "sqrt", "expand"] = "none"
    nonzero: bool = False
    split: Literal["fixed", "free"] = "fixed"
    center: bool = False

    @field_validator("format")
    @classmethod
    def _known(cls, name: str) -> str:
        return str(get_format(name))

    @model_validator(mode="after")
    def _check(self) -> Quant:
        if self.scaling.method == "predicted" and isinstance(get_format(self.format), Codebook):
            raise ValueError("method: predicted scaling needs a format whose rounding errors are bounded, no codebook")
        if self.flexible:
            self._check_flexible()
        elif self.split != "fixed":
            raise ValueError("split: only with method 'search' or 'learned' can the format be free")
        if self.center and (self.scaling.granularity in ("block", "tile") or self.scaling.method != "current"):
            raise ValueError("center: needs a tensor, rows or columns with scales of their own")
        if self.compand == "none":
            return self
        if self.scaling.granularity != "block" or self.scaling.method != "current":
            raise ValueError(f"compand: {self.compand!r} needs blocks that are scaled by their own amax")
        if self.scaling.snap != "exact" or self.scaling.margin:
            raise ValueError(
                f"compand: {self.compand!r} maps the amax to the format's largest value; no snap, no margin"
            )
        if get_format(self.format).min >= 0 and self.compand != "sqrt":
            raise ValueError(f"compand: {self.compand!r} needs a signed format, {self.format} has none below zero")
        return self

    def _check_flexible(self) -> None:
        fmt, method = get_format(self.format), self.scaling.method
        layout = isinstance(fmt, Format) and fmt == Format(fmt.exp, fmt.man)
        if not isinstance(fmt, Format) or not layout or fmt.man < 1 or fmt.exp > 7:
            raise ValueError(
                f"format: method {method!r} takes signed formats without Inf and NaN, of the usual bias, with at "
                f"least 1 mantissa bit and at most 7 exponent bits (e4m3none, e5m2none, e0m7); {self.format} is none"
            )
        if not 3 <= fmt.bits <= 12:
            raise ValueError(f"format: method {method!r} takes 3 to 12 bits, {self.format} has {fmt.bits}")
        if self.rounding != Rounding() or self.overflow != "saturate":
            raise ValueError(f"rounding, overflow: method {method!r} rounds to nearest and saturates")

    @property
    def flexible(self) -> bool:
        """Whether the range is searched or learned."""
        return self.scaling.method in FLEXIBLE

    @property
    def gemms_only(self) -> str:
        """The first property that only a GEMM operand can have; empty for others."""
        if self.center:
            return "center"
        return "" if self.scaling.plain else "statistic, target, floor, inverse:"

    @property
    def states_only(self) -> str:
        """The first property that only an optimizer state can have; empty for a GEMM operand."""
        scaling = self.scaling
        if self.compand != "none" or self.nonzero:
            return f"compand={self.compand!r}" if self.compand != "none" else "nonzero"
        if scaling.method == "predicted":
            return "method 'predicted'"
        return f"store {scaling.store!r}" if scaling.store in ("float16", "bfloat16") else ""


def refuse_flexible(slot: str, quant: Any) -> None:
    if isinstance(quant, Quant) and quant.flexible:
        raise ValueError(f"{slot}: method {quant.scaling.method!r} is for the operands of linear layers")


def refuse_states_only(slot: str, quant: Quant | None) -> None:
    if quant is not None and quant.states_only:
        raise ValueError(f"{slot}: {quant.states_only} is for optimizer states")


def refuse_gemms_only(slot: str, quant: Any) -> None:
    if isinstance(quant, Quant) and quant.gemms_only:
        raise ValueError(f"{slot}: {quant.gemms_only} for operands of GEMMs only")
