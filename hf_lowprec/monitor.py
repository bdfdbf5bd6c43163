# SPDX-License-Identifier: Apache-2.0
"""How the formats fit what flows through them: saturation, underflow, non-finite values, mu, skipped steps.

The counters live on the device and cost one pass over at most 65536 elements of each operand and step. Reading them
here is the one place that waits for the device: read at logging steps.
"""

from __future__ import annotations

import torch
from torch import nn

from hf_lowprec.modules.state import ROLES
from hf_lowprec.session import session_of


@torch.no_grad()
def statistics(model: nn.Module, *, reset: bool = False) -> dict[str, float]:
    """Counters of a converted model since conversion, or since the last `reset`, ready for `Trainer.log`.

    Returns: `lowprec/<role>_saturated`, `_underflow` (fractions of the elements looked at) and `_nonfinite` (a count)
    for input, weight and grad_output, and `lowprec/mu_min` where the recipe scales gradients by mu. Empty for a model
    that is not converted or quantises nothing.
    """
    session = session_of(model)
    if session is None or not session.scaling.layers:
        return {}
    out: dict[str, float] = {}
    for role in ROLES:
        counts = [operand.counts for operand in session.scaling.operands(role)]
        seen, saturated, underflow, nonfinite = torch.stack([c.cpu() for c in counts]).sum(0).tolist()
        out[f"lowprec/{role}_saturated"] = saturated / max(1, seen)
        out[f"lowprec/{role}_underflow"] = underflow / max(1, seen)
        out[f"lowprec/{role}_nonfinite"] = float(nonfinite)
        if reset:
            torch._foreach_zero_(counts)
    if session.gradients is not None:
        out["lowprec/mu_min"] = float(session.gradients.mu.min())
    return out


def per_layer(model: nn.Module) -> dict[str, dict[str, list[int]]]:
    """Layer name -> role -> [elements looked at, saturated, underflowed, non-finite]."""
    session = session_of(model)
    if session is None:
        return {}
    return {
        name: {role: operand.counts.tolist() for role, operand in zip(ROLES, layer.operands, strict=True)}
        for name, layer in session.scaling.layers.items()
    }
