# SPDX-License-Identifier: Apache-2.0
"""How fast is emulation on one CPU thread? Quantise-dequantise of 2^22 float32 beside everybody who does it.

    pip install -e .[peers]
    python benchmarks/bench_numerics.py            # prints the table, writes benchmarks/results/numerics_cpu.json

`numerics_peers.py` lists the contenders and what each of them really computes; a gate before timing holds each to it.
Times are the processor time of the process, so that what others do on the machine counts as little as it can (their
use of caches and memory still does). Every contender runs once per round, rounds are interleaved, the median counts;
`spread` is (third quartile - first) / median: how far to trust a row. Freed memory is kept by the process (MALLOC):
the page faults of a fresh 16 MiB result would cost up to as much as the arithmetic, depending on who ran before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import environment, version
from numerics_peers import FACTOR, TARGETS, groups, ready

N = 1 << 22
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 34), "MALLOC_TOP_PAD_": str(1 << 26)}
PEERS = ("qtorch", "gfloat", "ml_dtypes", "unit-scaling", "apytypes")


def measure(
    functions: dict[str, Callable[[torch.Tensor], Any]], x: torch.Tensor, rounds: int
) -> dict[str, list[float]]:
    """Seconds of every round, by contender."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):  # the first round warms up
        for name, function in functions.items():
            start = time.process_time()
            function(x)
            if turn:
                times[name].append(time.process_time() - start)
    return times


def rows(times: dict[str, list[float]], elements: int) -> dict[str, dict[str, float]]:
    """Median milliseconds, rate, spread, and how many times our eager function each of them takes."""
    out: dict[str, dict[str, float]] = {}
    base = None
    for name, seconds in times.items():
        median = statistics.median(seconds)
        base = median if base is None else base
        low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (median,) * 3
        row = {"ms": median * 1e3, "melem_per_s": elements / median / 1e6, "times_ours": median / base,
               "spread": (high - low) / median}  # fmt: skip
        out[name] = {key: round(value, 3) for key, value in row.items()}
    return out


def missed(table: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Where we are less than FACTOR times as fast as one of TARGETS, in words."""
    return [
        f"{group}: {name} takes {row['times_ours']:.1f} times ours, the target is {FACTOR:g}"
        for group, contenders in table.items()
        for name, row in contenders.items()
        if name.startswith(TARGETS) and row["times_ours"] < FACTOR
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=N // 2048, help="of 2048 elements")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "numerics_cpu.json")
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):  # glibc reads them when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC, "OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(arguments.rows, 2048)
    load = os.getloadavg()[0]
    table: dict[str, dict[str, dict[str, float]]] = {}
    gates: dict[str, dict[str, str]] = {}
    missing: dict[str, str] = {}
    for group, contenders in groups(x).items():
        functions, absent = ready(contenders, x)
        missing |= {f"{group}: {name}": why for name, why in absent.items()}
        gates[group] = {name: contenders[name].says for name in functions if contenders[name].says}
        table[group] = rows(measure(functions, x, arguments.rounds), x.numel())
        print(f"\n{group:44s} {'ms':>8s} {'Melem/s':>9s} {'x ours':>8s} {'spread':>8s}")
        for name, row in table[group].items():
            numbers = f"{row['ms']:8.2f} {row['melem_per_s']:9.0f} {row['times_ours']:8.2f} {row['spread']:8.2f}"
            print(f"  {name:42s} {numbers}")
    for line in [f"not there: {name}: {why}" for name, why in missing.items()] + missed(table):
        print(line)
    here = environment()
    here["libraries"] |= {name: version(name) for name in PEERS}
    result = {
        "environment": here | {"threads": torch.get_num_threads(), "rounds": arguments.rounds, "malloc": MALLOC,
                               "load": [round(load, 2), round(os.getloadavg()[0], 2)]},
        "elements": x.numel(), "gates": gates, "missing": missing, "missed": missed(table), "results": table,
    }  # fmt: skip
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
