# SPDX-License-Identifier: Apache-2.0
"""fuse, attention, liger and graphs on their way from arguments, LowPrecConfig and the environment to the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import llama, rows
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer

import hf_lowprec
from hf_lowprec.conversion import report_of
from hf_lowprec.graphs import GraphError
from hf_lowprec.integrations import switches
from hf_lowprec.integrations.quantizer import LowPrecConfig
from hf_lowprec.integrations.switches import Switches
from hf_lowprec.integrations.trainer import LowPrecTrainingArguments


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch):
    for name in ("HF_LOWPREC_RECIPE", "ACCELERATE_MIXED_PRECISION", "HF_LOWPREC_FUSE", "HF_LOWPREC_LIGER",
                 "HF_LOWPREC_ATTENTION", "HF_LOWPREC_GRAPHS"):  # fmt: skip
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `settle` was told, in order."""
    from hf_lowprec.integrations import accelerate_prepare, quantizer

    calls: list[tuple[Any, ...]] = []

    def record(model: Any, said: Switches, device: torch.device, engine: str = "NO") -> None:
        calls.append((tuple(said), device.type, engine))

    monkeypatch.setattr(accelerate_prepare, "settle", record)
    monkeypatch.setattr(quantizer, "settle", record)
    return calls


def train(tmp_path: Path, model: Any = None, **kwargs: Any) -> Trainer:
    arguments = LowPrecTrainingArguments(tmp_path, max_steps=1, report_to=[], use_cpu=True, save_strategy="no",
                                         **{"lowprec": "te-current", **kwargs})  # fmt: skip
    trainer = Trainer(model or llama(), arguments, train_dataset=rows(8))
    trainer.train()
    return trainer


@pytest.mark.parametrize(("argument", "environment", "fused"), [
    (None, None, True), (False, None, False), (None, "0", False), (True, "0", True), (False, "1", False),
])  # fmt: skip
def test_fuse(
    argument: bool | None, environment: str | None, fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if environment is not None:
        monkeypatch.setenv("HF_LOWPREC_FUSE", environment)
    report = report_of(train(tmp_path, lowprec_fuse=argument).model)
    assert report is not None and bool(report.norms) == bool(report.mlps) == bool(report.shared) == fused


def test_arguments_win_over_the_config_at_load(tmp_path: Path, settled: list[tuple[Any, ...]]) -> None:
    llama().save_pretrained(tmp_path / "model")
    config = LowPrecConfig("te-current", fuse=False, attention=False, liger=True, graphs=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config)
    assert not report_of(model).norms
    assert settled == [((False, False, True, True), "cpu", "NO")]
    train(tmp_path, model, lowprec_liger=False, lowprec_graphs=False)
    assert settled[1] == ((False, False, False, False), "cpu", "NO")
    assert LowPrecConfig.from_dict(config.to_dict()) == config
    assert LowPrecConfig.from_dict(config.to_dict()) != LowPrecConfig("te-current")


def test_the_command_line(tmp_path: Path) -> None:
    parser = HfArgumentParser(LowPrecTrainingArguments)
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--lowprec", "te-current", "--lowprec_liger", "true",
             "--lowprec_fuse", "False"]  # fmt: skip
    (arguments,) = parser.parse_args_into_dataclasses(words)
    assert (arguments.lowprec_liger, arguments.lowprec_fuse, arguments.lowprec_attention) == (True, False, None)


def test_a_reference_model_is_fused_like_its_policy(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tiny import tokenizer

    from hf_lowprec.integrations.trl import LowPrecDPOConfig

    data = datasets.Dataset.from_dict({"prompt": ["a b"] * 4, "chosen": ["c d"] * 4, "rejected": ["e f"] * 4})
    for fused in (True, False):
        AcceleratorState._reset_state(True)
        arguments = LowPrecDPOConfig(tmp_path, lowprec="te-current", lowprec_fuse=fused, max_steps=1, report_to=[],
                                     use_cpu=True, per_device_train_batch_size=2, logging_steps=1, save_strategy="no",
                                     max_length=32)  # fmt: skip
        trainer = trl.DPOTrainer(llama(), llama(), args=arguments, train_dataset=data, processing_class=tokenizer())
        trainer.train()
        reports = [report_of(model) for model in (trainer.model, trainer.ref_model)]
        assert [bool(report.norms) for report in reports] == [fused, fused]
        assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_nothing_happens_to_a_model_without_a_recipe() -> None:
    model = llama()
    switches.settle(model, Switches(liger=True), torch.device("cpu"))
    assert type(model.lm_head) is torch.nn.Linear


def test_a_missing_liger_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_lowprec.integrations import loss

    monkeypatch.setattr(loss, "installed", lambda: False)
    model = llama()
    hf_lowprec.convert(model, "te-current")
    with pytest.raises(ImportError, match=r"hf-lowprec\[gpu\]"):
        switches.settle(model, Switches(liger=True), torch.device("cpu"))


def test_the_fused_loss_stays_off_where_weights_are_sharded() -> None:
    model = llama()
    report = hf_lowprec.convert(model, "te-current")
    switches.settle(model, Switches(liger=True), torch.device("cpu"), engine="FSDP")
    assert report.loss == "stock (HF_LOWPREC_LIGER has no effect under FSDP)" and report.loss in report.summary()
    assert type(model.lm_head) is torch.nn.Linear


def test_graphs_without_a_cuda_device_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GraphError, match="need a CUDA device"):
        train(tmp_path, lowprec_graphs=True)
    monkeypatch.setenv("HF_LOWPREC_GRAPHS", "1")
    model = llama()
    hf_lowprec.convert(model, "te-current")
    with pytest.raises(GraphError, match="need a CUDA device"):
        switches.settle(model, Switches(), torch.device("cpu"))


def test_graphs_on_a_cuda_device_and_where_weights_are_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_lowprec.graphs import LayerGraphs

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for engine, said in (("FSDP", "none (HF_LOWPREC_GRAPHS has no effect under FSDP)"),
                         ("MULTI_GPU", "0 of 2 layers of model.layers")):  # fmt: skip
        model = llama()
        report = hf_lowprec.convert(model, "te-current", emulate=True)
        switches.settle(model, Switches(attention=False, graphs=True), torch.device("cuda"), engine=engine)
        assert str(report.graphs) == said and f"CUDA graphs: {said}" in report.summary()
        assert isinstance(report.graphs, LayerGraphs) == (engine != "FSDP")
        hf_lowprec.revert(model)
        assert model.__dict__.get("_hf_lowprec_graphs") is None


@pytest.mark.parametrize("name", ["fuse", "attention", "liger", "graphs"])
def test_switches_of_the_config_are_checked(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}='yes': True, False or None"):
        LowPrecConfig("te-current", **{name: "yes"})


@pytest.mark.parametrize("name", ["HF_LOWPREC_ATTENTION", "HF_LOWPREC_LIGER", "HF_LOWPREC_GRAPHS"])
def test_switches_of_the_environment_are_checked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    hf_lowprec.convert(model, "te-current")
    monkeypatch.setenv(name, "on")
    with pytest.raises(ValueError, match=rf"{name}='on': 0(,| or) 1"):
        switches.settle(model, Switches(), torch.device("cpu"))
