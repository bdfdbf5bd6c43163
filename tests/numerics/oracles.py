# SPDX-License-Identifier: Apache-2.0
"""What gfloat says about our formats, as arrays of codes, and the inputs at which formats differ."""

from __future__ import annotations

from typing import Any

import numpy as np
from gfloat import Domain, FormatInfo, RoundMode, decode_float, decode_ndarray, encode_ndarray, round_ndarray

from hf_lowprec.formats import FORMATS, Format

MODES = {"nearest": RoundMode.TiesToEven, "away": RoundMode.TiesToAway, "zero": RoundMode.TowardZero}
CATALOGUE = [fmt for fmt in FORMATS.values() if isinstance(fmt, Format)]
# What the catalogue has only once or not at all.
MORE = [
    Format(4, 3, 11, subnormal="normal0"),  # HFP8 without subnormals
    Format(2, 1, subnormal="normal0"),
    Format(5, 2, specials="ieee", subnormal="normal0"),
    Format(4, 3, specials="fn", subnormal="flush"),
    Format(3, 0),
    Format(4, 0, specials="fn", subnormal="flush"),
    Format(1, 6),
    Format(0, 1),
    Format(7, 8, specials="ieee"),
    Format(4, 3, 8, specials="fnuz", subnormal="flush"),
    Format(4, 4, signed=False),
    Format(4, 2, subnormal="normal0", signed=False),
    Format(3, 0, subnormal="normal0"),  # no zero
    Format(5, 3, specials="fn", signed=False),
]


def gfloat_info(fmt: Format, *, subnormals: bool | None = None) -> FormatInfo:
    gradual = fmt.subnormal == "gradual" if subnormals is None else subnormals
    assert fmt.bias is not None
    return FormatInfo(
        str(fmt),
        fmt.bits,
        fmt.man + 1,
        bias=fmt.bias,
        is_signed=fmt.signed,
        domain=Domain.Extended if fmt.specials == "ieee" else Domain.Finite,
        has_nz=fmt.signed and fmt.specials != "fnuz",
        num_high_nans={"ieee": 2**fmt.man - 1, "fn": 1}.get(fmt.specials, 0),
        has_subnormals=gradual,
        is_twos_complement=False,
    )


def gfloat_values(fmt: Format) -> np.ndarray:
    """The value of every code, float64."""
    codes = np.arange(1 << fmt.bits)
    if fmt.exp == 0:  # gfloat's array version misses the positive NaN there, its scalar one does not
        return np.array([decode_float(gfloat_info(fmt), int(code)).fval for code in codes])
    if fmt.subnormal == "flush":
        values = decode_ndarray(gfloat_info(fmt, subnormals=True), codes)
        return np.where(np.abs(values) < fmt.min_normal, _zero_like(fmt, values), values)
    # gfloat's formats without subnormals are what we call normal0: field 0 is a normal binade, its first code zero.
    return decode_ndarray(gfloat_info(fmt), codes)


def _zero_like(fmt: Format, values: np.ndarray) -> np.ndarray:
    return np.copysign(0.0, values) if fmt.has_negative_zero else np.zeros_like(values)


def gfloat_round(fmt: Format, x: np.ndarray, mode: str, *, saturate: bool, **sr: Any) -> np.ndarray:
    """Values, float64. Not for normal0: gfloat rounds its formats without subnormals as if they had no least value."""
    assert fmt.subnormal != "normal0"
    kind = RoundMode.StochasticFastest if mode == "stochastic" else MODES[mode]
    with np.errstate(invalid="ignore"):
        values = round_ndarray(gfloat_info(fmt), x.astype(np.float64), kind, saturate, **sr)
    if fmt.subnormal == "flush":
        values = np.where(np.abs(values) < fmt.min_normal, _zero_like(fmt, values), values)
    return values


def gfloat_codes(fmt: Format, x: np.ndarray, mode: str, *, saturate: bool, **sr: Any) -> np.ndarray:
    """Codes, with every NaN as our one."""
    values = gfloat_round(fmt, x, mode, saturate=saturate, **sr)
    codes = encode_ndarray(gfloat_info(fmt, subnormals=True), values).astype(np.int64)
    return np.where(np.isnan(values), fmt.nan_code if fmt.has_nan else -1, codes)


def half_inputs() -> np.ndarray:
    """All 65536 float16 values, as float32."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def edge_inputs(fmt: Format, limit: int = 3000) -> np.ndarray:
    """Values of the format, the ties between them, their float32 neighbours, what lies beyond, zeros, Inf, NaN."""
    values = np.array([v for v in fmt.values() if v >= 0], dtype=np.float64)
    if len(values) > limit:  # the lowest and highest binades, and a sample between
        third = limit // 3
        keep = np.r_[:third, np.linspace(third, len(values) - third, third).astype(int), -third:0]
        values = values[keep]
    ties = (values[:-1] + values[1:]) / 2
    step = values[-1] - values[-2]
    beyond = values[-1] + step * np.array([0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 1e3])
    tiny = np.array([fmt.tiny, fmt.min_normal]) * np.array([[0.25], [0.5], [0.75], [1.0]])
    exact = np.concatenate([values, ties, beyond, tiny.ravel(), [1e-45, 1e-39, 2.0**-126, 3e38, 1e30]])
    with np.errstate(over="ignore"):
        base = exact.astype(np.float32)
    near = [base, np.nextafter(base, np.float32(0)), np.nextafter(base, np.float32(np.inf))]
    positive = np.concatenate([*near, np.array([0.0, np.inf, np.nan], np.float32)])
    return np.concatenate([positive, -positive])


def random_inputs(n: int, seed: int = 0) -> np.ndarray:
    """Half uniform float32 bit patterns (Inf, NaN and subnormals among them), half normals of widely spread size."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 1 << 32, n // 2, dtype=np.uint64).astype(np.uint32).view(np.float32)
    wide = rng.standard_normal(n - n // 2) * 2.0 ** rng.integers(-20, 20, n - n // 2)
    return np.concatenate([bits, wide.astype(np.float32)])


def without_nan(fmt: Format, x: np.ndarray) -> np.ndarray:
    """gfloat raises for a NaN that the format cannot hold."""
    return x if fmt.has_nan else x[~np.isnan(x)]
