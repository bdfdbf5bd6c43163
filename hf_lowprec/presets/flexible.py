# SPDX-License-Identifier: Apache-2.0
"""FP8 Quantization: The Power of the Exponent (arXiv 2208.09225): formats that are searched or learned."""

from __future__ import annotations

from hf_lowprec.recipe import Recipe

RECIPES: tuple[Recipe, ...] = ()
