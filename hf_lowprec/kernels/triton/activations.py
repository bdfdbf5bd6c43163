# SPDX-License-Identifier: Apache-2.0
"""Activations and their derivatives for fused kernels: `numerics.activation` and `.activation_slope` in float32.

EXACT (kernels on float32 tensors): exponentials and quotients are rounded as torch's are. Kernels on 16-bit tensors
take the short instructions, whose error lies far below the last bit of what they store.

Short form of the normal distribution, for x >= 0: 1 - Phi(x) = e^(-x^2 / 2) P(1 / (1 + 0.308 x)), P of degree 6
without constant term, fitted to [0, 14] with a relative error below 4e-6; the exponential serves the density, too.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# The interpreter, which runs on a CPU, knows no PTX.
_INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
# 1 / (1 + 2^(-x log2 e)) without the compiler's care for subnormal numbers, which costs twice the rest.
_SIGMOID = tl.constexpr(
    "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000;"
    " rcp.approx.ftz.f32 $0, t; }"
)
# e^(-x^2 / 2) = 2^(c x^2), and 1 / (1 + 0.308 |x|)
_BELL = tl.constexpr("{ .reg .f32 t; mul.f32 t, $1, $1; mul.f32 t, t, 0fBF38AA3B; ex2.approx.ftz.f32 $0, t; }")
_RECIPROCAL = tl.constexpr(
    "{ .reg .f32 t; abs.f32 t, $1; fma.rn.f32 t, t, 0f3E9DB22D, 0f3F800000; rcp.approx.ftz.f32 $0, t; }"
)


@triton.jit
def _exp(x):
    """e^x within 1 ulp: x = n ln 2 + r with ln 2 in two parts, the first short enough that n times it is exact."""
    x = tl.where(x > 89.0, 89.0, tl.where(x < -104.0, -104.0, x))
    shifted = x * 1.4426950408889634 + 12582912.0  # 1.5 * 2^23: the fraction is rounded away
    n = shifted - 12582912.0
    r = tl.fma(n, -0.693359375, x)
    r = tl.fma(n, 2.12194440054690583e-4, r)
    p = tl.fma(r, 1.0 / 5040.0, 1.0 / 720.0)
    p = tl.fma(p, r, 1.0 / 120.0)
    p = tl.fma(p, r, 1.0 / 24.0)
    p = tl.fma(p, r, 1.0 / 6.0)
    p = tl.fma(p, r, 0.5)
    p = tl.fma(p * r, r, r) + 1.0
    whole = n.to(tl.int32)
    half = whole >> 1  # in two steps: 2^n may be no float where e^x still is one
    first = ((half + 127) << 23).to(tl.float32, bitcast=True)
    second = ((whole - half + 127) << 23).to(tl.float32, bitcast=True)
    return p * first * second


@triton.jit
def _sigmoid(x, EXACT: tl.constexpr):
    if EXACT:
        s = tl.div_rn(1.0, 1.0 + _exp(-x))
    elif _INTERPRETED:
        s = 1.0 / (1.0 + tl.exp(-x))
    else:
        s = tl.inline_asm_elementwise(_SIGMOID, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return s


@triton.jit
def _normal(x, EXACT: tl.constexpr):
    """(Phi(x), e^(-x^2 / 2)) of the normal distribution."""
    if EXACT:
        bell = _exp(-0.5 * x * x)
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    else:
        if _INTERPRETED:
            bell = tl.exp(-0.5 * x * x)
            t = 1.0 / (1.0 + 0.308 * tl.abs(x))
        else:
            bell = tl.inline_asm_elementwise(_BELL, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
            t = tl.inline_asm_elementwise(_RECIPROCAL, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
        p = 0.1896272290976566 - 0.07543323912756365 * t
        p = 0.007262965807260897 + p * t
        p = 0.13653866844097307 + p * t
        p = 0.11888000260523371 + p * t
        p = 0.12312281065493928 + p * t
        tail = p * t * bell
        share = tl.where(x > 0.0, 1.0 - tail, tail)
    return share, bell


@triton.jit
def _gelu_tanh_argument(x):
    """2 sqrt(2 / pi) (x + 0.044715 x^3): (1 + tanh(z)) / 2 = sigmoid(2 z)."""
    return x * (1.5957691216057308 + 0.07135481282553172 * (x * x))


@triton.jit
def activation(x, ACT: tl.constexpr, EXACT: tl.constexpr):
    """`numerics.activation` in float32."""
    if ACT == "silu":
        if EXACT:
            y = tl.div_rn(x, 1.0 + _exp(-x))
        else:
            y = x * _sigmoid(x, EXACT)
    elif ACT == "gelu":
        share, _ = _normal(x, EXACT)
        y = x * share
    elif ACT == "gelu_tanh":
        y = x * _sigmoid(_gelu_tanh_argument(x), EXACT)
    elif ACT == "quick_gelu":
        y = x * _sigmoid(1.702 * x, EXACT)
    elif ACT == "sigmoid":
        y = _sigmoid(x, EXACT)
    elif ACT == "relu":
        y = tl.where(x <= 0.0, 0.0, x)
    elif ACT == "relu2":
        y = tl.where(x <= 0.0, 0.0, x * x)
    else:
        tl.static_assert(ACT == "identity")
        y = x
    return y


@triton.jit
def _sigmoids(x, EXACT: tl.constexpr):
    """(sigmoid(x), 1 - sigmoid(x)), the latter without cancellation if EXACT."""
    s = _sigmoid(x, EXACT)
    return s, _sigmoid(-x, EXACT) if EXACT else 1.0 - s


@triton.jit
def with_slope(x, ACT: tl.constexpr, EXACT: tl.constexpr):
    """(act(x), act'(x)): `numerics.activation` and `numerics.activation_slope` in float32."""
    if ACT == "silu":
        s, rest = _sigmoids(x, EXACT)
        y = x * s
        slope = s + y * rest
    elif ACT == "gelu":
        s, bell = _normal(x, EXACT)
        y = x * s
        slope = s + x * (0.3989422804014327 * bell)
    elif ACT == "gelu_tanh":
        s, rest = _sigmoids(_gelu_tanh_argument(x), EXACT)
        y = x * s
        slope = s + y * rest * (1.5957691216057308 + 0.21406443847659515 * (x * x))
    elif ACT == "quick_gelu":
        s, rest = _sigmoids(1.702 * x, EXACT)
        y = x * s
        slope = s + 1.702 * y * rest
    elif ACT == "sigmoid":
        y, rest = _sigmoids(x, EXACT)
        slope = y * rest
    elif ACT == "relu":
        y = tl.where(x <= 0.0, 0.0, x)
        slope = tl.where(x <= 0.0, 0.0, 1.0)
    elif ACT == "relu2":
        y = tl.where(x <= 0.0, 0.0, x * x)
        slope = tl.where(x <= 0.0, 0.0, 2.0 * x)
    else:
        tl.static_assert(ACT == "identity")
        y = x
        slope = tl.full(x.shape, 1.0, tl.float32)
    return y, slope
