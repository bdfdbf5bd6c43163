# SPDX-License-Identifier: Apache-2.0
"""hf_lowprec::dequantize: the values of a quantised operand, for a GEMM of which it is the only one."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowprec import numerics
from hf_lowprec.ops.quantize import parse_quant
from hf_lowprec.ops.registry import LIBRARY

LIBRARY.define("dequantize(Tensor qdata, Tensor scale, str quant, ScalarType dtype) -> Tensor")


def dequantize(qdata: Tensor, scale: Tensor, quant: str, dtype: torch.dtype) -> Tensor:
    """Values of what `quantize` gave, computed in float32 and rounded to `dtype` once; the shape of `qdata`."""
    out: Tensor = torch.ops.hf_lowprec.dequantize(qdata, scale, quant, dtype)
    return out


def default_dequantize(qdata: Tensor, scale: Tensor, quant: str, dtype: torch.dtype) -> Tensor:
    return numerics.dequantize(numerics.ScaledTensor(qdata.contiguous(), scale), parse_quant(quant), dtype)


LIBRARY.impl("dequantize", default_dequantize, "CompositeExplicitAutograd")


def _fake_dequantize(qdata: Tensor, scale: Tensor, quant: str, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(qdata, dtype=dtype, memory_format=torch.contiguous_format)


torch.library.register_fake("hf_lowprec::dequantize", _fake_dequantize)
