# SPDX-License-Identifier: Apache-2.0
"""Run a training script with a recipe, without the import hook:

    hf-lowprec run --recipe fp8-lm train.py --lr 1e-4
    python -m hf_lowprec.run --recipe my.yaml train.py
    torchrun --nproc_per_node 8 -m hf_lowprec.run --recipe fp8-lm -m my_package.train
    accelerate launch --multi_gpu -m hf_lowprec.run --recipe fp8-lm train.py

It sets the two environment variables that the hook would find, activates the patches whatever HF_LOWPREC_AUTOLOAD
says, and becomes the script.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence

from hf_lowprec._autoload import RECIPE_ENV, activate
from hf_lowprec.integrations.accelerate_launch import PRECISION_ENV, read_recipe


def run(recipe: str, script: str, args: Sequence[str] = (), *, module: bool = False) -> None:
    """Run `script` (a path, or a module's name with `module=True`) as `__main__` under `recipe`.

    Raises RecipeError for a bad recipe and FileNotFoundError for a missing script, both before anything runs.
    """
    text, chosen = read_recipe(recipe)
    if not module and not os.path.exists(script):
        raise FileNotFoundError(f"training script {script!r} does not exist")
    os.environ[RECIPE_ENV] = text
    os.environ[PRECISION_ENV] = chosen.base  # `accelerate launch` without --mixed_precision has written "no"
    activate()
    sys.argv = [script, *args]
    if module:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
        runpy.run_path(script, run_name="__main__")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `hf-lowprec run`; exits with status 2 and a message for a bad recipe or a missing script."""
    parser = argparse.ArgumentParser(
        prog="hf-lowprec run", description="Run a training script in low precision.", allow_abbrev=False
    )
    about = f"a recipe's name or .yaml file (default: ${RECIPE_ENV})"
    parser.add_argument("--recipe", "-r", help=about)
    parser.add_argument("-m", "--module", action="store_true", help="the script is a module's name, as in python -m")
    parser.add_argument("script", help="the training script")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="its own arguments")
    options = parser.parse_args(argv)
    recipe = options.recipe or os.environ.get(RECIPE_ENV)
    if not recipe:
        parser.error(f"name a recipe: --recipe fp8-lm, or set {RECIPE_ENV}")
    try:
        read_recipe(recipe, None if options.recipe else RECIPE_ENV)
    except ValueError as error:
        parser.error(str(error))
    if not options.module and not os.path.exists(options.script):
        parser.error(f"training script {options.script!r} does not exist")
    run(recipe, options.script, options.args, module=options.module)


if __name__ == "__main__":
    main()
