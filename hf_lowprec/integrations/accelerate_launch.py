# SPDX-License-Identifier: Apache-2.0
"""The launching side of accelerate: a recipe's name where a precision is expected.

The launcher writes `ACCELERATE_MIXED_PRECISION` into the environment of the processes it starts. A recipe becomes two
variables, `ACCELERATE_MIXED_PRECISION=<the recipe's base>` and `HF_LOWPREC_RECIPE=<the recipe>`, so that every branch
of accelerate goes on seeing a value it knows; the training side (integrations/accelerate.py) reads both.

    accelerate launch --mixed_precision fp8-lm   patch_parser (accept the word), patch_launchers (translate it)
    yaml with mixed_precision: fp8-lm            patch_launchers
    notebook_launcher(mixed_precision="fp8-lm")  patch_notebook_launcher

`PrecisionType` and the parser's own four values stay as they are.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lowprec._autoload import OWNED_BY_ACCELERATE, RECIPE_ENV, RECIPES

if TYPE_CHECKING:
    from hf_lowprec.recipe import Recipe

PRECISION_ENV = "ACCELERATE_MIXED_PRECISION"
RECIPE = "_hf_lowprec_recipe"  # attribute of the Accelerator and of AcceleratorState, which all Accelerators share


def read_recipe(text: str, said_by: str | None = None) -> tuple[str, Recipe]:
    """The value for HF_LOWPREC_RECIPE (a file as an absolute path, since scripts change directory) and the recipe.

    said_by: the variable or file that `text` comes from, where the reader of an error may not know of it.
    Raises RecipeError: unknown name (with the nearest ones), bad file.
    """
    from hf_lowprec.presets import get_recipe
    from hf_lowprec.recipe import RecipeError

    try:
        recipe = get_recipe(text)
    except RecipeError as error:
        if said_by is None:
            raise
        raise RecipeError(f"{said_by}: {error}") from None
    is_file = text.endswith((".yaml", ".yml", ".json"))
    return (str(Path(text).resolve()) if is_file else recipe.name), recipe


# --- the command line ----------------------------------------------------------------------------------------------


def _precision(text: str) -> str:
    """argparse type of `--mixed_precision`: accelerate's own four as they are, else a recipe's name or file."""
    if text in OWNED_BY_ACCELERATE:
        return text
    own = ", ".join(OWNED_BY_ACCELERATE)
    if text.lower() in OWNED_BY_ACCELERATE:
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {own} or a recipe)")
    try:
        return read_recipe(text)[0]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error} (besides recipes there are accelerate's own {own})") from None


def patch_parser(module: Any) -> None:
    """`accelerate.commands.utils`: the option `--mixed_precision` of every command takes recipes, too."""
    add_action = module.CustomArgumentGroup._add_action

    @functools.wraps(add_action)
    def _add_action(self: Any, action: argparse.Action) -> argparse.Action:
        added: argparse.Action = add_action(self, action)
        if added.dest == "mixed_precision" and tuple(added.choices or ()) == OWNED_BY_ACCELERATE:
            added.choices, added.type = None, _precision
            added.metavar = "{" + ",".join([*OWNED_BY_ACCELERATE, *RECIPES, "exmy:e<X>m<Y>"]) + "}"
        return added

    module.CustomArgumentGroup._add_action = _add_action


# --- the environment of the processes ------------------------------------------------------------------------------


def _translate(args: argparse.Namespace) -> None:
    """Split `args.mixed_precision` into the recipe (environment) and its base precision (what accelerate sees).

    A recipe named on the command line or in the yaml replaces one from the environment. Without one,
    HF_LOWPREC_RECIPE counts unless the command line itself names a precision: then both reach the training process,
    which knows what to do with a contradiction.
    """
    asked, on_command_line = str(args.mixed_precision or "no"), "mixed_precision" in getattr(args, "nondefault", ())
    file = getattr(args, "config_file", None) or "accelerate's default config file"
    said_by = "--mixed_precision" if on_command_line else f"mixed_precision in {file}"
    if asked.lower() in OWNED_BY_ACCELERATE:
        if not os.environ.get(RECIPE_ENV) or on_command_line:
            return
        asked, said_by = os.environ[RECIPE_ENV], RECIPE_ENV
    os.environ[RECIPE_ENV], recipe = read_recipe(asked, said_by)
    args.mixed_precision = recipe.base


def patch_launchers(module: Any) -> None:
    """`accelerate.utils.launch`: translate before the environment of the children is put together.

    Each of these functions copies os.environ. The SageMaker one writes a dict of its own and a TPU cannot run what we
    convert: there accelerate's "Unknown mixed_precision mode" and our refusal are the answer.
    """

    def translated(prepare: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(prepare)
        def wrapper(args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
            _translate(args)
            return prepare(args, *rest, **kwargs)

        return wrapper

    for name in ("prepare_simple_launcher_cmd_env", "prepare_multi_gpu_env", "prepare_deepspeed_cmd_env"):
        setattr(module, name, translated(getattr(module, name)))

    prepare_tpu = module.prepare_tpu

    @functools.wraps(prepare_tpu)
    def refuse_tpu(args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
        if os.environ.get(RECIPE_ENV) or str(args.mixed_precision or "no").lower() not in OWNED_BY_ACCELERATE:
            raise ValueError("hf_lowprec does not train on TPUs; use --mixed_precision bf16 and unset " + RECIPE_ENV)
        return prepare_tpu(args, *rest, **kwargs)

    module.prepare_tpu = refuse_tpu


@contextmanager
def _own_recipe() -> Iterator[None]:
    """A launch in the notebook's own process neither inherits the recipe of an earlier Accelerator nor leaves its own.

    What is set aside lies in the shared state itself, so that it goes with it when the launched function resets it.
    """
    from accelerate.state import AcceleratorState

    state, aside = AcceleratorState._shared_state, RECIPE + "_aside"
    if RECIPE in state:
        state[aside] = state.pop(RECIPE)
    try:
        yield
    finally:
        state.pop(RECIPE, None)
        if aside in state:
            state[RECIPE] = state.pop(aside)


def patch_notebook_launcher(module: Any) -> None:
    """`accelerate.launchers.notebook_launcher`.

    accelerate 1.15 writes the precision into the variable MIXED_PRECISION, which nobody reads, and only when it forks;
    so the two variables are set around the call, which forked processes inherit and a call in this process reads.
    Without `mixed_precision`, which defaults to "no", the launched function follows what the notebook has set up.
    """
    launch = module.notebook_launcher
    signature = inspect.signature(launch)

    @functools.wraps(launch)
    def notebook_launcher(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        asked, environment = call.arguments.get("mixed_precision"), {}
        if asked is None:
            return launch(*args, **kwargs)
        if str(asked).lower() not in OWNED_BY_ACCELERATE:
            text, recipe = read_recipe(str(asked))
            call.arguments["mixed_precision"] = recipe.base
            environment = {RECIPE_ENV: text, PRECISION_ENV: recipe.base}
        from accelerate.utils import patch_environment

        with patch_environment(**environment), _own_recipe():
            return launch(*call.args, **call.kwargs)

    module.notebook_launcher = notebook_launcher
    package: Any = sys.modules["accelerate"]
    if getattr(package, "notebook_launcher", None) is launch:  # we came late: the package has its name for it already
        package.notebook_launcher = notebook_launcher
