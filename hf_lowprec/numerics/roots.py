# SPDX-License-Identifier: Apache-2.0
"""The square root, correctly rounded everywhere.

CUDA, Triton's `sqrt_rn`, numpy and the C++ of torch.compile round the root of a float32 correctly. Eager torch on an
x86 CPU does not: it calls MKL's vector library, which is off by one unit in the last place for every sixth number. In
float64 the same library errs by less than one of its units, 2^-52 at most, and that is enough: a root of a float32
keeps a relative distance of 2^-51 from the middle between two of them. (The middle is an odd M of 25 bits, times a
power of two; M^2 has 50 bits and is odd, so no x of 24 bits equals it, and the nearest one differs by 2^-50.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def sqrt_rn(x: Tensor, *, out: Tensor | None = None, wide: Tensor | None = None) -> Tensor:
    """The float32 nearest to the root of each element of a float32 tensor; -0 is its own root, negatives give NaN.

    float64 is torch's own root. out, wide: for the result and, float64, for what is between, of the shape of `x`.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.sqrt(x, out=out)
    root = (x.double() if wide is None else wide.copy_(x)).sqrt_()
    return root.float() if out is None else out.copy_(root)
