# SPDX-License-Identifier: Apache-2.0
"""Every recipe trains the same small Llama on the same real text, and what the papers say fails is run as well.

    python benchmarks/corpus.py --fetch
    python benchmarks/recipe_study.py                                      the study (one GPU)
    python benchmarks/recipe_study.py --device cpu --jobs 2                the stand-in without a GPU
    python benchmarks/recipe_study.py --recipes fp8-lm my.yaml --seeds 1 2 3
    python benchmarks/recipe_study.py --fused --seeds 1 2 3                fused, unfused, saved: `recipe_pairs.py`

Cases are all PRESETS but `bf16`, which is the baseline (stock accelerate: fp32 weights, bf16 autocast, fp32 AdamW),
and the negative controls of `recipe_controls.py`. A candidate runs the same function with one word changed. A seed
fixes initial weights and data order; the learning rate is one for all, found for none.

Of each case: training curve, validation loss and its gap to bf16 of the same seed, median time of a step, and, from
one batch at the end, what each of the six slots does to the tensors that are there (`monitor.slots`: SQNR, underflow,
overflow). A case that cannot run or diverges is recorded as such, with the reason.

On a GPU: 23 M parameters, 500 steps of 16 x 512 tokens of the corpus, in results/recipes.json. On a CPU a stand-in:
0.9 M parameters on the same text as bytes, 300 steps of 4 x 64, in results/recipes_cpu.json; its times say how slow
emulation is, and nothing about a GPU. What is emulated addition by addition comes last, as it takes much longer.
Cases run in processes of their own, --jobs at a time; one that is in the results with the same settings is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from environment import REPOSITORY, environment
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
    reusable,
    start,
    write_results,
)
from loss_parity import EVERY, Study, Windows, build_optimizer, nudge, validate
from recipe_controls import CONTROLS, control_optimizer, control_recipe, mechanism
from recipe_pairs import compare_pairs, parse, wanted
from recipe_pairs import table as table_of_pairs
from verdict import compare


@dataclass(frozen=True)
class RecipeStudy(Study):
    """bytes: the corpus as UTF-8 bytes (vocabulary 256) instead of its tokens."""

    hidden: int = 384
    intermediate: int = 1024
    heads: int = 6
    seq: int = 512
    batch: int = 16
    steps: int = 500
    warmup: int = 50
    valid_windows: int | None = 512
    bytes: bool = False


STAND_IN = RecipeStudy(
    hidden=128, intermediate=384, layers=4, heads=4, vocab=256, seq=64, batch=4, steps=300, warmup=30, lr=2e-3,
    valid_windows=128, bytes=True,
)  # fmt: skip
MICRO = replace(
    STAND_IN, hidden=32, intermediate=64, layers=1, heads=2, seq=32, batch=4, steps=20, warmup=2, valid_windows=8
)
LOADED = {"bf16-sr": "bf16"}  # recipes about 16-bit weights, and how their weights are loaded


def families() -> dict[str, str]:
    """Recipe -> family, for every preset but the baseline, in the order of PRESETS."""
    from hf_lowprec import presets

    own = {r.name: family.__name__.rpartition(".")[2] for family in presets._FAMILIES for r in family.RECIPES}
    return {name: own.get(name, "") for name in presets.PRESETS if name != BASELINE}


def slow(recipe: str) -> int:
    """0, or how a recipe whose sums are emulated compares with others of that kind."""
    from hf_lowprec.presets import get_recipe

    name = parse(recipe).name
    chosen = control_recipe(name) if name in CONTROLS else get_recipe(name)
    sums = [gemm.accumulation for gemm in (chosen.fprop, chosen.dgrad, chosen.wgrad)] if chosen else []
    return max((1 + (s.rounding.mode == "stochastic") for s in sums if s.format is not None), default=0)


# --- one case: the worker process ----------------------------------------------------------------------------------


class ByteWindows(Windows):
    """As Windows, of the bytes of the same text."""

    def __init__(self, path: Path, seq: int, device: Any, count: int) -> None:
        import numpy as np
        import torch
        from tokenizers import Tokenizer

        tokens = np.fromfile(path, dtype=np.uint16)[: count * seq].tolist()  # a token is a byte or more
        text = Tokenizer.from_file(str(path.parent / "tokenizer.json")).decode(tokens, skip_special_tokens=False)
        data = np.frombuffer(text.encode(), dtype=np.uint8)[: count * seq].astype(np.int32)
        self.count = len(data) // seq
        self.rows = torch.from_numpy(data[: self.count * seq]).view(self.count, seq).to(device)


def windows(study: RecipeStudy, corpus: Path, device: Any) -> tuple[Windows, Windows]:
    """Training and held-out text."""
    count = study.valid_windows or 512
    if study.bytes:
        return (
            ByteWindows(corpus / "train.bin", study.seq, device, 4 * study.steps * study.batch),
            ByteWindows(corpus / "valid.bin", study.seq, device, count),
        )
    return Windows(corpus / "train.bin", study.seq, device), Windows(corpus / "valid.bin", study.seq, device)


def mixed_precision(recipe: str) -> str:
    """What `Accelerator(mixed_precision=...)` is told: a recipe's name, or the file of a control."""
    if recipe not in CONTROLS:
        return recipe
    chosen = control_recipe(recipe)
    if chosen is None:
        return BASELINE
    SCRATCH.mkdir(parents=True, exist_ok=True)
    path = SCRATCH / f"{chosen.name}.yaml"
    path.write_text(chosen.to_yaml())
    return str(path)


def train(recipe: str, seed: int, study: RecipeStudy, corpus: Path, device: str) -> dict[str, Any]:
    """One run through Accelerator.prepare; what was measured. Raises what the recipe or its libraries raise."""
    import torch

    torch.set_num_threads(1)
    os.environ["HF_LOWPREC_BREAK_EVEN"] = "0"  # the question is the loss, whatever the speed
    name, dtype, fused, control = parse(recipe)
    os.environ["HF_LOWPREC_FUSE"] = str(int(fused))
    dtype = LOADED.get(name, dtype)
    accelerator = make_accelerator(mixed_precision(name), device)
    model = build_llama(seed, dtype, **study.model)
    if control:
        nudge(model)
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = control_optimizer(name, build_optimizer(study, model))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, study.learning_rate)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    text, held_out = windows(study, corpus, accelerator.device)
    if text.count < study.steps * study.batch:
        raise SystemExit(f"the corpus has {text.count} windows, {study.steps * study.batch} are needed (one epoch)")
    order = torch.randperm(text.count, generator=torch.Generator().manual_seed(seed))
    everything = min(held_out.count, study.valid_windows or held_out.count)

    curve, pace, status = [], [], "ok"
    recent = torch.zeros((), device=accelerator.device)
    mark = time.perf_counter()
    for step in range(1, study.steps + 1):
        ids = text.batch(order[(step - 1) * study.batch : step * study.batch])
        ids = ids.flip(0) if control else ids  # sums over tokens in another order
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), study.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        recent += loss.detach()
        if step % EVERY == 0:  # the only host synchronisation of the loop
            mean = float(recent) / EVERY
            now = time.perf_counter()
            pace.append(1e3 * (now - mark) / EVERY)
            recent.zero_()
            if not math.isfinite(mean):
                status = "diverged"
                break
            curve.append([step, round(mean, 4)])
            mark = time.perf_counter()
    final = validate(model, held_out, study, everything) if status == "ok" else math.nan
    case: dict[str, Any] = {
        "status": status if math.isfinite(final) else "diverged", "parameters": parameters, "weights": dtype,
        "train_tokens": len(curve) * EVERY * study.batch * study.seq, "valid_tokens": everything * (study.seq - 1),
        "valid_loss": round(final, 5) if math.isfinite(final) else None, "train_curve": curve,
        "step_ms": round(statistics.median(pace[1:] or pace), 1), "peak_gib": peak_gib(),
    }  # fmt: skip
    if name != BASELINE:
        case |= converted(accelerator.unwrap_model(model))
        if case["status"] == "ok":
            ids = text.batch(order[: study.batch])
            case["slots"] = measured_slots(
                accelerator.unwrap_model(model), lambda: model(input_ids=ids, labels=ids).loss
            )
    return case


def converted(model: Any) -> dict[str, Any]:
    """What the report says: how many linears, native or emulated, and their share of the layers' GEMM FLOPs."""
    from hf_lowprec.conversion import report_of

    report = report_of(model)
    if report is None:
        return {}
    return {"conversion": {
        "recipe": report.recipe.to_dict(), "summary": report.summary(), "emulated": report.emulated,
        "converted": len(report.converted), "layer_flop_share": round(report.flop_share, 4),
    }}  # fmt: skip


def measured_slots(model: Any, loss: Any) -> dict[str, Any]:
    """`monitor.over_layers` of one batch, rounded; a recipe whose slots it cannot measure says why instead."""
    from hf_lowprec.conversion import session_of
    from hf_lowprec.monitor import over_layers, slots

    if session_of(model) is None:
        return {}
    try:
        table = over_layers(slots(model, loss))
    except (ValueError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {slot: {key: number(value) for key, value in row.items()} for slot, row in table.items()}


def number(value: float) -> float | None:
    """For JSON, which has neither NaN nor Inf."""
    return round(value, 6) if math.isfinite(value) else None


# --- running the cases ---------------------------------------------------------------------------------------------


def summarize(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Per recipe the paired comparison with bf16 (`verdict.compare`), worst time, and what became of its runs."""
    by: dict[str, dict[int, dict[str, Any]]] = {}
    for case in cases:
        by.setdefault(case["recipe"], {})[case["seed"]] = case
    base = {s: c["valid_loss"] for s, c in by.get(BASELINE, {}).items() if c.get("valid_loss")}
    summary: dict[str, Any] = {}
    for recipe, own in by.items():
        done = {s: c for s, c in own.items() if c["status"] == "ok"}
        row: dict[str, Any] = {"runs": len(own), "status": sorted({c["status"] for c in own.values()})}
        if done:
            row["valid_loss"] = statistics.fmean(c["valid_loss"] for c in done.values())
            row["step_ms"] = statistics.median(c["step_ms"] for c in done.values())
        if recipe != BASELINE and base.keys() & done.keys():
            found = compare(base, {s: c["valid_loss"] for s, c in done.items()})
            row |= {key: found[key] for key in ("seeds", "gaps", "mean_gap", "standard_error") if key in found}
        summary[recipe] = row
    return summary


def table(summary: dict[str, Any]) -> str:
    lines = [f"{'recipe':<28} {'runs':>4} {'valid loss':>10} {'gap to bf16':>18} {'ms/step':>9}"]
    for recipe, row in summary.items():
        gap = f"{row['mean_gap']:+.2%}" if "mean_gap" in row else "-"
        gap += f" +- {row['standard_error']:.2%}" if "standard_error" in row else ""
        loss = f"{row['valid_loss']:.4f}" if "valid_loss" in row else ", ".join(row["status"])
        lines.append(f"{recipe:<28} {row['runs']:>4} {loss:>10} {gap:>18} {row.get('step_ms', math.nan):>9.1f}")
    return "\n".join(lines)


def store(path: Path, cases: list[dict[str, Any]], order: list[str], corpus: Path, fused: bool) -> None:
    rank = {name: i for i, name in enumerate([BASELINE, *order])}
    cases.sort(key=lambda c: (rank.get(c["recipe"], len(rank)), c["recipe"], c["seed"]))
    meta = json.loads((corpus / "meta.json").read_text())
    own = {"pairs": compare_pairs(cases)} if fused else {"mechanism": mechanism()}
    write_results(path, {"benchmark": "fused_loss" if fused else "recipes", "summary": summarize(cases), **own,
                         "corpus": meta.get("files"), "cases": cases})  # fmt: skip


def run(args: argparse.Namespace, study: RecipeStudy) -> int:
    corpus = json.loads((args.corpus / "meta.json").read_text())["files"]["train.bin"]["sha256"]
    settings = {"study": asdict(study), "corpus_sha256": corpus, "device": args.device}
    here = environment()
    own = families()
    order = [*own, *CONTROLS]
    chosen = [r for r in (args.recipes if args.recipes is not None else order) if r not in args.skip]
    stored = [case for case in read_cases(args.out) if reusable(case, settings, here, args.any_source)]
    done = [case for case in stored if not (args.retry and case["status"] == "failed")]
    have = {(case["recipe"], case["seed"]) for case in done}
    pairs = wanted(args.seeds) if args.fused else [(r, seed) for seed in args.seeds for r in [BASELINE, *chosen]]
    waiting = sorted((pair for pair in pairs if pair not in have), key=lambda pair: slow(pair[0]))
    gpus = max(1, here["gpu_count"]) if args.device == "cuda" else 1
    print(f"{len(done)} cases done before, {len(waiting)} to run, {args.jobs} at a time", flush=True)

    deadline = time.monotonic() + 60 * args.minutes
    running: dict[tuple[str, int], tuple[subprocess.Popen, Path, int, float]] = {}
    failed: list[str] = []
    while waiting or running:
        while waiting and len(running) < args.jobs * gpus:
            recipe, seed = pair = waiting.pop(0)
            load = [gpu for _, _, gpu, _ in running.values()]
            gpu = min(range(gpus), key=load.count)
            target = SCRATCH / f"recipes-{file_name(recipe)}-{seed}.json"
            case = {"recipe": recipe, "seed": seed, "family": own.get(parse(recipe).name, "control"
                    if recipe in CONTROLS else "own"), **settings}  # fmt: skip
            process = start(__file__, {**case, "corpus": str(args.corpus)}, target, gpu)
            running[pair] = (process, target, gpu, time.monotonic())
        time.sleep(0.2)
        for pair, (process, target, _, began) in list(running.items()):
            if process.poll() is None:
                continue
            del running[pair]
            if process.returncode or not target.is_file():
                failed.append(f"{pair[0]} seed {pair[1]}: exit status {process.returncode}")
                continue
            case = {**json.loads(target.read_text()), "command": here["command"]}
            done.append(case)
            store(args.out, done, order, args.corpus, args.fused)
            said = case.get("reason") or f"valid {case['valid_loss']}"
            print(f"{pair[0]} seed {pair[1]}: {case['status']}, {said}, {time.monotonic() - began:.0f} s", flush=True)
        if time.monotonic() > deadline:
            failed += [f"{recipe} seed {seed}: out of time" for recipe, seed in [*running, *waiting]]
            for process, *_ in running.values():
                process.terminate()
            break
    print(table(summarize(done)))
    if args.fused:
        print(table_of_pairs(compare_pairs(done)))
    for reason in failed:
        print(f"NOT FINISHED: {reason}")
    return 1 if failed else 0


def work(order: dict[str, Any]) -> None:
    """A case that raises is a result, too: which recipe does not run where, and why."""
    case = order["case"]
    corpus = Path(case.pop("corpus"))  # where this machine keeps it is nobody's business
    try:
        measured = train(case["recipe"], case["seed"], RecipeStudy(**case["study"]), corpus, case["device"])
    except (ValueError, RuntimeError, NotImplementedError, ImportError) as error:
        measured = {"status": "failed", "reason": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
    finish(order, measured)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipes", nargs="*", help="default: all presets and controls; bf16 always runs")
    parser.add_argument("--skip", nargs="*", default=[], help="recipes to leave out")
    parser.add_argument("--fused", action="store_true", help="the study of recipe_pairs.py in place of --recipes")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--tokens", type=int, help="tokens of a step: the batch follows")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--jobs", type=int, help="cases at a time on each GPU (4), or on the CPU (2)")
    parser.add_argument("--minutes", type=float, default=600, help="stop then; what has finished is stored")
    parser.add_argument("--micro", action="store_true", help="a model of toy size, to try the script")
    parser.add_argument("--any-source", action="store_true", help="reuse cases that another package source produced")
    parser.add_argument("--retry", action="store_true", help="run cases again that failed")
    parser.add_argument("--corpus", type=Path, default=REPOSITORY / ".corpus")
    parser.add_argument(
        "--out", type=Path, help="default: results/recipes.json, recipes_cpu.json, fused_loss.json; scratch for trials"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(json.loads(args.worker))
        return 0
    default = MICRO if args.micro else STAND_IN if args.device == "cpu" else RecipeStudy()
    study = default if args.steps is None else replace(default, steps=args.steps)
    if args.tokens is not None:
        if args.tokens % study.seq:
            raise SystemExit(f"--tokens: a multiple of the sequence length, {study.seq}")
        study = replace(study, batch=args.tokens // study.seq)
    args.jobs = args.jobs or (4 if args.device == "cuda" else 2)
    name = f"{'fused_loss' if args.fused else 'recipes'}{'' if args.device == 'cuda' else '_cpu'}.json"
    args.out = args.out or (RESULTS if study in (RecipeStudy(), STAND_IN) else SCRATCH) / name
    if not (args.corpus / "meta.json").is_file():
        raise SystemExit(f"no corpus in {args.corpus.name}; build it: python benchmarks/corpus.py --fetch")
    return run(args, study)


if __name__ == "__main__":
    sys.exit(main())
