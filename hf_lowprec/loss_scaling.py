# SPDX-License-Identifier: Apache-2.0
"""Loss scaling as a recipe names it: torch's GradScaler, dynamic or with a scale that stays.

    scaled = scale * loss;  backward;  g = g / scale;  clip;  step, unless some g is Inf or NaN;  scale = next(scale)

What counts is the gradient in the Parameter's own dtype, after division. An 8-bit format that saturates inside a GEMM
gives finite gradients, and no step is skipped for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler

from hf_lowprec.recipe import LossScale
from hf_lowprec.session import session_of


class StaticGradScaler(GradScaler):
    """A GradScaler whose scale stays, and which skips steps with Inf or NaN all the same."""

    def __init__(self, device: str, scale: float) -> None:
        super().__init__(device, init_scale=scale)
        self._constant = float(scale)

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Ends the step; only a caller's `new_scale` changes the scale, as torch's does."""
        super().update(self._constant if new_scale is None else new_scale)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, but for the scale, which is the recipe's."""
        super().load_state_dict({**state_dict, "scale": self._constant})


def make_scaler(policy: LossScale, device: str) -> GradScaler:
    """The scaler of `policy` for gradients on `device` (`cpu`, `cuda`); one that does nothing for method `none`."""
    if policy.method == "static":
        return StaticGradScaler(device, policy.init)
    return GradScaler(
        device,
        init_scale=policy.init,
        growth_factor=policy.growth_factor,
        backoff_factor=policy.backoff_factor,
        growth_interval=policy.growth_interval,
        enabled=policy.method == "dynamic",
    )


def grad_scaler(model: nn.Module) -> GradScaler:
    """torch's GradScaler for a converted model in plain PyTorch, with the loss scale that its recipe names.

    For a recipe without one it does nothing, so that a script may always call it:

        scaler = hf_lowprec.grad_scaler(model)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # before clipping, if there is any
        scaler.step(optimizer)
        scaler.update()

    Save and load its `state_dict()` with the optimizer's. `Accelerator` and Trainer do all of it by themselves.

    Raises ValueError: the model is not converted, or trains float16 Parameters, whose gradients torch unscales not.
    """
    session = session_of(model)
    if session is None:
        raise ValueError("convert the model before asking for its loss scale")
    policy = session.recipe.loss_scale
    if policy.method != "none":
        check_parameters(model)
        session.report.loss_scale = f"{policy.method} {policy.init:g}"
    device = next((p.device.type for p in model.parameters()), "cpu")
    return make_scaler(policy, device)


def check_parameters(model: nn.Module) -> None:
    """Raises ValueError for float16 Parameters that train."""
    name = next((n for n, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16), None)
    if name is not None:
        raise ValueError(
            f"{name} is float16: a loss scale needs gradients in a wider range, and torch unscales no float16; load "
            "the model in float32 or bfloat16 (dtype=torch.float32), the GEMMs run in float16 by autocast"
        )
