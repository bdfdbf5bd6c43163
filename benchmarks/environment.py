# SPDX-License-Identifier: Apache-2.0
"""The conditions under a number: versions, hardware, source and command. Every benchmark stores `environment()`."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
LIBRARIES = (
    "torch", "triton", "transformers", "accelerate", "peft", "torchao", "liger-kernel", "numpy", "bitsandbytes",
    "flashoptim",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """JSON-ready; a value that this machine cannot tell is None. Holds no host name and no absolute path."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command(),
        **source(),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        **gpu(),
        "cpu": cpu(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def command() -> str:
    """The command line, seen from the repository; of paths outside it only the last part is kept."""

    def portable(argument: str) -> str:
        option, sign, value = argument.rpartition("=")
        path = Path(value)
        if not path.is_absolute():
            return argument
        inside = path.is_relative_to(REPOSITORY)
        return f"{option}{sign}{path.relative_to(REPOSITORY) if inside else path.name}"

    script = Path(sys.argv[0]).resolve()
    return " ".join(["python", *map(portable, [str(script), *sys.argv[1:]])])


def source() -> dict[str, Any]:
    """Commit and dirty flag where git answers, and always a hash of the package's source.

    A machine that got the tree without its history is told the commit by HF_LOWPREC_COMMIT, which wins over git: what
    git says of a copied tree is the state of the copy. Of dirt it is told nothing, `package_sha256` proves the source.
    """
    digest = hashlib.sha256()
    for path in sorted((REPOSITORY / "hf_lowprec").rglob("*.py")):
        digest.update(path.relative_to(REPOSITORY).as_posix().encode() + b"\0" + path.read_bytes())
    status = _output("git", "-C", str(REPOSITORY), "status", "--porcelain", "--untracked-files=no")
    told = os.environ.get("HF_LOWPREC_COMMIT")
    return {
        "commit": told or _output("git", "-C", str(REPOSITORY), "rev-parse", "--verify", "-q", "HEAD"),
        "dirty": None if told or status is None else bool(status),
        "package_sha256": digest.hexdigest(),
    }


def gpu() -> dict[str, Any]:
    """Name, memory and count from torch, driver from nvidia-smi."""
    import torch

    if not torch.cuda.is_available():
        return {"gpu": None, "gpu_count": 0, "gpu_memory_gib": None, "driver": None, "cuda": torch.version.cuda}
    properties = torch.cuda.get_device_properties(0)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": properties.name,
        "gpu_count": torch.cuda.device_count(),
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
    }


def cpu() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else None


def _output(*arguments: str) -> str | None:
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    import json

    print(json.dumps(environment(), indent=1))
