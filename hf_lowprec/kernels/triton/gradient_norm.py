# SPDX-License-Identifier: Apache-2.0
"""The norm of all gradients, in one order of summation whatever the GPU: `optim/clipping.py` has the same bits.

Squares are float32. A chunk's are added up tile after tile, lane by lane, then the lanes in pairs of neighbours; sums
of chunks, in the order of the tensors, in float64 in the same way. No fused multiply-add may be formed here.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def in_pairs(x):
    """The sum of [N], N a power of two: ((x0 + x1) + (x2 + x3)) + ...

    A sum of two is the same in either order, so that no layout of threads has a say in it."""
    for _ in tl.static_range(0, 16):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0] // 2, 2]), 1)
    return tl.sum(x, 0)


@triton.jit(do_not_specialize=["count", "bits"])
def norm_kernel(squares, limit, norm, factor, count, bits, TENSOR: tl.constexpr, BLOCK: tl.constexpr):
    """One program: the norm from the sums of `count` chunks, and min(1, max_norm / (norm + 1e-6)); NaN where the norm
    is not finite. max_norm is `limit`, float32 0-d, where TENSOR, else the float32 of these `bits`."""
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for start in tl.range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(squares + i, mask=i < count, other=0.0).to(tl.float64)
    found = tl.sqrt(in_pairs(total)).to(tl.float32)
    if TENSOR:
        most = tl.load(limit)
    else:
        most = bits.to(tl.float32, bitcast=True)
    # A quotient in float64, rounded to float32, is float32's own.
    share = (most.to(tl.float64) / (found + 1e-6).to(tl.float64)).to(tl.float32)
    share = tl.where(share > 1.0, 1.0, share)
    tl.store(norm, found)
    tl.store(factor, tl.where(found < float("inf"), share, float("nan")))
