# SPDX-License-Identifier: Apache-2.0
"""Models at unit scale through the Trainer, Accelerator and from_pretrained: fresh ones are brought to it, loaded ones
keep their function, runs resume bit for bit, and checkpoints are stock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny import llama, rows
from transformers import LlamaForCausalLM, Trainer
from transformers.trainer_utils import set_seed

from hf_lowprec import LowPrecConfig, LowPrecTrainingArguments
from hf_lowprec.conversion import ConversionError, high_precision, report_of, session_of


@pytest.fixture(autouse=True)
def _fresh_state() -> Any:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def arguments(tmp_path: Path, **changes: Any) -> LowPrecTrainingArguments:
    common = dict(
        output_dir=str(tmp_path / "out"), use_cpu=True, max_steps=4, per_device_train_batch_size=4, logging_steps=1,
        learning_rate=1e-3, warmup_steps=2, save_steps=2, report_to="none", disable_tqdm=True, lowprec="u-mup",
    )  # fmt: skip
    return LowPrecTrainingArguments(**{**common, **changes})


def train(args: LowPrecTrainingArguments, model: Any, resume: str | None = None) -> Trainer:
    set_seed(0)
    trainer = Trainer(args=args, model=model, train_dataset=rows())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_trainer_brings_a_fresh_model_to_unit_scale_and_resumes(tmp_path: Path, capfd: Any) -> None:
    first = train(arguments(tmp_path), llama())
    report = report_of(first.model)
    assert report is not None and "fresh weights brought to it" in str(report.transform)
    assert "unit scale: fresh weights brought to it" in capfd.readouterr().err
    assert {group["lr"] for group in first.optimizer.param_groups} == {0.0}  # the schedule's end, of the whole groups
    straight = [entry["loss"] for entry in first.state.log_history if "loss" in entry]

    second = train(arguments(tmp_path), llama(seed=1), resume=f"{tmp_path}/out/checkpoint-2")
    assert [entry["loss"] for entry in second.state.log_history if "loss" in entry] == straight
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    session = session_of(second.model)
    assert session is not None and session.transform is not None and session.transform.fresh


def test_what_the_trainer_saves_is_a_stock_model(tmp_path: Path) -> None:
    trainer = train(arguments(tmp_path, max_steps=1), llama())
    trainer.save_model(str(tmp_path / "model"))
    ids, model = rows(2)[0]["input_ids"][None], trainer.model.eval()
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), stock.parameters(), strict=True))
    with high_precision(model), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(input_ids=ids).logits, stock(input_ids=ids).logits.float())

    config = LowPrecConfig("u-mup")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config).eval()
    report = report_of(loaded)
    assert report is not None and "loaded weights as they are" in str(report.transform)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), stock.parameters(), strict=True))


def test_accelerator_prepares_in_any_order() -> None:
    losses = []
    for early in (False, True):
        AcceleratorState._reset_state(True)
        accelerator, model = Accelerator(mixed_precision="unit-scaling", cpu=True), llama()
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        if early:
            optimizer = accelerator.prepare(optimizer)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        found = []
        for batch in rows(3):
            loss = model(**{key: value[None] for key, value in batch.items()}).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            found.append(float(loss))
        losses.append(found)
    assert losses[0] == losses[1]


def test_an_optimizer_that_cannot_follow_is_refused_at_prepare() -> None:
    accelerator, model = Accelerator(mixed_precision="u-mup", cpu=True), llama()
    with pytest.raises(ValueError, match="SGD: the learning rates of a model at unit scale"):
        accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_model_that_is_no_decoder_is_refused_with_its_name() -> None:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    accelerator, model = Accelerator(mixed_precision="u-mup", cpu=True), BertForMaskedLM(config)
    with pytest.raises(ConversionError, match="such as Llama, Qwen, Mistral or GPT-2; BertForMaskedLM: "):
        accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
