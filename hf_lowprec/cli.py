# SPDX-License-Identifier: Apache-2.0
"""`hf-lowprec`: which recipes there are, what one means, what it does to a model, what this machine can run.

Commands only gather and print: words come from `describe`, facts about the machine from `doctor`, the report of a
model from `convert` itself. Libraries that take seconds to import are imported by the command that needs them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from hf_lowprec import describe, summary
from hf_lowprec.presets import ALIASES, PRESETS, get_recipe
from hf_lowprec.recipe import Recipe, RecipeError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hf_lowprec.report import ConversionReport

app = typer.Typer(
    help="Train any Hugging Face script in low precision.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a training script that fails under `run` shows its own traceback
)


def main() -> None:
    app()


def _console() -> Console:
    """Wide enough for the tables when nobody is looking (a pipe, a log)."""
    return Console(width=None if sys.stdout.isatty() else 150, highlight=False)


def _fail(message: object) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def _recipe(name: str) -> Recipe:
    try:
        return get_recipe(name)
    except RecipeError as error:
        _fail(error)


def _table(*columns: str, **options: Any) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", **options)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


# --- recipes and explain --------------------------------------------------------------------------------------------


@app.command()
def recipes(
    markdown: Annotated[bool, typer.Option("--markdown", help="The table of the documentation.")] = False,
) -> None:
    """List every recipe: how it runs on this machine, and what it is."""
    if markdown:
        typer.echo(summary.recipe_table(), nl=False)
        return
    from hf_lowprec.doctor import runs_here

    table, reasons = _table("recipe", "here", "what it is"), dict[tuple[str, str], list[str]]()
    for name, recipe in PRESETS.items():
        word, why = runs_here(recipe)
        reasons.setdefault((word, re.sub(r"^recipe '[^']*' ", "", why)), []).append(name)
        table.add_row(name, word, summary.one_line(recipe))
    for alias, name in ALIASES.items():
        table.add_row(alias, "", f"another name of {name}")
    word, why = runs_here(get_recipe("exmy:e3m1"))
    table.add_row("exmy:e<X>m<Y>", word, summary.EXMY_WORDS)
    console = _console()
    console.print(table)
    console.print()
    heads = [word for word, _ in reasons]
    for (word, why), names in reasons.items():
        which = f" ({', '.join(names)})" if heads.count(word) > 1 else ""
        console.print(f"[bold]{word}[/]{which}: {why}")


@app.command()
def explain(
    name: Annotated[str, typer.Argument(help="A recipe's name, a .yaml or .json file, or optimizer states (8bit).")],
    yaml: Annotated[bool, typer.Option("--yaml", help="Only the recipe as a file to start your own from.")] = False,
) -> None:
    """Say what a recipe computes in which precision, and print it as a file to start your own from."""
    console = _console()
    try:
        recipe = get_recipe(name)
    except RecipeError as error:
        if yaml or not _explain_states(name, console):
            _fail(error)
        return
    if yaml:
        typer.echo(recipe.to_yaml(), nl=False)
        return
    console.print(f"[bold]{recipe.name}[/]: {summary.one_line(recipe)}")
    if recipe.paper:
        console.print(recipe.paper)
    if PRESETS.get(recipe.name) == recipe:
        console.print(f"docs/recipes/{recipe.name}.md")
    for gemm, (equation, _) in describe.GEMMS.items():
        console.print(f"\n[bold]{gemm}[/]  {equation}")
        table = _table("operand", "format", "scaling", "rounding", "beyond the largest")
        for slot, *cells in describe.slot_rows(recipe):
            if slot.startswith(gemm):
                table.add_row(slot.removeprefix(gemm).strip(), *cells)
        console.print(table)
    console.print()
    table = _table("policy", "", show_header=False)
    for row in describe.policy_rows(recipe):
        table.add_row(*row)
    console.print(table)
    needs = describe.needs(recipe)
    console.print(f"\nnative on: {needs}" + ("" if needs == "any" else "; emulated elsewhere"))
    # What YAML would read back must not pass through markup or wrapping.
    typer.echo(f"\n# as a file (hf-lowprec run --recipe my.yaml train.py)\n{recipe.to_yaml()}", nl=False)


def _explain_states(name: str, console: Console) -> bool:
    """Optimizer states that are no recipe's; False if there are none of that name."""
    from hf_lowprec.optim.table import bytes_words, named

    states = named().get(name)
    if states is None:
        return False
    console.print(f"[bold]{name}[/]: states of hf_lowprec.optim's optimizers, states={name!r}; docs/optimizers.md")
    table = _table("kept", "", show_header=False)
    for row in [*describe.state_rows(states), ("bytes per parameter", f"Adam's, {bytes_words(states)}")]:
        table.add_row(*row)
    console.print(table)
    return True


# --- inspect --------------------------------------------------------------------------------------------------------


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A folder, a hub name or a config.json.")],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A recipe's name or file.")] = "fp8-lm",
    every: Annotated[bool, typer.Option("--all", help="One line per layer instead of one per kind.")] = False,
) -> None:
    """Show what a recipe does to each layer of a model. Reads the config only; no weights are loaded."""
    chosen = _recipe(recipe)
    network = _build(model)
    import torch

    from hf_lowprec.conversion import convert
    from hf_lowprec.stepping import attach_optimizer

    try:
        report = convert(network, chosen)
        attach_optimizer(network, torch.optim.AdamW(network.parameters()))
    except ValueError as error:
        _fail(error)
    console = _console()
    console.print(_layers(network, report, every))
    console.print()
    _print_shapes(console, network, report)
    for line in str(report).splitlines():
        console.print(line, markup=False, soft_wrap=True)


def _transformers(command: str) -> Any:
    try:
        import transformers
    except ImportError:
        _fail(f"{command} needs transformers: pip install 'hf-lowprec[transformers]'")
    return transformers


def _build(name: str) -> nn.Module:
    """The model of a config, on the meta device."""
    transformers = _transformers("inspect")
    import torch

    path = Path(name)
    if path.suffix == ".json" and not path.is_file():
        _fail(f"there is no file {name}")
    try:
        config = transformers.AutoConfig.from_pretrained(path.parent if path.name == "config.json" else name)
        architecture = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
        with torch.device("meta"):
            if architecture is not None:
                built: nn.Module = architecture(config)
            else:
                built = transformers.AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        _fail(f"no model can be built from {name!r}: {error}")
    dtype = getattr(config, "dtype", None)
    return built.to(dtype) if isinstance(dtype, torch.dtype) else built


def _kind(name: str) -> str:
    """A module's name without the numbers of layers."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _layers(model: nn.Module, report: ConversionReport, every: bool) -> Table:
    """One row per kind of linear: the numbers in its name, its shape and its fate folded together."""
    rows: dict[tuple[str, str, str], list[Tensor]] = {}
    weights = {name: module.weight for name, module in model.named_modules() if hasattr(module, "weight")}
    for name in sorted([*report.converted, *report.skipped], key=list(weights).index):
        sizes = tuple(weights[name].shape)
        fate = "converted" if name not in report.skipped else f"left alone: {report.skipped[name]}"
        if fate == "converted" and report.emulated and any(size % 16 for size in sizes):
            fate = "converted here; left alone on a GPU, whose FP8 GEMMs take multiples of 16"
        kind = name if every else _kind(name)
        rows.setdefault((kind, " x ".join(map(str, sizes)), fate), []).append(weights[name])
    table = _table("linear", "count", "weight", "parameters", "bytes", "what happens")
    for column in table.columns[1:5]:
        column.justify = "right"
    for (kind, shape, fate), group in rows.items():
        size = sum(weight.numel() * weight.element_size() for weight in group)
        table.add_row(kind, str(len(group)), shape, f"{sum(w.numel() for w in group):,}", f"{size:,}", fate)
    return table


# --- export ---------------------------------------------------------------------------------------------------------


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A folder or a hub name.")],
    folder: Annotated[Path, typer.Argument(help="Where to write; made if it is not there.")],
    weights: Annotated[str, typer.Option("--format", help="exmy:e3m1 (an exponent per weight), exmy:e3m1/row.")],
) -> None:
    """Write a model's weights in fewer bits, with its config and tokenizer; hf_lowprec.load_exported reads them."""
    from hf_lowprec.checkpoint import ExportError, export_pretrained

    transformers = _transformers("export")
    try:
        config = transformers.AutoConfig.from_pretrained(model)
        architecture = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
        network = (architecture or transformers.AutoModelForCausalLM).from_pretrained(model, dtype="auto")
    except (OSError, ValueError) as error:
        _fail(f"no model can be loaded from {model!r}: {error}")
    try:
        report = export_pretrained(network, folder, format=weights)
    except (ExportError, ImportError) as error:
        _fail(error)
    try:
        transformers.AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    except (OSError, ValueError, KeyError):
        typer.echo(f"no tokenizer found in {model!r}")
    typer.echo(str(report))


def _print_shapes(console: Console, model: nn.Module, report: ConversionReport) -> None:
    """Sizes that miss the tensor cores' multiples, the vocabulary among them."""
    from torch import nn

    from hf_lowprec.shapes import NEEDED, PREFERRED, Gemm, advise

    high = 32 if report.recipe.base == "no" else 16
    low = describe.operand_bits(report.recipe) or high
    modules, gemms = dict(model.named_modules()), []
    for name in (*report.converted, *report.skipped):
        rows, columns = modules[name].weight.shape  # type: ignore[misc, union-attr]
        ins, outs = (columns, rows) if isinstance(modules[name], nn.Linear) else (rows, columns)
        gemms.append(Gemm(_kind(name), int(ins), int(outs), high if name in report.skipped else low))
    found = advise(gemms)
    bits = sorted({gemm.bits for gemm in gemms})
    wanted = "; ".join(f"{b}-bit operands: {NEEDED[b]}, better {PREFERRED[b]}" for b in bits)
    if not found:
        console.print(f"shapes: all in and out features are multiples of what tensor cores like ({wanted})\n")
        return
    console.print(f"[bold]shapes[/]  multiples for {wanted}")
    table = _table("size", "bits", "of", "advice")
    for advice in found:
        where = ", ".join(advice.where[:3]) + (f" and {len(advice.where) - 3} more" if len(advice.where) > 3 else "")
        table.add_row(str(advice.size), str(advice.bits), where, str(advice), style=None if advice.serious else "dim")
    console.print(table)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    padded = [advice.padded for advice in found if advice.size == vocabulary and advice.padded]
    if padded:
        console.print(f"the vocabulary: model.resize_token_embeddings({padded[0]}) pads it, before the first step")
    console.print("tokens of a micro-batch (batch x sequence) are the third size: keep them a multiple of 64\n")


# --- doctor and run -------------------------------------------------------------------------------------------------


@app.command()
def doctor() -> None:
    """Check this machine and environment; exit status 1 if something is wrong."""
    from hf_lowprec.doctor import diagnose

    facts, console = diagnose(), _console()
    table = _table("fact", "", show_header=False)
    for fact in facts:
        table.add_row(fact.name, fact.value)
    console.print(table)
    problems = [fact.problem for fact in facts if fact.problem]
    for problem in problems:
        console.print(f"problem: {problem}", markup=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)
    console.print("no problems found")


@app.command(
    add_help_option=False,  # the arguments belong to hf_lowprec.run, and after the script's name to the script
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)
def run(context: typer.Context) -> None:
    """Run a training script by a recipe: run --recipe NAME_OR_FILE [-m] SCRIPT [ARGUMENTS]."""
    from hf_lowprec.run import main as run_script

    run_script(context.args)


if __name__ == "__main__":
    main()
