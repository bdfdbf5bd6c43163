# SPDX-License-Identifier: Apache-2.0
"""The residual stream that `find_decoder` sees, and the models that it refuses, with the reason."""

from __future__ import annotations

import pytest
import torch
import transformers
from decoders import KINDS, decoder, inside
from torch import nn

from hf_lowprec.decoder import NoDecoder, find_decoder


@pytest.mark.parametrize("kind", KINDS)
def test_finds_the_parts(kind: str) -> None:
    model = decoder(kind)
    names = {name for name, _ in model.named_modules()}
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = find_decoder(model)
    assert len(found.branches) == 4 and [b.glu is None for b in found.branches] == [True, False] * 2
    assert found.width == 64 and found.head == "lm_head"
    assert {n for b in found.branches for n in (*b.begin, b.end)} | {found.head} == set(found.linears) <= names
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_names_and_activations() -> None:
    llama, gpt2 = find_decoder(decoder("llama")), find_decoder(decoder("gpt2"))
    first, second = llama.branches[:2]
    layer = "model.layers.0"
    assert first.norm == f"{layer}.input_layernorm" and first.end == f"{layer}.self_attn.o_proj"
    assert first.begin == [f"{layer}.self_attn.{name}_proj" for name in "qkv"]
    assert second.glu is not None and second.glu.act == "silu" and second.glu.up == f"{layer}.mlp.up_proj"
    assert llama.embeddings == ["model.embed_tokens"] and not llama.tied and llama.norm == "model.norm"
    assert gpt2.embeddings == ["transformer.wte", "transformer.wpe"] and gpt2.tied
    assert gpt2.branches[1].glu is not None and gpt2.branches[1].glu.up is None
    assert gpt2.kinds["transformer.ln_f"].center and not llama.kinds["model.norm"].center


def test_a_decoder_inside_of_peft() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    found = find_decoder(peft.get_peft_model(decoder("llama"), config))
    assert len(found.branches) == 4 and all("lora" not in name for name in found.linears)
    assert inside(found.branches[0].end) == "base_layer"


REFUSED = {
    "gemma": "may scale what it looks up",
    "gemma2": "may scale what it looks up",
    "olmo2": "without a norm",
    "granite": "was multiplied by a number",
    "mixtral": "several experts",
    "gpt_neox": "ends a branch that begins with|reads neither|residual stream",
    "opt": "may scale what it looks up",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refuses(kind: str) -> None:
    config = transformers.AutoConfig.for_model(kind)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "ffn_dim": 128,
             "word_embed_proj_dim": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    config.update({key: value for key, value in sizes.items() if hasattr(config, key)})
    with pytest.raises(NoDecoder, match=REFUSED[kind]):
        find_decoder(transformers.AutoModelForCausalLM.from_config(config))


def test_refuses_what_is_no_language_model() -> None:
    with pytest.raises(NoDecoder, match="no language-model head"):
        find_decoder(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(NoDecoder, match="no language-model head"):
        find_decoder(decoder("llama").model)
