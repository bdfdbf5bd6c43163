# SPDX-License-Identifier: Apache-2.0
"""The demo from end to end in miniature, and its arithmetic on made-up runs."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
DEMO = Path(__file__).resolve().parents[2] / "recipes" / "demo" / "run.py"


@pytest.fixture(scope="module")
def demo() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(DEMO)))


def fake_runs(demo: SimpleNamespace, folder: Path, losses: dict[tuple[str, int], float]) -> list[Any]:
    runs = []
    for (precision, seed), loss in losses.items():
        run = demo.Run(precision, seed, folder / f"{precision}-seed{seed}")
        run.folder.mkdir()
        states = 8.0 if precision == "bf16" else 3.0
        parts = {"weights": 4.0, "gradients": 4.0, "optimizer": states}
        summary = {"eval_loss": loss, "tokens_per_second": 1000.0, "parameters": 1.3e6, "bytes_per_parameter": parts}
        (run.folder / "summary.json").write_text(json.dumps(summary))
        rows = [{"step": 1, "loss": 7.0}, {"step": 1, "eval_loss": 6.0}, {"step": 2, "eval_loss": loss}]
        (run.folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        runs.append(run)
    return runs


LOSSES = {("bf16", 1): 4.0, ("fp8-lm", 1): 4.02, ("bf16", 2): 4.1, ("fp8-lm", 2): 4.1}


def test_gaps_are_paired_by_seed(demo: SimpleNamespace, tmp_path: Path) -> None:
    runs = fake_runs(demo, tmp_path, LOSSES)
    assert demo.relative_gaps(runs) == pytest.approx([0.005, 0.0])
    assert demo.seed_spread(runs) == pytest.approx(0.1 / 4.05)
    text = demo.verdict(runs, gpu=False)
    assert "+0.50%, +0.00%; mean +0.25%" in text
    assert "inside" in text and "emulates" in text
    assert "emulates" not in demo.verdict(runs, gpu=True)


def test_a_gap_beyond_the_spread_is_said(demo: SimpleNamespace, tmp_path: Path) -> None:
    worse = {key: loss + 0.3 * (key[0] == "fp8-lm") for key, loss in LOSSES.items()}
    assert "OUTSIDE" in demo.verdict(fake_runs(demo, tmp_path, worse), gpu=True)


def test_table_and_plot(demo: SimpleNamespace, tmp_path: Path) -> None:
    runs = fake_runs(demo, tmp_path, LOSSES)
    console = Console(width=120, record=True, file=open(os.devnull, "w"))
    console.print(demo.make_table(runs))
    text = console.export_text()
    assert "4.0200" in text and "4.00 + 4.00 + 3.00 = 11.00" in text and "4.00 + 4.00 + 8.00 = 16.00" in text
    demo.plot(runs, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_demo_end_to_end(tmp_path: Path) -> None:
    """One seed of a tiny model: both launches, table, picture, and a line from plain transformers."""
    small = [
        "--steps",
        "6",
        "--batch_size",
        "4",
        "--sequence_length",
        "32",
        "--hidden_size",
        "32",
        "--num_layers",
        "1",
    ]
    small += ["--intermediate_size", "32", "--num_heads", "2", "--max_characters", "200000", "--vocab_size", "512"]
    command = [sys.executable, str(DEMO), "--output", str(tmp_path), "--seeds", "1", *small]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_LOWPREC_RECIPE": "fp8-lm-o1"}
    environment |= {"COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    assert output.count("hf_lowprec: recipe fp8-lm: converted 7 of 8 linears") == 1  # and none under bf16
    assert (tmp_path / "loss.png").exists()
    assert "\ndef" in done.stdout.split("with plain transformers")[1]
    bf16, low = (json.loads((tmp_path / f"{name}-seed1" / "summary.json").read_text()) for name in ("bf16", "fp8-lm"))
    assert bf16["bytes_per_parameter"]["optimizer"] > 8 > 4 > low["bytes_per_parameter"]["optimizer"]
    assert low["eval_loss"] == pytest.approx(bf16["eval_loss"], rel=0.01)
    assert low["eval_loss"] != bf16["eval_loss"]
