# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from hf_lowprec.numerics import (
    encode,
    relative_error,
    round_to_format,
    saturation_fraction,
    sqnr,
    underflow_fraction,
)


def test_sqnr_and_relative_error_are_one_number() -> None:
    x = torch.randn(1000)
    y = x * 1.01
    assert relative_error(x, y).item() == pytest.approx(0.01, rel=1e-4)
    assert sqnr(x, y).item() == pytest.approx(40, abs=1e-3)
    assert sqnr(x, x) == float("inf")
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0


def test_underflow_counts_what_became_zero() -> None:
    x = torch.tensor([0.0, 1e-4, -1e-4, 1.0])
    assert underflow_fraction(x, round_to_format(x, "e4m3fn")).item() == pytest.approx(2 / 3)
    assert underflow_fraction(torch.zeros(3), torch.zeros(3)) == 0


@pytest.mark.parametrize("native", [True, False])
def test_saturation_counts_the_largest_codes(native: bool) -> None:
    x = torch.tensor([448.0, -500.0, 1.0, float("nan")])
    qdata = round_to_format(x, "e4m3fn").to(torch.float8_e4m3fn) if native else encode(x, "e4m3fn")
    assert saturation_fraction(qdata, "e4m3fn") == 0.5
    assert saturation_fraction(torch.empty(0, dtype=torch.uint8), "e4m3fn") == 0
