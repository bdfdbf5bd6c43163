# SPDX-License-Identifier: Apache-2.0
"""The named states in words and bytes, for the documentation and `hf-lowprec explain`."""

from __future__ import annotations

import torch

from hf_lowprec import describe
from hf_lowprec.optim.states import NAMED, state_bytes
from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import Quant, States

_LARGE = 1 << 24  # elements; counters and single scales vanish


def named() -> dict[str, States]:
    """Names that are for choosing: not those of a paper's ablation, nor of states that mean something, or go fast,
    with their recipe only."""
    recipes = [(name, recipe, recipe.states) for name, recipe in PRESETS.items() if recipe.states is not None]
    by_the_way = {name for name, recipe, states in recipes if states.op_by_op or not recipe.quantises_gemms}
    return {name: states for name, states in NAMED.items() if not name.startswith("#") and name not in by_the_way}


def bytes_words(states: States) -> str:
    """`2.03; 2.03 beside a bfloat16 Parameter`, the master included: what Adam keeps per element of a large tensor."""
    wide, half = (state_bytes(states, dtype, _LARGE) / _LARGE for dtype in (torch.float32, torch.bfloat16))
    return f"{wide:.2f}; {half:.2f} beside a bfloat16 Parameter"


def state_table() -> str:
    """Every named state: formats, master of 16-bit Parameters, bytes, exceptions; as Markdown."""
    rows: list[tuple[str, ...]]
    rows = [("states", "first moment", "second moment", "master of a 16-bit Parameter", "bytes", "bytes, bf16",
             "float32 moments for")]  # fmt: skip
    for name, states in named().items():
        wide, half = (state_bytes(states, dtype, _LARGE) / _LARGE for dtype in (torch.float32, torch.bfloat16))
        moments = [_moment(quant) for quant in (states.exp_avg, states.exp_avg_sq)]
        exceptions = dict(describe.state_rows(states)).get("float32 moments", "")
        exceptions = exceptions.replace("tensors under ", "< ").replace(" elements", "").replace(" and ", ", ")
        rows.append((f"`{name}`", *moments, _master(states), f"{wide:.2f}", f"{half:.2f}", exceptions))
    return describe.markdown(rows)


def _moment(quant: Quant | None) -> str:
    if quant is None:
        return "float32"
    scaling = quant.scaling
    words = {"softsign": "softsign in ", "sqrt": "its root in ", "expand": "expanded in ", "none": ""}[quant.compand]
    words += f"`{quant.format}`"
    if scaling.granularity == "block":
        words += f", blocks of {scaling.block[0]}"
    elif scaling.method != "none":
        words += ", one scale" + (" from a bound" if scaling.method == "predicted" else "")
    return words + (", stochastic" if quant.rounding.mode == "stochastic" else "")


def _master(states: States) -> str:
    name = describe.master_name(states)
    if name:
        stochastic = getattr(getattr(states.master, "rounding", None), "mode", "") == "stochastic"
        return f"`{name}`" + (", stochastic" if stochastic else "")
    return "itself, " + ("stochastic" if states.update.mode == "stochastic" else "nearest")
