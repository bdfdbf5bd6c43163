# SPDX-License-Identifier: Apache-2.0
"""Many small Llamas in one forward and one backward pass, each with its own optimizer.

A small model leaves a GPU idle: a step is a thousand launches of kernels that each take a few microseconds. A lane is
one LlamaForCausalLM of the transformers library. The lanes of a `Lanes` have the same shape, and their Parameters are
views of one buffer [lanes, parameters of a lane], so that one batched matrix product does the same layer of all of
them. An optimizer sees nothing of it: a lane has ordinary Parameters with ordinary gradients.

The arithmetic is that of bf16 autocast, written out: matrix products and attention take operands cast to `compute`,
norms, the residual stream and the loss are float32. tests/test_benchmarks.py holds it to LlamaForCausalLM's own.

With bfloat16 Parameters the residual stream stays float32 (a bfloat16 LlamaForCausalLM would round it): what differs
from the lanes with float32 Parameters is how the weights and their gradients are stored, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import build_llama
from torch import Tensor, nn

EPS, THETA = 1e-6, 10000.0  # LlamaConfig's defaults


class Lanes:
    """One lane per entry of `seeds`, which fix the initial weights; `config`: LlamaConfig's arguments, equal heads.

    lanes: the models; their Parameters and gradients are views of `weights` and `grads`, [lanes, parameters].
    compiled: whether torch.compile fuses the layer and the loss (two graphs, whatever the number of layers).
    """

    def __init__(
        self,
        seeds: list[int],
        config: dict[str, int],
        *,
        dtype: torch.dtype,
        compute: torch.dtype,
        device: str,
        compiled: bool = False,
    ) -> None:
        built = {seed: build_llama(seed, "fp32", **config) for seed in dict.fromkeys(seeds)}
        shapes = {name: p.shape for name, p in built[seeds[0]].named_parameters()}
        count, size = len(seeds), sum(shape.numel() for shape in shapes.values())
        self.weights = torch.empty(count, size, dtype=dtype, device=device)
        self.grads = torch.zeros_like(self.weights)
        self.count, self.layers, self.compute = count, config["num_hidden_layers"], compute
        self.heads = config["num_attention_heads"]
        self.rotary = rotary(config["max_position_embeddings"], config["hidden_size"] // self.heads, device)
        self.lane_index = torch.arange(count, device=device).view(count, 1, 1)

        self.lanes = [self._lane(lane, seed, built, config) for lane, seed in enumerate(seeds)]
        self.stacked: dict[str, Tensor] = {}  # the leaves of the batched graph
        start = 0
        for name, shape in shapes.items():
            part = slice(start, start := start + shape.numel())
            leaf = self.weights[:, part].view(count, *shape).detach().requires_grad_()
            leaf.grad = self.grads[:, part].view(count, *shape)
            self.stacked[name] = leaf

        wrap: Callable[[Any], Any] = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        self._layer, self._head = wrap(layer), wrap(head)

    def _lane(self, lane: int, seed: int, built: dict[int, nn.Module], config: dict[str, int]) -> nn.Module:
        """A LlamaForCausalLM with the weights of `built[seed]`, in the buffer's row `lane`."""
        with torch.device("meta"):
            model = build_llama(seed, "fp32", "meta", **config)
        start = 0
        for name, value in built[seed].named_parameters():
            part = slice(start, start := start + value.numel())
            self.weights[lane, part] = value.detach().flatten().to(self.weights)
            parameter = nn.Parameter(self.weights[lane, part].view(value.shape))
            parameter.grad = self.grads[lane, part].view(value.shape)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, parameter)
        return model

    def losses(self, ids: Tensor) -> Tensor:
        """Mean loss per predicted token of every lane, float32 [lanes]; ids: int64 [lanes, batch, sequence]."""
        w = self.stacked
        x = w["model.embed_tokens.weight"][self.lane_index, ids].float()
        for i in range(self.layers):
            own = [w[f"model.layers.{i}.{name}.weight"] for name in LAYER]
            x = self._layer(x, *self.rotary, self.heads, self.compute, *own)
        return self._head(x, ids, self.compute, w["model.norm.weight"], w["lm_head.weight"])

    def backward(self, ids: Tensor, clip: float) -> Tensor:
        """Gradients of each lane's own loss, each lane's clipped to the norm `clip`; returns the losses, detached."""
        self.grads.zero_()
        losses = self.losses(ids)
        losses.sum().backward()  # no lane's loss depends on another's weights
        norms = torch.linalg.vector_norm(self.grads, dim=1, dtype=torch.float32)
        self.grads *= (clip / (norms + 1e-6)).clamp(max=1).to(self.grads.dtype)[:, None]
        return losses.detach()


LAYER = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def rotary(length: int, width: int, device: str) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary embedding, float32 [length, width]."""
    frequency = 1.0 / THETA ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(device), angle.sin().to(device)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm; x: [lanes, batch, sequence, hidden], weight: [lanes, hidden]."""
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return weight[:, None, None].float() * x


def linear(x: Tensor, weight: Tensor, compute: torch.dtype) -> Tensor:
    """x: [lanes, batch, sequence, in], weight: [lanes, out, in] -> [lanes, batch, sequence, out] in `compute`."""
    y = torch.bmm(x.flatten(1, 2).to(compute), weight.to(compute).mT)
    return y.unflatten(1, x.shape[1:3])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [..., sequence, width], rotated in float32."""
    low, high = x.chunk(2, dim=-1)
    return x * cos[: x.shape[-2]] + torch.cat((-high, low), dim=-1) * sin[: x.shape[-2]]


def layer(x: Tensor, cos: Tensor, sin: Tensor, heads: int, compute: torch.dtype, *weights: Tensor) -> Tensor:
    """One decoder layer; x: float32 [lanes, batch, sequence, hidden], weights: those of LAYER, lanes first."""
    before, wq, wk, wv, wo, after, gate, up, down = weights
    h = norm(x, before)
    q, k, v = (linear(h, w, compute).flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2) for w in (wq, wk, wv))
    q, k = (rotate(t, cos, sin).to(compute) for t in (q, k))
    h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + linear(h.transpose(1, 2).flatten(-2).view(x.shape), wo, compute)
    h = norm(x, after)
    return x + linear(F.silu(linear(h, gate, compute)) * linear(h, up, compute), down, compute)


def head(x: Tensor, ids: Tensor, compute: torch.dtype, weight: Tensor, vocabulary: Tensor) -> Tensor:
    """Final norm, logits, and the mean loss of the next token: float32 [lanes]."""
    logits = linear(norm(x[:, :, :-1], weight), vocabulary, compute)
    losses = F.cross_entropy(logits.flatten(0, 2).float(), ids[:, :, 1:].flatten(), reduction="none")
    return losses.view(len(x), -1).mean(1)
