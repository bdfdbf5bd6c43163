# SPDX-License-Identifier: Apache-2.0
"""Every preset has its page in docs/recipes, in one form, and the page says what the data says."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_lowprec import describe
from hf_lowprec.presets import PRESETS, get_recipe
from hf_lowprec.recipe import Recipe

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "recipes"
SECTIONS = ["What it computes", "In the paper", "Measured here", "When to use it", "In your script"]
OUTPUTS = {"fprop": "output", "dgrad": "grad_input", "wgrad": "grad_weight"}
# How a format may be called beside its own name.
CALLED = {
    "e0m7": ("int8", "8-bit", "8 bits", "127"), "e0m1": ("ternary",), "sign": ("1-bit",), "e4m3fn": ("e4m3",),
    "e4m3b11": ("e4m3",), "e4m3b11fnuz": ("e4m3",), "e4m3b8": ("e4m3",), "e4m3none": ("e4m3",),
    "e5m10": ("fp16", "float16"), "e8m7": ("bf16", "bfloat16"),
}  # fmt: skip


def page(name: str) -> str:
    path = PAGES / f"{name}.md"
    assert path.is_file(), f"docs/recipes/{name}.md is missing: every preset has its page"
    return path.read_text(encoding="utf-8")


def sections(text: str) -> dict[str, str]:
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def block(text: str) -> str:
    match = re.search(r"```\w*\n(.*?)```", text, re.DOTALL)
    assert match, "no code block with the equations"
    return match[1]


@pytest.mark.parametrize("name", PRESETS)
def test_the_form(name: str) -> None:
    text = page(name)
    assert text.startswith(f"# `{name}`\n\n")
    found = sections(text)
    assert list(found) == SECTIONS
    assert all(body.strip() for body in found.values())
    assert "<!-- begin measured" in found["Measured here"] and "<!-- end measured -->" in found["Measured here"]
    assert name in found["In your script"]
    intro = text.split("## ", 1)[0]
    for paper in re.findall(r"arXiv (\d{4}\.\d{5})", PRESETS[name].paper):
        assert paper in intro, "the page names the paper of the data"


@pytest.mark.parametrize("name", [name for name, recipe in PRESETS.items() if recipe.quantises_gemms])
def test_the_equations_name_the_formats_of_the_data(name: str) -> None:
    wrong = disagreements(page(name), PRESETS[name])
    assert not wrong, "\n".join(wrong)


def disagreements(text: str, recipe: Recipe) -> list[str]:
    """Where a page says something else than the recipe.

    Every format of a slot is named before the paper's results; a line of the code block that says what a GEMM gives
    names, of formats in the e<exp>m<man> spelling, none but those of its two slots and its sums.
    """
    wrong = []
    equations, before = block(sections(text)["What it computes"]).lower(), text.split("## In the paper")[0].lower()
    for gemm, output in OUTPUTS.items():
        policy = getattr(recipe, gemm)
        slots = [getattr(policy, slot) for slot in describe.GEMMS[gemm][1]]
        formats = [quant.format for quant in slots if quant is not None]
        for fmt in formats:
            if not any(word in before for word in (fmt, *CALLED.get(fmt, ()))):
                wrong.append(f"{gemm}: {fmt} is nowhere on the page")
        sums = [fmt for fmt in (policy.accumulation.format, policy.accumulation.outer) if fmt is not None]
        sums.append("e8m0")  # the format of block scales
        allowed = {spelling for fmt in (*formats, *sums) for spelling in (fmt, *CALLED.get(fmt, ()))}
        allowed |= {quant.scaling.store for quant in slots if quant is not None}  # of the scales
        for line in equations.splitlines():
            if not re.match(rf"\s*(?:{gemm}:?\s+)?{output}\s*=", line):
                continue
            named = re.findall(r"\be\d+m\d+(?:b\d+)?(?:fnuz|fn|ieee|none)?(?:flush|normal0)?u?", line)
            wrong += [f"{gemm}: the line says {word}" for word in named if word not in allowed]
    return wrong


def test_a_page_that_lies_is_found() -> None:
    recipe, right = PRESETS["te-current"], page("te-current")
    assert not disagreements(right, recipe)
    assert "wgrad: the line says e3m4" in disagreements(right.replace("e5m2(grad_output).T", "e3m4(g).T"), recipe)
    assert "dgrad: e5m2 is nowhere on the page" in disagreements(right.replace("e5m2", "e4m3fn"), recipe)


def test_no_page_without_a_name() -> None:
    for path in PAGES.glob("*.md"):
        if not path.stem.startswith("exmy"):
            assert get_recipe(path.stem).name == path.stem


def test_the_index_links_every_page() -> None:
    docs = load_update_docs()
    table = docs.page_table()
    assert all(f"(recipes/{path.name})" in table for path in PAGES.glob("*.md"))
    assert "<!-- begin pages" in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert "(adding-a-recipe.md)" in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [*PAGES.glob("*.md"), ROOT / "docs" / "adding-a-recipe.md"], ids=lambda p: p.stem)
def test_links_and_files_that_pages_name_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (path.parent / target).exists() or "/img/" in target, target
    for script in re.findall(r"benchmarks/\w+\.py", text):
        assert (ROOT / script).is_file(), script


# --- the measured block ---------------------------------------------------------------------------------------------


def load_update_docs() -> Any:
    spec = importlib.util.spec_from_file_location("update_docs", ROOT / "scripts" / "update_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["update_docs"] = module
    spec.loader.exec_module(module)
    return module


def case(recipe: str, **changes: Any) -> dict[str, Any]:
    return {
        "recipe": recipe, "status": "ok", "parameters": 23_000_000, "step_ms": 50.0,
        "study": {"steps": 500, "batch": 16, "seq": 512, "bytes": False}, "environment": {"gpu": "H100"}, **changes,
    }  # fmt: skip


def test_the_measured_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = load_update_docs()
    gpu, cpu = tmp_path / "recipes.json", tmp_path / "recipes_cpu.json"
    monkeypatch.setattr(docs, "STUDIES", (gpu, cpu))
    monkeypatch.setattr(docs, "TIMES", tmp_path / "recipe_times.json")
    assert docs.measured("fp8-lm") == "Not measured yet.\n"
    times = [{"recipe": "bf16", "status": "ok", "step_ms": 70.0, "baseline_ms": 70.0, "ratio": 1.0},
             {"recipe": "fp8-lm", "status": "ok", "step_ms": 48.2, "baseline_ms": 70.0, "ratio": 0.689}]  # fmt: skip
    docs.TIMES.write_text(json.dumps({"cases": times}))
    row = {"mean_gap": 0.00123, "seeds": [1, 2, 3], "standard_error": 0.0004}
    cases = [case("bf16"), case("fp8-lm"), case("sr-mac", status="failed", reason="no kernel"), case("bf16-sr@bf16")]
    summary = {"fp8-lm": row, "bf16-sr@bf16": {"mean_gap": -0.01, "seeds": [1]}}
    gpu.write_text(json.dumps({"cases": cases, "summary": summary}))
    study = {"steps": 300, "batch": 8, "seq": 64, "bytes": True}
    small = case("fp8-lm", status="diverged", parameters=900_000, study=study, environment={"gpu": None})
    cpu.write_text(json.dumps({"cases": [small], "summary": {}}))
    table = docs.measured("fp8-lm")
    assert "23.0 M parameters, 16 x 512 tokens | 500 | H100 | +0.12 % ± 0.04 % (3 seeds) | 48 ms, 70 ms |" in table
    assert "0.9 M parameters, 8 x 64 bytes | 300 | CPU, one thread (a stand-in) | diverged |" in table
    assert docs.measured("sr-mac") == "\nNot run on H100: no kernel\n"
    assert "-1.00 % (1 seed)" in docs.measured("bf16-sr"), "whatever dtype its weights were loaded in"
    text = "<!-- begin measured (make docs) -->\nold\n<!-- end measured -->\n"
    assert docs.filled(text, "te-current") == text.replace("old\n", "Not measured yet.\n")
