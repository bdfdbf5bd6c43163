# SPDX-License-Identifier: Apache-2.0
"""State of converted layers that is not a weight: amax histories, delayed scales, counters.

It is neither Parameter nor buffer. A buffer would appear in state dicts that stock loaders refuse, DDP would overwrite
every rank's values with rank 0's, and `model.half()` would cast it. It travels in the optimizer's state dict instead
(`hf_lowprec.stepping`), and follows the weight from device to device by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hf_lowprec import numerics
from hf_lowprec.formats import get_format
from hf_lowprec.modules.weight_cache import WeightCache
from hf_lowprec.operands import LinearSpec, OperandState
from hf_lowprec.recipe import InputNorm, Quant, Recipe, Scaling

if TYPE_CHECKING:
    from hf_lowprec.modules.flexible import Flexible
    from hf_lowprec.modules.sharing import SharedInput

ROLES = ("input", "weight", "grad_output")
GEMMS = ("fprop", "dgrad", "wgrad")


SumSeeds = tuple[Tensor | None, Tensor | None, Tensor | None]


def role_quants(recipe: Recipe) -> dict[str, Quant | None]:
    """The policy whose scale each operand role carries from step to step: the first slot that the role fills."""
    return {
        "input": recipe.fprop.input or recipe.wgrad.input,
        "weight": recipe.fprop.weight or recipe.dgrad.weight,
        "grad_output": recipe.dgrad.grad_output or recipe.wgrad.grad_output,
    }


def _operand(quant: Quant | None, other: Quant | None, seed: int) -> OperandState:
    delayed = quant is not None and quant.scaling.method == "delayed"
    random = any(q is not None and q.rounding.mode == "stochastic" for q in (quant, other))
    return OperandState(
        scale=torch.zeros(()) if delayed else None,
        amax=torch.zeros(()) if delayed else None,
        counts=torch.zeros(4, dtype=torch.int64),
        seed=torch.tensor(seed, dtype=torch.int64) if random else None,
    )


def _sum_seeds(recipe: Recipe, index: int) -> SumSeeds:
    """One stream of random words for each GEMM whose sums round stochastically; `_operand` has those below 2^62."""
    gemms = (recipe.fprop, recipe.dgrad, recipe.wgrad)
    return tuple(  # type: ignore[return-value]
        torch.tensor((1 << 62) + ((3 * index + i) << 32), dtype=torch.int64) if random else None
        for i, random in enumerate(g.accumulation.rounding.mode == "stochastic" for g in gemms)
    )


class ProducedOperand(NamedTuple):
    """What a kernel that quantises its own output needs to know of the layer that reads it.

    quant: the policy (`ops.parse_quant`).
    state: scale to use, amax to raise and counts to increase as `ops.quantize` does.
    ready: delayed scaling: the host knows that the scale is not 0. Without it the layer has to quantise by itself.
    remade: a source of the tensor is welcome (`Quantized.source`).
    """

    quant: str
    state: OperandState
    ready: bool
    remade: bool = False


@dataclass(eq=False)
class LayerState:
    """State of one converted linear: what `functional.linear` needs besides the Parameters.

    ready: of each operand, whether the host knows that its delayed scale is not 0; then no pass for the amax is needed
        before a cast. Found out without waiting for the device (`ScalingState.roll`).
    constant: the scales are constants of a model at unit scale (`hf_lowprec.transform`), which nothing rolls.
    shared: the layers that read the same input, and what they or its producer have quantised (`modules.sharing`).
    sum_seeds: of fprop, dgrad and wgrad, where their sums round stochastically. As the seeds of operands they stay for
        an optimizer step, so that recomputed activations have the same bits, and micro-batches the same words.
    flexible: ranges that are searched or learned (`modules.flexible`).
    least: an input of fewer elements is multiplied in the base precision, in eager mode (`hf_lowprec.break_even`).
    input_norm: what the layer does to its input first.
    """

    spec: LinearSpec
    operands: tuple[OperandState, OperandState, OperandState]
    enabled: bool = True
    ready: tuple[bool, bool, bool] = (False, False, False)
    weight_cache: WeightCache = field(default_factory=WeightCache)
    shared: SharedInput | None = None
    sum_seeds: SumSeeds = (None, None, None)
    flexible: Flexible | None = None
    least: int = 0
    input_norm: InputNorm | None = None
    constant: bool = False

    @classmethod
    def create(cls, recipe: Recipe, index: int, *, weight_is_kn: bool, emulate: bool) -> LayerState:
        first = role_quants(recipe)
        second = {"input": recipe.wgrad.input, "weight": recipe.dgrad.weight, "grad_output": recipe.wgrad.grad_output}
        operands = tuple(_operand(first[r], second[r], seed=(3 * index + i) << 32) for i, r in enumerate(ROLES))
        spec = LinearSpec.from_recipe(recipe, weight_is_kn=weight_is_kn, emulate=emulate)
        cache = WeightCache(recipe.weight_cache)
        seeds = _sum_seeds(recipe, index)
        return cls(spec, operands, weight_cache=cache, sum_seeds=seeds, input_norm=recipe.input_norm)  # type: ignore[arg-type]

    def set_constants(self, scales: Sequence[float]) -> None:
        """Cast with these scales of input, weight and output gradient from now on."""
        self.operands = tuple(  # type: ignore[assignment]
            operand._replace(scale=torch.tensor(scale)) for operand, scale in zip(self.operands, scales, strict=True)
        )
        self.constant, self.ready = True, (True, True, True)

    def to(self, device: torch.device) -> None:
        self.operands = tuple(  # type: ignore[assignment]
            OperandState(*(None if t is None else t.to(device) for t in operand))  # type: ignore[arg-type]
            for operand in self.operands
        )
        self.sum_seeds = tuple(None if seed is None else seed.to(device) for seed in self.sum_seeds)  # type: ignore[assignment]
        self.weight_cache.drop()
        if self.flexible is not None:
            self.flexible.to(device)
        if self.shared is not None:
            self.shared.set_operand(self.operands[0])
            self.shared.drop()

    def input_operand(self, elements: int | None = None) -> ProducedOperand | None:
        """For producers of the input, of so many elements (`sharing.hand_over`); None: nothing can be handed over."""
        if elements is not None and elements < self.least:
            return None
        if not self.enabled or not self.spec.shared_input or self.spec.fprop_input is None:
            return None
        return ProducedOperand(self.spec.fprop_input, self.operands[0], self.ready[0], self.spec.remade)


@dataclass
class ScalingState:
    """Delayed scaling of a whole model: one [n, history] table, rolled once per optimizer step."""

    recipe: Recipe
    layers: dict[str, LayerState]
    distributed: bool = False
    history: dict[str, Tensor] = field(default_factory=dict)
    _news: dict[str, tuple[torch.cuda.Event, Tensor]] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_news": {}}  # an event cannot be copied

    def __post_init__(self) -> None:
        for role, scaling in self._delayed().items():
            self.history.setdefault(role, torch.zeros(len(self.layers), scaling.history))

    def _delayed(self) -> dict[str, Scaling]:
        quants = role_quants(self.recipe)
        return {r: q.scaling for r, q in quants.items() if q is not None and q.scaling.method == "delayed"}

    @torch.no_grad()
    def settle(self) -> None:
        """Have the counters and amaxes hold what casts of weights after the last step saw (`modules.emission`), of
        weights that were used since. Whoever reads them calls it first; it waits for nobody."""
        found = [
            (layer.operands[1], news)
            for layer in self.layers.values()
            if (news := layer.weight_cache.take_news()) is not None
        ]
        if not found:
            return
        torch._foreach_add_(
            [operand.counts for operand, _ in found],
            [news.counts.to(operand.counts.device, non_blocking=True) for operand, news in found],
        )
        pairs = [(operand.amax, news.amax) for operand, news in found if operand.amax is not None]
        if pairs:
            torch._foreach_maximum_(
                [amax for amax, _ in pairs], [new.to(amax.device, non_blocking=True) for amax, new in pairs]
            )

    def operands(self, role: str) -> list[OperandState]:
        index = ROLES.index(role)
        return [layer.operands[index] for layer in self.layers.values()]

    @torch.no_grad()
    def roll(self) -> None:
        """Close an optimizer step: amax into the histories, new scales out of them. No host synchronisation."""
        self.settle()
        for role, scaling in self._delayed().items():
            operands = self.operands(role)
            amaxes, scales = [_not_none(o.amax) for o in operands], [_not_none(o.scale) for o in operands]
            home = amaxes[0].device
            history = self.history[role] = self.history[role].to(home, non_blocking=True)
            amax = torch.stack([a.to(home, non_blocking=True) for a in amaxes])
            if self.distributed and scaling.group == "data_parallel":
                dist.all_reduce(amax, dist.ReduceOp.MAX)
            history[:, 0] = torch.maximum(history[:, 0], amax)
            scale = torch.stack([s.to(home, non_blocking=True) for s in scales])
            fmt = get_format(role_quants(self.recipe)[role].format)  # type: ignore[union-attr]
            numerics.delayed_update(history, scale, torch.full_like(scale, fmt.max), scaling)
            torch._foreach_copy_(scales, list(scale.unbind()), non_blocking=True)
            torch._foreach_zero_(amaxes)
            self._look_for_scales(role, scale)
        seeds: dict[int, Tensor] = {}
        for layer in self.layers.values():
            layer.weight_cache.close_step()  # from the first step on copies are kept
            if layer.shared is not None:
                layer.shared.drop()
            every = (*(operand.seed for operand in layer.operands), *layer.sum_seeds)
            seeds.update({id(seed): seed for seed in every if seed is not None})  # shared ones once
        for seed in seeds.values():
            seed.add_(1)

    def drop_weights(self) -> None:
        """Forget all low-precision copies of weights."""
        for layer in self.layers.values():
            layer.weight_cache.drop()

    def _look_for_scales(self, role: str, scale: Tensor) -> None:
        """Note which layers have a delayed scale by now; of a GPU what an earlier step has sent. Nobody waits.

        A scale that is not 0 never becomes 0 again, so old news are good news.
        """
        index = ROLES.index(role)
        layers = list(self.layers.values())
        if all(layer.ready[index] for layer in layers):
            self._news.pop(role, None)
            return
        if not scale.is_cuda:
            _note_ready(layers, index, scale)
            return
        if torch.cuda.is_current_stream_capturing():
            return
        sent = self._news.get(role)
        if sent is not None:
            arrived, values = sent
            if not arrived.query():
                return
            _note_ready(layers, index, values)
        values = torch.empty(scale.shape, dtype=scale.dtype, pin_memory=True)
        values.copy_(scale, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._news[role] = (arrived, values)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors keyed by layer name, ready for `torch.load(weights_only=True)`."""
        self.settle()
        out: dict[str, Any] = {}
        for i, (name, layer) in enumerate(self.layers.items()):
            entry = out[name] = {}
            for role, operand in zip(ROLES, layer.operands, strict=True):
                tensors = {k: v.clone() for k, v in operand._asdict().items() if v is not None}
                if role in self.history:
                    tensors["history"] = self.history[role][i].clone()
                if layer.flexible is not None:
                    tensors.update({k: v.detach().clone() for k, v in layer.flexible.tensors(role).items()})
                entry[role] = tensors
            sums = {f"seed_{gemm}": s.clone() for gemm, s in zip(GEMMS, layer.sum_seeds, strict=True) if s is not None}
            if sums:
                entry["sums"] = sums
        return out

    def check(self, state: Any) -> None:
        """Raises ValueError, before anything changes, unless `state` fits these layers."""
        if not isinstance(state, dict) or not all(isinstance(roles, dict) for roles in state.values()):
            raise ValueError("low-precision state is damaged: no table of layers")
        mine = self.state_dict()
        if set(state) != set(mine):
            missing, extra = sorted(set(mine) - set(state))[:3], sorted(set(state) - set(mine))[:3]
            raise ValueError(f"low-precision state of other layers: missing {missing}, unexpected {extra}")
        for name, roles in mine.items():
            for role, tensors in roles.items():
                theirs = state[name].get(role)
                for key, tensor in tensors.items():
                    value = theirs.get(key) if isinstance(theirs, dict) else None
                    if not isinstance(value, Tensor) or value.shape != tensor.shape or value.dtype != tensor.dtype:
                        raise ValueError(f"low-precision state {name}.{role}.{key} is missing or of another shape")
                    # Scales, amaxes and counters: whatever is none of these came out of a damaged file.
                    if not key.startswith("seed") and not bool((value.isfinite() & (value >= 0)).all()):
                        raise ValueError(f"low-precision state {name}.{role}.{key} is negative or not finite")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.check(state)
        for i, (name, layer) in enumerate(self.layers.items()):
            for role, operand in zip(ROLES, layer.operands, strict=True):
                tensors = state[name][role]
                for key, target in operand._asdict().items():
                    if target is not None:
                        target.copy_(tensors[key])
                if role in self.history:
                    self.history[role][i].copy_(tensors["history"])
                if layer.flexible is not None:
                    for key, target in layer.flexible.tensors(role).items():
                        target.data.copy_(tensors[key])
            if layer.flexible is not None:
                layer.flexible.loaded()
            for gemm, seed in zip(GEMMS, layer.sum_seeds, strict=True):
                if seed is not None:
                    seed.copy_(state[name]["sums"][f"seed_{gemm}"])
            layer.ready = (layer.constant,) * 3
            layer.weight_cache.drop()
            layer.weight_cache.take_news()
            layer.weight_cache.followed = True  # by the optimizer whose state dict this comes from
            if layer.shared is not None:
                layer.shared.drop()
        self._news.clear()


def _note_ready(layers: Sequence[LayerState], index: int, scales: Tensor) -> None:
    for layer, scale in zip(layers, scales.tolist(), strict=True):
        if scale > 0:
            layer.ready = (*layer.ready[:index], True, *layer.ready[index + 1 :])  # type: ignore[assignment]


def _not_none(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
