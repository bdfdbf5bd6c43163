# SPDX-License-Identifier: Apache-2.0
"""Cast many weights to FP8, each with a scale of its own, in the two layouts that GEMMs read: one launch, by a table.

    chunks    int32 [programs, 2]   row of the table, and which of that weight's parts; a program takes one part
    table     int64 [weights, 16]   addresses and facts, see `W_...`

The scale comes from an amax that is known (the optimizer's, `columns.N_WEIGHT`), so that nobody looks at a weight
twice. A tile is cast as `cast_transpose` casts it. Bytes moved for b-byte weights: n (b + 2), one layout n (b + 1).
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_lowprec.kernels.triton.cast import count_sample, used_scale
from hf_lowprec.kernels.triton.cast_transpose import cast_tile

# columns of `table`
W_WEIGHT = tl.constexpr(0)
W_QDATA = tl.constexpr(1)  # [R, C]
W_TRANSPOSED = tl.constexpr(2)  # [C, 16 pads]
W_SCALE = tl.constexpr(3)  # written: float32
W_AMAX = tl.constexpr(4)  # the weight's finite amax, float32, where the scale may come from it
W_GIVEN = tl.constexpr(5)  # the scale to use, float32; delayed scaling: 0 = none yet
W_COUNTS = tl.constexpr(6)  # int64 [4], increased as `count_sample` does
W_SEEN = tl.constexpr(7)  # delayed scaling: float32, the amax again
W_R = tl.constexpr(8)
W_C = tl.constexpr(9)
W_PADS = tl.constexpr(10)
W_SAMPLES = tl.constexpr(11)
W_EVERY = tl.constexpr(12)  # the stride of the sample
W_PARTS = tl.constexpr(13)  # programs that share the weight
W_COLUMNS = tl.constexpr(16)


@triton.jit
def _integer(row, COLUMN: tl.constexpr):
    return tl.load(row + COLUMN).to(tl.int32)


@triton.jit
def _floats(row, COLUMN: tl.constexpr):
    return tl.load(row + COLUMN).to(tl.pointer_type(tl.float32))


@triton.jit
def cast_weights_kernel(
    chunks, table,
    FMT_MAX: tl.constexpr, HALF_TINY: tl.constexpr, TOP_EXP: tl.constexpr, TOP_MAN: tl.constexpr,
    MARGIN: tl.constexpr, POW2: tl.constexpr, METHOD: tl.constexpr, X: tl.constexpr, Q: tl.constexpr,
    TRANSPOSED: tl.constexpr, FAST: tl.constexpr, SAMPLES: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """One part: every W_PARTS-th tile of a contiguous weight [R, C].

    METHOD: as `cast.used_scale`. TRANSPOSED: both layouts are wanted. FAST: addresses and C are multiples of 16.
    """
    chunk = chunks + 2 * tl.program_id(0)
    row = table + tl.load(chunk).to(tl.int64) * W_COLUMNS
    part = tl.load(chunk + 1)
    parts, n_rows = _integer(row, W_PARTS), _integer(row, W_R)
    n_columns = tl.load(row + W_C).to(tl.int32)
    x_ptr = tl.load(row + W_WEIGHT).to(tl.pointer_type(X))
    qdata_ptr = tl.load(row + W_QDATA).to(tl.pointer_type(Q))
    words = 4 * _integer(row, W_PADS)
    if FAST:  # what the JIT finds out by itself of arguments; on the result of a call the hint would be lost
        n_columns = tl.multiple_of(n_columns, 16)
        x_ptr, qdata_ptr = tl.multiple_of(x_ptr, 16), tl.multiple_of(qdata_ptr, 16)
    transposed_ptr = None
    if TRANSPOSED:
        transposed_ptr = tl.multiple_of(tl.load(row + W_TRANSPOSED).to(tl.pointer_type(tl.int32)), 16)
    given_ptr = _floats(row, W_GIVEN)
    amax_ptr = _floats(row, W_AMAX)
    scale = used_scale(amax_ptr, given_ptr, METHOD, False, FMT_MAX, TOP_EXP, TOP_MAN, MARGIN, POW2, 1)
    if part == 0:
        tl.store(_floats(row, W_SCALE), scale)
        if METHOD == 1:
            tl.store(_floats(row, W_SEEN), tl.load(amax_ptr))
    inverse = tl.div_rn(1.0, scale)
    across = tl.cdiv(n_columns, TILE_C)
    for tile in range(part, across * tl.cdiv(n_rows, TILE_R), parts):
        cast_tile(
            x_ptr, qdata_ptr, transposed_ptr, tile, across, n_rows, n_columns, n_columns, words, inverse, 0.0,
            FMT_MAX, Q, False, TILE_R, TILE_C,
        )  # fmt: skip
    count_sample(
        x_ptr, tl.load(row + W_COUNTS).to(tl.pointer_type(tl.int64)), part, parts, 1, 1, _integer(row, W_SAMPLES),
        _integer(row, W_EVERY), inverse, FMT_MAX, HALF_TINY, True, SAMPLES,
    )  # fmt: skip
