# SPDX-License-Identifier: Apache-2.0
"""What this machine and this environment mean for low-precision training, and what is wrong with them."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

import torch

from hf_lowprec import __version__
from hf_lowprec._autoload import AUTOLOAD_ENV, RECIPE_ENV
from hf_lowprec.conversion import emulation_reason, native_problem
from hf_lowprec.describe import MX_SINCE, recipe_since
from hf_lowprec.presets import PRESETS, get_recipe
from hf_lowprec.recipe import Recipe, RecipeError

LIBRARIES = ("torch", "triton", "transformers", "accelerate", "peft", "trl")
TORCH_AUTOLOAD_ENV = "TORCH_DEVICE_BACKEND_AUTOLOAD"  # torch's own switch for the entry points that carry our hook


@dataclass(frozen=True)
class Fact:
    """One line of the diagnosis. problem: what is wrong and how to mend it, or None."""

    name: str
    value: str
    problem: str | None = None


def diagnose() -> list[Fact]:
    """Versions, GPUs, import hook, environment variables, recipes, in this order."""
    return [
        Fact("hf_lowprec", f"{__version__}, Python {platform.python_version()}"),
        *_libraries(),
        *_gpus(),
        import_hook(),
        *_variables(),
        *_recipes(),
    ]


def runs_here(recipe: Recipe) -> tuple[str, str]:
    """(`native`, `emulated` or `refused`, why) for the recipe's GEMMs on this machine."""
    if not recipe.quantises_gemms:
        return "native", "no GEMM in low precision"
    if not torch.cuda.is_available():
        return "emulated", "no NVIDIA GPU; the CPU computes the same numbers slowly"
    device = torch.device("cuda", torch.cuda.current_device())
    problem = native_problem(recipe, device)
    if problem is None:
        return "native", "MX tensor cores" if recipe_since(recipe) == MX_SINCE else "FP8 tensor cores"
    if emulation_reason(recipe, device) is not None:
        return "emulated", problem
    return "refused", f"{problem}; convert(..., emulate=True) computes the same numbers slowly"


# --- libraries ------------------------------------------------------------------------------------------------------


def _libraries() -> Iterator[Fact]:
    minimum = _minimum_versions()
    for name in LIBRARIES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Fact(name, "not installed")
            continue
        wanted = minimum.get(name)
        old = wanted is not None and _numbers(version) < _numbers(wanted)
        yield Fact(name, version, f"{name} {version} is older than {wanted}: pip install -U {name}" if old else None)


def _minimum_versions() -> dict[str, str]:
    """From our own package metadata; empty where the package is on the path but not installed."""
    try:
        requirements = metadata.requires("hf-lowprec") or []
    except metadata.PackageNotFoundError:
        return {}
    pairs = (re.match(r"([\w-]+)>=([\d.]+)", requirement) for requirement in requirements)
    return {match[1]: match[2] for match in pairs if match}


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


# --- machine --------------------------------------------------------------------------------------------------------


def _gpus() -> Iterator[Fact]:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        yield Fact("GPU", "none that torch can use" + ("" if built else " (torch is a CPU build)"))
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        fp8 = "FP8 tensor cores" if (properties.major, properties.minor) >= (8, 9) else "no FP8 tensor cores"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        yield Fact(f"GPU {index}", f"{properties.name}, sm_{properties.major}{properties.minor}, {memory}, {fp8}")


def import_hook() -> Fact:
    """Whether scripts that never import us get their recipe from `accelerate launch`."""
    name = "import hook"
    if any(type(finder).__module__ == "hf_lowprec._autoload" for finder in sys.meta_path):
        return Fact(name, "on: accelerate launch --mixed_precision takes recipe names")
    off = "off: use `hf-lowprec run --recipe NAME script.py`"
    for variable in (AUTOLOAD_ENV, TORCH_AUTOLOAD_ENV):
        if os.environ.get(variable) == "0":
            recipe = os.environ.get(RECIPE_ENV)
            problem = f"{RECIPE_ENV}={recipe} is ignored while {variable}=0: unset {variable}, or use `hf-lowprec run`"
            return Fact(name, f"{off} ({variable}=0)", problem if recipe else None)
    if not any(entry.name == "hf_lowprec" for entry in metadata.entry_points(group="torch.backends")):
        problem = "the package is on the path but not installed, so torch does not find its hook: pip install -e ."
        return Fact(name, off, problem)
    return Fact(name, off, "torch did not run the installed hook; its message at `import torch` says why")


def _variables() -> Iterator[Fact]:
    recipe = os.environ.get(RECIPE_ENV)
    problem = None
    if recipe:
        try:
            get_recipe(recipe)
        except RecipeError as error:
            problem = f"{RECIPE_ENV}: {error}"
    yield Fact(RECIPE_ENV, recipe or "not set", problem)
    yield Fact(AUTOLOAD_ENV, os.environ.get(AUTOLOAD_ENV) or "not set")


def _recipes() -> Iterator[Fact]:
    by_word: dict[str, list[str]] = {}
    for name, recipe in PRESETS.items():
        by_word.setdefault(runs_here(recipe)[0], []).append(name)
    for word, names in by_word.items():
        yield Fact(f"{word} here", ", ".join(names))
