# SPDX-License-Identifier: Apache-2.0
"""Activations of MLPs and their derivatives, in the dtype that they are given.

Backward needs the derivative from the activation's input alone, because low-precision training keeps that input (or a
quantised copy of it) and nothing else. In float64 these functions are the truth that kernels are measured against, in
float32 they are what the CPU computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715
_QUICK = 1.702


def _gelu_slope(x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    return 0.5 * torch.erfc(x * -math.sqrt(0.5)) + x * density


def _gelu(x: Tensor) -> Tensor:
    # 1 + erf(z) has no digits left for z << 0, erfc(-z) has all of them.
    return x * (0.5 * torch.erfc(x * -math.sqrt(0.5)))


def _tanh_argument(x: Tensor) -> Tensor:
    return 2.0 * _SQRT_2_OVER_PI * (x + _CUBIC * x * x * x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return x * torch.sigmoid(_tanh_argument(x))  # (1 + tanh(z)) / 2 = sigmoid(2 z), which keeps its digits for z << 0


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    s, rest = _sigmoids(_tanh_argument(x))
    return s + x * s * rest * (2.0 * _SQRT_2_OVER_PI * (1.0 + 3.0 * _CUBIC * x * x))


def _silu_slope(x: Tensor) -> Tensor:
    s, rest = _sigmoids(x)
    return s + x * s * rest


def _quick_gelu_slope(x: Tensor) -> Tensor:
    s, rest = _sigmoids(_QUICK * x)
    return s + _QUICK * x * s * rest


def _sigmoid_slope(x: Tensor) -> Tensor:
    s, rest = _sigmoids(x)
    return s * rest


def _sigmoids(x: Tensor) -> tuple[Tensor, Tensor]:
    """sigmoid(x) and 1 - sigmoid(x), the latter without cancellation."""
    return torch.sigmoid(x), torch.sigmoid(-x)


# name: (function, derivative)
_FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "silu": (F.silu, _silu_slope),
    "gelu": (_gelu, _gelu_slope),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_slope),
    "relu": (F.relu, lambda x: torch.where(x <= 0, torch.zeros_like(x), torch.ones_like(x))),
    "relu2": (lambda x: F.relu(x).square(), lambda x: 2.0 * F.relu(x)),
    "quick_gelu": (lambda x: x * torch.sigmoid(_QUICK * x), _quick_gelu_slope),
    "sigmoid": (torch.sigmoid, _sigmoid_slope),
    "identity": (lambda x: x, torch.ones_like),
}
ACTIVATIONS: tuple[str, ...] = tuple(_FUNCTIONS)


def activation(name: str, x: Tensor) -> Tensor:
    """act(x), in the dtype of `x` (float32 or float64). Raises ValueError: a name that is not in ACTIVATIONS."""
    return _named(name)[0](x)


def activation_slope(name: str, x: Tensor) -> Tensor:
    """act'(x), likewise. relu'(0) is 0, as torch has it."""
    return _named(name)[1](x)


def _named(name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    try:
        return _FUNCTIONS[name]
    except KeyError:
        raise ValueError(f"no activation {name!r}; there are {', '.join(ACTIVATIONS)}") from None
