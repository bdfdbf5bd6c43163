# SPDX-License-Identifier: Apache-2.0
"""hf_lowprec::flexible and its kin: operands whose range and mantissa width are tensors (`numerics.flexible`).

    flexible            q of a matrix, rounded once to the dtype that is asked for
    flexible_mm         Q(x) @ Q(w).T + bias: products and sums in float32, rounded once
    flexible_gradients  of the matrix, its range and its width, straight through
    flexible_count      what quantising a sample of the elements does to them

A matrix is [R, C], of any strides, float32, bfloat16 or float16. Its range `maxval` is float32, 0-dim, or [R, 1] for
its rows; its width `man` is float32, 0-dim; `bits` are those of the format. No value is read by the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowprec.numerics import flexible as truth
from hf_lowprec.ops.quantize import sample_stride
from hf_lowprec.ops.registry import LIBRARY, direct

LIBRARY.define("flexible(Tensor x, Tensor maxval, Tensor man, int bits, ScalarType dtype) -> Tensor")
LIBRARY.define(
    "flexible_mm(Tensor x, Tensor x_maxval, Tensor x_man, int x_bits, Tensor w, Tensor w_maxval, Tensor w_man,"
    " int w_bits, Tensor? bias, ScalarType dtype) -> Tensor"
)
LIBRARY.define(
    "flexible_gradients(Tensor grad, Tensor x, Tensor maxval, Tensor man, int bits, ScalarType dtype, Tensor? q=None)"
    " -> (Tensor grad_x, Tensor grad_maxval, Tensor grad_man)"
)
LIBRARY.define("flexible_count(Tensor x, Tensor? maxval, Tensor? man, int bits, Tensor(a!) counts) -> ()")


def flexible(x: Tensor, maxval: Tensor, man: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """q of `x` [R, C], rounded once from float32 to `dtype`; contiguous."""
    kernel = direct("flexible", x) or torch.ops.hf_lowprec.flexible
    out: Tensor = kernel(x, maxval, man, bits, dtype)
    return out


def flexible_mm(
    x: Tensor,
    x_maxval: Tensor,
    x_man: Tensor,
    x_bits: int,
    w: Tensor,
    w_maxval: Tensor,
    w_man: Tensor,
    w_bits: int,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Q(x) [M, K] times Q(w) [N, K] transposed, plus bias [N], [M, N] in `dtype`.

    The truth multiplies q's and sums in float32. The kernel multiplies what they are before their scales, which
    bfloat16 holds for formats of up to 8 bits, and has the scales multiply the sums: no product is rounded, two
    roundings come after the sums, and before the bias

        |kernel - exact| <= (K + 2) 2^-22 sum |q_x q_w|

    as long as s_x s_w and what the sums are times s_x stay within the normal float32 numbers. (The truth's own sums
    are within K 2^-24 of that, and two roundings for each product; tensor cores cut bits off where float32 rounds.)
    """
    kernel = direct("flexible_mm", x) or torch.ops.hf_lowprec.flexible_mm
    out: Tensor = kernel(x, x_maxval, x_man, x_bits, w, w_maxval, w_man, w_bits, bias, dtype)
    return out


def flexible_gradients(
    grad: Tensor, x: Tensor, maxval: Tensor, man: Tensor, bits: int, dtype: torch.dtype, q: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x` in `dtype`, in its own layout; of `maxval` and `man` in their shapes, float32.

    grad: [R, C], of a loss by q, any float dtype. q: `flexible(...)` in float32, from who has it.

    Sums over elements are of their terms in float32, |sum - exact| <= 2^-16 sum |terms|; no order of theirs is left to
    chance.
    """
    kernel = direct("flexible_gradients", grad) or torch.ops.hf_lowprec.flexible_gradients
    grads: tuple[Tensor, Tensor, Tensor] = kernel(grad, x, maxval, man, bits, dtype, q)
    return grads


def flexible_count(x: Tensor, maxval: Tensor | None, man: Tensor | None, bits: int, counts: Tensor) -> None:
    """Raise `counts` (int64 [4]) as `ops.quantize` does: elements looked at, beyond the range, to zero, non-finite.

    Without a range (and a width) only the first and the last are.
    """
    kernel = direct("flexible_count", x)
    if kernel is not None:
        kernel(x, maxval, man, bits, counts)
        return
    maxval, man = (None if t is None else t.detach() for t in (maxval, man))
    torch.ops.hf_lowprec.flexible_count(x.detach(), maxval, man, bits, counts)


# --- the truth ------------------------------------------------------------------------------------------------------


def default_flexible(x: Tensor, maxval: Tensor, man: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    return truth.flexible(x, maxval, man, bits).to(dtype).contiguous()


def default_flexible_mm(
    x: Tensor,
    x_maxval: Tensor,
    x_man: Tensor,
    x_bits: int,
    w: Tensor,
    w_maxval: Tensor,
    w_man: Tensor,
    w_bits: int,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    qx = truth.flexible(x, x_maxval, x_man, x_bits)
    qw = truth.flexible(w, w_maxval, w_man, w_bits)
    return multiply_values(qx, qw, bias, dtype)


def multiply_values(qx: Tensor, qw: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """qx @ qw.T + bias of float32 values, rounded once to `dtype`."""
    # Autocast reaches into operators and would turn the float32 product into a bfloat16 one.
    with torch.autocast(qx.device.type, enabled=False):
        out = qx @ qw.t()
        if bias is not None:
            out = out + bias.float()
        return out.to(dtype)


def default_flexible_gradients(
    grad: Tensor, x: Tensor, maxval: Tensor, man: Tensor, bits: int, dtype: torch.dtype, q: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    q = truth.flexible(x, maxval, man, bits) if q is None else q
    found = truth.gradients(grad, x, q, maxval, man, bits)
    out = torch.empty_like(x, dtype=dtype)
    if found.x.dtype == dtype and found.x.stride() == out.stride():
        return found.x, found.maxval, found.man
    return out.copy_(found.x), found.maxval, found.man


def default_flexible_count(
    x: Tensor, maxval: Tensor | None, man: Tensor | None, bits: int, counts: Tensor
) -> None:  # fmt: skip
    if not x.numel():
        return
    every = sample_stride(x.numel())
    size = x.reshape(-1)[::every].float().abs()
    finite = size.isfinite()
    beyond = lost = torch.zeros((), dtype=torch.int64, device=x.device)
    if maxval is not None:
        assert man is not None
        tiny = truth.smallest_of(maxval, man, bits).expand(x.shape[0], 1)
        row = torch.arange(0, x.numel(), every, device=x.device) // x.shape[1]
        beyond = ((size > maxval.expand(x.shape[0], 1)[row, 0]) & finite).sum()
        lost = ((size > 0) & (size <= tiny[row, 0] / 2)).sum()
    seen = torch.full((), size.numel(), dtype=torch.int64, device=x.device)
    counts.add_(torch.stack([seen, beyond, lost, (~finite).sum()]))


LIBRARY.impl("flexible", default_flexible, "CompositeExplicitAutograd")
LIBRARY.impl("flexible_mm", default_flexible_mm, "CompositeExplicitAutograd")
LIBRARY.impl("flexible_gradients", default_flexible_gradients, "CompositeExplicitAutograd")
LIBRARY.impl("flexible_count", default_flexible_count, "CompositeExplicitAutograd")


def _fake_flexible(x: Tensor, maxval: Tensor, man: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _fake_flexible_mm(
    x: Tensor,
    x_maxval: Tensor,
    x_man: Tensor,
    x_bits: int,
    w: Tensor,
    w_maxval: Tensor,
    w_man: Tensor,
    w_bits: int,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[0]), dtype=dtype)


def _fake_flexible_gradients(
    grad: Tensor, x: Tensor, maxval: Tensor, man: Tensor, bits: int, dtype: torch.dtype, q: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    sums = (torch.empty_like(t, dtype=torch.float32, memory_format=torch.contiguous_format) for t in (maxval, man))
    by_maxval, by_man = sums
    return torch.empty_like(x, dtype=dtype), by_maxval, by_man


def _fake_flexible_count(x: Tensor, maxval: Tensor | None, man: Tensor | None, bits: int, counts: Tensor) -> None:
    return None


torch.library.register_fake("hf_lowprec::flexible", _fake_flexible)
torch.library.register_fake("hf_lowprec::flexible_mm", _fake_flexible_mm)
torch.library.register_fake("hf_lowprec::flexible_gradients", _fake_flexible_gradients)
torch.library.register_fake("hf_lowprec::flexible_count", _fake_flexible_count)
