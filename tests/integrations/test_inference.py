# SPDX-License-Identifier: Apache-2.0
"""FP8-AMAX and FP8-CSCALE for inference: one line, no state for backward, the numbers of training's forward pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import VOCAB, llama, rows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import hf_lowprec
from hf_lowprec import numerics
from hf_lowprec.conversion import session_of
from hf_lowprec.modules.linear import LowPrecMixin
from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import Gemm, Quant, Recipe, Scaling

RECIPES = ("fp8-amax", "fp8-cscale")


def ids(n: int = 2, length: int = 16) -> Tensor:
    return torch.stack([row["input_ids"] for row in rows(n, length)])


def converted(name: str | Recipe, **kwargs: object) -> nn.Module:
    model = llama(**kwargs).eval()
    hf_lowprec.convert(model, name)
    return model


def state_bits(model: nn.Module) -> list[Tensor]:
    session = session_of(model)
    assert session is not None
    return [t for entry in session.scaling.state_dict().values() for role in entry.values() for t in role.values()]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_kept_without_gradients(name: str, dtype: torch.dtype) -> None:
    """No graph, no saved tensor, no counter, no cached weight; the same bits as with gradients."""
    model = converted(name, dtype=dtype)
    before = [t.clone() for t in state_bits(model)]
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        with torch.no_grad():
            quiet = model(input_ids=ids()).logits
        assert not saved and quiet.grad_fn is None and not quiet.requires_grad
        assert all(torch.equal(a, b) for a, b in zip(before, state_bits(model), strict=True))
        with torch.inference_mode():
            assert torch.equal(model(input_ids=ids()).logits, quiet)
        assert not saved
        loud = model(input_ids=ids()).logits
    assert saved and torch.equal(loud, quiet)
    caches = [m._lowprec.weight_cache for m in model.modules() if isinstance(m, LowPrecMixin)]
    assert caches and all(cache.quantized is None for cache in caches)


@pytest.mark.parametrize("name", RECIPES)
def test_frozen_parameters_save_nothing_either(name: str) -> None:
    model = converted(name).requires_grad_(False)
    out = model(input_ids=ids()).logits
    assert out.grad_fn is None and not out.requires_grad


@pytest.mark.parametrize("name", RECIPES)
def test_the_forward_is_the_papers(name: str) -> None:
    """One layer, written down from the paper: Q(x 2^b) Q(w 2^b) 2^-(b1 + b2), b from the amax or one constant."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48, bias=False)).eval()
    x, w = torch.randn(10, 64) * 3, model[0].weight.detach().double()
    hf_lowprec.convert(model, name)

    def cast(t: Tensor) -> tuple[Tensor, int]:
        b = int(torch.floor(torch.log2(448 / t.abs().max().double()))) if name == "fp8-amax" else 0
        return (t.double() * 2.0**b).clamp(-448, 448).float().to(torch.float8_e4m3fn).double(), b

    (qx, bx), (qw, bw) = cast(x), cast(w)
    expected = (qx @ qw.t() * 2.0 ** -(bx + bw)).float()
    with torch.no_grad():
        assert torch.allclose(model(x), expected, rtol=2**-20, atol=2**-20 * float(expected.abs().max()))


@pytest.mark.parametrize("name", RECIPES)
def test_one_line_with_from_pretrained_and_generate(name: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    config = hf_lowprec.LowPrecConfig(name)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config).eval()
    same = converted(name, dtype=model.dtype)
    assert sum(isinstance(m, LowPrecMixin) for m in model.modules()) == 14
    prompt = ids(1, 5)
    tokens = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert tokens.shape == (1, 13) and bool((tokens < VOCAB).all())
    assert torch.equal(tokens, same.generate(prompt, max_new_tokens=8, do_sample=False))
    with torch.no_grad():
        low = model(input_ids=prompt).logits
        with hf_lowprec.high_precision(model):
            high = model(input_ids=prompt).logits
    assert not torch.equal(low, high) and float(numerics.sqnr(high.float(), low.float())) > 15


def test_the_constant_has_a_window() -> None:
    """Too small a scale cuts off, too large a one loses to zero; in between it is as good as AMAX."""
    model, x = llama().eval(), ids(4)

    def quality(recipe: str | Recipe) -> float:
        with torch.no_grad():
            high = model(input_ids=x).logits
            hf_lowprec.convert(model, recipe)
            low = model(input_ids=x).logits
        hf_lowprec.revert(model)
        return float(numerics.sqnr(high, low))

    def constant(exponent: int) -> Recipe:
        scaling = Scaling(method="static", exponent=exponent)
        e4m3 = Quant(format="e4m3fn", scaling=scaling)
        return replace(PRESETS["fp8-cscale"], name=f"c{exponent}", fprop=Gemm(input=e4m3, weight=e4m3))

    best = quality("fp8-amax")
    inside, small, large = (quality(constant(k)) for k in (-5, -16, 6))
    assert inside > best - 1 and small < best - 10 and large < best - 10
