# SPDX-License-Identifier: Apache-2.0
"""SGD with momentum, as torch.optim.SGD; its equations are in `optim/algorithms.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_lowprec.optim.adopt import adopt
from hf_lowprec.optim.base import _NO_STATE, LowPrecOptimizer
from hf_lowprec.recipe import States


class SGD(LowPrecOptimizer):
    """torch.optim.SGD: momentum, dampening, Nesterov, coupled weight decay. `momentum_buffer` has `states.exp_avg`.

    Without momentum a parameter keeps `step` alone (it seeds stochastic rounding). Momentum that is switched on later
    starts from 0; switched off, the buffer stays.

    Other arguments, and what raises: see `AdamW` and `LowPrecOptimizer`.
    """

    algorithm = "sgd"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        states: str | States = "8bit",
        master: str | None = "default",
        overrides: Mapping[str, str | States] | None = None,
        nonfinite: str = "step",
        maximize: bool = False,
        **options: Any,
    ) -> None:
        if not momentum >= 0:
            raise ValueError(f"momentum: {momentum} is not >= 0")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("nesterov: needs a momentum, and no dampening")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(
            params, defaults, states=states, master=master, overrides=overrides, nonfinite=nonfinite, options=options
        )

    def moments(self, group: Mapping[str, Any], state: Mapping[str, Any] = _NO_STATE) -> tuple[str, ...]:
        kept = group["momentum"] or any(key.startswith("momentum_buffer") for key in state)
        return ("momentum_buffer",) if kept else ()

    def from_foreign(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """torch counts no steps; a buffer says that there was one."""
        if "step" in state:  # another optimizer's: what is missing will be said
            return state
        kept = {key: value for key, value in state.items() if value is not None}
        return {"step": torch.tensor(float(bool(kept))), **kept}

    @classmethod
    def adopt(cls, optimizer: Optimizer, states: str | States) -> SGD:
        """Takes over from a torch.optim.SGD, as `AdamW.adopt` does from Adam; its equations stay."""
        new = adopt(optimizer, states, {torch.optim.SGD: SGD})
        assert isinstance(new, SGD)
        return new
