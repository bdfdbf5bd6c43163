# SPDX-License-Identifier: Apache-2.0
"""hf_lowprec::quantize and ::cast_transpose: scale and cast one GEMM operand, and note what the cast saw.

    scale = fixed, or the delayed one, or (first use, current scaling) from this tensor's amax
    qdata = cast(input / scale)

`cast_transpose` gives a matrix in the two layouts that GEMMs read: as it lies, for a product that sums over its
columns, and transposed, for one that sums over its rows. Hopper's FP8 tensor cores want both operands contiguous along
the sum, so the transpose is data in memory, padded with zeros to a multiple of 16.

A policy crosses the operator boundary as a string (`quant_key`), because torch.compile treats strings as constants.
Non-finite elements become NaN in qdata and are left out of amax, so one bad row cannot spoil the scale of the others.
"""

from __future__ import annotations

import json
from functools import cache

import torch
from pydantic import TypeAdapter
from torch import Tensor

from hf_lowprec import numerics
from hf_lowprec.formats import Format, get_format
from hf_lowprec.numerics.scaling import store_scale
from hf_lowprec.ops.registry import LIBRARY, direct
from hf_lowprec.recipe import Quant, Scaling

_QUANT = TypeAdapter(Quant)
# Counters look at about this many elements of a tensor: fractions to 1 % need no second pass over all of it.
_SAMPLE = 1 << 16
ALIGNMENT = 16

_STATE = "Tensor? scale, bool fixed, Tensor(a!)? amax, Tensor(b!)? counts, Tensor? seed"
LIBRARY.define(
    f"quantize(Tensor input, str quant, {_STATE}, bool ready=False, Tensor? partials=None)"
    " -> (Tensor qdata, Tensor scale)"
)
LIBRARY.define(
    f"cast_transpose(Tensor input, str quant, {_STATE}, bool ready=False, Tensor? partials=None, bool rows=True,"
    " bool columns=True) -> (Tensor rows, Tensor columns, Tensor scale)"
)
LIBRARY.define("transposed(Tensor qdata) -> Tensor")
LIBRARY.define("current_scale(Tensor input, str quant) -> Tensor")


@cache
def quant_key(quant: Quant) -> str:
    """The string that stands for `quant` in operator calls; equal policies give equal strings."""
    return json.dumps(_QUANT.dump_python(quant, mode="json", exclude_defaults=True), sort_keys=True)


@cache
def parse_quant(key: str) -> Quant:
    quant: Quant = _QUANT.validate_python(json.loads(key))
    return quant


@cache
def storage_dtype(format_name: str) -> torch.dtype:
    """dtype of qdata: torch's own where torch has the format, else integer codes."""
    fmt = get_format(format_name)
    if isinstance(fmt, Format) and fmt.torch_dtype_name is not None:
        dtype: torch.dtype = getattr(torch, fmt.torch_dtype_name)
        return dtype
    return torch.uint8 if fmt.bits <= 8 else torch.int16


def quantize(
    input: Tensor,
    quant: str,
    scale: Tensor | None = None,
    *,
    fixed: bool = False,
    amax: Tensor | None = None,
    counts: Tensor | None = None,
    seed: Tensor | None = None,
    ready: bool = False,
    partials: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise `input` [..., K] along its last axis by the policy `quant_key(...)`.

    Args:
        scale: a fixed scale (`fixed=True`), or the delayed one, where 0 means "none yet: take this tensor's amax".
        amax: 0-dim float32, raised in place to this tensor's finite amax. None: nothing is noted.
        counts: int64 [4], increased in place by (elements looked at, saturated, underflowed to zero, non-finite).
        seed: 0-dim int64, for stochastic rounding.
        ready: the caller knows that the delayed scale is not 0: no pass for the amax comes before the cast.
        partials: float32, a power of two of them: amaxes of parts that cover the input, from whoever computed it. They
            spare the pass for the amax where one is needed. One scale for the tensor only.

    Returns: qdata (torch's float8 or 16-bit dtype, or integer codes), and the scale with x ~ qdata * scale, float32 or
    float8_e8m0fnu.
    """
    kernel = direct("quantize", input)
    if kernel is not None:
        qdata, used = kernel(input, quant, scale, fixed, amax, counts, seed, ready, partials)
    else:
        qdata, used = torch.ops.hf_lowprec.quantize(input, quant, scale, fixed, amax, counts, seed, ready, partials)
    return qdata, used


def cast_transpose(
    input: Tensor,
    quant: str,
    scale: Tensor | None = None,
    *,
    fixed: bool = False,
    amax: Tensor | None = None,
    counts: Tensor | None = None,
    seed: Tensor | None = None,
    ready: bool = False,
    partials: Tensor | None = None,
    rows: bool = True,
    columns: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise `input` [..., C], of R rows in all, with one scale for the tensor, in one or both layouts.

    The policy's granularity must be the tensor; the other arguments are those of `quantize`.

    Returns: rows [R, C], columns [C, R rounded up to 16] with zeros at the end, both contiguous, and the scale. A
    layout that is not asked for is an empty tensor.
    """
    kernel = direct("cast_transpose", input)
    if kernel is None:
        kernel, input = torch.ops.hf_lowprec.cast_transpose, input.detach()
    a, b, used = kernel(input, quant, scale, fixed, amax, counts, seed, ready, partials, rows, columns)
    return a, b, used


def default_quantize(
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
    policy = parse_quant(quant)
    hp = input.detach().contiguous()
    if not fixed:
        scale = _scale(hp, policy, scale, amax, partials)
    qdata, used = numerics.quantize(hp, policy, scale=scale, seed=seed, own_scale=fixed)
    if counts is not None:
        _count(hp, policy, used, counts)
    # Operators may not return their own argument.
    return qdata, used.clone() if fixed else used


def _scale(
    hp: Tensor, policy: Quant, delayed: Tensor | None, amax: Tensor | None, partials: Tensor | None
) -> Tensor | None:
    """The scale to use; None: as the policy has it."""
    scaling = policy.scaling
    if scaling.method == "current" and scaling.statistic == "amax" and partials is not None:
        return store_scale(numerics.scale_from_amax(partials.max(), policy.format, scaling), scaling)
    if scaling.method != "delayed":
        return None
    current = numerics.amax_per_group(hp, scaling)
    if amax is not None:
        amax.copy_(torch.maximum(amax, current))
    from_amax = numerics.scale_from_amax(current if partials is None else partials.max(), policy.format, scaling)
    return from_amax if delayed is None else torch.where(delayed > 0, delayed, from_amax)


def sample_stride(numel: int) -> int:
    """Every how many elements the counters look. Odd: a power of two would pick the same few columns of every row."""
    return numel // _SAMPLE | 1


def _count(hp: Tensor, policy: Quant, scale: Tensor, counts: Tensor) -> None:
    flat = hp.reshape(-1)
    if not flat.numel():
        return
    stride = sample_stride(flat.numel())
    sample, fmt = numerics.centred(hp, policy).reshape(-1)[::stride].float(), get_format(policy.format)
    one = scale.numel() == 1
    used = scale.float() if one else _scales_of_sample(scale.float(), hp.shape, policy.scaling, stride)
    magnitude = sample.abs() * numerics.way_in(used, policy.scaling)
    # Where the format has no NaN, one bad element makes the whole group's scale NaN; only that element is counted.
    finite = (magnitude if one and fmt.has_nan else sample).isfinite()
    seen = torch.stack(
        [
            torch.full((), sample.numel(), dtype=torch.int64, device=hp.device),
            ((magnitude > fmt.max) & finite).sum(),
            ((magnitude > 0) & (magnitude <= (fmt.tiny / 2 if fmt.has_zero else 0.0))).sum(),
            (~finite).sum(),
        ]
    )
    counts.add_(seen)


def _scales_of_sample(scale: Tensor, shape: torch.Size, scaling: Scaling, stride: int) -> Tensor:
    """The scale of every `stride`-th element of a tensor of `shape` in groups along its last axis, or in tiles."""
    if scaling.granularity in ("row", "block"):
        index = torch.arange(0, shape.numel(), stride, device=scale.device)
        run = scaling.block[0] if scaling.block else shape[-1]
        return scale.view(-1)[index // shape[-1] * scale.shape[-1] + index % shape[-1] // run]
    return numerics.expand_scale(scale, tuple(shape), scaling).expand(shape).reshape(-1)[::stride]


def default_cast_transpose(
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
) -> tuple[Tensor, Tensor, Tensor]:
    matrix = input.reshape(-1, input.shape[-1])
    qdata, used = default_quantize(matrix, quant, scale, fixed, amax, counts, seed, ready, partials)
    nothing = qdata.new_empty(0)
    return qdata if rows else nothing, default_transposed(qdata) if columns else nothing, used


def transposed(qdata: Tensor) -> Tensor:
    """[R, C] of a quantised matrix -> [C, R rounded up to 16], contiguous, with zeros at the end."""
    kernel = direct("transposed", qdata) or torch.ops.hf_lowprec.transposed
    out: Tensor = kernel(qdata)
    return out


def default_transposed(qdata: Tensor) -> Tensor:
    r, c = qdata.shape
    integer = {1: torch.uint8, 2: torch.int16}[qdata.dtype.itemsize]  # torch fills few dtypes of 8 bits
    out = torch.zeros((c, padded(r)), dtype=integer, device=qdata.device)
    out[:, :r] = qdata.view(integer).t()
    return out.view(qdata.dtype)


def padded(rows: int) -> int:
    return (rows + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


LIBRARY.impl("quantize", default_quantize, "CompositeExplicitAutograd")
LIBRARY.impl("cast_transpose", default_cast_transpose, "CompositeExplicitAutograd")
LIBRARY.impl("transposed", default_transposed, "CompositeExplicitAutograd")


def _fake_quantize(
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
    policy = parse_quant(quant)
    qdata = input.new_empty(input.shape, dtype=storage_dtype(policy.format))
    if fixed and scale is not None:
        return qdata, torch.empty_like(scale)
    return qdata, numerics.scale_like(input, policy.scaling).to(_scale_dtype(policy.scaling))


def _scale_dtype(scaling: Scaling) -> torch.dtype:
    return torch.float8_e8m0fnu if scaling.store == "e8m0" else torch.float32


def _fake_cast_transpose(
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
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, c = storage_dtype(parse_quant(quant).format), input.shape[-1]
    r = 1
    for size in input.shape[:-1]:
        r = r * size
    nothing = input.new_empty(0, dtype=dtype)
    used = input.new_empty((), dtype=_scale_dtype(parse_quant(quant).scaling))
    return (
        input.new_empty((r, c), dtype=dtype) if rows else nothing,
        input.new_empty((c, padded(r)), dtype=dtype) if columns else nothing,
        used,
    )


def _fake_transposed(qdata: Tensor) -> Tensor:
    return qdata.new_empty((qdata.shape[1], padded(qdata.shape[0])))


torch.library.register_fake("hf_lowprec::quantize", _fake_quantize)
torch.library.register_fake("hf_lowprec::cast_transpose", _fake_cast_transpose)
torch.library.register_fake("hf_lowprec::transposed", _fake_transposed)


def current_scale(input: Tensor, quant: str) -> Tensor:
    """The scale that `quantize` would take from this tensor's amax, where it has to be changed before the cast."""
    scale: Tensor = torch.ops.hf_lowprec.current_scale(input, quant)
    return scale


def default_current_scale(input: Tensor, quant: str) -> Tensor:
    policy = parse_quant(quant)
    if policy.scaling.method in ("none", "static"):
        return torch.full((), 2.0**policy.scaling.exponent, dtype=torch.float32, device=input.device)
    amax = numerics.statistic_per_group(input.detach(), policy.scaling)
    return numerics.scale_from_amax(amax, policy.format, policy.scaling)


LIBRARY.impl("current_scale", default_current_scale, "CompositeExplicitAutograd")


def _fake_current_scale(input: Tensor, quant: str) -> Tensor:
    return numerics.scale_like(input, parse_quant(quant).scaling)


torch.library.register_fake("hf_lowprec::current_scale", _fake_current_scale)
