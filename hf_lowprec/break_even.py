# SPDX-License-Identifier: Apache-2.0
"""From which weight size and how many tokens on low precision pays, as measured on the GPU at hand.

A linear in FP8 saves time in its GEMMs and spends time on casts and on the host. Which is more depends on the GPU, on
its host, on the size of the weight, and on the tokens of a call, which are known at run time only. So the rule has two
parts: sizes that lost at every number of tokens are left in the base precision when a model is converted; all others
get the least number of tokens from which on they gained, and a call with fewer runs in the base precision.

The numbers are not ours to guess: `benchmarks/bench_breakeven.py --write-rule` measures them and writes
`break_even.json` beside this file. Where nothing was measured there is no rule.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

PATH = Path(__file__).with_name("break_even.json")


class BreakEven(NamedTuple):
    """The rule for one GPU and recipe.

    measured_on: name of the GPU.
    steps: (elements, tokens) in ascending order of elements; tokens None: no number of tokens was enough.
    """

    measured_on: str
    steps: tuple[tuple[int, int | None], ...]

    def tokens(self, elements: int) -> int | None:
        """Least tokens of a call from which on a weight of so many elements gains: those of the largest size measured
        that it reaches. None: it does not gain, or is smaller than what was measured."""
        reached = [tokens for size, tokens in self.steps if size <= elements]
        return reached[-1] if reached else None

    @property
    def min_numel(self) -> int:
        """The least elements of a weight that gains at some number of tokens, and so do all sizes above; beyond the
        largest measured, if that does not gain."""
        least = self.steps[-1][0] + 1
        for size, tokens in reversed(self.steps):
            if tokens is None:
                break
            least = size
        return least


def break_even(recipe: str, device: torch.device) -> BreakEven | None:
    """The rule for a model on `device`, or going to the GPU from there; None: nothing was measured on this GPU.

    A recipe that was not measured has the most cautious rule of those that were.
    """
    if not torch.cuda.device_count():
        return None
    return find(_table(PATH), torch.cuda.get_device_name(device if device.type == "cuda" else None), recipe)


@cache
def _table(path: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["gpus"]
    return table


def find(table: dict[str, Any], gpu: str, recipe: str) -> BreakEven | None:
    """table: GPU name -> recipe -> {"least_tokens": [[elements, tokens or None], ...]}."""
    recipes = table.get(gpu)
    if not recipes:
        return None
    known = [recipes[recipe]] if recipe in recipes else list(recipes.values())
    rules = [BreakEven(gpu, tuple((size, tokens) for size, tokens in entry["least_tokens"])) for entry in known]
    sizes = sorted({size for rule in rules for size, _ in rule.steps})
    return BreakEven(gpu, tuple((size, _most([rule.tokens(size) for rule in rules])) for size in sizes))


def _most(tokens: list[int | None]) -> int | None:
    known = [count for count in tokens if count is not None]
    return max(known) if len(known) == len(tokens) else None


def least_tokens(cells: list[list[float]]) -> list[list[int | None]]:
    """From measured [width, tokens, base ms, ms] of square weights: the steps of a rule.

    Tokens count as enough only if every larger number that was measured gains as well.
    """
    steps: list[list[int | None]] = []
    for width in sorted({int(cell[0]) for cell in cells}):
        least = None
        for _, tokens, base, ours in sorted((c for c in cells if c[0] == width), key=lambda c: -c[1]):
            if ours >= base:
                break
            least = int(tokens)
        steps.append([width * width, least])
    return steps
