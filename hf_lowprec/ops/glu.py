# SPDX-License-Identifier: Apache-2.0
"""hf_lowprec::glu: the elementwise middle of an MLP, act(gate) * up, with what the GEMM behind it and backward need.

    h        = round(act(gate) * up)          float32 between, one rounding to the dtype of `gate`
    quantised h                               of the rounded h: the bits that `ops.quantize(h)` gives
    quantised gate, quantised up              what backward reads instead of the 16-bit tensors (`Recipe.saved`)

Each is quantised as a matrix [rows, N] of all its leading dimensions: tiles run over the tokens of a batch, whichever
sequence they belong to.

Eager modules round act(gate) to the tensor's dtype before the product; here only the product is rounded, so the error
against float64 is smaller. Backward computes in float32 from what was kept and rounds each gradient once:

    grad_gate = grad * up * act'(gate)        grad_up = grad * act(gate)

`up` may be None: an MLP without a gate, h = act(gate).

hf_lowprec::glu_again: h once more, of what was kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowprec import numerics
from hf_lowprec.ops.quantize import default_quantize, parse_quant, storage_dtype
from hf_lowprec.ops.registry import LIBRARY, direct

LIBRARY.define(
    "glu(Tensor gate, Tensor? up, str act, bool write, str? quant, Tensor? scale, Tensor(a!)? amax,"
    " Tensor(b!)? counts, Tensor? seed, bool ready, str? saved) -> Tensor[]"
)
LIBRARY.define(
    "glu_backward(Tensor grad, Tensor gate, Tensor? gate_scale, Tensor? up, Tensor? up_scale, str act, str? saved,"
    " Tensor(a!) grad_gate, Tensor(b!)? grad_up) -> ()"
)
LIBRARY.define(
    "glu_again(Tensor gate, Tensor gate_scale, Tensor? up, Tensor? up_scale, str act, str saved, ScalarType dtype)"
    " -> Tensor"
)


class GLUOutput(NamedTuple):
    """What was asked for; None otherwise. Pairs are (qdata, scale) as `ops.quantize` returns them.

    quantized: h as a matrix [rows, N].
    gate, up: qdata [..., N]; scale of a matrix [rows, N] (`numerics.scale_shape`).
    """

    h: Tensor | None
    quantized: tuple[Tensor, Tensor] | None
    gate: tuple[Tensor, Tensor] | None
    up: tuple[Tensor, Tensor] | None


def glu(
    gate: Tensor,
    up: Tensor | None,
    act: str,
    *,
    write: bool = True,
    quant: str | None = None,
    scale: Tensor | None = None,
    amax: Tensor | None = None,
    counts: Tensor | None = None,
    seed: Tensor | None = None,
    ready: bool = False,
    saved: str | None = None,
) -> GLUOutput:
    """act(gate) * up.

    Args:
        gate, up: [..., N] of one shape and dtype; halves of one packed tensor are fine.
        act: one of `numerics.ACTIVATIONS`.
        write: return h in the dtype of `gate`.
        quant, scale, amax, counts, seed: return h quantised too; as `ops.quantize`, first use of a delayed scale
            included.
        ready: a delayed scale is known to be there already (not 0), which spares a launch.
        saved: `quant_key` of the policy under which gate and up are returned for `glu_backward`.
    """
    kernel = direct("glu", gate)
    if kernel is None:
        kernel = torch.ops.hf_lowprec.glu
    out = kernel(gate, up, act, write, quant, scale, amax, counts, seed, ready, saved)
    rest = iter(out)

    def pair(wanted: bool) -> tuple[Tensor, Tensor] | None:
        return (next(rest), next(rest)) if wanted else None

    h = next(rest) if write else None
    quantized = pair(quant is not None)
    kept = [pair(saved is not None and tensor is not None) for tensor in (gate, up)]
    return GLUOutput(h, quantized, *kept)


def default_glu(
    gate: Tensor,
    up: Tensor | None,
    act: str,
    write: bool,
    quant: str | None,
    scale: Tensor | None,
    amax: Tensor | None,
    counts: Tensor | None,
    seed: Tensor | None,
    ready: bool,
    saved: str | None,
) -> list[Tensor]:
    out: list[Tensor] = []
    if write or quant is not None:
        h = numerics.activation(act, gate.detach().float())
        h = (h if up is None else h * up.detach().float()).to(gate.dtype)
        if write:
            out.append(h)
        if quant is not None:
            matrix = h.reshape(-1, h.shape[-1])
            out.extend(default_quantize(matrix, quant, scale, False, amax, counts, seed))
    if saved is not None:
        for kept in (gate, up):
            if kept is not None:
                qdata, used = default_quantize(as_matrix(kept), saved, None, False, None, None, None)
                out.extend((qdata.view(kept.shape), used))
    return out


def as_matrix(x: Tensor) -> Tensor:
    """[rows, N] of [..., N]."""
    return x.detach().reshape(-1, x.shape[-1])


LIBRARY.impl("glu", default_glu, "CompositeExplicitAutograd")


def _fake_glu(
    gate: Tensor,
    up: Tensor | None,
    act: str,
    write: bool,
    quant: str | None,
    scale: Tensor | None,
    amax: Tensor | None,
    counts: Tensor | None,
    seed: Tensor | None,
    ready: bool,
    saved: str | None,
) -> list[Tensor]:
    matrix = (gate.numel() // gate.shape[-1], gate.shape[-1])

    def pair(shape: tuple[int, ...], key: str) -> list[Tensor]:
        policy = parse_quant(key)
        qdata = gate.new_empty(matrix, dtype=storage_dtype(policy.format))
        scale = numerics.scale_like(qdata, policy.scaling)
        return [qdata.view(shape), scale.to(torch.float8_e8m0fnu) if policy.scaling.store == "e8m0" else scale]

    out = [gate.new_empty(gate.shape)] if write else []
    if quant is not None:
        out += pair(matrix, quant)
    if saved is not None:
        out += pair(tuple(gate.shape), saved)
        out += [] if up is None else pair(tuple(up.shape), saved)
    return out


torch.library.register_fake("hf_lowprec::glu", _fake_glu)


def glu_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    act: str,
    grad_gate: Tensor,
    grad_up: Tensor | None,
    *,
    gate_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    saved: str | None = None,
) -> None:
    """Fills grad_gate and grad_up, [..., N] of the dtype of `grad`; halves of one packed tensor are fine.

    gate, up: what `glu` was given, or with `saved` the quantised tensors that it returned, with their scales.
    """
    kernel = direct("glu_backward", grad)
    if kernel is None:
        kernel = torch.ops.hf_lowprec.glu_backward
    kernel(grad, gate, gate_scale, up, up_scale, act, saved, grad_gate, grad_up)


def default_glu_backward(
    grad: Tensor,
    gate: Tensor,
    gate_scale: Tensor | None,
    up: Tensor | None,
    up_scale: Tensor | None,
    act: str,
    saved: str | None,
    grad_gate: Tensor,
    grad_up: Tensor | None,
) -> None:
    g, x = grad.detach().float(), _restored(gate, gate_scale, saved)
    if up is not None and grad_up is not None:
        grad_up.copy_(g * numerics.activation(act, x))
        g = g * _restored(up, up_scale, saved)
    grad_gate.copy_(g * numerics.activation_slope(act, x))


def _restored(kept: Tensor, scale: Tensor | None, saved: str | None) -> Tensor:
    if saved is None or scale is None:
        return kept.detach().float()
    codes = numerics.ScaledTensor(as_matrix(kept), scale)
    return numerics.dequantize(codes, parse_quant(saved)).view(kept.shape)


LIBRARY.impl("glu_backward", default_glu_backward, "CompositeExplicitAutograd")


def _fake_glu_backward(
    grad: Tensor,
    gate: Tensor,
    gate_scale: Tensor | None,
    up: Tensor | None,
    up_scale: Tensor | None,
    act: str,
    saved: str | None,
    grad_gate: Tensor,
    grad_up: Tensor | None,
) -> None:
    return None


torch.library.register_fake("hf_lowprec::glu_backward", _fake_glu_backward)


def glu_again(
    gate: Tensor,
    up: Tensor | None,
    act: str,
    dtype: torch.dtype,
    *,
    gate_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    saved: str | None = None,
) -> Tensor:
    """h [..., N] in `dtype`, of what `glu_backward` takes.

    Without `saved` the h of forward, bit for bit; else act(gate) * up of the values that the codes stand for, float32
    between, rounded once.
    """
    if saved is None:
        h = glu(gate, up, act).h
        assert h is not None
        return h
    kernel = direct("glu_again", gate)
    if kernel is None:
        kernel = torch.ops.hf_lowprec.glu_again
    out: Tensor = kernel(gate, gate_scale, up, up_scale, act, saved, dtype)
    return out


def default_glu_again(
    gate: Tensor,
    gate_scale: Tensor,
    up: Tensor | None,
    up_scale: Tensor | None,
    act: str,
    saved: str,
    dtype: torch.dtype,
) -> Tensor:
    h = numerics.activation(act, _restored(gate, gate_scale, saved))
    return (h if up is None else h * _restored(up, up_scale, saved)).to(dtype)


LIBRARY.impl("glu_again", default_glu_again, "CompositeExplicitAutograd")


def _fake_glu_again(
    gate: Tensor,
    gate_scale: Tensor,
    up: Tensor | None,
    up_scale: Tensor | None,
    act: str,
    saved: str,
    dtype: torch.dtype,
) -> Tensor:
    return gate.new_empty(gate.shape, dtype=dtype)


torch.library.register_fake("hf_lowprec::glu_again", _fake_glu_again)
