# SPDX-License-Identifier: Apache-2.0
"""Step time and peak memory of a Llama training step through Accelerator.prepare, eager, against bf16 of the same run.

    python benchmarks/bench_step.py                     every case below (one GPU)
    python benchmarks/bench_step.py --only 8b/2x4096    cases whose name contains this
    python benchmarks/bench_step.py --micro --device cpu --only tiny   the script itself, on a CPU

A case is model/batch/recipe: `8b/2x4096x1/fp8-lm@bf16` is Llama-8B's widths with 8 layers, micro-batches of 2 x 4096
tokens, one per step, weights loaded in bf16. Recipes beside ours:
    bf16        baseline: fp32 weights, bf16 autocast, AdamW(fused=True); every ratio is to it
    bf16@bf16   bf16 weights and states, no master: less than any recipe here keeps, shown for scale
    torchao     torchao's tensorwise float8 linears, not compiled, on the baseline (a peer; skipped if not installed)
`lora` cases train adapters of rank 16 on a frozen base; there the question is memory.

Milliseconds are the median of CUDA-event times over --steps steps after --warmup; memory is torch's peak over those
steps. Cases take turns on the GPU (a file lock); while one runs, the next only imports. Losing rows stay in.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import json
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
    parse_recipe,
    peak_gib,
    read_cases,
    report_of,
    reusable,
    start,
    write_results,
)

_COMMON = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 8192}
MODELS: dict[str, dict[str, int]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8, **_COMMON},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, **_COMMON},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 128},
}  # fmt: skip
MODELS["1b-lora"], MODELS["tiny-lora"] = MODELS["1b"], MODELS["tiny"]
NOT_INSTALLED = "not installed"

CASES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("8b", "2x4096x1", (BASELINE, "fp8-lm", "fp8-lm-o1", "te-current", "bf16@bf16", "fp8-lm@bf16", "torchao")),
    ("1b", "1x2048x4", (BASELINE, "fp8-lm", "te-current", "torchao")),
    ("1b-lora", "2x4096x1", (BASELINE, "fp8-lm", "bf16@bf16", "fp8-lm@bf16")),
    ("8b", "1x2048x4", (BASELINE, "fp8-lm")),
    ("1b", "2x4096x1", (BASELINE, "fp8-lm")),
)
MICRO = (
    ("tiny", "2x64x2", (BASELINE, "bf16@bf16", "fp8-lm", "fp8-lm@bf16", "torchao")),
    ("tiny-lora", "2x64x1", (BASELINE, "fp8-lm")),
)


# --- one case: the worker process ----------------------------------------------------------------------------------


@contextlib.contextmanager
def turn(path: Path) -> Iterator[None]:
    """Holds the GPU for this process: one at a time between here and the end of the block."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def add_peer(model: Any) -> str | None:
    """torchao's float8 linears in place of the layers' own; what is missing, or None."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        return NOT_INSTALLED
    config = Float8LinearConfig.from_recipe_name("tensorwise")
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: "lm_head" not in name)
    return None


def add_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))


def measure(model_name: str, batch: str, recipe: str, device: str, warmup: int, steps: int) -> dict[str, Any]:
    import peft  # noqa: F401  imports come before the turn, so that no one waits for them
    import torch
    import transformers  # noqa: F401

    name, dtype = parse_recipe(recipe)
    precision = BASELINE if name == "torchao" else name
    if dtype == "bf16" and name == BASELINE:
        precision = "no"  # weights are bf16 already: autocast would only add casts
    accelerator = make_accelerator(precision, device, gradient_accumulation_steps=int(batch.split("x")[2]))
    with turn(SCRATCH / "gpu.lock"):
        try:
            return train(accelerator, model_name, batch, name, dtype, warmup, steps)
        finally:  # the next process needs the memory while this one is still leaving
            accelerator.free_memory()
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()


def train(
    accelerator: Any, model_name: str, batch: str, name: str, dtype: str, warmup: int, steps: int
) -> dict[str, Any]:
    import torch

    device = accelerator.device.type
    model = build_llama(0, dtype, device, **MODELS[model_name])
    if name == "torchao" and (missing := add_peer(model)):
        return {"status": missing}
    if model_name.endswith("-lora"):
        model = add_lora(model)
    parameters = sum(p.numel() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-5, fused=True))
    model.train()
    rows, seq, micro_batches = map(int, batch.split("x"))
    ids = torch.randint(0, MODELS[model_name]["vocab_size"], (micro_batches, rows, seq), device=device)

    def step() -> Any:
        for tokens in ids:
            with accelerator.accumulate(model):
                loss = model(input_ids=tokens, labels=tokens).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        return loss.detach()

    loss, times, peak = timed(step, warmup, steps, device)
    out = {
        "status": "ok", "parameters": parameters, "trained_parameters": sum(p.numel() for p in trained),
        "step_ms": round(statistics.median(times), 2), "step_ms_min": round(min(times), 2),
        "step_ms_max": round(max(times), 2), "tokens_per_s": round(ids.numel() / statistics.median(times) * 1e3),
        "peak_gib": peak, "loss": float(loss),
    }  # fmt: skip
    if name not in (BASELINE, "torchao"):
        report = report_of(accelerator, model)
        out |= {"summary": report.summary(), "kernels": report.kernels}
    return out


def timed(step: Any, warmup: int, steps: int, device: str) -> tuple[Any, list[float], float | None]:
    """The last loss, milliseconds of each measured step, peak GiB over them."""
    import torch

    times = []
    for index in range(warmup + steps):
        if index == warmup and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            begin.record()
            loss = step()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            clock = time.perf_counter()
            loss = step()
            times.append(1e3 * (time.perf_counter() - clock))
    return loss, times[warmup:], peak_gib()


def work(order: dict[str, Any]) -> None:
    """A case that cannot run is a result too: its error is stored in place of numbers."""
    try:
        measured = measure(**order["case"])
    except Exception as error:
        measured = {"status": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    finish(order, measured)


# --- running the cases ---------------------------------------------------------------------------------------------


def add_ratios(cases: list[dict[str, Any]]) -> None:
    """Time and memory as shares of the baseline's, with the same model and batch; `cases` are of one run."""
    base = {(c["model_name"], c["batch"]): c for c in cases if c["recipe"] == BASELINE and c["status"] == "ok"}
    for case in cases:
        reference = base.get((case["model_name"], case["batch"]))
        if reference and case["status"] == "ok":
            case |= {"baseline_ms": reference["step_ms"], "ratio": round(case["step_ms"] / reference["step_ms"], 3)}
            if case["peak_gib"] and reference["peak_gib"]:
                case["peak_ratio"] = round(case["peak_gib"] / reference["peak_gib"], 3)


def table(cases: list[dict[str, Any]]) -> str:
    head = ("model", "batch", "recipe", "step ms", "ratio", "tokens/s", "peak GiB", "ratio")
    rows = [head]
    for c in cases:
        numbers = [c.get(k) for k in ("step_ms", "ratio", "tokens_per_s", "peak_gib", "peak_ratio")]
        cells = ["-" if n is None else f"{n:g}" for n in numbers] if c["status"] == "ok" else [""] * 5
        rows.append((c["model_name"], c["batch"], c["recipe"], *cells))
        if c["status"] != "ok":
            rows[-1] = (*rows[-1][:7], f"  {c['status'][:60]}")
    return "\n".join(f"{a:<9} {b:<9} {c:<12} {d:>9} {e:>6} {f:>9} {g:>9} {h:>6}" for a, b, c, d, e, f, g, h in rows)


def plan(args: argparse.Namespace, stored: list[dict[str, Any]], here: dict[str, Any]) -> tuple[list, dict, list]:
    """All wanted cases in order, the stored ones that still hold (by key), and those to run.

    Ratios are to a baseline of the same run, so a group with anything to run measures its baseline again.
    """
    settings = {"device": args.device, "warmup": args.warmup, "steps": args.steps}
    wanted = [
        {"model_name": model, "batch": batch, "recipe": recipe, **settings}
        for model, batch, recipes in (MICRO if args.micro else CASES)
        for recipe in recipes
        if any(text in f"{model}/{batch}/{recipe}" for text in args.only)
    ]
    kept: dict[str, dict[str, Any]] = {}
    for case in wanted:
        found = [c for c in stored if c["status"] == "ok" and reusable(c, case, here, args.any_source)]
        if found and not args.again:
            kept[key(case)] = found[0]
    waiting = [case for case in wanted if key(case) not in kept]
    groups = dict.fromkeys((case["model_name"], case["batch"]) for case in waiting)
    bases = [{"model_name": m, "batch": b, "recipe": BASELINE, **settings} for m, b in groups]
    return wanted, kept, [*(base for base in bases if base not in waiting), *waiting]


def run(args: argparse.Namespace) -> int:
    here = environment()
    stored = read_cases(args.out)
    wanted, kept, waiting = plan(args, stored, here)
    print(f"{len(kept)} cases done before, {len(waiting)} to run", flush=True)

    order = [key(case) for case in wanted]
    fresh: dict[str, dict[str, Any]] = {}
    running: list[tuple[dict[str, Any], subprocess.Popen, Path]] = []
    deadline = time.monotonic() + 60 * args.minutes
    while (waiting or running) and time.monotonic() < deadline:
        while waiting and len(running) < 2:  # one measures, one imports
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
            print(f"{key(case)}: {result['status']} {result.get('step_ms', '')}", flush=True)
            add_ratios(list(fresh.values()))
            known = {key(c): c for c in stored} | kept | fresh
            ranked = sorted(known, key=lambda name: order.index(name) if name in order else -1)
            write_results(args.out, {"benchmark": "step", "cases": [known[name] for name in ranked]})
    for _, process, _ in running:
        process.terminate()
    known = kept | fresh
    print(table([known[name] for name in order if name in known]))
    late = [case for case, _, _ in running] + waiting
    for case in late:
        print(f"NOT FINISHED: {key(case)}: out of time")
    return 1 if late else 0


def key(case: dict[str, Any]) -> str:
    return f"{case['model_name']}/{case['batch']}/{case['recipe']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose model/batch/recipe contains one of these")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=600, help="stop then; what has finished is stored")
    parser.add_argument("--micro", action="store_true", help="toy models, to try the script")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--again", action="store_true", help="measure finished cases again")
    parser.add_argument("--any-source", action="store_true", help="reuse cases that another package source produced")
    parser.add_argument("--out", type=Path, help="default: results/step.json, a scratch file with --micro")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(json.loads(args.worker))
        return 0
    args.out = args.out or (SCRATCH if args.micro else RESULTS) / "step.json"
    SCRATCH.mkdir(parents=True, exist_ok=True)
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
