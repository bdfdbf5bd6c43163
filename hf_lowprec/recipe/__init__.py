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

from hf_lowprec.recipe.gemm import Accumulation, Gemm, InputNorm
from hf_lowprec.recipe.gradients import Communication, LossScale
from hf_lowprec.recipe.quant import FLEXIBLE, NONE, Quant, Rounding, Scaling
from hf_lowprec.recipe.states import Residual, RoundOff, States
from hf_lowprec.recipe.transform import Transform
from hf_lowprec.recipe.whole import Recipe, RecipeError

__all__ = [
    "FLEXIBLE",
    "NONE",
    "Accumulation",
    "Communication",
    "Gemm",
    "InputNorm",
    "LossScale",
    "Quant",
    "Recipe",
    "RecipeError",
    "Residual",
    "RoundOff",
    "Rounding",
    "Scaling",
    "States",
    "Transform",
]
