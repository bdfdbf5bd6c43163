# SPDX-License-Identifier: Apache-2.0
"""Companding: blocks of an optimizer state seen through a function that gives small values more codes.

A block has a scale a (its amax, as stored) and holds codes of z, which lies in [-1, 1] and is spread to the format:

    none       z = x / a
    softsign   y = x / a;  z = 2 y / (1 + |y|)                    y = z / (2 - |z|);  x = y a
    sqrt       z = sqrt(x) / a, a the amax of sqrt(x)             r = z a;  x = r r
    expand     e = sign(x) |x / c|^k;  z = e / a, a the amax of e     |x| = |z a|^(1/k) c

softsign and sqrt: FlashOptim (arXiv 2602.23349). Their slope at zero is 2 and infinite: uniform codes of z are dense
where most moments are. expand: COAT's dynamic range expansion (arXiv 2410.19313, section 4.1): c is the geometric mean
of the block's largest and smallest magnitude (zeros left out), and the power k spreads the block over the format's
range R, in steps of 1/16 so that k log2(largest / smallest) <= log2 R.

Everything is elementwise float32 in the order written; only `expand` has transcendentals, which differ in the last
bits between devices. Rows of `x` are blocks: [blocks, size].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_lowprec.formats import Codebook, Format

# COAT's code lets k run down to 1/16. A block of which one element has all but died out would then pay for it: at
# k = 1/2 neighbouring codes of E4M3 are 13 % apart, at 1/4 28 %. What is smaller becomes the smallest code or zero.
POWERS = (0.5, 16.0)


def row_amax(x: Tensor) -> Tensor:
    """Largest magnitude of each row, NaN where a row holds one: [blocks]."""
    return torch.maximum(x.amax(1), x.amin(1).neg_())


def softsign(y: Tensor) -> Tensor:
    """(2 y) / (1 + |y|), odd, from [-1, 1] onto itself."""
    return (y * 2).div_(y.abs().add_(1))


def softsign_inverse(z: Tensor) -> Tensor:
    """z / (2 - |z|)."""
    return z / z.abs().neg_().add_(2)


def expansion(x: Tensor, fmt: Format | Codebook) -> tuple[Tensor, Tensor]:
    """(power k, center c) of each row, float32 [blocks, 1]; see the module docstring.

    Degenerate rows: without a nonzero element k = c = 1; where all nonzero elements are one magnitude, k = 1.
    """
    span = math.log2(fmt.max / fmt.tiny * 7 / 16)  # for E4M3 COAT's 448^2 / 2: the smallest lands on the second code
    magnitude = x.abs()
    high = magnitude.amax(1, keepdim=True)
    low = magnitude.masked_fill_(magnitude == 0, math.inf).amin(1, keepdim=True)
    low = torch.maximum(low, high * 2.0 ** (-span / POWERS[0]))  # what the smallest power reaches
    octaves = high.log2() - low.log2()
    power = torch.floor(16 * span / octaves).div_(16).clamp_(*POWERS)
    power = torch.where(octaves > 0, power, 1.0)
    center = (high.sqrt() * low.sqrt()).clamp_(2.0**-126, 2.0**126)
    return power, torch.where(high > 0, center, 1.0)


def expand(x: Tensor, power: Tensor, center: Tensor) -> Tensor:
    """sign(x) |x (1 / c)|^k."""
    return x.abs().mul_(1.0 / center).pow_(power).copysign_(x)


def expand_inverse(e: Tensor, power: Tensor, center: Tensor) -> Tensor:
    """sign(e) |e|^(1 / k) c."""
    return e.abs().pow_(1.0 / power).mul_(center).copysign_(e)
