# SPDX-License-Identifier: Apache-2.0
"""Post-training quantisation: formats and ranges for a trained model, from a few batches, without a gradient.

    report = hf_lowprec.calibrate(model, data)            # "fp8-flex": 8 bits, split and range by least error
    hf_lowprec.save_calibration(model, "ranges.safetensors")

Weights are searched as they are, each output channel by itself where the recipe says so. Of inputs each layer keeps a
histogram (`numerics.search.Histogram`: 256 KiB a layer, however much data), filled while the model runs in high
precision, so that no layer sees the errors of another. The same data give the same result, in any order of batches.

A calibrated model runs its quantised forward; `high_precision` and `revert` undo it. Under a recipe that learns its
ranges (fp8-flex) training goes on from them; under method `search` they stay.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_lowprec import files
from hf_lowprec.conversion import ConversionError, convert, high_precision, revert, session_of
from hf_lowprec.formats import get_format
from hf_lowprec.modules.flexible import Flexible, Operand
from hf_lowprec.modules.linear import LowPrecMixin
from hf_lowprec.numerics.flexible import least_man
from hf_lowprec.numerics.search import ESTIMATORS, Estimator, Histogram
from hf_lowprec.presets import get_recipe
from hf_lowprec.recipe import Recipe, RecipeError
from hf_lowprec.report import ConversionReport
from hf_lowprec.session import Session

_KIND, _VERSION = "hf_lowprec calibration", "1"


class CalibrationError(ValueError):
    """The data, the model or the file does not allow a calibration. The model is as it was before."""


def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    recipe: str | Path | dict[str, Any] | Recipe = "fp8-flex",
    *,
    estimator: Estimator = "output",
    percentile: float = 99.99,
    forward: Callable[[nn.Module, Any], object] | None = None,
    modules_to_not_convert: Sequence[str] | str | None = None,
    module_filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> ConversionReport:
    """Convert `model` in place (unless it is) and choose the format and range of every input and weight.

    Args:
        data: batches: a mapping goes to the model as keywords, a tuple or list as positional arguments, anything else
            as the only one. Tensors are moved to the model's device. A hundred sequences are plenty.
        recipe: one whose ranges are learned or searched; `fp8-flex`, or your own (docs/recipes/fp8-flex.md).
        estimator: `output`, `mse` (the paper's), `minmax` or `percentile` (`numerics.search`). The first two are
            about equal, except where a few features are much larger than the rest, as in large language models: these
            make up the squared error of the input, and what depends on the others is lost.
        percentile: of the elements, up to which the range of that estimator goes.
        forward: run a batch in another way than the above, e.g. `lambda model, batch: model.generate(**batch)`.
        modules_to_not_convert, module_filter_fn: as `convert` takes them.

    Returns: the report; `report.formats` has every layer's formats, its summary how often each was chosen.

    Raises:
        CalibrationError: no batches; a layer that no batch reached, or whose input or weight is not finite; another
            recipe than the model is converted with, or one that has no ranges to find.
        TypeError: `data` is one batch, or nothing that can be iterated.
        RecipeError, ConversionError: as `convert`.
        ValueError: no such estimator or percentile.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    if not 0.0 < percentile <= 100.0:
        raise ValueError(f"percentile: above 0, at most 100, got {percentile}")
    check_data(data)
    existing = session_of(model)
    chosen = _recipe_for(existing, recipe)
    report = existing.report if existing is not None else convert(
        model, chosen, modules_to_not_convert=modules_to_not_convert, module_filter_fn=module_filter_fn
    )  # fmt: skip
    session = session_of(model)
    assert session is not None
    try:
        histograms, batches = _observe(model, session, data, forward or run_batch, weigh=estimator == "output")
        _check(histograms, session.weights(), batches)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            _merge(histograms)
    except BaseException:
        if existing is None:
            revert(model)
        raise
    weights = session.weights()
    for name, flexible in _flexible(session).items():
        flexible.fit_weight(weights[name], estimator, percentile, histograms[name].energy)
        flexible.input.fit(histograms[name].magnitudes(), estimator, percentile)
    words = estimator if estimator != "percentile" else f"percentile {percentile:g}"
    _note(session, f"by {words} on {batches} batch{'es' if batches != 1 else ''}")
    return report


def _recipe_for(existing: Session | None, recipe: str | Path | dict[str, Any] | Recipe) -> Recipe:
    chosen = get_recipe(recipe)
    if existing is not None:
        if recipe != "fp8-flex" and existing.recipe != chosen:
            raise CalibrationError(
                f"the model is converted with recipe {existing.recipe.name!r}, not {chosen.name!r}: leave the recipe "
                "out, or call hf_lowprec.revert(model) first"
            )
        chosen = existing.recipe
    if not chosen.flexible:
        raise CalibrationError(
            f"recipe {chosen.name!r} takes its scales from each tensor and has nothing to calibrate: use 'fp8-flex', "
            "or a recipe whose fprop operands have scaling method 'search' or 'learned'"
        )
    return chosen


def _flexible(session: Session) -> dict[str, Flexible]:
    return {name: layer.flexible for name, layer in session.scaling.layers.items() if layer.flexible is not None}


# --- what flows through ---------------------------------------------------------------------------------------------


def _observe(
    model: nn.Module, session: Session, data: Iterable[Any], run: Callable[[nn.Module, Any], object], *, weigh: bool
) -> tuple[dict[str, Histogram], int]:
    histograms: dict[str, Histogram] = {}
    handles = []
    modules = dict(session.root.named_modules())

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            input = args[0] if args else kwargs["input"]
            histograms[name].add(input)

        return see

    weights = session.weights()
    for name, flexible in _flexible(session).items():
        importance = flexible.importance(weights[name]) if weigh else None
        histograms[name] = Histogram(weights[name].device, importance)
        assert isinstance(modules[name], LowPrecMixin)
        handles.append(modules[name].register_forward_pre_hook(watch(name), with_kwargs=True))
    training = {module: module.training for module in model.modules()}
    device = next(iter(weights.values())).device
    batches = 0
    try:
        model.eval()
        with torch.no_grad(), high_precision(model):
            for batch in data:
                run(model, moved(batch, device))
                batches += 1
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return histograms, batches


def run_batch(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [moved(value, device) for value in batch]
    return batch


def check_data(data: object) -> None:
    """Raises TypeError for what is no sequence of batches, such as one batch."""
    iterable = hasattr(data, "__iter__") or hasattr(data, "__getitem__")  # the latter: torch's Dataset
    if not iterable or isinstance(data, Mapping | Tensor | str):
        raise TypeError(
            f"data: batches, such as a DataLoader, not one {type(data).__name__}: [batch] is a list of one"
        )


def _check(histograms: dict[str, Histogram], weights: Mapping[str, Tensor], batches: int) -> None:
    if not batches:
        raise CalibrationError("no data: calibrate needs at least one batch")
    damaged = [name for name, weight in weights.items() if not bool(weight.isfinite().all())]
    if damaged:
        raise CalibrationError(f"the weight of {damaged[0]} holds Inf or NaN: there is no range for it")
    broken = [name for name, histogram in histograms.items() if bool(histogram.nonfinite)]
    if broken:
        raise CalibrationError(f"the input of {broken[0]} holds Inf or NaN: the model does not compute on this data")
    unseen = [name for name, histogram in histograms.items() if not bool(histogram.counts.any())]
    if unseen:
        raise CalibrationError(
            f"{len(unseen)} layers saw no data ({', '.join(unseen[:3])}): give batches that reach them, or name them "
            "in modules_to_not_convert"
        )


def _merge(histograms: dict[str, Histogram]) -> None:
    """What all ranks have seen, so that all choose the same."""
    for histogram in histograms.values():
        dist.all_reduce(histogram.counts)
        if histogram.energy is not None:
            dist.all_reduce(histogram.energy)
        dist.all_reduce(histogram.amax, dist.ReduceOp.MAX)
        rough = torch.tensor(int(not histogram.exact), device=histogram.counts.device)
        dist.all_reduce(rough, dist.ReduceOp.MAX)
        histogram.exact = not bool(rough)


def _note(session: Session, how: str) -> None:
    """Into the report: every layer's formats, and how often each was chosen."""
    report = session.report
    report.formats = {
        name: (str(flexible.input.format), str(flexible.weight.format))
        for name, flexible in _flexible(session).items()
    }
    said = []
    for index, role in enumerate(("inputs", "weights")):
        counts = Counter(formats[index] for formats in report.formats.values())
        said.append(f"{role} {', '.join(f'{n} x {fmt}' for fmt, n in counts.most_common())}")
    report.calibration = f"{how}: {'; '.join(said)}"


# --- files ----------------------------------------------------------------------------------------------------------


def save_calibration(model: nn.Module, path: str | Path) -> None:
    """Write ranges and mantissa widths (kilobytes) as safetensors; the recipe is in the file, the weights are not.

    Raises CalibrationError: the model has no ranges, or none yet. ImportError: safetensors is not installed.
    """
    session = session_of(model)
    if session is None or not session.recipe.flexible:
        raise CalibrationError("the model has no ranges to save: calibrate it first")
    missing = [name for name, f in _flexible(session).items() if not (f.input.found and f.weight.found)]
    if missing:
        raise CalibrationError(f"{missing[0]} has no ranges yet: call hf_lowprec.calibrate(model, data) first")
    tensors = {
        f"{name}.{role}.{key}": tensor.detach().cpu().contiguous()
        for name, flexible in _flexible(session).items()
        for role in flexible.operands
        for key, tensor in flexible.tensors(role).items()
    }
    metadata = {"kind": _KIND, "version": _VERSION, "recipe": json.dumps(session.recipe.to_dict())}
    files.write(tensors, Path(path), metadata)


def load_calibration(model: nn.Module, path: str | Path, **options: Any) -> ConversionReport:
    """Give `model` the ranges of a file; a model that is not converted is, by the recipe in the file.

    options: of `convert`, for a model that is not converted: `modules_to_not_convert` as it was calibrated with.

    Raises CalibrationError, before anything changed: no such file, damaged, of other layers, or of another recipe.
    """
    tensors, recipe = _read(path)
    existing = session_of(model)
    if existing is not None and existing.recipe != recipe:
        raise CalibrationError(
            f"{path}: calibrated with recipe {recipe.name!r}, the model is converted with {existing.recipe.name!r}"
            f"{existing.recipe.difference(recipe)}"
        )
    report = existing.report if existing is not None else convert(model, recipe, **options)
    session = session_of(model)
    assert session is not None
    try:
        _fill(session, tensors, path)
    except BaseException:
        if existing is None:
            revert(model)
        raise
    _note(session, f"read from {Path(path).name}")
    return report


def _read(path: str | Path) -> tuple[dict[str, Tensor], Recipe]:
    try:
        tensors, metadata = files.read(Path(path))
    except ValueError as error:
        raise CalibrationError(f"{path}: {error}") from None
    if metadata.get("kind") != _KIND or metadata.get("version") != _VERSION:
        raise CalibrationError(f"{path}: not a calibration of this version (save_calibration writes one)")
    try:
        recipe = Recipe.from_json(metadata.get("recipe", ""))
    except RecipeError as error:
        raise CalibrationError(f"{path}: {error}") from None
    if not recipe.flexible:
        raise CalibrationError(f"{path}: recipe {recipe.name!r} has no ranges")
    return tensors, recipe


def _fill(session: Session, tensors: dict[str, Tensor], path: str | Path) -> None:
    targets: dict[str, tuple[Operand, str, Tensor]] = {
        f"{name}.{role}.{key}": (operand, key, tensor)
        for name, flexible in _flexible(session).items()
        for role, operand in flexible.operands.items()
        for key, tensor in flexible.tensors(role).items()
    }
    if tensors.keys() != targets.keys():
        odd = sorted(tensors.keys() ^ targets.keys())
        raise CalibrationError(f"{path}: of other layers than the model's ({odd[0]} is on one side only)")
    for key, (operand, kind, target) in targets.items():
        value = tensors[key]
        if value.shape != target.shape or value.dtype != target.dtype:
            raise CalibrationError(f"{path}: {key} is {value.dtype} {tuple(value.shape)}, not {tuple(target.shape)}")
        low, high = (0.0, torch.inf) if kind == "maxval" else (least_man(operand.bits) - 0.5, operand.bits - 0.5)
        if not bool(((value > low) & (value < high)).all()):
            raise CalibrationError(f"{path}: {key} is out of range")
        fixed = operand.quant.split == "fixed" and kind == "man"
        if fixed and float(value) != float(getattr(get_format(operand.quant.format), "man", -1)):
            raise CalibrationError(f"{path}: {key} is not the recipe's format")
    for key, (operand, _, target) in targets.items():
        target.data.copy_(tensors[key])
        operand.found = True


__all__ = ["CalibrationError", "ConversionError", "calibrate", "load_calibration", "save_calibration"]
