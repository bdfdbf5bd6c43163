# SPDX-License-Identifier: Apache-2.0
"""The kernels of formats with ranges and widths as tensors: in Triton's interpreter q and the gradient of x bit for
bit the plain-torch truth, sums within their bounds; and compiled for an H100, without a GPU, with wide loads and no
fused multiply-add."""

from __future__ import annotations

import itertools
import re
from typing import Any

import interpreter
import pytest
import torch
from torch import Tensor

from hf_lowprec.numerics.flexible import gradients, least_man
from hf_lowprec.ops import flexible as ops

F, B, H = torch.float32, torch.bfloat16, torch.float16
SHAPES = [(1, 1), (3, 5), (7, 130), (1, 600), (70, 33), (6, 1), (5, 1100)]
SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-42, 3e38, -3e38, 1.0, 2.0, -2.0]
RANGES = [0.0, 1e-45, 1e-38, 2.0**-100, 0.037, 1.0, 2.0, 5.7, 3e4, 1e30, 3e38]


def noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int, special: bool = True) -> Tensor:
    """Of 40 octaves, with what is special in some places."""
    generator = torch.Generator().manual_seed(seed)
    octaves = torch.randint(-20, 6 if dtype == H else 20, shape, generator=generator).float()
    x = torch.randn(shape, generator=generator) * torch.exp2(octaves)
    if special:
        values = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), shape, generator=generator)]
        x = torch.where(torch.rand(shape, generator=generator) < 0.3, values, x)
    return x.to(dtype)


def layouts(shape: tuple[int, int], dtype: torch.dtype, seed: int, special: bool = True) -> list[Tensor]:
    """Contiguous, transposed, with gaps."""
    r, c = shape
    return [
        noise((r, c), dtype, seed, special),
        noise((c, r), dtype, seed + 1, special).t(),
        noise((r, c + 3), dtype, seed + 2, special)[:, 3:],
        noise((r, c, 2), dtype, seed + 3, special)[..., 1],
    ]


def assert_same(a: Tensor, b: Tensor, what: Any) -> None:
    """Bits, signs of zeros included; any NaN is like any other."""
    assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.isnan(), b.isnan()), what
    bits = torch.int16 if a.dtype.itemsize == 2 else torch.int32
    x, y = (torch.where(t.isnan(), 0, t).contiguous().view(bits) for t in (a, b))
    assert torch.equal(x, y), (what, a[x != y][:4], b[x != y][:4])


def assert_sum(found: Tensor, terms: Tensor, what: Any) -> None:
    """terms: float64, summed over the last dimension; 2^-16 of their magnitudes."""
    exact, size = terms.sum(-1), terms.abs().sum(-1)
    there = exact.isfinite()
    found = found.double().reshape(exact.shape)
    assert ((found - exact).abs() <= size * 2.0**-16 + 1e-37)[there].all(), (what, found, exact)
    assert not found[exact.isnan()].isfinite().any(), what


def ranges_of(shape: tuple[int, int], turn: int) -> list[Tensor]:
    each = torch.tensor(RANGES)[(torch.arange(shape[0]) + turn) % len(RANGES)].reshape(-1, 1)
    return [torch.tensor(RANGES[turn % len(RANGES)]), each.clone()]


def check_values() -> int:
    from hf_lowprec.kernels import flexible as kernels

    checked = 0
    widths = [(bits, man) for bits in (8, 3, 4, 6, 9, 12) for man in range(least_man(bits), bits)]
    widths += [(8, man) for man in (-3.0, 0.4, 2.5, 3.5, 3.49, 6.6, 99.0)]
    for turn, (bits, man) in enumerate(widths):
        width = torch.tensor(float(man))
        for place in range(2):
            shape = SHAPES[(turn + 3 * place) % len(SHAPES)]
            dtype, out = (F, B, H)[turn % 3], (F, B, F, H)[(turn + place) % 4]
            x = layouts(shape, dtype, 7 * turn)[(turn + place) % 4]
            for maxval in ranges_of(shape, turn + place):
                got = kernels.flexible(x, maxval, width, bits, out)
                assert got.is_contiguous()
                assert_same(got, ops.default_flexible(x, maxval, width, bits, out), (bits, man, shape, maxval))
                checked += 1
    # Every value near the grid of every width: all float16 numbers.
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(H).reshape(256, 256)
    for man in range(1, 8):
        args = x, torch.tensor(2.7), torch.tensor(float(man)), 8, F
        assert_same(kernels.flexible(*args), ops.default_flexible(*args), man)
        checked += 1
    # Every range on its own, over what is special.
    x = torch.tensor(SPECIAL).repeat(2)[None]
    for maxval, man in itertools.product(RANGES, range(1, 8)):
        args = x, torch.tensor(maxval), torch.tensor(float(man)), 8, F
        assert_same(kernels.flexible(*args), ops.default_flexible(*args), (maxval, man))
        checked += 1
    return checked


def check_gradients() -> int:
    from hf_lowprec.kernels import flexible as kernels
    from hf_lowprec.kernels.triton import flexible as triton_flexible

    checked = 0
    for turn, (bits, man) in enumerate((n, man) for n in (8, 5) for man in range(least_man(n), n)):
        width = torch.tensor(float(man))
        triton_flexible._MOST_PROGRAMS = (2048, 3)[turn % 2]  # many turns of few programs
        triton_flexible._cut_of_gradients.cache_clear()
        for place, shape in enumerate(SHAPES):
            dtype, out = (F, B, H)[(turn + place) % 3], (F, B, H, F)[(turn + place) % 4]
            special = place % 2 == 0
            x = layouts(shape, dtype, 5 * turn + place, special)[(turn + place) % 4]
            grad = layouts(shape, (F, B)[place % 2], 90 + turn, False)[(turn // 2 + place) % 2]
            for maxval in ranges_of(shape, 3 + turn + place):
                args = grad, x, maxval, width, bits, out
                got, expected = kernels.flexible_gradients(*args), ops.default_flexible_gradients(*args)
                what = (bits, man, shape, maxval)
                assert_same(got[0], expected[0], what)
                assert got[0].stride() == expected[0].stride(), what
                assert got[1].shape == maxval.shape and got[2].shape == width.shape
                # Each term by itself, as the truth has it.
                q = ops.default_flexible(x, maxval, width, bits, F)
                many, every = x.numel(), maxval.expand(x.shape[0], 1).expand(x.shape).reshape(-1, 1)
                one = gradients(grad.reshape(many, 1), x.reshape(many, 1), q.view(many, 1), every, width, bits)
                terms = one.maxval.double().view(x.shape)
                assert_sum(got[1], terms if maxval.dim() else terms.reshape(-1), what)
                each = width.expand(many, 1)
                one = gradients(grad.reshape(many, 1), x.reshape(many, 1), q.view(many, 1), every, each, bits)
                assert_sum(got[2], one.man.double().reshape(-1), what)
                checked += 1
    return checked


def check_products() -> int:
    from hf_lowprec.kernels import flexible as kernels

    kernels.multiplies_bfloat16 = lambda device: True
    seen = []

    def product(a: Tensor, b: Tensor) -> Tensor:
        seen.append((a.dtype, b.dtype))
        return a.float() @ b.float().t()

    kernels._product = product
    checked = 0
    for turn, (x_man, w_man) in enumerate(itertools.product(range(1, 8), range(1, 8))):
        m, n, k = ((3, 5, 7), (1, 1, 1), (9, 70, 40), (64, 3, 130))[turn % 4]
        x = layouts((m, k), (F, B, H)[turn % 3], turn, False)[turn % 4]
        w = layouts((n, k), (B, F)[turn % 2], 99 + turn, False)[(turn // 2) % 4]
        bias = torch.randn(n, dtype=(F, B)[turn % 2]) if turn % 3 else None
        x_maxval, w_maxval = x.float().abs().amax() * 0.7, w.float().abs().amax(1, keepdim=True) * 0.7
        x_range, w_range = (x_maxval, torch.tensor(float(x_man)), 8), (w_maxval, torch.tensor(float(w_man)), 8)
        if turn % 5 == 0:
            w_range = (w_maxval.amax(), *w_range[1:])
        out = kernels.flexible_mm(x, *x_range, w, *w_range, bias, F)
        qx, qw = (ops.default_flexible(t, *r, F).double() for t, r in ((x, x_range), (w, w_range)))
        exact = qx @ qw.t()
        bound = (k + 2) * 2.0**-22 * (qx.abs() @ qw.abs().t())
        if bias is not None:
            exact = exact + bias.double()
            bound = bound + 2.0**-24 * exact.abs()
        assert ((out.double() - exact).abs() <= bound).all(), (x_man, w_man)
        for dtype in (B, H):
            narrow = kernels.flexible_mm(x, *x_range, w, *w_range, bias, dtype)
            assert_same(narrow, out.to(dtype), "rounded once")
        checked += 1
    assert set(seen) == {(B, B)}
    # What bfloat16 does not hold is multiplied in float32.
    nine = torch.tensor(2.0), torch.tensor(3.0), 9
    args = (noise((4, 6), F, 1, False), *nine, noise((5, 6), F, 2, False), *nine, None, F)
    assert_same(kernels.flexible_mm(*args), ops.default_flexible_mm(*args), "9 bits")
    assert len(seen) == 3 * checked
    # Not finite: rows of their own.
    x = noise((4, 6), F, 1, False)
    x[2, 3] = float("inf")
    args = (x, *nine[:2], 8, noise((5, 6), F, 2, False), *nine[:2], 8, None, F)
    assert torch.equal(kernels.flexible_mm(*args).isnan(), ops.default_flexible_mm(*args).isnan())
    return checked


def check_counts() -> int:
    from hf_lowprec.kernels import flexible as kernels

    checked = 0
    for turn, shape in enumerate([*SHAPES, (300, 700)]):
        for place, x in enumerate(layouts(shape, (F, B, H)[turn % 3], turn)):
            if shape[0] > 99 and place != 1:
                continue  # of many programs one is enough
            for maxval in [None, *ranges_of(shape, turn + place)]:
                width = None if maxval is None else torch.tensor(float(1 + (turn + place) % 7))
                got, expected = (torch.arange(4) for _ in range(2))
                kernels.flexible_count(x, maxval, width, 8, got)
                ops.default_flexible_count(x, maxval, width, 8, expected)
                assert got.tolist() == expected.tolist(), (shape, maxval)
                checked += 1
    return checked


def test_every_value_of_8_bits_is_one_of_bfloat16() -> None:
    for bits in range(3, 9):
        for man in range(least_man(bits), bits):
            width = torch.tensor(float(man))
            form = ops.truth.layout(width, bits)
            x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(B).float()
            r = ops.default_flexible(x[x.isfinite()], form.largest, width, bits, F)
            assert torch.equal(r, r.bfloat16().float()) and float(form.largest) < 2.0**33
            assert r.unique().numel() >= (1 << bits) - (3 if man < bits - 2 else 4), "all its values"


@pytest.mark.parametrize("what", ["values", "gradients", "products", "counts"])
def test_interpreter_agrees_with_the_truth(what: str) -> None:
    assert int(interpreter.run(__file__, what).split()[-1]) >= 49


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> str:
    import triton
    from triton.backends.compiler import GPUTarget

    types = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in types}
    source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attrs)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    ptx: str = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    return ptx


def test_compiles_for_an_h100() -> None:
    pytest.importorskip("triton")
    from hf_lowprec.kernels.triton import flexible as kernels

    format = {"BITS": 8, "LEAST": 1}
    ranges = {"maxval_ptr": "*fp32", "man_ptr": "*fp32"}
    for each, tile, dtype in itertools.product((False, True), ({"ROWS": 4, "COLS": 512}, {"ROWS": 64, "COLS": 32}),
                                               ("bf16", "fp32")):  # fmt: skip
        turned = tile["ROWS"] == 64
        side = {"stride_row" if turned else "stride_col": 1}
        more = {**format, "EACH_ROW": each, **tile, **side}
        pointers = {"x_ptr": f"*{dtype}", "out_ptr": "*bf16", "grad_ptr": "*bf16", **ranges}
        pointers |= {"by_maxval_ptr": "*fp32", "by_man_ptr": "*fp32"}
        for kernel, extra in ((kernels._flexible_kernel, {"SCALED": each}), (kernels._gradients_kernel, {"grad_col": 1,
                              "out_row" if turned else "out_col": 1})):  # fmt: skip
            ptx = compiled(kernel, pointers, {**more, **extra})
            assert not re.search(r"\bfma\.", ptx) or "div.rn" in ptx, kernel
            loads = [int(v or 1) * int(w) for v, w in re.findall(r"ld\.global(?:\.v(\d))?\.b(\d+)", ptx)]
            assert sum(bits >= 64 for bits in loads) >= 2, (kernel, loads)
    pointers = {name: "*fp32" for name in ("sums_ptr", "x_maxval_ptr", "x_man_ptr", "w_maxval_ptr", "w_man_ptr")}
    pointers |= {"out_ptr": "*bf16", "bias_ptr": "*bf16"}
    limits = {"X_BITS": 8, "X_LEAST": 1, "W_BITS": 8, "W_LEAST": 1, "ROWS": 4, "COLS": 512}
    for bias in ({}, {"bias_ptr": None}):
        assert "st.global.v4.b32" in compiled(kernels._finish_kernel, pointers, {**limits, "EACH_COL": True, **bias})
    pointers = {"by_maxval_ptr": "*fp32", "by_man_ptr": "*fp32", "out_man_ptr": "*fp32", **ranges}
    for each in (False, True):
        compiled(kernels._sums_kernel, pointers, {**format, "EACH_ROW": each, "BLOCK": 1024})
        limits = {**format, "EACH_ROW": each, "SAMPLES": 128}
        compiled(kernels._count_kernel, {"x_ptr": "*bf16", "counts_ptr": "*i64", **ranges}, limits)
    none = {"maxval_ptr": None, "man_ptr": None}
    compiled(kernels._count_kernel, {"x_ptr": "*bf16", "counts_ptr": "*i64"}, {**limits, **none})


if __name__ == "__main__":
    import sys

    interpreter.mend()
    print(globals()[f"check_{sys.argv[1]}"]())
