# SPDX-License-Identifier: Apache-2.0
"""What `convert` fuses, what it says about it, and that nobody can tell but by the clock: results, copies, adapters,
`high_precision` and `revert` are those of the unfused model."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from core import QUANTISING, llama, mlp, same_bits, token_ids
from torch import nn

import hf_lowprec
from hf_lowprec import fusion
from hf_lowprec.conversion import report_of, session_of
from hf_lowprec.modules.glu import GLU
from hf_lowprec.presets import PRESETS

NO_SAVED = {**PRESETS["fp8-lm"].to_dict(), "saved": None}


def fused_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if fusion.is_fused(module)}


EXPECTED = {
    "model.norm",
    *(f"model.layers.{i}.{part}" for i in range(2) for part in ("input_layernorm", "post_attention_layernorm", "mlp")),
}


def losses_and_gradients(model: nn.Module, steps: int = 3, **kwargs: Any) -> list[torch.Tensor]:
    """Of a few steps, on which delayed scales start to count."""
    optimizer, out = torch.optim.SGD(model.parameters(), lr=0.05), []
    for step in range(steps):
        ids = token_ids(2, 8, seed=step)
        loss = model(input_ids=ids, labels=ids, **kwargs).loss
        loss.backward()
        out += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
    return out


# --- what is fused, and the report ----------------------------------------------------------------------------------


def test_llama_is_fused_and_the_report_says_so() -> None:
    model = llama()
    report = hf_lowprec.convert(model, "fp8-lm")
    assert fused_names(model) == EXPECTED == {*report.norms, *report.mlps}
    attention, mlps = "model.layers.0.self_attn.", "model.layers.0.mlp."
    assert report.shared[:2] == [
        tuple(attention + f"{p}_proj" for p in "qkv"), (mlps + "gate_proj", mlps + "up_proj")
    ]  # fmt: skip
    assert len(report.shared) == 4
    assert report.norms["model.layers.0.input_layernorm"] == report.shared[0] and report.norms["model.norm"] == ()
    assert report.mlps["model.layers.1.mlp"] == "down_proj(silu(gate_proj(x)) * up_proj(x))"
    assert report.unfused_norms == report.unfused_mlps == report.untraced == {}
    counts = "fused: 5 of 5 norms, 2 of 2 MLPs, 2 of 2 rotary embeddings, 4 shared inputs;"
    assert counts in report.summary() and "\n" not in report.summary()
    text = str(report)
    for line in (
        "one input: 2 x model.layers.*.self_attn.q_proj + k_proj + v_proj",
        "fused norm: 2 x model.layers.*.post_attention_layernorm -> model.layers.*.mlp.gate_proj + up_proj",
        "fused norm, no converted linear reads it: model.norm\n",
        "fused MLP: 2 x model.layers.*.mlp = down_proj(silu(gate_proj(x)) * up_proj(x))",
        "fused rotary embedding: 2 x model.layers.*.self_attn: apply_rotary_pos_emb",
    ):
        assert line in text


def test_states_of_a_group_are_one() -> None:
    model = llama()
    report = hf_lowprec.convert(model, "fp8-lm")
    layers = session_of(model).scaling.layers
    for group in report.shared:
        assert len({id(layers[name].operands[0].amax) for name in group}) == 1
        assert len({id(layers[name].operands[1].counts) for name in group}) == len(group)
    amaxes = {id(layer.operands[0].amax) for layer in layers.values()}
    assert len(amaxes) == 14 - 2 * (2 + 1)


@pytest.mark.parametrize("off", ["argument", "environment"])
def test_fusing_can_be_turned_off(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    if off == "environment":
        monkeypatch.setenv("HF_LOWPREC_FUSE", "0")
    report = hf_lowprec.convert(model, "fp8-lm", fuse=False if off == "argument" else None)
    assert fused_names(model) == set() and report.shared == [] and report.norms == report.mlps == {}
    assert "fused" not in str(report)
    layers = session_of(model).scaling.layers.values()
    assert len({id(layer.operands[0].amax) for layer in layers}) == 14
    assert hf_lowprec.convert(model, "fp8-lm") is report, "a second call asks for nothing else"
    if off == "environment":
        hf_lowprec.revert(model)
        hf_lowprec.convert(model, "fp8-lm", fuse=True)
        assert fused_names(model) == EXPECTED, "the argument wins"


def test_recipes_without_gemms_fuse_nothing() -> None:
    model = llama()
    hf_lowprec.convert(model, "bf16")
    assert fused_names(model) == set()


def test_emulated_recipes_leave_norms_alone_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    hf_lowprec.convert(model, "te-current", emulate=True)
    assert fused_names(model) == EXPECTED, "on the CPU there is nothing but emulation"
    hf_lowprec.revert(model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    report = hf_lowprec.convert(model, "te-current", emulate=True)
    assert fused_names(model) == {"model.layers.0.mlp", "model.layers.1.mlp"} and len(report.shared) == 4
    assert set(report.unfused_norms.values()) == {"the recipe is emulated"} and report.unfused_mlps == {}
    assert "fused: 0 of 5 norms, 2 of 2 MLPs, 2 of 2 rotary embeddings, 4 shared inputs" in report.summary()
    assert "unfused, the recipe is emulated: 2 x model.layers.*.input_layernorm" in str(report)


def test_one_quantised_copy_is_shared_where_it_is_the_only_one() -> None:
    """Scales per token serve fprop, and a wgrad in the base precision needs none; scales that differ do not."""
    rows = {"format": "e4m3fn", "scaling": {"granularity": "row"}}
    tensor = {"format": "e4m3fn"}
    for wgrad, groups in (({}, 4), ({"input": rows, "grad_output": tensor}, 0)):
        recipe = {"name": "rows", "fprop": {"input": rows, "weight": rows}, "wgrad": wgrad}
        model = llama()
        report = hf_lowprec.convert(model, recipe)
        assert (len(report.shared), len(report.unshared)) == (groups, 4 - groups)
        states = {id(x.operands[0].counts) for x in session_of(model).scaling.layers.values()}
        assert len(states) == (8 if groups else 14)
        said = "one input, not shared, the recipe casts it per product: 2 x model.layers.*.self_attn.q_proj + k_proj"
        assert (said in str(report)) is (not groups)


def test_what_the_caller_leaves_out_is_not_fused() -> None:
    model = llama()
    report = hf_lowprec.convert(model, "fp8-lm", modules_to_not_convert=["layers.0", "model.norm", "k_proj"])
    assert fused_names(model) == {name for name in EXPECTED if name.startswith("model.layers.1")}
    assert report.unfused_norms == {
        "model.layers.0.input_layernorm": "named by modules_to_not_convert (layers.0)",
        "model.layers.0.post_attention_layernorm": "named by modules_to_not_convert (layers.0)",
        "model.norm": "named by modules_to_not_convert (model.norm)",
    }
    attention = "model.layers.1.self_attn."
    assert report.shared[0] == (attention + "q_proj", attention + "v_proj")


def test_a_model_that_cannot_be_followed_is_converted_all_the_same() -> None:
    report = hf_lowprec.convert(mlp(), "fp8-lm")
    assert report.converted == ["up", "down"] and report.shared == []
    assert report.untraced == {"MLP": "MLP has no config that says what its inputs are"}
    assert "structure of MLP not found: MLP has no config" in str(report) and "\n" not in report.summary()
    assert report.norms == {"norm": ()}, "a norm is one whoever reads it"


def test_other_forwards_stay() -> None:
    model = llama()
    norm, mlp_ = model.model.layers[0].input_layernorm, model.model.layers[0].mlp
    norm.forward = type(norm).forward.__get__(norm)
    mlp_.forward = type(mlp_).forward.__get__(mlp_)

    class Odd(type(norm)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).clamp(-1, 1)

    model.model.layers[1].input_layernorm.__class__ = Odd
    report = hf_lowprec.convert(model, "fp8-lm")
    replaced = "its forward was replaced on the instance"
    assert report.unfused_mlps == {"model.layers.0.mlp": replaced}
    assert report.unfused_norms == {
        "model.layers.0.input_layernorm": replaced,
        "model.layers.1.input_layernorm": "no norm that there is a kernel for",
    }
    assert "fused: 3 of 5 norms, 1 of 2 MLPs, 2 of 2 rotary embeddings, 4 shared inputs" in report.summary()


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (GLU("g", "u", "d", "silu"), "d(silu(g(x)) * u(x))"),
        (GLU("p", "p", "d", "silu"), "d(silu(p(x)[1]) * p(x)[2])"),
        (GLU("p", "p", "d", "silu", gate_first=False), "d(silu(p(x)[2]) * p(x)[1])"),
        (GLU("u", None, "d", "gelu", after="drop"), "drop(d(gelu(u(x))))"),
    ],
)
def test_formulas(parts: GLU, words: str) -> None:
    assert fusion.formula(parts) == words


# --- nobody can tell ------------------------------------------------------------------------------------------------


def distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Of all losses and gradients together, relative to the other's."""
    apart = sum(float((a - b).norm() ** 2) for a, b in zip(one, other, strict=True))
    return (apart / sum(float(b.norm() ** 2) for b in other)) ** 0.5


@pytest.mark.parametrize("name", QUANTISING)
def test_training_is_that_of_the_unfused_model(name: str) -> None:
    """In float32 but for the order of sums. In bfloat16 the MLP's product is rounded once instead of twice: that moves
    FP8 codes, by less than quantising does, and no further from the truth."""
    recipe = {**PRESETS[name].to_dict(), "saved": None}
    for autocast in (False, True):
        fused, unfused, truth = llama(), llama(), losses_and_gradients(llama())
        hf_lowprec.convert(fused, recipe)
        hf_lowprec.convert(unfused, recipe, fuse=False)
        with torch.autocast("cpu", torch.bfloat16, autocast):
            mine, theirs = losses_and_gradients(fused), losses_and_gradients(unfused)
        if autocast:
            assert distance(mine, theirs) < 0.5 * distance(theirs, truth)
            assert distance(mine, truth) < 1.1 * distance(theirs, truth)
        else:
            assert distance(mine, theirs) < 2.0**-12


def test_what_mlps_save_in_e4m3_costs_no_more_than_the_gemms() -> None:
    quality = {}
    for saved in (None, PRESETS["fp8-lm"].to_dict()["saved"]):
        model = llama()
        hf_lowprec.convert(model, {**PRESETS["fp8-lm"].to_dict(), "saved": saved})
        quality[saved is None] = distance(losses_and_gradients(model), losses_and_gradients(llama()))
    assert quality[False] != quality[True], "the policy is carried out"
    assert quality[False] < 1.5 * quality[True]


def test_sharing_alone_is_the_same_bit_for_bit() -> None:
    fused, unfused = llama(), llama()
    hf_lowprec.convert(fused, NO_SAVED)
    for module in fused.modules():
        fusion.unfuse(module)
    hf_lowprec.convert(unfused, NO_SAVED, fuse=False)
    for a, b in zip(losses_and_gradients(fused), losses_and_gradients(unfused), strict=True):
        assert same_bits(a, b)
    mine, theirs = session_of(fused).state_dict()["layers"], session_of(unfused).state_dict()["layers"]
    for layer in mine:
        for key in ("scale", "amax", "history"):
            assert same_bits(mine[layer]["input"][key], theirs[layer]["input"][key]), (layer, key)


def test_state_of_an_unfused_run_loads_into_a_fused_one() -> None:
    fused, unfused = llama(), llama()
    hf_lowprec.convert(unfused, NO_SAVED, fuse=False)
    losses_and_gradients(unfused)
    hf_lowprec.convert(fused, NO_SAVED)
    fused.load_state_dict(unfused.state_dict())
    session_of(fused).load_state_dict(session_of(unfused).state_dict())
    ids = token_ids(2, 8, seed=9)
    with torch.no_grad():
        a, b = fused(input_ids=ids).logits, unfused(input_ids=ids).logits
    assert float((a - b).norm() / b.norm()) < 2.0**-12


def test_a_run_may_go_on_with_another_memory_policy() -> None:
    states = {}
    for policy in ("both", "none"):
        model = llama()
        hf_lowprec.convert(model, {**PRESETS["te-delayed"].to_dict(), "weight_cache": policy})
        losses_and_gradients(model)
        states[policy] = session_of(model).state_dict()
    session_of(model).load_state_dict(states["both"])
    hf_lowprec.revert(model)
    hf_lowprec.convert(model, "te-current")
    with pytest.raises(ValueError, match="written with recipe 'te-delayed'"):
        session_of(model).load_state_dict(states["both"])


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_high_precision_is_the_stock_model(mode: str) -> None:
    model, stock, ids = llama(), llama(), token_ids(2, 8)
    hf_lowprec.convert(model, "fp8-lm")
    model.train(mode == "train"), stock.train(mode == "train")
    with torch.set_grad_enabled(mode != "no_grad"):
        with hf_lowprec.high_precision(model):
            assert same_bits(model(input_ids=ids).logits, stock(input_ids=ids).logits)
            assert not any(state.enabled for state in fusion.fused_states(model))
        assert all(state.enabled for state in fusion.fused_states(model))
        assert not same_bits(model(input_ids=ids).logits, stock(input_ids=ids).logits)


def test_revert_and_convert_again() -> None:
    model, stock, ids = llama(), llama(), token_ids(2, 8)
    classes = {name: type(module) for name, module in model.named_modules()}
    for _ in range(2):
        hf_lowprec.convert(model, "fp8-lm")
        hf_lowprec.revert(model)
        assert {name: type(module) for name, module in model.named_modules()} == classes
        assert not any("lowprec" in key for module in model.modules() for key in module.__dict__)
        assert same_bits(model(input_ids=ids).logits, stock(input_ids=ids).logits)


def test_revert_calls_what_was_registered_once_and_copies_do_not() -> None:
    model, calls = llama(), []
    hf_lowprec.convert(model, "fp8-lm")
    session_of(model).on_end(lambda: calls.append(session_of(model)))
    hf_lowprec.revert(copy.deepcopy(model))
    assert calls == []
    hf_lowprec.revert(model)
    hf_lowprec.revert(model)
    assert calls == [None], "after the conversion was taken off"


@pytest.mark.parametrize("way", ["deepcopy", "torch.save"])
def test_copies_share_among_themselves(way: str) -> None:
    model, ids = llama(), token_ids(2, 8)
    hf_lowprec.convert(model, "fp8-lm")
    losses_and_gradients(model, 1)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        other = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert fused_names(other) == EXPECTED
    mine, theirs = session_of(model).scaling.layers, session_of(other).scaling.layers
    for group in report_of(model).shared:
        assert len({id(theirs[name].operands[0].amax) for name in group}) == 1
        assert theirs[group[0]].operands[0].amax is not mine[group[0]].operands[0].amax
    for a, b in zip(losses_and_gradients(model), losses_and_gradients(other), strict=True):
        assert same_bits(a, b)
    hf_lowprec.revert(other)
    assert fused_names(other) == set() and fused_names(model) == EXPECTED
    assert not same_bits(model(input_ids=ids).logits, other(input_ids=ids).logits)


def test_a_fused_module_copied_out_of_a_model_is_freed_of_it() -> None:
    model = llama()
    hf_lowprec.convert(model, "fp8-lm")
    other = llama()
    other.model.layers[0] = copy.deepcopy(model.model.layers[0])
    report = hf_lowprec.convert(other, "fp8-lm")
    assert fused_names(other) == EXPECTED and len(report.shared) == 4
    attention = other.model.layers[0].self_attn
    assert attention.q_proj._lowprec is session_of(other).scaling.layers["model.layers.0.self_attn.q_proj"]
    assert attention.q_proj._lowprec.shared is attention.k_proj._lowprec.shared is not None


# --- with others ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["before", "after"])
def test_adapters_before_and_after_conversion(order: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)

    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(7)
        return peft.get_peft_model(model, config)

    outputs = []
    for fuse in (True, False):
        model = llama()
        if order == "before":
            model = adapted(model)
            hf_lowprec.convert(model, NO_SAVED, fuse=fuse)
        else:
            hf_lowprec.convert(model, NO_SAVED, fuse=fuse)
            model = adapted(model)
        assert len(fused_names(model)) == (7 if fuse else 0)
        outputs.append(losses_and_gradients(model))
        if fuse:
            merged = model.merge_and_unload()
            with hf_lowprec.high_precision(merged):
                expected = merged(input_ids=token_ids(2, 8)).logits
            hf_lowprec.revert(merged)
            assert same_bits(merged(input_ids=token_ids(2, 8)).logits, expected)
            assert fused_names(merged) == set()
    for a, b in zip(*outputs, strict=True):
        assert float((a - b).norm()) <= 2.0**-12 * float(b.norm()) + 1e-12


def test_checkpointing_recomputes_the_same() -> None:
    results = []
    for checkpointing in (False, True):
        model = llama()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        hf_lowprec.convert(model, "fp8-lm")
        model.train()
        results.append(losses_and_gradients(model, use_cache=False))
    for a, b in zip(*results, strict=True):
        assert same_bits(a, b)


def test_generation_is_the_unfused_one() -> None:
    texts = []
    for fuse in (True, False):
        model = llama().eval()
        hf_lowprec.convert(model, "fp8-lm", fuse=fuse)
        ids = token_ids(1, 4)
        texts.append(model.generate(ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids)))
    assert torch.equal(*texts)


# --- what is too small to gain --------------------------------------------------------------------------------------


def test_linears_below_the_break_even_stay_as_they_are() -> None:
    model = llama()
    report = hf_lowprec.convert(model, "fp8-lm", min_numel=32 * 48)
    reason = "FP8 gains nothing below 1536 elements"
    assert {name.rpartition(".")[2] for name, why in report.skipped.items() if why == reason} == {
        "q_proj", "k_proj", "v_proj", "o_proj"
    }  # fmt: skip
    assert len(report.converted) == 6 and reason in str(report)
    assert [group[0] for group in report.shared] == [f"model.layers.{i}.mlp.gate_proj" for i in range(2)]
    assert report.norms["model.layers.0.input_layernorm"] == ()
    assert hf_lowprec.convert(model, "fp8-lm") is report
    with pytest.raises(hf_lowprec.ConversionError, match="FP8 gains nothing below 9999 elements"):
        hf_lowprec.convert(llama(), "fp8-lm", min_numel=9999)
