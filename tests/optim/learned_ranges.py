# SPDX-License-Identifier: Apache-2.0
"""What two ranks do to train learned ranges (fp8-flex) under DDP."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import hf_lowprec
from hf_lowprec.conversion import session_of


def train(seed: int) -> dict[str, Any]:
    """Three steps; each rank has batches of its own, eight times as large on the second."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))
    hf_lowprec.convert(model, "fp8-flex")
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = hf_lowprec.attach_optimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    first = None
    for step in range(3):
        torch.manual_seed(100 * seed + 10 * step + rank)
        optimizer.zero_grad()
        parallel((1.0, 8.0)[rank] * torch.randn(8, 32)).square().mean().backward()
        if step == 0:
            first = session_of(model).scaling.state_dict()["0"]["input"]["maxval"]
        optimizer.step()
    ranges = [p.detach().clone() for p in hf_lowprec.learned_parameters(model)]
    return {"ranges": ranges, "moments": session_of(model).ranges.state_dict(), "weight": model[0].weight.detach(),
            "first": first}  # fmt: skip
