# SPDX-License-Identifier: Apache-2.0
"""benchmarks/recipe_study.py: every preset is a case, failures are results, controls show their mechanism."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


@pytest.fixture
def accelerate_state():
    from accelerate.state import AcceleratorState, GradientState

    def reset() -> None:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    reset()
    yield
    reset()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_corpus(tmp_path_factory.mktemp("corpus"))


def text_corpus(folder: Path) -> Path:
    """A few documents of this repository through the corpus' own tokenizer."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from corpus import Document, train_tokenizer
    finally:
        sys.path.remove(str(BENCHMARKS))
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/numerics.md"))
    tokenizer = train_tokenizer([Document("x", "x", text)], 384, len(text))
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = np.array(tokenizer.encode(text).ids, dtype=np.uint16)
    ids.tofile(folder / "train.bin")
    ids[:2000].tofile(folder / "valid.bin")
    (folder / "meta.json").write_text(json.dumps({"files": {"train.bin": {"sha256": "x"}}}))
    return folder


def test_every_preset_but_the_baseline_is_a_case() -> None:
    from harness import BASELINE
    from recipe_study import families

    assert set(families()) == set(PRESETS) - {BASELINE} and all(families().values())


def test_the_study_is_as_large_as_it_says() -> None:
    from harness import build_llama
    from recipe_study import STAND_IN, RecipeStudy

    for study, least in ((RecipeStudy(), 20e6), (STAND_IN, 0.9e6)):
        model = build_llama(1, "fp32", "meta", **study.model)
        assert least <= sum(p.numel() for p in model.parameters()) < 1.2 * least
    assert RecipeStudy().steps >= 500


def test_what_is_emulated_addition_by_addition_comes_last() -> None:
    from recipe_study import slow

    assert slow("bf16") == slow("fp8-lm") == slow("bf16-sr@bf16") == slow("e4m3-second-moment") == 0
    assert slow("e6m9-unchunked") == slow("e6m5-nearest") == 1


def test_bytes_are_the_text(corpus: Path) -> None:
    from recipe_study import MICRO, windows

    train, valid = windows(MICRO, corpus, "cpu")
    text = (ROOT / "README.md").read_bytes()
    assert bytes(train.rows[:4].flatten().to(torch.uint8).numpy().tobytes()) == text[: 4 * MICRO.seq]
    assert valid.count == MICRO.valid_windows and train.count >= MICRO.steps * MICRO.batch


def test_a_case_is_measured(corpus: Path, accelerate_state: None) -> None:
    from recipe_study import MICRO, train

    case = train("fp8-amax", 1, MICRO, corpus, "cpu")
    assert case["status"] == "ok" and case["train_curve"][-1][0] == MICRO.steps
    assert case["valid_loss"] < math.log(256) and case["step_ms"] > 0
    assert case["conversion"]["recipe"] == PRESETS["fp8-amax"].to_dict()
    assert case["slots"]["fprop input"]["sqnr"] == pytest.approx(31, abs=2)
    assert set(case["slots"]["dgrad grad_output"]) == {"sqnr", "sqnr_least", "underflow", "overflow"}
    json.dumps(case, allow_nan=False)


def test_what_cannot_run_says_why(corpus: Path, accelerate_state: None, tmp_path: Path, monkeypatch) -> None:
    import recipe_study

    def refuse(*_: object) -> None:
        raise ValueError("this recipe needs another machine\nand more words")

    monkeypatch.setattr(recipe_study, "train", refuse)
    case = {"recipe": "x", "seed": 1, "study": asdict(recipe_study.MICRO), "device": "cpu", "corpus": str(corpus)}
    recipe_study.work({"case": case, "target": str(tmp_path / "x.json")})
    stored = json.loads((tmp_path / "x.json").read_text())
    assert stored["status"] == "failed" and stored["reason"] == "ValueError: this recipe needs another machine"
    assert "corpus" not in stored


def test_summary_pairs_seeds_and_leaves_out_what_failed() -> None:
    from recipe_study import summarize, table

    def run(recipe: str, seed: int, loss: float | None, status: str = "ok") -> dict:
        return {"recipe": recipe, "seed": seed, "status": status, "valid_loss": loss, "step_ms": 10.0 * seed}

    cases = [run("bf16", 1, 4.0), run("bf16", 2, 5.0), run("a", 1, 4.04), run("a", 2, 5.05), run("c", 1, 4.4)]
    cases += [run("b", 1, None, "diverged"), {"recipe": "d", "seed": 1, "status": "failed", "reason": "x"}]
    summary = summarize(cases)
    assert summary["a"]["mean_gap"] == pytest.approx(0.01) and summary["a"]["seeds"] == [1, 2]
    assert "mean_gap" not in summary["b"] and summary["b"]["status"] == ["diverged"]
    assert summary["c"]["gaps"] == pytest.approx([0.1]) and summary["d"]["status"] == ["failed"]
    assert "diverged" in table(summary) and "+1.00%" in table(summary)


def test_controls_leave_out_one_thing() -> None:
    from recipe_controls import CONTROLS, control_optimizer, control_recipe, refused_states

    for name in CONTROLS[:3]:
        recipe = control_recipe(name)
        assert recipe is not None and Recipe.from_yaml(recipe.to_yaml()) == recipe and recipe.name == name
        for gemm in (recipe.fprop, recipe.dgrad, recipe.wgrad):
            assert gemm.accumulation.chunk is None and gemm.accumulation.rounding.mode == "nearest"
    assert "table 6, variant #4" in refused_states()
    weight = torch.nn.Parameter(torch.ones(64))
    optimizer = control_optimizer("e4m3-second-moment", torch.optim.AdamW([weight], lr=0.1))
    weight.grad = torch.logspace(-4, 0, 64)
    optimizer.step()
    moment = optimizer.state[weight]["exp_avg_sq"]
    assert int((moment == 0).sum()) > 16 and len(moment.unique()) < 64, "small second moments are gone"
    other = torch.optim.AdamW([weight])
    assert control_optimizer("e5m2-unscaled", other) is other


def test_the_mechanism_of_each_control() -> None:
    from recipe_controls import CONTROLS, mechanism

    found = mechanism(2048)
    assert set(found) == set(CONTROLS)
    for name, (bad, good) in {name: tuple(row.values()) for name, row in found.items()}.items():
        assert bad > 5 * good and bad > 0.02, f"{name}: {bad} against {good}"


def test_micro_is_the_same_study_at_toy_size() -> None:
    from recipe_study import MICRO, STAND_IN

    same = replace(MICRO, hidden=STAND_IN.hidden, intermediate=STAND_IN.intermediate, layers=STAND_IN.layers,
                   heads=STAND_IN.heads, seq=STAND_IN.seq, batch=STAND_IN.batch, steps=STAND_IN.steps,
                   warmup=STAND_IN.warmup, valid_windows=STAND_IN.valid_windows)  # fmt: skip
    assert same == STAND_IN
