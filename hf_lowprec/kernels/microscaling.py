# SPDX-License-Identifier: Apache-2.0
"""GEMMs of MXFP8 operands on GPUs with MX tensor cores (sm_100 and newer), by cuBLASLt through torch.

Each operand brings an E8M0 scale per 32 elements of its rows, which the tensor cores apply to partial sums. cuBLASLt
reads these scales in tiles of 128 rows by 4 blocks, 512 bytes that a warp fetches at once:

    scale (r, c) of a tile stands at byte  (r % 32) * 16 + (r // 32) * 4 + c

tiles follow each other along a row of tiles, and what is missing in the last ones is filled up. The axis of the sum is
padded with zeros to whole blocks: wgrad sums over tokens, of which there can be any number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32
_ROWS, _COLUMNS = 128, 4  # of a tile of scales


def swizzled(scale: Tensor) -> Tensor:
    """Scales [R, C] (1 byte each) in the order that cuBLASLt reads, R and C filled up to whole tiles of 128 x 4."""
    r, c = scale.shape
    rows, columns = -(-r // _ROWS), -(-c // _COLUMNS)
    # 2^0 where nothing is: a code of 0 would do as well, but for the eye of whoever debugs it
    whole = torch.full((rows * _ROWS, columns * _COLUMNS), 127, dtype=torch.uint8, device=scale.device)
    whole[:r, :c] = scale.view(torch.uint8)
    tiles = whole.view(rows, _COLUMNS, _ROWS // _COLUMNS, columns, _COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(scale.dtype)


def padded(qdata: Tensor) -> Tensor:
    """A matrix of codes [R, K], contiguous along K, with zeros up to whole blocks."""
    k = qdata.shape[1]
    if k % BLOCK == 0:
        return qdata.contiguous()
    out = torch.zeros((qdata.shape[0], -(-k // BLOCK) * BLOCK), dtype=torch.uint8, device=qdata.device)
    out[:, :k] = qdata.view(torch.uint8)
    return out.view(qdata.dtype)


def mx_scaled_mm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """[M, K] x [N, K] -> [M, N] in `dtype`; K is the shorter of the two, what is longer holds zeros there.

    a, b: float8 of at least one e4m3fn. a_scale, b_scale: float8_e8m0fnu [M or N, blocks]. bias: [N], added by the
    GEMM; for 16-bit outputs only. N is a multiple of 16.
    """
    k = min(a.shape[1], b.shape[1])
    blocks = -(-k // BLOCK)
    out: Tensor = F.scaled_mm(
        padded(a[:, :k]),
        padded(b[:, :k]).t(),
        swizzled(a_scale[:, :blocks]),
        F.ScalingType.BlockWise1x32,
        swizzled(b_scale[:, :blocks]),
        F.ScalingType.BlockWise1x32,
        F.SwizzleType.SWIZZLE_32_4_4,
        F.SwizzleType.SWIZZLE_32_4_4,
        bias=bias,
        output_dtype=dtype,
    )
    return out
