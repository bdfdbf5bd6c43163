# SPDX-License-Identifier: Apache-2.0
"""Fused models on a GPU against unfused ones: same training but for rounding, in fewer kernels; bit for bit the stock
model in `high_precision`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import hf_lowprec
from hf_lowprec import fusion
from hf_lowprec.presets import PRESETS

pytestmark = pytest.mark.gpu
DEVICE = "cuda"

SIZES: dict[str, Any] = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=256)
GATED: dict[str, Any] = dict(SIZES, intermediate_size=256, num_key_value_heads=1, pad_token_id=0)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GATED),
    "qwen3": ("Qwen3", dict(GATED, head_dim=64)),
    "gemma": ("Gemma", dict(GATED, head_dim=64)),
    "phi3": ("Phi3", GATED),
    "gpt_neox": ("GPTNeoX", dict(SIZES, intermediate_size=256)),
    "gpt2": ("GPT2LMHead", dict(vocab_size=256, n_embd=128, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
                                attn_pdrop=0.0)),
    "olmo2": ("Olmo2", GATED),
    "qwen2_moe": ("Qwen2Moe", dict(GATED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
                                   shared_expert_intermediate_size=128)),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    import transformers

    family, config = MODELS[name]
    kind = f"{family}Model" if family.endswith("LMHead") else f"{family}ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, f"{family.removesuffix('LMHead')}Config")(**config))
    return model.to(DEVICE, dtype)


def ids(seed: int) -> torch.Tensor:
    return torch.randint(3, 256, (2, 64), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def losses_and_gradients(model: nn.Module, steps: int = 5, autocast: bool = True) -> list[torch.Tensor]:
    optimizer, out = torch.optim.SGD(model.parameters(), lr=1e-3), []
    for step in range(steps):
        with torch.autocast(DEVICE, torch.bfloat16, autocast):
            loss = model(input_ids=ids(step), labels=ids(step), use_cache=False).loss
        loss.backward()
        out += [loss.detach().float(), *(p.grad.float() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
    return out


def distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Of all losses and gradients together, relative to the other's."""
    apart = sum(float((a - b).norm() ** 2) for a, b in zip(one, other, strict=True))
    return (apart / sum(float(b.norm() ** 2) for b in other)) ** 0.5


@pytest.mark.parametrize("recipe", ["te-current", "te-delayed", "fp8-lm-o1"])
@pytest.mark.parametrize("name", MODELS)
def test_training_is_that_of_the_unfused_model(name: str, recipe: str) -> None:
    """One rounding more or less moves FP8 codes, so that the errors of the two are nearly independent of each other
    (sqrt(2) of one apart, then), but of one size. Five steps: kernels use delayed scales from the third on."""
    fused, unfused = build(name), build(name)
    report = hf_lowprec.convert(fused, recipe)
    hf_lowprec.convert(unfused, recipe, fuse=False)
    assert report.norms and report.mlps and not report.unfused_norms and not report.untraced
    truth = losses_and_gradients(build(name), autocast=False)
    mine, theirs = losses_and_gradients(fused), losses_and_gradients(unfused)
    assert all(bool(tensor.isfinite().all()) for tensor in mine)
    assert distance(mine, theirs) < 1.3 * distance(theirs, truth)
    assert distance(mine, truth) < 1.15 * distance(theirs, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_high_precision_is_the_stock_model(name: str, dtype: torch.dtype) -> None:
    model, stock = build(name, dtype).eval(), build(name, dtype).eval()
    hf_lowprec.convert(model, "fp8-lm")
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, dtype == torch.float32):
        expected = stock(input_ids=ids(0)).logits
        with hf_lowprec.high_precision(model):
            assert torch.equal(model(input_ids=ids(0)).logits, expected)
        out = model(input_ids=ids(0)).logits
        assert not torch.equal(out, expected)
        assert float((out - expected).float().norm() / expected.float().norm()) < 0.2
    hf_lowprec.revert(model)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, dtype == torch.float32):
        assert torch.equal(model(input_ids=ids(0)).logits, expected)


def test_fused_models_launch_fewer_kernels() -> None:
    launches = {}
    for fuse in (True, False):
        model = build("llama", torch.bfloat16)
        hf_lowprec.convert(model, "te-delayed", fuse=fuse)
        losses_and_gradients(model, autocast=False)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            model(input_ids=ids(0), labels=ids(0), use_cache=False).loss.backward()
            torch.cuda.synchronize()
        launches[fuse] = sum(e.device_type == torch.autograd.DeviceType.CUDA for e in trace.events())
    assert launches[True] < 0.7 * launches[False], launches


def test_recomputation_and_adapters() -> None:
    peft = pytest.importorskip("peft")
    results = {}
    for fuse in (True, False):
        for checkpointing in (True, False):
            torch.manual_seed(0)
            lora = peft.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
            model = peft.get_peft_model(build("llama"), lora).train()
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                model.enable_input_require_grads()
            hf_lowprec.convert(model, {**PRESETS["fp8-lm-o1"].to_dict(), "saved": None}, fuse=fuse)
            assert any(fusion.is_fused(module) for module in model.modules()) is fuse
            results[fuse, checkpointing] = losses_and_gradients(model)
    assert distance(results[True, True], results[True, False]) < 1e-2
    assert distance(results[True, False], results[False, False]) < 0.2
