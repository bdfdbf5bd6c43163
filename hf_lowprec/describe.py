# SPDX-License-Identifier: Apache-2.0
"""A recipe in words: what `hf-lowprec explain` prints and the tables in the documentation hold.

Everything is derived from the recipe's data, so that a description cannot say something else than what runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hf_lowprec.formats import FORMATS, Format, get_format
from hf_lowprec.recipe import (
    FLEXIBLE,
    Accumulation,
    Gemm,
    LossScale,
    Quant,
    Recipe,
    Residual,
    Rounding,
    RoundOff,
    Scaling,
    States,
    Transform,
)

GEMMS = {
    "fprop": ("output = input @ weight.T", ("input", "weight")),
    "dgrad": ("grad_input = grad_output @ weight", ("grad_output", "weight")),
    "wgrad": ("grad_weight = grad_output.T @ input", ("input", "grad_output")),
}
_COMPAND_WORDS = {
    "none": "",
    "softsign": "softsign-companded ",
    "sqrt": "square roots in ",
    "expand": "range-expanded ",
}
_WEIGHT_CACHE_WORDS = {
    "both": "once per optimizer step, kept in both layouts (2 bytes per parameter)",
    "one": "once per optimizer step, kept in one layout (1 byte per parameter), transposed in backward",
    "none": "in every forward and backward pass, nothing kept",
}
_SPLIT_WORDS = {"search": "searched", "learned": "learned"}
# Formats whose products FP8 tensor cores compute: with one scale per tensor, or (MX) one per 32 elements.
_TENSOR_CORE_FORMATS = ("e4m3fn", "e5m2")
FP8_SINCE, MX_SINCE, INT8_SINCE = (8, 9), (10, 0), (8, 0)


# --- parts ----------------------------------------------------------------------------------------------------------


def scaling_words(scaling: Scaling) -> str:
    """`per tensor, largest amax of 16 steps, powers of two`."""
    if scaling.method == "none":
        return "no scale"
    if scaling.method == "static":
        return f"constant 2^{scaling.exponent}"
    groups = {"block": "per block of {0}", "tile": "per tile of {0} x {1}"}
    parts = [groups.get(scaling.granularity, f"per {scaling.granularity}").format(*scaling.block)]
    if scaling.method == "current":
        target = "" if scaling.target is None else f" to {scaling.target:g}"
        floor = f", at least {scaling.floor:g}" if scaling.floor else ""
        parts.append(f"its own {'amax' if scaling.statistic == 'amax' else 'mean magnitude'}{target}{floor}")
    elif scaling.method in FLEXIBLE:
        how = {"search": "range found by calibrate", "learned": "range learned"}
        parts.append(how[scaling.method])
    elif scaling.method == "predicted":
        parts.append("a bound on its amax known beforehand")
    else:
        which = "largest" if scaling.algorithm == "max" else "most recent"
        parts.append(f"{which} amax of {scaling.history} steps")
    if scaling.margin:
        parts.append(f"margin 2^{scaling.margin}")
    if scaling.snap != "exact":
        parts.append("powers of two" + ("" if scaling.snap == "rceil" else f" ({scaling.snap})"))
    if scaling.inverse:
        parts.append("divides on the way out")
    if scaling.store != "float32":
        parts.append(f"stored as {'E8M0' if scaling.store == 'e8m0' else scaling.store}")
    return ", ".join(parts)


def rounding_words(rounding: Rounding) -> str:
    words = {"nearest": "nearest, ties to even", "away": "nearest, ties away from zero", "zero": "toward zero"}
    bits = "" if rounding.bits is None else f", {rounding.bits} random bits"
    return words.get(rounding.mode, rounding.mode) + bits


def accumulation_words(accumulation: Accumulation) -> str:
    if accumulation.format is None:
        words = "float32"
        if accumulation.fast:
            words += ", partial sums in the tensor cores' own precision"
    else:
        words = f"{accumulation.format}, {rounding_words(accumulation.rounding)}"
    if accumulation.chunk is not None:
        words += f", in chunks of {accumulation.chunk} that add in {accumulation.outer or 'float32'}"
    return words


def quant_words(quant: Quant | None, otherwise: str) -> str:
    """One line for a slot; `otherwise` where it is empty."""
    if quant is None:
        return otherwise
    zero = ", nothing but zero becomes zero" if quant.nonzero else ""
    what = f"{_COMPAND_WORDS[quant.compand]}{format_words(quant)}"
    return f"{what}, {scaling_words(quant.scaling)}, {rounding_words(quant.rounding)}{zero}"


def format_words(quant: Quant) -> str:
    """The format's name, or for a free split `8 bits of learned split`."""
    if quant.split == "fixed":
        return f"{quant.format} of x - mean" if quant.center else quant.format
    return f"{get_format(quant.format).bits} bits of {_SPLIT_WORDS[quant.scaling.method]} split"


def slot_rows(recipe: Recipe) -> list[tuple[str, str, str, str, str]]:
    """(slot, format, scaling, rounding, overflow) for the six GEMM slots, in the order of GEMMS."""
    rows = []
    for gemm, (_, slots) in GEMMS.items():
        for slot in slots:
            quant: Quant | None = getattr(getattr(recipe, gemm), slot)
            if quant is None:
                rows.append((f"{gemm} {slot}", base_name(recipe), "", "", ""))
            else:
                scaling = scaling_words(quant.scaling)
                if recipe.transform.method != "none":
                    scaling = "a constant of the layer"
                rows.append(
                    (f"{gemm} {slot}", format_words(quant), scaling, rounding_words(quant.rounding), quant.overflow)
                )
    return rows


def policy_rows(recipe: Recipe) -> list[tuple[str, str]]:
    """(name, words) for everything beside the slots."""
    rows = [(f"{gemm} sums in", _sum_words(recipe, getattr(recipe, gemm))) for gemm in GEMMS]
    rows += _state_rows(recipe.states)
    communication = recipe.communication
    if communication is None:
        rows.append(("weight gradients", "as they are"))
    else:
        words = quant_words(communication.gradient, "")
        if communication.auto_scale:
            words += (
                f"; auto-scaled by mu: halved when more than {communication.saturation:.3%} saturate, "
                f"else doubled per {communication.growth} steps"
            )
        rows.append(("weight gradients", words))
    if recipe.transform.method != "none":
        rows.append(("unit scale", transform_words(recipe.transform)))
    rows.append(("loss scale", loss_scale_words(recipe.loss_scale)))
    if recipe.flexible and "learned" in {q.scaling.method for q in (recipe.fprop.input, recipe.fprop.weight) if q}:
        rows.append(("learned ranges", "with every optimizer step, by Adam at 10 times its learning rate, no decay"))
    if recipe.input_norm is not None:
        kind = {"layer": "LayerNorm", "rms": "RMSNorm"}[recipe.input_norm.kind]
        rows.append(("input norm", f"{kind} without weights (eps {recipe.input_norm.eps:g}) inside every linear"))
    if recipe.quantises_gemms:
        rows.append(("saved by MLPs", _saved_words(recipe)))
        rows.append(("weight casts", _weight_cache_words(recipe)))
        if recipe.saved_inputs == "remade":
            rows.append(("saved by linears", _remade_words(recipe)))
    rows.append(("base precision", f"{base_name(recipe)}: everything that no slot names"))
    if recipe.quantises_gemms:
        rows.append(("stays high", stays_high(recipe)))
    return rows


def _weight_cache_words(recipe: Recipe) -> str:
    """Only a weight that both GEMMs read with one scale for the tensor is kept (`functional.LinearSpec`), and no
    range may train with it (`functional_flexible`)."""
    first, second = recipe.fprop.weight, recipe.dgrad.weight
    kept = first is not None and first == second and first.scaling.granularity == "tensor" and not recipe.flexible
    return _WEIGHT_CACHE_WORDS[recipe.weight_cache if kept else "none"]


def _sum_words(recipe: Recipe, gemm: Gemm) -> str:
    if gemm.one_sided:
        return f"{base_name(recipe)} GEMM, its one quantised operand read back"
    if _since(gemm) == INT8_SINCE:
        operands = (gemm.input, gemm.weight, gemm.grad_output)
        divides = any(q is not None and q.scaling.inverse for q in operands)
        return "int32, exactly" + ("; emulated, the values in float32" if divides else "")
    return accumulation_words(gemm.accumulation)


def _saved_words(recipe: Recipe) -> str:
    """What fused MLPs keep of gate and up; linears save their quantised input in any case."""
    return quant_words(recipe.saved, "gate and up as they are computed") + "; by MLPs that are fused"


def _remade_words(recipe: Recipe) -> str:
    words = "no input that a fused norm, a fused MLP or attention makes: cast again in backward with forward's scale"
    if recipe.saved is None:
        return words
    return f"{words}; of an MLP's product the codes are those of gate and up as they are saved, not forward's"


def _state_rows(states: States | None) -> list[tuple[str, str]]:
    return [("optimizer", "the script's own, unchanged")] if states is None else state_rows(states)


def state_rows(states: States) -> list[tuple[str, str]]:
    """(slot, words) of what an optimizer keeps per parameter."""
    rows = [] if states.algorithm is None else [("optimizer", "StableAdamW in place of the script's Adam or AdamW")]
    rows += [
        ("exp_avg", quant_words(states.exp_avg, "float32")),
        ("exp_avg_sq", quant_words(states.exp_avg_sq, "float32")),
        ("master", master_words(states)),
    ]
    if states.weight is not None:
        rows.append(("GEMM weights", f"{quant_words(states.weight, '')}: the Parameter holds its master's values"))
    if states.arithmetic is not None:
        rows.append(
            ("update", f"every AXPY in {quant_words(states.arithmetic, '')}; not what makes the second moment")
        )
    kept = [f"tensors under {states.min_numel} elements"] if states.min_numel else []
    kept += [] if states.embeddings else ["embeddings"]
    if kept:
        rows.append(("float32 moments", " and ".join(kept)))
    return rows


def loss_scale_words(loss_scale: LossScale) -> str:
    """`dynamic from 65536, doubled after 2000 clean steps, ...`."""
    if loss_scale.method == "none":
        return "none"
    skip = "a step with Inf or NaN in a gradient is skipped"
    if loss_scale.method == "static":
        return f"static, {loss_scale.init:g}; {skip}"
    return (
        f"dynamic from {loss_scale.init:g}: x {loss_scale.growth_factor:g} after {loss_scale.growth_interval} clean "
        f"steps; {skip}, and x {loss_scale.backoff_factor:g}"
    )


def master_words(states: States) -> str:
    """Where the master of a 16-bit Parameter is, and how it rounds."""
    master = states.master
    if master is None:
        return f"the Parameter itself, updated {rounding_words(states.update)}"
    if isinstance(master, RoundOff):
        kept = quant_words(master.residual, "")
        return f"a GEMM weight and what its format rounds away, in {kept}; of other 16-bit Parameters {kept}"
    if isinstance(master, Residual):
        rounding = "" if master.bits == 16 else f", {rounding_words(master.rounding)}"
        words = f"{master.bits} bits beside a bfloat16 Parameter{rounding}"
    else:
        words = "float32" if isinstance(master, str) else quant_words(master, "")
    return words + ("; a float32 Parameter is its own" if states.weight is None else "")


def master_name(states: States) -> str:
    """The master's format in a word; empty where the Parameter is it."""
    master = states.master
    if isinstance(master, RoundOff):
        return f"{states.weight.format if states.weight else ''}+{master.residual.format}"
    if isinstance(master, Residual):
        return f"bf16+{master.bits}"
    return master.format if isinstance(master, Quant) else master or ""


def transform_words(transform: Transform) -> str:
    """What is done to a model before its GEMMs need no scale from data."""
    method = {"unit": "Unit Scaling", "u-mup": "u-muP"}.get(transform.method, transform.method)
    length = transform.sequence_length or "the model's own"
    lr = "the optimizer's is the stock model's" if transform.learning_rate == "standard" else "the optimizer's is eta"
    return (
        f"{method}: constants in the casts; fresh weights brought to it, loaded ones kept; branches weigh "
        f"{transform.residual:g}, attention {transform.attention_ratio:g} of an MLP; sequences of {length}; a "
        f"learning rate per weight, {lr}"
    )


def stays_high(recipe: Recipe) -> str:
    """What is computed in the base precision or float32 whatever the slots say."""
    words = "norms, attention, embeddings, output embeddings, heads, routers, LoRA adapters, loss"
    if recipe.transform.critical:
        words += ", linears that end a residual branch"
    if recipe.modules_to_not_convert:
        words += f", and {', '.join(recipe.modules_to_not_convert)}"
    return words


def base_name(recipe: Recipe) -> str:
    """The precision of what no slot names: `bf16`, `fp16`, or `float32`."""
    return "float32" if recipe.base == "no" else recipe.base


# --- where it is native ---------------------------------------------------------------------------------------------


def native_since(quant: Quant) -> tuple[int, int] | None:
    """The compute capability from which on tensor cores read operands of this policy; None: no GPU's do."""
    scaling = quant.scaling
    if get_format(quant.format).is_integer and scaling.granularity in ("tensor", "row"):
        return INT8_SINCE
    if quant.format not in _TENSOR_CORE_FORMATS:
        return None
    if scaling.granularity == "tensor" and scaling.store == "float32":
        return FP8_SINCE
    return MX_SINCE if (scaling.block, scaling.store) == ((32,), "e8m0") else None


def recipe_since(recipe: Recipe) -> tuple[int, int] | None:
    """The same for all GEMMs of a recipe; (0, 0) where it quantises none."""
    found = [_since(gemm) for gemm in (recipe.fprop, recipe.dgrad, recipe.wgrad)]
    return None if None in found else max(since for since in found if since is not None)


def _since(gemm: Gemm) -> tuple[int, int] | None:
    """The same for one of them; (0, 0) where it runs in the base precision."""
    quants = [quant for quant in (gemm.input, gemm.weight, gemm.grad_output) if quant is not None]
    if gemm.accumulation.format is not None:
        return None
    if len(quants) < 2:
        return (0, 0)
    if [quant.format for quant in quants] == ["e5m2", "e5m2"]:  # the one pair that tensor cores do not multiply
        return None
    found = {native_since(quant) for quant in quants}
    return found.pop() if len(found) == 1 else None


def sm(capability: tuple[int, int]) -> str:
    """`sm_89`."""
    return f"sm_{capability[0]}{capability[1]}"


def needs(recipe: Recipe) -> str:
    """Hardware on which the recipe's GEMMs run natively; everywhere else they are emulated."""
    since = recipe_since(recipe)
    if since is None:
        return "nowhere yet"
    return f"{sm(since)} or newer" if since > (0, 0) else "any"


def operand_bits(recipe: Recipe) -> int | None:
    """Bits of an element in the widest of the GEMMs' operands, 8 or 16 as storage has them; None without any."""
    gemms = [getattr(recipe, gemm) for gemm in GEMMS]
    quants = [quant for g in gemms for quant in (g.input, g.weight, g.grad_output) if quant is not None]
    if not quants:
        return None
    return 8 if all(get_format(quant.format).bits <= 8 for quant in quants) else 16


# --- documentation --------------------------------------------------------------------------------------------------


def format_table() -> str:
    """The catalogue of formats as Markdown."""
    rows = [("name", "bits", "largest", "smallest normal", "smallest", "Inf, NaN", "in torch")]
    for name, fmt in FORMATS.items():
        specials = " ".join(word for word, there in (("Inf", fmt.has_inf), ("NaN", fmt.has_nan)) if there) or "none"
        normal = _number(fmt.min_normal) if isinstance(fmt, Format) and fmt.min_normal > fmt.tiny else ""
        cells = (_number(fmt.max), normal, _number(fmt.tiny), specials, fmt.torch_dtype_name or "")
        rows.append((f"`{name}`", str(fmt.bits), *cells))
    return markdown(rows)


def _number(x: float) -> str:
    """Powers of two as such, the rest with the digits that matter."""
    fraction, exponent = math.frexp(x)
    return f"2^{exponent - 1}" if fraction == 0.5 and abs(exponent - 1) > 3 else f"{x:.7g}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row).replace("|  |", "| |").rstrip() + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines) + "\n"
