# SPDX-License-Identifier: Apache-2.0
"""The operations that kernels implement: a schema, a fake and a plain-torch default each.

Nobody calls kernels by name.
"""

from hf_lowprec.ops.dequantize import dequantize
from hf_lowprec.ops.quantize import cast_transpose, current_scale, parse_quant, quant_key, quantize, transposed
from hf_lowprec.ops.registry import kernel_counts
from hf_lowprec.ops.scaled_mm import accumulation_key, parse_accumulation, scaled_mm

__all__ = [
    "accumulation_key",
    "cast_transpose",
    "current_scale",
    "dequantize",
    "kernel_counts",
    "parse_accumulation",
    "parse_quant",
    "quant_key",
    "quantize",
    "scaled_mm",
    "transposed",
]
