# SPDX-License-Identifier: Apache-2.0
"""Models at unit scale: that the folded model is the papers' model, what is kept of loaded weights, and that FP8
without any scale from data trains."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from decoders import KINDS, LENGTH, decoder, outputs, rms, text
from torch import Tensor, nn

import hf_lowprec
from hf_lowprec.conversion import ConversionError, session_of
from hf_lowprec.decoder import find_decoder, in_features
from hf_lowprec.numerics import unit
from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import Gemm, Recipe, RecipeError, Transform
from hf_lowprec.transform import is_fresh

BOTH = ("unit-scaling", "u-mup")


def unquantised(name: str, **transform: Any) -> Recipe:
    """The recipe's model in float32."""
    recipe = PRESETS[name]
    changed = replace(recipe.transform, **transform)
    return replace(recipe, fprop=Gemm(), dgrad=Gemm(), wgrad=Gemm(), base="no", transform=changed)


def trained(kind: str, steps: int = 2) -> Any:
    """A model that is not fresh any more."""
    model = decoder(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for ids in text(steps, length=16):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


# --- a fresh model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BOTH)
def test_activations_are_at_unit_scale(name: str, kind: str) -> None:
    model = decoder(kind)
    parts = find_decoder(model)
    report = hf_lowprec.convert(model, name)
    assert report.transform is not None and "fresh weights brought to it" in report.summary()
    seen = outputs(model, text(1)[0])
    sigma = 1.0
    for branch in parts.branches:
        for linear in branch.begin:
            assert 0.9 < seen[linear] < 1.1
        assert 0.5 < seen[branch.end] < 2  # of two layers: a branch's residual weight is 2^-1/2
        sigma = math.hypot(sigma, 2**-0.5)
    layers = {n: r for n, r in seen.items() if n.rpartition(".")[2].isdigit()}
    assert list(layers.values()) == pytest.approx([2**0.5, 3**0.5], rel=0.25)
    assert sigma == pytest.approx(3**0.5)
    logits = 1.0 if name == "unit-scaling" else 64**-0.5
    assert seen["lm_head"] == pytest.approx(logits, rel=0.1)


@pytest.mark.parametrize("layers,length", [(1, 64), (8, 64), (4, 512)])
def test_depth_width_and_length(layers: int, length: int) -> None:
    sizes = {"hidden_size": 96, "intermediate_size": 160, "max_position_embeddings": length}
    model = decoder("llama", num_hidden_layers=layers, **sizes)
    hf_lowprec.convert(model, unquantised("u-mup"))
    seen = outputs(model, text(1, rows=1, length=length)[0])
    for name, value in seen.items():
        last = name.rpartition(".")[2]
        if last in ("o_proj", "down_proj"):
            assert 0.5 < value * math.sqrt(layers) < 2
        elif last.isdigit():
            assert 0.5 < value < 2
            assert value == pytest.approx(math.sqrt(1 + 2 * (int(last) + 1) / layers), rel=0.25)
        elif last != "lm_head":
            assert 0.5 < value < 2


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_at_the_scale_of_their_casts(kind: str) -> None:
    model = decoder(kind)
    hf_lowprec.convert(model, "unit-scaling")
    session, (ids,) = session_of(model), text(1)
    assert session is not None
    seen: dict[str, float] = {}

    def listen(name: str) -> Any:
        return lambda module, args, out: out.register_hook(lambda g: seen.__setitem__(name, rms(g))) and None

    for name in session.scaling.layers:
        model.get_submodule(name).register_forward_hook(listen(name))
    model(input_ids=ids, labels=ids).loss.backward()
    for name, layer in session.scaling.layers.items():
        assert 0.3 < seen[name] / float(layer.operands[2].scale) < 3, name
        assert 0.7 < rms(model.get_submodule(name).weight) / float(layer.operands[1].scale) < 1.42
    counters = hf_lowprec.monitor.statistics(model)
    assert all(value < 0.02 for key, value in counters.items() if "saturated" in key)


def unit_llama(model: Any, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """u-muP's Llama, written with the operations of `numerics.unit`, from the folded weights of `model`.

    Returns logits and the unit-scaled weights, which require gradients.
    """
    config, weights = model.config, dict[str, Tensor]()
    layers, heads, width = config.num_hidden_layers, config.num_attention_heads, config.head_dim

    def weight(name: str) -> Tensor:
        value = model.get_submodule(name).weight.detach()
        weights[name] = (value / rms(value)).requires_grad_()
        return weights[name]

    def split(x: Tensor, n: int) -> Tensor:
        return x.view(*x.shape[:-1], n, width).transpose(1, 2)

    x = unit.embedding(ids, weight("model.embed_tokens"))
    cos, sin = model.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
    rotate = type(model).__module__
    apply = __import__(rotate, fromlist=["apply_rotary_pos_emb"]).apply_rotary_pos_emb
    for i in range(layers):
        part = f"model.layers.{i}.self_attn."
        branch, rest = unit.residual_split(x, unit.residual_tau(2 * i, 2 * layers))
        h = unit.norm(branch, eps=config.rms_norm_eps)
        q, k, v = (unit.linear(h, weight(part + n)) for n in ("q_proj", "k_proj", "v_proj"))
        q, k = apply(split(q, heads), split(k, config.num_key_value_heads), cos, sin)
        v = split(v, config.num_key_value_heads)
        k, v = (t.repeat_interleave(heads // config.num_key_value_heads, 1) for t in (k, v))
        shared = unit.attention_share(i, layers)
        h = unit.attention(q, k, v, mult=math.sqrt(width), shared=shared).transpose(1, 2).flatten(2)
        x = unit.residual_add(unit.linear(h, weight(part + "o_proj")), rest, unit.residual_tau(2 * i, 2 * layers))
        part = f"model.layers.{i}.mlp."
        tau = unit.residual_tau(2 * i + 1, 2 * layers)
        branch, rest = unit.residual_split(x, tau)
        h = unit.norm(branch, eps=config.rms_norm_eps)
        h = unit.silu_glu(unit.linear(h, weight(part + "up_proj")), unit.linear(h, weight(part + "gate_proj")))
        x = unit.residual_add(unit.linear(h, weight(part + "down_proj")), rest, tau)
    return unit.readout(unit.norm(x, eps=config.rms_norm_eps), weight("lm_head")), weights


def test_the_folded_model_is_the_unit_scaled_model() -> None:
    """The same logits, and the same gradients but for a constant per tensor, which Adam does not see."""
    model = decoder("llama", num_hidden_layers=3, rms_norm_eps=1e-12)
    hf_lowprec.convert(model, unquantised("u-mup"))
    (ids,) = text(1)
    folded = model(input_ids=ids).logits
    logits, weights = unit_llama(model, ids)
    torch.testing.assert_close(logits, folded, rtol=0.02, atol=2e-3)  # glu's constant: a fit there, an integral here
    torch.nn.functional.cross_entropy(folded[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    unit.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, weight in weights.items():
        ours = model.get_submodule(name).weight.grad
        assert float(nn.functional.cosine_similarity(ours.flatten(), weight.grad.flatten(), 0)) > 0.999, name


def test_constants_do_not_look_at_data() -> None:
    model = decoder("llama")
    hf_lowprec.convert(model, "u-mup")
    session = session_of(model)
    assert session is not None
    before = [float(o.scale) for layer in session.scaling.layers.values() for o in layer.operands[:2]]
    assert all(math.log2(scale).is_integer() for scale in before)
    optimizer = hf_lowprec.attach_optimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    grads = []
    for ids in text(2):
        (model(input_ids=ids, labels=ids).loss * 1000).backward()
        optimizer.step()
        grads.append([float(layer.operands[2].scale) for layer in session.scaling.layers.values()])
    assert before == [float(o.scale) for layer in session.scaling.layers.values() for o in layer.operands[:2]]
    assert grads[0] == grads[1]
    model(input_ids=text(1, rows=16)[0], labels=text(1, rows=16)[0]).loss.backward()  # a mean over four times as many
    assert [4 * float(layer.operands[2].scale) for layer in session.scaling.layers.values()] == grads[0]


def test_seed_decides_and_the_draws_are_kept() -> None:
    stock, model = decoder("llama"), decoder("llama")
    hf_lowprec.convert(model, "u-mup")
    for (name, before), after in zip(stock.named_parameters(), model.parameters(), strict=True):
        if before.dim() == 2:
            torch.testing.assert_close(after / rms(after), before / rms(before), msg=name)
    q = "model.layers.0.self_attn.q_proj"
    assert rms(model.get_submodule(q).weight) == pytest.approx(64**-0.5, rel=1e-5)
    assert rms(model.lm_head.weight) == pytest.approx(1 / 64, rel=1e-5)


# --- a loaded model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BOTH)
def test_loaded_weights_keep_their_function(name: str, kind: str) -> None:
    model = trained(kind)
    (ids,), stock = text(1), copy.deepcopy(model)
    expected = model(input_ids=ids).logits
    report = hf_lowprec.convert(model, unquantised(name))
    assert "loaded weights as they are" in str(report.transform)
    assert torch.equal(model(input_ids=ids).logits, expected)
    hf_lowprec.revert(model)
    hf_lowprec.convert(model, name)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), stock.parameters(), strict=True))
    with hf_lowprec.high_precision(model):
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    quantised = model(input_ids=ids).logits
    assert rms(quantised - expected) < 0.1 * rms(expected) and not torch.equal(quantised, expected)
    session = session_of(model)
    assert session is not None and not session.learning_rates()
    for linear, layer in session.scaling.layers.items():
        assert 0.7 < rms(model.get_submodule(linear).weight) / float(layer.operands[1].scale) < 1.42


@pytest.mark.parametrize("kind", KINDS)
def test_what_counts_as_fresh(kind: str) -> None:
    def fresh(model: Any) -> bool:
        parts = find_decoder(model)
        return is_fresh(model, parts, {n: rms(model.get_submodule(n).weight)
                                       for n in (*parts.linears, *parts.embeddings)})  # fmt: skip

    model = decoder(kind)
    assert fresh(model)
    with torch.no_grad():
        norm = model.get_submodule(find_decoder(model).norm)
        norm.weight[0] += 1e-3
        assert not fresh(model)
        norm.weight[0] = 1.0
        assert fresh(model)
        model.get_submodule(find_decoder(model).branches[0].begin[0]).weight.mul_(1.2)
    assert not fresh(model)
    assert not fresh(trained(kind, steps=1))


def test_large_weights_are_fresh_within_chance() -> None:
    """Gains of bf16 models stay at 1 for hundreds of steps, so the matrices have to tell."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4,
        pad_token_id=0,
    )  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(dtype)
        with torch.no_grad():
            model.model.embed_tokens.weight[:8] = 0  # padding is no training
        copied = copy.deepcopy(model)
        assert hf_lowprec.convert(model, "u-mup").transform.startswith("fresh")
        with torch.no_grad():
            copied.model.layers[0].mlp.down_proj.weight.mul_(1.025)
        assert hf_lowprec.convert(copied, "u-mup").transform.startswith("loaded")


@pytest.mark.parametrize("name", BOTH)
def test_linears_beside_the_decoder_are_left_alone(name: str) -> None:
    """A value head, a vision tower: no constant is known for them."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm = decoder("llama")
            self.tower = nn.Linear(64, 64)

        def forward(self, **inputs: Any) -> Any:
            return self.lm(**inputs)

    model = Beside()
    report = hf_lowprec.convert(model, name)
    assert type(model.tower) is nn.Linear and "no part of the residual stream" in str(report)
    (ids,) = text(1, length=16)
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(session_of(model).scaling.layers) == (14 if name == "unit-scaling" else 10)


def test_a_wrapped_head_is_named() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ConversionError, match=r"no language-model head .*a linear, but a ModulesToSaveWrapper"):
        hf_lowprec.convert(peft.get_peft_model(decoder("llama"), config), "u-mup")


def test_init_can_be_asked_for_and_refused() -> None:
    fresh, loaded = decoder("llama"), trained("llama")
    before = fresh.lm_head.weight.detach().clone()
    assert "loaded" in str(hf_lowprec.convert(fresh, "u-mup", init=False).transform)
    assert torch.equal(fresh.lm_head.weight, before)
    assert "fresh" in str(hf_lowprec.convert(loaded, "u-mup", init=True).transform)
    assert rms(loaded.model.embed_tokens.weight) == pytest.approx(1, rel=1e-5)
    with pytest.raises(ConversionError, match="already converted with init=False"):
        hf_lowprec.convert(fresh, "u-mup", init=True)
    with pytest.raises(ConversionError, match="has no transform"):
        hf_lowprec.convert(decoder("llama"), "te-current", init=True)
    with pytest.raises(TypeError, match="init"):
        hf_lowprec.convert(decoder("llama"), "u-mup", init="yes")  # type: ignore[arg-type]


# --- living with it -------------------------------------------------------------------------------------------------


def train(model: Any, recipe: str | Recipe, batches: list[Tensor], lr: float = 1e-3) -> list[float]:
    hf_lowprec.convert(model, recipe)
    optimizer = hf_lowprec.attach_optimizer(model, torch.optim.AdamW(model.parameters(), lr=lr))
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("name", BOTH)
def test_fp8_without_scales_trains(name: str) -> None:
    batches = text(20, length=32)
    low, high = (train(decoder("llama"), recipe, batches, lr=2e-3) for recipe in (name, unquantised(name)))
    assert sum(low[-5:]) / 5 < low[0] - 0.8
    assert abs(sum(low[-5:]) - sum(high[-5:])) / 5 < 0.05


def test_without_the_transform_the_same_casts_lose_the_gradients() -> None:
    lost = []
    for recipe in (PRESETS["unit-scaling"], replace(PRESETS["unit-scaling"], transform=Transform())):
        model, (ids,) = decoder("llama"), text(1)
        hf_lowprec.convert(model, recipe)
        model(input_ids=ids, labels=ids).loss.backward()
        lost.append(hf_lowprec.monitor.statistics(model)["lowprec/grad_output_underflow"])
    assert lost[0] < 0.01 and lost[1] > 0.3


def test_critical_matmuls_stay_in_the_base_precision() -> None:
    report = hf_lowprec.convert(decoder("llama"), "u-mup")
    assert {name.rpartition(".")[2] for name in report.converted} == {
        f"{n}_proj" for n in ("q", "k", "v", "gate", "up")
    }
    assert "critical for u-muP" in report.skipped["model.layers.0.mlp.down_proj"]
    assert "model.layers.0.mlp.down_proj" in hf_lowprec.convert(decoder("llama"), "unit-scaling").converted


def test_gradient_checkpointing_changes_nothing() -> None:
    losses = []
    for checkpointing in (False, True):
        model = decoder("llama")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        losses.append(train(model, "unit-scaling", text(3, length=16)))
    assert losses[0] == losses[1]


def test_compiles_without_a_break() -> None:
    model = decoder("llama", num_hidden_layers=1)
    hf_lowprec.convert(model, "u-mup")
    (ids,) = text(1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = model(input_ids=ids, labels=ids).loss
    loss = compiled(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_generates_and_is_reverted(tmp_path: Any) -> None:
    model = decoder("llama")
    train(model, "u-mup", text(2, length=16))
    ids = text(1)[0][:, :8]
    model.eval()
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (4, 12)
    with hf_lowprec.high_precision(model):
        expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()  # by a transformers that knows nothing of us
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="the weights stay at unit scale"):
        hf_lowprec.revert(model)
    assert all(type(module).__module__.partition(".")[0] != "hf_lowprec" for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(model(input_ids=ids).logits, expected)


def test_twice_is_once() -> None:
    model = decoder("llama")
    report = hf_lowprec.convert(model, "u-mup")
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert hf_lowprec.convert(model, "u-mup") is report and hf_lowprec.convert(model, "u-mup", init=True) is report
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    with pytest.raises(ConversionError, match="already converted"):
        hf_lowprec.convert(model, "unit-scaling")


def test_copies_and_pickles() -> None:
    model = decoder("llama")
    hf_lowprec.convert(model, "u-mup")
    twin, file = copy.deepcopy(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    (ids,) = text(1)
    expected = model(input_ids=ids, labels=ids).loss
    for other in (twin, torch.load(file, weights_only=False)):
        assert torch.equal(other(input_ids=ids, labels=ids).loss, expected)
        session = session_of(other)
        assert session is not None and session.transform is not None and session is not session_of(model)
        assert session.transform.tokens == 256  # noted by the copy's own hook
        assert [layer for layer, _ in session.transform.gradients] == list(session.scaling.layers.values())


def test_resumes_where_it_stopped() -> None:
    """Constants and learning rates come from the checkpoint: its weights alone look like any loaded ones."""

    def step(model: Any, optimizer: Any, ids: Tensor) -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    def start(model: Any) -> Any:
        hf_lowprec.convert(model, "unit-scaling")
        return hf_lowprec.attach_optimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-3))

    batches, first = text(5, length=16), decoder("llama")
    optimizer = start(first)
    for ids in batches[:3]:
        step(first, optimizer, ids)
    weights, states = copy.deepcopy(first.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = [step(first, optimizer, ids) for ids in batches[3:]]

    second = decoder("llama", seed=5)
    second.load_state_dict(weights)  # before it is converted, as the Trainer does
    resumed = start(second)
    assert not session_of(second).learning_rates()  # type: ignore[union-attr]
    resumed.load_state_dict(states)
    assert "fresh" in str(session_of(second).report.transform)  # type: ignore[union-attr]
    assert [step(second, resumed, ids) for ids in batches[3:]] == expected


def test_lora_trains_on_loaded_weights() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(trained("llama"), peft.LoraConfig(r=4, target_modules="all-linear"))
    losses = train(model, "unit-scaling", 4 * text(1, length=16), lr=1e-2)
    assert losses[-1] < losses[0] and len(session_of(model).scaling.layers) == 14  # type: ignore[union-attr]


def test_refuses_with_the_reason() -> None:
    with pytest.raises(ConversionError, match=r"needs a decoder.*no language-model head"):
        hf_lowprec.convert(nn.Sequential(nn.Linear(32, 32)), "u-mup")
    model = decoder("llama")
    model.lm_head.to("meta")
    with pytest.raises(ConversionError, match="lm_head has no values"):
        hf_lowprec.convert(model, "u-mup")
    model = decoder("llama")
    nn.init.zeros_(model.lm_head.weight)
    with pytest.raises(ConversionError, match="lm_head has RMS 0"):
        hf_lowprec.convert(model, "u-mup")
    assert session_of(model) is None and float(model.model.embed_tokens.weight.std()) == pytest.approx(0.02, rel=0.1)


def test_a_report_without_values() -> None:
    """`hf-lowprec inspect` builds models on the meta device."""
    with torch.device("meta"):
        model = decoder("llama")
    report = hf_lowprec.convert(model, "u-mup")
    assert len(report.converted) == 10 and "as if fresh" in report.summary()
    model.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="revert, load or initialise it"):
        model(input_ids=text(1)[0])


def test_recipes_are_checked() -> None:
    with pytest.raises(RecipeError, match="base"):
        Recipe.from_dict({**PRESETS["u-mup"].to_dict(), "base": "fp16", "loss_scale": {"method": "dynamic"}})
    with pytest.raises(RecipeError, match="scaling method 'none'"):
        Recipe.from_dict({**PRESETS["te-current"].to_dict(), "transform": {"method": "unit"}})
    with pytest.raises(ValueError, match="native"):
        Transform(method="unit", learning_rate="native")
    with pytest.raises(ValueError, match="residual"):
        Transform(method="unit", residual=0.0)
    data = {**PRESETS["u-mup"].to_dict(), "name": "mine"}
    data["transform"]["sequence_length"] = 32
    assert Recipe.from_dict(data).transform.sequence_length == 32 and Recipe.from_dict(data).transform.critical


def test_residual_weights_reach_the_weights() -> None:
    def end(**transform: Any) -> tuple[float, float]:
        model = decoder("llama")
        hf_lowprec.convert(model, unquantised("u-mup", **transform))
        layer = model.model.layers[0]
        return rms(layer.self_attn.o_proj.weight), rms(layer.mlp.down_proj.weight)

    attention, mlp = end()
    assert end(residual=2.0) == pytest.approx((2 * attention, 2 * mlp), rel=1e-5)
    more, less = end(attention_ratio=2.0)
    assert (more / attention) / (less / mlp) == pytest.approx(2, rel=1e-5)
    assert end(sequence_length=LENGTH) == pytest.approx((attention, mlp), rel=1e-5)
    assert end(sequence_length=16)[0] < attention
    assert in_features(decoder("llama").lm_head) == 64


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fused_and_unfused_train_alike(kind: str) -> None:
    losses = []
    for fuse in (False, True):
        model = decoder(kind)
        hf_lowprec.convert(model, "unit-scaling", fuse=fuse)
        losses.append(train(model, "unit-scaling", text(3, length=16)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
