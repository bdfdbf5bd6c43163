# SPDX-License-Identifier: Apache-2.0
"""The norm that a recipe puts inside every converted linear, before its input is quantised (`recipe.InputNorm`).

BitNet (arXiv 2310.11453, section 2.1) calls it SubLN: with unit variance before the weight, the variance of the output
does not depend on how the weights are scaled. Without weights of its own it adds no Parameter to the model, so that
checkpoints, adapters and optimizers see the model that they know.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_lowprec.recipe import InputNorm


def normalise(x: Tensor, norm: InputNorm) -> Tensor:
    """`x` [..., K] normalised over K, in its own dtype, computed in float32.

    For backward torch keeps `x` itself, which other layers that read it keep as well, and one or two float32 numbers
    per row; the normalised tensor is gone once it is quantised. Autocast would keep a float32 copy of `x` instead.
    """
    if not torch.is_autocast_enabled(x.device.type):
        return _normalise(x, norm)
    with torch.autocast(x.device.type, enabled=False):
        return _normalise(x, norm)


def _normalise(x: Tensor, norm: InputNorm) -> Tensor:
    if norm.kind == "rms":
        return F.rms_norm(x, x.shape[-1:], eps=norm.eps)
    return F.layer_norm(x, x.shape[-1:], eps=norm.eps)
