# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings of halves, forward and backward, in plain torch: every rounding that eager mode makes.

    x = (x1, x2), the halves of its first `width` columns; the columns beyond pass through
    forward     y1 = x1 * c1 - x2 * s1,    y2 = x2 * c2 + x1 * s2
    backward    d1 = g1 * c1 + g2 * s2,    d2 = g2 * c2 - g1 * s1

Each product is rounded to `mid`, the sum as well, and the end to `out`: no fused multiply-add. The two halves of a
table of cosines are usually equal, and are not taken to be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, *, dim: int, mid: torch.dtype, out: torch.dtype, joined: bool
) -> Tensor:
    """`x` [B, H, S, D] with `dim` 1, [B, S, H, D] with `dim` 2, rotated by cos and sin [B or 1, S, width].

    joined: the result is put together with the columns from `width` on, of which there may be none, and so contiguous;
        else width is D, and it has the layout of elementwise operators.
    """
    cos, sin = cos.unsqueeze(dim), sin.unsqueeze(dim)
    width = cos.shape[-1]
    turned = x[..., :width]
    half = width // 2
    rotated = torch.cat((-turned[..., half:], turned[..., :half]), -1)
    y = (turned.to(mid) * cos.to(mid) + rotated.to(mid) * sin.to(mid)).to(out)
    return torch.cat((y, x[..., width:].to(out)), -1) if joined else y


def rotary_backward(
    grad: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    dim: int,
    mid: torch.dtype,
    out: torch.dtype,
    stride: Sequence[int],
) -> Tensor:
    """The gradient of x, in dtype `out`, from that of `rotary`'s result; autograd's, zeros' signs included.

    mid: what the two gradients of each element are rounded to before they are added.
    stride: of x. The result has no gaps, and its dimensions in the same order, so that the linear before x reads it as
        it is; autograd's is contiguous, and copied there.
    """
    cos, sin = cos.unsqueeze(dim).float(), sin.unsqueeze(dim).float()
    width = cos.shape[-1]
    half = width // 2
    turned = grad[..., :width].float()
    straight = (turned * cos).to(mid)
    across = (turned * sin).to(mid)
    first = straight[..., :half] + across[..., half:]
    second = straight[..., half:] - across[..., :half]
    parts = [first, second] if width == grad.shape[-1] else [first, second, grad[..., width:]]
    # Autograd adds zeros where an element has no gradient from one of the slices, so it never returns -0.
    parts = [part + 0.0 for part in parts[:2]] + [part.to(out) + 0.0 for part in parts[2:]]
    whole = torch.cat([part.to(out) for part in parts], -1)
    return torch.empty_strided(whole.shape, dense(whole.shape, stride), dtype=out, device=whole.device).copy_(whole)


def dense(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor without gaps whose dimensions lie in memory in the order that `stride` gives; in that of the
    shape where `stride` repeats elements."""
    repeats = any(step == 0 and length > 1 for step, length in zip(stride, shape, strict=True))
    backwards = range(len(shape) - 1, -1, -1)
    order = list(backwards) if repeats else sorted(backwards, key=lambda d: (stride[d], shape[d]))
    found, step = [0] * len(shape), 1
    for d in order:
        found[d] = step
        step *= shape[d]
    return tuple(found)
