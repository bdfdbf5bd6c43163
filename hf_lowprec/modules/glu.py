# SPDX-License-Identifier: Apache-2.0
"""MLPs whose elementwise middle is one kernel each way: the module's own class with another `forward`.

    down(act(gate(x)) * up(x))      also with gate and up packed in one linear, or without a gate: down(act(up(x)))

The linears stay children that are called as modules, so hooks, adapters and names go on working. Between them one
operator computes the product and, in the same pass over memory, what is read of it later: its quantised form, which is
handed over to `down`, and what backward needs of gate and up in the recipe's `saved` format. With E4M3 there an MLP
keeps three bytes per hidden element for backward; as transformers computes it in bfloat16, eight. With `saved_inputs`
`remade` it keeps two: `down`'s backward makes the product again of gate and up as they are kept.

Under torch.compile the module's own forward runs, which the compiler fuses itself. It also runs where the fused form
would not be what the module is now: its class got another forward, or its activation was replaced or hooked.
"""

from __future__ import annotations

import copyreg
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from hf_lowprec import kernels as _kernels  # noqa: F401  (registers the CUDA implementations of `ops`)
from hf_lowprec import numerics, ops
from hf_lowprec.functional import applier, first_order
from hf_lowprec.modules.linear import LowPrecMixin, forward_is_replaced, set_class
from hf_lowprec.modules.sharing import hand_over
from hf_lowprec.modules.state import ProducedOperand
from hf_lowprec.operands import Quantized, Remake, Source
from hf_lowprec.ops.glu import glu, glu_again, glu_backward
from hf_lowprec.recipe import Quant

ACTS = numerics.ACTIVATIONS
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, nn.Parameter)


@dataclass(frozen=True)
class GLU:
    """Names of the parts of an MLP.

    gate, up, down: children. gate == up: one linear holds both, the gate in its first half unless `gate_first` is
        False. up None: no gate, `gate` is the only linear before the activation.
    act: one of ACTS.
    after: a child that is called on the output of `down` (a dropout), or None.
    """

    gate: str
    up: str | None
    down: str
    act: str
    gate_first: bool = True
    after: str | None = None


@dataclass
class GLUState:
    """What a fused MLP knows besides its children.

    saved: policy under which gate and up are kept for backward, or None: as they are.
    enabled: False runs the module's own forward.
    others: the children and functions that only the module's own forward calls, the activation among them.
    """

    parts: GLU
    saved: str | None = None
    enabled: bool = True
    others: tuple[tuple[str, Any], ...] = field(default=(), compare=False, repr=False)

    def holds(self, module: nn.Module) -> bool:
        """Whether `others` are still what they were, and nobody listens to their calls."""
        for name, known in self.others:
            if not isinstance(known, nn.Module):
                if module.__dict__.get(name) is not known:
                    return False
            elif (
                module._modules.get(name) is not known or "forward" in known.__dict__
                or known._forward_hooks or known._forward_pre_hooks
                or known._backward_hooks or known._backward_pre_hooks
            ):  # fmt: skip
                return False
        return True


class LowPrecGLU:
    """The shared body; `_lowprec_glu` is attached by `fuse_glu`."""

    _lowprec_glu: GLUState
    _original: ClassVar[Any]
    _known_forward: ClassVar[Any]  # of _original, when the class was made

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self._lowprec_glu
        if not state.enabled or len(args) != 1 or kwargs or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if self._original.forward is not type(self)._known_forward or not state.holds(self):  # type: ignore[arg-type]
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        parts = state.parts
        down: nn.Module = getattr(self, parts.down)
        # gate and up live in the frames below, so that they are gone when `down` runs.
        out = down(_middle(self, state, down, args[0]))
        return out if parts.after is None else getattr(self, parts.after)(out)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: a pickle names what it is made of.
        reduced = super().__reduce_ex__(protocol)
        if reduced[0] is not copyreg.__newobj__ or reduced[1][0] is not type(self):  # type: ignore[attr-defined, index]
            return reduced
        known = self._original.forward is type(self)._known_forward
        return (_blank, (self._original, known), *reduced[2:])

    def extra_repr(self) -> str:
        own = super().extra_repr()  # type: ignore[misc]
        return f"{own}, fused" if own else "fused"


_CLASSES: dict[tuple[type, Any], type] = {}


def fuse_glu(module: nn.Module, parts: GLU, saved: Quant | None = None) -> None:
    """Let `module`, whose own forward computes what `parts` says and nothing else, run its fused form, in place.

    Raises ValueError: an activation that is not in ACTS, no such child, a forward that was replaced on the instance,
    or a `saved` policy that needs more than the tensor itself.
    """
    if parts.act not in ACTS:
        raise ValueError(f"no fused kernel for the activation {parts.act!r}; there are {', '.join(ACTS)}")
    for name in {parts.gate, parts.up or parts.gate, parts.down, parts.after or parts.down}:
        if not isinstance(getattr(module, name, None), nn.Module):
            raise ValueError(f"{type(module).__name__} has no child {name!r}")
    if forward_is_replaced(module):
        raise ValueError("its forward was replaced on the instance")
    if saved is not None:
        if saved.scaling.method in ("delayed", "predicted"):
            raise ValueError(
                f"saved: {saved.scaling.method} scaling keeps a scale between steps; saved tensors have none"
            )
        if saved.rounding.mode == "stochastic":
            raise ValueError("saved: stochastic rounding needs a seed; choose nearest")
    key = None if saved is None else ops.quant_key(saved)
    module._lowprec_glu = GLUState(parts, key, others=_others(module, parts))  # type: ignore[assignment]
    if not isinstance(module, LowPrecGLU):
        set_class(module, _fused_class(type(module), type(module).forward))


def _others(module: nn.Module, parts: GLU) -> tuple[tuple[str, Any], ...]:
    called = (parts.gate, parts.up, parts.down, parts.after)
    children = [(name, child) for name, child in module._modules.items() if name not in called]
    functions = [
        (name, value)
        for name, value in module.__dict__.items()
        if callable(value) and name != "forward" and not name.startswith("_")
    ]
    return (*((name, child) for name, child in children if child is not None), *functions)


def unfuse_glu(module: nn.Module) -> None:
    """Undo `fuse_glu`; nothing happens to any other module.

    Raises TypeError: somebody subclassed it since.
    """
    if not isinstance(module, LowPrecGLU):
        return
    if type(module) not in _CLASSES.values():
        raise TypeError(
            f"{type(module).__name__} was made from a fused MLP (by a parametrization, say): remove that first"
        )
    set_class(module, module._original)
    del module._lowprec_glu


def _fused_class(original: type, forward: Any) -> type:
    """forward: the one of `original` that the fused form stands for."""
    cls = _CLASSES.get((original, forward))
    if cls is None:
        body = {
            "_original": original, "_known_forward": forward, "__module__": __name__, "__doc__": original.__doc__,
        }  # fmt: skip
        cls = _CLASSES[original, forward] = type(f"LowPrec{original.__name__}", (LowPrecGLU, original), body)
    return cls


def _blank(original: Any, known: bool = True) -> Any:
    """known: the forward of `original` is the one that was fused."""
    cls: Any = _fused_class(original, original.forward if known else None)
    return cls.__new__(cls)


# --- forward --------------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """One call of the operator beside its tensors with gradients: a single argument, as autograd looks at each.

    reader: how `down` quantises its input, or None.
    found: receives the quantised h.
    """

    act: str
    packed: bool
    gate_first: bool
    saved: str | None
    observe: bool
    reader: ProducedOperand | None
    found: list[Quantized]


def _middle(module: Any, state: GLUState, down: nn.Module, x: Tensor) -> Tensor:
    """act(gate(x)) * up(x), its quantised form handed over to `down`."""
    parts = state.parts
    packed = parts.up == parts.gate
    gate: Tensor = getattr(module, parts.gate)(x)
    up: Tensor | None = None if packed or parts.up is None else getattr(module, parts.up)(x)
    fits = type(gate) in _PLAIN and gate.dtype in _DTYPES and (
        up is None or (type(up) in _PLAIN and up.dtype == gate.dtype and up.shape == gate.shape)
    )  # fmt: skip
    if not fits:
        return _unfused(gate, up, parts, packed)
    linear, reader = _reader_of(down), None
    if linear is not None:
        layer = linear._lowprec
        if layer.operands[0].counts.device != gate.device:
            layer.to(gate.device)
        reader = layer.input_operand(gate.numel() // 2 if packed else gate.numel())
    observe = torch.is_grad_enabled()
    call = _Call(parts.act, packed, parts.gate_first, state.saved, observe, reader, [])
    h: Tensor = _apply(gate, up, call)
    if linear is not None and call.found:
        hand_over(linear._lowprec, h, call.found.pop())
    return h


def _unfused(gate: Tensor, up: Tensor | None, parts: GLU, packed: bool) -> Tensor:
    """As the module itself would, for dtypes and tensor classes that the operator does not take."""
    if packed:
        gate, up = _halves(gate, parts.gate_first)
    wide = gate if gate.dtype == torch.float64 else gate.float()
    h = numerics.activation(parts.act, wide).to(gate.dtype)
    return h if up is None else h * up


def _halves(both: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    first, second = both.chunk(2, -1)
    return (first, second) if gate_first else (second, first)


def _reader_of(down: nn.Module) -> LowPrecMixin | None:
    """The converted linear that is called with exactly what `down` is called with: itself, or inside a LoRA layer."""
    if isinstance(down, LowPrecMixin):
        return down
    inner = getattr(down, "base_layer", None) if hasattr(down, "lora_A") else None
    return inner if isinstance(inner, LowPrecMixin) else None


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, call: _Call) -> Tensor:
        both = gate
        if call.packed:
            gate, up = _halves(both, call.gate_first)
        keeps = call.observe and any(ctx.needs_input_grad[:2])
        quant = scale = amax = counts = seed = None
        ready = False
        if call.reader is not None:
            quant, operand, ready, _ = call.reader
            scale, seed = operand.scale, operand.seed
            if call.observe:
                amax, counts = operand.amax, operand.counts
        out = glu(
            gate, up, call.act, quant=quant, scale=scale, amax=amax, counts=counts, seed=seed, ready=ready,
            saved=call.saved if keeps else None,
        )  # fmt: skip
        kept: tuple[Tensor | None, ...] = ()
        if keeps and call.saved is None:
            kept = (both,) if call.packed else (gate, up)
        elif keeps:
            kept = (*out.gate, *(out.up or ()))  # type: ignore[misc]
        ctx.save_for_backward(*kept)
        if out.quantized is not None:
            assert call.reader is not None
            source = None
            if kept and call.reader.remade:
                how = partial(_again, call.act, call.packed, call.gate_first, call.saved, both.dtype)
                source = Source(Remake(how), kept)
            call.found.append(Quantized(*out.quantized, source=source))
        ctx.call, ctx.shape, ctx.dtype = call, both.shape, both.dtype
        assert out.h is not None
        return out.h

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        gate, up, gate_scale, up_scale = _unpacked(ctx.saved_tensors, call.packed, call.gate_first, call.saved)
        out = torch.empty(ctx.shape, dtype=ctx.dtype, device=grad.device)
        grad_up: Tensor | None
        if call.packed:
            grad_gate, grad_up = _halves(out, call.gate_first)
        else:
            grad_gate, grad_up = out, None if up is None else torch.empty_like(out)
        glu_backward(
            grad, gate, up, call.act, grad_gate, grad_up, gate_scale=gate_scale, up_scale=up_scale, saved=call.saved
        )
        return (out, None, None) if call.packed else (out, grad_up, None)


def _unpacked(
    kept: Sequence[Any], packed: bool, gate_first: bool, saved: str | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """gate, up and their scales of what forward kept."""
    if saved is not None:
        gate, gate_scale, *rest = kept
        up, up_scale = rest or (None, None)
        return gate, up, gate_scale, up_scale
    gate, up = _halves(kept[0], gate_first) if packed else kept
    return gate, up, None, None


def _again(
    act: str, packed: bool, gate_first: bool, saved: str | None, dtype: torch.dtype, kept: Sequence[Any]
) -> Tensor:
    """h of what was kept: forward's where that is gate and up as they were."""
    gate, up, gate_scale, up_scale = _unpacked(kept, packed, gate_first, saved)
    return glu_again(gate, up, act, dtype, gate_scale=gate_scale, up_scale=up_scale, saved=saved)


_apply = applier(_GLU)
