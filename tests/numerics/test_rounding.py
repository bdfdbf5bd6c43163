# SPDX-License-Identifier: Apache-2.0
"""Rounding against gfloat, code by code: -0 and NaN count."""

import numpy as np
import pytest
import torch
from oracles import (
    CATALOGUE,
    MODES,
    MORE,
    edge_inputs,
    gfloat_codes,
    half_inputs,
    random_inputs,
    without_nan,
)

from hf_lowprec.formats import FORMATS, Codebook, Format
from hf_lowprec.numerics import decode, encode, round_to_format
from hf_lowprec.recipe import Rounding

INF = float("inf")
ROUNDED_BY_GFLOAT = [f for f in CATALOGUE + MORE if f.subnormal != "normal0" and f.signed]


def codes(x: np.ndarray | torch.Tensor, fmt: Format, mode: str = "nearest", overflow: str = "saturate") -> np.ndarray:
    """Ours, as non-negative integers."""
    out = encode(torch.as_tensor(x), fmt, Rounding(mode=mode), overflow)
    return out.to(torch.int64).numpy() & 0xFFFF


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fmt", ROUNDED_BY_GFLOAT, ids=str)
def test_all_halves_edges_and_random_floats_encode_as_gfloat_says(fmt: Format, mode: str) -> None:
    x = without_nan(fmt, np.concatenate([half_inputs(), edge_inputs(fmt), random_inputs(1 << 12)]))
    np.testing.assert_array_equal(codes(x, fmt, mode, "saturate_inf"), gfloat_codes(fmt, x, mode, saturate=True))


@pytest.mark.parametrize("mode", ["nearest", "away"])
@pytest.mark.parametrize("fmt", [f for f in ROUNDED_BY_GFLOAT if f.has_nan], ids=str)
def test_overflow_to_inf_or_nan_as_gfloat_says(fmt: Format, mode: str) -> None:
    x = np.concatenate([half_inputs(), edge_inputs(fmt), random_inputs(1 << 12)])
    overflow = "inf" if fmt.has_inf else "nan"
    np.testing.assert_array_equal(codes(x, fmt, mode, overflow), gfloat_codes(fmt, x, mode, saturate=False))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fmt", ROUNDED_BY_GFLOAT, ids=str)
def test_float64_input_is_rounded_once(fmt: Format, mode: str) -> None:
    """A tie plus less than float32 can see: rounding to float32 first would make it a tie again."""
    values = np.array([v for v in fmt.values() if v > 0][:2000])
    ties = (values[:-1] + values[1:]) / 2
    x = np.concatenate(
        [ties * (1 + 2.0**-40), ties * (1 - 2.0**-40), -ties, np.random.default_rng(0).standard_normal(999)]
    )
    np.testing.assert_array_equal(codes(x, fmt, mode), gfloat_codes(fmt, x, mode, saturate=True))
    np.testing.assert_array_equal(
        round_to_format(torch.from_numpy(x), fmt, Rounding(mode=mode)).numpy(),
        decode(encode(torch.from_numpy(x), fmt, Rounding(mode=mode)), fmt, torch.float64).numpy(),
    )


@pytest.mark.parametrize("fmt", CATALOGUE + MORE, ids=str)
def test_tensors_agree_with_the_scalar_specification(fmt: Format) -> None:
    x = edge_inputs(fmt)
    x = np.concatenate([x[:: max(1, len(x) // 3000)], random_inputs(500), [0.0, -0.0]]).astype(np.float32)
    if not fmt.has_nan:
        x = x[np.isfinite(x)]
    np.testing.assert_array_equal(codes(x, fmt), [fmt.encode(float(v)) for v in x])


@pytest.mark.parametrize("fmt", [f for f in CATALOGUE + MORE if f.subnormal == "normal0" and f.signed], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_normal0_rounds_between_its_neighbours(fmt: Format, mode: str) -> None:
    """gfloat has no such rounding; search the table of values instead."""
    x = edge_inputs(fmt)
    x = x[np.isfinite(x)].astype(np.float64)
    grid = np.array([v for v in fmt.values() if v >= 0])
    size = np.minimum(np.abs(x), fmt.max)
    low = np.clip(np.searchsorted(grid, size, side="right") - 1, 0, len(grid) - 2)
    below, above = size - grid[low], grid[low + 1] - size
    up = {
        "nearest": (above < below) | ((above == below) & (low % 2 == 1)),
        "away": above <= below,
        "zero": above == 0,
    }[mode]
    expected = np.copysign(grid[low + up], x)
    got = round_to_format(torch.from_numpy(x.astype(np.float32)), fmt, Rounding(mode=mode)).numpy()
    np.testing.assert_array_equal(got.view(np.int32), expected.astype(np.float32).view(np.int32))


def test_normal0_of_hfp8_starts_at_1_125() -> None:
    """HFP8's 1-4-3 without subnormals: code 1 is 2^-11 * 1.125."""
    fmt = Format(4, 3, 11, subnormal="normal0")
    assert fmt.tiny == 2.0**-11 * 1.125
    half = fmt.tiny / 2
    got = round_to_format(torch.tensor([half, np.nextafter(np.float32(half), np.float32(1)), -half, 2.0**-11]), fmt)
    assert got.tolist() == [0.0, fmt.tiny, -0.0, fmt.tiny]
    assert got[2].signbit()


def test_flush_rounds_before_it_flushes() -> None:
    """E6M5 without subnormals: just below the least normal rounds up to it, the rest below is zero."""
    fmt = FORMATS["e6m5"]
    x = torch.tensor([2.0**-30, 2.0**-30 * (1 - 2.0**-8), 2.0**-30 * (1 - 2.0**-6), -(2.0**-33)])
    for mode, second in (("nearest", 2.0**-30), ("zero", 0.0)):
        got = round_to_format(x, fmt, Rounding(mode=mode))
        assert got.tolist() == [2.0**-30, second, 0.0, -0.0]
        assert got[3].signbit()


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e5m10", "e8m7", "e4m3b8", "e2m1", "e6m9", "e6m5"])
def test_edges(name: str) -> None:
    fmt = FORMATS[name]
    assert isinstance(fmt, Format)
    ulp = 2.0 ** (fmt.emax - fmt.man)
    x = torch.tensor([0.0, -0.0, fmt.tiny, fmt.tiny / 2, fmt.max, fmt.max + ulp / 2, -INF, INF, float("nan")])
    got = round_to_format(x, fmt)
    assert got[:5].tolist() == [0.0, 0.0, fmt.tiny, 0.0, fmt.max]
    assert got[1].signbit().item() == fmt.has_negative_zero
    assert got[5] == fmt.max
    assert got[6:].isnan().all()  # a non-finite element becomes NaN
    assert round_to_format(x, fmt, overflow="saturate_inf")[5:8].tolist() == [fmt.max, -fmt.max, fmt.max]
    tie_stays = fmt.max_code % 2 == 0  # E4M3FN: 464 is a tie and 448 the even code
    assert round_to_format(x, fmt, overflow="nan")[5].isnan() == (not tie_stays)
    assert round_to_format(x, fmt, overflow="nan")[6:].isnan().all()
    if fmt.has_inf:
        assert round_to_format(x, fmt, overflow="inf")[5:8].tolist() == [INF, -INF, INF]
    with pytest.raises(OverflowError, match="beyond the format"):
        round_to_format(torch.tensor([fmt.max + 0.75 * ulp]), fmt, overflow="error")
    assert round_to_format(x[6:], fmt, overflow="error").isnan().all()  # error is about finite values


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e2m1", "e8m7", "e6m5"])
@pytest.mark.parametrize("overflow", ["saturate", "saturate_inf", "nan"])
def test_fast_and_general_method_agree(name: str, overflow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.from_numpy(np.concatenate([edge_inputs(FORMATS[name]), random_inputs(1 << 12)]))
    fast = round_to_format(x, name, overflow=overflow)
    monkeypatch.setattr("hf_lowprec.numerics.rounding.magic_fits", lambda fmt: False)
    monkeypatch.setattr("hf_lowprec.numerics.rounding._nearest_bf16", None)
    monkeypatch.setattr(Format, "torch_dtype_name", None)
    general = round_to_format(x, name, overflow=overflow)
    assert torch.equal(fast.isnan(), general.isnan())
    assert torch.equal(fast.nan_to_num(7).view(torch.int32), general.nan_to_num(7).view(torch.int32))


@pytest.mark.parametrize("name", ["e4m3fn", "e2m1", "e5m10"])
def test_shape_dtype_and_slices_do_not_matter(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 700)  # several cache-sized slices, the last one partial
    whole = round_to_format(x, name)
    assert torch.equal(round_to_format(x.t(), name), whole.t())
    assert torch.equal(torch.stack([round_to_format(row, name) for row in x]), whole)
    for empty in (torch.empty(0), torch.empty(3, 0)):
        assert round_to_format(empty, name).shape == empty.shape
    assert round_to_format(x[0, 0], name) == whole[0, 0]
    assert encode(x.t(), name).shape == (700, 300)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_input_keeps_its_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(1000).to(dtype)
    got = round_to_format(x, "e4m3fn")
    assert got.dtype == dtype
    assert torch.equal(got.float(), round_to_format(x.float(), "e4m3fn"))
    wide = "e5m10" if dtype == torch.bfloat16 else "e8m7"
    with pytest.raises(ValueError, match="cannot hold"):
        round_to_format(x, wide)
    assert torch.equal(encode(x, wide), encode(x.float(), wide))


def test_input_is_left_alone() -> None:
    x = torch.tensor([0.1, INF, -3.0], requires_grad=True)
    before = x.detach().clone()
    assert not round_to_format(x, "e4m3fn").requires_grad
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize("book", [f for f in FORMATS.values() if isinstance(f, Codebook)], ids=str)
def test_codebooks_take_the_nearest_value(book: Codebook) -> None:
    x = torch.cat([torch.randn(2000) * 0.5, torch.tensor([0.0, 5.0, -5.0])])
    table = torch.tensor(book.values)
    nearest = table[(x[:, None].double() - table.double()).abs().argmin(1)]
    got = round_to_format(x, book)
    assert torch.equal((got.double() - x).abs(), (nearest.double() - x).abs())
    assert encode(x, book).tolist() == [book.encode(v) for v in x.tolist()]
    assert round_to_format(torch.tensor([INF]), book).isnan().all()
    assert round_to_format(torch.tensor([5.0]), book, overflow="nan").isnan().all()
    toward_zero = round_to_format(x, book, Rounding(mode="zero"))
    assert (toward_zero.abs() <= x.abs().clamp(min=table.abs().min())).all()


def test_errors_say_what_to_do() -> None:
    x = torch.ones(3)
    with pytest.raises(TypeError, match="floating point"):
        round_to_format(torch.ones(3, dtype=torch.int32), "e4m3fn")
    with pytest.raises(ValueError, match="no Inf"):
        round_to_format(x, "e4m3fn", overflow="inf")
    with pytest.raises(ValueError, match="overflow"):
        round_to_format(x, "e4m3fn", overflow="wrap")
    with pytest.raises(ValueError, match="seed"):
        round_to_format(x, "e4m3fn", Rounding(mode="stochastic"))
    with pytest.raises(ValueError, match="one per element"):
        round_to_format(x, "e4m3fn", Rounding(mode="stochastic"), words=torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="drops 20 bits"):
        round_to_format(x, "e4m3fn", Rounding(mode="stochastic", bits=21), seed=0)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["e4m3fn", "e8m7"])
def test_compiled_code_rounds_alike(name: str, backend: str) -> None:
    """e8m7: Inductor drops a cast to bfloat16 and back, which eager code uses."""
    x = torch.from_numpy(edge_inputs(FORMATS[name]))
    stochastic = Rounding(mode="stochastic")
    for function in (
        lambda x: round_to_format(x, name),
        lambda x: decode(encode(x, name, stochastic, seed=3), name),
    ):
        got, want = torch.compile(function, backend=backend, fullgraph=True)(x), function(x)
        assert torch.equal(got.nan_to_num(7).view(torch.int32), want.nan_to_num(7).view(torch.int32))
