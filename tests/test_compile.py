# SPDX-License-Identifier: Apache-2.0
"""torch.compile: one graph, the numbers of eager mode, and no recompilation beyond the unconverted model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from core import QUANTISING, assert_same_state, batch, close_in, mlp, same_bits
from torch import Tensor, nn
from torch._dynamo.utils import counters

import hf_lowprec
from hf_lowprec.conversion import session_of

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def train(model: nn.Module, run: Callable[..., Tensor], inputs: list[Tensor], lr: float = 0.1) -> list[Tensor]:
    """Losses; every gradient of the last step is left on the model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses = []
    for x in inputs:
        optimizer.zero_grad()
        loss = run(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("name", QUANTISING)
def test_one_graph_with_the_numbers_of_eager(name: str) -> None:
    """Three steps, so that delayed scales are used: losses, weights and histories bit for bit."""
    eager, model = mlp(), mlp()
    hf_lowprec.convert(eager, name)
    report = hf_lowprec.convert(model, name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = [batch(4, 32, seed=i) for i in range(3)]
    losses, expected = train(model, compiled, inputs), train(eager, eager, inputs)
    assert not counters["graph_break"]
    assert all(map(same_bits, losses, expected))
    assert_same_state(model.state_dict(), eager.state_dict())
    assert_same_state(session_of(model).state_dict(), session_of(eager).state_dict())
    recipe = report.recipe
    if not recipe.flexible:  # whose products are torch's own
        gemms = sum(gemm.quantised and not gemm.one_sided for gemm in (recipe.fprop, recipe.dgrad, recipe.wgrad))
        assert sum(report.kernels.values()) >= 3 * 2 * gemms, "compiled graphs are counted too"


def test_autocast_and_frozen_weights() -> None:
    def make() -> nn.Module:
        model = mlp()
        model.up.weight.requires_grad_(False)
        hf_lowprec.convert(model, "fp8-lm")
        return model

    eager, model = make(), make()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(2):
        x = batch(4, 32, seed=step)
        with torch.autocast("cpu", torch.bfloat16):
            out, expected = compiled(x), eager(x)
        assert out.dtype == expected.dtype
        close_in(out.detach(), expected.detach().float())
        out.float().sum().backward()
        expected.float().sum().backward()
    assert model.up.weight.grad is None
    for (name, a), b in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert a.grad is None or torch.allclose(a.grad, b.grad, rtol=2e-2, atol=1e-3), name


def recompilations(convert: bool) -> tuple[int, int]:
    """Graphs that a script of many shapes and modes compiles, and its graph breaks."""
    torch.compiler.reset()
    counters.clear()
    model = mlp()
    if convert:
        hf_lowprec.convert(model, "fp8-lm")
    compiled: Any = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for tokens in (4, 7, 16, 33):
        for _ in range(2):
            compiled(batch(tokens, 32)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            compiled(batch(tokens + 1, 32))
        model.train()
    compiled(batch(2, 5, 32)).sum().backward()
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def test_no_more_compilations_than_without_conversion() -> None:
    plain, converted = recompilations(convert=False), recompilations(convert=True)
    assert plain[1] == converted[1] == 0
    assert converted[0] == plain[0]


def test_no_grad_in_a_compiled_model_leaves_no_trace() -> None:
    model = mlp()
    hf_lowprec.convert(model, "fp8-lm")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    train(model, compiled, [batch(4, 32)])
    before = session_of(model).state_dict()
    with torch.no_grad():
        out = compiled(batch(4, 32, seed=3))
        assert same_bits(out, model(batch(4, 32, seed=3)))
    assert_same_state(before, session_of(model).state_dict())


def test_high_precision_inside_a_compiled_model() -> None:
    model, original = mlp(), mlp()
    hf_lowprec.convert(model, "fp8-lm")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = batch(4, 32)
    quantised = compiled(x)
    with hf_lowprec.high_precision(model):
        assert same_bits(compiled(x), original(x))
    assert same_bits(compiled(x), quantised) and not same_bits(quantised, original(x))
