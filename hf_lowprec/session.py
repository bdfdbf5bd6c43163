# SPDX-License-Identifier: Apache-2.0
"""The record of one conversion: which model, which recipe, and the state that goes with it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_lowprec.modules import ScalingState
from hf_lowprec.modules.linear import LowPrecMixin
from hf_lowprec.modules.rotary_use import RotaryUse
from hf_lowprec.optim.gradient import GradientQuantizer
from hf_lowprec.optim.ranges import RangeTrainer
from hf_lowprec.presets import get_recipe
from hf_lowprec.recipe import Recipe, RecipeError
from hf_lowprec.report import ConversionReport
from hf_lowprec.transform import UnitScaled

_LIVE: weakref.WeakSet[Session] = weakref.WeakSet()
_NUMBERS = itertools.count()
STATE_VERSION = 1


class Session:
    """Lives in `model.__dict__["_hf_lowprec"]`, so it is copied, pickled and freed with the model.

    number: unlike `id`, never used twice in a process, and in order of conversion, which ranks share.
    """

    def __init__(self, root: nn.Module, recipe: Recipe, report: ConversionReport, scaling: ScalingState) -> None:
        self.root = root
        self.recipe = recipe
        self.report = report
        self.scaling = scaling
        self._at_end: list[Callable[[], None]] = []
        self.rotary: list[RotaryUse] = []  # of functions that take a kernel while this lives
        self.options: tuple[object, ...] = ()  # what `convert` was asked for beside the recipe
        self.transform: UnitScaled | None = None
        self.gradients: GradientQuantizer | None = None
        if recipe.communication is not None:
            self.gradients = GradientQuantizer(recipe.communication, len(scaling.layers))
        flexible = [layer.flexible for layer in scaling.layers.values() if layer.flexible is not None]
        self.ranges = RangeTrainer(o for f in flexible for o in (f.input, f.weight)) if flexible else None
        self._register()

    @classmethod
    def begin(cls, root: nn.Module, recipe: Recipe, report: ConversionReport, scaling: ScalingState) -> Session:
        session = root.__dict__["_hf_lowprec"] = cls(root, recipe, report, scaling)
        return session

    @property
    def live(self) -> bool:
        """False after `revert`."""
        return self.root.__dict__.get("_hf_lowprec") is self

    def on_end(self, callback: Callable[[], None]) -> None:
        """Have `revert` call it, to undo what was done to this model besides the conversion; copies do not."""
        self._at_end.append(callback)

    def end(self) -> None:
        self.root.__dict__.pop("_hf_lowprec", None)
        _LIVE.discard(self)
        for use in self.rotary:
            use.release()
        self.rotary.clear()
        while self._at_end:
            self._at_end.pop()()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_at_end": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register()

    def _register(self) -> None:
        self.number = next(_NUMBERS)
        _LIVE.add(self)

    def weights(self) -> dict[str, nn.Parameter]:
        """Converted layers' weights by layer name, as they are now (FSDP2 replaces Parameters)."""
        modules = dict(self.root.named_modules())
        return {n: modules[n].weight for n in self.scaling.layers if isinstance(modules.get(n), LowPrecMixin)}  # type: ignore[misc]

    @property
    def has_rates(self) -> bool:
        """Whether the weights have learning rates of their own (`hf_lowprec.transform`)."""
        return self.transform is not None and bool(self.transform.factors)

    def learning_rates(self) -> dict[int, float]:
        """id of a Parameter -> its learning rate over the optimizer's, where that is not 1."""
        factors = {} if self.transform is None else self.transform.factors
        return {id(p): factors[n] for n, p in self.root.named_parameters() if factors.get(n, 1.0) != 1.0}

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        mine = {id(p) for p in self.root.parameters()}
        return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])

    def state_dict(self) -> dict[str, Any]:
        """All low-precision state that is not a weight, as tensors, strings and numbers."""
        out = {"version": STATE_VERSION, "recipe": self.recipe.to_dict(), "layers": self.scaling.state_dict()}
        if self.gradients is not None:
            out["gradients"] = self.gradients.state_dict()
        if self.ranges is not None:
            out["ranges"] = self.ranges.state_dict()
        if self.transform is not None:
            out["transform"] = self.transform.state_dict()
        return out

    def check(self, state: dict[str, Any]) -> None:
        """Raises ValueError, before anything changes, unless `state` was saved by a model like this one."""
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION or "recipe" not in state:
            raise ValueError(f"low-precision state is damaged or of another version (expected {STATE_VERSION})")
        try:
            theirs = get_recipe(state["recipe"])
        except RecipeError as error:
            raise ValueError(
                f"the checkpoint's low-precision state names a recipe that is not known here: {error}"
            ) from None
        mine, theirs = self.recipe, replace(theirs, weight_cache=self.recipe.weight_cache)  # changes no number
        if mine.saved is None:  # nor then does what backward makes again
            mine, theirs = replace(mine, saved_inputs="codes"), replace(theirs, saved_inputs="codes")
        if theirs != mine:
            reusable = theirs.states == mine.states
            way = (
                "drop the key 'hf_lowprec' of the optimizer's state dict to start new scales"
                if reusable
                else "load the weights and start a new optimizer (its states are of other formats)"
            )
            raise ValueError(
                f"the checkpoint was written with recipe {theirs.name!r}, the model trains with {mine.name!r}"
                f"{mine.difference(theirs)}; resume with the same recipe, or {way}"
            )
        self.scaling.check(state.get("layers"))
        if self.gradients is not None:
            self.gradients.check(state.get("gradients"))
        if self.ranges is not None:
            self.ranges.check(state.get("ranges"))
        if self.transform is not None:
            self.transform.check(state.get("transform"), self.root)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.check(state)
        if self.gradients is not None:
            self.gradients.load_state_dict(state["gradients"])
        if self.transform is not None:
            self.transform.load_state_dict(state["transform"])
            self.report.transform = self.transform.words()
        self.scaling.load_state_dict(state["layers"])
        if self.ranges is not None:
            self.ranges.load_state_dict(state["ranges"])


def live_sessions() -> list[Session]:
    """In order of conversion: ranks that reduce amaxes of several models must do so in the same order."""
    return sorted(_LIVE, key=lambda session: session.number)


def session_of(model: nn.Module) -> Session | None:
    """The conversion that `model`, or a module that it wraps or is wrapped by one of its direct wrappers, carries."""
    for module in _inside(model):
        session: Session | None = module.__dict__.get("_hf_lowprec")
        if session is not None:
            return session
    # A part of a converted model, e.g. what PEFT's merge_and_unload returns: its layers know the session.
    layer = next((m for m in model.modules() if isinstance(m, LowPrecMixin)), None)
    if layer is None:
        return None
    return next((s for s in live_sessions() if any(layer._lowprec is x for x in s.scaling.layers.values())), None)


def _inside(model: nn.Module) -> Iterator[nn.Module]:
    """`model`, and what DDP (`module`), torch.compile (`_orig_mod`) or PEFT (`base_model.model`) wrapped around."""
    yield model
    for name in ("module", "_orig_mod", "base_model", "model"):
        inner = model._modules.get(name)
        if inner is not None:
            yield from _inside(inner)
