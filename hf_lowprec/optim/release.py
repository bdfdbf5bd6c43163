# SPDX-License-Identifier: Apache-2.0
"""Gradient release: each parameter is updated inside backward, as soon as its gradient is there, which is then freed.

Of all gradients only those of the layer that backward is in exist at a time: 2 to 4 bytes per parameter less (as LOMO,
arXiv 2306.09782, and torch's tutorial on optimizers in backward do). What is given up is everything that looks at all
gradients before the first update:

    clipping by the global norm       StableAdamW clips each update by its own size instead
    skipping a whole step             `nonfinite="element"` skips the elements that are not finite
    gradient accumulation             a larger micro-batch; the memory is there now
    GradScaler (float16)              bfloat16
    reduction between ranks           DDP, FSDP: not with gradient release

None of these is ignored silently. In the place of a used gradient stands a `FreedGradient`, which has no memory and
raises when anything reads it: clip_grad_norm_, GradScaler, DDP's reducer, a second backward.

Every parameter is a launch of its own, so it costs time where tensors are small and many.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from hf_lowprec.optim.base import LowPrecOptimizer
from hf_lowprec.optim.freed import FreedGradient

_RELEASED = "_hf_lowprec_released"  # on an optimizer: its GradientRelease

# Called before the first update after a step: `stepping`, a layer above, tells the optimizer here through which
# formats its recipes pass weight gradients, which it otherwise does when `step` begins.
BEFORE_UPDATE: list[Callable[[LowPrecOptimizer], None]] = []
# Called after every update, inside backward: low-precision copies of weights are outdated.
AFTER_UPDATE: list[Callable[[], None]] = []


def release_gradients(optimizer: LowPrecOptimizer) -> GradientRelease:
    """From now on backward updates the parameters of `optimizer` and frees their gradients. Call `step()` after each
    backward as before: it ends the step (hooks, LR schedulers, recipes), and the next backward raises without it.

    Returns a handle; `remove()` ends it. An optimizer that accelerate wrapped may be given as it is. With the Trainer:
    `max_grad_norm=0`, `gradient_accumulation_steps=1`, one process, and this call from a callback's `on_train_begin`.

    Raises ValueError: `nonfinite="step"` (which the updates could no longer take back), sharded parameters, released
    already; RuntimeError: several processes; TypeError: no optimizer of this package.
    """
    inner: Any = optimizer
    while not isinstance(inner, LowPrecOptimizer) and isinstance(getattr(inner, "optimizer", None), Optimizer):
        inner = inner.optimizer
    if not isinstance(inner, LowPrecOptimizer):
        raise TypeError(f"release_gradients takes an optimizer of hf_lowprec.optim, not a {type(optimizer).__name__}")
    if is_released(inner):
        raise ValueError("the gradients of this optimizer are released already")
    if inner.nonfinite != "element":
        raise ValueError(
            "nonfinite='step' skips a step when any gradient is not finite, but with gradient release other "
            "parameters have been updated by then: build the optimizer with nonfinite='element'"
        )
    for param in (p for group in inner.param_groups for p in group["params"]):
        if hasattr(param, "to_local") or getattr(param, "_is_flat_param", False):
            raise ValueError(
                "gradient release does not work with sharded parameters (FSDP), whose gradients are reduced after "
                "backward; FSDP2 frees unsharded gradients itself"
            )
    _check_one_process()
    return GradientRelease(inner)


def is_released(optimizer: Optimizer) -> bool:
    """Whether backward updates its parameters."""
    return optimizer.__dict__.get(_RELEASED) is not None


class GradientRelease:
    """The hooks of one optimizer. Made by `release_gradients`."""

    def __init__(self, optimizer: LowPrecOptimizer) -> None:
        self._optimizer = weakref.ref(optimizer)  # hooks live with the model, which may outlive the optimizer
        self._updated: set[int] = set()
        self._lock = threading.Lock()  # autograd has a thread per device
        self._hooks: dict[int, Any] = {}
        self._step_hook = optimizer.register_step_pre_hook(self._end_step)
        self._follow(optimizer)
        optimizer.__dict__[_RELEASED] = self

    def remove(self) -> None:
        """Gradients stay again; what has been updated since the last `step` stays updated."""
        optimizer = self._optimizer()
        if optimizer is not None:
            self._clear(optimizer)
            optimizer.__dict__.pop(_RELEASED, None)
        for handle in (self._step_hook, *self._hooks.values()):
            handle.remove()
        self._hooks.clear()

    def _follow(self, optimizer: LowPrecOptimizer) -> None:
        """Hooks the parameters that have none yet (`add_param_group`)."""
        for param in (p for group in optimizer.param_groups for p in group["params"]):
            if id(param) not in self._hooks and param.requires_grad:
                self._hooks[id(param)] = param.register_post_accumulate_grad_hook(self._update)

    @torch.no_grad()
    def _update(self, param: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        with self._lock:
            if id(param) in self._updated:
                raise RuntimeError(
                    f"gradient release: a second gradient of a parameter of shape {tuple(param.shape)} before "
                    "optimizer.step(): gradient accumulation needs the first one, which was used and freed (so does "
                    "reentrant checkpointing of a module that runs twice). Use larger micro-batches, or remove() it"
                )
            _check_one_process()
            plan = optimizer._plan
            if not self._updated or plan is None:  # it looks at all parameters: once per backward, not for each
                for tell in BEFORE_UPDATE:
                    tell(optimizer)
                plan = optimizer._plan_of_step()
            items = optimizer._collect([param], plan=plan)
            try:
                optimizer._update(items)
            finally:
                optimizer._release(items)
            self._updated.add(id(param))
            param.grad = FreedGradient(param)
            for note in AFTER_UPDATE:
                note()

    def _end_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        for name, value in (("a closure", closure), ("clip", kwargs.get("clip"))):
            if value is not None:
                raise RuntimeError(
                    f"gradient release: step() with {name}, but backward has updated the parameters already; "
                    "StableAdamW clips its updates itself"
                )
        assert isinstance(optimizer, LowPrecOptimizer)
        self._clear(optimizer)
        self._follow(optimizer)

    def _clear(self, optimizer: LowPrecOptimizer) -> None:
        self._updated.clear()
        for param in (p for group in optimizer.param_groups for p in group["params"]):
            if isinstance(param.grad, FreedGradient):
                param.grad = None


def _check_one_process() -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(
            f"gradient release in {dist.get_world_size()} processes: DDP and FSDP reduce gradients between ranks "
            "after the point where it uses them. Train without it; FSDP2 keeps a shard of the gradients only"
        )
