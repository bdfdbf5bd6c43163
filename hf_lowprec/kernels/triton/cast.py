# SPDX-License-Identifier: Apache-2.0
"""Scale and cast a tensor to FP8 or FP16, in the order in which it lies in memory.

    delayed scaling    one pass: cast, with the amax as a by-product. While no scale exists a pass for the amax comes
                       first; the host may not know, so its programs look at the scale and leave if there is one.
    current scaling    two passes: partial amaxes, then every program of the second finishes the reduction (from L2)
                       and casts, so that no scalar kernel stands between the two. One, if the amax is known.

Bytes moved for b-byte input and c-byte output: n (b + c), with the pass for the amax n (2 b + c). The largest
magnitude is raised by an integer atomic maximum on the bits of a float that is not negative: the order does not
matter. Counters look at a sample that is gathered beside the pass; to ask of every element whether it belongs to it
cost half the bandwidth. A program takes many tiles, as what it notes costs a barrier at its end: one tile each, and
noting costs a third of the bandwidth (H200).

No kernel here uses `tl.minimum`/`tl.maximum` with NaN propagation: beside one-byte stores Triton miscompiles it
(triton-lang/triton#11111). Comparisons with NaN are false, and the plain minimum drops it.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from hf_lowprec.kernels.triton.launch import Launcher, integer_key
from hf_lowprec.ops.quantize import sample_stride

PARTIALS = 1024
SAMPLES = 128  # elements that a program gathers at a time for the counters
MOST_PROGRAMS = 2048
GIVEN, DELAYED, CURRENT = 0, 1, 2  # where a kernel has its scale from
_AMAX_BLOCK = 2048
_BLOCK = 4096
_SCALARS = ["given_ptr", "scale_ptr", "amax_ptr", "counts_ptr", "partial_ptr"]
_COUNTS = ["samples", "sample_stride"]
# The interpreter runs on the CPU, knows no PTX, and its cast to float8 does not saturate.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def if_finite(x):
    """x, and NaN for Inf: one instruction. Plain maxima drop the NaN."""
    return tl.fma(x, 0.0, x)


@triton.jit(do_not_specialize_on_alignment=_SCALARS)
def _amax_kernel(x_ptr, partial_ptr, given_ptr, n, per_program, BLOCK: tl.constexpr):
    """partial[p] = largest finite |x| of this program's stretch; 0 where it has none, or a scale is given already."""
    start = tl.program_id(0).to(tl.int64) * per_program
    end = per_program
    if given_ptr is not None:
        if tl.load(given_ptr) > 0:
            end = 0
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    here = tl.arange(0, BLOCK)
    for i in range(0, end, BLOCK):
        first = start + i
        x = tl.load(x_ptr + first + here, mask=first + here < n, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(if_finite(x)))
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
def used_scale(
    partial_ptr, given_ptr, METHOD: tl.constexpr, READY: tl.constexpr, FMT_MAX: tl.constexpr, TOP_EXP: tl.constexpr,
    TOP_MAN: tl.constexpr, MARGIN: tl.constexpr, POW2: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """The scale to cast with: as GIVEN (0), DELAYED (1) if there is one, else from this tensor's amax (2)."""
    if METHOD == 2:
        amax = tl.max(tl.load(partial_ptr + tl.arange(0, PARTIALS)), 0)
        scale = _scale_of(amax, FMT_MAX, TOP_EXP, TOP_MAN, MARGIN, POW2)
    else:
        scale = tl.load(given_ptr)
        if METHOD == 1 and not READY:
            if not scale > 0:
                amax = tl.max(tl.load(partial_ptr + tl.arange(0, PARTIALS)), 0)
                scale = _scale_of(amax, FMT_MAX, TOP_EXP, TOP_MAN, MARGIN, POW2)
    return scale


@triton.jit
def in_range(x, inverse, FMT_MAX: tl.constexpr, Q: tl.constexpr):
    """What the cast to Q is given: x / scale, NaN where that is not finite, within the range unless Q's cast clamps.

    PTX knows no other cast to float8 than one that clamps finite values (`cvt.satfinite`).
    """
    y = if_finite(x * inverse)
    if INTERPRETED or Q == tl.float16:
        y = tl.where(y == y, tl.minimum(tl.maximum(y, -FMT_MAX), FMT_MAX), y)
    return y


@triton.jit
def raise_amax(amax_ptr, amax):
    """amax_ptr[0] = max(amax_ptr[0], amax); neither is negative: such floats are ordered as their bits are."""
    if amax > tl.load(amax_ptr):  # nearly all programs come too late and must not queue
        tl.atomic_max(amax_ptr.to(tl.pointer_type(tl.int32), bitcast=True), amax.to(tl.int32, bitcast=True))


@triton.jit
def count_sample(
    x_ptr, counts_ptr, part, parts, cols, stride, samples, sample_stride, inverse, FMT_MAX: tl.constexpr,
    HALF_TINY: tl.constexpr, FLAT: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Add what the cast does to every `sample_stride`-th element; all parts, a program each, share the work."""
    seen = tl.zeros([SAMPLES], dtype=tl.int64)  # three numbers of 21 bits: no program sees 2^20 elements
    for first in range(part * SAMPLES, samples, parts * SAMPLES):
        which = first + tl.arange(0, SAMPLES)
        offset = which.to(tl.int64) * sample_stride
        if not FLAT:
            offset = offset // cols * stride + offset % cols
        magnitude = tl.abs(tl.load(x_ptr + offset, mask=which < samples, other=0.0).to(tl.float32) * inverse)
        finite = magnitude < float("inf")
        seen += (finite & (magnitude > FMT_MAX)).to(tl.int64)
        seen += ((magnitude > 0) & (magnitude <= HALF_TINY)).to(tl.int64) << 21
        seen += (finite == 0).to(tl.int64) << 42
    if part == 0:
        tl.atomic_add(counts_ptr, samples.to(tl.int64))
    # All add to the same three numbers; nearly all have nothing to add and must not queue for it.
    total = tl.sum(seen, 0)
    if total > 0:
        tl.atomic_add(counts_ptr + 1, total & 0x1FFFFF)
        tl.atomic_add(counts_ptr + 2, (total >> 21) & 0x1FFFFF)
        tl.atomic_add(counts_ptr + 3, total >> 42)


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_SCALARS)
def _cast_kernel(
    x_ptr, q_ptr, partial_ptr, given_ptr, scale_ptr, amax_ptr, counts_ptr, n, samples, sample_stride,
    FMT_MAX: tl.constexpr, HALF_TINY: tl.constexpr, TOP_EXP: tl.constexpr, TOP_MAN: tl.constexpr,
    MARGIN: tl.constexpr, POW2: tl.constexpr, METHOD: tl.constexpr, READY: tl.constexpr, PARTIALS: tl.constexpr,
    SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """q = cast(x / scale), NaN where x is not finite."""
    pid = tl.program_id(0)
    scale = used_scale(partial_ptr, given_ptr, METHOD, READY, FMT_MAX, TOP_EXP, TOP_MAN, MARGIN, POW2, PARTIALS)
    if scale_ptr is not None:
        if pid == 0:
            tl.store(scale_ptr, scale)
    inverse = tl.div_rn(1.0, scale)
    Q: tl.constexpr = q_ptr.dtype.element_ty
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    here = tl.arange(0, BLOCK)
    start = pid.to(tl.int64) * BLOCK
    for _ in range(pid, tl.cdiv(n, BLOCK), tl.num_programs(0)):
        inside = start + here < n
        x = tl.load(x_ptr + start + here, mask=inside, other=0.0).to(tl.float32)
        tl.store(q_ptr + start + here, in_range(x, inverse, FMT_MAX, Q).to(Q), mask=inside)
        if amax_ptr is not None:
            largest = tl.maximum(largest, tl.abs(if_finite(x)))
        start += tl.num_programs(0) * BLOCK
    if amax_ptr is not None:
        raise_amax(amax_ptr, tl.max(largest, 0))
    if counts_ptr is not None:
        count_sample(
            x_ptr, counts_ptr, pid, tl.num_programs(0), 1, 1, samples, sample_stride, inverse, FMT_MAX, HALF_TINY,
            True, SAMPLES,
        )  # fmt: skip


class FormatConstants(NamedTuple):
    """What the kernels know of a format and its scaling, at compile time; in the order of their parameters."""

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


class CastPlan(NamedTuple):
    """How a policy runs in the kernels. `number` tells plans apart quickly.

    method: none, static, current or delayed (`recipe.Scaling`). constant_scale: of the first two.
    """

    number: int
    dtype: torch.dtype
    constants: FormatConstants
    method: str
    constant_scale: float


_amax = Launcher(_amax_kernel)
_scale = Launcher(_scale_kernel)
_cast = Launcher(_cast_kernel)


def current_scale(x: Tensor, plan: CastPlan) -> Tensor:
    """The scale from the finite amax of a contiguous tensor, 0-dim float32."""
    scale = torch.empty((), dtype=torch.float32, device=x.device)
    fmt_max, _, *rest = plan.constants
    _scale(plan.number, x.get_device(), (1, 1, 1), (partial_amax(x), scale, fmt_max, *rest, PARTIALS))
    return scale


def cast(
    x: Tensor,
    plan: CastPlan,
    method: int,
    given: Tensor | None,
    *,
    ready: bool,
    partials: Tensor | None,
    amax: Tensor | None,
    counts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(qdata, scale) of a contiguous float32, bfloat16 or float16 tensor on a GPU.

    given: the scale, which is returned (GIVEN), or the delayed one, 0 = none yet, unless `ready` (DELAYED).
    """
    grid, integers, integers_key = _geometry(x.numel(), _BLOCK, MOST_PROGRAMS)
    qdata = torch.empty(x.shape, dtype=plan.dtype, device=x.device)
    partial = needed_amax(x, method, given, ready, partials)
    length = 0 if partial is None else partial.numel()
    scale = None if method == GIVEN else torch.empty((), dtype=torch.float32, device=x.device)
    key = (
        plan.number, x.dtype, x.data_ptr() % 16, integers_key, method, ready, length, amax is None, counts is None
    )  # fmt: skip
    args = (
        x, qdata, partial, given, scale, amax, counts, *integers, *plan.constants, method, ready, length, SAMPLES,
        _BLOCK,
    )  # fmt: skip
    _cast(key, x.get_device(), grid, args, num_warps=8)
    if scale is None:
        assert given is not None
        scale = given
    return qdata, scale


@lru_cache(maxsize=4096)
def _geometry(n: int, block: int, most: int) -> tuple[tuple[int, int, int], tuple[int, int, int], int]:
    """Of n elements: the grid, the kernel's integers, and what it specialises on in them."""
    every = sample_stride(n)
    return (min(-(-n // block), most), 1, 1), (n, -(-n // every), every), integer_key(n)


def needed_amax(x: Tensor, method: int, given: Tensor | None, ready: bool, partials: Tensor | None) -> Tensor | None:
    """Partial amaxes where the cast wants them; those that are there, or new ones."""
    if method == GIVEN or (method == DELAYED and ready):
        return None
    if partials is not None:
        return partials
    return partial_amax(x.contiguous(), given if method == DELAYED else None)


def partial_amax(x: Tensor, given: Tensor | None = None) -> Tensor:
    """float32 [PARTIALS] of a contiguous tensor: their maximum is its finite amax, unless a scale is `given`."""
    partial = torch.empty(PARTIALS, dtype=torch.float32, device=x.device)
    n = x.numel()
    per_program = (n + PARTIALS * _AMAX_BLOCK - 1) // (PARTIALS * _AMAX_BLOCK) * _AMAX_BLOCK
    key = (x.dtype, x.data_ptr() % 16, integer_key(n), integer_key(per_program), given is None)
    _amax(key, x.get_device(), (PARTIALS, 1, 1), (x, partial, given, n, per_program, _AMAX_BLOCK), num_warps=8)
    return partial
