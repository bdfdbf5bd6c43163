# SPDX-License-Identifier: Apache-2.0
"""hf_lowprec::scaled_mm on CUDA: `torch._scaled_mm`, with the layouts that Hopper's FP8 tensor cores demand, and MX.

Both operands must be contiguous along the reduction axis ("K-major") and that axis, like the output's last one, must
be a multiple of 16 long. wgrad reduces over tokens, of which there can be any number: its operands are transposed into
buffers padded with zeros, which add nothing to the sums.

Sums narrower than float32 have a kernel of their own, of the same bits as the default.

Operands of integers (int8, ternary, signs) go to `torch._int_mm`, whose int32 sums are exact: the result differs from
the default implementation's in no bit, unless a policy's stored factor divides (`Scaling.inverse`).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from hf_lowprec.describe import FP8_SINCE, MX_SINCE, native_since
from hf_lowprec.kernels.microscaling import mx_scaled_mm
from hf_lowprec.kernels.triton.accumulate import accumulate
from hf_lowprec.kernels.triton.any_decode import decode, decodes, fits_bfloat16
from hf_lowprec.kernels.triton.formats import covered
from hf_lowprec.kernels.triton.transpose import transpose
from hf_lowprec.ops.quantize import parse_quant
from hf_lowprec.ops.registry import count
from hf_lowprec.ops.scaled_mm import (
    are_integers,
    default_scaled_mm,
    finish_sums,
    integer_mm,
    multiply,
    parse_accumulation,
    sums_name,
)

_ALIGNMENT = 16
_BFLOAT16_SINCE = (8, 0)
_MX = "scaled_mm MX"


def scaled_mm(
    a: Tensor,
    a_scale: Tensor,
    a_quant: str,
    b: Tensor,
    b_scale: Tensor,
    b_quant: str,
    bias: Tensor | None,
    dtype: torch.dtype,
    fast: bool,
    emulate: bool,
    accumulation: str = "",
    seed: Tensor | None = None,
) -> Tensor:
    if accumulation:
        return _narrow(a, a_scale, a_quant, b, b_scale, b_quant, bias, dtype, accumulation, seed)
    if emulate:
        return _emulated(a, a_scale, a_quant, b, b_scale, b_quant, bias, dtype)
    if are_integers(a_quant, b_quant):
        k = min(a.shape[1], b.shape[1])
        qa, qb = parse_quant(a_quant), parse_quant(b_quant)
        return integer_mm(a[:, :k], a_scale, qa, b[:, :k], b_scale, qb, bias, dtype)
    named = _supported(a.device, a_quant, b_quant)
    m, depth = a.shape
    n, other = b.shape
    if not (m and n and depth and other):
        out = a.new_zeros((m, n), dtype=dtype)
        return out if bias is None else out + bias.to(dtype)
    # cuBLASLt adds a bias in 16-bit outputs only.
    fused = bias is not None and dtype != torch.float32
    added = bias.to(dtype) if bias is not None and fused else None
    if named.startswith(_MX):
        out = mx_scaled_mm(a, a_scale, b, b_scale, added, dtype)
        count(named)
        return out if bias is None or fused else out.add_(bias)
    if depth % _ALIGNMENT or a.stride() != (depth, 1):
        a = _k_major(a)
    if other % _ALIGNMENT or b.stride() != (other, 1):
        b = _k_major(b)
    out = torch._scaled_mm(
        a,
        b.t(),
        scale_a=a_scale,
        scale_b=b_scale,
        bias=added,
        out_dtype=dtype,
        use_fast_accum=fast,
    )
    count(named)
    return out if bias is None or fused else out.add_(bias)


def _emulated(
    a: Tensor,
    a_scale: Tensor,
    a_quant: str,
    b: Tensor,
    b_scale: Tensor,
    b_quant: str,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`default_scaled_mm`, whose operands a kernel decodes in one pass.

    Tensor cores multiply them where bfloat16 holds both exactly: the products are exact then as well, and summed in
    float32. Float32's own GEMMs are an order of magnitude slower.
    """
    qa, qb = parse_quant(a_quant), parse_quant(b_quant)
    itself = qa.scaling.inverse or qb.scaling.inverse or are_integers(a_quant, b_quant)
    if itself or not decodes(qa) or not decodes(qb):
        return default_scaled_mm(a, a_scale, a_quant, b, b_scale, b_quant, bias, dtype, False, True)
    count(f"emulated {qa.format} x {qb.format}")
    k = min(a.shape[1], b.shape[1])
    one_scale = a_scale.numel() == 1 and b_scale.numel() == 1
    exact = multiplies_bfloat16(a.device) and fits_bfloat16(qa, not one_scale) and fits_bfloat16(qb, not one_scale)
    values = torch.bfloat16 if exact else torch.float32
    hp_a = decode(a[:, :k], None if one_scale else a_scale, qa, values)
    hp_b = decode(b[:, :k], None if one_scale else b_scale, qb, values)
    return multiply(hp_a, hp_b, a_scale.float() * b_scale.float() if one_scale else None, bias, dtype)


def _narrow(
    a: Tensor,
    a_scale: Tensor,
    a_quant: str,
    b: Tensor,
    b_scale: Tensor,
    b_quant: str,
    bias: Tensor | None,
    dtype: torch.dtype,
    accumulation: str,
    seed: Tensor | None,
) -> Tensor:
    formats = parse_quant(a_quant).format, parse_quant(b_quant).format
    if covered(formats[0]) is None or covered(formats[1]) is None:
        return default_scaled_mm(
            a, a_scale, a_quant, b, b_scale, b_quant, bias, dtype, False, True, accumulation, seed
        )  # fmt: skip
    k = min(a.shape[1], b.shape[1])  # what one has beyond the other are zeros
    sums = accumulate(a[:, :k], formats[0], b[:, :k], formats[1], parse_accumulation(accumulation), seed)
    count(f"triton {formats[0]} x {formats[1]}{sums_name(accumulation)}")
    return finish_sums(sums, a_scale, b_scale, bias, dtype)


def _k_major(x: Tensor) -> Tensor:
    """`x` with its last axis contiguous, and rows that begin at multiples of 16 elements."""
    row, element = x.stride()
    if element == 1 and row % _ALIGNMENT == 0 and x.shape[1] % _ALIGNMENT == 0:
        return x
    return transpose(x if row == 1 else x.contiguous(), pad_to=_ALIGNMENT)


@cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether torch has bfloat16 GEMMs with float32 outputs there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _BFLOAT16_SINCE


@cache
def _supported(device: torch.device, a_quant: str, b_quant: str) -> str:
    """The name under which a GEMM of these operands is counted. Raises RuntimeError: this GPU has none."""
    a, b = parse_quant(a_quant), parse_quant(b_quant)
    formats = a.format, b.format
    capability = torch.cuda.get_device_capability(device)
    if native_since(a) == native_since(b) == MX_SINCE and formats != ("e5m2", "e5m2"):
        if capability < MX_SINCE:
            raise RuntimeError(
                f"{torch.cuda.get_device_name(device)} has no MX tensor cores (sm_100 or newer needed): convert with "
                "emulate=True to compute the same numbers slowly, or use recipe 'bf16'"
            )
        return f"{_MX} {formats[0]} x {formats[1]}"
    if capability < FP8_SINCE:
        raise RuntimeError(
            f"{torch.cuda.get_device_name(device)} has no FP8 tensor cores (sm_89 or newer needed): convert with "
            "emulate=True to compute the same numbers slowly, or use recipe 'bf16'"
        )
    one_scale = all(q.scaling.granularity == "tensor" or q.scaling.method in ("none", "static") for q in (a, b))
    if not set(formats) <= {"e4m3fn", "e5m2"} or formats == ("e5m2", "e5m2") or not one_scale:
        raise RuntimeError(
            f"no native GEMM for {formats[0]} x {formats[1]} with these scalings: convert with emulate=True"
        )
    return f"_scaled_mm {formats[0]} x {formats[1]}"
