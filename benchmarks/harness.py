# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks that train share: the model, the entry into Accelerate, one process per case, JSON results.

A case is a dict of settings plus what was measured. It runs in its own process, because a process can hold only one
Accelerator, one allocator history and one patched library. A finished case is reused as long as its settings, the GPU
and, for candidates, the package's source are the same.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from environment import REPOSITORY, environment

BASELINE = "bf16"  # stock accelerate: fp32 weights, bf16 autocast, torch's AdamW in fp32
RESULTS = REPOSITORY / "benchmarks" / "results"
SCRATCH = REPOSITORY / "outputs" / "benchmarks"


def parse_recipe(text: str) -> tuple[str, str]:
    """`fp8-lm@bf16` -> ("fp8-lm", "bf16"): the recipe, and the dtype that the weights are loaded in (fp32)."""
    name, _, dtype = text.partition("@")
    if dtype not in ("", "fp32", "bf16"):
        raise SystemExit(f"{text!r}: weights are loaded in fp32 or bf16")
    return name, dtype or "fp32"


def file_name(recipe: str) -> str:
    return re.sub(r"[^\w.-]", "_", recipe)


def make_accelerator(recipe: str, device: str = "cuda", **options: Any) -> Any:
    """`Accelerator(mixed_precision=recipe)`, as in a user's script. The baseline's process never sees hf_lowprec."""
    if recipe not in (BASELINE, "no"):
        from hf_lowprec import _autoload

        _autoload.activate()
    from accelerate import Accelerator

    return Accelerator(mixed_precision=recipe, cpu=device == "cpu", **options)


def build_llama(seed: int, dtype: str, device: str = "cpu", **config: Any) -> Any:
    """Random-initialised LlamaForCausalLM, untied. On the CPU the seed gives the same weights everywhere."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        model = LlamaForCausalLM(
            LlamaConfig(tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa", **config)
        )
    return model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])


def report_of(accelerator: Any, model: Any) -> Any:
    """The conversion report. Raises SystemExit if the recipe never reached the model."""
    from hf_lowprec.conversion import report_of

    report = report_of(accelerator.unwrap_model(model))
    if report is None:
        raise SystemExit("the model was not converted: the recipe did not reach Accelerator.prepare")
    return report


def peak_gib() -> float | None:
    import torch

    return round(torch.cuda.max_memory_allocated() / 2**30, 3) if torch.cuda.is_available() else None


# --- cases ---------------------------------------------------------------------------------------------------------


def start(script: str, case: dict[str, Any], target: Path, gpu: int | None = None) -> subprocess.Popen:
    """Run `script --worker <case>` in a fresh process, which sees GPU number `gpu` only; it writes to `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    environ.pop("HF_LOWPREC_RECIPE", None)
    if gpu is not None:
        visible = list(filter(None, environ.get("CUDA_VISIBLE_DEVICES", "").split(",")))
        environ["CUDA_VISIBLE_DEVICES"] = visible[gpu] if visible else str(gpu)
    environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # several processes share one memory
    order = json.dumps({"case": case, "target": str(target)})
    return subprocess.Popen([sys.executable, script, "--worker", order], env=environ)


def finish(order: dict[str, Any], measured: dict[str, Any]) -> None:
    """Store a worker's result beside its settings and its conditions (the command is the parent's, not stored)."""
    conditions = environment()
    conditions.pop("command")
    Path(order["target"]).write_text(json.dumps({**order["case"], **measured, "environment": conditions}))


def reusable(case: dict[str, Any], settings: dict[str, Any], here: dict[str, Any], any_source: bool = False) -> bool:
    """Whether a stored case answers for `settings` on this machine; a candidate needs the same package source too."""
    if any(case.get(key) != value for key, value in settings.items()):
        return False
    there = case["environment"]
    candidate = parse_recipe(case["recipe"])[0] != BASELINE
    same_source = any_source or not candidate or there["package_sha256"] == here["package_sha256"]
    return there["gpu"] == here["gpu"] and installed(there) == installed(here) and same_source


def installed(conditions: dict[str, Any]) -> dict[str, str]:
    """Versions of what is there: which absent libraries are listed, too, changes with the benchmarks."""
    return {name: version for name, version in conditions["libraries"].items() if version is not None}


def read_cases(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["cases"] if path.is_file() else []


def write_results(path: Path, data: dict[str, Any]) -> None:
    """One line per case, so that a diff shows which changed; replaced in one move, so that a kill leaves the old."""
    cases = ",\n".join(json.dumps(case, separators=(",", ":")) for case in data["cases"])
    head = json.dumps({**data, "cases": []}, indent=1).removesuffix("[]\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(f"{head}[\n{cases}\n]}}\n")
    fresh.replace(path)
