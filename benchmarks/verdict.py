# SPDX-License-Identifier: Apache-2.0
"""When is the loss of a recipe the loss of bf16? The rule, fixed before the runs, and the table that applies it.

From the final validation losses v over the seeds s, paired by seed (same initial weights, same data order):

    gap     = mean_s (v_candidate - v_bf16) / v_bf16                 +- its standard error
    spread  = (max_s v_bf16 - min_s v_bf16) / mean_s v_bf16          what another seed alone changes
    bound   = min(0.25 %, spread)

    |gap| + error <= bound    "within 0.25 % and inside the seed spread"
    |gap| - error >  bound    "outside"
    otherwise                 "inconclusive", as with fewer than three seeds: run more of them

A run that diverges is "outside". The gap counts in both directions: a lower loss is no parity either. Who asks for no
more than "not worse than bf16" finds it beside the verdict: `not_higher` is gap + error <= bound.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from harness import BASELINE

TOLERANCE = 0.0025


def compare(baseline: dict[int, float], candidate: dict[int, float]) -> dict[str, Any]:
    """Paired gap, its standard error, the baseline's seed spread and the verdict by the rule above."""
    seeds = sorted(baseline.keys() & candidate.keys())
    losses = [baseline[s] for s in seeds]
    gaps = [(candidate[s] - baseline[s]) / baseline[s] for s in seeds]
    out: dict[str, Any] = {"seeds": seeds, "gaps": gaps, "tolerance": TOLERANCE}
    if not gaps:
        return {**out, "verdict": "inconclusive"}
    out["mean_gap"] = mean = statistics.fmean(gaps)
    out["baseline_spread"] = spread = (max(losses) - min(losses)) / statistics.fmean(losses)
    if not all(map(math.isfinite, gaps)):
        return {**out, "verdict": "outside", "not_higher": False}
    if len(gaps) < 3:
        return {**out, "verdict": "inconclusive"}
    out["baseline_deviation"] = statistics.stdev(losses) / statistics.fmean(losses)
    out["standard_error"] = error = statistics.stdev(gaps) / math.sqrt(len(gaps))
    bound = min(TOLERANCE, spread)
    out["not_higher"] = mean + error <= bound
    if abs(mean) + error <= bound:
        out["verdict"] = f"within {100 * TOLERANCE:g} % and inside the seed spread"
    else:
        out["verdict"] = "outside" if abs(mean) - error > bound else "inconclusive"
    return out


def summarize(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Per candidate the comparison over the whole validation text, and the same weights in high precision."""
    by: dict[str, dict[int, dict[str, Any]]] = {}
    for case in cases:
        by.setdefault(case["recipe"], {})[case["seed"]] = case
    baseline = {s: c["valid_loss"] for s, c in by.get(BASELINE, {}).items()}
    summary: dict[str, Any] = {}
    for recipe, own in by.items():
        if recipe == BASELINE:
            continue
        summary[recipe] = compare(baseline, {s: c["valid_loss"] for s, c in own.items()})
        high = {s: c["valid_loss_high_precision"] for s, c in own.items() if "valid_loss_high_precision" in c}
        summary[recipe]["mean_gap_high_precision"] = compare(baseline, high).get("mean_gap")
    return summary


def table(cases: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    lines = [f"{'recipe':<16} {'seed':>4} {'valid loss':>10} {'seconds':>8} {'peak GiB':>8}"]
    for case in cases:
        peak = "-" if case["peak_gib"] is None else f"{case['peak_gib']:.2f}"
        lines.append(f"{case['recipe']:<16} {case['seed']:>4} {case['valid_loss']:>10.5f} {case['seconds']:>8.1f} "
                     f"{peak:>8}")  # fmt: skip
    for recipe, s in summary.items():
        error = s.get("standard_error")
        numbers = f"gap {s['mean_gap']:+.3%}" if "mean_gap" in s else "no pair"
        numbers += f" +- {error:.3%}, spread of bf16 {s['baseline_spread']:.3%}" if error is not None else ""
        verdict = s["verdict"] + (", not higher" if s.get("not_higher") else "")
        lines.append(f"{recipe}: {numbers}: {verdict}")
    return "\n".join(lines)
