# SPDX-License-Identifier: Apache-2.0
"""What `find_structure` sees in each architecture, layer by layer; that looking changes nothing; and what it says when
it cannot see. MLPs by themselves: test_structure_mlps.py."""

from __future__ import annotations

import copy
import random
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from core import mlp, same_bits, token_ids
from torch import Tensor, nn

from hf_lowprec.modules.glu import GLU
from hf_lowprec.recipe import Recipe
from hf_lowprec.selection import Choice, select
from hf_lowprec.structure import Structure, find_structure

transformers = pytest.importorskip("transformers")

LAYERS = 2
SIZES: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=2)
TEXT: dict[str, Any] = dict(SIZES, vocab_size=32, intermediate_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GATED: dict[str, Any] = dict(TEXT, num_key_value_heads=1)
VISION: dict[str, Any] = dict(SIZES, intermediate_size=48, image_size=32, patch_size=16)
MOE: dict[str, Any] = dict(GATED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    recipe = Recipe.from_dict(
        {"name": "any", "fprop": {"input": {"format": "e4m3fn"}, "weight": {"format": "e4m3fn"}}}
    )
    return select(model, recipe, Choice())[1]


def look(model: nn.Module) -> Structure:
    return find_structure(model, linears_of(model))


# --- architectures --------------------------------------------------------------------------------------------------

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
VIT_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
TWO_NORMS = {"input_layernorm": QKV, "post_attention_layernorm": GATE_UP}


def glu(act: str, prefix: str = "mlp") -> dict[str, GLU]:
    return {prefix: GLU("gate_proj", "up_proj", "down_proj", act)}


def plain(first: str, second: str, act: str, name: str = "mlp", after: str | None = None) -> dict[str, GLU]:
    return {name: GLU(first, None, second, act, after=after)}


# name -> class, config, prefix of the layers, and per layer: shared inputs, norms with the linears that read them (no
# linear reads what some of them return), MLPs. Names are those inside the layer.
Expected = tuple[str, dict[str, Any], str, list[tuple[str, ...]], dict[str, tuple[str, ...]], dict[str, GLU]]
MODELS: dict[str, Expected] = {
    "llama": ("Llama", GATED, "model.layers", [QKV, GATE_UP], TWO_NORMS, glu("silu")),
    "mistral": ("Mistral", GATED, "model.layers", [QKV, GATE_UP], TWO_NORMS, glu("silu")),
    "qwen2": ("Qwen2", GATED, "model.layers", [QKV, GATE_UP], TWO_NORMS, glu("silu")),
    "qwen3": (
        "Qwen3", dict(GATED, head_dim=16), "model.layers", [QKV, GATE_UP],
        {**TWO_NORMS, "self_attn.q_norm": (), "self_attn.k_norm": ()}, glu("silu"),
    ),
    "gemma": ("Gemma", dict(GATED, head_dim=16), "model.layers", [QKV, GATE_UP], TWO_NORMS, glu("gelu_tanh")),
    "gemma2": (
        "Gemma2", dict(GATED, head_dim=16), "model.layers", [QKV, GATE_UP],
        {"input_layernorm": QKV, "post_attention_layernorm": (), "pre_feedforward_layernorm": GATE_UP,
         "post_feedforward_layernorm": ()}, glu("gelu_tanh"),
    ),
    "phi3": (
        "Phi3", GATED, "model.layers", [],
        {"input_layernorm": ("self_attn.qkv_proj",), "post_attention_layernorm": ("mlp.gate_up_proj",)},
        {"mlp": GLU("gate_up_proj", "gate_up_proj", "down_proj", "silu")},
    ),
    "gpt_neox": (
        "GPTNeoX", TEXT, "gpt_neox.layers", [],
        {"input_layernorm": ("attention.query_key_value",), "post_attention_layernorm": ("mlp.dense_h_to_4h",)},
        plain("dense_h_to_4h", "dense_4h_to_h", "gelu"),
    ),
    "gptj": (  # one norm, attention and MLP beside each other
        "GPTJ", dict(vocab_size=32, n_embd=32, n_layer=LAYERS, n_head=2, rotary_dim=8, bos_token_id=1, eos_token_id=2),
        "transformer.h",
        [("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in")],
        {"ln_1": ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in")},
        plain("fc_in", "fc_out", "gelu_tanh", after="dropout"),
    ),
    "gpt2": (
        "GPT2LMHead", dict(vocab_size=32, n_embd=32, n_layer=LAYERS, n_head=2, bos_token_id=1, eos_token_id=2),
        "transformer.h", [], {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)},
        plain("c_fc", "c_proj", "gelu_tanh", after="dropout"),
    ),
    "olmo2": (
        "Olmo2", GATED, "model.layers", [QKV, GATE_UP],
        {"self_attn.q_norm": (), "self_attn.k_norm": (), "post_attention_layernorm": (),
         "post_feedforward_layernorm": ()}, glu("silu"),
    ),
    "mixtral": (
        "Mixtral", dict(GATED, num_local_experts=4), "model.layers", [QKV],
        {"input_layernorm": QKV, "post_attention_layernorm": ()}, {},
    ),
    "qwen2_moe": (
        "Qwen2Moe", dict(MOE, shared_expert_intermediate_size=32), "model.layers",
        [QKV, ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")],
        {"input_layernorm": QKV, "post_attention_layernorm": ()}, glu("silu", "mlp.shared_expert"),
    ),
    "qwen3_moe": (
        "Qwen3Moe", dict(MOE, head_dim=16), "model.layers", [QKV],
        {"input_layernorm": QKV, "post_attention_layernorm": (), "self_attn.q_norm": (), "self_attn.k_norm": ()}, {},
    ),
    "vit": (
        "ViTForImageClassification", VISION, "vit.layers", [VIT_QKV],
        {"layernorm_before": VIT_QKV, "layernorm_after": ("mlp.fc1",)},
        plain("fc1", "fc2", "gelu"),
    ),
}  # fmt: skip


def build(name: str) -> nn.Module:
    family, config, *_ = MODELS[name]
    if family.endswith("Classification"):
        return getattr(transformers, family)(transformers.ViTConfig(**config))
    causal = getattr(transformers, f"{family}ForCausalLM", None) or getattr(transformers, f"{family}Model")
    return causal(getattr(transformers, f"{family.removesuffix('LMHead')}Config")(**config))


def check_layers(
    found: Structure,
    prefix: str,
    shared: list[tuple[str, ...]],
    norms: dict[str, tuple[str, ...]],
    mlps: dict[str, GLU],
) -> None:
    """Every layer has exactly these."""
    for i in range(LAYERS):
        layer = f"{prefix}.{i}."
        inside = [group for group in found.shared if group[0].startswith(layer)]
        assert sorted(inside) == sorted(tuple(layer + name for name in group) for group in shared)
        seen = {name: norm for name, norm in found.norms.items() if name.startswith(layer)}
        assert {name: norm.readers for name, norm in seen.items()} == {
            layer + name: tuple(layer + reader for reader in readers) for name, readers in norms.items()
        }
        assert all(norm.readers or norm.why for norm in seen.values())
        inside_mlps = {name: parts for name, parts in found.mlps.items() if name.startswith(layer)}
        assert inside_mlps == {layer + name: parts for name, parts in mlps.items()}


@pytest.mark.parametrize("name", MODELS)
def test_groups_per_layer(name: str) -> None:
    _, _, prefix, *expected = MODELS[name]
    model = build(name)
    found = look(model)
    assert found.failures == {} and found.unfused == {}
    check_layers(found, prefix, *expected)
    # Beside the layers there is the last norm, which the output embedding or a head reads.
    outside = [norm for norm_name, norm in found.norms.items() if not norm_name.startswith(prefix)]
    assert [norm.why for norm in outside] == ["no converted linear reads it"]
    assert all(group[0].startswith(prefix) for group in found.shared)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_groups_of_a_model_on_meta(name: str) -> None:
    with torch.device("meta"):
        model = build(name)
    check_layers(look(model), *MODELS[name][2:])


def test_clip_has_two_towers() -> None:
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=32)
    found = look(transformers.CLIPModel(config))
    assert found.failures == {}
    norms = {"layer_norm1": QKV, "layer_norm2": ("mlp.fc1",)}
    for tower in ("text_model", "vision_model"):
        check_layers(found, f"{tower}.encoder.layers", [QKV], norms, plain("fc1", "fc2", "quick_gelu"))


def test_vision_tower_of_a_model_whose_main_input_is_text() -> None:
    """The forward pass with text alone does not reach it: it is followed on its own."""
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**GATED), vision_config=transformers.CLIPVisionConfig(**VISION)
    )
    found = look(transformers.LlavaForConditionalGeneration(config))
    assert found.failures == {}
    check_layers(found, "model.language_model.layers", [QKV, GATE_UP], TWO_NORMS, glu("silu"))
    norms = {"layer_norm1": QKV, "layer_norm2": ("mlp.fc1",)}
    mlps = plain("fc1", "fc2", "quick_gelu")
    check_layers(found, "model.vision_tower.encoder.layers", [QKV], norms, mlps)


def test_cross_attention_of_all_layers_reads_one_tensor() -> None:
    sizes = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2)
    widths = dict(d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48)
    tokens = dict(vocab_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    found = look(transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **widths, **tokens)))
    cross = tuple(f"model.decoder.layers.{i}.encoder_attn.{p}_proj" for i in range(2) for p in "kv")
    assert cross in found.shared
    # Dropout stands between the norm of the embeddings and the first layer in training, though not in evaluation.
    assert found.norms["model.encoder.layernorm_embedding"].readers == ()


def test_weights_that_serve_every_layer() -> None:
    """ALBERT calls one layer again and again; its last norm feeds the attention, and at the end something else."""
    config = transformers.AlbertConfig(**dict(TEXT, embedding_size=32))
    found = look(transformers.AlbertModel(config))
    layer = "encoder.albert_layer_groups.0.albert_layers.0."
    assert found.shared == [tuple(f"{layer}attention.{part}" for part in ("query", "key", "value"))]
    assert found.norms[layer + "full_layer_layer_norm"].why == "other linears read it from call to call"


# --- around the model -----------------------------------------------------------------------------------------------


def test_peft_base_layers_share() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=16, target_modules="all-linear", lora_dropout=0.1)
    found = look(peft.get_peft_model(build("llama"), config))
    prefix = "base_model.model.model.layers"
    qkv, gate_up = (tuple(f"{name}.base_layer" for name in group) for group in (QKV, GATE_UP))
    assert found.failures == {}
    for i in range(LAYERS):
        layer = f"{prefix}.{i}."
        for group in (qkv, gate_up):
            assert tuple(layer + name for name in group) in found.shared
        assert found.norms[layer + "input_layernorm"].readers == tuple(layer + name for name in qkv)
        assert found.mlps[layer + "mlp"] == GLU("gate_proj", "up_proj", "down_proj", "silu")


def test_attention_kernels_of_a_gpu_are_not_needed() -> None:
    model = build("llama")
    model.config._attn_implementation = "flash_attention_2"
    found = look(model)
    assert found.failures == {} and len(found.shared) == 2 * LAYERS
    assert model.config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_mode_of_the_caller_does_not_matter(mode: Any) -> None:
    with mode():
        check_layers(look(build("llama")), *MODELS["llama"][2:])


def test_compiled_parts_and_device_hooks_are_looked_through() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = build("llama")
    for layer in model.model.layers:
        layer.compile(backend="inductor")
        hooks.add_hook_to_module(layer.mlp, hooks.AlignDevicesHook(execution_device="cpu"))
    found = look(model)
    assert found.failures == {}
    check_layers(found, *MODELS["llama"][2:5], glu("silu"))


def test_sharded_weights_have_their_full_size(tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = build("llama")
        for layer in model.model.layers:
            fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        check_layers(look(model), *MODELS["llama"][2:])
    finally:
        dist.destroy_process_group()


def test_a_dropout_between_norm_and_linears_is_seen_in_evaluation_too() -> None:
    model = build("llama").eval()

    def dropped(self: nn.Module, x: Tensor) -> Tensor:
        return F.dropout(type(self).forward(self, x), 0.5, self.training)

    norm = model.model.layers[0].input_layernorm
    norm.forward = dropped.__get__(norm)
    found = look(model)
    assert "model.layers.0.input_layernorm" in found.norms and found.failures == {}

    class Dropping(nn.Module):
        def __init__(self, inner: nn.Module, p: float) -> None:
            super().__init__()
            self.inner, self.p = inner, p

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.inner(x), self.p, self.training)

    for p, readers in ((0.5, 0), (0.0, 3)):
        model = build("llama").eval()
        model.model.layers[0].input_layernorm = Dropping(model.model.layers[0].input_layernorm, p)
        assert len(look(model).norms["model.layers.0.input_layernorm.inner"].readers) == readers


# --- looking changes nothing ----------------------------------------------------------------------------------------


def test_looking_leaves_the_model_as_it_is() -> None:
    model = build("llama")
    model.train()
    model.gradient_checkpointing_enable()
    calls: list[str] = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append("hook"))
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda *_: calls.append("pre-hook"))
    before = {name: (id(module), type(module), dict(module.__dict__)) for name, module in model.named_modules()}
    tables = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
    parts = {name: {key: dict(getattr(module, key)) for key in tables} for name, module in model.named_modules()}
    config = copy.deepcopy(model.config.to_dict())
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    random.seed(3)
    states = torch.get_rng_state(), random.getstate()
    look(model)
    assert same_bits(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    after = {name: (id(module), type(module), dict(module.__dict__)) for name, module in model.named_modules()}
    assert after == before and calls == []
    for name, module in model.named_modules():
        assert {key: dict(getattr(module, key)) for key in parts[name]} == parts[name], name
    assert all(same_bits(model.state_dict()[name], value) for name, value in values.items())
    assert model.config.to_dict() == config
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    model(input_ids=token_ids(1, 8), labels=token_ids(1, 8)).loss.backward()
    assert {"hook", "pre-hook"} == set(calls)


def test_what_a_forward_pass_writes_stays_in_the_skeleton() -> None:
    model = build("llama")

    class Counting(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.kept.append(kwargs["input_ids"])
            self.seen.add_(1)
            torch.rand(3)
            return super().forward(*args, **kwargs)

    model.__class__ = Counting
    model.calls, model.kept = 0, []
    model.register_buffer("seen", torch.zeros(()))
    found = look(model)
    assert found.failures == {} and len(found.shared) == 2 * LAYERS
    assert model.calls == 0 and model.kept == [] and float(model.seen) == 0


def test_a_deep_model_is_looked_at_in_two_seconds() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=32))
    linears = linears_of(model)
    start = time.process_time()
    found = find_structure(model, linears)
    assert time.process_time() - start < 2.0
    assert len(found.shared) == 64 and len(found.norms) == 65 and len(found.mlps) == 32


# --- what cannot be seen --------------------------------------------------------------------------------------------


def test_a_plain_module_has_mlps_only() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x))

    found = look(nn.Sequential(nn.LayerNorm(32), Gated()))
    assert found.mlps == {"1": GLU("gate", "up", "down", "silu")}
    assert found.shared == [("1.gate", "1.up")], "the graph of an MLP shows that, too"
    assert found.norms["0"].why == "its output was not followed"
    assert found.failures == {"": "Sequential has no config that says what its inputs are"}
    assert look(mlp()).shared == []


@pytest.mark.parametrize("what", ["raises", "function", "inputs", "loop"])
def test_a_forward_that_cannot_be_followed_is_reported_and_the_parts_inside_are_found(what: str) -> None:
    model = build("llama")
    expected = ""
    if what == "function":
        inner = model.forward
        model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
        expected = "the forward of the model was replaced by a function"
    else:

        class Broken(type(model)):  # type: ignore[misc]
            def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
                if what == "raises":
                    raise RuntimeError("not on this\nmachine")
                if what == "loop":
                    return self._parameters[len(self._parameters)]
                return super().forward(input_ids, **kwargs)

        class Foreign(Broken):
            main_input_name = "point_cloud"

            def forward(self, point_cloud: Tensor) -> Any:
                return point_cloud

        model.__class__ = Foreign if what == "inputs" else Broken
        expected = {"raises": "RuntimeError: not on this", "loop": "KeyError: 0",
                    "inputs": "its inputs are of no known kind"}[what]  # fmt: skip
    found = look(model)
    assert found.failures == {"": expected}
    check_layers(found, *MODELS["llama"][2:])  # LlamaModel inside it can be followed


def test_values_are_not_needed() -> None:
    """A forward pass that looks at what it is given goes on, with zeros."""
    model = build("llama")

    class Looking(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            if (input_ids > 5).any() or input_ids.max().item() or int(input_ids.sum()) or input_ids.nonzero().numel():
                raise RuntimeError("there are values")
            assert input_ids.tolist() == [[0] * input_ids.shape[1]]
            return super().forward(input_ids, **kwargs)

    model.__class__ = Looking
    assert look(model).failures == {}
