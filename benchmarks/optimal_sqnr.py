# SPDX-License-Identifier: Apache-2.0
"""How good can 8 bits be? The best signal-to-noise ratio of every split of them, for three distributions.

    python benchmarks/optimal_sqnr.py          # prints the tables, writes benchmarks/results/optimal_sqnr.json

No sample is drawn: the expected squared error of a format under a range is the sum over its cells of
integral (x - value)^2 p(x) dx, the two unbounded ones included, from the closed forms of the integrals of p, x p and
x^2 p; and the range is chosen for the least. Following section 3 of arXiv 2208.09225, whose published code prints mean
squared errors for the first two distributions; they are stored beside ours.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from environment import environment
from torch import Tensor

from hf_lowprec.formats import Format, get_format

FORMATS = {"E5M2": "e5m2none", "E4M3": "e4m3none", "E3M4": "e3m4none", "E2M5": "e2m5none", "INT8": "e0m7"}
# What the code that accompanies the paper prints (Qualcomm-AI-research/FP8-quantization).
PRINTED_MSE = {
    "U(-1, 1)": {"E5M2": 6.78e-4, "E4M3": 1.78e-4},
    "N(0, 1)": {"E5M2": 2.77e-3, "E4M3": 6.99e-4},
}

# (integrals of p, x p and x^2 p from 0 to x) of a symmetric density
Integrals = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def uniform(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U(-1, 1)."""
    x = x.clamp(max=1.0)
    return x / 2, x.square() / 4, x**3 / 6


def normal(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """N(0, 1)."""
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    upto = torch.erf(x / math.sqrt(2)) / 2
    last = torch.where(x.isfinite(), x * density, 0.0)
    return upto, 1 / math.sqrt(2 * math.pi) - density, upto - last


def student(x: Tensor, nu: int = 8, clip: float = 100.0) -> tuple[Tensor, Tensor, Tensor]:
    """Student's t with 8 degrees of freedom; what lies beyond the clip is left out. x = sqrt(nu) tan, s = sin."""
    x = x.clamp(max=clip)
    c = math.exp(math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2)) / math.sqrt(nu * math.pi)
    s = x / (nu + x.square()).sqrt()
    zeroth = c * math.sqrt(nu) * (s - s**3 + 3 * s**5 / 5 - s**7 / 7)
    first = c * nu / (nu - 1) * (1 - (1 + x.square() / nu) ** (-(nu - 1) / 2))
    second = c * nu**1.5 * (s**3 / 3 - 2 * s**5 / 5 + s**7 / 7)
    return zeroth, first, second


SOURCES: dict[str, Integrals] = {"U(-1, 1)": uniform, "N(0, 1)": normal, "t(8), clip 100": student}


def signal(source: Integrals) -> float:
    """E[x^2]."""
    return 2 * float(source(torch.tensor([math.inf], dtype=torch.float64))[2])


def expected_error(fmt: Format, maxval: Tensor, source: Integrals) -> Tensor:
    """E[(x - Q(x))^2] under each maxval [C]: float64 [C]."""
    values = torch.tensor([v for v in fmt.values() if v >= 0], dtype=torch.float64)
    values = values * (maxval.double() / fmt.max)[:, None]
    middles = (values[:, 1:] + values[:, :-1]) / 2
    zero, end = torch.zeros(len(maxval), 1), torch.full((len(maxval), 1), math.inf)
    edges = torch.cat([zero.double(), middles, end.double()], 1)
    zeroth, first, second = (part.diff(dim=1) for part in source(edges))
    return 2 * (second - 2 * values * first + values.square() * zeroth).sum(1)


def optimum(fmt: Format, source: Integrals) -> tuple[float, float]:
    """(maxval, mean squared error) at the best range: 12 octaves in steps of 1/512, then around it of 1/2^14."""
    at = torch.exp2(torch.arange(-2 * 512, 10 * 512, dtype=torch.float64) / 512)
    for step in (1 / 2**14, 0.0):
        error = torch.cat([expected_error(fmt, part, source) for part in at.split(512)])
        best = at[error.argmin()]
        if step:
            at = best * torch.exp2(torch.arange(-64, 65, dtype=torch.float64) * step)
    return float(best), float(error.min())


def table() -> dict[str, dict[str, dict[str, float]]]:
    """source -> format -> maxval, mse, sqnr_db."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    for name, source in SOURCES.items():
        out[name] = {}
        for label, format_name in FORMATS.items():
            fmt = get_format(format_name)
            assert isinstance(fmt, Format)
            maxval, mse = optimum(fmt, source)
            sqnr = 10 * math.log10(signal(source) / mse)
            out[name][label] = {"maxval": round(maxval, 5), "mse": float(f"{mse:.6g}"), "sqnr_db": round(sqnr, 3)}
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "optimal_sqnr.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = table()
    print("best SQNR in dB".ljust(18) + "".join(f"{name:>9s}" for name in FORMATS))
    for source, row in results.items():
        print(source.ljust(18) + "".join(f"{row[name]['sqnr_db']:9.2f}" for name in FORMATS))
    print("\nmean squared error, ours / printed by the paper's code")
    for source, row in PRINTED_MSE.items():
        for name, printed in row.items():
            print(f"{source:10s} {name}  {results[source][name]['mse']:.3e} / {printed:.2e}")
    stored = {"environment": environment(), "results": results, "printed_mse": PRINTED_MSE}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(stored, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
