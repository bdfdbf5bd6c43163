# SPDX-License-Identifier: Apache-2.0
"""What `convert` changes, what it leaves alone and why, and that it can be undone."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from core import (
    QUANTISING,
    VOCAB,
    assert_same_state,
    batch,
    converted_names,
    llama,
    mlp,
    same_bits,
    token_ids,
    train_step,
)
from torch import nn

import hf_lowprec
from hf_lowprec.conversion import recipe_of, report_of, session_of
from hf_lowprec.modules import LowPrecLinear
from hf_lowprec.presets import PRESETS

LAYER = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip


# --- in place, and back ---------------------------------------------------------------------------------------------


def test_parameters_keep_identity_names_and_values() -> None:
    model = llama()
    names = {name: id(p) for name, p in model.named_parameters()}
    values = {name: p.detach().clone() for name, p in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hf_lowprec.convert(model, "fp8-lm")
    assert {name: id(p) for name, p in model.named_parameters()} == names
    assert model.state_dict().keys() == values.keys(), "state that is not a weight must not enter the state dict"
    assert all(same_bits(model.state_dict()[name], value) for name, value in values.items())
    assert dict(model.named_buffers()).keys() == dict(llama().named_buffers()).keys()
    ids = token_ids(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert not same_bits(model.model.layers[0].mlp.up_proj.weight, values["model.layers.0.mlp.up_proj.weight"])


def test_converted_modules_are_still_linears() -> None:
    model = mlp()
    hf_lowprec.convert(model, "fp8-lm")
    assert type(model.up) is LowPrecLinear and isinstance(model.up, nn.Linear)
    assert repr(model.up) == ("LowPrecLinear(in_features=32, out_features=48, bias=True, i:e4m3fn,w:e4m3fn,go:e5m2)")
    assert isinstance(model.norm, nn.LayerNorm)
    assert repr(model.norm).startswith("LowPrecLayerNorm((32,), eps=1e-05") and repr(model.norm).endswith(", fused)")


@pytest.mark.parametrize("name", QUANTISING)
def test_forward_differs_and_high_precision_is_exact(name: str) -> None:
    model, original, ids = llama(), llama(), token_ids(2, 8)
    hf_lowprec.convert(model, name)
    expected = original(input_ids=ids, labels=ids)
    assert not same_bits(model(input_ids=ids).logits, expected.logits)
    with hf_lowprec.high_precision(model):
        out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    expected.loss.backward()
    assert same_bits(out.logits, expected.logits)
    for (key, a), b in zip(model.named_parameters(), original.parameters(), strict=True):
        assert same_bits(a.grad, b.grad), key
    assert not same_bits(model(input_ids=ids).logits, expected.logits), "quantised again after the context"


def test_high_precision_under_autocast_nests_and_survives_errors() -> None:
    model, original, x = mlp(), mlp(), batch(5, 32)
    hf_lowprec.convert(model, "fp8-lm")
    with torch.autocast("cpu", torch.bfloat16):
        expected = original(x)
        with pytest.raises(KeyError), hf_lowprec.high_precision(model):
            with hf_lowprec.high_precision(model):
                pass
            assert same_bits(model(x), expected)
            raise KeyError
        assert not same_bits(model(x), expected)
    with hf_lowprec.high_precision(original):
        pass


@pytest.mark.parametrize("name", QUANTISING)
def test_revert_restores_the_model(name: str) -> None:
    model, original, ids = llama(), llama(), token_ids(2, 8)
    classes = {n: type(m) for n, m in model.named_modules()}
    hf_lowprec.convert(model, name)
    hf_lowprec.revert(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert not any("lowprec" in key for m in model.modules() for key in m.__dict__)
    assert recipe_of(model) is None and report_of(model) is None
    assert same_bits(model(input_ids=ids).logits, original(input_ids=ids).logits)
    hf_lowprec.revert(model)
    hf_lowprec.convert(model, "te-current")
    assert recipe_of(model) == PRESETS["te-current"]


def test_convert_is_idempotent() -> None:
    model = mlp()
    report = hf_lowprec.convert(model, "fp8-lm")
    state = model.up._lowprec
    for again in ("fp8-lm", "fp8-lm-o2", PRESETS["fp8-lm"], PRESETS["fp8-lm"].to_dict()):
        assert hf_lowprec.convert(model, again) is report
    assert model.up._lowprec is state
    assert report_of(model) is report and recipe_of(model) is PRESETS["fp8-lm"]


def test_wrappers_find_the_conversion_and_names_do_not_depend_on_them() -> None:
    model = mlp()
    compiled = torch.compile(model, backend="eager")
    report = hf_lowprec.convert(compiled, "fp8-lm")
    assert report.converted == ["up", "down"]
    assert recipe_of(compiled) is recipe_of(model) is PRESETS["fp8-lm"]
    assert hf_lowprec.convert(model, "fp8-lm") is report
    hf_lowprec.revert(compiled)
    assert type(model.up) is nn.Linear


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_independent_and_complete(way: str) -> None:
    model, x = mlp(), batch(5, 32)
    hf_lowprec.convert(model, "fp8-lm")
    model.up.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    train_step(model, optimizer, x)
    model(x)
    assert model.up._lowprec.weight_cache.quantized is not None, "the float8 cache must not be in the way of a copy"
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        other = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert converted_names(other) == ["up", "down"]
    assert session_of(other) is not session_of(model) and session_of(other).root is other
    assert session_of(other).scaling.layers["up"] is other.up._lowprec
    assert_same_state(session_of(model).state_dict(), session_of(other).state_dict())
    assert same_bits(model(x), other(x))
    before = session_of(model).state_dict()
    train_step(other, torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.1), 3 * x)
    assert_same_state(before, session_of(model).state_dict())
    with pytest.raises(AssertionError):
        assert_same_state(before, session_of(other).state_dict())


@pytest.mark.parametrize("move", ["half", "bfloat16", "double", "to dtype", "to device"])
def test_state_is_not_cast_with_the_model(move: str) -> None:
    model = mlp()
    hf_lowprec.convert(model, "fp8-lm")
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), 1e4 * batch(5, 32))
    before = session_of(model).state_dict()
    moves: dict[str, Any] = {
        "half": model.half, "bfloat16": model.bfloat16, "double": model.double,
        "to dtype": lambda: model.to(torch.bfloat16), "to device": lambda: model.to("cpu", torch.float16),
    }  # fmt: skip
    moves[move]()
    assert model.up.weight.dtype != torch.float32
    assert_same_state(before, session_of(model).state_dict())
    if model.up.weight.dtype != torch.float64:
        assert model(batch(5, 32, dtype=model.up.weight.dtype)).dtype == model.up.weight.dtype


def test_model_converted_on_meta_materialises() -> None:
    with torch.device("meta"):
        model = mlp()
    hf_lowprec.convert(model, "fp8-lm")
    model.to_empty(device="cpu")
    model.load_state_dict(mlp().state_dict())
    other = mlp()
    hf_lowprec.convert(other, "fp8-lm")
    assert same_bits(model(batch(5, 32)), other(batch(5, 32)))


# --- what is left alone ---------------------------------------------------------------------------------------------


def test_llama_converts_everything_but_the_head() -> None:
    model = llama()
    report = hf_lowprec.convert(model, "fp8-lm")
    assert report.converted == [f"model.layers.{i}.{name}" for i in range(2) for name in LAYER]
    assert report.converted == converted_names(model)
    assert report.skipped == {"lm_head": "output embedding or head"}
    assert report.unconvertible == {}


def test_tied_weights() -> None:
    model = llama(tie_word_embeddings=True)
    assert "lm_head" in hf_lowprec.convert(model, "fp8-lm").skipped
    first, second = nn.Linear(32, 32), nn.Linear(32, 32)
    second.weight = first.weight
    model = nn.Sequential(first, second, nn.Linear(32, 32))
    report = hf_lowprec.convert(model, "fp8-lm")
    assert report.converted == ["2"]
    assert report.skipped == dict.fromkeys(["0", "1"], "weight tied to another module")


def test_a_module_used_twice_is_converted_once() -> None:
    shared = nn.Linear(32, 32)
    model = nn.Sequential(shared, shared)
    assert hf_lowprec.convert(model, "fp8-lm").converted == ["0"]
    x = batch(5, 32)
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), x)
    assert session_of(model).scaling.history["input"].shape == (1, 16)


SIZES: dict[str, Any] = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
GATED: dict[str, Any] = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 1}


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=32))


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(**SIZES, ffn_dim=48, max_position_embeddings=32, word_embed_proj_dim=32)
    return OPTForCausalLM(config)


def qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    return Qwen2ForSequenceClassification(Qwen2Config(**GATED, num_labels=16, pad_token_id=0))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**SIZES, intermediate_size=48, num_labels=16, max_position_embeddings=32)
    return BertForSequenceClassification(config)


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**GATED, num_local_experts=4))


def qwen2_moe() -> nn.Module:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=32)
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**GATED, **experts))


ATTENTION = LAYER[:4]
MODELS: dict[str, tuple[Any, list[str], dict[str, str], list[str]]] = {
    # model -> converted names, skipped names with part of the reason, named expert weights
    "gpt2": (
        gpt2,
        [f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")],
        {"lm_head": "output embedding"},
        [],
    ),
    "opt": (
        opt,
        [f"model.decoder.layers.0.{name}" for name in
         ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2")],
        {"lm_head": "output embedding"},
        [],
    ),
    "qwen2": (qwen2, [f"model.layers.0.{name}" for name in LAYER], {"score": "head"}, []),
    "bert": (
        bert,
        [f"bert.encoder.layer.0.{name}" for name in
         ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
          "intermediate.dense", "output.dense")] + ["bert.pooler.dense"],
        {"classifier": "head"},
        [],
    ),
    "mixtral": (
        mixtral,
        [f"model.layers.0.{name}" for name in ATTENTION],
        {"lm_head": "output embedding"},
        [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")],
    ),
    "qwen2_moe": (
        qwen2_moe,
        [f"model.layers.0.{name}" for name in
         [*ATTENTION, *(f"mlp.shared_expert.{p}" for p in ("gate_proj", "up_proj", "down_proj"))]],
        {"lm_head": "output embedding", "model.layers.0.mlp.shared_expert_gate": "router"},
        [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_architectures(name: str) -> None:
    make, converted, skipped, experts = MODELS[name]
    model = make()
    report = hf_lowprec.convert(model, "fp8-lm")
    assert report.converted == converted == converted_names(model)
    assert report.skipped.keys() == skipped.keys()
    assert all(reason in report.skipped[module] for module, reason in skipped.items())
    assert list(report.unconvertible) == experts
    assert all(part in str(report) for part in (*experts[:1], "lm_head" if "lm_head" in skipped else "head"))
    if experts:
        assert report.flop_share < 0.9, "experts are GEMMs that run in high precision"
    ids = token_ids(2, 8)
    out = model(input_ids=ids, labels=ids if "lm_head" in skipped else torch.tensor([3, 1]))
    out.loss.backward()
    weights = session_of(model).weights()
    assert len(weights) == len(converted) and all(w.grad.isfinite().all() for w in weights.values())
    assert all(float(layer.operands[0].amax) > 0 for layer in session_of(model).scaling.layers.values())


def test_subclasses_and_multihead_attention_keep_their_own_forward() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.ModuleDict({"mine": Scaled(32, 32), "mha": nn.MultiheadAttention(32, 2), "plain": nn.Linear(32, 32)})
    report = hf_lowprec.convert(model, "fp8-lm")
    assert report.converted == ["plain"]
    assert report.skipped["mine"] == "class Scaled may have a forward of its own"
    assert "mha.out_proj" in report.skipped


def test_adapters_are_left_alone_by_name() -> None:
    model = nn.ModuleDict({"q_proj": nn.ModuleDict({
        "base_layer": nn.Linear(32, 32), "lora_A": nn.ModuleDict({"default": nn.Linear(32, 16)}),
    })})  # fmt: skip
    report = hf_lowprec.convert(model, "fp8-lm")
    assert report.converted == ["q_proj.base_layer"] and report.skipped == {"q_proj.lora_A.default": "adapter"}


def test_a_gate_in_a_plain_mlp_is_no_router() -> None:
    mlp_ = nn.ModuleDict({"gate": nn.Linear(32, 32), "up": nn.Linear(32, 32)})
    moe = nn.ModuleDict({"gate": nn.Linear(32, 16), "experts": nn.ModuleList([nn.Linear(32, 32)])})
    report = hf_lowprec.convert(nn.ModuleDict({"mlp": mlp_, "moe": moe}), "fp8-lm")
    assert report.converted == ["mlp.gate", "mlp.up", "moe.experts.0"]
    assert report.skipped == {"moe.gate": "router"}


def test_alignment_matters_only_to_native_gemms(monkeypatch: pytest.MonkeyPatch) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 20), nn.Linear(20, 32), nn.Linear(32, 32))

    assert hf_lowprec.convert(model(), "fp8-lm").converted == ["0", "1", "2"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    report = hf_lowprec.convert(model(), "fp8-lm")
    assert report.converted == ["2"] and not report.emulated
    assert report.skipped["0"] == "a dimension of (20, 32) is not divisible by 16"
    assert hf_lowprec.convert(model(), "fp8-lm", emulate=True).converted == ["0", "1", "2"]


def test_instance_forward_of_accelerate_hooks_is_quantised_too() -> None:
    """`from_pretrained(device_map=...)` binds the old forward on the instance before anybody converts."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, plain, x = mlp(), mlp(), batch(5, 32)
    hooks.add_hook_to_module(model.up, hooks.AlignDevicesHook(execution_device="cpu"))
    hf_lowprec.convert(plain, "te-current")
    assert hf_lowprec.convert(model, "te-current").converted == ["up", "down"]
    assert same_bits(model(x), plain(x))
    hf_lowprec.revert(model)
    assert same_bits(model(x), mlp()(x))
    hooks.remove_hook_from_module(model.up)
    assert same_bits(model(x), mlp()(x))


def test_replaced_forward_is_left_alone() -> None:
    model = mlp()
    model.up.forward = lambda x: x.new_zeros(*x.shape[:-1], 48)
    report = hf_lowprec.convert(model, "fp8-lm")
    assert report.skipped == {"up": "its forward was replaced on the instance"}


# --- what the caller leaves out --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("mlp", [f"model.layers.{i}.{name}" for i in range(2) for name in LAYER[4:]]),
        ("q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ("layers.0", [f"model.layers.0.{name}" for name in LAYER]),
        ("model.layers.1", [f"model.layers.1.{name}" for name in LAYER]),
        ("model.layers.0.self_attn.q_proj", ["model.layers.0.self_attn.q_proj"]),
        (r".*\.0\..*_proj", [f"model.layers.0.{name}" for name in LAYER]),
    ],
)
def test_modules_to_not_convert(pattern: str, left: list[str]) -> None:
    model = llama()
    report = hf_lowprec.convert(model, "fp8-lm", modules_to_not_convert=[pattern])
    reason = f"named by modules_to_not_convert ({pattern})"
    assert [name for name, why in report.skipped.items() if why == reason] == left
    assert not set(left) & set(converted_names(model))
    assert len(report.converted) == 14 - len(left)
    assert report.unmatched_patterns == []


@pytest.mark.parametrize("pattern", ["q_pro", "proj", "fc1", "layers.10", "self_attn.q"])
def test_patterns_do_not_match_parts_of_words_and_are_reported(pattern: str) -> None:
    model = llama()
    report = hf_lowprec.convert(model, "fp8-lm", modules_to_not_convert=[pattern, "lm_head", "norm"])
    assert len(report.converted) == 14
    assert report.unmatched_patterns == [pattern], "lm_head is a linear, norm a module"
    assert f"matched nothing: {pattern}" in str(report)


def test_patterns_of_the_recipe_count_too() -> None:
    recipe = {**PRESETS["te-current"].to_dict(), "modules_to_not_convert": ["up"]}
    report = hf_lowprec.convert(mlp(), recipe)
    assert report.converted == ["down"]


def test_module_filter_fn() -> None:
    model, asked = llama(), []

    def wanted(module: nn.Module, name: str) -> bool:
        asked.append((module, name))
        return "mlp" in name

    report = hf_lowprec.convert(model, "fp8-lm", module_filter_fn=wanted)
    assert len(report.converted) == 6 and all("mlp" in name for name in report.converted)
    assert report.skipped["model.layers.0.self_attn.q_proj"] == "refused by module_filter_fn"
    assert all(module is model.get_submodule(name) for module, name in asked)
    assert "lm_head" not in {name for _, name in asked}, "the filter narrows the defaults, it does not widen them"


# --- the report -----------------------------------------------------------------------------------------------------


def test_report_numbers() -> None:
    model = llama()
    report = hf_lowprec.convert(model, "fp8-lm", modules_to_not_convert=["down_proj"])
    parameters = sum(p.numel() for p in model.parameters())
    layers = 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48)
    converted = layers - 2 * 32 * 48
    assert report.parameters == parameters and report.converted_parameters == converted
    assert report.parameter_share == converted / parameters
    assert report.flop_share == converted / layers, "the output embedding does not count"
    assert report.total_linears == 15 and len(report.converted) == 12
    assert report.bytes_per_parameter == 4.0
    assert report.recipe is PRESETS["fp8-lm"]
    assert report.emulated is not torch.cuda.is_available()
    line = report.summary()
    assert "\n" not in line
    assert (
        "recipe fp8-lm: converted 12 of 15 linears" in line and f"{converted / parameters:.1%} of parameters" in line
    )


def test_report_counts_the_kernels_that_ran() -> None:
    model = mlp()
    report = hf_lowprec.convert(model, "fp8-lm")
    assert report.kernels == {}
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), batch(5, 32))
    assert report.kernels == {"emulated e4m3fn x e4m3fn": 2, "emulated e5m2 x e4m3fn": 4}
    assert "ran 4 x emulated e5m2 x e4m3fn" in str(report)
    with hf_lowprec.high_precision(model):
        train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), batch(5, 32))
    assert sum(report.kernels.values()) == 6


@pytest.mark.parametrize("name", ["bf16", "bf16-sr", "fp16"])
def test_recipes_without_gemms_convert_nothing_and_say_so(name: str) -> None:
    model, x = mlp(), batch(5, 32)
    report = hf_lowprec.convert(model, name)
    assert report.converted == [] and report.flop_share == 0.0 and not report.emulated
    assert report.skipped == dict.fromkeys(["up", "down"], f"recipe {name} quantises no GEMM")
    assert same_bits(model(x), mlp()(x)) and recipe_of(model) is PRESETS[name]


# --- a part, a copy, a second call ----------------------------------------------------------------------------------


class TwoParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = nn.Sequential(nn.Linear(32, 32)), nn.Sequential(nn.Linear(32, 32))


def test_a_converted_part_does_not_pass_for_the_whole() -> None:
    model = TwoParts()
    hf_lowprec.convert(model.enc, "fp8-lm")
    with pytest.raises(hf_lowprec.ConversionError, match=r"a part .* 1 linears beside it are not \('dec.0'\)"):
        hf_lowprec.convert(model, "fp8-lm")
    hf_lowprec.revert(model.enc)
    assert hf_lowprec.convert(model, "fp8-lm").converted == ["enc.0", "dec.0"]
    with pytest.raises(hf_lowprec.ConversionError, match=r"without 'dec\.0': revert the whole"):
        hf_lowprec.revert(model.enc)
    assert isinstance(model.dec[0], hf_lowprec.LowPrecLinear)


def test_parts_of_two_recipes_are_no_whole() -> None:
    model = TwoParts()
    hf_lowprec.convert(model.enc, "fp8-lm")
    hf_lowprec.convert(model.dec, "te-delayed")
    with pytest.raises(hf_lowprec.ConversionError, match="already converted with recipe 'te-delayed', not 'fp8-lm'"):
        hf_lowprec.convert(model, "fp8-lm")


def test_a_second_call_with_other_exclusions_is_refused() -> None:
    model = TwoParts()
    hf_lowprec.convert(model, "fp8-lm")
    with pytest.raises(hf_lowprec.ConversionError, match=r"'dec\.0' included, which is to be left alone now"):
        hf_lowprec.convert(model, "fp8-lm", modules_to_not_convert=["dec"])
    with pytest.raises(hf_lowprec.ConversionError, match=r"'enc\.0' included"):
        hf_lowprec.convert(model, "fp8-lm", module_filter_fn=lambda module, name: "enc" not in name)


def test_a_second_call_may_leave_the_exclusions_out() -> None:
    model = TwoParts()
    first = hf_lowprec.convert(model, "fp8-lm", modules_to_not_convert="dec")  # one string is one pattern
    assert first.converted == ["enc.0"] and not first.unmatched_patterns
    assert hf_lowprec.convert(model, "fp8-lm") is first


def test_a_copied_layer_in_another_model_is_converted_afresh() -> None:
    model, other = TwoParts(), TwoParts()
    hf_lowprec.convert(model, "fp8-lm")
    other.enc[0] = copy.deepcopy(model.enc[0])
    other.dec[0] = copy.deepcopy(model.dec[0])
    report = hf_lowprec.convert(other, "fp8-lm")
    assert report.converted == ["enc.0", "dec.0"]
    third = nn.Sequential(copy.deepcopy(model.enc[0]))
    hf_lowprec.revert(third)
    assert type(third[0]) is nn.Linear


def test_a_parametrized_layer_says_why_it_cannot_be_reverted() -> None:
    model = TwoParts()
    hf_lowprec.convert(model, "fp8-lm")
    nn.utils.parametrizations.weight_norm(model.enc[0])
    with pytest.raises(TypeError, match="parametrization"):
        hf_lowprec.revert(model)


def test_bad_patterns_and_models_are_named() -> None:
    with pytest.raises(hf_lowprec.ConversionError, match=r"'\*bad\(' is no regular expression"):
        hf_lowprec.convert(TwoParts(), "fp8-lm", modules_to_not_convert=["*bad("])
    with pytest.raises(hf_lowprec.RecipeError, match=r"modules_to_not_convert: .* no regular expression"):
        hf_lowprec.Recipe.from_dict({"name": "mine", "modules_to_not_convert": ["*bad("]})
    with pytest.raises(TypeError, match=r"takes an nn\.Module, not a str"):
        hf_lowprec.convert("gpt2", "fp8-lm")  # type: ignore[arg-type]


def test_the_summary_line_tells_of_typos() -> None:
    report = hf_lowprec.convert(TwoParts(), "fp8-lm", modules_to_not_convert=["dek"])
    assert "modules_to_not_convert matched nothing: dek" in report.summary()


def test_encoder_layers_with_a_path_around_forward_are_left_alone() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), nn.Linear(32, 32))
    report = hf_lowprec.convert(model, "fp8-lm")
    assert report.converted == ["1"]
    assert "nn.TransformerEncoderLayer reads its weight directly" in report.skipped["0.linear1"]


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "error", "words"), [
    ({"fuse": "no"}, TypeError, "fuse='no': True, False or None"), ({"fuse": 0}, TypeError, "fuse=0"),
    ({"min_numel": -1}, ValueError, "min_numel=-1"), ({"min_numel": True}, TypeError, "min_numel=True"),
    ({"min_tokens": -1}, ValueError, "min_tokens=-1"), ({"min_tokens": "9"}, TypeError, "min_tokens='9': a number"),
    ({"min_numel": 1.5}, TypeError, "min_numel=1.5"), ({"min_numel": "1"}, TypeError, "min_numel='1'"),
])  # fmt: skip
def test_options_of_another_kind_are_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    model = llama()
    with pytest.raises(error, match=words):
        hf_lowprec.convert(model, "te-current", **options)
    assert session_of(model) is None and converted_names(model) == []


@pytest.mark.parametrize("value", ["off", "false", "2", "no"])
def test_the_environment_says_0_or_1(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_LOWPREC_FUSE", value)
    model = llama()
    with pytest.raises(ValueError, match=f"HF_LOWPREC_FUSE='{value}': 0 or 1"):
        hf_lowprec.convert(model, "te-current")
    assert session_of(model) is None and converted_names(model) == []
    assert hf_lowprec.convert(model, "te-current", fuse=True).mlps, "an argument leaves the environment out"


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(("first", "second", "words"), [
    ({"fuse": False}, {"fuse": True}, "with fuse=False, not True"), ({}, {"fuse": False}, "with fuse=True, not False"),
    ({"min_numel": 1}, {"min_numel": 2}, "with min_numel=1, not 2"), ({}, {"min_numel": 9}, "with min_numel=0, not 9"),
    ({}, {"emulate": True}, "with emulate=False, not True"), ({}, {"min_tokens": 9}, "with min_tokens=None, not 9"),
])  # fmt: skip
def test_converting_again_with_other_options_is_refused(
    first: dict[str, Any], second: dict[str, Any], words: str, copied: bool
) -> None:
    model = llama()
    report = hf_lowprec.convert(model, "te-current", **first)
    for same in ({}, first, {"fuse": None, "min_numel": None}):
        assert hf_lowprec.convert(model, "te-current", **same) is report
    if copied:
        model = copy.deepcopy(model)
    with pytest.raises(hf_lowprec.ConversionError, match=words):
        hf_lowprec.convert(model, "te-current", **second)
    hf_lowprec.revert(model)
    hf_lowprec.convert(model, "te-current", **second)


def test_the_environment_asks_nothing_of_a_converted_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    report = hf_lowprec.convert(model, "te-current")
    monkeypatch.setenv("HF_LOWPREC_FUSE", "0")
    assert hf_lowprec.convert(model, "te-current") is report
