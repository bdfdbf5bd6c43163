# SPDX-License-Identifier: Apache-2.0
"""Operations at unit scale: variance 1 forward and backward, and the unit-scaling package's own results."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_lowprec.numerics import unit

U = pytest.importorskip("unit_scaling.functional")
transformer_residual_scaling_rule = pytest.importorskip(
    "unit_scaling.core.functional"
).transformer_residual_scaling_rule

N, D, E = 512, 256, 384


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator).requires_grad_()


def run(function, *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    out = function(*inputs)
    seed = randn(*out.shape, seed=7).detach() if out.dim() else None
    grads = torch.autograd.grad(out, [i for i in inputs if i.requires_grad], seed)
    return out.detach(), list(grads)


def std(x: Tensor) -> float:
    return float(x.double().var(unbiased=False).sqrt())


ALONE = {
    "linear": (lambda x, w: unit.linear(x, w, constraint="free"), lambda: (randn(N, D), randn(E, D))),
    "linear with bias": (
        lambda x, w, b: unit.linear(x, w, b, constraint="free") * 2**-0.5,
        lambda: (randn(N, D), randn(E, D), randn(E)),
    ),
    "embedding": (lambda w: unit.embedding(torch.arange(4 * N) % N, w), lambda: (randn(N, D),)),
    "rms norm": (lambda x: unit.norm(x), lambda: (randn(N, D),)),
    "layer norm": (lambda x: unit.norm(x, center=True), lambda: (randn(N, D),)),
    "gelu": (lambda x: unit.gelu(x, constraint="free"), lambda: (randn(N, D),)),
    "silu": (lambda x: unit.silu(x, constraint="free"), lambda: (randn(N, D),)),
    "silu glu": (unit.silu_glu, lambda: (randn(N, D), randn(N, D, seed=1))),
    "residual": (
        lambda x, f: unit.residual_add(f, x, 0.6),
        lambda: (randn(N, D), randn(N, D, seed=1)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_variance_is_one(name: str) -> None:
    function, inputs = ALONE[name]
    out, grads = run(function, *inputs())
    assert std(out) == pytest.approx(1, rel=0.05)
    if name == "linear with bias":
        grads = [g * 2**0.5 for g in grads]
    if name == "residual":  # the branch's gradient is left at 1 until the branch begins; the rest is split off there
        assert std(grads[1]) == pytest.approx(1, rel=0.05)
        return
    assert [std(g) for g in grads] == pytest.approx([1] * len(grads), rel=0.05)


def test_gain_and_bias_of_norms() -> None:
    gain, bias = torch.ones(D, requires_grad=True), torch.zeros(D, requires_grad=True)
    _, grads = run(lambda g, b: unit.norm(randn(8 * N, D).detach(), g, b, center=True), gain, bias)
    assert [std(g) for g in grads] == pytest.approx([1, 1], rel=0.1)  # of 256 elements


@pytest.mark.parametrize("mult", [0.5, 1.0])
@pytest.mark.parametrize("size", [64, 512])
def test_softmax(mult: float, size: int) -> None:
    out, grads = run(lambda x: unit.softmax(x, mult=mult, constraint="free"), randn(4 * N, size))
    assert std(out) == pytest.approx(1, rel=0.05)
    assert std(grads[0]) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("mult", [1.0, 8.0])  # of u-muP, and of the usual 1 / sqrt(width)
@pytest.mark.parametrize("tokens", [32, 256])
def test_attention(mult: float, tokens: int) -> None:
    inputs = [randn(2**15 // tokens, tokens, 64, seed=s) for s in range(3)]
    out, grads = run(lambda *qkv: unit.attention(*qkv, mult=mult, constraint="free"), *inputs)
    assert [std(out), *map(std, grads)] == pytest.approx([1] * 4, rel=0.05)


@pytest.mark.parametrize("tau", [0.1, 0.7, 2.0])
def test_a_residual_layer_has_unit_variance_inside_and_out(tau: float) -> None:
    seen: list[Tensor] = []

    def layer(x: Tensor, w: Tensor) -> Tensor:
        branch, rest = unit.residual_split(x, tau)
        y = unit.linear(branch, w)
        y.register_hook(lambda g: seen.append(g))
        return unit.residual_add(y, rest, tau)

    out, grads = run(layer, randn(N, D), randn(D, D))
    assert std(out) == pytest.approx(1, rel=0.05) and std(grads[0]) == pytest.approx(1, rel=0.05)
    assert std(seen[0]) == pytest.approx(1, rel=0.05)


def test_cross_entropy() -> None:
    logits, target = (randn(4096, 96).detach() * 1e-3).requires_grad_(), torch.arange(4096) % 96
    loss = unit.cross_entropy(logits, target)
    assert float(loss) == pytest.approx(math.log(96), rel=1e-3)
    (grad,) = torch.autograd.grad(loss, logits)
    assert float(grad.square().mean().sqrt()) == pytest.approx(1, rel=0.05)


ORACLE = {
    "linear": (unit.linear, lambda x, w: U.linear(x, w, None), lambda: (randn(N, D), randn(E, D))),
    "linear free": (
        lambda x, w: unit.linear(x, w, constraint="free"),
        lambda x, w: U.linear(x, w, None, constraint=None),
        lambda: (randn(N, D), randn(E, D)),
    ),
    "linear mean": (
        lambda x, w: unit.linear(x, w, constraint="to_mean"),
        lambda x, w: U.linear(x, w, None, constraint="gmean"),
        lambda: (randn(N, D), randn(E, D)),
    ),
    "readout": (unit.readout, lambda x, w: U.linear_readout(x, w, None), lambda: (randn(N, D), randn(E, D))),
    "embedding": (
        lambda w: unit.embedding(torch.arange(100), w), lambda w: U.embedding(torch.arange(100), w),
        lambda: (randn(N, D),),
    ),
    "rms norm": (
        lambda x, g: unit.norm(x, g), lambda x, g: U.rms_norm(x * 1.0, (D,), g * 1.0, eps=1e-6),
        lambda: (randn(N, D), randn(D)),
    ),
    "layer norm": (
        lambda x, g, b: unit.norm(x, g, b, center=True), lambda x, g, b: U.layer_norm(x, (D,), g, b, eps=1e-6),
        lambda: (randn(N, D), randn(D), randn(D, seed=1)),
    ),
    "gelu": (unit.gelu, U.gelu, lambda: (randn(N, D),)),
    "gelu mult": (lambda x: unit.gelu(x, mult=2.5), lambda x: U.gelu(x, mult=2.5), lambda: (randn(N, D),)),
    "silu": (unit.silu, U.silu, lambda: (randn(N, D),)),
    "silu mult": (
        lambda x: unit.silu(x, mult=0.5, constraint="free"), lambda x: U.silu(x, mult=0.5, constraint=None),
        lambda: (randn(N, D),),
    ),
    "silu glu": (unit.silu_glu, U.silu_glu, lambda: (randn(N, D), randn(N, D, seed=1))),
    "residual": (
        lambda x, f: unit.residual_add(f * unit.residual_split(x, 0.3)[0], unit.residual_split(x, 0.3)[1], 0.3),
        lambda x, f: U.residual_add(f * U.residual_split(x, 0.3)[0], U.residual_split(x, 0.3)[1], 0.3),
        lambda: (randn(N, D), randn(N, D, seed=1)),
    ),
    "cross entropy": (
        lambda x: unit.cross_entropy(x, torch.arange(N) % D), lambda x: U.cross_entropy(x, torch.arange(N) % D),
        lambda: (randn(N, D),),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ORACLE)
def test_equals_the_unit_scaling_package(name: str) -> None:
    ours, theirs, inputs = ORACLE[name]
    (out, grads), (expected, expected_grads) = run(ours, *inputs()), run(theirs, *inputs())
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-5)


OTHER_CONSTANTS = {  # the same functions; ours have variance 1, theirs come from an interpolation
    "softmax": (unit.softmax, lambda x: U.softmax(x, -1), lambda: (randn(N, D),)),
    "attention": (
        unit.attention, lambda q, k, v: U.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda: tuple(randn(4, 64, 32, seed=s) for s in range(3)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_CONSTANTS)
def test_is_a_multiple_of_what_the_package_computes(name: str) -> None:
    ours, theirs, inputs = OTHER_CONSTANTS[name]
    (out, grads), (expected, expected_grads) = run(ours, *inputs()), run(theirs, *inputs())
    for one, other in zip([out, *grads], [expected, *expected_grads], strict=True):
        ratio = std(one) / std(other)
        torch.testing.assert_close(one, other * ratio, rtol=1e-4, atol=1e-5)
        assert 0.7 < ratio < 1.5


@pytest.mark.parametrize("residual,ratio", [(1.0, 1.0), (0.5, 2.0)])
def test_residual_weights(residual: float, ratio: float) -> None:
    theirs = transformer_residual_scaling_rule(residual, ratio)
    for branch in range(12):
        assert unit.residual_tau(branch, 12, residual, ratio) == pytest.approx(theirs(branch, 12), rel=1e-12)


def test_a_divided_stream_is_an_undivided_one_with_constant_weights() -> None:
    """What `hf_lowprec.transform` builds on: sigma_i tau_i = alpha / sqrt(layers)."""
    sigma, mlp, attention = 1.0, *unit.branch_weights(0.7, 1.5)
    for branch in range(16):
        tau = unit.residual_tau(branch, 16, 0.7, 1.5)
        assert sigma * tau == pytest.approx((mlp if branch % 2 else attention) / math.sqrt(8), rel=1e-12)
        sigma *= math.sqrt(1 + tau * tau)
    running_mean = [unit.residual_tau(branch, 16, math.sqrt(8)) for branch in range(16)]
    assert running_mean == pytest.approx([1 / math.sqrt(1 + branch) for branch in range(16)], rel=1e-12)


def test_scale_is_no_part_of_the_other_direction() -> None:
    x = torch.ones(3, requires_grad=True)
    y = unit.scale(x, 3.0, 5.0)
    y.sum().backward()
    assert y.tolist() == [3.0] * 3 and x.grad is not None and x.grad.tolist() == [5.0] * 3
