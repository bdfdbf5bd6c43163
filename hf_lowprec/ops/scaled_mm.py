# SPDX-License-Identifier: Apache-2.0
"""hf_lowprec::scaled_mm: output = (a * a_scale) @ (b * b_scale).T + bias, from quantised operands.

The default implementation is the truth: operands are decoded, products and sums are float32, the scales multiply the
sum, one rounding to the output dtype ends it. The CUDA implementation (`kernels/`) is `torch._scaled_mm`, whose
tensor cores sum in another order and, on Hopper, with fewer bits: tests hold it to a stated tolerance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowprec import numerics
from hf_lowprec.ops.quantize import parse_quant
from hf_lowprec.ops.registry import LIBRARY, count, direct

LIBRARY.define(
    "scaled_mm(Tensor a, Tensor a_scale, str a_quant, Tensor b, Tensor b_scale, str b_quant, Tensor? bias,"
    " ScalarType dtype, bool fast, bool emulate) -> Tensor"
)


def scaled_mm(
    a: Tensor,
    a_scale: Tensor,
    a_quant: str,
    b: Tensor,
    b_scale: Tensor,
    b_quant: str,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype,
    fast: bool = False,
    emulate: bool = False,
) -> Tensor:
    """[M, K] x [N, K] -> [M, N]. Operands may have any strides; both reduce along their last axis.

    One operand may be longer along K than the other: what is beyond the shorter one must be zeros (the padding of
    `cast_transpose`).

    Args:
        dtype: of the output: float32, bfloat16 or float16.
        fast: let the tensor cores keep partial sums in their own narrow accumulators.
        emulate: use the default implementation also where a kernel exists.

    Raises:
        RuntimeError: a GPU without FP8 tensor cores, or a format pair it has no GEMM for, unless `emulate`.
    """
    kernel = direct("scaled_mm", a) or torch.ops.hf_lowprec.scaled_mm
    out: Tensor = kernel(a, a_scale, a_quant, b, b_scale, b_quant, bias, dtype, fast, emulate)
    return out


def default_scaled_mm(
    a: Tensor,
    a_scale: Tensor,
    a_quant: str,
    b: Tensor,
    b_scale: Tensor,
    b_quant: str,
    bias: Tensor | None,
    dtype: torch.dtype,
    fast: bool,
    emulate: bool,
) -> Tensor:
    qa, qb = parse_quant(a_quant), parse_quant(b_quant)
    count(f"emulated {qa.format} x {qb.format}")
    k = min(a.shape[1], b.shape[1])
    a, b = a[:, :k], b[:, :k]
    # Autocast reaches into operators and would turn the float32 product into a bfloat16 one.
    with torch.autocast(a.device.type, enabled=False):
        if a_scale.numel() == 1 and b_scale.numel() == 1:
            out = _values(a, qa.format) @ _values(b, qb.format).t()
            out *= a_scale.float() * b_scale.float()
        else:
            hp_a = numerics.dequantize(numerics.ScaledTensor(a, a_scale), qa)
            hp_b = numerics.dequantize(numerics.ScaledTensor(b, b_scale), qb)
            out = hp_a @ hp_b.t()
        if bias is not None:
            out += bias.float()
        return out.to(dtype)


def _values(qdata: Tensor, format_name: str) -> Tensor:
    if qdata.dtype.is_floating_point:
        return qdata.to(torch.float32)
    return numerics.decode(qdata, format_name)


LIBRARY.impl("scaled_mm", default_scaled_mm, "CompositeExplicitAutograd")


def _fake_scaled_mm(
    a: Tensor,
    a_scale: Tensor,
    a_quant: str,
    b: Tensor,
    b_scale: Tensor,
    b_quant: str,
    bias: Tensor | None,
    dtype: torch.dtype,
    fast: bool,
    emulate: bool,
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


torch.library.register_fake("hf_lowprec::scaled_mm", _fake_scaled_mm)
