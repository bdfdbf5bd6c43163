# SPDX-License-Identifier: Apache-2.0
"""Kernels in Triton's interpreter: a process of their own, as triton decides at import; and what it does wrongly."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch


def environment(**more: str) -> dict[str, str]:
    """Variables for a process that imports what this one does and interprets its kernels, on one thread."""
    path = os.pathsep.join(sys.path)
    return {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


def run(script: str, *arguments: str, **more: str) -> str:
    """What `python script *arguments` prints; a failure of it is one of the test."""
    pytest.importorskip("triton")
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, env=environment(**more), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def mend() -> None:
    """What the interpreter does wrongly: loop bounds as [1] arrays, which numpy >= 2.4 makes no int of; float32 to
    bfloat16 truncated and to float8 off (1.887 becomes 1.0 in E4M3; Triton 3.6); back to float32, the subnormal
    numbers of bfloat16 and what is not finite in float8; masks that are no bools (3.9); NaN of `tl.maximum` and
    `tl.minimum`, which on a GPU return the number beside it."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    patch, convert, builder = (
        interpreter._patch_lang_tensor,
        interpreter._convert_float,
        interpreter.InterpreterBuilder,
    )
    narrow = {
        tl.bfloat16: (torch.bfloat16, torch.int16, np.uint16),
        tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8, np.uint8),
        tl.float8e5: (torch.float8_e5m2, torch.uint8, np.uint8),
    }

    def with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def to_nearest(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if source in narrow and target == tl.float32:
            dtype, raw, _ = narrow[source]
            exact = torch.from_numpy(np.ascontiguousarray(values)).view(raw).view(dtype).float()
            return exact.view(torch.int32).numpy().view(np.uint32)
        if source != tl.float32 or target not in narrow:
            return convert(values, source, target, mode)
        dtype, raw, words = narrow[target]  # of float8 in range: the kernels have clamped
        return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).view(raw).numpy().view(words)

    def with_bools(method: Any, place: int) -> Any:
        def call(self: Any, *args: Any) -> Any:
            args[place].data = args[place].data.astype(bool, copy=False)
            return method(self, *args)

        return call

    interpreter._patch_lang_tensor, interpreter._convert_float = with_index, to_nearest
    builder.create_masked_load = with_bools(builder.create_masked_load, 1)
    builder.create_masked_store = with_bools(builder.create_masked_store, 2)
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)


def few_programs() -> None:
    """Amaxes are found by 1024 programs, which the interpreter runs one by one; four have as many loops and edges."""
    from hf_lowprec.kernels.triton import any_cast, cast

    any_cast.PARTIALS = cast.PARTIALS = 4
