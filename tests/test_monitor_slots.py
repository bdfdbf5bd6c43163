# SPDX-License-Identifier: Apache-2.0
"""`monitor.slots`: what each slot does to the tensors of one batch, against the same numbers made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from core import QUANTISING, llama, mlp, token_ids
from torch import nn

import hf_lowprec
from hf_lowprec import numerics
from hf_lowprec.monitor import over_layers, slot_error, slots
from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import NONE, Gemm, Quant, Recipe, Rounding, Scaling

E5M2 = Quant(format="e5m2", scaling=NONE)
UNSCALED = Recipe(
    name="unscaled",
    fprop=Gemm(input=E5M2, weight=E5M2),
    dgrad=Gemm(grad_output=E5M2, weight=E5M2),
    wgrad=Gemm(input=E5M2, grad_output=E5M2),
)


def test_slot_error_by_hand() -> None:
    """E4M3 without a scale: 448 and 460 are kept or rounded, 480 and 1000 cut off; 2^-11 is lost, 0 is no loss."""
    quant = Quant(format="e4m3fn", scaling=NONE)
    x = torch.tensor([448.0, 460, 480, -1000, 1, 2.0**-11, -(2.0**-11), 0])
    error = slot_error(x, quant)
    assert error.overflow == 2 / 8 and error.underflow == pytest.approx(2 / 7)
    kept = torch.tensor([448.0, 448, 448, -448, 1, 0, 0, 0])
    assert error.sqnr == pytest.approx(float(numerics.sqnr(x, kept)))
    assert slot_error(torch.tensor([1.0, 2, 0.5]), quant) == (math.inf, 0.0, 0.0)
    assert math.isnan(slot_error(torch.zeros(3), quant).sqnr)


def test_each_slot_sees_its_tensor_along_its_sum() -> None:
    """Blocks lie along the GEMM's reduction axis: a layer whose four matrices are known."""
    mx = Quant(format="e2m1", scaling=Scaling(granularity="block", block=(4,), snap="ocp", store="e8m0"))
    recipe = Recipe(
        name="mx", fprop=Gemm(input=mx, weight=mx), dgrad=Gemm(grad_output=mx, weight=mx),
        wgrad=Gemm(input=mx, grad_output=mx),
    )  # fmt: skip
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12, bias=False))
    x, g = torch.randn(16, 8), torch.randn(16, 12)
    found = slots(model, lambda: (model(x) * g).sum(), recipe)["0"]
    w = model[0].weight.detach()
    matrices = {
        "fprop input": x, "fprop weight": w, "dgrad grad_output": g, "dgrad weight": w.t(), "wgrad input": x.t(),
        "wgrad grad_output": g.t(),
    }  # fmt: skip
    assert found.keys() == matrices.keys()
    for slot, matrix in matrices.items():
        expected = numerics.sqnr(matrix, numerics.quantize_dequantize(matrix.contiguous(), mx))
        assert found[slot].sqnr == pytest.approx(float(expected)), slot
    assert len({round(error.sqnr, 6) for error in found.values()}) == 6, "no two slots are the same matrix here"


@pytest.mark.parametrize("name", QUANTISING)
def test_every_preset_on_a_converted_model(name: str) -> None:
    """All slots of all converted layers; gradients that were there stay, none are left behind."""
    model = llama()
    hf_lowprec.convert(model, name)
    first = next(model.parameters())
    first.grad = torch.full_like(first, 3.0)
    ids = token_ids(2, 16)
    found = slots(model, lambda: model(input_ids=ids, labels=ids).loss)
    report = hf_lowprec.conversion.report_of(model)
    recipe = PRESETS[name]
    wanted = {
        f"{gemm} {slot}"
        for gemm in ("fprop", "dgrad", "wgrad")
        for slot in ("input", "weight", "grad_output")
        if getattr(getattr(recipe, gemm), slot) is not None
    }
    assert sorted(found) == sorted(report.converted) and all(set(errors) == wanted for errors in found.values())
    assert all(error.sqnr > 0 for errors in found.values() for error in errors.values())
    assert torch.equal(first.grad, torch.full_like(first, 3.0))
    assert all(p.grad is None for p in model.parameters() if p is not first)
    table = over_layers(found)
    assert set(table) == wanted and all(row["sqnr_least"] <= row["sqnr"] for row in table.values())


def test_unscaled_gradients_underflow_and_scaled_ones_do_not() -> None:
    """The mechanism behind the negative control of benchmarks/recipe_study.py."""
    model = mlp(width=64, hidden=96)
    x = torch.randn(128, 64)

    def loss() -> torch.Tensor:
        return model(x).square().mean() * 1e-3

    low = over_layers(slots(model, loss, UNSCALED))
    high = over_layers(slots(model, loss, "te-current"))
    assert low["dgrad grad_output"]["underflow"] > 0.5 > 0.01 > high["dgrad grad_output"]["underflow"]
    assert high["dgrad grad_output"]["sqnr"] > low["dgrad grad_output"]["sqnr"] + 10


def test_stochastic_rounding_and_a_model_that_was_never_converted() -> None:
    model, x = mlp(), torch.randn(8, 32)
    with pytest.raises(ValueError, match="not converted"):
        slots(model, lambda: model(x).sum())
    quant = Quant(format="e5m2", rounding=Rounding(mode="stochastic"))
    recipe = replace(UNSCALED, dgrad=Gemm(grad_output=quant, weight=quant))
    found = slots(model, lambda: model(x).square().sum(), recipe)
    assert set(found) == {"up", "down"}
    nearest = slots(model, lambda: model(x).square().sum(), replace(recipe, dgrad=UNSCALED.dgrad))
    assert found["up"]["dgrad weight"].sqnr < nearest["up"]["dgrad weight"].sqnr


def test_flexible_operands_are_searched_once_for_both_gemms() -> None:
    """A weight by its output channels, also where dgrad reads it transposed; nothing but rounding errors is left."""
    model, x = mlp(), torch.randn(64, 32)
    found = slots(model, lambda: model(x).square().sum(), "fp8-flex")["up"]
    assert set(found) == {"fprop input", "fprop weight", "dgrad weight", "wgrad input"}
    assert found["fprop weight"] == found["dgrad weight"] and found["fprop input"] == found["wgrad input"]
    assert 40 < found["fprop weight"].sqnr < 55 and found["fprop input"].overflow < 0.01
    fixed = slots(model, lambda: model(x).square().sum(), {
        "name": "e4m3", **{gemm: {slot: {"format": "e4m3none", "scaling": {"method": "search"}} for slot in used}
                           for gemm, used in (("fprop", ("input", "weight")), ("dgrad", ("weight",)),
                                              ("wgrad", ("input",)))}})["up"]  # fmt: skip
    assert 28 < fixed["fprop weight"].sqnr < found["fprop weight"].sqnr - 8


def test_ranges_that_are_searched() -> None:
    """8 free bits of a normal tensor: near the optimum of arXiv 2208.09225's analysis, 42.67 dB by E2M5."""
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    free = Quant(format="e4m3none", scaling=Scaling(method="search"), split="free")
    fixed = Quant(format="e4m3none", scaling=Scaling(granularity="row", method="learned"))
    assert slot_error(x, free).sqnr == pytest.approx(42.67, abs=0.3)
    assert slot_error(x, fixed).sqnr == pytest.approx(31.56, abs=0.3)
    assert slot_error(x, free).overflow < 0.001
