# SPDX-License-Identifier: Apache-2.0
"""TRL: each config with `lowprec=`, and the plain trainers under the launcher or with the callback."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LINEARS, VOCAB, converted, llama, llama_config, tokenizer
from transformers import HfArgumentParser, LlamaForCausalLM, LlamaForSequenceClassification

import hf_lowprec
from hf_lowprec import LowPrecCallback
from hf_lowprec.optim import AdamW

trl = pytest.importorskip("trl")
Dataset = pytest.importorskip("datasets").Dataset

PAIRS = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": "no"} for a in range(4) for b in range(4)]


@pytest.fixture
def common(tmp_path: Path) -> dict[str, Any]:
    return dict(
        output_dir=str(tmp_path / "out"), use_cpu=True, max_steps=2, per_device_train_batch_size=4, logging_steps=1,
        learning_rate=1e-2, lr_scheduler_type="constant", save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip


def pairs() -> Any:
    return Dataset.from_list(PAIRS)


def text() -> Any:
    return Dataset.from_list([{"text": p["prompt"] + p["chosen"]} for p in PAIRS])


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# --- SFT -----------------------------------------------------------------------------------------------------------


def test_sft(common):
    args = hf_lowprec.LowPrecSFTConfig(**common | {"max_steps": 10}, lowprec="fp8-lm")
    trainer = trl.SFTTrainer(llama(), args, train_dataset=text(), processing_class=tokenizer())
    trainer.train()
    assert len(converted(trainer.model)) == LINEARS
    assert isinstance(trainer.optimizer.optimizer, AdamW)
    loss = logged(trainer, "loss")
    assert loss[-1] < loss[0] - 0.5
    assert any(name.startswith("lowprec/") for name in trainer.state.log_history[0])


def test_sft_plain_under_the_launcher(common, monkeypatch):
    """`accelerate launch --mixed_precision fp8-lm` sets these two; TRL's own bf16=True does not undo them."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("HF_LOWPREC_RECIPE", "fp8-lm")
    trainer = trl.SFTTrainer(llama(), trl.SFTConfig(**common), train_dataset=text(), processing_class=tokenizer())
    trainer.train()
    assert len(converted(trainer.model)) == LINEARS and isinstance(trainer.optimizer.optimizer, AdamW)
    assert any(name.startswith("lowprec/") for name in trainer.state.log_history[0])


# --- DPO -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["arguments", "callback", "launcher"])
def test_dpo_starts_at_ln_2(common, way, monkeypatch):
    """Policy and reference are one model, so the first loss is ln 2 if and only if both run in the same precision."""
    callbacks = [LowPrecCallback("fp8-lm")] if way == "callback" else None
    if way == "launcher":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        monkeypatch.setenv("HF_LOWPREC_RECIPE", "fp8-lm")
    plain, ours = trl.DPOConfig, hf_lowprec.LowPrecDPOConfig
    args = ours(**common, lowprec="fp8-lm") if way == "arguments" else plain(**common)
    trainer = trl.DPOTrainer(
        llama(), llama(), args, train_dataset=pairs(), processing_class=tokenizer(), callbacks=callbacks
    )
    trainer.train()
    assert converted(trainer.model) == converted(trainer.ref_model) and len(converted(trainer.model)) == LINEARS
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(trainer, "rewards/margins")[0] == 0.0
    assert logged(trainer, "loss")[1] != logged(trainer, "loss")[0]


# --- reward --------------------------------------------------------------------------------------------------------


def classifier(seed: int = 0) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(llama_config(num_labels=1))


def test_reward_head_is_untouched(common):
    args = hf_lowprec.LowPrecRewardConfig(**common, lowprec="fp8-lm")
    data = pairs().map(lambda row: {key: row["prompt"] + row[key] for key in ("chosen", "rejected")})
    trainer = trl.RewardTrainer(
        classifier(), args, train_dataset=data.remove_columns("prompt"), processing_class=tokenizer()
    )
    trainer.train()
    assert len(converted(trainer.model)) == LINEARS
    assert type(trainer.model.score) is torch.nn.Linear
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))


# --- GRPO ----------------------------------------------------------------------------------------------------------


def test_grpo_with_a_reward_model(common, tmp_path):
    args = hf_lowprec.LowPrecGRPOConfig(
        **common, lowprec="fp8-lm", beta=0.1, num_generations=4, max_completion_length=8
    )
    tokens, judge = tokenizer(), classifier(1)
    llama().save_pretrained(tmp_path / "policy")  # GRPO loads its reference model from there
    policy = LlamaForCausalLM.from_pretrained(tmp_path / "policy")

    def digits(completions, **kwargs):
        return [float(sum(c.isdigit() for c in text)) for text in completions]

    trainer = trl.GRPOTrainer(
        policy, [digits, judge], args, train_dataset=pairs().select_columns("prompt"),
        processing_class=tokens, reward_processing_classes=[None, tokens],
    )  # fmt: skip
    trainer.train()
    assert len(converted(trainer.model)) == LINEARS and isinstance(trainer.optimizer.optimizer, AdamW)
    assert not converted(judge)
    assert converted(trainer.ref_model) == converted(trainer.model)
    assert logged(trainer, "kl")[0] == pytest.approx(0.0, abs=1e-6)
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))


# --- configs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["SFT", "DPO", "Reward", "GRPO"])
def test_configs(kind, common, tmp_path):
    cls = getattr(hf_lowprec, f"LowPrec{kind}Config")
    assert issubclass(cls, getattr(trl, f"{kind}Config"))
    common |= {"num_generations": 4} if kind == "GRPO" else {}
    args = cls(**common, lowprec="fp8-lm")
    assert args.bf16 and args.mixed_precision == "fp8-lm"
    torch.save(args, tmp_path / "training_args.bin")
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).to_dict() == args.to_dict()
    assert cls(**common).bf16 is True  # TRL's own default
    with pytest.raises(ValueError, match="bf16=False"):
        cls(**common, lowprec="fp8-lm", bf16=False)
    argv = ["--output_dir", str(tmp_path), "--use_cpu", "--lowprec", "fp8-lm-o1"]
    argv += ["--num_generations", "4"] if kind == "GRPO" else []
    assert HfArgumentParser(cls).parse_args_into_dataclasses(argv)[0].lowprec == "fp8-lm-o1"


def test_without_trl(monkeypatch):
    monkeypatch.delitem(sys.modules, "hf_lowprec.integrations.trl", raising=False)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-lowprec\[trl\]'"):
        importlib.import_module("hf_lowprec.integrations.trl")


def test_vocabulary_fits():
    assert len(tokenizer()) <= VOCAB
