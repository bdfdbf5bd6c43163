# SPDX-License-Identifier: Apache-2.0
"""convert(model, recipe): swap the linears of a model for low-precision ones, in place, and say what was done.

Which modules: every `nn.Linear` and transformers `Conv1D`, except

- output embeddings and weights tied to an embedding (their errors reach every token, and tying shares one tensor);
- classification and value heads (`score`, `classifier`, `v_head`, ...), adapters (LoRA A/B), MoE routers: small and
  sensitive;
- sizes that no FP8 GEMM takes (a dimension not divisible by 16), unless the recipe is emulated;
- what `modules_to_not_convert` names and what `module_filter_fn` refuses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowprec import optim, stepping
from hf_lowprec.modules import LayerState, ScalingState, low_precision_class
from hf_lowprec.modules.linear import LowPrecMixin, forward_is_replaced, original_class, set_class
from hf_lowprec.recipe import Accumulation, Recipe, get_recipe
from hf_lowprec.report import ConversionReport
from hf_lowprec.session import Session, live_sessions, session_of

# Matched against whole dotted parts of a module's name.
_HEADS = ("lm_head", "embed_out", "score", "classifier", "classification_head", "qa_outputs", "v_head", "value_head",
          "reward_head", "summary", "output_projection")  # fmt: skip
_ROUTERS = ("router", "gate", "shared_expert_gate", "gating")
_ADAPTERS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_ALIGNMENT = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ConversionError(ValueError):
    """The model cannot be converted as asked. Nothing was changed."""


class NothingConvertedError(ConversionError):
    """The recipe quantises GEMMs, and no module of the model qualified."""


def convert(
    model: nn.Module,
    recipe: str | Path | dict[str, Any] | Recipe,
    *,
    modules_to_not_convert: Sequence[str] | str | None = None,
    module_filter_fn: Callable[[nn.Module, str], bool] | None = None,
    emulate: bool = False,
) -> ConversionReport:
    """Make `model` train by `recipe`, in place; Parameters keep their identity and names. Idempotent.

    Args:
        modules_to_not_convert: names or regular expressions, added to the defaults; an entry matches a whole dotted
            part of a module name (`"mlp"`), a whole name, or, as a regular expression, all of it.
        module_filter_fn: called with (module, name); False leaves the module alone.
        emulate: on a GPU without FP8 tensor cores, compute the same numbers slowly instead of raising.

    Returns: the report, also printed by `hf-lowprec inspect` and logged at `Accelerator.prepare`.

    Raises:
        RecipeError: unknown, planned or malformed recipe.
        ConversionError: nn.DataParallel; already converted with another recipe; a GPU that cannot run it natively; a
            field of a user's own recipe that this version does not carry out.
        NothingConvertedError: the recipe quantises GEMMs and no module qualified.
    """
    chosen = get_recipe(recipe)
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert takes an nn.Module, not a {type(model).__name__}: load the model first")
    excluded = _patterns(modules_to_not_convert)
    if isinstance(model, nn.DataParallel):
        raise ConversionError(
            "nn.DataParallel copies the model at every step and loses its scales; start one process per GPU with "
            "`accelerate launch` (or set CUDA_VISIBLE_DEVICES to one GPU)"
        )
    model = _unwrapped(model)
    existing = session_of(model)
    if existing is not None:
        _check_same(existing, model, chosen, excluded, module_filter_fn)
        return existing.report
    _release_orphans(model)
    _refuse_what_nothing_reads(chosen)
    emulated = _emulates(model, chosen, emulate)
    patterns = [*chosen.modules_to_not_convert, *excluded]
    report, modules = _select(model, chosen, patterns, module_filter_fn, aligned=not emulated)
    report.emulated = emulated
    if chosen.quantises_gemms and not modules:
        raise NothingConvertedError(f"recipe {chosen.name!r} was asked for, but nothing could be converted:\n{report}")
    # Not `emulated`: a model that is still on the CPU runs natively once it has moved to a GPU.
    always = emulate or native_nowhere(chosen) is not None
    layers: dict[str, LayerState] = {}
    for index, (name, module) in enumerate(modules.items()):
        kn = type(module) is not nn.Linear
        state = LayerState.create(chosen, index, weight_is_kn=kn, emulate=always)
        if (device := _weight(module).device).type != "meta":
            state.to(device)
        layers[name] = state
        module._lowprec = state  # type: ignore[assignment]
        set_class(module, low_precision_class(module))  # type: ignore[arg-type]
    Session.begin(model, chosen, report, ScalingState(chosen, layers))
    stepping.install_hooks()
    optim.mark_embeddings(model)  # for optimizers of ours that nobody attaches
    return report


def revert(model: nn.Module) -> None:
    """Undo `convert`: the original classes, no state left. Weights are untouched; a model never converted is fine.

    Raises ConversionError: `model` is a part of what was converted together.
    """
    session = session_of(model)
    if session is not None:
        mine = {id(m._lowprec) for m in model.modules() if isinstance(m, LowPrecMixin)}
        left = [name for name, layer in session.scaling.layers.items() if id(layer) not in mine]
        # The root may have lost layers to the model (PEFT's merge_and_unload): a part that holds them all will do.
        if left and not any(m is session.root for m in model.modules()):
            raise ConversionError(f"this is a part of a converted model, without {left[0]!r}: revert the whole model")
        for module in {*session.root.modules(), *model.modules()}:
            _restore(module)
        session.end()
    _release_orphans(model)


def _restore(module: nn.Module) -> None:
    if isinstance(module, LowPrecMixin):
        set_class(module, original_class(module))
        del module._lowprec


def _release_orphans(model: nn.Module) -> None:
    """Restore converted layers that belong to no conversion: copies, taken out of a converted model one by one."""
    owned = {id(layer) for session in live_sessions() for layer in session.scaling.layers.values()}
    for module in model.modules():
        if isinstance(module, LowPrecMixin) and id(module._lowprec) not in owned:
            _restore(module)


@contextmanager
def high_precision(model: nn.Module) -> Iterator[None]:
    """Run the converted layers in the base precision inside the context, e.g. to compare an evaluation."""
    session = session_of(model)
    layers = [] if session is None else list(session.scaling.layers.values())
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def invalidate(model: nn.Module) -> None:
    """Drop cached low-precision weights; needed after writes that no hook sees (`param.data[...]`)."""
    session = session_of(model)
    if session is not None:
        for layer in session.scaling.layers.values():
            layer.frozen = None


def recipe_of(model: nn.Module) -> Recipe | None:
    session = session_of(model)
    return None if session is None else session.recipe


def report_of(model: nn.Module) -> ConversionReport | None:
    session = session_of(model)
    return None if session is None else session.report


# --- selection -----------------------------------------------------------------------------------------------------


def _select(
    model: nn.Module,
    recipe: Recipe,
    patterns: list[str],
    filter_fn: Callable[[nn.Module, str], bool] | None,
    *,
    aligned: bool,
) -> tuple[ConversionReport, dict[str, nn.Module]]:
    report = ConversionReport(recipe)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or low_precision_class(m)}
    heads, tied, unused = _head_ids(model), _tied_ids(model), set(patterns)
    chosen: dict[str, nn.Module] = {}
    for name, module in linears.items():
        matched = [p for p in patterns if _matches(p, name)]
        unused -= set(matched)
        reason = _reason(name, module, model, heads, tied, aligned)
        if not recipe.quantises_gemms:
            reason = f"recipe {recipe.name} quantises no GEMM"
        elif matched:
            reason = f"named by modules_to_not_convert ({matched[0]})"
        elif reason is None and filter_fn is not None and not filter_fn(module, name):
            reason = "refused by module_filter_fn"
        if reason is None:
            chosen[name] = module
            report.converted.append(name)
            report.converted_parameters += _weight(module).numel()
            report.converted_flops += _weight(module).numel()
        else:
            report.skipped[name] = reason
        if id(module) not in heads:
            report.flops += _weight(module).numel()
    for name, parameter in model.named_parameters():
        report.parameters += parameter.numel()
        if parameter.dim() == 3 and "expert" in name:
            report.unconvertible[name] = "3-D expert weights of a mixture of experts"
            report.flops += parameter.numel()
    # A pattern may also name a module that is no linear; only one that matches nothing at all is a likely typo.
    names = [n for n, _ in model.named_modules()]
    report.unmatched_patterns = sorted(p for p in unused if not any(_matches(p, n) for n in names))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    report.bytes_per_parameter = size / max(1, report.parameters)
    return report, chosen


def _reason(
    name: str, module: nn.Module, model: nn.Module, heads: set[int], tied: set[int], aligned: bool
) -> str | None:
    """Why `module` is left alone, or None."""
    parts = name.split(".")
    if isinstance(module, LowPrecMixin):
        return "already converted"
    if low_precision_class(module) is None:
        return f"class {type(module).__name__} may have a forward of its own"
    if id(module) in heads:
        return "output embedding or head"
    weight = _weight(module)
    if id(weight) in tied:
        return "weight tied to another module"
    if any(part in _ADAPTERS for part in parts):
        return "adapter"
    if any(part in _HEADS for part in parts):
        return "head"
    parent = model.get_submodule(".".join(parts[:-1]))
    # A `gate` beside `up` belongs to a gated MLP, one beside experts chooses among them.
    if parts[-1] in _ROUTERS and any("expert" in child for child, _ in parent.named_children()):
        return "router"
    if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return f"nn.{type(parent).__name__} reads its weight directly"
    if forward_is_replaced(module):
        return "its forward was replaced on the instance"
    if weight.dtype not in _DTYPES:
        return f"its weight is stored as {weight.dtype}"
    if aligned and any(size % _ALIGNMENT for size in weight.shape):
        return f"a dimension of {tuple(weight.shape)} is not divisible by {_ALIGNMENT}"
    return None


def _weight(module: nn.Module) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight


def _unwrapped(model: nn.Module) -> nn.Module:
    """`model` without torch.compile and DDP around it, so that layer names do not depend on how it is launched."""
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _head_ids(model: nn.Module) -> set[int]:
    heads = set()
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            try:
                head = getter()
            except (AttributeError, NotImplementedError):
                continue
            if head is not None:
                heads.add(id(head))
    return heads


def _tied_ids(model: nn.Module) -> set[int]:
    """ids of Parameters that more than one module owns."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {key for key, count in owners.items() if count > 1}


def _matches(pattern: str, name: str) -> bool:
    if pattern == name or pattern in name.split(".") or name.endswith("." + pattern):
        return True
    if f".{pattern}." in f".{name}.":
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def _patterns(patterns: Sequence[str] | str | None) -> list[str]:
    """As a list; one string is one pattern. Raises ConversionError for a pattern that is no regular expression."""
    listed = [patterns] if isinstance(patterns, str) else list(patterns or ())
    for pattern in listed:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConversionError(f"modules_to_not_convert: {pattern!r} is no regular expression: {error}") from None
    return listed


def _check_same(
    existing: Session,
    model: nn.Module,
    chosen: Recipe,
    excluded: list[str],
    filter_fn: Callable[[nn.Module, str], bool] | None,
) -> None:
    """Raises ConversionError unless converting `model` once more would change nothing."""
    for other in {existing, *(s for s in live_sessions() if any(m is s.root for m in model.modules()))}:
        if other.recipe != chosen:
            raise ConversionError(
                f"the model is already converted with recipe {other.recipe.name!r}, not {chosen.name!r}"
                f"{other.recipe.difference(chosen)}; call hf_lowprec.revert(model) first"
            )
    modules = dict(existing.root.named_modules())
    for name in existing.report.converted:
        refused = filter_fn is not None and name in modules and not filter_fn(modules[name], name)
        if refused or any(_matches(pattern, name) for pattern in excluded):
            raise ConversionError(
                f"the model is already converted, {name!r} included, which is to be left alone now: call "
                "hf_lowprec.revert(model) first"
            )
    inside = {id(m) for m in existing.root.modules()}
    _, would = _select(model, chosen, list(chosen.modules_to_not_convert), None, aligned=not existing.report.emulated)
    outside = [name for name, module in would.items() if id(module) not in inside]
    if outside:
        raise ConversionError(
            f"a part of the model is already converted, {len(outside)} linears beside it are not ({outside[0]!r}): "
            "call hf_lowprec.revert on the part and convert the whole"
        )


def _refuse_what_nothing_reads(recipe: Recipe) -> None:
    """Raises ConversionError where a recipe asks for something that would silently not happen."""
    for name in ("fprop", "dgrad", "wgrad"):
        accumulation = getattr(recipe, name).accumulation
        if accumulation != Accumulation(fast=accumulation.fast):
            raise ConversionError(
                f"recipe {recipe.name!r}: {name}.accumulation: low-precision accumulation is planned, not here yet"
            )
    if recipe.loss_scale.method == "static" or (recipe.loss_scale.method == "dynamic") != (recipe.base == "fp16"):
        raise ConversionError(
            f"recipe {recipe.name!r}: loss_scale: torch's GradScaler scales, dynamically and under base fp16 only"
        )


def _emulates(model: nn.Module, recipe: Recipe, emulate: bool) -> bool:
    """Whether the GEMMs will be emulated. Raises ConversionError for a GPU that would need `emulate=True`."""
    if emulate or not recipe.quantises_gemms:
        return emulate
    if native_nowhere(recipe) is not None:
        return True
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type in ("cpu", "meta"):  # it may move to the GPU later, where every GEMM is checked again
        return not torch.cuda.is_available()
    problem = native_problem(recipe, device)
    if problem is None:
        return False
    raise ConversionError(f"{problem}; pass emulate=True to compute the same numbers slowly, or use recipe 'bf16'")


def native_problem(recipe: Recipe, device: torch.device) -> str | None:
    """Why `recipe` does not run natively on `device`, or None."""
    if device.type != "cuda":
        return f"recipe {recipe.name!r} has no kernels for device type {device.type!r}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        name = f"{torch.cuda.get_device_name(device)} is sm_{capability[0]}{capability[1]}"
        return f"recipe {recipe.name!r} needs FP8 tensor cores (sm_89 or newer), {name}"
    return native_nowhere(recipe)


def native_nowhere(recipe: Recipe) -> str | None:
    """What keeps `recipe` from any GPU's tensor cores, or None. Such a recipe is emulated, and the summary says so."""
    for gemm in (recipe.fprop, recipe.dgrad, recipe.wgrad):
        for quant in (gemm.input, gemm.weight, gemm.grad_output):
            if quant is None:
                continue
            granularity = quant.scaling.granularity
            if quant.format not in ("e4m3fn", "e5m2") or granularity != "tensor":
                return f"recipe {recipe.name!r} uses {quant.format} per {granularity}, native nowhere yet"
    return None


__all__ = [
    "ConversionError", "ConversionReport", "NothingConvertedError", "convert", "high_precision", "invalidate",
    "native_nowhere", "native_problem", "recipe_of", "report_of", "revert", "session_of",
]  # fmt: skip
