# SPDX-License-Identifier: Apache-2.0
"""`functional.linear` through converted layers, against a second implementation (`core.ReferenceLinear`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from core import (
    FIXED,
    QUANTISING,
    ReferenceLinear,
    assert_same_state,
    batch,
    bits_of,
    close_in,
    llama,
    mlp,
    same_bits,
    token_ids,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hf_lowprec
from hf_lowprec.conversion import session_of
from hf_lowprec.ops.quantize import storage_dtype
from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import Gemm, Quant, Recipe, Rounding, Scaling

X, W = Quant(format="e4m3fn"), Quant(format="e4m3fn", scaling=Scaling(snap="rceil"))
G = Quant(format="e5m2")
# Recipes that no preset covers: GEMMs that stay in high precision, and slots of one operand that differ.
PARTIAL = {
    "fprop only": Recipe(name="fprop-only", fprop=Gemm(input=X, weight=W)),
    "dgrad only": Recipe(name="dgrad-only", dgrad=Gemm(grad_output=G, weight=W)),
    "wgrad only": Recipe(name="wgrad-only", wgrad=Gemm(grad_output=G, input=X)),
    "no wgrad": Recipe(name="no-wgrad", fprop=Gemm(input=X, weight=W), dgrad=Gemm(grad_output=G, weight=W)),
    "no dgrad": Recipe(name="no-dgrad", fprop=Gemm(input=X, weight=W), wgrad=Gemm(grad_output=G, input=X)),
    "weight read back": Recipe(name="weights", fprop=Gemm(weight=W), dgrad=Gemm(weight=W)),
    "input read back": Recipe(name="inputs", fprop=Gemm(input=X), wgrad=Gemm(input=X)),
    "gradient read back": Recipe(name="gradients", dgrad=Gemm(grad_output=G), wgrad=Gemm(grad_output=G)),
    "weight of dgrad read back": Recipe(name="dgrad-weight", dgrad=Gemm(weight=W), wgrad=Gemm(grad_output=G, input=X)),
    "input of wgrad read back": Recipe(name="wgrad-input", fprop=Gemm(input=X, weight=W), wgrad=Gemm(input=G)),
    "slots differ": Recipe(
        name="slots-differ",
        fprop=Gemm(input=X, weight=W),
        dgrad=Gemm(grad_output=G, weight=replace(W, format="e5m2")),
        wgrad=Gemm(grad_output=W, input=replace(X, format="e5m2")),
    ),
}


def layer(
    recipe: str | Recipe, k: int = 32, n: int = 48, bias: bool = True, dtype: torch.dtype = torch.float32
) -> Any:
    model = nn.Sequential(nn.Linear(k, n, bias=bias)).to(dtype)
    hf_lowprec.convert(model, recipe)
    return model[0]


def run(module: Any, x: Tensor, grad: Tensor, autocast: bool = False) -> tuple[Tensor, Tensor]:
    """(output, grad_input); the parameters' gradients are in the module."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = module(x)
    out.backward(grad.to(out.dtype))
    assert x.grad is not None
    return out.detach(), x.grad


def in_base_precision(gemm: Gemm) -> bool:
    return gemm.one_sided or not gemm.quantised


def check(module: Any, recipe: Recipe, x: Tensor, grad: Tensor, autocast: bool = False) -> None:
    base = torch.bfloat16 if autocast else x.dtype
    grad = grad.to(base)
    out, grad_input = run(module, x, grad, autocast)
    expected = ReferenceLinear(recipe).run(x, module.weight.detach(), module.bias, grad, base)
    assert (out.dtype, grad_input.dtype) == (base, x.dtype)
    assert module.weight.grad.dtype == module.weight.dtype
    close_in(out, expected[0])
    # A GEMM without slots rounds its result to the base precision.
    if recipe.input_norm is not None and base == torch.bfloat16:  # a sum of what was rounded to bfloat16 before
        assert float((grad_input - expected[1]).abs().max()) <= 2.0**-7 * float(expected[1].abs().max())
    else:
        close_in(grad_input, expected[1], ulps=2.0**16 if autocast and in_base_precision(recipe.dgrad) else 1)
    close_in(module.weight.grad, expected[2], ulps=2.0**16 if autocast and in_base_precision(recipe.wgrad) else 1)
    if module.bias is not None:
        close_in(module.bias.grad, expected[3])


@pytest.mark.parametrize("setting", ["float32", "bfloat16", "autocast", "autocast of bfloat16"])
@pytest.mark.parametrize("name", FIXED)
def test_equals_slot_by_slot_reference(name: str, setting: str) -> None:
    dtype = torch.bfloat16 if "bfloat16" in setting else torch.float32
    x, grad = 3 * batch(2, 9, 32, seed=1), 1e-3 * batch(2, 9, 48, seed=2)
    check(layer(name, dtype=dtype), PRESETS[name], x.to(dtype), grad, autocast="autocast" in setting)


@pytest.mark.parametrize("name", PARTIAL)
def test_gemms_without_slots_stay_in_high_precision(name: str) -> None:
    check(layer(PARTIAL[name]), PARTIAL[name], batch(5, 32), batch(5, 48, seed=1))


@pytest.mark.parametrize("name", ["fprop only", "no wgrad"])
def test_high_precision_wgrad_saves_its_input_in_the_base_precision(name: str) -> None:
    module = layer(PARTIAL[name])
    check(module, PARTIAL[name], batch(5, 32), batch(5, 48, seed=1), autocast=True)
    saved = [t.dtype for t in saved_by(module, batch(5, 32)) if t.numel() == 5 * 32]
    assert saved == [torch.bfloat16], "what F.linear keeps under autocast"


@pytest.mark.parametrize("shape", [(32,), (1, 32), (7, 32), (2, 3, 32), (2, 1, 3, 32), (0, 32), (2, 0, 32)])
@pytest.mark.parametrize("bias", [True, False])
def test_any_number_of_dimensions_and_tokens(shape: tuple[int, ...], bias: bool) -> None:
    module = layer("fp8-lm", bias=bias)
    x, grad = batch(*shape), batch(*shape[:-1], 48, seed=1)
    check(module, PRESETS["fp8-lm"], x, grad)
    assert module(x).shape == (*shape[:-1], 48)


@pytest.mark.parametrize("size", [1, 7, 20])
def test_sizes_need_no_alignment_when_emulated(size: int) -> None:
    check(layer("te-current", size, size + 3), PRESETS["te-current"], batch(5, size), batch(5, size + 3))


def test_non_contiguous_operands() -> None:
    """Same bits as from contiguous copies."""
    recipe = PRESETS["fp8-lm"]
    plain, strided = layer("fp8-lm"), layer("fp8-lm")
    strided.weight.data = plain.weight.data.t().contiguous().t()
    strided.bias.data = plain.bias.data
    x, grad = batch(32, 9, 2).permute(2, 1, 0), batch(9, 48)[None].expand(2, 9, 48)
    assert not x.is_contiguous() and not strided.weight.is_contiguous() and not grad.is_contiguous()
    check(strided, recipe, x, grad)
    a, b = run(plain, x.contiguous(), grad.contiguous()), run(strided, x, grad)
    assert same_bits(a[0], b[0]) and same_bits(a[1], b[1]) and same_bits(plain.weight.grad, strided.weight.grad)


def test_input_without_gradient_and_frozen_bias() -> None:
    module = layer("fp8-lm")
    module.bias.requires_grad_(False)
    x, grad = batch(5, 32), batch(5, 48, seed=1)
    module(x).backward(grad)
    expected = ReferenceLinear(PRESETS["fp8-lm"]).run(x, module.weight.detach(), module.bias, grad, torch.float32)
    close_in(module.weight.grad, expected[2])
    assert module.bias.grad is None
    assert float(module._lowprec.operands[2].amax) == float(grad.abs().max()), "wgrad alone must note the amax"


@pytest.mark.parametrize("name", QUANTISING)
def test_conv1d_is_linear_with_a_transposed_weight(name: str) -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    linear = layer(name)
    model = nn.Sequential(pytorch_utils.Conv1D(48, 32))
    model[0].weight.data, model[0].bias.data = linear.weight.data.t().contiguous(), linear.bias.data.clone()
    report = hf_lowprec.convert(model, name)
    assert report.converted == ["0"] and isinstance(model[0], pytorch_utils.Conv1D)
    x, grad = batch(2, 9, 32), batch(2, 9, 48, seed=1)
    a, b = run(linear, x, grad), run(model[0], x, grad)
    assert same_bits(a[0], b[0]) and same_bits(a[1], b[1])
    assert same_bits(linear.bias.grad, model[0].bias.grad)
    # The gradient comes in the weight's own layout, and random words go by the place in it.
    if PRESETS[name].wgrad.accumulation.rounding.mode != "stochastic":
        assert same_bits(linear.weight.grad.t(), model[0].weight.grad)


# --- what is kept for backward --------------------------------------------------------------------------------------


def saved_by(model: nn.Module, *args: Any, autocast: bool = True, **kwargs: Any) -> list[Tensor]:
    """Every tensor that the forward pass keeps for backward."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16, autocast):
        model(*args, **kwargs)
    return saved


@pytest.mark.parametrize("name", [n for n in FIXED if not in_base_precision(PRESETS[n].wgrad)])
@pytest.mark.parametrize("autocast", [True, False])
def test_saved_activations_are_quantised(name: str, autocast: bool) -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 16))
    hf_lowprec.convert(model, name)
    quant = PRESETS[name].wgrad.input
    weights = {p.data_ptr() for p in model.parameters()}
    for tokens, padded in ((16, 16), (18, 32)):  # wgrad sums over tokens: saved as its GEMM reads them
        saved = [t for t in saved_by(model, batch(2, tokens // 2, 32), autocast=autocast) if t.numel() > 1]
        assert len({storage_dtype(quant.format).itemsize, 1}) == 1, "a byte an element"
        one_scale = quant.scaling.granularity == "tensor"
        wanted = [(storage_dtype(quant.format), (width, padded if one_scale else tokens)) for width in (32, 48)]
        if not one_scale:
            wanted += [(torch.float8_e8m0fnu, (width, 1)) for width in (32, 48)]
        found = [(t.dtype, tuple(t.shape)) for t in saved if t.data_ptr() not in weights]
        assert sorted(found, key=str) == sorted(wanted, key=str)


def test_saved_tensors_of_a_whole_model() -> None:
    model = llama()
    report = hf_lowprec.convert(model, "fp8-lm", fuse=False)
    ids = token_ids(2, 8)
    fp8 = [t for t in saved_by(model, input_ids=ids, labels=ids) if t.dtype == torch.float8_e4m3fn]
    assert len(fp8) == len(report.converted) == 14
    assert {t.numel() for t in fp8} == {16 * 32, 16 * 48}


def test_frozen_float32_weight_is_cached_once_and_serves_dgrad() -> None:
    module = layer("fp8-lm")
    module.weight.requires_grad_(False)
    x = batch(5, 32).requires_grad_()
    assert not [t for t in saved_by(module, x) if t.numel() > 1], "no operands of wgrad, no weight"
    kept = module._lowprec.weight_cache.quantized
    assert kept.qdata.dtype == torch.float8_e4m3fn and kept.transposed is None, "one byte a parameter"
    module(x)
    assert module._lowprec.weight_cache.quantized.qdata is kept.qdata
    trained = layer("fp8-lm")
    trained.load_state_dict(module.state_dict())
    grad = batch(5, 48, seed=1)
    assert all(map(same_bits, run(module, x, grad), run(trained, x, grad)))
    assert module.weight.grad is None


def test_frozen_bfloat16_weight_costs_no_copy() -> None:
    """bf16 LoRA keeps a reference to the weight for backward; a kept FP8 copy would be on top of it."""
    module = layer("fp8-lm", dtype=torch.bfloat16)
    module.weight.requires_grad_(False)
    saved = [t for t in saved_by(module, batch(5, 32, dtype=torch.bfloat16).requires_grad_()) if t.numel() > 1]
    assert [t.data_ptr() for t in saved] == [module.weight.data_ptr()]
    assert module._lowprec.weight_cache.quantized is None


@pytest.mark.parametrize("event", ["step", "invalidate", "load_state_dict", "data_ptr", "in place", "device move"])
def test_frozen_cache_is_dropped(event: str) -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 16))
    hf_lowprec.convert(model, "te-current")
    model[0].weight.requires_grad_(False)
    x = batch(5, 32)
    stale = model[0](x).detach()
    assert model[0]._lowprec.weight_cache.quantized is not None
    new = 2 * model[0].weight.detach()
    if event == "step":
        model[0].weight.data.view(-1)[:] = new.view(-1)  # seen by no version counter
        assert same_bits(model[0](x), stale), "or else this case tests nothing"
        model(x).sum().backward()
        torch.optim.SGD([model[1].weight], lr=0.0).step()
    elif event == "invalidate":
        model[0].weight.data.view(-1)[:] = new.view(-1)
        hf_lowprec.invalidate(model)
    elif event == "load_state_dict":
        model.load_state_dict({**model.state_dict(), "0.weight": new})
    elif event == "data_ptr":
        model[0].weight.data = new
    elif event == "in place":
        with torch.no_grad():
            model[0].weight.copy_(new)
    else:
        model[0].weight.data.view(-1)[:] = new.view(-1)
        model.to("cpu", torch.float32)
    fresh = layer("te-current")
    fresh.load_state_dict(model[0].state_dict())
    assert same_bits(model[0](x), fresh(x)) and not same_bits(fresh(x), stale)


def test_frozen_weight_under_no_grad_is_read_afresh() -> None:
    """Merging an adapter or syncing a reference writes `.data`, mostly between evaluations."""
    module = layer("fp8-lm")
    module.weight.requires_grad_(False)
    module.bias.data.zero_()
    x = batch(5, 32)
    before = module(x)
    module.weight.data.view(-1)[:] = 2 * module.weight.detach().view(-1)
    with torch.no_grad():
        assert same_bits(module(x), 2 * before)


def test_weight_scale_of_forward_is_used_in_backward() -> None:
    """Delayed weight scales: a step between forward and backward must not change what dgrad reads."""
    module = layer("te-delayed")
    x, grad = batch(5, 32), batch(5, 48, seed=1)
    expected = run(module, x, grad)[1]
    x = x.requires_grad_()
    out = module(x)
    module._lowprec.operands[1].scale.fill_(4.0)
    out.backward(grad)
    assert same_bits(x.grad, expected)


# --- gradient mode, checkpointing, randomness -----------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["fp8-lm", "te-delayed", "te-current"])
def test_gradient_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    plain, other = mlp(), mlp()
    hf_lowprec.convert(plain, name)
    hf_lowprec.convert(other, name)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, other)]
    for step in range(3):
        x = batch(4, 32, seed=step).requires_grad_()
        plain(x).square().mean().backward()
        checkpoint(other, x, use_reentrant=reentrant).square().mean().backward()
        for (key, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
            assert same_bits(a.grad, b.grad), key
        states = [bits_of(session_of(m).scaling.state_dict()) for m in (plain, other)]
        assert_same_state(*({k: v for k, v in s.items() if not k.endswith("counts")} for s in states))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointed_transformer_trains_like_a_plain_one() -> None:
    losses = []
    for checkpointing in (False, True):
        model = llama()
        hf_lowprec.convert(model, "fp8-lm")
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for step in range(3):
            ids = token_ids(2, 8, seed=step)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    assert same_bits(*losses)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "eval", "generate"])
def test_evaluation_is_quantised_and_leaves_no_trace(mode: str) -> None:
    model = llama()
    hf_lowprec.convert(model, "fp8-lm")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = token_ids(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    scaling = session_of(model).scaling
    before = scaling.state_dict()
    expected = model(input_ids=ids).logits.detach()
    with pytest.raises(AssertionError):  # a training forward leaves its traces
        assert_same_state(before, scaling.state_dict())
    scaling.load_state_dict(before)
    with hf_lowprec.high_precision(model):
        assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-4)
    if mode == "generate":
        out = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert out.shape == (2, 12)
    elif mode == "inference_mode":
        with torch.inference_mode():
            assert same_bits(model(input_ids=ids).logits.clone(), expected)
    else:
        model.train(mode != "eval")
        with torch.no_grad():
            assert same_bits(model(input_ids=ids).logits, expected)
    assert_same_state(before, scaling.state_dict())


def stochastic() -> Recipe:
    sr = Rounding(mode="stochastic")
    x, w, g = (replace(q, rounding=sr) for q in (X, W, G))
    return Recipe(name="sr", fprop=Gemm(input=x, weight=w), dgrad=Gemm(grad_output=g, weight=w),
                  wgrad=Gemm(input=x, grad_output=g))  # fmt: skip


def test_stochastic_rounding_is_reproducible_and_moves_on_with_the_step() -> None:
    model = nn.Sequential(nn.Linear(32, 48))
    hf_lowprec.convert(model, stochastic())
    x, grad = batch(5, 32), batch(5, 48, seed=1)
    first, again = run(model[0], x, grad), run(model[0], x, grad)
    assert all(map(same_bits, first, again)), "a recomputed forward must round like the first"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.step()
    later = run(model[0], x, grad)
    assert not same_bits(first[0], later[0])
    mean = torch.zeros_like(later[0])
    for _ in range(200):
        mean += run(model[0], x, grad)[0] / 200
        optimizer.step()
    exact = nn.functional.linear(x, model[0].weight, model[0].bias)
    assert (mean - exact).abs().max() < 0.25 * (later[0] - exact).abs().max(), "rounding is unbiased"


def test_stochastic_slot_beside_a_nearest_one() -> None:
    """The random slot may be the second that reads the operand."""
    recipe = stochastic()
    recipe = replace(recipe, fprop=Gemm(input=X, weight=W))
    run(layer(recipe), batch(5, 32), batch(5, 48))


# --- errors of the function itself ----------------------------------------------------------------------------------


def test_dtypes_that_differ_outside_autocast() -> None:
    with pytest.raises(RuntimeError, match=r"input is torch\.float32 and weight is torch\.bfloat16.*autocast"):
        layer("fp8-lm", dtype=torch.bfloat16)(batch(5, 32))


@pytest.mark.parametrize("name", ["te-current", "mxfp8", "switchback", "fp8-flex"])
@pytest.mark.parametrize("shape", [(6, 32), (2, 3, 32)])
def test_output_may_be_written_in_place(name: str, shape: tuple[int, ...]) -> None:
    grads = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(inplace=inplace), nn.Linear(32, 32))
        hf_lowprec.convert(model, name)
        x = batch(*shape).requires_grad_()
        out = model(x)
        if inplace:
            out += x
        else:
            out = out + x
        out.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    assert all(same_bits(a, b) for a, b in zip(*grads, strict=True))


def test_second_derivatives_are_refused() -> None:
    x = batch(5, 32).requires_grad_()
    (grad,) = torch.autograd.grad(layer("fp8-lm")(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_current_slot_is_not_scaled_by_the_delayed_one() -> None:
    """fprop delays its input scale, wgrad scales the same input by its own amax."""
    delayed = replace(X, scaling=Scaling(method="delayed", history=4))
    recipe = Recipe(name="mixed", fprop=Gemm(input=delayed, weight=W), wgrad=Gemm(input=X, grad_output=G))
    module = layer(recipe)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    run(module, 1e3 * batch(5, 32), batch(5, 48))
    optimizer.step()
    x, grad = batch(5, 32, seed=3), batch(5, 48, seed=4)
    run(module, x, grad)
    expected = ReferenceLinear(replace(recipe, fprop=Gemm(input=X, weight=W)))
    close_in(module.weight.grad, expected.run(x, module.weight.detach(), module.bias, grad, torch.float32)[2])
