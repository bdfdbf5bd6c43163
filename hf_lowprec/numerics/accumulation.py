# SPDX-License-Identifier: Apache-2.0
"""Matrix products whose sums are narrower than float32: the specification that the kernel imitates bit for bit.

Products of two low-precision values are exact in float32 (`recipe.Gemm` refuses operands where they are not). They are
added one after the other, and every addition rounds:

    s = 0
    for k = 0, 1, ... K - 1:    s = round(fl32(s + a_k * b_k))

In chunks of CL products (Wang et al. 2018, arXiv 1812.08011, section 3.1) the inner sum starts anew, and the sums of
chunks add up in the format `outer`, each addition rounding likewise (float32 by itself):

    S = 0
    for every chunk:   s = 0;  for k in chunk: s = round(fl32(s + a_k * b_k));  S = round_outer(fl32(S + s))

`round` is `round_to_format`, so that a sum which leaves the format saturates and one that falls below a format without
subnormals is zero. Rounding the float32 sum is rounding the exact one: for nearest rounding to m mantissa bits, twice
is harmless as long as 24 >= 2 (m + 1) + 2 (m <= 10: E6M9, E6M5, float16); wider formats are defined by these formulas.
Stochastic rounding adds r random bits right below the last kept one and drops the rest, which is what the lazy adder
of arXiv 2404.14010 does; the tail below the r bits is cut.

The random word of an addition depends on where it stands, never on when it runs: `counter_hash(seed, i << 32 | step)`,
i the output's index in row-major order and step k for the product k, 2^31 + c for the sum of chunk c. Zeros that pad K
add nothing and consume nothing.

Stated results. A sum of zero is +0. An operand that is Inf or NaN makes NaN of all sums that it enters, and of no
other. No products (K = 0) sum to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowprec.formats import Format, get_sum_format
from hf_lowprec.numerics.codes import F32, random_bits
from hf_lowprec.numerics.hashing import step_keys, stream_keys, stream_words
from hf_lowprec.numerics.rounding import magic_fits, rounder
from hf_lowprec.recipe import Accumulation, Rounding

# Sums that are worked on at once: with their scratch they stay in a core's second-level cache, and are so many that
# Python's calls do not count.
_AT_ONCE = 1 << 15
CHUNK_SUMS = 1 << 31  # steps from here on are the sums of chunks

# round(sums, words, scratch): float32 sums, rounded in place; words: masked random bits; scratch: int32 like the sums.
_Round = Callable[[Tensor, Tensor | None, Tensor], None]


def accumulate(a: Tensor, b: Tensor, accumulation: Accumulation, *, seed: int | Tensor | None = None) -> Tensor:
    """`a @ b.T` with sums as `accumulation` says; see the module docstring.

    a: [..., M, K], values of a low-precision format in any dtype that holds them. b: [..., N, K] with the same leading
    dimensions. seed: for stochastic rounding, an int of up to 64 bits or a 0-dim int64 tensor.

    Returns: float32 [..., M, N]; the index i of an output runs over all of its dimensions.
    Raises ValueError: shapes that do not fit; float32 sums, which are `torch.matmul`'s; stochastic without a seed.
    """
    if a.dim() < 2 or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-1]:
        raise ValueError(f"a is [..., M, K] and b [..., N, K], got {tuple(a.shape)} and {tuple(b.shape)}")
    if accumulation.format is None:
        raise ValueError("accumulation names no format: float32 sums are torch.matmul's")
    if accumulation.rounding.mode == "stochastic" and seed is None:
        raise ValueError("stochastic rounding needs a seed")
    batch, m, n, k = a.shape[:-2].numel(), a.shape[-2], b.shape[-2], a.shape[-1]
    shape = (*a.shape[:-1], n)
    a, b = a.detach().float().reshape(batch, m, k), b.detach().float().reshape(batch, n, k)
    out = torch.zeros((batch, m, n), dtype=torch.float32, device=a.device)
    if out.numel() and k:
        length = k if accumulation.chunk is None else min(accumulation.chunk, k)
        chunks = -(-k // length)
        operands = _by_step(a, chunks, length), _by_step(b, chunks, length)
        for piece in _pieces(batch, m, n, chunks):
            _add_up(out, *operands, piece, accumulation, seed)
    # Also -0 + 0 = +0.
    out += _poison(a)[:, :, None]
    out += _poison(b)[:, None, :]
    return out.view(shape)


def _poison(x: Tensor) -> Tensor:
    """[..., K] -> [...]: NaN where an element is not finite, else 0."""
    return torch.where(x.isfinite().all(-1), 0.0, torch.nan)


def _by_step(x: Tensor, chunks: int, length: int) -> Tensor:
    """[batch, rows, K] -> [length, chunks, batch, rows] contiguous: what each step reads lies together."""
    batch, rows, k = x.shape
    x = torch.nn.functional.pad(x.nan_to_num(0.0, 0.0, 0.0), (0, chunks * length - k))
    return x.view(batch, rows, chunks, length).permute(3, 2, 0, 1).contiguous()


class _Piece(NamedTuple):
    """Outputs of some batches and rows, and how many of their chunks run beside each other."""

    batches: slice
    rows: slice
    together: int


def _pieces(batch: int, m: int, n: int, chunks: int) -> Iterator[_Piece]:
    rows = max(1, min(m, _AT_ONCE // n))
    batches = max(1, min(batch, _AT_ONCE // (rows * n))) if rows == m else 1
    together = max(1, min(chunks, _AT_ONCE // (batches * rows * n)))
    for first in range(0, batch, batches):
        for row in range(0, m, rows):
            yield _Piece(slice(first, min(first + batches, batch)), slice(row, min(row + rows, m)), together)


def _add_up(
    out: Tensor, a: Tensor, b: Tensor, piece: _Piece, accumulation: Accumulation, seed: int | Tensor | None
) -> None:
    """Fill a piece of `out` [batch, M, N]; a, b: of `_by_step`."""
    assert accumulation.format is not None
    inner = get_sum_format(accumulation.format)
    outer = None if accumulation.outer is None else get_sum_format(accumulation.outer)
    rounding = accumulation.rounding
    (length, chunks), device = a.shape[:2], a.device
    target = out[piece.batches, piece.rows]
    stochastic = rounding.mode == "stochastic"
    streams, keys, chunk_keys = torch.zeros((), dtype=torch.int32), None, None
    if stochastic:
        assert seed is not None
        index = torch.arange(out.numel(), device=device).view(out.shape)[piece.batches, piece.rows]
        streams = stream_keys(seed, index)
        steps = torch.arange(chunks * length, device=device)
        keys = step_keys(seed, steps).view(chunks, length).t().contiguous()[..., None, None, None]
        chunk_keys = step_keys(seed, CHUNK_SUMS + steps[:chunks])
    round_inner = _rounder(inner, rounding)
    round_outer = None if outer is None else _rounder(outer, rounding)
    for first in range(0, chunks, piece.together):
        some = slice(first, min(first + piece.together, chunks))
        left = a[:, some, piece.batches, piece.rows, None].unbind(0)
        right = b[:, some, piece.batches, None, :].unbind(0)
        shape = (some.stop - some.start, *target.shape)
        sums = torch.zeros(shape, dtype=torch.float32, device=device)
        words, scratch = (torch.empty(shape, dtype=torch.int32, device=device) for _ in range(2))
        bits = random_bits(rounding, inner)
        for i in range(length):
            torch.addcmul(sums, left[i], right[i], out=sums)
            if keys is not None:
                stream_words(streams, keys[i, some], bits, (words, scratch))
            round_inner(sums, words if stochastic else None, scratch)
        if accumulation.chunk is None:
            target.copy_(sums[0])
            continue
        for c, chunk_sum in enumerate(sums):
            target += chunk_sum
            if outer is None or round_outer is None:
                continue
            if chunk_keys is not None:
                stream_words(streams, chunk_keys[first + c], random_bits(rounding, outer), (words[0], scratch[0]))
            round_outer(target, words[0] if stochastic else None, scratch[0])


def _rounder(fmt: Format, rounding: Rounding) -> _Round:
    """The way of `round_to_format` for one addition, without what sums never need (NaN, signs of zeros)."""
    if rounding.mode == "nearest" and magic_fits(fmt):
        return lambda sums, words, scratch: _nearest(sums, fmt, scratch)
    if rounding.mode != "nearest" and fmt.subnormal == "flush" and fmt.emax < 126:
        return lambda sums, words, scratch: _drop_bits(sums, fmt, rounding, words)

    def general(sums: Tensor, words: Tensor | None, scratch: Tensor) -> None:
        sums.copy_(rounder(fmt, torch.float32, rounding, "saturate_inf", None, words)(sums, 0, None).view(sums.shape))

    return general


def _nearest(sums: Tensor, fmt: Format, scratch: Tensor) -> None:
    """The FPU rounds to the step of the binade (`rounding`): exact, ties to even."""
    magic = 1.5 * 2.0 ** (F32.man - fmt.man)
    power = torch.bitwise_and(sums.view(torch.int32), 0x7F800000, out=scratch).view(torch.float32)
    power.clamp_(2.0**fmt.emin if fmt.subnormal == "gradual" else None, 2.0**fmt.emax)
    sums.add_(power, alpha=magic).sub_(power, alpha=magic)
    _within(sums, fmt)


def _drop_bits(sums: Tensor, fmt: Format, rounding: Rounding, words: Tensor | None) -> None:
    """Every other mode where all binades are normal ones: an integer addition below the last kept bit, and a mask."""
    drop = F32.man - fmt.man
    units = sums.view(torch.int32)
    if rounding.mode == "away":
        units += 1 << (drop - 1)
    elif words is not None:
        units += words.bitwise_left_shift_(drop - random_bits(rounding, fmt))
    units &= -1 << drop
    _within(sums, fmt)


def _within(sums: Tensor, fmt: Format) -> None:
    """Flush and saturate."""
    if fmt.subnormal == "flush":
        below = fmt.min_normal * (1 - 2.0**-24)  # the largest float32 that is not a value
        torch.ops.aten.hardshrink.out(sums, below, out=sums)
    sums.clamp_(-fmt.max, fmt.max)
