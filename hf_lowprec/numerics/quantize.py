# SPDX-License-Identifier: Apache-2.0
"""Quantise a tensor by a policy: q = round(x * (1 / scale)), x ~ q * scale.

The reciprocal is a float32 division per group, the products float32 multiplications; with power-of-two scales both are
exact. (With `Scaling.inverse` the factor itself is stored: q = round(x * factor), x ~ q / factor.) Where a format has
a NaN code, a non-finite element becomes NaN alone and its group's scale comes from the other elements. A format
without one (MXFP4, MXINT8) cannot say so: there the scale of the group is NaN, as in OCP MX v1.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowprec.formats import Codebook, Format, get_format
from hf_lowprec.numerics.codes import codes_of, value_table
from hf_lowprec.numerics.lookup import Lookup, look_up
from hf_lowprec.numerics.rounding import Part, check, code_table, decode_part, map_chunks, rounder
from hf_lowprec.numerics.scaling import (
    NonFinite,
    expand_scale,
    mean_per_group,
    scale_from_amax,
    statistic_per_group,
    store_scale,
    way_in,
)
from hf_lowprec.recipe import Quant


class ScaledTensor(NamedTuple):
    """x ~ qdata * scale.

    qdata: torch's dtype of the format where it has one, else codes of `numerics.encode`; the shape of x.
    scale: float32 or torch.float8_e8m0fnu, of `numerics.scale_shape`.
    """

    qdata: Tensor
    scale: Tensor


def quantize(
    x: Tensor,
    quant: Quant,
    *,
    scale: Tensor | None = None,
    reduction_axis: int = -1,
    seed: int | Tensor | None = None,
    words: Tensor | None = None,
    nonfinite: NonFinite = "element",
    own_scale: bool = False,
) -> ScaledTensor:
    """Quantise `x` (float32, bfloat16, float16; any shape; float64 is rounded to float32 first).

    scale: used instead of one from this tensor's amax; delayed scaling needs it.
    own_scale: `scale` is what an earlier call gave for this `x`, and so says what the format cannot (NaN).
    reduction_axis: the axis that the GEMM sums over, along which blocks lie.
    seed, words: see `round_to_format`. nonfinite: see `amax_per_group`.

    Raises ValueError: delayed scaling without `scale`; a non-finite element where neither the format nor a scale of
    our own can say NaN; and as `round_to_format`.
    """
    fmt = get_format(quant.format)
    stored = _scale(x, quant, fmt, scale, reduction_axis, nonfinite)
    native = fmt.torch_dtype_name
    dtype = torch.float32 if native is None else getattr(torch, native)
    x = centred(x, quant)
    own = (
        scale is None or own_scale
    ) and quant.scaling.method == "current"  # what the format cannot say, the group's scale says
    # torch casts to float8 faster than a look-up, but not on the CPU.
    if native is None or (x.device.type == "cpu" and not torch.compiler.is_compiling()):
        table = code_table(fmt, quant.rounding.mode, quant.overflow, x.device)
        if table is not None and (fmt.has_nan or own):
            check(x, fmt, quant.rounding, quant.overflow, seed, words)
            codes = _scaled(x, quant, stored.float(), reduction_axis, lambda z: look_up(z, table), torch.uint8)
            return ScaledTensor(codes if native is None else codes.view(dtype), stored)
    rounded = _apply(x, quant, fmt, stored.float(), reduction_axis, seed, words, dtype)
    if native is not None:
        return ScaledTensor(rounded, stored)
    if own and not fmt.has_nan:
        rounded.nan_to_num_(nan=0.0)
        return ScaledTensor(codes_of(rounded, fmt, checked=False), stored)
    return ScaledTensor(codes_of(rounded, fmt), stored)


def dequantize(
    scaled: ScaledTensor, quant: Quant, dtype: torch.dtype = torch.float32, reduction_axis: int = -1
) -> Tensor:
    """qdata * scale (qdata / scale with `Scaling.inverse`) in float32, then `dtype`."""
    q = scaled.qdata
    fmt = get_format(quant.format)
    scale, run = _runs(scaled.scale.float(), q, quant, reduction_axis)
    if q.dtype.itemsize == 1 and q.device.type == "cpu":
        q = q.view(torch.uint8)  # by table: torch converts float8 an element at a time

    look_up = decode_part(fmt, q.device, torch.float32)

    def part(some: Tensor, start: int, out: Tensor | None) -> Tensor:
        values = some.float() if some.is_floating_point() else look_up(some, start, out)
        rows = values.view(-1, run)
        factor = _pick(scale, slice(start // run, start // run + rows.shape[0]))
        return rows.div_(factor) if quant.scaling.inverse else rows.mul_(factor)

    return map_chunks(part, q, dtype, run)


def quantize_dequantize(
    x: Tensor,
    quant: Quant,
    *,
    scale: Tensor | None = None,
    reduction_axis: int = -1,
    seed: int | Tensor | None = None,
    words: Tensor | None = None,
    nonfinite: NonFinite = "element",
) -> Tensor:
    """`dequantize(quantize(x, ...))` in the dtype of `x`, without the codes."""
    fmt = get_format(quant.format)
    used = _scale(x, quant, fmt, scale, reduction_axis, nonfinite).float()
    own = scale is None and quant.scaling.method == "current"
    table = _table_of(quant, fmt, x.device) if fmt.has_nan or own else None
    return _apply(
        centred(x, quant), quant, fmt, used, reduction_axis, seed, words, x.dtype, dequantized=True, table=table
    )


def _table_of(quant: Quant, fmt: Format | Codebook, device: torch.device) -> Lookup | None:
    """Where two look-ups are faster than rounding: on the CPU, in the modes that the FPU does not have."""
    if device.type != "cpu" or torch.compiler.is_compiling() or quant.rounding.mode not in ("away", "zero"):
        return None
    return code_table(fmt, quant.rounding.mode, quant.overflow, device)


def _by_table(table: Lookup, fmt: Format | Codebook) -> Part:
    """`rounder`'s function by way of the codes."""
    values = value_table(fmt, table.words.device, torch.float32)

    def part(z: Tensor, start: int, out: Tensor | None) -> Tensor:
        codes = look_up(z, table).view(-1)
        if out is None:
            return values.index_select(0, codes).view(z.shape)
        return torch.index_select(values, 0, codes, out=out.view(-1)).view(z.shape)

    return part


def centred(x: Tensor, quant: Quant) -> Tensor:
    """`x`, or with `quant.center` the float32 `x` minus the mean of its group."""
    return x.detach().float() - mean_per_group(x, quant.scaling) if quant.center else x


def _scale(
    x: Tensor, quant: Quant, fmt: Format | Codebook, scale: Tensor | None, reduction_axis: int, nonfinite: NonFinite
) -> Tensor:
    scaling = quant.scaling
    if scale is not None:
        return scale
    if scaling.method in ("delayed", "predicted"):
        raise ValueError(f"{scaling.method} scaling keeps its scale between steps: pass scale=")
    if scaling.method in ("none", "static"):
        amax = torch.ones((), device=x.device)
    else:
        whole = nonfinite if fmt.has_nan else "group"
        amax = statistic_per_group(x, scaling, reduction_axis, nonfinite=whole)
    return store_scale(scale_from_amax(amax, fmt, scaling), scaling)


def _apply(
    x: Tensor,
    quant: Quant,
    fmt: Format | Codebook,
    scale: Tensor,
    reduction_axis: int,
    seed: int | Tensor | None,
    words: Tensor | None,
    dtype: torch.dtype,
    *,
    dequantized: bool = False,
    table: Lookup | None = None,
) -> Tensor:
    """round(x / scale), or that times scale, computed in float32 and returned in `dtype`; by `table` if given."""
    x = x.detach()
    check(x, fmt, quant.rounding, quant.overflow, seed, words)
    if table is not None:
        round_part = _by_table(table, fmt)
    else:
        round_part = rounder(fmt, torch.float32, quant.rounding, quant.overflow, seed, words)
    scale, run = _runs(scale, x, quant, reduction_axis)
    inverse = way_in(scale, quant.scaling)

    def part(hp: Tensor, start: int, out: Tensor | None) -> Tensor:
        rows = hp.float().view(-1, run)
        here = slice(start // run, start // run + rows.shape[0])
        rounded = round_part(rows * _pick(inverse, here), start, None if out is None else out.view(-1, run))
        if not dequantized:
            return rounded
        return rounded.div_(_pick(scale, here)) if quant.scaling.inverse else rounded.mul_(_pick(scale, here))

    return map_chunks(part, x, dtype, run)


def _scaled(
    x: Tensor,
    quant: Quant,
    scale: Tensor,
    reduction_axis: int,
    function: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """function(x / scale) of float32, elementwise, in `dtype`."""
    scale, run = _runs(scale, x, quant, reduction_axis)
    inverse = way_in(scale, quant.scaling)

    def part(hp: Tensor, start: int, out: Tensor | None) -> Tensor:
        rows = hp.float().view(-1, run)
        here = slice(start // run, start // run + rows.shape[0])
        return function(rows * _pick(inverse, here))

    return map_chunks(part, x.detach(), dtype, run)


def _pick(factors: Tensor, here: slice) -> Tensor:
    return factors if factors.dim() == 0 else factors[here, None]


def _runs(scale: Tensor, x: Tensor, quant: Quant, reduction_axis: int) -> tuple[Tensor, int]:
    """The scale as one number, or one per run of consecutive elements, and the length of a run."""
    scaling = quant.scaling
    if scale.numel() == 1:
        return scale.reshape(()), 1
    if scaling.granularity == "row":
        return scale.reshape(-1), max(x.shape[-1], 1)
    if scaling.granularity == "block" and reduction_axis in (-1, x.dim() - 1) and x.shape[-1] % scaling.block[0] == 0:
        return scale.reshape(-1), scaling.block[0]
    return expand_scale(scale, tuple(x.shape), scaling, reduction_axis).expand(x.shape).reshape(-1), 1
