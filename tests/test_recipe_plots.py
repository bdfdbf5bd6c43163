# SPDX-License-Identifier: Apache-2.0
"""Figures of formats and recipes: the numbers that they draw, and that they draw what results hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


@pytest.mark.parametrize(
    ("fmt", "peak"),
    [("e5m2", 25.6), ("e4m3fn", 31.5), ("e4m3b11", 31.5), ("e3m2", 25.6), ("e2m3", 30.8), ("e2m1", 18.9),
     ("e5m10", 73.7), ("e6m5", 43.6)],
)  # fmt: skip
def test_peaks(fmt: str, peak: float) -> None:
    """The largest SQNR of a normal input over its RMS, as computed independently for arXiv 2303.11257's analysis."""
    from plot_numbers import sqnr_curve

    assert max(sqnr_curve(fmt, tuple(k / 2 for k in range(-4, 9)))) == pytest.approx(peak, abs=0.1)


def test_width_of_e4m3() -> None:
    """Within 3 dB of its peak from 2^-5.5 to 2^7."""
    from plot_numbers import sqnr_curve

    inside, edges = sqnr_curve("e4m3fn", (-5.5, 7.0)), sqnr_curve("e4m3fn", (-6.5, 7.5))
    assert min(inside) > 31.5 - 3.1 > max(edges)


def case(recipe: str, family: str, status: str = "ok") -> dict[str, Any]:
    libraries = {"torch": "2", "transformers": "5"}
    return {
        "recipe": recipe, "family": family, "seed": 1, "status": status, "parameters": 1e6, "step_ms": 1.0,
        "train_curve": [[s, 5 - s / 100] for s in range(10, 210, 10)] if status == "ok" else [],
        "study": {"batch": 8, "seq": 64, "bytes": True, "steps": 200},
        "environment": {"gpu": None, "cpu": "cpu", "libraries": libraries},
    }  # fmt: skip


def test_figures_are_drawn(tmp_path: Path) -> None:
    from plot import FIGURES, draw

    data = {"cases": [case("bf16", "control"), case("fp8-lm", "fp8"), case("x", "narrow", "failed")],
            "summary": {"fp8-lm": {"mean_gap": 0.01}}}  # fmt: skip
    (tmp_path / "recipes_cpu.json").write_text(json.dumps(data))
    row = {"perplexity": 17.0, "input_sqnr": 30.0, "weight_sqnr": 31.0}
    sweep = {
        "perplexity": 17.0, "perplexity_amax": 17.5, "tolerance": 0.03, "window": [0, 1], "tokens": 8,
        "model": {"name": "m", "layers": 2, "parameters": 1e6}, "environment": data["cases"][0]["environment"],
        "cases": [{"exponent": k, **row} for k in (-1, 0, 1)] + [{"exponent": 2, **row, "perplexity": None}],
    }  # fmt: skip
    (tmp_path / "constant_window.json").write_text(json.dumps(sweep))
    for name in ("recipes_cpu", "constant_window", "number_lines"):
        assert draw(name, tmp_path, tmp_path / "img"), name
        assert (tmp_path / "img" / f"{name}.svg").stat().st_size > 1000
    assert not draw("recipes", tmp_path, tmp_path / "img"), "no GPU study yet"
    assert {"formats_sqnr", "number_lines", "recipes", "recipes_cpu", "constant_window"} <= set(FIGURES)
