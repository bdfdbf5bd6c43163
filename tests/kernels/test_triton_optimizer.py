# SPDX-License-Identifier: Apache-2.0
"""The optimizers' kernels in Triton's interpreter, on any machine: bit for bit what `optim/algorithms.py` gives.

The interpreter must be chosen before Triton is imported, and would then run everybody's kernels. So the cases run in a
process of their own, one for the whole file, which is told their names; it is this file, run as a script.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

B, F, H = torch.bfloat16, torch.float32, torch.float16
STATES = ("8bit", "fp32", "fp8-lm", "compact", "bf16", "fp8", "4bit")
DTYPES = {"bf16": B, "fp32": F, "fp16": H}

# Name of the case: arguments of `check`. Tensors of fewer than 4096 elements have float32 moments; 4100 is no multiple
# of 8 or of a block; 4608 is one of 512 and of nothing more.
CASES: dict[str, dict[str, Any]] = {
    **{f"AdamW {s} {name}": {"states": s, "dtypes": [dtype]} for s in STATES for name, dtype in DTYPES.items()},
    **{f"master {m}": {"states": "8bit", "master": m} for m in ("fp32", "fp16-scaled", "bf16+8", "bf16+16", None)},
    "master fp32 beside fp16": {"states": "fp32", "master": "fp32", "dtypes": [H]},
    "mixed dtypes and groups": {"sizes": [4100, 1, 17, 0], "dtypes": [B, F], "groups": True},
    "clip": {"clip": 0.37},
    "clip fp8-lm": {"states": "fp8-lm", "clip": 0.37},
    "clip that is NaN": {"clip": float("nan")},
    "one NaN": {"spoil": 1},
    "one NaN fp8-lm": {"states": "fp8-lm", "spoil": 1},
    "by element": {"spoil": 1, "nonfinite": "element", "dtypes": [B, F]},
    "by element compact": {"states": "compact", "spoil": 1, "nonfinite": "element"},
    "not contiguous": {"strided": True},
    "not aligned": {"skew": True},
    "maximize": {"maximize": True},
    "lr is a tensor": {"states": "fp8-lm", "lr": torch.tensor(1e-3)},
    "small eps": {"states": "fp8-lm", "eps": 1e-30},
    "betas of 0": {"betas": (0.0, 0.0)},
    "Adam L2": {"make": "Adam", "weight_decay": 0.1},
    "Adam L2 fp8-lm": {"make": "Adam", "states": "fp8-lm", "weight_decay": 0.1},
    **{f"Lion {s}": {"make": "Lion", "states": s, "sizes": [4100, 33]} for s in STATES},
    **{f"StableAdamW {s}": {"make": "StableAdamW", "states": s, "sizes": [4100, 33]} for s in STATES},
    **{
        f"SGD {s}": {"make": "SGD", "states": s, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01, "lr": 0.1}
        for s in STATES
    },
    "SGD nesterov": {"make": "SGD", "momentum": 0.9, "nesterov": True, "lr": 0.1},
    "SGD nesterov fp8-lm": {"make": "SGD", "states": "fp8-lm", "momentum": 0.9, "nesterov": True, "lr": 0.1},
    "SGD plain": {"make": "SGD", "lr": 0.1, "weight_decay": 0.1},
    "SGD plain fp8-lm": {"make": "SGD", "states": "fp8-lm", "lr": 0.1, "weight_decay": 0.1},
}
CASES["AdamW compact fp16"]["master"] = "sr"  # a residual needs bfloat16
QUICK = (
    *(f"AdamW {s} bf16" for s in STATES), "AdamW 8bit fp32", "AdamW 8bit fp16", "master bf16+16",
    "mixed dtypes and groups", "clip", "one NaN", "by element", "not contiguous", "not aligned", "Adam L2",
    "Lion 8bit", "StableAdamW 8bit", "SGD 8bit", "SGD plain",
)  # fmt: skip


# --- the process that interprets ------------------------------------------------------------------------------------


def patch_interpreter() -> None:
    """Loops over loaded bounds, float32 to bfloat16 to nearest (Triton 3.6), masks that are no bools (3.9)."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor, convert = interpreter._patch_lang_tensor, interpreter._convert_float

    def with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def to_nearest(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(values)).to(B)
            return rounded.view(torch.int16).numpy().view(np.uint16)
        return convert(values, source, target, mode)

    interpreter._patch_lang_tensor, interpreter._convert_float = with_index, to_nearest

    builder = interpreter.InterpreterBuilder

    def with_bools(method: Any, place: int) -> Any:
        def call(self: Any, *args: Any) -> Any:
            args[place].data = args[place].data.astype(bool)
            return method(self, *args)

        return call

    builder.create_masked_load = with_bools(builder.create_masked_load, 1)
    builder.create_masked_store = with_bools(builder.create_masked_store, 2)


def parameters(
    sizes: list[int], dtypes: list[torch.dtype], *, strided: bool = False, skew: bool = False
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    out = []
    for size in sizes:
        values = torch.randn(size + skew, generator=generator) * 0.02
        out += [nn.Parameter(values.to(dtype)[int(skew) :]) for dtype in dtypes]
    if strided:
        out.append(nn.Parameter((torch.randn(65, 70, generator=generator) * 0.02).to(dtypes[0]).t()))
    return out


def set_gradients(params: list[nn.Parameter], step: int, spoil: int | None) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        grad = torch.randn(p.shape, generator=generator) * 0.01
        p.grad = (grad * 10.0 ** torch.randn(p.shape, generator=generator)).to(p.dtype)
    if spoil == step:
        params[0].grad.view(-1)[5] = float("nan")
        params[-1].grad.view(-1)[3] = float("inf")


def check(
    make: str = "AdamW", states: str = "8bit", *, sizes: list[int] | None = None,
    dtypes: list[torch.dtype] | None = None, clip: float | None = None, spoil: int | None = None,
    groups: bool = False, strided: bool = False, skew: bool = False, **options: Any,
) -> None:  # fmt: skip
    """Two steps of the truth and of the kernels; AssertionError names what differs."""
    from hf_lowprec import optim
    from hf_lowprec.optim import fused

    sets = []
    for _ in range(2):
        params = parameters(sizes or [4608, 4100], dtypes or [B], strided=strided, skew=skew)
        halves: list[Any] = [{"params": params[::2], "weight_decay": 0.0}, {"params": params[1::2], "lr": 3e-3}]
        sets.append((params, getattr(optim, make)(halves if groups else params, states=states, **options)))
    kernels = fused.Fused(sets[1][1])
    factor = None if clip is None else torch.tensor(clip)
    for step in range(2):
        for params, _ in sets:
            set_gradients(params, step, spoil)
        sets[0][1].step(clip=factor)
        optimizer = sets[1][1]
        items = optimizer._collect()
        kernels.step(optimizer.algorithm, items, factor, None)
        optimizer._release(items)
        compare(*sets, where=f"step {step}")


def compare(truth: Any, found: Any, where: str) -> None:
    for i, (a, b) in enumerate(zip(truth[0], found[0], strict=True)):
        theirs, ours = {"param": a, **truth[1].state[a]}, {"param": b, **found[1].state[b]}
        assert theirs.keys() == ours.keys()
        for name, x in theirs.items():
            x, y = x.detach().contiguous(), ours[name].detach().contiguous()
            integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]
            wrong = (x.view(integer) != y.view(integer)).flatten().nonzero().flatten()
            assert not len(wrong), (
                f"{where}, tensor {i} {tuple(a.shape)} {a.dtype}, {name}: {len(wrong)} of {x.numel()} differ, "
                f"at {wrong[:3].tolist()}: {y.float().flatten()[wrong[:3]].tolist()}, "
                f"not {x.float().flatten()[wrong[:3]].tolist()}"
            )
    for name in ("skipped_steps", "skipped_elements"):
        assert int(getattr(truth[1], name)) == int(getattr(found[1], name)), f"{where}: {name}"


def serve() -> None:
    """Reads names of cases, answers with an error or null, until there is no more input."""
    patch_interpreter()
    torch.set_num_threads(1)
    for line in sys.stdin:
        error = None
        try:
            check(**CASES[json.loads(line)])
        except Exception:
            error = traceback.format_exc()
        print(json.dumps(error), flush=True)


# --- the tests ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[[str], str | None]]:
    """Runs a case in the interpreter; its error, or None."""
    pytest.importorskip("triton")
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    command = [sys.executable, __file__]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def ask(name: str) -> str | None:
            process.stdin.write(json.dumps(name) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            return json.loads(answer) if answer else f"the interpreting process died: {process.wait()}"

        yield ask
        process.stdin.close()


@pytest.mark.parametrize(
    "case", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_kernels_give_the_bits_of_the_truth(interpreted: Callable[[str], str | None], case: str) -> None:
    error = interpreted(case)
    assert error is None, error


def test_every_quick_case_exists() -> None:
    assert set(QUICK) <= CASES.keys()


if __name__ == "__main__":
    serve()
