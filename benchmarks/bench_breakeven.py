# SPDX-License-Identifier: Apache-2.0
"""From which width and how many tokens on does low precision pay? Forward and backward of two Llama layers, eager.

    python benchmarks/bench_breakeven.py                      every recipe below, one GPU (a minute)
    python benchmarks/bench_breakeven.py --recipes te-current --widths 1024 4096 --tokens 2048
    python benchmarks/bench_breakeven.py --micro --device cpu

For each width (FFN 3.5 x, heads of 64 or 128, a quarter as many KV heads) and number of tokens in a micro-batch, a
step is four micro-batches, and weights change between steps, so that casts of weights are paid once a step, as in
training. Without optimizer, embedding and head: what is compared is what `convert` changed. Baseline: the same layers
with fp32 weights under bf16 autocast, measured in the same process right before. Cells where a recipe loses stay in.

Writes results/breakeven.json: one case per recipe, with `cells` of [width, tokens, bf16 ms, ms].
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from environment import environment
from harness import RESULTS, SCRATCH, read_cases, write_results

RECIPES = ("fp8-lm", "te-current")
WIDTHS = (1024, 2048, 3072, 4096, 6144)
TOKENS = (512, 1024, 2048, 4096, 8192)
MICRO_BATCHES = 4


def build(width: int, tokens: int, device: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaModel

    heads = width // (128 if width >= 4096 else 64) if width >= 1024 else 4
    config = LlamaConfig(
        hidden_size=width, intermediate_size=7 * width // 2, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4), vocab_size=64, max_position_embeddings=max(tokens, 64),
        use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaModel(config).train()


def step_time(model: Any, tokens: int, device: str, steps: int, changed: Any) -> float:
    """Median milliseconds of a step. changed: called after each step, as an optimizer's step would change weights."""
    import torch

    rows = max(1, tokens // 4096)
    x = torch.randn(rows, tokens // rows, model.config.hidden_size, device=device, requires_grad=True)
    times = []
    for _ in range(2 + steps):
        if device == "cuda":
            torch.cuda.synchronize()
        clock = time.perf_counter()
        for _ in range(MICRO_BATCHES):
            with torch.autocast(device, torch.bfloat16):
                out = model(inputs_embeds=x).last_hidden_state
            out.backward(torch.ones_like(out))
        changed()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - clock))
        model.zero_grad(set_to_none=True)
        x.grad = None
    return statistics.median(times[2:])


def measure(recipe: str, widths: list[int], tokens: list[int], device: str, steps: int) -> list[list[float]]:
    import torch

    import hf_lowprec

    cells = []
    for width in widths:
        for count in tokens:
            model = build(width, count, device)
            base = step_time(model, count, device, steps, lambda: None)
            report = hf_lowprec.convert(model, recipe)
            ours = step_time(model, count, device, steps, lambda m=model: hf_lowprec.invalidate(m))
            cells.append([width, count, round(base, 3), round(ours, 3)])
            print(f"{recipe} {width} x {count}: bf16 {base:.2f} ms, ratio {ours / base:.2f}", flush=True)
            del model, report
            if device == "cuda":
                torch.cuda.empty_cache()
    return cells


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--micro", action="store_true", help="toy sizes, to try the script")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="default: results/breakeven.json, a scratch file with --micro")
    args = parser.parse_args()
    if args.micro:
        args.widths, args.tokens, args.steps = [64, 128], [32, 64], 1
    args.out = args.out or (SCRATCH if args.micro else RESULTS) / "breakeven.json"
    here = environment()
    known = {case["recipe"]: case for case in read_cases(args.out)}
    for recipe in args.recipes:
        cells = measure(recipe, args.widths, args.tokens, args.device, args.steps)
        known[recipe] = {"recipe": recipe, "micro_batches": MICRO_BATCHES, "cells": cells, "environment": here}
        write_results(args.out, {"benchmark": "breakeven", "cases": list(known.values())})
    return 0


if __name__ == "__main__":
    sys.exit(main())
