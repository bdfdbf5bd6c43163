# SPDX-License-Identifier: Apache-2.0
"""Tiny MLPs of transformers, fused and as they are, and how to compare them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from core import batch, same_bits
from torch import Tensor, nn

import hf_lowprec
from hf_lowprec.modules.glu import GLU, fuse_glu
from hf_lowprec.recipe import Quant, Scaling

WIDTH, HIDDEN = 32, 48
E4M3 = Quant(format="e4m3fn", scaling=Scaling(snap="rceil"))
TILES = Quant(format="e4m3fn", scaling=Scaling(granularity="tile", block=(4, 16), snap="rceil"))
SEPARATE = ("gate_proj", "up_proj", "down_proj")


def _mlp(kind: str) -> nn.Module:
    import transformers as t
    from transformers.models.gemma.modeling_gemma import GemmaMLP
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXMLP
    from transformers.models.llama.modeling_llama import LlamaMLP
    from transformers.models.olmo2.modeling_olmo2 import Olmo2MLP
    from transformers.models.phi3.modeling_phi3 import Phi3MLP
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN}
    make: dict[str, Callable[[], nn.Module]] = {
        "llama": lambda: LlamaMLP(t.LlamaConfig(**sizes, mlp_bias=True)),
        "gemma": lambda: GemmaMLP(t.GemmaConfig(**sizes, hidden_act="gelu_pytorch_tanh")),
        "phi3": lambda: Phi3MLP(t.Phi3Config(**sizes, pad_token_id=0)),
        "qwen2": lambda: Qwen2MLP(t.Qwen2Config(**sizes)),
        "olmo2": lambda: Olmo2MLP(t.Olmo2Config(**sizes)),
        "gpt2": lambda: GPT2MLP(HIDDEN, t.GPT2Config(n_embd=WIDTH, resid_pdrop=0.0)),
        "gpt_neox": lambda: GPTNeoXMLP(t.GPTNeoXConfig(**sizes, num_attention_heads=4)),
    }
    return make[kind]()


KINDS = {
    "llama": GLU(*SEPARATE, "silu"),
    "gemma": GLU(*SEPARATE, "gelu_tanh"),
    "phi3": GLU("gate_up_proj", "gate_up_proj", "down_proj", "silu"),
    "qwen2": GLU(*SEPARATE, "silu"),
    "olmo2": GLU(*SEPARATE, "silu"),
    "gpt2": GLU("c_fc", None, "c_proj", "gelu_tanh", after="dropout"),
    "gpt_neox": GLU("dense_h_to_4h", None, "dense_4h_to_h", "gelu"),
}


def mlp(kind: str = "llama", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return _mlp(kind)


def pair(kind: str = "llama", recipe: str | None = None, saved: Quant | None = None) -> tuple[nn.Module, nn.Module]:
    """(fused, as transformers has it), converted if there is a recipe."""
    ours, own = mlp(kind), mlp(kind)
    if recipe is not None:
        for module in (ours, own):
            hf_lowprec.convert(module, recipe, fuse=False)
    fuse_glu(ours, KINDS[kind], saved)
    return ours, own


def run(module: Any, x: Tensor, grad: Tensor | None = None) -> dict[str, Tensor]:
    """Output and every gradient; the gradient of the output is `grad`, or made of the output's shape."""
    module.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    out = module(leaf)
    out.backward(batch(*out.shape, seed=9, dtype=out.dtype) if grad is None else grad)
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": leaf.grad, **found}


def assert_agree(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """The same output; gradients up to float32 rounding of the slope, which may turn over a code here and there."""
    assert a.keys() == b.keys()
    assert same_bits(a["out"], b["out"])
    for key in b:
        assert (a[key] - b[key]).norm() <= 1e-3 * b[key].norm(), key


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert same_bits(a[key], b[key]), f"{key}: off by {(a[key].float() - b[key].float()).abs().max()}"
