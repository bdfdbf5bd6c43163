# SPDX-License-Identifier: Apache-2.0
"""Raw elements of a tile: from memory to one int32 each, and back.

A tile is a [ROWS, BLOCK] piece of a flattened tensor, BLOCK the block of its states. `load_words` and `elements`,
`packed` and `store_words` move elements of 4, 8, 16 or 32 bits as int32, one per element. Where `FAST`, they go
through 32-bit words, which a thread takes apart itself: LLVM spends an instruction more per element on vectors of
bytes. Everything else (addresses that are not aligned, a tensor's ragged end) goes element by element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_lowprec.kernels.triton.ptx import four_bytes, high_halves, low_halves, saturated_bytes, sign_bytes, top_bytes


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


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
def bytes_of(words, FAST: tl.constexpr):
    """`elements` of 8 bits without rubbish, in [0, 255]."""
    if FAST:
        a, b, c, d = four_bytes(words)
        out = tl.join(tl.join(a, c), tl.join(b, d))
        return tl.reshape(out, [words.shape[0], words.shape[1] * 4])
    else:
        return words & 0xFF


@triton.jit
def load_words(base, first, tile, left, BITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
               EACH: tl.constexpr, FAST: tl.constexpr, OTHER: tl.constexpr = 0,
               WHOLE: tl.constexpr = False):  # fmt: skip
    """A tile of the array at address `base`, for `elements`, and OTHER from element `left` on. WHOLE: all of it is
    there, which needs FAST and saves the masks.

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
        if FAST and WHOLE:
            words = tl.load(pointer + index)
        else:
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
def halves(x):
    """(even, odd) neighbours of [R, C]."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def _joined(x, SHIFT: tl.constexpr):
    """Pairs of neighbours: even + odd * 2^SHIFT, so that signed elements add up as integers do."""
    even, odd = halves(x)
    return even + (odd << SHIFT)


@triton.jit
def _four(pairs):
    """Words of four bytes from two pairs of them."""
    even, odd = halves(pairs)
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
        even, odd = halves(x)
        # The compiler itself joins a pair of fresh 16-bit floats as it rounds them.
        out = high_halves(even, odd) if SHAPE == "high" else (even & 0xFFFF) | (odd << 16)
    elif SHAPE == "tree":
        even, odd = halves(x)
        out = _four(top_bytes(even, odd))
    elif SHAPE == "plain":
        out = _joined(_joined(x, 8), 16)
    else:
        even, odd = halves(x)
        a, c = halves(even)
        b, d = halves(odd)
        out = saturated_bytes(a, b, c, d, SHAPE == "signed")
    return out


@triton.jit
def packed_tree(distance, x, beyond, ZERO: tl.constexpr, BITS: tl.constexpr, FAST: tl.constexpr):
    """`packed` for a signed tree: `distance` from its code ZERO of 0 in the top byte, upward where x >= 0.

    An odd end of 4-bit elements leaves half a byte, which is 0.
    """
    if FAST and BITS == 8:
        even, odd = halves(distance)
        above = _four(top_bytes(even, odd))
        even, odd = halves(bits_of(x))
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
                EACH: tl.constexpr, FAST: tl.constexpr, WHOLE: tl.constexpr = False):  # fmt: skip
    """The inverse of `load_words`, for what `packed` gave."""
    if FAST or BITS == 32 or BITS == 4:
        PACK: tl.constexpr = 8 if BITS == 4 and not FAST else 32
        COUNT: tl.constexpr = BLOCK * BITS // PACK
        pointer = base.to(tl.pointer_type(tl.uint8 if PACK == 8 else tl.int32))
        if FAST:
            pointer = tl.multiple_of(pointer, EACH * BITS // 8)
        pointer += first * (ROWS * COUNT)
        index = tile * (ROWS * COUNT) + tl.arange(0, ROWS)[:, None] * COUNT + tl.arange(0, COUNT)[None, :]
        if FAST and WHOLE:
            tl.store(pointer + index, words)
        else:
            count = (left * BITS + PACK - 1) // PACK
            if FAST:
                count = tl.multiple_of(count, 8 * BITS // 32)
            tl.store(pointer + index, words.to(pointer.dtype.element_ty), mask=index < count)
    else:
        pointer = base.to(tl.pointer_type(tl.uint8 if BITS == 8 else tl.int16)) + first * (ROWS * BLOCK)
        index = tile * (ROWS * BLOCK) + tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(pointer + index, words.to(pointer.dtype.element_ty), mask=index < left)
