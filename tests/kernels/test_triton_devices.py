# SPDX-License-Identifier: Apache-2.0
"""Triton launches on the current device: what launches a kernel of its own goes to its tensor's device first."""

from __future__ import annotations

import ast
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import hf_lowprec

pytest.importorskip("triton")
KERNELS = Path(hf_lowprec.__file__).parent / "kernels" / "triton"


class OnGpu:
    def __init__(self, index: int) -> None:
        self.index = index

    def get_device(self) -> int:
        return self.index


def test_the_device_of_the_tensor_is_current_and_then_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_lowprec.kernels.triton.launch import on_its_device

    current = [0]

    @contextmanager
    def device(index: int) -> Any:
        before, current[0] = current[0], index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)

    @on_its_device
    def launch(x: torch.Tensor, factor: int, *, plus: int = 0) -> int:
        return current[0] * factor + plus

    for index in (0, 1, 3):
        assert launch(cast(torch.Tensor, OnGpu(index)), 10, plus=1) == 10 * index + 1 and current == [0]
    assert launch(torch.zeros(1), 10) == 0, "the CPU's, for the interpreter"


def test_whoever_launches_without_a_launcher_is_guarded() -> None:
    """Functions with `kernel[grid](...)` are wrapped, or called by functions of the same module that are."""
    found = 0
    for path in sorted(KERNELS.glob("*.py")):
        functions = {f.name: f for f in ast.parse(path.read_text()).body if isinstance(f, ast.FunctionDef)}
        launching = {
            name for name, f in functions.items() for node in ast.walk(f)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
            and getattr(node.func.value, "id", "").endswith("_kernel")
        }  # fmt: skip
        for name in launching:
            found += 1
            guarded = any(getattr(d, "id", "") == "on_its_device" for d in functions[name].decorator_list)
            callers = {
                other for other, f in functions.items() for node in ast.walk(f)
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == name
            }  # fmt: skip
            inner = (
                name.startswith("_")
                and callers
                and all(
                    any(getattr(d, "id", "") == "on_its_device" for d in functions[c].decorator_list) for c in callers
                )
            )
            assert guarded or inner, f"{path.name}: {name} launches on whatever device is current"
    assert found >= 5
