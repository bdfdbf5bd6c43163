# SPDX-License-Identifier: Apache-2.0
"""How the formats fit what flows through them: saturation, underflow, non-finite values, mu, skipped steps.

The counters live on the device and cost one pass over at most 65536 elements of each operand and step. Reading them
here is the one place that waits for the device: read at logging steps.

`slots` is the thorough way, for one batch now and then: what each of the six slots of every layer does to the tensors
that the model really has there.
"""

from __future__ import annotations

import math
import statistics as stats
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_lowprec import numerics
from hf_lowprec.conversion import high_precision
from hf_lowprec.describe import GEMMS
from hf_lowprec.formats import Format, get_format
from hf_lowprec.modules.state import ROLES
from hf_lowprec.numerics.flexible import flexible, mans_of
from hf_lowprec.numerics.search import magnitudes_of, search
from hf_lowprec.presets import get_recipe
from hf_lowprec.recipe import Quant, Recipe, Scaling
from hf_lowprec.selection import weight_of
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
    session.scaling.settle()
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
    session.scaling.settle()
    return {
        name: {role: operand.counts.tolist() for role, operand in zip(ROLES, layer.operands, strict=True)}
        for name, layer in session.scaling.layers.items()
    }


# --- one batch, every slot -----------------------------------------------------------------------------------------


class SlotError(NamedTuple):
    """What quantising one tensor did to it.

    sqnr: signal to quantisation noise, dB (inf: nothing was lost; nan: the tensor is zero).
    underflow: share of the elements other than zero that became zero.
    overflow: share of all elements that lie more than half a step beyond the format's largest value.
    """

    sqnr: float
    underflow: float
    overflow: float


def slots(
    model: nn.Module, loss: Callable[[], Tensor], recipe: str | Path | dict[str, Any] | Recipe | None = None
) -> dict[str, dict[str, SlotError]]:
    """Layer -> `"fprop input"`, ... -> what the recipe's policy of that slot does to the tensors of one batch.

    Args:
        loss: runs the forward pass and returns the loss. It and the backward pass run once, in the base precision, so
            that recipes are compared on the same tensors; gradients that are there are kept as they are.
        recipe: whose slots; None: the one that the model was converted with. A model that was never converted can be
            asked, too: about every `nn.Linear` and transformers' `Conv1D` but its output embeddings.

    Delayed scales are taken from the tensor's own amax here, since a history of them belongs to a run; ranges that are
    searched or learned (and free splits) are searched in the tensor.
    Stochastic rounding draws its words from seed 0.

    Raises ValueError: no recipe given, and the model is not converted.
    """
    session = session_of(model)
    if recipe is None and session is None:
        raise ValueError("the model is not converted: say whose slots by recipe=")
    chosen = get_recipe(recipe) if recipe is not None else session.recipe  # type: ignore[union-attr]
    layers = _linears(model)
    if session is not None:
        layers = {name: layer for name, layer in layers.items() if name in session.scaling.layers}
    found: dict[str, dict[str, SlotError]] = {name: {} for name in layers}
    parameters = list(model.parameters())
    before = [p.grad for p in parameters]

    def watch(name: str, layer: nn.Module) -> Any:
        def forward(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            x = arguments[0].detach()
            x = x.reshape(-1, x.shape[-1])
            if output.requires_grad:
                output.register_hook(lambda grad: backward(x, grad.detach().reshape(-1, grad.shape[-1])))

        def backward(x: Tensor, g: Tensor) -> None:
            weight = weight_of(layer).detach()
            weight = weight if isinstance(layer, nn.Linear) else weight.t()  # [N, K]
            # Each with the axis last that its GEMM sums over.
            along = {
                "fprop input": x, "fprop weight": weight, "dgrad grad_output": g, "dgrad weight": weight.t(),
                "wgrad input": x.t(), "wgrad grad_output": g.t(),
            }  # fmt: skip
            for gemm, (_, names) in GEMMS.items():
                for slot in names:
                    quant: Quant | None = getattr(getattr(chosen, gemm), slot)
                    if quant is None:
                        continue
                    # Both GEMMs read one flexible operand, whose rows are output channels.
                    tensor = along[f"fprop {slot}" if quant.flexible else f"{gemm} {slot}"]
                    found[name][f"{gemm} {slot}"] = slot_error(tensor, quant)

        return layer.register_forward_hook(forward)

    handles = [watch(name, layer) for name, layer in layers.items()]
    try:
        for p in parameters:
            p.grad = None
        with high_precision(model):
            loss().backward()
    finally:
        for handle in handles:
            handle.remove()
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad
    return found


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    getter: Any = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None

    def linear(module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or any(c.__name__ == "Conv1D" for c in type(module).__mro__)

    return {name: module for name, module in model.named_modules() if module is not head and linear(module)}


@torch.no_grad()
def slot_error(x: Tensor, quant: Quant) -> SlotError:
    """The loss in quantising `x` [..., K] along its last axis, by `numerics` alone; see `slots` for scales."""
    x = x.float().contiguous()
    fmt = get_format(quant.format)
    if quant.flexible:
        assert isinstance(fmt, Format)
        seen = magnitudes_of(x, rows=quant.scaling.granularity == "row")
        best = search(seen, fmt.bits, mans_of(fmt, free=quant.split == "free"))
        maxval = best.maxval if len(best.maxval) > 1 else best.maxval[0, 0]
        back = flexible(x, maxval, best.man, fmt.bits)
        beyond = x.abs() > maxval * (1 + 2.0 ** -(best.man + 2))
        shares = float(numerics.underflow_fraction(x, back)), float(beyond.sum() / max(1, x.numel()))
        return SlotError(float(numerics.sqnr(x, back)), *shares)
    scale = None
    if quant.scaling.method not in ("none", "static", "current"):
        own = Scaling(snap=quant.scaling.snap, margin=quant.scaling.margin)
        scale = numerics.scale_from_amax(numerics.finite_amax(x), fmt, own)
        quant = replace(quant, scaling=own)
    seed = 0 if quant.rounding.mode == "stochastic" else None
    scaled = numerics.quantize(x, quant, scale=scale, seed=seed)
    back = numerics.dequantize(scaled, quant)
    codes = scaled.qdata
    values = codes.float() if codes.is_floating_point() else numerics.decode(codes, fmt)
    below = fmt.decode(fmt.max_code - 1) if isinstance(fmt, Format) else fmt.max
    slack = 1 + (1 - below / fmt.max) / 2
    over = (values.abs() == fmt.max) & (x.abs() > back.abs() * slack)
    return SlotError(
        float(numerics.sqnr(x, back)),
        float(numerics.underflow_fraction(x, back)),
        float(over.sum() / max(1, x.numel())),
    )


def over_layers(found: dict[str, dict[str, SlotError]]) -> dict[str, dict[str, float]]:
    """Slot -> the median and the least SQNR over the layers (dB), and the mean shares, of a result of `slots`."""
    out: dict[str, dict[str, float]] = {}
    for slot in dict.fromkeys(slot for errors in found.values() for slot in errors):
        errors = [layer[slot] for layer in found.values() if slot in layer]
        known = [e.sqnr for e in errors if not math.isnan(e.sqnr)] or [math.nan]
        out[slot] = {
            "sqnr": stats.median(known),
            "sqnr_least": min(known),
            "underflow": stats.fmean(e.underflow for e in errors),
            "overflow": stats.fmean(e.overflow for e in errors),
        }
    return out
