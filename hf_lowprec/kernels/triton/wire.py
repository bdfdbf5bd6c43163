# SPDX-License-Identifier: Apache-2.0
"""Gradients through the format of communication, E4M3 with one scale and the factor mu: bit for bit
as `optim/gradient.py`.

scale_of          s / mu of every gradient, from its largest finite magnitude
through           g' of g
observe_kernel    the state machine of mu, when all codes have been counted
exchange_kernel   g' as tensors of their own, for optimizers that have no kernel here
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_lowprec.kernels.triton.codecs import from_float
from hf_lowprec.kernels.triton.columns import (
    N_AMAX,
    N_COLUMNS,
    N_EXTREMES,
    N_FINITE,
    T_COLUMNS,
    T_GRAD_FORMAT,
    T_WIRE_COUNT,
    T_WIRE_GROWTH,
    T_WIRE_K,
    T_WIRE_LIMIT,
    T_WIRE_MU,
    T_WIRE_SATURATED,
    T_WIRE_UPPER,
    chunk_of,
    left_of,
)
from hf_lowprec.kernels.triton.ptx import nearest_bf16, through_e4m3
from hf_lowprec.kernels.triton.quantize import code_values, count_codes
from hf_lowprec.kernels.triton.words import bits_of, elements, float_of, load_words, packed, store_words

_EXTREME = tl.constexpr(432.0)  # what rounds to 448 or beyond
_REACH = tl.constexpr(16)  # of mu: 2^-16


# --- scales ----------------------------------------------------------------------------------------------------------


@triton.jit
def scale_of(row, amax, inside):
    """(whether the gradient passes through the format, scale of its codes, the scale's inverse), one per row.

    amax: the largest finite magnitude. mu = 2^(k / growth), from a table of 2^(r / growth) and the exponent.
    """
    wired = tl.load(row + T_WIRE_COUNT, mask=inside, other=0) != 0
    k_address = tl.load(row + T_WIRE_K, mask=wired, other=0)
    scaled = k_address != 0
    growth = tl.load(row + T_WIRE_GROWTH, mask=scaled, other=1)
    k = tl.load(k_address.to(tl.pointer_type(tl.int32)), mask=scaled, other=0).to(tl.int64)
    k = tl.minimum(k, tl.load(row + T_WIRE_UPPER, mask=scaled, other=0))
    whole = (k + 64 * growth) // growth - 64  # downward; k >= -16 * growth
    part = tl.load(row + T_WIRE_MU, mask=scaled, other=0).to(tl.pointer_type(tl.float32)) + (k - whole * growth)
    mu = float_of(bits_of(tl.load(part, mask=scaled, other=1.0)) + (whole.to(tl.int32) << 23))
    bits = bits_of(amax)  # 448 is 0x43E00000
    exponent = (bits >> 23) - 135 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    scale = float_of((tl.minimum(tl.maximum(exponent, -126), 126) + 127) << 23)
    scale = tl.div_rn(tl.where(amax > 0, scale, 1.0), mu)
    return wired, scale, tl.div_rn(1.0, scale)


# --- elements --------------------------------------------------------------------------------------------------------


@triton.jit
def _coded(z, NATIVE: tl.constexpr):
    """The nearest number of E4M3, saturated; rubbish for what is not finite."""
    if NATIVE:
        out = through_e4m3(z)
    else:
        value = code_values(count_codes(z, 0, 3, -6, 126, 0), 3, -6, 0.001953125)
        out = float_of(bits_of(value) | (bits_of(z) & -0x80000000))
    return out


@triton.jit
def rounded(x, FORMAT: tl.constexpr):
    """float32 x to nearest in `fp32`, `bf16` or `fp16`, as a cast of torch has it, in float32."""
    if FORMAT == "bf16":
        x = x.to(tl.bfloat16).to(tl.float32)
    elif FORMAT == "fp16":
        x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def through(z, scale, FORMAT: tl.constexpr, NATIVE: tl.constexpr, FINITE: tl.constexpr):
    """g' in the gradient's FORMAT, for z = g / scale. FINITE: nobody reads what is not finite; else it becomes NaN."""
    value = _coded(z, NATIVE) * scale
    if not FINITE:
        value = tl.fma(z, 0.0, value)
    if NATIVE and FORMAT == "bf16":
        return nearest_bf16(value)
    return rounded(value, FORMAT)


@triton.jit
def at_extremes(z):
    """1 where the code of z is the format's largest, int32."""
    magnitude = tl.abs(z)
    return ((magnitude >= _EXTREME) & (magnitude < float("inf"))).to(tl.int32)


@triton.jit
def amax_through(row, seen, inside):
    """(float32 amax of g', NaN or Inf if g holds one; scale; its inverse; 0 and 0 where g passes as it is)."""
    raw = tl.load(seen + N_AMAX, mask=inside, other=0)
    amax = float_of(tl.load(seen + N_FINITE, mask=inside, other=0))
    wired, scale, inverse = scale_of(row, amax, inside)
    kind = tl.load(row + T_GRAD_FORMAT, mask=inside, other=0)
    # To quantise keeps the order, so that the largest of them becomes the largest.
    value = through(amax * inverse, scale, "fp32", False, False)
    value = tl.where(kind == 1, rounded(value, "bf16"), tl.where(kind == 2, rounded(value, "fp16"), value))
    value = tl.where(raw < 0x7F800000, value, float("nan"))
    return tl.where(wired, value, float_of(raw)), tl.where(wired, scale, 0.0), tl.where(wired, inverse, 0.0)


@triton.jit
def count_extremes(base, begin, left, inverse, GRAD: tl.constexpr, FAST: tl.constexpr, EACH: tl.constexpr,
                   TILE: tl.constexpr):  # fmt: skip
    """How many codes of a chunk's gradient are the format's largest, and nothing else. FAST: tiles are whole."""
    BITS: tl.constexpr = 32 if GRAD == "fp32" else 16
    hits = tl.zeros([1, TILE], dtype=tl.int32)
    for tile in tl.range(0, tl.cdiv(left, TILE)):
        words = load_words(base, begin, tile, left, BITS, 1, TILE, EACH, FAST, 0, FAST)
        hits += at_extremes(from_float(elements(words, BITS, FAST), GRAD) * inverse)
    return tl.sum(hits)


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tensors"])
def observe_kernel(table, seen, tensors, BLOCK: tl.constexpr):
    """`GradientQuantizer.observe` for BLOCK tensors."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, seen = table + i * T_COLUMNS, seen + i * N_COLUMNS
    count_address = tl.load(row + T_WIRE_COUNT, mask=i < tensors, other=0)
    wired = count_address != 0
    raw = tl.load(seen + N_AMAX, mask=wired, other=0)
    extremes = tl.load(seen + N_EXTREMES, mask=wired, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
    saturated = tl.maximum(extremes - 1, 0)  # the largest element sits there by right
    k_address = tl.load(row + T_WIRE_K, mask=wired, other=0)
    moving = (k_address != 0) & (raw > 0) & (raw < 0x7F800000)
    k_pointer = k_address.to(tl.pointer_type(tl.int32))
    k = tl.load(k_pointer, mask=moving, other=0).to(tl.int64)
    growth = tl.load(row + T_WIRE_GROWTH, mask=moving, other=0)
    limit = float_of(tl.load(row + T_WIRE_LIMIT, mask=moving, other=0).to(tl.int32))
    k = tl.where(saturated.to(tl.float32) > limit, k - growth, k + 1)
    k = tl.minimum(tl.maximum(k, -_REACH * growth), tl.load(row + T_WIRE_UPPER, mask=moving, other=0))
    tl.store(k_pointer, k.to(tl.int32), mask=moving)
    total = tl.load(row + T_WIRE_SATURATED, mask=wired, other=0).to(tl.pointer_type(tl.int64))
    tl.store(total, tl.load(total, mask=wired, other=0) + saturated, mask=wired)
    count = count_address.to(tl.pointer_type(tl.int64))
    tl.store(count, tl.load(count, mask=wired, other=0) + 1, mask=wired)


@triton.jit
def _exchange(out, base, begin, left, scale, inverse, FORMAT: tl.constexpr, FAST: tl.constexpr, NATIVE: tl.constexpr,
              TILE: tl.constexpr):  # fmt: skip
    BITS: tl.constexpr = 32 if FORMAT == "fp32" else 16
    EACH: tl.constexpr = 4 if FORMAT == "fp32" else 8
    hits = tl.zeros([1, TILE], dtype=tl.int32)
    for tile in tl.range(0, tl.cdiv(left, TILE)):
        words = load_words(base, begin, tile, left, BITS, 1, TILE, EACH, FAST)
        z = from_float(elements(words, BITS, FAST), FORMAT) * inverse
        hits += at_extremes(z)
        value = through(z, scale, FORMAT, NATIVE, False)
        if FORMAT == "bf16":
            raw = packed(bits_of(value), "high", BITS, FAST)
        elif FORMAT == "fp16":
            raw = packed(value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32), "plain", BITS, FAST)
        else:
            raw = bits_of(value)
        store_words(out, begin, tile, left, raw, BITS, 1, TILE, EACH, FAST)
    return tl.sum(hits)


@triton.jit(do_not_specialize=["tensors"])
def exchange_kernel(
    chunks, table, grads, seen, tensors, NATIVE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """g' of one chunk, and the number of its codes at the extremes. grads: where g are, and behind them, where g'."""
    tensor, careful, number = chunk_of(chunks)
    row, seen = table + tensor * T_COLUMNS, seen + tensor * N_COLUMNS
    left = left_of(row, number, CHUNK)
    base, out = tl.load(grads + tensor), tl.load(grads + tensors + tensor)
    amax = float_of(tl.load(seen + N_FINITE))
    _wired, scale, inverse = scale_of(row, amax, True)
    begin = number * (CHUNK // TILE)
    kind = tl.load(row + T_GRAD_FORMAT)
    if careful:
        if kind == 0:
            hits = _exchange(out, base, begin, left, scale, inverse, "fp32", False, NATIVE, TILE)
        elif kind == 1:
            hits = _exchange(out, base, begin, left, scale, inverse, "bf16", False, NATIVE, TILE)
        else:
            hits = _exchange(out, base, begin, left, scale, inverse, "fp16", False, NATIVE, TILE)
    else:
        left = tl.multiple_of(left, 8)
        if kind == 0:
            hits = _exchange(out, base, begin, left, scale, inverse, "fp32", True, NATIVE, TILE)
        elif kind == 1:
            hits = _exchange(out, base, begin, left, scale, inverse, "bf16", True, NATIVE, TILE)
        else:
            hits = _exchange(out, base, begin, left, scale, inverse, "fp16", True, NATIVE, TILE)
    if hits > 0:
        tl.atomic_add(seen + N_EXTREMES, hits)
