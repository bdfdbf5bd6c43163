# SPDX-License-Identifier: Apache-2.0
"""The two operators: schema, fake and default implementation agree, and say what they count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core import batch, same_bits
from torch import Tensor

from hf_lowprec import numerics
from hf_lowprec.ops import kernel_counts, parse_quant, quant_key, quantize, scaled_mm
from hf_lowprec.ops.quantize import storage_dtype
from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import Quant, Rounding, Scaling

QUANTS = {
    "current exact": Quant(format="e4m3fn"),
    "current power of two": Quant(format="e5m2", scaling=Scaling(snap="rceil")),
    "delayed": Quant(format="e4m3fn", scaling=Scaling(method="delayed", history=4)),
    "static": Quant(format="e4m3fn", scaling=Scaling(method="static", exponent=-3)),
    "none": Quant(format="e5m2", scaling=Scaling(method="none")),
    "row": Quant(format="e4m3fn", scaling=Scaling(granularity="row")),
    "block": Quant(format="e4m3fn", scaling=Scaling(granularity="block", block=(16,))),
    "tile": Quant(format="e4m3fn", scaling=Scaling(granularity="tile", block=(4, 16))),
    "stochastic": Quant(format="e4m3fn", rounding=Rounding(mode="stochastic")),
    "codes of 5 bits": Quant(format="e2m2"),
    "codes of 12 bits": Quant(format="e5m6"),
    "half": Quant(format="e5m10"),
}


def state(name: str) -> dict[str, Any]:
    return {
        "amax": None if QUANTS[name].scaling.granularity != "tensor" else torch.zeros(()),
        "counts": torch.zeros(4, dtype=torch.int64),
        "seed": torch.tensor(5) if name == "stochastic" else None,
    }


@pytest.mark.parametrize("name", QUANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_passes_opcheck(name: str, dtype: torch.dtype) -> None:
    delayed = torch.zeros(()) if name == "delayed" else None
    s = state(name)
    args = (batch(8, 32, dtype=dtype), quant_key(QUANTS[name]), delayed, False, s["amax"], s["counts"], s["seed"])
    torch.library.opcheck(torch.ops.hf_lowprec.quantize.default, args)


def test_quantize_with_a_fixed_scale_passes_opcheck() -> None:
    args = (batch(8, 32).t(), quant_key(QUANTS["delayed"]), torch.tensor(0.5), True, None, None, None)
    torch.library.opcheck(torch.ops.hf_lowprec.quantize.default, args)


FP8_PAIRS = [("current exact", "current power of two"), ("block", "block"), ("codes of 5 bits", "row")]


@pytest.mark.parametrize("pair", [*FP8_PAIRS, ("half", "codes of 12 bits")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_mm_passes_opcheck(pair: tuple[str, str], dtype: torch.dtype) -> None:
    # torch's schema check compares arguments with allclose, which knows no float8.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if pair not in FP8_PAIRS:
        checks = ("test_schema", *checks)
    operands: list[Any] = []
    for name, rows in zip(pair, (5, 7), strict=True):
        key = quant_key(QUANTS[name])
        operands += [*quantize(batch(rows, 32), key), key]
    for bias in (None, batch(7)):
        args = (*operands, bias, dtype, True, False)
        torch.library.opcheck(torch.ops.hf_lowprec.scaled_mm.default, args, test_utils=checks)


@pytest.mark.parametrize("name", QUANTS)
def test_quantize_is_numerics(name: str) -> None:
    quant, x = QUANTS[name], batch(8, 32)
    s = state(name)
    delayed = torch.tensor(0.25) if name == "delayed" else None
    qdata, scale = quantize(x, quant_key(quant), delayed, **s)
    expected = numerics.quantize(x, quant, scale=delayed, seed=s["seed"])
    assert qdata.dtype == storage_dtype(quant.format) and scale.dtype == torch.float32
    assert same_bits(qdata, expected.qdata) and same_bits(scale, expected.scale)
    if name == "delayed":
        assert float(s["amax"]) == float(x.abs().max())
    assert int(s["counts"][0]) == x.numel()


GROUPS = {
    "row": Scaling(granularity="row", margin=-3),
    "short block": Scaling(granularity="block", block=(48,), snap="ocp", store="e8m0"),
    "tile": Scaling(granularity="tile", block=(3, 50), margin=-2),
}


@pytest.mark.parametrize("name", GROUPS)
def test_counters_go_by_the_scale_of_each_group(name: str) -> None:
    """On a sample of 65536 elements and a few, which is all that a larger tensor is looked at."""
    x = batch(700, 200) * torch.exp2(batch(700, 200, seed=1) * 4)
    x[5, 7] = float("inf")
    quant, counts = Quant(format="e2m1", scaling=GROUPS[name]), torch.zeros(4, dtype=torch.int64)
    _, scale = quantize(x, quant_key(quant), counts=counts)
    z = (x.abs() / numerics.expand_scale(scale.float(), (700, 200), quant.scaling)).reshape(-1)[::3]
    x = x.reshape(-1)[::3]
    finite = x.isfinite()
    wanted = [x.numel(), (finite & (z > 6)).sum(), ((z > 0) & (z <= 0.25)).sum(), (~finite).sum()]
    assert counts.tolist() == [int(w) for w in wanted] and min(counts[:3]) > 500


def test_amax_rises_and_does_not_fall() -> None:
    amax, key = torch.zeros(()), quant_key(QUANTS["delayed"])
    for size, expected in ((2.0, 2.0), (1.0, 2.0), (3.0, 3.0)):
        quantize(torch.tensor([[-size, 0.0]]), key, torch.zeros(()), amax=amax)
        assert float(amax) == expected


def test_delayed_scale_of_zero_means_none_yet() -> None:
    key, x = quant_key(QUANTS["delayed"]), batch(4, 32)
    assert same_bits(quantize(x, key, torch.zeros(()))[1], x.abs().max() / 448)
    assert float(quantize(x, key, torch.tensor(3.0))[1]) == 3.0


@pytest.mark.parametrize("name", ["current exact", "static", "row"])
def test_given_scale_counts_for_delayed_scaling_only(name: str) -> None:
    key, x = quant_key(QUANTS[name]), batch(4, 32)
    assert same_bits(quantize(x, key, torch.tensor(3.0))[1], quantize(x, key)[1])
    assert float(quantize(x, quant_key(QUANTS["static"]), torch.tensor(3.0), fixed=True)[1]) == 3.0


def values(qdata: Tensor, scale: Tensor, name: str) -> Tensor:
    return numerics.dequantize(numerics.ScaledTensor(qdata, scale), QUANTS[name])


@pytest.mark.parametrize("a", QUANTS)
@pytest.mark.parametrize("b", ["current exact", "block"])
def test_scaled_mm_is_the_product_of_the_values(a: str, b: str) -> None:
    qa = quantize(batch(5, 32), quant_key(QUANTS[a]), torch.ones(()) if a == "delayed" else None, seed=torch.tensor(5))
    qb = quantize(batch(7, 32, seed=1), quant_key(QUANTS[b]))
    bias = batch(7, seed=2, dtype=torch.bfloat16)
    expected = values(*qa, a).double() @ values(*qb, b).double().t() + bias.double()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = scaled_mm(*qa, quant_key(QUANTS[a]), *qb, quant_key(QUANTS[b]), bias, dtype=dtype)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=2e-5)


def test_scaled_mm_under_autocast_is_float32_inside() -> None:
    key = quant_key(QUANTS["current exact"])
    a, b = quantize(batch(64, 256), key), quantize(batch(32, 256, seed=1), key)
    plain = scaled_mm(*a, key, *b, key, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(scaled_mm(*a, key, *b, key, dtype=torch.float32), plain)


def test_strides_do_not_matter() -> None:
    key = quant_key(QUANTS["current exact"])
    (a, sa), (b, sb) = quantize(batch(5, 32), key), quantize(batch(7, 32), key)
    strided = a.t().contiguous().t(), b.t().contiguous().t()
    assert strided[0].stride() != a.stride()
    out = scaled_mm(a, sa, key, b, sb, key, dtype=torch.float32)
    torch.testing.assert_close(scaled_mm(strided[0], sa, key, strided[1], sb, key, dtype=torch.float32), out)


def test_kernels_are_counted() -> None:
    x, y = quant_key(QUANTS["current exact"]), quant_key(QUANTS["current power of two"])
    before = kernel_counts()
    scaled_mm(*quantize(batch(5, 32), x), x, *quantize(batch(7, 32), y), y, dtype=torch.float32)
    assert kernel_counts() - before == {"emulated e4m3fn x e5m2": 1}


def test_keys() -> None:
    keys = {quant_key(quant) for quant in QUANTS.values()}
    assert len(keys) == len(QUANTS), "different policies, different keys"
    for recipe in PRESETS.values():
        for gemm in (recipe.fprop, recipe.dgrad, recipe.wgrad):
            for quant in (gemm.input, gemm.weight, gemm.grad_output):
                assert quant is None or parse_quant(quant_key(quant)) == quant
    assert quant_key(Quant(format="float8_e5m2")) == quant_key(Quant(format="e5m2"))
