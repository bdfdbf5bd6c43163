# SPDX-License-Identifier: Apache-2.0
"""From which size and how many tokens on does low precision pay? The rule that the package follows, and a check of it.

    python benchmarks/bench_breakeven.py                      every recipe below, one GPU (two minutes)
    python benchmarks/bench_breakeven.py --recipes te-current --widths 1024 4096 --tokens 2048
    python benchmarks/bench_breakeven.py --write-rule [--no-map]  also writes hf_lowprec/break_even.json from `linears`
    python benchmarks/bench_breakeven.py --ruled              the map with that rule in force, where nothing may lose
    python benchmarks/bench_breakeven.py --micro --device cpu

Two measurements for each width and number of tokens in a micro-batch:

    linears   LINEARS square linears behind each other and nothing else, each with a cast of its own: what the rule is
              made from. A weight of width^2 elements gains from the least number of tokens on from which on all that
              were measured gained.
    cells     two Llama layers (FFN 3.5 x, heads of 64 or 128, a quarter as many KV heads): the map of the figure, with
              everything converted, and with --ruled by the rule. CUDA graphs of the layers as in training: where the
              GPU waits for the host; with --no-graphs nowhere.

A step is four micro-batches, and weights change between steps, so that casts of weights are paid once a step, as in
training. Without optimizer, embedding and head: what is compared is what `convert` changed. Baseline: the same layers
with fp32 weights under bf16 autocast, measured in the same process right before. Cells where a recipe loses stay in.
The host's time is in it, so the rule is of a GPU and its host.

Writes results/breakeven.json: one case per recipe, `cells` and `linears` of [width, tokens, bf16 ms, ms].
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from environment import REPOSITORY, environment
from harness import RESULTS, SCRATCH, read_cases, write_results

RECIPES = ("fp8-lm", "te-current")
WIDTHS = (1024, 2048, 3072, 4096, 6144)
TOKENS = (512, 1024, 2048, 4096, 8192)
MICRO_BATCHES = 4
LINEARS = 4
GRAPH_WARMUP = 6  # steps until layers are captured, and a first replay
RULE = REPOSITORY / "hf_lowprec" / "break_even.json"


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


def build_linears(width: int, device: str) -> Any:
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False, device=device) for _ in range(LINEARS))).train()


def step_time(forward: Any, x: Any, device: str, steps: int, changed: Any, warmup: int = 2) -> float:
    """Median milliseconds of a step. changed: called after each step, as an optimizer's step would change weights."""
    import torch

    times = []
    for _ in range(warmup + steps):
        if device == "cuda":
            torch.cuda.synchronize()
        clock = time.perf_counter()
        for _ in range(MICRO_BATCHES):
            with torch.autocast(device, torch.bfloat16):
                out = forward(x)
            out.backward(torch.ones_like(out))
        changed()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - clock))
        x.grad = None
    return statistics.median(times[warmup:])


def pair(
    model: Any, forward: Any, x: Any, recipe: str, device: str, steps: int, ruled: bool, graphs: bool
) -> tuple[float, float, Any]:
    """Milliseconds of the model as it is, and converted; the graphs of its layers, or None."""
    import hf_lowprec
    from hf_lowprec.conversion import session_of
    from hf_lowprec.modules.weight_cache import weights_changed

    def forget() -> None:
        model.zero_grad(set_to_none=True)

    base = step_time(forward, x, device, steps, forget)
    try:
        hf_lowprec.convert(model, recipe, **({} if ruled else {"min_numel": 0, "min_tokens": 0}))
    except hf_lowprec.NothingConvertedError:  # the rule leaves all of it
        return base, step_time(forward, x, device, steps, forget), None
    session = session_of(model)
    taken = hf_lowprec.graph_layers(model, when="waiting") if graphs else None

    def close() -> None:  # what follows an optimizer's step
        session.scaling.roll()
        weights_changed()
        forget()

    ours = step_time(forward, x, device, steps, close, 2 if taken is None else 2 + GRAPH_WARMUP)
    return base, ours, taken


def measure(
    recipe: str,
    widths: list[int],
    tokens: list[int],
    device: str,
    steps: int,
    ruled: bool,
    graphs: bool,
    linears: bool,
) -> list[list[float]]:
    """[width, tokens, bf16 ms, ms] of two Llama layers, or of `linears`."""
    import torch

    cells = []
    for width in widths:
        for count in tokens:
            rows = max(1, count // 4096)
            model = build_linears(width, device) if linears else build(width, count, device)
            forward = model if linears else lambda x, m=model: m(inputs_embeds=x).last_hidden_state
            x = torch.randn(rows, count // rows, width, device=device, requires_grad=True)
            base, ours, taken = pair(model, forward, x, recipe, device, steps, ruled, graphs and not linears)
            cells.append([width, count, round(base, 3), round(ours, 3)])
            what = f"{LINEARS} linears" if linears else "Llama"
            print(f"{recipe} {what} {width} x {count}: bf16 {base:.2f} ms, ratio {ours / base:.2f}"
                  f"{'' if taken is None else f', graphs: {taken}'}", flush=True)  # fmt: skip
            del model, forward, taken
            if device == "cuda":
                torch.cuda.empty_cache()
    return cells


def write_rule(path: Path, recipe: str, linears: list[list[float]], conditions: dict[str, Any]) -> None:
    """Adds, or replaces, the rule for this GPU and recipe in the file that the package reads."""
    from hf_lowprec.break_even import least_tokens

    if conditions["gpu"] is None:
        raise SystemExit("--write-rule: the rule is a GPU's, and there is none")
    data = json.loads(path.read_text(encoding="utf-8"))
    kept = ("date", "command", "commit", "dirty", "gpu", "driver", "cpu", "libraries")
    data["gpus"].setdefault(conditions["gpu"], {})[recipe] = {
        "least_tokens": least_tokens(linears),
        "environment": {key: conditions[key] for key in kept if key in conditions},
    }
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--micro", action="store_true", help="toy sizes, to try the script")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--write-rule", nargs="?", type=Path, const=RULE, metavar="JSON", help="default: the package's"
    )
    parser.add_argument("--no-map", action="store_true", help="`linears` alone: what the rule is made from")
    parser.add_argument("--no-linears", action="store_true", help="the map alone")
    parser.add_argument("--no-graphs", action="store_true", help="the map without CUDA graphs of the layers")
    parser.add_argument("--ruled", action="store_true", help="measure the map with the package's rule in force")
    parser.add_argument("--out", type=Path, help="default: results/breakeven.json, a scratch file with --micro")
    args = parser.parse_args()
    if args.micro:
        args.widths, args.tokens, args.steps = [64, 128], [32, 64], 1
    args.out = args.out or (SCRATCH if args.micro else RESULTS) / "breakeven.json"
    here = environment()
    known = {case["recipe"]: case for case in read_cases(args.out)}
    for recipe in args.recipes:
        name = f"{recipe}, by the rule" if args.ruled else f"{recipe}, no graphs" if args.no_graphs else recipe
        graphs = args.device == "cuda" and not args.no_graphs
        sizes = (args.widths, args.tokens, args.device, args.steps, args.ruled, graphs)
        case: dict[str, Any] = {"recipe": name, "micro_batches": MICRO_BATCHES, "environment": here}
        if args.no_linears and name in known:
            case = {**known[name], "map_environment": here}
        elif not args.ruled and not args.no_linears:
            case["linears"] = measure(recipe, *sizes, True)
            if args.write_rule is not None:
                write_rule(args.write_rule, recipe, case["linears"], here)
        case["cells"] = [] if args.no_map else measure(recipe, *sizes, False)
        known[name] = case
        write_results(args.out, {"benchmark": "breakeven", "cases": list(known.values())})
    return 0


if __name__ == "__main__":
    sys.exit(main())
