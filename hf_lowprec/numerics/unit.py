# SPDX-License-Identifier: Apache-2.0
"""Unit scaling (arXiv 2303.11257) and u-muP (arXiv 2407.17465): operations with outputs and gradients of variance 1.

Every operation multiplies its output by a constant and the gradient of each input by another. They follow from shapes
alone, for inputs, weights and gradients that are independent N(0, 1). The two may differ for an input that is a cut
edge of the graph (a weight; the beginning and end of a residual branch). For the others one of them must hold for
both, or gradients are wrong; `to_output` keeps the output's, as u-muP does, `to_mean` their geometric mean, as unit
scaling does; `free` is for cut edges, and for looking at one operation alone.

    linear          output fan_in^-1/2, input's gradient fan_out^-1/2, weight's tokens^-1/2
    readout         output 1 / fan_in (u-muP: its updates, not its initial values, make the logits), always free
    embedding       weight's gradient (vocabulary / tokens)^1/2
    norm            gain's and bias' gradients (width / elements)^1/2
    gelu, silu, glu: between the limits of a small and a large multiplier, on a logarithmic scale
    softmax, attention: from the sum of squared probabilities under normal logits. The unit-scaling
                    package interpolates here, too, and is up to 1.4 times off at the usual multipliers
    residual        (tau f(x) + x) / (1 + tau^2)^1/2, where the branch's own factor is applied to its gradient at the
                    beginning of the branch, so that inside of it gradients have variance 1
    cross_entropy   logits' gradient vocabulary / (vocabulary - 1)^1/2 of the sum over tokens

These functions are the specification. A model is not rewritten with them: `hf_lowprec.transform` applies the same
constants where they cost nothing, and tests compare the two.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Constraint = Literal["free", "to_output", "to_mean"]


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward_scale = backward
        return x * forward if forward != 1.0 else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.backward_scale, None, None


def scale(x: Tensor, forward: float = 1.0, backward: float = 1.0) -> Tensor:
    """`x * forward`, whose gradient is multiplied by `backward` instead."""
    out: Tensor = _Scale.apply(x, forward, backward)  # type: ignore[no-untyped-call]
    return out


def constrained(constraint: Constraint, output: float, *gradients: float) -> tuple[float, ...]:
    """The constants of an operation's output and of its inputs' gradients, tied as the constraint says."""
    if constraint == "free":
        return (output, *gradients)
    tied = output
    if constraint == "to_mean":
        tied = math.exp(math.fsum(map(math.log, (output, *gradients))) / (1 + len(gradients)))
    return (tied,) * (1 + len(gradients))


def between(weight: float, low: float, high: float) -> float:
    """`low` at 0, `high` at 1, geometrically between."""
    return float(low ** (1 - weight) * high**weight)


# --- constants ------------------------------------------------------------------------------------------------------


def gelu_scales(mult: float = 1.0) -> tuple[float, float]:
    """Of output and gradient of gelu(mult x) / mult."""
    weight = 1 / (1 + 0.25 / mult**2)
    return between(weight, 2.0, math.sqrt(2 / (1 - 1 / math.pi))), between(weight, 2.0, math.sqrt(2))


def silu_scales(mult: float = 1.0) -> tuple[float, float]:
    """Of output and gradient of x sigmoid(mult x)."""
    output = between(1 / (1 + 0.25 / mult**2), 2.0, math.sqrt(2 / (1 - 1 / math.pi)))
    return output, between(1 / (1 + 1 / mult**2), 2.0, math.sqrt(2))


def glu_scale(mult: float = 1.0) -> float:
    """Of output and both gradients of x silu(gate)."""
    return between(1 / (1 + 1 / mult**2), 2.0, math.sqrt(2))


@cache
def softmax_moments(size: int, variance: float) -> tuple[Tensor, Tensor]:
    """Of p = softmax(x) over n = 1 ... `size` independent normal logits of this variance, float64 [size] each:

        E[sum p^2]                              what an average under p keeps of its values' variance
        E[sum p^2 - 2 sum p^3 + (sum p^2)^2]    what p * (g - sum p g) keeps of that of g

    Exact but for the integrals' sums: with S = sum exp(x), 1 / S^k is the integral of u^(k-1) exp(-u S) / (k-1)! over
    u > 0, under which the n logits are independent.
    """
    x = torch.linspace(-8.0, 8.0, 201, dtype=torch.float64)
    weight = torch.softmax(-0.5 * x * x, 0)
    e = torch.exp(x * math.sqrt(variance))
    log_u = torch.linspace(math.log(1e-9 / size), math.log(1e5), 801, dtype=torch.float64)
    u, du = log_u.exp(), float(log_u[1] - log_u[0])
    damped = torch.exp(-u[:, None] * e) * weight
    moments = [damped @ e**k for k in range(5)]  # E[exp(k x) exp(-u exp(x))]
    log_all = moments[0].clamp(min=1e-300).log()
    n = torch.arange(1, size + 1, dtype=torch.float64)[:, None]
    others = torch.exp(log_all * (n - 1))
    pairs = torch.where(n > 1, torch.exp(log_all * (n - 2).clamp(min=0)), 0.0)

    def integral(values: Tensor, power: int) -> Tensor:
        return (values * u**power).sum(-1) * du / math.factorial(power - 1)

    square, cube = integral(n * moments[2] * others, 2), integral(n * moments[3] * others, 3)
    fourth = integral(n * moments[4] * others + n * (n - 1) * moments[2] ** 2 * pairs, 4)
    return square, square - 2 * cube + fourth


def softmax_scales(size: int, mult: float = 1.0) -> tuple[float, float]:
    """Of output and gradient of softmax(mult x) over `size` elements."""
    square, back = (float(moment[-1]) / size for moment in softmax_moments(size, mult * mult))
    return 1 / math.sqrt(square - size**-2), 1 / (mult * math.sqrt(back))


def attention_scales(
    tokens: int, width: int, mult: float = 1.0, causal: bool = True, shared: float = 0.0
) -> tuple[float, float]:
    """Of output and values' gradient, and of queries' and keys' gradients; heads of `width`, logits mult q.k / width.

    causal: over all positions, each of which sees those before it.
    shared: the share of the values' variance that attention of earlier layers has written (`attention_share`). Values
        that are averages over the positions before t and t' themselves have a correlation of (t / t')^1/2, of which an
        average keeps 2/3 of the variance, whatever its length.
    """
    variance = mult * mult / width
    moments = softmax_moments(tokens, variance)
    square, back = (float(moment.mean() if causal else moment[-1]) for moment in moments)
    return 1 / math.sqrt(square * (1 - shared) + shared * 2 / 3), 1 / math.sqrt(variance * back)


def attention_share(layer: int, layers: int, residual: float = 1.0, attention_ratio: float = 1.0) -> float:
    """`shared` of layer 0, 1, ...: what attention has added to the stream, over the stream's variance."""
    mlp, attention = branch_weights(residual, attention_ratio)
    return layer * attention**2 / (layers + layer * (attention**2 + mlp**2))


def residual_tau(branch: int, branches: int, residual: float = 1.0, attention_ratio: float = 1.0) -> float:
    """tau of branch 0, 1, ... where attention (even) and MLP (odd) alternate (arXiv 2407.17465, appendix G)."""
    mlp, attention = branch_weights(residual, attention_ratio)
    seen = branches / 2 + (branch + 1) // 2 * attention**2 + branch // 2 * mlp**2
    return (mlp if branch % 2 else attention) / math.sqrt(seen)


def branch_weights(residual: float, attention_ratio: float) -> tuple[float, float]:
    """alpha of MLP and attention branches: RMS of what all of a kind add to a stream that starts at 1."""
    mlp = residual * math.sqrt(2 / (1 + attention_ratio**2))
    return mlp, attention_ratio * mlp


# --- operations -----------------------------------------------------------------------------------------------------


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, constraint: Constraint = "to_output", power: float = 0.5
) -> Tensor:
    """x [..., in], weight [out, in], bias [out] -> [..., out]. power: of 1 / fan_in in the output's constant."""
    fan_out, fan_in = weight.shape
    tokens = max(1, x.numel() // fan_in)
    output, grad_x = constrained(constraint, fan_in**-power, fan_out**-0.5)
    x, weight = scale(x, 1.0, grad_x), scale(weight, 1.0, tokens**-0.5)
    if bias is not None:
        # Of the sum as a whole, so that a bias of 1 is 1 after it.
        return scale(x @ weight.mT, output) + scale(bias, 1.0, tokens**-0.5)
    return scale(x @ weight.mT, output)


def readout(x: Tensor, weight: Tensor) -> Tensor:
    """u-muP's output embedding: logits [..., vocabulary] of standard deviation fan_in^-1/2 at the beginning."""
    return linear(x, weight, constraint="free", power=1.0)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """ids integers [...], weight [vocabulary, width] -> [..., width]."""
    return F.embedding(ids, scale(weight, 1.0, math.sqrt(weight.shape[0] / max(1, ids.numel()))))


def norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-6, center: bool = False
) -> Tensor:
    """RMSNorm, or LayerNorm with `center`, over the last axis."""
    back = math.sqrt(x.shape[-1] / max(1, x.numel()))
    if center:
        x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * scale(weight, 1.0, back)
    return y if bias is None else y + scale(bias, 1.0, back)


def gelu(x: Tensor, *, mult: float = 1.0, constraint: Constraint = "to_output") -> Tensor:
    output, grad = constrained(constraint, *gelu_scales(mult))
    return scale(F.gelu(scale(x, 1.0, grad) * mult) / mult, output)


def silu(x: Tensor, *, mult: float = 1.0, constraint: Constraint = "to_output") -> Tensor:
    output, grad = constrained(constraint, *silu_scales(mult))
    x = scale(x, 1.0, grad)
    return scale(x * torch.sigmoid(mult * x), output)


def silu_glu(x: Tensor, gate: Tensor, *, mult: float = 1.0) -> Tensor:
    """x silu(gate), both of one shape."""
    factor = glu_scale(mult)
    x, gate = scale(x, 1.0, factor), scale(gate, 1.0, factor)
    return scale(x * gate * torch.sigmoid(mult * gate), factor)


def softmax(x: Tensor, *, mult: float = 1.0, constraint: Constraint = "to_output") -> Tensor:
    """Over the last axis; its sum is then the constant, not 1."""
    output, grad = constrained(constraint, *softmax_scales(x.shape[-1], mult))
    return scale(torch.softmax(scale(x, 1.0, grad) * mult, -1), output)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mult: float = 1.0,
    causal: bool = True,
    shared: float = 0.0,
    constraint: Constraint = "to_output",
) -> Tensor:
    """[..., tokens, width] each. mult: sqrt(width) makes the logits' scale the usual 1 / sqrt(width)."""
    tokens, width = v.shape[-2:]
    value, logit = attention_scales(tokens, width, mult, causal, shared)
    if constraint != "free":
        value, logit = constrained(constraint, value, logit)
    q, k, v = scale(q, 1.0, logit), scale(k, 1.0, logit), scale(v, 1.0, value)
    return scale(F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=mult / width), value)


def residual_split(x: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """(beginning of the branch, the rest of the stream)."""
    norm = math.sqrt(1 + tau * tau)
    return scale(x, 1.0, tau / norm), scale(x, 1.0, 1 / norm)


def residual_add(branch: Tensor, stream: Tensor, tau: float) -> Tensor:
    norm = math.sqrt(1 + tau * tau)
    return scale(branch, tau / norm) + scale(stream, 1 / norm)


def cross_entropy(logits: Tensor, target: Tensor, *, mult: float = 1.0) -> Tensor:
    """Mean over tokens of logits [tokens, vocabulary]; its gradient is that of the sum, times the constant."""
    tokens, vocabulary = logits.shape
    logits = scale(scale(logits, 1.0, vocabulary / math.sqrt(vocabulary - 1)), mult)
    return scale(F.cross_entropy(logits, target, reduction="sum"), 1 / tokens)
