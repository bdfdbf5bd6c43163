# SPDX-License-Identifier: Apache-2.0
"""The tables in device memory that say what the kernels of an optimizer step have to do.

    chunks    int32 [chunks, 2]     2 * tensor + careful, and the number of the chunk in it; a program takes one.
                                    careful: addresses or lengths that `codecs` cannot move as words
    table     int64 [tensors, 25]   addresses and facts, see the names `T_...`
    grads     int64 [tensors]       addresses of the gradients, which change more often than the rest
    groups    int64 [groups, 16]    hyperparameters, most of them the bits of a float64, see `G_...`
    scalars   int32 [tensors, 32]   what `prepare_kernel` computes, most of it float32, see `S_...`
    seen      int32 [tensors, 4]    what the kernels saw of each tensor, see `N_...`; zero before the step

With them neither the number of tensors nor that of parameter groups adds launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
# How the gradient passes through the format of communication (`kernels.wires.Wire`)
T_WIRE_K = tl.constexpr(16)  # addresses in the quantizer's state; 0: its mu is 1
T_WIRE_SATURATED = tl.constexpr(17)
T_WIRE_COUNT = tl.constexpr(18)  # 0: this gradient passes as it is
T_WIRE_MU = tl.constexpr(19)  # address of 2^(r / growth) for r = 0, 1, ...
T_WIRE_GROWTH = tl.constexpr(20)
T_WIRE_UPPER = tl.constexpr(21)
T_WIRE_LIMIT = tl.constexpr(22)  # bits of a float32: more saturated codes than that halve mu
T_START = tl.constexpr(23)  # of a shard: its first element's number in the whole tensor
# Whether a separate master alone says what the Parameter holds, unless somebody edited it, and how: 0 no, or so few
# elements that they are always looked at; else 1 + (float16 Parameter) + 2 * (scaled float16 master)
T_FOLLOWS = tl.constexpr(24)
T_COLUMNS = tl.constexpr(25)

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
S_WIRE = tl.constexpr(17)  # the scale of the gradient's codes and its inverse; 0: the gradient passes as it is
S_WIRE_INVERSE = tl.constexpr(18)
S_EDITED = tl.constexpr(19)  # kept from step to step: whether the Parameter may be another than its master's cast
S_READ = tl.constexpr(20)  # whether this step reads a Parameter that follows a master
S_KEYS = tl.constexpr(24)  # pairs of hash keys: first moment, second moment, master or Parameter
S_COLUMNS = tl.constexpr(32)

# columns of `seen`
N_AMAX = tl.constexpr(0)  # float32 bits of the gradient's largest magnitude: NaN > Inf > numbers
N_FINITE = tl.constexpr(1)  # of its largest finite one, where it passes through a format
N_EXTREMES = tl.constexpr(2)  # how many of its codes are the format's largest
N_WEIGHT = tl.constexpr(3)  # float32 bits of the largest finite magnitude in the new Parameter, where asked for
N_COLUMNS = tl.constexpr(4)

LARGEST_SQUARE = tl.constexpr(0x5F800000)  # bits of 2^64, whose square overflows


# --- what is known of a chunk ----------------------------------------------------------------------------------------


@triton.jit
def chunk_of(chunks):
    """(row of the table, int64; careful; number of the chunk in its tensor, int64)."""
    entry = chunks + 2 * tl.program_id(0)
    word = tl.load(entry)
    return (word >> 1).to(tl.int64), word & 1, tl.load(entry + 1).to(tl.int64)


@triton.jit
def left_of(row, number, CHUNK: tl.constexpr):
    """Elements of this chunk, int32."""
    left = tl.load(row + T_NUMEL) - number * CHUNK
    return tl.minimum(left, CHUNK).to(tl.int32)


@triton.jit
def scalar_of(scalars, COLUMN: tl.constexpr):
    return tl.load(scalars + COLUMN).to(tl.float32, bitcast=True)


@triton.jit
def keys_of(scalars, PLACE: tl.constexpr):
    k0 = tl.load(scalars + S_KEYS + 2 * PLACE).to(tl.uint32, bitcast=True)
    return k0, tl.load(scalars + S_KEYS + 2 * PLACE + 1).to(tl.uint32, bitcast=True)
