# SPDX-License-Identifier: Apache-2.0
"""`saved_inputs: remade`: backward makes the codes of inputs again that others keep codes of, and nobody can tell."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from core import QUANTISING, assert_same_state, batch, llama, same_bits, token_ids
from glu_cases import WIDTH
from glu_cases import mlp as glu_mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hf_lowprec
from hf_lowprec import numerics, ops
from hf_lowprec.conversion import session_of
from hf_lowprec.describe import policy_rows
from hf_lowprec.fusion import fused_states
from hf_lowprec.modules.sharing import KEPT, REMADE, RemadeInput, kept_by_attention, share_input
from hf_lowprec.operands import Remake
from hf_lowprec.ops.quantize import default_cast_transpose
from hf_lowprec.ops.registry import kernel_counts
from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import Gemm, Quant, Recipe, RecipeError, Rounding, Scaling


def remade(recipe: Recipe, **changes: Any) -> Recipe:
    return replace(recipe, saved_inputs="remade", **changes)


def takes(name: str) -> bool:
    try:
        remade(PRESETS[name])
    except ValueError:
        return False
    return True


TAKING = [name for name in QUANTISING if takes(name)]
EXACT = {name: replace(PRESETS[name], saved=None) for name in TAKING}


def converted(recipe: Recipe, make: Callable[[], nn.Module] = llama, emulate: bool = True) -> nn.Module:
    model = make()
    hf_lowprec.convert(model, recipe)
    for state in fused_states(model):
        if hasattr(state, "emulate"):
            state.emulate, state.least = emulate, 0  # norms: as on a GPU, not their own forward
    return model


def pair(recipe: Recipe, make: Callable[[], nn.Module] = llama) -> tuple[nn.Module, nn.Module]:
    return converted(recipe, make), converted(remade(recipe), make)


def loss_of(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_trains_alike(
    models: tuple[nn.Module, nn.Module], loss: Callable[[Any, Tensor], Tensor] = loss_of, steps: int = 3,
    but: str = "nothing", micro_batches: int = 2,
) -> None:  # fmt: skip
    """Losses, gradients and the state of scaling, counters included; `but`: gradients that may differ."""
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in models]
    for step in range(steps):
        found = []
        for model in models:
            for part in range(micro_batches):
                value = loss(model, token_ids(2, 9, seed=7 * step + part))
                value.backward()
            found.append((value.detach(), gradients(model)))
        (loss_a, one), (loss_b, other) = found
        assert one and one.keys() == other.keys() and same_bits(loss_a, loss_b), step
        for name in one:
            assert but in name or same_bits(one[name], other[name]), (step, name)
        assert_same_state(*(session_of(model).scaling.state_dict() for model in models))
        for optimizer in optimizers:
            if but == "nothing":
                optimizer.step()
            else:
                for model in models:
                    session_of(model).scaling.roll()
            optimizer.zero_grad()


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    before, out = kernel_counts(), dict[str, int]()
    yield out
    out.update(kernel_counts() - before)


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", TAKING)
def test_training_is_the_same_bit_for_bit(recipe: str) -> None:
    assert_trains_alike(pair(EXACT[recipe]))


def test_which_recipes_take_it() -> None:
    assert {"fp8-lm", "te-current", "te-delayed", "fp8-cscale"} <= set(TAKING)
    assert not {"mxfp8", "switchback"} & set(TAKING)


@pytest.mark.parametrize("family", ["GPT2LMHead", "Phi3", "GPTNeoX", "Gemma"])
def test_other_structures(family: str) -> None:
    """Packed linears, [in, out] weights, norms with a bias, MLPs without a gate, four readers of one norm."""
    import transformers as t

    sizes: dict[str, Any] = dict(vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=0, bos_token_id=0, eos_token_id=1)  # fmt: skip
    if family == "GPT2LMHead":
        sizes = dict(vocab_size=32, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    name = family.removesuffix("LMHead")
    if name in ("Phi3", "Gemma"):
        sizes |= {"num_key_value_heads": 1}
    if name == "Gemma":
        sizes |= {"head_dim": 16}

    def make() -> nn.Module:
        torch.manual_seed(0)
        kind = f"{family}Model" if family.endswith("LMHead") else f"{family}ForCausalLM"
        return getattr(t, kind)(getattr(t, f"{name}Config")(**sizes))

    models = pair(EXACT["te-delayed"], make)
    with counted() as ran:
        assert_trains_alike(models)
    # Behind a rotation of a part of each head torch's attention for the CPU has an output that is copied.
    copied = 6 if family in ("Phi3", "GPTNeoX") else 0
    assert ran[REMADE] and ran.get(KEPT, 0) == copied, ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_and_in_bfloat16(dtype: torch.dtype) -> None:
    def loss(model: Any, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, ids)

    assert_trains_alike(pair(EXACT["fp8-lm"], lambda: llama().to(dtype)), loss)


def test_of_saved_codes_all_but_downs_weight_is_the_same() -> None:
    assert PRESETS["fp8-lm"].saved is not None
    assert_trains_alike(pair(PRESETS["fp8-lm"]), but="down_proj")


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2"])
def test_downs_gradient_is_that_of_the_product_of_what_is_saved(kind: str) -> None:
    recipe = PRESETS["fp8-lm"]
    assert recipe.saved is not None
    key = ops.quant_key(recipe.saved)
    model = converted(remade(recipe), lambda: nn.Sequential(glu_mlp(kind)))
    parts = model[0]._lowprec_glu.parts
    down, gate = getattr(model[0], parts.down), getattr(model[0], parts.gate)
    seen: dict[str, Tensor] = {}
    gate.register_forward_hook(lambda m, a, out: seen.update(gate=out.detach()))
    if parts.up not in (None, parts.gate):
        getattr(model[0], parts.up).register_forward_hook(lambda m, a, out: seen.update(up=out.detach()))
    down.register_forward_pre_hook(lambda m, a: seen.update(h=a[0].detach()))
    x, grad = batch(2, 8, WIDTH), batch(2, 8, WIDTH, seed=1)
    model(x).backward(grad)

    halves = [seen["gate"], seen.get("up")]
    if parts.up == parts.gate:
        halves = list(seen["gate"].chunk(2, -1))
    values = [None if t is None else ops.dequantize(*ops.quantize(t, key), key, torch.float32) for t in halves]
    again = numerics.activation(parts.act, values[0])
    again = again if values[1] is None else again * values[1]
    state = down._lowprec
    scale = ops.quantize(seen["h"], state.spec.fprop_input, state.operands[0].scale)[1]
    _, codes, _ = default_cast_transpose(again, state.spec.wgrad_input, scale, True, None, None, None, rows=False)
    _, g, g_scale = ops.cast_transpose(grad, state.spec.wgrad_grad_output, state.operands[2].scale, rows=False)
    operands = (g, g_scale, state.spec.wgrad_grad_output), (codes, scale, state.spec.wgrad_input)
    a, b = operands[::-1] if state.spec.weight_is_kn else operands
    expected = ops.scaled_mm(*a, *b, dtype=torch.float32, fast=state.spec.fast[2], emulate=state.spec.emulate)
    assert same_bits(down.weight.grad, expected)


def test_stochastic_rounding_draws_the_same_words() -> None:
    forward = Quant(format="e4m3fn", rounding=Rounding(mode="stochastic"))
    weight, grad = Quant(format="e4m3fn"), Quant(format="e5m2")
    recipe = Recipe(
        name="stochastic",
        fprop=Gemm(input=forward, weight=weight),
        dgrad=Gemm(grad_output=grad, weight=weight),
        wgrad=Gemm(input=forward, grad_output=grad),
    )
    models = pair(recipe)
    with counted() as ran:
        assert_trains_alike(models)
    assert ran[REMADE] and not ran.get(KEPT)
    optimizer = torch.optim.SGD(models[1].parameters(), lr=0.0)
    loss = loss_of(models[1], token_ids(2, 9))
    session_of(models[1]).scaling.roll()  # the next step's words: these would be other codes
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    optimizer.zero_grad()


# --- what runs ------------------------------------------------------------------------------------------------------


class Watched:
    """Every remake: what was made, and who still holds it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[weakref.ref[Tensor]] = []
        self.asked = 0
        columns = Remake.columns

        def watching(remake: Remake, *args: Any) -> Tensor:
            new = remake._columns is None
            out = columns(remake, *args)
            self.asked += 1
            if new:
                self.made.append(weakref.ref(out))
            return out

        monkeypatch.setattr(Remake, "columns", watching)

    @property
    def alive(self) -> int:
        gc.collect()
        return sum(reference() is not None for reference in self.made)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def test_groups_are_made_once_and_freed(watched: Watched) -> None:
    model = converted(remade(EXACT["te-current"]))
    with counted() as ran:
        loss = loss_of(model, token_ids(2, 9))
        loss.backward()
    assert ran[REMADE] == 14 and not ran.get(KEPT), "seven linears of two layers; lm_head is none"
    assert watched.asked == 14 and len(watched.made) == 8, "q/k/v, o, gate/up and down"
    assert not watched.alive, "though the graph lives"
    del loss


def test_a_graph_that_runs_twice(watched: Watched) -> None:
    model = converted(remade(EXACT["te-current"]))
    loss = loss_of(model, token_ids(2, 9))
    loss.backward(retain_graph=True)
    first = gradients(model)
    model.zero_grad()
    loss.backward()
    assert len(watched.made) == 16 and not watched.alive
    assert all(same_bits(first[name], grad) for name, grad in gradients(model).items())


def test_two_graphs_at_a_time() -> None:
    """Forward, forward, backward, backward: what one makes is not what the other reads."""
    grads = []
    for model in pair(EXACT["te-delayed"]):
        losses = [loss_of(model, token_ids(2, 9, seed=seed)) for seed in range(2)]
        losses[0].backward()
        losses[1].backward()
        grads.append(gradients(model))
    assert all(same_bits(a, b) for a, b in zip(*(g.values() for g in grads), strict=True))


class Block(nn.Module):
    """A norm, its readers in an order that can be chosen, and no attention."""

    def __init__(self, order: str = "qkv") -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v = nn.Linear(32, 48), nn.Linear(32, 48, bias=False), nn.Linear(32, 48)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return torch.stack([getattr(self, name)(h) for name in self.order]).tanh().sum(0)


def block(order: str = "qkv", recipe: Recipe = remade(EXACT["te-current"])) -> Any:  # noqa: B008
    torch.manual_seed(0)
    made = Block(order)
    hf_lowprec.convert(made, recipe)
    share_input([layer._lowprec for layer in (made.q, made.k, made.v)])
    for state in fused_states(made):  # no structure is found in a module without a config
        state.emulate, state.least = True, 0
        state.readers = (made.q._lowprec,) if recipe.saved_inputs == "remade" else ()
    return made


def test_readers_that_backward_does_not_reach(watched: Watched) -> None:
    grads = []
    for recipe in (EXACT["te-current"], remade(EXACT["te-current"])):
        model = block(recipe=recipe)
        h = model.norm(batch(2, 9, 32))
        outs = [layer(h) for layer in (model.q, model.k, model.v)]
        outs[0].sum().backward(retain_graph=True)
        assert not watched.alive
        (outs[1].sum() + outs[2].sum()).backward()
        grads.append(gradients(model))
    assert watched.asked == 3 and len(watched.made) == 2 and not watched.alive
    assert all(same_bits(a, b) for a, b in zip(*(g.values() for g in grads), strict=True))


@pytest.mark.parametrize("order", ["vkq", "qqkv", "kqvq", "qkvqkv"])
def test_used_more_than_once(order: str) -> None:
    grads = []
    for recipe in (EXACT["fp8-lm"], remade(EXACT["fp8-lm"])):
        model = block(order, recipe)
        for seed in range(2):
            model(batch(2, 9, 32, seed=seed)).sum().backward()
        grads.append(gradients(model))
    assert all(same_bits(a, b) for a, b in zip(*(g.values() for g in grads), strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool, watched: Watched) -> None:
    def make() -> nn.Module:
        model: Any = llama()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model.train()

    models = pair(EXACT["fp8-lm"], make)
    assert_trains_alike(models, micro_batches=1)
    assert len(watched.made) == 3 * 8 and not watched.alive


def test_checkpointing_around_one_linear() -> None:
    """Its producer is outside, and is not run again."""
    grads = []
    for recipe in (EXACT["te-current"], remade(EXACT["te-current"])):
        model, x = block(recipe=recipe), batch(2, 9, 32).requires_grad_()
        h = model.norm(x)
        checkpoint(model.q, h, use_reentrant=False).sum().backward()
        grads.append([x.grad, model.q.weight.grad])
    assert all(same_bits(a, b) for a, b in zip(*grads, strict=True))


def test_without_gradients_nothing_is_offered_or_counted() -> None:
    model = converted(remade(EXACT["te-current"]))
    with torch.no_grad(), counted() as ran:
        loss_of(model, token_ids(2, 9))
    model.eval()
    with torch.no_grad(), counted() as also:
        loss_of(model, token_ids(2, 9))
    assert not {REMADE, KEPT} & {*ran, *also}
    groups = {id(g): g for m in model.modules() if hasattr(m, "_lowprec") and (g := m._lowprec.shared) is not None}
    assert len(groups) == 8 and all(type(group) is RemadeInput for group in groups.values())
    gc.collect()
    assert all(group._offered.value is None and group._slot.value is None for group in groups.values())


def test_frozen_weights_keep_nothing() -> None:
    peft = pytest.importorskip("peft")

    def make() -> nn.Module:
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
        return peft.get_peft_model(llama(), lora)

    models = pair(EXACT["te-delayed"], make)
    assert all(("lora" in name) == p.requires_grad for name, p in models[1].named_parameters())
    assert not any("lora" in name for name in session_of(models[1]).report.converted)
    with counted() as ran:
        assert_trains_alike(models)
    assert not {REMADE, KEPT} & {*ran}


def test_hooks_on_saved_tensors_see_all() -> None:
    model, plain = converted(remade(EXACT["te-current"])), converted(remade(EXACT["te-current"]))
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(model, token_ids(2, 9))
    loss.backward()
    loss_of(plain, token_ids(2, 9)).backward()
    assert all(same_bits(a, b) for a, b in zip(gradients(model).values(), gradients(plain).values(), strict=True))


def test_copies_and_reverting() -> None:
    model = converted(remade(EXACT["te-current"]))
    copied = copy.deepcopy(model)
    (reader,) = copied.model.layers[0].input_layernorm._lowprec_norm.readers
    assert reader.shared is copied.model.layers[0].self_attn.k_proj._lowprec.shared
    assert reader.shared is not model.model.layers[0].self_attn.k_proj._lowprec.shared
    loss_of(copied, token_ids(2, 9)).backward()
    loss_of(model, token_ids(2, 9)).backward()
    assert all(same_bits(a, b) for a, b in zip(gradients(model).values(), gradients(copied).values(), strict=True))
    hf_lowprec.revert(model)
    loss_of(model, token_ids(2, 9)).backward()


def test_compiled_keeps_codes() -> None:
    torch.compiler.reset()
    model, plain = block(), block(recipe=EXACT["te-current"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = batch(2, 9, 32)
    with counted() as ran:
        compiled(x).sum().backward()
    torch.compile(plain, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert REMADE not in ran
    assert all(same_bits(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    torch.compiler.reset()


def test_groups_with_scales_of_their_own() -> None:
    """One norm, read by q with k, and by v, which has seen larger inputs."""

    def two(recipe: Recipe) -> Any:
        torch.manual_seed(0)
        made = Block()
        hf_lowprec.convert(made, recipe)
        share_input([made.q._lowprec, made.k._lowprec])
        for state in fused_states(made):
            state.emulate, state.least = True, 0
            state.readers = (made.q._lowprec, made.v._lowprec) if recipe.saved_inputs == "remade" else ()
        return made

    grads = []
    for model in (two(EXACT["te-delayed"]), two(remade(EXACT["te-delayed"]))):
        model.v(50 * batch(2, 9, 32)).sum().backward()
        session_of(model).scaling.roll()
        model.zero_grad()
        model(batch(2, 9, 32)).sum().backward()
        grads.append(gradients(model))
    assert all(same_bits(a, b) for a, b in zip(*(g.values() for g in grads), strict=True))


def _writes_data(module: nn.Module, args: Any, y: Tensor) -> None:
    y.data.mul_(2)


def _writes(module: nn.Module, args: Any, y: Tensor) -> None:
    y.mul_(2)


@pytest.mark.parametrize("hook", [_writes, _writes_data])
def test_a_hook_writes_what_the_norm_made(hook: Callable[..., None]) -> None:
    grads = []
    for recipe in (EXACT["te-current"], remade(EXACT["te-current"])):
        model = block(recipe=recipe)
        model.norm.register_forward_hook(hook)
        model(batch(2, 9, 32)).sum().backward()
        grads.append(gradients(model))
    assert all(same_bits(a, b) for a, b in zip(*(g.values() for g in grads), strict=True))


# --- what cannot be made again, and says so -------------------------------------------------------------------------


def test_unfused_norms_keep_codes_and_are_counted() -> None:
    model, plain = converted(remade(EXACT["te-current"]), emulate=False), converted(EXACT["te-current"], emulate=False)
    with counted() as ran:
        loss_of(model, token_ids(2, 9)).backward()
    assert ran[KEPT] == 2 * 5 and ran[REMADE] == 2 * 2
    loss_of(plain, token_ids(2, 9)).backward()
    assert all(same_bits(a, b) for a, b in zip(gradients(model).values(), gradients(plain).values(), strict=True))


def test_eager_attention_keeps_codes() -> None:
    model = converted(remade(EXACT["te-current"]), lambda: llama(attn_implementation="eager"))
    with counted() as ran:
        loss_of(model, token_ids(2, 9)).backward()
    assert ran[KEPT] == 2 and ran[REMADE] == 12


def test_what_attention_keeps() -> None:
    q = batch(1, 16, 2, 8).requires_grad_().transpose(1, 2)
    out = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert kept_by_attention(out.transpose(1, 2).reshape(1, 16, 16)) and kept_by_attention(out)
    assert not kept_by_attention(out + 0)
    assert not kept_by_attention(out.reshape(1, 2, 128)), "this copies"
    mask = torch.zeros(16, 16).requires_grad_()  # by matrix products, whose output nobody keeps
    assert not kept_by_attention(torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask))
    assert not kept_by_attention(q) and not kept_by_attention(q.detach())


def test_the_report_says_what_is_made_of_what() -> None:
    model = llama()
    report = hf_lowprec.convert(model, remade(PRESETS["fp8-lm"]))
    text = str(report)
    assert "input made again in backward: 2 x model.layers.*.mlp.down_proj, from gate and up as they are kept" in text
    assert "2 x model.layers.*.self_attn.q_proj, by model.layers.*.input_layernorm" in text
    assert "input kept as codes unless attention keeps it: 2 x model.layers.*.self_attn.o_proj" in text
    other = llama()
    unfused = str(hf_lowprec.convert(other, remade(PRESETS["fp8-lm"]), fuse=False))
    assert "input made again" not in unfused and "mlp.down_proj" in unfused.split("unless attention keeps it")[-1]
    plain = llama()
    assert "again" not in str(hf_lowprec.convert(plain, "fp8-lm"))


@pytest.mark.parametrize("which", ["norm", "attention", "gate"])
def test_written_in_between_is_an_error(which: str) -> None:
    model: Any = converted(remade(EXACT["te-current"]))
    layer, kept = model.model.layers[0], []
    watched: dict[str, tuple[nn.Module, Callable[..., Tensor]]] = {
        "norm": (layer.input_layernorm, lambda args, out: args[0]),
        "attention": (layer.self_attn.o_proj, lambda args, out: args[0]),
        "gate": (layer.mlp.gate_proj, lambda args, out: out),
    }
    module, pick = watched[which]
    module.register_forward_hook(lambda m, args, out: kept.append(pick(args, out)))
    loss = loss_of(model, token_ids(2, 9))
    with torch.no_grad():
        kept[0].mul_(2)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        loss.backward()


def test_written_before_it_is_read() -> None:
    """The linears read something else than the norm made."""
    grads = []
    for recipe in (EXACT["te-current"], remade(EXACT["te-current"])):
        model = block(recipe=recipe)
        h = model.norm(batch(2, 9, 32))
        first = model.q(h)
        h = h + 0
        h.add_(1.0)
        (first.sum() + model.k(h).sum()).backward()
        h = model.norm(batch(2, 9, 32))
        h.data = h.data * 2
        model.v(h).sum().backward()
        grads.append(gradients(model))
    assert all(same_bits(a, b) for a, b in zip(*(g.values() for g in grads), strict=True))


def test_freed_memory_is_an_error() -> None:
    model = block()
    loss = model(batch(2, 9, 32)).sum()
    size = model.norm.weight.untyped_storage().nbytes()
    model.norm.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="a norm's weight is freed"):
        loss.backward()
    model.norm.weight.untyped_storage().resize_(size)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("mxfp8", {}, "one scale for the tensor"),
        ("switchback", {}, "wgrad.input has to be fprop.input"),
        ("fp8-flex", {}, "searched and learned"),
        ("bf16", {}, "wgrad.input has to be fprop.input"),
        ("te-current", {"wgrad": Gemm()}, "wgrad.input has to be fprop.input"),
        ("te-current", {"wgrad": Gemm(input=PRESETS["te-current"].wgrad.input)}, "wgrad.grad_output has to be"),
        ("te-current", {"wgrad": replace(PRESETS["te-current"].wgrad, input=Quant(format="e5m2", scaling=Scaling()))},
         "wgrad.input has to be fprop.input"),
        ("bitnet", {}, "input_norm changes it"),
    ],
)  # fmt: skip
def test_recipes_that_cannot(name: str, changes: dict[str, Any], words: str) -> None:
    data = {**replace(PRESETS[name], **changes).to_dict(), "saved_inputs": "remade"}
    with pytest.raises(RecipeError, match=words):
        Recipe.from_dict(data)


def test_the_field_is_checked_and_travels() -> None:
    recipe = remade(PRESETS["fp8-lm"])
    rows = dict(policy_rows(recipe))
    assert "not forward's" in rows["saved by linears"]
    assert "saved by linears" not in dict(policy_rows(PRESETS["fp8-lm"]))
    assert "not forward's" not in dict(policy_rows(remade(EXACT["fp8-lm"])))["saved by linears"]
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe and PRESETS["fp8-lm"].saved_inputs == "codes"
    with pytest.raises(RecipeError, match="saved_inputs"):
        Recipe.from_dict({**recipe.to_dict(), "saved_inputs": "sometimes"})


@pytest.mark.parametrize("saved", [None, PRESETS["fp8-lm"].saved])
def test_resuming_with_another_value(saved: Quant | None) -> None:
    """No number depends on it where gate and up are kept as they are."""
    recipe = replace(PRESETS["fp8-lm"], saved=saved)
    one, other = (session_of(model) for model in pair(recipe))
    if saved is None:
        one.load_state_dict(other.state_dict())
        other.load_state_dict(one.state_dict())
    else:
        for a, b in ((one, other), (other, one)):
            with pytest.raises(ValueError, match="saved_inputs differ"):
                a.load_state_dict(b.state_dict())


@pytest.mark.parametrize("how", ["ddp", "fsdp2", "fsdp2 alone"])
def test_wrapped(how: str, tmp_path: Any) -> None:
    """One process; `alone`: each linear and norm is a unit, before which FSDP makes another tensor of the input."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        grads = []
        for recipe in (EXACT["te-delayed"], remade(EXACT["te-delayed"])):
            model: Any = converted(recipe)
            if how == "ddp":
                model = nn.parallel.DistributedDataParallel(model)
            else:
                mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
                for layer in model.model.layers:
                    for part in list(layer.modules()) if "alone" in how else []:
                        if part is not layer and list(part.parameters(recurse=False)):
                            fully_shard(part, mesh=mesh)
                    fully_shard(layer, mesh=mesh)
                fully_shard(model, mesh=mesh)
            with counted() as ran:
                for seed in range(2):
                    loss_of(model, token_ids(2, 9, seed=seed)).backward()
            grads.append({name: p.grad for name, p in model.named_parameters()})
        assert {REMADE, KEPT} & {*ran} == {KEPT if "alone" in how else REMADE}
        for name, grad in grads[0].items():
            other = grads[1][name]
            assert same_bits(*(g.full_tensor() if hasattr(g, "full_tensor") else g for g in (grad, other))), name
    finally:
        dist.destroy_process_group()
