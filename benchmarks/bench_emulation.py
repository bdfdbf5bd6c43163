# SPDX-License-Identifier: Apache-2.0
"""What emulation costs on a GPU: casts to any format beside a copy, narrow sums beside the same kernel in float32.

    python benchmarks/bench_emulation.py                        all cases (two minutes)
    python benchmarks/bench_emulation.py --only mxfp4 sums      cases whose name contains one of these
    python benchmarks/bench_emulation.py --micro --device cpu   the script itself, by the plain torch versions

Before a case is timed its result is compared, bit for bit, with the plain torch version of the same inputs on the CPU.
Targets: quantise-dequantise at 0.9 of the bandwidth of a copy; sums in at most 2 times (nearest) and 4 times
(stochastic) the time of the float32 kernel, which adds in the same order with the same tiles. Writes
results/emulation.json; a call replaces the cases that it measures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_kernels import line, measure
from environment import environment
from harness import RESULTS, SCRATCH, read_cases, write_results
from kernel_cases import Case, copy

from hf_lowprec import numerics, ops
from hf_lowprec.ops.quantize import storage_dtype
from hf_lowprec.recipe import NONE, Accumulation, Quant, Rounding, Scaling

SR13 = Rounding(mode="stochastic", bits=13)
SR = Rounding(mode="stochastic")
SEED = 1 << 40


def mx(name: str, snap: str = "ocp", rounding: Rounding | None = None) -> Quant:
    scaling = Scaling(granularity="block", block=(32,), snap=snap, store="e8m0")  # type: ignore[arg-type]
    return Quant(format=name, scaling=scaling, rounding=rounding or Rounding())


ROW = Scaling(granularity="row", snap="ocp")
QUANTS: dict[str, Quant] = {
    "mxfp8 e4m3": mx("e4m3fn", "rceil"),
    "mxfp6 e3m2, away": mx("e3m2", rounding=Rounding(mode="away")),
    "mxfp4 e2m1": mx("e2m1"),
    "mxfp4 e2m1, stochastic": mx("e2m1", rounding=SR),
    "mxint8": mx("e0m7"),
    "e3m1 per row": Quant(format="e3m1", scaling=ROW),
    "int8 per row": Quant(format="e0m7", scaling=Scaling(granularity="row")),
    "e4m3b11fnuz, no scale": Quant(format="e4m3b11fnuz", scaling=NONE),
    "e6m9, no scale": Quant(format="e6m9", scaling=NONE),
    "e6m9, no scale, stochastic": Quant(format="e6m9", scaling=NONE, rounding=SR),
    "e6m5 flush, no scale, 13 bits": Quant(format="e6m5", scaling=NONE, rounding=SR13),
    "e4m3fn, no scale, 9 bits": Quant(format="e4m3fn", scaling=NONE, rounding=Rounding(mode="stochastic", bits=9)),
    "e3m4 per tensor": Quant(format="e3m4"),
}
SUMS: dict[str, Accumulation | None] = {
    "float32": None,
    "e6m9 nearest": Accumulation(format="e6m9"),
    "e6m9 nearest, chunks of 64": Accumulation(format="e6m9", chunk=64, outer="e6m9"),
    "e6m5 nearest": Accumulation(format="e6m5"),
    "e6m5 stochastic 13": Accumulation(format="e6m5", rounding=SR13),
    "e6m5 stochastic 13, chunks of 64": Accumulation(format="e6m5", rounding=SR13, chunk=64, outer="e6m5"),
    "e6m9 stochastic": Accumulation(format="e6m9", rounding=SR),
    "tc14 truncated, chunks of 128": Accumulation(format="tc14", rounding=Rounding(mode="zero"), chunk=128),
}


def cast(quant: Quant, dtype: torch.dtype, codes: bool, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Codes of a tensor, or what they stand for, on this device."""
    random = quant.rounding.mode == "stochastic"
    if device == "cpu":
        if codes:
            return lambda x: numerics.quantize(x, quant, seed=SEED if random else None).qdata
        return lambda x: numerics.quantize_dequantize(x, quant, seed=SEED if random else None)
    from hf_lowprec.kernels.triton import any_cast

    plan, seed = any_cast.plan_of(quant), torch.tensor(SEED, device=device) if random else None
    assert plan is not None
    return lambda x: any_cast.quantize(x, plan, seed=seed, values=not codes)[0]


def cast_cases(rows: int, columns: int, device: str) -> Iterator[tuple[Case, Callable[[], bool]]]:
    """Each case with a check of its values on a small tensor."""
    for name, quant in QUANTS.items():
        for dtype in (torch.bfloat16, torch.float32):
            for codes, turned in ((False, False), (True, False), (True, True)):
                if turned and quant.scaling.granularity != "block":
                    continue
                size = storage_dtype(quant.format).itemsize if codes else dtype.itemsize
                passes = 2 if quant.scaling.granularity == "tensor" and quant.scaling.method == "current" else 1
                moved = rows * columns * (passes * dtype.itemsize + size)
                do = cast(quant, dtype, codes, device)

                def some(r: int, c: int, dtype: torch.dtype = dtype, turned: bool = turned) -> torch.Tensor:
                    x = torch.randn(c, r) if turned else torch.randn(r, c)
                    x = x.to(dtype).to(device)
                    return x.t() if turned else x

                def make(do: Any = do, some: Any = some) -> Callable[[], Any]:
                    x = some(rows, columns)
                    return lambda: do(x)

                def check(do: Any = do, some: Any = some, q: Quant = quant, c: bool = codes) -> bool:
                    x = some(70, 96)
                    truth = cast(q, x.dtype, c, "cpu")(x.cpu().contiguous())
                    return torch.equal(bits(do(x).cpu()), bits(truth))

                what = "quantise" if codes else "quantise-dequantise"
                label = f"{what} {name}{', transposed view' if turned else ''}, {str(dtype)[6:]}"
                yield Case(f"{label}, {rows} x {columns}", make, moved), check


def sum_cases(m: int, n: int, k: int, device: str) -> Iterator[tuple[Case, Callable[[], bool]]]:
    """E5M2 operands; the bytes of operands do not count."""
    key = ops.quant_key(Quant(format="e5m2", scaling=NONE))

    def product(how: Accumulation | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seed = torch.tensor(SEED, device=a.device)
        if a.is_cuda:
            from hf_lowprec.kernels.triton.accumulate import accumulate

            return accumulate(a, "e5m2", b, "e5m2", how, seed)
        one, sums = torch.ones(()), "" if how is None else ops.accumulation_key(how)
        return ops.scaled_mm(a, one, key, b, one, key, dtype=torch.float32, accumulation=sums, seed=seed)

    def operands(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (torch.randn(rows, k).to(torch.float8_e5m2).to(device) for rows in (m, n))
        return a, b

    for name, how in SUMS.items():

        def make(how: Accumulation | None = how) -> Callable[[], Any]:
            a, b = operands(m, n, k)
            return lambda: product(how, a, b)

        def check(how: Accumulation | None = how) -> bool:
            a, b = operands(70, 50, 200)
            got, truth = product(how, a, b).cpu(), product(how, a.cpu(), b.cpu())
            return torch.equal(got, truth) if how is not None else torch.allclose(got, truth, rtol=1e-4, atol=1e-4)

        yield Case(f"sums {name}, {m} x {n} x {k}", make, 0, 2 * m * n * k), check


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.dtype.itemsize])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--micro", action="store_true", help="toy sizes, to try the script")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="default: results/emulation.json, a scratch file with --micro")
    args = parser.parse_args()
    args.out = args.out or (SCRATCH if args.micro else RESULTS) / "emulation.json"
    here, known = environment(), {case["kernel"]: case for case in read_cases(args.out)}
    rows, columns = (32, 64) if args.micro else (8192, 8192)
    shapes = ((16, 16, 32),) if args.micro else ((2048, 2048, 2048), (4096, 1024, 1024))
    (copied,) = copy(rows, columns, args.device)
    speed = measure(copied, None, args.device, args.rounds)["gb_per_s"]
    print(f"device copy {speed} GB/s")
    known["device copy"] = {"kernel": "device copy", "status": "ok", "gb_per_s": speed, "environment": here}
    cases = [case for shape in shapes for case in sum_cases(*shape, args.device)]
    cases += cast_cases(rows, columns, args.device)
    baseline: dict[str, float] = {}
    for case, check in cases:
        if not any(text in case.name for text in args.only) and "sums float32" not in case.name:
            continue
        found: dict[str, Any] = {"status": "the values differ from numerics"}
        if check():
            found = measure(case, speed, args.device, args.rounds)
        shape = case.name.rpartition(", ")[2]
        if found["status"] == "ok" and case.name.startswith("sums"):
            baseline.setdefault(shape, found["us"])  # float32 comes first
            found["ratio"] = round(found["us"] / baseline[shape], 3)
        known[case.name] = {"kernel": case.name, **found, "environment": here}
        ratio = f", {found['ratio']:.2f} of float32" if "ratio" in found else ""
        print(f"{case.name:<80} {line(found)}{ratio}", flush=True)
        if args.device == "cuda":
            torch.cuda.empty_cache()
        write_results(args.out, {"benchmark": "emulation", "cases": list(known.values())})  # a call may be cut off
    return 0


if __name__ == "__main__":
    sys.exit(main())
