# SPDX-License-Identifier: Apache-2.0
"""Fused MLPs against the modules of transformers that they are made of: values, ways of calling, the way back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from core import assert_same_state, batch, same_bits
from glu_cases import E4M3, KINDS, SEPARATE, TILES, WIDTH, assert_same, mlp, pair, run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hf_lowprec
from hf_lowprec import numerics, ops
from hf_lowprec.conversion import session_of
from hf_lowprec.modules.glu import GLU, LowPrecGLU, fuse_glu, unfuse_glu
from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import Quant, Rounding, Scaling

# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_float32_as_transformers(kind: str) -> None:
    ours, own = pair(kind)
    a, b = run(ours, batch(2, 7, WIDTH)), run(own, batch(2, 7, WIDTH))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_nearer_to_float64_than_eager(kind: str) -> None:
    """One rounding where eager has two (forward) or three (backward): no error is larger, the sum is smaller.

    Without a gate eager is one operator, too.
    """
    ours, own = (m.bfloat16() for m in pair(kind))
    exact = copy.deepcopy(own).double()
    x, grad = batch(64, WIDTH, dtype=torch.bfloat16), batch(64, WIDTH, seed=9, dtype=torch.bfloat16)
    truth = run(exact, x.double(), grad.double())
    errors = {}
    for name, module in (("ours", ours), ("own", own)):
        got = run(module, x, grad)
        errors[name] = {k: float((got[k].double() - truth[k]).norm() / truth[k].norm()) for k in truth}
    for key in truth:
        assert errors["ours"][key] <= 1.05 * errors["own"][key], (key, errors)
    totals = [sum(errors[name].values()) for name in ("ours", "own")]
    assert totals[0] < totals[1] or (KINDS[kind].up is None and totals[0] == totals[1])


@pytest.mark.parametrize("act", numerics.ACTIVATIONS)
def test_slopes_are_the_derivatives(act: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 999, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(numerics.activation(act, leaf).sum(), leaf)
    torch.testing.assert_close(numerics.activation_slope(act, x), slope, rtol=1e-9, atol=1e-14)


def test_activations_are_those_of_transformers() -> None:
    from transformers.activations import ACT2FN

    names = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
             "relu": "relu", "relu2": "relu2", "quick_gelu": "quick_gelu", "sigmoid": "sigmoid"}  # fmt: skip
    x = torch.linspace(-9, 9, 500, dtype=torch.float64)
    for theirs, ours in names.items():
        torch.testing.assert_close(numerics.activation(ours, x), ACT2FN[theirs](x), rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="no activation 'mish'"):
        numerics.activation("mish", x)


def restored(x: Tensor, saved: Quant) -> Tensor:
    """`x` as its codes hold it; tiles run over all tokens, of whichever sequence."""
    return numerics.quantize_dequantize(x.detach().reshape(-1, x.shape[-1]), saved).view(x.shape).double()


@pytest.mark.parametrize("saved", [E4M3, TILES], ids=["tensor", "tile"])
@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt_neox"])
def test_saved_policy_decides_what_backward_computes_with(kind: str, saved: Quant) -> None:
    """With E4M3, gradients are those at the dequantised gate and up; the output does not change."""
    ours, own = pair(kind, saved=saved)
    parts = KINDS[kind]
    x = batch(3, 5, WIDTH)
    got, plain = run(ours, x), run(own, x)
    torch.testing.assert_close(got["out"], plain["out"], rtol=2e-6, atol=2e-6)

    leaf = x.clone().requires_grad_()
    gate = getattr(own, parts.gate)(leaf)
    gate, up = gate.chunk(2, -1) if parts.up == parts.gate else (gate, None)
    if parts.up not in (None, parts.gate):
        up = getattr(own, parts.up)(leaf)
    grad = batch(3, 5, WIDTH, seed=9) @ getattr(own, parts.down).weight.detach()  # of h
    a = restored(gate, saved)
    slope = numerics.activation_slope(parts.act, a)
    pulled = grad * slope
    if up is not None:
        b = restored(up, saved)
        (grad * numerics.activation(parts.act, a)).float().mul(up).sum().backward(retain_graph=True)
        pulled = pulled * b
    pulled.float().mul(gate).sum().backward()
    torch.testing.assert_close(got["x"], leaf.grad, rtol=1e-5, atol=1e-6)
    assert (got["x"] - plain["x"]).abs().max() > 1e-5, "the policy changed nothing"


def test_a_scale_per_tile_is_nearer_than_one_per_tensor() -> None:
    gate = batch(64, 96) * torch.logspace(-4, 4, 6).repeat_interleave(16)
    tensor, tile = (
        ((restored(gate, saved) - gate).view(64, 6, 16).norm(dim=(0, 2)) / gate.view(64, 6, 16).norm(dim=(0, 2)))
        for saved in (E4M3, TILES)
    )
    assert (tile <= tensor + 1e-6).all() and tile.max() < 0.04 and tensor.max() > 0.9


@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH), (2, 0, WIDTH)], ids=str)
@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2"])
def test_few_tokens_or_none_in_tiles(kind: str, shape: tuple[int, ...]) -> None:
    ours, own = pair(kind, saved=TILES)
    if kind == "gpt2" and len(shape) == 1:
        shape = (1, 1, WIDTH)  # its Conv1D takes no vector
    got, plain = run(ours, batch(*shape)), run(own, batch(*shape))
    assert got["out"].shape == plain["out"].shape
    for key in plain:
        assert (got[key] - plain[key]).norm() <= 0.06 * plain[key].norm(), key


# --- ways of calling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recipe", ["fp8-lm", "te-current"])
def test_checkpointing(recipe: str, reentrant: bool) -> None:
    ours, again = (mlp() for _ in range(2))
    for module in (ours, again):
        hf_lowprec.convert(module, recipe, fuse=False)
        fuse_glu(module, KINDS["llama"], PRESETS[recipe].saved)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = again

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    outer = Checkpointed()
    for step in range(2):
        a, b = run(ours, batch(4, WIDTH, seed=step)), run(outer, batch(4, WIDTH, seed=step))
        assert_same(a, {key.removeprefix("inner."): value for key, value in b.items()})
        for module in (ours, again):
            session_of(module).scaling.roll()
    ours_state, again_state = (session_of(m).scaling.state_dict() for m in (ours, again))
    for name, roles in ours_state.items():
        for role, tensors in roles.items():
            for key in set(tensors) - {"counts"}:  # a recomputation looks twice
                assert same_bits(tensors[key], again_state[name][role][key]), (name, role, key)


def test_autocast_over_float32_weights() -> None:
    ours, own = pair(recipe="te-current")
    exact = copy.deepcopy(mlp()).double()
    x = batch(32, WIDTH)
    truth = run(exact, x.double())
    results = []
    for module in (ours, own):
        with torch.autocast("cpu", torch.bfloat16):
            out = module(x)
        assert out.dtype == torch.bfloat16
        results.append(out)
    errors = [float((r.detach().double() - truth["out"]).norm() / truth["out"].norm()) for r in results]
    assert errors[0] <= 1.05 * errors[1] < 0.1


def test_no_grad_notes_nothing() -> None:
    ours, _ = pair(recipe="te-delayed")
    before = copy.deepcopy(session_of(ours).state_dict())
    with torch.no_grad():
        ours(batch(4, WIDTH))
    assert_same_state(session_of(ours).state_dict(), before)


@pytest.mark.parametrize("recipe", [None, "fp8-lm"])
def test_lora_on_every_child(recipe: str | None) -> None:
    peft = pytest.importorskip("peft")
    results = []
    for fuse in (False, True):
        model = nn.Sequential(mlp())
        if recipe is not None:
            hf_lowprec.convert(model, recipe, fuse=False)
        if fuse:
            fuse_glu(model[0], KINDS["llama"])
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=list(SEPARATE), init_lora_weights=False, lora_dropout=0.0)
        wrapped = peft.get_peft_model(model, config)
        results.append(run(wrapped, batch(3, WIDTH)))
        inner = wrapped.base_model.model[0]
        assert isinstance(inner, LowPrecGLU) == fuse and type(inner.down_proj).__name__ == "Linear"
    assert len(results[0]) == 2 + 6
    for key in results[0]:
        assert (results[1][key] - results[0][key]).norm() <= 1e-3 * results[0][key].norm(), key


def test_double_backward_is_refused() -> None:
    ours, _ = pair()
    x = batch(2, WIDTH).requires_grad_()
    (grad,) = torch.autograd.grad(ours(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_dtypes_without_kernel_run_as_the_module_would() -> None:
    ours, own = (m.double() for m in pair())
    x = batch(3, WIDTH).double()
    assert_same(run(ours, x), run(own, x))


def test_high_precision_and_switched_off_states_are_the_stock_module() -> None:
    ours, own = pair(recipe="fp8-lm")
    stock = mlp()
    with hf_lowprec.high_precision(ours):
        assert_same(run(ours, batch(3, WIDTH)), run(stock, batch(3, WIDTH)))
    ours._lowprec_glu.enabled = False
    session_of(own).scaling.load_state_dict(session_of(ours).scaling.state_dict())
    assert_same(run(ours, batch(3, WIDTH)), run(own, batch(3, WIDTH)))


def test_compiled_without_a_break() -> None:
    ours, own = pair(recipe="te-delayed")
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    out, expected = compiled(batch(4, WIDTH)), own(batch(4, WIDTH))
    assert same_bits(out.detach(), expected.detach())
    torch.compiler.reset()


# --- the module -----------------------------------------------------------------------------------------------------


def test_copies_pickles_names_and_the_way_back() -> None:
    ours, own = pair(recipe="fp8-lm", saved=E4M3)
    assert list(ours.state_dict()) == list(own.state_dict())
    assert type(ours).__name__ == "LowPrecLlamaMLP" and isinstance(ours, type(own)) and "fused" in repr(ours)
    x = batch(3, WIDTH)
    expected = run(ours, x)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is type(ours) and other._lowprec_glu == ours._lowprec_glu
        assert other._lowprec_glu is not ours._lowprec_glu
        assert_same(run(other, x), expected)
    old = ours.forward  # as accelerate's device hooks keep it
    ours._old_forward = old
    unfuse_glu(ours)
    assert type(ours) is type(own) and not hasattr(ours, "_lowprec_glu")
    assert ours._old_forward.__func__ is type(own).forward
    unfuse_glu(ours)


def test_what_cannot_be_fused_says_why() -> None:
    module = mlp()
    for parts, saved, message in (
        (GLU(*SEPARATE, "mish"), None, "no fused kernel for the activation 'mish'"),
        (GLU("gate", "up_proj", "down_proj", "silu"), None, "LlamaMLP has no child 'gate'"),
        (KINDS["llama"], Quant(format="e4m3fn", scaling=Scaling(method="delayed")), "delayed scaling keeps a scale"),
        (KINDS["llama"], Quant(format="e4m3fn", rounding=Rounding(mode="stochastic")), "needs a seed"),
    ):
        with pytest.raises(ValueError, match=message):
            fuse_glu(module, parts, saved)
        assert not isinstance(module, LowPrecGLU)
    module.forward = lambda x: x
    with pytest.raises(ValueError, match="replaced on the instance"):
        fuse_glu(module, KINDS["llama"])


@pytest.mark.parametrize("change", ["another", "forward", "hook", "pre", "backward", "function"])
def test_an_activation_that_was_touched_is_called(change: str) -> None:
    ours, own = pair()
    called: list[str] = []

    def replaced(x: Tensor) -> Tensor:
        called.append("forward")
        return x.relu()

    for module in (ours, own):
        act: Any = module.act_fn
        if change == "another":
            module.act_fn = nn.ReLU()
        elif change == "forward":
            act.forward = replaced
        elif change == "hook":
            act.register_forward_hook(lambda m, args, out: out * 2)
        elif change == "pre":
            act.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        elif change == "backward":
            act.register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,))
        else:
            del module.act_fn
            module.act_fn = torch.relu
    assert_same(run(ours, batch(3, WIDTH)), run(own, batch(3, WIDTH)))
    assert len(called) == 2 * (change == "forward")


def test_fused_again_once_the_hook_is_gone() -> None:
    ours, _ = pair()
    fused = run(ours, batch(64, WIDTH))
    ours.act_fn.register_forward_hook(lambda m, args, out: None).remove()
    assert ours._lowprec_glu.holds(ours)
    assert_same(run(ours, batch(64, WIDTH)), fused)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other._lowprec_glu.holds(other)
        other.act_fn = nn.ReLU()
        assert not other._lowprec_glu.holds(other)


def test_a_function_that_is_an_attribute() -> None:
    module: Any = Own()
    fuse_glu(module, GLU("gate", None, "down", "relu"))
    assert module._lowprec_glu.holds(module)
    module.act = torch.sigmoid
    x = batch(3, WIDTH)
    assert torch.equal(module(x), module.down(module.gate(x).sigmoid()))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.act: Any = torch.relu

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)))


def test_a_class_whose_forward_was_replaced_since(monkeypatch: pytest.MonkeyPatch) -> None:
    """As libraries patch models that exist already; also for copies made afterwards, not for what is fused then."""
    ours, own = pair()
    cls = type(own)
    before = pickle.dumps(ours)
    plain = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x: 2 * plain(self, x))
    x = batch(3, WIDTH)
    for other in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x), own(x))
        unfuse_glu(other)
        assert type(other) is cls
    later, _ = pair()  # whoever fuses says what the forward of now computes
    assert not torch.equal(later(x), own(x))
    monkeypatch.undo()
    assert isinstance(pickle.loads(before), LowPrecGLU)
    assert torch.equal(later(x), own(x))


# --- the operator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("recipe", "kept_as"), [("fp8-lm", E4M3), ("te-current", E4M3), ("te-current", TILES)])
def test_opcheck(recipe: str, kept_as: Quant, packed: bool) -> None:
    quant = PRESETS[recipe].fprop.input
    gate, up = batch(2, 5, 12).chunk(2, -1) if packed else (batch(2, 5, 6), batch(2, 5, 6, seed=1))
    delayed = quant.scaling.method == "delayed"
    scale, amax = (torch.tensor(0.5), torch.tensor(0.0)) if delayed else (None, None)
    counts = torch.zeros(4, dtype=torch.int64)
    key, saved = ops.quant_key(quant), ops.quant_key(kept_as)
    for gated in (up, None):
        args = (gate, gated, "silu", True, key, scale, amax, counts, None, False, saved)
        torch.library.opcheck(torch.ops.hf_lowprec.glu.default, args, test_utils=("test_schema", "test_faketensor"))
    kept = torch.ops.hf_lowprec.glu(*args[:1], up, *args[2:])[-4:]
    grads = [torch.empty(2, 5, 6) for _ in range(2)]
    plain = (batch(2, 5, 6), gate, None, up, None, "silu", None, *grads)
    torch.library.opcheck(
        torch.ops.hf_lowprec.glu_backward.default, plain, test_utils=("test_schema", "test_faketensor")
    )
    args = (batch(2, 5, 6), *kept, "silu", saved, *grads)  # test_schema multiplies float8, which torch cannot
    torch.library.opcheck(torch.ops.hf_lowprec.glu_backward.default, args, test_utils=("test_faketensor",))
