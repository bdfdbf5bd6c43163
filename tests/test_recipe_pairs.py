# SPDX-License-Identifier: Apache-2.0
"""benchmarks/recipe_pairs.py: fused against unfused, and what backward keeps, beside what chance makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_lowprec.presets import PRESETS, get_recipe

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


def run(recipe: str, seed: int, loss: float, **more: Any) -> dict[str, Any]:
    curve = [[step, loss + 1 - step / 100] for step in range(10, 110, 10)]
    return {"recipe": recipe, "seed": seed, "status": "ok", "valid_loss": loss, "train_curve": curve,
            "study": {"steps": 100}, **more}  # fmt: skip


def test_contenders() -> None:
    from recipe_pairs import CONTROLS, PAIRS, REMADE, SAVED, parse, wanted

    assert parse("fp8-lm") == ("fp8-lm", "fp32", True, False)
    assert parse("bf16~") == ("bf16", "fp32", True, True)
    assert parse("fp8-lm@bf16+nofuse~") == ("fp8-lm", "bf16", False, True)
    with pytest.raises(SystemExit, match=r"bf16\+nofuse~"):
        parse("bf16+nofuse~")
    lm = PRESETS["fp8-lm"].to_dict()
    assert lm["saved"]["format"] == "e4m3fn"
    changed = {SAVED: {key: value for key, value in lm.items() if key != "saved"},
               REMADE: {**lm, "saved_inputs": "remade"}}  # fmt: skip
    for name, fields in changed.items():
        assert get_recipe(parse(name).name) == get_recipe({**fields, "name": name}), "the preset, but for one field"

    runs = wanted([1, 2, 3])
    assert len(runs) == len(set(runs)) == 21 and runs[-2:] == [("bf16~", 2), ("bf16~", 3)]
    assert {recipe for recipe, _ in runs} == {name for names in (*CONTROLS, *PAIRS) for name in names}
    assert [seed for _, seed in runs[:7]] == [1] * 7, "a first seed of all comes first"


def test_a_gap_is_judged_by_the_controls() -> None:
    from recipe_pairs import compare_pairs, table

    assert compare_pairs([run("bf16", 1, 4.0)]) == []
    base = [run("fp8-lm", seed, 4.0) for seed in (1, 2, 3)]
    noise = [run("fp8-lm~", seed, 4.0 + d) for seed, d in ((1, 0.004), (2, -0.004), (3, 0.004))]
    small = [run("fp8-lm+nofuse", seed, 4.0 + d) for seed, d in ((1, 0.006), (2, -0.002), (3, 0.002))]
    large = [run("fp8-lm-remade", seed, 4.02) for seed in (1, 2, 3)]
    failed = [run("fp8-lm-saved-bf16", 1, 4.0, status="failed")]
    rows = {(row["of"], row["to"]): row for row in compare_pairs([*base, *noise, *small, *large, *failed])}
    assert list(rows) == [("fp8-lm~", "fp8-lm"), ("fp8-lm+nofuse", "fp8-lm"), ("fp8-lm-remade", "fp8-lm")]
    control, unfused, remade = rows.values()
    assert control["control"] and "verdict" not in control
    assert unfused["apart"] == pytest.approx((44 / 48) ** 0.5, 1e-3)
    assert unfused["valid"]["gaps"] == pytest.approx([0.0015, -0.0005, 0.0005]) and unfused["seeds"] == [1, 2, 3]
    assert unfused["valid"]["shows"] == pytest.approx(3.18 * 0.001 / 3**0.5), "three gaps of 0.1 % by chance"
    assert unfused["verdict"] == "within" and remade["verdict"] == "outside" and remade["apart"] > 4
    assert remade["valid"]["mean"] == pytest.approx(0.005)
    late = [row[1] for row in base[0]["train_curve"][5:]]
    assert remade["curve"]["mean"] == pytest.approx(np.mean([0.02 / loss for loss in late])), "the second half"
    text = table(list(rows.values()))
    bf16 = [run(name, seed, 4.0) for name in ("bf16", "bf16~") for seed in (1, 2, 3)]
    (mixed,) = (row for row in compare_pairs([*base, *noise, *bf16]) if row["of"] == "fp8-lm")
    assert mixed["valid"]["shows"] == pytest.approx(2.45 * (0.001**2 / 2) ** 0.5 / 3**0.5), "half of it is bf16's"
    assert "verdict" not in compare_pairs([*base, *noise, *bf16[:3]])[-1], "bf16 has no control yet"
    assert text.count("\n") == 3 and "within" in text and text.splitlines()[1].endswith("control")
    wide = [run("fp8-lm+nofuse", seed, 4.0 + d) for seed, d in ((1, 0.08), (2, -0.03), (3, 0.03))]
    assert compare_pairs([*base, *noise, *wide])[-1]["verdict"] == "scatters", "to no side"
    assert compare_pairs([*base, *noise, *wide[:1]])[-1]["verdict"] == "outside", "one seed has no scatter"
    lone = compare_pairs([*base, *small])
    assert "verdict" not in lone[0] and "no control yet" in table(lone)
    same = compare_pairs([*base, *(run("fp8-lm~", seed, 4.0) for seed in (1, 2, 3)), *small])
    json.dumps(same, allow_nan=False)
    assert same[1]["apart"] is None and same[1]["verdict"] == "scatters" and "control" in table(same)


def test_a_nudge_moves_what_every_token_meets() -> None:
    from loss_parity import nudge

    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(4, 8), "norm": torch.nn.LayerNorm(8)})
    nudge(model)
    weight = model["norm"].weight
    assert float(weight[0].detach()) == pytest.approx(1.001) and bool((weight[1:] == 1).all())


def test_slots_are_measured_beside_graphs() -> None:
    """The hooks that look at a batch make layers run eagerly, and leave the graphs what they were."""
    from core import llama
    from graph_cases import FakeCapturer

    import hf_lowprec
    from hf_lowprec.monitor import slots

    model = llama(use_cache=False)
    hf_lowprec.convert(model, "fp8-lm", emulate=True)
    graphs = hf_lowprec.graph_layers(model, warmup_steps=1, capturer=FakeCapturer, device_type="cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    ids = torch.arange(32).view(2, 16)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(6):
        step()
    assert graphs.captured == 2
    replays = graphs.replays
    found = slots(model, lambda: model(input_ids=ids, labels=ids).loss)
    assert len(found) == 14 and all(len(layer) == 6 for layer in found.values()) and graphs.replays == replays


def test_the_study_runs_at_toy_size(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from test_recipe_study import text_corpus

    corpus, out = text_corpus(tmp_path / "corpus"), tmp_path / "fused_loss.json"
    command = [sys.executable, str(BENCHMARKS / "recipe_study.py"), "--fused", "--micro", "--device", "cpu",
               "--corpus", str(corpus), "--out", str(out)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    cases = {case["recipe"]: case for case in result["cases"]}
    assert len(cases) == 7 and all(case["status"] == "ok" for case in cases.values())
    assert "fused:" in cases["fp8-lm"]["conversion"]["summary"]
    assert "fused:" not in cases["fp8-lm+nofuse"]["conversion"]["summary"]
    assert cases["fp8-lm-remade"]["conversion"]["recipe"]["saved_inputs"] == "remade"
    assert [row["control"] for row in result["pairs"]] == [True] * 2 + [False] * 8
    assert "fp8-lm+nofuse to fp8-lm" in done.stdout and str(tmp_path) not in out.read_text()
    again = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "7 cases done before, 0 to run" in again

    pytest.importorskip("matplotlib")
    from plot import draw

    assert draw("fused_loss", tmp_path, tmp_path)
    assert (tmp_path / "fused_loss.png").stat().st_size > 10_000
