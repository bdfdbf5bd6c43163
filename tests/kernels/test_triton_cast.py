# SPDX-License-Identifier: Apache-2.0
"""The cast and transpose kernels in Triton's interpreter, bit for bit the plain-torch operators.

Large shapes and every tile have their turn on the GPU (tests/gpu/test_casts.py).
"""

import sys

import interpreter
import pytest
import torch

from hf_lowprec import ops
from hf_lowprec.ops.quantize import (
    default_cast_transpose,
    default_current_scale,
    default_quantize,
    default_transposed,
    sample_stride,
)
from hf_lowprec.recipe import Quant, Scaling

CURRENT, SNAPPED = Scaling(), Scaling(snap="rceil")
DELAYED = Scaling(method="delayed", history=4, snap="rceil", margin=1)
STATIC = Scaling(method="static", exponent=-3)


def same_codes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, any NaN for any NaN."""
    nan = a.float().isnan()
    integer = {1: torch.uint8, 2: torch.int16}[a.dtype.itemsize]
    same = a.view(integer) == b.view(integer)
    return a.dtype == b.dtype and a.shape == b.shape and bool((same | (nan & b.float().isnan())).all())


def state(scaling: Scaling, start: float) -> dict[str, torch.Tensor | None]:
    delayed = scaling.method == "delayed"
    return {
        "scale": torch.tensor(start) if delayed else None,
        "amax": torch.tensor(1.5) if delayed else None,
        "counts": torch.ones(4, dtype=torch.int64),
    }


def agree(truth, kernel, x: torch.Tensor, key: str, scaling: Scaling, start: float, ready: bool, *flags) -> None:
    mine, theirs = state(scaling, start), state(scaling, start)
    expected = truth(x, key, mine["scale"], False, mine["amax"], mine["counts"], None, ready, *flags)
    got = kernel(x, key, theirs["scale"], False, theirs["amax"], theirs["counts"], None, ready, *flags)
    for a, b in zip(expected[:-1], got[:-1], strict=True):
        assert (b is None and not a.numel()) or same_codes(a, b), (key, x.shape, start)
    assert torch.equal(expected[-1], got[-1])
    assert torch.equal(mine["counts"], theirs["counts"]), (mine["counts"], theirs["counts"])
    assert mine["amax"] is None or torch.equal(mine["amax"], theirs["amax"])
    fixed = kernel(x, key, expected[-1], True, None, None, None, ready, *flags)
    assert all(a is b is None or same_codes(a, b) for a, b in zip(fixed[:-1], got[:-1], strict=True))


def check_cast() -> int:
    from hf_lowprec.kernels import quantize as kernel

    checked = 0
    # Below a block, several, a sampled one, zeros.
    for name, scaling in [("e5m10", s) for s in (CURRENT, SNAPPED, STATIC)] + [("e4m3fn", DELAYED), ("e5m2", DELAYED)]:
        key = ops.quant_key(Quant(format=name, scaling=scaling))
        sizes = ((777, float("nan")), (9000, -float("inf")), (64, 0.0), (200001, None))
        for n, special in sizes if scaling is DELAYED else sizes[1:3]:
            x = torch.randn(n, generator=torch.Generator().manual_seed(n)) * 50
            if special is not None:
                x[n // 2] = special
            x = torch.zeros_like(x) if special == 0.0 else x
            # A scale that is there, known to be there or not; and none.
            for start, ready in ((0.25, True), (0.25, False), (0.0, False)) if scaling is DELAYED else ((0.0, False),):
                agree(default_quantize, kernel.quantize, x, key, scaling, start, ready)
                checked += 1
            if scaling.method == "current":
                assert torch.equal(kernel.current_scale(x, key), default_current_scale(x, key))
    assert sample_stride(200001) > 1  # so that the sampled counters above were not those of every element
    return checked


def check_cast_transpose() -> int:
    from hf_lowprec.kernels import quantize as kernel
    from hf_lowprec.kernels.triton import cast_transpose as triton

    checked = 0
    shapes = ((1, 16), (16, 128), (33, 48), (130, 20), (2, 9, 32), (129, 1))
    for name, scaling, dtype in (
        ("e4m3fn", DELAYED, torch.bfloat16), ("e5m2", DELAYED, torch.float32), ("e4m3fn", SNAPPED, torch.float32),
        ("e4m3fn", STATIC, torch.float16),
    ):  # fmt: skip
        key = ops.quant_key(Quant(format=name, scaling=scaling))
        for i, shape in enumerate(shapes if scaling is not SNAPPED else shapes[2:4]):
            triton.TILE = triton.TILES[i % len(triton.TILES)]
            generator = torch.Generator().manual_seed(i)
            x = (torch.randn(shape, generator=generator) * 100).to(dtype)
            x.view(-1)[x.numel() // 3] = (float("nan"), float("inf"), 3e4)[i % 3]
            first = ((0.0, False),) if i % 2 else ()
            for start, ready in (*first, (2.0, True)) if scaling is DELAYED else ((0.0, False),):
                agree(default_cast_transpose, kernel.cast_transpose, x, key, scaling, start, ready)
                agree(default_cast_transpose, kernel.cast_transpose, x, key, scaling, start, ready, None, False, True)
                agree(default_cast_transpose, kernel.cast_transpose, x, key, scaling, start, ready, None, True, False)
                checked += 3
                if ready:
                    continue
                # Amaxes that somebody knows, where a pass for them would be.
                known = x.abs().float().where(x.isfinite(), 0.0).max()
                for partials in (known, torch.stack([known / 2, known, known / 3, torch.zeros(())])):
                    agree(default_cast_transpose, kernel.cast_transpose, x, key, scaling, start, ready, partials)
    # Every tile, rows that lie apart, a sample.
    key = ops.quant_key(Quant(format="e4m3fn", scaling=DELAYED))
    x = torch.randn(150, 140).to(torch.bfloat16)
    for tile in triton.TILES:
        triton.TILE = tile
        agree(default_cast_transpose, kernel.cast_transpose, x[:, 3:137], key, DELAYED, 0.25, True)
        checked += 1
    wide = torch.randn(260, 600)[:, :520]
    assert sample_stride(wide.numel()) > 1
    agree(default_cast_transpose, kernel.cast_transpose, wide, key, DELAYED, 0.25, True)
    agree(default_cast_transpose, kernel.cast_transpose, x.t(), key, DELAYED, 0.25, True)
    other = torch.tensor([1.0, 64.0])  # used where it is needed, and only there
    current = ops.quant_key(Quant(format="e4m3fn", scaling=CURRENT))
    for args in ((current, CURRENT, 0.0, False, other), (key, DELAYED, 0.25, False, other)):
        agree(default_quantize, kernel.quantize, x, *args)
        agree(default_cast_transpose, kernel.cast_transpose, x, *args)
    return checked + 2


def check_transpose() -> int:
    from hf_lowprec.kernels import quantize as kernel
    from hf_lowprec.kernels.triton.transpose import transpose

    shapes = [(16, 16), (17, 33), (64, 1), (1, 5), (100, 129)]
    for shape in shapes:
        x = torch.randint(0, 255, shape, dtype=torch.uint8)
        padded = transpose(x.t(), pad_to=16)
        assert padded.is_contiguous() and padded.shape == (shape[1], -(-shape[0] // 16) * 16)
        assert torch.equal(padded[:, : shape[0]], x.t()) and not padded[:, shape[0] :].any()
        qdata = x.view(torch.float8_e5m2)
        assert torch.equal(kernel.transposed(qdata).view(torch.uint8), default_transposed(qdata).view(torch.uint8))
    return len(shapes)


@pytest.mark.parametrize("part", ["cast", "cast_transpose", "transpose"])
def test_interpreter_agrees_with_the_operator(part: str) -> None:
    assert int(interpreter.run(__file__, part).split()[-1]) >= 5


if __name__ == "__main__":
    torch.set_num_threads(1)
    interpreter.mend()
    interpreter.few_programs()
    print("checked", {f.__name__[6:]: f for f in (check_cast, check_cast_transpose, check_transpose)}[sys.argv[1]]())
