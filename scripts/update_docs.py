# SPDX-License-Identifier: Apache-2.0
"""Fill the tables between `<!-- begin NAME -->` and `<!-- end NAME -->` in the documentation: `make docs`.

Most tables follow from the package; `measured`, on the page of a recipe, from benchmarks/results/recipes*.json.
`--check` changes nothing and exits with status 1 if a page is out of date.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_lowprec.describe import format_table, markdown
from hf_lowprec.optim.table import state_table
from hf_lowprec.presets import _FAMILIES, PRESETS
from hf_lowprec.summary import recipe_table

ROOT = Path(__file__).resolve().parents[1]
RECIPE_PAGES = ROOT / "docs" / "recipes"
# The study on a GPU, and its stand-in on a CPU (benchmarks/recipe_study.py).
STUDIES = tuple(ROOT / "benchmarks" / "results" / name for name in ("recipes.json", "recipes_cpu.json"))
TIMES = ROOT / "benchmarks" / "results" / "recipe_times.json"


def pages() -> list[str]:
    own = sorted(path.relative_to(ROOT).as_posix() for path in RECIPE_PAGES.glob("*.md"))
    return ["README.md", "docs/recipes.md", "docs/numerics.md", "docs/optimizers.md", *own]


def page_table(_: str = "") -> str:
    """Links to the recipes' own pages, by family, in the order of PRESETS; then those that no preset has."""
    there = {path.stem: f"[{path.stem}](recipes/{path.name})" for path in sorted(RECIPE_PAGES.glob("*.md"))}
    rows = [("family", "pages")]
    for family in _FAMILIES:
        about = (family.__doc__ or "").strip().split("\n")[0].rstrip(".")
        names = [recipe.name for recipe in family.RECIPES if recipe.name in there and recipe.name in PRESETS]
        if names:
            rows.append((about, ", ".join(there.pop(name) for name in names)))
    if there:
        rows.append(("more", ", ".join(there.values())))
    return markdown(rows)


def measured(name: str) -> str:
    """Rows of a recipe's runs: what trained where, and how far from bf16 of the same seeds."""
    rows = [("model", "steps", "device", "loss gap to bf16", "time of a step, bf16's")]
    reasons = []
    for path in STUDIES:
        data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"cases": [], "summary": {}}
        cases = [case for case in data["cases"] if case["recipe"].partition("@")[0] == name]
        if not cases:
            continue
        case, summary = cases[0], data["summary"].get(cases[0]["recipe"], {})
        device = case["environment"]["gpu"] or "CPU, one thread (a stand-in)"
        if case["status"] == "failed":
            reasons.append(f"{device}: {case['reason']}")
            continue
        study = case["study"]
        text = "bytes" if study.get("bytes") else "tokens"
        model = f"Llama, {case['parameters'] / 1e6:.1f} M parameters, {study['batch']} x {study['seq']} {text}"
        time = _time(name) if case["environment"]["gpu"] else ""  # an emulation on a CPU says nothing of the recipe
        gap = "diverged" if case["status"] == "diverged" else _gap(summary)
        rows.append((model, str(study["steps"]), device, gap, time))
    if len(rows) == 1 and not reasons:
        return "Not measured yet.\n"
    table = markdown(rows) if len(rows) > 1 else ""
    return table + "".join(f"\nNot run on {reason}\n" for reason in reasons)


def _time(name: str) -> str:
    """A step without other runs beside it, and bf16's of the same call."""
    cases = json.loads(TIMES.read_text(encoding="utf-8"))["cases"] if TIMES.is_file() else []
    found = [c for c in cases if c["recipe"].partition("@")[0] == name and c["status"] == "ok" and "ratio" in c]
    return f"{found[0]['step_ms']:.0f} ms, {found[0]['baseline_ms']:.0f} ms" if found else ""


def _gap(summary: dict[str, Any]) -> str:
    if "mean_gap" not in summary:
        return ""
    count = len(summary["seeds"])
    error = f" ± {100 * summary['standard_error']:.2f} %" if "standard_error" in summary else ""
    return f"{100 * summary['mean_gap']:+.2f} %{error} ({count} seed{'s' * (count != 1)})"


TABLES: dict[str, Callable[[str], str]] = {
    "recipes": lambda page: recipe_table(),
    "formats": lambda page: format_table(),
    "states": lambda page: state_table(),
    "pages": page_table,
    "measured": measured,
}


def filled(text: str, page: str = "") -> str:
    """`text` with every table as it should be; `page`: its name without folder and suffix, as `fp8-lm`.

    Raises KeyError for a marker that names no table.
    """

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]](page)}{match[3]}"

    return re.sub(r"(<!-- begin (\w+)[^>]*-->)\n.*?(<!-- end \2 -->)", block, text, flags=re.DOTALL)


def main() -> int:
    texts = {page: (ROOT / page).read_text(encoding="utf-8") for page in pages()}
    fresh = {page: filled(text, Path(page).stem) for page, text in texts.items()}
    stale = [page for page in texts if texts[page] != fresh[page]]
    if "--check" in sys.argv[1:]:
        for page in stale:
            print(f"{page} is out of date: make docs")
        return bool(stale)
    for page in stale:
        (ROOT / page).write_text(fresh[page], encoding="utf-8")
        print(f"updated {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
