# SPDX-License-Identifier: Apache-2.0
"""The recipe that docs/adding-a-recipe.md walks through: its file goes through every way in and does the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from tiny import ROOT, llama, rows
from typer.testing import CliRunner

import hf_lowprec
from hf_lowprec import cli
from hf_lowprec.conversion import recipe_of, report_of
from hf_lowprec.monitor import over_layers, slots
from hf_lowprec.recipe import Recipe

PAGE = (ROOT / "docs" / "adding-a-recipe.md").read_text(encoding="utf-8")
CONVERTED = 2 * 5  # q, k, v, gate, up: o_proj and down_proj are left alone


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "rowwise-sr.yaml"
    path.write_text(PAGE.split("```yaml\n", 1)[1].split("```", 1)[0])
    return str(path)


def said(*arguments: str) -> str:
    done = CliRunner().invoke(cli.app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.output


def test_explain_and_inspect(file: str, tmp_path: Path) -> None:
    words = said("explain", file)
    assert "per row" in words and "stochastic" in words and "dynamic8u" in words and "o_proj, down_proj" in words
    assert Recipe.from_dict(yaml.safe_load(said("explain", file, "--yaml"))) == Recipe.from_yaml(
        Path(file).read_text()
    )
    llama().config.save_pretrained(tmp_path)
    table = said("inspect", str(tmp_path), "--recipe", file)
    assert "named by modules_to_not_convert" in table and f"converted {CONVERTED} of 15 linears" in table


def check(model: torch.nn.Module, file: str) -> None:
    assert recipe_of(model) == Recipe.from_yaml(Path(file).read_text())
    report = report_of(model)
    assert report is not None and len(report.converted) == CONVERTED and "dynamic8" in report.optimizer


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    batch = rows(4)
    ids = torch.stack([row["input_ids"] for row in batch])
    return model(input_ids=ids, labels=ids).loss


def test_convert(file: str) -> None:
    model = llama()
    hf_lowprec.convert(model, file)
    optimizer = hf_lowprec.attach_optimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    check(model, file)
    before = float(loss_of(model))
    for _ in range(3):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss_of(model)) < before
    errors = over_layers(slots(model, lambda: loss_of(model)))
    # Near the formats' peaks; stochastic rounding has twice nearest's noise power.
    assert errors["fprop weight"]["sqnr"] == pytest.approx(31.5, abs=1)
    assert errors["dgrad grad_output"]["sqnr"] == pytest.approx(25.6 - 3, abs=1.5)


def test_accelerate(file: str) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    from hf_lowprec import _autoload

    _autoload.activate()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    try:
        accelerator = Accelerator(mixed_precision=file, cpu=True)
        model = llama()
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        check(accelerator.unwrap_model(model), file)
        accelerator.backward(loss_of(model))
        optimizer.step()
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


@pytest.mark.parametrize("way", ["argument", "callback"])
def test_trainer(file: str, way: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    common = {"max_steps": 2, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True,
              "save_strategy": "no", "learning_rate": 1e-3, "disable_tqdm": True}  # fmt: skip
    model, out = llama(), str(tmp_path / "out")
    if way == "argument":
        arguments = hf_lowprec.LowPrecTrainingArguments(out, lowprec=file, **common)
        trainer = Trainer(model, arguments, train_dataset=rows())
    else:
        callbacks = [hf_lowprec.LowPrecCallback(file)]
        trainer = Trainer(
            model, TrainingArguments(out, bf16=True, **common), train_dataset=rows(), callbacks=callbacks
        )
    trainer.train()
    check(trainer.accelerator.unwrap_model(trainer.model), file)


def test_from_pretrained(file: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    llama().save_pretrained(tmp_path / "model")
    config = hf_lowprec.LowPrecConfig(file)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config)
    assert recipe_of(model) == Recipe.from_yaml(Path(file).read_text())
