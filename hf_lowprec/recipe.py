# SPDX-License-Identifier: Apache-2.0
"""A recipe says in which precision a model trains. Frozen data, no arithmetic.

A linear layer runs three matrix products, so a recipe binds six GEMM slots:

    fprop:  output      = input       @ weight.T      slots input,       weight
    dgrad:  grad_input  = grad_output @ weight        slots grad_output, weight
    wgrad:  grad_weight = grad_output.T @ input       slots input,       grad_output

Each slot holds a `Quant` (format, scaling, rounding, overflow) or None for the base precision. Beside the slots stand
the small policies: optimizer states, gradient communication, loss scale, model transform, tensors saved for backward,
modules left alone. `presets` holds the named recipes; `Recipe.from_dict` and friends read a user's own.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    ConfigDict,
    Discriminator,
    Tag,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from hf_lowprec.formats import Codebook, Format, get_format, get_sum_format
from hf_lowprec.recipe_transform import Transform
from hf_lowprec.update_rules import check_update

_CONFIG = ConfigDict(extra="forbid")


class RecipeError(ValueError):
    """A recipe that is unknown, malformed or contradictory. The message names the field."""


FLEXIBLE = ("search", "learned")  # methods of Scaling that find a range, and a format if it is free


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
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


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
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


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
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


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Residual:
    """The low bits of a float32 master that its bfloat16 Parameter lacks (`numerics.residual`), as integers.

    bits: 8 makes a 24-bit master, 16 the float32 itself.
    rounding: of the 24-bit master; 16 bits round nothing.
    """

    bits: Literal[8, 16]
    rounding: Rounding = Rounding()

    @model_validator(mode="after")
    def _check(self) -> Residual:
        if self.bits == 16 and self.rounding != Rounding():
            raise ValueError("rounding: a residual of 16 bits is exact")
        if self.rounding.mode not in ("nearest", "stochastic") or self.rounding.bits is not None:
            raise ValueError("rounding: a residual is rounded to nearest, or stochastically with all its bits")
        return self


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class RoundOff:
    """HFP8's master: what `States.weight` rounds away is kept beside the Parameter (`numerics.residual`).

    residual: how; e6m9 without a scale in the paper, which a scale of its own amax may improve.
    """

    residual: Quant

    @model_validator(mode="after")
    def _check(self) -> RoundOff:
        quant = self.residual
        if quant.states_only or quant.scaling.method == "delayed":
            raise ValueError(f"residual: {quant.states_only or 'delayed scaling'} is not for what rounding leaves")
        return self


def _refuse_flexible(slot: str, quant: Any) -> None:
    if isinstance(quant, Quant) and quant.flexible:
        raise ValueError(f"{slot}: method {quant.scaling.method!r} is for the operands of linear layers")


def _refuse_states_only(slot: str, quant: Quant | None) -> None:
    if quant is not None and quant.states_only:
        raise ValueError(f"{slot}: {quant.states_only} is for optimizer states")


def _refuse_gemms_only(slot: str, quant: Any) -> None:
    if isinstance(quant, Quant) and quant.gemms_only:
        raise ValueError(f"{slot}: {quant.gemms_only} for operands of GEMMs only")


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
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


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
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
            _refuse_states_only(slot, getattr(self, slot))
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


def _kind(master: Any) -> str:
    """Which of the four a master is, so that an error speaks of that one only."""
    if isinstance(master, str):
        return "name"
    if isinstance(master, RoundOff) or (isinstance(master, dict) and "residual" in master):
        return "round-off"
    return "residual" if isinstance(master, Residual) or (isinstance(master, dict) and "bits" in master) else "quant"


_Master = Annotated[
    Annotated[Quant, Tag("quant")]
    | Annotated[Residual, Tag("residual")]
    | Annotated[RoundOff, Tag("round-off")]
    | Annotated[Literal["float32"], Tag("name")],
    Discriminator(_kind),
]


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class States:
    """What an optimizer keeps of a parameter. None keeps a moment in float32.

    exp_avg, exp_avg_sq: Adam's moments; the momentum of Lion and SGD goes by `exp_avg`. Blocks count over the tensor
        flattened in row-major order; the last one may be short.
    master: where the Parameter is loaded in 16 bits (a float32 Parameter is its own master): a Quant of it, "float32",
        a `Residual` beside a bfloat16 Parameter, or None: the Parameter itself is the master.
    update: rounding of a 16-bit Parameter that is its own master.
    weight: what the Parameters of quantised GEMMs hold, of any dtype: their master's values in this format, written
        back after every step (FP8-LM's O3, HFP8). The master is then in the state, or, as `RoundOff`, half there.
        Other Parameters have the master of 16-bit ones (of a `RoundOff`, its residual's format).
    arithmetic: every AXPY of an update (weight decay into the gradient, gradient into the first moment, step into the
        weight) is rounded to this format (arXiv 1812.08011); None: float32. A second moment is kept out of it.
    min_numel: tensors of fewer elements (counted before sharding) keep float32 moments.
    embeddings: False keeps float32 moments for embeddings (arXiv 2110.02861, section 2.3).
    algorithm: `stable-adamw` (arXiv 2304.13013, algorithm 2) takes the place of the script's Adam or AdamW, with its
        groups and hyperparameters. None: the algorithm stays.
    """

    exp_avg: Quant | None = None
    exp_avg_sq: Quant | None = None
    master: _Master | None = None
    update: Rounding = Rounding()
    weight: Quant | None = None
    arithmetic: Quant | None = None
    min_numel: int = 0
    embeddings: bool = True
    algorithm: Literal["stable-adamw"] | None = None

    @model_validator(mode="after")
    def _check(self) -> States:
        sq = self.exp_avg_sq
        if sq is not None and sq.scaling.granularity == "tensor" and get_format(sq.format).bits <= 8:
            raise ValueError(
                "exp_avg_sq: 8 bits with one scale per tensor round small second moments to zero and the update "
                "diverges (FP8-LM, arXiv 2310.18313, table 6, variant #4); use e5m10, or a block scaling"
            )
        if self.exp_avg is not None and (self.exp_avg.compand == "sqrt" or get_format(self.exp_avg.format).min >= 0):
            raise ValueError("exp_avg: a first moment has two signs; no compand 'sqrt' and no unsigned format")
        if isinstance(self.master, Quant) and self.master.compand != "none":
            raise ValueError("master: compand is for moments")
        residual = self.master.residual if isinstance(self.master, RoundOff) else None
        slots = {name: getattr(self, name) for name in ("exp_avg", "exp_avg_sq", "master", "weight", "arithmetic")}
        for slot, quant in {**slots, "master.residual": residual}.items():
            _refuse_flexible(slot, quant)
            _refuse_gemms_only(slot, quant)
            if isinstance(quant, Quant) and quant.overflow == "error":
                raise ValueError(f"{slot}: overflow 'error' reads every result back to the host")
        if self.min_numel < 0:
            raise ValueError("min_numel: at least 0")
        check_update(self)
        return self

    @property
    def op_by_op(self) -> bool:
        """Whether a step is none that kernels have."""
        return self.weight is not None or self.arithmetic is not None

    @property
    def of_weights(self) -> bool:
        """Whether they say how weights are updated, which is then any optimizer's business; else they are moments."""
        return self.op_by_op or (self.master is None and self.update.mode == "stochastic")


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Communication:
    """Weight gradients between GPUs and on their way into the optimizer.

    auto_scale: FP8-LM's factor mu (arXiv 2310.18313, section 2.1): halved when more than `saturation` of the codes sit
        at the format's maximum, otherwise doubled per `growth` steps.
    """

    gradient: Quant
    auto_scale: bool = False
    saturation: float = 1e-5
    growth: int = 1000

    @model_validator(mode="after")
    def _check(self) -> Communication:
        _refuse_states_only("gradient", self.gradient)
        _refuse_flexible("gradient", self.gradient)
        _refuse_gemms_only("gradient", self.gradient)
        return self


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class LossScale:
    """Loss scaling, of any base precision; torch's GradScaler carries it out.

    method: `static` (the scale stays `init`) or `dynamic`. Either skips a step whose gradients hold NaN or Inf.
    growth_factor, growth_interval, backoff_factor: dynamic only. The scale grows after `growth_interval` steps without
        one that was skipped, and shrinks after each that was.
    """

    method: Literal["none", "static", "dynamic"] = "none"
    init: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000

    @model_validator(mode="after")
    def _check(self) -> LossScale:
        if not 0 < self.init < 2.0**127:
            raise ValueError("init: positive and finite")
        if not (self.growth_factor > 1 and 0 < self.backoff_factor < 1 and self.growth_interval >= 1):
            raise ValueError("growth_factor above 1, backoff_factor between 0 and 1, growth_interval at least 1")
        varied = (self.growth_factor, self.backoff_factor, self.growth_interval) != (2.0, 0.5, 2000)
        if (varied and self.method != "dynamic") or (self.init != 65536.0 and self.method == "none"):
            raise ValueError(f"method {self.method!r} does not read every field that is set")
        return self


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
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


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Recipe:
    """One way to train. See the module docstring for the slots; `hf-lowprec explain NAME` prints one.

    base: precision of everything that no slot names (`no` = float32), as accelerate calls it.
    transform: of the model to unit scale; the slots then have scaling method `none`, or none at all.
    saved: tensors kept for elementwise backward (of norms and gated MLPs); None keeps them as they are computed.
    weight_cache: low-precision copies of weights, cast once per optimizer step and kept until the next: `both` layouts
        (2 bytes per parameter), `one` (1 byte, the other is made in backward), or `none` (cast in every pass).
    modules_to_not_convert: names or regular expressions of modules to leave alone, added to the defaults.
    input_norm: what converted linears do to their input first; None: nothing.
    """

    name: str
    paper: str = ""
    base: Literal["no", "fp16", "bf16"] = "bf16"
    fprop: Gemm = Gemm()
    dgrad: Gemm = Gemm()
    wgrad: Gemm = Gemm()
    states: States | None = None
    communication: Communication | None = None
    loss_scale: LossScale = LossScale()
    transform: Transform = Transform()
    saved: Quant | None = None
    weight_cache: Literal["both", "one", "none"] = "both"
    modules_to_not_convert: tuple[str, ...] = ()
    input_norm: InputNorm | None = None

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        _refuse_states_only("saved", self.saved)
        _refuse_flexible("saved", self.saved)
        _refuse_gemms_only("saved", self.saved)
        foreign = {"fprop": "grad_output", "dgrad": "input", "wgrad": "weight"}
        for gemm, slot in foreign.items():
            if getattr(getattr(self, gemm), slot) is not None:
                raise ValueError(f"{gemm}.{slot}: {gemm} does not read {slot}")
        self._check_flexible()
        if self.input_norm is not None and not self.quantises_gemms:
            raise ValueError("input_norm: nothing is converted that could have one; quantise a GEMM")
        if self.transform.method != "none":
            self._check_unscaled()
        # Each operand of a layer keeps one amax history; its scale is made for the format of the first slot.
        for slot, first, second in (("input", "fprop", "wgrad"), ("weight", "fprop", "dgrad"),
                                    ("grad_output", "dgrad", "wgrad")):  # fmt: skip
            one, two = getattr(getattr(self, first), slot), getattr(getattr(self, second), slot)
            if one is None or two is None or two.scaling.method != "delayed":
                continue
            if one.scaling != two.scaling or one.format != two.format:
                raise ValueError(f"{second}.{slot}: delayed scaling needs the format and scaling of {first}.{slot}")
        return self

    def _check_flexible(self) -> None:
        """Searched and learned ranges have one backward: straight through both quantisers (arXiv 2208.09225)."""
        gemms = {"fprop": self.fprop, "dgrad": self.dgrad, "wgrad": self.wgrad}
        slots = {
            f"{gemm}.{slot}": quant
            for gemm, policy in gemms.items()
            for slot in ("input", "weight", "grad_output")
            if (quant := getattr(policy, slot)) is not None
        }
        method = next((q.scaling.method for q in slots.values() if q.flexible), None)
        if method is None:
            return
        for slot, quant in slots.items():
            if not quant.flexible:
                other = quant.scaling.method
                raise ValueError(f"{slot}: method {method!r} does not go together with method {other!r}")
            if slot.endswith("input") and quant.scaling.granularity != "tensor":
                raise ValueError(f"{slot}: the range of an input is one for the tensor")
        if self.wgrad.input != self.fprop.input or self.dgrad.weight != self.fprop.weight or len(slots) != 4:
            raise ValueError(
                f"fprop: method {method!r} trains straight through its quantisers, so dgrad.weight is fprop.weight, "
                "wgrad.input is fprop.input, and grad_output stays empty"
            )
        for gemm, policy in gemms.items():
            if policy.accumulation != Accumulation():
                raise ValueError(f"{gemm}.accumulation: method {method!r} sums in float32")
        if self.base == "fp16":
            raise ValueError(f"base: method {method!r} would take the gradients of its ranges scaled; use bf16 or no")

    @property
    def flexible(self) -> bool:
        """Whether the operands of fprop have searched or learned ranges (checked to be all or none)."""
        return any(q is not None and q.flexible for q in (self.fprop.input, self.fprop.weight))

    def _check_unscaled(self) -> None:
        if self.base == "fp16":
            raise ValueError("base: 'bf16' or 'no': fp16's loss scale would move the gradients off their constants")
        if self.input_norm is not None:
            raise ValueError("input_norm: a transform to unit scale takes norms as the model has them")
        if self.loss_scale.method != "none":
            raise ValueError("loss_scale: it would move the gradients off the constants of the transform")
        for gemm in ("fprop", "dgrad", "wgrad"):
            for slot in ("input", "weight", "grad_output"):
                quant = getattr(getattr(self, gemm), slot)
                if quant is not None and (quant.scaling != NONE or isinstance(get_format(quant.format), Codebook)):
                    raise ValueError(
                        f"{gemm}.{slot}: a transform to unit scale takes the place of scales: scaling method 'none' "
                        "in a format with exponents"
                    )

    @field_validator("modules_to_not_convert")
    @classmethod
    def _expressions(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return patterns

    @property
    def quantises_gemms(self) -> bool:
        return any(g.quantised for g in (self.fprop, self.dgrad, self.wgrad))

    def to_dict(self) -> dict[str, Any]:
        """Plain data without the fields that hold their default. `from_dict` reads it back equal."""
        out: dict[str, Any] = _ADAPTER.dump_python(self, mode="json", exclude_defaults=True)
        return out

    def difference(self, other: Recipe) -> str:
        """Where two recipes of one name differ, for messages; empty if the names tell them apart."""
        mine, theirs = self.to_dict(), other.to_dict()
        if self.name != other.name:
            return ""
        fields = sorted(k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k))
        return f" (same name, but {', '.join(fields)} differ)"

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def to_yaml(self) -> str:
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False)
        return text

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """Raises RecipeError naming every field that is wrong."""
        try:
            return _ADAPTER.validate_python(data)
        except ValidationError as error:
            raise RecipeError(_describe(error, data)) from None

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise RecipeError(f"recipe is not JSON: {error}") from None

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        try:
            return cls.from_dict(yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise RecipeError(f"recipe is not YAML: {error}") from None


_ADAPTER = TypeAdapter(Recipe)


def _describe(error: ValidationError, data: Any) -> str:
    name = data.get("name", "<unnamed>") if isinstance(data, dict) else "<unnamed>"
    lines = [f"recipe {name!r} is not valid:"]
    for e in error.errors():
        field = ".".join(str(part) for part in e["loc"]) or "(recipe)"
        message = e["msg"].removeprefix("Value error, ")
        if e["type"] == "unexpected_keyword_argument":
            message = "no such field"
        lines.append(f"  {field}: {message}")
    return "\n".join(lines)
