# SPDX-License-Identifier: Apache-2.0
"""Scales: tables by hand, exponents around every power of two, torchao's four MX rules, TransformerEngine's delay."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from hf_lowprec.formats import get_format
from hf_lowprec.numerics import (
    amax_per_group,
    delayed_update,
    finite_amax,
    scale_from_amax,
    scale_like,
    scale_shape,
)
from hf_lowprec.recipe import Scaling

INF, NAN = float("inf"), float("nan")
SNAPS = ["rceil", "ocp", "ceil", "even"]
ELEMENTS = ["e4m3fn", "e5m2", "e2m1", "e3m2", "e2m3", "e0m7"]


def block(snap: str = "ocp", k: int = 32, **rest: object) -> Scaling:
    return Scaling(granularity="block", block=(k,), snap=snap, store="e8m0", **rest)


def exponent(scale: torch.Tensor) -> list[int]:
    mantissa, exp = torch.frexp(scale)
    assert (mantissa == 0.5).all()
    return (exp - 1).tolist()


def floor_log2(x: Fraction) -> int:
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if Fraction(2) ** e <= x else e - 1


def reference_exponent(amax: float, name: str, snap: str) -> int:
    """In rational numbers."""
    fmt, a = get_format(name), Fraction(amax)
    top = Fraction(fmt.max)
    if snap == "rceil":
        return -floor_log2(top / a)
    if snap == "ceil":
        return -floor_log2(1 / a) - floor_log2(top)
    if snap == "even":
        a += Fraction(2) ** (floor_log2(a) - fmt.man - 1)
    return floor_log2(a) - floor_log2(top)


def test_worked_example() -> None:
    """a = 150, E4M3 (research: RCEIL 126, CEIL 127 as E8M0 codes)."""
    amax = torch.tensor([150.0])
    codes = {snap: exponent(scale_from_amax(amax, "e4m3fn", block(snap)))[0] + 127 for snap in SNAPS}
    assert codes == {"rceil": 126, "ocp": 126, "ceil": 127, "even": 126}


@pytest.mark.parametrize("snap", SNAPS)
@pytest.mark.parametrize("name", ELEMENTS)
def test_exponents_at_and_around_every_power_of_two(name: str, snap: str) -> None:
    """The float just below 2^k, where a rounded logarithm is wrong, 2^k, the float above, and the format's max."""
    powers = 2.0 ** np.arange(-126, 128, dtype=np.float64)
    top = np.float32(get_format(name).max) * 2.0 ** np.arange(-100, 100, dtype=np.float64)
    base = np.concatenate([powers, top]).astype(np.float32)
    amax = np.concatenate([np.nextafter(base, np.float32(0)), base, np.nextafter(base, np.float32(INF))])
    got = exponent(scale_from_amax(torch.from_numpy(amax), name, block(snap)))
    want = [min(max(reference_exponent(float(a), name, snap), -127), 127) for a in amax]
    assert got == want


@pytest.mark.parametrize("name", ELEMENTS)
def test_rceil_is_the_least_power_of_two_that_holds_amax(name: str) -> None:
    top = get_format(name).max
    amax = torch.rand(5000).add_(1e-3) * 2.0 ** torch.randint(-60, 60, (5000,))
    for margin in (0, 2):
        scale = scale_from_amax(amax, name, Scaling(snap="rceil", method="current", margin=margin)) / 2**margin
        assert (amax / scale <= top).all()
        assert (amax / (scale / 2) > top).all()


def test_exact_maps_amax_to_max() -> None:
    scale = scale_from_amax(torch.tensor([4.0, 448.0, 1e-30]), "e4m3fn", Scaling())
    assert torch.equal(scale, torch.tensor([4.0, 448.0, 1e-30]) / 448)
    assert scale_from_amax(torch.tensor(4.0), "e4m3fn", Scaling(margin=3)) == torch.tensor(4.0) / 448 * 8
    assert scale_from_amax(torch.tensor(4.0), "nf4", Scaling()) == 4.0


@pytest.mark.parametrize("snap", ["exact", *SNAPS])
def test_zero_inf_nan_and_extremes(snap: str) -> None:
    amax = torch.tensor([0.0, INF, NAN, 1e-45, 3.4e38])
    scale = scale_from_amax(amax, "e4m3fn", Scaling(snap=snap))
    assert scale[0] == 1.0
    assert scale[1:3].isnan().all()
    assert (1 / scale[3:]).isfinite().all() and (scale[3:] > 0).all()
    if snap == "exact":
        return
    scale = scale_from_amax(amax, "e4m3fn", block(snap))
    assert scale[0] == 2.0**-127 and scale[3] == 2.0**-127  # OCP's zero block
    assert scale.to(torch.float8_e8m0fnu).view(torch.uint8).tolist()[:4] == [0, 255, 255, 0]


def test_static_and_none_ignore_amax() -> None:
    amax = torch.tensor([0.0, NAN, 7.0])
    assert scale_from_amax(amax, "e5m2", Scaling(method="static", exponent=-3)).tolist() == [0.125] * 3
    assert scale_from_amax(amax, "e5m2", Scaling(method="none")).tolist() == [1.0] * 3


def test_even_needs_a_mantissa() -> None:
    with pytest.raises(ValueError, match="even"):
        scale_from_amax(torch.ones(1), "nf4", Scaling(snap="even"))


@pytest.mark.parametrize("snap", SNAPS)
@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e2m1", "e3m2", "e2m3"])
def test_torchao_has_the_same_scales(name: str, snap: str) -> None:
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    dtypes = {
        "e4m3fn": torch.float8_e4m3fn,
        "e5m2": torch.float8_e5m2,
        "e2m1": torch.float4_e2m1fn_x2,
        "e3m2": "fp6_e3m2",
        "e2m3": "fp6_e2m3",
    }
    mode = getattr(mx.ScaleCalculationMode, {"ocp": "FLOOR"}.get(snap, snap.upper()))
    base = torch.cat([2.0 ** torch.arange(-100.0, 100.0), 150 * 2.0 ** torch.arange(-50.0, 50.0), torch.rand(1000)])
    amax = torch.cat([base, torch.nextafter(base, torch.tensor(0.0)), torch.nextafter(base, torch.tensor(INF))])
    if snap == "rceil":  # torchao's eager path takes a rounded logarithm, wrong next to powers of two
        amax = torch.cat([torch.rand(3000) * 2.0 ** torch.randint(-50, 50, (3000,)), torch.tensor([150.0])])
    x = torch.zeros(len(amax), 32)
    x[:, 5] = -amax
    theirs, _ = mx.to_mx(x, dtypes[name], 32, mode)
    ours = scale_from_amax(amax_per_group(x, block(snap)), name, block(snap))
    assert torch.equal(ours.to(torch.float8_e8m0fnu).view(torch.uint8), theirs.view(torch.uint8).view(-1, 1))


# --- amax -----------------------------------------------------------------------------------------------------------


def test_amax_of_every_granularity() -> None:
    x = torch.randn(4, 6, 64)
    size = x.abs()
    cases = {
        (): Scaling(),
        (4, 6, 1): Scaling(granularity="row"),
        (1, 1, 64): Scaling(granularity="column"),
        (4, 6, 2): Scaling(granularity="block", block=(32,)),
        (4, 2, 4): Scaling(granularity="tile", block=(3, 16)),
        (4, 2, 64): Scaling(granularity="block", block=(4,)),
    }
    want = {
        (): size.amax(),
        (4, 6, 1): size.amax(-1, keepdim=True),
        (1, 1, 64): size.amax((0, 1), keepdim=True),
        (4, 6, 2): size.view(4, 6, 2, 32).amax(-1),
        (4, 2, 4): size.view(4, 2, 3, 4, 16).amax((2, 4)),
        (4, 2, 64): torch.stack([size[:, :4].amax(1), size[:, 4:].amax(1)], 1),  # the second block is partial
    }
    for shape, scaling in cases.items():
        axis = 1 if scaling.block == (4,) else -1
        got = amax_per_group(x, scaling, axis)
        assert got.dtype == torch.float32 and got.shape == shape
        assert torch.equal(got, want[shape])
        assert scale_shape(x.shape, scaling, axis) == shape == scale_like(x, scaling, axis).shape
        assert torch.equal(amax_per_group(x.bfloat16(), scaling, axis), want[shape].bfloat16().float())
    with pytest.raises(ValueError, match="matrix"):
        amax_per_group(torch.ones(4), cases[(4, 2, 4)])


def test_amax_leaves_out_what_is_not_finite() -> None:
    x = torch.tensor([[1.0, -INF, -3.0], [NAN, INF, NAN], [0.0, -0.0, 0.0]])
    row = Scaling(granularity="row")
    assert finite_amax(x) == 3.0
    assert amax_per_group(x, row).flatten().tolist() == [3.0, 0.0, 0.0]
    group = amax_per_group(x, row, nonfinite="group").flatten()
    assert group[0] == INF and group[1].isnan() and group[2] == 0
    assert not group[2].signbit()
    for empty in (torch.empty(0), torch.empty(0, 4), torch.empty(4, 0)):
        assert finite_amax(empty) == 0
        assert amax_per_group(empty.view(-1, 4), row).shape == (0, 1)
    assert finite_amax(torch.tensor(-2.0)) == 2.0


# --- delayed --------------------------------------------------------------------------------------------------------


def delayed(length: int = 4, **rest: object) -> Scaling:
    return Scaling(method="delayed", history=length, **rest)


def test_transformer_engines_worked_example() -> None:
    """H = [4, 1, 2, 3], E4M3: H becomes [0, 2, 3, 4], the quantisation factor 448 / 4 = 112."""
    history, scale = torch.tensor([[4.0, 1.0, 2.0, 3.0]]), torch.ones(1)
    delayed_update(history, scale, torch.tensor([448.0]), delayed())
    assert history.tolist() == [[0.0, 2.0, 3.0, 4.0]]
    assert scale.item() == torch.tensor(1 / 112, dtype=torch.float32).item()


def test_delayed_rows_are_independent() -> None:
    history = torch.tensor([[1.0, 8.0, 2.0], [0.0, 5.0, 6.0], [INF, 1.0, 1.0], [3.0, 0.0, 0.0]])
    scale = torch.tensor([0.5, 0.25, 7.0, 0.0])
    delayed_update(history, scale, torch.tensor([448.0, 448.0, 448.0, 57344.0]), delayed(3))
    want = [[0.0, 2.0, 1.0], [0.0, 5.0, 6.0], [0.0, 1.0, INF], [0.0, 0.0, 3.0]]
    assert history.tolist() == [
        [0.0, *torch.tensor(h).tolist()] for h in ([2.0, 1.0], [5.0, 6.0], [1.0, INF], [0.0, 3.0])
    ]
    assert history.tolist() == want
    assert scale[0] == torch.tensor(8.0) / 448
    assert scale[1] == 0.25  # no fresh amax: untouched
    assert scale[2] == 7.0  # not finite: rolled, the scale stays
    assert scale[3] == torch.tensor(3.0) / 57344


def test_delayed_algorithm_margin_and_snap() -> None:
    def scale_after(**rest: object) -> float:
        scale = torch.ones(1)
        delayed_update(torch.tensor([[3.0, 100.0]]), scale, torch.tensor([448.0]), delayed(2, **rest))
        return scale.item()

    assert scale_after() == pytest.approx(100 / 448)
    assert scale_after(algorithm="most_recent") == pytest.approx(3 / 448)
    assert scale_after(margin=2) == pytest.approx(400 / 448)
    assert scale_after(snap="rceil") == 2.0 ** math.ceil(math.log2(100 / 448))
    assert scale_after(snap="rceil", margin=1) == 2.0 ** (math.ceil(math.log2(100 / 448)) + 1)


def test_delayed_history_of_one_and_window() -> None:
    """A maximum leaves the window after `history` updates."""
    history, scale = torch.zeros(1, 3), torch.zeros(1)
    seen = []
    for amax in (8.0, 1.0, 1.0, 1.0):
        history[:, 0] = amax
        delayed_update(history, scale, torch.tensor([1.0]), delayed(3))
        seen.append(scale.item())
    assert seen == [8.0, 8.0, 8.0, 1.0]
    history = torch.full((1, 1), 5.0)
    delayed_update(history, scale, torch.tensor([1.0]), delayed(1))
    assert (history.item(), scale.item()) == (0.0, 5.0)


def test_delayed_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="history"):
        delayed_update(torch.zeros(4), torch.zeros(1), torch.zeros(1), delayed())
