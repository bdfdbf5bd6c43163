# SPDX-License-Identifier: Apache-2.0
"""Host time per Llama layer and micro-batch, forward and backward, without a GPU: `fake_gpu.py` runs no kernel.

    python benchmarks/bench_host.py                       bf16 and every recipe of RECIPES, JSON to results/
    python benchmarks/bench_host.py --recipes fp8-lm --profile 30     and the functions that take longest

A micro-batch at which the GPU is done before the host has launched everything costs what is counted here. Tensors are
tiny, so the bf16 model's own kernels cost little more than their dispatch; what a launch costs in the driver is not in
it (about 5 us for each kernel). Counted for one micro-batch in the middle of a step:

    python    function calls that the interpreter makes (Python and C), by sys.setprofile
    operators calls that reach a kernel of torch behind the dispatcher (of ours, none: they go around it)
    empties   of those, new tensors without content
    views     of those, views
    nodes     autograd nodes of the graph, by name
    launches  kernels of ours and FP8 GEMMs

Times are the processor's, of one thread: the least and the median of many micro-batches. `close` is what follows
an optimizer's step (scales from amaxes), once per step for the layer.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environment import environment
from fake_gpu import LAUNCHES, fake_gpu
from harness import BASELINE, RESULTS, SCRATCH, write_results

RECIPES = ("fp8-lm", "te-current", "te-delayed")
WIDTH, ROWS = 64, 16


def build(layers: int, dtype: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=16, max_position_embeddings=ROWS, use_cache=False,
        attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaModel(config).to(dtype).train()


def prepare(model: Any, recipe: str, run: Callable[[], Any]) -> Any:
    """Converts the model and puts it into the middle of training: scales known, weights followed.

    run: a micro-batch. Norms choose their rounding by comparison with real results.
    """
    import hf_lowprec
    from hf_lowprec.conversion import session_of
    from hf_lowprec.fusion import fused_states

    hf_lowprec.convert(model, recipe)
    session = session_of(model)
    for layer in session.scaling.layers.values():
        layer.ready = (True, True, True)
        layer.weight_cache.followed = True
    for state in fused_states(model):
        if hasattr(state, "emulate"):
            state.emulate = True  # norms: take the kernels on the CPU as well
    emulate_rotary(session, True)
    run()
    return session


def emulate_rotary(session: Any, on: bool) -> None:
    """Whether rotary embeddings take the kernel on the CPU as well, for whatever model of the file calls them."""
    for use in session.rotary:
        use.patch.emulate = on


def micro_batch(model: Any, x: Any, grad: Any) -> Callable[[], Any]:
    """One call: forward, and a function for backward."""
    import torch

    def forward() -> Any:
        with torch.autocast("cpu", torch.bfloat16):  # as Accelerate does, whatever the weights
            return model(inputs_embeds=x).last_hidden_state

    def run() -> None:
        out = forward()
        out.backward(grad)

    run.forward = forward  # type: ignore[attr-defined]
    return run


def counts(run: Any, grad: Any) -> dict[str, Any]:
    """What one micro-batch does."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = 0

    def trace(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    gc.collect()
    sys.setprofile(trace)
    try:
        run()
    finally:
        sys.setprofile(None)

    operators: Counter[str] = Counter()
    views = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal views
            operators[func._schema.name.removeprefix("aten::")] += 1
            views += func.is_view
            return func(*args, **(kwargs or {}))

    LAUNCHES.clear()
    with Count():
        out = run.forward()
        nodes, seen, pending = Counter(), set(), [out.grad_fn]
        while pending:
            node = pending.pop()
            if node is not None and node not in seen:
                seen.add(node)
                nodes[type(node).__name__] += 1
                pending += [parent for parent, _ in node.next_functions]
        out.backward(grad)
    empties = sum(operators[name] for name in ("empty.memory_format", "empty", "new_empty", "empty_like"))
    return {
        "python": calls, "operators": sum(operators.values()), "empties": empties, "views": views,
        "nodes": sum(nodes.values()), "launches": sum(LAUNCHES.values()),
        "by_operator": dict(operators.most_common()), "by_node": dict(nodes.most_common()),
        "by_kernel": dict(LAUNCHES.most_common()),
    }  # fmt: skip


def clocked(call: Callable[[], Any], rounds: int) -> list[float]:
    """Microseconds of this thread's processor time of each call."""
    times = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            start = time.thread_time_ns()
            call()
            times.append((time.thread_time_ns() - start) / 1e3)
    finally:
        gc.enable()
    return times


class Contender:
    """Two models that differ by `layers` layers, so that what surrounds the layers cancels."""

    def __init__(self, recipe: str, dtype: Any, layers: int) -> None:
        import torch

        self.layers = layers
        self.runs: dict[int, Any] = {}
        self.times: dict[int, list[float]] = {1: [], 1 + layers: []}
        self.closing: list[float] = []
        self.session: Any = None
        self.grad = torch.ones(1, ROWS, WIDTH, dtype=dtype)
        for size in self.times:
            model = build(size, dtype)
            # from a tensor that needs a gradient, as behind an embedding
            x = torch.randn(1, ROWS, WIDTH, dtype=dtype, requires_grad=True)
            self.runs[size] = micro_batch(model, x, self.grad)
            if recipe != BASELINE:
                self.session = prepare(model, recipe, self.runs[size])

    def begin(self) -> None:
        """The file of the bf16 model is the converted ones', and so is its function."""
        from hf_lowprec.session import live_sessions

        for session in live_sessions():
            emulate_rotary(session, self.session is not None)

    def count(self) -> dict[str, Any]:
        self.begin()
        found = {}
        for size, run in self.runs.items():
            for _ in range(5):
                run()
            found[size] = counts(run, self.grad)
        small, large = found.values()
        out: dict[str, Any] = {}
        for key, value in large.items():
            if isinstance(value, int):
                out[key] = round((value - small[key]) / self.layers, 1)
            else:
                less = Counter(value)
                less.subtract(small[key])
                out[key] = {name: round(n / self.layers, 2) for name, n in less.items() if n}
        return out

    def clock(self, rounds: int) -> None:
        from hf_lowprec.modules import weights_changed

        self.begin()
        for size, run in self.runs.items():
            self.times[size] += clocked(run, rounds)
        if self.session is not None:
            self.closing += clocked(lambda: (weights_changed(), self.session.scaling.roll()), 1)
            for run in self.runs.values():
                run()  # casts weights again

    def result(self) -> dict[str, Any]:
        def per_layer(of: Callable[[list[float]], float]) -> float:
            small, large = (of(times) for times in self.times.values())
            return round((large - small) / self.layers, 1)

        close = round(min(self.closing) / (1 + self.layers), 1) if self.closing else None
        return {"best_us": per_layer(min), "median_us": per_layer(statistics.median), "close_us": close}


def show_profile(run: Callable[[], Any], lines: int) -> None:
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(50):
        run()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(lines)


def show(case: dict[str, Any]) -> str:
    keys = ("best_us", "median_us", "close_us", "python", "operators", "empties", "views", "nodes", "launches")
    return f"{case['case']:>16}: " + ", ".join(f"{key} {case[key]}" for key in keys if case[key] is not None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16", help="of the weights as loaded")
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--profile", type=int, default=0, metavar="LINES")
    parser.add_argument("--micro", action="store_true", help="few rounds, to try the script")
    parser.add_argument("--out", type=Path, help="default: results/host.json, a scratch file with --micro")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    if args.micro:
        args.rounds, args.layers = 10, 1
    here = environment()
    suffix = "" if args.dtype == "fp32" else "@bf16"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    contenders = {recipe: Contender(recipe, dtype, args.layers) for recipe in (BASELINE, *args.recipes)}
    cases = []
    with fake_gpu():
        counted = {recipe: contender.count() for recipe, contender in contenders.items()}
        for _ in range(20):  # by turns: what else runs on the machine disturbs all alike
            for contender in contenders.values():
                contender.clock(max(1, args.rounds // 20))
        for recipe, contender in contenders.items():
            case = {"case": recipe + suffix, **contender.result(), **counted[recipe]}
            cases.append({**case, "environment": here})
            print(show(case), flush=True)
            if args.profile:
                contender.begin()
                show_profile(contender.runs[1 + args.layers], args.profile)
    out = args.out or (SCRATCH if args.micro else RESULTS) / "host.json"
    write_results(out, {"benchmark": "host", "layers": args.layers, "rounds": args.rounds, "cases": cases})
    return 0


if __name__ == "__main__":
    sys.exit(main())
