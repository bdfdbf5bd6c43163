# SPDX-License-Identifier: Apache-2.0
"""The named states, and what of them a parameter really keeps.

    name          exp_avg (momentum)                    exp_avg_sq                            master beside 16 bits
    fp32          float32                               float32                               none
    bf16          bfloat16, stochastic                  bfloat16, stochastic                  none, stochastic updates
    8bit          dynamic tree, blocks of 256           dynamic tree, blocks of 256           none, stochastic updates
    4bit          dynamic tree, blocks of 128           8 binades of 1 and 1.5, 128, stoch.   none, stochastic updates
    fp8           E4M3, blocks of 128                   the same, stochastic                  none, stochastic updates
    fp8-expand    fp8 under COAT's range expansion      the same, stochastic                  none, stochastic updates
    fp8-lm        E4M3, one predicted scale             FP16, one predicted scale             FP16, one predicted scale
    fp8-lm-exact  the same by exact scales, two passes
    compact       INT8 softsign, blocks of 32           UINT8 of the root, 32, stochastic     8 more bits: 24
    #0 ... #3     FP8-LM's decoupling study (arXiv 2310.18313, table 6)

`8bit` is bitsandbytes' (arXiv 2110.02861): same codebooks, blocks and scales, except that a second moment that is not
0 never becomes 0. Tensors of fewer than 4096 elements keep float32 moments (not under fp32, bf16, #0 ... #3), and so
do embeddings under 8bit and 4bit. `master=` of an optimizer overrides the last column.

Why second moments are rounded stochastically. At beta2 = 0.999 an unused v shrinks by 0.1 % a step, far less than half
a code of any format here, so that nearest rounding never lets it fall, unless the scale of its block does. Adam on
gradients of lognormal spread, 0.65 octaves within a block (a small Llama has 0.2 to 0.9), 3000 steps; at step 1500 the
gradients of all elements, or of a random half of them, fall to a third. Octaves by which v is then off (median over
those elements), and relative error of the update, with v rounded to nearest / stochastically (tests/optim/drift.py;
8bit keeps the nearest of bitsandbytes):

                  all fall: octaves    error                half fall: octaves    error
    8bit          -0.02 / -0.01        0.09 / 0.10          +1.23 / -0.03         0.45 / 0.11
    4bit          -0.06 / -0.14        0.47 / 0.50          +1.01 / -0.10         0.81 / 0.50
    fp8           -0.04 / -0.02        0.12 / 0.13          +0.47 / -0.06         0.59 / 0.14
    fp8-expand    -0.02 / -0.06        0.07 / 0.09          +0.42 / -0.09         0.48 / 0.10
    compact       +1.51 / +0.00        0.40 / 0.10          +1.56 / -0.01         0.24 / 0.09

fp8-lm, whose FP16 has ten bits, is off by 0.04 octaves under nearest, with an error of 0.08 (E4M3's, of m). First
moments forget within ten steps; a block's own scale, new in every step, keeps them from sticking, and the noise would
cost more than it gives. fp8-lm has one scale per tensor, and there it is needed (`presets.FP8_LM_STATES`).

Scales of compact are bfloat16. FP16, the paper's choice, ends at 6e-8, where moments of large models are; and rounded
up as it must be, either freezes a v to nearest. With 4 bits 16 equal steps without a zero (arXiv 2309.01507) hold
small second moments at a sixteenth of the largest: +0.4 octaves where the 8 binades have -0.06.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from hf_lowprec.presets import DECOUPLING, FP8_LM_STATES, PRESETS
from hf_lowprec.recipe import NONE, Quant, Residual, Rounding, RoundOff, Scaling, States

_SR = Rounding(mode="stochastic")
_SMALL = 4096


def _blocks(size: int, store: Literal["float32", "bfloat16"] = "float32") -> Scaling:
    return Scaling(granularity="block", block=(size,), store=store)


def _exact(quant: Quant) -> Quant:
    return replace(quant, scaling=Scaling(snap="rceil"))


def _falling(quant: Quant) -> Quant:
    """`quant` for a second moment: it can fall (see the table above), and never becomes 0."""
    return replace(quant, rounding=_SR, nonzero=True)


_BF16 = Quant(format="e8m7", scaling=NONE, rounding=_SR)
_E4M3 = Quant(format="e4m3fn", scaling=_blocks(128))
_EXPAND = replace(_E4M3, compand="expand")
_FP16_MASTER = FP8_LM_STATES.master
assert isinstance(_FP16_MASTER, Quant) and FP8_LM_STATES.exp_avg and FP8_LM_STATES.exp_avg_sq

NAMED: dict[str, States] = {
    "fp32": States(),
    "bf16": States(exp_avg=_BF16, exp_avg_sq=_BF16, update=_SR),
    "8bit": States(
        exp_avg=Quant(format="dynamic8", scaling=_blocks(256)),
        exp_avg_sq=Quant(format="dynamic8u", scaling=_blocks(256), nonzero=True),
        update=_SR,
        min_numel=_SMALL,
        embeddings=False,
    ),
    "4bit": States(
        exp_avg=Quant(format="dynamic4", scaling=_blocks(128)),
        exp_avg_sq=_falling(Quant(format="e3m1normal0u", scaling=_blocks(128))),
        update=_SR,
        min_numel=_SMALL,
        embeddings=False,
    ),
    "fp8": States(exp_avg=_E4M3, exp_avg_sq=_falling(_E4M3), update=_SR, min_numel=_SMALL),
    "fp8-expand": States(exp_avg=_EXPAND, exp_avg_sq=_falling(_EXPAND), update=_SR, min_numel=_SMALL),
    "fp8-lm": FP8_LM_STATES,
    "fp8-lm-exact": replace(
        FP8_LM_STATES,
        exp_avg=_exact(FP8_LM_STATES.exp_avg),
        exp_avg_sq=_exact(FP8_LM_STATES.exp_avg_sq),
        master=_exact(_FP16_MASTER),
    ),
    "compact": States(
        exp_avg=Quant(format="e0m7", scaling=_blocks(32, "bfloat16"), compand="softsign"),
        exp_avg_sq=_falling(Quant(format="e0m8u", scaling=_blocks(32, "bfloat16"), compand="sqrt")),
        master=Residual(bits=8, rounding=_SR),
        min_numel=_SMALL,
    ),
    **{name: recipe.states for name, recipe in PRESETS.items() if recipe.states is not None},
    **DECOUPLING,
}
_MASTERS: dict[str | None, tuple[Quant | Residual | Literal["float32"] | None, Rounding]] = {
    "fp32": ("float32", Rounding()),
    "fp16-scaled": (_FP16_MASTER, Rounding()),
    "bf16+8": (Residual(bits=8, rounding=_SR), Rounding()),
    "bf16+16": (Residual(bits=16), Rounding()),
    "sr": (None, _SR),
    None: (None, Rounding()),
}
_ADAPTER = TypeAdapter(States)


@functools.lru_cache(maxsize=64)
def resolve_states(states: str | States) -> States:
    """`states` by name (module docstring, or any that `states_name` gave), or itself.

    Raises ValueError: unknown name; `#4` (with the reason); scalings that an optimizer state cannot have.
    """
    if isinstance(states, str):
        states = _parse(states)
    for slot in ("exp_avg", "exp_avg_sq", "master"):
        quant = getattr(states, slot)
        if isinstance(quant, Quant) and quant.scaling.method == "delayed":
            raise ValueError(
                f"states.{slot}: delayed scaling is for GEMM operands; a state is scaled by its own amax, or by a "
                "bound on it (method 'predicted')"
            )
    return states


def _parse(name: str) -> States:
    if name in NAMED:
        return NAMED[name]
    try:
        if name == "#4":  # States itself knows why not
            return replace(NAMED["#2a"], exp_avg_sq=NAMED["#2a"].exp_avg)
        if name.startswith("{"):
            return _ADAPTER.validate_json(name)
    except ValidationError as error:
        raise ValueError(f"states {name!r}: {_reason(error)}") from None
    raise ValueError(f"unknown states {name!r}; known: {', '.join(NAMED)}, or a hf_lowprec.recipe.States")


def _reason(error: ValidationError) -> str:
    return "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())


@functools.lru_cache(maxsize=64)
def states_name(states: str | States) -> str:
    """The name of `states`, or its JSON where it has none: plain text that a checkpoint can hold and compare."""
    resolved = resolve_states(states)
    for name, known in NAMED.items():
        if resolved == known:
            return name
    return _ADAPTER.dump_json(resolved, exclude_defaults=True).decode()


@functools.lru_cache(maxsize=64)
def with_master(states: States, master: str | None = "default") -> States:
    """`states` with another master for 16-bit Parameters; float32 Parameters are their own, whatever is said here.

    master: `default` (that of the states), `fp32` (a float32 copy), `fp16-scaled` (FP8-LM's), `bf16+8` and `bf16+16`
        (residuals of a bfloat16 Parameter: 24 and 32 bits in all), `sr` (none; the Parameter is rounded
        stochastically), None (none; it is rounded to nearest).

    Raises ValueError: another name; one that the states' rules (`weight`, `arithmetic`) cannot have.
    """
    if master == "default":
        return states
    if master not in _MASTERS:
        names = ", ".join(repr(name) for name in ("default", *_MASTERS))
        raise ValueError(f"unknown master {master!r}; known: {names}")
    kept, update = _MASTERS[master]
    try:
        return replace(states, master=kept, update=update)
    except ValidationError as error:
        raise ValueError(f"master={master!r}: {_reason(error)}") from None


@functools.lru_cache(maxsize=1024)
def effective(states: States, numel: int, embedding: bool = False, vector: bool = False, gemm: bool = True) -> States:
    """What a parameter of `numel` elements (before sharding) keeps: small ones and some embeddings float32 moments.

    vector: a sharded one of one dimension, whose rows are single elements: float32 where others have blocks of a row.
    gemm: False: it is no weight of a quantised GEMM, and `states.weight` not its format.
    """
    if states.weight is not None and not gemm:
        master = states.master.residual if isinstance(states.master, RoundOff) else states.master
        states = replace(states, weight=None, master=master)
    if numel < states.min_numel or (embedding and not states.embeddings):
        return replace(states, exp_avg=None, exp_avg_sq=None)
    if vector:
        blocks: dict[str, Any] = {
            slot: None
            for slot in ("exp_avg", "exp_avg_sq")
            if (quant := getattr(states, slot)) is not None and quant.scaling.granularity == "block"
        }
        return replace(states, **blocks)
    return states
