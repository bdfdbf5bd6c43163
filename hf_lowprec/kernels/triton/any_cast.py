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
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hf_lowprec.formats import Format
from hf_lowprec.kernels.triton.any_kernels import amax_kernel, any_cast_kernel, count_kernel, turned_kernel
from hf_lowprec.kernels.triton.cast import SAMPLES
from hf_lowprec.kernels.triton.formats import Constants, covered, cut_fits, mode_of, plain
from hf_lowprec.kernels.triton.launch import Launcher, integer_key, on_its_device
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
WIDE_FROM = 2**31  # indices of 64 bits


class Setting(NamedTuple):
    """A program's tile. cols: its columns, at least a block. elements: in all, at least a row. each: of a thread."""

    cols: int
    elements: int
    each: int


# By how elements lie: all in one row, along the rows, along the columns (`turned_kernel`: words); rows with a
# scale each, in one pass or two.
DEFAULTS = {
    "flat": Setting(2048, 2048, 16),
    "lying": Setting(256, 2048, 16),
    "turned": Setting(32, 2048, 16),
    "turned words": Setting(128, 4096, 32),
    "row": Setting(8, 2048, 32),
    "long row": Setting(1024, 2048, 16),
}
# What measurements say otherwise: (how they lie, bytes of an element read, written).
SETTINGS: dict[tuple[str, int, int], Setting] = {
    ("turned words", 2, 1): Setting(64, 4096, 32),
    ("turned words", 4, 1): Setting(128, 8192, 32),
}


# --- launchers ------------------------------------------------------------------------------------------------------

_any_cast, _turned, _amax = Launcher(any_cast_kernel), Launcher(turned_kernel), Launcher(amax_kernel)
_ANY_CONSTANTS, _TURNED_CONSTANTS = tuple(any_cast_kernel.arg_names[12:]), tuple(turned_kernel.arg_names[8:])


@dataclass(frozen=True, eq=False)
class AnyPlan:
    """A policy in the kernels; one object each. method: GIVEN (a constant, too), CURRENT or DELAYED."""

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
    shape = _shape(
        plan, *matrix.shape, *matrix.stride(), matrix.is_contiguous(), x.dtype, raw.dtype.itemsize,
        method == CURRENT and not values,
    )  # fmt: skip
    written = None if method == GIVEN else used
    pointers: tuple[Tensor | None, ...]
    numbers: tuple[int, ...]
    if shape.kind == "turned words":
        pointers = matrix, raw.view(torch.int32), written, seed
        numbers = shape.rows, shape.cols, shape.stride_col, shape.groups
        launcher, names = _turned, _TURNED_CONSTANTS
    else:
        pointers = matrix, raw, written, given, partial, amax, seed
        numbers = shape.rows, shape.cols, shape.stride_row, shape.stride_col, shape.groups
        launcher, names = _any_cast, _ANY_CONSTANTS
    parts = 1 if partial is None else partial.numel()
    key = (shape, method, values, parts, *[None if t is None else t.data_ptr() % 16 for t in pointers])
    arguments = (*pointers, *numbers, *_arguments(shape, names, method, values, parts))
    launcher(key, x.get_device(), (shape.programs, 1, 1), arguments, num_warps=shape.warps)
    assert used is not None
    if counts is not None and used.numel() == 1:
        _count(matrix, given if method == GIVEN else used, plan.format, counts)
    if scaling.store == "e8m0" and used.dtype == torch.uint8:
        used = used.view(torch.float8_e8m0fnu)
    return qdata, used


@dataclass(frozen=True, eq=False)
class _Shape:
    """The matrix as the kernel sees it, and how it is cut into programs; one object each."""

    kind: str
    rows: int
    cols: int
    stride_row: int
    stride_col: int
    groups: int
    programs: int
    warps: int
    constants: dict[str, Any]


@lru_cache(maxsize=4096)
def _shape(
    plan: AnyPlan, rows: int, cols: int, stride_row: int, stride_col: int, dense: bool, dtype: torch.dtype, size: int,
    codes: bool,
) -> _Shape:  # fmt: skip
    """dense: contiguous. size: bytes of an element that is written. codes: that and scales of its own are all that is
    wanted."""
    granularity, block = plan.constants["GRANULARITY"], plan.block
    if granularity == 0 and dense:
        kind, rows, cols, stride_row, stride_col = "flat", 1, rows * cols, rows * cols, 1
    elif stride_col != 1 and stride_row == 1:
        words = granularity == 2 and codes and size == 1 and cols % 4 == 0 and block % 4 == 0
        kind = "turned words" if words else "turned"
    elif granularity != 1:
        kind = "lying"
    elif cols <= LONGEST_ROW:
        kind, granularity, block = "row", 2, triton.next_power_of_2(cols)
    else:
        kind = "long row"
    setting = SETTINGS.get((kind, dtype.itemsize, size), DEFAULTS[kind])
    width = max(setting.cols, block)
    tall = max(1, setting.elements // width)
    warps = max(1, min(16, tall * width // (32 * setting.each)))
    reach = max(rows * cols, rows * stride_row + cols * stride_col) + tall * max(cols, stride_row) + width * stride_col
    constants = {
        **plan.constants, "GRANULARITY": granularity, "BLOCK": block, "ROWS": tall, "COLS": width,
        "WIDE": reach >= WIDE_FROM, "EVEN": rows % tall == 0 and cols % width == 0,
        "EACH": 8 if stride_col == 1 and cols % 8 == 0 and width % 8 == 0 else 1,
    }  # fmt: skip
    groups = triton.cdiv(cols, block) if granularity == 2 else 1
    programs = triton.cdiv(rows, tall) * (1 if granularity == 1 else triton.cdiv(cols, width))
    return _Shape(kind, rows, cols, stride_row, stride_col, groups, programs, warps, constants)


@lru_cache(maxsize=4096)
def _arguments(shape: _Shape, names: tuple[str, ...], method: int, values: bool, parts: int) -> tuple[Any, ...]:
    """The kernel's constants in its order."""
    constants = {**shape.constants, "METHOD": method, "VALUES": values, "PARTS": parts}
    return tuple(constants[name] for name in names)


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
    count_kernel[(triton.cdiv(samples, 8 * SAMPLES),)](
        flat, counts, raw, samples, every, LARGEST=fmt.max, HALF_TINY=fmt.tiny / 2, E8M0=e8m0, SAMPLES=SAMPLES
    )


def _partials(matrix: Tensor, group: bool) -> Tensor:
    """int32 [PARTIALS]: the largest of them is the amax, as bits."""
    flat = _dense(matrix)
    partial = torch.empty(PARTIALS, dtype=torch.int32, device=matrix.device)
    n = flat.numel()
    per_program = triton.cdiv(n, PARTIALS * 1024) * 1024
    key = (flat.dtype, flat.data_ptr() % 16, integer_key(n), integer_key(per_program), group)
    _amax(key, flat.get_device(), (PARTIALS, 1, 1), (flat, partial, n, per_program, group, 1024), num_warps=4)
    return partial
