# SPDX-License-Identifier: Apache-2.0
"""hf_lowprec::glu, glu_backward, glu_again on CUDA: fused kernels for FP8 and FP16, a scale per tensor, of gate and up
also per tile; plain torch for the rest."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from hf_lowprec.kernels.quantize import plan_of, quantize
from hf_lowprec.kernels.triton.glu import Hidden, Policy, forward, is_tile
from hf_lowprec.kernels.triton.glu_backward import again, backward
from hf_lowprec.numerics import ACTIVATIONS
from hf_lowprec.ops.glu import as_matrix, default_glu, default_glu_again, default_glu_backward
from hf_lowprec.ops.quantize import parse_quant, quant_key, sample_stride
from hf_lowprec.ops.registry import count

_INPUTS = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _policy(quant: str, ready: bool) -> Policy | None:
    """None: the fused kernels do not cover it."""
    plan = plan_of(quant)
    if plan is None:
        return None
    scale = {"none": "constant", "static": "constant", "delayed": "ready" if ready else "delayed"}.get(plan.method)
    return Policy(plan.number, plan.dtype, plan.constants, scale or plan.method, plan.constant_scale)


@cache
def _kept_policy(saved: str) -> Policy | None:
    """`_policy` for gate and up, which may have a scale per tile."""
    quant = parse_quant(saved)
    scaling = quant.scaling
    if scaling.granularity != "tile":
        return _policy(saved, False)
    whole = _policy(quant_key(replace(quant, scaling=replace(scaling, granularity="tensor", block=()))), False)
    if whole is None or whole.scale == "constant":  # which all tiles share
        return whole
    rows, cols = scaling.block
    return whole._replace(scale="tile", tile=(rows, cols)) if is_tile(rows, cols) else None


@cache
def _casts_fp8(device: torch.device) -> bool:
    """Whether the GPU converts to float8; the kernels have no other way. (The interpreter's device is the CPU.)"""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _covered(gate: Tensor, up: Tensor | None, act: str) -> bool:
    same = up is None or (up.dtype == gate.dtype and up.shape == gate.shape)
    known = gate.dtype in _INPUTS and act in ACTIVATIONS and _casts_fp8(gate.device)
    return same and known and gate.numel() > 0 and gate.dim() > 0


def glu(
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
    if not _covered(gate, up, act):
        return default_glu(gate, up, act, write, quant, scale, amax, counts, seed, ready, saved)
    hidden = None if quant is None else _policy(quant, ready and scale is not None)
    kept = None if saved is None else _kept_policy(saved)
    if (hidden is None) != (quant is None) or (kept is None) != (saved is None):
        count("glu in several passes")
        return _in_passes(gate, up, act, write, quant, scale, amax, counts, seed, ready, saved, kept)
    count("fused glu")
    codes = None
    if hidden is not None:
        follows = hidden.scale in ("delayed", "ready")
        if hidden.scale == "delayed" and scale is None:
            hidden = hidden._replace(scale="current")
        given, noted = (scale, amax) if follows else (None, None)
        codes = Hidden(hidden, given, noted, counts, sample_stride(gate.numel()))
    return forward(gate, up, act, write=write, hidden=codes, kept=kept)


def _in_passes(
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
    kept: Policy | None,
) -> list[Tensor]:
    """For policies that the fused kernel does not know: h by the kernel, and gate and up if it knows theirs; the other
    casts after it."""
    h, *codes = forward(gate, up, act, write=True, hidden=None, kept=kept)
    out = [h] if write else []
    if quant is not None:
        out += quantize(h.view(-1, h.shape[-1]), quant, scale, False, amax, counts, seed, ready)
    out += codes
    if saved is not None and kept is None:
        for tensor in (gate, up):
            if tensor is not None:
                qdata, used = quantize(as_matrix(tensor), saved, None, False, None, None, None)
                out += (qdata.view(tensor.shape), used)
    return out


def glu_backward(
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
    kept = None if saved is None else _kept_policy(saved)
    fits = _covered(grad, None, act) and grad_gate.dtype == grad.dtype
    if not fits or (kept is None) != (saved is None):
        default_glu_backward(grad, gate, gate_scale, up, up_scale, act, saved, grad_gate, grad_up)
    else:
        tile = None if kept is None else kept.tile
        backward(grad, gate, gate_scale, up, up_scale, act, grad_gate, grad_up, tile)


def glu_again(
    gate: Tensor,
    gate_scale: Tensor,
    up: Tensor | None,
    up_scale: Tensor | None,
    act: str,
    saved: str,
    dtype: torch.dtype,
) -> Tensor:
    fits = dtype in _INPUTS and act in ACTIVATIONS and _casts_fp8(gate.device) and gate.numel() > 0
    kept = _kept_policy(saved)
    if not fits or kept is None:
        return default_glu_again(gate, gate_scale, up, up_scale, act, saved, dtype)
    count("fused glu again")
    return again(gate, gate_scale, up, up_scale, act, dtype, kept.tile)
