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


class Parts(nn.Module):
    def __init__(self, forward: Callable[..., Tensor], act: nn.Module | None = None) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
        self.act = nn.SiLU() if act is None else act
        self.drop = nn.Dropout(0.1)
        self.body = forward

    def forward(self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
        return self.body(self, x, scale)


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
    "a branch on values": (lambda m, x, s: m.down(m.act(m.gate(x)) * m.up(x)) if x.sum() > 0 else x, "TraceError"),
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
