# SPDX-License-Identifier: Apache-2.0
"""Low precision in plain torch: exact, on every device, and the truth that kernels are tested against."""

from hf_lowprec.numerics.accumulation import accumulate
from hf_lowprec.numerics.activations import ACTIVATIONS, activation, activation_slope
from hf_lowprec.numerics.errors import relative_error, saturation_fraction, sqnr, underflow_fraction
from hf_lowprec.numerics.hashing import counter_hash, seed_keys
from hf_lowprec.numerics.integers import integer_product, integer_unit_of, integers
from hf_lowprec.numerics.quantize import ScaledTensor, centred, dequantize, quantize, quantize_dequantize
from hf_lowprec.numerics.roots import sqrt_rn
from hf_lowprec.numerics.rounding import Overflow, decode, encode, round_to_format
from hf_lowprec.numerics.scaling import (
    NonFinite,
    amax_per_group,
    delayed_update,
    expand_scale,
    finite_amax,
    multiplier,
    scale_from_amax,
    scale_like,
    scale_shape,
    statistic_per_group,
    way_in,
)

__all__ = [
    "ACTIVATIONS",
    "NonFinite",
    "Overflow",
    "ScaledTensor",
    "accumulate",
    "activation",
    "activation_slope",
    "amax_per_group",
    "centred",
    "counter_hash",
    "decode",
    "delayed_update",
    "dequantize",
    "encode",
    "expand_scale",
    "finite_amax",
    "integer_product",
    "integer_unit_of",
    "integers",
    "multiplier",
    "quantize",
    "quantize_dequantize",
    "relative_error",
    "round_to_format",
    "saturation_fraction",
    "scale_from_amax",
    "scale_like",
    "scale_shape",
    "seed_keys",
    "sqnr",
    "sqrt_rn",
    "statistic_per_group",
    "underflow_fraction",
    "way_in",
]
