# SPDX-License-Identifier: Apache-2.0
"""The demo: one training script, two precisions, two seeds, one table.

    python recipes/demo/run.py                        # Python's own sources, minutes on two CPU cores
    python recipes/demo/run.py --text some/folder     # or your text, or a hub dataset

Trains a small Llama from scratch with recipes/pretrain/run.py, which knows nothing of low precision: for each seed
once under `accelerate launch --mixed_precision bf16` and once under `--mixed_precision fp8-lm`, with the same data in
the same order from the same start. Then draws loss.png, prints the table and lets plain transformers reload the result
and write a line.

Arguments that this script does not know go to the training script: `--steps 400 --hidden_size 256`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent / "pretrain" / "run.py"
BASELINE, LOW = "bf16", "fp8-lm"
COLORS = {BASELINE: "#7f7f7f", LOW: "#c1440e"}
console = Console()


@dataclass(frozen=True)
class Run:
    """What one training run left behind."""

    precision: str
    seed: int
    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if key in row]
        return [row["step"] for row in rows], [row[key] for row in rows]


def say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def has_fp8_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


def clean_environment(**more: str) -> dict[str, str]:
    """This environment without a recipe that the user may have exported: it would turn bf16 into something else."""
    return {key: value for key, value in os.environ.items() if not key.startswith("HF_LOWPREC_")} | more


def train(precision: str, seed: int, folder: Path, arguments: list[str], gpu: bool) -> Run:
    settings = HERE.parent / "pretrain" / ("llama-500m.yaml" if gpu else "llama-1m.yaml")
    script = [os.path.relpath(SCRIPT), os.path.relpath(settings), "--output_dir", str(folder), "--seed", str(seed)]
    script += ["--save_every", "0", *(["--steps", "240", "--eval_every", "40"] if gpu else []), *arguments]
    say(f"\n[bold]accelerate launch --mixed_precision {precision}[/] {' '.join(script)}")
    # `accelerate launch` of this very Python; the other options only say what it would guess anyway, with a warning
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    threads = os.environ.get("OMP_NUM_THREADS") or str(min(os.cpu_count() or 1, 8))
    launch += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", threads]
    launch += [] if gpu else ["--cpu"]
    finished = subprocess.run([*launch, "--mixed_precision", precision, *script], env=clean_environment())
    if finished.returncode:
        raise SystemExit(f"the run under {precision} failed; its message is above")
    return Run(precision, seed, folder)


def seeds_of(runs: list[Run]) -> list[int]:
    return list(dict.fromkeys(run.seed for run in runs))


def relative_gaps(runs: list[Run]) -> list[float]:
    """For each seed, how far fp8-lm's last validation loss lies above bf16's, as a fraction."""
    losses = {(run.precision, run.seed): run.summary["eval_loss"] for run in runs}
    return [losses[LOW, seed] / losses[BASELINE, seed] - 1 for seed in seeds_of(runs)]


def seed_spread(runs: list[Run]) -> float:
    """(largest - smallest) / mean of bf16's last validation losses over the seeds."""
    losses = [run.summary["eval_loss"] for run in runs if run.precision == BASELINE]
    return (max(losses) - min(losses)) / fmean(losses)


def make_table(runs: list[Run]) -> Table:
    table = Table(title=f"Llama, {runs[0].summary['parameters'] / 1e6:.1f} M parameters, from scratch")
    table.add_column("precision")
    for seed in seeds_of(runs):
        table.add_column(f"val. loss\nseed {seed}", justify="right")
    table.add_column("bytes per parameter:\nweights, grads, states", justify="right")
    table.add_column("tokens/s", justify="right")
    for precision in (BASELINE, LOW):
        summaries = [run.summary for run in runs if run.precision == precision]
        parts = summaries[0]["bytes_per_parameter"]
        table.add_row(
            precision,
            *(f"{summary['eval_loss']:.4f}" for summary in summaries),
            f"{' + '.join(f'{part:.2f}' for part in parts.values())} = {sum(parts.values()):.2f}",
            f"{fmean(summary['tokens_per_second'] for summary in summaries):,.0f}",
        )
    return table


def verdict(runs: list[Run], gpu: bool) -> str:
    """The gap beside the seed spread, and what the numbers do not say."""
    gaps = relative_gaps(runs)
    each = ", ".join(f"{gap:+.2%}" for gap in gaps)
    lines = [f"gap to {BASELINE}, same seed and data: {each}; mean {fmean(gaps):+.2%}"]
    if len(gaps) > 1:
        spread = seed_spread(runs)
        place = "inside" if abs(fmean(gaps)) <= spread else "OUTSIDE"
        lines.append(f"seed spread of {BASELINE}: {spread:.2%}; the mean gap lies {place} it")
        lines.append(f"{len(gaps)} seeds and a short run: a smoke test with numbers, no proof")
    if not gpu:
        lines.append("no FP8 tensor cores here: the CPU emulates FP8 value for value, hence slower than bf16;")
        lines.append("loss and bytes per parameter are real, tokens/s say nothing about a GPU")
    return "\n".join(lines)


def plot(runs: list[Run], path: Path) -> None:
    figure, (top, bottom) = plt.subplots(2, sharex=True, height_ratios=(3, 1), figsize=(7, 5.5), layout="constrained")
    for run in runs:
        color = COLORS[run.precision]
        label = run.precision if run.seed == runs[0].seed else None
        top.plot(*run.curve("loss"), color=color, alpha=0.35, linewidth=0.8)
        top.plot(*run.curve("eval_loss"), color=color, marker="o", markersize=3, label=label)
    top.set_ylabel("loss (thin: training)")
    top.legend(title="validation", frameon=False)
    for seed in seeds_of(runs):
        curves = {run.precision: run.curve("eval_loss") for run in runs if run.seed == seed}
        (steps, base), (_, low) = curves[BASELINE], curves[LOW]
        gaps = [100 * (other / loss - 1) for other, loss in zip(low, base, strict=True)]
        bottom.plot(steps, gaps, color=COLORS[LOW], marker="o", markersize=3)
    spread = 100 * seed_spread(runs)
    bottom.axhspan(-spread, spread, color=COLORS[BASELINE], alpha=0.2, linewidth=0)
    bottom.axhline(0, color=COLORS[BASELINE], linewidth=0.8)
    bottom.set_ylabel(f"gap, %\n(band: seed spread\nof {BASELINE})")
    bottom.set_xlabel("step")
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def generate(folder: Path, prompt: str) -> None:
    """In a fresh process without any plugin: the checkpoint is an ordinary one."""
    command = [sys.executable, str(HERE / "generate.py"), str(folder), prompt]
    subprocess.run(command, env=clean_environment(HF_LOWPREC_AUTOLOAD="0"), check=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="python", help="folder of .txt .md .rst .py files, a file or a hub dataset")
    parser.add_argument("--dataset", dest="text", help="the same as --text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=Path("demo"))
    parser.add_argument("--prompt", help="the beginning of the generated line")
    arguments, rest = parser.parse_known_args(argv)

    started, gpu, runs = time.perf_counter(), has_fp8_gpu(), []
    for seed in dict.fromkeys(arguments.seeds):
        for precision in (BASELINE, LOW):
            tokenizer = ["--tokenizer", str(runs[0].folder)] if runs else []  # trained once, the same for all
            folder = arguments.output / f"{precision}-seed{seed}"
            runs.append(train(precision, seed, folder, ["--text", arguments.text, *tokenizer, *rest], gpu))

    plot(runs, arguments.output / "loss.png")
    say("")
    console.print(make_table(runs))
    say(verdict(runs, gpu))
    say(f"\nreloaded {runs[-1].folder} with plain transformers:")
    generate(runs[-1].folder, arguments.prompt or ("def" if arguments.text == "python" else "The"))
    minutes, seconds = divmod(round(time.perf_counter() - started), 60)
    say(f"\ncurves: {arguments.output / 'loss.png'}; {minutes} min {seconds} s in all")


if __name__ == "__main__":
    main()
