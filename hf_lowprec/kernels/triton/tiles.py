# SPDX-License-Identifier: Apache-2.0
"""Moments, Parameters and masters of a tile: loads, float32 values, stores. What they mean is in `optim/slots.py` and
`optim/weights.py`; how their elements lie in memory, in `codecs`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_lowprec.kernels.triton.codecs import (
    block_inverse,
    decode,
    encode,
    enlarged,
    from_float,
    in_bytes,
    load_scale,
    new_scale,
    store_scale,
    to_float,
)
from hf_lowprec.kernels.triton.words import bits_of, bytes_of, elements, float_of, load_words, packed, store_words


@triton.jit
def load_moment(base, scale_base, first, tile, left, CODEC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                 EACH: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """(words, scales of the blocks) of a moment in this tile, for `moment`."""
    WIDE: tl.constexpr = 32 if CODEC == "fp32" else 16 if CODEC == "bf16" or CODEC == "fp16p" else 8
    BITS: tl.constexpr = 4 if CODEC == "dynamic4" or CODEC == "e3m1u" else WIDE
    # The code of 0 in the signed dynamic trees: what lies beyond the end must not count in its block.
    ZERO: tl.constexpr = 127 if CODEC == "dynamic8" else 7 if CODEC == "dynamic4" else 0
    words = load_words(base, first, tile, left, BITS, ROWS, BLOCK, EACH, FAST, ZERO, FAST)
    if CODEC == "fp32" or CODEC == "bf16" or CODEC == "e4m3p" or CODEC == "fp16p":
        scale = 1.0
    else:
        HALF: tl.constexpr = CODEC == "softsign8" or CODEC == "sqrt8"
        scale = load_scale(scale_base, first, tile, left, HALF, ROWS, BLOCK, FAST)
    return words, scale


@triton.jit
def moment(words, scale, old_scale, tables, beyond, CODEC: tl.constexpr, FAST: tl.constexpr):
    """float32 [ROWS, BLOCK]; old_scale: the predicted one; beyond: which elements lie beyond the end."""
    WIDE: tl.constexpr = 32 if CODEC == "fp32" else 16 if CODEC == "bf16" or CODEC == "fp16p" else 8
    BITS: tl.constexpr = 4 if CODEC == "dynamic4" or CODEC == "e3m1u" else WIDE
    raw = bytes_of(words, FAST) if in_bytes(CODEC) else elements(words, BITS, FAST)
    if CODEC == "e4m3p" or CODEC == "fp16p":
        scale = old_scale
    x = decode(raw, scale, tables, CODEC)
    if BITS == 4 and not FAST:
        x = tl.where(beyond, 0.0, x)
    return x


@triton.jit
def store_moment(base, scale_base, factor, tables, first, tile, left, x, words, beyond, CODEC: tl.constexpr,
                  EACH: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """factor: the inverse of a predicted scale; blocks compute their own."""
    WIDE: tl.constexpr = 32 if CODEC == "fp32" else 16 if CODEC == "bf16" or CODEC == "fp16p" else 8
    BITS: tl.constexpr = 4 if CODEC == "dynamic4" or CODEC == "e3m1u" else WIDE
    if CODEC != "fp32" and CODEC != "bf16" and CODEC != "e4m3p" and CODEC != "fp16p":
        scale = new_scale(x, CODEC, EACH)
        factor = block_inverse(scale)
        HALF: tl.constexpr = CODEC == "softsign8" or CODEC == "sqrt8"
        store_scale(scale_base, first, tile, left, scale, HALF, x.shape[1], EACH, FAST)
    raw = encode(x, factor, words, tables, beyond, CODEC, FAST)
    store_words(base, first, tile, left, raw, BITS, x.shape[0], x.shape[1], EACH, FAST, FAST)


@triton.jit
def cast_to(x, FORMAT: tl.constexpr):
    """Raw elements of x to nearest, saturating; NaN stays NaN: `weights._cast`."""
    LIMIT: tl.constexpr = 65504.0 if FORMAT == "fp16" else 3.3895313892515355e38
    near = tl.minimum(x, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    near = tl.maximum(near, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
    half = near.to(tl.bfloat16 if FORMAT == "bf16" else tl.float16)
    return half.to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def _split(x, words, BITS: tl.constexpr, STOCHASTIC: tl.constexpr):
    """`numerics.residual.split` in one int32: the upper half is the Parameter, the BITS below it are the residual with
    its sign bit turned over (so that half a unit of the Parameter is 0).
    """
    bits = bits_of(x)
    half = 0x8000
    if BITS == 8:
        half = (words & 0xFF) | 0x8000 if STOCHASTIC else ((bits >> 8) & 1) + 0x807F
    # A finite number never becomes infinite: the largest Parameter and the largest residual.
    both = enlarged(x, half)
    return tl.where(tl.abs(x) < float("inf"), both, (bits & -0x10000) | 0x8000)


@triton.constexpr_function
def follows(MASTER):
    """Whether the master alone says what a Parameter holds that nobody edited."""
    return MASTER in ("fp32", "fp16p")


@triton.jit
def load_weight(param_base, master_base, first, tile, left, PARAM: tl.constexpr, MASTER: tl.constexpr,
                 ROWS: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """(words of the Parameter, of its master or residual), for `weight`, which looks itself for a Parameter that
    follows its master: twice the master's then."""
    if follows(MASTER):
        BITS: tl.constexpr = 32 if MASTER == "fp32" else 16
        master = load_words(master_base, first, tile, left, BITS, ROWS, BLOCK, EACH, FAST, 0, FAST)
        param = master
    else:
        WIDE: tl.constexpr = 32 if PARAM == "fp32" else 16
        param = load_words(param_base, first, tile, left, WIDE, ROWS, BLOCK, EACH, FAST, 0, FAST)
        master = param
        if MASTER != "none":
            LOW: tl.constexpr = 16 if MASTER == "residual16" else 8
            master = load_words(master_base, first, tile, left, LOW, ROWS, BLOCK, EACH, FAST, 0, FAST)
    return param, master


@triton.jit
def weight(param_words, master_words, old_scale, read, param_base, first, tile, left, PARAM: tl.constexpr,
           MASTER: tl.constexpr, EACH: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """`weights.read_weight`. read: whether a Parameter that follows its master may have been edited."""
    raw = elements(param_words, 32 if PARAM == "fp32" or MASTER == "fp32" else 16, FAST)
    if MASTER == "none":
        return from_float(raw, PARAM)
    elif MASTER == "residual8" or MASTER == "residual8s" or MASTER == "residual16":
        WIDTH: tl.constexpr = 16 if MASTER == "residual16" else 8
        low = (elements(master_words, WIDTH, FAST) << (32 - WIDTH)) >> 16
        high = raw << 16
        magnitude = high & 0x7FFF0000
        low = tl.where(magnitude >= 0x7F800000, 0, low)  # edited to Inf or NaN: `residual.join`
        # Below 0 only where it was edited to 0.
        return float_of(tl.maximum(magnitude + low, 0) | (high & -0x80000000))
    else:
        tl.static_assert(follows(MASTER))
        w = from_float(raw, "fp32") if MASTER == "fp32" else from_float(raw, "fp16") * old_scale
        if read:  # where somebody edited the Parameter, it wins
            words = load_words(param_base, first, tile, left, 16, w.shape[0], w.shape[1], EACH, FAST, 0, FAST)
            param = from_float(elements(words, 16, FAST), PARAM)
            w = tl.where(from_float(cast_to(w, PARAM), PARAM) == param, w, param)
        return w


@triton.jit
def store_weight(param_base, master_base, factor, new_scale, first, tile, left, w, words, PARAM: tl.constexpr,
                  MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, EACH: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """`weights.write_weight`; factor: the inverse of the predicted scale `new_scale`. Returns the Parameter's raw
    elements; those of bfloat16 lie in the upper half, unless they are the cast of a master ("fp32", "fp16p")."""
    ROWS: tl.constexpr = w.shape[0]
    BLOCK: tl.constexpr = w.shape[1]
    WIDE: tl.constexpr = 32 if PARAM == "fp32" else 16
    LOWER: tl.constexpr = MASTER == "fp32" or MASTER == "fp16p" or PARAM != "bf16"
    SHAPE: tl.constexpr = "plain" if LOWER else "high"
    if MASTER == "none":
        raw = to_float(w, words, PARAM, STOCHASTIC)
    elif MASTER == "residual8" or MASTER == "residual8s" or MASTER == "residual16":
        WIDTH: tl.constexpr = 16 if MASTER == "residual16" else 8
        raw = _split(w, words, WIDTH, MASTER == "residual8s")
        if WIDTH == 8:
            low = packed(raw << 16, "tree", 8, FAST) ^ (-0x7F7F7F80 if FAST else 0x80)
        else:
            low = packed(raw, "plain", 16, FAST) ^ (-0x7FFF8000 if FAST else 0x8000)
        store_words(master_base, first, tile, left, low, WIDTH, ROWS, BLOCK, EACH, FAST, FAST)
    elif MASTER == "fp32":
        store_words(master_base, first, tile, left, bits_of(w), 32, ROWS, BLOCK, EACH, FAST, FAST)
        raw = cast_to(w, PARAM)
    else:
        tl.static_assert(MASTER == "fp16p")
        code = to_float(w * factor, words, "fp16", True)
        halves = packed(code, "plain", 16, FAST)
        store_words(master_base, first, tile, left, halves, 16, ROWS, BLOCK, EACH, FAST, FAST)
        raw = cast_to(from_float(code, "fp16") * new_scale, PARAM)
    store_words(param_base, first, tile, left, packed(raw, SHAPE, WIDE, FAST), WIDE, ROWS, BLOCK, EACH, FAST, FAST)
    return raw


@triton.jit
def finite_magnitude(raw, PARAM: tl.constexpr, HIGH: tl.constexpr):
    """float32 bits of |Parameter|, 0 where it is not finite. HIGH: raw is bfloat16 in the upper half."""
    bits = (raw & -0x10000 if HIGH else bits_of(from_float(raw, PARAM))) & 0x7FFFFFFF
    return tl.where(bits < 0x7F800000, bits, 0)
