# SPDX-License-Identifier: Apache-2.0
"""Every figure of the documentation, from the committed JSON in benchmarks/results and from nothing else, but for
the figures of number formats (`plot_numbers.py`), which follow from the numerics.

    python benchmarks/plot.py               all figures whose results exist, into docs/img (SVG and PNG)
    python benchmarks/plot.py loss_parity   one of them

A new figure is a function from results to a matplotlib figure and a line in FIGURES. Colours: bf16 is grey, every
format family has one hue, in the same order everywhere; members of a family differ in lightness. Backgrounds are
transparent and ink is mid-grey, so that figures read on light and dark pages.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from environment import REPOSITORY
from harness import BASELINE, RESULTS
from matplotlib.figure import Figure
from plot_numbers import formats_sqnr, number_lines
from plot_recipes import constant_window, fused_loss, recipes
from verdict import TOLERANCE

IMAGES = REPOSITORY / "docs" / "img"
INK = "#7d8590"
LARGEST = 200_000  # bytes of a PNG, so that the README stays light
STYLE = {
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "font.size": 10,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "legend.frameon": False,
    "legend.labelcolor": INK, "svg.fonttype": "path", "svg.hashsalt": "hf_lowprec",
}  # fmt: skip

# Family: (what its recipes' names start with, shades in the order in which members are first drawn).
FAMILIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bf16": (("bf16", "fp32"), ("#8c8c8c", "#b4b4b4")),
    "fp16": (("fp16",), ("#a0785a",)),
    "fp8": (("fp8", "te-", "hfp8"), ("#1f77d0", "#7db8f2", "#14508c", "#4fa3b8", "#a9c9e8")),
    "mx": (("mx",), ("#c03a7f", "#de7fb0")),
    "int8": (("switchback", "compact"), ("#e08a1e", "#f0b666")),
    "codebook": (("8bit", "4bit"), ("#8a63c9", "#b89be0")),
    "ternary": (("bitnet",), ("#2a9d5c", "#74c79a")),
    "peers": (("torch", "bitsandbytes", "flashoptim"), ("#d0553c", "#e58d78", "#9c3b27", "#f0b3a4", "#b86a5a")),
}
_drawn: dict[str, dict[str, str]] = {}  # family -> recipe -> shade


class NothingToDraw(Exception):
    """The results hold nothing of this kind, e.g. because an older version of the benchmark wrote them."""


def colour(recipe: str) -> str:
    for family, (prefixes, shades) in FAMILIES.items():
        if recipe.rpartition("/")[2].startswith(prefixes):  # a recipe may be a file
            taken = _drawn.setdefault(family, {})
            return taken.setdefault(recipe, shades[len(taken) % len(shades)])
    raise SystemExit(f"no colour for {recipe!r}: add its format family to FAMILIES in plot.py")


def conditions(environment: dict[str, Any], *others: dict[str, Any]) -> str:
    """GPU and versions under a figure. others: environments that may differ in the commit alone."""
    libraries = environment["libraries"]
    where = environment["gpu"] or f"{environment['cpu']} (CPU, emulated)"
    commits = list(dict.fromkeys(e["commit"][:9] for e in (environment, *others) if e.get("commit")))
    commit = f", commit{'s' * (len(commits) > 1)} {' and '.join(commits)}" if commits else ""
    return f"{where}, torch {libraries['torch']}, transformers {libraries['transformers']}{commit}"


# --- loss parity ---------------------------------------------------------------------------------------------------


def loss_parity(data: dict[str, Any]) -> Figure:
    """Training loss over tokens, seeds as bands; below, the validation gap to bf16 beside what a seed changes."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for case in data["cases"]:
        runs.setdefault(case["recipe"], []).append(case)
    study = data["cases"][0]["study"]
    scale = study["batch"] * study["seq"] / 1e6  # steps to M tokens

    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    top, low = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1.15))
    for recipe, cases in runs.items():
        steps, losses = stacked(cases, "train_curve")
        label = f"{recipe} ({len(cases)} seed{'s' * (len(cases) != 1)})"
        top.plot(steps * scale, losses.mean(0), color=colour(recipe), lw=1.4, label=label,
                 zorder=1 if recipe == BASELINE else 2)  # fmt: skip
        top.fill_between(steps * scale, losses.min(0), losses.max(0), color=colour(recipe), alpha=0.25, lw=0)
    top.set_ylabel("training loss")
    top.set_ylim(*zoom(top))
    top.legend(loc="upper right")
    draw_gaps(low, runs, data["summary"], scale)
    low.set_xlabel(f"training tokens (millions)\n{caption(data)}")
    return figure


def draw_gaps(axes: Any, runs: dict[str, list[dict[str, Any]]], summary: dict[str, Any], scale: float) -> None:
    """Paired relative gap of the validation loss in %, the final one with its standard error."""
    base = {case["seed"]: case for case in runs[BASELINE]}
    steps, losses = stacked(list(base.values()), "valid_curve", final=True)
    around = 100 * (losses / losses.mean(0) - 1)
    axes.fill_between(steps * scale, around.min(0), around.max(0), color=colour(BASELINE), alpha=0.3, lw=0,
                      label="bf16, seed to seed")  # fmt: skip
    axes.axhline(0, color=INK, lw=0.8)
    for sign in (-1, 1):
        axes.axhline(sign * 100 * TOLERANCE, color=INK, lw=0.8, ls=(0, (4, 4)))
    for recipe, cases in runs.items():
        pairs = [case for case in cases if case["seed"] in base]
        if recipe == BASELINE or not pairs:
            continue
        steps, losses = stacked(pairs, "valid_curve", final=True)
        _, reference = stacked([base[case["seed"]] for case in pairs], "valid_curve", final=True)
        gaps = 100 * (losses / reference - 1).mean(0)
        numbers = summary[recipe]
        error = numbers.get("standard_error")
        label = f"{recipe} {100 * numbers['mean_gap']:+.2f} %" + ("" if error is None else f" ± {100 * error:.2f} %")
        axes.plot(steps * scale, gaps, color=colour(recipe), lw=1.4, label=label)
        axes.errorbar(steps[-1] * scale, gaps[-1], yerr=100 * (error or 0), color=colour(recipe), fmt="o", ms=4,
                      capsize=3)  # fmt: skip
    axes.set_ylabel("validation gap (%)")
    axes.legend(loc="upper right", fontsize=8, ncols=2)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -200 * TOLERANCE), max(high * 1.5, 300 * TOLERANCE))


def stacked(cases: list[dict[str, Any]], curve: str, final: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses [case, step] over the steps that all cases have."""
    length = min(len(case[curve]) for case in cases)
    steps = [point[0] for point in cases[0][curve][:length]]
    losses = [[point[1] for point in case[curve][:length]] for case in cases]
    if final:
        steps.append(cases[0]["study"]["steps"])
        losses = [[*row, case["valid_loss"]] for row, case in zip(losses, cases, strict=True)]
    return np.array(steps, float), np.array(losses, float)


def zoom(axes: Any) -> tuple[float, float]:
    """y-limits that leave out the first steps, where the loss falls from ln(vocab)."""
    drawn = [np.asarray(line.get_ydata(), float) for line in axes.get_lines()]
    rest = np.concatenate([y[len(y) // 20 :] for y in drawn])
    low, high = np.nanmin(rest), np.nanmax(rest)
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def caption(data: dict[str, Any]) -> str:
    case = data["cases"][0]
    model = f"Llama, {case['parameters'] / 1e6:.0f} M parameters"
    text = f"gap at the end over {case['valid_tokens'] / 1e6:.2f} M held-out tokens; dashed: ±{100 * TOLERANCE:g} %"
    return f"{model}; {text}\n{conditions(case['environment'])}"


# --- optimizer states ----------------------------------------------------------------------------------------------


def loss_states(data: dict[str, Any]) -> Figure:
    """The final loss gap of every state format to fp32 states, the control first; beside it, what the states cost."""
    summary = {name: s for name, s in data["summary"].items() if name != data["baseline"] and "mean_gap" in s}
    names = sorted(summary, key=lambda name: (name != data["control"], "/" in name))  # control, float32, bfloat16
    figure = Figure(figsize=(8.2, 1.3 + 0.3 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2.2, 1))
    limit = 100 * data["tolerance"]
    if "deviation" in (control := summary.get(data["control"], {})):
        chaos = 100 * control["deviation"]
        left.axvspan(-chaos, chaos, color=colour(data["baseline"]), alpha=0.2, lw=0,
                     label="one seed's gap from rounding alone (± 1 deviation)")  # fmt: skip
    left.axvline(0, color=INK, lw=0.8)
    left.axvline(limit, color=INK, lw=0.8, ls=(0, (4, 4)), label=f"bound on mean + error: {limit:g} %")
    for y, name in enumerate(names):
        s, states = summary[name], name.partition("/")[0]
        shade = colour(data["baseline"] if name == data["control"] else states)
        gaps = 100 * np.asarray(s["gaps"], float)
        left.plot(gaps, np.full(len(gaps), y), "|", color=shade, ms=7, alpha=0.55)
        left.errorbar(100 * s["mean_gap"], y, xerr=100 * s.get("standard_error", 0), fmt="o", ms=5, capsize=3,
                      color=shade)  # fmt: skip
        right.barh(y, s["matrix_state_bytes"], color=shade, height=0.7)
        right.text(s["matrix_state_bytes"], y, f" {s['matrix_state_bytes']:.2f}", va="center", fontsize=8)
    labels = [f"{name}  ({len(summary[name]['seeds'])} seeds: {summary[name]['verdict']})" for name in names]
    labels = [label.replace(data["control"], "control, torch", 1) if name == data["control"] else label
              for name, label in zip(names, labels, strict=True)]  # fmt: skip
    left.set_yticks(range(len(names)), labels, fontsize=8)
    left.invert_yaxis()
    left.set_title("validation gap to fp32 states (%)\nevery seed, mean ± standard error", fontsize=9)
    right.set_title("bytes of state\nper parameter", fontsize=9)
    right.margins(x=0.22)
    figure.legend(loc="outside upper center", fontsize=8, ncols=2)
    case = data["cases"][0]
    figure.supxlabel(
        f"Llama, {case['parameters'] / 1e6:.1f} M parameters, {case['study']['steps']} steps; name/master: bfloat16 "
        f"Parameters\n{conditions(data['environments'][case['environment']])}", fontsize=8,
    )  # fmt: skip
    return figure


# --- step time and memory ------------------------------------------------------------------------------------------


def step_groups(data: dict[str, Any], field: str, baseline: bool) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Cases that ran and have `field`, by model and batch."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in data["cases"]:
        if case["status"] == "ok" and case.get(field) is not None and (baseline or case["recipe"] != BASELINE):
            groups.setdefault((case["model_name"], case["batch"]), []).append(case)
    if not groups:
        raise NothingToDraw(f"no case of {data['benchmark']}.json has {field}")
    return groups


def environments(groups: dict[Any, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [case["environment"] for cases in groups.values() for case in cases]


def step(data: dict[str, Any]) -> Figure:
    """Step time as a share of bf16's in the same run, of every case that ran, the losing ones included."""
    groups = step_groups(data, "ratio", baseline=False)
    figure = Figure(figsize=(8.2, 1.2 + 0.24 * sum(len(g) + 1 for g in groups.values())), layout="constrained")
    axes = figure.subplots()
    position, ticks = 0.0, []
    for (model, batch), cases in groups.items():
        axes.text(0, position - 0.75, f"{model}, {batch}", fontsize=9, weight="bold", va="center")
        for case in cases:
            ticks.append((position, case["recipe"]))
            axes.barh(position, case["ratio"], color=colour(case["recipe"]), height=0.8)
            share = f", {100 * case['mfu_bf16']:.0f} %" if case.get("mfu_bf16") else ""
            axes.text(case["ratio"], position, f" {case['ratio']:.2f}  ({case['step_ms']:.0f} ms{share})", va="center",
                      fontsize=8)  # fmt: skip
            position += 1
        position += 1.2
    axes.axvline(1, color=colour(BASELINE), lw=1.2)
    axes.set_title("step time / bf16 of the same run   (ms, model FLOPs as a share of the bf16 peak)", pad=18)
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.margins(x=0.22, y=0.01)
    axes.invert_yaxis()
    how = "through Accelerator.prepare, eager unless +compile; @bf16: weights loaded in bf16"
    figure.supxlabel(f"{how}\n{conditions(*environments(groups))}", fontsize=8)
    return figure


PARTS = (("weights_gib", "weights", "#8c8c8c"), ("states_gib", "optimizer states", "#8a63c9"),
         ("held", "cached FP8 weights, other state", "#2a9d5c"),
         ("rest", "activations, gradients, temporaries", "#1f77d0"),
         ("pools", "more that is reserved, where layers have CUDA graphs", "#b9d4ef"))  # fmt: skip


def memory(data: dict[str, Any]) -> Figure:
    """Peak memory of a step, stacked: what is held between steps, and what a step adds on top.

    Where layers were captured, up to all that is reserved: the allocator does not see what replays use.
    """
    groups = step_groups(data, "held_gib", baseline=True)
    figure = Figure(figsize=(8.2, 1.4 + 0.24 * sum(len(g) + 1 for g in groups.values())), layout="constrained")
    axes = figure.subplots()
    position, ticks = 0.0, []
    for (model, batch), cases in groups.items():
        axes.text(0, position - 0.75, f"{model}, {batch}", fontsize=9, weight="bold", va="center")
        for case in cases:
            held = case["held_gib"] - case["weights_gib"] - case["states_gib"]
            seen = "reserved" if case.get("graphs_captured") and "reserved_gib" in case else "peak"
            sizes = {**case, "held": max(held, 0.0), "rest": case["peak_gib"] - case["held_gib"],
                     "pools": case[f"{seen}_gib"] - case["peak_gib"]}  # fmt: skip
            left = 0.0
            for field, label, shade in PARTS:
                axes.barh(position, sizes[field], left=left, color=shade, height=0.8,
                          label=label if not ticks else None)  # fmt: skip
                left += sizes[field]
            share = f" ({case[f'{seen}_ratio']:.2f})" if f"{seen}_ratio" in case else ""
            axes.text(left, position, f" {case[f'{seen}_gib']:.1f}{share}", va="center", fontsize=8)
            ticks.append((position, case["recipe"]))
            position += 1
        position += 1.2
    axes.set_title("peak memory, GiB   (share of bf16's in the same run)", pad=18)
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.margins(x=0.14, y=0.01)
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", fontsize=8, ncols=2)
    figure.supxlabel(conditions(*environments(groups)), fontsize=8)
    return figure


def breakeven(data: dict[str, Any]) -> Figure:
    """Time of two layers, forward and backward, as a share of bf16's, over width and tokens; the line: break-even."""
    cases = [case for case in data["cases"] if case["cells"]]
    if not cases:
        raise SystemExit("no case of breakeven.json has a map: run bench_breakeven.py without --no-map")
    figure = Figure(figsize=(1.2 + 3.6 * len(cases), 3.6), layout="constrained")
    for axes, case in zip(np.atleast_1d(figure.subplots(1, len(cases), sharey=True)), cases, strict=True):
        widths, tokens = (sorted({cell[i] for cell in case["cells"]}) for i in (0, 1))
        ratios = np.full((len(tokens), len(widths)), np.nan)
        for width, count, base, ours in case["cells"]:
            ratios[tokens.index(count), widths.index(width)] = ours / base
        spread = max(0.5, float(np.nanmax(np.abs(np.log2(ratios)))))
        axes.imshow(np.log2(ratios), cmap="RdBu_r", vmin=-spread, vmax=spread, origin="lower", aspect="auto")
        if min(ratios.shape) > 1:
            axes.contour(ratios, levels=[1.0], colors="black", linewidths=1.2)
        for y, x in np.ndindex(ratios.shape):
            dark = abs(np.log2(ratios[y, x])) > 0.6 * spread
            axes.text(x, y, f"{ratios[y, x]:.2f}", ha="center", va="center", fontsize=8,
                      color="white" if dark else "black")  # fmt: skip
        axes.set_xticks(range(len(widths)), widths)
        axes.set_yticks(range(len(tokens)), tokens)
        axes.set_title(f"{case['recipe']}: time / bf16")
        axes.set_xlabel("hidden size")
    figure.axes[0].set_ylabel("tokens in a micro-batch")
    what = "two Llama layers, forward and backward, eager, CUDA graphs where the GPU waits"
    figure.supxlabel(f"{what}; {conditions(cases[0]['environment'])}", fontsize=8)
    return figure


# --- kernels -------------------------------------------------------------------------------------------------------


def kernels(data: dict[str, Any]) -> Figure:
    """Bytes that a pass must move over its time, as a share of what a copy reaches in the same process."""
    cases = [case for case in data["cases"] if case["status"] == "ok" and case.get("copy_share")]
    cases = [case for case in cases if ", 8192 x" in case["kernel"]]
    if not cases:
        raise NothingToDraw("no case of the size that is drawn (8192 rows)")
    figure = Figure(figsize=(8.2, 1.2 + 0.22 * len(cases)), layout="constrained")
    axes = figure.subplots()
    for position, case in enumerate(cases):
        axes.barh(position, case["copy_share"], color=colour("fp8"), height=0.8)
        axes.text(case["copy_share"], position, f" {case['copy_share']:.2f}  ({case['gb_per_s']:.0f} GB/s)",
                  va="center", fontsize=8)  # fmt: skip
    axes.axvline(1, color=INK, lw=0.8)
    axes.axvline(0.9, color=INK, lw=0.8, ls=(0, (4, 4)))
    axes.set_yticks(range(len(cases)), [case["kernel"] for case in cases], fontsize=8)
    axes.set_title("needed bytes per second / a device copy's   (dashed: the target, 0.9)")
    axes.margins(x=0.2, y=0.01)
    axes.invert_yaxis()
    figure.supxlabel(conditions(cases[0]["environment"]), fontsize=8)
    return figure


# --- narrow sums ---------------------------------------------------------------------------------------------------


SHADES = ("#d0553c", "#1f77d0", "#e58d78", "#8a63c9", "#b89be0", "#2a9d5c", "#74c79a", "#c03a7f", "#14508c", "#8c8c8c")


def accumulation(data: dict[str, Any]) -> Figure:
    """Relative error of a sum against its length, for every way of adding: one stalls, one drifts, one stays."""
    figure = Figure(figsize=(8.2, 4.6), layout="constrained")
    axes = figure.subplots()
    for shade, case in zip(SHADES, data["cases"], strict=True):
        lengths, means, _ = (np.array(column, float) for column in zip(*case["points"], strict=True))
        ls = "--" if "chunks" in case["sums"] else "-"
        axes.plot(lengths, means, ls, marker="o", ms=4, lw=1.5, color=shade, label=case["sums"])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylabel("mean relative error")
    axes.set_xlabel(f"length of the sum (values {data['values']}, {data['trials']} sums each)\n"
                    f"{conditions(data['environment'])}", fontsize=8)  # fmt: skip
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


# --- optimizer step ------------------------------------------------------------------------------------------------


def optim(data: dict[str, Any]) -> Figure:
    """Time of a step against what the states cost, of every contender that ran; circles are ours, squares peers."""
    cases = [case for case in data["cases"] if case["status"] == "ok" and case["set"] == "big"]
    figure = Figure(figsize=(9.0, 5.4), layout="constrained")
    axes = figure.subplots()
    labels = []
    for case in cases:
        name, told = case["contender"], case["state_bytes_told"]
        x, y = case["state_bytes"] if told is None else told, case["ms_per_1e9"]
        if x is not None:
            peer = colour(name) in FAMILIES["peers"][1]
            axes.plot(x, y, "s" if peer else "o", color=colour(name), ms=7)
            labels.append((x, y, f"{name} {y:.1f}"))
    label_apart(axes, labels)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else "")
    axes.set_xlim(-0.5, axes.get_xlim()[1] + 1.2)
    axes.set_ylabel("ms per step and 1e9 parameters")
    text = "circles: hf_lowprec, squares: peers; states@weights"
    libraries = cases[0]["environment"]["libraries"]
    peers = ", ".join(f"{name} {libraries[name]}" for name in ("bitsandbytes", "torchao", "flashoptim")
                      if libraries.get(name))  # fmt: skip
    below = (text, conditions(cases[0]["environment"]), peers)
    axes.set_xlabel("\n".join(["bytes of state per parameter", *below]), fontsize=8)
    return figure


def label_apart(axes: Any, labels: list[tuple[float, float, str]], apart: float = 0.035) -> None:
    """Names beside their points, on a logarithmic y axis; one that would lie on another moves up.

    apart: of labels at nearby x, as a share of the height of all points.
    """
    ys = np.log([y for _, y, _ in labels])
    height = max(float(np.ptp(ys)), 1e-3) if len(ys) else 1.0
    placed: list[tuple[float, float]] = []
    for x, y, text in sorted(labels, key=lambda label: label[1]):
        at, left = float(np.log(y)), x < 1.5
        for near, other in placed:
            if abs(near - x) < 1.3 and not left:
                at = max(at, other + apart * height)
        if not left:
            placed.append((x, at))
        axes.annotate(text, (x, y), xytext=(-0.15 + x if left else x + 0.15, np.exp(at)), fontsize=8, va="center",
                      ha="right" if left else "left")  # fmt: skip


def study(data: dict[str, Any]) -> Figure:
    return recipes(data, conditions(data["cases"][0]["environment"]))


def pairs(data: dict[str, Any]) -> Figure:
    return fused_loss(data, conditions(data["cases"][0]["environment"]))


def window(data: dict[str, Any]) -> Figure:
    return constant_window(data, conditions(data["environment"]))


# name of the figure -> (file in benchmarks/results, or None, function)
FIGURES: dict[str, tuple[str | None, Callable[[dict[str, Any]], Figure]]] = {
    "loss_parity": ("loss_parity.json", loss_parity),
    "loss_states": ("loss_states.json", loss_states),
    "step": ("step.json", step),
    "memory": ("step.json", memory),
    "breakeven": ("breakeven.json", breakeven),
    "kernels": ("kernels.json", kernels),
    "optim": ("optim.json", optim),
    "recipes": ("recipes.json", study),
    "recipes_cpu": ("recipes_cpu.json", study),
    "fused_loss": ("fused_loss.json", pairs),
    "constant_window": ("constant_window.json", window),
    "formats_sqnr": (None, formats_sqnr),
    "number_lines": (None, number_lines),
    "accumulation": ("accumulation.json", accumulation),
}


def draw(name: str, results: Path, images: Path) -> bool:
    source, function = FIGURES[name]
    if source is not None and not (results / source).is_file():
        print(f"{name}: no {source} yet")
        return False
    _drawn.clear()
    images.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        try:
            figure = function({} if source is None else json.loads((results / source).read_text()))
        except NothingToDraw as error:
            print(f"{name}: {error}")
            return False
        figure.savefig(images / f"{name}.svg", metadata={"Date": None})
        dpi = 140 if figure.get_figheight() < 7 else 105  # pages of panels stay light, too
        figure.savefig(images / f"{name}.png", dpi=dpi, metadata={"Software": None})
    size = (images / f"{name}.png").stat().st_size
    if size > LARGEST:
        raise SystemExit(f"{name}.png has {size} bytes, more than {LARGEST}")
    print(f"{name}: drawn from {source or 'the numerics'}")
    return True


def main() -> int:
    names = sys.argv[1:] or list(FIGURES)
    if unknown := [name for name in names if name not in FIGURES]:
        raise SystemExit(f"no figure {', '.join(unknown)}; there are: {', '.join(FIGURES)}")
    for name in names:
        draw(name, RESULTS, IMAGES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
