# SPDX-License-Identifier: Apache-2.0
"""The parts of benchmarks/ that decide something: the verdict's rule, the corpus split, reuse of stored cases."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("verdict", "harness", "corpus", "plot", "environment"):
        sys.modules.pop(name, None)


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
