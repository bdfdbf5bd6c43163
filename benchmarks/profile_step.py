# SPDX-License-Identifier: Apache-2.0
"""Where a training step's GPU time goes: torch.profiler over one step of a bench_step case, by kind of kernel.

    python benchmarks/profile_step.py 8b/2x4096x1/fp8-lm@bf16 8b/2x4096x1/bf16
    python benchmarks/profile_step.py 8b/2x4096x1/fp8-lm@bf16 --callers Memset      and who launches those

Prints for every case a table of kernel groups (milliseconds, launches), the longest kernels of each, and the host's
time beside the wall's for a step that is not profiled; with --out the same as JSON. Kernels of CUDA graphs count like
others; to see who launches them, profile the case with +nographs. Groups go by kernel names, in the
order of GROUPS; what no pattern knows is "other elementwise", so the sum is the whole step. With --callers it counts
which operators of torch, inside which others, have launched the GPU's work of a name that matches.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench_step import add_graphs, add_peers, import_peers, make_optimizer, recipe_argument
from environment import environment
from harness import SCRATCH, build_llama, make_accelerator, read_cases, write_results
from step_cases import GRAPH_WARMUP, MODELS, parse

GROUPS: tuple[tuple[str, str], ...] = (
    ("attention", r"sdpa|fmha|flash_(fwd|bwd)|attention"),
    ("GEMM fp8", r"nvjet_sm\d+_q|scaled_mm|e4m3.*gemm|gemm.*e4m3"),
    ("GEMM 16/32 bit", r"nvjet|gemm|cutlass|cublas|splitKreduce|xmma"),
    ("optimizer", r"step_kernel|prepare_kernel|multi_tensor|adam|foreach"),
    ("gradient quantisation", r"wire|swap_kernel|gradient_kernel"),
    ("norm, GLU (fused)", r"norm.*kernel.*|glu|swiglu|geglu|liger"),
    ("quantise, transpose", r"_cast_kernel|_amax_kernel|quantis|quantiz|transpose|_copy_kernel$"),
    ("loss, embedding", r"softmax|nll_loss|cross_entropy|embedding|index_"),
    ("copies, casts", r"copy_kernel|Memcpy|Memset|fill|CatArray"),
    ("reductions", r"reduce_kernel"),
)
OTHER = "other elementwise"


def group_of(kernel: str) -> str:
    return next((name for name, pattern in GROUPS if re.search(pattern, kernel, re.IGNORECASE)), OTHER)


def tally(kernels: list[tuple[str, int, float]]) -> dict[str, dict[str, Any]]:
    """(name, launches, milliseconds) of each kernel -> the groups, longest first, each with its longest kernels."""
    groups: dict[str, dict[str, Any]] = {}
    for name, count, milliseconds in sorted(kernels, key=lambda k: -k[2]):
        group = groups.setdefault(group_of(name), {"ms": 0.0, "launches": 0, "longest": []})
        group["ms"] += milliseconds
        group["launches"] += count
        if len(group["longest"]) < 4:
            group["longest"].append([name[:100], count, round(milliseconds, 3)])
    for group in groups.values():
        group["ms"] = round(group["ms"], 3)
    return dict(sorted(groups.items(), key=lambda item: -item[1]["ms"]))


def callers(events: Iterable[Any], pattern: str) -> dict[str, int]:
    """Operator < the one it runs in < ..., from FunctionEvents of the host: its launches whose names match."""
    found: Counter[str] = Counter()
    for event in events:
        count = sum(re.search(pattern, kernel.name) is not None for kernel in event.kernels)
        if count:
            names, parent = [event.name], event.cpu_parent
            while parent is not None and len(names) < 4:
                names.append(parent.name)
                parent = parent.cpu_parent
            found[" < ".join(names)] += count
    return dict(found.most_common())


def profiled(step: Any, pattern: str | None) -> tuple[list[tuple[str, int, float]], dict[str, int]]:
    """The GPU kernels of one step, without the ranges that torch puts over them (`Optimizer.step`); and `callers`."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        step()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    kernels = [
        (event.key, event.count, event.self_device_time_total / 1e3)
        for event in trace.key_averages()
        if event.device_type == cuda and not event.is_user_annotation and "#" not in event.key
    ]
    if pattern is None:
        return kernels, {}
    found = callers((event for event in trace.events() if event.device_type != cuda), pattern)
    launched = sum(count for name, count, _ in kernels if re.search(pattern, name))
    return kernels, {**found, "outside of operators": launched - sum(found.values())}


def run(case: str, pattern: str | None = None) -> dict[str, Any]:
    import torch

    model_name, batch, recipe = case.split("/")
    contender = parse(recipe)
    import_peers(contender)
    os.environ.update(contender.environment("cuda"))
    rows, seq, micro_batches = map(int, batch.split("x"))
    options: dict[str, Any] = {"gradient_accumulation_steps": micro_batches}
    if "compile" in contender.options:
        options["dynamo_backend"] = "inductor"
    accelerator = make_accelerator(recipe_argument(contender), "cuda", **options)
    model = build_llama(0, contender.dtype, "cuda", **MODELS[model_name])
    add_peers(model, contender)
    add_graphs(model, contender, "cuda")
    model, optimizer = accelerator.prepare(model, make_optimizer(contender, list(model.parameters())))
    model.train()
    ids = torch.randint(0, MODELS[model_name]["vocab_size"], (micro_batches, rows, seq), device="cuda")

    def step() -> None:
        for tokens in ids:
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
                optimizer.step()
                optimizer.zero_grad()

    for _ in range(3 + (GRAPH_WARMUP if contender.may_graph else 0)):
        step()
    torch.cuda.synchronize()
    clock = time.perf_counter()
    step()
    host = time.perf_counter() - clock
    torch.cuda.synchronize()
    wall = time.perf_counter() - clock
    kernels, who = profiled(step, pattern)
    groups = tally(kernels)
    return {
        "case": case, "host_ms": round(1e3 * host, 2), "wall_ms": round(1e3 * wall, 2),
        "gpu_ms": round(sum(group["ms"] for group in groups.values()), 2),
        "launches": sum(group["launches"] for group in groups.values()), "groups": groups,
        **({"callers": {pattern: who}} if pattern is not None else {}),
    }  # fmt: skip


def show(result: dict[str, Any]) -> str:
    lines = [
        "== {case}: GPU {gpu_ms} ms in {launches} launches, host {host_ms} ms, wall {wall_ms} ms".format(**result)
    ]
    for name, group in result["groups"].items():
        lines.append(f"{group['ms']:9.2f} ms {group['launches']:6d}  {name}")
        lines += [f"    {ms:9.2f} {count:6d}      {kernel}" for kernel, count, ms in group["longest"]]
    for pattern, found in result.get("callers", {}).items():
        lines.append(f"{pattern}, launched by")
        lines += [f"{count:6d}  {name}" for name, count in found.items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="+", help="model/batch/contender, as in step_cases.py")
    parser.add_argument("--callers", metavar="PATTERN", help="who launches GPU work of such a name")
    parser.add_argument("--out", type=Path, help="JSON to add the results to")
    args = parser.parse_args()
    SCRATCH.mkdir(parents=True, exist_ok=True)
    if len(args.cases) > 1:  # one process each: an Accelerator cannot be had twice
        import subprocess

        more = [] if args.out is None else ["--out", str(args.out)]
        more += [] if args.callers is None else ["--callers", args.callers]
        return max(subprocess.run([sys.executable, __file__, case, *more]).returncode for case in args.cases)
    result = run(args.cases[0], args.callers)
    print(show(result), flush=True)
    if args.out is not None:
        known = {case["case"]: case for case in read_cases(args.out)}
        known[result["case"]] = {**result, "environment": environment()}
        write_results(args.out, {"benchmark": "profile", "cases": list(known.values())})
    return 0


if __name__ == "__main__":
    sys.exit(main())
