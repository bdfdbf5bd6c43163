# SPDX-License-Identifier: Apache-2.0
"""What stands in `param.grad` where gradient release has used and freed the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class FreedGradient(Tensor):
    """A gradient's shape, dtype and device without its memory; every operation on it raises RuntimeError."""

    @staticmethod
    def __new__(cls, like: Tensor) -> FreedGradient:
        made: FreedGradient = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, like.shape, dtype=like.dtype, device=like.device
        )
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(
            f"{func} reads a gradient that was used in backward and freed (optim.release_gradients). Clipping by the "
            "global norm (clip_grad_norm_; the Trainer's max_grad_norm, set it to 0), GradScaler, DDP and gradient "
            "accumulation need all gradients at once: use StableAdamW, which clips its updates itself, bfloat16 and "
            "one backward per step, or no gradient release"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FreedGradient({tuple(self.shape)}, {self.dtype})"
