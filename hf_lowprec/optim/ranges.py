# SPDX-License-Identifier: Apache-2.0
"""Training of learned ranges and mantissa widths (`modules.flexible`), beside whatever optimizer trains the weights.

They cannot become a param group of the script's optimizer: a scheduler that was made before the model was prepared has
one learning rate per group, and torch's schedulers raise at their next step when there is a group more. Nor would DDP
reduce them, which knows the module's Parameters only, nor FSDP1 and DeepSpeed, whose optimizers hold flat shards. So
every `optimizer.step()` that follows the model steps them too, by Adam without weight decay, at `RATIO` times the
learning rate of the optimizer's first group:

    width   M     -= lr * m / (sqrt(v) + eps)                  of its gradient
    range   maxval *= 2^-(lr * m / (sqrt(v) + eps))            of the gradient by log2(maxval): maxval * ln2 * gradient

A range is stepped by its logarithm, because ranges of weights and of inputs are orders of magnitude apart and no range
may become negative. Parameters that the script has put into an optimizer of its own (`hf_lowprec.learned_parameters`)
are stepped by that one alone. A gradient that is not finite leaves its element where it is. One step changes a range
by no more than 0.1 octaves and a width by no more than 0.1 bits, since SGD's learning rates are not Adam's; where the
first group has none of its own (Adafactor's relative steps) it counts as 1e-3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

RATIO = 10.0
_MOST = 0.1
_LR = 1e-3
_BETAS = (0.9, 0.999)
_EPS = 1e-12  # gradients of a mean loss by a logarithm may be as small as 1e-9
_LN2 = math.log(2.0)


class Operand(Protocol):
    """`modules.flexible.Operand`: range (0 until it is found) and width, and whether the host knows them found."""

    maxval: torch.nn.Parameter
    man: torch.nn.Parameter
    found: bool

    @property
    def widths(self) -> tuple[int, int]:
        """The least and the most that `man` may be."""
        ...


class RangeTrainer:
    """Trains the operands of one model whose range requires gradients, in the model's order."""

    def __init__(self, operands: Iterable[Operand]) -> None:
        self.operands = [o for o in operands if o.maxval.requires_grad]
        self.parameters = [
            (p, p is o.maxval) for o in self.operands for p in (o.maxval, o.man) if p.requires_grad
        ]  # of each whether it is a range
        self.step_count = torch.zeros((), dtype=torch.int64)
        self._agreed = False
        self._moments: list[tuple[Tensor, Tensor]] = [
            (torch.zeros_like(p.data), torch.zeros_like(p.data)) for p, _ in self.parameters
        ]

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, *, distributed: bool) -> None:
        """One update from the gradients that there are, which are then dropped. No host synchronisation.

        distributed: all ranks call it together. Gradients are averaged over them; and in the first steps the ranks
            agree on ranges, which each has found in its own first batch (this waits for the device).
        """
        if not self.parameters:
            return
        if distributed:
            self._reduce()
        elif all(p.grad is None for p, _ in self.parameters):
            return  # a step of another model's optimizer, or two optimizers of one model
        theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
        lr = optimizer.param_groups[0].get("lr")
        lr = _LR if lr is None else lr
        self.step_count += 1
        mine = [i for i, (p, _) in enumerate(self.parameters) if p.grad is not None and id(p) not in theirs]
        for is_range in (True, False):
            chosen = [i for i in mine if self.parameters[i][1] is is_range]
            if chosen:
                self._adam(chosen, lr, is_range)
        self._clamp()
        for parameter, _ in self.parameters:
            if id(parameter) not in theirs:
                parameter.grad = None

    def _clamp(self) -> None:
        """Widths within what there is: two launches for all of one device and number of bits."""
        together: dict[tuple[torch.device, int, int], list[Tensor]] = {}
        for operand in self.operands:
            together.setdefault((operand.man.device, *operand.widths), []).append(operand.man)
        for (_, least, most), widths in together.items():
            torch._foreach_clamp_min_(widths, least)
            torch._foreach_clamp_max_(widths, most)

    def _adam(self, chosen: list[int], lr: float | Tensor, is_range: bool) -> None:
        """Over all of them in one vector: thousands of them cost some thirty kernels."""
        parameters = [self.parameters[i][0] for i in chosen]
        home = parameters[0].device
        for i in chosen:  # a model that moved since: copies back and forth in each step would wait for a GPU
            if self._moments[i][0].device != self.parameters[i][0].device:
                first, second = (m.to(self.parameters[i][0].device) for m in self._moments[i])
                self._moments[i] = first, second
        value, grad = _flat(parameters, home), _flat([p.grad for p in parameters if p.grad is not None], home)
        first, second = (_flat([self._moments[i][k] for i in chosen], home) for k in (0, 1))
        grad = grad * value * _LN2 if is_range else grad
        usable = grad.isfinite()
        grad = torch.where(usable, grad, 0.0)
        first = torch.lerp(grad, first, _BETAS[0])
        second = torch.lerp(grad.square(), second, _BETAS[1])
        count = int(self.step_count)  # lives on the CPU
        size = (second / (1.0 - _BETAS[1] ** count)).sqrt() + _EPS
        change = (RATIO * lr * (first / (1.0 - _BETAS[0] ** count)) / size).clamp(-_MOST, _MOST)
        change = torch.where(usable, change, 0.0)
        value = value * torch.exp2(-change) if is_range else value - change
        targets: list[list[Tensor]] = [[*parameters], *([self._moments[i][k] for i in chosen] for k in (0, 1))]
        for tensors, new in zip(targets, (value, first, second), strict=True):
            pieces = new.split([t.numel() for t in tensors])
            torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(pieces, tensors, strict=True)])

    def _reduce(self) -> None:
        if not self._agreed:
            self._agree()
        parameters = [p for p, _ in self.parameters]
        flat = _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters], parameters[0].device)
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = piece.view_as(parameter).to(parameter.device, copy=True)

    def _agree(self) -> None:
        """Take the range and width of each operand from the first rank that has found them.

        Asked again until every operand is found on some rank (an expert may see no token for long), and then no more.
        """
        values = [p.detach().reshape(-1) for o in self.operands for p in (o.maxval, o.man)]
        mine = _flat(values, values[0].device)
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, mine)
        ranks = [rank.split([v.numel() for v in values]) for rank in gathered]
        self._agreed = True
        for i, operand in enumerate(self.operands):
            first = next((rank for rank in ranks if bool((rank[2 * i] > 0).all())), None)
            operand.found = first is not None
            self._agreed &= operand.found
            if first is not None:
                operand.maxval.copy_(first[2 * i].view_as(operand.maxval))
                operand.man.copy_(first[2 * i + 1].view_as(operand.man))

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors; the Parameters themselves travel with their layers."""
        flat = [torch.cat([m[i].reshape(-1).cpu() for m in self._moments] or [torch.zeros(0)]) for i in (0, 1)]
        return {"step": self.step_count.clone(), "exp_avg": flat[0], "exp_avg_sq": flat[1]}

    def check(self, state: Any) -> None:
        """Raises ValueError unless `state` fits."""
        mine = self.state_dict()
        for key, tensor in mine.items():
            value = state.get(key) if isinstance(state, dict) else None
            if not isinstance(value, Tensor) or value.shape != tensor.shape or value.dtype != tensor.dtype:
                raise ValueError(f"low-precision state ranges.{key} is missing or of another shape")
            if not bool(value.isfinite().all()) or (key != "exp_avg" and bool((value < 0).any())):
                raise ValueError(f"low-precision state ranges.{key} is negative or not finite")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.check(state)
        self.step_count.copy_(state["step"])
        sizes = [m[0].numel() for m in self._moments]
        for i, key in enumerate(("exp_avg", "exp_avg_sq")):
            for moments, piece in zip(self._moments, state[key].split(sizes), strict=True):
                moments[i].data = piece.view_as(moments[i]).to(moments[i].device, copy=True)
        self._agreed = all(o.found for o in self.operands)  # every rank loads the same


def _flat(tensors: list[Any], device: torch.device) -> Tensor:
    return torch.cat([t.detach().reshape(-1).to(device) for t in tensors])
