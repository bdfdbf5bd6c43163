# SPDX-License-Identifier: Apache-2.0
"""AdamW, Adam and StableAdamW whose states are data; their equations are in `optim/algorithms.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_lowprec.optim import states as st
from hf_lowprec.optim.adopt import adopt
from hf_lowprec.optim.base import _NO_STATE, LowPrecOptimizer
from hf_lowprec.recipe import States


class _AdamLike(LowPrecOptimizer):
    """Two moments, betas and eps."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        *,
        maximize: bool,
        more: Mapping[str, Any],
        **common: Any,
    ) -> None:
        check_betas(betas)
        if not eps >= 0:
            raise ValueError(f"eps: {eps} is not >= 0")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            **more,
        }
        super().__init__(params, defaults, **common)

    def moments(self, group: Mapping[str, Any], state: Mapping[str, Any] = _NO_STATE) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")


def check_betas(betas: tuple[float, float]) -> None:
    """Raises ValueError, unless both are in [0, 1)."""
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: {betas} are not both in [0, 1)")


class AdamW(_AdamLike):
    """Adam with decoupled weight decay (arXiv 1711.05101) and states of any format.

    params: tensors, (name, tensor) pairs, or groups of either, as for torch's optimizers.
    lr: float or 0-d tensor.
    decoupled: False is Adam's L2 regularisation: the decay joins the gradient, and so the moments.
    states, master, overrides, nonfinite, and what raises: see `LowPrecOptimizer`.
    """

    algorithm = "adam"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        states: str | States = "8bit",
        master: str | None = "default",
        overrides: Mapping[str, str | States] | None = None,
        nonfinite: str = "step",
        maximize: bool = False,
        decoupled: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, maximize=maximize, more={"decoupled_weight_decay": decoupled},
            states=states, master=master, overrides=overrides, nonfinite=nonfinite, options=options,
        )  # fmt: skip

    def from_foreign(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        return state

    @classmethod
    def adopt(cls, optimizer: Optimizer, states: str | States) -> AdamW | StableAdamW:
        """Takes over from a torch.optim.AdamW (gives an AdamW) or torch.optim.Adam (gives an Adam).

        The new optimizer has the same `param_groups` list and the same hooks, so LR schedulers built on the old one
        go on driving it. Moments that exist are quantised. The old optimizer shares the new one's `state` and forwards
        its methods, so a script may go on using, saving and loading either; adopted again, it gives the same new one.
        States with predicted scales become exact ones (`fp8-lm-exact`) under an Adam with weight decay, which is
        coupled. States whose `algorithm` is `stable-adamw` give a StableAdamW instead, which refuses such an Adam, and
        an eps of 0. Nothing has changed when it raises: TypeError for another class, or a mode that has no counterpart
        here (amsgrad, differentiable); ValueError for moments that hold NaN or Inf, low-precision states that a torch
        optimizer has loaded, or one that was adopted with other states.
        """
        kinds: dict[type[Optimizer], type[LowPrecOptimizer]] = {torch.optim.AdamW: AdamW, torch.optim.Adam: Adam}
        if st.resolve_states(states).algorithm is not None:
            kinds = dict.fromkeys(kinds, StableAdamW)
        new = adopt(optimizer, states, kinds)
        assert isinstance(new, AdamW | StableAdamW)
        return new


class Adam(AdamW):
    """Adam with L2 regularisation (arXiv 1412.6980): `AdamW` with `decoupled=False` and no decay by default."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        states: str | States = "8bit",
        master: str | None = "default",
        overrides: Mapping[str, str | States] | None = None,
        nonfinite: str = "step",
        maximize: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, maximize=maximize, decoupled=False,
            states=states, master=master, overrides=overrides, nonfinite=nonfinite, **options,
        )  # fmt: skip


class StableAdamW(_AdamLike):
    """AdamW with update clipping (arXiv 2304.13013, algorithm 2): lr is divided by the RMS of g / sqrt(v) where that
    exceeds 1, per tensor, so no gradient clipping is needed. The betas are debiased instead of the moments.

    Arguments: see `AdamW`.
    """

    algorithm = "stable_adam"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        states: str | States = "8bit",
        master: str | None = "default",
        overrides: Mapping[str, str | States] | None = None,
        nonfinite: str = "step",
        maximize: bool = False,
        **options: Any,
    ) -> None:
        if not eps > 0:
            raise ValueError(f"eps: {eps} is not > 0, and StableAdamW divides by its square where v is 0")
        super().__init__(
            params, lr, betas, eps, weight_decay, maximize=maximize, more={},
            states=states, master=master, overrides=overrides, nonfinite=nonfinite, options=options,
        )  # fmt: skip
