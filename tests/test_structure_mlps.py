# SPDX-License-Identifier: Apache-2.0
"""Which modules `find_structure` takes for an MLP, by the graph of their forward, and why it refuses the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from core import same_bits
from torch import Tensor, nn

from hf_lowprec import numerics
from hf_lowprec.modules.glu import GLU
from hf_lowprec.structure import Structure, activation_name, find_structure


def look(model: nn.Module) -> Structure:
    return find_structure(model, {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)})


class Children(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
        self.act = nn.SiLU() if act is None else act
        self.drop = nn.Dropout(0.1)


def Parts(forward: Callable[..., Tensor], act: nn.Module | None = None) -> nn.Module:
    """With `forward(self, x, scale)`."""
    return type("Parts", (Children,), {"forward": forward})(act)


GATED_FORWARDS: dict[str, tuple[Callable[..., Tensor], GLU]] = {
    "other order": (lambda m, x, s: m.down(m.up(x) * m.act(m.gate(x))), GLU("gate", "up", "down", "silu")),
    "names mean nothing": (lambda m, x, s: m.gate(m.act(m.up(x)) * m.up(x)), None),  # type: ignore[dict-item]
    "swapped": (lambda m, x, s: m.down(m.act(m.up(x)) * m.gate(x)), GLU("up", "gate", "down", "silu")),
    "torch.mul": (lambda m, x, s: m.down(torch.mul(m.act(m.gate(x)), m.up(x))), GLU("gate", "up", "down", "silu")),
    "function": (
        lambda m, x, s: m.down(F.gelu(m.gate(x), approximate="tanh") * m.up(x)), GLU("gate", "up", "down", "gelu_tanh")
    ),
    "dropout after": (
        lambda m, x, s: m.drop(m.down(m.act(m.gate(x)) * m.up(x))), GLU("gate", "up", "down", "silu", after="drop")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GATED_FORWARDS)
def test_gated_mlps(name: str) -> None:
    forward, expected = GATED_FORWARDS[name]
    found = look(Parts(forward))
    assert found.mlps == ({} if expected is None else {"": expected})


REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "scaled": (lambda m, x, s: m.down(m.act(m.gate(x)) * m.up(x) * s), "mul stands where an activation"),
    "residual": (lambda m, x, s: x + m.down(m.act(m.gate(x)) * m.up(x)), "last step is no linear"),
    "dropout inside": (lambda m, x, s: m.down(m.drop(m.act(m.gate(x)) * m.up(x))), "drop stands where"),
    "two inputs": (lambda m, x, s: m.down(m.act(m.gate(x)) * m.up(x + 1)), "different tensors"),
    "no activation": (lambda m, x, s: m.down(m.gate(x) * m.up(x)), "where an activation that is known"),
    "on the sum": (lambda m, x, s: m.down(m.act(m.gate(x) + m.up(x))), "no linear"),
    "a branch on values": (lambda m, x, s: m.down(m.act(m.gate(x)) * m.up(x)) if x.sum() > 0 else x, "has branches"),
    "more than that": (lambda m, x, s: (m.gate(x), m.down(m.act(m.gate(x)) * m.up(x)))[1], "also computes"),
    "another argument": (lambda m, x, s: m.down(m.act(m.gate(x), inplace=True) * m.up(x)), "more than a tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_only_looks_like_a_gated_mlp_is_left_alone_with_a_reason(name: str) -> None:
    forward, reason = REFUSED[name]
    found = look(Parts(forward))
    assert found.mlps == {} and reason in found.unfused[""]


def test_activations_with_hooks_or_replaced_forwards_are_left_alone() -> None:
    forward = GATED_FORWARDS["other order"][0]
    model = Parts(forward)
    model.act.register_forward_hook(lambda *_: None)
    assert look(model).unfused == {"": "hooks sit on act"}
    model = Parts(forward)
    model.forward = lambda x: x  # type: ignore[method-assign]
    assert look(model).unfused == {"": "its forward was replaced on the instance"}


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.slope * x)


def test_activation_names() -> None:
    from transformers.activations import ACT2FN

    expected = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
                "gelu_fast": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu", "relu2": "relu2",
                "sigmoid": "sigmoid", "linear": "identity", "tanh": None, "mish": None, "relu6": None,
                "gelu_10": None}  # fmt: skip
    assert {name: activation_name(ACT2FN[name]) for name in expected} == expected
    for name in numerics.ACTIVATIONS:
        assert activation_name(lambda x, name=name: numerics.activation(name, x)) == name  # type: ignore[misc]
    assert activation_name(nn.GELU("tanh")) == "gelu_tanh" and activation_name(nn.LeakyReLU(0.01)) is None
    assert activation_name(Learned()) is None and activation_name(lambda x: x.sum()) is None
    assert activation_name(lambda x: torch.rand_like(x)) is None


def test_noise_of_an_activation_does_not_move_the_generator() -> None:
    state = torch.get_rng_state()
    activation_name(lambda x: x * torch.rand_like(x))
    assert same_bits(torch.get_rng_state(), state)


# --- code that one graph does not stand for -------------------------------------------------------------------------


class Deeds(Children):
    loud = False

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__(act)
        self.seen: list[Tensor] = []
        self.register_buffer("calls", torch.zeros(()))

    def product(self, x: Tensor) -> Tensor:
        return self.act(self.gate(x)) * self.up(x)

    def dropped(self, x: Tensor) -> Tensor:
        h = self.product(x)
        return self.drop(h) if self.training else h


def in_training(m: Deeds, x: Tensor) -> Tensor:
    h = m.product(x)
    if m.training:
        h = m.drop(h)
    return m.down(h)


def flag(m: Deeds, x: Tensor) -> Tensor:
    h = m.product(x)
    if m.loud:
        h = h * 3
    return m.down(h)


def without_gradients(m: Deeds, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m.down(m.product(x))


def casting(m: Deeds, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.down(m.product(x))


def keeping(m: Deeds, x: Tensor) -> Tensor:
    h = m.product(x)
    m.last = h
    return m.down(h)


def filing(m: Deeds, x: Tensor) -> Tensor:
    h = m.product(x)
    m.seen[0] = h
    return m.down(h)


def looping(m: Deeds, x: Tensor) -> Tensor:
    for _ in range(1):
        h = m.product(x)
    return m.down(h)


def trying(m: Deeds, x: Tensor) -> Tensor:
    try:
        return m.down(m.product(x))
    finally:
        torch.relu(x)


def setting(m: Deeds, x: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    return m.down(m.product(x))


def aliased(m: Deeds, x: Tensor) -> Tensor:
    me = m
    return me.down(me.dropped(x))


DEEDS: dict[Callable[..., Tensor], str] = {
    in_training: "has branches",
    flag: "has branches",
    without_gradients: "has a with block",
    casting: "has a with block",
    keeping: "stores attributes",
    filing: "stores items",
    looping: "has a loop",
    trying: "has a try block",
    setting: "calls torch.set_grad_enabled",
    aliased: "uses m as a whole",
    torch.no_grad()(lambda m, x: m.down(m.product(x))): "has a with block",
    lambda m, x: m.down(torch.utils.checkpoint.checkpoint(m.product, x)): "calls torch.utils.checkpoint.checkpoint",
    lambda m, x: (m.seen.append(x), m.down(m.product(x)))[1]: "calls seen.append",
    lambda m, x: (m.calls.add_(1), m.down(m.product(x)))[1]: "calls calls.add_",
    lambda m, x: (setattr(m, "last", x), m.down(m.product(x)))[1]: "calls setattr",
    lambda m, x: (print(), m.down(m.product(x)))[1]: "calls print",
    lambda m, x: m.down(m.dropped(x)): "calls dropped, which has branches",
    lambda m, x: m.down.forward(m.product(x)): "calls down.forward",
    lambda m, x: m.down((m.act, m.drop)[m.training](m.gate(x)) * m.up(x)): "drop stands where an activation",
}  # fmt: skip


@pytest.mark.parametrize("forward", DEEDS, ids=[reason.replace(" ", "_") for reason in DEEDS.values()])
def test_only_straight_line_code_is_taken_for_an_mlp(forward: Callable[..., Tensor]) -> None:
    model = type("Deeds", (Deeds,), {"forward": forward})()
    found = look(model)
    assert found.mlps == {} and found.shared == []
    assert DEEDS[forward] in found.unfused[""]
    assert model.training and model.seen == [] and float(model.calls) == 0


def test_methods_of_straight_line_code_are_followed() -> None:
    model = type("Deeds", (Deeds,), {"forward": lambda m, x: m.down(m.product(x))})()
    assert look(model).mlps == {"": GLU("gate", "up", "down", "silu")}


class Act(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class Noisy(Act):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) + torch.rand_like(x) if self.training else F.silu(x)


class Recording(Act):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return F.silu(x)


class Blended(Act):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) + x * int(self.training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("act", "reason"), [
    (Noisy, "the forward of act has branches"), (Recording, "the forward of act stores attributes"),
    (Blended, "act stands where an activation"), (nn.RReLU, "no activation in either mode"), (Act, None),
])  # fmt: skip
def test_an_activation_computes_one_thing(act: type[nn.Module], reason: str | None, training: bool) -> None:
    model = Parts(lambda m, x: m.down(m.act(m.gate(x)) * m.up(x)), act()).train(training)
    model.act.train(not training)
    found = look(model)
    assert bool(found.mlps) == (reason is None)
    assert reason is None or act is nn.RReLU or reason in found.unfused[""]
    assert model.training == training and model.act.training != training
    if act is Noisy or act is Blended:
        assert activation_name(model.act) is None and model.act.training != training
