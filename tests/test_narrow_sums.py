# SPDX-License-Identifier: Apache-2.0
"""Sums narrower than float32 inside converted layers: recomputation, compilation, resuming, seeds, scales."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from core import assert_same_state, batch, bits_of, llama, same_bits, token_ids
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hf_lowprec
from hf_lowprec import numerics, ops
from hf_lowprec.conversion import session_of
from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import NONE, Accumulation, Gemm, Quant, Recipe, Rounding, Scaling
from hf_lowprec.stepping import attach_optimizer

NARROW = ["hfp8", "fp8-chunked", "sr-mac"]
SR = PRESETS["sr-mac"].fprop.accumulation


def two_layers(recipe: str | Recipe) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))
    hf_lowprec.convert(model, recipe)
    return model


def step(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = model(x).float().square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("name", NARROW)
def test_gemms_add_in_the_format_of_the_recipe(name: str) -> None:
    before = ops.kernel_counts()
    model, how = two_layers(name), PRESETS[name].fprop.accumulation
    out = model[0](batch(5, 32))
    layer, quant = model[0], PRESETS[name].fprop.input
    q = [numerics.quantize_dequantize(t.detach(), quant) for t in (batch(5, 32), layer.weight)]
    seed = layer._lowprec.sum_seeds[0]
    assert (seed is None) == (name != "sr-mac")
    assert same_bits(out.detach(), numerics.accumulate(*q, how, seed=seed) + layer.bias.detach())
    assert not torch.equal(out, q[0] @ q[1].t() + layer.bias)
    counted = ops.kernel_counts() - before
    assert counted[f"emulated {quant.format} x {quant.format} in {how.format}"] == 1


def test_the_three_gemms_of_every_layer_have_words_of_their_own() -> None:
    model = two_layers("sr-mac")
    seeds = [int(seed) for layer in (model[0], model[2]) for seed in layer._lowprec.sum_seeds]
    assert len(set(seeds)) == 6 and all(seed >> 62 == 1 for seed in seeds)
    a, b = batch(2, 40), batch(2, 40, seed=1)
    sums = {float(numerics.accumulate(a, b, SR, seed=seed)[0, 0]) for seed in seeds}
    assert len(sums) > 2


@pytest.mark.parametrize("name", NARROW)
def test_a_recomputed_forward_pass_has_the_same_bits(name: str) -> None:
    results = []
    for recompute in (False, True):
        model = two_layers(name)
        x = batch(6, 32).requires_grad_()
        out = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in model.parameters())])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", NARROW)
def test_resumed_runs_have_the_same_bits(name: str) -> None:
    model = two_layers(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    attach_optimizer(model, optimizer)
    x = batch(8, 32)
    for _ in range(2):
        step(model, optimizer, x)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    step(model, optimizer, x)
    again = two_layers(name)
    other = torch.optim.AdamW(again.parameters(), lr=1e-2)
    attach_optimizer(again, other)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    step(again, other, x)
    assert_same_state(bits_of(model.state_dict()), again.state_dict())
    mine, theirs = (session_of(m).scaling.state_dict() for m in (model, again))
    assert_same_state(mine, theirs)
    if name == "sr-mac":
        assert int(mine["0"]["sums"]["seed_wgrad"]) & 0xFFFF == 3, "advanced once per step"
        del theirs["0"]["sums"]["seed_wgrad"]
        with pytest.raises(ValueError, match=r"0\.sums\.seed_wgrad is missing"):
            session_of(model).scaling.load_state_dict(theirs)


@pytest.mark.parametrize("name", ["fp8-chunked", "sr-mac"])
def test_compiles_without_a_break_and_gives_the_same_bits(name: str) -> None:
    model, x = two_layers(name), batch(6, 32)
    eager = model(x)
    eager.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    out.sum().backward()
    assert same_bits(out.detach(), eager.detach())
    assert all(same_bits(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


def test_float32_sums_cost_nothing() -> None:
    """Recipes whose sums are float32 carry no seed and an empty key."""
    for name in ("fp8-lm", "te-current"):
        model = two_layers(name)
        state = model[0]._lowprec
        assert state.spec.accumulation == ("", "", "") and state.sum_seeds == (None, None, None)
        assert "sums" not in session_of(model).scaling.state_dict()["0"]


def test_one_gemm_alone_may_add_narrowly() -> None:
    """wgrad in e6m9, the others in float32: each its own accumulation."""
    e5m2 = Quant(format="e5m2", scaling=NONE)
    narrow = Accumulation(format="e6m9")
    recipe = Recipe(
        name="mine",
        fprop=Gemm(input=e5m2, weight=e5m2),
        dgrad=Gemm(grad_output=e5m2, weight=e5m2),
        wgrad=Gemm(input=e5m2, grad_output=e5m2, accumulation=narrow),
    )
    wide = replace(recipe, wgrad=replace(recipe.wgrad, accumulation=Accumulation()))
    results = []
    for r in (recipe, wide):
        model, x = two_layers(r), batch(40, 32).requires_grad_()
        model(x).square().sum().backward()
        results.append((x.grad, model[0].weight.grad, model[0]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(results[0][1], results[1][1], rtol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0.05, atol=0.2)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_scales_multiply_whole_sums(granularity: str) -> None:
    quant = Quant(format="e4m3fn", scaling=Scaling(granularity=granularity, snap="exact"))
    key, how = ops.quant_key(quant), Accumulation(format="e6m9", chunk=8, outer="e6m9")
    a, b = batch(5, 40), batch(7, 40, seed=1)
    (qa, sa), (qb, sb) = (ops.quantize(x, key) for x in (a, b))
    out = ops.scaled_mm(qa, sa, key, qb, sb, key, dtype=torch.float32, accumulation=ops.accumulation_key(how))
    sums = numerics.accumulate(qa.float(), qb.float(), how)
    expected = sums * (sa.reshape(-1, 1) * sb.reshape(1, -1))
    assert same_bits(out, expected)
    torch.testing.assert_close(out, a @ b.t(), rtol=0.2, atol=0.8)


def test_operator_errors() -> None:
    quant = Quant(format="e4m3fn", scaling=Scaling(granularity="block", block=(8,)))
    key = ops.quant_key(quant)
    q, s = ops.quantize(batch(5, 40), key)
    with pytest.raises(ValueError, match="one scale, or one per row"):
        ops.scaled_mm(q, s, key, q, s, key, dtype=torch.float32, accumulation='{"format": "e6m9"}')
    e5m2 = ops.quant_key(Quant(format="e5m2", scaling=NONE))
    q, s = ops.quantize(batch(5, 40), e5m2)
    with pytest.raises(ValueError, match="needs a seed"):
        ops.scaled_mm(q, s, e5m2, q, s, e5m2, dtype=torch.float32, accumulation=ops.accumulation_key(SR))


def test_a_value_that_is_not_finite_spoils_its_row_alone() -> None:
    """e4m3b11fnuz has a NaN, which hfp8 needs: without scales nothing else could say it."""
    model, x = two_layers("hfp8"), batch(6, 32)
    clean = model[0](x)
    x[2, 5] = float("inf")
    out = model[0](x)
    assert out[2].isnan().all()
    rest = [0, 1, 3, 4, 5]
    assert same_bits(out[rest].detach(), clean[rest].detach())


def test_hfp8_formats() -> None:
    """Bias 11: 30 is the largest, and `normal0` is the option without subnormals."""
    from hf_lowprec.formats import get_format

    fmt = get_format(PRESETS["hfp8"].fprop.input.format)
    assert (fmt.max, fmt.min_normal, fmt.tiny) == (30.0, 2.0**-10, 2.0**-13)
    assert get_format("e4m3b11").max == 30 and get_format("float8_e4m3b11fnuz") == fmt
    assert get_format("e4m3b11fnuznormal0").tiny == 1.125 * 2.0**-11
    hfp8 = PRESETS["hfp8"].to_dict()
    text = str(hfp8).replace("e4m3b11fnuz", "e4m3b11fnuznormal0")
    import ast

    model = two_layers(Recipe.from_dict({**ast.literal_eval(text), "name": "mine"}))
    assert bool(model(batch(4, 32)).isfinite().all())


def test_base_precision_operands_are_said_by_name() -> None:
    """Products of float16 operands in narrow sums: their format in the slots."""
    half = Quant(format="e5m10", scaling=NONE)
    how = Accumulation(format="e6m5", rounding=Rounding(mode="stochastic"))
    model = two_layers(Recipe(name="mine", fprop=Gemm(input=half, weight=half, accumulation=how)))
    x = batch(5, 32)
    seed = model[0]._lowprec.sum_seeds[0]
    sums = numerics.accumulate(x.half().float(), model[0].weight.detach().half().float(), how, seed=seed)
    assert same_bits(model[0](x).detach(), sums + model[0].bias.detach())


@pytest.mark.parametrize("name", NARROW)
def test_a_small_llama_learns(name: str) -> None:
    model, ids = llama(), token_ids(2, 12)
    hf_lowprec.convert(model, name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    attach_optimizer(model, optimizer)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.3
