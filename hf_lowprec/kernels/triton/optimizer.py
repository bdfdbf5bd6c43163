# SPDX-License-Identifier: Apache-2.0
"""One optimizer step of all tensors of a device in a few launches: `optim.algorithms`, bit for bit.

    amax_kernel      largest |gradient| of every tensor                 only where somebody needs it
    prepare_kernel   is the step finite; scalars of every tensor; scales that are predicted; step += 1
    square_kernel    StableAdamW: sums of g^2 / max(v, eps^2), one per chunk
    rate_kernel      StableAdamW: learning rates from these sums, in a fixed order
    step_kernel      the step; one launch per kind of tensor (dtypes and states)

Tables in device memory say what there is to do, so that neither the number of tensors nor that of parameter groups
adds launches:

    chunks    int32 [chunks, 2]     2 * tensor + careful, and the number of the chunk in it; a program takes one.
                                    careful: addresses or lengths that `codecs` cannot move as words
    table     int64 [tensors, 16]   addresses and facts, see the names `T_...`
    grads     int64 [tensors]       addresses of the gradients, which change more often than the rest
    groups    int64 [groups, 16]    hyperparameters, most of them the bits of a float64, see `G_...`
    scalars   int32 [tensors, 32]   what `prepare_kernel` computes, most of it float32, see `S_...`

No fused multiply-add may be formed here (launches say `enable_fp_fusion=False`), divisions and roots are IEEE's, and
maxima of several programs meet in integer atomics: there is nothing whose order could matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_lowprec.kernels.triton.codecs import (
    bits_of,
    decode,
    elements,
    encode,
    float_of,
    from_float,
    inverse,
    load_scale,
    load_words,
    mix,
    new_scale,
    packed,
    store_scale,
    store_words,
    tile_words,
    to_float,
)
from hf_lowprec.kernels.triton.ptx import root_and_quotient

# columns of `table`
T_PARAM = tl.constexpr(0)
T_FIRST = tl.constexpr(1)  # codes of exp_avg or momentum_buffer
T_FIRST_SCALE = tl.constexpr(2)
T_SECOND = tl.constexpr(3)  # codes of exp_avg_sq
T_SECOND_SCALE = tl.constexpr(4)
T_MASTER = tl.constexpr(5)  # its codes, its float32 or its residual
T_NUMEL = tl.constexpr(6)
T_STEP = tl.constexpr(7)
T_GROUP = tl.constexpr(8)
T_INDEX = tl.constexpr(9)  # of the parameter, for seeds
T_FIRST_AMAX = tl.constexpr(10)  # addresses of predicted slots' amax; 0: the slot is not predicted
T_SECOND_AMAX = tl.constexpr(11)
T_MASTER_AMAX = tl.constexpr(12)
T_MASTER_SCALE = tl.constexpr(13)
T_GRAD_FORMAT = tl.constexpr(14)  # 0 fp32, 1 bf16, 2 fp16
T_CHUNK = tl.constexpr(15)  # place of the tensor's first chunk among the sums of `square_kernel`
T_COLUMNS = tl.constexpr(16)

# columns of `groups`
G_LR = tl.constexpr(0)  # a float64, or the address of a tensor
G_LR_KIND = tl.constexpr(1)  # 0 a float64, 1 a float32 tensor, 2 a float64 tensor
G_BETA1 = tl.constexpr(2)  # SGD: momentum
G_BETA2 = tl.constexpr(3)  # SGD: dampening
G_EPS = tl.constexpr(4)
G_DECAY = tl.constexpr(5)
G_COUPLED = tl.constexpr(6)  # whether the decay joins the gradient, as 0 or 1 (so are the next two)
G_MAXIMIZE = tl.constexpr(7)
G_NESTEROV = tl.constexpr(8)
G_RATIO = tl.constexpr(9)  # `algorithms.adam_ratio`
G_COLUMNS = tl.constexpr(16)

# columns of `scalars`
S_GAIN = tl.constexpr(0)  # the clipping factor, negative to maximize
S_SHRINK = tl.constexpr(1)  # factor of decoupled decay
S_RATE = tl.constexpr(2)  # Adam: lr / (1 - beta1^t); StableAdamW: eta; else lr
S_CORRECTION = tl.constexpr(3)  # Adam: 1 / sqrt(1 - beta2^t)
S_KEEP = tl.constexpr(4)  # beta2; SGD: momentum
S_GAIN1 = tl.constexpr(5)  # 1 - beta1; SGD: 1 - dampening
S_GAIN2 = tl.constexpr(6)  # 1 - beta2
S_EPS = tl.constexpr(7)
S_DECAY = tl.constexpr(8)  # coupled decay
S_NESTEROV = tl.constexpr(9)
S_FIRST_OLD = tl.constexpr(10)  # predicted scales: the one of the codes that are there, and of those to come
S_FIRST_NEW = tl.constexpr(11)
S_SECOND_OLD = tl.constexpr(12)
S_SECOND_NEW = tl.constexpr(13)
S_MASTER_OLD = tl.constexpr(14)
S_MASTER_NEW = tl.constexpr(15)
S_FLOOR = tl.constexpr(16)  # StableAdamW: eps^2
S_KEYS = tl.constexpr(24)  # pairs of hash keys: first moment, second moment, master or Parameter
S_COLUMNS = tl.constexpr(32)

_LARGEST_SQUARE = tl.constexpr(0x5F800000)  # bits of 2^64, whose square overflows


# --- what is known of a chunk ----------------------------------------------------------------------------------------


@triton.jit
def _chunk(chunks):
    """(row of the table, int64; careful; number of the chunk in its tensor, int64)."""
    entry = chunks + 2 * tl.program_id(0)
    word = tl.load(entry)
    return (word >> 1).to(tl.int64), word & 1, tl.load(entry + 1).to(tl.int64)


@triton.jit
def _left(row, number, CHUNK: tl.constexpr):
    """Elements of this chunk, int32."""
    left = tl.load(row + T_NUMEL) - number * CHUNK
    return tl.minimum(left, CHUNK).to(tl.int32)


# --- amax ------------------------------------------------------------------------------------------------------------


@triton.jit
def _amax_of(base, number, left, FORMAT: tl.constexpr, FAST: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """Bits of the largest magnitude of a chunk."""
    BITS: tl.constexpr = 32 if FORMAT == "fp32" else 16
    EACH: tl.constexpr = 4 if FORMAT == "fp32" else 8
    largest = tl.zeros([1, TILE], dtype=tl.int32)
    for tile in tl.range(0, tl.cdiv(left, TILE)):
        words = load_words(base, number * (CHUNK // TILE), tile, left, BITS, 1, TILE, EACH, FAST)
        raw = elements(words, BITS, FAST)
        largest = tl.maximum(largest, bits_of(from_float(raw, FORMAT)) & 0x7FFFFFFF)
    return tl.max(largest)


@triton.jit
def amax_kernel(chunks, table, grads, amaxes, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """Raises amaxes[tensor] (int32: float32 bits, so that NaN > Inf > numbers) by one chunk of its gradient."""
    tensor, careful, number = _chunk(chunks)
    row = table + tensor * T_COLUMNS
    left = _left(row, number, CHUNK)
    base = tl.load(grads + tensor)
    kind = tl.load(row + T_GRAD_FORMAT)
    if careful:
        if kind == 0:
            largest = _amax_of(base, number, left, "fp32", False, CHUNK, TILE)
        elif kind == 1:
            largest = _amax_of(base, number, left, "bf16", False, CHUNK, TILE)
        else:
            largest = _amax_of(base, number, left, "fp16", False, CHUNK, TILE)
    else:
        if kind == 0:
            largest = _amax_of(base, number, left, "fp32", True, CHUNK, TILE)
        elif kind == 1:
            largest = _amax_of(base, number, left, "bf16", True, CHUNK, TILE)
        else:
            largest = _amax_of(base, number, left, "fp16", True, CHUNK, TILE)
    tl.atomic_max(amaxes + tensor, largest)


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


@triton.jit(do_not_specialize=["tensors"])
def prepare_kernel(
    table, groups, amaxes, scalars, given, clip, finite_ptr, skipped, tensors,
    ALGORITHM: tl.constexpr, LOOK: tl.constexpr, CLIP: tl.constexpr, PREDICTED: tl.constexpr,
    FIRST_STREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK tensors. LOOK: 0 `given` says whether the step is finite, 1 the amaxes say it, 2 it is but for `clip`."""
    gain = tl.load(clip) if CLIP else 1.0
    if LOOK == 0:
        finite = tl.load(given).to(tl.int32) != 0
    else:
        largest = 0
        if LOOK == 1:
            for start in tl.range(0, tensors, 1024):
                i = start + tl.arange(0, 1024)
                largest = tl.maximum(largest, tl.max(tl.load(amaxes + i, mask=i < tensors, other=0), 0))
        finite = largest < _LARGEST_SQUARE
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

    if PREDICTED:
        g = float_of(tl.load(amaxes + i, mask=inside, other=0))
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


# --- the step --------------------------------------------------------------------------------------------------------


@triton.jit
def _scalar(scalars, COLUMN: tl.constexpr):
    return tl.load(scalars + COLUMN).to(tl.float32, bitcast=True)


@triton.jit
def _keys(scalars, PLACE: tl.constexpr):
    k0 = tl.load(scalars + S_KEYS + 2 * PLACE).to(tl.uint32, bitcast=True)
    return k0, tl.load(scalars + S_KEYS + 2 * PLACE + 1).to(tl.uint32, bitcast=True)


@triton.jit
def _load_moment(base, scale_base, first, tile, left, CODEC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                 EACH: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """(words, scales of the blocks) of a moment in this tile, for `_moment`."""
    WIDE: tl.constexpr = 32 if CODEC == "fp32" else 16 if CODEC == "bf16" or CODEC == "fp16p" else 8
    BITS: tl.constexpr = 4 if CODEC == "dynamic4" or CODEC == "e3m1u" else WIDE
    # The code of 0 in the signed dynamic trees: what lies beyond the end must not count in its block.
    ZERO: tl.constexpr = 127 if CODEC == "dynamic8" else 7 if CODEC == "dynamic4" else 0
    words = load_words(base, first, tile, left, BITS, ROWS, BLOCK, EACH, FAST, ZERO)
    if CODEC == "fp32" or CODEC == "bf16" or CODEC == "e4m3p" or CODEC == "fp16p":
        scale = 1.0
    else:
        HALF: tl.constexpr = CODEC == "softsign8" or CODEC == "sqrt8"
        scale = load_scale(scale_base, first, tile, left, HALF, ROWS, BLOCK)
    return words, scale


@triton.jit
def _moment(words, scale, old_scale, tables, beyond, CODEC: tl.constexpr, FAST: tl.constexpr):
    """float32 [ROWS, BLOCK]; old_scale: the predicted one; beyond: which elements lie beyond the end."""
    WIDE: tl.constexpr = 32 if CODEC == "fp32" else 16 if CODEC == "bf16" or CODEC == "fp16p" else 8
    BITS: tl.constexpr = 4 if CODEC == "dynamic4" or CODEC == "e3m1u" else WIDE
    raw = elements(words, BITS, FAST)
    if CODEC == "e4m3p" or CODEC == "fp16p":
        scale = old_scale
    x = decode(raw, scale, tables, CODEC)
    if BITS == 4 and not FAST:
        x = tl.where(beyond, 0.0, x)
    return x


@triton.jit
def _store_moment(base, scale_base, factor, tables, first, tile, left, x, words, beyond, CODEC: tl.constexpr,
                  EACH: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """factor: the inverse of a predicted scale; blocks compute their own."""
    WIDE: tl.constexpr = 32 if CODEC == "fp32" else 16 if CODEC == "bf16" or CODEC == "fp16p" else 8
    BITS: tl.constexpr = 4 if CODEC == "dynamic4" or CODEC == "e3m1u" else WIDE
    if CODEC != "fp32" and CODEC != "bf16" and CODEC != "e4m3p" and CODEC != "fp16p":
        scale = new_scale(x, CODEC)
        factor = inverse(scale)
        HALF: tl.constexpr = CODEC == "softsign8" or CODEC == "sqrt8"
        store_scale(scale_base, first, tile, left, scale, HALF, x.shape[1], EACH)
    raw = encode(x, factor, words, tables, beyond, CODEC, FAST)
    store_words(base, first, tile, left, raw, BITS, x.shape[0], x.shape[1], EACH, FAST)


@triton.jit
def _cast(x, FORMAT: tl.constexpr):
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
    both = tl.minimum((bits & 0x7FFFFFFF) + half, 0x7F7FFFFF) | (bits & -0x80000000)
    return tl.where(tl.abs(x) < float("inf"), both, (bits & -0x10000) | 0x8000)


@triton.jit
def _load_weight(param_base, master_base, first, tile, left, PARAM: tl.constexpr, MASTER: tl.constexpr,
                 ROWS: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """(words of the Parameter, of its master or residual), for `_weight`."""
    param = load_words(param_base, first, tile, left, 32 if PARAM == "fp32" else 16, ROWS, BLOCK, EACH, FAST)
    master = param
    if MASTER != "none":
        HALF: tl.constexpr = 16 if MASTER == "fp16p" or MASTER == "residual16" else 8
        master = load_words(master_base, first, tile, left, 32 if MASTER == "fp32" else HALF, ROWS, BLOCK, EACH, FAST)
    return param, master


@triton.jit
def _weight(param_words, master_words, old_scale, PARAM: tl.constexpr, MASTER: tl.constexpr, FAST: tl.constexpr):
    """`weights.read_weight`."""
    raw = elements(param_words, 32 if PARAM == "fp32" else 16, FAST)
    param = from_float(raw, PARAM)
    if MASTER == "none":
        return param
    elif MASTER == "residual8" or MASTER == "residual8s" or MASTER == "residual16":
        WIDTH: tl.constexpr = 16 if MASTER == "residual16" else 8
        low = (elements(master_words, WIDTH, FAST) << (32 - WIDTH)) >> 16
        high = raw << 16
        magnitude = high & 0x7FFF0000
        edited = ((magnitude == 0) & (low < 0)) | (magnitude >= 0x7F800000)  # to 0, Inf or NaN: `residual.join`
        return float_of(high + tl.where(edited, 0, low))
    else:
        raw = elements(master_words, 32 if MASTER == "fp32" else 16, FAST)
        master = from_float(raw, "fp32") if MASTER == "fp32" else from_float(raw, "fp16") * old_scale
        # Where somebody edited the Parameter, it wins.
        return tl.where(from_float(_cast(master, PARAM), PARAM) == param, master, param)


@triton.jit
def _store_weight(param_base, master_base, factor, new_scale, first, tile, left, w, words, PARAM: tl.constexpr,
                  MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, EACH: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """`weights.write_weight`; factor: the inverse of the predicted scale `new_scale`."""
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
        store_words(master_base, first, tile, left, low, WIDTH, ROWS, BLOCK, EACH, FAST)
    elif MASTER == "fp32":
        store_words(master_base, first, tile, left, bits_of(w), 32, ROWS, BLOCK, EACH, FAST)
        raw = _cast(w, PARAM)
    else:
        tl.static_assert(MASTER == "fp16p")
        code = to_float(w * factor, words, "fp16", True)
        store_words(master_base, first, tile, left, packed(code, "plain", 16, FAST), 16, ROWS, BLOCK, EACH, FAST)
        raw = _cast(from_float(code, "fp16") * new_scale, PARAM)
    store_words(param_base, first, tile, left, packed(raw, SHAPE, WIDE, FAST), WIDE, ROWS, BLOCK, EACH, FAST)


@triton.jit
def _square(g):
    """Whether g and its square are finite."""
    return (bits_of(g) & 0x7FFFFFFF) < _LARGEST_SQUARE


@triton.jit
def square_kernel(
    chunks, table, grads, scalars, finite_ptr, decode_ptr, sums,
    GRAD: tl.constexpr, SECOND: tl.constexpr, ELEMENT: tl.constexpr, FAST: tl.constexpr, EACH: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """StableAdamW: sums[chunk] = float64 sum of g^2 / max(v, eps^2) over one chunk, v that of this step."""
    if tl.load(finite_ptr) == 0:
        return
    tensor, _careful, number = _chunk(chunks)
    row = table + tensor * T_COLUMNS
    scalars += tensor * S_COLUMNS
    left = _left(row, number, CHUNK)
    if FAST:
        left = tl.multiple_of(left, 8)
    grad_base = tl.load(grads + tensor)
    base = tl.load(row + T_SECOND)
    scale_base = tl.load(row + T_SECOND_SCALE)
    gain, keep, gain2 = _scalar(scalars, S_GAIN), _scalar(scalars, S_KEEP), _scalar(scalars, S_GAIN2)
    floor, old_scale = _scalar(scalars, S_FLOOR), _scalar(scalars, S_SECOND_OLD)
    ROWS: tl.constexpr = TILE // BLOCK
    inside = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    begin = number * (CHUNK // TILE)
    total = tl.zeros([], dtype=tl.float64)
    GRAD_BITS: tl.constexpr = 32 if GRAD == "fp32" else 16
    for tile in tl.range(0, tl.cdiv(left, TILE), num_stages=STAGES):
        words = load_words(grad_base, begin, tile, left, GRAD_BITS, ROWS, BLOCK, EACH, FAST)
        codes, scale = _load_moment(base, scale_base, begin, tile, left, SECOND, ROWS, BLOCK, EACH, FAST)
        beyond = tile * TILE + inside >= left
        g = from_float(elements(words, GRAD_BITS, FAST), GRAD)
        if ELEMENT:
            g = tl.where(_square(g), g, 0.0)
        g = g * gain
        v = _moment(codes, scale, old_scale, decode_ptr, beyond, SECOND, FAST)
        v = v * keep + (g * gain2) * g
        ratio = tl.div_rn(g * g, tl.maximum(v, floor))
        ratio = tl.where(beyond, 0.0, ratio)  # with eps = 0 it is 0 / 0 there
        total += tl.sum(tl.sum(ratio.to(tl.float64), 1), 0)
    tl.store(sums + tl.load(row + T_CHUNK) + number, total)


@triton.jit
def step_kernel(
    chunks, table, grads, scalars, finite_ptr, decode_ptr, encode_ptr, skipped,
    ALGORITHM: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, COUPLED: tl.constexpr, ELEMENT: tl.constexpr,
    QUICK: tl.constexpr, FAST: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One chunk. FIRST, SECOND: codecs of the moments, "none" for those that the algorithm lacks; MASTER: "none",
    "fp32", "fp16p", "residual8" (nearest), "residual8s" (stochastic), "residual16". COUPLED: some groups' decay joins
    the gradient. ELEMENT: elements whose gradient is not finite stay as they are. QUICK: see `root_and_quotient`.
    """
    if tl.load(finite_ptr) == 0:
        return
    tensor, _careful, number = _chunk(chunks)
    row = table + tensor * T_COLUMNS
    scalars += tensor * S_COLUMNS
    left = _left(row, number, CHUNK)
    if FAST:
        left = tl.multiple_of(left, 8)
    param_base = tl.load(row + T_PARAM)
    grad_base = tl.load(grads + tensor)
    first_base = tl.load(row + T_FIRST)
    first_scale_base = tl.load(row + T_FIRST_SCALE)
    second_base = tl.load(row + T_SECOND)
    second_scale_base = tl.load(row + T_SECOND_SCALE)
    master_base = tl.load(row + T_MASTER)

    gain = _scalar(scalars, S_GAIN)
    shrink = _scalar(scalars, S_SHRINK)
    rate = _scalar(scalars, S_RATE)
    correction = _scalar(scalars, S_CORRECTION)
    keep = _scalar(scalars, S_KEEP)
    gain1 = _scalar(scalars, S_GAIN1)
    gain2 = _scalar(scalars, S_GAIN2)
    eps = _scalar(scalars, S_EPS)
    decay = _scalar(scalars, S_DECAY)
    nesterov = _scalar(scalars, S_NESTEROV)
    first_old, first_new = _scalar(scalars, S_FIRST_OLD), _scalar(scalars, S_FIRST_NEW)
    second_old, second_new = _scalar(scalars, S_SECOND_OLD), _scalar(scalars, S_SECOND_NEW)
    master_old, master_new = _scalar(scalars, S_MASTER_OLD), _scalar(scalars, S_MASTER_NEW)
    first_k0, first_k1 = _keys(scalars, 0)
    second_k0, second_k1 = _keys(scalars, 1)
    weight_k0, weight_k1 = _keys(scalars, 2)
    first_factor, second_factor, master_factor = inverse(first_new), inverse(second_new), inverse(master_new)

    GRAD_BITS: tl.constexpr = 32 if GRAD == "fp32" else 16
    ROWS: tl.constexpr = TILE // BLOCK
    inside = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    begin = number * (CHUNK // TILE)  # the number of the first tile
    first_amax = tl.zeros([ROWS, BLOCK // EACH], dtype=tl.int32)
    second_amax = first_amax
    master_amax = first_amax
    skips = first_amax
    for tile in tl.range(0, tl.cdiv(left, TILE), num_stages=STAGES):
        words = load_words(grad_base, begin, tile, left, GRAD_BITS, ROWS, BLOCK, EACH, FAST)
        if SECOND != "none":
            second_words, second_scale = _load_moment(second_base, second_scale_base, begin, tile, left, SECOND, ROWS,
                                                      BLOCK, EACH, FAST)  # fmt: skip
        if FIRST != "none":
            first_words, first_scale = _load_moment(first_base, first_scale_base, begin, tile, left, FIRST, ROWS,
                                                    BLOCK, EACH, FAST)  # fmt: skip
        param_words, master_words = _load_weight(param_base, master_base, begin, tile, left, PARAM, MASTER, ROWS,
                                                 BLOCK, EACH, FAST)  # fmt: skip

        # The second moment from its codes to its codes, then the first: fewer values are alive at a time.
        start = (begin + tile) * TILE
        beyond = tile * TILE + inside >= left
        g = from_float(elements(words, GRAD_BITS, FAST), GRAD)
        if ELEMENT:
            good = _square(g)
            skips += tl.sum(tl.reshape((good == 0).to(tl.int32), [ROWS, BLOCK // EACH, EACH]), 2)
        g = g * gain
        if COUPLED:
            w = _weight(param_words, master_words, master_old, PARAM, MASTER, FAST)
            g = tl.where(decay != 0, w * decay + g, g)
        if ELEMENT:
            g = tl.where(good, g, 0.0)
        if SECOND != "none":
            v = _moment(second_words, second_scale, second_old, decode_ptr, beyond, SECOND, FAST)
            # Where a gradient is not finite, factors of 1 and sums of 0 keep what there is, to the last bit.
            v = v * (tl.where(good, keep, 1.0) if ELEMENT else keep) + (g * gain2) * g
            if SECOND != "sqrt8":  # whose codes come from the root
                words = 0
                if SECOND == "bf16" or SECOND == "e4m3n" or SECOND == "e3m1u":
                    words = tile_words(second_k0, second_k1, start, inside)
                _store_moment(second_base, second_scale_base, second_factor, encode_ptr, begin, tile, left, v, words,
                              beyond, SECOND, EACH, FAST)  # fmt: skip
                if SECOND == "fp16p":
                    second_amax = tl.maximum(second_amax, _thread_max(bits_of(v), EACH))

        if FIRST != "none":
            m = _moment(first_words, first_scale, first_old, decode_ptr, beyond, FIRST, FAST)
        w = _weight(param_words, master_words, master_old, PARAM, MASTER, FAST)
        if SECOND != "none":
            change = (g - m) * gain1
            m = m + (tl.where(good, change, -0.0) if ELEMENT else change)
            root, change = root_and_quotient(m * rate, v, correction, eps, QUICK)
            w = w * (tl.where(good, shrink, 1.0) if ELEMENT else shrink)
            w = w - (tl.where(good, change, 0.0) if ELEMENT else change)
            if SECOND == "sqrt8":
                words = tile_words(second_k0, second_k1, start, inside)
                _store_moment(second_base, second_scale_base, second_factor, encode_ptr, begin, tile, left, root,
                              words, beyond, SECOND, EACH, FAST)  # fmt: skip
        elif ALGORITHM == "lion":
            old_m, old_w = m, w
            difference = g - m
            direction = m + difference * gain1
            m = m + difference * gain2
            w = w * shrink
            w = w - tl.where(direction > 0, rate, tl.where(direction < 0, -rate, 0.0))
            if ELEMENT:
                m = tl.where(good, m, old_m)
                w = tl.where(good, w, old_w)
        else:
            tl.static_assert(ALGORITHM == "sgd")
            old_w = w
            if FIRST != "none":
                old_m = m
                m = m * keep + g * gain1
                g = tl.where(nesterov != 0, m * keep + g, m)
                if ELEMENT:
                    m = tl.where(good, m, old_m)
            w = w - g * rate
            if ELEMENT:
                w = tl.where(good, w, old_w)
        words = 0
        if STOCHASTIC or MASTER == "fp16p" or MASTER == "residual8s":
            words = tile_words(weight_k0, weight_k1, start, inside)
        _store_weight(param_base, master_base, master_factor, master_new, begin, tile, left, w, words, PARAM, MASTER,
                      STOCHASTIC, EACH, FAST)  # fmt: skip
        if MASTER == "fp16p":  # beyond the end it may be 0 / 0
            magnitude = bits_of(w) & 0x7FFFFFFF
            if not FAST:
                magnitude = tl.where(beyond, 0, magnitude)
            magnitude = _thread_max(magnitude, EACH)
            if FAST:  # the end does not divide what a thread holds side by side
                magnitude = tl.where(_thread_max(beyond.to(tl.int32), EACH) > 0, 0, magnitude)
            master_amax = tl.maximum(master_amax, magnitude)
        if FIRST != "none":
            words = 0
            if FIRST == "bf16" or FIRST == "e4m3p":
                words = tile_words(first_k0, first_k1, start, inside)
            _store_moment(first_base, first_scale_base, first_factor, encode_ptr, begin, tile, left, m, words,
                          beyond, FIRST, EACH, FAST)  # fmt: skip
            if FIRST == "e4m3p":
                first_amax = tl.maximum(first_amax, _thread_max(bits_of(m) & 0x7FFFFFFF, EACH))

    if FIRST == "e4m3p":
        _raise_amax(row, T_FIRST_AMAX, first_amax)
    if SECOND == "fp16p":
        _raise_amax(row, T_SECOND_AMAX, second_amax)
    if MASTER == "fp16p":
        _raise_amax(row, T_MASTER_AMAX, master_amax)
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
