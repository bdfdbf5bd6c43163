# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and LayerNorm over the last axis, forward and backward, in plain torch.

    n = (x - mean) * rstd                       mean only where the norm centers; rstd = 1 / sqrt(var + eps)
    y = out(mid(n) * w + b)                     w = weight, or 1 + weight

Models differ in one detail, and it is visible in bf16: where the result is rounded. `mid` rounds the normalised value
before the weight multiplies it (Llama: to the input's dtype), `out` rounds the end (Gemma, LayerNorm: only there).
Everything between is `compute`: float32 is the definition, float64 the yardstick of tests.
"""

from __future__ import annotations

import torch
from torch import Tensor


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    center: bool,
    plus_one: bool,
    mid: torch.dtype,
    out: torch.dtype,
    compute: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Normalise `x` [..., C].

    Returns: y like x in dtype `out`, and stats [1, rows] (rstd) or, where the norm centers, [2, rows] (rstd, mean).
    """
    rows = x.reshape(-1, x.shape[-1]).to(compute)
    mean = rows.mean(-1, keepdim=True) if center else None
    centered = rows if mean is None else rows - mean
    rstd = 1 / (centered.square().mean(-1, keepdim=True) + eps).sqrt()
    y = _rounded(centered * rstd, mid)
    if weight is not None:
        y = y * _factor(weight, plus_one, compute)
    if bias is not None:
        y = y + bias.to(compute)
    stats = torch.stack([rstd[:, 0]] if mean is None else [rstd[:, 0], mean[:, 0]])
    return y.to(out).reshape(x.shape), stats


def norm_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    *,
    plus_one: bool,
    mid: torch.dtype,
    compute: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x, grad_weight, grad_bias) in dtype `compute`, the last two [C]; `stats` as `norm` returned them.

    Rounding to `mid` passes gradients straight through, as torch's casts do.
    """
    rows = x.reshape(-1, x.shape[-1]).to(compute)
    g = grad.reshape(rows.shape).to(compute)
    stats = stats.to(compute).unsqueeze(-1)
    center = stats.shape[0] == 2
    n = (rows - stats[1] if center else rows) * stats[0]
    gw = g if weight is None else g * _factor(weight, plus_one, compute)
    inner = gw - n * (gw * n).mean(-1, keepdim=True)
    if center:
        inner = inner - gw.mean(-1, keepdim=True)
    return (inner * stats[0]).reshape(x.shape), (g * _rounded(n, mid)).sum(0), g.sum(0)


def _factor(weight: Tensor, plus_one: bool, compute: torch.dtype) -> Tensor:
    return 1 + weight.to(compute) if plus_one else weight.to(compute)


def _rounded(n: Tensor, mid: torch.dtype) -> Tensor:
    """n rounded to `mid`; a `mid` that is no narrower than n leaves it as it is."""
    return n if mid.itemsize >= 4 else n.to(mid).to(n.dtype)
