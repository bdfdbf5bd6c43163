# SPDX-License-Identifier: Apache-2.0
"""The hook that lets `accelerate launch --mixed_precision fp8-lm` work in scripts that never import us.

torch calls every entry point of the group `torch.backends` at the end of `import torch`; ours is `install`. It puts
one finder on `sys.meta_path` and returns. When one of the few modules in `PATCHES` has been executed, the finder
imports the integration that belongs to it and hands the module over. A process that imports neither accelerate nor
transformers' Trainer never loads more of us than this file.

An exception inside a `torch.backends` entry point turns `import torch` into a RuntimeError, so this file uses the
standard library only and `install` never raises. `HF_LOWPREC_AUTOLOAD=0` turns it off, which is said on stderr if a
recipe is requested; `activate` (called by `hf-lowprec run` and by our Trainer classes) works all the same. See
docs/autoload.md.
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

RECIPE_ENV = "HF_LOWPREC_RECIPE"
AUTOLOAD_ENV = "HF_LOWPREC_AUTOLOAD"

# Values of --mixed_precision that stay accelerate's, and the recipe names beside them. Written out because importing
# hf_lowprec.recipe would cost what this file must not; a test compares them with hf_lowprec.recipe.
OWNED_BY_ACCELERATE = ("no", "fp16", "bf16", "fp8")
RECIPES = (
    "bf16-sr", "fp8-lm", "fp8-lm-o1", "fp8-lm-o2", "fp8-lm-o3", "te-delayed", "te-current", "fp8-amax", "fp8-cscale",
    "mxfp8", "mxfp6", "mxfp6-e2m3", "mxfp4", "mxint8", "hfp8", "fp8-chunked", "sr-mac", "bitnet", "bitnet-b1.58",
    "switchback", "switchback-m", "switchback-q", "unit-scaling", "u-mup", "fp8-flex",
)  # fmt: skip

# module -> functions "module:name" that are called with it once it has been executed
PATCHES: dict[str, tuple[str, ...]] = {
    "accelerate.accelerator": ("hf_lowprec.integrations.accelerate:patch_accelerator",),
    "accelerate.commands.utils": ("hf_lowprec.integrations.accelerate_launch:patch_parser",),
    "accelerate.utils.launch": ("hf_lowprec.integrations.accelerate_launch:patch_launchers",),
    "accelerate.launchers": ("hf_lowprec.integrations.accelerate_launch:patch_notebook_launcher",),
    "transformers.trainer": ("hf_lowprec.integrations.accelerate:patch_trainer",),
}
# the same, but only in a process for which a recipe is requested: these import torch-side code of ours
PATCHES_ON_REQUEST: dict[str, tuple[str, ...]] = {
    "transformers.trainer": ("hf_lowprec.integrations.trainer:install",),
}

_patched: set[str] = set()
_said: list[str] = []  # the recipe that the off switch leaves unused, once the user has been told


class PatchError(RuntimeError):
    """A recipe is requested, but the library it should act on could not be patched.

    No ImportError: those are often swallowed as "optional dependency is missing".
    """


def _apply(module: ModuleType) -> None:
    """Patch `module`, once. A failure is an error if a recipe is requested, otherwise a warning."""
    name = module.__name__
    if name in _patched:
        return
    _patched.add(name)
    requested = os.environ.get(RECIPE_ENV)
    for target in PATCHES[name] + (PATCHES_ON_REQUEST.get(name, ()) if requested else ()):
        where, _, function = target.partition(":")
        if where in sys.modules and _executed(where) is None:
            continue  # it is importing `module` itself, and installs itself when it is done
        try:
            getattr(import_module(where), function)(module)
        except Exception as error:
            message = f"hf_lowprec could not patch {name} ({type(error).__name__}: {error})"
            if requested:
                raise PatchError(f"{message}, so {RECIPE_ENV}={requested} would be ignored") from error
            warnings.warn(f"{message}; low-precision recipes are not available", RuntimeWarning, stacklevel=2)


def _executed(name: str) -> ModuleType | None:
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    return None if spec is None or getattr(spec, "_initializing", False) else module


class _Finder:
    """Finds nothing itself: it asks the finders behind it and listens for the end of the module's execution."""

    def __init__(self) -> None:
        self.late: set[str] = set()  # modules that were half imported when torch called us
        self.busy: set[str] = set()  # guards against another delegating finder that asks us back

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if self.late:
            self.patch_late()
        if name not in PATCHES or name in _patched or name in self.busy:
            return None
        self.busy.add(name)
        try:
            return _listen(self.ask_others(name, path, target))
        except PatchError:
            raise
        except Exception:
            return None  # whoever comes next on sys.meta_path meets the same problem and words it better
        finally:
            self.busy.discard(name)

    def ask_others(self, name: str, path: Any, target: ModuleType | None) -> ModuleSpec | None:
        for finder in list(sys.meta_path):
            if finder is not self:
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    return spec
        return None

    def patch_late(self) -> None:
        for name in list(self.late):
            module = _executed(name)
            if module is not None:
                self.late.discard(name)
                _apply(module)


def _listen(spec: ModuleSpec | None) -> ModuleSpec | None:
    """Have the spec's own loader call `_apply` after it has executed the module."""
    loader: Any = None if spec is None else spec.loader
    if loader is not None:
        exec_module = loader.exec_module

        def execute(module: ModuleType) -> None:
            exec_module(module)
            if module.__name__ in PATCHES:  # a zip importer is one loader for many modules
                _apply(module)

        loader.exec_module = execute
    return spec


def activate() -> None:
    """Install the finder and patch what is imported already. Idempotent; does not read HF_LOWPREC_AUTOLOAD."""
    finder = next((f for f in sys.meta_path if isinstance(f, _Finder)), None)
    if finder is None:
        finder = _Finder()
        sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
    finder.late.update(name for name in PATCHES if name in sys.modules and name not in _patched)
    finder.patch_late()


def _warn_of_ignored_recipe() -> None:
    """Training without the recipe that the environment names must not happen silently. Said once.

    Said when torch calls, not when the package is imported before torch: `hf-lowprec run` has activated us by then.
    """
    recipe = os.environ.get(RECIPE_ENV)
    if not recipe or _said or "torch" not in sys.modules or any(isinstance(f, _Finder) for f in sys.meta_path):
        return
    _said.append(recipe)
    sys.stderr.write(
        f"hf_lowprec: {AUTOLOAD_ENV}=0, so a script that does not import hf_lowprec trains WITHOUT "
        f"{RECIPE_ENV}={recipe}; unset {AUTOLOAD_ENV}, or start it with `hf-lowprec run`\n"
    )


def install() -> None:
    """Entry point of the group `torch.backends`. Never raises."""
    try:
        if os.environ.get(AUTOLOAD_ENV) != "0":
            activate()
        else:
            _warn_of_ignored_recipe()
    except Exception as error:
        try:
            sys.stderr.write(f"hf_lowprec: the import hook is off ({type(error).__name__}: {error})\n")
        except Exception:
            pass  # stderr may be None or closed; not a reason to break `import torch`
