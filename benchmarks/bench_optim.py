# SPDX-License-Identifier: Apache-2.0
"""Time, memory and kernels of one optimizer step on a GPU: ours and its peers, each in a process of its own.

    python benchmarks/bench_optim.py                       every contender, both sets of tensors (2 minutes)
    python benchmarks/bench_optim.py --only 8bit torch@    contenders whose name contains one of these
    python benchmarks/bench_optim.py --micro --device cpu  the script itself

Contenders are states@weights: `8bit@bf16` is our AdamW with 8-bit states on bfloat16 Parameters and gradients. Where
16-bit Parameters have a master, it is the default one of those states. `8bit-element` passes non-finite gradients by
element, in one pass. `fp8-lm+weights@bf16` also casts every matrix to FP8 after the step, in both layouts, as the
layers of `fp8-lm` read them. Peers: torch's fused AdamW, bitsandbytes' AdamW8bit, torchao's AdamW8bit (and AdamWFp8,
which runs only where --only names it), flashoptim's FlashAdamW with 24-bit masters; who cannot be imported is skipped.

Tensors: `big`, 30 of 4096 x 8192 and 60 of 4096; `small`, 1000 of 16 x 4096 and 1000 of 4096 x 16. Numbers:
    ms_per_1e9          median of CUDA-event times of single steps, per 1e9 parameters
    wall_ms, host_ms    of one step in a row of them; until `step()` returns
    bytes               that a step must move per parameter: gradient once, Parameter and states in and out (of a
                        Parameter with a whole master beside it only out; FP8 copies of weights out)
    bytes_passes        that ours moves: gradients once more where all are looked at before the first write, Parameters
                        once more where they are cast
    copy_share          `bytes` over that time, as a share of what a copy reaches in the same process
    state_bytes         per parameter, by the allocator; state_bytes_told: by `optimizer.state_bytes()`
    first_step_s        the first step of the process, of one matrix and one vector, with nothing compiled before
    kernels             of one step, by torch.profiler

Processes take turns on the GPU (a file lock); while one measures, the next import and compile.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_step import NOT_INSTALLED, turn
from environment import environment
from harness import RESULTS, SCRATCH, file_name, finish, read_cases, start, write_results

OURS = ("8bit@bf16", "8bit-element@bf16", "8bit+weights@bf16", "8bit@fp32", "compact@bf16", "fp8-lm@bf16",
        "fp8-lm+weights@bf16", "fp8@bf16", "4bit@bf16", "bf16@bf16", "fp32@fp32")  # fmt: skip
PEERS = ("torch@fp32", "torch@bf16", "bitsandbytes@bf16", "bitsandbytes@fp32", "torchao@bf16", "flashoptim@bf16",
         "torchao-fp8@bf16")  # fmt: skip
ON_REQUEST = ("torchao-fp8@bf16",)
BIG_ONLY = ("torchao",)  # it compiles for every shape and steps in a loop over the tensors

Shapes = list[tuple[int, ...]]
SETS: dict[str, Shapes] = {
    "big": [(4096, 8192)] * 30 + [(4096,)] * 60,
    "small": [(16, 4096)] * 1000 + [(4096, 16)] * 1000,
}
MICRO: dict[str, Shapes] = {
    "big": [(64, 128)] * 3 + [(64,)] * 6,
    "small": [(4, 64)] * 10 + [(64, 4)] * 10,
}


# --- one contender: the worker process -----------------------------------------------------------------------------


def maker(name: str) -> Callable[[list[Any]], Any]:
    """Parameters -> optimizer. Raises ImportError."""
    kind, _, dtype = name.partition("@")
    if kind == "torch":
        import torch

        return lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True)
    if kind == "bitsandbytes":
        from bitsandbytes.optim import AdamW8bit

        return lambda params: AdamW8bit(params, lr=1e-4)
    if kind.startswith("torchao"):
        from torchao import optim

        cls = optim.AdamWFp8 if kind == "torchao-fp8" else optim.AdamW8bit
        return lambda params: cls(params, lr=1e-4)
    if kind == "flashoptim":
        from flashoptim import FlashAdamW

        return lambda params: FlashAdamW(params, lr=1e-4, master_weight_bits=24 if dtype == "bf16" else None)
    from hf_lowprec.optim import AdamW

    kind, weights, _ = kind.partition("+weights")
    states, element, _ = kind.partition("-element")
    nonfinite = "element" if element else "step"
    if weights:
        return lambda params: WithWeights(AdamW(params, lr=1e-4, states=states, nonfinite=nonfinite), params)
    return lambda params: AdamW(params, lr=1e-4, states=states, nonfinite=nonfinite)


class WithWeights:
    """An optimizer of ours after whose steps all matrices are cast as weights of `fp8-lm`, in both layouts, again into
    the same copies; without a model around them, whose first layer would ask for that."""

    def __init__(self, optimizer: Any, params: list[Any]) -> None:
        from hf_lowprec.modules import LayerState, emission
        from hf_lowprec.ops.cast_weights import PlainTable
        from hf_lowprec.presets import PRESETS

        optimizer.note_amax()
        self.optimizer, self.weights = optimizer, [p for p in params if p.dim() == 2]
        self.layers = [LayerState.create(PRESETS["fp8-lm"], i, weight_is_kn=False, emulate=False)
                       for i in range(len(self.weights))]  # fmt: skip
        for layer, weight in zip(self.layers, self.weights, strict=True):
            layer.to(weight.device)
            layer.weight_cache.followed = True
            self._need(layer, weight)
        if self.weights[0].device.type == "cpu":  # to try the script
            emission.table_for = lambda device: PlainTable()
        self.emission = emission.Emission(list(zip(self.layers, self.weights, strict=True)))

    def step(self) -> None:
        self.optimizer.step()
        caches = [layer.weight_cache for layer in self.layers]
        copies = [cache.quantized for cache in caches]
        for cache, weight in zip(caches, self.weights, strict=True):
            cache.close_step()
            cache.note_amax(weight, self.optimizer.weight_amax(weight))
        self.emission.defer(copies)
        self._need(self.layers[0], self.weights[0])

    @staticmethod
    def _need(layer: Any, weight: Any) -> None:
        """As a forward pass does: the first layer's has all weights cast."""
        layer.weight_cache.get(weight, layer.spec, layer.operands[1], ready=False, training=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


def parameters(shapes: Shapes, dtype: str, device: str) -> list[Any]:
    import torch

    torch.manual_seed(0)
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    params = [torch.nn.Parameter(torch.randn(shape, device=device, dtype=kind) * 0.02) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    return params


def synchronize(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def timed(step: Callable[[], Any], device: str, count: int, warmup: int = 3) -> list[float]:
    """Milliseconds of each call, by events on a GPU."""
    import torch

    times = []
    for _ in range(warmup + count):
        if device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            step()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            clock = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - clock))
    return times[warmup:]


def copy_rate(device: str) -> float:
    """Bytes read and written per second by a copy."""
    import torch

    x = torch.zeros(2**31 if device == "cuda" else 2**20, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.numel() / statistics.median(timed(lambda: y.copy_(x), device, 10)) * 1e3


def on_the_host(step: Callable[[], Any], device: str, count: int) -> tuple[float, float]:
    """(milliseconds of wall per step of a row of them, median milliseconds until one returns)."""
    synchronize(device)
    clock = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)
    wall = 1e3 * (time.perf_counter() - clock) / count
    host = []
    for _ in range(count):
        clock = time.perf_counter()
        step()
        host.append(1e3 * (time.perf_counter() - clock))
        synchronize(device)
    return wall, statistics.median(host)


def kernels(step: Callable[[], Any], device: str) -> int | None:
    """Of one step: everything that runs on the device, copies and fills too."""
    if device != "cuda":
        return None
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in trace.events())


def bytes_moved(optimizer: Any, params: list[Any], state_bytes: float) -> tuple[float, float]:
    """`bytes` and `bytes_passes` per parameter, see the module docstring; of a peer's passes nothing is known."""
    numel = sum(p.numel() for p in params)
    out = 2 * state_bytes
    for p in params:
        keys = optimizer.state[p]
        whole = "master" in keys or "master_qdata" in keys
        out += p.numel() / numel * (p.grad.itemsize + p.itemsize * (1 if whole else 2))
    passes = out
    if getattr(optimizer, "nonfinite", "") == "step":
        passes += sum(p.numel() * p.grad.itemsize for p in params) / numel
    for weight in getattr(optimizer, "weights", ()):
        out += 2 * weight.numel() / numel
        passes += (2 + weight.itemsize) * weight.numel() / numel
    return out, passes


def measure_set(
    make: Callable[[list[Any]], Any], shapes: Shapes, dtype: str, device: str, steps: int
) -> dict[str, Any]:
    import torch

    params = parameters(shapes, dtype, device)
    numel = sum(p.numel() for p in params)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    optimizer = make(params)
    optimizer.step()
    synchronize(device)
    allocated = (torch.cuda.memory_allocated() - before) / numel if device == "cuda" else None
    told = sum(optimizer.state_bytes().values()) / numel if hasattr(optimizer, "state_bytes") else None
    times = timed(optimizer.step, device, steps)
    wall, host = on_the_host(optimizer.step, device, steps)
    moved, passes = bytes_moved(optimizer, params, next((n for n in (told, allocated) if n is not None), 0.0))
    median = statistics.median(times)
    return {
        "parameters": numel, "tensors": len(params), "ms": round(median, 4), "ms_min": round(min(times), 4),
        "ms_max": round(max(times), 4), "ms_per_1e9": round(median / numel * 1e9, 3), "wall_ms": round(wall, 3),
        "host_ms": round(host, 3), "bytes": round(moved, 3),
        "bytes_passes": None if told is None else round(passes, 3), "bytes_per_s": moved * numel / median * 1e3,
        "state_bytes": None if allocated is None else round(allocated, 3),
        "state_bytes_told": None if told is None else round(told, 3), "kernels": kernels(optimizer.step, device),
    }  # fmt: skip


def measure(contender: str, device: str, steps: int, micro: bool) -> dict[str, Any]:
    # Nothing was compiled before: a folder of its own for what Triton and Inductor keep.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TRITON_CACHE_DIR"] = os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            make = maker(contender)
        except ImportError:
            return {"status": NOT_INSTALLED}
        dtype = contender.partition("@")[2]
        sets = {
            name: shapes
            for name, shapes in (MICRO if micro else SETS).items()
            if name == "big" or not contender.startswith(BIG_ONLY)
        }
        params = parameters([sets["big"][0], sets["big"][-1]], dtype, device)
        optimizer = make(params)
        synchronize(device)
        clock = time.perf_counter()
        optimizer.step()
        synchronize(device)
        first = round(time.perf_counter() - clock, 2)
        del params, optimizer
        found = {}
        with turn(SCRATCH / "gpu.lock"):
            rate = copy_rate(device)
            for name, shapes in sets.items():
                release(device)
                case = measure_set(make, shapes, dtype, device, steps)
                share = case.pop("bytes_per_s") / rate if device == "cuda" else None
                found[name] = case | {
                    "copy_share": None if share is None else round(share, 3),
                    "copy_tb_per_s": round(rate / 1e12, 3),
                    "first_step_s": first,
                }
            release(device)
    return {"status": "ok", "sets": found}


def release(device: str) -> None:
    """The next tensors, or the next process, need the memory."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def work(order: dict[str, Any]) -> None:
    """A contender that cannot run is a result too: its error is stored in place of numbers."""
    try:
        measured = measure(**order["case"])
    except Exception as error:
        measured = {"status": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
    finish(order, measured)


# --- running the contenders ----------------------------------------------------------------------------------------


def by_set(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One case per set of tensors, or the one that says why there is none."""
    sets = result.pop("sets", {"big": {}})
    conditions = result.pop("environment")
    return [{**result, "set": name, **numbers, "environment": conditions} for name, numbers in sets.items()]


def table(cases: list[dict[str, Any]]) -> str:
    fields = ("ms_per_1e9", "wall_ms", "host_ms", "bytes", "bytes_passes", "copy_share", "state_bytes",
              "state_bytes_told", "first_step_s", "kernels")  # fmt: skip
    head = ("ms/1e9", "wall ms", "host ms", "B moved", "passes", "of copy", "B state", "(told)", "first s", "kernels")
    lines = [f"{'set':<6} {'contender':<19} " + " ".join(f"{title:>8}" for title in head)]
    for case in sorted(cases, key=lambda case: case["set"]):
        cells = ["-" if (n := case.get(field)) is None else f"{n:g}" for field in fields]
        numbers = " ".join(f"{cell:>8}" for cell in cells) if case["status"] == "ok" else case["status"][:80]
        lines.append(f"{case['set']:<6} {case['contender']:<19} {numbers}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    here = environment()
    wanted = [
        name
        for name in (*OURS, *PEERS)
        if (any(text in name for text in args.only) if args.only else name not in ON_REQUEST)
    ]
    # A contender that compiles for long begins early.
    waiting = sorted(wanted, key=lambda name: not name.startswith("torchao"))
    fresh: dict[str, list[dict[str, Any]]] = {}
    stored: dict[str, list[dict[str, Any]]] = {}
    for case in read_cases(args.out):
        stored.setdefault(case["contender"], []).append(case)
    running: list[tuple[str, subprocess.Popen, Path]] = []
    deadline = time.monotonic() + 60 * args.minutes
    while (waiting or running) and time.monotonic() < deadline:
        while waiting and len(running) < args.jobs:
            name = waiting.pop(0)
            target = SCRATCH / f"optim-{file_name(name)}.json"
            case = {"contender": name, "device": args.device, "steps": args.steps, "micro": args.micro}
            running.append((name, start(__file__, case, target), target))
        time.sleep(0.1)
        for entry in [entry for entry in running if entry[1].poll() is not None]:
            running.remove(entry)
            name, process, target = entry
            died = {"contender": name, "status": f"exit status {process.returncode}", "environment": here}
            result = json.loads(target.read_text()) if target.is_file() else died
            fresh[name] = [{**case, "command": here["command"]} for case in by_set(result)]
            print(f"{name}: {', '.join(str(c.get('ms_per_1e9', c['status'])) for c in fresh[name])}", flush=True)
            known = stored | fresh
            order = [*OURS, *PEERS, *(other for other in known if other not in (*OURS, *PEERS))]
            cases = [case for name in order for case in known.get(name, [])]
            write_results(args.out, {"benchmark": "optim", "cases": cases})
    for _, process, _ in running:
        process.terminate()
    print(table([case for cases in fresh.values() for case in cases]))
    for name, cases in fresh.items():
        if cases[0]["status"] == NOT_INSTALLED:
            print(f"SKIPPED: {name}: {NOT_INSTALLED}")
    late = [name for name, _, _ in running] + waiting
    for name in late:
        print(f"NOT FINISHED: {name}: out of time")
    failed = [n for n, cases in fresh.items() if n in OURS and cases[0]["status"] != "ok"]
    return 1 if late or failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], help="contenders whose name contains one of these")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--jobs", type=int, default=3, help="processes: one measures, the others import and compile")
    parser.add_argument("--minutes", type=float, default=600, help="stop then; what has finished is stored")
    parser.add_argument("--micro", action="store_true", help="small tensors, to try the script")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="default: results/optim.json, a scratch file with --micro")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(json.loads(args.worker))
        return 0
    args.out = args.out or (SCRATCH if args.micro else RESULTS) / "optim.json"
    SCRATCH.mkdir(parents=True, exist_ok=True)
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
