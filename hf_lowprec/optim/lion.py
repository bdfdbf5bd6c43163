# SPDX-License-Identifier: Apache-2.0
"""Lion (arXiv 2302.06675): one moment, and steps of one size; its equations are in `optim/algorithms.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_lowprec.optim.adamw import check_betas
from hf_lowprec.optim.base import _NO_STATE, LowPrecOptimizer
from hf_lowprec.recipe import States


class Lion(LowPrecOptimizer):
    """Lion with decoupled weight decay. The paper advises a third to a tenth of AdamW's lr, and as much more decay.

    betas: of the direction, and of the moment. Other arguments, and what raises: see `AdamW` and `LowPrecOptimizer`.
    """

    algorithm = "lion"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-2,
        *,
        states: str | States = "8bit",
        master: str | None = "default",
        overrides: Mapping[str, str | States] | None = None,
        nonfinite: str = "step",
        maximize: bool = False,
        **options: Any,
    ) -> None:
        check_betas(betas)
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(
            params, defaults, states=states, master=master, overrides=overrides, nonfinite=nonfinite, options=options
        )

    def moments(self, group: Mapping[str, Any], state: Mapping[str, Any] = _NO_STATE) -> tuple[str, ...]:
        return ("exp_avg",)
