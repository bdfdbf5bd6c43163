# SPDX-License-Identifier: Apache-2.0
"""benchmarks/constant_window.py: the recipes it sweeps, and what it calls the window."""

from __future__ import annotations

import pytest
import torch
from core import llama, token_ids

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


def test_window_is_the_longest_run_inside() -> None:
    from constant_window import window

    found = [10.0, 30.0, 10.05, 10.29, 10.4, None, 10.0]
    cases = [{"exponent": k, "perplexity": value} for k, value in enumerate(found, start=-3)]
    assert window(cases[::-1], 10.0) == [-1, 0]


def test_the_sweep_measures_and_leaves_the_model_alone() -> None:
    from constant_window import constant, fprop_errors, quantised

    assert constant(-3).fprop.weight.scaling.exponent == -3 == constant(-3).wgrad.grad_output.scaling.exponent
    model, ids = llama().eval(), token_ids(1, 32)
    before = [p.clone() for p in model.parameters()]
    errors = fprop_errors(model, ids, {k: constant(k) for k in (-6, 12)})
    assert errors[-6]["input_sqnr"] > 28 > errors[12]["input_sqnr"] and errors[12]["weight_underflow"] == 1.0
    assert quantised(model, "fp8-amax", ids) == pytest.approx(quantised(model, constant(-6), ids), rel=0.01)
    assert not hasattr(model, "_lowprec") and all(map(torch.equal, before, model.parameters()))
