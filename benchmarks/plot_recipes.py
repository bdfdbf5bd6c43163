# SPDX-License-Identifier: Apache-2.0
"""Figures of recipe_study.py, with and without --fused, and constant_window.py, from their results alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from harness import BASELINE
from matplotlib.figure import Figure
from recipe_pairs import CONTROLS, PAIRS, curve_gaps

GREY = "#8c8c8c"
SHADES = ("#1f77d0", "#c03a7f", "#2a9d5c", "#e08a1e", "#8a63c9", "#4fa3b8", "#d0553c", "#7db8f2", "#de7fb0", "#74c79a")
TITLES = {"sixteen": "16 bits", "fp8": "FP8", "microscaling": "microscaling, eXmY", "narrow": "narrow sums",
          "integer": "integers", "unscaled": "unit scaling", "flexible": "flexible FP8", "exmy": "eXmY",
          "control": "negative controls", "own": "own"}  # fmt: skip
COLUMNS = 3


def smooth(values: np.ndarray, width: int = 3) -> np.ndarray:
    """Running mean that keeps the length."""
    padded = np.pad(values, width // 2, mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")[: len(values)]


def recipes(data: dict[str, Any], where: str) -> Figure:
    """Loss curves of all recipes: a panel per family, bf16 grey in each, the final gap to it in the legend."""
    first: dict[str, dict[str, Any]] = {}
    for case in data["cases"]:
        first.setdefault(case["recipe"], case)  # of several seeds the first is drawn, the gap is the mean of all
    families: dict[str, list[str]] = {}
    for recipe, case in first.items():
        if recipe != BASELINE:
            families.setdefault(case["family"], []).append(recipe)
    rows = -(-len(families) // COLUMNS)
    figure = Figure(figsize=(3.4 * COLUMNS, 2.6 * rows + 0.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False)).flatten()
    base = np.array(first[BASELINE]["train_curve"])
    for axes, (family, names) in zip(panels, families.items(), strict=False):
        axes.plot(base[:, 0], smooth(base[:, 1]), color=GREY, lw=2.4, alpha=0.6, label=BASELINE)
        for name, shade in zip(names, SHADES * 4, strict=False):
            case, summary = first[name], data["summary"].get(name, {})
            curve = np.array(case.get("train_curve") or [[0, np.nan]])
            gap = f" {100 * summary['mean_gap']:+.2f} %" if "mean_gap" in summary else f" ({case['status']})"
            axes.plot(curve[:, 0], smooth(curve[:, 1]), color=shade, lw=1.1, label=name + gap)
        axes.set_title(TITLES.get(family, family))
        axes.legend(fontsize=7)
    for axes in panels[len(families) :]:
        axes.set_visible(False)
    tail = base[len(base) // 10 :, 1]
    span = tail.max() - tail.min()
    panels[0].set_ylim(tail.min() - 0.1 * span, tail.max() + 0.15 * span)
    study = first[BASELINE]["study"]
    unit = "bytes" if study.get("bytes") else "tokens"
    model = f"Llama, {first[BASELINE]['parameters'] / 1e6:.1f} M parameters, {study['batch']} x {study['seq']} {unit}"
    figure.supylabel("training loss", fontsize=10)
    figure.supxlabel(f"step; beside each name its gap in validation loss to bf16\n{model}; {where}", fontsize=9)
    return figure


def fused_loss(data: dict[str, Any], where: str) -> Figure:
    """Above, how training curves of a pair part, over the range of the controls; below, the final gaps."""
    done = {(case["recipe"], case["seed"]): case for case in data["cases"] if case["status"] == "ok"}
    figure = Figure(figsize=(8.6, 6.4), layout="constrained")
    above, below = figure.subfigures(2, 1)
    panels = zip(above.subplots(1, 2, sharey=True), ("fused and unfused", "what backward keeps"), strict=True)
    shade_of = dict(zip(PAIRS, (*SHADES[:4], *SHADES[4:5] * 4), strict=True))
    for at, (panel, title) in enumerate(panels):
        for names in (CONTROLS[0], *PAIRS[2 * at : 2 * at + 2]):
            label: str | None = f"{' to '.join(names)}{' (control)' * (names in CONTROLS)}"
            shade = shade_of.get(names, GREY)
            for gaps in gap_curves(done, *names):
                panel.plot(gaps[:, 0], smooth(gaps[:, 1]), color=shade, lw=1.0, label=label)
                label = None
        panel.set_title(title)
        panel.set_xlabel("step")
        panel.set_ylabel("" if at else "training loss, gap (%)")
        panel.legend(fontsize=7)
    draw_pairs(below.subplots(), data["pairs"], shade_of)
    case = data["cases"][0]
    model = f"Llama, {case['parameters'] / 1e6:.1f} M parameters, {case['study']['steps']} steps"
    figure.supxlabel(f"{model}; {where}", fontsize=8)
    return figure


def gap_curves(done: dict[tuple[str, int], dict[str, Any]], one: str, other: str) -> list[np.ndarray]:
    """[steps, 2]: step, gap in % of the training loss, for each seed of both."""
    seeds = [seed for recipe, seed in done if recipe == one and (other, seed) in done]
    return [np.array(curve_gaps(done[one, seed], done[other, seed])) * (1, 100) for seed in seeds]


def draw_pairs(axes: Any, rows: list[dict[str, Any]], shade_of: dict[tuple[str, str], str]) -> None:
    """Gap of the final validation loss of each pair: seeds, mean, and the range that chance makes of a mean."""
    label: str | None = "a mean gap by chance, 95 %"
    for y, row in enumerate(rows):
        shade, valid = shade_of.get((row["of"], row["to"]), GREY), row["valid"]
        if "shows" in valid:
            least = 100 * valid["shows"]
            axes.barh(y, 2 * least, left=-least, color=GREY, alpha=0.25, height=0.8, label=label)
            label = None
        axes.plot(100 * np.array(valid["gaps"]), [y] * len(valid["gaps"]), "|", color=shade, ms=8)
        axes.plot(100 * valid["mean"], y, "o", color=shade, ms=5)
    axes.axvline(0, color=GREY, lw=0.8)
    said = [row.get("verdict", "control" if row["control"] else "no control yet") for row in rows]
    axes.set_yticks(range(len(rows)), [f"{r['of']} to {r['to']}: {s}" for r, s in zip(rows, said, strict=True)],
                    fontsize=8)  # fmt: skip
    axes.invert_yaxis()
    axes.set_xlabel("validation loss at the end, gap (%): each seed, mean", fontsize=8)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def constant_window(data: dict[str, Any], where: str) -> Figure:
    """Perplexity and SQNR of FP8-CSCALE against the exponent of its constant."""
    cases = sorted(data["cases"], key=lambda case: case["exponent"])
    k = [case["exponent"] for case in cases]
    figure = Figure(figsize=(7.2, 5.0), layout="constrained")
    top, low = figure.subplots(2, 1, sharex=True)
    top.semilogy(k, [case["perplexity"] or np.nan for case in cases], "o-", ms=4, lw=1.4, color=SHADES[0],
                 label="FP8-CSCALE, scale 2^k everywhere")  # fmt: skip
    top.axhline(data["perplexity_amax"], color=SHADES[1], lw=1.2, label=f"FP8-AMAX {data['perplexity_amax']:.2f}")
    top.axhline(data["perplexity"], color=GREY, lw=1.2, label=f"float32 {data['perplexity']:.2f}")
    top.set_ylim(data["perplexity"] * 0.8, data["perplexity"] * 100)
    top.set_ylabel("perplexity")
    for role, shade in (("input", SHADES[3]), ("weight", SHADES[2])):
        low.plot(k, [case[f"{role}_sqnr"] for case in cases], "o-", ms=4, lw=1.4, color=shade, label=f"{role}s")
    low.set_ylabel("SQNR, median of layers (dB)")
    for axes in (top, low):
        if data["window"]:
            axes.axvspan(data["window"][0] - 0.5, data["window"][-1] + 0.5, color=SHADES[0], alpha=0.12, lw=0)
        axes.legend(fontsize=8)
    model = data["model"]
    size = f"{model['parameters'] / 1e6:.0f} M parameters, {model['layers']} layers"
    text = f"{model['name']}, {size}; {data['tokens']} tokens"
    inside = f"shaded: within {100 * data['tolerance']:g} % of FP8-AMAX"
    low.set_xlabel(f"k: x ~ code * 2^k      ({inside})\n{text}\n{where}")
    return figure
