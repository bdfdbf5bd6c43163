# SPDX-License-Identifier: Apache-2.0
"""Our optimizers in the Trainer: by argument, by the Trainer's own arguments, by hand, and adopted under a recipe."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import llama, rows
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainingArguments

from hf_lowprec import LowPrecTrainingArguments, optim
from hf_lowprec.conversion import report_of
from hf_lowprec.integrations import trainer_optim
from hf_lowprec.integrations.trainer_optim import Choice, parse
from hf_lowprec.optim.states import resolve_states
from hf_lowprec.presets import get_recipe


@pytest.fixture
def common(tmp_path: Path) -> dict[str, Any]:
    return dict(
        output_dir=str(tmp_path / "out"), use_cpu=True, max_steps=4, per_device_train_batch_size=4, logging_steps=1,
        learning_rate=1e-2, lr_scheduler_type="linear", weight_decay=0.1, save_strategy="no", report_to="none",
        disable_tqdm=True, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6,
    )  # fmt: skip


def run(args: TrainingArguments, resume: str | None = None, **kwargs: Any) -> Trainer:
    if "model_init" not in kwargs:
        kwargs.setdefault("model", llama())
    trainer = Trainer(args=args, train_dataset=rows(), **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def optimizer_of(trainer: Trainer) -> Any:
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def slots(trainer: Trainer, name: str) -> set[str]:
    return set(optimizer_of(trainer).state[dict(trainer.model.named_parameters())[name]])


def assert_embedding_in_32_bits(trainer: Trainer) -> None:
    assert "exp_avg_qdata" in slots(trainer, "model.layers.0.mlp.up_proj.weight")
    assert "exp_avg" in slots(trainer, "model.embed_tokens.weight")  # 8192 elements
    assert "exp_avg" in slots(trainer, "model.norm.weight")


# --- the argument ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, choice",
    [
        ("8bit", ("adamw", "8bit", None)),
        ("fp8-lm", ("adamw", "fp8-lm", None)),
        ("stable_adamw:8bit", ("stable_adamw", "8bit", None)),
        ("Stable-AdamW:8bit", ("stable_adamw", "8bit", None)),
        ("lion:compact", ("lion", "compact", None)),
        ('{"min_numel": 7}', ("adamw", '{"min_numel": 7}', None)),
        ("paged-8bit", ("adamw", "8bit", "PagedAdamW8bit")),
        ("lion:paged-32bit", ("lion", "32bit", "PagedLion32bit")),
    ],
)
def test_grammar(text, choice):
    assert parse(text) == Choice(*choice)


@pytest.mark.parametrize(
    "text, message",
    [
        ("8bits", "unknown states '8bits'"),
        ("lamb:8bit", "no algorithm 'lamb'; known: adamw"),
        ("sgd:paged-8bit", "pages no such optimizer; known: adamw:paged-8bit"),
        ("paged-4bit", "pages no such optimizer"),
        ("#4", "table 6, variant #4"),
    ],
)
def test_grammar_errors(common, text, message):
    with pytest.raises(ValueError, match=message):
        LowPrecTrainingArguments(**common, lowprec_optim=text)


@pytest.mark.parametrize("other", [{"optim": "sgd"}, {"optim": "adamw_8bit"}, {"optim_args": "a=1"}])
def test_contradiction_with_the_trainers_own(common, other):
    name, value = next(iter(other.items()))
    with pytest.raises(ValueError, match=f"lowprec_optim='8bit' and {name}='{value}': choose one"):
        LowPrecTrainingArguments(**common, lowprec_optim="8bit", **other)


def test_from_the_command_line(tmp_path):
    argv = ["--output_dir", str(tmp_path), "--use_cpu", "--lowprec_optim", "stable_adamw:8bit"]
    (args,) = HfArgumentParser(LowPrecTrainingArguments).parse_args_into_dataclasses(argv)
    assert args.lowprec_optim == "stable_adamw:8bit" and args.lowprec is None
    assert LowPrecTrainingArguments(**args.to_dict()).to_dict() == args.to_dict()


def test_trl_configs_have_it(tmp_path):
    pytest.importorskip("trl")
    from hf_lowprec import LowPrecDPOConfig, LowPrecGRPOConfig, LowPrecRewardConfig, LowPrecSFTConfig

    for config in (LowPrecSFTConfig, LowPrecDPOConfig, LowPrecRewardConfig, LowPrecGRPOConfig):
        assert config(output_dir=str(tmp_path), use_cpu=True, lowprec_optim="8bit").lowprec_optim == "8bit"


def test_trl_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tiny import tokenizer

    from hf_lowprec import LowPrecSFTConfig

    args = LowPrecSFTConfig(
        str(tmp_path), use_cpu=True, max_steps=2, report_to="none", lowprec_optim="8bit", max_length=32, bf16=False,
        disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_list([{"text": "one two three four"}] * 8)
    trainer = trl.SFTTrainer(llama(), args, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    assert type(optimizer_of(trainer)) is optim.AdamW
    assert_embedding_in_32_bits(trainer)


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, cls",
    [("8bit", "AdamW"), ("adam:8bit", "Adam"), ("stable_adamw:8bit", "StableAdamW"), ("lion:8bit", "Lion"),
     ("sgd:8bit", "SGD")],
)  # fmt: skip
def test_trains_with_the_trainers_hyperparameters(common, text, cls):
    rate = {"Lion": 1e-3, "SGD": 0.1}.get(cls, 1e-2)
    args = LowPrecTrainingArguments(**common | {"max_steps": 12, "learning_rate": rate}, lowprec_optim=text)
    trainer = run(args)
    optimizer = optimizer_of(trainer)
    assert type(optimizer) is getattr(optim, cls)
    decay, none = optimizer.param_groups
    assert (decay["weight_decay"], none["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in none["params"]} == {1} and all(p.ndim > 1 for p in decay["params"])
    for group in optimizer.param_groups:
        assert group["initial_lr"] == rate and group["lr"] < rate  # the schedule reached it
        if cls == "SGD":
            assert group["momentum"] == 0.8
        else:
            assert group["betas"] == (0.8, 0.95)
        if "Adam" in cls:
            assert group["eps"] == 1e-6
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.2
    assert "lowprec_optim" not in str(trainer.model.config)
    if cls != "SGD":
        assert_embedding_in_32_bits(trainer)


def test_fp32_states_train_as_the_trainers_own(common):
    ours = run(LowPrecTrainingArguments(**common, lowprec_optim="fp32"))
    torchs = run(TrainingArguments(**common, optim="adamw_torch"))
    for a, b in zip(ours.model.parameters(), torchs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-5)  # of 4 steps of up to 1e-2, rounded in another order


def test_model_init_is_marked_too(common):
    assert_embedding_in_32_bits(
        run(LowPrecTrainingArguments(**common, lowprec_optim="8bit"), model_init=lambda: llama())
    )


@pytest.mark.parametrize(
    "text, lowprec, dtype",
    [
        ("8bit", None, torch.float32),
        ("8bit", None, torch.bfloat16),
        ("stable_adamw:compact", None, torch.bfloat16),  # a residual beside each weight
        ("8bit", "fp8-lm", torch.bfloat16),
    ],
)
def test_resume_is_bit_identical(common, text, lowprec, dtype):
    common |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    args = LowPrecTrainingArguments(**common, lowprec_optim=text, lowprec=lowprec)
    whole = run(args, model=llama(dtype=dtype))
    resumed = run(args, resume=f"{args.output_dir}/checkpoint-2", model=llama(dtype=dtype))
    assert losses(resumed) == losses(whole)
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    a, b = (optimizer_of(trainer).state_dict()["state"] for trainer in (whole, resumed))
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].keys() == b[key].keys()
        for slot in a[key]:
            one, two = (state[key][slot].reshape(-1).view(torch.uint8) for state in (a, b))  # float8 knows no equality
            assert a[key][slot].dtype == b[key][slot].dtype and torch.equal(one, two), (key, slot)


def test_with_a_recipe_the_argument_names_the_states(common):
    trainer = run(LowPrecTrainingArguments(**common, lowprec="fp8-lm", lowprec_optim="8bit"))
    assert all(group["states"] == "8bit" for group in optimizer_of(trainer).param_groups)
    assert_embedding_in_32_bits(trainer)
    assert "optimizer AdamW with exp_avg dynamic8, exp_avg_sq dynamic8u" in report_of(trainer.model).optimizer


# --- by hand --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowprec", [None, "te-current"])
@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
def test_by_hand(common, way, lowprec):
    model = llama()
    args = LowPrecTrainingArguments(**common, lowprec=lowprec)
    if way == "optimizers":
        given: Any = (optim.AdamW(model.parameters(), lr=1e-2, states="8bit"), None)
    else:
        given = (optim.AdamW, {"lr": 1e-2, "states": "8bit"})
    trainer = run(args, model=model, **{way: given})
    assert type(optimizer_of(trainer)) is optim.AdamW
    assert_embedding_in_32_bits(trainer)


def test_by_hand_with_model_init(common):
    trainer = run(
        TrainingArguments(**common),
        model_init=lambda: llama(),
        optimizer_cls_and_kwargs=(optim.Lion, {"states": "8bit"}),
    )
    assert type(optimizer_of(trainer)) is optim.Lion
    assert_embedding_in_32_bits(trainer)


@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
def test_by_hand_and_by_argument_contradict(common, way):
    model = llama()
    given: Any = (torch.optim.SGD, {"lr": 1e-2})
    if way == "optimizers":
        given = (optim.AdamW(model.parameters(), states="compact"), None)
    with pytest.raises(RuntimeError, match="lowprec_optim='8bit' was asked for, but the Trainer trains with"):
        run(LowPrecTrainingArguments(**common, lowprec_optim="8bit"), model=model, **{way: given})


def test_trainers_with_groups_of_their_own(common):
    """LLaVA's pattern: `create_optimizer` overridden, the class from the static method."""

    class Mine(Trainer):
        def create_optimizer(self, model=None):
            cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = cls([{"params": list(self.model.parameters()), "lr": 1e-3}], **kwargs)
            return self.optimizer

    trainer = Mine(llama(), LowPrecTrainingArguments(**common, lowprec_optim="8bit"), train_dataset=rows())
    trainer.train()
    assert len(optimizer_of(trainer).param_groups) == 1
    assert_embedding_in_32_bits(trainer)


def test_the_example(monkeypatch, capsys):
    """It asserts that its resumed run ends in the same loss."""
    path = Path(__file__).parents[2] / "examples" / "optimizer_8bit.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--steps", "12"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "states 8bit: 2.54 bytes per parameter" in out
    first, *_, last = (float(line.split()[-1]) for line in out.splitlines() if line.startswith("step"))
    assert last < first - 1


# --- adopted --------------------------------------------------------------------------------------------------------


def test_adopted_with_8bit_states(common, tmp_path):
    """As docs/recipes.md writes them. Embeddings keep 32 bits, and a resumed run is the same."""
    path = tmp_path / "mine.yaml"
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    path.write_text(text.split("```yaml")[1].split("```")[0])
    assert get_recipe(path).states == resolve_states("8bit")
    common |= {"save_strategy": "steps", "save_steps": 2}
    args = LowPrecTrainingArguments(**common, lowprec=str(path))
    trainer, resumed = run(args), run(args, resume=f"{args.output_dir}/checkpoint-2")
    for one in (trainer, resumed):
        assert type(optimizer_of(one)) is optim.AdamW
        assert all(group["states"] == "8bit" for group in optimizer_of(one).param_groups)
        assert_embedding_in_32_bits(one)
    assert losses(resumed) == losses(trainer)
    for a, b in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


# --- paged ----------------------------------------------------------------------------------------------------------


def test_paged_is_bitsandbytes(common):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = llama()
    with pytest.warns(UserWarning, match="Paged optimizers are not supported on CPU"):
        trainer = run(LowPrecTrainingArguments(**common, lowprec_optim="paged-8bit"), model=model)
    optimizer = optimizer_of(trainer)
    assert type(optimizer) is bitsandbytes.optim.PagedAdamW8bit
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.95) and optimizer.param_groups[0]["weight_decay"] == 0.1
    states = {name: optimizer.state[p]["state1"].dtype for name, p in model.named_parameters()}
    assert states["model.layers.0.mlp.up_proj.weight"] == torch.uint8
    assert states["model.embed_tokens.weight"] == torch.float32


def test_paged_without_bitsandbytes(common, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-lowprec\[bitsandbytes\]'.*lowprec_optim='adamw:8bit'"):
        LowPrecTrainingArguments(**common, lowprec_optim="paged-8bit")


# --- the rest of the process ----------------------------------------------------------------------------------------


def test_other_arguments_get_the_trainers_optimizer(common):
    assert type(optimizer_of(run(TrainingArguments(**common)))) is torch.optim.AdamW
    assert type(optimizer_of(run(LowPrecTrainingArguments(**common)))) is torch.optim.AdamW


def test_verify_sees_through_wrappers(common):
    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    args = LowPrecTrainingArguments(**common, lowprec_optim="8bit")
    model = nn.Linear(4, 4)
    trainer_optim.verify(args, Wrapper(optim.AdamW(model.parameters(), states="8bit")))
    with pytest.raises(RuntimeError, match=r"hf_lowprec\.optim\.\w+\.Lion"):
        trainer_optim.verify(args, Wrapper(optim.Lion(model.parameters(), states="8bit")))
