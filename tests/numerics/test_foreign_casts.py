# SPDX-License-Identifier: Apache-2.0
"""torch's and ml_dtypes' casts: bit for bit where they agree with us, by a named option where they do not.

Where casts disagree about values beyond a format, `overflow` reproduces each:

                                saturate (ours)   saturate_inf      nan               inf
    e4m3fn  beyond 464          448               448 (torch)       NaN (ml_dtypes)   -
    e4m3fn  Inf                 NaN               448 (torch)       NaN (ml_dtypes)   -
    e5m2    beyond 61440, Inf   57344, NaN        57344             NaN               Inf (torch, ml_dtypes)
    fnuz    beyond, Inf         max, NaN          max               NaN (both)        -
    e2m1, e2m3, e3m2 beyond     max, NaN          max (ml_dtypes)   NaN               -

E8M0 rounds ties away in torch and ml_dtypes (`away`), to the even code in gfloat (`nearest`).
"""

import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat import RoundMode, encode_ndarray, round_ndarray
from oracles import edge_inputs, gfloat_info, half_inputs, random_inputs

from hf_lowprec.formats import FORMATS, Format, get_format
from hf_lowprec.numerics import encode, round_to_format
from hf_lowprec.recipe import Rounding


def inputs(fmt: Format) -> np.ndarray:
    return np.concatenate([half_inputs(), edge_inputs(fmt), random_inputs(1 << 15)])


def ours(x: np.ndarray, fmt: Format, overflow: str, mode: str = "nearest") -> np.ndarray:
    out = encode(torch.from_numpy(x), fmt, Rounding(mode=mode), overflow)
    return out.to(torch.int64).numpy() & 0xFFFF


def one_nan(codes: np.ndarray, fmt: Format) -> np.ndarray:
    """Foreign codes, with the payload and the sign of NaNs dropped."""
    codes = codes.astype(np.int64)
    nan = np.array([np.isnan(fmt.decode(code)) for code in range(1 << fmt.bits)])
    return np.where(nan[codes], fmt.nan_code if fmt.has_nan else -1, codes)


TORCH = [
    ("e4m3fn", "saturate_inf"),
    ("e5m2", "inf"),
    ("e4m3b8", "nan"),
    ("e5m2b16", "nan"),
    ("e5m10", "inf"),
    ("e8m7", "inf"),
]


@pytest.mark.parametrize(("name", "overflow"), TORCH)
def test_torch(name: str, overflow: str) -> None:
    fmt = FORMATS[name]
    assert isinstance(fmt, Format) and fmt.torch_dtype_name
    x = inputs(fmt)
    cast = torch.from_numpy(x).to(getattr(torch, fmt.torch_dtype_name))
    codes = cast.view(torch.uint8 if fmt.bits == 8 else torch.int16).to(torch.int64).numpy() & 0xFFFF
    if name == "e4m3fn" and torch.tensor(1e4).to(torch.float8_e4m3fn).isnan():
        overflow = "nan"  # torch before 2.12
    np.testing.assert_array_equal(ours(x, fmt, overflow), one_nan(codes, fmt))


ML_DTYPES = [
    ("float8_e4m3fn", "nan"),
    ("float8_e5m2", "inf"),
    ("float8_e4m3fnuz", "nan"),
    ("float8_e5m2fnuz", "nan"),
    ("float8_e4m3b11fnuz", "nan"),
    ("float8_e4m3", "inf"),
    ("float8_e3m4", "inf"),
    ("float6_e2m3fn", "saturate_inf"),
    ("float6_e3m2fn", "saturate_inf"),
    ("float4_e2m1fn", "saturate_inf"),
    ("bfloat16", "inf"),
]


@pytest.mark.parametrize(("dtype", "overflow"), ML_DTYPES)
def test_ml_dtypes(dtype: str, overflow: str) -> None:
    fmt = get_format(dtype)
    assert isinstance(fmt, Format)
    x = inputs(fmt)
    if not fmt.has_nan:
        x = x[~np.isnan(x)]  # ml_dtypes makes them -0; we raise (below)
    with np.errstate(invalid="ignore", over="ignore"):
        codes = x.astype(getattr(ml_dtypes, dtype)).view(np.uint8 if fmt.bits <= 8 else np.uint16)
    np.testing.assert_array_equal(ours(x, fmt, overflow), one_nan(codes, fmt))


def test_nan_in_a_format_without_nan() -> None:
    nan = torch.tensor([float("nan")])
    assert np.array([np.nan], np.float32).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) == 8  # minus zero
    with pytest.raises(ValueError, match="no NaN"):
        encode(nan, "e2m1")
    assert round_to_format(nan, "e2m1").isnan().all()


def test_e4m3b11_is_ml_dtypes_but_for_minus_zero() -> None:
    """HFP8's forward format has no NaN to give the code of -0 to; ml_dtypes' variant has the same values."""
    x = random_inputs(1 << 14)
    x = np.concatenate([x[np.isfinite(x)], edge_inputs(FORMATS["e4m3b11"])])
    x = x[np.abs(x) < 30]
    with np.errstate(invalid="ignore"):
        theirs = x.astype(ml_dtypes.float8_e4m3b11fnuz).astype(np.float32)
    np.testing.assert_array_equal(round_to_format(torch.from_numpy(x), "e4m3b11").numpy(), theirs)


# --- E8M0 -----------------------------------------------------------------------------------------------------------


def scales() -> np.ndarray:
    x = np.concatenate([edge_inputs(FORMATS["e8m0u"]), random_inputs(1 << 14)])
    return x[x > 2.0**-128]


def test_e8m0_ties() -> None:
    x = torch.tensor([1.5, 3.0, 6.0])
    assert round_to_format(x, "e8m0u", Rounding(mode="away")).tolist() == [2.0, 4.0, 8.0]
    assert round_to_format(x, "e8m0u").tolist() == [2.0, 2.0, 8.0]
    assert x.to(torch.float8_e8m0fnu).float().tolist() == [2.0, 4.0, 8.0]


def test_e8m0_away_is_torch_and_ml_dtypes() -> None:
    x = scales()
    x = x[x >= 2.0**-126]
    with np.errstate(over="ignore", invalid="ignore"):
        theirs = x.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    ours_ = ours(x, FORMATS["e8m0u"], "nan", "away")
    np.testing.assert_array_equal(ours_, theirs)
    np.testing.assert_array_equal(ours_, torch.from_numpy(x).to(torch.float8_e8m0fnu).view(torch.uint8).numpy())


def test_e8m0_among_float32_subnormals() -> None:
    """torch and ml_dtypes round everything between 2^-127 and 2^-126 up; we go on by the nearest."""
    x = torch.tensor([1.25 * 2.0**-127, 1.75 * 2.0**-127])
    assert encode(x, "e8m0u", Rounding(mode="away")).tolist() == [0, 1]
    assert x.to(torch.float8_e8m0fnu).view(torch.uint8).tolist() == [1, 1]
    assert x.numpy().astype(ml_dtypes.float8_e8m0fnu).view(np.uint8).tolist() == [1, 1]


def test_e8m0_nearest_is_gfloat() -> None:
    fmt = FORMATS["e8m0u"]
    assert isinstance(fmt, Format)
    x = scales()
    x = x[(x >= 2.0**-127) & (x < 2.0**127)].astype(np.float64)
    info = gfloat_info(fmt, subnormals=False)
    theirs = encode_ndarray(info, round_ndarray(info, x, RoundMode.TiesToEven))
    np.testing.assert_array_equal(ours(x, fmt, "saturate"), theirs)


def test_e8m0_of_what_is_no_scale() -> None:
    """Zero and negatives: the least value, or NaN by `overflow="nan"`, as ml_dtypes; torch drops the sign instead."""
    x = torch.tensor([0.0, -1.0, float("inf"), float("nan"), 3e38])
    assert encode(x, "e8m0u").tolist() == [0, 0, 255, 255, 254]
    assert encode(x, "e8m0u", overflow="nan").tolist() == [255] * 5
    with np.errstate(over="ignore", invalid="ignore"):
        assert x.numpy().astype(ml_dtypes.float8_e8m0fnu).view(np.uint8).tolist() == [255] * 5
    assert x[:2].to(torch.float8_e8m0fnu).view(torch.uint8).tolist() == [0, 127]
