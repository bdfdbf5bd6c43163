# SPDX-License-Identifier: Apache-2.0
"""Figures of number formats. They follow from `hf_lowprec.numerics` alone: nothing is measured on a machine."""

from __future__ import annotations

import functools
from typing import Any

import torch
from matplotlib.figure import Figure

from hf_lowprec.formats import Codebook, get_format
from hf_lowprec.numerics import round_to_format

SAMPLES = 1 << 16
EXPONENTS = tuple(k / 2 for k in range(-40, 41))  # of the input's RMS
# format -> (what it is called, colour): one hue per number of bits.
CURVES = {
    "e5m10": ("FP16", "#8c8c8c"), "e8m7": ("BF16", "#b4b4b4"), "e6m5": ("E6M5, flush (sums)", "#2a9d5c"),
    "e4m3fn": ("E4M3", "#1f77d0"), "e5m2": ("E5M2", "#7db8f2"), "e4m3b11": ("E4M3 bias 11 (HFP8)", "#14508c"),
    "e0m7": ("INT8 (E0M7)", "#e08a1e"), "e2m3": ("E2M3", "#c03a7f"), "e3m2": ("E3M2", "#de7fb0"),
    "e2m1": ("E2M1", "#8a63c9"),
}  # fmt: skip
LINES = ("e2m1", "nf4", "e3m1", "e2m3", "e3m2", "e0m7", "e4m3fn", "e5m2", "dynamic8")


@functools.cache
def weighted_normal() -> tuple[torch.Tensor, torch.Tensor]:
    """Points from -8 to 8 and the density of N(0, 1) there, float64: an integral instead of a draw, tails included."""
    x = torch.linspace(-8.0123, 8.0077, SAMPLES, dtype=torch.float64)  # on no format's grid
    return x, torch.exp(-(x**2) / 2)


def sqnr_curve(fmt: str, exponents: tuple[float, ...] = EXPONENTS) -> list[float]:
    """SQNR (dB) of N(0, 2^k) in `fmt` without a scale, to nearest, saturating."""
    unit, weight = weighted_normal()
    curve = []
    for k in exponents:
        x = unit * 2.0**k
        noise = weight * (x - round_to_format(x, fmt)) ** 2
        curve.append(float(10 * torch.log10((weight * x**2).sum() / noise.sum())))
    return curve


def formats_sqnr(_: Any = None) -> Figure:
    """SQNR against the RMS of a normal input, no scale: how high and how wide each format is."""
    figure = Figure(figsize=(8.2, 4.8), layout="constrained")
    axes = figure.subplots()
    for fmt, (label, shade) in CURVES.items():
        curve = sqnr_curve(fmt)
        axes.plot(EXPONENTS, curve, color=shade, lw=1.6, label=f"{label}: {max(curve):.1f} dB")
    axes.set_ylim(0, 80)
    axes.set_xlim(EXPONENTS[0], EXPONENTS[-1])
    axes.set_xticks(range(-20, 21, 4), [f"$2^{{{k}}}$" for k in range(-20, 21, 4)])
    axes.set_xlabel("RMS of the input, normally distributed, no scale")
    axes.set_ylabel("SQNR (dB)")
    axes.grid(alpha=0.2)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def number_lines(_: Any = None) -> Figure:
    """Every value of a format on a line, scaled so that its largest is 1: what a scale per tensor makes of them."""
    figure = Figure(figsize=(8.2, 0.9 + 0.42 * len(LINES)), layout="constrained")
    axes = figure.subplots()
    for y, name in enumerate(LINES):
        fmt = get_format(name)
        values = torch.tensor(fmt.values if isinstance(fmt, Codebook) else fmt.values(), dtype=torch.float64)
        shade = CURVES.get(name, ("", "#5f9ea0"))[1]
        axes.vlines((values / fmt.max).tolist(), y - 0.36, y + 0.36, color=shade, lw=0.7 if len(values) > 64 else 1.2)
    axes.set_yticks(range(len(LINES)), [f"{name} ({get_format(name).bits} bits)" for name in LINES], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(-1.02, 1.02)
    axes.set_xlabel("value / the format's largest")
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)
    return figure
