# SPDX-License-Identifier: Apache-2.0
"""Integers and fewer bits: BitNet, SwitchBack."""

from __future__ import annotations

from hf_lowprec.recipe import Recipe

RECIPES: tuple[Recipe, ...] = ()
