# SPDX-License-Identifier: Apache-2.0
"""Step time and peak memory of a Llama training step through Accelerator.prepare, ours and peers, against bf16.

    python benchmarks/bench_step.py                     every case of step_cases.py (one GPU)
    python benchmarks/bench_step.py --only 8b/2x4096    cases whose name contains this; `8b/2x4096x1/fp8-lm$` is exact
    python benchmarks/bench_step.py --minutes 4         the first ones, those that decide most come first
    python benchmarks/bench_step.py --recipes           every recipe on recipe_study.py's model: what emulation costs
    python benchmarks/bench_step.py --micro --device cpu --only tiny   the script itself, on a CPU

Finished cases are kept, so a call goes on where the last one ended. Every call measures the baseline of each group
again, and its ratios are to that: none crosses calls. Peers that are not installed are skipped and named. Losing rows
stay in. `lora` cases train adapters of rank 16 on a frozen base; there the question is memory.

    step_ms             median of CUDA-event times over --steps steps after --warmup, to which those until layers are
                        captured are added; host_ms until step() returns
    peak_gib            torch's peak over those steps, without what replays of CUDA graphs use;
                        weights_gib, states_gib and held_gib (all that is allocated between steps) say what it is of
    reserved_gib        the most that torch's allocator holds of the GPU in those steps, pools of graphs included, once
                        warm-up's leftovers were given back: the memory to compare where there are graphs
    graphs, graphs_*    what became of CUDA graphs of layers, where there may be any
    tflops, mfu_*       step_cases.flops_per_step over the time, and as a share of the GPU's bf16 and FP8 peak

Cases take turns on the GPU (a file lock); while one runs, the next ones only import.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from environment import environment
from harness import (
    BASELINE,
    RESULTS,
    SCRATCH,
    build_llama,
    file_name,
    finish,
    make_accelerator,
    peak_gib,
    read_cases,
    report_of,
    reusable,
    start,
    write_results,
)
from step_cases import CASES, GRAPH_WARMUP, MICRO, MODELS, RECIPES, Contender, flops_per_step, parse, utilisation

NOT_INSTALLED = "not installed"
GIB = 2**30


class Missing(Exception):
    """A peer that cannot be imported."""


# --- one case: the worker process ----------------------------------------------------------------------------------


@contextlib.contextmanager
def turn(path: Path) -> Iterator[None]:
    """Holds the GPU for this process: one at a time between here and the end of the block."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def import_peers(contender: Contender) -> None:
    """Import what the contender needs, before its turn. Raises Missing."""
    try:
        if contender.name.startswith("torchao"):
            import torchao.float8  # noqa: F401
        if {"liger", "liger-loss"} & contender.options:
            import liger_kernel.transformers  # noqa: F401
    except ImportError as error:
        raise Missing(f"{NOT_INSTALLED}: {error.name or error}") from error


def add_peers(model: Any, contender: Contender) -> None:
    """torchao's linears and liger-kernel's modules in place of the model's own."""
    if contender.name.startswith("torchao"):
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        recipe = contender.name.partition("-")[2] or "tensorwise"
        config = Float8LinearConfig.from_recipe_name(recipe)
        convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: "lm_head" not in name)
    if "liger" in contender.options:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model)


def add_graphs(model: Any, contender: Contender, device: str) -> None:
    """Graphs of the baseline's layers; those of ours are switched on by the environment."""
    if "graphs" in contender.options and device == "cuda" and not contender.ours:
        from hf_lowprec import graph_layers

        graph_layers(model)


def add_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))


def recipe_argument(contender: Contender) -> str:
    """What to pass as `mixed_precision`: a name, or a recipe file where the case changes a field."""
    if not contender.ours:  # bf16 weights: autocast would only add casts
        return "no" if contender.dtype == "bf16" else BASELINE
    if not contender.changes:
        return contender.name
    from hf_lowprec.presets import get_recipe

    changed = get_recipe({**get_recipe(contender.name).to_dict(), **contender.changes})
    path = SCRATCH / f"{'-'.join((contender.name, *contender.changes.values()))}.yaml"
    path.write_text(changed.to_yaml())
    return str(path)


def make_optimizer(contender: Contender, parameters: list[Any]) -> Any:
    if contender.states is not None:
        from hf_lowprec.optim import AdamW

        return AdamW(parameters, lr=1e-5, states=contender.states)
    import torch

    return torch.optim.AdamW(parameters, lr=1e-5, fused=True)


def measure(model_name: str, batch: str, recipe: str, device: str, warmup: int, steps: int) -> dict[str, Any]:
    import peft  # noqa: F401  imports come before the turn, so that no one waits for them
    import torch
    import transformers  # noqa: F401

    contender = parse(recipe)
    import_peers(contender)
    os.environ.update(contender.environment(device))
    options: dict[str, Any] = {"gradient_accumulation_steps": int(batch.split("x")[2])}
    if "compile" in contender.options:
        options["dynamo_backend"] = "inductor"
    accelerator = make_accelerator(recipe_argument(contender), device, **options)
    with turn(SCRATCH / "gpu.lock"):
        try:
            return train(accelerator, model_name, batch, contender, warmup, steps)
        finally:  # the next process needs the memory while this one is still leaving
            accelerator.free_memory()
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()


def train(
    accelerator: Any, model_name: str, batch: str, contender: Contender, warmup: int, steps: int
) -> dict[str, Any]:
    import torch

    device, config = accelerator.device.type, MODELS[model_name]
    model = build_llama(0, contender.dtype, device, **config)
    flops = flops_per_step(model, config, batch)
    add_peers(model, contender)
    if model_name.endswith("-lora"):
        model = add_lora(model)
    parameters = sum(p.numel() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    inner = model
    add_graphs(model, contender, device)
    model, optimizer = accelerator.prepare(model, make_optimizer(contender, trained))
    model.train()
    rows, seq, micro_batches = map(int, batch.split("x"))
    ids = torch.randint(0, config["vocab_size"], (micro_batches, rows, seq), device=device)

    def step() -> Any:
        for tokens in ids:
            with accelerator.accumulate(model):
                loss = model(input_ids=tokens, labels=tokens).loss
                accelerator.backward(loss)
                if "clip" in contender.options and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        return loss.detach()

    clock = time.perf_counter()
    warmup += GRAPH_WARMUP if contender.may_graph and device == "cuda" else 0
    loss, times, hosts, peak = timed(step, warmup, steps, device)
    median = statistics.median(times)
    out = {
        "status": "ok", "parameters": parameters, "trained_parameters": sum(p.numel() for p in trained),
        "step_ms": round(median, 2), "step_ms_min": round(min(times), 2), "step_ms_max": round(max(times), 2),
        "host_ms": round(statistics.median(hosts), 2), "tokens_per_s": round(ids.numel() / median * 1e3),
        "peak_gib": peak, "loss": float(loss), "all_steps_s": round(time.perf_counter() - clock, 1),
        **memory_between_steps(inner, optimizer, device),
    }  # fmt: skip
    if not model_name.endswith("-lora"):  # what a frozen weight costs is another formula
        out |= utilisation(flops, median, torch.cuda.get_device_name() if device == "cuda" else None)
    if contender.may_graph and device == "cuda":
        out |= graphs_of(inner)
    if contender.ours and contender.name != "fp16":  # which converts no layer
        report = report_of(accelerator, model)
        out |= {"summary": report.summary(), "kernels": report.kernels}
    return out


def graphs_of(model: Any) -> dict[str, Any]:
    """What became of graphs of layers; empty where nobody thought of them (`fp16` converts nothing)."""
    from hf_lowprec.conversion import report_of, unwrapped
    from hf_lowprec.graphs.lists import OWNER, LayerGraphs

    report = report_of(model)
    graphs = unwrapped(model).__dict__.get(OWNER) if report is None else report.graphs
    if not isinstance(graphs, LayerGraphs):  # words, why there are none
        return {} if graphs is None else {"graphs": str(graphs)}
    return {
        "graphs": str(graphs), "graphs_captured": graphs.captured, "graphs_replays": graphs.replays,
        "graphs_eager": graphs.eager,
    }  # fmt: skip


def memory_between_steps(model: Any, optimizer: Any, device: str) -> dict[str, float]:
    """What is held when no step runs: the weights, the optimizer's states, and all that is allocated."""
    if device != "cuda":
        return {}
    import torch
    from torch.utils._pytree import tree_leaves

    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
        optimizer = optimizer.optimizer

    def size(tensors: Any) -> float:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.is_cuda}
        return round(sum(storages.values()) / GIB, 3)

    states = [t for t in tree_leaves(list(optimizer.state.values())) if isinstance(t, torch.Tensor)]
    return {
        "weights_gib": size(model.parameters()), "states_gib": size(states),
        "held_gib": round(torch.cuda.memory_allocated() / GIB, 3),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
    }  # fmt: skip


def timed(step: Any, warmup: int, steps: int, device: str) -> tuple[Any, list[float], list[float], float | None]:
    """The last loss, milliseconds of each measured step, milliseconds until each returned, peak GiB over them."""
    import torch

    times, hosts = [], []
    for index in range(warmup + steps):
        if index == warmup - 1 and device == "cuda":  # one step to map again what steps need
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        if index == warmup and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            begin.record()
        clock = time.perf_counter()
        loss = step()
        hosts.append(1e3 * (time.perf_counter() - clock))
        if device == "cuda":
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            times.append(hosts[-1])
    return loss, times[warmup:], hosts[warmup:], peak_gib()


def work(order: dict[str, Any]) -> None:
    """A case that cannot run is a result too: its error is stored in place of numbers."""
    try:
        measured = measure(**order["case"])
    except Missing as error:
        measured = {"status": str(error)}
    except Exception as error:
        measured = {"status": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
    finish(order, measured)


# --- running the cases ---------------------------------------------------------------------------------------------


def add_ratios(cases: list[dict[str, Any]]) -> None:
    """Time and memory as shares of the baseline's, with the same model and batch; `cases` are of one run."""
    base = {(c["model_name"], c["batch"]): c for c in cases if c["recipe"] == BASELINE and c["status"] == "ok"}
    for case in cases:
        reference = base.get((case["model_name"], case["batch"]))
        if reference and case["status"] == "ok":
            case |= {"baseline_ms": reference["step_ms"], "ratio": round(case["step_ms"] / reference["step_ms"], 3)}
            for memory in ("peak", "reserved"):
                if case.get(f"{memory}_gib") and reference.get(f"{memory}_gib"):
                    case[f"{memory}_ratio"] = round(case[f"{memory}_gib"] / reference[f"{memory}_gib"], 3)


def table(cases: list[dict[str, Any]]) -> str:
    rows = [("model", "batch", "contender", "step ms", "ratio", "host ms", "tokens/s", "MFU", "peak GiB", "ratio",
             "reserved", "ratio", "graphs")]  # fmt: skip
    for c in cases:
        fields = ("step_ms", "ratio", "host_ms", "tokens_per_s", "mfu_bf16", "peak_gib", "peak_ratio", "reserved_gib",
                  "reserved_ratio", "graphs_captured")  # fmt: skip
        numbers = [c.get(k) for k in fields]
        cells = ["-" if n is None else f"{n:g}" for n in numbers] if c["status"] == "ok" else [""] * len(fields)
        rows.append((c["model_name"], c["batch"], c["recipe"], *cells))
        if c["status"] != "ok":
            rows[-1] = (*rows[-1][:-1], f"  {c['status'][:60]}")
    widths = ("<9", "<9", f"<{max(len(row[2]) for row in rows)}", *(f">{n}" for n in (9, 6, 8, 9, 7, 9, 6, 9, 6, 6)))
    return "\n".join(" ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows)


def wants(only: list[str], name: str) -> bool:
    return any(name.endswith(text[:-1]) if text.endswith("$") else text in name for text in only)


def plan(args: argparse.Namespace, stored: list[dict[str, Any]], here: dict[str, Any]) -> tuple[list, dict, list]:
    """All wanted cases in order, the stored ones that still hold (by key), and those to run.

    Ratios are to a baseline of the same run, so a group with anything to run measures its baseline again, first.
    """
    settings = {"device": args.device, "warmup": args.warmup, "steps": args.steps}
    wanted = [
        {"model_name": model, "batch": batch, "recipe": recipe, **settings}
        for model, batch, recipes in (MICRO if args.micro else RECIPES if args.recipes else CASES)
        for recipe in recipes
        if wants(args.only, f"{model}/{batch}/{recipe}")
    ]
    kept: dict[str, dict[str, Any]] = {}
    for case in wanted:
        stock = not parse(case["recipe"]).ours  # a peer runs the same whatever our source is
        found = [c for c in stored if c["status"] == "ok" and reusable(c, case, here, args.any_source or stock)]
        if found and not args.again:
            kept[key(case)] = found[0]
    waiting = [case for case in wanted if key(case) not in kept]
    ordered: list[dict[str, Any]] = []
    for case in waiting:
        for wanted_now in ({**case, "recipe": BASELINE}, case):
            if wanted_now not in ordered:
                ordered.append(wanted_now)
    return wanted, kept, ordered


def run(args: argparse.Namespace) -> int:
    here = environment()
    stored = read_cases(args.out)
    wanted, kept, waiting = plan(args, stored, here)
    print(f"{len(kept)} cases done before, {len(waiting)} to run", flush=True)

    order = [key(case) for case in wanted]
    fresh: dict[str, dict[str, Any]] = {}
    running: list[tuple[dict[str, Any], subprocess.Popen, Path]] = []
    begun = time.monotonic()
    deadline = begun + 60 * args.minutes
    while (waiting or running) and time.monotonic() < deadline:
        while waiting and len(running) < args.jobs:  # one measures, the others import
            case = waiting.pop(0)
            target = SCRATCH / f"step-{file_name(key(case))}.json"
            running.append((case, start(__file__, case, target), target))
        time.sleep(0.2)
        for entry in [entry for entry in running if entry[1].poll() is not None]:
            running.remove(entry)
            case, process, target = entry
            died = {**case, "status": f"exit status {process.returncode}", "environment": here}
            result = json.loads(target.read_text()) if target.is_file() else died
            fresh[key(case)] = {**result, "command": here["command"]}
            add_ratios(list(fresh.values()))
            now = fresh[key(case)]
            numbers = f"{now.get('step_ms', '')} ms, ratio {now.get('ratio', '-')}, {now.get('peak_gib', '-')} GiB"
            print(f"{time.monotonic() - begun:5.0f} s  {key(case)}: {now['status']} {numbers}", flush=True)
            known = {key(c): c for c in stored} | kept | fresh
            ranked = sorted(known, key=lambda name: order.index(name) if name in order else -1)
            write_results(args.out, {"benchmark": "step", "cases": [known[name] for name in ranked]})
    for _, process, _ in running:
        process.terminate()
    known = kept | fresh
    print(table([known[name] for name in dict.fromkeys([*fresh, *order]) if name in known]))
    for name, case in known.items():
        if case["status"].startswith(NOT_INSTALLED):
            print(f"SKIPPED: {name}: {case['status']}")
    late = [case for case, _, _ in running] + waiting
    for case in late:
        print(f"NOT FINISHED: {key(case)}: out of time")
    return 1 if late else 0


def key(case: dict[str, Any]) -> str:
    return f"{case['model_name']}/{case['batch']}/{case['recipe']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = "cases whose model/batch/contender contains one of these, or ends with it (TEXT$)"
    parser.add_argument("--only", nargs="+", default=[""], help=names)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=600, help="stop then; what has finished is stored")
    parser.add_argument("--jobs", type=int, default=3, help="processes at a time: one measures, the others import")
    parser.add_argument("--recipes", action="store_true", help="all recipes on recipe_study.py's model instead")
    parser.add_argument("--micro", action="store_true", help="toy models, to try the script")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--again", action="store_true", help="measure finished cases again")
    parser.add_argument("--any-source", action="store_true", help="reuse cases that another package source produced")
    files = "results/step.json, results/recipe_times.json with --recipes, a scratch file with --micro"
    parser.add_argument("--out", type=Path, help=f"default: {files}")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(json.loads(args.worker))
        return 0
    name = "recipe_times.json" if args.recipes else "step.json"
    args.out = args.out or (SCRATCH if args.micro else RESULTS) / name
    SCRATCH.mkdir(parents=True, exist_ok=True)
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
