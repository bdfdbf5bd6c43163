# SPDX-License-Identifier: Apache-2.0
"""FP8 Quantization: The Power of the Exponent (arXiv 2208.09225): formats that are searched or learned.

8 bits whose split into exponent and mantissa belongs to each tensor, and whose range belongs to each output channel of
a weight and to each input. Both start where the squared error of the first batch is least (or where `calibrate` put
them) and are then trained; gradients are not quantised.
"""

from __future__ import annotations

from hf_lowprec.recipe import Gemm, Quant, Recipe, Scaling

_INPUT = Quant(format="e4m3none", scaling=Scaling(method="learned"), split="free")
_WEIGHT = Quant(format="e4m3none", scaling=Scaling(granularity="row", method="learned"), split="free")

RECIPES: tuple[Recipe, ...] = (
    Recipe(
        name="fp8-flex",
        paper="FP8 Quantization: The Power of the Exponent, arXiv 2208.09225",
        fprop=Gemm(input=_INPUT, weight=_WEIGHT),
        dgrad=Gemm(weight=_WEIGHT),
        wgrad=Gemm(input=_INPUT),
        weight_cache="none",  # a weight and its range are trained together
    ),
)
