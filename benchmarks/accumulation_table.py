# SPDX-License-Identifier: Apache-2.0
"""What a sum narrower than float32 loses: mean relative error of sums of N uniform E5M2 values, on the CPU.

    python benchmarks/accumulation_table.py            # a few minutes; writes benchmarks/results/accumulation.json

Each value is drawn from U(0, 1) and rounded to E5M2; the sum is a dot product with ones, in the order of the values
(`numerics.accumulate`), so that what is lost is lost in the additions. Nearest rounding stalls where a value is less
than half a unit of the sum: in E6M9 at 1024, in E6M5 at 64. Chunks (arXiv 1812.08011) keep the sums small, random bits
(arXiv 2404.14010) let a small value count sometimes; with too few of them it does not count often enough.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from environment import environment
from harness import RESULTS, SCRATCH, write_results

from hf_lowprec.numerics import accumulate, round_to_format
from hf_lowprec.recipe import Accumulation, Rounding

LENGTHS = (256, 1024, 4096, 16384, 65536)
TRIALS = 64


def stochastic(bits: int) -> Rounding:
    return Rounding(mode="stochastic", bits=bits)


CASES: dict[str, Accumulation] = {
    "E6M9 nearest": Accumulation(format="e6m9"),
    "E6M9 nearest, chunks of 64": Accumulation(format="e6m9", chunk=64, outer="e6m9"),
    "E6M5 nearest": Accumulation(format="e6m5"),
    **{f"E6M5 stochastic, r = {r}": Accumulation(format="e6m5", rounding=stochastic(r)) for r in (4, 7, 9, 11, 13)},
    "E6M5 stochastic, r = 13, chunks of 64": Accumulation(
        format="e6m5", rounding=stochastic(13), chunk=64, outer="e6m5"
    ),
    "14 bits truncated, chunks of 128 in float32": Accumulation(
        format="tc14", rounding=Rounding(mode="zero"), chunk=128
    ),
}


def errors(how: Accumulation, n: int, trials: int, seed: int = 0) -> torch.Tensor:
    """|sum - exact| / exact, float64 [trials]."""
    drawn = torch.rand(trials, 1, n, generator=torch.Generator().manual_seed(seed))
    values = round_to_format(drawn, "e5m2")
    exact = values.double().sum(-1, keepdim=True)
    sums = accumulate(values, torch.ones_like(values), how, seed=seed + 1).double()
    return ((sums - exact).abs() / exact).flatten()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro", action="store_true", help="short sums, few of them, to try the script")
    parser.add_argument("--out", type=Path, help="default: results/accumulation.json, a scratch file with --micro")
    args = parser.parse_args()
    out = args.out or (SCRATCH if args.micro else RESULTS) / "accumulation.json"
    lengths, trials = ((256, 1024), 4) if args.micro else (LENGTHS, TRIALS)
    torch.set_num_threads(1)
    here = environment()
    cases: list[dict[str, Any]] = []
    print(f"{'':45s}" + "".join(f"{n:>9d}" for n in lengths))
    for name, how in CASES.items():
        begin = time.perf_counter()
        points = []
        for n in lengths:
            found = errors(how, n, trials)
            points.append([n, round(float(found.mean()), 6), round(float(found.std()) / trials**0.5, 6)])
        seconds = round(time.perf_counter() - begin, 2)
        cases.append({"sums": name, "points": points, "seconds": seconds})
        print(f"{name:45s}" + "".join(f"{error:9.4f}" for _, error, _ in points), flush=True)
    head = {"benchmark": "accumulation", "values": "U(0, 1) in E5M2", "trials": trials, "environment": here}
    write_results(out, {**head, "cases": cases})
    print(f"written to {out.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
