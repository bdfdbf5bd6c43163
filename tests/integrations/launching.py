# SPDX-License-Identifier: Apache-2.0
"""Processes in which the import hook is live, whether or not the package is installed; a clean start in this one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from argparse import Namespace
from importlib.metadata import entry_points
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOOP = ROOT / "examples" / "accelerate_loop.py"


def hooked_path(folder: Path, package_root: Path = ROOT) -> str:
    """A PYTHONPATH on which torch finds our entry point: the installed package's, or one made in `folder`."""
    paths = [str(package_root)]
    if package_root != ROOT or not any(e.name == "hf_lowprec" for e in entry_points(group="torch.backends")):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        info = folder / f"hf_lowprec-{project['version']}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        name, version = project["name"], project["version"]
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        hook = project["entry-points"]["torch.backends"]["hf_lowprec"]
        (info / "entry_points.txt").write_text(f"[torch.backends]\nhf_lowprec = {hook}\n")
        paths.append(str(folder))
    return os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])


def launch(folder: Path, *command: str, path: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python *command` with the hook and without a GPU, in `folder`; stdout and stderr are one text."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "HF_LOWPREC_"))}
    env |= {
        "PYTHONPATH": path or hooked_path(folder), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true", **environment,
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *command], env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=280,
    )  # fmt: skip


def losses(output: str) -> list[float]:
    return [float(x) for x in re.findall(r"^step +\d+ +loss ([\d.]+)$", output, re.M)]


def parsed(*words: str) -> Namespace:
    """What `accelerate launch *words --cpu train.py` makes of its arguments, in this process."""
    from accelerate.commands import launch as accelerate_launch

    args = accelerate_launch.launch_command_parser().parse_args([*words, "--cpu", "train.py"])
    return accelerate_launch._validate_launch_command(args)[0]


def child_environment(args: Namespace) -> tuple[str, str | None]:
    """ACCELERATE_MIXED_PRECISION and HF_LOWPREC_RECIPE of the process that it would start."""
    from accelerate.utils import launch as launch_environment

    env = launch_environment.prepare_simple_launcher_cmd_env(args)[1]
    return env["ACCELERATE_MIXED_PRECISION"], env.get("HF_LOWPREC_RECIPE")
