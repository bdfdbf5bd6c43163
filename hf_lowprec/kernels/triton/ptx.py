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
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
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
    if INTERPRETED or not QUICK:
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
    if INTERPRETED:
        out = tl.div_rn(n, d)
    else:
        bits = tl.inline_asm_elementwise(
            _QUOTIENT, "=&r,r,r", [n.to(tl.int32, bitcast=True), d.to(tl.int32, bitcast=True)],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        out = bits.to(tl.float32, bitcast=True)
    return out


@triton.jit
def reciprocal(x):
    """1 / x rounded to nearest: what `div.rn` needs half as many instructions for if it is told so."""
    if INTERPRETED:
        out = tl.div_rn(1.0, x)
    else:
        out = tl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return out


@triton.jit
def inner_reciprocal(x):
    """1 / x rounded to nearest for x in [2^-126, 2^126], without a look at the range; NaN of NaN."""
    if INTERPRETED:
        out = tl.div_rn(1.0, x)
    else:
        out = tl.inline_asm_elementwise(
            "{ .reg .f32 r, s, t; rcp.approx.ftz.f32 r, $1; neg.f32 s, $1; fma.rn.f32 t, s, r, 0f3F800000; "
            "fma.rn.f32 $0, r, t, r; }",
            "=&f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return out


@triton.jit
def add_down(a, b):
    """a + b rounded toward zero, for 0 <= a <= b and for b = 0."""
    if INTERPRETED:
        near = a + b
        bits = near.to(tl.int32, bitcast=True) - ((b > 0) & (near - b > a)).to(tl.int32)
        out = bits.to(tl.float32, bitcast=True)
    else:
        out = tl.inline_asm_elementwise(
            "add.rz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    return out


@triton.constexpr_function
def _raised_text(EMIN):
    least = f"0f{(EMIN + 127) << 23:08X}"
    return (
        f"{{ .reg .f32 s, t; abs.f32 s, $1; add.rz.f32 t, s, {least}; add.rn.f32 s, s, s; max.f32 s, s, t; "
        "mov.b32 $0, s; }"
    )


@triton.jit
def raised(x, EMIN: tl.constexpr):
    """Bits of the larger of 2 |x| and |x| + 2^EMIN, the latter rounded toward zero; of a NaN for NaN."""
    if INTERPRETED:
        a = tl.abs(x)
        double = (a + a).to(tl.int32, bitcast=True)
        out = tl.where(a < 2.0**EMIN, add_down(a, 2.0**EMIN).to(tl.int32, bitcast=True), double)
    else:
        out = tl.inline_asm_elementwise(_raised_text(EMIN), "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1)
    return out


@triton.jit
def times_plus(a, b, c):
    """a b + c of int32, modulo 2^32: one instruction also where b is a power of two, of which no shift is made."""
    if INTERPRETED:
        out = a * b + c
    else:
        out = tl.inline_asm_elementwise(
            "mad.lo.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    return out


@triton.jit
def fma_flushed(a, b, c):
    """a b + c, 0 where it or an operand is no normal number; the interpreter rounds the product as well."""
    if INTERPRETED:
        out = a * b + c
        out = tl.where(tl.abs(out) < 2.0**-126, 0.0, out)
    else:
        out = tl.inline_asm_elementwise(
            "fma.rn.ftz.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, b, c], dtype=tl.float32, is_pure=True, pack=1
        )
    return out


@triton.jit
def larger_magnitude(a, b):
    """max(|a|, |b|), NaN if one is. (`tl.maximum` beside stores of bytes is miscompiled, triton-lang/triton#11111.)"""
    if INTERPRETED:
        bits = tl.maximum(a.to(tl.int32, bitcast=True) & 0x7FFFFFFF, b.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        out = bits.to(tl.float32, bitcast=True)
    else:
        out = tl.inline_asm_elementwise(
            "{ .reg .f32 s, t; abs.f32 s, $1; abs.f32 t, $2; max.NaN.f32 $0, s, t; }", "=f,f,f", [a, b],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return out


@triton.jit
def top_bytes(even, odd):
    """int32 whose two lowest bytes are the highest of `even` and of `odd`; the others are rubbish."""
    if INTERPRETED:
        out = ((even >> 24) & 0xFF) | ((odd >> 16) & 0xFF00)
    else:
        out = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x73;", "=r,r,r", [even, odd], dtype=tl.int32, is_pure=True, pack=1
        )
    return out


@triton.jit
def sign_bytes(even, odd):
    """int32 whose two lowest bytes are 255 where `even` and `odd` are negative, else 0; the others are rubbish."""
    if INTERPRETED:
        out = ((even >> 31) & 0xFF) | ((odd >> 31) & 0xFF00)
    else:
        out = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0xFB;", "=r,r,r", [even, odd], dtype=tl.int32, is_pure=True, pack=1
        )
    return out


@triton.jit
def low_halves(even, odd):
    """The low halves of two int32, `even`'s below."""
    if INTERPRETED:
        out = (even & 0xFFFF) | (odd << 16)
    else:
        out = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [even, odd], dtype=tl.int32, is_pure=True, pack=1
        )
    return out


@triton.jit
def high_halves(even, odd):
    """The high halves of two int32, `even`'s below."""
    if INTERPRETED:
        out = ((even >> 16) & 0xFFFF) | (odd & -0x10000)
    else:
        out = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [even, odd], dtype=tl.int32, is_pure=True, pack=1
        )
    return out


_BYTES = tl.constexpr(" ".join(f"prmt.b32 ${i}, $4, 0, 0x444{i};" for i in range(4)))


@triton.jit
def four_bytes(words):
    """The four bytes of int32 words, the lowest first, as int32."""
    if INTERPRETED:
        a, b, c, d = words & 0xFF, (words >> 8) & 0xFF, (words >> 16) & 0xFF, (words >> 24) & 0xFF
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            _BYTES, "=&r,=&r,=&r,=r,r", [words],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    return a, b, c, d


@triton.constexpr_function
def _high_text(BITS, SPARE):
    """PTX that joins the highest BITS of two or four int32, and shifts each of these down by SPARE - 32 + BITS."""
    down = SPARE - 32 + BITS
    mask = ((1 << (BITS - down)) - 1) * (0x01010101 if BITS == 8 else 0x00010001)
    text = "{ .reg .b32 s, t; "
    if BITS == 8:
        text += "prmt.b32 s, $1, $2, 0x73; prmt.b32 t, $3, $4, 0x73; prmt.b32 s, s, t, 0x5410; "
    else:
        text += "prmt.b32 s, $1, $2, 0x7632; "
    return text + (f"shr.u32 s, s, {down}; and.b32 s, s, {mask}; " if down else "") + "mov.b32 $0, s; }"


@triton.jit
def high_bits(x, BITS: tl.constexpr, SPARE: tl.constexpr):
    """x >> SPARE of int32, logically, as int8 or int16 by BITS; no more than BITS are left."""
    if INTERPRETED:
        out = (x >> SPARE).to(tl.int8 if BITS == 8 else tl.int16)
        out &= (1 << (32 - SPARE)) - 1 if SPARE > 32 - BITS else -1
    else:
        out = tl.inline_asm_elementwise(
            _high_text(BITS, SPARE), "=r,r,r,r,r" if BITS == 8 else "=r,r,r", [x],
            dtype=tl.int8 if BITS == 8 else tl.int16, is_pure=True, pack=32 // BITS,
        )  # fmt: skip
    return out


@triton.jit
def saturated_bytes(a, b, c, d, SIGNED: tl.constexpr):
    """Words of four int32, `a` lowest, each held within a byte: [-128, 127] if SIGNED, else [0, 255]."""
    if INTERPRETED:
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


@triton.jit
def through_e4m3(x):
    """The nearest number of E4M3, saturated, in float32; needs sm_89."""
    return tl.inline_asm_elementwise(
        "{ .reg .b16 code, low, high; .reg .b32 both; cvt.rn.satfinite.e4m3x2.f32 code, $3, $2; "
        "cvt.rn.f16x2.e4m3x2 both, code; mov.b32 {low, high}, both; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }",
        "=f,=f,f,f", [x], dtype=tl.float32, is_pure=True, pack=2,
    )  # fmt: skip


def _count(test: str) -> str:
    zeros = " ".join(f"mov.u32 ${i}, 0;" for i in range(4))
    count = " ".join(f"abs.f32 t, ${i}; {test} @p add.s32 $0, $0, 1;" for i in (4, 5, 6, 7))
    return f"{{ .reg .pred p, q; .reg .f32 t; {zeros} {count} }}"


# LLVM would gather eight such bits in a word and count them there. A thread has a multiple of four elements; which
# four are counted together is the layout's affair: only the sum over a whole tile means something.
_COUNT_LARGE = tl.constexpr(_count("setp.geu.f32 p, t, 0f5F800000;"))
_COUNT_EXTREME = tl.constexpr(_count("setp.lt.f32 q, t, 0f7F800000; setp.ge.and.f32 p, t, 0f43D80000, q;"))


@triton.jit
def count_large(x):
    """int32 whose sum over a tile says how many elements are 2^64 or larger in magnitude, or NaN."""
    if INTERPRETED:
        out = 1 - (tl.abs(x) < 18446744073709551616.0).to(tl.int32)
    else:
        out = tl.inline_asm_elementwise(
            _COUNT_LARGE, "=&r,=&r,=&r,=&r,f,f,f,f", [x], dtype=tl.int32, is_pure=True, pack=4
        )
    return out


@triton.jit
def count_extreme(x):
    """int32 whose sum over a tile says how many elements are 432 or larger in magnitude, and finite."""
    if INTERPRETED:
        out = ((tl.abs(x) >= 432.0) & (tl.abs(x) < float("inf"))).to(tl.int32)
    else:
        out = tl.inline_asm_elementwise(
            _COUNT_EXTREME, "=&r,=&r,=&r,=&r,f,f,f,f", [x], dtype=tl.int32, is_pure=True, pack=4
        )
    return out


@triton.jit
def nearest_bf16(x):
    """float32 x rounded to bfloat16 by `cvt.rn`, two at a time, in float32; needs sm_80."""
    bits = tl.inline_asm_elementwise(
        "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000; }",
        "=&r,=r,r,r", [x.to(tl.int32, bitcast=True)], dtype=tl.int32, is_pure=True, pack=2,
    )  # fmt: skip
    return bits.to(tl.float32, bitcast=True)


_STORE_16, _STORE_32 = (
    tl.constexpr(f"{{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b{bits} [$1], $2; mov.u32 $0, 0; }}")
    for bits in (16, 32)
)


@triton.jit
def store_in_place(pointer, words, mask, HALF: tl.constexpr):
    """`tl.store` of int32 (HALF: of their low halves) by the threads that have them. Triton would hand a few values to
    other threads first, through shared memory and two barriers, to have neighbours store them."""
    if INTERPRETED:
        tl.store(pointer, words.to(pointer.dtype.element_ty), mask=mask)
    else:
        text: tl.constexpr = _STORE_16 if HALF else _STORE_32
        tl.inline_asm_elementwise(
            text, "=r,l,r,r", [pointer.to(tl.int64), words, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def not_speculated(words):
    """The same words; but what is computed from them inside a branch is computed only where the branch is taken."""
    if INTERPRETED:
        out = words
    else:
        out = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [words], dtype=tl.int32, is_pure=False, pack=1)
    return out


@triton.jit
def as_it_is(words):
    """The same words, of which the compiler knows nothing: it keeps to the order in which xors are written."""
    if INTERPRETED:
        out = words
    else:
        out = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1)
    return out


# --- tables in shared memory -----------------------------------------------------------------------------------------
# `tl.gather` brings its table to shared memory for every tile, between barriers. These tables are brought there once.


_TABLES, _TABLES_SMALL, _TABLES_LEAST = (
    tl.constexpr(f"{{ .shared .align 16 .b8 tables[{size}]; mov.u32 $0, tables; }}") for size in (19968, 8192, 2048)
)


@triton.jit
def shared_tables(BYTES: tl.constexpr):
    """Address of so many bytes of shared memory or more; to be called once in a kernel."""
    text: tl.constexpr = _TABLES_LEAST if BYTES <= 2048 else _TABLES_SMALL if BYTES <= 8192 else _TABLES
    tl.static_assert(BYTES <= 19968)
    return tl.inline_asm_elementwise(text, "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def store_shared(address, words):
    """Stores 32-bit words at addresses in shared memory; `shared_ready` says when they may be read."""
    tl.inline_asm_elementwise(
        "st.shared.b32 [$1], $2; mov.u32 $0, 0;", "=r,r,r", [address, words], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def shared_ready(address):
    """Waits for the stores of the whole program. Reads go by the address that this returns, so none comes earlier."""
    tl.debug_barrier()
    return tl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [address], dtype=tl.int32, is_pure=False, pack=1)


@triton.constexpr_function
def _load_text(OFFSET):
    return f"{{ .reg .b32 t; mad.lo.u32 t, $2, 4, $1; ld.shared.b32 $0, [t+{OFFSET}]; }}"


@triton.jit
def load_shared(address, index, OFFSET: tl.constexpr):
    """32-bit words number index, counted from address + OFFSET in shared memory, which nobody writes any more. The
    load itself multiplies by 4: LLVM would join the factor with a shift of the index and need a mask."""
    return tl.inline_asm_elementwise(
        _load_text(OFFSET), "=r,r,r", [address, index], dtype=tl.int32, is_pure=True, pack=1
    )
