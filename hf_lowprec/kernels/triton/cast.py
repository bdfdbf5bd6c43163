# SPDX-License-Identifier: Apache-2.0
"""Scale and cast a tensor to FP8 or FP16 in two launches: partial amaxes, then scale + cast + counters.

The second kernel finishes the reduction itself (every program reads the few partial amaxes again, from L2), computes
the scale, and casts, so that no scalar kernel stands between the two. Bytes moved for b-byte input and c-byte output:
n (2 b + c).

Neither kernel uses `tl.minimum`/`tl.maximum` with NaN propagation: beside one-byte stores Triton miscompiles it
(triton-lang/triton#11111). Comparisons with NaN are false, which is what both kernels want.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTIALS = 512
_BLOCK = 4096


@triton.jit
def _amax_kernel(x_ptr, partial_ptr, n, per_program, BLOCK: tl.constexpr):
    """partial[p] = largest finite |x| of this program's stretch; 0 where it has none."""
    start = tl.program_id(0).to(tl.int64) * per_program
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(0, per_program, BLOCK):
        offset = start + i + tl.arange(0, BLOCK)
        magnitude = tl.abs(tl.load(x_ptr + offset, mask=offset < n, other=0.0).to(tl.float32))
        finite = tl.where(magnitude < float("inf"), magnitude, 0.0)
        largest = tl.where(finite > largest, finite, largest)
    tl.store(partial_ptr + tl.program_id(0), tl.max(largest, 0))


@triton.jit
def _scale_of(amax, FMT_MAX: tl.constexpr, TOP_EXP: tl.constexpr, TOP_MAN: tl.constexpr, MARGIN: tl.constexpr,
              POW2: tl.constexpr):  # fmt: skip
    """`numerics.scale_from_amax` for one finite amax: snap rceil (POW2) or exact."""
    if POW2:
        bits = amax.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) - TOP_EXP + ((bits & 0x7FFFFF) > TOP_MAN).to(tl.int32) + MARGIN
        exponent = tl.where(exponent < -126, -126, tl.where(exponent > 126, 126, exponent))
        scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    else:
        scale = tl.div_rn(amax, FMT_MAX) * (2.0**MARGIN)
        scale = tl.where(scale < 2.0**-126, 2.0**-126, tl.where(scale > 2.0**126, 2.0**126, scale))
    return tl.where(amax > 0, scale, 1.0)


@triton.jit
def _scale_kernel(
    partial_ptr, scale_ptr, FMT_MAX: tl.constexpr, TOP_EXP: tl.constexpr, TOP_MAN: tl.constexpr,
    MARGIN: tl.constexpr, POW2: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    amax = tl.max(tl.load(partial_ptr + tl.arange(0, PARTIALS)), 0)
    tl.store(scale_ptr, _scale_of(amax, FMT_MAX, TOP_EXP, TOP_MAN, MARGIN, POW2))


@triton.jit
def _cast_kernel(
    x_ptr, q_ptr, partial_ptr, given_ptr, scale_ptr, amax_ptr, counts_ptr, n, sample_stride,
    FMT_MAX: tl.constexpr, HALF_TINY: tl.constexpr, TOP_EXP: tl.constexpr, TOP_MAN: tl.constexpr,
    MARGIN: tl.constexpr, POW2: tl.constexpr, FIXED: tl.constexpr, DELAYED: tl.constexpr, OBSERVE: tl.constexpr,
    COUNT: tl.constexpr, PARTIALS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """q = cast(x / scale), NaN where x is not finite; program 0 stores the scale and raises amax."""
    pid = tl.program_id(0)
    if FIXED:
        scale = tl.load(given_ptr)
    else:
        amax = tl.max(tl.load(partial_ptr + tl.arange(0, PARTIALS)), 0)
        scale = _scale_of(amax, FMT_MAX, TOP_EXP, TOP_MAN, MARGIN, POW2)
        if DELAYED:
            delayed = tl.load(given_ptr)
            scale = tl.where(delayed > 0, delayed, scale)
        if pid == 0:
            tl.store(scale_ptr, scale)
            if OBSERVE:
                before = tl.load(amax_ptr)
                tl.store(amax_ptr, tl.where(amax > before, amax, before))
    inverse = tl.div_rn(1.0, scale)
    offset = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < n
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) * inverse
    magnitude = tl.abs(x)
    finite = magnitude < float("inf")
    y = tl.where(x > FMT_MAX, FMT_MAX, tl.where(x < -FMT_MAX, -FMT_MAX, x))
    y = tl.where(finite, y, float("nan"))
    tl.store(q_ptr + offset, y.to(q_ptr.dtype.element_ty), mask=inside)
    if COUNT:
        # All programs add to the same three numbers; nearly all have nothing to add and must not queue for it.
        # One 64-bit remainder per program, 32-bit ones per element.
        first = ((pid.to(tl.int64) * BLOCK) % sample_stride).to(tl.int32)
        seen = inside & ((first + tl.arange(0, BLOCK)) % sample_stride == 0)
        saturated = tl.sum((seen & finite & (magnitude > FMT_MAX)).to(tl.int64), 0)
        underflow = tl.sum((seen & (magnitude > 0) & (magnitude <= HALF_TINY)).to(tl.int64), 0)
        nonfinite = tl.sum((seen & (finite == 0)).to(tl.int64), 0)
        if pid == 0:
            tl.atomic_add(counts_ptr, (n + sample_stride - 1) // sample_stride)
        if saturated > 0:
            tl.atomic_add(counts_ptr + 1, saturated)
        if underflow > 0:
            tl.atomic_add(counts_ptr + 2, underflow)
        if nonfinite > 0:
            tl.atomic_add(counts_ptr + 3, nonfinite)


class FormatConstants(NamedTuple):
    """What the kernels know of a format and its scaling, at compile time."""

    fmt_max: float
    half_tiny: float
    top_exp: int
    top_man: int
    margin: int
    pow2: bool

    @classmethod
    def of(cls, fmt_max: float, tiny: float, margin: int, pow2: bool) -> FormatConstants:
        (bits,) = struct.unpack("i", struct.pack("f", fmt_max))
        return cls(fmt_max, tiny / 2, bits >> 23, bits & 0x7FFFFF, margin, pow2)


def current_scale(x: Tensor, constants: FormatConstants) -> Tensor:
    """The scale from the finite amax of a contiguous tensor, 0-dim float32."""
    scale = torch.empty((), dtype=torch.float32, device=x.device)
    _scale_kernel[(1,)](
        _partial_amax(x), scale, FMT_MAX=constants.fmt_max, TOP_EXP=constants.top_exp, TOP_MAN=constants.top_man,
        MARGIN=constants.margin, POW2=constants.pow2, PARTIALS=PARTIALS,
    )  # fmt: skip
    return scale


def cast(
    x: Tensor,
    dtype: torch.dtype,
    given: Tensor | None,
    constants: FormatConstants,
    *,
    fixed: bool,
    amax: Tensor | None,
    counts: Tensor | None,
    sample_stride: int,
) -> tuple[Tensor, Tensor]:
    """(qdata, scale) of a contiguous float32, bfloat16 or float16 tensor on a GPU.

    given: the scale itself if `fixed`, else the delayed scale (0 = none yet) or None.
    """
    n = x.numel()
    qdata = torch.empty(x.shape, dtype=dtype, device=x.device)
    # Pointers that a variant does not use are passed as x.
    partial = x if fixed else _partial_amax(x)
    scale = given if fixed else torch.empty((), dtype=torch.float32, device=x.device)
    assert scale is not None
    _cast_kernel[(max(1, triton.cdiv(n, _BLOCK)),)](
        x, qdata, partial, scale if given is None else given, scale, x if amax is None else amax,
        x if counts is None else counts, n, sample_stride,
        FMT_MAX=constants.fmt_max, HALF_TINY=constants.half_tiny, TOP_EXP=constants.top_exp,
        TOP_MAN=constants.top_man, MARGIN=constants.margin, POW2=constants.pow2,
        FIXED=fixed, DELAYED=given is not None and not fixed, OBSERVE=amax is not None, COUNT=counts is not None,
        PARTIALS=PARTIALS, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    return qdata, scale


def _partial_amax(x: Tensor) -> Tensor:
    partial = torch.empty(PARTIALS, dtype=torch.float32, device=x.device)
    per_program = triton.cdiv(triton.cdiv(x.numel(), PARTIALS), _BLOCK) * _BLOCK
    _amax_kernel[(PARTIALS,)](x, partial, x.numel(), per_program, BLOCK=_BLOCK, num_warps=8)
    return partial
