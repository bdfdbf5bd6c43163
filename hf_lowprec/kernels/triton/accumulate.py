# SPDX-License-Identifier: Apache-2.0
"""Matrix products with sums narrower than float32: `numerics.accumulate` on a GPU, bit for bit.

Two kernels. The first decodes an operand, of any layout, into float32 with k first, so that what a step reads lies
together; it costs as many elements as the operand has, where the second works on M N K. The second keeps a tile of
sums in registers and goes through k one by one: no other order is the same sum.

A product and the addition may run as one fused instruction, and do: the product of two operands is exact in float32
(`recipe.Gemm` refuses others), so that one rounding is the same as two. Rounding to nearest takes the FPU's own
addition, (s + C) - C with C = 1.5 * 2^(23 - man) * 2^floor(log2 |s|), whose products with C are exact as well.

What a sum need not be looked at for:

    subnormals   all sums are multiples of the product of the operands' least steps. Where that is no less than the
                 format's own step, nothing below its normal numbers is rounded
    flushing     where what lies below the normal numbers is not rounded at least, float32 flushes it as it adds, if
                 the sums are scaled so that the format's normal numbers begin where those of float32 do
    saturation   the largest elements of the rows bound what some steps can add. Where the sums stay below the largest
                 value, a loop runs that does not compare; sums that may grow by rounding alone, as stochastic ones do,
                 are looked at every 64 steps to know where they are

A random word is `counter_hash(seed, i << 32 | step)`; what depends on the output i and what depends on the step are
hashed apart, which leaves one multiplication for each addition.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowprec.formats import Format, get_sum_format
from hf_lowprec.kernels.triton.formats import (
    Constants,
    code_values,
    count_codes,
    covered,
    decoded,
    keys_of,
    low_bits,
    mix,
    mode_of,
)
from hf_lowprec.kernels.triton.launch import on_its_device
from hf_lowprec.kernels.triton.ptx import fma_flushed, times_plus
from hf_lowprec.numerics.codes import random_bits
from hf_lowprec.numerics.rounding import magic_fits
from hf_lowprec.recipe import Accumulation, Rounding

_DECODE = 32
_BLOCK = 64  # additions after which sums that can grow are looked at
_NO_SUBNORMAL = 3  # beside the kinds of `formats`: none that a sum could be


class Setting(NamedTuple):
    """A program's tile of sums. ahead: whether a step loads what the next one multiplies. registers: at most."""

    rows: int
    cols: int
    warps: int
    ahead: bool
    unroll: int
    registers: int | None = None


# By the way of rounding (0: float32, 1: by the FPU, 2: by dropping bits, 3: any), whether it is stochastic, whether
# sums have chunks. Left alone, loops may take up to 250 registers: fewer programs at a time.
_COMMON = Setting(64, 64, 4, True, 4)
SETTINGS = {
    (0, False, False): Setting(32, 64, 2, True, 4),
    (1, False, False): _COMMON._replace(registers=128),
    (1, False, True): _COMMON,
    (2, False, False): _COMMON._replace(registers=128),
    (2, False, True): _COMMON._replace(registers=128),
    (2, True, False): _COMMON._replace(registers=128),
    (2, True, True): _COMMON._replace(registers=128),
    (3, False, False): _COMMON,
    (3, False, True): _COMMON,
    (3, True, False): _COMMON,
    (3, True, True): _COMMON,
}


@triton.jit
def _decode_kernel(
    raw_ptr, out_ptr, top_ptr, rows, k, stride_row, stride_k, SHIFT: tl.constexpr,
    MAN: tl.constexpr, EMIN: tl.constexpr, MAX_CODE: tl.constexpr, SUBNORMAL: tl.constexpr, SIGN: tl.constexpr,
    NAN_CODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[k, row] = value * 2^SHIFT; top[row] = bits of the largest |value|, where one is not finite of infinity."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (r[:, None] < rows) & (c[None, :] < k)
    at = r[:, None].to(tl.int64) * stride_row + c[None, :].to(tl.int64) * stride_k
    raw = tl.load(raw_ptr + at, mask=inside, other=0).to(tl.int32) & (0xFFFF if SIGN > 128 else 0xFF)
    value, finite = decoded(raw, MAN, EMIN, MAX_CODE, SUBNORMAL, SIGN, NAN_CODE)
    target = out_ptr + c[:, None].to(tl.int64) * rows + r[None, :]
    tl.store(target, tl.trans(value * 2.0**SHIFT), mask=(c[:, None] < k) & (r[None, :] < rows))
    size = tl.where(finite, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800000)
    tl.atomic_max(top_ptr + r, tl.max(tl.where(inside, size, 0), 1), mask=r < rows)


@triton.jit
def _rounded(
    s, words, CLAMP: tl.constexpr, WAY: tl.constexpr, MODE: tl.constexpr, BITS: tl.constexpr, MAN: tl.constexpr,
    EMIN: tl.constexpr, MAX_CODE: tl.constexpr, SUBNORMAL: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """`numerics.accumulation._rounder` of sums that are finite. CLAMP: whether some may lie beyond LARGEST."""
    if WAY == 3:
        codes = count_codes(s, words, MODE, BITS, MAN, EMIN, MAX_CODE, SUBNORMAL)
        sign = s.to(tl.int32, bitcast=True) & -0x80000000
        size = code_values(codes, MAN, EMIN, SUBNORMAL).to(tl.int32, bitcast=True)
        s = (size | sign).to(tl.float32, bitcast=True)
    elif WAY > 0:
        if WAY == 1:
            MAGIC_C: tl.constexpr = 1.5 * 2.0 ** (23 - MAN)
            power = (s.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            if SUBNORMAL == 0:
                power = tl.maximum(power, 2.0**EMIN)
            s = tl.fma(power, MAGIC_C, s)
            s = tl.fma(power, -MAGIC_C, s)
        else:
            units = s.to(tl.int32, bitcast=True)
            if MODE == 1:
                units += 1 << (22 - MAN)
            elif MODE == 3:
                units = times_plus(words, 1 << (23 - MAN - BITS), units)
            s = (units & -(1 << (23 - MAN))).to(tl.float32, bitcast=True)
        if SUBNORMAL == 1:
            s = tl.where(tl.abs(s) < 2.0**EMIN, 0.0, s)
        if CLAMP:
            s = tl.minimum(tl.maximum(s, -LARGEST), LARGEST)
    return s


@triton.jit
def _stream_key(stream, k1):
    """With `_step_key`, `numerics.hashing.stream_words` begun; h ^ (h >> 15) is linear over xor."""
    h = mix(stream) ^ k1
    return h ^ (h >> 15)


@triton.jit
def _step_key(step, k0):
    h = k0 ^ step  # uint32, also where the interpreter counts in Python's integers
    h ^= h >> 16
    h *= 0x7FEB352D
    return h ^ (h >> 15)


@triton.jit
def _noise(stream, step, BITS: tl.constexpr):
    """int32 of BITS random bits."""
    return low_bits((stream ^ step) * 0x846CA68B, BITS, 0)


@triton.jit
def _steps(
    s, a_at, b_at, next_a, next_b, first, last, stream, k0, m, n, CLAMP: tl.constexpr,
    STOCHASTIC: tl.constexpr, FLUSH: tl.constexpr, MODE: tl.constexpr,
    WAY: tl.constexpr, BITS: tl.constexpr, MAN: tl.constexpr, EMIN: tl.constexpr, MAX_CODE: tl.constexpr,
    SUBNORMAL: tl.constexpr, LARGEST: tl.constexpr, AHEAD: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Sums, pointers and what was loaded ahead, after the products `first` to `last` - 1."""
    for i in tl.range(first, last, loop_unroll_factor=UNROLL):
        if AHEAD:
            a, b = next_a, next_b
            a_at += m
            b_at += n
            next_a, next_b = tl.load(a_at), tl.load(b_at)
        else:
            a, b = tl.load(a_at), tl.load(b_at)
            a_at += m
            b_at += n
        if FLUSH:
            s = fma_flushed(a, b, s)
        else:
            s = a * b + s
        words = _noise(stream, _step_key(i, k0), BITS) if STOCHASTIC else 0
        s = _rounded(s, words, CLAMP, WAY, MODE, BITS, MAN, EMIN, MAX_CODE, SUBNORMAL, LARGEST)
    return s, a_at, b_at, next_a, next_b


@triton.jit
def _sums(
    a_at, b_at, stream, k0, m, n, k, chunk, block, product, BOUND: tl.constexpr, LOOK: tl.constexpr,
    SHIFT: tl.constexpr, CHUNKED: tl.constexpr, STOCHASTIC: tl.constexpr, FLUSH: tl.constexpr, MODE: tl.constexpr,
    WAY: tl.constexpr, BITS: tl.constexpr, MAN: tl.constexpr, EMIN: tl.constexpr, MAX_CODE: tl.constexpr,
    SUBNORMAL: tl.constexpr, LARGEST: tl.constexpr,
    OUTER_WAY: tl.constexpr, OUTER_BITS: tl.constexpr, OUTER_MAN: tl.constexpr, OUTER_EMIN: tl.constexpr,
    OUTER_MAX_CODE: tl.constexpr, OUTER_SUBNORMAL: tl.constexpr, OUTER_LARGEST: tl.constexpr,
    AHEAD: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The sums of a tile, from the pointers to its first products, none larger than `product`.

    AHEAD: loads a step ahead, beyond the last.
    """
    s = tl.zeros(stream.shape, dtype=tl.float32)
    total = tl.zeros(stream.shape, dtype=tl.float32)
    next_a, next_b = 0.0, 0.0
    if AHEAD:
        next_a, next_b = tl.load(a_at), tl.load(b_at)
    for first in range(0, k, chunk):
        if CHUNKED:
            s = tl.zeros(stream.shape, dtype=tl.float32)
        end = tl.minimum(first + chunk, k)
        for begin in range(first, end, block):
            last = tl.minimum(begin + block, end)
            free = False
            if BOUND > 0:
                reach = product * block
                if LOOK:
                    reach += tl.max(tl.abs(s)) * 2.0**-SHIFT
                free = reach < BOUND
            if free:
                s, a_at, b_at, next_a, next_b = _steps(
                    s, a_at, b_at, next_a, next_b, begin, last, stream, k0, m, n, False, STOCHASTIC, FLUSH, MODE,
                    WAY, BITS, MAN, EMIN, MAX_CODE, SUBNORMAL, LARGEST, AHEAD, UNROLL,
                )  # fmt: skip
            else:
                s, a_at, b_at, next_a, next_b = _steps(
                    s, a_at, b_at, next_a, next_b, begin, last, stream, k0, m, n, True, STOCHASTIC, FLUSH, MODE,
                    WAY, BITS, MAN, EMIN, MAX_CODE, SUBNORMAL, LARGEST, AHEAD, UNROLL,
                )  # fmt: skip
        if CHUNKED:
            total += s
            words = 0
            if STOCHASTIC and OUTER_WAY > 0:
                words = _noise(stream, _step_key(first // chunk, k0 ^ 0x80000000), OUTER_BITS)
            total = _rounded(total, words, True, OUTER_WAY, MODE, OUTER_BITS, OUTER_MAN, OUTER_EMIN, OUTER_MAX_CODE,
                             OUTER_SUBNORMAL, OUTER_LARGEST)  # fmt: skip
    return total if CHUNKED else s


@triton.jit
def _sums_kernel(
    a_ptr, b_ptr, out_ptr, a_top_ptr, b_top_ptr, seed_ptr, m, n, k, chunk, block,
    SHIFT: tl.constexpr, BOUND: tl.constexpr, LOOK: tl.constexpr,
    CHUNKED: tl.constexpr, STOCHASTIC: tl.constexpr, FLUSH: tl.constexpr, MODE: tl.constexpr,
    WAY: tl.constexpr, BITS: tl.constexpr, MAN: tl.constexpr, EMIN: tl.constexpr, MAX_CODE: tl.constexpr,
    SUBNORMAL: tl.constexpr, LARGEST: tl.constexpr,
    OUTER_WAY: tl.constexpr, OUTER_BITS: tl.constexpr, OUTER_MAN: tl.constexpr, OUTER_EMIN: tl.constexpr,
    OUTER_MAX_CODE: tl.constexpr, OUTER_SUBNORMAL: tl.constexpr, OUTER_LARGEST: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, AHEAD: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """a [k, m] times 2^SHIFT, b [k, n] -> out [m, n].

    BOUND: of `block` products, and with LOOK the sums before them, below which nothing saturates; 0: none is known.
    """
    across = tl.cdiv(n, TILE_N)
    row = tl.program_id(0) // across * TILE_M + tl.arange(0, TILE_M)[:, None]
    col = tl.program_id(0) % across * TILE_N + tl.arange(0, TILE_N)[None, :]
    # Beyond the end the last row and column are read once more: no step needs a mask.
    last_row, last_col = tl.minimum(row, m - 1), tl.minimum(col, n - 1)
    a_at, b_at = a_ptr + last_row, b_ptr + last_col
    a_top, b_top = tl.load(a_top_ptr + last_row), tl.load(b_top_ptr + last_col)
    stream, k0 = tl.zeros([TILE_M, TILE_N], dtype=tl.uint32), 0
    if STOCHASTIC:
        k0, k1 = keys_of(tl.load(seed_ptr))
        # Not the int64 below, which would be kept through the loop: 64 registers.
        stream = _stream_key((row * n + col).to(tl.uint32, bitcast=True), k1)
    a_largest = tl.max(tl.max(a_top, 1), 0).to(tl.float32, bitcast=True)
    b_largest = tl.max(tl.max(b_top, 1), 0).to(tl.float32, bitcast=True)
    out = _sums(
        a_at, b_at, stream, k0, m, n, k, chunk, block, a_largest * b_largest, BOUND, LOOK, SHIFT, CHUNKED, STOCHASTIC,
        FLUSH, MODE, WAY, BITS, MAN, EMIN, MAX_CODE, SUBNORMAL, LARGEST, OUTER_WAY, OUTER_BITS, OUTER_MAN, OUTER_EMIN,
        OUTER_MAX_CODE, OUTER_SUBNORMAL, OUTER_LARGEST, AHEAD, UNROLL,
    )  # fmt: skip
    out = out * 2.0**-SHIFT + 0.0  # -0 becomes 0
    inside = (row < m) & (col < n)
    bad = (a_top >= 0x7F800000) | (b_top >= 0x7F800000)
    tl.store(out_ptr + row.to(tl.int64) * n + col, tl.where(bad, float("nan"), out), mask=inside)


# --- launchers ------------------------------------------------------------------------------------------------------


@on_its_device
def accumulate(
    a: Tensor,
    a_format: str,
    b: Tensor,
    b_format: str,
    accumulation: Accumulation | None,
    seed: Tensor | None = None,
    *,
    setting: Setting | None = None,
) -> Tensor:
    """`numerics.accumulate` of codes [M, K] and [N, K], of any strides, in their formats: float32 [M, N].

    accumulation: None adds in float32, one product after the other, which is what the others are compared with.
    seed: 0-dim int64 on the device of `a`, for stochastic rounding. setting: for measurements.

    Raises ValueError: a format that `kernels.triton.formats` does not cover; stochastic rounding without a seed.
    """
    constants = _constants(a_format, b_format, accumulation)
    if constants["STOCHASTIC"] and seed is None:
        raise ValueError("stochastic rounding needs a seed")
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty((m, n), dtype=torch.float32, device=a.device)
    if not m or not n or not k:
        return out.zero_()
    a_values, a_top = _decode(a, a_format, constants["SHIFT"])
    b_values, b_top = _decode(b, b_format, 0)
    chunk = k if accumulation is None or accumulation.chunk is None else min(accumulation.chunk, k)
    block = _BLOCK if constants["LOOK"] else chunk
    use = setting or SETTINGS[constants["WAY"], constants["STOCHASTIC"], constants["CHUNKED"]]
    grid = (triton.cdiv(m, use.rows) * triton.cdiv(n, use.cols),)
    _sums_kernel[grid](
        a_values, b_values, out, a_top, b_top, a_top if seed is None else seed, m, n, k, chunk, block,
        **constants, TILE_M=use.rows, TILE_N=use.cols, AHEAD=use.ahead, UNROLL=use.unroll, num_warps=use.warps,
        maxnreg=use.registers,
    )  # fmt: skip
    return out


def _decode(x: Tensor, name: str, shift: int) -> tuple[Tensor, Tensor]:
    """(float32 values [K, rows] times 2^shift, int32 [rows]: bits of the largest magnitude, Inf if one is not finite).

    The values lie before one more row of K, which may be read and is rubbish.
    """
    rows, k = x.shape
    values = torch.empty((k + 1, rows), dtype=torch.float32, device=x.device)[:k]
    top = torch.zeros(rows, dtype=torch.int32, device=x.device)
    raw = x.view(torch.uint8 if x.dtype.itemsize == 1 else torch.int16)
    _decode_kernel[(triton.cdiv(rows, _DECODE), triton.cdiv(k, _DECODE))](
        raw,
        values,
        top,
        rows,
        k,
        raw.stride(0),
        raw.stride(1),
        shift,
        *Constants.of(_operand(name))[:6],
        BLOCK=_DECODE,
    )
    return values, top


@cache
def _constants(a_format: str, b_format: str, accumulation: Accumulation | None) -> dict[str, Any]:
    """The kernel's constants that the recipe decides."""
    if accumulation is None or accumulation.format is None:
        rounding, inner, chunked, outer = Rounding(), None, False, None
    else:
        rounding, chunked = accumulation.rounding, accumulation.chunk is not None
        inner = get_sum_format(accumulation.format)
        outer = None if accumulation.outer is None else get_sum_format(accumulation.outer)
    a, b = _operand(a_format), _operand(b_format)
    chunk_sum = 2.0**127 if inner is None else inner.max
    step = math.frexp(_step(a) * _step(b))[1] - 1  # all sums are multiples of 2^step
    inside = _sum_constants(inner, rounding, a.max * b.max, step)
    outside = _sum_constants(outer, rounding, chunk_sum, step)
    shift = 0
    if inside.SUBNORMAL == 1 and inside.WAY in (1, 2) and step >= inside.EMIN - 1 - inside.MAN and outside.WAY < 3:
        # No operand may be flushed itself, and the outer sums' subnormals may not fall below float32's.
        low = outside.EMIN if outside.WAY and outside.SUBNORMAL < 2 else 0
        if _step(a) >= 2.0**inside.EMIN and _step(b) >= 2.0**-126 and low >= inside.EMIN:
            shift = -126 - inside.EMIN
            inside = inside.scaled(shift)._replace(SUBNORMAL=_NO_SUBNORMAL)
            outside = outside.scaled(shift)
    # To nearest a product moves a sum by 2 |ab|: the sum before it is a value, no further from it than the one chosen.
    # Stochastic, one goes up by its last place, 2^-man of itself at most: |s| <= (|s0| + sum |ab|) (1 + 2^-man)^steps.
    # What is below the largest value is rounded to no more than that. Half is left for the roundings of the test.
    bound, look, growth = 0.0, False, 2.0
    if accumulation is not None and inner is not None and inside.WAY in (1, 2):
        if rounding.mode == "stochastic":
            look = accumulation.chunk is None or accumulation.chunk > _BLOCK
            growth = (1 + 2.0**-inner.man) ** (_BLOCK if look else accumulation.chunk or 0)
        bound = inner.max / (2 * growth)
    return {
        "CHUNKED": chunked,
        "STOCHASTIC": rounding.mode == "stochastic",
        "MODE": mode_of(rounding.mode),
        "SHIFT": shift,
        "FLUSH": shift != 0,
        "BOUND": bound,
        "LOOK": look,
        **inside._asdict(),
        **{f"OUTER_{name}": value for name, value in outside._asdict().items()},
    }


class _Sum(NamedTuple):
    """The kernel's constants of one kind of sums."""

    WAY: int
    BITS: int
    MAN: int
    EMIN: int
    MAX_CODE: int
    SUBNORMAL: int
    LARGEST: float

    def scaled(self, shift: int) -> _Sum:
        return self._replace(EMIN=self.EMIN + shift, LARGEST=self.LARGEST * 2.0**shift) if self.WAY else self


def _operand(name: str) -> Format:
    fmt = covered(name)
    if fmt is None:
        raise ValueError(f"no kernel decodes {name}")
    return fmt


def _step(fmt: Format) -> float:
    """What all values of a format are multiples of."""
    return 2.0 ** (fmt.emin - fmt.man)


def _sum_constants(fmt: Format | None, rounding: Rounding, added: float, step: int) -> _Sum:
    """Sums in `fmt` (None: float32), to which magnitudes up to `added` are added, multiples of 2^step."""
    if fmt is None:
        return _Sum(0, 1, 1, 0, 1, 0, 1.0)
    constants = Constants.of(fmt)
    subnormal = constants.subnormal
    if step >= fmt.emin - (fmt.man if fmt.subnormal == "gradual" else 0):
        subnormal = _NO_SUBNORMAL
    reach = math.frexp(fmt.max + added)[1]  # of the sum before it is rounded
    if rounding.mode == "nearest" and magic_fits(fmt) and 23 - fmt.man + reach <= 127:
        way = 1
    elif rounding.mode != "nearest" and subnormal in (1, _NO_SUBNORMAL):
        way = 2
    else:
        way, subnormal = 3, constants.subnormal
    return _Sum(way, random_bits(rounding, fmt), fmt.man, fmt.emin, constants.max_code, subnormal, fmt.max)
