# SPDX-License-Identifier: Apache-2.0
"""A recipe's loss scale under accelerate and the Trainer; update rules that come with a recipe, by every way in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradScalerKwargs
from tiny import llama, rows
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_lowprec
from hf_lowprec import ConversionError, LowPrecCallback, LowPrecConfig, LowPrecTrainingArguments, _autoload, optim
from hf_lowprec.integrations.accelerate_scaler import scale_loss
from hf_lowprec.loss_scaling import StaticGradScaler
from hf_lowprec.numerics import round_to_format
from hf_lowprec.optim import states as st
from hf_lowprec.presets import PRESETS
from hf_lowprec.presets.narrow import HFP8_STATES, WANG_STATES
from hf_lowprec.recipe import LossScale, Recipe
from hf_lowprec.session import session_of

_autoload.activate()
STATIC = LossScale(method="static", init=1000.0)
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def recipe_file(folder: Path, recipe: Recipe) -> str:
    path = folder / f"{recipe.name}.yaml"
    path.write_text(recipe.to_yaml())
    return str(path)


def mine(**fields: Any) -> Recipe:
    return Recipe(name="mine", **fields)


def prepared(recipe: str, **options: Any) -> tuple[Accelerator, nn.Module, Any]:
    accelerator = Accelerator(mixed_precision=recipe, **options)
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return accelerator, *accelerator.prepare(model, optimizer)


def train(accelerator: Accelerator, model: nn.Module, optimizer: Any, steps: int, clip: float | None = None) -> Any:
    batch = torch.stack([row["input_ids"] for row in rows(4)])
    norms = []
    for _ in range(steps):
        accelerator.backward(model(input_ids=batch, labels=batch).loss)
        if clip is not None:
            norms.append(accelerator.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def vector(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


# --- accelerate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["no", "bf16", "fp16"])
def test_clipping_sees_unscaled_gradients(tmp_path, base):
    results = []
    for number, policy in enumerate((LossScale(), STATIC)):
        AcceleratorState._reset_state(True)
        # On a CPU accelerate takes fp16 for float32, whose gradients have to be unscaled all the same.
        here = "no" if base == "fp16" and policy == LossScale() else base
        recipe = recipe_file(tmp_path, Recipe(name=f"mine{number}", base=here, loss_scale=policy))
        accelerator, model, optimizer = prepared(recipe)
        assert (accelerator.scaler is None) == (policy == LossScale())
        norms = train(accelerator, model, optimizer, 3, clip=0.5)
        results.append((norms, vector(model)))
    assert all(norm > 0.5 for norm in results[0][0]), "they are clipped"
    torch.testing.assert_close(results[1][0], results[0][0], rtol=2e-2 if base == "bf16" else 1e-4, atol=0)
    assert (results[1][1] - results[0][1]).abs().mean() < 1e-4


def test_a_dynamic_scale_for_fp16_is_at_work_on_a_cpu_too(tmp_path):
    """accelerate's own is not, and the report must not say that it were."""
    dynamic = LossScale(method="dynamic")
    accelerator, model, optimizer = prepared(recipe_file(tmp_path, mine(base="fp16", loss_scale=dynamic)))
    assert accelerator.scaler.get_scale() == 65536.0
    assert "loss scale dynamic 65536" in session_of(model).report.summary()
    assert train(accelerator, model, optimizer, 1, clip=0.5)[0] < 100


def test_without_clipping_it_is_unscaled_too(tmp_path):
    accelerator, model, optimizer = prepared(recipe_file(tmp_path, mine(base="no", loss_scale=STATIC)))
    seen = []
    optimizer.optimizer.register_step_pre_hook(
        lambda o, a, k: seen.append(max(p.grad.abs().max().item() for p in o.param_groups[0]["params"]))
    )
    train(accelerator, model, optimizer, 2)
    assert len(seen) == 2 and 0 < max(seen) < 10
    assert "loss scale static 1000" in session_of(model).report.summary()


def test_a_dynamic_scale_backs_off_and_the_step_is_skipped(tmp_path):
    policy = LossScale(method="dynamic", init=2.0**126, growth_interval=2)
    accelerator, model, optimizer = prepared(recipe_file(tmp_path, mine(base="no", loss_scale=policy)))
    skipped, scales = [], []
    for _ in range(12):
        before = vector(model)
        scales.append(accelerator.scaler.get_scale())
        train(accelerator, model, optimizer, 1)
        skipped.append(accelerator.optimizer_step_was_skipped)
        assert torch.equal(before, vector(model)) == skipped[-1]
    assert skipped[0] and not all(skipped)
    scale, clean = 2.0**126, 0
    for was_skipped, seen in zip(skipped, scales, strict=True):
        assert seen == scale
        clean = 0 if was_skipped else clean + 1
        if was_skipped:
            scale *= 0.5
        elif clean == 2:
            scale, clean = scale * 2, 0


def test_save_and_load_state(tmp_path):
    policy = LossScale(method="dynamic", init=8.0, growth_interval=2)
    recipe = recipe_file(tmp_path, mine(base="no", loss_scale=policy))
    accelerator, model, optimizer = prepared(recipe)
    train(accelerator, model, optimizer, 3)
    assert accelerator.scaler.get_scale() == 16
    saved = accelerator.scaler.state_dict()
    accelerator.save_state(str(tmp_path / "state"))
    train(accelerator, model, optimizer, 3)
    AcceleratorState._reset_state(True)
    again, resumed, other = prepared(recipe)
    again.load_state(str(tmp_path / "state"))
    assert again.scaler.state_dict() == saved
    train(again, resumed, other, 3)
    assert torch.equal(vector(model), vector(resumed))
    assert again.scaler.state_dict() == accelerator.scaler.state_dict()


def test_contradictions_are_refused(tmp_path):
    recipe = recipe_file(tmp_path, mine(base="no", loss_scale=STATIC))
    with pytest.raises(ConversionError, match="the script passes GradScalerKwargs: drop one of them"):
        prepared(recipe, kwargs_handlers=[GradScalerKwargs(init_scale=2.0)])
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(mixed_precision=recipe)
    model = llama()
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters()))
    with pytest.raises(ConversionError, match="prepare the model before or with its optimizer"):
        accelerator.prepare(model)
    assert optimizer.scaler is None
    AcceleratorState._reset_state(True)
    accelerator, model, _ = prepared(recipe)
    with pytest.raises(ConversionError, match=r"this Accelerator has LossScale\(method='static', init=1000.0"):
        scale_loss(accelerator, model, mine(loss_scale=LossScale(method="static", init=8.0)), "NO")
    scale_loss(accelerator, model, mine(loss_scale=STATIC), "NO")


def test_float16_parameters_are_refused(tmp_path):
    accelerator = Accelerator(mixed_precision=recipe_file(tmp_path, mine(base="no", loss_scale=STATIC)))
    with pytest.raises(ValueError, match="is float16: a loss scale needs gradients in a wider range"):
        accelerator.prepare(llama(dtype=torch.float16))


def test_float16_models_in_evaluation_mode_are_taken_and_not_trained(tmp_path):
    """A model to evaluate comes without an optimizer, as one to train may; torch refuses what would train it."""
    accelerator = Accelerator(mixed_precision=recipe_file(tmp_path, mine(base="no", loss_scale=STATIC)), cpu=True)
    model = accelerator.prepare(llama(dtype=torch.float16).eval())
    ids = torch.arange(16).reshape(2, 8)
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.isfinite()
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters()))
    accelerator.backward(model(input_ids=ids, labels=ids).loss)
    with pytest.raises(ValueError, match="FP16 gradients"):
        optimizer.step()


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_engines_with_loss_scales_of_their_own_are_refused(tmp_path, engine):
    accelerator, model = Accelerator(), llama()
    with pytest.raises(ConversionError, match=f"its static loss scale is not available under {engine}"):
        scale_loss(accelerator, model, mine(loss_scale=STATIC), engine)
    assert accelerator.scaler is None


# --- Trainer --------------------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    def __init__(self) -> None:
        self.norms: list[float] = []
        self.scaler: Any = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "grad_norm" in logs:
            self.norms.append(float(logs["grad_norm"]))


def trainer(folder: Path, recipe: str | Recipe | None, steps: int = 4, **options: Any) -> tuple[Trainer, Watch]:
    common: dict[str, Any] = dict(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, logging_steps=1, report_to=[],
        disable_tqdm=True, use_cpu=True, learning_rate=1e-3, seed=0, save_strategy="no",
    )  # fmt: skip
    common.update(options)
    watch = Watch()
    if isinstance(recipe, Recipe):
        args: Any = TrainingArguments(**common, bf16=recipe.base == "bf16")
        callbacks = [LowPrecCallback(recipe), watch]
    else:
        args, callbacks = LowPrecTrainingArguments(**common, lowprec=recipe), [watch]
    return Trainer(model=llama(), args=args, train_dataset=rows(64), callbacks=callbacks), watch


@pytest.mark.parametrize("way", ["argument", "callback"])
def test_trainer_clips_unscaled_gradients(tmp_path, way):
    norms = []
    for number, policy in enumerate((LossScale(), STATIC)):
        AcceleratorState._reset_state(True)
        recipe = Recipe(name=f"mine{number}", base="no", loss_scale=policy)
        one, watch = trainer(tmp_path, recipe if way == "callback" else recipe_file(tmp_path, recipe))
        one.train()
        assert isinstance(one.accelerator.scaler, StaticGradScaler) == (policy == STATIC)
        norms.append(watch.norms)
    assert len(norms[0]) == 4
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-3, atol=0)


def test_trainer_resumes_its_scale(tmp_path):
    recipe = recipe_file(
        tmp_path, mine(base="no", loss_scale=LossScale(method="dynamic", init=8.0, growth_interval=2))
    )
    whole, _ = trainer(tmp_path / "a", recipe, 5, save_strategy="steps", save_steps=3)
    whole.train()
    assert whole.accelerator.scaler.get_scale() == 32
    scales = [entry["lowprec/loss_scale"] for entry in whole.state.log_history if "loss" in entry]
    assert scales == [8, 16, 16, 32, 32]
    AcceleratorState._reset_state(True)
    second, _ = trainer(tmp_path / "b", recipe, 5)
    second.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert second.accelerator.scaler.state_dict() == whole.accelerator.scaler.state_dict()
    assert torch.equal(vector(second.model), vector(whole.model))


# --- update rules that a recipe brings -------------------------------------------------------------------------------

SGD: Any = dict(lr=0.1, momentum=0.9, weight_decay=1e-3)
WANG = mine(base="no", states=WANG_STATES, loss_scale=STATIC)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_scripts_own_optimizer_follows_the_papers_rule(tmp_path, kind):
    accelerator = Accelerator(mixed_precision=recipe_file(tmp_path, WANG))
    model = llama()
    own = kind(model.parameters(), **(SGD if kind is torch.optim.SGD else {"lr": 1e-3}))
    scheduler = torch.optim.lr_scheduler.LambdaLR(own, lambda step: 0.5**step)
    model, optimizer, scheduler = accelerator.prepare(model, own, scheduler)
    ours = optimizer.optimizer
    assert type(ours) is (optim.SGD if kind is torch.optim.SGD else optim.AdamW)
    assert ours.param_groups is own.param_groups
    train(accelerator, model, optimizer, 3)
    scheduler.step()
    assert ours.param_groups[0]["lr"] == 0.5 * (0.1 if kind is torch.optim.SGD else 1e-3)
    for p in model.parameters():
        assert torch.equal(p.detach(), round_to_format(p.detach(), "e6m9"))
    assert "AXPYs rounded stochastically to e6m9" in session_of(model).report.summary()


def test_an_sgd_that_has_stepped_is_taken_over_with_its_momentum():
    params = [nn.Parameter(torch.randn(64, 65)) for _ in range(2)]
    own = torch.optim.SGD(params, **SGD)
    for p in params:
        p.grad = torch.randn_like(p)
    own.step()
    momentum = [own.state[p]["momentum_buffer"].clone() for p in params]
    ours = optim.SGD.adopt(own, WANG_STATES)
    for p, m in zip(params, momentum, strict=True):
        item = ours._plan_now().of(p)
        kept = st.read(item.state, "momentum_buffer", item.slots["momentum_buffer"], torch.float32, p.shape)
        assert torch.equal(kept, round_to_format(m, "e6m9")) and item.state["step"] == 1
    plain = torch.optim.SGD([nn.Parameter(torch.randn(3))], lr=0.1)
    plain.param_groups[0]["params"][0].grad = torch.ones(3)
    plain.step()
    assert optim.SGD.adopt(plain, "bf16-sr").param_groups is plain.param_groups
    with pytest.raises(TypeError, match=r"takes a torch\.optim\.SGD"):
        optim.SGD.adopt(torch.optim.AdamW(params), "fp32")


def sr_models(way: str, kind: type[torch.optim.Optimizer], folder: Path) -> tuple[nn.Module, Any]:
    """A bfloat16 model and its optimizer under recipe bf16-sr, by four ways in."""
    options = {"lr": 1e-5} | ({"weight_decay": 0.0} if kind is torch.optim.AdamW else {})
    if way == "config":
        path = folder / "saved"
        llama(dtype=torch.bfloat16).save_pretrained(path)
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, quantization_config=LowPrecConfig("bf16-sr")
        )
    else:
        model = llama(dtype=torch.bfloat16)
    optimizer = kind(model.parameters(), **options)
    if way == "plain":
        hf_lowprec.convert(model, "bf16-sr")
        return model, hf_lowprec.attach_optimizer(model, optimizer)
    accelerator = Accelerator(mixed_precision="bf16-sr" if way == "accelerate" else "bf16")
    return accelerator.prepare(model, optimizer)


@pytest.mark.parametrize(
    ("way", "kind"),
    [("plain", torch.optim.SGD), ("accelerate", torch.optim.AdamW), ("accelerate", torch.optim.SGD),
     ("config", torch.optim.AdamW)],
)  # fmt: skip
def test_bf16_sr_rounds_stochastically_by_every_way_in(tmp_path, way, kind):
    model, optimizer = sr_models(way, kind, tmp_path)
    inner = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(inner, optim.LowPrecOptimizer)
    assert "weights rounded stochastically" in session_of(model).report.summary()
    weight = dict(model.named_parameters())["model.layers.0.mlp.up_proj.weight"]
    before = weight.detach().float().clone()
    for _ in range(60):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    moved = (before - weight.detach().float()).mean().item()
    assert abs(moved / (60 * 1e-5) - 1) < 0.1, "nearest rounding would leave most of them where they are"


def test_bf16_sr_through_the_trainer(tmp_path):
    one = Trainer(
        model=llama(dtype=torch.bfloat16), train_dataset=rows(16),
        args=LowPrecTrainingArguments(
            output_dir=str(tmp_path), max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no",
            lowprec="bf16-sr",
        ),
    )  # fmt: skip
    one.train()
    inner = one.optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    assert isinstance(inner, optim.AdamW) and inner.defaults["states"] == "bf16-sr"


def test_bf16_sr_says_that_float32_weights_are_not_rounded():
    model = llama()
    hf_lowprec.convert(model, "bf16-sr")
    hf_lowprec.attach_optimizer(model, torch.optim.AdamW(model.parameters()))
    assert "load the model in bfloat16" in session_of(model).report.summary()


@pytest.mark.parametrize(
    ("states", "dtype"),
    [(PRESETS["fp8-lm-o3"].states, torch.float32), (PRESETS["fp8-lm-o3"].states, torch.bfloat16),
     (HFP8_STATES, torch.bfloat16)],
    ids=["o3-float32", "o3-bfloat16", "hfp8"],
)  # fmt: skip
def test_only_weights_of_quantised_gemms_are_in_fp8(states, dtype, tmp_path):
    base = PRESETS["fp8-lm"].to_dict()
    recipe = Recipe.from_dict({**base, "name": "mine", "states": mine(states=states).to_dict()["states"]})
    accelerator = Accelerator(mixed_precision=recipe_file(tmp_path, recipe))
    model = llama(dtype=dtype)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    train(accelerator, model, optimizer, 2)
    inside = {id(w) for w in session_of(model).weights().values()}
    assert inside and states.weight is not None
    for name, p in model.named_parameters():
        on_grid = torch.equal(st.on_grid(p.detach().float(), states.weight), p.detach().float())
        assert on_grid == (id(p) in inside) or p.detach().unique().numel() < 8, name
        assert ("round_off_qdata" in optimizer.optimizer.state[p]) == (states is HFP8_STATES and id(p) in inside)
    assert f"GEMM weights {states.weight.format}" in session_of(model).report.summary()


@pytest.mark.parametrize("rule", ["o3", "wang"])
def test_state_of_update_rules_is_resumed_bit_for_bit(tmp_path, rule):
    o3 = Recipe.from_dict({**PRESETS["fp8-lm-o3"].to_dict(), "name": "mine"})
    recipe = recipe_file(tmp_path, WANG if rule == "wang" else o3)
    accelerator, model, optimizer = prepared(recipe)
    train(accelerator, model, optimizer, 2)
    accelerator.save_state(str(tmp_path / "state"))
    train(accelerator, model, optimizer, 2)
    AcceleratorState._reset_state(True)
    again, resumed, other = prepared(recipe)
    again.load_state(str(tmp_path / "state"))
    train(again, resumed, other, 2)
    assert torch.equal(vector(model), vector(resumed))


@pytest.mark.parametrize(("name", "kind"), [("hfp8", "AdamW"), ("fp8-chunked", "SGD"), ("fp8-chunked", "AdamW")])
def test_one_word_brings_a_papers_sums_update_and_loss_scale(name, kind):
    accelerator = Accelerator(mixed_precision=name)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 64, bias=False))
    options = SGD if kind == "SGD" else {"lr": 1e-2}
    model, optimizer = accelerator.prepare(model, getattr(torch.optim, kind)(model.parameters(), **options))
    assert isinstance(accelerator.scaler, StaticGradScaler) == (name == "fp8-chunked")
    assert accelerator.scaler.get_scale() == (1000 if name == "fp8-chunked" else 65536)
    x, losses = torch.randn(32, 64), []
    for _ in range(25):
        loss = (model(x).float() - x).square().mean() * (100 if kind == "SGD" else 1)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0] and not accelerator.optimizer_step_was_skipped
    fmt = "e6m9" if name == "fp8-chunked" else "e4m3b11fnuz"
    for p in model.parameters():
        assert torch.equal(p.detach(), round_to_format(p.detach(), fmt))
    assert type(optimizer.optimizer) is getattr(optim, kind)
