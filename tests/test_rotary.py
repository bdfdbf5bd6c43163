# SPDX-License-Identifier: Apache-2.0
"""Fused rotary embeddings: which models have them, that nobody can tell from the bits, and that the modeling file's
function is put back.

The CPU runs the operator's plain-torch implementation here (`emulate`); the kernel is held to that.
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import inspect
import io
import itertools
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from core import batch, llama, token_ids
from torch import Tensor, nn
from torch.autograd import forward_ad

import hf_lowprec
from hf_lowprec.conversion import session_of
from hf_lowprec.fusion import fused_states
from hf_lowprec.modules import rotary_use
from hf_lowprec.modules.rotary import Rule, turn
from hf_lowprec.modules.rotary_kind import RotaryKind, branches, plain_function, rotary_kind
from hf_lowprec.ops.rotary import rotary, rotary_backward

pytest.importorskip("transformers")
F, B, H = torch.float32, torch.bfloat16, torch.float16
NAME = "apply_rotary_pos_emb"
LLAMA = "transformers.models.llama.modeling_llama"


def file(model: str) -> Any:
    return importlib.import_module(f"transformers.models.{model}.modeling_{model}")


def bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(torch.int16 if x.dtype.itemsize == 2 else torch.int32)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Rule]]:
    """CPU tensors take the operators; what they were called with."""
    gc.collect()  # patches of models that are gone
    calls: list[Rule] = []

    def noted(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        if q.device.type == "cpu":  # not of `convert`, which follows a forward on the meta device
            calls.append(rule)
        return turn(q, k, cos, sin, rule)

    original = rotary_use._Patch.__init__

    def emulating(self: Any, *args: Any) -> None:
        original(self, *args)
        self.emulate = True

    monkeypatch.setattr(rotary_use._Patch, "__init__", emulating)
    monkeypatch.setattr(rotary_use, "turn", noted)
    monkeypatch.setattr(rotary_use, "_PATCHES", {})
    yield calls


# --- which function -------------------------------------------------------------------------------------------------

PLAIN = RotaryKind(wide=False, back=False, once=False, joined=False)
KINDS: dict[str, RotaryKind | None] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "mixtral", "gemma"), PLAIN),
    **dict.fromkeys(("gpt_neox", "phi3"), PLAIN._replace(joined=True)),
    "olmo2": PLAIN._replace(back=True),
    "modernbert": PLAIN._replace(back=True, wide=True),
    "hunyuan_vl": PLAIN._replace(back=True, wide=True, once=True),
    **dict.fromkeys(("cohere", "gptj", "nanochat", "gpt_oss", "glm", "gemma3n"), None),
}


@pytest.mark.parametrize("model", KINDS)
def test_kinds(model: str) -> None:
    assert rotary_kind(getattr(file(model), NAME)) == KINDS[model]


@pytest.mark.parametrize("model", [model for model, kind in KINDS.items() if kind is not None])
def test_bits_of_the_models_function(model: str) -> None:
    """Other shapes than the probe's; float32 cosines beside bfloat16 queries; gradients of q, k, both; zeros' sign."""
    function, kind = getattr(file(model), NAME), KINDS[model]
    assert kind is not None
    for dtype, table, dim, width in itertools.product((F, B, H), (F, B), (1, 2), (24, 10) if kind.joined else (24,)):
        q, k = (batch(2, 7, heads, 24, seed=heads, dtype=dtype) for heads in (4, 2))
        q[:, 2] *= 0
        cos, sin = (batch(2, 7, width, seed=9 + i, dtype=table) for i in range(2))
        if dim == 1:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        rule = kind.rule(dim, (dtype, dtype, table, table), (q.shape, k.shape, cos.shape, sin.shape))
        assert rule is not None
        for trains in ((True, True), (True, False), (False, True)):
            leaves = [x.detach().requires_grad_(on) for x, on in zip((q, k), trains, strict=True)]
            wanted = [x for x in leaves if x.requires_grad]
            found = []
            for call in (lambda *t, dim=dim: function(*t, unsqueeze_dim=dim), lambda *t, rule=rule: turn(*t, rule)):
                results = call(*leaves, cos, sin)
                grads = [batch(*y.shape, seed=3, dtype=y.dtype) * (y != 0) * -1 for y in results]
                assert tuple(y.requires_grad for y in results) == trains
                some = [(y, g) for y, g in zip(results, grads, strict=True) if y.requires_grad]
                found.append([*results, *torch.autograd.grad([y for y, _ in some], wanted, [g for _, g in some])])
            for theirs, ours in zip(*found, strict=True):
                assert theirs.dtype == ours.dtype and torch.equal(bits(theirs), bits(ours))
            assert [y.stride() for y in found[0][:2]] == [y.stride() for y in found[1][:2]]


def test_only_one_result_is_used() -> None:
    q, k = (batch(1, 3, 2, 8, seed=i).requires_grad_() for i in range(2))
    cos, sin = batch(1, 3, 8), batch(1, 3, 8, seed=4)
    turned, _ = turn(q, k, cos, sin, Rule(2, F, F, F, False))
    turned.sum().backward()
    assert q.grad is not None and k.grad is None
    with pytest.raises(RuntimeError, match="once_differentiable"):
        y, _ = turn(q, k, cos, sin, Rule(2, F, F, F, False))
        (g,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
        g.sum().backward()


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("dtype", [B, F])
def test_opcheck(joined: bool, dtype: torch.dtype) -> None:
    q, k = batch(2, 5, 3, 8, dtype=dtype).transpose(1, 2), batch(2, 5, 2, 8, dtype=dtype).transpose(1, 2)
    cos, sin = batch(1, 5, 6 if joined else 8), batch(1, 5, 6 if joined else 8)
    args = (q, k, cos, sin, 1, F, dtype, joined)
    torch.library.opcheck(torch.ops.hf_lowprec.rotary.default, args)
    a, b = rotary(*args)
    for grads in ((a, b), (None, b)):
        args = (*grads, cos, sin, 1, dtype, dtype, q.stride(), k.stride())
        torch.library.opcheck(torch.ops.hf_lowprec.rotary_backward.default, args)
    assert rotary_backward(*args)[0].numel() == 0


def test_a_function_with_a_branch_is_left_alone() -> None:
    assert not branches(inspect.unwrap(getattr(file("llama"), NAME))) and branches(getattr(file("qwen4_exp"), NAME))
    module = types.ModuleType("transformers.made_up")
    exec(f"def {NAME}(q, k, cos, sin, unsqueeze_dim=1):\n    return (q, k) if q.is_cuda else (q, k)", vars(module))
    sys.modules[module.__name__] = module
    try:
        assert rotary_use.problem(module.__name__, NAME) == f"{NAME} may compute something else from call to call"
    finally:
        del sys.modules[module.__name__]


def test_what_the_kernels_library_makes_of_a_function() -> None:
    """A module without weights, whose forward it replaces on the instance to exchange it."""
    original = inspect.unwrap(getattr(file("llama"), NAME))  # a converted model may live

    def hub(function: Callable[..., Any]) -> nn.Module:
        class Func(nn.Module):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return function(*args, **kwargs)

        return Func()

    function = hub(original)
    assert plain_function(function) is original and rotary_kind(function) == PLAIN
    function.forward = lambda *args: args
    assert plain_function(function) is None


# --- models ---------------------------------------------------------------------------------------------------------

MODELS = ["llama", "qwen2", "qwen3", "mistral", "mixtral", "gemma", "phi3", "gpt_neox", "olmo2"]


def decoder(kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    if kind == "phi3":
        sizes["partial_rotary_factor"] = 0.5
    config = transformers.AutoConfig.for_model(kind, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config).train()


def losses_and_gradients(model: nn.Module, **kwargs: Any) -> list[Tensor]:
    model.zero_grad()
    out = []
    for step in range(2):
        ids = token_ids(2, 8, seed=step)
        loss = model(input_ids=ids, labels=ids, **kwargs).loss
        loss.backward()
        out.append(loss.detach())
    return [*out, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("weights", ["float32", "float32, autocast", "bfloat16"])
@pytest.mark.parametrize("kind", MODELS)
def test_training_has_the_same_bits(kind: str, weights: str, emulated: list[Rule]) -> None:
    plain = decoder(kind).to(B if weights == "bfloat16" else F)
    ours = copy.deepcopy(plain)
    hf_lowprec.convert(plain, "te-current", fuse=False)
    results = []
    for model in (plain, ours):
        if model is ours:
            report = hf_lowprec.convert(ours, "te-current")
            assert len(report.rotary) == 2 and not report.unfused_rotary
            assert "2 of 2 rotary embeddings" in report.summary()
            assert "fused rotary embedding: 2 x " in str(report)
            for state in fused_states(ours):  # what rounds otherwise
                state.enabled = False
        with torch.autocast("cpu", B, weights == "float32, autocast"):
            results.append(losses_and_gradients(model))
    assert len(emulated) == 4
    names = ["loss"] * 2 + [name for name, _ in plain.named_parameters()]
    for name, theirs, mine in zip(names, *results, strict=True):
        # Qwen3's norms of heads, which run unfused here, sum in the order of memory, and that is q's and k's own.
        order = "self_attn.q_norm" in name or "self_attn.k_norm" in name
        torch.testing.assert_close(mine, theirs, rtol=0.02 if order and kind == "qwen3" else 0, atol=0)
    if weights == "float32, autocast" and kind not in ("qwen3", "olmo2"):  # bfloat16 queries, float32 cosines
        assert {rule.grad_mid for rule in emulated} == {B} and {rule.mid for rule in emulated} == {F}


def test_one_that_does_not_match(emulated: list[Rule]) -> None:
    model = decoder("cohere")
    before = getattr(file("cohere"), NAME)
    report = hf_lowprec.convert(model, "te-current")
    assert not report.rotary and len(report.unfused_rotary) == 2 and getattr(file("cohere"), NAME) is before
    assert "0 of 2 rotary embeddings" in report.summary()
    assert f"unfused, {NAME} is no rotary embedding that there is a kernel for: 2 x model.layers.*.self_attn" in str(
        report
    )
    assert hf_lowprec.convert(mlp_model(), "te-current").unfused_rotary == {}


def mlp_model() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


def test_generation_with_a_cache(emulated: list[Rule]) -> None:
    ours, ids = llama().eval(), token_ids(2, 5)
    hf_lowprec.convert(ours, "te-current")
    got = ours.generate(ids, max_new_tokens=6, do_sample=False, min_new_tokens=6)
    used = len(emulated)
    for use in session_of(ours).rotary:
        use.patch.emulate = False
    expected = ours.generate(ids, max_new_tokens=6, do_sample=False, min_new_tokens=6)
    assert torch.equal(got, expected) and used == 2 * 6 == len(emulated)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, emulated: list[Rule]) -> None:
    model = llama().train()
    hf_lowprec.convert(model, "te-current")
    expected = losses_and_gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    before = len(emulated)
    assert same(losses_and_gradients(model), expected) and len(emulated) - before == 2 * 2 * 2


def test_compiled(emulated: list[Rule]) -> None:
    model, ids = llama().eval(), token_ids(1, 6)
    hf_lowprec.convert(model, "te-current")
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        before = len(emulated)
        for use in session_of(model).rotary:
            use.patch.emulate = True
        function = torch.compile(getattr(file("llama"), NAME), backend="eager", fullgraph=True)
        q, k, cos = batch(1, 2, 4, 8), batch(1, 1, 4, 8), batch(1, 4, 8)
        theirs = session_of(model).rotary[0].patch.original(q, k, cos, cos)
        assert same(list(function(q, k, cos, cos)), list(theirs))
    assert before and len(emulated) == before and expected.isfinite().all()


# --- what goes to the model's own function ---------------------------------------------------------------------------


def test_what_is_left_to_the_models_function(emulated: list[Rule]) -> None:
    model = llama()
    hf_lowprec.convert(model, "te-current")
    function = getattr(file("llama"), NAME)
    original = function.__wrapped__
    q, k, cos = batch(1, 2, 4, 8), batch(1, 1, 4, 8), batch(1, 4, 8)

    class Special(Tensor):
        pass

    def vmapped(function: Callable[..., Any]) -> Any:
        return torch.func.vmap(lambda x: function(x, k, cos, cos)[0])(q[None])

    function(q, k, cos, cos)
    function(q.transpose(1, 2), k.transpose(1, 2), cos, cos, unsqueeze_dim=2)
    assert [rule.dim for rule in emulated] == [1, 2]
    trained = cos.clone().requires_grad_()
    for args, kwargs in (
        ((q.double(), k.double(), cos, cos), {}),
        ((q, k.to(B), cos, cos), {}),
        ((q.as_subclass(Special), k, cos, cos), {}),
        ((nn.Parameter(q), k, cos, cos), {}),
        ((q, k, trained, cos), {}),
        ((q, k, cos[:, :1], cos[:, :1]), {}),
        ((q[0], k[0], cos, cos), {}),
        ((q, k, cos, cos, 1), {}),
        ((q, k), {"cos": cos, "sin": cos}),
        ((q, k, cos[None], cos[None]), {"unsqueeze_dim": 0}),
    ):
        expected, got = original(*args, **kwargs), function(*args, **kwargs)
        assert [type(t) for t in got] == [type(t) for t in expected]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert torch.equal(vmapped(function), vmapped(original))
    with pytest.raises(RuntimeError):  # as the model's own does
        function(q, k, batch(1, 4, 6), batch(1, 4, 6))
    assert len(emulated) == 2


def test_forward_mode_and_tracing_go_to_the_models_function(emulated: list[Rule]) -> None:
    """The kernel knows no tangents, and a trace would hold its results as constants."""
    model = llama()
    hf_lowprec.convert(model, "te-current")
    function, q, cos = getattr(file("llama"), NAME), batch(1, 2, 4, 8), batch(1, 4, 8)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        assert forward_ad.unpack_dual(function(dual, dual, cos, cos)[0]).tangent is not None
    torch.jit.trace(lambda x: function(x, x, cos, cos), (q,), check_trace=False)
    assert not emulated
    function(q, q, cos, cos)
    assert len(emulated) == 1


def swapped(x: Tensor) -> Tensor:
    return x.flip(-1)


def test_a_helper_of_the_function_is_replaced(emulated: list[Rule], monkeypatch: pytest.MonkeyPatch) -> None:
    """After the conversion, before it, and back."""
    module, model, q, cos = file("llama"), llama(), batch(1, 2, 4, 8), batch(1, 4, 8)
    original = getattr(module, NAME)
    hf_lowprec.convert(model, "te-current")
    wrapper = getattr(module, NAME)
    wrapper(q, q, cos, cos)
    with monkeypatch.context() as patched:
        patched.setattr(module, "rotate_half", swapped)
        assert same(list(wrapper(q, q, cos, cos)), list(original(q, q, cos, cos))) and len(emulated) == 1
        other = llama()
        assert not hf_lowprec.convert(other, "te-current").rotary, "it is another function now"
    again = llama()
    assert hf_lowprec.convert(again, "te-current").rotary
    wrapper(q, q, cos, cos)
    assert len(emulated) == 2

    def rotate_half(x: Tensor) -> Tensor:  # the same by other means
        return torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)

    monkeypatch.setattr(module, "rotate_half", rotate_half)
    wrapper(q, q, cos, cos)
    assert len(emulated) == 2
    third = llama()
    assert hf_lowprec.convert(third, "te-current").rotary
    assert same(list(wrapper(q, q, cos, cos)), list(original(q, q, cos, cos))) and len(emulated) == 3


ATTENTION = """
import torch
def rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)
def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
class Attention(torch.nn.Linear):
    def forward(self, x, cos, sin):
        return apply_rotary_pos_emb(x, x, cos, sin)
"""


@pytest.mark.parametrize("name", ["loaded_by_its_path", "<run_path>", "transformers", None])
def test_code_that_is_no_module(name: str | None, emulated: list[Rule]) -> None:
    code = {} if name is None else {"__name__": name}
    exec(ATTENTION, code)
    model = nn.Sequential(nn.Linear(16, 16), code["Attention"](16, 16))
    report = hf_lowprec.convert(model, "te-current")
    assert report.unfused_rotary == {f"1: {NAME}": f"{NAME} is of code that is no module in sys.modules"}


def test_many_lengths_do_not_fill_the_memory(emulated: list[Rule], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotary_use, "_MOST", 3)
    model = llama()
    hf_lowprec.convert(model, "te-current")
    for length in range(1, 9):
        x = batch(1, 1, length, 8)
        getattr(file("llama"), NAME)(x, x, x[0], x[0])
    assert len(emulated) == 8 and len(session_of(model).rotary[0].patch.rules) <= 3


# --- the file's global -----------------------------------------------------------------------------------------------


def test_revert_and_two_models(emulated: list[Rule]) -> None:
    module = file("llama")
    original = getattr(module, NAME)
    first, second = llama(), llama()
    hf_lowprec.convert(first, "te-current")
    wrapper = getattr(module, NAME)
    assert wrapper is not original and wrapper.__wrapped__ is original and wrapper.__name__ == NAME
    hf_lowprec.convert(second, "te-current")
    hf_lowprec.convert(second, "te-current")
    assert getattr(module, NAME) is wrapper and wrapper.__wrapped__ is original
    hf_lowprec.revert(first)
    assert getattr(module, NAME) is wrapper
    hf_lowprec.revert(second)
    assert getattr(module, NAME) is original
    q = batch(1, 2, 4, 8)
    assert same(list(wrapper(q, q, q[0, :1], q[0, :1])), list(original(q, q, q[0, :1], q[0, :1]))) and not emulated
    hf_lowprec.convert(first, "te-current")
    assert getattr(module, NAME) is wrapper
    del first
    gc.collect()
    assert getattr(module, NAME) is original


def test_unfused_models_change_nothing(emulated: list[Rule]) -> None:
    original, model = getattr(file("llama"), NAME), llama()
    assert hf_lowprec.convert(model, "te-current", fuse=False).rotary == {}
    assert getattr(file("llama"), NAME) is original
    hf_lowprec.revert(model)
    report = hf_lowprec.convert(model, "te-current", modules_to_not_convert=["self_attn"])
    assert set(report.unfused_rotary.values()) == {"named by modules_to_not_convert (self_attn)"}
    assert getattr(file("llama"), NAME) is original


def test_a_part_of_the_layers(emulated: list[Rule]) -> None:
    model = llama()
    report = hf_lowprec.convert(model, "te-current", modules_to_not_convert=[r"model\.layers\.0\..*"])
    assert list(report.rotary) == [f"model.layers.1.self_attn: {NAME}"] and len(report.unfused_rotary) == 1


def liger(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    return q, k


def test_what_somebody_else_put_there_first(emulated: list[Rule], monkeypatch: pytest.MonkeyPatch) -> None:
    module, original = file("llama"), getattr(file("llama"), NAME)

    @functools.wraps(original)
    def logged(*args: Any) -> Any:
        return original(*args)

    for foreign, why in (
        (liger, f"was replaced by {__name__}"), (logged, "is no plain function"),
        (functools.partial(original), "is no plain function"),
    ):  # fmt: skip
        monkeypatch.setattr(module, NAME, foreign)
        model = llama()
        report = hf_lowprec.convert(model, "te-current")
        assert not report.rotary and why in report.unfused_rotary[f"model.layers.0.self_attn: {NAME}"]
        assert getattr(module, NAME) is foreign
        hf_lowprec.revert(model)
        assert getattr(module, NAME) is foreign


def test_what_somebody_else_puts_there_later(emulated: list[Rule], monkeypatch: pytest.MonkeyPatch) -> None:
    module, original = file("llama"), getattr(file("llama"), NAME)
    model, ids = llama().eval(), token_ids(1, 6)
    hf_lowprec.convert(model, "te-current")
    wrapper = getattr(module, NAME)

    @functools.wraps(wrapper)
    def logged(*args: Any) -> Any:
        return wrapper(*args)

    monkeypatch.setattr(module, NAME, logged)
    expected = model(input_ids=ids, use_cache=False).logits
    assert len(emulated) == 2
    other = llama()
    assert not hf_lowprec.convert(other, "te-current").rotary and getattr(module, NAME) is logged
    hf_lowprec.revert(other)
    hf_lowprec.revert(model)
    assert getattr(module, NAME) is logged
    model(input_ids=ids, use_cache=False)
    assert len(emulated) == 2
    setattr(module, NAME, wrapper)  # who was last takes its own back, and finds a wrapper that nobody uses
    hf_lowprec.convert(model, "te-current")
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected) and len(emulated) == 4
    hf_lowprec.revert(model)
    assert getattr(module, NAME) is original
    monkeypatch.undo()
    setattr(module, NAME, original)


def test_a_file_that_imported_the_function_of_another(emulated: list[Rule]) -> None:
    first, module = llama(), types.ModuleType("my_modeling")
    original = inspect.unwrap(getattr(file("llama"), NAME))  # a converted model may live
    hf_lowprec.convert(first, "te-current")
    exec(f"from {LLAMA} import {NAME}", vars(module))
    sys.modules[module.__name__] = module
    try:
        use = rotary_use.RotaryUse(module.__name__, NAME)
        hf_lowprec.revert(first)
        assert getattr(file("llama"), NAME) is original is not getattr(module, NAME)
        x = batch(1, 1, 2, 8)
        getattr(module, NAME)(x, x, x[0], x[0])
        assert len(emulated) == 1
        use.release()
        use.release()
        assert getattr(module, NAME) is original
    finally:
        del sys.modules[module.__name__]


def test_copies(emulated: list[Rule]) -> None:
    module, model, ids = file("llama"), llama().eval(), token_ids(1, 6)
    original = getattr(module, NAME)
    hf_lowprec.convert(model, "te-current")
    expected = model(input_ids=ids, use_cache=False).logits
    stream = io.BytesIO()
    torch.save(model, stream)
    copied = copy.deepcopy(model)
    hf_lowprec.revert(model)
    assert getattr(module, NAME) is not original
    assert torch.equal(copied(input_ids=ids, use_cache=False).logits, expected)
    hf_lowprec.revert(copied)
    assert getattr(module, NAME) is original and len(emulated) == 4
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    assert getattr(module, NAME) is not original
    assert torch.equal(loaded(input_ids=ids, use_cache=False).logits, expected) and len(emulated) == 6
    hf_lowprec.revert(loaded)
    assert getattr(module, NAME) is original


def test_a_pickle_in_a_new_process(tmp_path: Any) -> None:
    model = llama()
    hf_lowprec.convert(model, "te-current")
    torch.save(model, tmp_path / "model.pt")
    script = (
        "import torch, sys\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        f"print(hasattr(sys.modules[{LLAMA!r}].{NAME}, '_lowprec_patch'))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=280)
    assert done.stdout.split() == ["True"], done.stderr[-2000:]
