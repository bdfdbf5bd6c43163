# SPDX-License-Identifier: Apache-2.0
"""Layers whose scales lie along the axis of the sum (MX blocks, eXmY rows), and eXmY layers: against the reference for
every shape, in both weight layouts, with each scale rule and rounding, compiled, checkpointed, resumed."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from core import ReferenceLinear, assert_same_state, batch, bits_of, close_in, llama, mlp, same_bits, token_ids
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hf_lowprec
from hf_lowprec.conversion import session_of
from hf_lowprec.numerics import quantize_dequantize
from hf_lowprec.presets import PRESETS, get_recipe
from hf_lowprec.recipe import Gemm, Quant, Recipe, Rounding, Scaling
from hf_lowprec.stepping import attach_optimizer

NAMES = ["mxfp8", "mxfp6", "mxfp6-e2m3", "mxfp4", "mxint8", "exmy:e3m1", "exmy:e4m3/row", "exmy:e0m2/row", "exmy:e5m3"]


def changed(name: str, **scaling: Any) -> Recipe:
    """A preset with another scale rule or rounding in all its slots, as a recipe file would have it."""
    data = get_recipe(name).to_dict()
    rounding = scaling.pop("rounding", None)
    for gemm in ("fprop", "dgrad", "wgrad"):
        for slot in data[gemm].values():
            slot["scaling"].update(scaling)
            if rounding is not None:
                slot["rounding"] = rounding
    return Recipe.from_dict({**data, "name": "mine"})


def name_of(recipe: str | Recipe) -> str:
    return recipe if isinstance(recipe, str) else recipe.name


def layer(recipe: str | Recipe, k: int, n: int, bias: bool = True) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, n, bias=bias))
    hf_lowprec.convert(model, recipe)
    return model[0]


def run(module: Any, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    x = x.detach().requires_grad_()
    out = module(x)
    out.backward(grad)
    grads = {name: p.grad for name, p in module.named_parameters()}
    return {"out": out.detach(), "input": x.grad, **grads}  # type: ignore[dict-item]


def check(recipe: str | Recipe, shape: tuple[int, ...], n: int, bias: bool = True) -> None:
    module = layer(recipe, shape[-1], n, bias)
    x, grad = 3 * batch(*shape), 1e-3 * batch(*shape[:-1], n, seed=1)
    result = run(module, x, grad)
    expected = ReferenceLinear(get_recipe(recipe)).run(x, module.weight.detach(), module.bias, grad, torch.float32)
    for key, wanted in zip(("out", "input", "weight"), expected, strict=False):
        close_in(result[key], wanted)
    if bias:
        close_in(result["bias"], expected[3])


SHAPES = [(32,), (1, 33), (7, 64), (33, 31), (2, 5, 48), (2, 3, 2, 40), (0, 32), (3, 0, 32)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_any_shape_and_number_of_tokens(name: str, shape: tuple[int, ...]) -> None:
    """wgrad's blocks lie along the tokens, of which there are 0 to 33; the last block is short."""
    check(name, shape, n=17, bias=len(shape) != 3)


@pytest.mark.parametrize("snap", ["ocp", "rceil"])
@pytest.mark.parametrize("mode", ["nearest", "away"])
@pytest.mark.parametrize("name", ["mxfp4", "mxint8", "exmy:e2m2/row"])
def test_scale_rules_and_roundings(name: str, mode: str, snap: str) -> None:
    check(changed(name, snap=snap, rounding={"mode": mode}), (9, 40), 24)


@pytest.mark.parametrize("snap", ["ceil", "even"])
def test_other_scale_rules_run_too(snap: str) -> None:
    recipe = changed("mxfp4", snap=snap)
    module, x = layer(recipe, 64, 8, bias=False), batch(5, 64)
    a, b = recipe.fprop.input, recipe.fprop.weight
    wanted = quantize_dequantize(x, a) @ quantize_dequantize(module.weight.detach(), b).t()
    close_in(module(x).detach(), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_conv1d_weights(name: str) -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    linear = layer(name, 40, 24)
    model = nn.Sequential(pytorch_utils.Conv1D(24, 40))
    model[0].weight.data, model[0].bias.data = linear.weight.data.t().contiguous(), linear.bias.data.clone()
    hf_lowprec.convert(model, name)
    x, grad = batch(3, 11, 40), batch(3, 11, 24, seed=1)
    a, b = run(linear, x, grad), run(model[0], x, grad)
    assert same_bits(a.pop("weight").t(), b.pop("weight"))
    assert_same_state(a, b)


def test_each_gemm_has_its_own_copy_of_an_operand() -> None:
    """Quantising and transposing do not commute: dgrad reads Q of the weight along its own axis, from the weight."""
    name, x, grad = "mxfp4", batch(64, 64), batch(64, 32, seed=1)
    module, q = layer(name, 64, 32), PRESETS[name]
    module.weight.data *= torch.exp2(2 * batch(32, 64, seed=2))
    result = run(module, x, grad)
    w = module.weight.detach()
    own = quantize_dequantize(w.t().contiguous(), q.dgrad.weight)
    fprops = quantize_dequantize(w, q.fprop.weight).t()
    twice = quantize_dequantize(fprops.contiguous(), q.dgrad.weight)
    g = quantize_dequantize(grad, q.dgrad.grad_output)
    assert not torch.equal(own, fprops) and not torch.equal(own, twice)
    close_in(result["input"], g @ own.t())
    for other in (fprops, twice):
        with pytest.raises(AssertionError):
            close_in(result["input"], g @ other.t())
    wgrad = (
        quantize_dequantize(grad.t().contiguous(), q.wgrad.grad_output)
        @ quantize_dequantize(x.t().contiguous(), q.wgrad.input).t()
    )
    close_in(result["weight"], wgrad)


STOCHASTIC = changed("mxfp4", snap="rceil", rounding={"mode": "stochastic", "bits": 8})


def test_stochastic_rounding_in_blocks() -> None:
    """The same in a step, other words in the next, and no bias."""
    x, steps = batch(8, 64), 60
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    hf_lowprec.convert(model, STOCHASTIC)
    exact, outs = x @ model[0].weight.detach().t(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(steps):
        out = model(x)
        assert same_bits(out.detach(), model(x).detach()), "a seed per step: recomputation sees the same words"
        outs.append(out.detach())
        out.sum().backward()
        optimizer.step()
    draws = torch.stack(outs)
    spread = draws.std(0) / steps**0.5
    assert not torch.equal(draws[0], draws[1]) and float(((draws.mean(0) - exact).abs() / spread).max()) < 5


@pytest.mark.parametrize("recipe", ["exmy:e3m1", "exmy:e3m1/row", STOCHASTIC], ids=name_of)
@pytest.mark.filterwarnings("ignore")
def test_compiled_without_a_break(recipe: Any) -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    eager, model = mlp(), mlp()
    hf_lowprec.convert(eager, recipe)
    hf_lowprec.convert(model, recipe)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (eager, model)]
    for step in range(3):
        for call, optimizer in zip((eager, compiled), optimizers, strict=True):
            optimizer.zero_grad()
            call(batch(7, 32, seed=step)).square().mean().backward()
            optimizer.step()
    assert not counters["graph_break"]
    assert_same_state(model.state_dict(), eager.state_dict())
    assert_same_state(session_of(model).state_dict(), session_of(eager).state_dict())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recipe", ["mxfp6", "exmy:e3m1", STOCHASTIC], ids=name_of)
def test_gradient_checkpointing_changes_nothing(recipe: Any, reentrant: bool) -> None:
    plain, other = mlp(), mlp()
    for model in (plain, other):
        hf_lowprec.convert(model, recipe)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, other)]
    for step in range(2):
        x = batch(4, 32, seed=step).requires_grad_()
        plain(x).square().mean().backward()
        checkpoint(other, x, use_reentrant=reentrant).square().mean().backward()
        for (key, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
            assert same_bits(a.grad, b.grad), key
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("recipe", ["mxfp8", "mxfp4", "exmy:e3m1", "exmy:e4m3/row", STOCHASTIC], ids=name_of)
def test_a_resumed_run_is_bit_identical(recipe: Any) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = mlp()
        hf_lowprec.convert(model, recipe)
        return model, attach_optimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-2))

    def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(batch(5, 32, seed=step)).square().mean().backward()
            optimizer.step()

    model, optimizer = start()
    go_on(model, optimizer, range(2))
    weights, saved = bits_of(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    go_on(model, optimizer, range(2, 4))
    resumed, new = start()
    resumed.load_state_dict(weights)
    new.load_state_dict(saved)
    go_on(resumed, new, range(2, 4))
    assert_same_state(model.state_dict(), resumed.state_dict())
    assert_same_state(session_of(model).state_dict(), session_of(resumed).state_dict())


@pytest.mark.parametrize("name", ["mxfp4", "exmy:e3m2"])
def test_a_small_llama_learns(name: str) -> None:
    """One batch by heart: the loss falls by the same order as in float32."""
    losses = {}
    for recipe in (name, None):
        model = llama()
        if recipe is not None:
            assert len(hf_lowprec.convert(model, recipe).converted) == 14
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ids = token_ids(2, 16)
        for _ in range(12):
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
        losses[recipe] = float(loss.detach())
    assert losses[name] < 1.35 * losses[None] < 2.0


@pytest.mark.parametrize("name", ["exmy:e3m1", "mxfp4"])
def test_fused_and_unfused_give_the_same_bits(name: str) -> None:
    """One exponent per tensor is quantised once for q, k, v and by the norm before them; blocks are not."""
    ids, results = token_ids(2, 9), []
    for fuse in (True, False):
        model = llama()
        report = hf_lowprec.convert(model, name, fuse=fuse)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters()} | {"loss": loss.detach()})
        assert bool(report.shared) == (fuse and name == "exmy:e3m1")
    assert_same_state(*results)


def test_operands_scaled_in_different_ways() -> None:
    """A recipe file may give each operand a format and a grouping of its own."""
    block = Scaling(granularity="block", block=(16,), snap="ocp", store="e8m0")
    x = Quant(format="e4m3fn", scaling=replace(block, block=(32,)))
    w = Quant(format="e2m1", scaling=block, rounding=Rounding(mode="away"))
    g = Quant(format="e5m2none", scaling=Scaling(granularity="row", snap="rceil"))
    recipe = Recipe(
        name="mine",
        fprop=Gemm(input=x, weight=w),
        dgrad=Gemm(grad_output=g, weight=w),
        wgrad=Gemm(input=x, grad_output=g),
    )
    check(recipe, (11, 72), 40)
