# SPDX-License-Identifier: Apache-2.0
"""Any `Format` within float32 inside a kernel: `numerics.codes` on a tile, in integers, bit for bit.

Formats are constants of a kernel (`Constants`), so that each compiles to its few instructions. Integers are the same
in the interpreter, on every GPU and in torch; no cast of a compiler is involved.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hf_lowprec.formats import Codebook, Format, get_format
from hf_lowprec.kernels.triton.ptx import add_down
from hf_lowprec.numerics.codes import F32, carrier_of
from hf_lowprec.recipe import Quant, Scaling

GRADUAL, FLUSH, NORMAL0 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NEAREST, AWAY, ZERO, STOCHASTIC = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_SUBNORMALS = {"gradual": 0, "flush": 1, "normal0": 2}
_MODES = {"nearest": 0, "away": 1, "zero": 2, "stochastic": 3}


class Constants(NamedTuple):
    """A format at compile time, in the order of the kernels' parameters.

    sign: the sign bit of a code, 0 for an unsigned format. nan_code: -1 where there is none.
    """

    man: int
    emin: int
    max_code: int
    subnormal: int
    sign: int
    nan_code: int
    negative_zero: bool

    @classmethod
    def of(cls, fmt: Format) -> Constants:
        sign = 1 << (fmt.exp + fmt.man) if fmt.signed else 0
        nan = fmt.nan_code if fmt.has_nan else -1
        return cls(fmt.man, fmt.emin, fmt.max_code, _SUBNORMALS[fmt.subnormal], sign, nan, fmt.has_negative_zero)


def covered(fmt: str | Format | Codebook) -> Format | None:
    """The format, if these functions compute it: no codebook, zero among its values, normal numbers of float32."""
    fmt = get_format(fmt)
    if not isinstance(fmt, Format) or not fmt.has_zero or carrier_of(fmt, torch.float32) is not F32:
        return None
    return fmt


def cut_fits(fmt: Format) -> bool:
    """Whether `cut` has the format: signed, within float32's normal numbers, or all of float32 with fewer bits."""
    whole = fmt.emin == -126 and fmt.subnormal == "gradual"
    return (
        fmt.signed and fmt.subnormal != "normal0" and fmt.man >= 1 and (whole or fmt.emin > -126) and fmt.emax <= 127
    )


def plain(quant: Quant) -> bool:
    """Whether format, rounding, overflow and these fields of its scaling say all of a policy: what kernels know.

    Whatever else `recipe` has come to hold is for those who carry it out.
    """
    s = quant.scaling
    known = Scaling(
        granularity=s.granularity, block=s.block, method=s.method, exponent=s.exponent, history=s.history,
        algorithm=s.algorithm, margin=s.margin, snap=s.snap, store=s.store, group=s.group,
    )  # fmt: skip
    same = Quant(format=quant.format, scaling=known, rounding=quant.rounding, overflow=quant.overflow)
    return s.method in ("none", "static", "current", "delayed") and same == quant


def mode_of(mode: str) -> int:
    """A rounding's mode as the kernels have it."""
    return _MODES[mode]


@triton.jit
def mix(h):
    """lowbias32 of uint32: `numerics.hashing._mix`."""
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= h >> 15
    h *= 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def keys_of(seed):
    """`numerics.seed_keys` of an int64."""
    k0 = mix(seed.to(tl.uint32) ^ 0x9E3779B9)
    return k0, mix((seed >> 32).to(tl.uint32) ^ k0)


@triton.jit
def word_keys(seed):
    """(early, late) of an int64, for `hashed`.

    h ^ (h >> 16) and h ^ (h >> 15) are linear over xor, so that a key goes in before them or after, folded by itself.
    """
    k0, k1 = keys_of(seed)
    return k0 ^ (k0 >> 16), k1 ^ (k1 >> 15)


@triton.jit
def hashed(h, late):
    """`numerics.counter_hash` up to its last step: h = i ^ (i >> 16) ^ early, uint32, of an index below 2^32."""
    h *= 0x7FEB352D
    h ^= (h >> 15) ^ late
    return h * 0x846CA68B


@triton.jit
def low_bits(h, BITS: tl.constexpr, SHIFT: tl.constexpr):
    """The last step, of which the low BITS, times 2^SHIFT, int32."""
    MASK: tl.constexpr = ((1 << BITS) - 1) << SHIFT
    if SHIFT <= 16:  # shifted before it is cut out: one instruction less
        word = ((h << SHIFT) ^ (h >> (16 - SHIFT))) & MASK
    else:
        word = ((h ^ (h >> 16)) << SHIFT) & MASK
    return word.to(tl.int32, bitcast=True)


@triton.jit
def count_codes(x, words, MODE: tl.constexpr, BITS: tl.constexpr, MAN: tl.constexpr, EMIN: tl.constexpr,
                MAX_CODE: tl.constexpr, SUBNORMAL: tl.constexpr):  # fmt: skip
    """Codes of |x| without sign (int32), rounded and saturated; Inf and NaN count as MAX_CODE.

    words: for MODE stochastic, int32 of which the low BITS are random.
    """
    LOW: tl.constexpr = EMIN + 127  # exponent field of the lowest binade
    DROP: tl.constexpr = 23 - MAN
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    OFFSET: tl.constexpr = (LOW - 1) << MAN if SUBNORMAL == 1 else (1 << MAN) if SUBNORMAL == 2 else 0
    if SUBNORMAL == 1:
        units = magnitude
    else:
        if LOW <= 1:
            units = magnitude
        else:
            field = magnitude >> 23
            significand = (magnitude & 0x7FFFFF) | tl.where(field > 0, 0x800000, 0)
            shift = LOW - tl.where(field > 1, field, 1)
            shift = tl.where(shift < 0, 0, tl.where(shift > 25, 25, shift))
            shifted = significand >> shift
            if MODE == 0:
                shifted |= tl.where((shifted << shift) != significand, 1, 0)
            units = tl.where(field >= LOW, magnitude - ((LOW - 1) << 23), shifted)
    if MODE == 0:
        units += (((units >> DROP) - OFFSET) & 1) + ((1 << (DROP - 1)) - 1)
    elif MODE == 1:
        units += 1 << (DROP - 1)
    elif MODE == 3:
        units += (words & ((1 << BITS) - 1)) << (DROP - BITS)
    codes = (units >> DROP) - OFFSET
    if SUBNORMAL == 1:
        codes = tl.where(codes < (1 << MAN), 0, codes)
    elif SUBNORMAL == 2:
        # Between zero and the smallest value there is nothing.
        TINY: tl.constexpr = (2.0**EMIN) * (1 + 2.0 ** (-MAN))
        size = tl.abs(x)
        if MODE == 0:
            up = size > TINY / 2
        elif MODE == 1:
            up = size >= TINY / 2
        elif MODE == 3:
            left = ((1 << BITS) - (words & ((1 << BITS) - 1))).to(tl.float64)
            up = size.to(tl.float64) * (1 << BITS) >= left * TINY
        else:
            up = size < 0
        codes = tl.where(size < TINY, up.to(tl.int32), codes)
    return tl.where(codes > MAX_CODE, MAX_CODE, codes)


@triton.jit
def nearest(size, MAN: tl.constexpr, EMIN: tl.constexpr, LARGEST: tl.constexpr, SUBNORMAL: tl.constexpr):
    """The nearest values to |x| by the FPU (`numerics.rounding`), for formats of `magic_fits`: a third of the
    instructions of `count_codes`. Saturates; signs, Inf and NaN are the caller's."""
    C: tl.constexpr = 1.5 * 2.0 ** (23 - MAN)
    r = tl.minimum(size, LARGEST)
    power = (r.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    if SUBNORMAL == 0:
        power = tl.maximum(power, 2.0**EMIN)
    r = tl.fma(power, C, r)
    r = tl.fma(power, -C, r)
    if SUBNORMAL == 1:
        r = tl.where(r < 2.0**EMIN, 0.0, r)
    return r


@triton.jit
def cut(size, h, MODE: tl.constexpr, BITS: tl.constexpr, MAN: tl.constexpr, EMIN: tl.constexpr,
        LARGEST: tl.constexpr, SUBNORMAL: tl.constexpr):  # fmt: skip
    """|x| rounded in other modes, for formats of `cut_fits`: an addition below the last kept bit, the rest dropped.

    Below the lowest normal binade 2^emin is added, cut off, and taken away again: there its units are the format's.
    Saturates; signs, Inf and NaN are the caller's. h: of `hashed`.
    """
    UNIT: tl.constexpr = 1 << (23 - MAN)
    LIFT: tl.constexpr = SUBNORMAL == 0 and EMIN > -126
    if LIFT:
        low = tl.where(size < 2.0**EMIN, 2.0**EMIN, 0.0)
        units = add_down(size, low).to(tl.int32, bitcast=True)
    else:
        units = size.to(tl.int32, bitcast=True)
    if MODE == 1:
        units += UNIT // 2
    elif MODE == 3:
        units += low_bits(h, BITS, 23 - MAN - BITS)
    r = (units & -UNIT).to(tl.float32, bitcast=True)
    if LIFT:
        r -= low
    elif SUBNORMAL == 1:
        r = tl.where(r < 2.0**EMIN, 0.0, r)
    return tl.minimum(r, LARGEST)


@triton.jit
def codes_of(values, MAN: tl.constexpr, EMIN: tl.constexpr, SUBNORMAL: tl.constexpr):
    """Codes without sign of values that `nearest` or `cut` gave."""
    DROP: tl.constexpr = 23 - MAN
    if SUBNORMAL == 0:
        # So that the format's subnormals are float32's. Exact, and no product is flushed.
        moved = values * (2.0 ** (-126 - EMIN))
        codes = moved.to(tl.int32, bitcast=True) >> DROP
    else:
        OFFSET: tl.constexpr = (EMIN + 126) << MAN
        units = values.to(tl.int32, bitcast=True)
        codes = tl.where(units == 0, 0, (units >> DROP) - OFFSET)
    return codes


@triton.jit
def code_values(codes, MAN: tl.constexpr, EMIN: tl.constexpr, SUBNORMAL: tl.constexpr):
    """float32 values of codes without sign, up to MAX_CODE."""
    if SUBNORMAL == 2:
        normal = ((codes << (23 - MAN)) + ((EMIN + 127) << 23)).to(tl.float32, bitcast=True)
        out = tl.where(codes == 0, 0.0, normal)
    else:
        normal = ((codes << (23 - MAN)) + ((EMIN + 126) << 23)).to(tl.float32, bitcast=True)
        low = codes.to(tl.float32) * (2.0 ** (EMIN - MAN)) if SUBNORMAL == 0 else 0.0
        out = tl.where(codes < (1 << MAN), low, normal)
    return out


@triton.jit
def signed_codes(codes, x, MAX_CODE: tl.constexpr, SIGN: tl.constexpr, NAN_CODE: tl.constexpr,
                 NEGATIVE_ZERO: tl.constexpr, OVERFLOW: tl.constexpr):  # fmt: skip
    """Complete codes from those of |x|: sign, and for what is not finite NaN, or where there is none the code 0.

    OVERFLOW: 0 saturate; 1 inf, 2 nan: `codes` are MAX_CODE + 1 beyond the largest, which is Inf where there is one.
    """
    bits = x.to(tl.int32, bitcast=True)
    lost = (bits & 0x7FFFFFFF) > 0x7F800000 if OVERFLOW == 1 else (bits & 0x7F800000) == 0x7F800000
    if OVERFLOW == 2:
        lost = lost | (codes > MAX_CODE)
    if SIGN == 0:
        codes = tl.where(bits < 0, 0, codes)
    else:
        sign = tl.where(bits < 0, SIGN, 0)
        if not NEGATIVE_ZERO:
            sign = tl.where(codes == 0, 0, sign)
        codes |= sign
    return tl.where(lost, NAN_CODE if NAN_CODE >= 0 else 0, codes)


@triton.jit
def decoded(raw, MAN: tl.constexpr, EMIN: tl.constexpr, MAX_CODE: tl.constexpr, SUBNORMAL: tl.constexpr,
            SIGN: tl.constexpr, NAN_CODE: tl.constexpr):  # fmt: skip
    """(float32 values, whether they are finite) of complete codes, int32; 0 where they are not."""
    if SIGN == 0:
        codes, finite = raw, raw <= MAX_CODE
    else:
        codes = raw & (SIGN - 1)
        finite = (codes <= MAX_CODE) & (raw != NAN_CODE)
    value = code_values(codes, MAN, EMIN, SUBNORMAL)
    if SIGN != 0:
        # Not -value, which Triton computes as 0 - value: the sign of a zero.
        sign = tl.where((raw & SIGN) != 0, -0x80000000, 0)
        value = (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(finite, value, 0.0), finite
