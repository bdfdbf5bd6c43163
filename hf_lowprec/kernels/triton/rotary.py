# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings: one launch for q and k, forward or backward.

A program turns one token of some heads of q and some of k: it reads the token's cosines and sines once, and each pair
(x1, x2) of a head's halves once, so that nothing but q, k and the results passes through memory. Any strides between
batches, tokens and heads. No fused multiply-add may be formed (launches say `enable_fp_fusion=False`): results have
the bits of torch's separate operators.

Needed bytes of n elements of q and k of b bytes: 2nb, and the table of cosines and sines.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowprec.kernels.triton.elementwise import stored
from hf_lowprec.kernels.triton.launch import Launcher, integer_key

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
MAX_BATCHES = 65535  # a grid's second dimension
# Pairs of a program; of a thread.
_PAIRS, _PER_THREAD = 4096, 16


@triton.jit
def _places(head, column, stride):
    """Offsets of [heads, columns] in one token."""
    return head[:, None].to(tl.int64) * stride + column[None, :]


@triton.jit
def _turned(x1, x2, c1, c2, s1, s2, MID: tl.constexpr, BACKWARD: tl.constexpr):
    """Both halves, float32; not yet rounded after the sum."""
    x1 = x1.to(tl.float32)
    x2 = x2.to(tl.float32)
    if BACKWARD:  # + 0.0: autograd, which adds zeros to the gradient of each half, never returns -0
        y1 = (stored(x1 * c1, MID) + stored(x2 * s2, MID)) + 0.0
        y2 = (stored(x2 * c2, MID) - stored(x1 * s1, MID)) + 0.0
    else:
        y1 = stored(x1 * c1, MID) - stored(x2 * s1, MID)
        y2 = stored(x2 * c2, MID) + stored(x1 * s2, MID)
    return y1, y2


@triton.jit
def _pass(x_ptr, y_ptr, head, there, x_stride, y_stride, WIDTH: tl.constexpr, SIZE: tl.constexpr,
          BEYOND: tl.constexpr, BACKWARD: tl.constexpr):  # fmt: skip
    """The columns that are not turned."""
    OUT: tl.constexpr = y_ptr.dtype.element_ty
    column = WIDTH + tl.arange(0, BEYOND)
    inside = there[:, None] & (column < SIZE)[None, :]
    x = tl.load(x_ptr + _places(head, column, x_stride), mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        x = stored(x, OUT) + 0.0
    tl.store(y_ptr + _places(head, column, y_stride), x.to(OUT), mask=inside)


@triton.jit
def _rotary_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    q_batch, q_token, q_head, k_batch, k_token, k_head,
    q_out_batch, q_out_token, q_out_head, k_out_batch, k_out_token, k_out_head,
    cos_batch, cos_token, sin_batch, sin_token,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, MID: tl.constexpr,
    BACKWARD: tl.constexpr, PARTS: tl.constexpr, Q_ROWS: tl.constexpr, K_ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BEYOND: tl.constexpr,
):  # fmt: skip
    """Token program_id(0) // PARTS of batch program_id(1): Q_ROWS of the heads of q, K_ROWS of those of k (K_HEADS 0:
    there is no k)."""
    HALF: tl.constexpr = WIDTH // 2
    part = tl.program_id(0) % PARTS
    token = (tl.program_id(0) // PARTS).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    narrow = column < HALF

    q_ptr += batch * q_batch + token * q_token
    q_out_ptr += batch * q_out_batch + token * q_out_token
    head = part * Q_ROWS + tl.arange(0, Q_ROWS)
    there = head < Q_HEADS
    inside = there[:, None] & narrow[None, :]
    place = q_ptr + _places(head, column, q_head)
    x1 = tl.load(place, mask=inside, other=0.0)
    x2 = tl.load(place + HALF, mask=inside, other=0.0)
    if K_HEADS > 0:  # asked for before anything waits
        k_ptr += batch * k_batch + token * k_token
        k_out_ptr += batch * k_out_batch + token * k_out_token
        k_number = part * K_ROWS + tl.arange(0, K_ROWS)
        k_there = k_number < K_HEADS
        k_inside = k_there[:, None] & narrow[None, :]
        k_place = k_ptr + _places(k_number, column, k_head)
        z1 = tl.load(k_place, mask=k_inside, other=0.0)
        z2 = tl.load(k_place + HALF, mask=k_inside, other=0.0)

    cos_ptr += batch * cos_batch + token * cos_token + column
    sin_ptr += batch * sin_batch + token * sin_token + column
    c1 = tl.load(cos_ptr, mask=narrow, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos_ptr + HALF, mask=narrow, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin_ptr, mask=narrow, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin_ptr + HALF, mask=narrow, other=0.0).to(tl.float32)[None, :]

    y1, y2 = _turned(x1, x2, c1, c2, s1, s2, MID, BACKWARD)
    out = q_out_ptr + _places(head, column, q_out_head)
    tl.store(out, y1.to(q_out_ptr.dtype.element_ty), mask=inside)
    tl.store(out + HALF, y2.to(q_out_ptr.dtype.element_ty), mask=inside)
    if K_HEADS > 0:
        y1, y2 = _turned(z1, z2, c1, c2, s1, s2, MID, BACKWARD)
        out = k_out_ptr + _places(k_number, column, k_out_head)
        tl.store(out, y1.to(k_out_ptr.dtype.element_ty), mask=k_inside)
        tl.store(out + HALF, y2.to(k_out_ptr.dtype.element_ty), mask=k_inside)
    if SIZE > WIDTH:
        _pass(q_ptr, q_out_ptr, head, there, q_head, q_out_head, WIDTH, SIZE, BEYOND, BACKWARD)
        if K_HEADS > 0:
            _pass(k_ptr, k_out_ptr, k_number, k_there, k_head, k_out_head, WIDTH, SIZE, BEYOND, BACKWARD)


class Launch(NamedTuple):
    """How a token is spread over programs: `parts` of them, each with q_rows and k_rows heads."""

    parts: int
    q_rows: int
    k_rows: int
    warps: int


@cache
def launch_for(q_heads: int, k_heads: int, width: int) -> Launch:
    block = triton.next_power_of_2(width // 2)
    parts = 1
    while True:
        q_rows, k_rows = (triton.next_power_of_2(max(1, -(-heads // parts))) for heads in (q_heads, k_heads))
        pairs = (q_rows + (k_rows if k_heads else 0)) * block
        if pairs <= _PAIRS or q_rows == k_rows == 1:
            break
        parts += 1
    warps = pairs // (32 * _PER_THREAD)
    return Launch(parts, q_rows, k_rows, max(1, min(8, 1 << max(0, warps.bit_length() - 1))))


_rotary = Launcher(_rotary_kernel)


class Laid(NamedTuple):
    """A tensor's strides between batches, tokens and heads."""

    batch: int
    token: int
    head: int


class Prepared(NamedTuple):
    """All of a launch that shapes, strides and dtypes decide."""

    number: int
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    warps: int


def prepare(
    batches: int,
    tokens: int,
    heads: tuple[int, int],
    size: int,
    width: int,
    strides: tuple[Laid, Laid, Laid, Laid],
    table: tuple[int, int, int, int],
    dtypes: tuple[torch.dtype, ...],
    mid: torch.dtype,
    backward: bool,
    launch: Launch | None = None,
) -> Prepared:
    """A launch for q and k with `heads` each (0 of k: there is none), `size` columns, the first `width` turned.

    strides: of q, k and their results. table: of cosines and of sines, between batches and tokens. dtypes: of q, cos
    and the results, part of the key. launch: for measurements.
    """
    launch = launch_for(*heads, width) if launch is None else launch
    integers = (*strides[0], *strides[1], *strides[2], *strides[3], *table)
    block, beyond = triton.next_power_of_2(width // 2), triton.next_power_of_2(max(1, size - width))
    constants = (*heads, size, width, _DTYPES[mid], backward, *launch[:3], block, beyond)
    key = (dtypes, tuple(integer_key(n) for n in integers), constants, launch.warps)
    grid = (tokens * launch.parts, batches, 1)
    return Prepared(_rotary.number(key), grid, (*integers, *constants), launch.warps)


def run(prepared: Prepared, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, k_out: Tensor) -> None:
    """Without a k, pass q and its result twice."""
    a, b, c, d = q.data_ptr() % 16, k.data_ptr() % 16, cos.data_ptr() % 16, sin.data_ptr() % 16
    aligned = not (a or b or c or d) or (not a, not b, not c, not d)
    _rotary(
        (prepared.number, aligned), q.get_device(), prepared.grid, (q, k, cos, sin, q_out, k_out, *prepared.args),
        num_warps=prepared.warps, enable_fp_fusion=False,
    )  # fmt: skip
