# SPDX-License-Identifier: Apache-2.0
"""A whole recipe, from and to plain data."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError, field_validator, model_validator
from pydantic.dataclasses import dataclass

from hf_lowprec.formats import Codebook, get_format
from hf_lowprec.recipe.gemm import Accumulation, Gemm, InputNorm
from hf_lowprec.recipe.gradients import Communication, LossScale
from hf_lowprec.recipe.quant import CONFIG, NONE, Quant, refuse_flexible, refuse_gemms_only, refuse_states_only
from hf_lowprec.recipe.states import States
from hf_lowprec.recipe.transform import Transform


class RecipeError(ValueError):
    """A recipe that is unknown, malformed or contradictory. The message names the field."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Recipe:
    """One way to train. See the module docstring for the slots; `hf-lowprec explain NAME` prints one.

    base: precision of everything that no slot names (`no` = float32), as accelerate calls it.
    transform: of the model to unit scale; the slots then have scaling method `none`, or none at all.
    saved: tensors kept for elementwise backward (of gated MLPs); None keeps them as they are computed. Groups
        are those of a matrix [tokens, features]. On a GPU tiles that powers of two measure, of 1024 to 4096 elements,
        cost no pass for amaxes.
    weight_cache: low-precision copies of weights, cast once per optimizer step and kept until the next: `both` layouts
        (2 bytes per parameter), `one` (1 byte, the other is made in backward), or `none` (cast in every pass).
    saved_inputs: what linears keep of their input for wgrad: the `codes` that fprop multiplied, or, `remade`, nothing
        where a producer's own tensors, kept anyway, make them again: a fused norm's, a fused MLP's, and attention's.
        The same codes with the same scale; of the MLP's product where `saved` is None, else those of the product of
        gate and up as `saved` holds them.
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
    saved_inputs: Literal["codes", "remade"] = "codes"
    modules_to_not_convert: tuple[str, ...] = ()
    input_norm: InputNorm | None = None

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        refuse_states_only("saved", self.saved)
        refuse_flexible("saved", self.saved)
        refuse_gemms_only("saved", self.saved)
        foreign = {"fprop": "grad_output", "dgrad": "input", "wgrad": "weight"}
        for gemm, slot in foreign.items():
            if getattr(getattr(self, gemm), slot) is not None:
                raise ValueError(f"{gemm}.{slot}: {gemm} does not read {slot}")
        self._check_flexible()
        if self.saved_inputs == "remade":
            self._check_remade()
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

    def _check_remade(self) -> None:
        """wgrad has to multiply the codes of fprop, and they have to be a function of the tensor and one scale."""
        x = self.fprop.input
        if self.flexible:
            raise ValueError("saved_inputs: 'remade' goes with fixed ranges; searched and learned ones keep the input")
        if self.input_norm is not None:
            raise ValueError("saved_inputs: 'remade' casts what a producer made, and input_norm changes it first")
        if x is None or x != self.wgrad.input or x.scaling.granularity != "tensor" or self.wgrad.grad_output is None:
            raise ValueError(
                "saved_inputs: 'remade' casts the input of fprop again for wgrad: wgrad.input has to be fprop.input, "
                "with one scale for the tensor, and wgrad.grad_output has to be quantised"
            )

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
