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
from weight_casts import casts_of, check, weights

from hf_lowprec import ops
from hf_lowprec.ops.cast_weights import PlainTable
from hf_lowprec.recipe import Quant


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
