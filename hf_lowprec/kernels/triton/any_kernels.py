# SPDX-License-Identifier: Apache-2.0
"""The kernels of `any_cast`: amaxes, casts, casts of transposed views to bytes, counters."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_lowprec.kernels.triton.any_parts import (
    amax_bits,
    first_words,
    inside,
    larger,
    magnitude,
    result,
    scale_of,
    spare_bits,
    spread,
    stored_scale,
    words,
)
from hf_lowprec.kernels.triton.cast import count_sample, raise_amax
from hf_lowprec.kernels.triton.formats import hashed
from hf_lowprec.kernels.triton.ptx import reciprocal


@triton.jit
def amax_kernel(x_ptr, partial_ptr, n, per_program, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """partial[p] = largest magnitude of this program's stretch of a contiguous tensor, as bits."""
    start = tl.program_id(0).to(tl.int64) * per_program
    here = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], dtype=tl.int32 if GROUP else tl.float32)
    for i in range(0, per_program, BLOCK):
        at = start + i + here
        x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
        largest = larger(magnitude(x, GROUP), largest)
    tl.store(partial_ptr + tl.program_id(0), amax_bits(tl.max(largest, 0)))


# `count_sample` takes no constant for `samples`, which the JIT makes of a 1: of a tensor of one element.
@triton.jit(do_not_specialize=["samples", "sample_stride"])
def count_kernel(x_ptr, counts_ptr, scale_ptr, samples, sample_stride, LARGEST: tl.constexpr, HALF_TINY: tl.constexpr,
                  E8M0: tl.constexpr, SAMPLES: tl.constexpr):  # fmt: skip
    scale = tl.load(scale_ptr)
    if E8M0:
        exponent = scale.to(tl.int32)
        scale = tl.where(exponent == 0, 1 << 22, exponent << 23).to(tl.float32, bitcast=True)
    inverse = tl.div_rn(1.0, scale)
    count_sample(
        x_ptr, counts_ptr, tl.program_id(0), tl.num_programs(0), 1, 1, samples, sample_stride, inverse, LARGEST,
        HALF_TINY, True, SAMPLES,
    )  # fmt: skip


@triton.jit
def any_cast_kernel(
    x_ptr, q_ptr, scale_ptr, given_ptr, partial_ptr, amax_ptr, seed_ptr, rows, cols, stride_row, stride_col, groups,
    GRANULARITY: tl.constexpr, METHOD: tl.constexpr, GROUP: tl.constexpr, VALUES: tl.constexpr,
    SNAP: tl.constexpr, MARGIN: tl.constexpr, E8M0: tl.constexpr, LARGEST: tl.constexpr, TOP_EXP: tl.constexpr,
    TOP_MAN: tl.constexpr, MODE: tl.constexpr, BITS: tl.constexpr, MAN: tl.constexpr, EMIN: tl.constexpr,
    MAX_CODE: tl.constexpr, SUBNORMAL: tl.constexpr, SIGN: tl.constexpr, NAN_CODE: tl.constexpr,
    NEGATIVE_ZERO: tl.constexpr, FAST: tl.constexpr, OVERFLOW: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, EACH: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """x [rows, cols] of any strides -> q contiguous. groups: scales of a row (blocks) or 1.

    EACH: `any_parts.words`. WIDE: some index or offset is 2^31 or more. EVEN: whole tiles fill the matrix.
    """
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    across = 1 if GRANULARITY == 1 else tl.cdiv(cols, COLS)
    row = (tl.program_id(0) // across).to(INDEX) * ROWS + tl.arange(0, ROWS).to(INDEX)
    corner = (tl.program_id(0) % across).to(INDEX) * COLS
    here = row < rows
    if GRANULARITY == 1:
        if METHOD == 0:
            scale = tl.load(given_ptr + row, mask=here, other=1.0)
            inverse = reciprocal(scale)
        else:
            largest = tl.zeros([ROWS, COLS], dtype=tl.int32 if GROUP else tl.float32)
            for first in range(0, cols, COLS):
                col = first + tl.arange(0, COLS).to(INDEX)
                mask = inside(here, col < cols, ROWS, COLS, EVEN)
                at = row[:, None] * stride_row + col[None, :] * stride_col
                x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
                largest = larger(magnitude(x, GROUP), largest)
            scale, inverse = scale_of(
                amax_bits(tl.max(largest, 1)), SNAP, MARGIN, E8M0, MAN, LARGEST, TOP_EXP, TOP_MAN
            )
            if scale_ptr is not None:
                tl.store(scale_ptr + row, stored_scale(scale, E8M0), mask=here)
        for first in range(0, cols, COLS):
            col = first + tl.arange(0, COLS).to(INDEX)
            mask = inside(here, col < cols, ROWS, COLS, EVEN)
            at = row[:, None] * stride_row + col[None, :] * stride_col
            x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
            drawn = words(seed_ptr, row, first, cols, COLS, EACH) if MODE == 3 else 0
            out = result(x, scale[:, None], inverse[:, None], drawn, DTYPE, VALUES, GROUP, MODE, BITS, MAN, EMIN,
                          MAX_CODE, SUBNORMAL, SIGN, NAN_CODE, NEGATIVE_ZERO, LARGEST, FAST, OVERFLOW)  # fmt: skip
            tl.store(q_ptr + row[:, None] * cols + col[None, :], out, mask=mask)
    else:
        col = corner + tl.arange(0, COLS).to(INDEX)
        mask = inside(here, col < cols, ROWS, COLS, EVEN)
        at = row[:, None] * stride_row + col[None, :] * stride_col
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        drawn = words(seed_ptr, row, corner, cols, COLS, EACH) if MODE == 3 else 0
        if GRANULARITY == 0:
            if METHOD == 0:
                scale = tl.load(given_ptr)
                inverse = reciprocal(scale)
            else:
                bits = tl.max(tl.load(partial_ptr + tl.arange(0, PARTS)), 0)
                scale, inverse = scale_of(bits, SNAP, MARGIN, E8M0, MAN, LARGEST, TOP_EXP, TOP_MAN)
                if METHOD == 2:
                    delayed = tl.load(given_ptr)
                    scale = tl.where(delayed > 0, delayed, scale)
                    inverse = reciprocal(scale)
                if amax_ptr is not None:
                    if tl.program_id(0) == 0:
                        raise_amax(amax_ptr, bits.to(tl.float32, bitcast=True))
            if scale_ptr is not None:
                if tl.program_id(0) == 0:
                    tl.store(scale_ptr, stored_scale(scale, E8M0))
            out = result(x, scale, inverse, drawn, DTYPE, VALUES, GROUP, MODE, BITS, MAN, EMIN, MAX_CODE, SUBNORMAL,
                          SIGN, NAN_CODE, NEGATIVE_ZERO, LARGEST, FAST, OVERFLOW)  # fmt: skip
        else:
            COUNT: tl.constexpr = COLS // BLOCK
            number = corner // BLOCK + tl.arange(0, COUNT).to(INDEX)
            place = row[:, None] * groups + number[None, :]
            there = here[:, None] & (number < groups)[None, :]
            if METHOD == 0:
                scale = tl.load(given_ptr + place, mask=there, other=1.0)
                inverse = reciprocal(scale)
            else:
                bits = amax_bits(tl.max(tl.reshape(magnitude(x, GROUP), [ROWS, COUNT, BLOCK]), 2))
                scale, inverse = scale_of(bits, SNAP, MARGIN, E8M0, MAN, LARGEST, TOP_EXP, TOP_MAN)
                if scale_ptr is not None:
                    tl.store(scale_ptr + place, stored_scale(scale, E8M0), mask=there)
            out = result(x, spread(scale, BLOCK), spread(inverse, BLOCK), drawn, DTYPE, VALUES, GROUP, MODE, BITS,
                          MAN, EMIN, MAX_CODE, SUBNORMAL, SIGN, NAN_CODE, NEGATIVE_ZERO, LARGEST, FAST,
                          OVERFLOW)  # fmt: skip
        tl.store(q_ptr + row[:, None] * cols + col[None, :], out, mask=mask)


@triton.jit
def turned_kernel(
    x_ptr, q_ptr, scale_ptr, seed_ptr, rows, cols, stride_col, groups, GROUP: tl.constexpr, SNAP: tl.constexpr,
    MARGIN: tl.constexpr, E8M0: tl.constexpr, LARGEST: tl.constexpr, TOP_EXP: tl.constexpr, TOP_MAN: tl.constexpr,
    MODE: tl.constexpr, BITS: tl.constexpr, MAN: tl.constexpr, EMIN: tl.constexpr, MAX_CODE: tl.constexpr,
    SUBNORMAL: tl.constexpr, SIGN: tl.constexpr, NAN_CODE: tl.constexpr, NEGATIVE_ZERO: tl.constexpr,
    FAST: tl.constexpr, OVERFLOW: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    WIDE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """x [rows, cols] of strides (1, stride_col) -> codes of one byte, int32 [rows, cols / 4]; scales of blocks.

    A thread takes four columns side by side, so that it stores words of four codes; bytes on their way to the threads
    that store them would cost an instruction each, and so their addresses. Blocks and cols are multiples of 4.
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    WORDS: tl.constexpr = COLS // 4
    across = tl.cdiv(cols, COLS)
    row = (tl.program_id(0) // across).to(INDEX) * ROWS + tl.arange(0, ROWS).to(INDEX)
    tile = (tl.program_id(0) % across).to(INDEX)
    place = tile * WORDS + tl.arange(0, WORDS).to(INDEX)
    col = place * 4
    here = row < rows
    mask = inside(here, col < cols, ROWS, WORDS, EVEN)
    at = x_ptr + row[:, None] + col[None, :] * stride_col
    x0 = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    x1 = tl.load(at + stride_col, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(at + 2 * stride_col, mask=mask, other=0.0).to(tl.float32)
    x3 = tl.load(at + 3 * stride_col, mask=mask, other=0.0).to(tl.float32)
    largest = larger(
        larger(magnitude(x0, GROUP), magnitude(x1, GROUP)), larger(magnitude(x2, GROUP), magnitude(x3, GROUP))
    )
    COUNT: tl.constexpr = COLS // BLOCK
    bits = amax_bits(tl.max(tl.reshape(largest, [ROWS, COUNT, BLOCK // 4]), 2))
    scale, inverse = scale_of(bits, SNAP, MARGIN, E8M0, MAN, LARGEST, TOP_EXP, TOP_MAN)
    number = tile * COUNT + tl.arange(0, COUNT).to(INDEX)
    there = here[:, None] & (number < groups)[None, :]
    tl.store(scale_ptr + row[:, None] * groups + number[None, :], stored_scale(scale, E8M0), mask=there)
    inverse = spread(inverse, BLOCK // 4)
    first, late = 0, 0
    if MODE == 3:
        first, late = first_words(seed_ptr, row[:, None] * cols + col[None, :])
    SPARE: tl.constexpr = spare_bits(FAST, SUBNORMAL, NEGATIVE_ZERO, SIGN)
    KEEP: tl.constexpr = 2 * SIGN - 1 if SIGN > 0 else 0xFF
    word = tl.zeros([ROWS, WORDS], dtype=tl.int32)
    for j in tl.static_range(4):
        x = x0 if j == 0 else x1 if j == 1 else x2 if j == 2 else x3
        h = hashed(first ^ j, late) if MODE == 3 else 0
        code = result(x, inverse, inverse, h, tl.int32, False, GROUP, MODE, BITS, MAN, EMIN, MAX_CODE, SUBNORMAL,
                      SIGN, NAN_CODE, NEGATIVE_ZERO, LARGEST, FAST, OVERFLOW)  # fmt: skip
        word |= ((code >> SPARE) & KEEP) << (8 * j)
    tl.store(q_ptr + row[:, None] * (cols // 4) + place[None, :], word, mask=mask)
