# SPDX-License-Identifier: Apache-2.0
"""Tiny decoders of the kinds that the transform to unit scale is for, and text with something to learn in it."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

KINDS = ("llama", "qwen2", "qwen3", "mistral", "gpt2")
VOCAB, LENGTH = 96, 64


def decoder(kind: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """As transformers initialises it, two layers of width 64, in training mode, without dropout."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": LENGTH,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    }  # fmt: skip
    if kind == "gpt2":
        sizes = {
            "vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": LENGTH, "resid_pdrop": 0.0,
            "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **changes})
    return transformers.AutoModelForCausalLM.from_config(config).train()


def text(steps: int, rows: int = 4, length: int = LENGTH, seed: int = 1) -> list[Tensor]:
    """A Markov chain over the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    chain = torch.softmax(torch.randn(VOCAB, VOCAB, generator=generator) * 2.5, -1)
    out = []
    for _ in range(steps):
        ids = [torch.randint(0, VOCAB, (rows,), generator=generator)]
        while len(ids) < length:
            ids.append(torch.multinomial(chain[ids[-1]], 1, generator=generator)[:, 0])
        out.append(torch.stack(ids, 1))
    return out


def inside(name: str) -> str:
    return name.rpartition(".")[2]


def rms(x: Tensor) -> float:
    return float(x.detach().float().square().mean().sqrt())


def outputs(model: nn.Module, ids: Tensor) -> dict[str, float]:
    """RMS of what every linear, embedding and decoder layer returns."""
    seen: dict[str, float] = {}
    handles = []
    for name, module in model.named_modules():
        if (hasattr(module, "weight") and module.weight.dim() == 2) or name.rpartition(".")[2].isdigit():

            def hook(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
                seen[name] = rms(out[0] if isinstance(out, tuple) else out)

            handles.append(module.register_forward_hook(hook))
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen
