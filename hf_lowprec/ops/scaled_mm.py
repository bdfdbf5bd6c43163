# SPDX-License-Identifier: Apache-2.0
"""hf_lowprec::scaled_mm: output = (a * a_scale) @ (b * b_scale).T + bias, from quantised operands.

The default implementation is the truth: operands are decoded, products and sums are float32, the scales multiply the
sum, one rounding to the output dtype ends it. Two exceptions: where each row has its own scale, or a policy's stored
factor divides (`Scaling.inverse`), the values themselves are multiplied; and two operands of integers whose scales are
those of rows or tensors are multiplied as integers, which is exact, before the scales do. The CUDA implementation
(`kernels/`) is `torch._scaled_mm`, whose tensor cores sum in another order and, on Hopper, with fewer bits: tests hold
it to a stated tolerance.

Sums narrower than float32 (`numerics.accumulation`) cross the operator boundary as a string, as policies do; the empty
one stands for float32. Their kernel gives the same bits as the default.
"""

from __future__ import annotations

import json
from functools import cache

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor

from hf_lowprec import numerics
from hf_lowprec.formats import get_format
from hf_lowprec.ops.quantize import parse_quant
from hf_lowprec.ops.registry import LIBRARY, count, direct
from hf_lowprec.recipe import Accumulation, Quant

_ACCUMULATION = TypeAdapter(Accumulation)

LIBRARY.define(
    "scaled_mm(Tensor a, Tensor a_scale, str a_quant, Tensor b, Tensor b_scale, str b_quant, Tensor? bias,"
    " ScalarType dtype, bool fast, bool emulate, str accumulation='', Tensor? seed=None) -> Tensor"
)


@cache
def accumulation_key(accumulation: Accumulation) -> str:
    """The string that stands for `accumulation` in operator calls; empty for float32 sums, fast or not."""
    if accumulation.format is None:
        return ""
    return json.dumps(_ACCUMULATION.dump_python(accumulation, mode="json", exclude_defaults=True), sort_keys=True)


@cache
def parse_accumulation(key: str) -> Accumulation:
    accumulation: Accumulation = _ACCUMULATION.validate_python(json.loads(key))
    return accumulation


def scaled_mm(
    a: Tensor,
    a_scale: Tensor,
    a_quant: str,
    b: Tensor,
    b_scale: Tensor,
    b_quant: str,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype,
    fast: bool = False,
    emulate: bool = False,
    accumulation: str = "",
    seed: Tensor | None = None,
) -> Tensor:
    """[M, K] x [N, K] -> [M, N]. Operands may have any strides; both reduce along their last axis.

    One operand may be longer along K than the other: what is beyond the shorter one must be zeros (the padding of
    `cast_transpose`).

    Args:
        dtype: of the output: float32, bfloat16 or float16.
        fast: let the tensor cores keep partial sums in their own narrow accumulators.
        emulate: use the default implementation also where a kernel exists (but not instead of the kernel of narrow
            sums, which computes the same).
        accumulation: `accumulation_key(...)`: sums narrower than float32.
        seed: 0-dim int64, for stochastic rounding of those.

    Raises:
        RuntimeError: a GPU without FP8 tensor cores, or a format pair it has no GEMM for, unless `emulate`.
        ValueError: narrow sums of operands with a scale per block, or stochastic ones without a seed.
    """
    kernel = direct("scaled_mm", a) or torch.ops.hf_lowprec.scaled_mm
    out: Tensor = kernel(a, a_scale, a_quant, b, b_scale, b_quant, bias, dtype, fast, emulate, accumulation, seed)
    return out


def default_scaled_mm(
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
    qa, qb = parse_quant(a_quant), parse_quant(b_quant)
    k = min(a.shape[1], b.shape[1])
    divides = qa.scaling.inverse or qb.scaling.inverse
    if not divides and not accumulation and are_integers(a_quant, b_quant):
        return integer_mm(a[:, :k], a_scale, qa, b[:, :k], b_scale, qb, bias, dtype)
    count(f"emulated {qa.format} x {qb.format}{sums_name(accumulation)}")
    a, b = a[:, :k], b[:, :k]
    if accumulation:
        how = parse_accumulation(accumulation)
        out = numerics.accumulate(_values(a, qa.format), _values(b, qb.format), how, seed=seed)
        return finish_sums(out, a_scale, b_scale, bias, dtype)
    one_scale = a_scale.numel() == 1 and b_scale.numel() == 1 and not divides
    if one_scale:
        hp_a, hp_b = _values(a, qa.format), _values(b, qb.format)
    else:
        hp_a = numerics.dequantize(numerics.ScaledTensor(a, a_scale), qa)
        hp_b = numerics.dequantize(numerics.ScaledTensor(b, b_scale), qb)
    return multiply(hp_a, hp_b, a_scale.float() * b_scale.float() if one_scale else None, bias, dtype)


def multiply(a: Tensor, b: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """a @ b.T, times one scale, plus the bias, in `dtype`; products and sums are float32.

    a, b: float32; on CUDA also both bfloat16.
    """
    # Autocast reaches into operators and would turn the float32 product into a bfloat16 one.
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype != torch.float32:
            out = torch.mm(a, b.t(), out_dtype=torch.float32)
        elif scale is None:
            return F.linear(a, b, None if bias is None else bias.float()).to(dtype)
        else:
            out = a @ b.t()
        if scale is not None:
            out *= scale
        if bias is not None:
            out += bias.float()
        return out.to(dtype)


@cache
def sums_name(accumulation: str) -> str:
    """` in e6m9`, for counts; empty for float32."""
    return f" in {parse_accumulation(accumulation).format}" if accumulation else ""


def finish_sums(out: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Narrow sums [M, N], float32, overwritten: times the scales, plus the bias, in `dtype`.

    Raises ValueError: a scale that is neither one number nor one per row.
    """
    for scale, rows in ((a_scale, out.shape[0]), (b_scale, out.shape[1])):
        if scale.numel() not in (1, rows):
            raise ValueError(f"narrow sums need one scale, or one per row, got {tuple(scale.shape)} for {rows} rows")
    out *= (a_scale.float().reshape(-1, 1) * b_scale.float().reshape(1, -1)).expand(out.shape)
    if bias is not None:
        out += bias.float()
    return out.to(dtype)


@cache
def are_integers(a_quant: str, b_quant: str) -> bool:
    """Whether the product is one of integers, times a factor per row of either operand."""
    policies = parse_quant(a_quant), parse_quant(b_quant)
    return all(get_format(q.format).is_integer and q.scaling.granularity in ("tensor", "row") for q in policies)


def integer_mm(
    a: Tensor,
    a_scale: Tensor,
    qa: Quant,
    b: Tensor,
    b_scale: Tensor,
    qb: Quant,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The product of two operands of integers [M, K] x [N, K], one scale per tensor or per row of each.

    The int32 sum is exact; it is rounded to float32, multiplied by the scale of its row, then of its column.
    """
    count(f"_int_mm {qa.format} x {qb.format}")
    units = numerics.integer_unit_of(qa.format) * numerics.integer_unit_of(qb.format)
    sums = numerics.integer_product(numerics.integers(a, qa.format), numerics.integers(b, qb.format))
    rows = numerics.multiplier(a_scale.float(), qa.scaling) * units
    columns = numerics.multiplier(b_scale.float(), qb.scaling)
    out = sums.float().mul_(rows).mul_(columns if columns.dim() == 0 else columns.view(1, -1))
    if bias is not None:
        out += bias.float()
    return out.to(dtype)


def _values(qdata: Tensor, format_name: str) -> Tensor:
    if qdata.dtype.is_floating_point:
        return qdata.to(torch.float32)
    return numerics.decode(qdata, format_name)


LIBRARY.impl("scaled_mm", default_scaled_mm, "CompositeExplicitAutograd")


def _fake_scaled_mm(
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
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


torch.library.register_fake("hf_lowprec::scaled_mm", _fake_scaled_mm)
