# SPDX-License-Identifier: Apache-2.0
"""One library handle, and the count of what really ran.

`torch.library.Library` instead of `custom_op`: a call costs 20 us of host time instead of 54 (H100, torch 2.11).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

LIBRARY: Any = torch.library.Library("hf_lowprec", "DEF")

# The CUDA implementations by operator name, filled in by `kernels/`.
CUDA_KERNELS: dict[str, Callable[..., Any]] = {}


def direct(name: str, tensor: Tensor) -> Callable[..., Any] | None:
    """The CUDA implementation itself, where nobody stands between a call of the operator and it; else None.

    Spares the dispatcher, and what operators owe it: no output may be an argument. torch.compile, fake tensors,
    tensor subclasses and dispatch modes get the operator. (Export and AOT compilation bring subclasses and modes.)
    """
    if not tensor.is_cuda or is_dynamo_compiling() or _dispatch_modes():
        return None
    return CUDA_KERNELS.get(name) if type(tensor) in _PLAIN else None


_PLAIN = (Tensor, torch.nn.Parameter)
_dispatch_modes = torch._C._len_torch_dispatch_stack

# Incremented inside the implementations, so compiled graphs count too (a CUDA graph's replay does not run Python).
_COUNTS: Counter[str] = Counter()


def count(kernel: str) -> None:
    _COUNTS[kernel] += 1


def kernel_counts() -> Counter[str]:
    """Calls of each kernel in this process so far, e.g. `{"_scaled_mm e4m3fn x e4m3fn": 12}`."""
    return Counter(_COUNTS)
