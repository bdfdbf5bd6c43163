# SPDX-License-Identifier: Apache-2.0
"""Fused MLPs of converted linears: what is quantised where, who sees what, and what is kept for backward."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from core import QUANTISING, assert_same_state, batch, same_bits
from glu_cases import E4M3, HIDDEN, KINDS, WIDTH, assert_agree, assert_same, mlp, pair, run
from torch import Tensor, nn

import hf_lowprec
from hf_lowprec import numerics, ops
from hf_lowprec.conversion import session_of
from hf_lowprec.modules import glu as fused
from hf_lowprec.modules.glu import LowPrecGLU, fuse_glu


@pytest.mark.parametrize("recipe", QUANTISING)
@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma"])
def test_fused_and_unfused_agree(kind: str, recipe: str) -> None:
    """float32, where eager rounds as little: outputs, scales and counters of three steps, first use included."""
    ours, own = pair(kind, recipe)
    if kind == "gemma":  # torch's formula loses digits where ours does not: both with ours
        own.act_fn = Act("gelu_tanh")
    for step in range(3):
        x = batch(2, 8, WIDTH, seed=step) * (step + 1)
        assert_agree(run(ours, x), run(own, x))
        for module in (ours, own):
            session_of(module).scaling.roll()
    states = [session_of(m).scaling.state_dict() for m in (ours, own)]
    for name, roles in states[0].items():
        for role in ("input", "weight"):
            assert_same_state(roles[role], states[1][name][role])
        looked_at = [s[name]["grad_output"]["counts"][0] for s in states]
        assert looked_at[0] == looked_at[1]


class Act(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return numerics.activation(self.name, x)


def handed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that are handed over from now on."""
    seen: list[Tensor] = []
    original = fused.hand_over

    def spy(state: Any, x: Tensor, quantized: Any) -> None:
        seen.append(x)
        original(state, x, quantized)

    monkeypatch.setattr(fused, "hand_over", spy)
    return seen


def test_a_lost_hand_over_costs_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, own = pair(recipe="te-current")
    seen = handed(monkeypatch)
    assert_agree(run(ours, batch(6, WIDTH)), run(own, batch(6, WIDTH)))
    (h,) = seen
    assert h.stride() == (HIDDEN, 1) and not h.isnan().any()
    monkeypatch.setattr(fused, "hand_over", lambda *_: None)
    assert_agree(run(ours, batch(6, WIDTH)), run(own, batch(6, WIDTH)))


def test_down_compiled_by_itself() -> None:
    ours, own = pair(recipe="te-current")
    torch.compiler.reset()
    ours.down_proj.compile(backend="eager")
    for _ in range(2):
        assert_agree(run(ours, batch(6, WIDTH)), run(own, batch(6, WIDTH)))
    torch.compiler.reset()


def test_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both hand over before either is read."""
    ours, own = pair(recipe="te-current")
    meet, original = threading.Barrier(2, timeout=60), fused.hand_over

    def meeting(*args: Any) -> None:
        original(*args)
        meet.wait()

    monkeypatch.setattr(fused, "hand_over", meeting)
    inputs = [batch(6, WIDTH, seed=seed) * (seed + 1) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool, torch.no_grad():
        outs = list(pool.map(torch.no_grad()(ours), inputs))
        for x, out in zip(inputs, outs, strict=True):
            assert same_bits(out, own(x))


def test_frozen_linears_and_inputs_without_gradient() -> None:
    for frozen in (["gate_proj"], ["up_proj", "down_proj"], ["gate_proj", "up_proj"]):
        ours, own = pair("qwen2", "te-current")
        for module in (ours, own):
            for name in frozen:
                module.get_submodule(name).requires_grad_(False)
        assert_agree(run(ours, batch(4, WIDTH)), run(own, batch(4, WIDTH)))
        for module in (ours, own):  # the input does not train: the frozen parts have no gradient at all
            module.zero_grad()
            module(batch(4, WIDTH)).square().sum().backward()
        for a, b in zip(ours.parameters(), own.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            assert a.grad is None or (a.grad - b.grad).norm() <= 1e-3 * b.grad.norm()


@pytest.mark.parametrize("hook", ["pre", "forward", "backward", "replaced"])
def test_hooks_see_the_product(hook: str) -> None:
    ours, own = pair(recipe="te-delayed")
    x = batch(2, 4, WIDTH)
    plain, seen, handles = run(ours, x), [], []
    for module in (ours, own):
        target: Any = module.down_proj
        if hook == "pre":
            handles.append(target.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().clone())))
        elif hook == "forward":
            handles.append(target.register_forward_hook(lambda m, args, out: seen.append(args[0].detach().clone())))
        elif hook == "backward":
            handles.append(target.register_full_backward_hook(lambda m, gi, go: seen.append(gi[0].clone())))
        elif hook == "replaced":
            forward = target.forward
            target.forward = lambda h, forward=forward: (seen.append(h.detach().clone()), forward(h))[1]
    got = run(ours, x)
    assert_same(got, plain)
    assert_agree(got, run(own, x))
    assert len(seen) == 2 and same_bits(seen[0], seen[1]) and not seen[0].isnan().any()
    for handle in handles:
        handle.remove()


def test_hooks_on_the_mlp_and_its_children() -> None:
    ours, own = pair(recipe="te-delayed")
    logs: list[list[tuple[str, Tensor]]] = []
    for module in (ours, own):
        log: list[tuple[str, Tensor]] = []
        logs.append(log)
        for name, child in [("", module), *module.named_children()]:
            if name != "act_fn":  # hooked, it would be called
                child.register_forward_hook(lambda m, a, out, log=log, name=name: log.append((name, out.detach())))
                child.register_full_backward_hook(lambda m, gi, go, log=log, name=name: log.append((name, go[0])))
    assert_agree(run(ours, batch(4, WIDTH)), run(own, batch(4, WIDTH)))
    assert len(logs[0]) == len(logs[1]) == 8
    for (a, x), (b, y) in zip(*logs, strict=True):
        assert a == b and (x - y).norm() <= 1e-3 * y.norm()


def kept_bytes(module: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> int:
    """Bytes of distinct storages that backward keeps, Parameters and the input of the module not counted."""
    known = {p.untyped_storage().data_ptr() for p in [*module.parameters(), x]}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            out = module(x)
    out.float().sum().backward()
    return sum(size for size, tensor in kept.values() if tensor.dim() > 0)


@pytest.mark.parametrize(("kind", "autocast"), [("llama", False), ("llama", True), ("phi3", False)])
def test_bytes_kept_for_backward(kind: str, autocast: bool) -> None:
    """fp8-lm: one byte each of the input, gate, up and the product. As computed: 16 bits of gate and up."""
    rows = 64
    dtype = torch.float32 if autocast else torch.bfloat16
    x = batch(rows, WIDTH, dtype=dtype).requires_grad_()
    scalars = 3 * 4
    for saved, each in ((E4M3, 1), (None, 2)):
        model = nn.Sequential(mlp(kind)).to(dtype)
        hf_lowprec.convert(model, "fp8-lm")  # with gate and up sharing their input
        assert isinstance(model[0], LowPrecGLU)
        model[0]._lowprec_glu.saved = None if saved is None else ops.quant_key(saved)
        found = kept_bytes(model, x, torch.bfloat16 if autocast else None)
        wanted = rows * (WIDTH + HIDDEN * (2 * each + 1))
        assert wanted <= found <= wanted + scalars, (saved, found, wanted)


def test_lora_base_layer_takes_the_quantised_product(monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(mlp())
    hf_lowprec.convert(model, "te-current", fuse=False)
    fuse_glu(model[0], KINDS["llama"])
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["down_proj"]))
    seen = handed(monkeypatch)
    wrapped(batch(3, WIDTH)).sum().backward()
    (h,) = seen
    assert h.stride() == (HIDDEN, 1) and not h.isnan().any()
    layer = wrapped.base_model.model[0].down_proj.base_layer._lowprec
    assert int(layer.operands[0].counts[0]) == 3 * HIDDEN, "the base layer quantised once more"
