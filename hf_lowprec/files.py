# SPDX-License-Identifier: Apache-2.0
"""safetensors files: written whole or not at all, read without unpickling."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


def write(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Contiguous tensors, each with memory of its own, on the CPU. An old file stays until the new one is complete."""
    save = require().torch.save_file
    half = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save(dict(tensors), half, dict(metadata))
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors on the CPU, metadata). Raises ValueError: there is no such file, or it is none that can be read."""
    safetensors = require()
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except Exception as error:  # safetensors has an exception of its own, and the system has many
        raise ValueError(f"no readable safetensors file: {error}") from None


def require() -> Any:
    """The module, imported. Raises ImportError: it is not installed."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"this reads and writes safetensors files: pip install safetensors ({error})") from error
    return safetensors
