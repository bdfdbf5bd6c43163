# SPDX-License-Identifier: Apache-2.0
"""Does AdamW with low-precision states reach the loss of float32 states? Many small Llamas on real text, many seeds.

    python benchmarks/corpus.py --fetch
    python benchmarks/loss_states.py                             every format, three seeds (one GPU)
    python benchmarks/loss_states.py --more 40 --minutes 3       and more seeds of the default, as time allows
    python benchmarks/loss_states.py --micro --device cpu        the script itself, on a CPU

What is compared: runs that differ in the optimizer's states and in nothing else: initial weights, data order, bf16
autocast, learning rates, gradients clipped per model. A format is written

    8bit            states of `hf_lowprec.optim.AdamW`, float32 Parameters
    8bit/bf16+8     the same on bfloat16 Parameters with that `master`; activations are those of float32 Parameters
    fp32            the baseline: this package's AdamW with float32 states
    torch           the control: torch.optim.AdamW(fused=True), also float32 states, its arithmetic rounded elsewhere.
                    Whatever gap it shows is chaos, which no format can be blamed for

lr and betas are AdamW's defaults, 1e-3, 0.9 and 0.999. The second beta is harder on a second moment of few bits than
0.95. The rate was chosen by the chaos of the baseline alone, before any format ran (a CPU, two layers, batches of 4,
one seed, one weight moved by a thousandth): at 3e-3 that run ends 0.1 % from the baseline and was 0.35 % away on the
way, so that 0.1 % would take dozens of seeds; at 1e-3 it ends 0.01 % away, and the loss is 0.9 % higher than at 3e-3.
What a format does at a rate where float32 states do not repeat, --lr 3e-3 asks.

What is measured, fixed before any run: the loss of the final weights over all of the held-out text (1.1 M tokens), one
number per run. The learning rate decays to zero, so that the final weights are annealed; no checkpoints are averaged.

What is decided, fixed before any run, per format, from the losses v over the seeds s:

    gap_s = (v_format - v_fp32) / v_fp32
    mean  = mean_s gap_s
    error = max(deviation_s gap_s, the control's deviation) / sqrt(seeds)

    mean + error <= 0.1 %     "not higher": a bound on a higher loss, as the claim is that nothing is lost
    mean - error >  0.1 %     "higher"
    otherwise                 "inconclusive", as with fewer than three seeds

and in the same way `two_sided` from |mean|: "same", "different", "inconclusive". A run that diverges is "higher". The
control enters the error because three seeds may agree by luck, and no format can repeat better than float32 states do.
How many seeds there are is decided by --seeds, --more and the time, never by a gap: whole rounds of all formats first,
then rounds of --more-formats. One standard error is what the claim asks for; `upper` is the mean plus two of them.

How: lanes.py trains --lanes models at once in one process, each with its own optimizer; several processes share the
GPU. Seconds here are no speed measurement. Runs that are already in --out with the same settings are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
import traceback
import warnings
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from environment import REPOSITORY, environment
from harness import RESULTS, SCRATCH, read_cases, reusable, write_results
from lanes import Lanes
from loss_parity import Study, Windows, embedding_norm

TOLERANCE = 0.001
FP32, CONTROL, DEFAULT = "fp32", "torch", "8bit"
FORMATS = (
    FP32, CONTROL, "8bit", "compact", "fp8-lm", "fp8", "fp8-expand", "4bit", "bf16",
    *(f"{states}/{master}" for states in ("8bit", "compact", "fp8-lm")
      for master in ("sr", "bf16+8", "bf16+16", "fp16-scaled")),
)  # fmt: skip
MORE = (FP32, CONTROL, DEFAULT, f"{DEFAULT}/sr")  # the default states, on Parameters of either dtype
POINTS = 20  # of a training curve

STUDY = Study(hidden=128, intermediate=384, layers=4, heads=2, seq=256, batch=8, lr=1e-3, lr_end=0.0, beta2=0.999)
MICRO = replace(STUDY, hidden=64, intermediate=128, layers=1, seq=32, batch=2, steps=20, warmup=2, valid_windows=32)

Pair = tuple[str, int]  # format, seed


def parse_format(text: str) -> tuple[str, str | None, torch.dtype]:
    """`states` or `states/master` -> states, master, dtype of the Parameters."""
    states, _, master = text.partition("/")
    return (states, master, torch.bfloat16) if master else (states, None, torch.float32)


# --- the verdict ---------------------------------------------------------------------------------------------------


def judge(baseline: dict[int, float], candidate: dict[int, float], chaos: float = 0.0) -> dict[str, Any]:
    """Paired gap, its standard error and both verdicts by the rule above, from {seed: loss}.

    chaos: deviation of the control's gaps.
    """
    seeds = sorted(baseline.keys() & candidate.keys())
    gaps = [(candidate[s] - baseline[s]) / baseline[s] for s in seeds]
    out: dict[str, Any] = {"seeds": seeds, "gaps": gaps, "verdict": "inconclusive", "two_sided": "inconclusive"}
    if not gaps:
        return out
    out["mean_gap"] = mean = statistics.fmean(gaps)
    if not all(map(math.isfinite, gaps)):
        return {**out, "verdict": "higher", "two_sided": "different"}
    if len(gaps) < 3:
        return out
    out["deviation"] = deviation = statistics.stdev(gaps)
    out["standard_error"] = error = max(deviation, chaos) / math.sqrt(len(gaps))
    out["upper"] = mean + 2 * error
    if mean + error <= TOLERANCE:
        out["verdict"] = "not higher"
    elif mean - error > TOLERANCE:
        out["verdict"] = "higher"
    if abs(mean) + error <= TOLERANCE:
        out["two_sided"] = "same"
    elif abs(mean) - error > TOLERANCE:
        out["two_sided"] = "different"
    return out


def summarize(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Per format, in the order of `cases`: `judge` against fp32, and the bytes that its states take."""
    by: dict[str, dict[int, dict[str, Any]]] = {}
    for case in cases:
        by.setdefault(case["format"], {})[case["seed"]] = case
    losses = {name: {s: c["valid_loss"] for s, c in own.items()} for name, own in by.items()}
    chaos = judge(losses.get(FP32, {}), losses.get(CONTROL, {})).get("deviation", 0.0)
    summary: dict[str, Any] = {}
    for name, own in by.items():
        first = next(iter(own.values()))
        bytes_ = {key: first[key] for key in ("matrix_state_bytes", "model_state_bytes")}
        norm = statistics.fmean(c["embedding_norm"] for c in own.values())
        judged = judge(losses.get(FP32, {}), losses[name], 0.0 if name == FP32 else chaos)
        summary[name] = {**judged, **bytes_, "mean_embedding_norm": round(norm, 4)}
    return summary


def table(summary: dict[str, Any]) -> str:
    lines = [f"bound {TOLERANCE:.1%} on mean + 1 standard error; bytes of state per parameter of a matrix"]
    for name, s in summary.items():
        gap = f"{s['mean_gap']:+.3%}" if "mean_gap" in s else "-"
        error = f"+- {s['standard_error']:.3%} (deviation {s['deviation']:.3%})" if "deviation" in s else ""
        verdicts = "" if name == FP32 else f"{s['verdict']}, two-sided: {s['two_sided']}"
        lines.append(f"{name:<20} {s['matrix_state_bytes']:>6.2f} B {len(s['seeds']):>3} seeds  {gap:>8} {error:<32} "
                     f"{verdicts}")  # fmt: skip
    return "\n".join(lines)


# --- one job: a worker process trains some lanes -------------------------------------------------------------------


def build_optimizer(name: str, model: Any, study: Study) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": study.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    states, master, _ = parse_format(name)
    betas = (study.beta1, study.beta2)
    if name == CONTROL:
        return torch.optim.AdamW(groups, lr=study.lr, betas=betas, fused=True)
    from hf_lowprec.optim import AdamW, mark_embeddings

    mark_embeddings(model)
    return AdamW(groups, lr=study.lr, betas=betas, states=states, master=master or "default")


def state_bytes(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor]) -> float:
    """Bytes of all state tensors of `parameters`, per element."""
    tensors = [t for p in parameters for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
    total = sum(t.numel() * t.element_size() for t in tensors)
    return round(total / sum(p.numel() for p in parameters), 4)


def build_lanes(pairs: list[Pair], study: Study, device: str, compiled: bool, ids: torch.Tensor) -> tuple[Lanes, bool]:
    """The lanes of a job, tried on `ids`; eager, loudly, where torch.compile does not work."""
    _, _, dtype = parse_format(pairs[0][0])
    for attempt in (True, False) if compiled else (False,):
        lanes = Lanes([seed for _, seed in pairs], study.model, dtype=dtype, compute=torch.bfloat16, device=device,
                      compiled=attempt)  # fmt: skip
        try:
            lanes.backward(ids, study.clip)
            return lanes, attempt
        except Exception:
            if not attempt:
                raise
            print("torch.compile failed, this job runs eagerly:", file=sys.stderr)
            traceback.print_exc()
    raise AssertionError


def validate(lanes: Lanes, windows: Windows, study: Study) -> list[float]:
    """Every lane's mean loss per token over the held-out windows, whole batches of them. Gradients stay on, unused:
    under no_grad torch.compile would make another graph."""
    total = torch.zeros(lanes.count, dtype=torch.float64, device=windows.rows.device)
    count = windows_used(windows, study)
    for first in range(0, count, study.batch):
        same = torch.arange(first, first + study.batch).expand(lanes.count, -1)
        total += lanes.losses(windows.batch(same)).detach() * study.batch
    return [value / count if count else math.nan for value in total.tolist()]


def windows_used(windows: Windows, study: Study) -> int:
    count = windows.count if study.valid_windows is None else min(windows.count, study.valid_windows)
    return count - count % study.batch


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Trains the runs `job["pairs"]`, whose Parameters have one dtype; returns cases, and errors if a run failed."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout")  # lanes are strided
    started = time.perf_counter()
    pairs: list[Pair] = [(name, seed) for name, seed in job["pairs"]]
    study, device, corpus = Study(**job["study"]), job["device"], Path(job["corpus"])
    text, held_out = (Windows(corpus / name, study.seq, device) for name in ("train.bin", "valid.bin"))
    needed = study.steps * study.batch
    if text.count < needed:
        raise SystemExit(f"the corpus has {text.count} windows, {needed} are needed (one epoch)")
    orders = {seed: torch.randperm(text.count, generator=torch.Generator().manual_seed(seed)) for _, seed in pairs}
    order = torch.stack([orders[seed][:needed] for _, seed in pairs]).to(device)
    lanes, compiled = build_lanes(pairs, study, device, job["compiled"], text.batch(order[:, : study.batch]))

    optimizers: list[torch.optim.Optimizer | None] = [None] * len(pairs)
    errors: dict[Pair, str] = {}
    curve: list[torch.Tensor] = []
    recent = torch.zeros(len(pairs), device=device)
    every = max(1, study.steps // POINTS)
    for step in range(study.steps):
        recent += lanes.backward(text.batch(order[:, step * study.batch : (step + 1) * study.batch]), study.clip)
        for i, pair in enumerate(pairs):
            if pair in errors:
                continue
            try:
                optimizer = optimizers[i] = optimizers[i] or build_optimizer(pair[0], lanes.lanes[i], study)
                for group in optimizer.param_groups:
                    group["lr"] = study.lr * study.learning_rate(step)
                optimizer.step()
            except Exception as error:  # one format must not take the others' runs with it
                traceback.print_exc()
                errors[pair] = f"{type(error).__name__}: {error}"
        if (step + 1) % every == 0:
            curve.append(recent / every)  # read at the end: nothing here waits for the device
            recent = torch.zeros_like(recent)
    valid, losses = validate(lanes, held_out, study), torch.stack(curve).T.tolist()
    seconds = round(time.perf_counter() - started, 1)
    print(f"{len(pairs)} runs in {seconds} s: {', '.join(f'{name} {seed}' for name, seed in pairs)}", flush=True)

    cases = []
    for i, pair in enumerate(pairs):
        optimizer, model = optimizers[i], lanes.lanes[i]
        if pair in errors or optimizer is None:
            continue
        parameters = list(model.parameters())
        cases.append({
            "format": pair[0], "seed": pair[1], "valid_loss": valid[i],
            "train_curve": [round(value, 4) for value in losses[i]],
            "embedding_norm": round(embedding_norm(model), 4),
            "skipped_steps": int(getattr(optimizer, "skipped_steps", 0)),
            "parameters": sum(p.numel() for p in parameters),
            "train_tokens": needed * study.seq, "valid_tokens": windows_used(held_out, study) * (study.seq - 1),
            "matrix_state_bytes": state_bytes(optimizer, [model.lm_head.weight]),
            "model_state_bytes": state_bytes(optimizer, parameters),
            "job": {"lanes": len(pairs), "seconds": seconds, "compiled": compiled},
        })  # fmt: skip
    return {"cases": cases, "errors": [f"{n} seed {s}: {why}" for (n, s), why in errors.items()], "seconds": seconds}


# --- running the jobs ----------------------------------------------------------------------------------------------


def plan(formats: list[str], seeds: list[int], more: int, more_formats: list[str]) -> list[Pair]:
    """All runs in the order in which they are wanted: rounds of all formats, then `more` rounds of `more_formats`."""
    pairs = [(name, seed) for seed in seeds for name in formats]
    last = max(seeds, default=0)
    return pairs + [(name, seed) for seed in range(last + 1, last + 1 + more) for name in more_formats]


def pack(pairs: list[Pair], lanes: int) -> list[list[Pair]]:
    """Jobs of at most `lanes` runs with Parameters of one dtype; the order of first runs is kept."""
    by_dtype: dict[torch.dtype, list[Pair]] = {}
    for pair in pairs:
        by_dtype.setdefault(parse_format(pair[0])[2], []).append(pair)
    jobs = [own[i : i + lanes] for own in by_dtype.values() for i in range(0, len(own), lanes)]
    return sorted(jobs, key=lambda job: pairs.index(job[0]))


def begin(gpus: Any) -> None:
    """A worker's start: its GPU."""
    if (gpu := gpus.get()) is not None:
        torch.cuda.set_device(gpu)


def pool(processes: int, device: str) -> ProcessPoolExecutor:
    """Fresh processes, spread over the GPUs."""
    context = multiprocessing.get_context("spawn")
    gpus = context.Queue()
    for i in range(processes):
        gpus.put(i % torch.cuda.device_count() if device == "cuda" else None)
    return ProcessPoolExecutor(processes, mp_context=context, initializer=begin, initargs=(gpus,))


def load(path: Path) -> list[dict[str, Any]]:
    """The stored cases, each with its environment, which the file holds once for all that share it."""
    environments = json.loads(path.read_text())["environments"] if path.is_file() else []
    return [{**case, "environment": environments[case["environment"]]} for case in read_cases(path)]


def store(path: Path, cases: list[dict[str, Any]], corpus: Path) -> dict[str, Any]:
    """Writes all cases and what follows from them; returns the summary."""
    known = {name: i for i, name in enumerate(FORMATS)}
    cases.sort(key=lambda c: (known.get(c["format"], len(known)), c["format"], c["seed"]))
    environments: list[dict[str, Any]] = []
    for case in cases:
        if case["environment"] not in environments:
            environments.append(case["environment"])
    summary = summarize(cases)
    write_results(path, {
        "benchmark": "loss_states", "tolerance": TOLERANCE, "baseline": FP32, "control": CONTROL, "summary": summary,
        "corpus": json.loads((corpus / "meta.json").read_text()), "environments": environments,
        "cases": [{**c, "environment": environments.index(c["environment"])} for c in cases],
    })  # fmt: skip
    return summary


def run(args: argparse.Namespace, study: Study, corpus: dict[str, Any]) -> int:
    deadline = time.monotonic() + 60 * args.minutes
    settings = {"study": asdict(study), "corpus_sha256": corpus["files"]["train.bin"]["sha256"], "device": args.device}
    here = environment()
    done = [c for c in load(args.out)
            if reusable({**c, "recipe": f"states {c['format']}"}, settings, here, args.any_source)]  # fmt: skip
    have = {(c["format"], c["seed"]) for c in done}
    formats, more = (list(dict.fromkeys([FP32, *names])) for names in (args.formats, args.more_formats))
    pairs = [pair for pair in plan(formats, args.seeds, args.more, more) if pair not in have]
    jobs = [{"pairs": own, "study": settings["study"], "device": args.device, "corpus": str(args.corpus),
             "compiled": args.device == "cuda" and not args.eager} for own in pack(pairs, args.lanes)]  # fmt: skip
    print(f"{len(done)} runs done before, {len(pairs)} to do in {len(jobs)} jobs, {args.jobs} at a time", flush=True)

    sys.path.insert(0, str(REPOSITORY))  # the workers' path is this one
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the processes are enough
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    failed: list[str] = []
    running: dict[Future[dict[str, Any]], list[Pair]] = {}
    pools = [pool(max(1, min(args.jobs, len(jobs))), args.device)]
    if args.device == "cuda" and jobs:  # meanwhile every format's kernels are compiled once, for all processes
        pools.append(pool(max(1, (os.cpu_count() or 1) - args.jobs), args.device))
        short = asdict(replace(study, steps=2, warmup=1, valid_windows=0))
        for name in dict.fromkeys(name for name, _ in pairs):
            pools[1].submit(train, {**jobs[0], "pairs": [(name, 0)], "study": short, "compiled": False})
    longest = 0.0
    try:
        while jobs or running:
            while jobs and len(running) < args.jobs and time.monotonic() + longest < deadline:
                job = jobs.pop(0)
                running[pools[0].submit(train, job)] = job["pairs"]
            if not running:
                break
            finished, _ = wait(running, max(0.0, deadline - time.monotonic()), FIRST_COMPLETED)
            if not finished:
                break
            for future in finished:
                own = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    raise
                except Exception as error:
                    failed += [f"{name} seed {seed}: {type(error).__name__}: {error}" for name, seed in own]
                    continue
                longest = max(longest, result["seconds"])
                failed += result["errors"]
                done += [{**case, **settings, "environment": here} for case in result["cases"]]
                store(args.out, done, args.corpus)
    finally:
        for process in multiprocessing.active_children():
            process.terminate()
        for each in pools:
            each.shutdown(cancel_futures=True)
    left = [*running.values(), *(job["pairs"] for job in jobs)]
    if done:
        print(table(store(args.out, done, args.corpus)))
    for reason in failed:
        print(f"NOT FINISHED: {reason}")
    if left:
        print(f"out of time for {sum(map(len, left))} runs, from {left[0][0][0]} seed {left[0][0][1]} on")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--formats", nargs="*", default=FORMATS, help="fp32 always runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--more", type=int, default=0, help="further seeds, after all others, of --more-formats")
    parser.add_argument("--more-formats", nargs="*", default=MORE)
    parser.add_argument("--lanes", type=int, default=12, help="models at a time in a process")
    parser.add_argument("--jobs", type=int, default=6, help="processes at a time")
    parser.add_argument("--minutes", type=float, default=600, help="stop then; what has finished is stored")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--beta2", type=float)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--micro", action="store_true", help="a model of toy size, to try the script")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--any-source", action="store_true", help="reuse runs that another package source produced")
    parser.add_argument("--corpus", type=Path, default=REPOSITORY / ".corpus")
    parser.add_argument("--out", type=Path, help="default: results/loss_states.json, a scratch file for trials")
    args = parser.parse_args()
    if not (args.corpus / "meta.json").is_file():
        raise SystemExit(f"no corpus in {args.corpus.name}; build it: python benchmarks/corpus.py --fetch")
    corpus = json.loads((args.corpus / "meta.json").read_text())
    given = {key: value for key in ("steps", "lr", "beta2") if (value := getattr(args, key)) is not None}
    study = replace(MICRO if args.micro else STUDY, vocab=corpus["vocab"], **given)
    args.out = args.out or (RESULTS if study == STUDY else SCRATCH) / "loss_states.json"
    return run(args, study, corpus)


if __name__ == "__main__":
    sys.exit(main())
