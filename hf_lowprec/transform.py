# SPDX-License-Identifier: Apache-2.0
"""Unit scaling of a decoder: the constants of its GEMMs, its weights at the beginning, its learning rates.

The papers write a unit-scaled weight U ~ N(0, 1) and operations that multiply by constants. Here the Parameter is the
folded weight W = a U, as a stock model holds it, and a constant is applied where it costs nothing: in the cast,

    Q(x / s_x) @ Q(W / s_w).T * (s_x s_w)          and likewise with s_g for gradients,

whose codes are those of the unit-scaled operands. So no operation of the model is rewritten: checkpoints, adapters,
generation and compilation see the stock model, gradients are the true ones (clipping means what it always meant), and
since a cast's constants are free, none has to be tied to another. s are rounded to powers of two: a cast then changes
exponents only.

Which constants: RMS values go forward through the decoder that `hf_lowprec.decoder` found, and those of gradients go
back (`_rms`), from the RMS of the weights. For a fresh model that gives the papers' rules; loaded ones are measured.

Residual branches: with u-muP's weights, the stream that is divided by sqrt(1 + tau^2) after every branch differs from
one that is never divided by a factor that each norm takes out again, and there tau becomes the same for all branches
of a kind: alpha / sqrt(layers). That factor belongs to `a` of the linear that ends the branch.

A fresh model, as transformers draws it, is brought to unit scale by one factor per weight, so seeds, ranks and devices
agree. Learning rates: `learning_rates`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_lowprec import numerics
from hf_lowprec.decoder import Branch, Decoder, adapts, in_features, is_linear, out_features
from hf_lowprec.modules import LayerState
from hf_lowprec.numerics import unit
from hf_lowprec.recipe import Transform

_LONGEST = 4096
_TOKENS = 4096  # of a micro-batch, before the first one has been seen
CRITICAL = "ends a residual branch (critical for u-muP)"
BESIDE = "no part of the residual stream that unit scaling knows"


class Constants(NamedTuple):
    """RMS of a linear's input, weight and, for a loss that is the mean over one token, output gradient."""

    input: float
    weight: float
    grad_output: float


@dataclass
class UnitScaled:
    """What a conversion keeps of the transform.

    fresh: the weights were brought to unit scale. factors: Parameter name -> its learning rate over the optimizer's.
    eta: u-muP's learning rate over the optimizer's. tokens: of a micro-batch, to the nearest power of two.
    gradients: every converted linear, and the constant of its gradient.
    agreed: the ranks of the job have the first one's factors and constants (`agree`).
    unknown: the weights had no values (meta device): good for a report, and refused by the first forward pass.
    """

    transform: Transform
    fresh: bool
    factors: dict[str, float]
    eta: float
    tokens: float = _TOKENS
    gradients: list[tuple[LayerState, float]] = field(default_factory=list, repr=False)
    unknown: bool = False
    agreed: bool = False

    def note_tokens(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A hook of the token embedding: gradients of a mean over tokens become smaller with their number.

        Powers of two: E5M2 keeps its precision over 28 binades, so the gradient need not follow every batch.
        """
        if self.unknown:
            raise RuntimeError(
                "the model was converted to unit scale on the meta device, where its weights have no values: revert, "
                "load or initialise it, and convert again"
            )
        if torch.compiler.is_compiling() or not (args and module.training and torch.is_grad_enabled()):
            return
        seen = _power_of_two(max(1, args[0].numel()))
        if seen != self.tokens:
            self.tokens = seen
            self.set_gradients()

    def set_gradients(self) -> None:
        for layer, constant in self.gradients:
            scale = layer.operands[2].scale
            assert scale is not None
            scale.fill_(_power_of_two(constant / self.tokens))

    def give_constants(self, layer: LayerState, constants: Constants) -> None:
        """Have `layer` cast with these."""
        scales = (constants.input, constants.weight, constants.grad_output / self.tokens)
        layer.set_constants([_power_of_two(scale) for scale in scales])
        self.gradients.append((layer, constants.grad_output))

    @torch.no_grad()
    def agree(self, root: nn.Module) -> None:
        """Take what the first rank has measured. All ranks call it together, once; waits for the device.

        Ranks without a common seed draw weights of their own. DDP replaces these by the first rank's, but factors and
        constants were computed from them: replicas would step by other learning rates, and drift apart.
        """
        names = [name for name, _ in root.named_parameters()]
        constants = [layer.operands[i].scale for layer, _ in self.gradients for i in (0, 1)]
        mine = [float(self.fresh), self.eta, *(self.factors.get(name, math.nan) for name in names)]
        mine += [*(float(scale) for scale in constants if scale is not None), *(c for _, c in self.gradients)]
        device = next((s.device for s in constants if s is not None), torch.device("cpu"))
        shared = torch.tensor(mine, dtype=torch.float64, device=device)
        dist.broadcast(shared, src=0)
        self.agreed = True
        theirs = iter(shared.tolist())
        self.fresh, self.eta = bool(next(theirs)), next(theirs)
        self.factors = {name: factor for name in names if not math.isnan(factor := next(theirs))}
        for scale in constants:
            if scale is not None:
                scale.fill_(next(theirs))
        for layer, _ in self.gradients:
            layer.weight_cache.drop()  # cast with the constants of before
        self.gradients = [(layer, next(theirs)) for layer, _ in self.gradients]
        self.set_gradients()

    def watch(self, embedding: nn.Module) -> None:
        """Have the number of tokens noted that `embedding` looks up; `unwatch` ends it, in copies as well."""
        embedding.register_forward_pre_hook(self.note_tokens)

    def words(self) -> str:
        if self.unknown:
            return "as if fresh, since the weights have no values on the meta device"
        if not self.fresh:
            return "loaded weights as they are, constants from their RMS"
        low, high = min(self.factors.values(), default=1.0), max(self.factors.values(), default=1.0)
        eta = "" if self.transform.method == "unit" else f" (eta {self.eta:.3g} x lr)"
        return f"fresh weights brought to it, learning rates x {low:.3g} to {high:.3g}{eta}"

    def state_dict(self) -> dict[str, Any]:
        return {"fresh": self.fresh, "factors": dict(self.factors), "eta": self.eta, "tokens": self.tokens}

    def check(self, state: Any, root: nn.Module) -> None:
        """Raises ValueError unless `state` was saved by a model with these Parameters."""
        if not isinstance(state, dict) or set(state) != {"fresh", "factors", "eta", "tokens"}:
            raise ValueError("low-precision state is damaged: no state of the transform to unit scale")
        unknown = sorted(set(state["factors"]) - {name for name, _ in root.named_parameters()})
        if unknown:
            raise ValueError(f"low-precision state of another model: it has no Parameter {unknown[0]!r}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fresh, self.eta, self.tokens = bool(state["fresh"]), float(state["eta"]), float(state["tokens"])
        self.factors = {name: float(factor) for name, factor in state["factors"].items()}


def unwatch(module: nn.Module) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(getattr(hook, "__self__", None), UnitScaled):
            del module._forward_pre_hooks[key]


@dataclass
class Plan:
    """What converting to unit scale would do. rescale: Parameters and what multiplies them."""

    scaled: UnitScaled
    constants: dict[str, Constants]
    left: dict[str, str]
    rescale: list[tuple[nn.Parameter, float]]
    tokens_seen_by: nn.Module

    @torch.no_grad()
    def apply(self) -> None:
        for parameter, factor in self.rescale:
            parameter.mul_(factor)


def plan(model: nn.Module, decoder: Decoder, transform: Transform, *, init: bool | None) -> Plan:
    """init: bring the weights to unit scale; None: if the model is fresh. Changes nothing.

    Raises ValueError: weights that are zero or not finite, or some of which have no values.
    """
    get = model.get_submodule
    named = (*decoder.linears, *decoder.embeddings)
    unknown = all(get(name).weight.is_meta for name in named)
    weights = {name: 0.02 if unknown else _rms_of(name, get(name).weight) for name in named}
    measured = dict(weights)
    gains = {name: 1.0 if unknown else _gain(get(name), kind.plus_one) for name, kind in decoder.kinds.items()}
    fresh = init if init is not None else unknown or is_fresh(model, decoder, weights)
    rescale: dict[str, float] = {}
    gain = 1.0  # of the last norm, where head and embedding share their weight
    if fresh:
        targets, gain = _targets(model, decoder, transform)
        rescale = {name: target / measured[name] for name, target in targets.items()}
        weights.update(targets)
        for name in gains:
            gains[name] = 1.0
        gains[decoder.norm] = gain
    heads = {decoder.head: weights[decoder.embeddings[0]]} if decoder.tied else {}
    constants = _rms(model, decoder, {**weights, **heads}, gains, _length(model, transform))
    factors, eta = _rates(model, decoder, transform, weights, measured, gain) if fresh else ({}, 1.0)
    in_stream = set(constants)
    beside = {name for name, module in model.named_modules() if is_linear(module) and not adapts(name)}
    left = {name: BESIDE for name in beside if name not in in_stream}
    if transform.critical:
        left.update({branch.end: CRITICAL for branch in decoder.branches})
    steps = [(get(name).weight, factor) for name, factor in rescale.items()]
    if gain != 1.0:
        steps += [(p, gain) for p in get(decoder.norm)._parameters.values() if p is not None]
    scaled = UnitScaled(transform, fresh, factors, eta, unknown=unknown)
    return Plan(scaled, constants, left, steps, get(_token_embedding(model, decoder)))  # type: ignore[arg-type]


def is_fresh(model: nn.Module, decoder: Decoder, weights: dict[str, float]) -> bool:
    """Whether nothing has trained these weights: gains are exactly 1, biases exactly 0, and the RMS of every matrix is
    what the config's `initializer_range` (or that over sqrt(2 layers), GPT-2's for the end of a branch) makes of it,
    but for chance. A large model that was trained for a few steps in bf16 may still pass.
    """
    config = getattr(model, "config", None) or next(m.config for m in model.modules() if hasattr(m, "config"))
    std = getattr(config, "initializer_range", None)
    if not isinstance(std, float) or not std > 0:
        return False
    for name in (*decoder.kinds, *decoder.linears):
        module = model.get_submodule(name)
        bias = getattr(module, "bias", None)
        if bias is not None and bool((bias != 0).any()):
            return False
        if name in decoder.kinds and getattr(module, "weight", None) is not None:
            gain: Any = module.weight
            if bool((gain != (0 if decoder.kinds[name].plus_one else 1)).any()):
                return False
    for name, rms in weights.items():
        numel = model.get_submodule(name).weight.numel()  # type: ignore[operator, union-attr]
        # By chance, and the rounding of 16 bits, no more: bf16 gains stay at 1 for long in a model that trains. But
        # rows of padding are zeros, and those that were added are near it.
        slack = 0.03 if name == decoder.head or name in decoder.embeddings else 1e-3
        error = max(6 / math.sqrt(2 * numel), slack)
        if all(abs(rms / s - 1) > error for s in (std, std / math.sqrt(len(decoder.branches)))):
            return False
    return True


# --- weights at the beginning ---------------------------------------------------------------------------------------


def _targets(model: nn.Module, decoder: Decoder, transform: Transform) -> tuple[dict[str, float], float]:
    """RMS of every folded weight at unit scale, and the gain of the last norm."""
    get, d = model.get_submodule, decoder.width
    out = {name: len(decoder.embeddings) ** -0.5 for name in decoder.embeddings}
    mlp, attention = unit.branch_weights(transform.residual, transform.attention_ratio)
    depth = math.sqrt(len(decoder.branches) / 2)
    square, averages = 1.0, 0.0  # of the stream, and of what attention has added to it
    for branch in decoder.branches:
        for name in branch.begin:
            out[name] = in_features(get(name)) ** -0.5
        weight = (attention if branch.glu is None else mlp) / depth
        ones = {name: 1.0 for name in branch.begin}
        inside = _inside(branch, ones, _length(model, transform), averages / square)
        square += weight**2
        averages += weight**2 if branch.glu is None else 0.0
        out[branch.end] = weight / (inside * math.sqrt(in_features(get(branch.end))))
    logits = 1.0 if transform.method == "unit" else d**-0.5
    if decoder.tied:
        return out, logits / (math.sqrt(d) * out[decoder.embeddings[0]])
    out[decoder.head] = logits / math.sqrt(d)
    return out, 1.0


def _inside(branch: Branch, rms: dict[str, float], tokens: int, shared: float) -> float:
    """RMS of what the linear that ends a branch reads, from the RMS of what the others return."""
    if branch.glu is None:
        return rms[branch.begin[-1]] / unit.attention_scales(tokens, 1, shared=shared)[0]  # q.k / sqrt(width) of 1
    act, up = branch.glu.act, branch.glu.up
    gated = _rms_under(lambda x: numerics.activation(act, x), rms[branch.glu.gate])
    return gated if up is None else gated * rms[up]


def _rms_under(function: Callable[[Tensor], Tensor], std: float) -> float:
    """RMS of function(std * N(0, 1)), by a sum over 2001 points within 8 standard deviations."""
    z = torch.linspace(-8.0, 8.0, 2001, dtype=torch.float64)
    density = torch.exp(-0.5 * z * z)
    return math.sqrt(float((function(z * std).square() * density).sum() / density.sum()))


# --- RMS values, forward and back -----------------------------------------------------------------------------------


def _rms(
    model: nn.Module, decoder: Decoder, weights: dict[str, float], gains: dict[str, float], tokens: int
) -> dict[str, Constants]:
    """weights: RMS, by name of module. gains: of the norms."""
    get = model.get_submodule
    stream = [math.sqrt(sum(weights[name] ** 2 for name in decoder.embeddings))]
    inputs: dict[str, float] = {}
    outputs: dict[str, float] = {}
    averages = 0.0
    for branch in decoder.branches:
        for name in branch.begin:
            inputs[name] = gains[branch.norm]
            outputs[name] = gains[branch.norm] * weights[name] * math.sqrt(in_features(get(name)))
        inputs[branch.end] = inside = _inside(branch, outputs, tokens, averages / stream[-1] ** 2)
        added = inside * weights[branch.end] * math.sqrt(in_features(get(branch.end)))
        stream.append(math.hypot(stream[-1], added))
        averages += added**2 if branch.glu is None else 0.0
    inputs[decoder.head] = gains[decoder.norm]

    logits = 1 / math.sqrt(out_features(get(decoder.head)))
    grads = {decoder.head: logits}
    grad = weights[decoder.head] * gains[decoder.norm] / stream[-1]  # of the stream
    for i, branch in reversed(list(enumerate(decoder.branches))):
        grads[branch.end] = grad
        inner = grad * math.sqrt(out_features(get(branch.end))) * weights[branch.end]
        grads.update(_backward(model, branch, outputs, inner, tokens))
        back = math.hypot(*(grads[n] * math.sqrt(out_features(get(n))) * weights[n] for n in branch.begin))
        grad = math.hypot(grad, back * gains[branch.norm] / stream[i])
    return {name: Constants(inputs[name], weights[name], grads[name]) for name in inputs}


def _backward(
    model: nn.Module, branch: Branch, outputs: dict[str, float], inner: float, tokens: int
) -> dict[str, float]:
    """RMS of the gradients of what the first linears of a branch return; inner: of what its last one reads."""
    if branch.glu is not None:
        act, gate, up = branch.glu.act, branch.glu.gate, branch.glu.up
        slope = _rms_under(lambda x: numerics.activation_slope(act, x), outputs[gate])
        if up is None:
            return {gate: inner * slope}
        gated = _rms_under(lambda x: numerics.activation(act, x), outputs[gate])
        if gate == up:  # one linear holds both
            return {gate: inner * math.sqrt((gated**2 + (outputs[up] * slope) ** 2) / 2)}
        return {gate: inner * outputs[up] * slope, up: inner * gated}
    of_values, of_logits = unit.attention_scales(tokens, 1)
    width, value = in_features(model.get_submodule(branch.end)), branch.begin[-1]
    out = {}
    for name in branch.begin:
        shared = max(1.0, width / out_features(model.get_submodule(name)))  # heads that read one key and value
        scale = of_values if name == value else of_logits * outputs[name] / outputs[value]
        out[name] = inner / scale * math.sqrt(shared)
    return out


# --- learning rates -------------------------------------------------------------------------------------------------


def _rates(
    model: nn.Module,
    decoder: Decoder,
    transform: Transform,
    weights: dict[str, float],
    measured: dict[str, float],
    gain: float,
) -> tuple[dict[str, float], float]:
    """Parameter name -> learning rate of the folded weight over the optimizer's; and u-muP's eta over it.

    Adam's first step changes every element of W by its learning rate. As transformers makes the model that is lr, the
    fraction lr / sigma of a weight's standard deviation sigma. U = W / a has standard deviation 1, so the same step
    relative to the weight is lr / sigma in U, or lr a / sigma in W: the factor of Unit Scaling for each weight.

    u-muP: U of fan_in gets eta / sqrt(fan_in), times 1 / sqrt(layers) within branches; the output embedding gets eta.
    What eta is at this model's lr follows from the matrices that read the stream: there the first step is lr / sigma
    as above, so eta = lr sqrt(width layers) / sigma. All others keep the paper's ratio to these.

    Gains and biases keep the optimizer's lr: they are 1 and 0 in either parametrisation. (A gain of the last norm that
    stands in for the multiplier of a tied head keeps the relative step.)
    """
    get, d, depth = model.get_submodule, decoder.width, math.sqrt(len(decoder.branches) / 2)
    native = transform.learning_rate == "native"
    begin = {name for branch in decoder.branches for name in branch.begin}
    inside = begin | {branch.end for branch in decoder.branches}
    sigma = math.sqrt(sum(measured[n] ** 2 for n in begin) / len(begin))
    eta = 1.0 if native else math.sqrt(d) * depth / sigma
    factors: dict[str, float] = {}
    for name, a in weights.items():
        if name not in inside and name != decoder.head and name not in decoder.embeddings:
            continue
        if decoder.tied and name == decoder.head:
            continue
        if transform.method == "unit":
            rate = 1 / measured[name]
        elif name == decoder.head:
            rate = eta
        else:
            fan_in = d if name in decoder.embeddings else in_features(get(name))
            rate = eta / math.sqrt(fan_in) / (depth if name in inside else 1.0)
        factors[f"{name}.weight"] = rate * a
    for name, parameter in get(decoder.norm).named_parameters(recurse=False):
        if gain != 1.0 and parameter is not None:
            factors[f"{decoder.norm}.{name}"] = gain
    if native:  # the norms' of branches, as unit-scaled layers have them
        for branch in decoder.branches:
            for name, _ in get(branch.norm).named_parameters(recurse=False):
                factors[f"{branch.norm}.{name}"] = 1 / depth
    return factors, eta


# --- small things ---------------------------------------------------------------------------------------------------


def _length(model: nn.Module, transform: Transform) -> int:
    if transform.sequence_length is not None:
        return transform.sequence_length
    for module in model.modules():
        length = getattr(getattr(module, "config", None), "max_position_embeddings", None)
        if isinstance(length, int) and length > 1:
            return min(length, _LONGEST)
    return _LONGEST


def _token_embedding(model: nn.Module, decoder: Decoder) -> str:
    """The embedding that is called with every token, not with their positions."""
    vocabulary = out_features(model.get_submodule(decoder.head))
    sizes = {name: model.get_submodule(name).weight.shape[0] for name in decoder.embeddings}  # type: ignore
    return next((name for name, size in sizes.items() if size == vocabulary), decoder.embeddings[0])


def _gain(module: nn.Module, plus_one: bool) -> float:
    weight = getattr(module, "weight", None)
    if weight is None:
        return 1.0
    values = weight.detach().float() + float(plus_one)
    return _positive("the gain of a norm", float(values.square().mean().sqrt()))


def _rms_of(name: str, weight: Any) -> float:
    if weight.is_meta:
        raise ValueError(f"{name} has no values (it is on the meta device), others have: load the whole model first")
    return _positive(name, float(weight.detach().float().square().mean().sqrt()))


def _positive(name: str, rms: float) -> float:
    if not 0 < rms < math.inf:
        raise ValueError(f"{name} has RMS {rms}: no constant brings it to unit scale")
    return rms


def _power_of_two(value: float) -> float:
    return 2.0 ** max(-100, min(100, round(math.log2(value))))
