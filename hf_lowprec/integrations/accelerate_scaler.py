# SPDX-License-Identifier: Apache-2.0
"""A recipe's loss scale under accelerate, which has one for `fp16` only.

Accelerator's own methods do the work wherever they look for `self.scaler`: `backward` scales, the wrapped optimizer
unscales, skips and updates, `save_state` (and the Trainer) save it. `unscale_gradients`, through which clipping goes,
asks for mixed_precision='fp16' on an accelerator instead; for other bases, and on a CPU, it gets one of ours.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_lowprec.conversion import ConversionError, report_of
from hf_lowprec.loss_scaling import check_parameters, make_scaler
from hf_lowprec.recipe import LossScale, Recipe

_POLICY = "_hf_lowprec_loss_scale"  # on an Accelerator: whose scaler it has
_ENGINES = ("NO", "MULTI_GPU", "MULTI_CPU")


def scale_loss(accelerator: Any, model: nn.Module, recipe: Recipe, engine: str) -> None:
    """Have `accelerator` scale the loss as `recipe` says. Idempotent; to be called before its optimizers are wrapped.

    Raises ConversionError: another loss scale at work (another recipe's, GradScalerKwargs, DeepSpeed's), an engine
    that has its own, an optimizer that was prepared earlier. ValueError: float16 Parameters, in training mode.
    """
    policy, done = recipe.loss_scale, getattr(accelerator, _POLICY, LossScale())
    if policy == done:
        return
    if done.method != "none":
        raise ConversionError(
            f"recipe {recipe.name!r} wants the loss scale {policy}, this Accelerator has {done} already: use one "
            "Accelerator per loss scale"
        )
    report = report_of(model)
    fsdp2 = engine == "FSDP" and accelerator.is_fsdp2  # whose DTensors torch's scaler agrees on over all ranks
    mine = engine in _ENGINES or fsdp2
    # On a CPU accelerate takes 'fp16' for float32, and neither scales nor unscales.
    theirs = accelerator.mixed_precision == "fp16" and (accelerator.native_amp or not mine)
    if theirs and policy == LossScale(method="dynamic"):
        if report is not None:
            report.loss_scale = "dynamic, accelerate's own"  # GradScalerKwargs and DeepSpeed's config count
        return
    if not mine:
        raise ConversionError(
            f"recipe {recipe.name!r}: its {policy.method} loss scale is not available under {engine}; train with DDP "
            "or FSDP2, or set it in DeepSpeed's config (fp16.loss_scale) and use recipe 'fp16'"
        )
    if accelerator.scaler_handler is not None:
        raise ConversionError(
            f"recipe {recipe.name!r} brings a loss scale ({policy.method} {policy.init:g}), and the script passes "
            "GradScalerKwargs: drop one of them"
        )
    if accelerator._optimizers:
        raise ConversionError("with a loss scale, prepare the model before or with its optimizer")
    if model.training:  # else it may only be evaluated; torch refuses to unscale float16 gradients
        check_parameters(model)
    accelerator.scaler = make_scaler(policy, accelerator.device.type)
    setattr(accelerator, _POLICY, policy)
    if not theirs:
        accelerator.unscale_gradients = _Unscale(accelerator)
    if report is not None:
        report.loss_scale = f"{policy.method} {policy.init:g}"


class _Unscale:
    """`Accelerator.unscale_gradients`, whatever its precision."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __call__(self, optimizer: Any = None) -> None:
        """optimizer: one, several, or None: all that were prepared."""
        some = self._accelerator._optimizers if optimizer is None else optimizer
        for one in some if isinstance(some, (tuple, list)) else [some]:
            while hasattr(one, "optimizer"):
                one = one.optimizer
            self._accelerator.scaler.unscale_(one)
