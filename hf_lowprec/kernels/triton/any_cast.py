# SPDX-License-Identifier: Apache-2.0
"""Scale and round a matrix to any `Format`: codes and scales, or values again; `numerics.quantize` bit for bit.

One family for what `cast` has no kernel for: formats without a dtype, rounding away from zero or stochastically, a
scale per row or per block of k elements along the rows, every scale rule, scales as E8M0.

    block     one pass: a tile holds whole blocks, their amax never leaves the registers
    row       two passes over a row, the second of which finds it in the cache
    tensor    an amax of parts, as in `cast`, then the pass that casts; one pass where the scale is given

Input may have any strides, so that a transposed view is quantised along its own rows without a copy; what is written
is contiguous. Random words go by the index of an element in the matrix as it is seen here.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowprec.formats import Format
from hf_lowprec.kernels.triton.cast import SAMPLES, count_sample, raise_amax
from hf_lowprec.kernels.triton.formats import (
    Constants,
    code_values,
    codes_of,
    count_codes,
    covered,
    mode_of,
    nearest,
    plain,
    signed_codes,
)
from hf_lowprec.kernels.triton.launch import on_its_device
from hf_lowprec.kernels.triton.quantize import random_words
from hf_lowprec.numerics.codes import random_bits
from hf_lowprec.numerics.rounding import magic_fits
from hf_lowprec.numerics.scaling import scale_shape
from hf_lowprec.ops.quantize import sample_stride, storage_dtype
from hf_lowprec.recipe import Quant

PARTIALS = 1024
_SNAPS = {"exact": 0, "rceil": 1, "ocp": 2, "ceil": 3, "even": 4}
_OVERFLOWS = {"saturate": 0, "inf": 1, "nan": 2}
_GRANULARITIES = {"tensor": 0, "row": 1, "block": 2}
_INPUTS = (torch.float32, torch.bfloat16, torch.float16)
GIVEN, CURRENT, DELAYED = 0, 1, 2
_LARGEST_BLOCK = 512


@triton.jit
def _magnitude(x, GROUP: tl.constexpr):
    """float32 bits of |x|, which are ordered as the numbers; of Inf and NaN 0, unless they count for their GROUP."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if not GROUP:
        bits = tl.where(bits >= 0x7F800000, 0, bits)
    return bits


@triton.jit
def _scale_of(bits, SNAP: tl.constexpr, MARGIN: tl.constexpr, E8M0: tl.constexpr, MAN: tl.constexpr,
              LARGEST: tl.constexpr, TOP_EXP: tl.constexpr, TOP_MAN: tl.constexpr):  # fmt: skip
    """`numerics.scale_from_amax` of the bits of amaxes."""
    LIMIT: tl.constexpr = 127 if E8M0 else 126
    if SNAP == 0:
        scale = tl.div_rn(bits.to(tl.float32, bitcast=True), LARGEST) * (2.0**MARGIN)
        scale = tl.where(scale < 2.0**-126, 2.0**-126, tl.where(scale > 2.0**126, 2.0**126, scale))
    else:
        # The exponent of a subnormal amax is that of the integer that its bits are.
        small = bits < 0x800000
        normal = tl.where(small, bits.to(tl.float32).to(tl.int32, bitcast=True), bits)
        exponent = (normal >> 23) - tl.where(small, 149, 0) - TOP_EXP
        fraction = normal & 0x7FFFFF
        if SNAP == 1:
            exponent += (fraction > TOP_MAN).to(tl.int32)
        elif SNAP == 3:
            exponent += (fraction > 0).to(tl.int32)
        elif SNAP == 4:
            exponent += (fraction >= (1 << 23) - (1 << (22 - MAN))).to(tl.int32)
        exponent += MARGIN
        exponent = tl.where(exponent < -LIMIT, -LIMIT, tl.where(exponent > LIMIT, LIMIT, exponent))
        scale = tl.where(exponent < -126, 1 << 22, (exponent + 127) << 23).to(tl.float32, bitcast=True)
    scale = tl.where(bits > 0, scale, 2.0**-127 if E8M0 else 1.0)
    return tl.where(bits < 0x7F800000, scale, float("nan"))


@triton.jit
def _stored_scale(scale, E8M0: tl.constexpr):
    """The scale, or its code in E8M0: the exponent field, which is 0 for 2^-127 and 255 for NaN."""
    if E8M0:
        out = ((scale.to(tl.int32, bitcast=True) >> 23) & 0xFF).to(tl.uint8)
    else:
        out = scale
    return out


@triton.jit
def _result(
    x, scale, index, seed_ptr, DTYPE: tl.constexpr, VALUES: tl.constexpr, MODE: tl.constexpr, BITS: tl.constexpr,
    MAN: tl.constexpr, EMIN: tl.constexpr, MAX_CODE: tl.constexpr, SUBNORMAL: tl.constexpr, SIGN: tl.constexpr,
    NAN_CODE: tl.constexpr, NEGATIVE_ZERO: tl.constexpr, LARGEST: tl.constexpr, FAST: tl.constexpr,
    OVERFLOW: tl.constexpr,
):  # fmt: skip
    """Codes of x / scale, or VALUES: those times the scale."""
    y = x * tl.div_rn(1.0, scale)
    words = random_words(tl.load(seed_ptr), index) if MODE == 3 else 0
    if FAST:
        near = nearest(y, MAN, EMIN, LARGEST, SUBNORMAL)
        codes = 0 if VALUES else codes_of(near, MAN, EMIN, SUBNORMAL)
    else:
        codes = count_codes(y, words, MODE, BITS, MAN, EMIN, MAX_CODE + (OVERFLOW > 0), SUBNORMAL)
        near = code_values(codes, MAN, EMIN, SUBNORMAL) if VALUES else y
        if VALUES and OVERFLOW > 0:
            near = tl.where(codes > MAX_CODE, float("inf") if OVERFLOW == 1 else float("nan"), near)
    if VALUES:
        bits = y.to(tl.int32, bitcast=True)
        size = near.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        sign = bits & -0x80000000
        if SIGN == 0:
            size = tl.where(bits < 0, 0, size)
            sign = sign & 0
        elif not NEGATIVE_ZERO:
            sign = tl.where(size == 0, 0, sign)
        value = (size | sign).to(tl.float32, bitcast=True) * scale
        if OVERFLOW == 1:  # what is infinite stays so
            lost = (bits & 0x7FFFFFFF) > 0x7F800000
        else:
            lost = (bits & 0x7F800000) == 0x7F800000
        out = tl.where(lost, float("nan"), value)
    else:
        out = signed_codes(codes, y, MAX_CODE, SIGN, NAN_CODE, NEGATIVE_ZERO, OVERFLOW)
    return out.to(DTYPE)


@triton.jit
def _amax_kernel(x_ptr, partial_ptr, n, per_program, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """partial[p] = largest magnitude of this program's stretch of a contiguous tensor, as bits."""
    start = tl.program_id(0).to(tl.int64) * per_program
    here = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], dtype=tl.int32)
    for i in range(0, per_program, BLOCK):
        at = start + i + here
        x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
        bits = _magnitude(x, GROUP)
        largest = tl.where(bits > largest, bits, largest)
    tl.store(partial_ptr + tl.program_id(0), tl.max(largest, 0))


# `count_sample` takes no constant for `samples`, which the JIT makes of a 1: of a tensor of one element.
@triton.jit(do_not_specialize=["samples", "sample_stride"])
def _count_kernel(x_ptr, counts_ptr, scale_ptr, samples, sample_stride, LARGEST: tl.constexpr, HALF_TINY: tl.constexpr,
                  E8M0: tl.constexpr, SAMPLES: tl.constexpr):  # fmt: skip
    scale = tl.load(scale_ptr)
    if E8M0:
        exponent = scale.to(tl.int32)
        scale = tl.where(exponent == 0, 1 << 22, exponent << 23).to(tl.float32, bitcast=True)
    inverse = tl.div_rn(1.0, scale)
    count_sample(
        x_ptr, counts_ptr, tl.program_id(0), tl.num_programs(0), 1, 1, samples, sample_stride, inverse, LARGEST,
        HALF_TINY, True, SAMPLES,
    )  # fmt: skip


@triton.jit
def _any_cast_kernel(
    x_ptr, q_ptr, scale_ptr, given_ptr, partial_ptr, amax_ptr, seed_ptr, rows, cols, stride_row, stride_col, groups,
    GRANULARITY: tl.constexpr, METHOD: tl.constexpr, GROUP: tl.constexpr, VALUES: tl.constexpr,
    SNAP: tl.constexpr, MARGIN: tl.constexpr, E8M0: tl.constexpr, LARGEST: tl.constexpr, TOP_EXP: tl.constexpr,
    TOP_MAN: tl.constexpr, MODE: tl.constexpr, BITS: tl.constexpr, MAN: tl.constexpr, EMIN: tl.constexpr,
    MAX_CODE: tl.constexpr, SUBNORMAL: tl.constexpr, SIGN: tl.constexpr, NAN_CODE: tl.constexpr,
    NEGATIVE_ZERO: tl.constexpr, FAST: tl.constexpr, OVERFLOW: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """x [rows, cols] of any strides -> q contiguous. groups: scales of a row (blocks) or 1."""
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    across = 1 if GRANULARITY == 1 else tl.cdiv(cols, COLS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    corner = (tl.program_id(0) % across).to(tl.int64) * COLS
    here = row < rows
    if GRANULARITY == 1:
        if METHOD == 0:
            scale = tl.load(given_ptr + row, mask=here, other=1.0)
        else:
            largest = tl.zeros([ROWS, COLS], dtype=tl.int32)
            for first in range(0, cols, COLS):
                col = first + tl.arange(0, COLS).to(tl.int64)
                inside = here[:, None] & (col < cols)[None, :]
                at = row[:, None] * stride_row + col[None, :] * stride_col
                bits = _magnitude(tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32), GROUP)
                largest = tl.where(bits > largest, bits, largest)
            scale = _scale_of(tl.max(largest, 1), SNAP, MARGIN, E8M0, MAN, LARGEST, TOP_EXP, TOP_MAN)
            if scale_ptr is not None:
                tl.store(scale_ptr + row, _stored_scale(scale, E8M0), mask=here)
        for first in range(0, cols, COLS):
            col = first + tl.arange(0, COLS).to(tl.int64)
            inside = here[:, None] & (col < cols)[None, :]
            at = row[:, None] * stride_row + col[None, :] * stride_col
            x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            index = row[:, None] * cols + col[None, :]
            out = _result(x, scale[:, None], index, seed_ptr, DTYPE, VALUES, MODE, BITS, MAN, EMIN, MAX_CODE,
                          SUBNORMAL, SIGN, NAN_CODE, NEGATIVE_ZERO, LARGEST, FAST, OVERFLOW)  # fmt: skip
            tl.store(q_ptr + index, out, mask=inside)
    else:
        col = corner + tl.arange(0, COLS).to(tl.int64)
        inside = here[:, None] & (col < cols)[None, :]
        at = row[:, None] * stride_row + col[None, :] * stride_col
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        index = row[:, None] * cols + col[None, :]
        if GRANULARITY == 0:
            if METHOD == 0:
                scale = tl.load(given_ptr)
            else:
                bits = tl.max(tl.load(partial_ptr + tl.arange(0, PARTS)), 0)
                scale = _scale_of(bits, SNAP, MARGIN, E8M0, MAN, LARGEST, TOP_EXP, TOP_MAN)
                if METHOD == 2:
                    delayed = tl.load(given_ptr)
                    scale = tl.where(delayed > 0, delayed, scale)
                if amax_ptr is not None:
                    if tl.program_id(0) == 0:
                        raise_amax(amax_ptr, bits.to(tl.float32, bitcast=True))
            if scale_ptr is not None:
                if tl.program_id(0) == 0:
                    tl.store(scale_ptr, _stored_scale(scale, E8M0))
            out = _result(x, scale, index, seed_ptr, DTYPE, VALUES, MODE, BITS, MAN, EMIN, MAX_CODE, SUBNORMAL, SIGN,
                          NAN_CODE, NEGATIVE_ZERO, LARGEST, FAST, OVERFLOW)  # fmt: skip
        else:
            COUNT: tl.constexpr = COLS // BLOCK
            number = corner // BLOCK + tl.arange(0, COUNT).to(tl.int64)
            place = row[:, None] * groups + number[None, :]
            there = here[:, None] & (number < groups)[None, :]
            if METHOD == 0:
                scale = tl.load(given_ptr + place, mask=there, other=1.0)
            else:
                bits = tl.max(tl.reshape(_magnitude(x, GROUP), [ROWS, COUNT, BLOCK]), 2)
                scale = _scale_of(bits, SNAP, MARGIN, E8M0, MAN, LARGEST, TOP_EXP, TOP_MAN)
                if scale_ptr is not None:
                    tl.store(scale_ptr + place, _stored_scale(scale, E8M0), mask=there)
            spread = tl.broadcast_to(scale[:, :, None], [ROWS, COUNT, BLOCK])
            out = _result(x, tl.reshape(spread, [ROWS, COLS]), index, seed_ptr, DTYPE, VALUES, MODE, BITS, MAN, EMIN,
                          MAX_CODE, SUBNORMAL, SIGN, NAN_CODE, NEGATIVE_ZERO, LARGEST, FAST, OVERFLOW)  # fmt: skip
        tl.store(q_ptr + index, out, mask=inside)


# --- launchers ------------------------------------------------------------------------------------------------------


class AnyPlan(NamedTuple):
    """A policy in the kernels. method: GIVEN (a constant, too), CURRENT or DELAYED."""

    quant: Quant
    format: Format
    method: int
    constants: dict[str, Any]
    block: int


@cache
def plan_of(quant: Quant) -> AnyPlan | None:
    """How a policy runs here; None: it does not."""
    scaling, rounding = quant.scaling, quant.rounding
    fmt = covered(quant.format)
    block = scaling.block[0] if scaling.granularity == "block" else 1
    constant = scaling.method in ("none", "static")
    granularity = "tensor" if constant else scaling.granularity
    if (
        fmt is None
        or not plain(quant)
        or quant.overflow not in _OVERFLOWS
        or quant.states_only
        or quant.gemms_only
        or granularity not in _GRANULARITIES
        or (block & (block - 1) or block > _LARGEST_BLOCK)
        or scaling.store not in ("float32", "e8m0")
        # Without NaN the scale has to say that an element is not finite, which one that is given cannot.
        or (not fmt.has_nan and scaling.method != "current")
        or (rounding.mode == "stochastic" and random_bits(rounding, fmt) > 23 - fmt.man)
    ):
        return None
    (top,) = struct.unpack("i", struct.pack("f", fmt.max))
    man, emin, max_code, subnormal, sign, nan_code, negative_zero = Constants.of(fmt)
    constants = {
        "GRANULARITY": _GRANULARITIES[granularity], "GROUP": not fmt.has_nan, "SNAP": _SNAPS[scaling.snap],
        "MARGIN": scaling.margin, "E8M0": scaling.store == "e8m0", "LARGEST": fmt.max, "TOP_EXP": top >> 23,
        "TOP_MAN": top & 0x7FFFFF, "MODE": mode_of(rounding.mode),
        "BITS": random_bits(rounding, fmt) if rounding.mode == "stochastic" else 0, "MAN": man, "EMIN": emin,
        "MAX_CODE": max_code, "SUBNORMAL": subnormal, "SIGN": sign, "NAN_CODE": nan_code,
        "NEGATIVE_ZERO": negative_zero, "OVERFLOW": _OVERFLOWS[quant.overflow], "BLOCK": block,
        "FAST": rounding.mode == "nearest" and quant.overflow == "saturate" and magic_fits(fmt),
    }  # fmt: skip
    method = GIVEN if constant else DELAYED if scaling.method == "delayed" else CURRENT
    return AnyPlan(quant, fmt, method, constants, block)


def takes(x: Tensor, plan: AnyPlan, fixed: bool, seed: Tensor | None) -> bool:
    """Whether the kernels cast `x` by the plan."""
    if x.dtype not in _INPUTS or not x.numel() or not x.dim() or (fixed and not plan.format.has_nan):
        return False
    return plan.quant.rounding.mode != "stochastic" or seed is not None


@on_its_device
def quantize(
    x: Tensor,
    plan: AnyPlan,
    scale: Tensor | None = None,
    *,
    fixed: bool = False,
    amax: Tensor | None = None,
    seed: Tensor | None = None,
    partials: Tensor | None = None,
    counts: Tensor | None = None,
    values: bool = False,
) -> tuple[Tensor, Tensor]:
    """(qdata, scale) of `ops.quantize`, in the shape of `x` [..., K], or with `values` x ~ qdata * scale in its dtype.

    scale: a fixed or a delayed one, as there. seed: 0-dim int64 on the device of `x`.
    Raises ValueError: a fixed scale for a format without NaN, which could not say that an element is not finite.
    """
    quant, scaling = plan.quant, plan.quant.scaling
    x = x.detach()
    matrix = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    rows, cols = matrix.shape
    if fixed and not plan.format.has_nan:
        raise ValueError(f"{plan.format} has no NaN: its scale comes from the tensor itself")
    method = plan.method
    given, used = None, scale
    shape = scale_shape(tuple(x.shape), scaling)
    if fixed:
        method, given = GIVEN, scale.float().contiguous()  # type: ignore[union-attr]
    elif method == GIVEN:
        # By a fill, which a CUDA graph can hold.
        used = given = torch.full((), 2.0**scaling.exponent, dtype=torch.float32, device=x.device)
        used = used.to(torch.float8_e8m0fnu) if scaling.store == "e8m0" else used
    else:
        used = torch.empty(shape, dtype=torch.uint8 if scaling.store == "e8m0" else torch.float32, device=x.device)
        if method == DELAYED:
            method, given = (CURRENT, None) if scale is None else (DELAYED, scale)
    partial = None
    if method != GIVEN and plan.constants["GRANULARITY"] == 0:
        if partials is not None and plan.format.has_nan:  # others' amaxes leave out what is not finite
            partial = partials.view(torch.int32)
        else:
            partial = _partials(matrix, not plan.format.has_nan)
    dtype = x.dtype if values else storage_dtype(quant.format)
    qdata = torch.empty(x.shape, dtype=dtype, device=x.device)
    raw = qdata if values else qdata.view({1: torch.uint8, 2: torch.int16}[dtype.itemsize])
    tile = _tile(plan, matrix)
    if plan.constants["GRANULARITY"] == 1:
        programs = triton.cdiv(rows, tile[0])
    else:
        programs = triton.cdiv(rows, tile[0]) * triton.cdiv(cols, tile[1])
    flat = plan.constants["GRANULARITY"] == 0 and matrix.is_contiguous()
    if flat:  # one long row
        rows, cols, tile = 1, rows * cols, (1, 2048)
        programs = triton.cdiv(cols, tile[1])
    groups = triton.cdiv(cols, plan.block) if plan.constants["GRANULARITY"] == 2 else 1
    stored = None if method == GIVEN else used
    _any_cast_kernel[(programs,)](
        matrix, raw, stored, given, partial, amax, seed, rows, cols, cols if flat else matrix.stride(0),
        1 if flat else matrix.stride(1), groups, **plan.constants, METHOD=method, VALUES=values,
        PARTS=1 if partial is None else partial.numel(), ROWS=tile[0], COLS=tile[1], num_warps=4,
    )  # fmt: skip
    assert used is not None
    if counts is not None and used.numel() == 1:
        _count(matrix, given if method == GIVEN else used, plan.format, counts)
    if scaling.store == "e8m0" and used.dtype == torch.uint8:
        used = used.view(torch.float8_e8m0fnu)
    return qdata, used


def _tile(plan: AnyPlan, matrix: Tensor) -> tuple[int, int]:
    """(rows, columns) of a program: long along what lies together in memory."""
    least = plan.block
    if matrix.stride(1) != 1 and matrix.stride(0) == 1:
        return max(8, min(64, 2048 // max(32, least))), max(32, least)
    if plan.constants["GRANULARITY"] == 1:
        return 2, min(1024, triton.next_power_of_2(matrix.shape[1]))
    return max(1, 2048 // max(256, least)), max(256, least)


def _dense(matrix: Tensor) -> Tensor:
    """The elements in the order in which they lie, a copy where there are gaps."""
    return matrix if matrix.is_contiguous() else matrix.t() if matrix.t().is_contiguous() else matrix.contiguous()


def _count(matrix: Tensor, scale: Tensor | None, fmt: Format, counts: Tensor) -> None:
    """Add to the counters of `ops.quantize` what the cast did to a sample."""
    assert scale is not None
    flat = _dense(matrix)
    every = sample_stride(flat.numel())
    samples = triton.cdiv(flat.numel(), every)
    e8m0 = scale.dtype != torch.float32
    raw = scale.view(torch.uint8) if e8m0 else scale
    _count_kernel[(triton.cdiv(samples, 8 * SAMPLES),)](
        flat, counts, raw, samples, every, LARGEST=fmt.max, HALF_TINY=fmt.tiny / 2, E8M0=e8m0, SAMPLES=SAMPLES
    )


def _partials(matrix: Tensor, group: bool) -> Tensor:
    """int32 [PARTIALS]: the largest of them is the amax, as bits."""
    flat = _dense(matrix)
    partial = torch.empty(PARTIALS, dtype=torch.int32, device=matrix.device)
    n = flat.numel()
    per_program = triton.cdiv(n, PARTIALS * 1024) * 1024
    _amax_kernel[(PARTIALS,)](flat, partial, n, per_program, GROUP=group, BLOCK=1024, num_warps=4)
    return partial
