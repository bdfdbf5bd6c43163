# SPDX-License-Identifier: Apache-2.0
"""The parts of benchmarks/ that decide something: the verdict's rule, the corpus split, reuse of stored cases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


def losses(*values: float) -> dict[int, float]:
    return dict(enumerate(values, start=1))


BF16 = losses(4.000, 4.010, 4.020)  # spread 0.5 %


@pytest.mark.parametrize(
    ("candidate", "verdict"),
    [
        (losses(4.001, 4.011, 4.021), "within 0.25 % and inside the seed spread"),
        (losses(4.020, 4.030, 4.040), "outside"),  # +0.5 %, far from its error
        (losses(3.980, 3.990, 4.000), "outside"),  # a lower loss is no parity either
        (losses(4.000, 4.020, 4.035), "inconclusive"),  # 0.21 % +- 0.11 % straddles the bound
        (losses(4.001, 4.011), "inconclusive"),
        (losses(4.001, 4.011, float("nan")), "outside"),
    ],
)
def test_verdict(candidate: dict[int, float], verdict: str) -> None:
    from verdict import compare

    assert compare(BF16, candidate)["verdict"] == verdict


def test_a_lower_loss_is_no_parity_but_not_higher() -> None:
    from verdict import compare, table

    assert compare(BF16, losses(3.980, 3.990, 4.000))["not_higher"]
    assert compare(BF16, losses(4.001, 4.011, 4.021))["not_higher"]
    for worse in (losses(4.020, 4.030, 4.040), losses(4.000, 4.020, 4.035), losses(4.0, 4.0, float("nan"))):
        assert not compare(BF16, worse)["not_higher"]
    assert "not_higher" not in compare(BF16, losses(4.001, 4.011)), "two seeds decide nothing"
    assert table([], {"x": compare(BF16, losses(3.980, 3.990, 4.000))}).endswith("outside, not higher")


def test_a_gap_outside_the_seed_spread_is_outside_even_below_the_tolerance() -> None:
    from verdict import compare

    narrow = losses(4.0000, 4.0004, 4.0008)  # spread 0.02 %
    found = compare(narrow, {seed: loss * 1.001 for seed, loss in narrow.items()})
    assert found["mean_gap"] == pytest.approx(0.001) and found["verdict"] == "outside"


def test_gaps_are_paired_by_seed() -> None:
    from verdict import compare

    found = compare(BF16, {3: 4.020 * 1.001, 1: 4.000 * 1.001, 2: 4.010 * 1.001, 4: 9.0})
    assert found["seeds"] == [1, 2, 3]
    assert found["gaps"] == pytest.approx([0.001] * 3) and found["standard_error"] == pytest.approx(0, abs=1e-12)


def test_corpus_holds_out_whole_documents_of_every_source(tmp_path: Path) -> None:
    from corpus import Document, clean, split

    def text(source: str, i: int) -> str:
        return "\n\n".join(f"{source} document {i} paragraph {j} " + "word " * 40 for j in range(4))

    made = [Document(source, f"{source}{i}", text(source, i)) for source in ("a", "b") for i in range(50)]
    repeated = Document("b", "copy", text("a", 7))
    documents = clean(iter([*made, repeated]))
    assert len(documents) == 100, "a copy of a document is dropped"
    train, valid = split(documents, 0.1, seed=1)
    assert {d.key for d in train}.isdisjoint(d.key for d in valid) and len(train) + len(valid) == 100
    assert [sum(d.source == s for d in valid) for s in ("a", "b")] == [pytest.approx(5, abs=1)] * 2
    assert [d.key for d in split(documents[::-1], 0.1, seed=1)[1]] == [d.key for d in valid], "order plays no part"


def test_corpus_from_a_folder(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    np = pytest.importorskip("numpy")
    import argparse

    import corpus

    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        paragraphs = [f"Text {i}, paragraph {j}: " + f"tale {i} " * 30 for j in range(5)]
        (folder / f"{i}.txt").write_text("\n\n".join(paragraphs))
    out = tmp_path / "out"
    corpus.build(argparse.Namespace(folders=[folder], fetch=False, root=None, out=out, vocab=300, train_tokens=10**9,
                                    held_out=0.1, tokenizer_characters=10**6, seed=1))  # fmt: skip
    meta = json.loads((out / "meta.json").read_text())
    tokens = np.fromfile(out / "valid.bin", dtype=np.uint16)
    assert len(tokens) == meta["splits"]["valid"]["tokens"] > 0 and tokens.max() < meta["vocab"] <= 300
    decoded = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json")).decode(tokens.tolist())
    assert decoded.startswith("Text ") and (tokens == 0).sum() == meta["splits"]["valid"]["documents"]


# --- loss_states.py ------------------------------------------------------------------------------------------------

FP32 = losses(5.00, 5.02, 5.04, 5.06)


def shifted(*gaps: float) -> dict[int, float]:
    return {seed: loss * (1 + gap) for (seed, loss), gap in zip(FP32.items(), gaps, strict=False)}


@pytest.mark.parametrize(
    ("candidate", "verdict", "two_sided"),
    [
        (shifted(0.0004, 0.0005, 0.0006, 0.0005), "not higher", "same"),
        (shifted(-0.0040, -0.0041, -0.0042, -0.0041), "not higher", "different"),  # a lower loss is not higher
        (shifted(0.0009, 0.0005, 0.0020, 0.0001), "inconclusive", "inconclusive"),  # 0.088 % +- 0.041 %
        (shifted(0.0040, 0.0041, 0.0042, 0.0041), "higher", "different"),
        (shifted(0.0001, 0.0001), "inconclusive", "inconclusive"),
        (shifted(0.0001, 0.0001, float("nan")), "higher", "different"),
        ({}, "inconclusive", "inconclusive"),
    ],
)
def test_verdict_on_states(candidate: dict[int, float], verdict: str, two_sided: str) -> None:
    from loss_states import judge

    found = judge(FP32, candidate)
    assert (found["verdict"], found["two_sided"]) == (verdict, two_sided)


def test_three_seeds_that_agree_by_luck_are_judged_by_the_spread_of_the_control() -> None:
    from loss_states import judge

    lucky = shifted(0.0005, 0.0005, 0.0005)
    assert judge(FP32, lucky)["verdict"] == "not higher"
    found = judge(FP32, lucky, chaos=0.003)
    assert found["verdict"] == "inconclusive" and found["standard_error"] == pytest.approx(0.003 / 3**0.5)


def test_whole_rounds_of_all_formats_come_before_further_seeds() -> None:
    from loss_states import pack, plan

    pairs = plan(["fp32", "8bit", "8bit/sr"], [1, 2], 2, ["fp32", "8bit"])
    rounds = [(name, seed) for seed in (1, 2) for name in ("fp32", "8bit", "8bit/sr")]
    assert pairs == [*rounds, ("fp32", 3), ("8bit", 3), ("fp32", 4), ("8bit", 4)]
    assert pack(pairs, 3) == [
        [("fp32", 1), ("8bit", 1), ("fp32", 2)],
        [("8bit/sr", 1), ("8bit/sr", 2)],
        [("8bit", 2), ("fp32", 3), ("8bit", 3)],
        [("fp32", 4), ("8bit", 4)],
    ]


@pytest.mark.filterwarnings("ignore:grad and param do not obey")  # lanes are strided
@pytest.mark.parametrize(("compute", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-3)])
def test_a_lane_is_a_llama(compute: str, tolerance: float) -> None:
    """Losses and gradients of the batched pass are those of LlamaForCausalLM under autocast; clipping is per lane."""
    pytest.importorskip("transformers")
    import torch
    from lanes import Lanes
    from loss_states import MICRO

    config = {**MICRO.model, "num_hidden_layers": 2, "vocab_size": 50}
    dtype = getattr(torch, compute)
    lanes = Lanes([1, 2, 1], config, dtype=torch.float32, compute=dtype, device="cpu")
    ids = torch.randint(0, 50, (3, 2, 16), generator=torch.Generator().manual_seed(0))
    found = lanes.backward(ids, clip=1e9)
    grads = lanes.grads.clone()
    for lane, (model, seed) in enumerate(zip(lanes.lanes, (1, 2, 1), strict=True)):
        from harness import build_llama

        alone = build_llama(seed, "fp32", **config)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = alone(input_ids=ids[lane], labels=ids[lane]).loss
        loss.backward()
        torch.testing.assert_close(found[lane], loss.detach(), rtol=tolerance, atol=0)
        expected = torch.cat([p.grad.flatten() for p in alone.parameters()])
        assert (grads[lane] - expected).norm() <= 10 * tolerance * expected.norm()
        for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            assert torch.equal(mine, theirs)

    half = float(grads[1].norm()) / 2
    lanes.backward(ids, clip=half)
    assert float(lanes.grads[1].norm()) == pytest.approx(half, rel=1e-4)
    step = torch.optim.SGD(lanes.lanes[0].parameters(), lr=1.0)
    before = lanes.weights.clone()
    step.step()
    torch.testing.assert_close(lanes.weights[0], before[0] - lanes.grads[0])
    assert torch.equal(lanes.weights[1:], before[1:]), "an optimizer reaches its own lane only"


def toy_corpus(folder: Path) -> None:
    """Tokens of falling frequency, each followed by its double half of the time."""
    import numpy as np

    rng = np.random.default_rng(0)
    folder.mkdir()
    for name, count in (("train.bin", 20_000), ("valid.bin", 2_000)):
        tokens = rng.zipf(1.3, count) % 128
        follow = rng.random(count) < 0.5
        tokens[1:][follow[1:]] = 2 * tokens[:-1][follow[1:]] % 128
        tokens.astype(np.uint16).tofile(folder / name)
    (folder / "meta.json").write_text(json.dumps({"vocab": 128, "files": {"train.bin": {"sha256": "toy"}}}))


def test_the_states_study_runs_at_toy_size(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    toy_corpus(tmp_path / "toy")
    out = tmp_path / "out.json"
    command = [sys.executable, str(BENCHMARKS / "loss_states.py"), "--micro", "--device", "cpu", "--steps", "12",
               "--lr", "3e-3", "--formats", "torch", "8bit", "8bit/bf16+16", "--seeds", "1", "--more", "1",
               "--more-formats", "8bit", "--jobs", "1", "--corpus", str(tmp_path / "toy"),
               "--out", str(out)]  # fmt: skip
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environ)
    result: dict[str, Any] = json.loads(out.read_text())
    assert [(case["format"], case["seed"]) for case in result["cases"]] == [
        ("fp32", 1), ("fp32", 2), ("torch", 1), ("8bit", 1), ("8bit", 2), ("8bit/bf16+16", 1),
    ]  # fmt: skip
    for case in result["cases"]:
        assert case["train_curve"][-1] < case["train_curve"][0] - 0.3 and case["skipped_steps"] == 0
    summary = result["summary"]
    assert abs(summary["torch"]["mean_gap"]) < 1e-4, "the control differs by rounding only"
    assert 0 < abs(summary["8bit"]["mean_gap"]) < 0.01 and summary["8bit"]["seeds"] == [1, 2]
    assert summary["fp32"]["matrix_state_bytes"] == pytest.approx(8, abs=0.01)
    assert summary["8bit"]["matrix_state_bytes"] == pytest.approx(2 + 8 / 256, abs=0.01)
    assert summary["8bit/bf16+16"]["matrix_state_bytes"] == pytest.approx(4 + 8 / 256, abs=0.01)

    pytest.importorskip("matplotlib")
    from plot import draw

    (tmp_path / "results").mkdir()
    out.rename(tmp_path / "results" / "loss_states.json")
    assert draw("loss_states", tmp_path / "results", tmp_path)
    assert (tmp_path / "loss_states.png").stat().st_size > 10_000

    again = [*command[:-1], str(tmp_path / "results" / "loss_states.json"), "--any-source"]
    assert "6 runs done before, 0 to do" in subprocess.run(again, check=True, capture_output=True, text=True).stdout


def test_a_stored_case_is_reused_only_for_the_same_settings_gpu_and_source() -> None:
    from harness import reusable

    here = {"gpu": "a", "libraries": {"torch": "1"}, "package_sha256": "x"}
    case = {"recipe": "fp8-lm", "steps": 5, "environment": here}
    assert reusable(case, {"steps": 5}, here)
    assert not reusable(case, {"steps": 6}, here)
    assert not reusable(case, {"steps": 5}, {**here, "gpu": "b"})
    assert not reusable(case, {"steps": 5}, {**here, "package_sha256": "y"})
    assert reusable({**case, "recipe": "bf16"}, {"steps": 5}, {**here, "package_sha256": "y"}), "stock code only"
    assert reusable(case, {"steps": 5}, {**here, "package_sha256": "y"}, any_source=True)


def test_results_are_written_as_one_line_per_case(tmp_path: Path) -> None:
    from harness import read_cases, write_results

    path = tmp_path / "results.json"
    cases = [{"recipe": "bf16", "n": 1}, {"recipe": "fp8-lm", "n": 2}]
    write_results(path, {"benchmark": "x", "cases": cases})
    assert read_cases(path) == cases
    assert sum(line.startswith('{"recipe"') for line in path.read_text().splitlines()) == 2


def test_recorded_command_holds_no_absolute_path(monkeypatch: pytest.MonkeyPatch) -> None:
    from environment import command

    script = str(BENCHMARKS / "x.py")
    monkeypatch.setattr(sys, "argv", [script, "--out", "/some/where/y.json", "--root=/a/b", f"{BENCHMARKS}/results"])
    assert command() == "python benchmarks/x.py --out y.json --root=b benchmarks/results"


def test_the_optimizer_benchmark_runs_at_toy_size(tmp_path: Path) -> None:
    out = tmp_path / "results" / "optim.json"
    command = [sys.executable, str(BENCHMARKS / "bench_optim.py"), "--micro", "--device", "cpu", "--steps", "2",
               "--jobs", "2", "--only", "8bit@bf16", "fp8-lm", "torch@bf16", "flashoptim",
               "--out", str(out)]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    cases = {(case["contender"], case["set"]): case for case in json.loads(out.read_text())["cases"]}
    names = [name for name in ("8bit@bf16", "fp8-lm@bf16", "fp8-lm+weights@bf16", "torch@bf16") for _ in range(2)]
    assert [name for name, _ in cases if not name.startswith("flash")] == names
    for case in (case for (name, _), case in cases.items() if not name.startswith("flash")):
        assert case["status"] == "ok" and case["ms_per_1e9"] > 0 and case["wall_ms"] > 0
        assert "bitsandbytes" in case["environment"]["libraries"]
    assert cases["8bit@bf16", "big"]["state_bytes_told"] == pytest.approx(2 + 8 / 256, abs=0.2)
    assert cases["fp8-lm@bf16", "big"]["bytes"] == pytest.approx(14, abs=0.3)
    emitting = cases["fp8-lm+weights@bf16", "big"]
    assert emitting["bytes"] == pytest.approx(16, abs=0.3) and emitting["bytes_passes"] == pytest.approx(20, abs=0.3)
    if cases["flashoptim@bf16", "big"]["status"] == "not installed":
        assert "SKIPPED: flashoptim@bf16" in done.stdout

    pytest.importorskip("matplotlib")
    from plot import draw

    assert draw("optim", out.parent, tmp_path)
    assert (tmp_path / "optim.png").stat().st_size > 5_000


@pytest.mark.slow
def test_the_study_runs_end_to_end_at_toy_size(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    import argparse

    import corpus

    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(200):
        paragraphs = [f"Text {i}, paragraph {j}: " + f"tale {i} of {j} " * 30 for j in range(20)]
        (folder / f"{i}.txt").write_text("\n\n".join(paragraphs))
    data, out = tmp_path / "corpus", tmp_path / "out.json"
    corpus.build(argparse.Namespace(folders=[folder], fetch=False, root=None, out=data, vocab=400, train_tokens=10**9,
                                    held_out=0.1, tokenizer_characters=10**6, seed=1))  # fmt: skip
    command = [sys.executable, str(BENCHMARKS / "loss_parity.py"), "--micro", "--device", "cpu", "--recipes", "fp8-lm",
               "--seeds", "1", "--corpus", str(data), "--out", str(out), "--jobs", "1"]  # fmt: skip
    subprocess.run(command, check=True)
    result = json.loads(out.read_text())
    baseline, candidate = result["cases"]
    assert (baseline["recipe"], candidate["recipe"]) == ("bf16", "fp8-lm")
    assert candidate["conversion"]["layer_flop_share"] == 1.0
    for case in (baseline, candidate):
        assert case["train_curve"][-1][1] < case["train_curve"][0][1]
    assert abs(result["summary"]["fp8-lm"]["mean_gap"]) < 0.02
    again = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "2 cases done before, 0 to run" in again
