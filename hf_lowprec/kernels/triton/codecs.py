# SPDX-License-Identifier: Apache-2.0
"""How optimizer states lie in memory, inside a fused kernel: raw words, codes, values.

A tile is a [ROWS, BLOCK] piece of a flattened tensor, BLOCK the block of its states. `load_words` and `elements`,
`packed` and `store_words` move elements of 4, 8, 16 or 32 bits as int32, one per element. Where `FAST`, they go
through 32-bit words, which a thread takes apart itself: LLVM spends an instruction more per element on vectors of
bytes. Everything else (addresses that are not aligned, a tensor's ragged end) goes element by element.

`decode` and `encode` are `numerics.blocks` and `numerics.quantize` bit for bit. Codebooks decode by a table in shared
memory and encode by another, see `kernels/cells.py`: one look-up gives the nearest code of every float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_lowprec.kernels.cells import dynamic_cells
from hf_lowprec.kernels.triton.ptx import high_halves, low_halves, quotient, saturated_bytes, sign_bytes, top_bytes
from hf_lowprec.kernels.triton.quantize import count_codes

_SIGNED, _UNSIGNED, _SIGNED4 = dynamic_cells(True), dynamic_cells(False), dynamic_cells(True, 3)
# (FIRST, HIGH, LOW, HIGH_BASE, LOW_BASE) of `nearest`, and LEAST
S8_FIRST, S8_HIGH, S8_LOW = (tl.constexpr(value) for value in _SIGNED[:3])
S8_HIGH_BASE, S8_LOW_BASE, S8_LEAST = (tl.constexpr(value) for value in _SIGNED[3:6])
U8_FIRST, U8_HIGH, U8_LOW = (tl.constexpr(value) for value in _UNSIGNED[:3])
U8_HIGH_BASE, U8_LOW_BASE = (tl.constexpr(value) for value in _UNSIGNED[3:5])
S4_FIRST, S4_HIGH, S4_LOW = (tl.constexpr(value) for value in _SIGNED4[:3])
S4_HIGH_BASE, S4_LOW_BASE, S4_LEAST = (tl.constexpr(value) for value in _SIGNED4[3:6])

# --- raw bits --------------------------------------------------------------------------------------------------------


@triton.jit
def elements(words, BITS: tl.constexpr, FAST: tl.constexpr):
    """What `load_words` gave as int32 [ROWS, BLOCK]. 4 and 8 bits: bits above an element's own are rubbish."""
    if FAST and BITS < 32:
        out = tl.join(words, words >> 16)
        if BITS <= 8:
            out = tl.join(out, out >> 8)
        if BITS == 4:
            out = tl.join(out, out >> 4)
        words = tl.reshape(out, [words.shape[0], words.shape[1] * (32 // BITS)])
    elif BITS == 4:
        words = tl.reshape(tl.join(words, words >> 4), [words.shape[0], words.shape[1] * 2])
    return words


@triton.jit
def load_words(base, first, tile, left, BITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
               EACH: tl.constexpr, FAST: tl.constexpr, OTHER: tl.constexpr = 0):  # fmt: skip
    """A tile of the array at address `base`, for `elements`, and OTHER from element `left` on.

    first: number of this program's first tile in the tensor; tile: that of this one, counted from there.
    EACH: elements that a thread holds side by side. An odd end of 4-bit elements is what lies there.
    """
    if FAST or BITS == 32 or BITS == 4:
        PACK: tl.constexpr = 8 if BITS == 4 and not FAST else 32
        COUNT: tl.constexpr = BLOCK * BITS // PACK  # words of a row
        pointer = base.to(tl.pointer_type(tl.uint8 if PACK == 8 else tl.int32))
        if FAST:
            pointer = tl.multiple_of(pointer, EACH * BITS // 8)
        pointer += first * (ROWS * COUNT)
        index = tile * (ROWS * COUNT) + tl.arange(0, ROWS)[:, None] * COUNT + tl.arange(0, COUNT)[None, :]
        count = (left * BITS + PACK - 1) // PACK
        if FAST:
            count = tl.multiple_of(count, 8 * BITS // 32)
        REST: tl.constexpr = OTHER * 0x11 if BITS == 4 else OTHER
        FILL: tl.constexpr = REST * 0x01010101 if PACK == 32 and BITS <= 8 else REST
        words = tl.load(pointer + index, mask=index < count, other=FILL).to(tl.int32)
    else:
        pointer = base.to(tl.pointer_type(tl.uint8 if BITS == 8 else tl.int16)) + first * (ROWS * BLOCK)
        index = tile * (ROWS * BLOCK) + tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        words = tl.load(pointer + index, mask=index < left, other=OTHER).to(tl.int32)
    return words


@triton.jit
def _halves(x):
    """(even, odd) neighbours of [R, C]."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def _joined(x, SHIFT: tl.constexpr):
    """Pairs of neighbours: even + odd * 2^SHIFT, so that signed elements add up as integers do."""
    even, odd = _halves(x)
    return even + (odd << SHIFT)


@triton.jit
def _four(pairs):
    """Words of four bytes from two pairs of them."""
    even, odd = _halves(pairs)
    return low_halves(even, odd)


@triton.jit
def packed(x, SHAPE: tl.constexpr, BITS: tl.constexpr, FAST: tl.constexpr):
    """The inverse of `elements`, for `store_words`: words where FAST, else one int32 per element.

    SHAPE says what x holds: "plain": elements, in range. "high": 16 bits in the upper half. "signed", "unsigned":
    integers to be held within 8 bits. "tree": codes of an unsigned tree in the top byte (`nearest`).
    """
    if BITS == 32:
        out = x
    elif BITS == 4:
        out = _joined(x, 4)
        if FAST:
            out = _joined(_joined(out, 8), 16)
    elif not FAST:
        out = x >> 16 if SHAPE == "high" else x >> 24 if SHAPE == "tree" else x
        if SHAPE == "signed":
            out = tl.minimum(tl.maximum(out, -128), 127)
        elif SHAPE == "unsigned":
            out = tl.minimum(tl.maximum(out, 0), 255)
    elif BITS == 16:
        even, odd = _halves(x)
        # The compiler itself joins a pair of fresh 16-bit floats as it rounds them.
        out = high_halves(even, odd) if SHAPE == "high" else (even & 0xFFFF) | (odd << 16)
    elif SHAPE == "tree":
        even, odd = _halves(x)
        out = _four(top_bytes(even, odd))
    elif SHAPE == "plain":
        out = _joined(_joined(x, 8), 16)
    else:
        even, odd = _halves(x)
        a, c = _halves(even)
        b, d = _halves(odd)
        out = saturated_bytes(a, b, c, d, SHAPE == "signed")
    return out


@triton.jit
def packed_tree(distance, x, beyond, ZERO: tl.constexpr, BITS: tl.constexpr, FAST: tl.constexpr):
    """`packed` for a signed tree: `distance` from its code ZERO of 0 in the top byte, upward where x >= 0.

    An odd end of 4-bit elements leaves half a byte, which is 0.
    """
    if FAST and BITS == 8:
        even, odd = _halves(distance)
        above = _four(top_bytes(even, odd))
        even, odd = _halves(bits_of(x))
        below = above & _four(sign_bytes(even, odd))
        return ZERO * 0x01010101 + above - 2 * below
    else:
        distance = (distance >> 24) & 0xFF
        code = ZERO + tl.where(x < 0, -distance, distance)
        if not FAST:
            code = tl.where(beyond, 0, code)
        return packed(code, "plain", BITS, FAST)


@triton.jit
def store_words(base, first, tile, left, words, BITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                EACH: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """The inverse of `load_words`, for what `packed` gave."""
    if FAST or BITS == 32 or BITS == 4:
        PACK: tl.constexpr = 8 if BITS == 4 and not FAST else 32
        COUNT: tl.constexpr = BLOCK * BITS // PACK
        pointer = base.to(tl.pointer_type(tl.uint8 if PACK == 8 else tl.int32))
        if FAST:
            pointer = tl.multiple_of(pointer, EACH * BITS // 8)
        pointer += first * (ROWS * COUNT)
        index = tile * (ROWS * COUNT) + tl.arange(0, ROWS)[:, None] * COUNT + tl.arange(0, COUNT)[None, :]
        count = (left * BITS + PACK - 1) // PACK
        if FAST:
            count = tl.multiple_of(count, 8 * BITS // 32)
        tl.store(pointer + index, words.to(pointer.dtype.element_ty), mask=index < count)
    else:
        pointer = base.to(tl.pointer_type(tl.uint8 if BITS == 8 else tl.int16)) + first * (ROWS * BLOCK)
        index = tile * (ROWS * BLOCK) + tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(pointer + index, words.to(pointer.dtype.element_ty), mask=index < left)


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
def tile_words(k0, k1, start, inside):
    """int32 [ROWS, BLOCK]: `counter_hash(seed, start + inside)` for the keys (k0, k1) of a seed.

    start: int64 scalar, a multiple of the tile's size (a power of two up to 2^16); inside: int32 indices in the tile.
    The indices then differ in the low 16 bits only, so that the first half of the hash is the same scalar for all of
    them, and the tensor part begins at the first product.
    """
    scalar = start.to(tl.uint32) ^ k0
    scalar ^= scalar >> 16
    late = k1 ^ mix((start >> 32).to(tl.uint32))
    late ^= late >> 15
    h = (inside.to(tl.uint32) ^ scalar) * 0x7FEB352D
    h = (h ^ (h >> 15) ^ late) * 0x846CA68B
    return (h ^ (h >> 16)).to(tl.int32, bitcast=True)


# --- 16-bit floats ---------------------------------------------------------------------------------------------------


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


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
    """`count_codes` for stochastic rounding by all the bits that are dropped, in fewer instructions."""
    DROP: tl.constexpr = 23 - MAN
    SMALL: tl.constexpr = 2.0 ** (23 - EMIN)
    magnitude = tl.abs(x)
    units = bits_of(magnitude) - ((EMIN + 126) << 23)
    units = tl.where(magnitude < 2.0**EMIN, (magnitude * SMALL).to(tl.int32), units)
    return tl.minimum((units + (words & ((1 << DROP) - 1))) >> DROP, MAX_CODE)


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
            bits = bits_of(x)
            magnitude = tl.minimum((bits & 0x7FFFFFFF) + (words & 0xFFFF), 0x7F7FFFFF)
            raw = bits_of(tl.fma(x, 0.0, float_of(magnitude | (bits & -0x80000000))))
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
def clamp(x, LIMIT: tl.constexpr):
    """x within [-LIMIT, LIMIT]; a NaN becomes a number or stays NaN."""
    return tl.maximum(tl.minimum(x, LIMIT), -LIMIT)


@triton.jit
def rint(x):
    """The nearest integer of |x| < 2^22, ties to even, int32."""
    return bits_of(x + 12582912.0) - 0x4B400000


# --- codebooks -------------------------------------------------------------------------------------------------------


@triton.jit
def look_up(tables, index, FIRST: tl.constexpr, SIZE: tl.constexpr):
    """(tables + FIRST)[index] through shared memory; SIZE: a power of two, index is below.

    Read from the first-level cache each time: held in registers, the tables would cost a quarter of the warps.
    """
    table = tl.load(tables + FIRST + tl.arange(0, SIZE))
    return tl.reshape(tl.gather(table, tl.reshape(index, [index.shape[0] * index.shape[1]]), 0), index.shape)


@triton.jit
def nearest(x, tables, PLACE: tl.constexpr, SIZE: tl.constexpr, FIRST: tl.constexpr, HIGH: tl.constexpr,
            LOW: tl.constexpr, HIGH_BASE: tl.constexpr, LOW_BASE: tl.constexpr):  # fmt: skip
    """In the top byte: index of the tree's value nearest to x in [0, 4); all below FIRST have that of FIRST.

    The cells are those of `kernels.cells`. A NaN has some code.
    """
    bits = bits_of(tl.maximum(x, FIRST))
    if HIGH == LOW:
        cell = (bits >> HIGH) - HIGH_BASE
    else:  # fine cells for large x, coarse ones for small x: the finer count is the larger from their border on
        cell = tl.maximum((bits >> HIGH) - HIGH_BASE, (bits >> LOW) - LOW_BASE)
    return look_up(tables, cell, PLACE, SIZE) + (bits << (24 - LOW))


# --- scales ----------------------------------------------------------------------------------------------------------


@triton.jit
def block_amax(x):
    """Largest |x| of each row, [ROWS, 1]: by integers, which a warp reduces in one instruction; NaN > Inf."""
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
    return tl.where(scale > 0, tl.div_rn(1.0, scale), 0.0)


@triton.jit
def load_scale(base, first, tile, left, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """[ROWS, 1] float32 scales of the tile's blocks. HALF: they are bfloat16."""
    rows = tl.arange(0, ROWS)[:, None]
    pointer = base.to(tl.pointer_type(tl.int16 if HALF else tl.int32)) + first * ROWS
    index = tile * ROWS + rows
    bits = tl.load(pointer + index, mask=index * BLOCK < left, other=0).to(tl.int32)
    return float_of(bits << 16 if HALF else bits)


@triton.jit
def store_scale(base, first, tile, left, scale, HALF: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr):
    """The inverse of `load_scale`. The first thread of a row stores; [ROWS] values would change hands on the way."""
    ROWS: tl.constexpr = scale.shape[0]
    THREADS: tl.constexpr = BLOCK // EACH
    pointer = base.to(tl.pointer_type(tl.int16 if HALF else tl.int32)) + first * ROWS
    column = tl.arange(0, THREADS)[None, :]
    index = tile * ROWS + tl.arange(0, ROWS)[:, None]
    bits = bits_of(scale) >> 16 if HALF else bits_of(scale)
    value = tl.broadcast_to(bits.to(pointer.dtype.element_ty), [ROWS, THREADS])
    tl.store(pointer + index + column, value, mask=(index * BLOCK < left) & (column == 0))


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


@triton.jit
def decode(raw, scale, tables, CODEC: tl.constexpr):
    """float32 [ROWS, BLOCK] of `elements`; scale [ROWS, 1] or a scalar; tables: the values of
    `kernels.optimizer.look_up_tables`."""
    if CODEC == "fp32" or CODEC == "bf16":
        return from_float(raw, CODEC)
    elif CODEC == "fp16p":
        return from_float(raw, "fp16") * scale
    elif CODEC == "dynamic8":
        return look_up(tables, raw & 0xFF, 0, 256) * scale
    elif CODEC == "dynamic8u":
        return look_up(tables, raw & 0xFF, 256, 256) * scale
    elif CODEC == "dynamic4":
        return look_up(tables, raw & 0xF, 512, 16) * scale
    elif CODEC == "e3m1u":
        code = raw & 0xF
        return tl.where(code > 0, float_of((code + 248) << 22), 0.0) * scale
    elif CODEC == "softsign8":
        return look_up(tables, raw & 0xFF, 768, 256) * scale
    elif CODEC == "sqrt8":
        root = (raw & 0xFF).to(tl.float32) * (1 / 255) * scale
        return root * root
    else:  # E4M3: the bits of a float32 whose exponent is 120 too small, subnormals included
        tl.static_assert(CODEC == "e4m3" or CODEC == "e4m3n" or CODEC == "e4m3p")
        return float_of(((raw << 24) >> 4) & -0x78100000) * 1.329227995784916e36 * scale


@triton.jit
def new_scale(x, CODEC: tl.constexpr):
    """[ROWS, 1] scale of blocks that hold x, as it will be stored. sqrt8: of blocks that hold x^2."""
    if CODEC == "dynamic8" or CODEC == "dynamic8u" or CODEC == "dynamic4":
        return exact_scale(block_amax(x), 1.0)
    elif CODEC == "e3m1u":
        return exact_scale(block_amax(x), 24.0)
    elif CODEC == "e4m3" or CODEC == "e4m3n":
        return exact_scale(block_amax(x), 448.0)
    elif CODEC == "softsign8":
        return upward_bf16(exact_scale(block_amax(x), 1.0))
    else:
        tl.static_assert(CODEC == "sqrt8")
        return upward_bf16(exact_scale(block_amax(x), 1.0))


@triton.jit
def encode(x, factor, words, tables, beyond, CODEC: tl.constexpr, FAST: tl.constexpr):
    """What `store_words` takes for x; factor: `inverse` of the scale; tables: the cells of `look_up_tables`.

    sqrt8: the code of x^2. beyond: which elements lie beyond the end; x is 0 there."""
    if CODEC == "fp32":
        return bits_of(x)
    elif CODEC == "bf16":
        return packed(to_float(x, words, "bf16", True), "high", 16, FAST)
    elif CODEC == "dynamic8":
        # The tree is symmetric but for its top, 1, which has no counterpart: what is below LEAST has the lowest code.
        z = tl.maximum(x * factor, S8_LEAST)
        code = nearest(tl.abs(z), tables, 0, 1024, S8_FIRST, S8_HIGH, S8_LOW, S8_HIGH_BASE, S8_LOW_BASE)
        return packed_tree(code, z, beyond, 127, 8, FAST)
    elif CODEC == "dynamic4":
        z = tl.maximum(x * factor, S4_LEAST)
        code = nearest(tl.abs(z), tables, 3072, 32, S4_FIRST, S4_HIGH, S4_LOW, S4_HIGH_BASE, S4_LOW_BASE)
        return packed_tree(code, z, beyond, 7, 4, FAST)
    elif CODEC == "dynamic8u":
        code = nearest(x * factor, tables, 1024, 2048, U8_FIRST, U8_HIGH, U8_LOW, U8_HIGH_BASE, U8_LOW_BASE)
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
        return packed(code | ((bits_of(z) >> 24) & 0x80), "plain", 8, FAST)
