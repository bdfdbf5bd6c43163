# SPDX-License-Identifier: Apache-2.0
"""Thin nn.Module shells around `hf_lowprec.functional`."""

from hf_lowprec.modules.embedding import StableEmbedding
from hf_lowprec.modules.linear import LowPrecLinear, low_precision_class
from hf_lowprec.modules.state import LayerState, ScalingState
from hf_lowprec.modules.weight_cache import weights_changed

__all__ = [
    "LayerState", "LowPrecLinear", "ScalingState", "StableEmbedding", "low_precision_class", "weights_changed",
]  # fmt: skip
