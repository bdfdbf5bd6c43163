# SPDX-License-Identifier: Apache-2.0
"""What a fused Llama block costs beside its kernels: memory that it keeps for backward, and calls of the host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
pytestmark = pytest.mark.usefixtures("benchmarks_on_path")
E4M3 = 1 + 4 / (16 * 256)  # bytes of an element of gate or up: its code, and its part of the scale of a tile


@pytest.mark.parametrize(("case", "stream", "hidden"), [
    ("fp8-lm@bf16", 2, E4M3), ("fp8-lm+saved=bf16@bf16", 2, 2), ("fp8-lm", 4, E4M3), ("te-current@bf16", 2, 2),
])  # fmt: skip
def test_a_block_keeps_what_the_formula_says(case: str, stream: int, hidden: float) -> None:
    pytest.importorskip("transformers")
    from saved_bytes import formula, measure

    found = measure(case, 512)
    expected = formula(3.5, 0.25, 128, stream, hidden)
    # Beside it one number per row for each norm, and scales.
    assert expected <= found["total_u"] <= expected + 0.02, found["tensors"]


@pytest.mark.parametrize(("case", "stream", "hidden", "asked"), [
    ("fp8-lm+remade@bf16", 2, E4M3, 8.0), ("fp8-lm+saved=bf16+remade@bf16", 2, 2, 11.5),
    ("te-current+remade@bf16", 2, 2, 11.5), ("fp8-lm+remade", 4, E4M3, 10.0),
])  # fmt: skip
def test_a_block_that_makes_inputs_again(case: str, stream: int, hidden: float, asked: float) -> None:
    """Elements in one or two bytes as asked for; beside them attention's float32 number per row and head (1/64), which
    that count leaves out, a number per row for each norm, and scales, those of gate and up 0.1 % of their codes."""
    pytest.importorskip("transformers")
    from saved_bytes import formula, measure

    found = measure(case, 512)
    expected = formula(3.5, 0.25, 128, stream, hidden, remade=True)
    assert expected == pytest.approx(asked + 1 / 64 + 3.5 * (hidden - round(hidden)))
    assert expected - 1e-3 <= found["total_u"] <= expected + 0.01, found["tensors"]
    elements = sum(u for name, u in found["tensors"] if name.startswith(("bfloat16", "float8", "float32 1x64x512")))
    assert elements == asked


def test_the_formula_is_that_of_the_committed_measurement() -> None:
    from saved_bytes import formula

    cases = {case["case"]: case for case in json.loads((BENCHMARKS / "results/saved_bytes.json").read_text())["cases"]}
    assert all(case["width"] == 4096 for case in cases.values())
    assert cases["fp8-lm@bf16"]["total_u"] == pytest.approx(formula(3.5, 0.25, 128, 2, E4M3), abs=0.01)
    assert cases["fp8-lm+saved=bf16@bf16"]["total_u"] == pytest.approx(formula(3.5, 0.25, 128, 2, 2), abs=0.01)
    for case, hidden in (("fp8-lm+remade@bf16", E4M3), ("fp8-lm+saved=bf16+remade@bf16", 2)):
        assert cases[case]["total_u"] == pytest.approx(formula(3.5, 0.25, 128, 2, hidden, remade=True), abs=0.002)
    assert cases["fp8-lm@bf16"]["total_u"] < 0.5 * cases["bf16@bf16"]["total_u"]


def test_calls_of_the_host_per_layer() -> None:
    """A guard: what the host does for one layer and micro-batch does not creep up unseen."""
    pytest.importorskip("transformers")
    pytest.importorskip("triton")
    import torch
    from bench_host import Contender, fake_gpu

    contender = Contender("fp8-lm", torch.bfloat16, layers=1)
    with fake_gpu():
        found = contender.count()
        contender.clock(1)
    assert found["by_kernel"] == {
        "_scaled_mm": 21, "cast_transpose_launch": 10, "norm_forward": 2, "norm_backward": 2, "norm_sum": 2,
        "glu_forward": 1, "transpose_launch": 1, "glu_backward_backward": 1, "rotary_rotary": 2,
    }  # fmt: skip
    assert {name: found["by_node"][name] for name in ("_LinearBackward", "_GLUBackward", "_NormBackward")} == {
        "_LinearBackward": 7, "_GLUBackward": 1, "_NormBackward": 2
    }  # fmt: skip
    assert found["operators"] <= 165 and found["empties"] <= 74 and found["views"] <= 70, found["by_operator"]
    assert found["python"] <= 1480  # it was 1840 before anybody counted, with rotary embeddings left to torch
