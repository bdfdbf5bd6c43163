# SPDX-License-Identifier: Apache-2.0
"""Counters of saturation, underflow and non-finite values against counts made by hand."""

from __future__ import annotations

import pytest
import torch
from core import QUANTISING, batch, mlp, train_step
from torch import nn

import hf_lowprec
from hf_lowprec.conversion import session_of
from hf_lowprec.monitor import per_layer, statistics
from hf_lowprec.ops import quant_key, quantize
from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import Quant, Scaling

STATIC = quant_key(Quant(format="e4m3fn", scaling=Scaling(method="static")))


def test_counts_by_hand() -> None:
    """E4M3: largest 448, smallest 2^-9; a tie at 2^-10 rounds to zero."""
    counts = torch.zeros(4, dtype=torch.int64)
    x = torch.tensor([448.0, 449, -1e9, 0, 2.0**-9, 2.0**-10, -(2.0**-10) * 1.01, 1e-30, float("nan"), float("-inf")])
    qdata, _ = quantize(x, STATIC, counts=counts)
    assert counts.tolist() == [10, 2, 2, 2]
    zeros = (qdata.float() == 0) & (x != 0)
    assert int(zeros.sum()) == 2
    quantize(x, STATIC, counts=counts)
    assert counts.tolist() == [20, 4, 4, 4], "they add up"


@pytest.mark.parametrize("columns", [1024, 2048])
def test_large_tensors_are_sampled_across_all_columns(columns: int) -> None:
    """One column of many saturates; a stride that divides the width would see it always or never."""
    x = torch.ones(512, columns)
    x[:, 0] = 1e4
    counts = torch.zeros(4, dtype=torch.int64)
    quantize(x, STATIC, counts=counts)
    seen, saturated = counts[:2].tolist()
    assert 1 << 15 <= seen <= 1 << 17
    assert saturated / seen == pytest.approx(1 / columns, rel=0.2)


def test_statistics_of_a_model() -> None:
    model = nn.Sequential(nn.Linear(32, 16, bias=False))
    hf_lowprec.convert(model, "fp8-cscale")  # scale 1: whatever is small falls to zero
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    x = torch.ones(4, 32)
    x[0, :8], x[1, :4], x[2, 0] = 1e3, 1e-5, float("nan")
    grad = torch.full((4, 16), 1e6)
    grad[:2] = 1e-9
    model(x).backward(grad)
    found = statistics(model)
    assert found == {
        "lowprec/input_saturated": 8 / 128, "lowprec/input_underflow": 4 / 128, "lowprec/input_nonfinite": 1.0,
        "lowprec/weight_saturated": 0.0, "lowprec/weight_underflow": 0.0, "lowprec/weight_nonfinite": 0.0,
        "lowprec/grad_output_saturated": 0.5, "lowprec/grad_output_underflow": 0.5,
        "lowprec/grad_output_nonfinite": 0.0,
    }  # fmt: skip
    assert per_layer(model) == {
        "0": {"input": [128, 8, 4, 1], "weight": [512, 0, 0, 0], "grad_output": [64, 32, 32, 0]}
    }
    assert statistics(model, reset=True) == found
    assert set(statistics(model).values()) == {0.0}


def test_delayed_scales_saturate_when_a_tensor_grows_and_the_counters_say_so() -> None:
    model = nn.Sequential(nn.Linear(32, 16))
    hf_lowprec.convert(model, "fp8-lm")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train_step(model, optimizer, batch(8, 32))
    assert statistics(model, reset=True)["lowprec/input_saturated"] == 0.0
    train_step(model, optimizer, 16 * batch(8, 32))
    assert statistics(model, reset=True)["lowprec/input_saturated"] > 0.2
    train_step(model, optimizer, 16 * batch(8, 32))
    assert statistics(model)["lowprec/input_saturated"] == 0.0, "one step later the scale has followed"


def test_mu_is_reported() -> None:
    model = mlp()
    hf_lowprec.convert(model, "fp8-lm")
    assert statistics(model)["lowprec/mu_min"] == 1.0
    session_of(model).gradients.k[1] = -1000
    assert statistics(model)["lowprec/mu_min"] == 0.5


def test_models_without_low_precision() -> None:
    assert statistics(mlp()) == {} and per_layer(mlp()) == {}
    model = mlp()
    hf_lowprec.convert(model, "bf16")
    assert statistics(model) == {} and per_layer(model) == {}


@pytest.mark.parametrize("name", QUANTISING)
def test_every_preset_counts_every_role(name: str) -> None:
    model = mlp()
    hf_lowprec.convert(model, name)
    model(batch(4, 32)).square().mean().backward()
    casts_gradients = PRESETS[name].flexible or PRESETS[name].dgrad.grad_output is not None
    assert per_layer(model)["up"] == {
        role: [size, *per_layer(model)["up"][role][1:]]
        for role, size in (("input", 4 * 32), ("weight", 48 * 32), ("grad_output", 4 * 48 * casts_gradients))
    }
