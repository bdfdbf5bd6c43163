# SPDX-License-Identifier: Apache-2.0
"""OCP Microscaling v1.0 (arXiv 2310.10537) and eXmY (arXiv 2405.13938): scales that are powers of two."""

from __future__ import annotations

from hf_lowprec.recipe import Recipe

RECIPES: tuple[Recipe, ...] = ()
