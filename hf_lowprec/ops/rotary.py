# SPDX-License-Identifier: Apache-2.0
"""hf_lowprec::rotary and rotary_backward: rotary position embeddings of q and k together, one pass each way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lowprec.numerics import rotary as truth
from hf_lowprec.ops.registry import LIBRARY, direct

LIBRARY.define(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, int dim, ScalarType mid, ScalarType out, bool joined)"
    " -> (Tensor, Tensor)"
)
LIBRARY.define(
    "rotary_backward(Tensor? grad_q, Tensor? grad_k, Tensor cos, Tensor sin, int dim, ScalarType mid, ScalarType out,"
    " SymInt[] q_stride, SymInt[] k_stride) -> (Tensor, Tensor)"
)


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dim: int, mid: torch.dtype, out: torch.dtype, joined: bool
) -> tuple[Tensor, Tensor]:
    """`numerics.rotary` of q and k, 4-D, of one dtype and any strides; cos and sin [B or 1, S, width].

    Args:
        dim: where heads are: 1, q [B, H, S, D], or 2, q [B, S, H, D]. k may have another number of heads.
        mid, out: what products and sums are rounded to, and the dtype of the results; `mid` is the wider.
        joined: columns from `width` on pass through; without it width is D.

    Returns: q and k rotated, in the layouts that torch's operators would give.
    """
    kernel = direct("rotary", q) or torch.ops.hf_lowprec.rotary
    turned: tuple[Tensor, Tensor] = kernel(q, k, cos, sin, dim, mid, out, joined)
    return turned


def rotary_backward(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    dim: int,
    mid: torch.dtype,
    out: torch.dtype,
    q_stride: Sequence[int],
    k_stride: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k in dtype `out`, `numerics.rotary_backward`; empty where None is given, not both.

    Args:
        q_stride, k_stride: of q and k: their gradients' dimensions lie in the same order, without gaps.
    """
    some = grad_q if grad_q is not None else grad_k
    assert some is not None
    kernel = direct("rotary_backward", some) or torch.ops.hf_lowprec.rotary_backward
    grads: tuple[Tensor, Tensor] = kernel(grad_q, grad_k, cos, sin, dim, mid, out, q_stride, k_stride)
    return grads


def fits(q: torch.Size, k: torch.Size | None, table: torch.Size, dim: int, joined: bool) -> bool:
    """Whether the operators are for these shapes (table: of cos and of sin): nothing but the table is repeated, for
    heads and batches."""
    if len(q) != 4 or len(table) != 3 or dim not in (1, 2):
        return False
    if k is not None and (len(k) != 4 or (k[0], k[3 - dim], k[3]) != (q[0], q[3 - dim], q[3])):
        return False
    width = table[2]
    beyond = q[3] - width
    there = table[0] in (1, q[0]) and table[1] == q[3 - dim]
    return there and width % 2 == 0 and width > 0 and (beyond >= 0 if joined else beyond == 0)


def default_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dim: int, mid: torch.dtype, out: torch.dtype, joined: bool
) -> tuple[Tensor, Tensor]:
    return (
        truth.rotary(q, cos, sin, dim=dim, mid=mid, out=out, joined=joined),
        truth.rotary(k, cos, sin, dim=dim, mid=mid, out=out, joined=joined),
    )


def default_rotary_backward(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    dim: int,
    mid: torch.dtype,
    out: torch.dtype,
    q_stride: Sequence[int],
    k_stride: Sequence[int],
) -> tuple[Tensor, Tensor]:
    def of(grad: Tensor | None, stride: Sequence[int]) -> Tensor:
        if grad is None:
            return cos.new_empty(0, dtype=out)
        return truth.rotary_backward(grad, cos, sin, dim=dim, mid=mid, out=out, stride=stride)

    return of(grad_q, q_stride), of(grad_k, k_stride)


LIBRARY.impl("rotary", default_rotary, "CompositeExplicitAutograd")
LIBRARY.impl("rotary_backward", default_rotary_backward, "CompositeExplicitAutograd")
# Layouts are those of torch's own operators, which know them for fake tensors as well.
torch.library.register_fake("hf_lowprec::rotary", default_rotary)
torch.library.register_fake("hf_lowprec::rotary_backward", default_rotary_backward)
