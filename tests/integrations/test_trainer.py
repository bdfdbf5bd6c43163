# SPDX-License-Identifier: Apache-2.0
"""The Trainer's two ways in: arguments and callback; their errors, their logs, and resume bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import LINEARS, converted, gpt2, llama, python, rows
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from hf_lowprec import LowPrecCallback, LowPrecTrainingArguments
from hf_lowprec.conversion import recipe_of
from hf_lowprec.integrations import trainer as integration
from hf_lowprec.optim import AdamW
from hf_lowprec.presets import get_recipe
from hf_lowprec.recipe import RecipeError


@pytest.fixture
def common(tmp_path: Path) -> dict[str, Any]:
    return dict(
        output_dir=str(tmp_path / "out"), use_cpu=True, max_steps=4, per_device_train_batch_size=4, logging_steps=1,
        learning_rate=1e-2, lr_scheduler_type="constant", save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip


def run(args: TrainingArguments, model: nn.Module | None = None, resume: str | None = None, **kwargs: Any) -> Trainer:
    if "model_init" not in kwargs:
        kwargs["model"] = llama() if model is None else model
    trainer = Trainer(args=args, train_dataset=rows(), **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def optimizer_of(trainer: Trainer) -> torch.optim.Optimizer:
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal bit for bit, through dicts and lists."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert torch.equal(bits(a), bits(b)), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


# --- arguments -----------------------------------------------------------------------------------------------------


def test_arguments_set_the_base_precision(common):
    args = LowPrecTrainingArguments(**common, lowprec="fp8-lm")
    assert args.bf16 and not args.fp16 and args.mixed_precision == "fp8-lm"
    plain = LowPrecTrainingArguments(**common)
    assert plain.bf16 is False and plain.mixed_precision == "no"
    assert LowPrecTrainingArguments(**common, bf16=True).mixed_precision == "bf16"


@pytest.mark.parametrize("word", ["fp16=True", "bf16=False"])
def test_arguments_that_contradict_the_base(common, word):
    name, value = word.split("=")
    with pytest.raises(ValueError, match=f"'fp8-lm' has the base precision 'bf16'.*{word}"):
        LowPrecTrainingArguments(**common, lowprec="fp8-lm", **{name: value == "True"})


def test_arguments_unknown_recipe(common):
    with pytest.raises(RecipeError, match="did you mean 'fp8-lm'"):
        LowPrecTrainingArguments(**common, lowprec="fp8lm")


@pytest.mark.parametrize("kind", ["Recipe", "dict"])
def test_arguments_take_text_only(common, kind):
    recipe = get_recipe("fp8-lm")
    with pytest.raises(RecipeError, match=f"lowprec is a {kind}: pass a recipe's name or a file"):
        LowPrecTrainingArguments(**common, lowprec=recipe if kind == "Recipe" else recipe.to_dict())


def test_arguments_take_a_path(common, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(get_recipe("te-current").to_json())
    args = LowPrecTrainingArguments(**common, lowprec=path)
    assert args.lowprec == args.mixed_precision == str(path) and args.bf16


def test_arguments_from_the_command_line(tmp_path):
    argv = ["--output_dir", str(tmp_path), "--use_cpu", "--lowprec", "te-current", "--bf16"]
    (args,) = HfArgumentParser(LowPrecTrainingArguments).parse_args_into_dataclasses(argv)
    assert args.lowprec == "te-current" and args.bf16


def test_arguments_are_pickled_and_rebuilt(common, tmp_path):
    args = LowPrecTrainingArguments(**common, lowprec="fp8-lm")
    torch.save(args, tmp_path / "training_args.bin")
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).to_dict() == args.to_dict()
    assert LowPrecTrainingArguments(**args.to_dict()).to_dict() == args.to_dict()


# --- training ------------------------------------------------------------------------------------------------------


class Reporter(TrainerCallback):
    """Stands for wandb and its kin: they read `logs` in on_log."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_arguments_train(common):
    reporter = Reporter()
    trainer = run(LowPrecTrainingArguments(**common | {"max_steps": 12}, lowprec="fp8-lm"), callbacks=[reporter])
    assert recipe_of(trainer.model) == get_recipe("fp8-lm")
    assert len(converted(trainer.model)) == LINEARS and "lm_head" not in converted(trainer.model)
    assert isinstance(optimizer_of(trainer), AdamW)
    assert trainer.accelerator.mixed_precision == "bf16"
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5
    for entry in (trainer.state.log_history[-2], reporter.seen[-2]):
        counters = {name for name in entry if name.startswith("lowprec/")}
        for word in ("saturat", "underflow", "nonfinite"):
            assert any(word in name for name in counters), (word, entry)
    assert not any(name.startswith("lowprec/") for name in trainer.state.log_history[-1])  # the summary of train()


def test_arguments_train_gpt2(common):
    trainer = run(LowPrecTrainingArguments(**common, lowprec="fp8-lm"), gpt2())
    assert len(converted(trainer.model)) == 2 * 4  # Conv1D: c_attn, c_proj, c_fc, c_proj


def test_arguments_take_a_recipe_file(common, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(get_recipe("te-current").to_yaml().replace("name: te-current", "name: mine"))
    trainer = run(LowPrecTrainingArguments(**common, lowprec=str(path)))
    assert recipe_of(trainer.model).name == "mine"


def test_no_recipe_leaves_the_model_alone(common):
    run(LowPrecTrainingArguments(**common, lowprec="fp8-lm"))
    trainer = run(LowPrecTrainingArguments(**common))  # nothing of the first run stays behind in the process
    assert not converted(trainer.model) and type(optimizer_of(trainer)) is torch.optim.AdamW
    assert not any(name.startswith("lowprec/") for entry in trainer.state.log_history for name in entry)


def test_evaluate_before_train(common):
    trainer = Trainer(
        llama(), LowPrecTrainingArguments(**common, lowprec="fp8-lm"), train_dataset=rows(), eval_dataset=rows(4)
    )
    trainer.evaluate()
    trainer.train()
    assert len(converted(trainer.model)) == LINEARS and isinstance(optimizer_of(trainer), AdamW)


def test_works_without_the_autoload_hook(tmp_path):
    code = """
import sys; sys.path.insert(0, sys.argv[1])
from tiny import *
from transformers import Trainer
from hf_lowprec import LowPrecTrainingArguments
args = LowPrecTrainingArguments(
    sys.argv[2], use_cpu=True, max_steps=1, report_to="none", lowprec="fp8-lm", lowprec_optim="stable_adamw:8bit"
)
trainer = Trainer(llama(), args, train_dataset=rows()); trainer.train()
print("converted", len(converted(trainer.model)))
optimizer = trainer.optimizer.optimizer
print(type(optimizer).__name__, sorted(optimizer.state[trainer.model.model.embed_tokens.weight]))
"""
    out = python(code, str(Path(__file__).parent), str(tmp_path), HF_LOWPREC_AUTOLOAD="0")
    assert f"converted {LINEARS}" in out
    assert "StableAdamW ['exp_avg', 'exp_avg_sq', 'step']" in out  # the embedding is marked: 32 bits


# --- callback ------------------------------------------------------------------------------------------------------


def test_callback_trains(common):
    trainer = run(TrainingArguments(**common, bf16=True), callbacks=[LowPrecCallback("fp8-lm")])
    assert len(converted(trainer.model)) == LINEARS and isinstance(optimizer_of(trainer), AdamW)
    assert any(name.startswith("lowprec/") for name in trainer.state.log_history[0])


def test_callback_and_arguments_are_the_same_run(common):
    a = run(TrainingArguments(**common, bf16=True), callbacks=[LowPrecCallback("fp8-lm")])
    b = run(LowPrecTrainingArguments(**common, lowprec="fp8-lm"))
    assert losses(a) == losses(b)


def test_callback_reaches_the_model_of_model_init(common):
    args = TrainingArguments(**common, bf16=True)
    trainer = run(args, model_init=lambda: llama(), callbacks=[LowPrecCallback("fp8-lm")])
    assert len(converted(trainer.model)) == LINEARS


def test_callback_marks_its_own_trainer_only(common):
    args = [TrainingArguments(**common, bf16=True) for _ in range(2)]
    trainers = [
        Trainer(llama(), args[0], train_dataset=rows(), callbacks=[LowPrecCallback("fp8-lm")]),
        Trainer(llama(), args[1], train_dataset=rows()),
    ]
    for trainer in trainers:
        trainer.train()
    assert [len(converted(trainer.model)) for trainer in trainers] == [LINEARS, 0]


@pytest.mark.parametrize("plain", [TrainingArguments, LowPrecTrainingArguments])
def test_arguments_train_their_own_trainer_only(common, plain):
    """Arguments made first reset accelerate's state, so the plain Trainer is made in the state of the other one."""
    args = [plain(**common, bf16=True), LowPrecTrainingArguments(**common, lowprec="fp8-lm")]
    ours = Trainer(llama(), args[1], train_dataset=rows())
    other = Trainer(llama(), args[0], train_dataset=rows())
    for trainer in (other, ours):
        trainer.train()
    assert [len(converted(trainer.model)) for trainer in (other, ours)] == [0, LINEARS]
    assert type(optimizer_of(other)) is torch.optim.AdamW and isinstance(optimizer_of(ours), AdamW)


def test_callback_with_weights_in_the_base_precision(common):
    trainer = run(TrainingArguments(**common), llama(dtype=torch.bfloat16), callbacks=[LowPrecCallback("fp8-lm")])
    assert len(converted(trainer.model)) == LINEARS


def test_callback_wants_the_base_precision(common):
    with pytest.raises(ValueError, match=r"base precision 'bf16'.*runs in 'no'.*TrainingArguments\(bf16=True\)"):
        Trainer(llama(), TrainingArguments(**common), callbacks=[LowPrecCallback("fp8-lm")])


def test_callback_and_arguments_of_two_recipes(common):
    args = LowPrecTrainingArguments(**common, lowprec="te-current")
    with pytest.raises(ValueError, match=r"'fp8-lm'.*'te-current'.*choose one"):
        Trainer(llama(), args, callbacks=[LowPrecCallback("fp8-lm")])


def test_callback_unknown_recipe():
    with pytest.raises(RecipeError, match="did you mean"):
        LowPrecCallback("fp8-ml")


# --- errors --------------------------------------------------------------------------------------------------------


def test_nothing_converted_is_an_error(common):
    with pytest.raises(ValueError, match="nothing could be converted"):
        run(LowPrecTrainingArguments(**common, lowprec="fp8-lm"), NoLinears())


class NoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Embedding(128, 128)

    def forward(self, input_ids, labels):
        return {"loss": nn.functional.cross_entropy(self.logits(input_ids).flatten(0, 1), labels.flatten())}


@pytest.mark.parametrize("n_gpu, hint", [(1, "nothing in it was converted$"), (2, "DataParallel")])
def test_training_does_not_start_unconverted(n_gpu, hint):
    arguments = SimpleNamespace(lowprec="fp8-lm", n_gpu=n_gpu)
    for callback in (LowPrecCallback("fp8-lm"), integration.LowPrecMonitorCallback()):
        with pytest.raises(RuntimeError, match=hint):
            callback.on_train_begin(arguments, None, None, model=llama())


# --- resume --------------------------------------------------------------------------------------------------------


class Snapshot(TrainerCallback):
    """The optimizer's state as training (re)starts."""

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.state = copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_continues_bit_for_bit(common, dtype):
    common |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    args = LowPrecTrainingArguments(**common, lowprec="fp8-lm")
    straight = run(args, llama(dtype=dtype))
    saved = f"{args.output_dir}/checkpoint-3"

    snapshot = Snapshot()
    resumed = run(args, llama(seed=1, dtype=dtype), saved, callbacks=[snapshot])

    on_disk = torch.load(f"{saved}/optimizer.pt", weights_only=True)
    assert "hf_lowprec" in on_disk
    assert any(state["exp_avg_qdata"].dtype == torch.float8_e4m3fn for state in on_disk["state"].values())
    assert_same(snapshot.state, on_disk)
    assert losses(resumed) == losses(straight)
    assert_same(resumed.model.state_dict(), straight.model.state_dict())
    assert_same(optimizer_of(resumed).state_dict(), optimizer_of(straight).state_dict())


def test_checkpoint_of_another_recipe(common):
    common |= {"save_strategy": "steps", "save_steps": 2}
    args = LowPrecTrainingArguments(**common, lowprec="te-delayed")
    run(args)
    with pytest.raises(ValueError, match=r"te-delayed.*fp8-lm-o1|fp8-lm-o1.*te-delayed"):
        run(LowPrecTrainingArguments(**common, lowprec="fp8-lm-o1"), resume=f"{args.output_dir}/checkpoint-2")


def test_bf16_checkpoint_continues_in_low_precision(common):
    common |= {"save_strategy": "steps", "save_steps": 2}
    args = LowPrecTrainingArguments(**common, bf16=True)
    before = run(args)
    after = run(LowPrecTrainingArguments(**common, lowprec="fp8-lm"), resume=f"{args.output_dir}/checkpoint-2")
    assert losses(after)[:2] == losses(before)[:2] and losses(after)[2] == pytest.approx(losses(before)[2], rel=0.02)
    for param, state in optimizer_of(after).state.items():
        if param.numel() >= 4096:
            assert state["exp_avg_qdata"].dtype == torch.float8_e4m3fn
        else:
            assert state["exp_avg"].dtype == torch.float32
