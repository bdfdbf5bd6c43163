# SPDX-License-Identifier: Apache-2.0
"""The part of a recipe that changes a model instead of scaling its tensors; `hf_lowprec.transform` carries it out."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from hf_lowprec.recipe.quant import CONFIG


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Transform:
    """How a decoder is brought to unit scale, so that its GEMMs need no scale from data (docs/recipes/u-mup.md).

    method: `none`; `unit` (Unit Scaling, arXiv 2303.11257) or `u-mup` (arXiv 2407.17465), which differ in the output
        embedding and in the learning rates.
    residual: RMS of what all branches of a kind add to a residual stream that starts at 1: u-muP's alpha_res.
        sqrt(layers) makes every branch weigh as much as the embedding, the running mean of arXiv 2303.11257.
    attention_ratio: weight of an attention branch over that of an MLP branch: u-muP's alpha_res-attn-ratio.
    sequence_length: number of tokens at which attention's average of values is taken to unit scale; None: as many as
        the model's config allows, 4096 at most.
    critical: whether the linears that end a residual branch stay in the base precision, as in u-muP's FP8 runs.
    learning_rate: `standard`: the optimizer's is the one for the model as transformers makes it, and each tensor's
        follows from it; `native`: it is u-muP's own eta.
    """

    method: Literal["none", "unit", "u-mup"] = "none"
    residual: float = 1.0
    attention_ratio: float = 1.0
    sequence_length: int | None = None
    critical: bool = False
    learning_rate: Literal["standard", "native"] = "standard"

    @model_validator(mode="after")
    def _check(self) -> Transform:
        for name in ("residual", "attention_ratio"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: above 0")
        if self.sequence_length is not None and self.sequence_length < 2:
            raise ValueError("sequence_length: at least 2")
        if self.learning_rate == "native" and self.method != "u-mup":
            raise ValueError("learning_rate: 'native' is the eta of method 'u-mup'")
        return self
