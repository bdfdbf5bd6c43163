# SPDX-License-Identifier: Apache-2.0
"""The square root, correctly rounded everywhere.

CUDA, Triton's `sqrt_rn`, numpy and C++ round the root of a float32 correctly, as processors do. Eager torch on an x86
CPU does not: it calls MKL's vector library, which is off by one unit in the last place for every sixth number. So the
root is numpy's, which most installations have, and which shares a tensor's memory.

Without numpy it goes through float64, in four times the time. There x / sqrt(x) is off by 2^-52 at most, and that is
enough: a root of a float32 keeps a relative distance of 2^-51 from the middle between two of them. (The middle is an
odd M of 25 bits, times a power of two; M^2 has 50 bits and is odd, so no x of 24 bits equals it, and the nearest one
differs by 2^-50.) Not sqrt(x): in float64 that is MKL's again, at twice the time of torch's `rsqrt`, which is not.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _numpy() -> Any:
    """The module, or None where it, or torch's bridge to it, is not there."""
    try:
        torch.zeros(1).numpy()
        return importlib.import_module("numpy")
    except (ImportError, RuntimeError):
        return None


def sqrt_rn(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The float32 nearest to the root of each element of a float32 tensor; -0 is its own root, negatives give NaN.

    float64 is torch's own root. out: for the result, of the shape of `x`, which it may be.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.sqrt(x, out=out)
    numpy = _numpy() if type(x) is Tensor and not x.requires_grad else None
    if numpy is not None:
        out = torch.empty_like(x) if out is None else out
        with numpy.errstate(invalid="ignore"):
            numpy.sqrt(x.numpy(), out=out.numpy())
        return out
    exact = x.double()
    root = exact.rsqrt().clamp(1e-300, 1e300) * exact  # 0 and Inf are their own roots
    return root.float() if out is None else out.copy_(root)
