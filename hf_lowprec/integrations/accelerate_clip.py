# SPDX-License-Identifier: Apache-2.0
"""`Accelerator.clip_grad_norm_` through the step of one of our optimizers, which needs no pass of its own for it.

torch reads all gradients, multiplies them in place, and the step then looks at them again. Our optimizers find the
norm in that look and apply the factor in the step (`LowPrecOptimizer.clip_grad_norm_`). The difference that can be
seen: between clip and step `p.grad` is not scaled yet. HF_LOWPREC_CLIP=0 leaves clipping to torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowprec.flags import read_switch
from hf_lowprec.optim import LowPrecOptimizer

CLIP_ENV = "HF_LOWPREC_CLIP"
_ENGINES = ("NO", "MULTI_GPU", "MULTI_CPU")  # where every rank has the whole gradients


def clip_in_step(accelerator: Any, parameters: Sequence[Tensor], max_norm: Any, norm_type: Any) -> Tensor | None:
    """The norm of the gradients, which the next step of the optimizer that has exactly these clips to `max_norm`.

    None: this is torch's to do, now. Raises ValueError for a bad HF_LOWPREC_CLIP; RuntimeError as the optimizer does.
    """
    mine = _ours(accelerator)
    if norm_type == 2 and _may(accelerator):
        clipped = [p for p in parameters if p.grad is not None]
        keys = {id(p) for p in clipped}
        # Subclasses are shards, or gradients that were released.
        if clipped and len(keys) == len(clipped) and all(_plain(p.grad) for p in clipped):
            for optimizer in mine:
                if keys == {id(p) for p in _parameters(optimizer) if p.grad is not None}:
                    return optimizer.clip_grad_norm_(max_norm)
    apply_clips(accelerator, parameters)
    return None


def apply_clips(accelerator: Any, parameters: Iterable[Tensor]) -> None:
    """Has the gradients of these parameters scaled that a step was to clip: somebody else reads or writes them."""
    keys = {id(p) for p in parameters}
    for optimizer in _ours(accelerator):
        if not keys.isdisjoint(map(id, _parameters(optimizer))):
            optimizer.apply_clip()


def _may(accelerator: Any) -> bool:
    """Whether gradients are whole and unscaled here, and a step follows. (A step that only accumulates does nothing:
    a clip would wait while backward adds to what it was meant for.)"""
    engine = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    whole = engine in _ENGINES and accelerator.scaler is None and accelerator.sync_gradients
    return read_switch(CLIP_ENV, True) and bool(whole)


def _plain(grad: Any) -> bool:
    return type(grad) is Tensor and grad.layout is torch.strided


def _ours(accelerator: Any) -> list[LowPrecOptimizer]:
    inner = []
    for one in accelerator._optimizers:
        while not isinstance(one, LowPrecOptimizer) and hasattr(one, "optimizer"):
            one = one.optimizer
        if isinstance(one, LowPrecOptimizer):
            inner.append(one)
    return inner


def _parameters(optimizer: LowPrecOptimizer) -> Iterable[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])
