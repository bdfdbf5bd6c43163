# SPDX-License-Identifier: Apache-2.0
"""Does a recipe reach the loss of bf16? A Llama trained from scratch on real text, once per recipe and seed.

    python benchmarks/corpus.py --fetch
    python benchmarks/loss_parity.py                                     the study (one GPU)
    python benchmarks/loss_parity.py --recipes fp8-lm my_recipe.yaml --seeds 1 2 3 4 5
    python benchmarks/loss_parity.py --micro --device cpu --recipes      the script itself, in a minute, on a CPU

What is compared: the baseline is fp32 weights, bf16 autocast, fp32 AdamW, through `Accelerator("bf16")` of an
untouched accelerate. A candidate runs the same function with one word changed. A seed fixes initial weights and data
order, so candidate and baseline are paired. A candidate may be written `recipe@bf16`: weights loaded in bf16. The
candidate `bf16~` is the control: the baseline again, one weight of the first norm moved by a thousandth. Whatever gap
it shows is chaos, which no recipe can be blamed for and no recipe can claim.

What is decided: `verdict.py` states the rule. The validation text is whole held-out documents of every source, all of
it, through the candidate's own forward; `valid_loss_high_precision` is the same weights through the unquantised one.

Each case is its own process; several share the GPU, so the seconds here are no speed measurement. A case that is
already in --out with the same settings is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
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
    parse_recipe,
    peak_gib,
    read_cases,
    report_of,
    reusable,
    start,
    write_results,
)
from verdict import summarize, table

SHARE = 0.95  # of the layers' GEMM FLOPs that a candidate has to convert
EVERY = 10  # steps between two points of the loss curve
PROBE = 100  # steps between two validation losses on PROBE_WINDOWS windows
PROBE_WINDOWS = 80
CONTROL = "bf16~"


@dataclass(frozen=True)
class Study:
    """Everything that makes two cases comparable; part of every result."""

    hidden: int = 768
    intermediate: int = 2048
    layers: int = 6
    heads: int = 12
    vocab: int = 16384
    seq: int = 1024
    batch: int = 20
    steps: int = 1000
    warmup: int = 100
    lr: float = 1e-3
    lr_end: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    valid_windows: int | None = None  # None: all

    @property
    def model(self) -> dict[str, int]:
        """LlamaConfig's arguments."""
        return {
            "hidden_size": self.hidden, "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.heads, "vocab_size": self.vocab,
            "max_position_embeddings": self.seq, "bos_token_id": 0, "eos_token_id": 0,
        }  # fmt: skip

    def learning_rate(self, step: int) -> float:
        """Factor on `lr`: linear warm-up, then cosine down to `lr_end`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        t = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.lr_end + (1 - self.lr_end) * 0.5 * (1 + math.cos(math.pi * t))


MICRO = Study(hidden=64, intermediate=128, layers=2, heads=4, seq=64, batch=4, steps=40, warmup=5, lr=3e-3,
              valid_windows=32)  # fmt: skip


# --- one case: the worker process ----------------------------------------------------------------------------------


class Windows:
    """Non-overlapping windows of `seq` tokens, kept on the device; a seed permutes them."""

    def __init__(self, path: Path, seq: int, device: Any) -> None:
        import numpy as np
        import torch

        tokens = np.fromfile(path, dtype=np.uint16).astype(np.int32)
        self.count = len(tokens) // seq
        self.rows = torch.from_numpy(tokens[: self.count * seq]).view(self.count, seq).to(device)

    def batch(self, indices: Any) -> Any:
        return self.rows[indices.to(self.rows.device)].long()


def build_optimizer(study: Study, model: Any) -> Any:
    import torch

    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": study.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=study.lr, betas=(study.beta1, study.beta2), fused=True)


def validate(model: Any, windows: Windows, study: Study, count: int) -> float:
    """Mean loss per predicted token over the first `count` windows."""
    import torch

    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=windows.rows.device)
    with torch.no_grad():
        for start in range(0, count, study.batch):
            ids = windows.batch(torch.arange(start, min(start + study.batch, count)))
            total += model(input_ids=ids, labels=ids).loss.double() * len(ids)
    model.train()
    return float(total) / count


def train(recipe: str, seed: int, study: Study, corpus: Path, device: str) -> dict[str, Any]:
    """One run through Accelerator.prepare; returns what was measured."""
    import torch

    torch.set_num_threads(1)
    os.environ["HF_LOWPREC_BREAK_EVEN"] = "0"  # the question is the loss, whatever the speed
    name, dtype = parse_recipe(BASELINE if recipe == CONTROL else recipe)
    accelerator = make_accelerator(name, device)
    model = build_llama(seed, dtype, **study.model)
    if recipe == CONTROL:
        nudge(model)
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = build_optimizer(study, model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, study.learning_rate)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

    text = Windows(corpus / "train.bin", study.seq, accelerator.device)
    held_out = Windows(corpus / "valid.bin", study.seq, accelerator.device)
    everything = min(held_out.count, study.valid_windows or held_out.count)
    if text.count < study.steps * study.batch:
        raise SystemExit(f"the corpus has {text.count} windows, {study.steps * study.batch} are needed (one epoch)")
    order = torch.randperm(text.count, generator=torch.Generator().manual_seed(seed))

    curve, probes = [], []
    recent = torch.zeros((), device=accelerator.device)
    clock = time.perf_counter()
    for step in range(1, study.steps + 1):
        ids = text.batch(order[(step - 1) * study.batch : step * study.batch])
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), study.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        recent += loss.detach()
        if step % EVERY == 0:  # the only host synchronisation of the loop
            curve.append([step, round(float(recent) / EVERY, 4)])
            recent.zero_()
            if not math.isfinite(curve[-1][1]):
                break
        if step % PROBE == 0 and step < study.steps:
            probes.append([step, round(validate(model, held_out, study, min(PROBE_WINDOWS, everything)), 5)])
            spent = time.perf_counter() - clock
            print(f"{recipe} seed {seed}: step {step}/{study.steps} loss {curve[-1][1]:.4f} valid {probes[-1][1]:.4f} "
                  f"{1000 * spent / step:.0f} ms/step", flush=True)  # fmt: skip
    seconds = time.perf_counter() - clock

    case: dict[str, Any] = {
        "parameters": parameters,
        "train_tokens": study.steps * study.batch * study.seq, "valid_tokens": everything * (study.seq - 1),
        "valid_loss": validate(model, held_out, study, everything), "train_curve": curve, "valid_curve": probes,
        "seconds": round(seconds, 1), "peak_gib": peak_gib(),
        "embedding_norm": round(embedding_norm(accelerator.unwrap_model(model)), 4),
    }  # fmt: skip
    if name != BASELINE:
        case["conversion"] = conversion(accelerator, model)
        case["valid_loss_high_precision"] = validate_high_precision(accelerator, model, held_out, study, everything)
        from hf_lowprec import ungraph_layers

        ungraph_layers(accelerator.unwrap_model(model))  # the profiler sees no operators in replays
    if accelerator.device.type == "cuda":
        case["one_step"] = count_kernels(model, text.batch(order[: study.batch]))
    return case


def nudge(model: Any) -> None:
    """Move one weight of the first norm by a thousandth: a run that differs from another by rounding alone.

    A norm's, since every token meets it: the embedding of one token is not in every batch.
    """
    import torch

    with torch.no_grad():
        next(p for p in model.parameters() if p.dim() == 1)[0] *= 1.001


def embedding_norm(model: Any) -> float:
    """Mean norm of the token embeddings: grows if momentum of rarely seen tokens sticks in a coarse format."""
    return float(model.get_input_embeddings().weight.detach().float().norm(dim=1).mean())


def validate_high_precision(accelerator: Any, model: Any, windows: Windows, study: Study, count: int) -> float:
    """The same weights through the unquantised forward: tells a worse model from a coarser measurement."""
    import hf_lowprec

    with hf_lowprec.high_precision(accelerator.unwrap_model(model)):
        return validate(model, windows, study, count)


def conversion(accelerator: Any, model: Any) -> dict[str, Any]:
    """What the report says ran in low precision. Raises if less than SHARE of the layers' GEMM FLOPs was converted."""
    import torch

    report = report_of(accelerator, model)
    layers = {
        name: module.weight.numel()
        for name, module in accelerator.unwrap_model(model).named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}"
    }  # every linear of a layer sees all tokens, so weights count FLOPs
    share = sum(layers.get(name, 0) for name in report.converted) / sum(layers.values())
    if share < SHARE:
        raise SystemExit(f"only {share:.1%} of the layers' GEMM FLOPs are converted, the study asks for {SHARE:.0%}")
    return {
        "recipe": report.recipe.to_dict(), "summary": report.summary(),
        "converted": len(report.converted), "layer_flop_share": round(share, 4),
        "skipped": report.skipped, "kernels": report.kernels, "bytes_per_parameter": report.bytes_per_parameter,
    }  # fmt: skip


def count_kernels(model: Any, ids: Any) -> dict[str, int]:
    """GEMM calls of one forward and backward pass, counted by the profiler: proof of what really ran."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        model(input_ids=ids, labels=ids).loss.backward()
        torch.cuda.synchronize()
    counts = {event.key: event.count for event in trace.key_averages()}
    gemms = ("aten::_scaled_mm", "aten::mm", "aten::addmm")
    launches = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
    return {
        **{name: counts[name] for name in gemms if name in counts},
        "kernel_launches": sum(counts.get(name, 0) for name in launches),
    }


# --- running the cases ---------------------------------------------------------------------------------------------


def store(path: Path, cases: list[dict[str, Any]], corpus: Path) -> None:
    cases.sort(key=lambda c: (c["recipe"] != BASELINE, c["recipe"], c["seed"]))
    meta = json.loads((corpus / "meta.json").read_text())
    write_results(path, {"benchmark": "loss_parity", "summary": summarize(cases), "corpus": meta, "cases": cases})


def run(args: argparse.Namespace, study: Study) -> int:
    corpus = json.loads((args.corpus / "meta.json").read_text())["files"]["train.bin"]["sha256"]
    settings = {"study": asdict(study), "corpus_sha256": corpus, "device": args.device}
    here = environment()
    done = [case for case in read_cases(args.out) if reusable(case, settings, here, args.any_source)]
    have = {(case["recipe"], case["seed"]) for case in done}
    wanted = [(recipe, seed) for seed in args.seeds for recipe in [BASELINE, *args.recipes]]  # whole pairs come first
    waiting = [pair for pair in wanted if pair not in have]
    gpus = max(1, here["gpu_count"]) if args.device == "cuda" else 1
    print(f"{len(done)} cases done before, {len(waiting)} to run, {args.jobs} at a time on each GPU", flush=True)

    deadline = time.monotonic() + 60 * args.minutes
    running: dict[tuple[str, int], tuple[subprocess.Popen, Path, int]] = {}
    failed: list[str] = []
    while waiting or running:
        while waiting and len(running) < args.jobs * gpus:
            recipe, seed = pair = waiting.pop(0)
            load = [gpu for _, _, gpu in running.values()]
            gpu = min(range(gpus), key=load.count)
            target = SCRATCH / f"loss_parity-{file_name(recipe)}-{seed}.json"
            case = {"recipe": recipe, "seed": seed, **settings}
            running[pair] = (start(__file__, {**case, "corpus": str(args.corpus)}, target, gpu), target, gpu)
        time.sleep(0.5)
        for pair, (process, target, _) in list(running.items()):
            if process.poll() is None:
                continue
            del running[pair]
            if process.returncode:
                failed.append(f"{pair[0]} seed {pair[1]}: exit status {process.returncode}")
                continue
            done.append({**json.loads(target.read_text()), "command": here["command"]})
            store(args.out, done, args.corpus)
        if time.monotonic() > deadline:
            failed += [f"{recipe} seed {seed}: out of time" for recipe, seed in [*running, *waiting]]
            for process, _, _ in running.values():
                process.terminate()
            break
    print(table(done, summarize(done)))
    for reason in failed:
        print(f"NOT FINISHED: {reason}")
    return 1 if failed else 0


def work(order: dict[str, Any]) -> None:
    case = order["case"]
    corpus = Path(case.pop("corpus"))  # where this machine keeps it is nobody's business
    finish(order, train(case["recipe"], case["seed"], Study(**case["study"]), corpus, case["device"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipes", nargs="*", default=["fp8-lm", "fp8-lm-o1"], help="candidates; bf16 always runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=4, help="cases at a time on each GPU")
    parser.add_argument("--minutes", type=float, default=600, help="stop then; what has finished is stored")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seq", type=int)
    parser.add_argument("--micro", action="store_true", help="a model of toy size, to try the script")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--any-source", action="store_true", help="reuse cases that another package source produced")
    parser.add_argument("--corpus", type=Path, default=REPOSITORY / ".corpus")
    parser.add_argument("--out", type=Path, help="default: results/loss_parity.json, a scratch file for trials")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(json.loads(args.worker))
        return 0
    given = {k: v for k in ("steps", "batch", "seq") if (v := getattr(args, k)) is not None}
    study = replace(MICRO if args.micro else Study(), **given)
    args.out = args.out or (RESULTS if study == Study() else SCRATCH) / "loss_parity.json"
    if not (args.corpus / "meta.json").is_file():
        raise SystemExit(f"no corpus in {args.corpus.name}; build it: python benchmarks/corpus.py --fetch")
    return run(args, study)


if __name__ == "__main__":
    sys.exit(main())
