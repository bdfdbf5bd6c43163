# SPDX-License-Identifier: Apache-2.0
"""The training side of accelerate: `Accelerator.__init__`, `prepare` and `prepare_model` learn recipes.

Bare scripts, transformers' Trainer and TRL's trainers all pass through these methods, so nothing else is patched, but
for one line by which an Accelerator learns what its Trainer trains.

    __init__        a recipe's name becomes its base precision, which accelerate knows; the recipe is remembered
    prepare         models are converted before DDP, FSDP or DeepSpeed wrap them, optimizers adopted, schedulers
                    re-pointed (integrations/accelerate_prepare.py)
    prepare_model   reached by `prepare`, and directly for models that are only evaluated
    clip_grad_..._  by the norm, gradients of one of our optimizers are clipped in its step
                    (integrations/accelerate_clip.py)

In a process that uses no recipe and no optimizer of ours, each of them calls accelerate's own and does nothing else.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hf_lowprec._autoload import OWNED_BY_ACCELERATE, RECIPE_ENV, activate
from hf_lowprec.integrations.accelerate_launch import PRECISION_ENV, RECIPE, read_recipe

if TYPE_CHECKING:
    from hf_lowprec.recipe import Recipe


def install() -> None:
    """Patch accelerate now, whether or not the import hook is on. Idempotent."""
    activate()


def settle_environment() -> None:
    """Write what the environment asks for in the form that accelerate and transformers read.

    `ACCELERATE_MIXED_PRECISION=fp8-lm`, which accelerate takes for float32 without a word, and `HF_LOWPREC_RECIPE`
    alone both become HF_LOWPREC_RECIPE plus the recipe's base precision, which TrainingArguments reads when it is
    made. A bad name is left for `Accelerator` to report.
    """
    text, precision = os.environ.get(RECIPE_ENV), os.environ.get(PRECISION_ENV)
    if not text and precision and precision.lower() not in OWNED_BY_ACCELERATE:
        text, precision = precision, None
    if not text:
        return
    try:
        text, recipe = read_recipe(text)
    except ValueError:
        return
    os.environ[RECIPE_ENV] = text
    if not precision:
        os.environ[PRECISION_ENV] = recipe.base


def _from_environment() -> Recipe | None:
    """Raises RecipeError for a name or file that settle_environment could not read."""
    settle_environment()
    text, precision = os.environ.get(RECIPE_ENV), os.environ.get(PRECISION_ENV)
    if text:
        return read_recipe(text, RECIPE_ENV)[1]
    if precision and precision.lower() not in OWNED_BY_ACCELERATE:
        return read_recipe(precision, PRECISION_ENV)[1]
    return None


def resolve(asked: str | None, state: dict[str, Any]) -> tuple[str | None, Recipe | None]:
    """What `Accelerator(mixed_precision=asked)` means: the precision to hand to accelerate, and the recipe.

    state: AcceleratorState's shared dict, empty if this is the process's first Accelerator. Later ones follow it,
    unless they name a precision themselves and the recipe was an earlier script's word, not the launcher's: a second,
    plain run in one notebook or test process is then plain.
    Raises RecipeError: unknown recipe, unreadable file, or two different recipes requested.
    """
    recipe: Recipe | None = state[RECIPE] if RECIPE in state else _from_environment()
    if asked is not None and str(asked).lower() not in OWNED_BY_ACCELERATE:
        from hf_lowprec.recipe import RecipeError

        own = read_recipe(str(asked))[1]
        if recipe is not None and own != recipe:
            first = "an earlier Accelerator" if RECIPE in state else "the launcher (or the environment)"
            raise RecipeError(
                f"the script asks for recipe {own.name!r}, {first} for {recipe.name!r}; name one of them only"
            )
        return own.base, own
    inherited = RECIPE in state and not os.environ.get(RECIPE_ENV)
    if recipe is None or (inherited and asked is not None):
        return asked, None
    explicit = asked
    if asked is None and RECIPE not in state:
        explicit = state.get("_mixed_precision", os.environ.get(PRECISION_ENV))
    if explicit is None or str(explicit).lower() == recipe.base:
        return (asked if state else recipe.base), recipe
    warnings.warn(
        f"recipe {recipe.name!r} is requested, but mixed_precision={str(explicit)!r} is set explicitly and wins: "
        f"nothing is converted. To train with the recipe, drop it or set it to {recipe.base!r}.",
        UserWarning,
        stacklevel=3,
    )
    return asked, None


def _active(accelerator: Any) -> bool:
    """Whether a recipe may be at work: asked for, or conversion code loaded by someone (by hand, or by a callback)."""
    return getattr(accelerator, RECIPE, None) is not None or "hf_lowprec.conversion" in sys.modules


def patch_accelerator(module: Any) -> None:
    """`accelerate.accelerator`: wrap these methods of Accelerator, and the repr of AcceleratorState."""
    settle_environment()
    cls, state_cls = module.Accelerator, module.AcceleratorState
    init, prepare, prepare_model, state_repr = cls.__init__, cls.prepare, cls.prepare_model, state_cls.__repr__
    by_norm, by_value = cls.clip_grad_norm_, cls.clip_grad_value_
    signature = inspect.signature(init)

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        call = signature.bind(self, *args, **kwargs)
        asked = call.arguments.get("mixed_precision")
        precision, recipe = resolve(asked, state_cls._shared_state)
        if precision is not asked:
            call.arguments["mixed_precision"] = precision
        setattr(self, RECIPE, recipe)
        init(*call.args, **call.kwargs)
        if recipe is not None or (os.environ.get(RECIPE_ENV) and RECIPE not in state_cls._shared_state):
            setattr(self.state, RECIPE, recipe)  # None: what the script said explicitly has won

    @functools.wraps(prepare)
    def _prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _active(self):
            from hf_lowprec.integrations.accelerate_prepare import before_prepare

            args = before_prepare(self, args)
        return prepare(self, *args, **kwargs)

    @functools.wraps(prepare_model)
    def _prepare_model(
        self: Any, model: Any, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> Any:
        if _active(self):
            from hf_lowprec.integrations.accelerate_prepare import before_prepare_model

            before_prepare_model(self, model, evaluation_mode)
        return prepare_model(self, model, device_placement=device_placement, evaluation_mode=evaluation_mode)

    @functools.wraps(by_norm)
    def _clip_grad_norm_(self: Any, parameters: Any, max_norm: Any, norm_type: Any = 2) -> Any:
        if "hf_lowprec.optim" in sys.modules:  # otherwise no optimizer can be one of ours
            from hf_lowprec.integrations.accelerate_clip import clip_in_step

            parameters = _listed(parameters)
            norm = clip_in_step(self, parameters, max_norm, norm_type)
            if norm is not None:
                return norm
        return by_norm(self, parameters, max_norm, norm_type=norm_type)

    @functools.wraps(by_value)
    def _clip_grad_value_(self: Any, parameters: Any, clip_value: Any) -> Any:
        if "hf_lowprec.optim" in sys.modules:
            from hf_lowprec.integrations.accelerate_clip import apply_clips

            parameters = _listed(parameters)
            apply_clips(self, parameters)
        return by_value(self, parameters, clip_value)

    @functools.wraps(state_repr)
    def __repr__(self: Any) -> str:
        text: str = state_repr(self)
        recipe = self._shared_state.get(RECIPE)
        if recipe is None:
            return text
        line = f"Mixed precision type: {self.mixed_precision}"
        return text.replace(line, f"{line} (hf_lowprec recipe: {recipe.name})")

    cls.__init__, cls.prepare, cls.prepare_model, state_cls.__repr__ = __init__, _prepare, _prepare_model, __repr__
    cls.clip_grad_norm_, cls.clip_grad_value_ = _clip_grad_norm_, _clip_grad_value_


def _listed(parameters: Any) -> list[Any]:
    """One Parameter or several, which may come as a generator, to be gone over more than once."""
    return [parameters] if hasattr(parameters, "grad_fn") else list(parameters)


def patch_trainer(module: Any) -> None:
    """`transformers.trainer`: after `Trainer.__init__` its Accelerator knows which model is trained.

    TRL prepares a reference model right after it, and `Trainer.evaluate` before `train` prepares the policy itself
    "for evaluation"; without this line the two look alike.

    When the Trainer has its optimizer and that is one of ours, the embeddings are marked for it. And the Trainer does
    not measure the norm of gradients that gradient release has freed: it would, for its log, even where
    `max_grad_norm` is 0.
    """
    init: Callable[..., None] = module.Trainer.__init__
    create: Callable[..., Any] = module.Trainer.create_optimizer
    measure: Callable[..., Any] | None = getattr(module.Trainer, "_get_grad_norm", None)

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and _active(accelerator):
            from hf_lowprec.integrations.accelerate_prepare import meet_trainer

            meet_trainer(accelerator, self.model, self.args)

    @functools.wraps(create)
    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = create(self, *args, **kwargs)
        if "hf_lowprec.optim" in sys.modules:  # otherwise it cannot be one of ours
            from hf_lowprec.integrations.trainer_optim import mark_for

            mark_for(self, args[0] if args else kwargs.get("model"))
        return out

    def _get_grad_norm(self: Any, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None and "hf_lowprec.optim" in sys.modules:
            from hf_lowprec.optim.freed import FreedGradient

            if any(isinstance(p.grad, FreedGradient) for p in model.parameters()):
                return None
        assert measure is not None
        return measure(self, model, grad_norm=grad_norm)

    module.Trainer.__init__, module.Trainer.create_optimizer = __init__, create_optimizer
    if measure is not None:
        module.Trainer._get_grad_norm = functools.wraps(measure)(_get_grad_norm)
