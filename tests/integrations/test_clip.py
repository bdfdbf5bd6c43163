# SPDX-License-Identifier: Apache-2.0
"""`Accelerator.clip_grad_norm_` through our optimizers' steps, beside torch's own way (HF_LOWPREC_CLIP=0)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny import llama, rows
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_lowprec import LowPrecTrainingArguments, _autoload, optim

_autoload.activate()
pytestmark = pytest.mark.usefixtures("fresh_accelerate")
BATCH = torch.stack([row["input_ids"] for row in rows(8)])


def prepared(dtype: torch.dtype = torch.float32, states: str = "8bit", **options: Any) -> Any:
    accelerator = Accelerator(**options)
    model = llama(dtype=dtype)
    model, optimizer = accelerator.prepare(model, optim.AdamW(model.parameters(), lr=1e-2, states=states))
    return accelerator, model, optimizer


def train(accelerator: Any, model: Any, optimizer: Any, steps: int = 4, max_norm: float = 0.5) -> list[float]:
    norms = []
    for _ in range(steps):
        accelerator.backward(model(input_ids=BATCH, labels=BATCH).loss)
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), max_norm)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def bits_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def backward(accelerator: Any, model: Any) -> list[torch.Tensor]:
    accelerator.backward(model(input_ids=BATCH, labels=BATCH).loss)
    return [p.grad.clone() for p in model.parameters()]


def untouched(model: nn.Module, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"mixed_precision": "fp8-lm"}, {"mixed_precision": "bf16"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_training_as_torchs(monkeypatch: Any, dtype: torch.dtype, options: dict[str, str]) -> None:
    """Up to rounding: of the norm in float32; of the factor and of every clipped gradient in bfloat16, in torch's; and
    of the gradients' E4M3 under fp8-lm, whose binades begin elsewhere when they are clipped before."""
    ours, theirs = prepared(dtype, "fp32", **options), prepared(dtype, "fp32", **options)
    start = bits_of(ours[1])
    assert torch.equal(start, bits_of(theirs[1]))
    norms = train(*ours, steps=1)
    assert ours[2].optimizer.skipped_steps == 0
    monkeypatch.setenv("HF_LOWPREC_CLIP", "0")
    expected = train(*theirs, steps=1)
    assert norms == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-2)
    assert norms[0] > 0.5, "there is something to clip"
    moved, moved_by_torch = bits_of(ours[1]) - start, bits_of(theirs[1]) - start
    if dtype == torch.float32:
        # Adam's first step divides g by |g|: where g is nearly eps, its last bits count.
        rtol = 2.0**-3 if "fp8-lm" in options.values() else 1e-3
        torch.testing.assert_close(moved, moved_by_torch, rtol=rtol, atol=1e-6)
    else:
        assert (moved != moved_by_torch).float().mean() < 0.1 and moved.any()


def test_gradients_stay_as_they_are_until_the_step() -> None:
    accelerator, model, optimizer = prepared()
    before = backward(accelerator, model)
    norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)
    assert norm.shape == () and norm.dtype == torch.float32 and untouched(model, before)
    optimizer.optimizer.apply_clip()
    total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert float(total) == pytest.approx(0.1, rel=1e-4)


def test_parameters_without_gradients_and_frozen_ones_do_not_matter() -> None:
    accelerator = Accelerator()
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    held = [p for p in model.parameters() if p.requires_grad]
    unused = nn.Parameter(torch.ones(3))
    model, optimizer = accelerator.prepare(model, optim.AdamW([*held, unused]))
    accelerator.backward(model(input_ids=BATCH, labels=BATCH).loss)
    before = held[0].grad.clone()
    accelerator.clip_grad_norm_(model.parameters(), 0.1)
    assert torch.equal(held[0].grad, before)
    optimizer.step()


def by_switch(accelerator: Any, model: Any, patch: Any) -> Any:
    patch.setenv("HF_LOWPREC_CLIP", "0")
    return accelerator.clip_grad_norm_(model.parameters(), 0.1)


def another_norm(accelerator: Any, model: Any, patch: Any) -> Any:
    return accelerator.clip_grad_norm_(model.parameters(), 0.1, norm_type=1)


def some_of_them(accelerator: Any, model: Any, patch: Any) -> Any:
    return accelerator.clip_grad_norm_(list(model.parameters())[1:], 0.1)


def more_than_it_has(accelerator: Any, model: Any, patch: Any) -> Any:
    other = nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    return accelerator.clip_grad_norm_([*model.parameters(), other], 0.1)


def accumulating(accelerator: Any, model: Any, patch: Any) -> Any:
    accelerator.gradient_state._set_sync_gradients(False)
    try:
        return accelerator.clip_grad_norm_(model.parameters(), 0.1)
    finally:
        accelerator.gradient_state._set_sync_gradients(True)


def with_a_loss_scale(accelerator: Any, model: Any, patch: Any) -> Any:
    patch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu"))
    return accelerator.clip_grad_norm_(model.parameters(), 0.1)


def under_fsdp(accelerator: Any, model: Any, patch: Any) -> Any:
    with patch.context() as within:
        within.setattr(type(accelerator), "distributed_type", "FSDP")
        within.setattr(accelerator, "_models", [])
        return accelerator.clip_grad_norm_(model.parameters(), 0.1)


def one_given_twice(accelerator: Any, model: Any, patch: Any) -> Any:
    return accelerator.clip_grad_norm_([*model.parameters(), model.lm_head.weight], 0.1)


CASES = [by_switch, another_norm, some_of_them, more_than_it_has, accumulating, with_a_loss_scale, under_fsdp,
         one_given_twice]  # fmt: skip


@pytest.mark.parametrize("waits", [False, True], ids=["", "after a clip"])
@pytest.mark.parametrize("clip", CASES, ids=lambda clip: clip.__name__)
def test_left_to_torch(monkeypatch: Any, clip: Any, waits: bool) -> None:
    """In place, now; a clip that waits for the step comes first."""
    accelerator, model, optimizer = prepared()
    before = backward(accelerator, model)
    if waits:
        accelerator.clip_grad_norm_(model.parameters(), 0.2)
    clip(accelerator, model, monkeypatch)
    grad = list(model.parameters())[1].grad
    assert optimizer.optimizer._waiting is None and not torch.equal(grad, before[1])
    optimizer.step()


def test_of_two_optimizers_each_has_its_own() -> None:
    accelerator = Accelerator()
    first, second = llama(0), llama(1)
    made = [optim.AdamW(m.parameters()) for m in (first, second)]
    first, second, *optimizers = accelerator.prepare(first, second, *made)
    for model in (first, second):
        backward(accelerator, model)
    accelerator.clip_grad_norm_(first.parameters(), 0.1)
    assert made[0]._waiting is not None and made[1]._waiting is None
    accelerator.clip_grad_norm_([*first.parameters(), *second.parameters()], 0.05)
    assert made[0]._waiting is None and made[1]._waiting is None
    total = torch.nn.utils.get_total_norm([p.grad for m in (first, second) for p in m.parameters()])
    assert float(total) == pytest.approx(0.05, rel=1e-3)
    for optimizer in optimizers:
        optimizer.step()


def test_a_clip_by_value_after_one_by_the_norm() -> None:
    accelerator, model, optimizer = prepared()
    backward(accelerator, model)
    accelerator.clip_grad_norm_(model.parameters(), 0.1)
    accelerator.clip_grad_value_(model.parameters(), 1e-4)
    assert max(float(p.grad.abs().max()) for p in model.parameters()) == pytest.approx(1e-4)
    optimizer.step()


def test_a_bad_switch_is_an_error(monkeypatch: Any) -> None:
    accelerator, model, _ = prepared()
    backward(accelerator, model)
    monkeypatch.setenv("HF_LOWPREC_CLIP", "yes")
    with pytest.raises(ValueError, match="HF_LOWPREC_CLIP='yes': 0 or 1"):
        accelerator.clip_grad_norm_(model.parameters(), 1.0)


def test_with_learning_rates_per_weight_the_step_looks_itself() -> None:
    """The optimizer has other groups inside of its step: tables would be made anew twice a step."""
    trained = prepared(mixed_precision="unit-scaling")
    assert trained[2].optimizer.regroups
    norms = train(*trained, max_norm=1e-3)
    assert all(norm > 1e-3 for norm in norms) and trained[2].optimizer.skipped_steps == 0


def test_torchs_optimizers_are_left_alone() -> None:
    accelerator, model = Accelerator(), llama()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    before = backward(accelerator, model)
    accelerator.clip_grad_norm_(model.parameters(), 0.1)
    assert not untouched(model, before)
    optimizer.step()


# --- the Trainer ----------------------------------------------------------------------------------------------------


class _Watch(TrainerCallback):
    def __init__(self) -> None:
        self.waited: list[bool] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)
        self.waited.append(inner._waiting is not None)


def trained(tmp_path: Path, **changes: Any) -> tuple[Trainer, _Watch]:
    watch = _Watch()
    args = LowPrecTrainingArguments(
        output_dir=str(tmp_path / "out"), use_cpu=True, max_steps=4, per_device_train_batch_size=4, logging_steps=1,
        learning_rate=1e-3, save_strategy="no", report_to="none", disable_tqdm=True, lowprec_optim="fp32", **changes,
    )  # fmt: skip
    trainer = Trainer(llama(), args, train_dataset=rows(), callbacks=[watch])
    trainer.train()
    return trainer, watch


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 3}, {"max_grad_norm": 0.0}], ids=str)
def test_the_trainers_log_says_the_same(monkeypatch: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    logs, weights = [], []
    for switch in ("1", "0"):
        monkeypatch.setenv("HF_LOWPREC_CLIP", switch)
        trainer, watch = trained(tmp_path, **changes)
        assert watch.waited == [switch == "1"] * 4
        logs.append([(e["grad_norm"], e["loss"]) for e in trainer.state.log_history if "grad_norm" in e])
        weights.append(bits_of(trainer.model))
    assert len(logs[0]) == 4
    for ours, theirs in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)
