# SPDX-License-Identifier: Apache-2.0
"""Who quantises and dequantises float32 on a CPU, and what each of them really computes: `bench_numerics.py` times it.

Every contender takes a float32 matrix and returns float32 values. A peer that is not installed is named with the
reason instead of timed. Peers differ at the edges, so each has a gate of its own (`same`, `same_but_ties`, ...): what
it computes has to agree with ours where its definition does, and the gate's words say where that is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_lowprec.formats import get_format
from hf_lowprec.numerics import counter_hash, dequantize, quantize, quantize_dequantize, round_to_format
from hf_lowprec.recipe import Quant, Rounding, Scaling

MX4 = Quant(format="e2m1", scaling=Scaling(granularity="block", block=(32,), snap="ocp", store="e8m0"))
CURRENT = Quant(format="e4m3fn", scaling=Scaling(snap="rceil"))
STOCHASTIC = Rounding(mode="stochastic")
SR9 = Rounding(mode="stochastic", bits=9)
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """make: imports what it needs and returns the function (ImportError or OSError: it is not there).

    gate: (input, output) -> None, raises AssertionError; None where there is nothing to compare with.
    says: what the gate holds it to.
    """

    make: Callable[[], Function]
    gate: Callable[[Tensor, Tensor], None] | None = None
    says: str = ""


# --- gates ----------------------------------------------------------------------------------------------------------


def same(function: Function) -> Callable[[Tensor, Tensor], None]:
    """Every value equal to `function`'s (0 equals -0)."""

    def gate(x: Tensor, out: Tensor) -> None:
        wrong = int((out != function(x)).sum())
        assert wrong == 0, f"{wrong} of {x.numel()} values differ"

    return gate


def same_but_least_normal(x: Tensor, out: Tensor) -> None:
    """Equal to ours; what rounds up to the least normal number from below may be 0 instead (apytypes 0.5.1)."""
    expected = ours(x)
    lost = (out == 0) & (expected.abs() == 2.0**-6) & (x.abs() < 2.0**-6)
    wrong = int(((out != expected) & ~lost).sum())
    assert wrong == 0, f"{wrong} of {x.numel()} values differ"


def same_but_ties(fmt: str, within: float) -> Callable[[Tensor, Tensor], None]:
    """Equal to ours for |x| <= within, ties aside; a value from a tie is one of its two neighbours."""

    def gate(x: Tensor, out: Tensor) -> None:
        even, away = (round_to_format(x, fmt, Rounding(mode=mode)) for mode in ("nearest", "away"))
        zero = round_to_format(x.double() * (1 - 2.0**-40), fmt).float()  # a tie, nudged to zero
        wrong = (out != even) & (out != away) & (out != zero) & (x.abs() <= within)
        assert not wrong.any(), f"{int(wrong.sum())} of {x.numel()} values differ"

    return gate


def neighbours(fmt: str, sigmas: float = 5.0, above: float = 0.0) -> Callable[[Tensor, Tensor], None]:
    """Every result one of the two values of `fmt` around x, and no bias: the mean error within `sigmas` of 0.

    above: only what is at least that large counts.
    """

    def gate(x: Tensor, out: Tensor) -> None:
        counted = x.abs() >= above
        wide, out = x[counted].double(), out[counted].double()
        low = round_to_format(wide, fmt, Rounding(mode="zero"))
        bits = get_format(fmt)
        step = torch.exp2(torch.floor(torch.log2(wide.abs().clamp(min=2.0**bits.emin)))) * 2.0**-bits.man  # type: ignore[union-attr]
        distance = (out.abs() - low.abs()) / step
        wrong = ((distance != 0) & (distance != 1)).sum()
        assert int(wrong) == 0, f"{int(wrong)} of {wide.numel()} results are no neighbour"
        error = (out.abs() - wide.abs()) / step
        bound = sigmas * float(error.std()) / wide.numel() ** 0.5
        mean = float(error.mean())
        assert abs(mean) <= bound, f"mean error {mean:.2e} of a step, at most {bound:.2e}"

    return gate


def ours(x: Tensor) -> Tensor:
    return round_to_format(x, "e4m3fn")


# --- E4M3, to nearest -----------------------------------------------------------------------------------------------


def compiled(function: Function) -> Callable[[], Function]:
    return lambda: torch.compile(function, dynamic=False)


def torch_native() -> Function:
    return lambda x: x.clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.float32)


def ml_dtypes() -> Function:
    import ml_dtypes

    return lambda x: torch.from_numpy(x.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32))


def gfloat_nearest() -> Function:
    from gfloat import RoundMode, round_ndarray
    from gfloat.formats import format_info_ocp_e4m3

    return lambda x: torch.from_numpy(round_ndarray(format_info_ocp_e4m3, x.numpy(), RoundMode.TiesToEven, True))


def qtorch(rounding: str) -> Callable[[], Function]:
    def make() -> Function:
        from qtorch.quant import float_quantize  # compiles a C++ extension when it is first imported

        return lambda x: float_quantize(x, exp=4, man=3, rounding=rounding)

    return make


def unit_scaling(rounding: str, bits: int = 0) -> Callable[[], Function]:
    def make() -> Function:
        from unit_scaling.formats import FPFormat

        return FPFormat(4, 3, rounding, bits).quantise

    return make


def apytypes(mode: str) -> Callable[[], Function]:
    def make() -> Function:
        from apytypes import APyFloatArray, QuantizationMode

        how = getattr(QuantizationMode, mode)

        def function(x: Tensor) -> Tensor:
            wide = APyFloatArray.from_array(x.numpy(), exp_bits=8, man_bits=23)
            return torch.from_numpy(wide.cast(exp_bits=4, man_bits=3, quantization=how).to_numpy()).float()

        return function

    return make


def torchao_floatx() -> Function:
    from torchao.prototype.custom_fp_utils import _f32_to_floatx_unpacked, _floatx_unpacked_to_f32

    return lambda x: _floatx_unpacked_to_f32(_f32_to_floatx_unpacked(x, 4, 3), 4, 3)


def published_elementwise(x: Tensor, emin: int, man: int, largest: float) -> Tensor:
    """microxcaling's element rule, from its paper and documentation: floor(log2 |x|) in floats, scale, round, clamp.

    The package itself has no pip release. Ties away from zero, its default.
    """
    exponent = torch.floor(torch.log2(x.abs() + (x == 0).to(x.dtype))).clamp(min=emin)
    out = x / 2**exponent * 2**man
    out = torch.sign(out) * torch.floor(torch.abs(out) + 0.5)
    out = out / 2**man * 2**exponent
    return torch.clamp(out, -largest, largest)


# --- MXFP4 ----------------------------------------------------------------------------------------------------------


def torchao_mx() -> Function:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    return lambda x: MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32).dequantize(torch.float32)


def published_mx(x: Tensor) -> Tensor:
    """microxcaling's block rule around its element rule."""
    blocks = x.view(*x.shape[:-1], -1, 32)
    amax = blocks.abs().amax(-1, keepdim=True)
    exponent = (torch.floor(torch.log2(amax + 2.0**-126 * (amax == 0).to(x.dtype))) - 2).clamp(-127, 127)
    scaled = blocks / 2**exponent
    return (published_elementwise(scaled, 0, 1, 6.0) * 2**exponent).view(x.shape)


def gfloat_mx() -> Function:
    """Elements by gfloat; scales by numpy, because `quantize_block` takes one block at a time (13 s for 2^22)."""
    from gfloat import RoundMode, round_ndarray
    from gfloat.formats import format_info_ocp_e2m1

    def function(x: Tensor) -> Tensor:
        blocks = x.numpy().reshape(-1, 32)
        scale = np.exp2(np.frexp(np.abs(blocks).max(1, keepdims=True))[1] - 1.0 - 2).astype(np.float32)
        rounded = round_ndarray(format_info_ocp_e2m1, blocks / scale, RoundMode.TiesToEven, True)
        return torch.from_numpy((rounded * scale).reshape(x.shape).astype(np.float32))

    return function


# --- groups ---------------------------------------------------------------------------------------------------------

TARGETS = ("torchao", "qtorch", "microxcaling")  # at least FACTOR times as fast as each of them
FACTOR = 5.0


def gfloat_stochastic() -> Function:
    from gfloat import RoundMode, round_ndarray
    from gfloat.formats import format_info_ocp_e4m3

    def function(x: Tensor) -> Tensor:
        words = counter_hash(1, x.numel()).numpy().reshape(x.shape).astype(np.int64) & 511
        mode = RoundMode.StochasticFastest
        return torch.from_numpy(round_ndarray(format_info_ocp_e4m3, x.numpy(), mode, True, srbits=words, srnumbits=9))

    return function


def groups(x: Tensor) -> dict[str, dict[str, Contender]]:
    """Contenders by what they compute; the first of a group is ours, with which the others are compared."""
    qdata = quantize(x, CURRENT)
    sr9: Function = lambda x: round_to_format(x, "e4m3fn", SR9, seed=1)  # noqa: E731
    sr: Function = lambda x: round_to_format(x, "e4m3fn", STOCHASTIC, seed=1)  # noqa: E731
    mx: Function = lambda x: quantize_dequantize(x, MX4)  # noqa: E731
    equal = "all values equal ours"
    return {
        "E4M3, nearest": {
            "ours: round_to_format": Contender(lambda: ours, same(torch_native()), "all values equal torch's"),
            "ours, torch.compile": Contender(compiled(ours), same(ours), equal),
            "memory: clone": Contender(lambda: torch.clone),
            "torch: clamp, cast, cast back": Contender(torch_native, same(ours), equal),
            "ml_dtypes: astype and back": Contender(ml_dtypes, same(ours), equal),
            "gfloat: round_ndarray": Contender(gfloat_nearest, same(ours), equal),
            "apytypes: cast": Contender(
                apytypes("TIES_EVEN"), same_but_least_normal, "equal; 0 for what rounds up to the least normal number"
            ),
            "torchao: f32 to floatx and back": Contender(torchao_floatx, same(ours), equal),
            "unit-scaling: FPFormat": Contender(
                unit_scaling("nearest"), same_but_ties("e4m3b8", 240), "equals e4m3b8, its format; ties go elsewhere"
            ),
            "qtorch: float_quantize": Contender(
                qtorch("nearest"), same_but_ties("e4m3fn", 448), "equal to 448; ties go elsewhere"
            ),
            "microxcaling's formula": Contender(
                lambda: lambda x: published_elementwise(x, -6, 3, 448.0),
                same_but_ties("e4m3fn", 448),
                "equal; ties go elsewhere",
            ),
        },
        "E4M3, stochastic": {
            "ours: round_to_format": Contender(lambda: sr, neighbours("e4m3fn"), "a neighbour each, unbiased"),
            "ours, 9 random bits": Contender(lambda: sr9, same(gfloat_stochastic()), "all values equal gfloat's"),
            "ours, torch.compile": Contender(compiled(sr), same(sr), equal),
            "gfloat: StochasticFastest, 9 bits": Contender(gfloat_stochastic, same(sr9), equal),
            "unit-scaling: FPFormat": Contender(
                unit_scaling("stochastic"), neighbours("e4m3b8"), "a neighbour in e4m3b8 each, unbiased"
            ),
            "apytypes: cast": Contender(
                apytypes("STOCH_WEIGHTED"),
                neighbours("e4m3fn", above=2.0**-6),
                "from 2^-6 on a neighbour each, unbiased",
            ),
            "qtorch: float_quantize": Contender(
                qtorch("stochastic"), neighbours("e4m3fn"), "a neighbour each, unbiased"
            ),
        },
        "MXFP4, blocks of 32": {
            "ours: quantize_dequantize": Contender(lambda: mx, same(gfloat_mx()), "all values equal gfloat's"),
            "ours, torch.compile": Contender(compiled(mx), same(mx), equal),
            "torchao: to_mx, dequantize": Contender(torchao_mx, same(mx), equal),
            "gfloat: round_ndarray of scaled blocks": Contender(gfloat_mx, same(mx), equal),
            "microxcaling's formula": Contender(lambda: published_mx),
        },
        "E4M3 with the tensor's own scale": {
            "ours: quantize_dequantize": Contender(lambda: lambda x: quantize_dequantize(x, CURRENT)),
            "ours: quantize": Contender(lambda: lambda x: quantize(x, CURRENT).qdata),
            "ours: dequantize": Contender(lambda: lambda x: dequantize(qdata, CURRENT)),
        },
    }


def ready(contenders: dict[str, Contender], x: Tensor) -> tuple[dict[str, Function], dict[str, str]]:
    """Functions that are there and have passed their gates, and why the others are not. Raises what a gate raises."""
    functions: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name, contender in contenders.items():
        try:
            function = contender.make()
            out = function(x)
        except (ImportError, OSError, RuntimeError) as error:
            if name.startswith("ours"):
                raise
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
        if contender.gate is not None:
            try:
                contender.gate(x, out)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
        functions[name] = function
    return functions, missing
