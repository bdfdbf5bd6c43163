# SPDX-License-Identifier: Apache-2.0
"""Before the step proper: the look at all gradients, and the scalars of every tensor.

No fused multiply-add may be formed here (launches say `enable_fp_fusion=False`), divisions and roots are IEEE's, and
maxima of several programs meet in integer atomics: there is nothing whose order could matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_lowprec.kernels.triton.codecs import from_float, mix
from hf_lowprec.kernels.triton.columns import (
    G_BETA1,
    G_BETA2,
    G_COLUMNS,
    G_COUPLED,
    G_DECAY,
    G_EPS,
    G_LR,
    G_LR_KIND,
    G_MAXIMIZE,
    G_NESTEROV,
    G_RATIO,
    LARGEST_SQUARE,
    N_AMAX,
    N_COLUMNS,
    N_FINITE,
    S_COLUMNS,
    S_CORRECTION,
    S_DECAY,
    S_EDITED,
    S_EPS,
    S_FIRST_OLD,
    S_FLOOR,
    S_GAIN,
    S_GAIN1,
    S_GAIN2,
    S_KEEP,
    S_KEYS,
    S_MASTER_OLD,
    S_NESTEROV,
    S_RATE,
    S_READ,
    S_SECOND_OLD,
    S_SHRINK,
    S_WIRE,
    S_WIRE_INVERSE,
    T_CHUNK,
    T_COLUMNS,
    T_FIRST_AMAX,
    T_FIRST_SCALE,
    T_FOLLOWS,
    T_GRAD_FORMAT,
    T_GROUP,
    T_INDEX,
    T_MASTER,
    T_MASTER_AMAX,
    T_MASTER_SCALE,
    T_NUMEL,
    T_SECOND_AMAX,
    T_SECOND_SCALE,
    T_STEP,
    chunk_of,
    left_of,
)
from hf_lowprec.kernels.triton.gradient_norm import in_pairs
from hf_lowprec.kernels.triton.sample import note_edited
from hf_lowprec.kernels.triton.wire import amax_through
from hf_lowprec.kernels.triton.words import bits_of, elements, float_of, load_words

# --- amax ------------------------------------------------------------------------------------------------------------


@triton.jit
def _amax_of(base, number, left, FORMAT: tl.constexpr, FAST: tl.constexpr, WIRED: tl.constexpr, NORM: tl.constexpr,
             CHUNK: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Bits of the largest magnitude of a chunk; if WIRED of the largest finite one; if NORM sums of squares."""
    BITS: tl.constexpr = 32 if FORMAT == "fp32" else 16
    EACH: tl.constexpr = 4 if FORMAT == "fp32" else 8
    largest = tl.zeros([1, TILE], dtype=tl.int32)
    finite = largest
    squares = tl.zeros([1, TILE], dtype=tl.float32)
    for tile in tl.range(0, tl.cdiv(left, TILE)):
        words = load_words(base, number * (CHUNK // TILE), tile, left, BITS, 1, TILE, EACH, FAST)
        values = from_float(elements(words, BITS, FAST), FORMAT)
        bits = bits_of(values) & 0x7FFFFFFF
        if NORM:
            squares += values * values
        largest = tl.maximum(largest, bits)
        if WIRED:
            finite = tl.maximum(finite, tl.where(bits < 0x7F800000, bits, 0))
    return tl.max(largest), tl.max(finite), squares


@triton.jit
def amax_kernel(
    chunks, table, grads, seen, scalars, sums, WIRED: tl.constexpr, SAMPLE: tl.constexpr, NORM: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Raises the amaxes of a tensor by one chunk of its gradient. WIRED: some gradients pass through a format. SAMPLE:
    some Parameters follow masters, and `scalars` get to know where somebody edited them. NORM: `sums` get the chunk's
    sum of squares, float32."""
    tensor, careful, number = chunk_of(chunks)
    row = table + tensor * T_COLUMNS
    left = left_of(row, number, CHUNK)
    base = tl.load(grads + tensor)
    kind = tl.load(row + T_GRAD_FORMAT)
    if careful:
        if kind == 0:
            largest, finite, squares = _amax_of(base, number, left, "fp32", False, WIRED, NORM, CHUNK, TILE)
        elif kind == 1:
            largest, finite, squares = _amax_of(base, number, left, "bf16", False, WIRED, NORM, CHUNK, TILE)
        else:
            largest, finite, squares = _amax_of(base, number, left, "fp16", False, WIRED, NORM, CHUNK, TILE)
    else:
        if kind == 0:
            largest, finite, squares = _amax_of(base, number, left, "fp32", True, WIRED, NORM, CHUNK, TILE)
        elif kind == 1:
            largest, finite, squares = _amax_of(base, number, left, "bf16", True, WIRED, NORM, CHUNK, TILE)
        else:
            largest, finite, squares = _amax_of(base, number, left, "fp16", True, WIRED, NORM, CHUNK, TILE)
    seen += tensor * N_COLUMNS
    tl.atomic_max(seen + N_AMAX, largest)
    if WIRED:
        tl.atomic_max(seen + N_FINITE, finite)
    if NORM:
        if left > 0:  # the chunk behind a tensor's last is another's
            tl.store(sums + tl.load(row + T_CHUNK) + number, in_pairs(tl.reshape(squares, [TILE])))
    if SAMPLE:
        note_edited(row, scalars + tensor * S_COLUMNS, number, left, CHUNK)


# --- scalars ---------------------------------------------------------------------------------------------------------


@triton.jit
def _power(beta, t):
    """beta^t, as `algorithms.power`."""
    result = tl.full(beta.shape, 1.0, tl.float64)
    for k in tl.static_range(31):
        result = tl.where((t >> k) & 1 == 1, result * beta, result)
        beta = beta * beta
    return result


@triton.jit
def _double(group, COLUMN: tl.constexpr, inside):
    return tl.load(group + COLUMN, mask=inside, other=0).to(tl.float64, bitcast=True)


@triton.jit
def _learning_rate(group, inside):
    kind = tl.load(group + G_LR_KIND, mask=inside, other=0)
    word = tl.load(group + G_LR, mask=inside, other=0)
    single = tl.load(word.to(tl.pointer_type(tl.float32)), mask=kind == 1, other=0.0).to(tl.float64)
    double = tl.load(word.to(tl.pointer_type(tl.float64)), mask=kind == 2, other=0.0)
    return tl.where(kind == 0, word.to(tl.float64, bitcast=True), tl.where(kind == 1, single, double))


@triton.jit
def _put(scalars, COLUMN: tl.constexpr, value, inside):
    tl.store(scalars + COLUMN, value.to(tl.float32).to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def _put_keys(scalars, PLACE: tl.constexpr, stream, index, step, inside):
    """`numerics.seed_keys` of `optim.slots.stream_seed`."""
    k0 = mix(step.to(tl.uint32) ^ 0x9E3779B9)
    k1 = mix((8 * index + stream).to(tl.uint32) ^ k0)
    tl.store(scalars + S_KEYS + 2 * PLACE, k0.to(tl.int32, bitcast=True), mask=inside)
    tl.store(scalars + S_KEYS + 2 * PLACE + 1, k1.to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def _old_scale(row, AMAX: tl.constexpr, SCALE: tl.constexpr, TINY: tl.constexpr, inside):
    """(whether the slot is predicted, its scale, `slots.stored_amax`)."""
    address = tl.load(row + AMAX, mask=inside, other=0)
    predicted = address != 0
    amax = tl.load(address.to(tl.pointer_type(tl.float32)), mask=predicted, other=0.0)
    scale_address = tl.load(row + SCALE, mask=predicted, other=0)
    scale = tl.load(scale_address.to(tl.pointer_type(tl.float32)), mask=predicted, other=1.0)
    return predicted, scale, tl.where(amax > 0, amax + scale * TINY, 0.0)


@triton.jit
def _put_scales(scalars, OLD: tl.constexpr, old, bound, row, AMAX: tl.constexpr, SCALE: tl.constexpr, stored,
                TOP_EXP: tl.constexpr, TOP_MAN: tl.constexpr, MARGIN: tl.constexpr, inside):  # fmt: skip
    """Notes the old scale and the one that follows from `bound` (rceil); where `stored`, makes it the slot's."""
    bits = bits_of(bound)
    exponent = (bits >> 23) - TOP_EXP + ((bits & 0x7FFFFF) > TOP_MAN).to(tl.int32) + MARGIN
    exponent = tl.minimum(tl.maximum(exponent, -126), 126)
    new = tl.where(bound > 0, float_of((exponent + 127) << 23), 1.0)
    new = tl.where(bound < float("inf"), new, float("nan"))
    _put(scalars, OLD, old, inside)
    _put(scalars, OLD + 1, new, inside)
    address = tl.load(row + SCALE, mask=stored, other=0)
    tl.store(address.to(tl.pointer_type(tl.float32)), new, mask=stored)
    address = tl.load(row + AMAX, mask=stored, other=0)
    tl.store(address.to(tl.pointer_type(tl.float32)), tl.zeros_like(new), mask=stored)


@triton.jit(do_not_specialize=["tensors", "trusted"])
def prepare_kernel(
    table, groups, seen, scalars, given, clip, finite_ptr, skipped, tensors, trusted,
    ALGORITHM: tl.constexpr, LOOK: tl.constexpr, CLIP: tl.constexpr, PREDICTED: tl.constexpr, WIRED: tl.constexpr,
    FOLLOWS: tl.constexpr, FIRST_STREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK tensors. LOOK: 0 `given` says whether the step is finite, 1 the amaxes say it, 2 it is but for `clip`.
    FOLLOWS: some Parameters follow masters; trusted: 0: the host knows that some were edited."""
    gain = tl.load(clip) if CLIP else 1.0
    if LOOK == 0:
        finite = tl.load(given).to(tl.int32) != 0
    else:
        largest = 0
        if LOOK == 1:
            SPAN: tl.constexpr = 256 if WIRED else 1024
            for start in tl.range(0, tensors, SPAN):
                i = start + tl.arange(0, SPAN)
                if WIRED:
                    some, _, _ = amax_through(table + i * T_COLUMNS, seen + i * N_COLUMNS, i < tensors)
                    bits = bits_of(some) & 0x7FFFFFFF
                else:
                    bits = tl.load(seen + i * N_COLUMNS + N_AMAX, mask=i < tensors, other=0)
                largest = tl.maximum(largest, tl.max(bits, 0))
        finite = largest < LARGEST_SQUARE
        if CLIP:
            finite = finite & (tl.abs(gain) < float("inf"))
        if tl.program_id(0) == 0:
            tl.store(skipped, tl.load(skipped) + tl.where(finite, 0, 1))
    if tl.program_id(0) == 0:
        tl.store(finite_ptr, finite.to(tl.int8))

    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < tensors
    row = table + i * T_COLUMNS
    out = scalars + i * S_COLUMNS
    group = groups + tl.load(row + T_GROUP, mask=inside, other=0) * G_COLUMNS
    index = tl.load(row + T_INDEX, mask=inside, other=0)
    step_ptr = tl.load(row + T_STEP, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask=inside, other=0.0) + 1.0
    t = step.to(tl.int64)

    lr = _learning_rate(group, inside)
    decay = _double(group, G_DECAY, inside)
    coupled = tl.load(group + G_COLUMNS * 0 + G_COUPLED, mask=inside, other=0) != 0
    beta1 = _double(group, G_BETA1, inside)
    beta2 = _double(group, G_BETA2, inside)
    eps = _double(group, G_EPS, inside)
    maximize = tl.load(group + G_MAXIMIZE, mask=inside, other=0) != 0
    _put(out, S_GAIN, tl.where(maximize, -gain, gain), inside)
    _put(out, S_EPS, eps, inside)
    coupled_decay = tl.where(coupled, decay, 0.0)
    _put(out, S_DECAY, coupled_decay, inside)
    shrink = tl.where(coupled, 1.0, 1.0 - lr * decay)
    rate = lr
    correction = tl.full(lr.shape, 1.0, tl.float64)
    if ALGORITHM == "adam":
        rate = lr / (1.0 - _power(beta1, t))
        correction = 1.0 / tl.sqrt(1.0 - _power(beta2, t))
    elif ALGORITHM == "stable_adam":
        beta1 = beta1 * (1.0 - _power(beta1, t - 1)) / (1.0 - _power(beta1, t))
        beta2 = beta2 * (1.0 - _power(beta2, t - 1)) / (1.0 - _power(beta2, t))
    keep, gain1, gain2 = beta2, 1.0 - beta1, 1.0 - beta2
    if ALGORITHM == "sgd":
        keep, gain1 = beta1, tl.where(t == 1, 1.0, 1.0 - beta2)
    _put(out, S_SHRINK, shrink, inside)
    _put(out, S_RATE, rate, inside)
    _put(out, S_CORRECTION, correction, inside)
    _put(out, S_KEEP, keep, inside)
    _put(out, S_GAIN1, gain1, inside)
    _put(out, S_GAIN2, gain2, inside)
    _put(out, S_FLOOR, eps * eps, inside)
    nesterov = tl.load(group + G_NESTEROV, mask=inside, other=0)
    _put(out, S_NESTEROV, nesterov, inside)
    master = tl.load(row + T_MASTER, mask=inside, other=0)
    _put_keys(out, 0, FIRST_STREAM, index, t, inside)
    _put_keys(out, 1, 1, index, t, inside)
    _put_keys(out, 2, tl.where(master != 0, 2, 3), index, t, inside)

    if FOLLOWS:
        edited = tl.load(out + S_EDITED, mask=inside, other=0)
        small = tl.load(row + T_FOLLOWS, mask=inside, other=0) == 0
        read = ((edited != 0) | small | (trusted == 0)).to(tl.int32)
        tl.store(out + S_READ, read, mask=inside)
        tl.store(out + S_EDITED, tl.where(finite, 0, read), mask=inside)  # a step that is skipped settles nothing
    if WIRED:
        g, wire_scale, wire_inverse = amax_through(row, seen + i * N_COLUMNS, inside)
        _put(out, S_WIRE, wire_scale, inside)
        _put(out, S_WIRE_INVERSE, wire_inverse, inside)
    if PREDICTED:
        if not WIRED:
            g = float_of(tl.load(seen + i * N_COLUMNS + N_AMAX, mask=inside, other=0))
        if CLIP:
            g = g * gain
        has_first, first_scale, first = _old_scale(row, T_FIRST_AMAX, T_FIRST_SCALE, 2.0**-9, inside)
        has_second, second_scale, second = _old_scale(row, T_SECOND_AMAX, T_SECOND_SCALE, 2.0**-24, inside)
        has_master, master_scale, weight = _old_scale(row, T_MASTER_AMAX, T_MASTER_SCALE, 2.0**-24, inside)
        g = tl.where(coupled_decay != 0, g + weight * coupled_decay.to(tl.float32), g)
        lr32, keep32, gain32 = lr.to(tl.float32), keep.to(tl.float32), gain1.to(tl.float32)
        if ALGORITHM == "lion":
            first = first * keep32 + g * gain2.to(tl.float32)
            update = lr32
        elif ALGORITHM == "sgd":
            first = first * keep32 + g * gain32
            direction = tl.where(nesterov != 0, first * keep32 + g, first)
            update = tl.where(keep32 != 0, direction, g) * lr32
        else:
            first = first * beta1.to(tl.float32) + g * gain32
            second = second * keep32 + (g * gain2.to(tl.float32)) * g
            update = lr32 * _double(group, G_RATIO, inside).to(tl.float32)
        _put_scales(out, S_FIRST_OLD, first_scale, first * 1.125, row, T_FIRST_AMAX, T_FIRST_SCALE,
                    has_first & finite, 135, 0x600000, 0, inside)  # fmt: skip
        _put_scales(out, S_SECOND_OLD, second_scale, second * 1.0009765625, row, T_SECOND_AMAX, T_SECOND_SCALE,
                    has_second & finite, 142, 0x7FE000, 0, inside)  # fmt: skip
        _put_scales(out, S_MASTER_OLD, master_scale, weight + update * 2.0, row, T_MASTER_AMAX, T_MASTER_SCALE,
                    has_master & finite, 142, 0x7FE000, 4, inside)  # fmt: skip
    tl.store(step_ptr, step, mask=inside & finite)


@triton.jit
def rate_kernel(table, groups, scalars, finite_ptr, sums, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """StableAdamW: eta = lr / max(1, RMS) of one tensor, from the sums of its chunks."""
    if tl.load(finite_ptr) == 0:
        return
    tensor = tl.program_id(0).to(tl.int64)
    row = table + tensor * T_COLUMNS
    scalars += tensor * S_COLUMNS
    group = groups + tl.load(row + T_GROUP) * G_COLUMNS
    numel = tl.load(row + T_NUMEL)
    chunks = (numel + CHUNK - 1) // CHUNK
    sums += tl.load(row + T_CHUNK)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for start in tl.range(0, chunks, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(sums + i, mask=i < chunks, other=0.0)
    root = tl.sqrt(tl.sum(total, 0) / tl.maximum(numel, 1).to(tl.float64))
    rate = (_learning_rate(group, True) / tl.where(root < 1.0, 1.0, root)).to(tl.float32)
    decay = tl.load(group + G_DECAY).to(tl.float64, bitcast=True).to(tl.float32)
    tl.store(scalars + S_RATE, bits_of(rate))
    tl.store(scalars + S_SHRINK, bits_of(1.0 - rate * decay))
