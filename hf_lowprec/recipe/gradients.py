# SPDX-License-Identifier: Apache-2.0
"""What happens to gradients beside the GEMMs: how they are scaled with the loss and sent between GPUs."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from hf_lowprec.recipe.quant import CONFIG, Quant, refuse_flexible, refuse_gemms_only, refuse_states_only


@dataclass(frozen=True, kw_only=True, config=CONFIG)
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
        refuse_states_only("gradient", self.gradient)
        refuse_flexible("gradient", self.gradient)
        refuse_gemms_only("gradient", self.gradient)
        return self


@dataclass(frozen=True, kw_only=True, config=CONFIG)
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
