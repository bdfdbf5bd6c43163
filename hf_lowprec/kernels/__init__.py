# SPDX-License-Identifier: Apache-2.0
"""Kernels that implement `hf_lowprec.ops` on GPUs. Importing this package registers them; nobody calls them by name.

Triton is imported by the first call on a CUDA tensor, not before: CPU-only machines have no Triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import hf_lowprec.ops.flexible
import hf_lowprec.ops.glu
import hf_lowprec.ops.norm
import hf_lowprec.ops.rotary  # noqa: F401  (the schemas)
from hf_lowprec.ops.registry import CUDA_KERNELS, LIBRARY


def _register(operator: str, module: str, behind_operator: str | None = None) -> None:
    """Implement `operator` by the function of that name in `module`, for calls through the dispatcher and without it.

    behind_operator: what the dispatcher calls instead, where it asks for more.
    """

    def first_call(*args: Any) -> Any:
        CUDA_KERNELS[operator] = kernel = getattr(import_module(f"hf_lowprec.kernels.{module}"), operator)
        return kernel(*args)

    def dispatched(*args: Any) -> Any:
        if behind_operator is None:
            return CUDA_KERNELS[operator](*args)
        return getattr(import_module(f"hf_lowprec.kernels.{module}"), behind_operator)(*args)

    CUDA_KERNELS[operator] = first_call
    LIBRARY.impl(operator, dispatched, "CUDA")


_register("quantize", "quantize", "quantize_operator")
_register("cast_transpose", "quantize", "cast_transpose_operator")
_register("transposed", "quantize")
_register("current_scale", "quantize")
_register("scaled_mm", "scaled_mm")
_register("norm", "norm")
_register("norm_backward", "norm")
_register("glu", "glu")
_register("glu_backward", "glu")
_register("glu_again", "glu")
_register("rotary", "rotary")
_register("rotary_backward", "rotary")
_register("flexible", "flexible")
_register("flexible_mm", "flexible")
_register("flexible_gradients", "flexible")
_register("flexible_count", "flexible")
