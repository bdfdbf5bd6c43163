# SPDX-License-Identifier: Apache-2.0
"""The optimizers' kernels compile for an H100, which the interpreter cannot tell, and needs no GPU; and all that a
first step needs is compiled before its first launch.

Triton is given a driver without a GPU, in a process of its own: this file, run as a script.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

CASES: dict[str, dict[str, Any]] = {
    "8bit": {"states": "8bit"},
    "by element": {"states": "8bit", "nonfinite": "element"},
    "compact": {"states": "compact"},
    "4bit": {"states": "4bit"},
    "fp8-lm": {"states": "fp8-lm"},
    "master": {"states": "8bit", "master": "fp32", "nonfinite": "element"},
}
CLIPPED = "by the norm"
WIRED = "fp8-lm"  # gradients pass through the communication format, and amaxes are noted


def drive() -> list[tuple[str, str]]:
    """Installs a driver for one H100 that is not there; returns what it is asked to do, as it comes."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    asked: list[tuple[str, str]] = []

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            self.name = metadata.name
            asked.append(("build", self.name))

        def __call__(self, *arguments: Any) -> None:
            asked.append(("launch", self.name))

    class Driver:
        launcher_cls = Launcher
        utils = mock.Mock()

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    def load(name: str, *rest: Any) -> tuple[int, int, int, int, int]:
        asked.append(("load", name))
        return 1, 1, 64, 0, 1024

    Driver.utils.load_binary = load
    Driver.utils.get_device_properties.return_value = {"max_shared_mem": 232448}
    driver.set_active(Driver())
    return asked


def step(states: str, wired: bool, norm: bool, **options: Any) -> list[list[tuple[str, str]]]:
    """What two steps ask of the driver."""
    from hf_lowprec.kernels import launch, optimizer, wires
    from hf_lowprec.optim import AdamW, fused
    from hf_lowprec.optim.gradient import GradientQuantizer, GradientSwap
    from hf_lowprec.presets import PRESETS

    asked, cuda = drive(), torch.device("cuda", 0)
    params = [nn.Parameter(torch.zeros(n).bfloat16()) for n in (8192, 4101, 128)]
    adamw = AdamW(params, states=states, **options)
    if wired:
        communication = PRESETS["fp8-lm"].communication
        assert communication is not None
        quantizer = GradientQuantizer(communication, 3, world_size=1)
        GradientSwap(quantizer, {p: i for i, p in enumerate(params)}).attach(adamw)
        adamw.note_amax()
    kernels, out = fused.Fused(adamw), []
    with (
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", create=True),
        mock.patch.object(optimizer, "launch_all", lambda launches, device: launch.launch_all(launches, cuda)),
        mock.patch.object(optimizer, "native", lambda device: True),
        mock.patch.object(wires, "native", lambda device: True),
    ):
        for _ in range(2):
            for p in params:
                p.grad = torch.zeros_like(p)
            items = adamw._collect()
            look = kernels.look(adamw.algorithm, items, 1.0) if norm else None
            kernels.step(adamw.algorithm, items, None if look is None else look.factor, None, None, look)
            adamw._release(items)
            out.append(list(asked))
            asked.clear()
    return out


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_first_step_compiles_everything_before_it_launches_anything(case: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    own = {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, case]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)
    count = len(second)
    assert 3 <= count <= 7 and {what for what, _ in second} == {"launch"}
    # Side by side: all is compiled, launchers are built. Then one after another; launchers are in a file by now.
    assert sorted(first[:count]) == sorted(["build", name] for _, name in second)
    assert first[count:] == [[what, name] for _, name in second for what in ("build", "load", "launch")]
    assert ("observe_kernel" in [name for _, name in second]) == (case == WIRED)


@pytest.mark.slow
def test_a_step_that_clips_looks_once(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    own = {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, __file__, CLIPPED], env={**os.environ, **own}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    _, second = json.loads(done.stdout)
    assert {what for what, _ in second} == {"launch"}
    names = [name for _, name in second]
    assert names[:3] == ["amax_kernel", "norm_kernel", "prepare_kernel"]
    assert set(names[3:]) == {"step_kernel"} and len(names) <= 6


if __name__ == "__main__":
    name = sys.argv[1]
    print(json.dumps(step(wired=name == WIRED, norm=name == CLIPPED, **CASES.get(name, {"states": "8bit"}))))
