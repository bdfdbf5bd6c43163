# SPDX-License-Identifier: Apache-2.0
"""What the casts to any `Format` are made of: amaxes, scales, random words, codes and values of a tile."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_lowprec.kernels.triton.formats import (
    code_values,
    codes_of,
    count_codes,
    cut,
    hashed,
    low_bits,
    mix,
    nearest,
    signed_codes,
    word_keys,
)
from hf_lowprec.kernels.triton.ptx import high_bits, reciprocal


@triton.jit
def magnitude(x, GROUP: tl.constexpr):
    """|x| for `larger` and `amax_bits`; Inf and NaN are NaN, unless they count for their GROUP."""
    if GROUP:
        out = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # ordered as the numbers
    else:
        out = tl.abs(tl.fma(x, 0.0, x))  # which maxima drop
    return out


@triton.jit
def larger(a, b):
    """The larger of two magnitudes."""
    if a.dtype == tl.int32:
        out = tl.where(a > b, a, b)
    else:
        out = tl.maximum(a, b)
    return out


@triton.jit
def amax_bits(largest):
    """float32 bits of the largest magnitudes of a group, 0 where none is finite."""
    if largest.dtype == tl.int32:
        out = largest
    else:
        out = tl.maximum(largest, 0.0).to(tl.int32, bitcast=True)
    return out


@triton.jit
def scale_of(bits, SNAP: tl.constexpr, MARGIN: tl.constexpr, E8M0: tl.constexpr, MAN: tl.constexpr,
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
def stored_scale(scale, E8M0: tl.constexpr):
    """The scale, or its code in E8M0: the exponent field, which is 0 for 2^-127 and 255 for NaN."""
    if E8M0:
        out = ((scale.to(tl.int32, bitcast=True) >> 23) & 0xFF).to(tl.uint8)
    else:
        out = scale
    return out


@triton.jit
def first_words(seed_ptr, index):
    """(h, late) for `hashed(h ^ j, late)`: of index + j, where j is below 2^16 and index a multiple of a power of two
    beyond it. int64 indices go to the hash whole, int32 ones are below 2^31."""
    early, late = word_keys(tl.load(seed_ptr))
    low = index.to(tl.uint32)
    late = tl.zeros_like(low) ^ late
    if index.dtype == tl.int64:
        high = mix((index >> 32).to(tl.uint32))
        late ^= high ^ (high >> 15)
    return low ^ (low >> 16) ^ early, late


@triton.jit
def words(seed_ptr, row, col, cols, COLS: tl.constexpr, EACH: tl.constexpr):
    """Of rows and of the COLS columns from `col` what `low_bits` makes random words of; EACH divides `col` and `cols`.

    A thread that has EACH columns side by side begins the hash once for them.
    """
    index = row[:, None] * cols + (col + tl.arange(0, COLS // EACH) * EACH)[None, :]
    h, late = first_words(seed_ptr, index)
    if EACH > 1:
        h = h[:, :, None] ^ tl.arange(0, EACH).to(tl.uint32)[None, None, :]
        h = tl.reshape(hashed(h, late[:, :, None]), [row.shape[0], COLS])
    else:
        h = hashed(h, late)
    return h


@triton.jit
def result(
    x, scale, inverse, h, DTYPE: tl.constexpr, VALUES: tl.constexpr, GROUP: tl.constexpr, MODE: tl.constexpr,
    BITS: tl.constexpr, MAN: tl.constexpr, EMIN: tl.constexpr, MAX_CODE: tl.constexpr, SUBNORMAL: tl.constexpr,
    SIGN: tl.constexpr, NAN_CODE: tl.constexpr, NEGATIVE_ZERO: tl.constexpr, LARGEST: tl.constexpr,
    FAST: tl.constexpr, OVERFLOW: tl.constexpr,
):  # fmt: skip
    """Codes of x / scale, or VALUES: those times the scale. h: of `hashed`. int32 codes: where `spare_bits` says."""
    y = x * inverse
    bits = y.to(tl.int32, bitcast=True)
    if FAST:
        size = tl.abs(y)
        if MODE == 0:
            near = nearest(size, MAN, EMIN, LARGEST, SUBNORMAL)
        else:
            near = cut(size, h, MODE, BITS, MAN, EMIN, LARGEST, SUBNORMAL)
        if VALUES:
            near = (near.to(tl.int32, bitcast=True) | (bits & -0x80000000)).to(tl.float32, bitcast=True)
            if not GROUP:  # there a scale that is NaN says it
                # Inf * 0 is NaN; |y| * 0 is +0, beside which no zero keeps its sign.
                near = tl.fma(y if NEGATIVE_ZERO else size, 0.0, near)
            elif not NEGATIVE_ZERO:
                near += 0.0
            out = near * scale
        else:
            AT: tl.constexpr = _log2(SIGN)
            if SUBNORMAL == 0 and NEGATIVE_ZERO:
                # As in `codes_of`, but upward: the sign is at the top already.
                moved = (near * (2.0 ** (-126 - EMIN))).to(tl.int32, bitcast=True)
                codes = (moved << (8 - AT + MAN)) | (bits & -0x80000000)
            else:
                codes = codes_of(near, MAN, EMIN, SUBNORMAL)
                sign = (bits >> (31 - AT)) & SIGN
                if not NEGATIVE_ZERO:
                    sign = tl.where(codes == 0, 0, sign)
                codes |= sign
            if GROUP:
                out = codes & tl.where(inverse < float("inf"), -1, 0)
            else:
                out = tl.where(
                    size < float("inf"), codes, NAN_CODE << spare_bits(FAST, SUBNORMAL, NEGATIVE_ZERO, SIGN)
                )
    else:
        drawn = low_bits(h, BITS, 0) if MODE == 3 else 0
        codes = count_codes(y, drawn, MODE, BITS, MAN, EMIN, MAX_CODE + (OVERFLOW > 0), SUBNORMAL)
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
    if VALUES:
        out = out.to(DTYPE)
    elif DTYPE != tl.int32:
        SPARE: tl.constexpr = spare_bits(FAST, SUBNORMAL, NEGATIVE_ZERO, SIGN)
        if SPARE > 0:
            out = high_bits(out, DTYPE.primitive_bitwidth, SPARE).to(DTYPE, bitcast=True)
        else:
            out = out.to(DTYPE)
    return out


@triton.constexpr_function
def spare_bits(FAST, SUBNORMAL, NEGATIVE_ZERO, SIGN):
    """How far below the top of an int32 the codes of `result` end; 0: they are at the bottom."""
    return 31 - _log2(SIGN) if FAST and SUBNORMAL == 0 and NEGATIVE_ZERO else 0


@triton.constexpr_function
def _log2(power):
    return power.bit_length() - 1


@triton.jit
def inside(rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr):
    """Mask of a tile from those of its rows and columns."""
    if EVEN:
        mask = tl.full([ROWS, COLS], True, tl.int1)
    else:
        mask = rows[:, None] & cols[None, :]
    return mask


@triton.jit
def spread(blocks, BLOCK: tl.constexpr):
    """A number per block -> for each of its elements."""
    ROWS: tl.constexpr = blocks.shape[0]
    COUNT: tl.constexpr = blocks.shape[1]
    return tl.reshape(tl.broadcast_to(blocks[:, :, None], [ROWS, COUNT, BLOCK]), [ROWS, COUNT * BLOCK])
