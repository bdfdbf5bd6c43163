# SPDX-License-Identifier: Apache-2.0
"""The casts to any format against numerics: bit for bit in Triton's interpreter and on a GPU; compiled for an H100.

The interpreter must be chosen before Triton is imported, so that one test starts a process of its own.
"""

from __future__ import annotations

import sys
from typing import Any

import interpreter
import pytest
import torch

from hf_lowprec import numerics
from hf_lowprec.ops.quantize import default_quantize, quant_key
from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import NONE, Quant, Rounding, Scaling

SEED = 2**40 + 12345
MX = [
    Quant(
        format=name,
        scaling=Scaling(granularity="block", block=(32,), snap=snap, store="e8m0"),
        rounding=Rounding(mode="away" if i % 2 else "nearest"),
    )
    for i, name in enumerate(("e4m3fn", "e5m2", "e3m2", "e2m3", "e2m1", "e0m7"))
    for snap in ("ocp", "rceil", "ceil", "even")
]
SR9, SR = Rounding(mode="stochastic", bits=9), Rounding(mode="stochastic")
ROW = Scaling(granularity="row")
OTHERS = [
    Quant(format="e3m1", scaling=Scaling(granularity="row", snap="ocp")),
    Quant(format="e3m1"),
    Quant(format="e0m7", scaling=ROW),
    Quant(format="e0m7", scaling=ROW, rounding=SR),
    Quant(format="e6m9", scaling=NONE),
    Quant(format="e6m9", scaling=Scaling(method="static", exponent=-3), rounding=SR9),
    Quant(format="e6m5", scaling=NONE),
    Quant(format="e6m5", scaling=NONE, rounding=Rounding(mode="stochastic", bits=13)),
    Quant(format="e4m3fn", scaling=Scaling(snap="rceil", margin=1), rounding=SR9),
    Quant(format="e5m2", rounding=Rounding(mode="away")),
    Quant(format="e4m3", rounding=Rounding(mode="zero")),
    Quant(format="e4m3b11fnuz", scaling=NONE),
    Quant(format="e4m3b11fnuznormal0", scaling=NONE),
    Quant(format="e4m3b11fnuznormal0", scaling=NONE, rounding=SR9),
    Quant(format="e4m3b8", scaling=Scaling(granularity="block", block=(16,))),
    Quant(format="e2m1", scaling=Scaling(granularity="block", block=(16,), snap="even", store="float32"), rounding=SR),
    Quant(format="e3m0", scaling=ROW),
    Quant(format="e8m7", scaling=NONE, rounding=SR),
    Quant(format="e5m10", scaling=Scaling(granularity="row", snap="ceil")),
    Quant(format="e0m8u", scaling=ROW),
    Quant(format="e5m2", scaling=NONE, overflow="inf"),
    Quant(format="e6m5", scaling=NONE, overflow="inf", rounding=SR9),
    Quant(format="e4m3fn", scaling=NONE, overflow="nan"),
    Quant(format="e4m3b11fnuz", scaling=NONE, overflow="nan", rounding=Rounding(mode="away")),
]


def inputs(rows: int, cols: int, dtype: torch.dtype, device: str, spoiled: bool) -> torch.Tensor:
    """Wide normals, ties, rows and blocks of zeros and of subnormals, and where `spoiled` Inf and NaN, one row all of
    them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((rows, cols), generator=generator) * 2.0 ** torch.randint(-20, 12, (rows, 1), generator=generator)
    x[:, ::3] = (x[:, ::3] * 8).round() / 8
    x[0] = 0.0
    x[1, : cols // 2] = -0.0
    x[2] *= 1e-40
    x[3, 0] = 3e38
    if spoiled:
        x[4, 1], x[5, cols - 1], x[6, 0] = float("inf"), float("nan"), -float("inf")
        x[7], x[7, ::2] = float("nan"), float("inf")
    return x.to(dtype).to(device)


def same(ours: torch.Tensor, theirs: torch.Tensor, what: object) -> None:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, what
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.dtype.itemsize]
    a, b = ours.cpu(), theirs.cpu()
    if a.is_floating_point():
        nan = a.float().isnan()
        assert torch.equal(nan, b.float().isnan()), what
        a, b = a.view(integer)[~nan], b.view(integer)[~nan]
    assert torch.equal(a, b), (what, (a != b).sum())


def check_kernels(device: str) -> int:
    from hf_lowprec.kernels.triton import any_cast

    count, seed = 0, torch.tensor(SEED, device=device)
    for i, quant in enumerate([*MX, *OTHERS]):
        plan = any_cast.plan_of(quant)
        assert plan is not None, quant
        random = quant.rounding.mode == "stochastic"
        for dtype in (torch.float32, torch.bfloat16) if i % 5 == 0 else (torch.float32,):
            for spoiled in (False, True):
                # Rows that lie together, or columns; blocks that the rows are whole multiples of, or not.
                x = inputs(75, 9, dtype, device, spoiled).t() if (i + spoiled) % 2 else inputs(
                    9, 96 if i % 3 else 75, dtype, device, spoiled)  # fmt: skip
                host = x.cpu().contiguous()
                drawn = {"seed": SEED} if random else {}
                q, s = any_cast.quantize(x, plan, seed=seed if random else None)
                truth = numerics.quantize(host, quant, **drawn)
                same(s, truth.scale, ("scale", quant))
                same(q, truth.qdata, (quant, spoiled, x.shape))
                count += 1
                if i % 4 == 1 or i >= len(MX):
                    values, _ = any_cast.quantize(x, plan, seed=seed if random else None, values=True)
                    same(values, numerics.quantize_dequantize(host, quant, **drawn), ("values", quant))
                    count += 1
    # Rows in two passes, and indices of 64 bits.
    any_cast.LONGEST_ROW, any_cast.WIDE_FROM = 16, 0
    any_cast._shape.cache_clear()
    x = inputs(9, 96, torch.float32, device, True)
    for quant in (*OTHERS[:5], OTHERS[15], OTHERS[16]):
        drawn = {"seed": SEED} if quant.rounding.mode == "stochastic" else {}
        q, _ = any_cast.quantize(x, any_cast.plan_of(quant), seed=seed if drawn else None)
        same(q, numerics.quantize(x.cpu(), quant, **drawn).qdata, ("long", quant))
        count += 1
    any_cast.LONGEST_ROW, any_cast.WIDE_FROM = 16384, 2**31
    any_cast._shape.cache_clear()
    check_scales_and_counts(any_cast, device)
    return count


def check_scales_and_counts(any_cast: Any, device: str) -> None:
    """Given and delayed scales, amaxes that are noted or known, counters; three dimensions."""
    x = inputs(8, 64, torch.float32, device, True)
    delayed = Quant(format="e3m4", scaling=Scaling(method="delayed", history=4, snap="rceil"))
    for quant, scale, fixed in (
        (delayed, 0.0, False), (delayed, 0.25, False), (delayed, 2.0, True),
        (Quant(format="e4m3", rounding=Rounding(mode="away")), 0.5, True),
        (Quant(format="e6m9", scaling=NONE), None, False),
    ):  # fmt: skip
        plan, key = any_cast.plan_of(quant), quant_key(quant)

        def notes(where: str, scale: float | None = scale) -> tuple[Any, ...]:
            given = None if scale is None else torch.tensor(scale, device=where)
            return given, torch.tensor(1.0, device=where), torch.zeros(4, dtype=torch.int64, device=where)

        given, amax, counts = notes(device)
        ours = (*any_cast.quantize(x, plan, given, fixed=fixed, amax=amax, counts=counts), amax, counts)
        given, amax, counts = notes("cpu")
        theirs = (*default_quantize(x.cpu(), key, given, fixed, amax, counts, None), amax, counts)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other, (quant, scale, fixed))
    known = torch.zeros(256, device=device)
    known[17] = 12.0
    plan = any_cast.plan_of(Quant(format="e4m3", rounding=Rounding(mode="away")))
    _, s = any_cast.quantize(x, plan, partials=known)
    assert torch.equal(s.cpu(), torch.tensor(12.0) / 240)
    row = any_cast.plan_of(OTHERS[2])
    q, s = any_cast.quantize(x.view(2, 4, 64), row)
    assert q.shape == (2, 4, 64) and s.shape == (2, 4, 1)
    assert not any_cast.takes(x, row, True, None), "a format without NaN cannot have its scale given"


def check_decoding(device: str) -> int:
    """`any_decode` against numerics.dequantize: as they lie and transposed, with scales and without, cut short."""
    from hf_lowprec.kernels.triton import any_decode

    count = 0
    for i, quant in enumerate([*MX[::4], *OTHERS, Quant(format="e5m2", overflow="inf"), Quant(format="e4m3fn")]):
        x = inputs(9, 75 if i % 2 else 96, torch.float32, "cpu", spoiled=True)
        random = {"seed": SEED} if quant.rounding.mode == "stochastic" else {}
        q, s = numerics.quantize(x, quant, **random)
        truth = numerics.dequantize(numerics.ScaledTensor(q, s), quant)
        given = q.t().contiguous().t() if i % 3 == 0 else q
        assert any_decode.decodes(quant)
        same(any_decode.decode(given.to(device), s.to(device), quant), truth, ("decode", quant))
        turned = s.t().contiguous().t() if s.dim() else s  # scales of any strides, as codes
        same(any_decode.decode(given.to(device), turned.to(device), quant), truth, ("turned scales", quant))
        bare = q.float() if q.is_floating_point() else numerics.decode(q, quant.format)
        same(any_decode.decode(given.to(device)[:, :40], None, quant), bare[:, :40].contiguous(), ("bare", quant))
        same(any_decode.decode(given.to(device)[:, :40], s.to(device), quant), truth[:, :40].contiguous(), quant)
        halves = any_decode.decode(given.to(device), s.to(device), quant, torch.bfloat16)
        same(halves, truth.bfloat16(), ("bfloat16", quant))
        if any_decode.fits_bfloat16(quant, True):
            assert bool(((halves.float().cpu() == truth) | truth.isnan() | (truth.abs() < 2.0**-133)).all()), quant
        if any_decode.fits_bfloat16(quant, False):
            bare_halves = any_decode.decode(given.to(device), None, quant, torch.bfloat16).float()
            same(bare_halves[:, :40].contiguous(), bare[:, :40].contiguous(), ("bare bfloat16", quant))
        count += 5
    assert any_decode.decode(q[:0].to(device), None, quant).shape == (0, 75 if i % 2 else 96)
    if device == "cpu":  # where both sum alike
        check_emulated_products()
    return count


def test_what_bfloat16_holds() -> None:
    pytest.importorskip("triton")
    from hf_lowprec.kernels.triton.any_decode import fits_bfloat16

    mx = Quant(format="e4m3fn", scaling=Scaling(granularity="block", block=(32,), snap="ocp", store="e8m0"))
    row = Quant(format="e4m3fn", scaling=Scaling(granularity="row"))
    assert fits_bfloat16(mx, True) and fits_bfloat16(row, False) and not fits_bfloat16(row, True)
    assert fits_bfloat16(Quant(format="bf16"), False) and not fits_bfloat16(Quant(format="e6m9"), False)
    assert not fits_bfloat16(Quant(format="fp16"), False)
    fixed, far = (Scaling(method="static", exponent=e) for e in (3, -110))
    assert fits_bfloat16(Quant(format="e5m2", scaling=fixed), True)
    assert not fits_bfloat16(Quant(format="e5m2", scaling=far), True)


def check_emulated_products() -> None:
    """The operator's default and what a GPU runs instead."""
    from hf_lowprec.kernels.scaled_mm import _emulated
    from hf_lowprec.ops.scaled_mm import default_scaled_mm

    for quant in (MX[0], MX[20], OTHERS[2], Quant(format="e5m2")):
        key = quant_key(quant)
        a, b = (numerics.quantize(torch.randn(r, 70), quant) for r in (6, 5))
        wide = torch.nn.functional.pad(b.qdata.view(torch.uint8), (0, 10)).view(b.qdata.dtype)  # zeros beyond K
        arguments = (a.qdata, a.scale, key, wide, b.scale, key, torch.randn(5), torch.bfloat16)
        same(_emulated(*arguments), default_scaled_mm(*arguments, False, True), quant)


def test_policies_that_the_kernels_leave_to_torch() -> None:
    pytest.importorskip("triton")
    from hf_lowprec.kernels.triton.any_cast import plan_of

    for quant in (
        Quant(format="nf4"),
        Quant(format="e4m3fn", overflow="error"),
        Quant(format="e4m3fn", scaling=Scaling(granularity="tile", block=(4, 4))),
        Quant(format="e4m3fn", scaling=Scaling(granularity="block", block=(24,))),
        Quant(format="e3m1", scaling=NONE),  # a NaN that neither code nor scale can say: torch raises
        Quant(format="e8m0u"),
        *(q for r in PRESETS.values() if r.flexible for q in (r.fprop.input, r.fprop.weight)),
    ):
        assert plan_of(quant) is None


def test_operators_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no fused kernel covers goes through `any_cast`, in both operators; what is fused stays fused."""
    pytest.importorskip("triton")
    from hf_lowprec.kernels import quantize as kernels
    from hf_lowprec.kernels.triton import any_cast

    taken = []

    def fake(x: torch.Tensor, plan: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        taken.append((plan.quant, tuple(x.shape), x.is_contiguous()))
        return torch.zeros(x.shape, dtype=torch.uint8), torch.ones(())

    monkeypatch.setattr(any_cast, "quantize", fake)
    monkeypatch.setattr(kernels, "transpose", lambda x, pad_to: x)
    x = torch.randn(4, 32)
    kernels.quantize(x.t(), quant_key(MX[0]), None, False, None, None, None)
    kernels.cast_transpose(x, quant_key(OTHERS[11]), None, False, None, None, None)
    assert taken == [(MX[0], (32, 4), False), (OTHERS[11], (4, 32), True)]
    assert kernels.plan_of(quant_key(Quant(format="e4m3fn"))) is not None


def test_one_sample_is_no_constant() -> None:
    """A 1 that the JIT specialises on has no `.to`: counting what a cast does to one element would not compile."""
    pytest.importorskip("triton")
    from hf_lowprec.kernels.triton import any_cast

    special = {p.name: not p.do_not_specialize for p in any_cast.count_kernel.params if not p.is_constexpr}
    assert not special["samples"] and not special["sample_stride"]


def compile_for_h100() -> list[str]:
    import triton
    from triton.backends.compiler import GPUTarget

    from hf_lowprec.kernels.triton import any_cast, any_decode
    from hf_lowprec.kernels.triton.formats import Constants

    done = []
    long = (96, 64), (64, 1)
    for quant, (rows, cols), strides, wide in (
        (MX[0], *long, False), (MX[16], *long, True), (OTHERS[2], *long, False), (OTHERS[3], *long, True),
        (OTHERS[7], (96, 63), (63, 1), False), (OTHERS[3], (96, 63), (63, 1), True),
        (OTHERS[3], (96, 64), (1, 96), True), (MX[0], (96, 64), (1, 96), False), (OTHERS[15], (96, 64), (1, 96), True),
        (OTHERS[15], *long, False), (OTHERS[3], (8, 20000), (20000, 1), False), (OTHERS[13], *long, False),
        (OTHERS[21], *long, True),
    ):  # fmt: skip
        plan = any_cast.plan_of(quant)
        any_cast.WIDE_FROM = 0 if wide else 2**31
        size = 2 if quant.format in ("e6m5", "e6m9") else 1
        codes, dense = plan.method == any_cast.CURRENT, strides == (cols, 1)
        shape = any_cast._shape(plan, rows, cols, *strides, dense, torch.bfloat16, size, codes)
        any_cast._shape.cache_clear()
        turned = shape.kind == "turned words"
        kernel = any_cast.turned_kernel if turned else any_cast.any_cast_kernel
        constants = {**shape.constants, "METHOD": plan.method, "VALUES": False, "PARTS": 1}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        if not turned:
            constants |= {"amax_ptr": None, "partial_ptr": None, "given_ptr" if plan.method else "scale_ptr": None}
        types = {name: "i32" for name in kernel.arg_names if name not in constants}
        scale = "*u8" if quant.scaling.store == "e8m0" else "*fp32"
        types |= {"x_ptr": "*bf16", "q_ptr": "*i32" if turned else "*i16" if size == 2 else "*u8", "seed_ptr": "*i64"}
        types |= {k: v for k, v in {"scale_ptr": scale, "given_ptr": "*fp32"}.items() if k in types}
        source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=constants)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        done.append(f"{quant.format} {ptx.count('st.global')}")
    decode = any_decode._decode_kernel
    constants = dict(zip(decode.arg_names[8:], (2, True, 32, *Constants.of(plan.format)[:6], -1, 8, 256), strict=True))
    types = {"raw_ptr": "*u8", "out_ptr": "*fp32", "scale_ptr": "*u8"}
    types |= {name: "i32" for name in decode.arg_names[3:8]}
    source = triton.compiler.ASTSource(fn=decode, signature=types, constexprs=constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    return [*done, f"decode {ptx.count('st.global')}"]


def test_interpreter_agrees_with_numerics() -> None:
    assert int(interpreter.run(__file__, "interpret").split()[-1]) >= 200


@pytest.mark.slow
def test_compiles_for_an_h100(tmp_path: object) -> None:
    printed = interpreter.run(__file__, "compile", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    lines = printed.splitlines()
    assert len(lines) == 14 and all(int(line.split()[1]) > 0 for line in lines)


@pytest.mark.gpu
def test_gpu_agrees_with_numerics() -> None:
    assert check_kernels("cuda") + check_decoding("cuda") >= 200


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "compile":
        print("\n".join(compile_for_h100()))
    else:
        interpreter.mend()
        interpreter.few_programs()
        print("checked", check_kernels("cpu") + check_decoding("cpu"))
