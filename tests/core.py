# SPDX-License-Identifier: Apache-2.0
"""Tiny models, and a linear layer in low precision written a second time, from the recipe's slots and `numerics`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowprec import numerics
from hf_lowprec.formats import get_format
from hf_lowprec.modules.linear import LowPrecMixin
from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import Quant, Recipe

# Those with a transform take decoders only, and change fresh weights (tests/test_transform.py).
QUANTISING = [name for name, recipe in PRESETS.items() if recipe.quantises_gemms and recipe.transform.method == "none"]
# Those whose scales and formats a second implementation can know from the tensors alone.
FIXED = [name for name in QUANTISING if not PRESETS[name].flexible]
VOCAB = 32


# --- models ---------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Two linears with a nonlinearity, and a norm that stays in high precision."""

    def __init__(self, width: int = 32, hidden: int = 48, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def mlp(seed: int = 0, **kwargs: Any) -> MLP:
    torch.manual_seed(seed)
    return MLP(**kwargs)


def batch(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def llama(seed: int = 0, **changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config: dict[str, Any] = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
        pad_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes}))


def token_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def converted_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LowPrecMixin)]


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, micro_batches: int = 1) -> Tensor:
    """One step on a quadratic loss; the loss of the last micro-batch."""
    optimizer.zero_grad()
    for part in x.chunk(micro_batches):
        loss = model(part).float().square().mean()
        loss.backward()
    optimizer.step()
    return loss.detach()


def bits_of(tensors: dict[str, Any]) -> dict[str, Any]:
    """A nested dict of tensors as one flat dict of copies, comparable with `same_bits`."""
    out: dict[str, Any] = {}
    for key, value in tensors.items():
        if isinstance(value, dict):
            out.update({f"{key}.{inner}": v for inner, v in bits_of(value).items()})
        else:
            out[str(key)] = value.detach().clone() if isinstance(value, Tensor) else value
    return out


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits: -0 differs from 0, and NaN equals the same NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def assert_same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    a, b = bits_of(a), bits_of(b)
    assert a.keys() == b.keys()
    for key, value in a.items():
        equal = same_bits(value, b[key]) if isinstance(value, Tensor) else value == b[key]
        assert equal, f"{key}: {value} != {b[key]}"


# --- the reference --------------------------------------------------------------------------------------------------


@dataclass
class ReferenceLinear:
    """Forward and both gradients of one layer, step after step; blocks and rows lie along the axis of the sum.

    Delayed scaling as TransformerEngine does it: the first use scales by the tensor itself; at the end of a step the
    amax of the step enters the history, and the largest of it gives the next scale.
    """

    recipe: Recipe
    scale: dict[str, Tensor] = field(default_factory=dict)
    history: dict[str, list[float]] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict)
    steps: int = 0

    def quantised(self, role: str, quant: Quant | None, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Values of Q(x) in float32, for a product that sums over the last axis of x."""
        if quant is None:
            return x.to(dtype).float()
        scaling = quant.scaling
        if get_format(quant.format).is_integer and scaling.granularity != "block" and scaling.snap == "exact":
            return integer_values(quant, x.float())
        if scaling.granularity in ("block", "row"):
            if not x.numel():
                return x.float()
            run = scaling.block[0] if scaling.block else x.shape[-1]
            return torch.cat([self._group(part, quant) for part in x.float().split(run, -1)], -1)
        amax = x.float().abs().max() if x.numel() else torch.zeros(())
        if scaling.method in ("none", "static"):
            scale = torch.tensor(2.0**scaling.exponent)
        elif scaling.method == "delayed" and role in self.scale:
            scale = self.scale[role]
        else:
            scale = self.scale_of(float(amax), quant)
        if scaling.method == "delayed":
            self.seen[role] = max(self.seen.get(role, 0.0), float(amax))
        fmt = get_format(quant.format)
        if fmt.torch_dtype_name is None:
            return self._nearest(x.float() / scale, quant) * scale
        codes = (x.float() * (1.0 / scale)).clamp(-fmt.max, fmt.max).to(getattr(torch, fmt.torch_dtype_name))
        return codes.float() * scale

    def _group(self, x: Tensor, quant: Quant) -> Tensor:
        """Q of rows that each have one scale, by its own amax."""
        rows = x.reshape(-1, x.shape[-1])
        scale = torch.tensor([float(self.scale_of(float(row.abs().max()), quant)) for row in rows])
        scale = scale.view(*x.shape[:-1], 1)
        return self._nearest(x / scale, quant) * scale

    @staticmethod
    def _nearest(x: Tensor, quant: Quant) -> Tensor:
        """The nearest value in the table of the format's, ties to the even code or away from zero."""
        fmt = get_format(quant.format)
        codes = range(fmt.max_code + 1)
        values = torch.tensor([fmt.decode(code) for code in codes], dtype=torch.float64)
        size = x.double().abs().clamp(max=fmt.max).contiguous()
        above = torch.bucketize(size, values).clamp(min=1)
        below = above - 1
        up, down = values[above] - size, size - values[below]
        ties = above % 2 == 0 if quant.rounding.mode == "nearest" else torch.ones_like(above, dtype=torch.bool)
        code = torch.where((up < down) | ((up == down) & ties), above, below)
        return values[code].float().copysign(x)

    @staticmethod
    def scale_of(amax: float, quant: Quant) -> Tensor:
        if amax == 0:
            return torch.tensor(1.0)
        largest = get_format(quant.format).max
        if quant.scaling.snap == "exact":
            return torch.tensor(amax) / torch.tensor(largest)
        if quant.scaling.snap == "ocp":
            return torch.tensor(2.0 ** (math.floor(math.log2(amax)) - math.floor(math.log2(largest))))
        exponent = -140
        while largest * 2.0**exponent < amax:  # the least power of two that keeps amax within the format
            exponent += 1
        return torch.tensor(2.0**exponent)

    def run(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(output, grad_input, grad_weight, grad_bias) in float32, not yet rounded; `dtype` is the base precision."""
        r = self.recipe
        rows, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        raw = rows
        if r.input_norm is not None:
            rows = torch.nn.functional.layer_norm(raw, raw.shape[-1:], eps=r.input_norm.eps)
        q_input = self.quantised("input", r.fprop.input, rows, dtype)
        out = self.product(0, q_input, self.quantised("weight", r.fprop.weight, weight, dtype))
        if bias is not None:
            out = out + bias.float()
        # Each operand as its GEMM sees it, the sum along the last axis. One quantised operand: in the base precision.
        base = dtype if r.dgrad.one_sided else torch.float32
        gd = self.quantised("grad_output", r.dgrad.grad_output, g, dtype)
        grad_input = self.product(1, gd, self.quantised("weight", r.dgrad.weight, weight.t(), dtype).to(base).float())
        base = dtype if r.wgrad.one_sided else torch.float32
        gw = self.quantised("grad_output", r.wgrad.grad_output, g.t(), dtype)
        grad_weight = self.product(2, gw, self.quantised("input", r.wgrad.input, rows.t(), dtype).to(base).float())
        if r.input_norm is not None:
            grad_input = layer_norm_backward(grad_input.to(x.dtype).float(), raw.float(), r.input_norm.eps)
        return out.reshape(*x.shape[:-1], len(weight)), grad_input.reshape(x.shape), grad_weight, g.float().sum(0)

    def product(self, number: int, a: Tensor, b: Tensor) -> Tensor:
        """a @ b.T of GEMM `number`, summed as the recipe says; narrow sums on values, without factoring out scales,
        which is the same where those are powers of two that change no rounding: here they are 1."""
        how = (self.recipe.fprop, self.recipe.dgrad, self.recipe.wgrad)[number].accumulation
        if how.format is None:
            return a @ b.t()
        return numerics.accumulate(a, b, how, seed=(1 << 62) + (number << 32) + self.steps)

    def end_step(self) -> None:
        self.steps += 1
        policies = {"input": self.recipe.fprop.input, "weight": self.recipe.fprop.weight,
                    "grad_output": self.recipe.dgrad.grad_output}  # fmt: skip
        for role, amax in self.seen.items():
            quant = policies[role]
            assert quant is not None
            if amax > 0:
                history = [amax, *self.history.get(role, [])][: quant.scaling.history]
                self.history[role] = history
                self.scale[role] = self.scale_of(max(history), quant)
        self.seen = {}


def integer_values(quant: Quant, x: Tensor) -> Tensor:
    """Values of a matrix in int8, ternary or signs, by the papers' formulas, in units where int8 counts in 1/64."""
    s = quant.scaling
    if not x.numel():
        return x
    magnitude = x.abs()
    if s.granularity == "tensor":
        statistic = magnitude.mean() if s.statistic == "mean" else magnitude.max()
    else:
        statistic = magnitude.amax({"row": -1, "column": 0}[s.granularity], keepdim=True)
    statistic = statistic.clamp(min=s.floor)
    if quant.center:
        x = x - x.mean()
    target = s.target or (1.0 if s.statistic == "mean" else get_format(quant.format).max)
    factor = (1 / statistic) * target if s.inverse else 1 / torch.where(statistic > 0, statistic / target, 1.0)
    z = x * factor
    if quant.format == "sign":
        q = torch.where(z > 0, 1.0, -1.0)
    else:
        unit, largest = {"e0m7": (64, 127), "e0m1": (1, 1)}[quant.format]
        q = (z * unit).round().clamp(-largest, largest) / unit
    if s.inverse:
        return q / factor
    return q * (statistic / target)


def layer_norm_backward(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    """The gradient of (x - mean) / sqrt(var + eps) over the last dimension."""
    centred = x - x.mean(-1, keepdim=True)
    r = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normal = centred * r
    return r * (grad - grad.mean(-1, keepdim=True) - normal * (grad * normal).mean(-1, keepdim=True))


def close_in(actual: Tensor, expected: Tensor, ulps: float = 1.0) -> None:
    """`actual` is `expected` (float32) rounded to its dtype, but for the order of a float32 sum.

    Tolerance: `ulps` units in the last place of actual's dtype, of each element, plus 2^-20 of the largest.
    """
    assert actual.shape == expected.shape
    eps = torch.finfo(actual.dtype).eps
    magnitude = expected.float().abs()
    bound = ulps * eps * magnitude + 2.0**-20 * (magnitude.max() if magnitude.numel() else 0.0)
    error = (actual.float() - expected.float()).abs()
    assert bool((error <= bound).all()), f"off by {(error - bound).max()} at most {bound.max()}"
