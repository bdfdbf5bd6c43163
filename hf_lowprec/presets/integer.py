# SPDX-License-Identifier: Apache-2.0
"""Integers and fewer bits: BitNet, SwitchBack."""

from __future__ import annotations

from dataclasses import replace

from hf_lowprec.recipe import Gemm, InputNorm, Quant, Recipe, Scaling, States

# --- BitNet: int8 inputs, one or two bits of weight; backward in the base precision, from what forward multiplied ----

# 2310.11453, section 2.1: the amax goes to 128, which saturates to 127; signs of weights around their mean.
_SIGNS = Quant(format="sign", scaling=Scaling(statistic="mean"), center=True)
_INT8_OF_128 = Quant(format="e0m7", scaling=Scaling(target=2.0))
# 2402.17764, and its reference code: round(x * s) / s, with statistics of at least 1e-5.
_TERNARY = Quant(format="e0m1", scaling=Scaling(statistic="mean", floor=1e-5, inverse=True))
_TOKENS = Quant(format="e0m7", scaling=Scaling(granularity="row", floor=1e-5, inverse=True))


def _columns(rows: Quant) -> Quant:
    """Scales per token, as wgrad sees them, whose sum runs over tokens."""
    return replace(rows, scaling=replace(rows.scaling, granularity="column"))


# --- SwitchBack: what sums over few elements in int8, what sums over all tokens in 16 bits ---------------------------

_ROWS = Quant(format="e0m7", scaling=Scaling(granularity="row"))
_TENSOR = Quant(format="e0m7")
_SWITCHBACK = Recipe(
    name="switchback",
    paper="Stable and low-precision training for large-scale vision-language models, arXiv 2304.13013",
    fprop=Gemm(input=_ROWS, weight=_TENSOR),
    dgrad=Gemm(grad_output=_ROWS, weight=_TENSOR),
    states=States(algorithm="stable-adamw"),
    weight_cache="one",
)

RECIPES = (
    Recipe(
        name="bitnet",
        paper="BitNet: Scaling 1-bit Transformers for Large Language Models, arXiv 2310.11453",
        fprop=Gemm(input=_INT8_OF_128, weight=_SIGNS),
        dgrad=Gemm(weight=_SIGNS),
        wgrad=Gemm(input=_INT8_OF_128),
        weight_cache="one",
        input_norm=InputNorm(kind="layer"),
    ),
    Recipe(
        name="bitnet-b1.58",
        paper="The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits, arXiv 2402.17764",
        fprop=Gemm(input=_TOKENS, weight=_TERNARY),
        dgrad=Gemm(weight=_TERNARY),
        wgrad=Gemm(input=_columns(_TOKENS)),
        weight_cache="one",
    ),
    _SWITCHBACK,
    replace(_SWITCHBACK, name="switchback-m", wgrad=Gemm(input=_columns(_ROWS))),
    replace(
        _SWITCHBACK,
        name="switchback-q",
        fprop=Gemm(input=_ROWS, weight=_ROWS),
        dgrad=Gemm(grad_output=_ROWS, weight=_ROWS),
        weight_cache="none",
    ),
)
