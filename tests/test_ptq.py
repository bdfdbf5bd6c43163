# SPDX-License-Identifier: Apache-2.0
"""GPFQ: the same numbers as its definition, less error than rounding to nearest, a whole model in order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core import batch, llama, mlp, token_ids
from torch import Tensor, nn

import hf_lowprec
from hf_lowprec import numerics, ptq
from hf_lowprec.conversion import ConversionError
from hf_lowprec.recipe import Quant, Rounding, Scaling

MXFP4 = Quant(format="e2m1", scaling=Scaling(granularity="block", block=(32,), snap="ocp", store="e8m0"))
E4M3 = Quant(format="e4m3fn")
ROWS = Quant(format="e0m7", scaling=Scaling(granularity="row"), rounding=Rounding(mode="away"))
FREE = Quant(format="e4m3none", scaling=Scaling(granularity="row", method="search"), split="free")
QUANTS = {"mxfp4": MXFP4, "e4m3": E4M3, "int8 rows": ROWS, "8 free bits": FREE}


def correlated(rows: int = 256, width: int = 64, seed: int = 0) -> Tensor:
    """Inputs of 12 directions and a little noise."""
    return batch(rows, 12, seed=seed) @ batch(12, width, seed=7) + 0.1 * batch(rows, width, seed=seed + 1)


def by_definition(weight: Tensor, quant: Quant, x: Tensor, y: Tensor) -> Tensor:
    """Column by column with u itself, in float64."""
    scaled = numerics.quantize(weight, quant)
    scale = numerics.expand_scale(scaled.scale.float(), tuple(weight.shape), quant.scaling).expand(weight.shape)
    x, y, w = x.double(), y.double(), weight.double()
    u = torch.zeros(len(weight), len(x), dtype=torch.float64)
    q = torch.zeros_like(w)
    for t in range(weight.shape[1]):
        u += w[:, t, None] * x[:, t]
        wanted = (u @ y[:, t]) / (y[:, t] @ y[:, t])
        code = numerics.round_to_format((wanted / scale[:, t]).float(), quant.format, quant.rounding)
        q[:, t] = code.double() * scale[:, t]
        u -= q[:, t, None] * y[:, t]
    return q.float()


@pytest.mark.parametrize("name", ["mxfp4", "e4m3", "int8 rows"])
def test_moments_give_what_the_definition_gives(name: str) -> None:
    weight, x = batch(24, 96, seed=3), correlated(width=96)
    y = x + 0.02 * batch(256, 96, seed=5)
    found = ptq.gpfq(weight, QUANTS[name], x, y)
    expected = by_definition(weight, QUANTS[name], x, y)
    assert float((found != expected).double().mean()) < 2e-3, "but for ties"
    moments = ptq.Moments(96)
    for some, other in zip(x.split(50), y.split(50), strict=True):
        moments.add(some, other)
    again = ptq.gpfq(weight, QUANTS[name], moments)
    assert float((again != found).double().mean()) < 2e-3
    error = (x @ weight.t() - y @ found.t()).norm() / (x @ weight.t()).norm()
    assert moments.error(weight, found) == pytest.approx(float(error), rel=1e-4)


@pytest.mark.parametrize("name", QUANTS)
def test_less_error_than_nearest_on_correlated_inputs(name: str) -> None:
    weight, x, unseen = batch(32, 64, seed=3), correlated(), correlated(seed=50)
    diffused, nearest = ptq.gpfq(weight, QUANTS[name], x), ptq.nearest(weight, QUANTS[name])

    def error(q: Tensor) -> float:
        return float((unseen @ (weight - q).t()).norm() / (unseen @ weight.t()).norm())

    assert error(diffused) < 0.5 * error(nearest)
    assert float((weight - diffused).norm()) > float((weight - nearest).norm()), "the weight itself is further off"


@pytest.mark.parametrize("name", ["mxfp4", "e4m3", "int8 rows"])
def test_results_are_values_of_the_format(name: str) -> None:
    weight, quant = batch(16, 64, seed=3), QUANTS[name]
    nearest = ptq.nearest(weight, quant)
    assert torch.allclose(nearest, numerics.quantize_dequantize(weight, quant), rtol=1e-6)
    scale = numerics.expand_scale(numerics.quantize(weight, quant).scale.float(), (16, 64), quant.scaling)
    codes = (ptq.gpfq(weight, quant, correlated()) / scale).float()
    assert torch.allclose(codes, numerics.round_to_format(codes, quant.format), rtol=1e-6, atol=1e-6)
    if name == "mxfp4":  # powers of two: the blocks are found again
        again = ptq.gpfq(weight, quant, correlated())
        assert torch.equal(numerics.quantize_dequantize(again, quant), again)


def test_features_that_never_occur_are_rounded_to_nearest() -> None:
    weight, x = batch(8, 64), correlated()
    x[:, 10:20] = 0.0
    assert torch.equal(ptq.gpfq(weight, E4M3, x)[:, 10:20], ptq.nearest(weight, E4M3)[:, 10:20])


@pytest.mark.parametrize(
    ("quant", "inputs", "message"),
    [
        (Quant(format="e4m3fn", rounding=Rounding(mode="stochastic")), correlated(), "stochastic rounding would undo"),
        (Quant(format="e4m3fn", scaling=Scaling(method="delayed")), correlated(), "method 'delayed'"),
        (Quant(format="e5m2", overflow="inf"), correlated(), "error diffusion saturates"),
        (E4M3, correlated(width=32), "the inputs have 32 features, the weight takes 64"),
        (E4M3, correlated() * torch.nan, "hold Inf or NaN"),
    ],
)  # fmt: skip
def test_what_is_refused(quant: Quant, inputs: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ptq.gpfq(batch(8, 64), quant, inputs)


# --- a model --------------------------------------------------------------------------------------------------------


def batches(n: int = 6) -> list[dict[str, Tensor]]:
    return [{"input_ids": token_ids(4, 24, seed=seed)} for seed in range(n)]


def logits(model: nn.Module, seed: int = 77) -> Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids(8, 24, seed=seed)).logits.double()


def test_a_llama_layer_after_layer() -> None:
    model, rounded, exact = llama(), llama(), logits(llama())
    names = list(model.state_dict())
    errors = ptq.gpfq_model(model, batches(), MXFP4)
    assert (len(errors) == 14 and not model.training == llama().training) or list(model.state_dict()) == names
    assert all(e.diffused < e.nearest for e in errors.values())
    for name in errors:
        weight = rounded.get_submodule(name).weight
        weight.data.copy_(ptq.nearest(weight, MXFP4))
        assert torch.equal(numerics.quantize_dequantize(model.get_submodule(name).weight.data, MXFP4),
                           model.get_submodule(name).weight.data)  # fmt: skip
    assert torch.equal(model.lm_head.weight, llama().lm_head.weight)
    assert (logits(model) - exact).norm() < 0.85 * (logits(rounded) - exact).norm()


def test_later_layers_make_up_for_earlier_ones() -> None:
    """Inputs of a layer are those of the quantised part before it: by hand for the second of two layers."""
    model, original = mlp(), mlp()
    x = batch(128, 32)
    ptq.gpfq_model(model, [x[:64], x[64:]], MXFP4)
    seen: dict[str, Tensor] = {}
    for name, some in (("exact", original), ("quantised", model)):
        with torch.no_grad():
            seen[name] = torch.nn.functional.gelu(some.up(some.norm(x)))
    expected = ptq.gpfq(original.down.weight, MXFP4, seen["exact"], seen["quantised"])
    assert float((expected != model.down.weight).double().mean()) < 5e-3


@pytest.mark.parametrize("kind", ["gpt2", "bfloat16", "use_cache"])
def test_models_of_other_kinds(kind: str) -> None:
    if kind == "gpt2":
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=2, n_positions=64)
        model: Any = transformers.GPT2LMHeadModel(config).eval()
    else:
        model = llama()
    if kind == "bfloat16":
        model = model.bfloat16()
    model.config.use_cache = kind == "use_cache"
    before = logits(model)
    errors = ptq.gpfq_model(model, batches(2), E4M3, modules_to_not_convert="k_proj")
    assert len(errors) == (8 if kind == "gpt2" else 12) and model.config.use_cache is (kind == "use_cache")
    assert 0 < float((logits(model) - before).norm() / before.norm()) < 0.1
    assert all(p.dtype == before.dtype or kind == "bfloat16" or p.dtype == torch.float32 for p in model.parameters())


def test_models_that_are_refused() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="no data"):
        ptq.gpfq_model(model, [], MXFP4)
    with pytest.raises(ConversionError, match="nothing to quantise"):
        ptq.gpfq_model(nn.Sequential(nn.LayerNorm(4)), [torch.ones(2, 4)], MXFP4)
    with pytest.raises(ValueError, match="method 'delayed'"):
        ptq.gpfq_model(model, [batch(4, 32)], Quant(format="e4m3fn", scaling=Scaling(method="delayed")))
    with pytest.raises(TypeError, match=r"\[batch\] is a list of one"):
        ptq.gpfq_model(model, batch(4, 32), MXFP4)
    with torch.no_grad():
        model.down.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the weight of down holds Inf or NaN"):
        ptq.gpfq_model(model, [batch(4, 32)], MXFP4)
    assert torch.equal(model.up.weight, mlp().up.weight)
    hf_lowprec.convert(model, "fp8-flex")
    with pytest.raises(ConversionError, match=r"the model is converted: call hf_lowprec.revert"):
        ptq.gpfq_model(model, [batch(4, 32)], MXFP4)


def test_an_error_halfway_says_what_has_changed() -> None:
    """The second layer's input overflows: the first is quantised by then."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with torch.no_grad():
        model[0].weight.fill_(3e38)
    with pytest.raises(ValueError, match=r"Inf or NaN; 1 layers are quantised already: load the model again"):
        ptq.gpfq_model(model, [torch.full((4, 32), 10.0)], E4M3)
