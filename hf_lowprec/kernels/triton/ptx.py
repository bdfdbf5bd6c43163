# SPDX-License-Identifier: Apache-2.0
"""PTX where Triton's own words cost too much: roots and quotients of several elements at a time, permuted bytes.

`sqrt.rn` and `div.rn` of PTX check their operands' range one by one: an approximation, some fused multiply-adds that
make it exact, and a branch around them to a slow way for the ends of the range. A thread has eight elements; here it
checks them together and branches once for four. The arithmetic is the compiler's own, instruction by instruction:

    root        r = rsqrt(v); s = v r; h = r / 2; s = s + h (v - s s)
    quotient    r = rcp(d); r = r + r (1 - d r); q = n r; q = q + r (n - d q)

The products inside parentheses are exact before they are added (fma), which is what makes the results correctly
rounded as long as nothing over- or underflows: the ranges below see to that.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# The interpreter, which runs on a CPU, knows no PTX.
_INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
_PACK = 4

_RANGE = 127 << 23  # both ranges are 127 binades wide
_LEAST_V = (127 - 100) << 23
_LEAST_N = (127 - 80) << 23


def _root_quotient() -> tuple[str, str]:
    """PTX and constraints: roots, quotients = f(n, v, factor, eps), `_PACK` of each."""
    place = iter(range(6 * _PACK))
    root, quotient, n, v, factor, eps = ([f"${next(place)}" for _ in range(_PACK)] for _ in range(6))
    check, quick, slow = ["mov.u32 far, 0;"], [], []
    for i in range(_PACK):
        check += [
            f"sub.u32 t, {v[i]}, {_LEAST_V};", "max.u32 far, far, t;",
            f"and.b32 t, {n[i]}, 0x7fffffff;", f"sub.u32 t, t, {_LEAST_N};", "max.u32 far, far, t;",
        ]  # fmt: skip
        quick += [
            f"rsqrt.approx.ftz.f32 r, {v[i]};", f"mul.rn.f32 s, {v[i]}, r;", "mul.rn.f32 r, r, 0f3F000000;",
            "neg.f32 t, s;", f"fma.rn.f32 t, t, s, {v[i]};", "fma.rn.f32 s, t, r, s;", f"mov.b32 {root[i]}, s;",
            f"mul.rn.f32 d, s, {factor[i]};", f"add.rn.f32 d, d, {eps[i]};", *_quotient(quotient[i], n[i]),
        ]  # fmt: skip
        slow += [
            f"sqrt.rn.f32 s, {v[i]};", f"mov.b32 {root[i]}, s;", f"mul.rn.f32 d, s, {factor[i]};",
            f"add.rn.f32 d, d, {eps[i]};", f"div.rn.f32 s, {n[i]}, d;", f"mov.b32 {quotient[i]}, s;",
        ]  # fmt: skip
    body = [
        ".reg .pred p;", ".reg .b32 far, t, r, s, d;", *check, f"setp.gt.u32 p, far, {_RANGE};", "@p bra SLOW;",
        *quick, "bra DONE;", "SLOW:", *slow, "DONE:",
    ]  # fmt: skip
    # Outputs are written before all inputs are read: no input may share a register with one.
    return "{ " + " ".join(body) + " }", ",".join(["=&r"] * (2 * _PACK) + ["r"] * (4 * _PACK))


def _quotient(out: str, n: str) -> list[str]:
    """n / d for d in the register of that name."""
    return [
        "rcp.approx.ftz.f32 r, d;", "neg.f32 d, d;", "fma.rn.f32 t, d, r, 0f3F800000;", "fma.rn.f32 r, r, t, r;",
        f"mul.rn.f32 s, {n}, r;", f"fma.rn.f32 t, d, s, {n};", f"fma.rn.f32 {out}, r, t, s;",
    ]  # fmt: skip


_ROOT_QUOTIENT, _ROOT_QUOTIENT_CONSTRAINTS = (tl.constexpr(text) for text in _root_quotient())
_QUOTIENT = tl.constexpr("{ .reg .b32 t, r, s, d; mov.b32 d, $2; " + " ".join(_quotient("$0", "$1")) + " }")


_PACK_SIGNED, _PACK_UNSIGNED = (
    tl.constexpr(
        "{ .reg .b32 t; mov.u32 t, 0; "
        f"cvt.pack.sat.{kind}.s32.b32 t, $4, $3, t; cvt.pack.sat.{kind}.s32.b32 $0, $2, $1, t; }}"
    )
    for kind in ("s8", "u8")
)


@triton.jit
def root_and_quotient(n, v, factor, eps, QUICK: tl.constexpr):
    """(sqrt(v), n / (sqrt(v) * factor + eps)), every operation rounded to nearest; v >= 0.

    QUICK needs factor in [1, 2^20] and eps in [0, 1]; elsewhere the compiler's own sequences run.
    """
    if _INTERPRETED or not QUICK:
        root = tl.sqrt_rn(v)
        quotient = tl.div_rn(n, root * factor + eps)
    else:
        root, quotient = tl.inline_asm_elementwise(
            _ROOT_QUOTIENT, _ROOT_QUOTIENT_CONSTRAINTS,
            [n.to(tl.int32, bitcast=True), v.to(tl.int32, bitcast=True), factor.to(tl.int32, bitcast=True),
             eps.to(tl.int32, bitcast=True)],
            dtype=(tl.int32, tl.int32), is_pure=True, pack=4,
        )  # fmt: skip
        root = root.to(tl.float32, bitcast=True)
        quotient = quotient.to(tl.float32, bitcast=True)
    return root, quotient


@triton.jit
def quotient(n, d):
    """n / d rounded to nearest, for d in [1, 4] and |n| <= 4; below 2^-80 only nearly."""
    if _INTERPRETED:
        out = tl.div_rn(n, d)
    else:
        bits = tl.inline_asm_elementwise(
            _QUOTIENT, "=&r,r,r", [n.to(tl.int32, bitcast=True), d.to(tl.int32, bitcast=True)],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        out = bits.to(tl.float32, bitcast=True)
    return out


@triton.jit
def top_bytes(even, odd):
    """int32 whose two lowest bytes are the highest of `even` and of `odd`; the others are rubbish."""
    if _INTERPRETED:
        out = ((even >> 24) & 0xFF) | ((odd >> 16) & 0xFF00)
    else:
        out = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x73;", "=r,r,r", [even, odd], dtype=tl.int32, is_pure=True, pack=1
        )
    return out


@triton.jit
def sign_bytes(even, odd):
    """int32 whose two lowest bytes are 255 where `even` and `odd` are negative, else 0; the others are rubbish."""
    if _INTERPRETED:
        out = ((even >> 31) & 0xFF) | ((odd >> 31) & 0xFF00)
    else:
        out = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0xFB;", "=r,r,r", [even, odd], dtype=tl.int32, is_pure=True, pack=1
        )
    return out


@triton.jit
def low_halves(even, odd):
    """The low halves of two int32, `even`'s below."""
    if _INTERPRETED:
        out = (even & 0xFFFF) | (odd << 16)
    else:
        out = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [even, odd], dtype=tl.int32, is_pure=True, pack=1
        )
    return out


@triton.jit
def high_halves(even, odd):
    """The high halves of two int32, `even`'s below."""
    if _INTERPRETED:
        out = ((even >> 16) & 0xFFFF) | (odd & -0x10000)
    else:
        out = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [even, odd], dtype=tl.int32, is_pure=True, pack=1
        )
    return out


@triton.jit
def saturated_bytes(a, b, c, d, SIGNED: tl.constexpr):
    """Words of four int32, `a` lowest, each held within a byte: [-128, 127] if SIGNED, else [0, 255]."""
    if _INTERPRETED:
        LEAST: tl.constexpr = -128 if SIGNED else 0
        a = tl.minimum(tl.maximum(a, LEAST), LEAST + 255) & 0xFF
        b = tl.minimum(tl.maximum(b, LEAST), LEAST + 255) & 0xFF
        c = tl.minimum(tl.maximum(c, LEAST), LEAST + 255) & 0xFF
        d = tl.minimum(tl.maximum(d, LEAST), LEAST + 255)
        out = a | (b << 8) | (c << 16) | (d << 24)
    else:
        out = tl.inline_asm_elementwise(
            _PACK_SIGNED if SIGNED else _PACK_UNSIGNED,
            "=&r,r,r,r,r",
            [a, b, c, d],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return out
