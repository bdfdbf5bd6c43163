# SPDX-License-Identifier: Apache-2.0
"""hf_lowprec::rotary and rotary_backward on CUDA: one kernel for float32, bfloat16 and float16 whose last dimension
has no gaps, plain torch for the rest.

What depends on shapes, strides and dtypes only is worked out once for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowprec.kernels.triton import rotary as triton_rotary
from hf_lowprec.kernels.triton.rotary import MAX_BATCHES, Laid, Launch, Prepared
from hf_lowprec.numerics.rotary import dense
from hf_lowprec.ops.registry import count
from hf_lowprec.ops.rotary import default_rotary, default_rotary_backward, fits

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST = 4096  # plans that are kept: texts of many lengths have one each


class _Plan(NamedTuple):
    """prepared: the launch, or None for plain torch or where there is nothing to compute. Strides of the results."""

    prepared: Prepared | None
    q_stride: tuple[int, ...]
    k_stride: tuple[int, ...]


_PLANS: dict[tuple[Any, ...], _Plan | None] = {}
_UNKNOWN: Any = object()


def _keep(key: tuple[Any, ...], plan: _Plan | None) -> _Plan | None:
    if len(_PLANS) >= _MOST:
        _PLANS.clear()
    _PLANS[key] = plan
    return plan


def _covered(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, dim: int, joined: bool) -> bool:
    return (
        fits(q.shape, None if k is None else k.shape, cos.shape, dim, joined)
        and cos.shape == sin.shape
        and q.dtype in _DTYPES
        and cos.dtype in _DTYPES
        and cos.dtype == sin.dtype
        and q.stride(3) == cos.stride(2) == sin.stride(2) == 1
        and (k is None or (k.dtype == q.dtype and k.stride(3) == 1))
        and q.shape[0] <= MAX_BATCHES
    )


def _laid(stride: Sequence[int], dim: int) -> Laid:
    return Laid(stride[0], stride[3 - dim], stride[dim])


def _plan(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, dim: int, mid: torch.dtype, out: torch.dtype,
    q_stride: tuple[int, ...], k_stride: tuple[int, ...], backward: bool, launch: Launch | None = None,
) -> _Plan | None:  # fmt: skip
    """For tensors that `_covered` knows; the strides are those of the results."""
    if not (q.numel() or (k is not None and k.numel())):
        return _Plan(None, q_stride, k_stride)
    if q_stride[3] != 1 or k_stride[3] != 1:
        return None
    laid = (_laid(q.stride(), dim), _laid((q if k is None else k).stride(), dim))
    results = (_laid(q_stride, dim), _laid(k_stride, dim))
    table = tuple(n for t in (cos, sin) for n in (t.stride(0) if t.shape[0] > 1 else 0, t.stride(1)))
    heads = (q.shape[dim], 0 if k is None else k.shape[dim])
    prepared = triton_rotary.prepare(
        q.shape[0], q.shape[3 - dim], heads, q.shape[3], cos.shape[2], (*laid, *results), table,  # type: ignore[arg-type]
        (q.dtype, cos.dtype, out), mid, backward, launch,
    )  # fmt: skip
    return _Plan(prepared, q_stride, k_stride) if prepared.grid[0] < 1 << 31 else None


def _forward_plan(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dim: int, mid: torch.dtype, out: torch.dtype, joined: bool,
    launch: Launch | None = None,
) -> _Plan | None:  # fmt: skip
    if not _covered(q, k, cos, sin, dim, joined) or mid not in _DTYPES or out not in _DTYPES:
        return None
    # The layouts of torch's own operators: they say it themselves, without computing anything.
    on_meta = (torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in (q, k, cos, sin))
    q_meta, k_meta, cos_meta, sin_meta = on_meta
    q_out, k_out = default_rotary(q_meta, k_meta, cos_meta, sin_meta, dim, mid, out, joined)
    return _plan(q, k, cos, sin, dim, mid, out, q_out.stride(), k_out.stride(), False, launch)


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    dim: int,
    mid: torch.dtype,
    out: torch.dtype,
    joined: bool,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """launch: for measurements."""
    key = (
        dim, mid, out, joined, q.dtype, k.dtype, cos.dtype, sin.dtype, q.shape, q.stride(), k.shape, k.stride(),
        cos.shape, cos.stride(), sin.shape, sin.stride(), launch,
    )  # fmt: skip
    plan = _PLANS.get(key, _UNKNOWN)
    if plan is _UNKNOWN:
        plan = _keep(key, _forward_plan(q, k, cos, sin, dim, mid, out, joined, launch))
    if plan is None:
        return default_rotary(q, k, cos, sin, dim, mid, out, joined)
    q_out = torch.empty_strided(q.shape, plan.q_stride, dtype=out, device=q.device)
    k_out = torch.empty_strided(k.shape, plan.k_stride, dtype=out, device=q.device)
    if plan.prepared is not None:
        count("fused rotary embedding")
        triton_rotary.run(plan.prepared, q, k, cos, sin, q_out, k_out)
    return q_out, k_out


def _backward_plan(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, dim: int, mid: torch.dtype, out: torch.dtype,
    q_stride: Sequence[int], k_stride: Sequence[int], launch: Launch | None = None,
) -> _Plan | None:  # fmt: skip
    if not _covered(q, k, cos, sin, dim, True) or mid not in _DTYPES or out not in _DTYPES:
        return None
    k_dense = dense((q if k is None else k).shape, k_stride)
    return _plan(q, k, cos, sin, dim, mid, out, dense(q.shape, q_stride), k_dense, True, launch)


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
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """launch: for measurements."""
    if grad_q is None or grad_k is None:
        return _one_backward(grad_q, grad_k, cos, sin, dim, mid, out, q_stride, k_stride)
    key = (
        dim, mid, out, grad_q.dtype, grad_k.dtype, cos.dtype, sin.dtype, grad_q.shape, grad_q.stride(), grad_k.shape,
        grad_k.stride(), cos.shape, cos.stride(), sin.shape, sin.stride(), *q_stride, *k_stride, launch,
    )  # fmt: skip
    plan = _PLANS.get(key, _UNKNOWN)
    if plan is _UNKNOWN:
        plan = _keep(key, _backward_plan(grad_q, grad_k, cos, sin, dim, mid, out, q_stride, k_stride, launch))
    if plan is None:
        return default_rotary_backward(grad_q, grad_k, cos, sin, dim, mid, out, q_stride, k_stride)
    q_out = torch.empty_strided(grad_q.shape, plan.q_stride, dtype=out, device=grad_q.device)
    k_out = torch.empty_strided(grad_k.shape, plan.k_stride, dtype=out, device=grad_q.device)
    if plan.prepared is not None:
        triton_rotary.run(plan.prepared, grad_q, grad_k, cos, sin, q_out, k_out)
    return q_out, k_out


def _one_backward(
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
    """Only one of them is wanted: an adapter on one, the other frozen."""
    grad, stride = (grad_q, q_stride) if grad_k is None else (grad_k, k_stride)
    assert grad is not None
    key = (
        "one", dim, mid, out, grad.dtype, cos.dtype, sin.dtype, grad.shape, grad.stride(), cos.shape, cos.stride(),
        sin.shape, sin.stride(), *stride,
    )  # fmt: skip
    plan = _PLANS.get(key, _UNKNOWN)
    if plan is _UNKNOWN:
        plan = _keep(key, _backward_plan(grad, None, cos, sin, dim, mid, out, stride, stride))
    if plan is None:
        return default_rotary_backward(grad_q, grad_k, cos, sin, dim, mid, out, q_stride, k_stride)
    done = torch.empty_strided(grad.shape, plan.q_stride, dtype=out, device=grad.device)
    if plan.prepared is not None:
        triton_rotary.run(plan.prepared, grad, grad, cos, sin, done, done)
    nothing = cos.new_empty(0, dtype=out)
    return (done, nothing) if grad_k is None else (nothing, done)
