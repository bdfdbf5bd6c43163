# SPDX-License-Identifier: Apache-2.0
"""Optimizers with low-precision states, and low-precision gradients for any optimizer."""

from hf_lowprec.optim.adamw import Adam, AdamW, StableAdamW
from hf_lowprec.optim.base import LowPrecOptimizer
from hf_lowprec.optim.bitsandbytes import load_bitsandbytes, to_bitsandbytes
from hf_lowprec.optim.clipping import clip_factor
from hf_lowprec.optim.gradient import GradientQuantizer, GradientSwap
from hf_lowprec.optim.lion import Lion
from hf_lowprec.optim.overrides import mark_embeddings, mark_gemm_weights
from hf_lowprec.optim.release import release_gradients
from hf_lowprec.optim.sgd import SGD

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "GradientQuantizer",
    "GradientSwap",
    "Lion",
    "LowPrecOptimizer",
    "StableAdamW",
    "clip_factor",
    "load_bitsandbytes",
    "mark_embeddings",
    "mark_gemm_weights",
    "release_gradients",
    "to_bitsandbytes",
]
