# SPDX-License-Identifier: Apache-2.0
"""Kernels with all their constants bound, for steps that launch the same ones again and again (`triton/launch.py`).

A step that meets several kernels for the first time has them compiled side by side: one after another took most of the
first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

_BOUND: dict[Any, Bound] = {}
_THREADS = 8


class Bound:
    """One kernel with its constants and options on one device, in one dimension.

    Its constants are its last parameters; those before them are tensors, and integers of 32 bits that the kernel does
    not specialise.
    """

    def __init__(self, kernel: Any, device: torch.device, constants: dict[str, Any]) -> None:
        from hf_lowprec.kernels.triton.launch import Launcher

        self._kernel, self._launcher = kernel, Launcher(kernel)
        self._device = -1 if device.index is None else device.index
        self._constants = tuple(constants[name] for name in kernel.arg_names if name in constants)
        self._options = {name: value for name, value in constants.items() if name not in kernel.arg_names}
        self.launched: set[tuple[bool, ...]] = set()  # for which of them Triton's cache holds it

    @classmethod
    def of(cls, kernel: Any, device: torch.device, /, **constants: Any) -> Bound:
        """The one for these constants, always the same."""
        key = (id(kernel), device, *constants.values())
        bound = _BOUND.get(key)
        if bound is None:
            bound = _BOUND[key] = cls(kernel, device, constants)
        return bound

    def launch(self, programs: int, arguments: Sequence[Tensor | int], alignments: tuple[bool, ...]) -> None:
        self.launched.add(alignments)
        self._launcher(alignments, self._device, (programs, 1, 1), (*arguments, *self._constants), **self._options)

    def compile(self, programs: int, arguments: Sequence[Tensor | int]) -> Any:
        """The compiled kernel, or the promise of it."""
        return self._kernel.warmup(*arguments, *self._constants, grid=(programs, 1, 1), **self._options)


class Launch(NamedTuple):
    """alignments: `alignments_of` the arguments, if they are known already."""

    bound: Bound
    programs: int
    arguments: tuple[Tensor | int, ...]
    alignments: tuple[bool, ...] | None = None


def launch_all(launches: Sequence[Launch], device: torch.device) -> None:
    """Launches in this order."""
    alignments = [launch.alignments or alignments_of(launch.arguments) for launch in launches]
    fresh = [launch for launch, key in zip(launches, alignments, strict=True) if key not in launch.bound.launched]
    if len(fresh) > 1 and device.type == "cuda":
        _compile_together(fresh)
    for (bound, programs, arguments, _), key in zip(launches, alignments, strict=True):
        bound.launch(programs, arguments, key)


def _compile_together(launches: Sequence[Launch]) -> None:
    """Has Triton's caches hold what these launches need, where Triton can compile in several threads (3.6).

    Nothing depends on it: what is not there by then is compiled, or fails, when it is launched.
    """
    import triton
    from triton.runtime import driver

    mode = getattr(triton, "AsyncCompileMode", None)
    if mode is None:
        return

    def build_launcher(promised: Any) -> None:  # by a C compiler, into Triton's cache; no use of the GPU
        with suppress(Exception):
            kernel = promised.result() if hasattr(promised, "result") else promised
            driver.active.launcher_cls(kernel.src, kernel.metadata)

    with suppress(Exception), ThreadPoolExecutor(min(_THREADS, len(launches))) as pool:
        with mode(pool, ignore_errors=True):
            kernels = [launch.bound.compile(launch.programs, launch.arguments) for launch in launches]
        list(pool.map(build_launcher, kernels))


def alignments_of(arguments: Sequence[Tensor | int]) -> tuple[bool, ...]:
    """Which are at multiples of 16 bytes: what Triton compiles kernels for."""
    return tuple(isinstance(arg, int) or arg.data_ptr() % 16 == 0 for arg in arguments)
