# SPDX-License-Identifier: Apache-2.0
"""How optimizer states lie in memory, inside a fused kernel: codes and values of the raw elements of `words`.

`decode` and `encode` are `numerics.blocks` and `numerics.quantize` bit for bit. Codebooks decode by a table in shared
memory and encode by another, see `kernels/cells.py`: one look-up gives the nearest code of every float32. `staged`
brings them there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_lowprec.kernels.cells import dynamic_cells
from hf_lowprec.kernels.triton.ptx import INTERPRETED as _INTERPRETED
from hf_lowprec.kernels.triton.ptx import (
    as_it_is,
    inner_reciprocal,
    larger_magnitude,
    load_shared,
    quotient,
    raised,
    reciprocal,
    shared_ready,
    shared_tables,
    store_in_place,
    store_shared,
)
from hf_lowprec.kernels.triton.quantize import count_codes
from hf_lowprec.kernels.triton.words import bits_of, float_of, halves, packed, packed_tree

_SIGNED, _UNSIGNED, _SIGNED4 = dynamic_cells(True), dynamic_cells(False), dynamic_cells(True, 3)
# (FIRST, LOW, BASE) of `nearest`, and LEAST
S8_FIRST, S8_LOW, S8_BASE, S8_LEAST = (tl.constexpr(value) for value in _SIGNED[:4])
U8_FIRST, U8_LOW, U8_BASE = (tl.constexpr(value) for value in _UNSIGNED[:3])
S4_FIRST, S4_LOW, S4_BASE, S4_LEAST = (tl.constexpr(value) for value in _SIGNED4[:4])
# Words of `kernels.optimizer.look_up_tables`: values of codes, then cells; those of second moments follow dynamic8's
# and lie so in shared memory, too, all others begin there at 0.
_D8, _D8U, _D4, _SOFTSIGN, _VALUES, _VALUES4 = (tl.constexpr(place) for place in (0, 1792, 4992, 5120, 256, 16))

# --- random words ----------------------------------------------------------------------------------------------------


@triton.jit
def mix(h):
    """lowbias32 of uint32, as in `numerics.hashing`."""
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= h >> 15
    h *= 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def tile_words(k0, k1, start, inside, ALIGNED: tl.constexpr):
    """int32 [ROWS, BLOCK]: `counter_hash(seed, start + inside)` for the keys (k0, k1) of a seed.

    start: int64 scalar; inside: int32 indices in the tile. ALIGNED: start is a multiple of the tile's size (a power of
    two up to 2^16). The indices then differ in the low 16 bits only, so that the first half of the hash is the same
    scalar for all of them, and the tensor part begins at the first product.
    """
    if ALIGNED:
        scalar = start.to(tl.uint32) ^ k0
        scalar ^= scalar >> 16
        late = k1 ^ mix((start >> 32).to(tl.uint32))
        late ^= late >> 15
        # Neighbours share all but the last bits, and with them one xor.
        shared = as_it_is((inside & -8) ^ scalar.to(tl.int32, bitcast=True))
        h = (shared ^ (inside & 7)).to(tl.uint32, bitcast=True) * 0x7FEB352D
        h = (h ^ (h >> 15) ^ late) * 0x846CA68B
    else:
        index = start + inside
        h = index.to(tl.uint32) ^ k0
        h = (h ^ (h >> 16)) * 0x7FEB352D
        h ^= k1 ^ mix((index >> 32).to(tl.uint32))
        h = (h ^ (h >> 15)) * 0x846CA68B
    return (h ^ (h >> 16)).to(tl.int32, bitcast=True)


# --- 16-bit floats ---------------------------------------------------------------------------------------------------


@triton.jit
def from_float(raw, FORMAT: tl.constexpr):
    """float32 of raw elements of a float format: `fp32`, `bf16`, `fp16`."""
    if FORMAT == "fp32":
        return float_of(raw)
    elif FORMAT == "bf16":
        return float_of(raw << 16)
    else:
        return raw.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def stochastic_codes(x, words, MAN: tl.constexpr, EMIN: tl.constexpr, MAX_CODE: tl.constexpr):
    """`count_codes` for stochastic rounding by all the bits that are dropped, in fewer instructions.

    Subnormals become numbers of the binade above 2^EMIN, whose units are theirs; normal numbers go a binade up, and
    codes go on from there. Each of the two sums is the larger one where it is wanted.
    """
    DROP: tl.constexpr = 23 - MAN
    FIRST: tl.constexpr = (EMIN + 127) << (23 - DROP)
    codes = (raised(x, EMIN) + (words & ((1 << DROP) - 1))).to(tl.uint32, bitcast=True) >> DROP
    return tl.minimum(codes.to(tl.int32, bitcast=True) - FIRST, MAX_CODE)


@triton.jit
def to_float(x, words, FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Raw elements of x rounded to `fp32`, `bf16` (in the upper half) or `fp16`; saturating; Inf and NaN become NaN.

    Nearest, or stochastically by all the bits that are dropped: `numerics.round_to_format`.
    """
    if FORMAT == "fp32":
        return bits_of(x)
    elif FORMAT == "bf16":
        # x * 0 is zero, or NaN where x is not finite.
        if STOCHASTIC:
            raw = bits_of(tl.fma(x, 0.0, float_of(enlarged(x, words & 0xFFFF))))
        else:
            near = tl.fma(x, 0.0, clamp(x, 3.3895313892515355e38))
            raw = near.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16
        return raw
    else:
        if STOCHASTIC:
            codes = stochastic_codes(x, words, 10, -14, 0x7BFF)
            raw = tl.where(tl.abs(x) < float("inf"), codes | ((bits_of(x) >> 16) & 0x8000), 0x7E00)
        else:
            near = tl.fma(x, 0.0, clamp(x, 65504.0))
            raw = near.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        return raw


@triton.jit
def enlarged(x, units):
    """Bits of a finite x, units (below 2^17) farther from 0, but within the finite numbers."""
    bits = tl.minimum(bits_of(x) + units, 0x7F7FFFFF)  # negative numbers are negative here, too
    return tl.minimum(bits.to(tl.uint32, bitcast=True), 0xFF7FFFFF).to(tl.int32, bitcast=True)


@triton.jit
def clamp(x, LIMIT: tl.constexpr):
    """x within [-LIMIT, LIMIT]; a NaN becomes a number or stays NaN."""
    return tl.maximum(tl.minimum(x, LIMIT), -LIMIT)


@triton.jit
def rint(x):
    """The nearest integer of |x| < 2^22, ties to even, int32."""
    return bits_of(x + 12582912.0) - 0x4B400000


# --- codebooks -------------------------------------------------------------------------------------------------------


@triton.jit
def staged(tables, FIRST: tl.constexpr, SECOND: tl.constexpr, ENCODES: tl.constexpr):
    """What `look_up` needs of the tables, for codecs of the two moments: their address in shared memory.

    ENCODES: states are written, too."""
    if _INTERPRETED:
        place = tables
    elif SECOND == "dynamic8u":
        if ENCODES:
            place = shared_tables(4 * (_D8U + 3200))
            if FIRST == "dynamic8":
                _stage(tables, place, 0, 0, 4096)
                _stage(tables, place, 4096, 4096, 512)
                _stage(tables, place, 4608, 4608, 256)
                _stage(tables, place, 4864, 4864, 128)
            else:
                _stage(tables, place, _D8U, _D8U, 2048)
                _stage(tables, place, _D8U + 2048, _D8U + 2048, 1024)
                _stage(tables, place, _D8U + 3072, _D8U + 3072, 128)
        else:
            place = shared_tables(4 * (_D8U + _VALUES))
            _stage(tables, place, _D8U, _D8U, _VALUES)
    elif FIRST == "dynamic8":
        place = shared_tables(4 * _D8U)
        _stage(tables, place, 0, 0, 1024)
        _stage(tables, place, 1024, 1024, 512)
        _stage(tables, place, 1536, 1536, 256)
    elif FIRST == "dynamic4":
        place = shared_tables(512)
        _stage(tables, place, _D4, 0, 128)
    elif FIRST == "softsign8":
        place = shared_tables(1024)
        _stage(tables, place, _SOFTSIGN, 0, 256)
    else:
        place = 0
    if not _INTERPRETED:
        if FIRST == "dynamic8" or FIRST == "dynamic4" or FIRST == "softsign8" or SECOND == "dynamic8u":
            place = shared_ready(place)
    return place


@triton.jit
def _stage(tables, place, FROM: tl.constexpr, TO: tl.constexpr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    store_shared(place + 4 * TO + 4 * index, tl.load(tables + FROM + index))


@triton.jit
def look_up(tables, index, FROM: tl.constexpr, TO: tl.constexpr, OFFSET: tl.constexpr):
    """int32 number OFFSET + index behind a codec's place, FROM in the tables and TO in what `staged` gave."""
    if _INTERPRETED:
        out = tl.load(tables + (FROM + OFFSET) + index)
    else:
        out = load_shared(tables, index, 4 * (TO + OFFSET))
    return out


@triton.jit
def nearest(x, tables, FROM: tl.constexpr, TO: tl.constexpr, VALUES: tl.constexpr, FIRST: tl.constexpr,
            LOW: tl.constexpr, BASE: tl.constexpr):  # fmt: skip
    """In the top byte: index of the tree's value nearest to x in [0, 4); all below FIRST have that of FIRST.

    The cells are those of `kernels.cells`, behind VALUES values. A NaN has some code.
    """
    bits = bits_of(tl.maximum(x, FIRST))
    return look_up(tables, bits >> LOW, FROM, TO, VALUES - BASE) + (bits << (24 - LOW))


# --- scales ----------------------------------------------------------------------------------------------------------


@triton.jit
def block_amax(x, EACH: tl.constexpr):
    """Largest |x| of each row, [ROWS, 1], or NaN. In a thread by floats, whose sign is free to drop; then by integers,
    which a warp reduces in one instruction."""
    for _ in tl.static_range(2 if EACH == 4 else 3):
        even, odd = halves(x)
        x = larger_magnitude(even, odd)
    return float_of(tl.max(bits_of(x) & 0x7FFFFFFF, 1, keep_dims=True))


@triton.jit
def exact_scale(amax, FMT_MAX: tl.constexpr):
    """`scale_from_amax` with snap exact."""
    scale = tl.div_rn(amax, FMT_MAX) if FMT_MAX != 1.0 else amax
    scale = tl.minimum(tl.maximum(scale, 1.1754943508222875e-38), 8.507059173023462e37)
    return tl.where(amax > 0, tl.where(amax < float("inf"), scale, float("nan")), 1.0)


@triton.jit
def upward_bf16(x):
    """The least bfloat16 not below x > 0, in float32 (`numerics.scaling.store_scale`)."""
    return float_of((bits_of(x) + 0xFFFF) & -0x10000)


@triton.jit
def inverse(scale):
    """1 / scale, and 0 for a scale that is not a number, so that look-ups stay within their tables."""
    return tl.where(scale > 0, reciprocal(scale), 0.0)


@triton.jit
def block_inverse(scale):
    """`inverse` for scales of blocks, which lie within [2^-126, 2^126] where they are numbers."""
    # 2^-126 might be flushed to zero on its way.
    return tl.where(scale > 0, tl.maximum(inner_reciprocal(scale), 1.1754943508222875e-38), 0.0)


@triton.jit
def load_scale(base, first, tile, left, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
               WHOLE: tl.constexpr):  # fmt: skip
    """[ROWS, 1] float32 scales of the tile's blocks. HALF: they are bfloat16. WHOLE: none lies beyond the end."""
    rows = tl.arange(0, ROWS)[:, None]
    pointer = base.to(tl.pointer_type(tl.int16 if HALF else tl.int32)) + first * ROWS
    index = tile * ROWS + rows
    if WHOLE:
        bits = tl.load(pointer + index).to(tl.int32)
    else:
        bits = tl.load(pointer + index, mask=index * BLOCK < left, other=0).to(tl.int32)
    return float_of(bits << 16 if HALF else bits)


@triton.jit
def store_scale(base, first, tile, left, scale, HALF: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr,
                WHOLE: tl.constexpr):  # fmt: skip
    """The inverse of `load_scale`, by the first thread of each row."""
    ROWS: tl.constexpr = scale.shape[0]
    THREADS: tl.constexpr = BLOCK // EACH
    pointer = base.to(tl.pointer_type(tl.int16 if HALF else tl.int32)) + first * ROWS
    column = tl.arange(0, THREADS)[None, :]
    index = tile * ROWS + tl.arange(0, ROWS)[:, None]
    bits = bits_of(scale) >> 16 if HALF else bits_of(scale)
    words = tl.broadcast_to(bits, [ROWS, THREADS])
    mask = tl.broadcast_to(column == 0, [ROWS, THREADS])
    if not WHOLE:
        mask &= index * BLOCK < left
    store_in_place(pointer + index + column, words, mask, HALF)


# --- moments ---------------------------------------------------------------------------------------------------------
# CODEC                 elements                                  scale
# fp32, bf16            floats, bf16 stochastic                   none
# dynamic8, dynamic8u   index in the dynamic tree (un/signed)     blocks, float32
# dynamic4              the same in 4 bits                        blocks, float32
# e3m1u                 E3M1 without sign and subnormals, *       blocks, float32
# e4m3, e4m3n           E4M3; *                                   blocks, float32
# softsign8, sqrt8      companded int8; uint8, *                  blocks, bfloat16
# e4m3p, fp16p          E4M3 stochastic; FP16, never to zero      one, predicted
# *: stochastic, never to zero.
# e4m3p and fp16p scale by a scalar that another kernel has prepared; `encode` gets its inverse.


@triton.constexpr_function
def in_bytes(CODEC):
    return CODEC in ("dynamic8", "dynamic8u", "softsign8")


@triton.jit
def decode(raw, scale, tables, CODEC: tl.constexpr):
    """float32 [ROWS, BLOCK] of `elements`, of `bytes_of` where `in_bytes`; scale [ROWS, 1] or a scalar; tables:
    `staged`."""
    if CODEC == "fp32" or CODEC == "bf16":
        return from_float(raw, CODEC)
    elif CODEC == "fp16p":
        return from_float(raw, "fp16") * scale
    elif CODEC == "dynamic8":
        return float_of(look_up(tables, raw, _D8, 0, 0)) * scale
    elif CODEC == "dynamic8u":
        return float_of(look_up(tables, raw, _D8U, _D8U, 0)) * scale
    elif CODEC == "dynamic4":
        return float_of(look_up(tables, raw & 0xF, _D4, 0, 0)) * scale
    elif CODEC == "e3m1u":
        code = raw & 0xF
        return tl.where(code > 0, float_of((code + 248) << 22), 0.0) * scale
    elif CODEC == "softsign8":
        return float_of(look_up(tables, raw, _SOFTSIGN, 0, 0)) * scale
    elif CODEC == "sqrt8":
        root = (raw & 0xFF).to(tl.float32) * (1 / 255) * scale
        return root * root
    else:  # E4M3: the bits of a float32 whose exponent is 120 too small, subnormals included
        tl.static_assert(CODEC == "e4m3" or CODEC == "e4m3n" or CODEC == "e4m3p")
        return float_of(((raw << 24) >> 4) & -0x78100000) * 1.329227995784916e36 * scale


@triton.jit
def new_scale(x, CODEC: tl.constexpr, EACH: tl.constexpr):
    """[ROWS, 1] scale of blocks that hold x, as it will be stored. sqrt8: of blocks that hold x^2.

    EACH: elements side by side in a thread."""
    if CODEC == "dynamic8" or CODEC == "dynamic8u" or CODEC == "dynamic4":
        return exact_scale(block_amax(x, EACH), 1.0)
    elif CODEC == "e3m1u":
        return exact_scale(block_amax(x, EACH), 24.0)
    elif CODEC == "e4m3" or CODEC == "e4m3n":
        return exact_scale(block_amax(x, EACH), 448.0)
    elif CODEC == "softsign8":
        return upward_bf16(exact_scale(block_amax(x, EACH), 1.0))
    else:
        tl.static_assert(CODEC == "sqrt8")
        return upward_bf16(exact_scale(block_amax(x, EACH), 1.0))


@triton.jit
def encode(x, factor, words, tables, beyond, CODEC: tl.constexpr, FAST: tl.constexpr):
    """What `store_words` takes for x; factor: `inverse` of the scale; tables: `staged`.

    sqrt8: the code of x^2. beyond: which elements lie beyond the end; x is 0 there."""
    if CODEC == "fp32":
        return bits_of(x)
    elif CODEC == "bf16":
        return packed(to_float(x, words, "bf16", True), "high", 16, FAST)
    elif CODEC == "dynamic8":
        # The tree is symmetric but for its top, 1, which has no counterpart: what is below LEAST has the lowest code.
        z = tl.maximum(x * factor, S8_LEAST)
        code = nearest(tl.abs(z), tables, _D8, 0, _VALUES, S8_FIRST, S8_LOW, S8_BASE)
        return packed_tree(code, z, beyond, 127, 8, FAST)
    elif CODEC == "dynamic4":
        z = tl.maximum(x * factor, S4_LEAST)
        code = nearest(tl.abs(z), tables, _D4, 0, _VALUES4, S4_FIRST, S4_LOW, S4_BASE)
        return packed_tree(code, z, beyond, 7, 4, FAST)
    elif CODEC == "dynamic8u":
        code = nearest(x * factor, tables, _D8U, _D8U, _VALUES, U8_FIRST, U8_LOW, U8_BASE)
        return packed(tl.where(x > 0, code, 0), "tree", 8, FAST)
    elif CODEC == "e3m1u":
        code = ((bits_of(x * factor) + (words & 0x3FFFFF)) >> 22) - 248
        return packed(tl.where(x > 0, tl.minimum(tl.maximum(code, 1), 15), 0), "plain", 4, FAST)
    elif CODEC == "softsign8":
        y = x * factor
        # |y| <= 1, as the scale was rounded up
        return packed(rint(quotient(y * 2.0, tl.abs(y) + 1.0) * 127.0), "signed", 8, FAST)
    elif CODEC == "sqrt8":
        units = (x * factor * 255.0 * 32768.0).to(tl.int32)
        code = (units + (words & 0x7FFF)) >> 15
        return packed(tl.maximum(code, tl.minimum(bits_of(x), 1)), "unsigned", 8, FAST)
    elif CODEC == "fp16p":
        near = tl.minimum(x * factor, 65504.0).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        return packed(tl.maximum(near, tl.minimum(bits_of(x), 1)), "plain", 16, FAST)
    else:
        z = x * factor
        code = count_codes(z, 0, 3, -6, 126, 0) if CODEC == "e4m3" else stochastic_codes(z, words, 3, -6, 126)
        if CODEC == "e4m3n":
            code = tl.maximum(code, tl.minimum(bits_of(x), 1))
        if FAST:
            return packed(code, "plain", 8, FAST) | (packed(bits_of(z), "tree", 8, FAST) & -0x7F7F7F80)
        return packed(code | ((bits_of(z) >> 24) & 0x80), "plain", 8, FAST)
