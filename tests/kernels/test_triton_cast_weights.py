# SPDX-License-Identifier: Apache-2.0
"""Many weights cast by one launch: in Triton's interpreter, bit for bit what a cast of each gives; and it compiles for
an H100, with whole words moved."""

from __future__ import annotations

import re
import sys
from typing import Any
from unittest import mock

import interpreter
import pytest
import torch
from torch import Tensor

from hf_lowprec import ops
from hf_lowprec.ops.cast_weights import PlainTable, WeightCast, new_copies
from hf_lowprec.recipe import Quant, Scaling

CURRENT, SNAPPED = Scaling(), Scaling(snap="rceil", margin=1)
DELAYED, STATIC = Scaling(method="delayed", history=4), Scaling(method="static", exponent=-3)
SHAPES = ((64, 128), (130, 48), (16, 16), (33, 20), (1, 16), (129, 1), (260, 520))


def weights() -> list[tuple[Tensor, Quant, float | None, bool]]:
    """(weight, policy, delayed scale, both layouts): every dtype, shape and method, some of them not finite."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for i, shape in enumerate(SHAPES):
        for j, (dtype, scaling) in enumerate(
            ((torch.bfloat16, CURRENT), (torch.float32, DELAYED), (torch.float16, STATIC), (torch.float32, SNAPPED))
        ):
            if (i + j) % 2 and i > 1:
                continue
            x = (torch.randn(shape, generator=generator) * 100).to(dtype)
            x.view(-1)[x.numel() // 3] = (float("nan"), float("inf"), 3e4, 0.0)[(i + j) % 4]
            given = (0.0, 0.25)[i % 2] if scaling is DELAYED else None
            out.append((x, Quant(format="e5m2" if scaling is STATIC else "e4m3fn", scaling=scaling), given, i != 3))
    odd = torch.randn(20 * 32 + 1, generator=generator)[1:].view(20, 32)  # an address that is a multiple of 4 only
    return [*out, (odd, Quant(format="e4m3fn"), None, True), (torch.zeros(32, 32), Quant(format="e4m3fn"), None, True)]


def finite_amax(x: Tensor) -> Tensor:
    x = x.float()
    return torch.where(x.isfinite(), x, 0.0).abs().max()


def casts_of(cases: list[Any]) -> list[WeightCast]:
    out = []
    for x, quant, given, both in cases:
        key = ops.quant_key(quant)
        copies = new_copies(x, key, transposed=both)
        for copy in copies[:2]:
            if copy is not None:
                copy.view(torch.uint8).fill_(77)
        scale = None if given is None else torch.tensor(given)
        out.append(WeightCast(x, key, scale, finite_amax(x), *copies))
    return out


def same(a: Tensor | None, b: Tensor) -> bool:
    """Equal bits, any NaN for any NaN."""
    if a is None:
        return not b.numel()
    nan = a.float().isnan()
    same = a.view(torch.uint8) == b.view(torch.uint8)
    return a.dtype == b.dtype and a.shape == b.shape and bool((same | (nan & b.float().isnan())).all())


def check(table: Any, cases: list[Any]) -> int:
    """Against `ops.cast_transpose` of each, thrice: the last time at other addresses."""
    casts = casts_of(cases)
    for run in range(3):
        casts = casts_of(cases) if run == 2 else casts
        counts = torch.full((len(casts), 4), 9)
        seen = torch.full((len(casts),), 9.0)
        table.run(casts, counts, seen)
        for cast, count, amax in zip(casts, counts, seen, strict=True):
            delayed = parse(cast.quant).scaling.method == "delayed"
            expected_counts, expected_amax = torch.zeros(4, dtype=torch.int64), torch.zeros(())
            rows, columns, scale = ops.cast_transpose(
                cast.weight, cast.quant, cast.given, amax=expected_amax if delayed else None, counts=expected_counts,
                columns=cast.transposed is not None,
            )  # fmt: skip
            where = (run, cast.weight.shape, cast.weight.dtype, parse(cast.quant).scaling.method)
            assert same(cast.qdata, rows) and same(cast.transposed, columns), where
            assert torch.equal(cast.scale, scale), (where, cast.scale, scale)
            assert torch.equal(count, expected_counts), (where, count, expected_counts)
            assert not delayed or torch.equal(amax, expected_amax), where
        for cast in casts:
            cast.weight.mul_(-1.5)
            if cast.amax is not None:
                cast.amax.copy_(finite_amax(cast.weight))
    return len(casts)


def parse(quant: str) -> Quant:
    from hf_lowprec.ops.quantize import parse_quant

    return parse_quant(quant)


def interpret() -> None:
    from hf_lowprec.kernels import cast_weights as kernels

    interpreter.mend()
    cases = weights()
    device = torch.device("cpu")
    assert all(kernels.WeightTable.takes(x, ops.quant_key(quant)) for x, quant, *_ in cases)
    for refused in (torch.zeros(8, 16, dtype=torch.float64), torch.zeros(8, 16).t(), torch.zeros(0, 16)):
        assert not kernels.WeightTable.takes(refused, ops.quant_key(Quant(format="e4m3fn")))
    assert not kernels.WeightTable.takes(torch.zeros(8, 16), ops.quant_key(Quant(format="e5m10")))
    table = kernels.WeightTable(device)
    with mock.patch.object(kernels, "launch_all", wraps=kernels.launch_all) as launches:
        count = check(table, cases)
    kinds = {(q.format, q.scaling.method, q.scaling.snap, x.dtype, both, x.shape[1] % 16, x.data_ptr() % 16 > 0)
             for x, q, _, both in cases}  # fmt: skip
    assert {len(call.args[0]) for call in launches.call_args_list} <= set(range(4, len(kinds) + 1))
    # Many tiles for each of few programs.
    with mock.patch.object(kernels, "_PROGRAMS", 1), mock.patch.object(kernels, "_SPAN", 7):
        count += check(kernels.WeightTable(device), [(torch.randn(700, 300), Quant(format="e4m3fn"), None, True)])
    # Fewer weights than before, in another order.
    count += check(table, cases[::-2])
    with pytest.raises(ValueError, match="amax is not known"):
        table.run([casts_of(cases)[0]._replace(amax=None)], torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1))
    print("checked", count)


def compile_for_h100() -> None:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    from hf_lowprec.kernels.triton.cast import SAMPLES, FormatConstants
    from hf_lowprec.kernels.triton.cast_transpose import TILE
    from hf_lowprec.kernels.triton.cast_weights import cast_weights_kernel as kernel

    constants = FormatConstants.of(448.0, 2.0**-9, 0, False)
    cases = ((tl.bfloat16, 2, True, True), (tl.float32, 1, True, True), (tl.float16, 0, False, True))
    for x, method, both, fast in (*cases, (tl.bfloat16, 2, True, False)):
        values = (*constants, method, x, tl.float8e4nv, both, fast, SAMPLES, TILE.rows, TILE.columns)
        given = {(i,): value for i, value in enumerate(values, 2)}
        types = {"chunks": "*i32", "table": "*i64", **{name: "constexpr" for name in kernel.arg_names[2:]}}
        aligned: Any = {(i,): [["tt.divisibility", 16]] for i in (0, 1)}
        source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=given, attrs=aligned)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": TILE.warps})
        ptx = made.asm["ptx"]
        loads, stores = (len(re.findall(rf"{word}\.global\.v4\.b32", ptx)) for word in ("ld", "st"))
        print(method, loads, stores, len(re.findall(r"st\.global\.b8", ptx)))


def test_the_truth_is_a_cast_of_each() -> None:
    assert check(PlainTable(), weights()) > 15


def test_interpreter_agrees_with_the_operator() -> None:
    assert int(interpreter.run(__file__, "interpret").split()[-1]) > 20


@pytest.mark.slow
def test_compiles_for_an_h100(tmp_path: object) -> None:
    """Weights whose rows are aligned move 16 bytes at a time, as in a launch for one of them."""
    printed = interpreter.run(__file__, "compile", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    rows = [[int(word) for word in line.split()] for line in printed.splitlines()]
    assert rows == [[2, 8, 8, 0], [1, 16, 8, 0], [0, 8, 4, 0], [2, 0, 4, 64]]


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"interpret": interpret, "compile": compile_for_h100}[sys.argv[1]]()
