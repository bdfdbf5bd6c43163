# SPDX-License-Identifier: Apache-2.0
"""`from_pretrained(quantization_config=LowPrecConfig(...))` converts, leaves no trace, and saves plain checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from tiny import LINEARS, converted, llama, rows, stock_python
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.quantizers.auto import AutoQuantizationConfig

import hf_lowprec
from hf_lowprec import LowPrecConfig
from hf_lowprec.conversion import recipe_of
from hf_lowprec.optim import AdamW
from hf_lowprec.presets import get_recipe
from hf_lowprec.recipe import RecipeError

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info.values()), info
ids = torch.arange(3, 19)[None]
print("loss", model(ids, labels=ids).loss.item())
print("types", {type(m).__name__ for m in model.modules() if "Linear" in type(m).__name__})
"""


@pytest.fixture
def folder(tmp_path):
    llama().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_loads_converted(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=LowPrecConfig("fp8-lm"))
    assert recipe_of(model) == get_recipe("fp8-lm") and len(converted(model)) == LINEARS
    for name, weight in llama().state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    ids = torch.arange(3, 19)[None]
    assert not torch.equal(model(ids).logits, llama()(ids).logits)  # the products are quantised
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_modules_to_not_convert(folder):
    config = LowPrecConfig("fp8-lm", modules_to_not_convert=["down_proj"])
    names = converted(AutoModelForCausalLM.from_pretrained(folder, quantization_config=config))
    assert len(names) == LINEARS - 2 and not any("down_proj" in name for name in names)


def test_no_trace_is_left(folder, tmp_path):
    """What transformers does to a model with a quantizer (see the module docstring) does not happen to ours."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=LowPrecConfig("fp8-lm"))
    assert not getattr(model, "is_quantized", False) and getattr(model, "hf_quantizer", None) is None
    assert not hasattr(model.config, "_is_quantized") and not hasattr(model.config, "quantization_config")
    model.float()  # refused while a quantizer holds the model

    zeros = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "zeros", state_dict=zeros)  # ignored while a quantizer holds the model
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "zeros")
    assert all(not p.any() for p in again.parameters()) and not converted(again)


def test_saved_model_loads_in_stock_transformers(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=LowPrecConfig("fp8-lm"))
    model.save_pretrained(tmp_path / "saved")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "saved")]
    assert configs[0] == configs[1]

    ids = torch.arange(3, 19)[None]
    with hf_lowprec.high_precision(model):
        loss = model(ids, labels=ids).loss.item()
    out = stock_python(LOAD, str(tmp_path / "saved"))
    assert float(out.split("loss ")[1].split()[0]) == pytest.approx(loss, rel=1e-6)
    assert "types {'Linear'}" in out


def test_trains_and_resumes_in_an_unmodified_trainer(folder, tmp_path):
    args = TrainingArguments(
        str(tmp_path / "out"), use_cpu=True, bf16=True, max_steps=4, save_steps=2, logging_steps=1, report_to="none",
        per_device_train_batch_size=4, learning_rate=1e-2, lr_scheduler_type="constant", disable_tqdm=True,
    )  # fmt: skip

    def run(resume=None):
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=LowPrecConfig("fp8-lm"))
        trainer = Trainer(model, args, train_dataset=rows())
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight, resumed = run(), run(f"{args.output_dir}/checkpoint-2")
    assert isinstance(straight.optimizer.optimizer, AdamW)
    losses = [[entry.get("loss") for entry in t.state.log_history[:4]] for t in (straight, resumed)]
    assert losses[0] == losses[1] and None not in losses[0]
    for (name, a), b in zip(straight.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with safe_open(f"{args.output_dir}/checkpoint-4/model.safetensors", "pt") as saved:
        with safe_open(f"{folder}/model.safetensors", "pt") as original:
            assert set(saved.keys()) == set(original.keys())


def test_config_round_trip():
    config = LowPrecConfig("fp8-lm", modules_to_not_convert=["q_proj"])
    data = json.loads(json.dumps(config.to_dict()))
    assert LowPrecConfig.from_dict(data) == config
    assert AutoQuantizationConfig.from_dict(data) == config  # registered under its quant_method
    assert LowPrecConfig(get_recipe("fp8-lm")) == LowPrecConfig("fp8-lm-o2") != config
    assert "fp8-lm" in repr(config)


def test_config_errors():
    with pytest.raises(RecipeError, match="did you mean"):
        LowPrecConfig("fp8lm")
    with pytest.raises(ValueError, match="quant_method"):
        LowPrecConfig("fp8-lm", quant_method="gptq")
