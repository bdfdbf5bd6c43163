# SPDX-License-Identifier: Apache-2.0
"""Optimizers with low-precision states, and low-precision gradients for any optimizer."""

from hf_lowprec.optim.adamw import Adam, AdamW
from hf_lowprec.optim.gradient import GradientQuantizer, GradientSwap

__all__ = ["Adam", "AdamW", "GradientQuantizer", "GradientSwap"]
