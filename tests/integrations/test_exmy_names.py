# SPDX-License-Identifier: Apache-2.0
"""`exmy:e3m1` and `mxfp4` wherever the name of a recipe is: the launcher, its yaml, a notebook, TrainingArguments, the
quantizer, a plain conversion, a command, a recipe file; and errors that say what a name may be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
from launching import LOOP, child_environment, launch, losses, parsed
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import hf_lowprec
from hf_lowprec import LowPrecConfig, LowPrecTrainingArguments
from hf_lowprec.cli import app
from hf_lowprec.conversion import recipe_of
from hf_lowprec.presets import get_recipe
from hf_lowprec.recipe import Recipe, RecipeError

hf_lowprec._autoload.activate()
NAMES = ["exmy:e3m1", "exmy:e4m3/row", "mxfp6-e2m3"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("HF_LOWPREC_", "ACCELERATE_")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_launcher(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("HF_LOWPREC_RECIPE", "")
        assert child_environment(parsed("--mixed_precision", name)) == ("bf16", name)
    config = tmp_path / "config.yaml"
    lines = ["compute_environment: LOCAL_MACHINE", "distributed_type: 'NO'", f"mixed_precision: {name}"]
    config.write_text("\n".join([*lines, "num_processes: 1"]))
    with monkeypatch.context() as patch:
        patch.setenv("HF_LOWPREC_RECIPE", "")
        assert child_environment(parsed("--config_file", str(config))) == ("bf16", name)


def test_the_launcher_of_a_bad_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--mixed_precision", "exmy:e0m0")
    assert "sign included, is 1; eXmY has 2 to 9 bits" in capsys.readouterr().err


def test_a_launched_script(tmp_path: Path) -> None:
    command = ("-m", "accelerate.commands.launch", "--cpu", "--mixed_precision", "exmy:e4m3/row")
    done = launch(tmp_path, *command, str(LOOP), "--steps", "12")
    assert done.returncode == 0, done.stdout
    assert "Mixed precision type: bf16 (hf_lowprec recipe: exmy:e4m3/row)" in done.stdout
    assert "recipe exmy:e4m3/row: converted 14 of 15 linears" in done.stdout and "emulated GEMMs" in done.stdout
    assert losses(done.stdout)[-1] < losses(done.stdout)[0] - 0.5


@pytest.mark.parametrize("name", NAMES)
def test_arguments_and_quantizer(name: str, tmp_path: Path) -> None:
    from core import llama

    args = LowPrecTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, lowprec=name)
    assert args.lowprec == name and args.bf16
    llama().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=LowPrecConfig(name))
    assert recipe_of(model) == get_recipe(name)
    ids = torch.arange(3, 19)[None]
    model(ids, labels=ids).loss.backward()


def test_explain_and_files(tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["explain", "exmy:e2m1/row"])
    assert run.exit_code == 0 and "per row" in run.output and "E8M0" in run.output and "nowhere yet" in run.output
    text = run.output[run.output.index("name: exmy:e2m1/row") :]
    assert Recipe.from_yaml(text) == get_recipe("exmy:e2m1/row")
    # Any role by itself: E3M1 weights, the rest E4M3, all by rows.
    data = get_recipe("exmy:e4m3/row").to_dict()
    for gemm in ("fprop", "dgrad"):
        data[gemm]["weight"]["format"] = "e3m1"
    path = tmp_path / "mine.yaml"
    path.write_text(Recipe.from_dict({**data, "name": "mine"}).to_yaml())
    assert [get_recipe(path).fprop.weight.format, get_recipe(path).fprop.input.format] == ["e3m1", "e4m3none"]


def test_spellings() -> None:
    recipe = get_recipe("exmy:e3m1")
    assert get_recipe("EXMY:E3M1") == get_recipe("exmy:e3m1/tensor") == recipe and recipe.name == "exmy:e3m1"
    assert get_recipe(recipe.name) == get_recipe(recipe.to_dict()) == recipe
    assert get_recipe("exmy:e3m1/row").name == "exmy:e3m1/row" != recipe.name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("exmy:e0m0", "sign included, is 1; eXmY has 2 to 9 bits"),
        ("exmy:e5m10", "sign included, is 16; eXmY has 2 to 9 bits"),
        ("exmy:e8m0", "8 exponent bits span more than float32"),
        ("exmy:e3m1/block", "one exponent per /tensor or per /row, got '/block'"),
        ("exmy:e3", "an eXmY recipe is exmy:e<X>m<Y>"),
        ("exmy:", "an eXmY recipe is exmy:e<X>m<Y>"),
        ("exmy:e3m1/row/row", "an eXmY recipe is exmy:e<X>m<Y>"),
        ("exmy", "unknown recipe 'exmy'; .*exmy:e<X>m<Y>"),
    ],
)
def test_bad_names(name: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        get_recipe(name)
