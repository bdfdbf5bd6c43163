# SPDX-License-Identifier: Apache-2.0
"""Matrix products with sums narrower than float32: `numerics.accumulate` on a GPU, bit for bit.

Two kernels. The first decodes an operand, of any layout, into float32 with k first, so that what a step reads lies
together; it costs as many elements as the operand has, where the second works on M N K. The second keeps a tile of
sums in registers and goes through k one by one: no other order is the same sum.

A product and the addition may run as one fused instruction, and do: the product of two operands is exact in float32
(`recipe.Gemm` refuses others), so that one rounding is the same as two. Rounding to nearest takes the FPU's own
addition, (s + C) - C with C = 1.5 * 2^(23 - man) * 2^floor(log2 |s|), whose products with C are exact as well.

A random word is `counter_hash(seed, i << 32 | step)`; what depends on the output i and what depends on the step are
hashed apart, which leaves one multiplication for each addition.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowprec.formats import Format, get_format, get_sum_format
from hf_lowprec.kernels.triton.formats import (
    Constants,
    code_values,
    count_codes,
    covered,
    decoded,
    keys_of,
    mix,
    mode_of,
)
from hf_lowprec.kernels.triton.launch import on_its_device
from hf_lowprec.numerics.codes import random_bits
from hf_lowprec.numerics.rounding import magic_fits
from hf_lowprec.recipe import Accumulation, Rounding

FLOAT32, MAGIC, DROP, GENERAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_TILE = 64
_DECODE = 32
_UNROLL = tl.constexpr(4)


@triton.jit
def _decode_kernel(
    raw_ptr, out_ptr, bad_ptr, rows, k, stride_row, stride_k,
    MAN: tl.constexpr, EMIN: tl.constexpr, MAX_CODE: tl.constexpr, SUBNORMAL: tl.constexpr, SIGN: tl.constexpr,
    NAN_CODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[k, row] = value; bad[row] = 1 where a row has an element that is not finite."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (r[:, None] < rows) & (c[None, :] < k)
    at = r[:, None].to(tl.int64) * stride_row + c[None, :].to(tl.int64) * stride_k
    raw = tl.load(raw_ptr + at, mask=inside, other=0).to(tl.int32) & (0xFFFF if SIGN > 128 else 0xFF)
    value, finite = decoded(raw, MAN, EMIN, MAX_CODE, SUBNORMAL, SIGN, NAN_CODE)
    target = out_ptr + c[:, None].to(tl.int64) * rows + r[None, :]
    tl.store(target, tl.trans(value), mask=(c[:, None] < k) & (r[None, :] < rows))
    spoiled = tl.max(((finite == 0) & inside).to(tl.int32), 1)
    tl.store(bad_ptr + r, spoiled, mask=(r < rows) & (spoiled > 0))


@triton.jit
def _rounded(
    s, words, WAY: tl.constexpr, MODE: tl.constexpr, BITS: tl.constexpr, MAN: tl.constexpr, EMIN: tl.constexpr,
    MAX_CODE: tl.constexpr, SUBNORMAL: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """`numerics.accumulation._rounder` of sums that are finite."""
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
                units += words << (23 - MAN - BITS)
            s = (units & -(1 << (23 - MAN))).to(tl.float32, bitcast=True)
        if SUBNORMAL == 1:
            s = tl.where(tl.abs(s) < 2.0**EMIN, 0.0, s)
        s = tl.minimum(tl.maximum(s, -LARGEST), LARGEST)
    return s


@triton.jit
def _word(stream, step, BITS: tl.constexpr):
    """`numerics.hashing.stream_words`: uint32 of streams and of a step -> int32 of BITS random bits."""
    h = stream ^ step
    h ^= h >> 15
    h *= 0x846CA68B
    return ((h ^ (h >> 16)) & ((1 << BITS) - 1)).to(tl.int32, bitcast=True)


@triton.jit
def _step_key(step, k0):
    h = k0 ^ step  # uint32, also where the interpreter counts in Python's integers
    h ^= h >> 16
    return h * 0x7FEB352D


@triton.jit
def _sums_kernel(
    a_ptr, b_ptr, out_ptr, a_bad_ptr, b_bad_ptr, seed_ptr, m, n, k, chunk,
    CHUNKED: tl.constexpr, STOCHASTIC: tl.constexpr, MODE: tl.constexpr,
    WAY: tl.constexpr, BITS: tl.constexpr, MAN: tl.constexpr, EMIN: tl.constexpr, MAX_CODE: tl.constexpr,
    SUBNORMAL: tl.constexpr, LARGEST: tl.constexpr,
    OUTER_WAY: tl.constexpr, OUTER_BITS: tl.constexpr, OUTER_MAN: tl.constexpr, OUTER_EMIN: tl.constexpr,
    OUTER_MAX_CODE: tl.constexpr, OUTER_SUBNORMAL: tl.constexpr, OUTER_LARGEST: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """a [k, m], b [k, n] -> out [m, n]."""
    across = tl.cdiv(n, TILE_N)
    row = tl.program_id(0) // across * TILE_M + tl.arange(0, TILE_M)[:, None]
    col = tl.program_id(0) % across * TILE_N + tl.arange(0, TILE_N)[None, :]
    # Beyond the end the last row and column are read once more: no step needs a mask.
    a_at = a_ptr + tl.minimum(row, m - 1)
    b_at = b_ptr + tl.minimum(col, n - 1)
    stream, k0 = tl.zeros([TILE_M, TILE_N], dtype=tl.uint32), 0
    if STOCHASTIC:
        k0, k1 = keys_of(tl.load(seed_ptr))
        stream = mix((row.to(tl.int64) * n + col).to(tl.uint32)) ^ k1
    s = tl.zeros([TILE_M, TILE_N], dtype=tl.float32)
    total = tl.zeros([TILE_M, TILE_N], dtype=tl.float32)
    for first in range(0, k, chunk):
        if CHUNKED:
            s = tl.zeros([TILE_M, TILE_N], dtype=tl.float32)
        for i in tl.range(first, tl.minimum(first + chunk, k), loop_unroll_factor=UNROLL):
            s = tl.load(a_at) * tl.load(b_at) + s
            words = _word(stream, _step_key(i, k0), BITS) if STOCHASTIC else 0
            s = _rounded(s, words, WAY, MODE, BITS, MAN, EMIN, MAX_CODE, SUBNORMAL, LARGEST)
            a_at += m
            b_at += n
        if CHUNKED:
            total += s
            words = 0
            if STOCHASTIC and OUTER_WAY > 0:
                words = _word(stream, _step_key(first // chunk, k0 ^ 0x80000000), OUTER_BITS)
            total = _rounded(total, words, OUTER_WAY, MODE, OUTER_BITS, OUTER_MAN, OUTER_EMIN, OUTER_MAX_CODE,
                             OUTER_SUBNORMAL, OUTER_LARGEST)  # fmt: skip
    out = (total if CHUNKED else s) + 0.0  # -0 becomes 0
    inside = (row < m) & (col < n)
    bad = (tl.load(a_bad_ptr + row, mask=row < m, other=0) | tl.load(b_bad_ptr + col, mask=col < n, other=0)) > 0
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
    tile: tuple[int, int] = (_TILE, _TILE),
    warps: int = 4,
) -> Tensor:
    """`numerics.accumulate` of codes [M, K] and [N, K], of any strides, in their formats: float32 [M, N].

    accumulation: None adds in float32, one product after the other, which is what the others are compared with.
    seed: 0-dim int64 on the device of `a`, for stochastic rounding. tile, warps: for measurements.

    Raises ValueError: a format that `kernels.triton.formats` does not cover; stochastic rounding without a seed.
    """
    constants = _constants(a_format, b_format, accumulation)
    if constants["STOCHASTIC"] and seed is None:
        raise ValueError("stochastic rounding needs a seed")
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty((m, n), dtype=torch.float32, device=a.device)
    if not m or not n or not k:
        return out.zero_()
    a_values, a_bad = _decode(a, a_format)
    b_values, b_bad = _decode(b, b_format)
    chunk = k if accumulation is None or accumulation.chunk is None else accumulation.chunk
    grid = (triton.cdiv(m, tile[0]) * triton.cdiv(n, tile[1]),)
    _sums_kernel[grid](
        a_values, b_values, out, a_bad, b_bad, a_bad if seed is None else seed, m, n, k, chunk,
        **constants, TILE_M=tile[0], TILE_N=tile[1], UNROLL=4, num_warps=warps,
    )  # fmt: skip
    return out


def _decode(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(float32 values [K, rows], int32 [rows]: 1 where a row has an element that is not finite)."""
    fmt = covered(name)
    if fmt is None:
        raise ValueError(f"no kernel decodes {name}")
    rows, k = x.shape
    values = torch.empty((k, rows), dtype=torch.float32, device=x.device)
    bad = torch.zeros(rows, dtype=torch.int32, device=x.device)
    raw = x.view(torch.uint8 if x.dtype.itemsize == 1 else torch.int16)
    _decode_kernel[(triton.cdiv(rows, _DECODE), triton.cdiv(k, _DECODE))](
        raw, values, bad, rows, k, raw.stride(0), raw.stride(1), *Constants.of(fmt)[:6], BLOCK=_DECODE
    )
    return values, bad


@cache
def _constants(a_format: str, b_format: str, accumulation: Accumulation | None) -> dict[str, Any]:
    """The kernel's constants that the recipe decides."""
    if accumulation is None or accumulation.format is None:
        rounding, inner, chunked, outer = Rounding(), None, False, None
    else:
        rounding, chunked = accumulation.rounding, accumulation.chunk is not None
        inner = get_sum_format(accumulation.format)
        outer = None if accumulation.outer is None else get_sum_format(accumulation.outer)
    a, b = get_format(a_format), get_format(b_format)
    added = a.max * b.max
    inner_names = ("WAY", "BITS", "MAN", "EMIN", "MAX_CODE", "SUBNORMAL", "LARGEST")
    chunk_sum = 2.0**127 if inner is None else inner.max
    return {
        "CHUNKED": chunked,
        "STOCHASTIC": rounding.mode == "stochastic",
        "MODE": mode_of(rounding.mode),
        **dict(zip(inner_names, _sum_constants(inner, rounding, added), strict=True)),
        **{f"OUTER_{name}": value for name, value in zip(inner_names, _sum_constants(outer, rounding, chunk_sum),
                                                         strict=True)},
    }  # fmt: skip


def _sum_constants(fmt: Format | None, rounding: Rounding, added: float) -> tuple[Any, ...]:
    """WAY to LARGEST of sums in `fmt` (None: float32), to which magnitudes up to `added` are added."""
    if fmt is None:
        return 0, 1, 1, 0, 1, 0, 1.0
    reach = math.frexp(fmt.max + added)[1]  # of the sum before it is rounded
    if rounding.mode == "nearest" and magic_fits(fmt) and 23 - fmt.man + reach <= 127:
        way = 1
    elif rounding.mode != "nearest" and fmt.subnormal == "flush" and fmt.emax < 126 and reach <= 127:
        way = 2
    else:
        way = 3
    constants = Constants.of(fmt)
    return way, random_bits(rounding, fmt), fmt.man, fmt.emin, constants.max_code, constants.subnormal, fmt.max
