# SPDX-License-Identifier: Apache-2.0
"""Sums narrower than float32: chunked accumulation, hybrid FP8, stochastic accumulators."""

from __future__ import annotations

from hf_lowprec.recipe import Recipe

RECIPES: tuple[Recipe, ...] = ()
