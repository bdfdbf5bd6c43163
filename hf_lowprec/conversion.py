# SPDX-License-Identifier: Apache-2.0
"""convert(model, recipe): swap the linears of a model for low-precision ones, in place, and say what was done.

`selection` says which linears; `fusion` then lets modules run together that read the same tensor or follow each other.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_lowprec import fusion, optim, stepping, transform
from hf_lowprec.break_even import break_even
from hf_lowprec.decoder import NoDecoder, find_decoder
from hf_lowprec.describe import FP8_SINCE, INT8_SINCE, MX_SINCE, native_since, recipe_since, sm
from hf_lowprec.flags import check_switch, read_switch
from hf_lowprec.modules import LayerState, ScalingState, low_precision_class
from hf_lowprec.modules.flexible import Flexible, flexible_class
from hf_lowprec.modules.linear import LowPrecMixin, original_class, set_class
from hf_lowprec.modules.sharing import share_input
from hf_lowprec.presets import get_recipe
from hf_lowprec.recipe import Recipe
from hf_lowprec.report import ConversionReport
from hf_lowprec.selection import Choice, matches, select, weight_of
from hf_lowprec.session import Session, live_sessions, session_of

FUSE_ENV = "HF_LOWPREC_FUSE"
BREAK_EVEN_ENV = "HF_LOWPREC_BREAK_EVEN"


class _Options(NamedTuple):
    """What a conversion was made with. It lives in its Session, and is copied with it."""

    fuse: bool
    min_numel: int
    min_tokens: int | None
    emulate: bool


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
    fuse: bool | None = None,
    min_numel: int | None = None,
    min_tokens: int | None = None,
    init: bool | None = None,
) -> ConversionReport:
    """Make `model` train by `recipe`, in place; Parameters keep their identity and names. Idempotent.

    Args:
        modules_to_not_convert: names or regular expressions, added to the defaults; an entry matches a whole dotted
            part of a module name (`"mlp"`), a whole name, or, as a regular expression, all of it.
        module_filter_fn: called with (module, name); False leaves the module alone.
        emulate: on a GPU without FP8 tensor cores, compute the same numbers slowly instead of raising. Recipes that
            no GPU has, or only those with MX tensor cores (sm_100), are emulated elsewhere without it.
        fuse: quantise a tensor once for all linears that read it, fuse norms, MLPs and rotary embeddings
            (docs/fusing.md).
            None: as the environment variable HF_LOWPREC_FUSE says, 0 or 1; it is on where that is unset.
        min_numel: leave linears in the base precision whose weight has fewer elements. None: the size below which FP8
            gains nothing on this GPU, where that was measured (`break_even`) and the environment variable
            HF_LOWPREC_BREAK_EVEN is not 0; 0: convert all sizes.
        min_tokens: run a call of a converted linear in the base precision if its input has fewer rows (eager mode
            only). None: as measured on this GPU for the size of the weight; 0: never.
        init: recipes with a `transform` only. True brings the weights to unit scale, one factor per weight, and maps
            learning rates; False keeps the weights, and so the function that the model computes. None: True for a
            model that nothing has trained (`transform.is_fresh`), False for any other. The report says which.

    Returns: the report, also printed by `hf-lowprec inspect` and logged at `Accelerator.prepare`.

    Raises:
        RecipeError: unknown or malformed recipe.
        ConversionError: nn.DataParallel; already converted with another recipe, `fuse`, `min_numel` or `min_tokens`
            (None: as it is), or now to be emulated; a GPU that cannot run it natively; a field of a user's own recipe
            that this version does not carry out.
        NothingConvertedError: the recipe quantises GEMMs and no module qualified.
        TypeError, ValueError: an argument, HF_LOWPREC_FUSE or HF_LOWPREC_BREAK_EVEN is none of its values.
    """
    check_switch("fuse", fuse)
    check_switch("init", init)
    _check_count("min_numel", min_numel, "elements")
    _check_count("min_tokens", min_tokens, "tokens")
    chosen = get_recipe(recipe)
    if init is not None and chosen.transform.method == "none":
        raise ConversionError(f"init: recipe {chosen.name!r} has no transform, and leaves weights as they are")
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert takes an nn.Module, not a {type(model).__name__}: load the model first")
    if chosen.flexible and min_tokens:
        raise ConversionError(f"recipe {chosen.name!r}: min_tokens is for layers without searched or learned ranges")
    excluded = _patterns(modules_to_not_convert)
    if isinstance(model, nn.DataParallel):
        raise ConversionError(
            "nn.DataParallel copies the model at every step and loses its scales; start one process per GPU with "
            "`accelerate launch` (or set CUDA_VISIBLE_DEVICES to one GPU)"
        )
    model = unwrapped(model)
    existing = session_of(model)
    if existing is not None:
        _check_same(existing, model, chosen, excluded, module_filter_fn)
        _check_same_options(existing, fuse, min_numel, min_tokens, emulate)
        _check_same_init(existing, init)
        _mark(existing)  # copies and new Parameters have no marks
        return existing.report
    if fuse is None:
        fuse = read_switch(FUSE_ENV, True)
    follows = read_switch(BREAK_EVEN_ENV, True)
    _release_orphans(model)
    _refuse_what_nothing_reads(chosen)
    emulated = _emulates(model, chosen, emulate)
    patterns = (*chosen.modules_to_not_convert, *excluded)
    # Measured for formats that stand for 16 bits. A linear of BitNet in the base precision would be another function.
    measured = follows and not emulated and recipe_since(chosen) != INT8_SINCE
    rule = break_even(chosen.name, _device(model)) if measured else None
    if min_numel is None:
        min_numel = 0 if rule is None else rule.min_numel
    planned = _plan_transform(model, chosen, init)
    left = {} if planned is None else planned.left
    choice = Choice(patterns, module_filter_fn, aligned=_aligned(chosen, emulated), min_numel=min_numel, left=left)
    report, modules = select(model, chosen, choice)
    why = emulation_reason(chosen, _device(model))
    report.emulated, report.why_emulated = emulated, why or ""
    if chosen.loss_scale.method != "none":
        report.loss_scale = f"{chosen.loss_scale.method}, by hf_lowprec.grad_scaler(model)"
    if chosen.quantises_gemms and not modules:
        advice = f"\nmin_numel=0 or {BREAK_EVEN_ENV}=0 converts what gains no speed, too" if min_numel else ""
        raise NothingConvertedError(
            f"recipe {chosen.name!r} was asked for, but nothing could be converted:\n{report}{advice}"
        )
    # Not `emulated`: a model that is still on the CPU runs natively once it has moved to a GPU.
    always = emulate or why is not None
    if planned is not None:
        planned.apply()
        report.transform = planned.scaled.words()
    layers: dict[str, LayerState] = {}
    for index, (name, module) in enumerate(modules.items()):
        kn = type(module) is not nn.Linear
        state = LayerState.create(chosen, index, weight_is_kn=kn, emulate=always)
        if chosen.flexible:
            channels = weight_of(module).shape[1 if kn else 0]
            state.flexible = Flexible.create(chosen, channels, weight_is_kn=kn)
        if planned is not None:
            planned.scaled.give_constants(state, planned.constants[name])
        if (device := weight_of(module).device).type != "meta":
            state.to(device)
        least = min_tokens
        if least is None:
            least = 0 if rule is None else rule.tokens(weight_of(module).numel()) or 0
        if least:
            state.least = least * weight_of(module).shape[0 if kn else 1]
            report.least_tokens[name] = least
        layers[name] = state
        if state.spec.remade:
            share_input([state])
        module._lowprec = state  # type: ignore[assignment]
        set_class(module, _class_for(module, chosen))
    if rule is not None:
        report.measured_on = rule.measured_on
    session = Session.begin(model, chosen, report, ScalingState(chosen, layers))
    session.options = _Options(fuse, min_numel, min_tokens, always)
    if planned is not None:
        session.transform = planned.scaled
        planned.scaled.watch(planned.tokens_seen_by)
    if layers and fuse:
        on_gpu = always and torch.cuda.is_available()
        session.rotary = fusion.fuse(model, chosen, layers, report, emulate=on_gpu, patterns=patterns)
    stepping.install_hooks()
    _mark(session)
    return report


def _mark(session: Session) -> None:
    """For optimizers of ours that nobody attaches."""
    optim.mark_embeddings(session.root)
    optim.mark_gemm_weights(session.root, session.weights().values())


def follows_measurements(session: Session) -> bool:
    """Whether the bounds on tokens of a call are those of `break_even`, not the user's own."""
    options = session.options
    return isinstance(options, _Options) and options.min_tokens is None


def _class_for(module: nn.Module, recipe: Recipe) -> type:
    cls = low_precision_class(module)
    assert cls is not None  # `select` has asked
    return flexible_class(cls) if recipe.flexible else cls


def learned_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The ranges and mantissa widths of a converted model that train (method `learned`); empty for other recipes.

    Whatever optimizer steps the weights steps them, too (`optim.ranges`). Put them into an optimizer of your own, and
    that one alone does: a param group without weight decay. On several processes their gradients are averaged before
    each step of an optimizer of the weights, so step that one first.
    """
    session = session_of(model)
    if session is None:
        return []
    layers = session.scaling.layers.values()
    return [p for layer in layers if layer.flexible is not None for p in layer.flexible.parameters()]


def revert(model: nn.Module) -> None:
    """Undo `convert`: the original classes, no state left. Weights are untouched; a model never converted is fine.

    Of a fresh model that was brought to unit scale the weights stay there, but their learning rates are gone, and
    converting it again takes it for a loaded model; a warning says so.

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
        if session.has_rates and session.transform is not None and not session.transform.unknown:
            warnings.warn(
                "the weights stay at unit scale, and from now on optimizers step all of them by one learning rate, "
                "which fits none: to train on, keep the model converted, or make it anew",
                stacklevel=2,
            )
        session.end()
    _release_orphans(model)


def _restore(module: nn.Module) -> None:
    fusion.unfuse(module)
    transform.unwatch(module)
    if isinstance(module, LowPrecMixin):
        set_class(module, original_class(module))
        del module._lowprec


def _release_orphans(model: nn.Module) -> None:
    """Restore modules that belong to no conversion: copies, taken out of a converted model one by one."""
    layers = {id(layer) for session in live_sessions() for layer in session.scaling.layers.values()}
    fused = {id(m) for session in live_sessions() for m in session.root.modules() if fusion.is_fused(m)}
    for module in model.modules():
        orphan = id(module._lowprec) not in layers if isinstance(module, LowPrecMixin) else id(module) not in fused
        if orphan:
            _restore(module)


@contextmanager
def high_precision(model: nn.Module) -> Iterator[None]:
    """Run the model as it was before conversion inside the context, e.g. to compare an evaluation."""
    session = session_of(model)
    states: list[Any] = []
    if session is not None:
        # The root may have lost modules to `model` (PEFT's merge_and_unload).
        fused = {id(state): state for root in (session.root, model) for state in fusion.fused_states(root)}
        states = [*session.scaling.layers.values(), *fused.values()]
    before = [state.enabled for state in states]
    try:
        for state in states:
            state.enabled = False
        yield
    finally:
        for state, enabled in zip(states, before, strict=True):
            state.enabled = enabled


def invalidate(model: nn.Module) -> None:
    """Drop cached low-precision weights; needed after writes that no hook sees (`param.data[...]`), in training
    also right after an optimizer's step, which has noted how large the weights are."""
    session = session_of(model)
    if session is not None:
        session.scaling.drop_weights()


def recipe_of(model: nn.Module) -> Recipe | None:
    session = session_of(model)
    return None if session is None else session.recipe


def report_of(model: nn.Module) -> ConversionReport | None:
    session = session_of(model)
    return None if session is None else session.report


# --- switches -------------------------------------------------------------------------------------------------------


# --- what convert checks first --------------------------------------------------------------------------------------


def unwrapped(model: nn.Module) -> nn.Module:
    """`model` without torch.compile and DDP around it, so that layer names do not depend on how it is launched."""
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


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
        if refused or any(matches(pattern, name) for pattern in excluded):
            raise ConversionError(
                f"the model is already converted, {name!r} included, which is to be left alone now: call "
                "hf_lowprec.revert(model) first"
            )
    inside = {id(m) for m in existing.root.modules()}
    choice = Choice(chosen.modules_to_not_convert, aligned=_aligned(chosen, existing.report.emulated))
    _, would = select(model, chosen, choice)
    outside = [name for name, module in would.items() if id(module) not in inside]
    if outside:
        raise ConversionError(
            f"a part of the model is already converted, {len(outside)} linears beside it are not ({outside[0]!r}): "
            "call hf_lowprec.revert on the part and convert the whole"
        )


def _check_same_options(
    existing: Session, fuse: bool | None, min_numel: int | None, min_tokens: int | None, emulate: bool
) -> None:
    """Likewise. `emulate` cannot be left out, so False asks for nothing."""
    done = existing.options
    if not isinstance(done, _Options):
        return
    asked = _Options(
        done.fuse if fuse is None else fuse,
        done.min_numel if min_numel is None else min_numel,
        done.min_tokens if min_tokens is None else min_tokens,
        emulate or done.emulate,
    )
    for name, was, value in zip(_Options._fields, done, asked, strict=True):
        if was != value:
            raise ConversionError(
                f"the model is already converted with {name}={was}, not {value}; call hf_lowprec.revert(model) first"
            )


def _check_same_init(existing: Session, init: bool | None) -> None:
    """Likewise."""
    if existing.transform is not None and init is not None and init != existing.transform.fresh:
        raise ConversionError(
            f"the model is already converted with init={existing.transform.fresh}, not {init}; call "
            "hf_lowprec.revert(model) first"
        )


def _plan_transform(model: nn.Module, recipe: Recipe, init: bool | None) -> transform.Plan | None:
    """Raises ConversionError: a model that the recipe's transform does not know, or whose weights have no values."""
    if recipe.transform.method == "none":
        return None
    try:
        return transform.plan(model, find_decoder(model), recipe.transform, init=init)
    except NoDecoder as error:
        raise ConversionError(
            f"recipe {recipe.name!r} needs a decoder whose branches read a norm and are added to the residual stream, "
            f"such as Llama, Qwen, Mistral or GPT-2; {type(model).__name__}: {error}"
        ) from None
    except ValueError as error:
        raise ConversionError(f"recipe {recipe.name!r}: {error}") from None


def _check_count(name: str, value: object, what: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: a number of {what}, or None")
    if value < 0:
        raise ValueError(f"{name}={value}: 0 or more")


def _refuse_what_nothing_reads(recipe: Recipe) -> None:
    """Raises ConversionError where a recipe asks for something that would silently not happen."""
    if recipe.loss_scale.method == "none" and recipe.base == "fp16":
        raise ConversionError(
            f"recipe {recipe.name!r}: loss_scale: gradients in float16 need one; method 'dynamic', or 'static'"
        )


def _emulates(model: nn.Module, recipe: Recipe, emulate: bool) -> bool:
    """Whether the GEMMs will be emulated. Raises ConversionError for a GPU that would need `emulate=True`."""
    if emulate or not recipe.quantises_gemms:
        return emulate
    device = _device(model)
    if emulation_reason(recipe, device) is not None:
        return True
    if device.type in ("cpu", "meta"):  # it may move to the GPU later, where every GEMM is checked again
        return not torch.cuda.is_available()
    problem = native_problem(recipe, device)
    if problem is None:
        return False
    raise ConversionError(f"{problem}; pass emulate=True to compute the same numbers slowly, or use recipe 'bf16'")


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def native_problem(recipe: Recipe, device: torch.device) -> str | None:
    """Why `recipe` does not run natively on `device`, or None."""
    if device.type != "cuda":
        return f"recipe {recipe.name!r} has no kernels for device type {device.type!r}"
    capability = torch.cuda.get_device_capability(device)
    since = recipe_since(recipe)
    wanted = FP8_SINCE if since is None else since
    if capability < wanted:
        name = f"{torch.cuda.get_device_name(device)} is {sm(capability)}"
        cores = {MX_SINCE: "MX", INT8_SINCE: "int8"}.get(wanted, "FP8")
        return f"recipe {recipe.name!r} needs {cores} tensor cores ({sm(wanted)} or newer), {name}"
    return native_nowhere(recipe)


def native_nowhere(recipe: Recipe) -> str | None:
    """What keeps `recipe` from any GPU's tensor cores, or None. Such a recipe is emulated, and the summary says so."""
    if recipe_since(recipe) is not None:
        return None
    gemms = (recipe.fprop, recipe.dgrad, recipe.wgrad)
    for gemm in gemms:
        if gemm.accumulation.format is not None:
            return f"recipe {recipe.name!r} adds in {gemm.accumulation.format}, native nowhere yet"
    quants = [q for gemm in gemms for q in (gemm.input, gemm.weight, gemm.grad_output) if q is not None]
    for quant in quants:
        if native_since(quant) is None:
            return f"recipe {recipe.name!r} uses {quant.format} per {quant.scaling.granularity}, native nowhere yet"
    if any([q.format for q in (gemm.input, gemm.weight, gemm.grad_output) if q] == ["e5m2"] * 2 for gemm in gemms):
        return f"recipe {recipe.name!r} multiplies e5m2 by e5m2, native nowhere yet"
    return f"recipe {recipe.name!r} has a GEMM of operands that are scaled in different ways, native nowhere yet"


def emulation_reason(recipe: Recipe, device: torch.device) -> str | None:
    """Why `recipe` is emulated without being asked for: no GPU has it, or only GPUs with MX tensor cores.

    Who chooses FP8 with one scale per tensor wants its speed, so that a GPU without it is an error unless
    `emulate=True`. The others are numbers to train with wherever one is. `device`: of the model, which may move from
    the CPU to the current GPU.
    """
    nowhere = native_nowhere(recipe)
    if nowhere is not None or recipe_since(recipe) != MX_SINCE or not torch.cuda.is_available():
        return nowhere
    return native_problem(recipe, device if device.type == "cuda" else torch.device("cuda"))


def _aligned(recipe: Recipe, emulated: bool) -> bool:
    """Whether sizes that no FP8 GEMM takes are to be left alone; operands of integers are padded."""
    return not emulated and recipe_since(recipe) != INT8_SINCE


__all__ = [
    "ConversionError", "ConversionReport", "NothingConvertedError", "convert", "emulation_reason", "high_precision",
    "invalidate", "native_nowhere", "native_problem", "recipe_of", "report_of", "revert", "session_of",
    "unwrapped",
]  # fmt: skip
