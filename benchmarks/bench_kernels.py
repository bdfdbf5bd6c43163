# SPDX-License-Identifier: Apache-2.0
"""GB/s of the bytes that each element-wise kernel must move, beside a device copy; TFLOP/s of the GEMMs. One GPU.

    python benchmarks/bench_kernels.py                  all of kernel_cases.py (a minute)
    python benchmarks/bench_kernels.py --only norm glu  families, or cases whose name contains one of these
    python benchmarks/bench_kernels.py --micro --device cpu   the script itself: times mean nothing there

Each time is the median over rounds of back-to-back calls, queued while the GPU sleeps so that the host's time does not
count, on tensors that take turns so that the L2 cache does not help. host_us is what one call costs the host. Target:
copy_share >= 0.9. Writes results/kernels.json; a call replaces the cases that it measures.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

from environment import environment
from harness import RESULTS, SCRATCH, read_cases, write_results
from kernel_cases import FAMILIES, SHAPES, Case

CACHE = 300_000_000  # bytes that sets of tensors hold in all: several times any L2


def calls_in_turn(case: Case, device: str) -> Callable[[], Any]:
    """Each call works on the next of several sets of tensors."""
    sets = max(1, min(8, CACHE // max(case.moved, 1))) if device == "cuda" and case.moved else 1
    turn = cycle([case.make() for _ in range(sets)])
    return lambda: next(turn)()


def milliseconds(call: Callable[[], Any], device: str, rounds: int, calls: int = 8) -> float:
    import torch

    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        if device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            torch.cuda._sleep(2_000_000)  # a millisecond, in which the queue fills
            begin.record()
            for _ in range(calls):
                call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / calls)
        else:
            clock = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - clock))
    return statistics.median(times)


def host_microseconds(call: Callable[[], Any], device: str, calls: int = 30) -> float:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter()
    for _ in range(calls):
        call()
    spent = time.perf_counter() - clock
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e6 * spent / calls


def measure(case: Case, copy: float | None, device: str, rounds: int) -> dict[str, Any]:
    """copy: GB/s of the device copy of the same process."""
    import hf_lowprec.kernels  # noqa: F401  without it all operators are plain torch

    try:
        call = calls_in_turn(case, device)
        ms = milliseconds(call, device, rounds)
        host = host_microseconds(call, device) if device == "cuda" else None
    except Exception as error:
        return {"status": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"}
    out: dict[str, Any] = {"status": "ok", "us": round(1e3 * ms, 2), "host_us": host and round(host, 1)}
    if case.moved:
        rate = case.moved / ms / 1e6
        out |= {"bytes": case.moved, "gb_per_s": round(rate, 1), "copy_share": copy and round(rate / copy, 3)}
    else:
        out["tflops"] = round(case.operations / ms / 1e9, 1)
    return out


def line(found: dict[str, Any]) -> str:
    if found["status"] != "ok":
        return str(found["status"])
    rate, unit = (found["tflops"], "TFLOP/s") if "tflops" in found else (found["gb_per_s"], "GB/s")
    share = f" {found['copy_share']:.2f} of copy" if found.get("copy_share") else ""
    return f"{found['us']:9.1f} us {rate:8.0f} {unit}{share}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], help="families or parts of names")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--micro", action="store_true", help="toy sizes, to try the script")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="default: results/kernels.json, a scratch file with --micro")
    args = parser.parse_args()
    args.out = args.out or (SCRATCH if args.micro else RESULTS) / "kernels.json"
    here = environment()
    known = {case["kernel"]: case for case in read_cases(args.out)}
    copy: float | None = None
    for family, cases in FAMILIES.items():
        for rows, columns in ((32, 64),) if args.micro else SHAPES[family]:
            for case in cases(rows, columns, args.device):
                name = case.name if family == "gemm" else f"{case.name}, {rows} x {columns}"
                if family != "copy" and not any(text in f"{family} {name}" for text in args.only):
                    continue
                found = measure(case, copy, args.device, args.rounds)
                copy = found["gb_per_s"] if family == "copy" else copy
                known[name] = {"kernel": name, "family": family, **found, "environment": here}
                print(f"{name:<75} {line(found)}", flush=True)
                if args.device == "cuda":
                    import torch

                    torch.cuda.empty_cache()
        write_results(args.out, {"benchmark": "kernels", "cases": list(known.values())})
    return 0


if __name__ == "__main__":
    sys.exit(main())
