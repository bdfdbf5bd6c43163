# SPDX-License-Identifier: Apache-2.0
"""The square root, correctly rounded everywhere.

CUDA, Triton's `sqrt_rn`, numpy and the C++ of torch.compile round the root of a float32 correctly. Eager torch on an
x86 CPU does not: it calls MKL's vector library, which is off by one unit in the last place for every sixth number. In
float64 x / sqrt(x) is off by 2^-52 at most, and that is enough: a root of a float32 keeps a relative distance of 2^-51
from the middle between two of them. (The middle is an odd M of 25 bits, times a power of two; M^2 has 50 bits and is
odd, so no x of 24 bits equals it, and the nearest one differs by 2^-50.) Not sqrt(x): in float64 that is MKL's again,
and takes twice the time of the processor's own root and division, of which torch makes its `rsqrt`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sqrt_rn(x: Tensor, *, out: Tensor | None = None, wide: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The float32 nearest to the root of each element of a float32 tensor; -0 is its own root, negatives give NaN.

    float64 is torch's own root. out, wide: of the shape of `x`; for the result and, float64, for what is between.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.sqrt(x, out=out)
    exact = x.double() if wide is None else wide[0].copy_(x)
    root = torch.rsqrt(exact, out=None if wide is None else wide[1])
    root.clamp_(1e-300, 1e300).mul_(exact)  # 0 and Inf are their own roots
    return root.float() if out is None else out.copy_(root)
