# SPDX-License-Identifier: Apache-2.0
"""The named recipes. Data: what a value means stands in `recipe`, and `hf-lowprec explain NAME` says it in words.

One file per family; a recipe's name is its key here, and its place in the files is its place in every table.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from hf_lowprec.presets import flexible, fp8, integer, microscaling, narrow, sixteen, unscaled
from hf_lowprec.presets.exmy import GRAMMAR, PREFIX, exmy_recipe
from hf_lowprec.presets.fp8 import DECOUPLING, FP8_LM_STATES
from hf_lowprec.recipe import Recipe, RecipeError

_FAMILIES = (sixteen, fp8, microscaling, narrow, integer, unscaled, flexible)
PRESETS: dict[str, Recipe] = {recipe.name: recipe for family in _FAMILIES for recipe in family.RECIPES}
ALIASES: dict[str, str] = {"fp8-lm-o2": "fp8-lm"}


def known_names() -> list[str]:
    """Every recipe name, aliases included."""
    return [*PRESETS, *ALIASES]


def get_recipe(recipe: str | Path | dict[str, Any] | Recipe) -> Recipe:
    """A preset's name, `exmy:e3m1` (`presets.exmy`), a path to a .yaml or .json file, a dict, or a Recipe.

    Raises RecipeError: unknown name (with the nearest ones), missing or malformed file.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, dict):
        return Recipe.from_dict(recipe)
    text = str(recipe)
    if text.endswith((".yaml", ".yml", ".json")):
        path = Path(text)
        if not path.is_file():
            raise RecipeError(f"recipe file {text!r} does not exist")
        read = Recipe.from_json if text.endswith(".json") else Recipe.from_yaml
        try:
            return read(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeError, RecipeError) as error:
            raise RecipeError(f"recipe file {text!r}: {error}") from None
    name = ALIASES.get(text.lower().replace("_", "-"), text.lower().replace("_", "-"))
    if name in PRESETS:
        return PRESETS[name]
    if name.startswith(PREFIX):
        return exmy_recipe(name)
    near = difflib.get_close_matches(name, known_names(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"available: {', '.join(PRESETS)}, {GRAMMAR}"
    raise RecipeError(f"unknown recipe {text!r}; {hint}")


__all__ = ["ALIASES", "DECOUPLING", "FP8_LM_STATES", "PRESETS", "get_recipe", "known_names"]
