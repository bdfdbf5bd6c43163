# SPDX-License-Identifier: Apache-2.0
"""A GPU whose kernels do nothing: what is left of a training step on it is the host's share.

All Python of this package runs as it does on a GPU, the launchers of `kernels/triton` included; a compiled kernel's
own launch returns at once, `torch._scaled_mm` allocates its output. Tensors live on the CPU and should be tiny. Not
there: the driver, Triton's packing of arguments (C++), cuBLASLt's choice of an algorithm. Values mean nothing.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

LAUNCHES: Counter[str] = Counter()  # kernels of ours by name, and "_scaled_mm"


class _Compiled:
    """What the JIT returns for a kernel: callable like Triton's, and idle."""

    function = packed_metadata = None

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, *_: Any) -> None:
        LAUNCHES[self.name] += 1

    def __getitem__(self, grid: Any) -> Callable[..., None]:  # the public way, for versions of Triton not known
        return self.run


class _Kernel:
    def __init__(self, name: str) -> None:
        self.compiled = _Compiled(name)

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *args, **options: self.compiled


def _scaled_mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype, **_: Any) -> Tensor:
    LAUNCHES["_scaled_mm"] += 1
    return torch.empty((a.shape[0], b.shape[1]), dtype=out_dtype)


@contextmanager
def fake_gpu() -> Iterator[None]:
    """CPU tensors take the way of CUDA tensors through `hf_lowprec.ops`; norms and rotary embeddings need
    `emulate` set beside."""
    from hf_lowprec.kernels.triton.launch import Launcher
    from hf_lowprec.ops import registry

    modules = {
        name: importlib.import_module(f"hf_lowprec.{name}")
        for name in ("ops.quantize", "ops.scaled_mm", "ops.glu", "ops.norm", "ops.rotary", "kernels.scaled_mm")
    }
    plain = (Tensor, torch.nn.Parameter)

    def direct(name: str, tensor: Tensor) -> Callable[..., Any] | None:
        registry.is_dynamo_compiling()  # `registry.direct`, but for the device and the modes that count
        registry._dispatch_modes()
        return registry.CUDA_KERNELS.get(name) if type(tensor) in plain else None

    changes: list[tuple[Any, str, Any]] = [
        (module, "direct", direct) for name, module in modules.items() if name.startswith("ops.")
    ]
    changes.append((modules["kernels.scaled_mm"], "_supported", lambda device, a, b: f"_scaled_mm {a[:6]}"))
    changes.append((torch, "_scaled_mm", _scaled_mm))
    changes.append((torch._C, "_cuda_getCurrentRawStream", lambda device: 0))
    kernels = (
        "cast",
        "cast_transpose",
        "transpose",
        "norm",
        "glu",
        "glu_backward",
        "rotary",
        "any_cast",
        "any_decode",
    )
    for name in kernels:
        module = importlib.import_module(f"hf_lowprec.kernels.triton.{name}")
        for attribute, value in vars(module).items():
            if isinstance(value, Launcher):
                changes.append((value, "kernel", _Kernel(f"{name}{attribute}")))
                changes.append((value, "_compiled", {}))
    before = [(owner, name, getattr(owner, name, None)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, old in before:
            if old is None:
                delattr(owner, name)
            else:
                setattr(owner, name, old)
