# SPDX-License-Identifier: Apache-2.0
"""Recipes that change the model instead of scaling its tensors: unit scaling and u-muP."""

from __future__ import annotations

from hf_lowprec.recipe import Recipe

RECIPES: tuple[Recipe, ...] = ()
