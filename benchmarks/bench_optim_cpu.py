# SPDX-License-Identifier: Apache-2.0
"""How long is an optimizer step on the CPU? ns per parameter, beside bitsandbytes and torch, in one process.

    python benchmarks/bench_optim_cpu.py     # prints the table, writes benchmarks/results/optim_cpu.json (12 minutes)

One Parameter of 4096 x 1024, float32 and bfloat16, 1 thread, and (fewer contenders) as many as there are cores. Every
contender steps once per round, so that a busy machine slows all of them alike. Stored are the best and the median of
the rounds; for one thread those of the processor's time, too, which other processes change less than the time on the
wall; and how many times faster than bitsandbytes that is. The first step, which allocates and compiles (nothing is
cached), is timed by itself. A gate checks that compiled and eager steps leave the same bits; it comes after the
timing, as it would compile before, and without it nothing is written.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import environment, version
from harness import RESULTS, write_results

from hf_lowprec.optim import SGD, AdamW, Lion, StableAdamW

SHAPE = (4096, 1024)
STATES = ("8bit", "fp32", "bf16", "4bit", "fp8", "fp8-expand", "fp8-lm", "fp8-lm-exact", "compact")
THREADED = ("8bit", "fp8-lm", "compact")  # with more than one thread
NOT_COMPILED = ("fp8-lm-exact", "fp8-expand")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parameter(dtype: torch.dtype) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter((torch.randn(SHAPE, generator=generator) * 0.02).to(dtype))
    param.grad = (torch.randn(SHAPE, generator=generator) * 1e-3).to(dtype)
    return param


def contenders(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Steps by name; each has a parameter of its own."""
    steps: dict[str, Callable[[], Any]] = {
        "torch AdamW": torch.optim.AdamW([parameter(dtype)], foreach=False).step,
        "torch AdamW, fused": torch.optim.AdamW([parameter(dtype)], fused=True).step,
    }
    if version("bitsandbytes") is not None:
        import bitsandbytes

        steps["bitsandbytes AdamW8bit"] = bitsandbytes.optim.AdamW8bit([parameter(dtype)]).step
    for states in STATES if torch.get_num_threads() == 1 else THREADED:
        steps[f"ours AdamW, {states}"] = AdamW([parameter(dtype)], states=states).step
        if states not in NOT_COMPILED:
            steps[f"ours AdamW, {states}, compiled"] = AdamW([parameter(dtype)], states=states, compile=True).step
    for name, make in {"Lion": Lion, "SGD": lambda p: SGD(p, momentum=0.9), "StableAdamW": StableAdamW}.items():
        steps[f"ours {name}, 8bit"] = make([parameter(dtype)]).step
    return steps


def gate(dtype: torch.dtype) -> None:
    """Speed of other bits is no speed."""
    for states in STATES if torch.get_num_threads() == 1 else THREADED:
        if states in NOT_COMPILED:
            continue
        results = []
        for compiled in (False, True):
            param = parameter(dtype)
            optimizer = AdamW([param], states=states, compile=compiled)
            for _ in range(2):
                optimizer.step()
            results.append([param.detach(), *optimizer.state[param].values()])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)), states


def measure(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """ns per parameter and seconds of the first step, by contender."""
    numel = SHAPE[0] * SHAPE[1]
    out: dict[str, dict[str, float]] = {}
    for name, step in steps.items():
        start = time.perf_counter()
        step()
        out[name] = {"first_step_s": round(time.perf_counter() - start, 3)}
        step()
    wall: dict[str, list[float]] = {name: [] for name in steps}
    processor: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start, busy = time.perf_counter(), time.thread_time()
            step()
            processor[name].append((time.thread_time() - busy) / numel * 1e9)
            wall[name].append((time.perf_counter() - start) / numel * 1e9)
    for name, row in out.items():
        row |= {"best_ns": round(min(wall[name]), 2), "median_ns": round(statistics.median(wall[name]), 2)}
        if torch.get_num_threads() == 1:
            row["processor_ns"] = round(min(processor[name]), 2)
            row["processor_median_ns"] = round(statistics.median(processor[name]), 2)
    return out


def compare(rows: dict[str, dict[str, float]]) -> None:
    """Adds to every row how many times faster than bitsandbytes it is, by the processor's time where that is known."""
    reference = rows.get("bitsandbytes AdamW8bit")
    best, median = ("best_ns", "median_ns") if torch.get_num_threads() > 1 else ("processor_ns", "processor_median_ns")
    for row in rows.values() if reference is not None else ():
        row["times_bitsandbytes"] = round(reference[best] / row[best], 2)
        row["times_bitsandbytes_median"] = round(reference[median] / row[median], 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=RESULTS / "optim_cpu.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    cache = tempfile.TemporaryDirectory(prefix="bench_")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name
    cases: list[dict[str, Any]] = []
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        for label, dtype in DTYPES.items():
            load = os.getloadavg()[0]
            rows = measure(contenders(dtype), arguments.rounds)
            gate(dtype)
            compare(rows)
            print(f"\n{label}, {threads} thread(s), load {load:.1f}")
            columns = {
                "best_ns": "best ns",
                "median_ns": "median",
                "processor_ns": "cpu ns",
                "processor_median_ns": "median",
                "times_bitsandbytes": "x bnb",
                "times_bitsandbytes_median": "median",
                "first_step_s": "first s",
            }
            print(f"{'':34s}" + "".join(f"{title:>9s}" for title in columns.values()))
            for name, row in rows.items():
                print(f"{name:34s}" + "".join(f"{row.get(column, float('nan')):9.2f}" for column in columns))
                cases.append({"contender": name, "dtype": label, "threads": threads, "load": round(load, 2), **row})
    conditions = environment() | {"rounds": arguments.rounds}
    conditions["libraries"] |= {"bitsandbytes": version("bitsandbytes")}
    write_results(
        arguments.output, {"benchmark": "optim_cpu", "shape": SHAPE, "environment": conditions, "cases": cases}
    )
    print(f"\nwritten to {arguments.output.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
