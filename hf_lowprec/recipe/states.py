# SPDX-License-Identifier: Apache-2.0
"""What an optimizer keeps of a parameter, and how it updates it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag, model_validator
from pydantic.dataclasses import dataclass

from hf_lowprec.formats import get_format
from hf_lowprec.recipe.quant import CONFIG, Quant, Rounding, refuse_flexible, refuse_gemms_only


@dataclass(frozen=True, kw_only=True, config=CONFIG)
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


@dataclass(frozen=True, kw_only=True, config=CONFIG)
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


@dataclass(frozen=True, kw_only=True, config=CONFIG)
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
            refuse_flexible(slot, quant)
            refuse_gemms_only(slot, quant)
            if isinstance(quant, Quant) and quant.overflow == "error":
                raise ValueError(f"{slot}: overflow 'error' reads every result back to the host")
        if self.min_numel < 0:
            raise ValueError("min_numel: at least 0")
        _check_update(self)
        return self

    @property
    def op_by_op(self) -> bool:
        """Whether a step is none that kernels have."""
        return self.weight is not None or self.arithmetic is not None

    @property
    def of_weights(self) -> bool:
        """Whether they say how weights are updated, which is then any optimizer's business; else they are moments."""
        return self.op_by_op or (self.master is None and self.update.mode == "stochastic")


def _check_update(states: States) -> None:
    """Raises ValueError: `weight`, `arithmetic` and `master` that contradict each other."""
    if states.weight is not None:
        _check_weight(states.weight, states.master)
        if isinstance(states.master, RoundOff) and states.weight.scaling.method == "current":
            raise ValueError("weight: beside a round-off, which the amax does not know, its scale is constant")
    elif isinstance(states.master, RoundOff):
        raise ValueError("master: a round-off is that of `weight`, the format of the Parameter")
    if states.arithmetic is not None:
        _check_arithmetic(states, states.arithmetic)


def _check_weight(quant: Quant, master: Any) -> None:
    if master is None or isinstance(master, Residual):
        raise ValueError("weight: needs a master beside the Parameter: a Quant, 'float32' or a round-off")
    scaling = quant.scaling
    if quant.states_only or scaling.granularity != "tensor" or scaling.method not in ("none", "static", "current"):
        raise ValueError("weight: one scale per tensor, from its own amax or constant; no compand, no nonzero")
    if scaling.method == "current" and scaling.snap == "exact":
        raise ValueError("weight: a Parameter holds values times powers of two exactly; choose snap rceil")
    if quant.rounding.mode == "stochastic":
        raise ValueError("weight: must be found again from the master, so it is not rounded stochastically")


def _check_arithmetic(states: States, quant: Quant) -> None:
    if quant.states_only or quant.scaling.method != "none":
        raise ValueError("arithmetic: results of operations have no scale (method 'none'), no compand, no nonzero")
    if states.weight is not None:
        raise ValueError("arithmetic: not together with `weight`, whose master holds more than either format")
    for slot in ("exp_avg", "master"):
        kept = getattr(states, slot)
        same = getattr(kept, "format", None) == quant.format and kept.scaling.method == "none"
        if not same and kept != "float32" and (slot == "master" or kept is not None):
            raise ValueError(f"{slot}: must hold what arithmetic in {quant.format} gives: unscaled, or in float32")
