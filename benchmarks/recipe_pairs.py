# SPDX-License-Identifier: Apache-2.0
"""The study of `recipe_study.py --fused`: fused against unfused, and what backward keeps, beside what chance changes.

    fp8-lm             the fused path: gate and up kept in E4M3
    fp8-lm+nofuse      HF_LOWPREC_FUSE=0; nothing but the inputs of linears is kept in 8 bits
    fp8-lm-saved-bf16  fused, gate and up kept as they are (variants/): what `saved` = E4M3 costs is beside this one
    fp8-lm-remade      fused, inputs of linears made again in backward (variants/)
    fp8-lm~, bf16~     the controls: the sequences of every batch in reverse, so that all sums over tokens have
                       another order, and one weight of the first norm moved by a thousandth

Two runs that differ in rounding alone part within some steps; how far is what the controls show. Runs of a pair have
the same seed. Two numbers of each pair: the gap of the final validation loss, and the mean gap of the training loss
over the second half of the steps, on the same batches. The rule, fixed before the runs: n seeds of a pair; c, the root
mean square of the gaps of fp8-lm~, and of bf16~, too, where one of the pair is bf16 (squares averaged over the two
controls); m gaps in all,

    |mean gap| <= t(97.5 %, m) * c / sqrt(n)     "within": no gap beyond what chance makes was seen

for both numbers. The right-hand side is `shows`: the least gap that the study could have told from chance. Where a
mean is larger, but not larger than t(97.5 %, n - 1) times its own standard error, the pair "scatters": more than sums
in another order do, to no side. Otherwise it is "outside". One of twenty numbers without a cause is beyond its range.
`apart` is the root mean square of the distance of the training curves, whatever its sign, as a multiple of the
controls'.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from environment import REPOSITORY
from harness import BASELINE, parse_recipe

VARIANTS = REPOSITORY / "benchmarks" / "variants"
FUSED, UNFUSED, SAVED, REMADE = "fp8-lm", "fp8-lm+nofuse", "fp8-lm-saved-bf16", "fp8-lm-remade"
CONTROLS = ((f"{FUSED}~", FUSED), (f"{BASELINE}~", BASELINE))
PAIRS = (
    (UNFUSED, FUSED), (UNFUSED, SAVED), (FUSED, SAVED), (REMADE, FUSED),
    *((recipe, BASELINE) for recipe in (FUSED, UNFUSED, SAVED, REMADE)),
)  # fmt: skip
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; m for m controls, whose mean is known to be zero.
T975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18)
NUMBERS = ("valid", "curve")


class Contender(NamedTuple):
    name: str  # a recipe's name, or the file of a variant
    dtype: str  # that weights are loaded in
    fused: bool
    control: bool


def parse(text: str) -> Contender:
    """`name[@dtype][+nofuse][~]`. Raises SystemExit for what means nothing."""
    bare = text.removesuffix("~")
    name, dtype = parse_recipe(bare.removesuffix("+nofuse"))
    if name == BASELINE and bare.endswith("+nofuse"):
        raise SystemExit(f"{text!r}: nothing is fused in {BASELINE}")
    file = VARIANTS / f"{name}.yaml"
    return Contender(str(file) if file.is_file() else name, dtype, bare == bare.removesuffix("+nofuse"), text != bare)


def wanted(seeds: Sequence[int]) -> list[tuple[str, int]]:
    """All runs in the order of what they decide; a control of bf16 beyond the first comes last."""
    first = [FUSED, UNFUSED, f"{FUSED}~", BASELINE, SAVED, REMADE]
    rounds = [(recipe, seed) for seed in seeds for recipe in first]
    controls = [(f"{BASELINE}~", seed) for seed in seeds]
    return rounds[: len(first)] + controls[:1] + rounds[len(first) :] + controls[1:]


# --- what the pairs say --------------------------------------------------------------------------------------------


def curve_gaps(one: dict[str, Any], other: dict[str, Any]) -> list[list[float]]:
    """[step, relative difference of the training loss] over the steps that both have."""
    points = zip(one["train_curve"], other["train_curve"], strict=False)
    return [[step, (a - b) / b] for (step, a), (_, b) in points]


def pair(cases: dict[tuple[str, int], dict[str, Any]], one: str, other: str) -> dict[str, Any] | None:
    """The gaps of `one` to `other` by seed; None: no seed of both has finished."""
    seeds = sorted(seed for recipe, seed in cases if recipe == one and (other, seed) in cases)
    if not seeds:
        return None
    valid, curve, apart = [], [], []
    for seed in seeds:
        a, b = cases[one, seed], cases[other, seed]
        gaps = [gap for step, gap in curve_gaps(a, b) if step > b["study"]["steps"] / 2]
        valid.append((a["valid_loss"] - b["valid_loss"]) / b["valid_loss"])
        curve.append(statistics.fmean(gaps))
        apart.append(rms(gaps))
    row: dict[str, Any] = {"of": one, "to": other, "control": (one, other) in CONTROLS, "seeds": seeds,
                           "distance": rms(apart)}  # fmt: skip
    return row | {key: {"gaps": gaps, "mean": statistics.fmean(gaps)}
                  for key, gaps in zip(NUMBERS, (valid, curve), strict=True)}  # fmt: skip


def compare_pairs(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every pair that has a seed, the controls first; `verdict` by the rule above, where its controls have a seed."""
    done = {(case["recipe"], case["seed"]): case for case in cases if case["status"] == "ok"}
    rows = [row for names in (*CONTROLS, *PAIRS) if (row := pair(done, *names)) is not None]
    controls = {row["to"]: row for row in rows if row["control"]}
    for row in rows:
        if row["control"]:
            continue
        own = [controls.get(base) for base in ((FUSED, BASELINE) if row["to"] == BASELINE else (FUSED,))]
        if all(own):
            judge(row, own)  # type: ignore[arg-type]
    return rows


def judge(row: dict[str, Any], controls: Sequence[dict[str, Any]]) -> None:
    """Add to a pair's row what its controls say of it."""
    count = sum(len(control["seeds"]) for control in controls)
    t = T975[min(count, len(T975)) - 1]
    for key in NUMBERS:
        chance = rms([rms(control[key]["gaps"]) for control in controls])
        row[key]["shows"] = t * chance / math.sqrt(len(row["seeds"]))
    distance = rms([control["distance"] for control in controls])
    row["apart"] = row["distance"] / distance if distance else None
    beyond = [row[key] for key in NUMBERS if abs(row[key]["mean"]) > row[key]["shows"]]
    scatters = all(abs(number["mean"]) <= own_range(number["gaps"]) for number in beyond)
    row["verdict"] = "within" if not beyond else "scatters" if scatters else "outside"


def own_range(gaps: Sequence[float]) -> float:
    """Of a mean, by the gaps' own scatter; 0 for a single one."""
    n = len(gaps)
    return T975[min(n - 1, len(T975)) - 1] * statistics.stdev(gaps) / math.sqrt(n) if n > 1 else 0.0


def rms(values: Sequence[float]) -> float:
    return math.sqrt(statistics.fmean(value * value for value in values))


def table(rows: Sequence[dict[str, Any]]) -> str:
    heads = (f"{head:>{width}}" for head, width in (("seeds", 5), ("valid gap", 9), ("shows", 6), ("curve gap", 9),
                                                    ("shows", 6), ("apart", 6)))  # fmt: skip
    lines = [f"{'pair, in % of the loss':<38} {' '.join(heads)}"]
    for row in rows:
        cells = []
        for key in NUMBERS:
            shows = row[key].get("shows")
            cells += [f"{100 * row[key]['mean']:+9.3f}", " " * 6 if shows is None else f"{100 * shows:6.3f}"]
        cells.append(" " * 6 if row.get("apart") is None else f"{row['apart']:6.2f}")
        verdict = "control" if row["control"] else row.get("verdict", "no control yet")
        lines.append(f"{row['of'] + ' to ' + row['to']:<38} {len(row['seeds']):>5} {' '.join(cells)}  {verdict}")
    return "\n".join(lines)
