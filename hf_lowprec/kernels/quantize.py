# SPDX-License-Identifier: Apache-2.0
"""hf_lowprec::quantize and ::cast_transpose on CUDA: fused kernels for per-tensor FP8 and FP16 (`triton.cast`), one
family for other formats, roundings, overflows and granularities (`triton.any_cast`), plain torch for the rest:
codebooks, columns and tiles, formats without NaN whose scale is given."""

from __future__ import annotations

from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor

from hf_lowprec.formats import get_format
from hf_lowprec.kernels.triton import any_cast
from hf_lowprec.kernels.triton.cast import CURRENT, DELAYED, GIVEN, CastPlan, FormatConstants, cast
from hf_lowprec.kernels.triton.cast import current_scale as triton_current_scale
from hf_lowprec.kernels.triton.cast_transpose import cast_transpose as triton_cast_transpose
from hf_lowprec.kernels.triton.transpose import transpose
from hf_lowprec.ops.quantize import (
    ALIGNMENT,
    default_cast_transpose,
    default_current_scale,
    default_quantize,
    default_transposed,
    parse_quant,
    storage_dtype,
)

_INPUTS = (torch.float32, torch.bfloat16, torch.float16)
_CONSTANT = ("none", "static")
_NUMBERS = count()


@cache
def _any_plan(quant: str) -> any_cast.AnyPlan | None:
    return any_cast.plan_of(parse_quant(quant))


@cache
def plan_of(quant: str) -> CastPlan | None:
    """How a policy runs in the fused kernels, parsed once per policy. None: they do not cover it."""
    policy = parse_quant(quant)
    scaling = policy.scaling
    covered = (
        policy.format in ("e4m3fn", "e5m2", "e5m10")
        and policy.rounding.mode == "nearest"
        and policy.overflow == "saturate"
        and scaling.granularity == "tensor"
        and scaling.method in ("none", "static", "current", "delayed")
        and scaling.store == "float32"
        and scaling.snap in ("exact", "rceil")
        and scaling.plain
        and not policy.center
    )
    if not covered:
        return None
    fmt = get_format(policy.format)
    constants = FormatConstants.of(fmt.max, fmt.tiny, scaling.margin, scaling.snap == "rceil")
    dtype = storage_dtype(policy.format)
    return CastPlan(next(_NUMBERS), dtype, constants, scaling.method, 2.0**scaling.exponent)


def _how(
    plan: CastPlan, input: Tensor, scale: Tensor | None, fixed: bool, amax: Tensor | None
) -> tuple[int, Tensor | None, Tensor | None]:
    """Method of the kernels, the scale that they are given, and the amax that they raise."""
    if fixed:
        return GIVEN, scale, None
    if plan.method in _CONSTANT:
        return GIVEN, _constant(plan.constant_scale, input.device), None
    if plan.method == "delayed" and scale is not None:
        return DELAYED, scale, amax
    return CURRENT, None, None


def _constant(value: float, device: torch.device) -> Tensor:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return torch.full((), value, dtype=torch.float32, device=device)  # its memory is the graph's
    return kept_constant(value, device)


@cache
def kept_constant(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=device)


def quantize(
    input: Tensor,
    quant: str,
    scale: Tensor | None,
    fixed: bool,
    amax: Tensor | None,
    counts: Tensor | None,
    seed: Tensor | None,
    ready: bool = False,
    partials: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    plan = plan_of(quant)
    if plan is None or input.dtype not in _INPUTS or not input.numel():
        general = _any_plan(quant)
        if general is None or not any_cast.takes(input, general, fixed, seed):
            return default_quantize(input, quant, scale, fixed, amax, counts, seed, ready, partials)
        return any_cast.quantize(
            input, general, scale, fixed=fixed, amax=amax, seed=seed, partials=partials, counts=counts
        )
    method, given, amax = _how(plan, input, scale, fixed, amax)
    return cast(
        input.contiguous(), plan, method, given, ready=ready, partials=partials, amax=amax, counts=counts
    )  # fmt: skip


def cast_transpose(
    input: Tensor,
    quant: str,
    scale: Tensor | None,
    fixed: bool,
    amax: Tensor | None,
    counts: Tensor | None,
    seed: Tensor | None,
    ready: bool = False,
    partials: Tensor | None = None,
    rows: bool = True,
    columns: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """A layout that is not asked for is None."""
    plan = plan_of(quant)
    n = input.numel()
    if plan is None or plan.dtype.itemsize != 1 or input.dtype not in _INPUTS or not n:
        general = _any_plan(quant)
        if plan is not None or general is None or not any_cast.takes(input, general, fixed, seed):
            return default_cast_transpose(
                input, quant, scale, fixed, amax, counts, seed, ready, partials, rows, columns
            )  # fmt: skip
        qdata, used = any_cast.quantize(
            input.reshape(-1, input.shape[-1]), general, scale,
            fixed=fixed, amax=amax, seed=seed, partials=partials, counts=counts,
        )  # fmt: skip
        return qdata if rows else None, transposed(qdata) if columns else None, used
    c = input.shape[-1]
    method, given, amax = _how(plan, input, scale, fixed, amax)
    if not columns:
        flat, used = cast(
            input.contiguous(), plan, method, given, ready=ready, partials=partials, amax=amax, counts=counts
        )
        return flat if flat.dim() == 2 else flat.view(-1, c), None, used
    return triton_cast_transpose(
        input if input.is_contiguous() else _matrix(input, c), plan, method, given,
        ready=ready, partials=partials, amax=amax, counts=counts, rows=rows, columns=columns,
    )  # fmt: skip


def quantize_operator(input: Tensor, quant: str, scale: Tensor | None, fixed: bool, *args: Any) -> tuple[Tensor, ...]:
    """`quantize` as the dispatcher has to see it: what is returned is nobody else's."""
    qdata, used = quantize(input, quant, scale, fixed, *args)
    return qdata, _own(used, quant, fixed)


def cast_transpose_operator(
    input: Tensor, quant: str, scale: Tensor | None, fixed: bool, *args: Any
) -> tuple[Tensor, ...]:
    """`cast_transpose` likewise, and a layout that was not asked for is an empty tensor."""
    rows, columns, used = cast_transpose(input, quant, scale, fixed, *args)
    nothing = input.new_empty(0, dtype=storage_dtype(parse_quant(quant).format))
    return nothing if rows is None else rows, nothing if columns is None else columns, _own(used, quant, fixed)


def _own(used: Tensor, quant: str, fixed: bool) -> Tensor:
    plan = plan_of(quant)
    return used.clone() if fixed or (plan is not None and plan.method in _CONSTANT) else used


def _matrix(input: Tensor, c: int) -> Tensor:
    """[R, C] with contiguous rows, a view where there is one."""
    if input.requires_grad:
        input = input.detach()
    matrix = input if input.dim() == 2 else input.reshape(-1, c)
    return matrix if matrix.stride(1) == 1 and matrix.stride(0) >= c else matrix.contiguous()


def transposed(qdata: Tensor) -> Tensor:
    if qdata.dtype.itemsize != 1 or not qdata.numel():
        return default_transposed(qdata)
    return transpose(qdata.t(), pad_to=ALIGNMENT)


def current_scale(input: Tensor, quant: str) -> Tensor:
    plan = plan_of(quant)
    if plan is None or input.dtype not in _INPUTS or plan.method in _CONSTANT:
        return default_current_scale(input, quant)
    return triton_current_scale(input.contiguous(), plan)
