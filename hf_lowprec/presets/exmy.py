# SPDX-License-Identifier: Apache-2.0
"""eXmY (arXiv 2405.13938): recipes by the bits of their format, `exmy:e3m1` or `exmy:e3m1/row`.

    exmy:e<X>m<Y>[/tensor | /row]       sign, X exponent and Y mantissa bits; 2 to 9 bits in all, X at most 7

All six slots have the format, without Inf and NaN. The exponents of a tensor, or of each row along the axis that a
GEMM sums over, are shifted so that the format's top binade is that of the largest element; the shift is the metadata,
an exponent of 8 bits. With a format each, operands are a recipe file's business.
"""

from __future__ import annotations

import re
from typing import Literal

from hf_lowprec.formats import Format
from hf_lowprec.recipe import Gemm, Quant, Recipe, RecipeError, Scaling

PREFIX = "exmy:"
GRAMMAR = "exmy:e<X>m<Y>, exmy:e<X>m<Y>/row"
_NAME = re.compile(r"exmy:e(?P<exp>\d+)m(?P<man>\d+)(?:/(?P<group>[a-z]+))?")
_MIN_BITS, _MAX_BITS, _MAX_EXP = 2, 9, 7


def aligned(name: str) -> Quant:
    """The one policy of `exmy:...`. Raises RecipeError: not the grammar of the module docstring."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise RecipeError(f"recipe {name!r}: an eXmY recipe is {GRAMMAR}, for example exmy:e3m1")
    exp, man, group = int(match["exp"]), int(match["man"]), match["group"] or "tensor"
    if not _MIN_BITS <= 1 + exp + man <= _MAX_BITS:
        raise RecipeError(
            f"recipe {name!r}: the width, sign included, is {1 + exp + man}; eXmY has {_MIN_BITS} to {_MAX_BITS} bits"
        )
    if exp > _MAX_EXP:
        raise RecipeError(
            f"recipe {name!r}: {exp} exponent bits span more than float32, so that there is nothing to align; at most "
            f"{_MAX_EXP}"
        )
    granularity: Literal["tensor", "row"]
    if group == "tensor":
        granularity = "tensor"
    elif group == "row":
        granularity = "row"
    else:
        raise RecipeError(f"recipe {name!r}: one exponent per /tensor or per /row, got '/{group}'")
    # The format without specials, whatever e4m3 or e5m2 mean elsewhere.
    fmt = str(Format(exp, man))
    return Quant(format=fmt, scaling=Scaling(granularity=granularity, snap="ocp", store="e8m0"))


def exmy_recipe(name: str) -> Recipe:
    """The recipe of `exmy:...`, in the canonical spelling. Raises RecipeError as `aligned` does."""
    q = aligned(name)
    return Recipe(
        name=name.removesuffix("/tensor"),
        paper="eXmY: A Data Type and Technique for Arbitrary Bit Precision Quantization, arXiv 2405.13938",
        fprop=Gemm(input=q, weight=q),
        dgrad=Gemm(grad_output=q, weight=q),
        wgrad=Gemm(input=q, grad_output=q),
        weight_cache="both" if q.scaling.granularity == "tensor" else "none",
    )
