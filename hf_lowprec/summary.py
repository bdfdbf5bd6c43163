# SPDX-License-Identifier: Apache-2.0
"""A recipe in one line, and the table of all of them, for the README and `hf-lowprec recipes`.

Derived from the data, as everything in `describe`; a line has room for what tells a recipe from the others, and for
that only.
"""

from __future__ import annotations

from hf_lowprec.describe import GEMMS, base_name, format_words, markdown, needs, rounding_words
from hf_lowprec.formats import Format, get_format
from hf_lowprec.presets import ALIASES, PRESETS
from hf_lowprec.recipe import Accumulation, Quant, Recipe, Residual, Rounding, RoundOff, Scaling, States

EXMY_WORDS = "a sign, X exponent and Y mantissa bits in all six slots; exponents aligned per tensor, or (/row) per row"


def recipe_table() -> str:
    """Every recipe name with what it is and where it runs, as Markdown."""
    rows = [("recipe", "what it is", "native on", "elsewhere")]
    aliases = {name: [a for a, target in ALIASES.items() if target == name] for name in PRESETS}
    for name, recipe in PRESETS.items():
        also = "".join(f" (= `{alias}`)" for alias in aliases[name])
        elsewhere = "emulated" if recipe.quantises_gemms else ""
        rows.append((f"`{name}`{also}", one_line(recipe), needs(recipe), elsewhere))
    rows.append(("`exmy:e<X>m<Y>`", EXMY_WORDS, "nowhere yet", "emulated"))
    return markdown(rows)


def one_line(recipe: Recipe) -> str:
    """The recipe in about 120 characters, for lists; `slot_rows` and `policy_rows` have the rest."""
    parts = []
    if recipe.quantises_gemms:
        parts += [_operands(recipe), _scales(recipe)]
        if recipe.input_norm is not None:
            parts.append("inputs normalised")
        sums = dict.fromkeys(getattr(recipe, gemm).accumulation for gemm in GEMMS)
        parts += [f"sums in {_narrow_sum(a)}" for a in sums if a.format is not None]
    else:
        parts.append(f"GEMMs in {base_name(recipe)}")
    if recipe.states is not None:
        parts += _optimizer(recipe.states)
    if recipe.communication is not None:
        parts.append(f"weight gradients {element(recipe.communication.gradient)}")
    if recipe.transform.method != "none":
        parts.append("decoder at unit scale" + (", u-muP" if recipe.transform.method == "u-mup" else ""))
    if recipe.loss_scale.method != "none":
        static = recipe.loss_scale.method == "static"
        parts.append(f"loss x {recipe.loss_scale.init:g}" if static else "dynamic loss scale")
    return "; ".join(parts)


def element(quant: Quant) -> str:
    """What the field calls an element: `int8`, `ternary`, `1-bit`, or the format's name."""
    fmt = get_format(quant.format)
    if quant.split != "fixed":
        return format_words(quant)
    if fmt.bits == 1:
        return "1-bit"
    if not isinstance(fmt, Format) or fmt.exp:
        return quant.format
    return "ternary" if fmt.signed and fmt.man == 1 else f"{'' if fmt.signed else 'u'}int{fmt.bits}"


def _operands(recipe: Recipe) -> str:
    """`e4m3fn forward, e5m2 gradients`; the GEMMs of backward apart where they read output gradients differently."""
    base = base_name(recipe)
    forward = " x ".join(dict.fromkeys(element(q) for q in (recipe.fprop.input, recipe.fprop.weight) if q)) or base
    dgrad, wgrad = (element(q) if q else base for q in (recipe.dgrad.grad_output, recipe.wgrad.grad_output))
    if dgrad == wgrad:
        return f"{forward} forward" + (" and gradients" if dgrad == forward else f", {dgrad} gradients")
    inputs = recipe.wgrad.input
    of = f" of {element(inputs)} inputs" if inputs is not None and recipe.wgrad.grad_output is None else ""
    return (
        f"{forward} forward"
        + (" and input gradients" if dgrad == forward else f", {dgrad} input gradients")
        + f", {wgrad} weight gradients{of}"
    )


def _scales(recipe: Recipe) -> str:
    """`delayed (16) 2^n scales, weight current`: those of most operands, then what is different."""
    operands = {
        "input": recipe.fprop.input or recipe.wgrad.input,
        "weight": recipe.fprop.weight or recipe.dgrad.weight,
        "grad_output": recipe.dgrad.grad_output or recipe.wgrad.grad_output,
    }
    scalings = {role: quant.scaling for role, quant in operands.items() if quant is not None}
    groups = {"block": "in blocks of {0}", "tile": "in tiles of {0} x {1}"}
    found = {
        role: (_method(s), groups.get(s.granularity, f"per {s.granularity}").format(*s.block))
        for role, s in scalings.items()
    }
    method, group = max(found.values(), key=list(found.values()).count)
    adaptive = [s for s in scalings.values() if s.method in ("current", "delayed")]
    snapped = "2^n " if adaptive and all(s.snap != "exact" for s in adaptive) else ""
    words = f"{method} {snapped}scales" + (f" {group}" if group != "per tensor" else "")
    for role, (other, others) in found.items():
        different = [other] * (other != method) + [others] * (others != group)
        words += f", {role} {' '.join(different)}" if different else ""
    return words


def _method(scaling: Scaling) -> str:
    if scaling.method == "delayed":
        return f"delayed ({scaling.history})"
    if scaling.statistic == "mean":
        return "by mean magnitude"
    return {"static": "constant", "none": "no", "search": "searched"}.get(scaling.method, scaling.method)


def _narrow_sum(accumulation: Accumulation) -> str:
    """`e6m9, chunks of 64`; rounding where it is not to nearest."""
    rounding, chunk = accumulation.rounding, ""
    if accumulation.chunk is not None:
        added = "" if accumulation.outer == accumulation.format else f" added in {accumulation.outer or 'float32'}"
        chunk = f", chunks of {accumulation.chunk}{added}"
    rounded = "" if rounding == Rounding() else f", {rounding_words(rounding)}"
    return f"{accumulation.format}{chunk}{rounded}"


def _optimizer(states: States) -> list[str]:
    """What differs from float32 moments and weights that are their own master."""
    parts, stochastic = [], "stochastic"
    kept = [q for q in (states.exp_avg, states.exp_avg_sq, states.master) if isinstance(q, Quant)]
    rounded = states.arithmetic
    whole = rounded is not None and states.exp_avg is not None and {q.format for q in kept} == {rounded.format}
    if not whole and (kept or isinstance(states.master, (str, Residual))):
        master = [] if states.master is None or isinstance(states.master, RoundOff) else [_bits(states.master)]
        bits = [_bits(states.exp_avg or "float32"), _bits(states.exp_avg_sq or "float32"), *master]
        parts.append(f"states {' + '.join(map(str, bits))} bits")
    if states.algorithm is not None:
        parts.append("StableAdamW")
    if states.update.mode == stochastic:
        parts.append("16-bit weights updated with stochastic rounding")
    if states.weight is not None:
        rest = f" + {element(states.master.residual)}" if isinstance(states.master, RoundOff) else ""
        parts.append(f"weights {element(states.weight)}{rest}")
    if rounded is not None:
        how = f", {stochastic}" if rounded.rounding.mode == stochastic else ""
        parts.append(f"update{' and states' if whole else ''} in {element(rounded)}{how}")
    return parts


def _bits(kept: Quant | Residual | str) -> int:
    """Bits of an element; a residual's are beside those of the Parameter."""
    if isinstance(kept, Quant):
        return get_format(kept.format).bits
    return kept.bits if isinstance(kept, Residual) else 32
