# SPDX-License-Identifier: Apache-2.0
"""How far a quantised tensor is from its source: signal to noise, what fell to zero, what hit the ceiling."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowprec.formats import Codebook, Format, get_format
from hf_lowprec.numerics.rounding import decode


def sqnr(reference: Tensor, x: Tensor) -> Tensor:
    """Signal-to-quantisation-noise ratio, 20 log10(|reference| / |reference - x|) dB: 0-dim float64; Inf if equal."""
    ref = reference.detach().double()
    noise = torch.linalg.vector_norm(ref - x.detach().double())
    return 20 * torch.log10(torch.linalg.vector_norm(ref) / noise)


def relative_error(reference: Tensor, x: Tensor) -> Tensor:
    """|reference - x| / |reference|, Frobenius norms: 0-dim float64. 0 where both are zero."""
    ref = reference.detach().double()
    noise = torch.linalg.vector_norm(ref - x.detach().double())
    return torch.where(noise == 0, 0.0, noise / torch.linalg.vector_norm(ref))


def underflow_fraction(x: Tensor, qx: Tensor) -> Tensor:
    """Share of the nonzero elements of `x` that are zero in `qx` (values, any float dtype): 0-dim float32."""
    nonzero = x.detach() != 0
    lost = nonzero & (qx.detach().float() == 0)
    return lost.sum() / nonzero.sum().clamp(min=1)


def saturation_fraction(qdata: Tensor, fmt: str | Format | Codebook) -> Tensor:
    """Share of the elements whose magnitude is the format's largest: 0-dim float32.

    qdata: codes of `encode`, or torch's own dtype of the format.
    """
    fmt = get_format(fmt)
    values = qdata.detach().float() if qdata.is_floating_point() else decode(qdata, fmt)
    return torch.eq(values.abs(), fmt.max).sum() / max(values.numel(), 1)
