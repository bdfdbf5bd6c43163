# SPDX-License-Identifier: Apache-2.0
"""Linear layers in low precision: the module's own class with another `forward`.

Conversion sets `module.__class__`; weights, names, hooks and everything that holds a reference to the module go on
working, so checkpoints, PEFT, TRL, DDP, FSDP and an optimizer that was built earlier notice nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowprec.functional import linear
from hf_lowprec.modules.input_norm import normalise
from hf_lowprec.modules.state import LayerState
from hf_lowprec.ops import parse_quant
from hf_lowprec.ops.registry import count

FEW_TOKENS = "linear in the base precision, few tokens"


class LowPrecMixin:
    """The shared body; `_lowprec` is attached by `hf_lowprec.convert`."""

    _lowprec: LayerState
    weight: Tensor
    bias: Tensor | None
    training: bool
    _parameters: dict[str, Any]

    def forward(self, input: Tensor) -> Tensor:
        state = self._lowprec
        if not state.enabled:
            return super().forward(input)  # type: ignore[misc, no-any-return]
        if state.least and input.numel() < state.least and not torch.compiler.is_compiling():
            count(FEW_TOKENS)
            return super().forward(input)  # type: ignore[misc, no-any-return]
        if state.operands[0].counts.device != input.device:
            state.to(input.device)
        if state.input_norm is not None:
            input = normalise(input, state.input_norm)
        # `self.weight` is a call of nn.Module.__getattr__; a parametrized one is found by it alone.
        own = self._parameters
        weight = own["weight"] if "weight" in own else self.weight
        bias = own["bias"] if "bias" in own else self.bias
        if torch.compiler.is_compiling():  # what is kept between calls would be a guard or a break
            return linear(input, weight, bias, state.spec, *state.operands, sum_seeds=state.sum_seeds)
        quantized = None
        if state.shared is not None:
            observe = torch.is_grad_enabled()
            quantized = state.shared.quantize(state, input, observe=observe, columns=observe and weight.requires_grad)
        return linear(
            input, weight, bias, state.spec, *state.operands,
            ready=state.ready,
            quantized=quantized,
            quantized_weight=state.weight_cache.get(
                weight, state.spec, state.operands[1], ready=state.ready[1], training=self.training
            ),
            sum_seeds=state.sum_seeds,
        )  # fmt: skip

    def train(self, mode: bool = True) -> Any:
        if mode != self.training:
            self._lowprec.weight_cache.drop()
        return super().train(mode)  # type: ignore[misc]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        out = super()._apply(fn, recurse)  # type: ignore[misc]
        if self.weight.device.type != "meta":
            self._lowprec.to(self.weight.device)
        return out

    def extra_repr(self) -> str:
        spec = self._lowprec.spec
        roles = (("i", spec.fprop_input), ("w", spec.fprop_weight), ("go", spec.dgrad_grad_output))
        formats = ",".join(f"{r}:{parse_quant(k).format if k else 'hp'}" for r, k in roles)
        return f"{super().extra_repr()}, {formats}"  # type: ignore[misc]


class LowPrecLinear(LowPrecMixin, nn.Linear):  # type: ignore[misc]
    """`nn.Linear` whose GEMMs run in a recipe's formats. Made by `hf_lowprec.convert`, not by hand."""


_CLASSES: dict[type, type] = {nn.Linear: LowPrecLinear}
VARIANTS: dict[type, type] = {}  # class with another forward -> the class above that it stands for


def low_precision_class(module: nn.Module) -> type | None:
    """The class that `module` becomes, or None. Exact classes only: a subclass may have a forward of its own."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    if pytorch_utils is not None and pytorch_utils.Conv1D not in _CLASSES:
        from hf_lowprec.modules.conv1d import LowPrecConv1D

        _CLASSES[pytorch_utils.Conv1D] = LowPrecConv1D
    return _CLASSES.get(type(module))


def original_class(module: nn.Module) -> type:
    """The class that `module` had before conversion. Raises TypeError: somebody subclassed it since."""
    kind = VARIANTS.get(type(module), type(module))
    original = next((o for o, converted in _CLASSES.items() if kind is converted), None)
    if original is None:
        raise TypeError(
            f"{type(module).__name__} was made from a converted layer (by a parametrization, say): remove that first"
        )
    return original


def set_class(module: nn.Module, cls: type) -> None:
    """`module.__class__ = cls`, also for the bound forward that accelerate's device hooks (`device_map`) have kept."""
    old = type(module)
    module.__class__ = cls  # type: ignore[assignment]
    if getattr(module.__dict__.get("_old_forward"), "__func__", None) is old.forward:  # type: ignore[attr-defined]
        module._old_forward = MethodType(cls.forward, module)  # type: ignore[assignment, attr-defined]


def forward_is_replaced(module: nn.Module) -> bool:
    """Whether somebody set `module.forward` on the instance, so that a class's forward would never run."""
    if "forward" not in module.__dict__:
        return False
    return getattr(module.__dict__.get("_old_forward"), "__func__", None) is not type(module).forward
