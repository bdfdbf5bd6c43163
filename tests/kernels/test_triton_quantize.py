# SPDX-License-Identifier: Apache-2.0
"""The rounding kernels against numerics: bit for bit in Triton's interpreter (any machine) and on a GPU.

The interpreter must be chosen before Triton is imported, so that one test starts a process of its own.
"""

import interpreter
import pytest
import torch

from hf_lowprec import numerics
from hf_lowprec.formats import Format, get_format
from hf_lowprec.recipe import Rounding

NAMES = ["e4m3fn", "e5m2", "e4m3", "e4m3b8", "e2m1", "e3m2", "e5m10", "e6m9", "e8m7", "e0m7"]
ROUNDINGS = [Rounding(), *(Rounding(mode="stochastic", bits=bits) for bits in (1, 9, 13, None))]


def inputs(fmt: Format, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Random float32 patterns, wide normals, the format's values and ties: enough for a partial last block."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1000,), generator=generator).to(torch.int32).view(torch.float32)
    wide = torch.randn(1000, generator=generator) * 2.0 ** torch.randint(-18, 18, (1000,), generator=generator)
    values = torch.tensor([*[v for v in fmt.values() if abs(v) <= 1e3][:700], fmt.max, 0.0, -0.0])
    ties = (values[1:] + values[:-1]) / 2
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 1e-45, -1e-40, 3e38])
    return torch.cat([bits, wide, values, ties, special]).to(dtype).to(device)


def assert_same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[ours.dtype.itemsize]
    nan = ours.float().isnan()
    assert torch.equal(nan, theirs.float().isnan())
    assert torch.equal(ours.view(integer)[~nan], theirs.view(integer)[~nan])


def check_kernels(device: str) -> int:
    from hf_lowprec.kernels.triton import quantize as kernels

    count = 0
    for name in NAMES:
        fmt = get_format(name)
        assert isinstance(fmt, Format)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            if dtype != torch.float32 and name not in ("e4m3fn", "e5m2", "e2m1"):
                continue
            x = inputs(fmt, dtype, device)
            for rounding in ROUNDINGS:
                if rounding.bits is not None and rounding.bits > 23 - fmt.man:
                    continue
                seed = None if rounding.mode == "nearest" else 2**40 + 12345
                ours = kernels.round_to_format(x, fmt, rounding, seed=seed)
                truth = numerics.round_to_format(x.cpu(), fmt, rounding, seed=seed)
                assert_same_bits(ours.cpu(), truth)
                count += 1
                if not fmt.has_nan:
                    continue
                for scale in (torch.tensor(0.37), torch.tensor(2.0**-5)):
                    got = kernels.encode(x, fmt, scale.to(device), rounding, seed=seed).cpu()
                    scaled = x.cpu().float() * (1 / scale)
                    codes = numerics.encode(scaled, fmt, rounding, seed=seed)
                    container = torch.uint8 if fmt.bits <= 8 else torch.int16
                    assert torch.equal(got.view(container), codes)
                    count += 1
    x = torch.randn(5, 7, device=device).t()
    assert torch.equal(kernels.round_to_format(x, "e4m3fn").cpu(), numerics.round_to_format(x.cpu(), "e4m3fn"))
    seed = torch.tensor(99, device=device)
    sr = Rounding(mode="stochastic")
    assert torch.equal(
        kernels.round_to_format(x, "e4m3fn", sr, seed=seed).cpu(),
        numerics.round_to_format(x.cpu(), "e4m3fn", sr, seed=99),
    )
    assert kernels.round_to_format(torch.empty(0, device=device), "e4m3fn").shape == (0,)
    for call, message in (
        (lambda: kernels.round_to_format(x, "e8m0u"), "no kernel for e8m0u"),
        (lambda: kernels.round_to_format(x, "e4m3fn", Rounding(mode="away")), "no kernel for rounding"),
        (lambda: kernels.encode(x, "e2m1", torch.tensor(1.0)), "no code for a non-finite"),
        (lambda: kernels.encode(x, "e4m3fn", torch.ones(2)), "scale: one float32"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    return count


def test_interpreter_agrees_with_numerics() -> None:
    assert int(interpreter.run(__file__).split()[-1]) > 100


@pytest.mark.gpu
def test_gpu_agrees_with_numerics() -> None:
    assert check_kernels("cuda") > 100


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("checked", check_kernels("cpu"))
