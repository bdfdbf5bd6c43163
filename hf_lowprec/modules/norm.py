# SPDX-License-Identifier: Apache-2.0
"""Normalisation layers in one kernel each way: the module's own class with another `forward`.

In eager mode a norm of transformers is eight elementwise kernels, most of them over float32 copies of its input, and
more in backward, which keeps several of the copies. The fused one reads the input once, and keeps it and one or two
numbers a row. It is the same function with the same roundings (`norm_kind`), so it needs no recipe.

Wherever fusing would not be the same or not pay, the module's own forward runs: on the CPU, under torch.compile (which
fuses norms itself), for dtypes or tensor classes that the kernels do not know, and once its eps or another setting has
changed or its class got another forward.
"""

from __future__ import annotations

import copyreg
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_lowprec import kernels as _kernels  # noqa: F401  (registers the CUDA implementations of `ops`)
from hf_lowprec.functional import applier, first_order
from hf_lowprec.modules.linear import set_class
from hf_lowprec.modules.norm_kind import NormKind, Rule, norm_kind, rounding_rule, settings
from hf_lowprec.modules.sharing import offer
from hf_lowprec.modules.state import LayerState
from hf_lowprec.operands import Remake, Source, shaped
from hf_lowprec.ops.norm import norm, norm_backward

__all__ = ["LowPrecLayerNorm", "LowPrecNorm", "LowPrecRMSNorm", "NormKind", "fuse_norm", "norm_kind", "unfuse_norm"]

_PLAIN = (Tensor, nn.Parameter)
_UNKNOWN: Any = object()
# torch's own norms are one call of C++ each way, with less host time than ours (measured: 19 against 56 us forward).
# Our kernels gain 118 us of device time both ways for 2^25 bfloat16 elements on an H200, and less in proportion; where
# the two cross depends on what a step waits for. This is between: an estimate.
_TORCHS = (nn.LayerNorm.forward, nn.RMSNorm.forward)
_LEAST = 1 << 23


@dataclass
class NormState:
    """What a fused norm knows besides its Parameters.

    enabled: False runs the module's own forward.
    emulate: use the operator's plain-torch implementation for CPU tensors instead of the module's own forward.
    least: smaller inputs, in elements, are left to the module's own forward.
    settings: attributes of the module that make it this kind.
    rules: of the dtypes seen so far.
    readers: one layer of each group that may make this norm's output again in backward (`sharing.offer`).
    """

    kind: NormKind
    enabled: bool = True
    emulate: bool = False
    least: int = 0
    settings: tuple[tuple[str, Any], ...] = ()
    rules: dict[tuple[Any, ...], Rule | None] = field(default_factory=dict)
    readers: tuple[LayerState, ...] = field(default=(), compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "rules": {}}

    def rule(self, module: nn.Module, x: Any, weight: Tensor | None, bias: Tensor | None) -> Rule | None:
        """How to compute the module's own result for x, or None: by its own forward."""
        if type(x) not in _PLAIN or not (x.is_cuda or self.emulate) or not x.dim() or x.numel() < self.least:
            return None
        now = module.__dict__
        for name, value in self.settings:
            if now.get(name) != value:
                return None
        # Sharded, offloaded or empty Parameters: the module's own forward has the right word about them.
        shape = (x.shape[-1] if self.kind.width is None else self.kind.width,)
        for parameter in (weight, bias):
            if parameter is not None and (type(parameter) not in _PLAIN or parameter.shape != shape):
                return None
        if x.shape[-1] != shape[0]:
            return None
        device = x.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        dtypes = (x.dtype, None if weight is None else weight.dtype, None if bias is None else bias.dtype)
        key = (device, autocast, dtypes)
        rule = self.rules.get(key, _UNKNOWN)
        if rule is _UNKNOWN:
            if device == "cuda" and torch.cuda.is_current_stream_capturing():
                return None  # a graph records no comparison
            rule = self.rules[key] = rounding_rule(module, self.kind, *dtypes, x.device)
        return rule


class LowPrecNorm:
    """The shared body; `_lowprec_norm` is attached by `fuse_norm`."""

    _lowprec_norm: NormState
    _original: ClassVar[Any]
    _known_forward: ClassVar[Any]  # of _original, when the class was made
    _forward_hooks: dict[int, Any]
    weight: Tensor | None
    bias: Tensor | None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        state = self._lowprec_norm
        usual = state.enabled and len(args) == 1 and not kwargs and not torch.compiler.is_compiling()
        if usual and self._original.forward is type(self)._known_forward:
            (x,) = args
            weight, bias = getattr(self, "weight", None), getattr(self, "bias", None)
            rule = state.rule(self, x, weight, bias)  # type: ignore[arg-type]
            if rule is not None:
                y = _fused(x, weight, bias, state.kind, rule)
                # Else x is not kept for a backward; and a hook may write y through `.data`, which nobody notices.
                if state.readers and y.requires_grad and not self._forward_hooks:
                    for reader in state.readers:  # groups cast with scales of their own
                        again = Remake(partial(_again, state.kind, rule))
                        offer(reader, y, Source(again, (x, weight, bias)))
                return y
        return super().forward(*args, **kwargs)  # type: ignore[misc, no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: a pickle names what it is made of.
        reduced = super().__reduce_ex__(protocol)
        if reduced[0] is not copyreg.__newobj__ or reduced[1][0] is not type(self):  # type: ignore[attr-defined, index]
            return reduced
        known = self._original.forward is type(self)._known_forward
        return (_blank, (_mixin(type(self)), self._original, known), *reduced[2:])

    def extra_repr(self) -> str:
        own = super().extra_repr()  # type: ignore[misc]
        return f"{own}, fused" if own else "fused"


class LowPrecRMSNorm(LowPrecNorm):
    """An RMSNorm of any class whose forward and backward are one kernel each."""


class LowPrecLayerNorm(LowPrecNorm):
    """A LayerNorm of any class whose forward and backward are one kernel each."""


_CLASSES: dict[tuple[type, type, Any], type] = {}


def fuse_norm(module: nn.Module, kind: NormKind, *, emulate: bool = False) -> NormState:
    """Let `module`, a norm of this kind (`norm_kind(module)`), compute by the fused kernels, in place."""
    unfuse_norm(module)
    own = type(module)
    least = _LEAST if own.forward in _TORCHS and not emulate else 0
    state = NormState(kind, emulate=emulate, least=least, settings=settings(module))
    module._lowprec_norm = state  # type: ignore[assignment]
    set_class(module, _fused_class(LowPrecLayerNorm if kind.center else LowPrecRMSNorm, own, own.forward))
    return state


def unfuse_norm(module: nn.Module) -> None:
    """Undo `fuse_norm`; nothing happens to any other module.

    Raises TypeError: somebody subclassed it since.
    """
    if not isinstance(module, LowPrecNorm):
        return
    if type(module) not in _CLASSES.values():
        raise TypeError(
            f"{type(module).__name__} was made from a fused norm (by a parametrization, say): remove that first"
        )
    set_class(module, module._original)
    del module._lowprec_norm


def _fused_class(mixin: type, original: type, forward: Any) -> type:
    """forward: the one of `original` that the kernels stand for."""
    cls = _CLASSES.get((mixin, original, forward))
    if cls is None:
        body = {
            "_original": original, "_known_forward": forward, "__module__": __name__, "__doc__": original.__doc__,
        }  # fmt: skip
        cls = _CLASSES[mixin, original, forward] = type(f"LowPrec{original.__name__}", (mixin, original), body)
    return cls


def _mixin(cls: type) -> type:
    return LowPrecLayerNorm if issubclass(cls, LowPrecLayerNorm) else LowPrecRMSNorm


def _blank(mixin: type, original: Any, known: bool = True) -> Any:
    """known: the forward of `original` is the one that was fused."""
    cls: Any = _fused_class(mixin, original, original.forward if known else None)
    return cls.__new__(cls)


# --- the function ----------------------------------------------------------------------------------------------------


def _fused(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: NormKind, rule: Rule) -> Tensor:
    if torch.is_grad_enabled():
        out: Tensor = _apply(x, weight, bias, kind, rule)
        return out
    return norm(x, weight, bias, kind.eps, kind.center, kind.plus_one, rule.mid, rule.out)[0]


def _again(kind: NormKind, rule: Rule, tensors: Sequence[Any]) -> Tensor:
    x, weight, bias = tensors
    return norm(x, weight, bias, kind.eps, kind.center, kind.plus_one, rule.mid, rule.out)[0]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: NormKind, rule: Rule) -> Tensor:
        y, stats = norm(x, weight, bias, kind.eps, kind.center, kind.plus_one, rule.mid, rule.out)
        ctx.save_for_backward(x, stats, weight)
        ctx.plus_one, ctx.mid = kind.plus_one, rule.mid
        ctx.bias_dtype = None if bias is None else bias.dtype
        return shaped(y, y.shape) if y._is_view() else y

    @staticmethod
    @first_order  # as the linear layers: no second derivatives
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, stats, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x, grad_weight, grad_bias = norm_backward(
            grad, x, stats, weight, ctx.plus_one, ctx.mid, needs_x,
            weight.dtype if needs_weight else None, ctx.bias_dtype if needs_bias else None,
        )  # fmt: skip
        return (
            grad_x if needs_x else None,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            None,
            None,
        )


_apply = applier(_Norm)
