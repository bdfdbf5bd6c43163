# SPDX-License-Identifier: Apache-2.0
"""One optimizer step of all tensors of a device in a few launches: `optim.algorithms`, bit for bit.

    amax_kernel      largest |gradient| of every tensor                 only where somebody needs it
    sample_kernel    which Parameters were edited                       where they follow masters and amax did not look
    prepare_kernel   is the step finite; scalars of every tensor; scales that are predicted; step += 1
    square_kernel    StableAdamW: sums of g^2 / max(v, eps^2), one per chunk
    rate_kernel      StableAdamW: learning rates from these sums, in a fixed order
    step_kernel      the step; one launch per kind of tensor (dtypes and states)
    observe_kernel   mu of gradients that passed through a format       only where some do

`columns` has the tables that they read, `prepare` and `wire` the kernels before and after. No fused multiply-add may
be formed here (launches say `enable_fp_fusion=False`), and divisions and roots are IEEE's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_lowprec.kernels.triton.codecs import from_float, inverse, staged, tile_words
from hf_lowprec.kernels.triton.columns import (
    N_COLUMNS,
    N_EXTREMES,
    N_WEIGHT,
    S_COLUMNS,
    S_CORRECTION,
    S_DECAY,
    S_EPS,
    S_FIRST_NEW,
    S_FIRST_OLD,
    S_FLOOR,
    S_GAIN,
    S_GAIN1,
    S_GAIN2,
    S_KEEP,
    S_MASTER_NEW,
    S_MASTER_OLD,
    S_NESTEROV,
    S_RATE,
    S_READ,
    S_SECOND_NEW,
    S_SECOND_OLD,
    S_SHRINK,
    S_WIRE,
    S_WIRE_INVERSE,
    T_CHUNK,
    T_COLUMNS,
    T_FIRST,
    T_FIRST_AMAX,
    T_FIRST_SCALE,
    T_MASTER,
    T_MASTER_AMAX,
    T_PARAM,
    T_SECOND,
    T_SECOND_AMAX,
    T_SECOND_SCALE,
    T_START,
    chunk_of,
    keys_of,
    left_of,
    scalar_of,
)
from hf_lowprec.kernels.triton.ptx import count_extreme, count_large, not_speculated, root_and_quotient
from hf_lowprec.kernels.triton.tiles import (
    finite_magnitude,
    load_moment,
    load_weight,
    moment,
    store_moment,
    store_weight,
    weight,
)
from hf_lowprec.kernels.triton.wire import count_extremes, through
from hf_lowprec.kernels.triton.words import bits_of, elements, load_words

_ROOT = tl.constexpr(2.0**64)  # whose square overflows


@triton.jit
def _square(g):
    """Whether g and its square are finite."""
    return tl.abs(g) < _ROOT


@triton.jit
def _add_extremes(seen, hits):
    if hits > 0:
        tl.atomic_add(seen + N_EXTREMES, hits)


@triton.jit
def _skip(param_base, grad_base, begin, left, seen, wire, wire_inverse, PARAM: tl.constexpr, GRAD: tl.constexpr,
          WIRED: tl.constexpr, AMAX: tl.constexpr, EACH: tl.constexpr, FAST: tl.constexpr,
          TILE: tl.constexpr):  # fmt: skip
    """What is to be seen of a chunk in a step that is refused: codes at the extremes, the Parameter as it stays."""
    if WIRED:
        if wire != 0:
            _add_extremes(seen, count_extremes(grad_base, begin, left, wire_inverse, GRAD, FAST, EACH, TILE))
    if AMAX:
        BITS: tl.constexpr = 32 if PARAM == "fp32" else 16
        largest = tl.zeros([1, TILE], dtype=tl.int32)
        for tile in tl.range(0, tl.cdiv(left, TILE)):
            words = load_words(param_base, begin, tile, left, BITS, 1, TILE, EACH, FAST, 0, FAST)
            largest = tl.maximum(largest, finite_magnitude(elements(words, BITS, FAST), PARAM, False))
        tl.atomic_max(seen + N_WEIGHT, tl.max(largest))


@triton.jit
def square_kernel(
    chunks, table, grads, scalars, finite_ptr, tables, sums,
    GRAD: tl.constexpr, SECOND: tl.constexpr, ELEMENT: tl.constexpr, WIRED: tl.constexpr, NATIVE: tl.constexpr,
    FAST: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """StableAdamW: sums[chunk] = float64 sum of g^2 / max(v, eps^2) over one chunk, v that of this step."""
    if tl.load(finite_ptr) == 0:
        return
    tensor, _careful, number = chunk_of(chunks)
    row = table + tensor * T_COLUMNS
    scalars += tensor * S_COLUMNS
    left = left_of(row, number, CHUNK)
    grad_base = tl.load(grads + tensor)
    base = tl.load(row + T_SECOND)
    scale_base = tl.load(row + T_SECOND_SCALE)
    gain, keep, gain2 = scalar_of(scalars, S_GAIN), scalar_of(scalars, S_KEEP), scalar_of(scalars, S_GAIN2)
    wire, wire_inverse = scalar_of(scalars, S_WIRE), scalar_of(scalars, S_WIRE_INVERSE)
    floor, old_scale = scalar_of(scalars, S_FLOOR), scalar_of(scalars, S_SECOND_OLD)
    ROWS: tl.constexpr = TILE // BLOCK
    inside = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    begin = number * (CHUNK // TILE)
    total = tl.zeros([], dtype=tl.float64)
    GRAD_BITS: tl.constexpr = 32 if GRAD == "fp32" else 16
    tables = staged(tables, "none", SECOND, False)
    for tile in tl.range(0, tl.cdiv(left, TILE), num_stages=STAGES):
        words = load_words(grad_base, begin, tile, left, GRAD_BITS, ROWS, BLOCK, EACH, FAST, 0, FAST)
        codes, scale = load_moment(base, scale_base, begin, tile, left, SECOND, ROWS, BLOCK, EACH, FAST)
        beyond = tile * TILE + inside >= left
        g = from_float(elements(words, GRAD_BITS, FAST), GRAD)
        if WIRED:
            if wire != 0:
                g = through(g * wire_inverse, wire, GRAD, NATIVE, not ELEMENT)
        if ELEMENT:
            g = tl.where(_square(g), g, 0.0)
        g = g * gain
        v = moment(codes, scale, old_scale, tables, beyond, SECOND, FAST)
        v = v * keep + (g * gain2) * g
        ratio = tl.div_rn(g * g, tl.maximum(v, floor))
        if not FAST:
            ratio = tl.where(beyond, 0.0, ratio)  # with eps = 0 it is 0 / 0 there
        total += tl.sum(tl.sum(ratio.to(tl.float64), 1), 0)
    tl.store(sums + tl.load(row + T_CHUNK) + number, total)


@triton.jit
def step_kernel(
    chunks, table, grads, scalars, finite_ptr, tables, skipped, seen,
    ALGORITHM: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, COUPLED: tl.constexpr, ELEMENT: tl.constexpr,
    WIRED: tl.constexpr, NATIVE: tl.constexpr, AMAX: tl.constexpr, QUICK: tl.constexpr, FAST: tl.constexpr,
    EACH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One chunk. FIRST, SECOND: codecs of the moments, "none" for those that the algorithm lacks; MASTER: "none",
    "fp32", "fp16p", "residual8" (nearest), "residual8s" (stochastic), "residual16". COUPLED: some groups' decay joins
    the gradient. ELEMENT: elements whose gradient is not finite stay as they are. WIRED: some gradients pass through
    E4M3, NATIVE: by the GPU's own casts. AMAX: the largest magnitude of the new Parameter is noted.
    QUICK: see `root_and_quotient`. FAST: elements move as words, and all tiles are whole.
    """
    tensor, _careful, number = chunk_of(chunks)
    row = table + tensor * T_COLUMNS
    scalars += tensor * S_COLUMNS
    left = left_of(row, number, CHUNK)
    param_base = tl.load(row + T_PARAM)
    grad_base = tl.load(grads + tensor)
    begin = number * (CHUNK // TILE)  # the number of the first tile
    seen += tensor * N_COLUMNS
    wire, wire_inverse = scalar_of(scalars, S_WIRE), scalar_of(scalars, S_WIRE_INVERSE)
    if tl.load(finite_ptr) == 0:
        if WIRED or AMAX:
            _skip(param_base, grad_base, begin, left, seen, wire, wire_inverse, PARAM, GRAD, WIRED, AMAX, EACH, FAST,
                  TILE)  # fmt: skip
        return
    first_base = tl.load(row + T_FIRST)
    first_scale_base = tl.load(row + T_FIRST_SCALE)
    second_base = tl.load(row + T_SECOND)
    second_scale_base = tl.load(row + T_SECOND_SCALE)
    master_base = tl.load(row + T_MASTER)

    shard_start = tl.load(row + T_START)
    read = tl.load(scalars + S_READ) != 0
    gain = scalar_of(scalars, S_GAIN)
    shrink = scalar_of(scalars, S_SHRINK)
    rate = scalar_of(scalars, S_RATE)
    correction = scalar_of(scalars, S_CORRECTION)
    keep = scalar_of(scalars, S_KEEP)
    gain1 = scalar_of(scalars, S_GAIN1)
    gain2 = scalar_of(scalars, S_GAIN2)
    eps = scalar_of(scalars, S_EPS)
    decay = scalar_of(scalars, S_DECAY)
    nesterov = scalar_of(scalars, S_NESTEROV)
    first_old, first_new = scalar_of(scalars, S_FIRST_OLD), scalar_of(scalars, S_FIRST_NEW)
    second_old, second_new = scalar_of(scalars, S_SECOND_OLD), scalar_of(scalars, S_SECOND_NEW)
    master_old, master_new = scalar_of(scalars, S_MASTER_OLD), scalar_of(scalars, S_MASTER_NEW)
    first_k0, first_k1 = keys_of(scalars, 0)
    second_k0, second_k1 = keys_of(scalars, 1)
    weight_k0, weight_k1 = keys_of(scalars, 2)
    first_factor, second_factor, master_factor = inverse(first_new), inverse(second_new), inverse(master_new)

    tables = staged(tables, FIRST, SECOND, True)
    GRAD_BITS: tl.constexpr = 32 if GRAD == "fp32" else 16
    ROWS: tl.constexpr = TILE // BLOCK
    inside = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    first_amax = tl.zeros([ROWS, BLOCK // EACH], dtype=tl.int32)
    second_amax = first_amax
    master_amax = first_amax
    weight_amax = first_amax
    skips = first_amax
    hits = first_amax
    for tile in tl.range(0, tl.cdiv(left, TILE), num_stages=STAGES):
        tile = not_speculated(tile)  # or offsets are computed in 64 bits
        grad_words = load_words(grad_base, begin, tile, left, GRAD_BITS, ROWS, BLOCK, EACH, FAST, 0, FAST)
        if SECOND != "none":
            second_words, second_scale = load_moment(second_base, second_scale_base, begin, tile, left, SECOND, ROWS,
                                                      BLOCK, EACH, FAST)  # fmt: skip
        if FIRST != "none":
            first_words, first_scale = load_moment(first_base, first_scale_base, begin, tile, left, FIRST, ROWS,
                                                    BLOCK, EACH, FAST)  # fmt: skip
        param_words, master_words = load_weight(param_base, master_base, begin, tile, left, PARAM, MASTER, ROWS,
                                                 BLOCK, EACH, FAST)  # fmt: skip

        # The second moment from its codes to its codes, then the first: fewer values are alive at a time.
        start = shard_start + (begin + tile) * TILE
        beyond = tile * TILE + inside >= left
        g = from_float(elements(grad_words, GRAD_BITS, FAST), GRAD)
        if WIRED:
            if wire != 0:
                z = g * wire_inverse
                hits += tl.sum(tl.reshape(count_extreme(z), [ROWS, BLOCK // EACH, EACH]), 2)
                g = through(z, wire, GRAD, NATIVE, not ELEMENT)
        if ELEMENT:
            bad = _square(g) == 0
            skips += tl.sum(tl.reshape(count_large(g), [ROWS, BLOCK // EACH, EACH]), 2)
        g = g * gain
        if COUPLED:
            w = weight(param_words, master_words, master_old, read, param_base, begin, tile, left, PARAM, MASTER,
                       EACH, FAST)  # fmt: skip
            g = tl.where(decay != 0, w * decay + g, g)
        if SECOND != "none":
            v = moment(second_words, second_scale, second_old, tables, beyond, SECOND, FAST)
            old_v = v
            v = v * keep + (g * gain2) * g
            if ELEMENT:
                v = tl.where(bad, old_v, v)
            if SECOND != "sqrt8":  # whose codes come from the root
                words = 0
                if SECOND == "bf16" or SECOND == "e4m3n" or SECOND == "e3m1u":
                    words = tile_words(second_k0, second_k1, start, inside, FAST)
                store_moment(second_base, second_scale_base, second_factor, tables, begin, tile, left, v, words,
                              beyond, SECOND, EACH, FAST)  # fmt: skip
                if SECOND == "fp16p":
                    second_amax = tl.maximum(second_amax, _thread_max(bits_of(v), EACH))

        if FIRST != "none":
            m = moment(first_words, first_scale, first_old, tables, beyond, FIRST, FAST)
        w = weight(param_words, master_words, master_old, read, param_base, begin, tile, left, PARAM, MASTER,
                   EACH, FAST)  # fmt: skip
        old_w = w
        if SECOND != "none":
            old_m = m
            change = (g - m) * gain1
            m = m + change
            if ELEMENT:
                m = tl.where(bad, old_m, m)
            root, change = root_and_quotient(m * rate, v, correction, eps, QUICK)
            w = w * shrink
            w = w - change
            if SECOND == "sqrt8":
                words = tile_words(second_k0, second_k1, start, inside, FAST)
                store_moment(second_base, second_scale_base, second_factor, tables, begin, tile, left, root,
                              words, beyond, SECOND, EACH, FAST)  # fmt: skip
        elif ALGORITHM == "lion":
            old_m = m
            difference = g - m
            direction = m + difference * gain1
            m = m + difference * gain2
            w = w * shrink
            w = w - tl.where(direction > 0, rate, tl.where(direction < 0, -rate, 0.0))
        else:
            tl.static_assert(ALGORITHM == "sgd")
            if FIRST != "none":
                old_m = m
                m = m * keep + g * gain1
                g = tl.where(nesterov != 0, m * keep + g, m)
            w = w - g * rate
        if ELEMENT:
            w = tl.where(bad, old_w, w)
            if FIRST != "none" and SECOND == "none":
                m = tl.where(bad, old_m, m)
        words = 0
        if STOCHASTIC or MASTER == "fp16p" or MASTER == "residual8s":
            words = tile_words(weight_k0, weight_k1, start, inside, FAST)
        raw = store_weight(param_base, master_base, master_factor, master_new, begin, tile, left, w, words, PARAM,
                           MASTER, STOCHASTIC, EACH, FAST)  # fmt: skip
        if AMAX:
            high: tl.constexpr = PARAM == "bf16" and MASTER != "fp32" and MASTER != "fp16p"
            magnitude = finite_magnitude(raw, PARAM, high)
            weight_amax = tl.maximum(weight_amax, _thread_max(magnitude, EACH))
        if MASTER == "fp16p":  # beyond the end it may be 0 / 0
            magnitude = bits_of(w) & 0x7FFFFFFF
            if not FAST:
                magnitude = tl.where(beyond, 0, magnitude)
            master_amax = tl.maximum(master_amax, _thread_max(magnitude, EACH))
        if FIRST != "none":
            words = 0
            if FIRST == "bf16" or FIRST == "e4m3p":
                words = tile_words(first_k0, first_k1, start, inside, FAST)
            store_moment(first_base, first_scale_base, first_factor, tables, begin, tile, left, m, words,
                          beyond, FIRST, EACH, FAST)  # fmt: skip
            if FIRST == "e4m3p":
                first_amax = tl.maximum(first_amax, _thread_max(bits_of(m) & 0x7FFFFFFF, EACH))

    if FIRST == "e4m3p":
        _raise_amax(row, T_FIRST_AMAX, first_amax)
    if SECOND == "fp16p":
        _raise_amax(row, T_SECOND_AMAX, second_amax)
    if MASTER == "fp16p":
        _raise_amax(row, T_MASTER_AMAX, master_amax)
    if AMAX:
        tl.atomic_max(seen + N_WEIGHT, tl.max(tl.max(weight_amax, 1), 0))
    if WIRED:
        if wire != 0:
            _add_extremes(seen, tl.sum(tl.sum(hits, 1), 0))
    if ELEMENT:
        count = tl.sum(tl.sum(skips, 1), 0)
        if count > 0:
            tl.atomic_add(skipped, count.to(tl.int64))


@triton.jit
def _thread_max(bits, EACH: tl.constexpr):
    """The largest of what a thread holds side by side."""
    return tl.max(tl.reshape(bits, [bits.shape[0], bits.shape[1] // EACH, EACH]), 2)


@triton.jit
def _raise_amax(row, COLUMN: tl.constexpr, bits):
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(tl.int32))
    tl.atomic_max(pointer, tl.max(tl.max(bits, 1), 0))
