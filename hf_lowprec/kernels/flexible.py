# SPDX-License-Identifier: Apache-2.0
"""hf_lowprec::flexible and its kin on CUDA: one kernel each for matrices of float32, bfloat16 and float16, plain torch
for the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowprec.kernels.scaled_mm import multiplies_bfloat16
from hf_lowprec.kernels.triton import flexible as kernels
from hf_lowprec.ops import flexible as default
from hf_lowprec.ops.registry import count

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Formats of n bits have significands of n - 1 bits at most and values of 2^(1 - 2^(n - 3)) to 2^(1 + 2^(n - 3)): with
# 8 bits bfloat16 holds them all, and sums of their products are below 2^67 K. With 9 such a sum may overflow.
_MOST_BITS = 8


def _covered(x: Tensor, maxval: Tensor | None, man: Tensor | None) -> bool:
    if x.dim() != 2 or x.dtype not in _DTYPES or not x.numel():
        return False
    if maxval is None or man is None:
        return True
    ranges = maxval.numel() == 1 or (tuple(maxval.shape) == (x.shape[0], 1) and maxval.is_contiguous())
    return ranges and man.numel() == 1 and maxval.dtype == man.dtype == torch.float32


def flexible(x: Tensor, maxval: Tensor, man: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    if not _covered(x, maxval, man) or dtype not in _DTYPES:
        return default.default_flexible(x, maxval, man, bits, dtype)
    return kernels.flexible(x, maxval, man, bits, dtype)


def flexible_mm(
    x: Tensor,
    x_maxval: Tensor,
    x_man: Tensor,
    x_bits: int,
    w: Tensor,
    w_maxval: Tensor,
    w_man: Tensor,
    w_bits: int,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    covered = _covered(x, x_maxval, x_man) and _covered(w, w_maxval, w_man) and dtype in _DTYPES
    if not covered:
        return default.default_flexible_mm(
            x, x_maxval, x_man, x_bits, w, w_maxval, w_man, w_bits, bias, dtype
        )  # fmt: skip
    exact = max(x_bits, w_bits) <= _MOST_BITS and x_maxval.numel() == 1 and multiplies_bfloat16(x.device)
    count(f"emulated flexible, {x_bits} x {w_bits} bits")
    if not exact:
        qx = kernels.flexible(x, x_maxval, x_man, x_bits, torch.float32)
        qw = kernels.flexible(w, w_maxval, w_man, w_bits, torch.float32)
        return default.multiply_values(qx, qw, bias, dtype)
    rx = kernels.flexible(x, x_maxval, x_man, x_bits, torch.bfloat16, scaled=False)
    rw = kernels.flexible(w, w_maxval, w_man, w_bits, torch.bfloat16, scaled=False)
    bias = None if bias is None else bias.detach().contiguous()
    return kernels.finish(_product(rx, rw), x_maxval, x_man, x_bits, w_maxval, w_man, w_bits, bias, dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T of bfloat16 matrices, float32."""
    with torch.autocast(a.device.type, enabled=False):  # which reaches into operators
        return torch.mm(a, b.t(), out_dtype=torch.float32)


def flexible_gradients(
    grad: Tensor, x: Tensor, maxval: Tensor, man: Tensor, bits: int, dtype: torch.dtype, q: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    covered = _covered(x, maxval, man) and grad.dtype in _DTYPES and grad.shape == x.shape and dtype in _DTYPES
    if not covered:
        return default.default_flexible_gradients(grad, x, maxval, man, bits, dtype, q)
    return kernels.gradients(grad, x, maxval, man, bits, dtype)


def flexible_count(x: Tensor, maxval: Tensor | None, man: Tensor | None, bits: int, counts: Tensor) -> None:
    if not _covered(x, maxval, man):
        default.default_flexible_count(x, maxval, man, bits, counts)
    else:
        kernels.count(x, maxval, man, bits, counts)
