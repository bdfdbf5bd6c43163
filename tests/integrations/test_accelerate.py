# SPDX-License-Identifier: Apache-2.0
"""accelerate: names and environment, `prepare` in every order, references, errors; at the end launched processes."""

from __future__ import annotations

import os
import sys
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import launch as launch_environment
from launching import LOOP, child_environment, launch, losses, parsed
from tiny import LINEARS, converted, llama, llama_config, rows
from torch import nn
from transformers import LlamaForSequenceClassification, Trainer, TrainingArguments

import hf_lowprec
from hf_lowprec import ConversionError, RecipeError, _autoload
from hf_lowprec.integrations.accelerate import resolve, settle_environment
from hf_lowprec.presets import PRESETS

_autoload.activate()
FP8_LM = PRESETS["fp8-lm"]
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def my_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(FP8_LM.to_yaml().replace("name: fp8-lm", "name: mine"))
    return path


def adamw(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr)


def train(accelerator: Accelerator, model: nn.Module, optimizer: Any, steps: int = 6) -> list[float]:
    batch = torch.stack([row["input_ids"] for row in rows(8)])
    out = []
    for _ in range(steps):
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        out.append(loss.item())
    return out


# --- what a word means -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "recipe", "precision", "expected"),
    [
        # nothing of ours asked for: handed through as it came
        (None, "", "", (None, None)),
        ("no", "", "", ("no", None)),
        ("bf16", "", "no", ("bf16", None)),
        ("fp8", "", "", ("fp8", None)),
        (None, "", "fp16", (None, None)),
        # the script's own word, a launcher's, a shell's
        ("fp8-lm", "", "", ("bf16", "fp8-lm")),
        ("FP8_LM", "", "", ("bf16", "fp8-lm")),
        ("fp8-lm", "fp8-lm", "bf16", ("bf16", "fp8-lm")),
        ("fp8-lm-o2", "fp8-lm", "bf16", ("bf16", "fp8-lm")),
        (None, "te-current", "bf16", ("bf16", "te-current")),
        (None, "te-current", "", ("bf16", "te-current")),
        (None, "", "te-current", ("bf16", "te-current")),
        ("bf16", "te-current", "bf16", ("bf16", "te-current")),
        ("bf16", "te-current", "no", ("bf16", "te-current")),
        # our recipes of accelerate's names are reached by the variable
        (None, "bf16", "", ("bf16", "bf16")),
        (None, "fp16", "", ("fp16", "fp16")),
    ],
)
def test_meaning(monkeypatch, asked, recipe, precision, expected):
    monkeypatch.setenv("HF_LOWPREC_RECIPE", recipe)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given, chosen = resolve(asked, {})
    assert (given, chosen and chosen.name) == expected


@pytest.mark.parametrize(
    ("asked", "precision"), [("fp16", "bf16"), ("no", "bf16"), ("fp8", "bf16"), (None, "no"), (None, "fp16")]
)
def test_another_precision_set_explicitly_wins_with_a_warning(monkeypatch, asked, precision):
    monkeypatch.setenv("HF_LOWPREC_RECIPE", "fp8-lm")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    with pytest.warns(UserWarning, match=f"'fp8-lm' is requested, but mixed_precision='{asked or precision}'"):
        assert resolve(asked, {}) == (asked, None)


def test_recipe_files(monkeypatch, my_yaml, tmp_path):
    assert resolve(str(my_yaml), {})[1].name == "mine"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_LOWPREC_RECIPE", "my.yaml")
    settle_environment()
    assert os.environ["HF_LOWPREC_RECIPE"] == str(my_yaml)  # the script may change directory
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    with pytest.raises(RecipeError, match=r"'none\.yaml' does not exist"):
        resolve("none.yaml", {})


@pytest.mark.parametrize("where", ["argument", "HF_LOWPREC_RECIPE", "ACCELERATE_MIXED_PRECISION"])
def test_unknown_names(monkeypatch, where):
    name = "fp8-lmm"
    if where != "argument":
        monkeypatch.setenv(where, name)
    source = "" if where == "argument" else f"{where}: "
    with pytest.raises(RecipeError, match=f"^{source}unknown recipe '{name}'.*did you mean 'fp8-lm'"):
        Accelerator(mixed_precision=name if where == "argument" else None)


def test_two_recipes_are_one_too_many(monkeypatch):
    monkeypatch.setenv("HF_LOWPREC_RECIPE", "te-current")
    with pytest.raises(RecipeError, match=r"script asks for recipe 'fp8-lm', the launcher .* for 'te-current'"):
        Accelerator(mixed_precision="fp8-lm")


def test_state_names_the_recipe_and_later_accelerators_follow():
    first = Accelerator(mixed_precision="fp8-lm")
    assert first.mixed_precision == "bf16" and first.native_amp
    assert "Mixed precision type: bf16 (hf_lowprec recipe: fp8-lm)\n" in repr(first.state)
    for again in (None, "fp8-lm"):
        assert Accelerator(mixed_precision=again)._hf_lowprec_recipe == FP8_LM
    with pytest.raises(RecipeError, match="an earlier Accelerator for 'fp8-lm'"):
        Accelerator(mixed_precision="te-current")
    with pytest.raises(ValueError, match="already been initialized"):
        Accelerator(mixed_precision="no")


def test_an_explicit_precision_after_a_recipe_is_a_plain_run():
    first = Accelerator(mixed_precision="fp8-lm")
    model = llama()
    train(first, *first.prepare(model, adamw(model)), steps=1)
    second = Accelerator(mixed_precision="bf16")
    other = llama()
    other, optimizer = second.prepare(other, adamw(other))
    assert not converted(other) and type(optimizer.optimizer) is torch.optim.AdamW
    train(second, other, optimizer, steps=1)
    assert first._hf_lowprec_recipe == Accelerator()._hf_lowprec_recipe == FP8_LM  # what the first said still holds
    assert "hf_lowprec recipe: fp8-lm" in repr(first.state)
    late = llama()
    assert len(converted(first.prepare(late))) == LINEARS


def test_an_explicit_base_precision_follows_the_launcher_every_time(monkeypatch):
    """The launcher's word is for the whole process, however many Accelerators and Trainers the script makes."""
    monkeypatch.setenv("HF_LOWPREC_RECIPE", "fp8-lm")
    assert [Accelerator(mixed_precision="bf16")._hf_lowprec_recipe for _ in range(2)] == [FP8_LM, FP8_LM]


@pytest.mark.parametrize("precision", [None, "no", "bf16"])
def test_accelerates_own_precisions_train_as_without_us(precision):
    def run(**methods: Any) -> tuple[list[float], str]:
        AcceleratorState._reset_state(True)
        with pytest.MonkeyPatch.context() as patch:
            for name, method in methods.items():
                patch.setattr(Accelerator, name, method)
            accelerator = Accelerator(mixed_precision=precision)
            model = llama()
            model, optimizer = accelerator.prepare(model, adamw(model))
            assert type(optimizer.optimizer) is torch.optim.AdamW and not converted(model)
            return train(accelerator, model, optimizer, 3), repr(accelerator.state)

    stock = {name: getattr(Accelerator, name).__wrapped__ for name in ("__init__", "prepare", "prepare_model")}
    assert run() == run(**stock)


# --- prepare ---------------------------------------------------------------------------------------------------------


def test_prepare_everything_at_once(capsys):
    accelerator = Accelerator(mixed_precision="fp8-lm")
    model = llama()
    parameters = dict(model.named_parameters())
    raw = adamw(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(raw, lambda step: 0.5**step)
    model, optimizer, scheduler = accelerator.prepare(model, raw, scheduler)
    assert len(converted(model)) == LINEARS and not any("lm_head" in name for name in converted(model))
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert isinstance(optimizer.optimizer, hf_lowprec.optim.AdamW)
    assert scheduler.scheduler.optimizer is optimizer.optimizer
    loss = train(accelerator, model, optimizer)
    assert loss[-1] < loss[0] - 0.5
    assert next(iter(optimizer.state.values()))["exp_avg_qdata"].dtype == torch.float8_e4m3fn
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5e-2
    said = capsys.readouterr().err
    assert said.count(f"recipe fp8-lm: converted {LINEARS} of {LINEARS + 1} linears") == 1
    assert "exp_avg e4m3fn" in said


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_prepare_one_by_one(order, capsys):
    accelerator = Accelerator(mixed_precision="fp8-lm")
    model = llama()
    raw = adamw(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(raw, lambda step: 1.0)
    if order == "model first":
        model = accelerator.prepare(model)
        optimizer = accelerator.prepare(raw)
        scheduler = accelerator.prepare(scheduler)
    else:
        optimizer = accelerator.prepare(raw)
        scheduler = accelerator.prepare(scheduler)
        model = accelerator.prepare(model)
    assert len(converted(model)) == LINEARS
    assert isinstance(optimizer.optimizer, hf_lowprec.optim.AdamW)
    assert scheduler.scheduler.optimizer is optimizer.optimizer
    loss = train(accelerator, model, optimizer)
    assert loss[-1] < loss[0] - 0.5
    assert "exp_avg e4m3fn" in capsys.readouterr().err


def test_prepare_twice_changes_nothing(capsys):
    accelerator = Accelerator(mixed_precision="fp8-lm")
    model = llama()
    model, optimizer = accelerator.prepare(model, adamw(model))
    inner = optimizer.optimizer
    assert accelerator.prepare(model, optimizer) == (model, optimizer)
    assert optimizer.optimizer is inner
    other = Accelerator()  # a helper of the script makes its own
    assert other.prepare(model) is model
    assert capsys.readouterr().err.count("converted") == 1


def test_optimizers_that_are_kept():
    accelerator = Accelerator(mixed_precision="fp8-lm")
    model = llama()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert type(optimizer.optimizer) is torch.optim.SGD and len(converted(model)) == LINEARS
    loss = train(accelerator, model, optimizer)
    assert loss[-1] < loss[0]


def test_states_only(monkeypatch):
    """bf16-sr quantises no GEMM: nothing to convert is no error, the optimizer is adopted."""
    accelerator = Accelerator(mixed_precision="bf16-sr")
    model = llama(dtype=torch.bfloat16)
    model, optimizer = accelerator.prepare(model, adamw(model))
    assert not converted(model) and isinstance(optimizer.optimizer, hf_lowprec.optim.AdamW)


def test_several_models_in_one_call():
    """A GAN's convolutional discriminator has nothing to convert; a loss function has no parameters at all."""
    accelerator = Accelerator(mixed_precision="fp8-lm")
    policy, critic = llama(), nn.Sequential(nn.Conv1d(4, 4, 1))
    first, second = adamw(policy), adamw(critic)
    objects = accelerator.prepare(policy, critic, nn.MSELoss(), first, second)
    assert len(converted(objects[0])) == LINEARS and not converted(objects[1])
    assert isinstance(objects[3].optimizer, hf_lowprec.optim.AdamW)
    assert objects[4].optimizer is second


def test_save_and_resume_state(tmp_path):
    """accelerator.save_state / load_state, the way a script resumes: the run continues as if uninterrupted."""

    def start() -> tuple[Accelerator, nn.Module, Any]:
        accelerator = Accelerator(mixed_precision="fp8-lm")
        model = llama()
        return accelerator, *accelerator.prepare(model, adamw(model))

    accelerator, model, optimizer = start()
    train(accelerator, model, optimizer, 3)
    accelerator.save_state(str(tmp_path / "state"))
    expected = train(accelerator, model, optimizer, 3)
    AcceleratorState._reset_state(True)
    accelerator, model, optimizer = start()
    accelerator.load_state(str(tmp_path / "state"))
    assert train(accelerator, model, optimizer, 3) == expected


# --- who asks --------------------------------------------------------------------------------------------------------


def test_request_on_the_model():
    accelerator = Accelerator(mixed_precision="bf16")
    model = llama()
    model._hf_lowprec_request = PRESETS["te-current"]
    raw = adamw(model)
    model, optimizer = accelerator.prepare(model, raw)
    assert len(converted(model)) == LINEARS and optimizer.optimizer is raw  # te-current names no states


def test_request_on_the_model_against_the_launcher():
    accelerator = Accelerator(mixed_precision="fp8-lm")
    model = llama()
    model._hf_lowprec_request = PRESETS["te-current"]
    with pytest.raises(RecipeError, match="'te-current', the launcher for 'fp8-lm'"):
        accelerator.prepare(model)
    assert not converted(model)
    model._hf_lowprec_request = FP8_LM
    assert len(converted(accelerator.prepare(model))) == LINEARS


def test_converted_by_hand():
    model = llama()
    hf_lowprec.convert(model, "te-current")
    with pytest.raises(ConversionError, match="'te-current', not 'fp8-lm'"):
        Accelerator(mixed_precision="fp8-lm").prepare(model)
    hf_lowprec.revert(model)
    hf_lowprec.convert(model, "fp8-lm", modules_to_not_convert=["mlp"])
    AcceleratorState._reset_state(True)
    model, optimizer = Accelerator(mixed_precision="bf16").prepare(model, adamw(model))
    assert len(converted(model)) == 8 and isinstance(optimizer.optimizer, hf_lowprec.optim.AdamW)


# --- models that are only evaluated ----------------------------------------------------------------------------------


def named(model: nn.Module, path: str) -> nn.Module:
    model.config.name_or_path = path
    return model


@pytest.mark.parametrize("path", ["", "org/model"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_reference_rounds_as_the_policy(when, path, capsys):
    accelerator = Accelerator(mixed_precision="fp8-lm")
    policy, reference = named(llama(), path), named(llama(), path)
    policy.config.use_cache = False  # trainers change the policy's config
    if when == "before":
        reference = accelerator.prepare_model(reference, evaluation_mode=True)
        assert not converted(reference)
    policy, _ = accelerator.prepare(policy, adamw(policy))
    if when == "after":
        reference = accelerator.prepare_model(reference, evaluation_mode=True)
    assert len(converted(reference)) == LINEARS
    assert "reference model LlamaForCausalLM converted" in capsys.readouterr().err
    batch = torch.stack([row["input_ids"] for row in rows(4)])
    with torch.no_grad():
        assert torch.equal(policy(input_ids=batch).logits, reference(input_ids=batch).logits)


def test_reference_leaves_out_what_the_policy_leaves_out():
    accelerator = Accelerator(mixed_precision="bf16")
    policy, reference = llama(), llama()
    hf_lowprec.convert(policy, "fp8-lm", modules_to_not_convert=["mlp"])
    accelerator.prepare_model(reference, evaluation_mode=True)
    policy, _ = accelerator.prepare(policy, adamw(policy))
    assert converted(reference) == converted(policy) and len(converted(policy)) == 8


def test_reward_models_and_teachers_stay_as_they_are(capsys):
    accelerator = Accelerator(mixed_precision="fp8-lm")
    reward = LlamaForSequenceClassification(llama_config())
    teacher, cousin = llama(num_hidden_layers=3), named(llama(), "org/other")
    for model in (reward, teacher, cousin):
        accelerator.prepare_model(model, evaluation_mode=True)
    policy = named(llama(), "org/model")
    accelerator.prepare(policy, adamw(policy))
    assert not converted(reward) and not converted(teacher) and not converted(cousin)
    said = capsys.readouterr().err
    assert "LlamaForSequenceClassification, evaluated only and no copy of the trained model, is left as it is" in said


def test_frozen_teacher_in_prepare():
    accelerator = Accelerator(mixed_precision="fp8-lm")
    student, teacher = llama(), llama(num_hidden_layers=3).requires_grad_(False)
    student, teacher, _ = accelerator.prepare(student, teacher, adamw(student))
    assert converted(student) and not converted(teacher)


def test_a_frozen_model_alone_is_left_but_not_silently(capsys):
    """Not knowing what it is for, we do not touch it; the user reads so."""
    accelerator = Accelerator(mixed_precision="fp8-lm")
    model = accelerator.prepare(llama().requires_grad_(False))
    assert not converted(model)
    assert "LlamaForCausalLM is only evaluated: left as it is until a copy is trained" in capsys.readouterr().err


# --- Trainer ---------------------------------------------------------------------------------------------------------


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), use_cpu=True, max_steps=3, per_device_train_batch_size=8, report_to="none",
        save_strategy="no", learning_rate=1e-2, disable_tqdm=True, **changes,
    )  # fmt: skip


def test_plain_trainer_evaluates_before_it_trains(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_LOWPREC_RECIPE", "fp8-lm")
    settle_environment()  # what the hook does when accelerate is imported
    trainer = Trainer(llama(), arguments(tmp_path), train_dataset=rows(32), eval_dataset=rows(8, seed=1))
    before = trainer.evaluate()["eval_loss"]
    assert len(converted(trainer.model)) == LINEARS
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, hf_lowprec.optim.AdamW)
    assert trainer.evaluate()["eval_loss"] < before


def test_trainer_with_data_parallel(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_LOWPREC_RECIPE", "fp8-lm")
    settle_environment()
    args = arguments(tmp_path)
    args._setup_devices  # noqa: B018  sets _n_gpu
    args._n_gpu = 2
    with pytest.raises(ConversionError, match=r"nn\.DataParallel .*accelerate launch --multi_gpu"):
        Trainer(llama(), args, train_dataset=rows(8))


# --- errors ----------------------------------------------------------------------------------------------------------


def test_nothing_to_convert():
    accelerator = Accelerator(mixed_precision="fp8-lm")
    with pytest.raises(ConversionError, match="nothing could be converted"):
        accelerator.prepare(nn.Sequential(nn.Conv1d(4, 4, 1)))


def test_data_parallel():
    with pytest.raises(ConversionError, match=r"nn\.DataParallel"):
        Accelerator(mixed_precision="fp8-lm").prepare(nn.DataParallel(llama()))


def test_optimizer_of_other_parameters():
    accelerator = Accelerator(mixed_precision="fp8-lm")
    model, stale = llama(), adamw(llama())
    with pytest.raises(ValueError, match="holds none of the model's parameters"):
        accelerator.prepare(model, stale)


def test_optimizer_whose_model_never_comes():
    accelerator = Accelerator(mixed_precision="fp8-lm")
    model = llama()
    optimizer = accelerator.prepare(adamw(model))
    with pytest.raises(ConversionError, match="the model that it updates was not"):
        train(accelerator, model, optimizer, 1)


FLAT = {
    "FSDP": "low-precision states are not available under FSDP1, but are with fsdp_version=2",
    "DEEPSPEED": "low-precision states and weight gradients are not available under DEEPSPEED yet",
}


@pytest.mark.parametrize("kind", FLAT)
def test_optimizers_of_flat_shards_are_kept(kind, capsys):
    """What happens before accelerate's own prepare; both run in tests below."""
    from hf_lowprec.integrations.accelerate_prepare import before_prepare

    accelerator = Accelerator(mixed_precision="fp8-lm")
    accelerator.state.distributed_type = kind
    accelerator.state.fsdp_plugin = Namespace(fsdp_version=1)
    model = llama()
    raw = adamw(model)
    assert before_prepare(accelerator, (model, raw)) == (model, raw)
    assert len(converted(model)) == LINEARS
    assert f"AdamW kept ({FLAT[kind]})" in capsys.readouterr().err


def test_fsdp2_has_low_precision_states(capsys):
    from hf_lowprec.integrations.accelerate_prepare import before_prepare

    accelerator = Accelerator(mixed_precision="fp8-lm")
    accelerator.state.distributed_type = "FSDP"
    accelerator.state.fsdp_plugin = Namespace(fsdp_version=2)
    model = llama()
    _, optimizer = before_prepare(accelerator, (model, adamw(model)))
    assert isinstance(optimizer, hf_lowprec.optim.AdamW)
    assert "AdamW with exp_avg e4m3fn" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["XLA", "MEGATRON_LM"])
def test_engines_that_are_refused(kind):
    from hf_lowprec.integrations.accelerate_prepare import before_prepare

    accelerator = Accelerator(mixed_precision="fp8-lm")
    accelerator.state.distributed_type = kind
    with pytest.raises(ConversionError, match=f"does not run under {kind}"):
        before_prepare(accelerator, (llama(),))


# --- the launcher, in this process -----------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--mixed_precision", "--mixed-precision"])
def test_command_line(option):
    assert child_environment(parsed(option, "fp8-lm")) == ("bf16", "fp8-lm")


def test_command_line_beats_the_environment(monkeypatch):
    monkeypatch.setenv("HF_LOWPREC_RECIPE", "te-current")
    assert child_environment(parsed("--mixed_precision", "fp8-lm")) == ("bf16", "fp8-lm")


def test_environment_with_a_launcher_that_was_told_nothing(monkeypatch):
    """`accelerate launch` writes ACCELERATE_MIXED_PRECISION=no by itself; that is nobody's explicit wish."""
    monkeypatch.setenv("HF_LOWPREC_RECIPE", "te-current")
    assert child_environment(parsed()) == ("bf16", "te-current")
    assert child_environment(parsed("--mixed_precision", "fp16")) == ("fp16", "te-current")  # the script's side warns


def test_yaml(tmp_path):
    config = tmp_path / "config.yaml"
    lines = [
        "compute_environment: LOCAL_MACHINE",
        "distributed_type: 'NO'",
        "mixed_precision: fp8-lm",
        "num_processes: 1",
    ]
    config.write_text("\n".join(lines))
    assert child_environment(parsed("--config_file", str(config))) == ("bf16", "fp8-lm")
    config.write_text(config.read_text().replace("fp8-lm", "fp8-lmm"))
    with pytest.raises(RecipeError, match=r"^mixed_precision in .*config\.yaml: .*did you mean 'fp8-lm'"):
        child_environment(parsed("--config_file", str(config)))


def test_the_launcher_names_the_variable_of_a_bad_recipe(monkeypatch):
    monkeypatch.setenv("HF_LOWPREC_RECIPE", "fp8-lmm")
    with pytest.raises(RecipeError, match=r"^HF_LOWPREC_RECIPE: .*did you mean 'fp8-lm'"):
        child_environment(parsed())


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16", "fp8"])
def test_accelerates_own_precisions_launch_as_without_us(precision):
    ours = launch_environment.prepare_simple_launcher_cmd_env(parsed("--mixed_precision", precision))
    stock = launch_environment.prepare_simple_launcher_cmd_env.__wrapped__(parsed("--mixed_precision", precision))
    assert ours == stock and ours[1]["ACCELERATE_MIXED_PRECISION"] == precision
    assert "HF_LOWPREC_RECIPE" not in ours[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [("fp8-lmm", "did you mean 'fp8-lm'"), ("BF16", "invalid choice"), ("x.yaml", "exist")],
)
def test_bad_words_on_the_command_line(name, message, capsys):
    with pytest.raises(SystemExit) as end:
        parsed("--mixed_precision", name)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_tpu_is_refused():
    with pytest.raises(ValueError, match="does not train on TPUs"):
        launch_environment.prepare_tpu(Namespace(mixed_precision="fp8-lm"), {})


def test_notebook_launcher():
    seen = []

    def function() -> None:
        accelerator = Accelerator()
        seen.append((accelerator.mixed_precision, accelerator._hf_lowprec_recipe))

    accelerate.notebook_launcher(function, num_processes=1, mixed_precision="fp8-lm")
    assert seen == [("bf16", FP8_LM)]
    assert "HF_LOWPREC_RECIPE" not in os.environ
    with pytest.raises(RecipeError, match="did you mean"):
        accelerate.notebook_launcher(function, num_processes=1, mixed_precision="fp8-lmm")


@pytest.mark.parametrize("second", ["bf16", None])
@pytest.mark.parametrize("explicit", [True, False])
def test_a_notebook_launch_leaves_no_recipe_behind(second, explicit):
    """Two launches in one process, whose functions name a precision themselves or leave that to the launcher."""
    seen = []

    def function(precision: str | None) -> None:
        accelerator = Accelerator(mixed_precision=precision if explicit else None)
        model = llama()
        accelerator.prepare(model, adamw(model))
        seen.append(len(converted(model)))

    for precision in ("fp8-lm", second, "fp8-lm"):
        said = {} if precision is None else {"mixed_precision": precision}
        accelerate.notebook_launcher(function, (precision,), num_processes=1, **said)
    assert seen == [LINEARS, 0, LINEARS]


def test_a_notebook_launch_beside_an_accelerator_with_a_recipe():
    seen = []

    def function() -> None:
        seen.append(Accelerator()._hf_lowprec_recipe)

    Accelerator(mixed_precision="fp8-lm")
    for precision in ("bf16", "te-current"):
        accelerate.notebook_launcher(function, num_processes=1, mixed_precision=precision)
    accelerate.notebook_launcher(function, num_processes=1)
    assert seen == [None, PRESETS["te-current"], FP8_LM]
    assert Accelerator()._hf_lowprec_recipe == FP8_LM

    with pytest.raises(ZeroDivisionError):
        accelerate.notebook_launcher(lambda: 1 / 0, num_processes=1, mixed_precision="bf16")
    assert Accelerator()._hf_lowprec_recipe == FP8_LM
    reset = AcceleratorState._reset_state  # TrainingArguments does it
    accelerate.notebook_launcher(lambda: reset(True), num_processes=1, mixed_precision="bf16")
    assert AcceleratorState._shared_state == {}


# --- launched processes, with a script that never heard of us --------------------------------------------------------


def assert_trained(output: str, recipe: str = "fp8-lm") -> None:
    assert f"Mixed precision type: bf16 (hf_lowprec recipe: {recipe})" in output, output
    assert output.count(f"recipe {recipe}: converted 14 of 15 linears") == 1, output
    assert losses(output)[-1] < losses(output)[0] - 1.0, output


def test_accelerate_launch(tmp_path):
    cli = str(Path(sys.executable).with_name("accelerate"))
    code = f"import sys, runpy; sys.argv[0] = {cli!r}; runpy.run_path({cli!r}, run_name='__main__')"
    done = launch(tmp_path, "-c", code, "launch", "--cpu", "--mixed_precision", "fp8-lm", str(LOOP), "--steps", "25")
    assert done.returncode == 0, done.stdout
    assert_trained(done.stdout)


def test_two_processes_from_a_yaml(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nmixed_precision: fp8-lm\nnum_processes: 2\n"
        "num_machines: 1\nmachine_rank: 0\nuse_cpu: true\n"
    )
    command = ("-m", "accelerate.commands.launch", "--config_file", "config.yaml", "--main_process_port", "0")
    done = launch(tmp_path, *command, str(LOOP), "--steps", "25")
    assert done.returncode == 0, done.stdout
    assert "DistributedType.MULTI_CPU" in done.stdout
    assert_trained(done.stdout)


def test_torchrun_with_a_recipe_file(tmp_path, my_yaml):
    command = ("-m", "torch.distributed.run", "--nproc_per_node", "1", "--standalone", str(LOOP), "--steps", "25")
    done = launch(tmp_path, *command, HF_LOWPREC_RECIPE="my.yaml")
    assert done.returncode == 0, done.stdout
    assert_trained(done.stdout, "mine")


def test_run_without_the_hook(tmp_path, my_yaml):
    done = launch(
        tmp_path, "-m", "hf_lowprec.run", "--recipe", "my.yaml", str(LOOP), "--steps", "25", HF_LOWPREC_AUTOLOAD="0"
    )
    assert done.returncode == 0, done.stdout
    assert_trained(done.stdout, "mine")


FSDP = """
import os, sys, torch
from accelerate.state import DistributedType, PartialState
# accelerate shards on GPUs only; torch does so on CPUs, too
PartialState(cpu=True)
PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from tiny import llama, rows
version, folder = int(sys.argv[1]), sys.argv[2]
kind = "SHARDED_STATE_DICT" if len(sys.argv) < 4 else sys.argv[3]
plugin = FullyShardedDataParallelPlugin(
    state_dict_type=kind,
    fsdp_version=version, auto_wrap_policy="transformer_based_wrap",
    transformer_cls_names_to_wrap=["LlamaDecoderLayer"], cpu_ram_efficient_loading=False,
    use_orig_params=True if version == 1 else None,
)
accelerator = Accelerator(fsdp_plugin=plugin)
model = llama()
if version == 1:
    model = accelerator.prepare(model)
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=1e-2))
else:
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
batch = torch.stack([row["input_ids"] for row in rows(8)])
begin = 0
if os.path.exists(folder):
    begin = 3
    accelerator.load_state(folder)
for step in range(begin, 6):
    if step == 3 and not begin and version == 2:
        accelerator.save_state(folder)
    loss = model(input_ids=batch, labels=batch).loss
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"step {step} loss {loss.item():.4f}")
for state in optimizer.state_dict()["state"].values():
    state.update({k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()})
    accelerator.print("state", {k: v.double().sum().item() for k, v in state.items()})
"""


def launch_fsdp(folder, version: int, recipe: str, *words: str, processes: int = 2) -> str:
    script = folder / "script.py"
    script.write_text(f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n{FSDP}")
    command = ("-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone", str(script))
    done = launch(folder, *command, str(version), str(folder / "checkpoint"), *words, HF_LOWPREC_RECIPE=recipe)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "recipe", "said"),
    [
        (1, "fp8-lm", f"kept ({FLAT['FSDP']})"),
        (2, "te-delayed", "kept (as asked)"),
        (2, "fp8-lm", "with exp_avg e4m3fn"),
    ],
)
def test_fsdp(tmp_path, version, recipe, said):
    output = launch_fsdp(tmp_path, version, recipe)
    assert f"recipe {recipe}: converted {LINEARS} of" in output
    assert f"AdamW {said}" in output
    assert ("float32 under FSDP2" in output) == (version == 2)
    assert losses(output)[-1] < losses(output)[0] - 1.0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
@pytest.mark.parametrize("recipe", ["te-delayed", "fp8-lm", "fp8-lm-o3", "fp8-chunked"])
def test_fsdp2_saves_and_resumes(tmp_path, recipe, kind):
    """Losses and states after `load_state` in new processes are those of the run that went on."""
    first = launch_fsdp(tmp_path, 2, recipe, kind)
    second = launch_fsdp(tmp_path, 2, recipe, kind)
    assert len(losses(first)) == 6 and losses(second) == losses(first)[3:]
    states = [[line for line in output.splitlines() if line.startswith("state")] for output in (first, second)]
    assert states[0] == states[1] and len(states[0]) > LINEARS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "fp8-lmm", str(LOOP)], "did you mean 'fp8-lm'"),
        (["--recipe", "fp8-lm", "nowhere.py"], "'nowhere.py' does not exist"),
        ([str(LOOP)], "name a recipe"),
    ],
)
def test_run_refuses(words, message, capsys):
    from hf_lowprec.run import main

    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_run_names_the_variable_of_a_bad_recipe(monkeypatch, capsys):
    from hf_lowprec.run import main

    monkeypatch.setenv("HF_LOWPREC_RECIPE", "fp8-lmm")
    with pytest.raises(SystemExit):
        main([str(LOOP)])
    assert "HF_LOWPREC_RECIPE: unknown recipe 'fp8-lmm'" in capsys.readouterr().err


DEEPSPEED = """
import os, sys, torch, deepspeed
from accelerate.state import DistributedType, PartialState
# accelerate starts DeepSpeed with its own choice of backend only; gloo and CPUs do, too
os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
os.environ.pop("ACCELERATE_USE_CPU", None)
deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
PartialState(cpu=True)
PartialState._shared_state |= {"distributed_type": DistributedType.DEEPSPEED, "device": torch.device("cpu")}
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DummyOptim
from hf_lowprec.session import live_sessions
from tiny import llama, rows
in_config = sys.argv[2] == "config"  # who makes the optimizer
config = {
    "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1, "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": int(sys.argv[1])},
}
if in_config:
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
model = llama()
optimizer = (DummyOptim if in_config else torch.optim.AdamW)(model.parameters(), lr=1e-2)
model, optimizer = accelerator.prepare(model, optimizer)
batch = torch.stack([row["input_ids"] for row in rows(8)])
for step in range(6):
    loss = model(input_ids=batch, labels=batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"step {step} loss {loss.item():.4f}")
(session,) = live_sessions()
accelerator.print("closed steps:", {int((h != 0).sum(1).max()) for h in session.scaling.history.values()})
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "recipe", "maker"),
    [(1, "fp8-lm", "script"), (2, "te-delayed", "script"), (3, "fp8-lm", "script"), (3, "te-delayed", "config")],
)
def test_deepspeed(tmp_path, stage, recipe, maker):
    pytest.importorskip("deepspeed")
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n{DEEPSPEED}")
    command = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script), str(stage), maker)
    done = launch(tmp_path, *command, HF_LOWPREC_RECIPE=recipe, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stdout
    assert f"recipe {recipe}: converted {LINEARS} of" in done.stdout
    assert "(low-precision states and weight gradients are not available under DEEPSPEED yet)" in done.stdout
    assert "closed steps: {6}" in done.stdout
    assert losses(done.stdout)[-1] < losses(done.stdout)[0] - 1.0
