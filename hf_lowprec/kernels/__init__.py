# SPDX-License-Identifier: Apache-2.0
"""Kernels that implement `hf_lowprec.ops` on GPUs. Importing this package registers them; nobody calls them by name.

Triton is imported by the first call on a CUDA tensor, not before: CPU-only machines have no Triton.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_lowprec.ops.registry import LIBRARY


def _quantize(*args: Any) -> tuple[Tensor, Tensor]:
    from hf_lowprec.kernels.quantize import quantize

    return quantize(*args)


def _current_scale(*args: Any) -> Tensor:
    from hf_lowprec.kernels.quantize import current_scale

    return current_scale(*args)


def _scaled_mm(*args: Any) -> Tensor:
    from hf_lowprec.kernels.scaled_mm import scaled_mm

    return scaled_mm(*args)


LIBRARY.impl("quantize", _quantize, "CUDA")
LIBRARY.impl("current_scale", _current_scale, "CUDA")
LIBRARY.impl("scaled_mm", _scaled_mm, "CUDA")
