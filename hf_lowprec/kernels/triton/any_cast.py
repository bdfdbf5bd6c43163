# SPDX-License-Identifier: Apache-2.0
"""Scale and round a matrix to any `Format`: codes and scales, or values again; `numerics.quantize` bit for bit.

One family for what `cast` has no kernel for: formats without a dtype, rounding away from zero or stochastically, a
scale per row or per block of k elements along the rows, every scale rule, scales as E8M0.

    block     one pass: a tile holds whole blocks, their amax never leaves the registers
    row       a row as a block; of longer rows a second pass, which finds them in the cache
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
    cut,
    cut_fits,
    hashed,
    low_bits,
    mix,
    mode_of,
    nearest,
    plain,
    signed_codes,
    word_keys,
)
from hf_lowprec.kernels.triton.launch import on_its_device
from hf_lowprec.kernels.triton.ptx import reciprocal
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
LONGEST_ROW = 16384  # in registers


class Setting(NamedTuple):
    """A program's tile. cols: its columns, at least a block. elements: in all, at least a row. each: of a thread."""

    cols: int
    elements: int
    each: int


# By how elements lie: all in one row, along the rows, along the columns; rows with a scale each, in one pass or two.
DEFAULTS = {
    "flat": Setting(2048, 2048, 16),
    "lying": Setting(256, 2048, 16),
    "turned": Setting(32, 2048, 16),
    "row": Setting(8, 2048, 32),
    "long row": Setting(1024, 2048, 16),
}
# What measurements say otherwise: (how they lie, bytes of an element read, written).
SETTINGS: dict[tuple[str, int, int], Setting] = {}


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
    """(`numerics.scale_from_amax` of the bits of amaxes, its inverse)."""
    LIMIT: tl.constexpr = 127 if E8M0 else 126
    ZERO: tl.constexpr = -127 if E8M0 else 0  # exponent of a scale that nothing needs
    if SNAP == 0:
        scale = tl.div_rn(bits.to(tl.float32, bitcast=True), LARGEST) * (2.0**MARGIN)
        scale = tl.where(scale < 2.0**-126, 2.0**-126, tl.where(scale > 2.0**126, 2.0**126, scale))
        scale = tl.where(bits > 0, scale, 2.0**ZERO)
        inverse = reciprocal(scale)
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
        exponent = tl.where(bits > 0, exponent, ZERO)
        scale = _power(exponent)
        inverse = _power(-exponent)
    finite = bits < 0x7F800000
    return tl.where(finite, scale, float("nan")), tl.where(finite, inverse, float("nan"))


@triton.jit
def _power(exponent):
    """2^exponent, -127 to 127."""
    return tl.where(exponent < -126, 1 << 22, (exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _stored_scale(scale, E8M0: tl.constexpr):
    """The scale, or its code in E8M0: the exponent field, which is 0 for 2^-127 and 255 for NaN."""
    if E8M0:
        out = ((scale.to(tl.int32, bitcast=True) >> 23) & 0xFF).to(tl.uint8)
    else:
        out = scale
    return out


@triton.jit
def _words(seed_ptr, row, col, cols, COLS: tl.constexpr, EACH: tl.constexpr):
    """Of rows and of the COLS columns from `col` what `low_bits` makes random words of; EACH divides `col` and `cols`.

    An index is then a multiple of EACH and one of its numbers, so that a thread that has EACH side by side begins the
    hash once for them. int64 indices go to the hash whole, int32 ones are below 2^31.
    """
    early, late = word_keys(tl.load(seed_ptr))
    first = row[:, None] * cols + (col + tl.arange(0, COLS // EACH) * EACH)[None, :]
    if first.dtype == tl.int64:
        high = mix((first >> 32).to(tl.uint32))
        late = late ^ high ^ (high >> 15)
    low = first.to(tl.uint32)
    h = low ^ (low >> 16) ^ early
    if EACH > 1:
        h = h[:, :, None] ^ tl.arange(0, EACH).to(tl.uint32)[None, None, :]
        late = (tl.zeros_like(first).to(tl.uint32) ^ late)[:, :, None]
        h = tl.reshape(hashed(h, late), [row.shape[0], COLS])
    else:
        h = hashed(h, late)
    return h


@triton.jit
def _result(
    x, scale, inverse, words, DTYPE: tl.constexpr, VALUES: tl.constexpr, GROUP: tl.constexpr, MODE: tl.constexpr,
    BITS: tl.constexpr, MAN: tl.constexpr, EMIN: tl.constexpr, MAX_CODE: tl.constexpr, SUBNORMAL: tl.constexpr,
    SIGN: tl.constexpr, NAN_CODE: tl.constexpr, NEGATIVE_ZERO: tl.constexpr, LARGEST: tl.constexpr,
    FAST: tl.constexpr, OVERFLOW: tl.constexpr,
):  # fmt: skip
    """Codes of x / scale, or VALUES: those times the scale."""
    y = x * inverse
    bits = y.to(tl.int32, bitcast=True)
    if FAST:
        size = tl.abs(y)
        if MODE == 0:
            near = nearest(size, MAN, EMIN, LARGEST, SUBNORMAL)
        else:
            near = cut(size, words, MODE, BITS, MAN, EMIN, LARGEST, SUBNORMAL)
        if VALUES:
            near = (near.to(tl.int32, bitcast=True) | (bits & -0x80000000)).to(tl.float32, bitcast=True)
            if not GROUP:  # there a scale that is NaN says it
                # Inf * 0 is NaN; |y| * 0 is +0, beside which no zero keeps its sign.
                near = tl.fma(y if NEGATIVE_ZERO else size, 0.0, near)
            elif not NEGATIVE_ZERO:
                near += 0.0
            out = near * scale
        else:
            codes = codes_of(near, MAN, EMIN, SUBNORMAL)
            AT: tl.constexpr = _log2(SIGN)
            sign = (bits >> (31 - AT)) & SIGN
            if not NEGATIVE_ZERO:
                sign = tl.where(codes == 0, 0, sign)
            if GROUP:
                out = (codes | sign) & tl.where(inverse < float("inf"), -1, 0)
            else:
                out = tl.where(size < float("inf"), codes | sign, NAN_CODE)
    else:
        words = low_bits(words, BITS, 0) if MODE == 3 else 0
        codes = count_codes(y, words, MODE, BITS, MAN, EMIN, MAX_CODE + (OVERFLOW > 0), SUBNORMAL)
        if VALUES:
            near = code_values(codes, MAN, EMIN, SUBNORMAL)
            if OVERFLOW > 0:
                near = tl.where(codes > MAX_CODE, float("inf") if OVERFLOW == 1 else float("nan"), near)
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


@triton.constexpr_function
def _log2(power):
    return power.bit_length() - 1


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
    count_sample(x_ptr, counts_ptr, 1, 1, samples, sample_stride, inverse, LARGEST, HALF_TINY, True, SAMPLES)


@triton.jit
def _any_cast_kernel(
    x_ptr, q_ptr, scale_ptr, given_ptr, partial_ptr, amax_ptr, seed_ptr, rows, cols, stride_row, stride_col, groups,
    GRANULARITY: tl.constexpr, METHOD: tl.constexpr, GROUP: tl.constexpr, VALUES: tl.constexpr,
    SNAP: tl.constexpr, MARGIN: tl.constexpr, E8M0: tl.constexpr, LARGEST: tl.constexpr, TOP_EXP: tl.constexpr,
    TOP_MAN: tl.constexpr, MODE: tl.constexpr, BITS: tl.constexpr, MAN: tl.constexpr, EMIN: tl.constexpr,
    MAX_CODE: tl.constexpr, SUBNORMAL: tl.constexpr, SIGN: tl.constexpr, NAN_CODE: tl.constexpr,
    NEGATIVE_ZERO: tl.constexpr, FAST: tl.constexpr, OVERFLOW: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, EACH: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """x [rows, cols] of any strides -> q contiguous. groups: scales of a row (blocks) or 1.

    EACH: `_words`. WIDE: some index or offset is 2^31 or more. EVEN: whole tiles fill the matrix.
    """
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    across = 1 if GRANULARITY == 1 else tl.cdiv(cols, COLS)
    row = (tl.program_id(0) // across).to(INDEX) * ROWS + tl.arange(0, ROWS).to(INDEX)
    corner = (tl.program_id(0) % across).to(INDEX) * COLS
    here = row < rows
    if GRANULARITY == 1:
        if METHOD == 0:
            scale = tl.load(given_ptr + row, mask=here, other=1.0)
            inverse = reciprocal(scale)
        else:
            largest = tl.zeros([ROWS, COLS], dtype=tl.int32)
            for first in range(0, cols, COLS):
                col = first + tl.arange(0, COLS).to(INDEX)
                inside = _inside(here, col < cols, ROWS, COLS, EVEN)
                at = row[:, None] * stride_row + col[None, :] * stride_col
                bits = _magnitude(tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32), GROUP)
                largest = tl.where(bits > largest, bits, largest)
            scale, inverse = _scale_of(tl.max(largest, 1), SNAP, MARGIN, E8M0, MAN, LARGEST, TOP_EXP, TOP_MAN)
            if scale_ptr is not None:
                tl.store(scale_ptr + row, _stored_scale(scale, E8M0), mask=here)
        for first in range(0, cols, COLS):
            col = first + tl.arange(0, COLS).to(INDEX)
            inside = _inside(here, col < cols, ROWS, COLS, EVEN)
            at = row[:, None] * stride_row + col[None, :] * stride_col
            x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            words = _words(seed_ptr, row, first, cols, COLS, EACH) if MODE == 3 else 0
            out = _result(x, scale[:, None], inverse[:, None], words, DTYPE, VALUES, GROUP, MODE, BITS, MAN, EMIN,
                          MAX_CODE, SUBNORMAL, SIGN, NAN_CODE, NEGATIVE_ZERO, LARGEST, FAST, OVERFLOW)  # fmt: skip
            tl.store(q_ptr + row[:, None] * cols + col[None, :], out, mask=inside)
    else:
        col = corner + tl.arange(0, COLS).to(INDEX)
        inside = _inside(here, col < cols, ROWS, COLS, EVEN)
        at = row[:, None] * stride_row + col[None, :] * stride_col
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        words = _words(seed_ptr, row, corner, cols, COLS, EACH) if MODE == 3 else 0
        if GRANULARITY == 0:
            if METHOD == 0:
                scale = tl.load(given_ptr)
                inverse = reciprocal(scale)
            else:
                bits = tl.max(tl.load(partial_ptr + tl.arange(0, PARTS)), 0)
                scale, inverse = _scale_of(bits, SNAP, MARGIN, E8M0, MAN, LARGEST, TOP_EXP, TOP_MAN)
                if METHOD == 2:
                    delayed = tl.load(given_ptr)
                    scale = tl.where(delayed > 0, delayed, scale)
                    inverse = reciprocal(scale)
                if amax_ptr is not None:
                    if tl.program_id(0) == 0:
                        raise_amax(amax_ptr, bits.to(tl.float32, bitcast=True))
            if scale_ptr is not None:
                if tl.program_id(0) == 0:
                    tl.store(scale_ptr, _stored_scale(scale, E8M0))
            out = _result(x, scale, inverse, words, DTYPE, VALUES, GROUP, MODE, BITS, MAN, EMIN, MAX_CODE, SUBNORMAL,
                          SIGN, NAN_CODE, NEGATIVE_ZERO, LARGEST, FAST, OVERFLOW)  # fmt: skip
        else:
            COUNT: tl.constexpr = COLS // BLOCK
            number = corner // BLOCK + tl.arange(0, COUNT).to(INDEX)
            place = row[:, None] * groups + number[None, :]
            there = here[:, None] & (number < groups)[None, :]
            if METHOD == 0:
                scale = tl.load(given_ptr + place, mask=there, other=1.0)
                inverse = reciprocal(scale)
            else:
                bits = tl.max(tl.reshape(_magnitude(x, GROUP), [ROWS, COUNT, BLOCK]), 2)
                scale, inverse = _scale_of(bits, SNAP, MARGIN, E8M0, MAN, LARGEST, TOP_EXP, TOP_MAN)
                if scale_ptr is not None:
                    tl.store(scale_ptr + place, _stored_scale(scale, E8M0), mask=there)
            out = _result(x, _spread(scale, BLOCK), _spread(inverse, BLOCK), words, DTYPE, VALUES, GROUP, MODE, BITS,
                          MAN, EMIN, MAX_CODE, SUBNORMAL, SIGN, NAN_CODE, NEGATIVE_ZERO, LARGEST, FAST,
                          OVERFLOW)  # fmt: skip
        tl.store(q_ptr + row[:, None] * cols + col[None, :], out, mask=inside)


@triton.jit
def _inside(rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr):
    """Mask of a tile from those of its rows and columns."""
    if EVEN:
        mask = tl.full([ROWS, COLS], True, tl.int1)
    else:
        mask = rows[:, None] & cols[None, :]
    return mask


@triton.jit
def _spread(blocks, BLOCK: tl.constexpr):
    """A number per block -> for each of its elements."""
    ROWS: tl.constexpr = blocks.shape[0]
    COUNT: tl.constexpr = blocks.shape[1]
    return tl.reshape(tl.broadcast_to(blocks[:, :, None], [ROWS, COUNT, BLOCK]), [ROWS, COUNT * BLOCK])


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
        "FAST": quant.overflow == "saturate" and (magic_fits if rounding.mode == "nearest" else cut_fits)(fmt),
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
    if fixed and not plan.format.has_nan:
        raise ValueError(f"{plan.format} has no NaN: its scale comes from the tensor itself")
    method = plan.method
    given, used = None, scale
    if fixed:
        method, given = GIVEN, scale.float().contiguous()  # type: ignore[union-attr]
    elif method == GIVEN:
        # By a fill, which a CUDA graph can hold.
        used = given = torch.full((), 2.0**scaling.exponent, dtype=torch.float32, device=x.device)
        used = used.to(torch.float8_e8m0fnu) if scaling.store == "e8m0" else used
    else:
        stored = torch.uint8 if scaling.store == "e8m0" else torch.float32
        used = torch.empty(scale_shape(tuple(x.shape), scaling), dtype=stored, device=x.device)
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
    shape = _launch(plan, matrix, raw.dtype.itemsize)
    written = None if method == GIVEN else used
    _any_cast_kernel[(shape.programs,)](
        matrix, raw, written, given, partial, amax, seed, shape.rows, shape.cols, shape.stride_row, shape.stride_col,
        shape.groups, **{**plan.constants, **shape.constants}, METHOD=method, VALUES=values,
        PARTS=1 if partial is None else partial.numel(), num_warps=shape.warps,
    )  # fmt: skip
    assert used is not None
    if counts is not None and used.numel() == 1:
        _count(matrix, given if method == GIVEN else used, plan.format, counts)
    if scaling.store == "e8m0" and used.dtype == torch.uint8:
        used = used.view(torch.float8_e8m0fnu)
    return qdata, used


class _Shape(NamedTuple):
    """The matrix as the kernel sees it, and how it is cut into programs."""

    rows: int
    cols: int
    stride_row: int
    stride_col: int
    groups: int
    programs: int
    warps: int
    constants: dict[str, Any]


def _launch(plan: AnyPlan, matrix: Tensor, size: int) -> _Shape:
    """size: bytes of an element that is written."""
    (rows, cols), (stride_row, stride_col) = matrix.shape, matrix.stride()
    granularity, block = plan.constants["GRANULARITY"], plan.block
    if granularity == 0 and matrix.is_contiguous():
        kind, rows, cols, stride_row, stride_col = "flat", 1, rows * cols, rows * cols, 1
    elif stride_col != 1 and stride_row == 1:
        kind = "turned"
    elif granularity != 1:
        kind = "lying"
    elif cols <= LONGEST_ROW:
        kind, granularity, block = "row", 2, triton.next_power_of_2(cols)
    else:
        kind = "long row"
    setting = SETTINGS.get((kind, matrix.dtype.itemsize, size), DEFAULTS[kind])
    width = max(setting.cols, block)
    tall = max(1, setting.elements // width)
    warps = max(1, min(16, tall * width // (32 * setting.each)))
    reach = max(rows * cols, rows * stride_row + cols * stride_col) + tall * max(cols, stride_row) + width * stride_col
    constants = {
        "GRANULARITY": granularity, "BLOCK": block, "ROWS": tall, "COLS": width, "WIDE": reach >= 2**31,
        "EVEN": rows % tall == 0 and cols % width == 0,
        "EACH": 8 if kind != "turned" and cols % 8 == 0 and width % 8 == 0 else 1,
    }  # fmt: skip
    groups = triton.cdiv(cols, block) if granularity == 2 else 1
    programs = triton.cdiv(rows, tall) * (1 if granularity == 1 else triton.cdiv(cols, width))
    return _Shape(rows, cols, stride_row, stride_col, groups, programs, warps, constants)


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
