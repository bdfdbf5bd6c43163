# SPDX-License-Identifier: Apache-2.0
"""Small models and what a test of an optimizer asks of them: train, take the bits, compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from hf_lowprec.optim import SGD, Adam, AdamW, Lion, LowPrecOptimizer, StableAdamW
from hf_lowprec.optim import states as st
from hf_lowprec.recipe import States

# Each with a learning rate that the regression of test_algorithms.py likes.
MAKE: dict[str, Callable[..., LowPrecOptimizer]] = {
    "AdamW": lambda params, **o: AdamW(params, **{"lr": 0.15, **o}),
    "Adam": lambda params, **o: Adam(params, **{"lr": 0.15, **o}),
    "StableAdamW": lambda params, **o: StableAdamW(params, **{"lr": 0.15, **o}),
    "Lion": lambda params, **o: Lion(params, **{"lr": 0.1, **o}),
    "SGD": lambda params, **o: SGD(params, **{"lr": 5.0, "momentum": 0.9, **o}),
}
NAMES = ("fp32", "bf16", "8bit", "4bit", "fp8", "fp8-expand", "fp8-lm", "fp8-lm-exact", "compact")
ODD = [(), (1,), (5,), (7, 13), (64, 65), (3, 1, 11), (2, 3, 5, 7)]


def slow_beside(quick: Iterable[Any], rest: Iterable[Any]) -> list[Any]:
    """Parameters of a test: `quick` ones always, `rest` with `make test-slow`."""
    return [*quick, *(pytest.param(value, marks=pytest.mark.slow) for value in rest)]


def small(states: str | States) -> States:
    """`states` for tensors of any size: named ones keep float32 moments below 4096 elements."""
    return replace(st.resolve_states(states), min_numel=0)


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(32, 8, generator=generator).to(dtype)
        optimizer.zero_grad()
        (model(x) - x[:, :4]).square().mean().backward()
        optimizer.step()


def parameters(shapes: list[tuple[int, ...]] = ODD, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    """Gradients of changing size, some of them far from 1, the same for the same step."""
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        p.grad = (torch.randn(p.shape, generator=generator) * 10.0 ** ((i + step) % 5 - 3)).to(p.dtype)


def weights(params: nn.Module | list[nn.Parameter]) -> torch.Tensor:
    params = list(params.parameters()) if isinstance(params, nn.Module) else params
    return torch.cat([p.detach().flatten() for p in params])


def bits(x: torch.Tensor) -> torch.Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.detach().contiguous().view(integers[x.itemsize])


def snapshot(optimizer: torch.optim.Optimizer) -> list[dict[str, torch.Tensor]]:
    return [{k: bits(v).clone() for k, v in state.items()} for state in optimizer.state.values()]


def same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True)
    )


def held(optimizer: LowPrecOptimizer, param: torch.Tensor, slot: str) -> torch.Tensor:
    """What the state says the slot is, in float32."""
    item = optimizer._plan_now().of(param)
    if item.slots[slot] == "float32":
        return item.state[slot].clone()
    quant: Any = item.slots[slot]
    return st.read(item.state, slot, quant, torch.float32, param.shape).clone()
