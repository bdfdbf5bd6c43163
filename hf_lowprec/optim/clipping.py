# SPDX-License-Identifier: Apache-2.0
"""Clipping by the global norm, as a factor for `step(clip=)` instead of a pass over all gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowprec.optim.shards import by_ranks, local_of


@torch.no_grad()
def clip_factor(
    params: Tensor | Iterable[Tensor], max_norm: float | Tensor, norm_type: float = 2.0
) -> tuple[Tensor, Tensor]:
    """(factor, total norm), float32 0-d on the device of the first gradient, without waiting for it.

    factor = min(1, max_norm / (norm + 1e-6)), torch.nn.utils.clip_grad_norm_'s; gradients are left as they are. Norms
    of 16-bit gradients are summed in float32, of sharded ones over all ranks (together). Without gradients: (1, 0). A
    gradient that is not finite makes the factor NaN and the norm NaN or Inf; `step` skips itself then.
    """
    grads = [p.grad for p in ([params] if isinstance(params, Tensor) else params) if p.grad is not None]
    if not grads:
        return torch.ones(()), torch.zeros(())
    home = grads[0].device
    whole = _norm([grad for grad in grads if not isinstance(grad, DTensor)], norm_type, home)
    parts = [
        shard.norm(_norm([local_of(grads[i]) for i in some], norm_type, home), norm_type)
        for shard, some in by_ranks(dict(enumerate(grads)))
    ]
    total = torch.linalg.vector_norm(torch.stack([whole, *parts]), norm_type) if parts else whole
    limit = max_norm.to(home, torch.float32) if isinstance(max_norm, Tensor) else max_norm
    factor = torch.clamp(limit / (total + 1e-6), max=1.0)
    return torch.where(total.isfinite(), factor, torch.nan), total


def _norm(grads: list[Tensor], norm_type: float, home: torch.device) -> Tensor:
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        if grad.numel():
            by_kind.setdefault((grad.device, grad.dtype), []).append(grad)
    norms = [
        norm.to(home, torch.float32)
        for (_, dtype), some in by_kind.items()
        for norm in torch._foreach_norm(some, norm_type, dtype=torch.promote_types(dtype, torch.float32))
    ]
    return torch.linalg.vector_norm(torch.stack(norms), norm_type) if norms else torch.zeros((), device=home)
