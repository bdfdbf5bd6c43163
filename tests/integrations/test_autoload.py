# SPDX-License-Identifier: Apache-2.0
"""The `torch.backends` hook: harmless, cheap, off when told so, gone after uninstall."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
from launching import LOOP, ROOT, hooked_path, launch, losses

from hf_lowprec import _autoload, presets


def test_static_names_are_the_recipes():
    own = set(_autoload.OWNED_BY_ACCELERATE)
    assert set(_autoload.RECIPES) == set(presets.known_names()) - own


# --- the hook alone: no torch in these processes ---------------------------------------------------------------------


def bare(code: str, **environment: str) -> str:
    """Run `code` in a process with hf_lowprec importable and nothing else done; its stdout. Fails with its stderr."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_LOWPREC_")}
    env |= {"PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_imports_the_standard_library_only():
    code = """
import sys
before = set(sys.modules)
from hf_lowprec import _autoload
_autoload.install()
new = {m.partition(".")[0] for m in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names)), sorted(m for m in sys.modules if m.startswith("hf_lowprec")))
"""
    assert bare(code).strip() == "['hf_lowprec'] ['hf_lowprec', 'hf_lowprec._autoload']"


def test_costs_less_than_a_millisecond(tmp_path):
    """Import and call, from byte code as an installed package is, best of 20 (the machine may be busy)."""
    code = """
import sys, time
import os, warnings, importlib, types, typing  # torch has loaded these long before it calls us
times = []
for _ in range(20):
    for name in ("hf_lowprec", "hf_lowprec._autoload"):
        sys.modules.pop(name, None)
    sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "_Finder"]
    start = time.perf_counter()
    from hf_lowprec import _autoload
    _autoload.install()
    times.append(time.perf_counter() - start)
print(min(times))
"""
    cached = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    assert float(bare(code, **cached)) < 1e-3


def test_off_switch():
    code = """
import sys
from hf_lowprec import _autoload
_autoload.install()
print([type(f).__name__ for f in sys.meta_path].count("_Finder"))
_autoload.activate(); _autoload.activate()
print([type(f).__name__ for f in sys.meta_path].count("_Finder"))
"""
    assert bare(code, HF_LOWPREC_AUTOLOAD="0").split() == ["0", "1"]
    assert bare(code).split() == ["1", "1"]


def test_a_recipe_that_the_off_switch_leaves_unused_is_said_once():
    torch = "import sys; sys.modules['torch'] = sys; from hf_lowprec import _autoload; _autoload.install()"
    both = {"HF_LOWPREC_AUTOLOAD": "0", "HF_LOWPREC_RECIPE": "fp8-lm"}
    said = bare(f"{torch}; _autoload.install()", **both)
    assert said.count("\n") == 1 and "trains WITHOUT HF_LOWPREC_RECIPE=fp8-lm; unset HF_LOWPREC_AUTOLOAD" in said
    for one in both:
        assert bare(torch, **{one: both[one]}) == ""
    assert bare(f"from hf_lowprec import _autoload; _autoload.activate(); {torch}", **both) == ""  # `hf-lowprec run`
    for stderr in ("None", "open(__import__('os').devnull)"):  # none, and one that cannot be written
        assert bare(f"import sys; sys.stderr = {stderr}; {torch}", **both) == ""


def test_a_script_that_trains_without_its_recipe_says_so(tmp_path):
    done = launch(tmp_path, "-c", "import torch", HF_LOWPREC_AUTOLOAD="0", HF_LOWPREC_RECIPE="fp8-lm")
    assert done.returncode == 0 and done.stdout.count("trains WITHOUT HF_LOWPREC_RECIPE=fp8-lm") == 1, done.stdout
    run = ("-m", "hf_lowprec.cli", "run", str(LOOP), "--steps", "2")
    done = launch(tmp_path, *run, HF_LOWPREC_AUTOLOAD="0", HF_LOWPREC_RECIPE="fp8-lm")
    assert done.returncode == 0 and "WITHOUT" not in done.stdout and "converted 14 of 15" in done.stdout, done.stdout


@pytest.mark.parametrize(
    "sabotage",
    [
        "sys.meta_path = ()",
        "sys.meta_path = None",
        "sys.meta_path.insert(0, object())",
        "_autoload.PATCHES = None",
        "_autoload._Finder = None",
        "sys.meta_path = (); sys.stderr = None",
        "sys.meta_path = (); sys.stderr.close()",
        "os.environ = None",
        "warnings.simplefilter('error'); sys.modules['accelerate.accelerator'] = os",
    ],
)
def test_install_never_raises(sabotage: str):
    code = f"""
import importlib, os, sys, warnings
from hf_lowprec import _autoload
{sabotage}
_autoload.install()
os.write(1, b"alive")
"""
    assert bare(code).startswith("alive")


# --- the finder, on modules made for it ------------------------------------------------------------------------------


@pytest.fixture
def playground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `pg` with the modules `a` and `b`; `pg_hook.patch` marks the module that it is called with."""
    package = tmp_path / "pg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("value = 1\n")
    (package / "b.py").write_text("value = 2\n")
    (tmp_path / "pg_hook.py").write_text("def patch(module):\n    module.calls = getattr(module, 'calls', 0) + 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(_autoload, "PATCHES", {"pg.a": ("pg_hook:patch",)})
    monkeypatch.setattr(_autoload, "_patched", set())
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if type(f).__name__ != "_Finder"])
    monkeypatch.delenv(_autoload.RECIPE_ENV, raising=False)
    yield tmp_path
    for name in [n for n in sys.modules if n.partition(".")[0] in ("pg", "pg_hook")]:
        del sys.modules[name]


def imported(name: str) -> ModuleType:
    __import__(name)
    return sys.modules[name]


def test_patches_after_execution_and_nothing_else(playground):
    _autoload.activate()
    assert imported("pg.a").calls == 1
    assert not hasattr(imported("pg.b"), "calls")
    assert find_spec("pg.a").loader.get_source("pg.a") == "value = 1\n"
    _autoload.activate()
    assert imported("pg.a").calls == 1


def test_patches_what_is_imported_already(playground):
    assert not hasattr(imported("pg.a"), "calls")
    _autoload.activate()
    assert imported("pg.a").calls == 1


def test_patches_a_module_that_was_half_imported(playground):
    """accelerate.accelerator imports torch, which calls us: the module must be patched when it has finished."""
    (playground / "pg" / "a.py").write_text(
        "from hf_lowprec import _autoload\n_autoload.activate()\nimport pg.b\nearly = 'calls' in globals()\n"
    )
    module = imported("pg.a")
    assert not module.early and not hasattr(module, "calls")
    with pytest.raises(ImportError):
        imported("pg.none")  # any import that reaches the finders
    assert module.calls == 1


def test_a_broken_patch_warns_and_the_module_lives(playground):
    (playground / "pg_hook.py").write_text("raise RuntimeError('broken')\n")
    _autoload.activate()
    with pytest.warns(RuntimeWarning, match="could not patch pg.a .*broken"):
        assert imported("pg.a").value == 1


def test_a_broken_patch_is_an_error_if_a_recipe_is_requested(playground, monkeypatch):
    monkeypatch.setenv(_autoload.RECIPE_ENV, "fp8-lm")
    (playground / "pg_hook.py").write_text("raise ImportError('broken')\n")
    _autoload.activate()
    with pytest.raises(_autoload.PatchError, match="HF_LOWPREC_RECIPE=fp8-lm would be ignored"):
        imported("pg.a")


@pytest.mark.parametrize("first", [True, False])
def test_lives_with_another_delegating_finder(playground, first):
    class Delegating:
        def find_spec(self, name, path=None, target=None):
            for finder in sys.meta_path:
                if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                    return spec
            return None

    if first:
        sys.meta_path.insert(0, Delegating())
    _autoload.activate()
    if not first:
        sys.meta_path.insert(0, Delegating())
    assert imported("pg.a").calls == 1


def test_a_finder_that_raises_is_not_our_problem(playground):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            raise LookupError("broken finder")

    sys.meta_path.insert(0, Broken())
    _autoload.activate()
    with pytest.raises(LookupError, match="broken finder"):
        imported("pg.a")


# --- with torch ------------------------------------------------------------------------------------------------------


def test_import_torch_survives_a_broken_package(tmp_path):
    """The recipes and the integrations do not import: plain bf16 work goes on, a requested recipe is refused."""
    copy = tmp_path / "broken"
    shutil.copytree(ROOT / "hf_lowprec", copy / "hf_lowprec", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "hf_lowprec" / "recipe" / "__init__.py").write_text("raise RuntimeError('broken recipe module')\n")
    code = """
import torch, sys
assert any(type(f).__name__ == "_Finder" for f in sys.meta_path)
from accelerate import Accelerator
print(Accelerator(mixed_precision="bf16").mixed_precision)
import os
os.environ["HF_LOWPREC_RECIPE"] = "fp8-lm"
try:
    Accelerator()
except RuntimeError as error:
    print("refused:", error)
"""
    path = hooked_path(tmp_path, copy)
    done = launch(tmp_path, "-c", code, path=path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-2:] == ["bf16", "refused: broken recipe module"]


def test_our_own_classes_first(tmp_path):
    """`from hf_lowprec import ...` imports transformers.trainer, whose hook would import our half-imported module."""
    code = "import torch; from hf_lowprec import LowPrecTrainingArguments, LowPrecConfig; print('fine')"
    done = launch(tmp_path, "-W", "error::RuntimeWarning", "-c", code, HF_LOWPREC_RECIPE="fp8-lm")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "fine", done.stdout


# --- installed -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that sees this one's packages, except an installed hf_lowprec; its python."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    where = "import site; print(site.getsitepackages()[0])"
    site = Path(subprocess.check_output([python, "-c", where], text=True).strip())
    ours = next(Path(p) for p in sys.path if (Path(p) / "torch").is_dir())
    for entry in ours.iterdir():
        name = entry.name.lower()
        if "hf_lowprec" not in name and not name.startswith(("pip", "setuptools")):
            target = site / entry.name
            if not target.exists():
                target.symlink_to(entry)
    return python


def in_environment(python: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "HF_LOWPREC_", "PYTHON"))}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [str(python), *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400,
        cwd=python.parent,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_installed_and_gone_after_uninstall(kind: str, environment: Path, tmp_path: Path):
    source = tmp_path / "source"  # builds leave files behind
    for name in ("hf_lowprec", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    pip = ("-m", "pip", "--disable-pip-version-check")
    if kind == "wheel":
        build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path))
        built = in_environment(environment, *build, str(source))
        assert built.returncode == 0, built.stdout
        what = [str(next(tmp_path.glob("*.whl")))]
    else:
        what = ["--no-build-isolation", "-e", str(source)]
    install = in_environment(environment, *pip, "install", "--no-deps", "--no-index", *what)
    assert install.returncode == 0, install.stdout

    command = ("-m", "accelerate.commands.launch", "--cpu", "--mixed_precision", "fp8-lm", str(LOOP), "--steps", "12")
    trained = in_environment(environment, *command)
    assert trained.returncode == 0, trained.stdout
    assert "recipe fp8-lm: converted 14 of 15 linears" in trained.stdout
    assert losses(trained.stdout)[-1] < losses(trained.stdout)[0]

    assert in_environment(environment, *pip, "uninstall", "-y", "hf-lowprec").returncode == 0
    left = [p.name for p in (environment.parent.parent / "lib").rglob("*hf_lowprec*")]
    assert not left
    code = "import sys, torch; print([type(f).__name__ for f in sys.meta_path].count('_Finder'))"
    gone = in_environment(environment, "-c", code)
    assert gone.returncode == 0 and gone.stdout.split()[-1] == "0", gone.stdout
    refused = in_environment(environment, *command)
    assert refused.returncode == 2 and "invalid choice: 'fp8-lm'" in refused.stdout
