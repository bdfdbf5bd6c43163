# SPDX-License-Identifier: Apache-2.0
"""Launches of Triton kernels that were compiled before, without the way through the JIT.

`kernel[grid](...)` binds, inspects and hashes every argument again: most of the 17 us of host time that a launch costs
(H100, Triton 3.6). The JIT returns the compiled kernel, which can be launched by itself as Triton's own tutorials do;
what is left to the caller is to say when a compiled kernel fits, by a key.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor
from triton import knobs

# Whose compiled kernels take their arguments as below; of any other version the public way is used.
_KNOWN = triton.__version__.startswith("3.6.")

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """For functions that launch by `kernel[grid]`: on the device of their first argument.

    Unlike torch's operators, Triton launches on the current device, whatever device the tensors are on: with layers
    on several GPUs (`device_map="auto"`) the kernel would run on another GPU's stream, before its input is there.
    """

    @wraps(function)
    def launch(x: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        device = x.get_device()
        if device < 0 or device == torch.cuda.current_device():
            return function(x, *args, **kwargs)
        with torch.cuda.device(device):
            return function(x, *args, **kwargs)

    return launch


class Launcher:
    """Compiled variants of one `@triton.jit` function.

    The key of a call must tell apart whatever the JIT specialises on: values of constexpr arguments and options,
    dtypes, which pointers are divisible by 16, and of integer arguments whether they are 1, divisible by 16 or longer
    than 32 bits (arguments named in `do_not_specialize` need the last only).
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[Hashable, Any] = {}
        self._numbers: dict[Hashable, int] = {}

    def number(self, key: Hashable) -> int:
        """One that stands for `key` in calls, and is hashed in no time; calls whose integers differ may share it."""
        return self._numbers.setdefault(key, len(self._numbers))

    def __call__(
        self, key: Hashable, device: int, grid: tuple[int, int, int], args: tuple[Any, ...], **options: int
    ) -> None:
        """Launch on the device of that index (as `on_its_device`), on its current stream; args in the order of the
        kernel, all of them."""
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(key, device, grid, args, **options)
        compiled = self._compiled.get((key, device))
        if compiled is not None:
            hooks = knobs.runtime
            if not _KNOWN or hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
                compiled[grid](*args)
            else:  # what that does, less the metadata for hooks that are not there
                stream = torch._C._cuda_getCurrentRawStream(device)
                compiled.run(
                    *grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args
                )  # fmt: skip
            return None
        compiled = self.kernel[grid](*args, **options)
        if compiled is not None:  # the interpreter compiles nothing
            self._compiled[key, device] = compiled
        return None


def integer_key(value: int) -> int:
    """What the JIT specialises on in an integer argument, as `Launcher` wants it."""
    return (value == 1) | (value % 16 == 0) << 1 | (value >= 1 << 31) << 2
