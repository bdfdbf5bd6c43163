# SPDX-License-Identifier: Apache-2.0
"""How fast is emulation on one CPU thread? Quantise-dequantise of 2^22 float32, eager, beside the usual ways.

    python benchmarks/bench_numerics.py            # prints the table, writes benchmarks/results/numerics_cpu.json

Every contender runs once per round, rounds are interleaved, and the median over rounds counts: a machine that is busy
slows all of them alike. A gate before timing checks that contenders compute the same values.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from environment import environment

from hf_lowprec.numerics import dequantize, encode, quantize, quantize_dequantize, round_to_format
from hf_lowprec.recipe import Quant, Rounding, Scaling

N = 1 << 22
MX4 = Quant(format="e2m1", scaling=Scaling(granularity="block", block=(32,), snap="ocp", store="e8m0"))
CURRENT = Quant(format="e4m3fn", scaling=Scaling(snap="rceil"))
REFERENCE_E4M3, REFERENCE_MX = "torch: clamp, cast, cast back", "torchao: to_mx, dequantize"


def torch_e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.float32)


def torch_scaled(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax() / 448
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.float32) * scale


def torchao_mx(x: torch.Tensor) -> torch.Tensor:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    out: torch.Tensor = MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32).dequantize(torch.float32)
    return out


def contenders(x: torch.Tensor) -> dict[str, dict[str, Callable[[], torch.Tensor]]]:
    """Groups of functions; the first of a group is what the others are compared with."""
    stochastic = Rounding(mode="stochastic")
    qdata = quantize(x, CURRENT)
    groups: dict[str, dict[str, Callable[[], torch.Tensor]]] = {
        "E4M3 quantise-dequantise": {
            REFERENCE_E4M3: lambda: torch_e4m3(x),
            "torch: cast, cast back": lambda: x.to(torch.float8_e4m3fn).to(torch.float32),
            "ours: round_to_format": lambda: round_to_format(x, "e4m3fn"),
            "memory: clone": lambda: x.clone(),
        },
        "E4M3 with the tensor's own scale": {
            "torch: amax, scale, cast and back": lambda: torch_scaled(x),
            "ours: quantize_dequantize": lambda: quantize_dequantize(x, CURRENT),
            "ours: quantize": lambda: quantize(x, CURRENT).qdata,
            "ours: dequantize": lambda: dequantize(qdata, CURRENT),
        },
        "MXFP4, blocks of 32, quantise-dequantise": {
            REFERENCE_MX: lambda: torchao_mx(x),
            "ours: quantize_dequantize": lambda: quantize_dequantize(x, MX4),
        },
        "others, ours only": {
            "round_to_format e5m10": lambda: round_to_format(x, "e5m10"),
            "round_to_format e8m7": lambda: round_to_format(x, "e8m7"),
            "round_to_format e4m3fn stochastic": lambda: round_to_format(x, "e4m3fn", stochastic, seed=1),
            "encode e2m1": lambda: encode(x, "e2m1"),
        },
    }
    try:
        version("torchao")
    except PackageNotFoundError:
        del groups["MXFP4, blocks of 32, quantise-dequantise"]
    return groups


def gate(x: torch.Tensor, groups: dict[str, dict[str, Callable[[], torch.Tensor]]]) -> None:
    """Speed of wrong values is no speed."""
    assert torch.equal(round_to_format(x, "e4m3fn").view(torch.int32), torch_e4m3(x).view(torch.int32))
    if "MXFP4, blocks of 32, quantise-dequantise" in groups:
        assert torch.equal(quantize_dequantize(x, MX4), torchao_mx(x))


def measure(groups: dict[str, dict[str, Callable[[], torch.Tensor]]], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds per contender."""
    times: dict[str, dict[str, list[float]]] = {g: {name: [] for name in fs} for g, fs in groups.items()}
    for turn in range(rounds + 1):  # the first round warms up
        for group, functions in groups.items():
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                if turn:
                    times[group][name].append(time.perf_counter() - start)
    return {g: {name: statistics.median(ts) for name, ts in fs.items()} for g, fs in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "numerics_cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(N // 2048, 2048)
    groups = contenders(x)
    gate(x, groups)
    medians = measure(groups, arguments.rounds)

    result: dict[str, object] = {
        "environment": environment()
        | {"threads": torch.get_num_threads(), "rounds": arguments.rounds, "load": os.getloadavg()[0]},
        "elements": N,
    }
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for group, times in medians.items():
        first = next(iter(times.values()))
        print(f"\n{group:44s} {'ms':>8s} {'Melem/s':>9s} {'speed-up':>9s}")
        rows[group] = {}
        for name, seconds in times.items():
            row = {"ms": seconds * 1e3, "melem_per_s": N / seconds / 1e6, "speedup": first / seconds}
            rows[group][name] = {key: round(value, 3) for key, value in row.items()}
            print(f"  {name:42s} {row['ms']:8.2f} {row['melem_per_s']:9.0f} {row['speedup']:9.2f}")
    result["results"] = rows
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
