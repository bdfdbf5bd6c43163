# SPDX-License-Identifier: Apache-2.0
"""The norm kernels in Triton's interpreter: against float64."""

import interpreter
import torch

from hf_lowprec import numerics
from hf_lowprec.numerics import norm as truth
from hf_lowprec.ops.norm import default_norm, default_norm_backward

# Widths that fill a tile, leave some of it empty, and leave most of it empty; rows that fill no tile, one, and several
# programs with a partial one at the end.
SHAPES = [(5, 33), (1, 16), (70, 64), (300, 20), (2, 3, 100), (0, 8)]


def check(
    shape: tuple[int, ...], center: bool, dtype: torch.dtype, mid: torch.dtype, weighted: bool, slack: float = 3e-7
) -> None:
    """slack: what sums in another order may be off by."""
    from hf_lowprec.kernels.norm import norm, norm_backward

    generator = torch.Generator().manual_seed(shape[-1])
    x, g = ((torch.randn(shape, generator=generator) * 3 + 1).to(dtype) for _ in "xg")
    weight, bias = (torch.randn(shape[-1], generator=generator).to(dtype) for _ in "wb")
    w, b = (weight if weighted else None), (bias if center and weighted else None)
    plus_one = weighted and not center
    args = (x, w, b, 1e-5, center, plus_one, mid, dtype)
    (y, stats), (y_default, stats_default) = norm(*args), default_norm(*args)
    assert y.shape == x.shape and y.dtype == dtype and stats.shape == stats_default.shape
    options = {"plus_one": plus_one, "mid": mid, "compute": torch.float64}
    y64, stats64 = truth.norm(x, w, b, eps=1e-5, center=center, out=torch.float64, **options)
    torch.testing.assert_close(stats.double(), stats64, rtol=3e-7, atol=3e-7)
    # A value at a tie of `mid` or of the output may fall to the other side.
    off = (y.double() - y64).abs() > 2e-6 * (y64.abs() + 4) + torch.finfo(dtype).eps / 2 * y64.abs()
    assert off.double().mean() <= (0.01 if dtype != torch.float32 else 0) if off.numel() else True
    torch.testing.assert_close(y, y_default, rtol=2 * torch.finfo(dtype).eps, atol=2e-5)

    dtypes = (dtype if weighted else None, torch.float32 if center and weighted else None)
    args = (g, x, stats, w, plus_one, mid, True, *dtypes)
    grads, defaults = norm_backward(*args), default_norm_backward(*args)
    exact = truth.norm_backward(g, x, stats64, w, **options)
    for i, (ours, default, best) in enumerate(zip(grads, defaults, exact, strict=True)):
        assert ours.dtype == default.dtype and ours.shape == default.shape
        if ours.numel():
            error = numerics.relative_error(best, ours.double())
            assert error <= 1.1 * numerics.relative_error(best, default.double()) + slack, i
    again = norm_backward(*args)
    assert all(torch.equal(a, b) for a, b in zip(again, grads, strict=True))
    for wanted in ((False, *dtypes), (True, None, dtypes[1]), (True, dtypes[0], None), (True, None, None)):
        part = norm_backward(g, x, stats, w, plus_one, mid, *wanted)
        for need, a, b in zip(wanted, part, grads, strict=True):
            assert torch.equal(a, b) if need else not a.numel()


def check_all() -> int:
    checked = 0
    for shape in SHAPES:
        for center in (False, True):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                for weighted in (True, False) if dtype != torch.bfloat16 else (True,):
                    check(shape, center, dtype, dtype, weighted)
                    checked += 1
    check((40, 48), False, torch.float16, torch.float32, True)
    check((3, 2100), False, torch.float32, torch.float32, True)
    check_special()
    check_strides()
    return checked + 4


def check_special() -> None:
    """A row with NaN or Inf is lost; the others are as without it."""
    from hf_lowprec.kernels.norm import norm

    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(24)
    for center in (False, True):
        clean, _ = norm(x, weight, None, 1e-5, center, False, torch.float32, torch.float32)
        bad = x.clone()
        bad[2, 3], bad[4, 0] = float("nan"), float("inf")
        y, _ = norm(bad, weight, None, 1e-5, center, False, torch.float32, torch.float32)
        keep = [0, 1, 3, 5]
        assert torch.equal(y[keep], clean[keep])
        assert y[2].isnan().all() and y[4].isnan().any()
        assert not norm(torch.zeros(2, 24), weight, None, 1e-5, center, False, torch.float32, torch.float32)[0].any()


def check_strides() -> None:
    from hf_lowprec.kernels.norm import norm, norm_backward

    x = torch.randn(24, 10, generator=torch.Generator().manual_seed(0)).t()
    wide = torch.randn(48, generator=torch.Generator().manual_seed(1))[::2]
    args = (wide, None, 1e-5, False, False, torch.float32, torch.float32)
    y, stats = norm(x, *args)
    assert y.is_contiguous() and torch.equal(y, norm(x.contiguous(), *args)[0])
    rest = (wide, False, torch.float32, True, torch.float32, None)
    strided = norm_backward(x, x, stats, *rest)
    straight = norm_backward(x.contiguous(), x.contiguous(), stats, *rest)
    assert all(torch.equal(a, b) for a, b in zip(strided, straight, strict=True))


def test_interpreter_agrees_with_float64() -> None:
    assert int(interpreter.run(__file__).split()[-1]) == 64


if __name__ == "__main__":
    torch.set_num_threads(1)
    interpreter.mend()
    print("checked", check_all())
