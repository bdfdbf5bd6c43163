# SPDX-License-Identifier: Apache-2.0
"""Importing the package costs nothing: heavy libraries load on first use of a name that needs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "triton", "transformers", "accelerate", "trl", "peft", "numpy", "pydantic", "yaml", "rich", "typer")


def python(code: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_nothing_heavy() -> None:
    code = f"import sys, hf_lowprec; dir(hf_lowprec); print([m for m in {HEAVY} if m in sys.modules])"
    assert python(code) == "[]"


@pytest.mark.parametrize("module", ["formats", "_autoload"])
def test_modules_of_the_standard_library_only(module: str) -> None:
    assert python(f"import sys, hf_lowprec.{module}; print([m for m in {HEAVY} if m in sys.modules])") == "[]"


def test_recipes_need_no_torch() -> None:
    code = "import sys, hf_lowprec; hf_lowprec.PRESETS['fp8-lm'].to_yaml(); print('torch' in sys.modules)"
    assert python(code) == "False"


def test_convert_needs_neither_transformers_nor_triton() -> None:
    code = """
import sys, torch, hf_lowprec
model = torch.nn.Sequential(torch.nn.Linear(32, 32))
hf_lowprec.convert(model, "fp8-lm")
model(torch.ones(2, 32)).sum().backward()
print([m for m in ("triton", "transformers", "accelerate", "trl", "peft") if m in sys.modules])
"""
    assert python(code) == "[]"


def test_convert_registers_the_gpu_kernels() -> None:
    """Without them, CUDA tensors would quietly run the emulation."""
    code = """
import torch, hf_lowprec
hf_lowprec.convert
print([torch._C._dispatch_has_kernel_for_dispatch_key(f"hf_lowprec::{n}", "CUDA") for n in ("quantize", "scaled_mm")])
"""
    assert python(code) == "[True, True]"


def test_every_public_name_resolves() -> None:
    """Those of the integrations by their source: importing a Trainer takes as long as all other tests here."""
    import hf_lowprec

    for name, module in hf_lowprec._EXPORTS.items():
        if module.startswith("integrations."):
            assert name in (ROOT / "hf_lowprec" / f"{module.replace('.', '/')}.py").read_text()
        else:
            assert getattr(hf_lowprec, name) is not None
    assert set(hf_lowprec.__all__) <= set(dir(hf_lowprec))
    assert callable(hf_lowprec.convert) and hf_lowprec.optim.AdamW.__name__ == "AdamW"


def test_unknown_names() -> None:
    import hf_lowprec

    with pytest.raises(AttributeError, match="module 'hf_lowprec' has no attribute 'covert'"):
        _ = hf_lowprec.covert
