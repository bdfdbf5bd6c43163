# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of emulation run at toy size, check values before they time them; the committed table is whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


def run(monkeypatch: pytest.MonkeyPatch, script: Any, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "x.py"), *arguments])
    threads = torch.get_num_threads()
    try:
        return script.main()
    finally:
        torch.set_num_threads(threads)


def test_emulation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import bench_emulation

    out = tmp_path / "emulation.json"
    options = ("--micro", "--device", "cpu", "--rounds", "1", "--out", str(out))
    assert run(monkeypatch, bench_emulation, *options, "--only", "e3m1", "mxfp4 e2m1, bf", "e6m9 nearest") == 0
    cases = {case["kernel"]: case for case in json.loads(out.read_text())["cases"]}
    assert {case["status"] for case in cases.values()} == {"ok"}
    nearest = cases["sums e6m9 nearest, 16 x 16 x 32"]
    assert nearest["ratio"] > 1 and cases["sums float32, 16 x 16 x 32"]["ratio"] == 1
    assert cases["quantise-dequantise e3m1 per row, float32, 32 x 64"]["bytes"] == 32 * 64 * 8
    # Speed of wrong values is no speed.
    monkeypatch.setattr(bench_emulation, "bits", lambda x: torch.randn(3))
    assert run(monkeypatch, bench_emulation, *options, "--only", "e3m1") == 0
    spoiled = {case["kernel"]: case for case in json.loads(out.read_text())["cases"]}
    assert spoiled["quantise e3m1 per row, float32, 32 x 64"]["status"] == "the values differ from numerics"


def test_accumulation_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import accumulation_table

    out = tmp_path / "accumulation.json"
    assert run(monkeypatch, accumulation_table, "--micro", "--out", str(out)) == 0
    fresh = json.loads(out.read_text())
    committed = json.loads((BENCHMARKS / "results" / "accumulation.json").read_text())
    assert [case["sums"] for case in fresh["cases"]] == [case["sums"] for case in committed["cases"]]
    for case in committed["cases"]:
        assert [point[0] for point in case["points"]] == list(accumulation_table.LENGTHS)


def test_what_the_committed_table_shows() -> None:
    committed = json.loads((BENCHMARKS / "results" / "accumulation.json").read_text())
    errors = {case["sums"]: {n: mean for n, mean, _ in case["points"]} for case in committed["cases"]}
    assert errors["E6M9 nearest"][1024] < 0.01 and errors["E6M9 nearest"][65536] > 0.95
    assert max(errors["E6M9 nearest, chunks of 64"].values()) < 0.003
    r = {bits: errors[f"E6M5 stochastic, r = {bits}"][65536] for bits in (4, 7, 9, 11, 13)}
    assert r[4] > r[7] > r[9] > r[11] > r[13] and r[13] < 0.1
