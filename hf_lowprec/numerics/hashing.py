# SPDX-License-Identifier: Apache-2.0
"""Random words for stochastic rounding: a hash of (seed, index), the same bits on every device and in every order.

    mix(h):  h ^= h >> 16;  h *= 0x7feb352d;  h ^= h >> 15;  h *= 0x846ca68b;  h ^= h >> 16      (lowbias32, mod 2^32)
    k0 = mix(low32(seed) ^ 0x9e3779b9)
    k1 = mix(high32(seed) ^ k0)
    word(seed, i) = mix with k1 injected:
        h = low32(i) ^ k0;  h ^= h >> 16;  h *= 0x7feb352d
        h ^= k1 ^ mix(high32(i));  h ^= h >> 15;  h *= 0x846ca68b;  h ^= h >> 16

lowbias32 is Chris Wellons' two-multiply 32-bit mixer. With a single key before it, two seeds would give the same words
in another order; the second key after the first multiplication breaks that. mix(0) is 0, so tensors of fewer than
2^32 elements pay nothing for the high half of the index. The words are keyed by the logical position of an element,
never by launch order, so tiling and chunking do not change a result.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_M0, _M1 = 0x7FEB352D, 0x846CA68B

IntOrTensor = TypeVar("IntOrTensor", int, Tensor)


def _mix(h: IntOrTensor) -> IntOrTensor:
    """lowbias32 of a Python int or an int64 tensor that holds 32 unsigned bits."""
    h = h ^ (h >> 16)
    h = (h * _M0) & _LOW
    h = h ^ (h >> 15)
    h = (h * _M1) & _LOW
    return h ^ (h >> 16)


def seed_keys(seed: IntOrTensor) -> tuple[IntOrTensor, IntOrTensor]:
    """(k0, k1) of a 64-bit seed: Python ints of 32 bits, or int64 tensors that hold them (no host synchronisation)."""
    k0 = _mix((seed & _LOW) ^ _GOLDEN)
    return k0, _mix(((seed >> 32) & _LOW) ^ k0)


def _signed(word: int | Tensor) -> int | Tensor:
    """32 unsigned bits as int32."""
    if isinstance(word, Tensor):
        return word.to(torch.int32)
    return word - (1 << 32) if word >> 31 else word


def folded(n: int) -> Tensor:
    """int32 i ^ (i >> 16) for i = 0 to n - 1: how `counter_hash` begins, but for an xor, with which this commutes."""
    counts = torch.arange(n, dtype=torch.int32)
    return counts ^ (counts >> 16)


def counter_hash(
    seed: int | Tensor,
    index: int | Tensor,
    *,
    start: int | Tensor = 0,
    device: torch.device | str | None = None,
    buffers: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """One 32-bit word per index; see the module docstring for the formula.

    seed: an int of up to 64 bits, or a 0-dim int64 tensor.
    index: an int64 tensor of indices, or a count n for the indices `start` to `start + n - 1` on `device`.
    start: an int, or a 0-dim int64 tensor that has the same high 32 bits as the last index.
    buffers: int32 [n], for a count on the CPU: the first is filled and returned, the second overwritten, the third is
        `folded(n)`.

    Returns: int32 of the shape of `index` (or [n]); its 32 bits are the word.
    """
    if isinstance(seed, Tensor) and seed.device.type == "cpu" and not torch.compiler.is_compiling():
        seed = int(seed)  # free there, and the keys then cost no tensor operations
    shifted: Tensor | None = None
    begun = False
    k0, k1 = seed_keys(seed) if isinstance(seed, Tensor) else seed_keys(int(seed))
    if isinstance(index, Tensor):
        low, high = index.to(torch.int64), index >> 32
        h = low.to(torch.int32)
        late: int | Tensor = _mix(high & _LOW) ^ k1
    elif isinstance(start, Tensor):
        h = torch.arange(index, dtype=torch.int32, device=start.device) + start.to(torch.int32)
        late = _mix((start >> 32) & _LOW) ^ k1
    elif start >> 32 == (start + max(index, 1) - 1) >> 32:
        first = start & _LOW
        if buffers is not None and not first & ((1 << (index - 1).bit_length()) - 1):  # then start + i = start ^ i
            key = first ^ int(k0)
            h, shifted = torch.bitwise_xor(buffers[2], _signed(key ^ key >> 16), out=buffers[0]), buffers[1]
            begun = True
        else:
            begin = _signed(first)
            assert isinstance(begin, int)
            out = None if buffers is None else buffers[0]
            h = torch.arange(begin, begin + index, dtype=torch.int32, device=device, out=out)
        late = _mix(start >> 32) ^ k1
    else:
        words = counter_hash(seed, torch.arange(start, start + index, device=device))
        return words if buffers is None else buffers[0].copy_(words)
    # Shifts of int32 are arithmetic; the masks make them logical.
    if not begun:
        h ^= _signed(k0)
        h ^= torch.bitwise_right_shift(h, 16, out=shifted).bitwise_and_(0xFFFF)
    h *= _M0
    h ^= _signed(late)
    h ^= torch.bitwise_right_shift(h, 15, out=shifted).bitwise_and_(0x1FFFF)
    h *= _M1 - (1 << 32)
    h ^= torch.bitwise_right_shift(h, 16, out=shifted).bitwise_and_(0xFFFF)
    return h


def step_keys(seed: int | Tensor, steps: Tensor) -> Tensor:
    """int32 of the shape of `steps` (int64): what `stream_words` needs of each step."""
    k0, _ = _keys(seed)
    h = ((steps & _LOW) ^ k0).to(torch.int32)
    h ^= (h >> 16).bitwise_and_(0xFFFF)
    return h.mul_(_M0)


def stream_keys(seed: int | Tensor, streams: Tensor) -> Tensor:
    """int32 of the shape of `streams` (int64): what `stream_words` needs of each stream."""
    _, k1 = _keys(seed)
    return (_mix(streams & _LOW) ^ k1).to(torch.int32)


def stream_words(
    streams: Tensor, step: Tensor | int, bits: int, buffers: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The low `bits` of `counter_hash(seed, stream << 32 | step)`: many streams, of which each gives a word per step.

    streams: of `stream_keys`. step: of `step_keys`, a number or a tensor that broadcasts against them. buffers: int32
    of the result's shape; the first is returned.
    """
    h, shifted = buffers if buffers is not None else (None, None)
    h = torch.bitwise_xor(streams, step, out=h)
    h ^= torch.bitwise_right_shift(h, 15, out=shifted).bitwise_and_(0x1FFFF)
    h *= _M1 - (1 << 32)
    shifted = torch.bitwise_right_shift(h, 16, out=shifted)
    if bits > 16:  # the shift is arithmetic: above 16 bits it has brought copies of the sign
        shifted &= 0xFFFF
    h ^= shifted
    return h.bitwise_and_((1 << bits) - 1) if bits < 32 else h


def _keys(seed: int | Tensor) -> tuple[int | Tensor, int | Tensor]:
    if isinstance(seed, Tensor) and seed.device.type == "cpu" and not torch.compiler.is_compiling():
        seed = int(seed)
    return seed_keys(seed) if isinstance(seed, Tensor) else seed_keys(int(seed))
