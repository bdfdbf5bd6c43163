# SPDX-License-Identifier: Apache-2.0
"""Gradient release: the same training with fewer gradients alive; whatever needs all gradients raises."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hf_lowprec
from hf_lowprec import optim
from hf_lowprec.conversion import session_of
from hf_lowprec.optim.freed import FreedGradient
from hf_lowprec.optim.plan import Plan
from hf_lowprec.optim.release import release_gradients

ALTERNATIVE = "StableAdamW"
MAKE: dict[str, Callable[..., Any]] = {
    "adamw-8bit": lambda p: optim.AdamW(p, lr=1e-2, states="8bit", nonfinite="element"),
    "stable-8bit": lambda p: optim.StableAdamW(p, lr=1e-2, states="8bit", nonfinite="element"),
    "lion-fp32": lambda p: optim.Lion(p, lr=1e-3, states="fp32", nonfinite="element"),
    "sgd-bf16": lambda p: optim.SGD(p, lr=1e-2, momentum=0.9, states="bf16", nonfinite="element"),
}


def mlp(layers: int = 3, width: int = 80, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))).to(dtype)


def backward(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    first: Any = next(model.parameters())
    x = torch.randn(4, first.shape[1], generator=torch.Generator().manual_seed(seed)).to(first)
    (model(x).float().square().mean() * scale).backward()


def train(model: nn.Module, optimizer: Any, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def assert_same(a: Any, b: Any) -> None:
    """Two optimizers over equal models: parameters and states bit for bit."""
    pairs = zip(a._parameters(), b._parameters(), strict=True)
    for p, q in pairs:
        assert torch.equal(p, q)
        assert a.state[p].keys() == b.state[q].keys()
        for key, value in a.state[p].items():
            assert torch.equal(value, b.state[q][key]), key
    for name in ("skipped_steps", "skipped_elements"):
        assert torch.equal(getattr(a, name), getattr(b, name))


def assert_equal_trees(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_trees(a[key], b[key])
    else:
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


# --- the same training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MAKE)
def test_same_as_without(name: str, dtype: torch.dtype) -> None:
    plain, released = mlp(dtype=dtype), mlp(dtype=dtype)
    a, b = MAKE[name](plain.parameters()), MAKE[name](released.parameters())
    release_gradients(b)
    train(plain, a, 4)
    train(released, b, 4)
    assert_same(a, b)
    assert all(state["step"] == 4 for state in b.state.values())


def test_hooks_and_schedulers_run_as_before() -> None:
    plain, released = mlp(), mlp()
    optimizers = [MAKE["adamw-8bit"](m.parameters()) for m in (plain, released)]
    release_gradients(optimizers[1])
    calls: list[int] = []
    optimizers[1].register_step_post_hook(lambda *_: calls.append(1))
    for model, optimizer in zip((plain, released), optimizers, strict=True):
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(3):
            backward(model, step)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    assert len(calls) == 3
    assert_same(*optimizers)


def test_resume_in_the_middle() -> None:
    whole, model = mlp(), mlp()
    a, b = MAKE["adamw-8bit"](whole.parameters()), MAKE["adamw-8bit"](model.parameters())
    release_gradients(a)
    release_gradients(b)
    train(whole, a, 4)
    train(model, b, 2)
    again = mlp()
    again.load_state_dict(model.state_dict())
    c = MAKE["adamw-8bit"](again.parameters())
    release_gradients(c)
    c.load_state_dict(b.state_dict())
    train(again, c, 2, first=2)
    assert_same(a, c)


def test_non_finite_elements_are_skipped_and_counted() -> None:
    model = mlp(1)
    weight: Any = model[0].weight
    optimizer = MAKE["adamw-8bit"](model.parameters())
    release_gradients(optimizer)
    train(model, optimizer, 1)
    before = weight.detach().clone()
    weight.register_hook(lambda grad: grad.index_put((torch.tensor(3), torch.tensor(5)), grad.new_tensor(torch.inf)))
    train(model, optimizer, 1, first=1)
    unchanged = weight == before
    assert unchanged[3, 5] and unchanged.sum() == 1 and optimizer.skipped_elements == 1


def test_a_recipe_quantises_what_it_would_have_quantised() -> None:
    """fp8-lm's weight gradients pass through E4M3 with mu, whether in step() or in backward."""
    plain, released = mlp(), mlp()
    optimizers = []
    for model in (plain, released):
        hf_lowprec.convert(model, "fp8-lm")
        optimizers.append(hf_lowprec.attach_optimizer(model, MAKE["adamw-8bit"](model.parameters())))
    release_gradients(optimizers[1])
    train(plain, optimizers[0], 4)
    train(released, optimizers[1], 4)
    assert_same(*optimizers)
    a, b = (session_of(model).state_dict() for model in (plain, released))
    assert all(torch.equal(a["gradients"][key], b["gradients"][key]) for key in a["gradients"])
    assert a["gradients"]["count"].tolist() == [4, 4, 4]
    assert_equal_trees(a["layers"], b["layers"])


def test_new_groups_are_followed() -> None:
    model, more = mlp(), mlp()
    optimizer = MAKE["adamw-8bit"](model.parameters())
    release_gradients(optimizer)
    optimizer.add_param_group({"params": list(more.parameters())})
    both = nn.Sequential(model, more)
    backward(both, 0)
    assert isinstance(model[0].weight.grad, FreedGradient) and isinstance(more[0].weight.grad, Tensor)
    optimizer.step()  # the new group's in step, this once
    assert all(state["step"] == 1 for state in optimizer.state.values()) and len(optimizer.state) == 12
    optimizer.zero_grad()
    backward(both, 1)
    assert isinstance(more[0].weight.grad, FreedGradient)


# --- memory ---------------------------------------------------------------------------------------------------------


def live_gradients(model: nn.Module) -> int:
    grads = [p.grad for p in model.parameters() if p.grad is not None and not isinstance(p.grad, FreedGradient)]
    return sum(grad.untyped_storage().nbytes() for grad in grads)


@pytest.mark.parametrize("released", [True, False])
def test_gradients_alive_at_once(released: bool) -> None:
    """Bytes of the gradients that exist whenever one has just been made: one layer's, or the model's."""
    model = mlp(layers=8)
    optimizer = MAKE["adamw-8bit"](model.parameters())
    peak = 0

    def look(param: Tensor) -> None:
        nonlocal peak
        peak = max(peak, live_gradients(model))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(look)  # before those of the release
    if released:
        release_gradients(optimizer)
    backward(model, 0)
    layer = 4 * (80 * 80 + 80)
    assert peak == (4 * 80 * 80 if released else 8 * layer)
    assert live_gradients(model) == (0 if released else 8 * layer)


@pytest.mark.gpu
def test_peak_memory_on_the_gpu() -> None:
    """The allocator's peak of backward falls by the gradients of all layers but one."""
    peaks = {}
    for released in (False, True):
        model = mlp(layers=16, width=2048, dtype=torch.bfloat16).cuda()
        optimizer = MAKE["adamw-8bit"](model.parameters())
        if released:
            release_gradients(optimizer)
        train(model, optimizer, 1)  # states exist, kernels are compiled
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        train(model, optimizer, 1, first=1)
        torch.cuda.synchronize()
        peaks[released] = torch.cuda.max_memory_allocated() - before
        del model, optimizer
        gc.collect()
        torch.cuda.empty_cache()
    layer = 2 * 2048 * 2048
    assert peaks[False] > 16 * layer and peaks[True] < 4 * layer


@pytest.mark.gpu
def test_same_as_without_on_the_gpu() -> None:
    plain, released = mlp(dtype=torch.bfloat16).cuda(), mlp(dtype=torch.bfloat16).cuda()
    a, b = MAKE["adamw-8bit"](plain.parameters()), MAKE["adamw-8bit"](released.parameters())
    release_gradients(b)
    train(plain, a, 4)
    train(released, b, 4)
    assert_same(a, b)


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.fixture
def released() -> tuple[nn.Module, Any]:
    model = mlp()
    optimizer = MAKE["adamw-8bit"](model.parameters())
    release_gradients(optimizer)
    return model, optimizer


def test_other_optimizers() -> None:
    with pytest.raises(TypeError, match=r"optimizer of hf_lowprec\.optim, not a AdamW"):
        release_gradients(torch.optim.AdamW(mlp().parameters()))  # type: ignore[arg-type]


def test_a_step_cannot_be_taken_back() -> None:
    with pytest.raises(
        ValueError, match=r"nonfinite='step' skips a step .* build the optimizer with nonfinite='element'"
    ):
        release_gradients(optim.AdamW(mlp().parameters()))


def test_twice(released: tuple[nn.Module, Any]) -> None:
    with pytest.raises(ValueError, match="released already"):
        release_gradients(released[1])


@pytest.mark.parametrize("zero_grad", [True, False])
def test_accumulation(released: tuple[nn.Module, Any], zero_grad: bool) -> None:
    model, optimizer = released
    backward(model, 0)
    before = [p.detach().clone() for p in model.parameters()]
    if zero_grad:
        optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="gradient accumulation"):
        backward(model, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("clip", ["norm", "value", "factor"])
def test_clipping(released: tuple[nn.Module, Any], clip: str) -> None:
    model, _ = released
    backward(model, 0)
    functions: dict[str, Callable[[], object]] = {
        "norm": lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        "value": lambda: nn.utils.clip_grad_value_(model.parameters(), 1.0),
        "factor": lambda: optim.clip_factor(model.parameters(), 1.0),
    }
    with pytest.raises(RuntimeError, match=f"used in backward and freed.*{ALTERNATIVE}"):
        functions[clip]()


def test_clip_as_an_argument_and_closures(released: tuple[nn.Module, Any]) -> None:
    model, optimizer = released
    with pytest.raises(RuntimeError, match=f"step\\(\\) with clip.*{ALTERNATIVE}"):
        optimizer.step(clip=torch.ones(()))
    with pytest.raises(RuntimeError, match=r"step\(\) with a closure"):
        optimizer.step(lambda: backward(model, 0))


def test_grad_scaler(released: tuple[nn.Module, Any]) -> None:
    model, optimizer = released
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(torch.randn(2, 80)).sum()).backward()
    with pytest.raises(RuntimeError, match=r"used in backward and freed.*GradScaler"):
        scaler.step(optimizer)


def test_flat_shards() -> None:
    optimizer = MAKE["adamw-8bit"](mlp().parameters())
    next(optimizer._parameters())._is_flat_param = True
    with pytest.raises(ValueError, match="sharded parameters"):
        release_gradients(optimizer)


@pytest.fixture
def gloo(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp2(gloo: None) -> None:
    model = fully_shard(mlp(), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="sharded parameters"):
        release_gradients(MAKE["adamw-8bit"](model.parameters()))


def test_ddp_of_one_process(gloo: None, released: tuple[nn.Module, Any]) -> None:
    """Its reducer reads the gradients after us."""
    with pytest.raises(RuntimeError, match=r"used in backward and freed.*DDP"):
        backward(nn.parallel.DistributedDataParallel(released[0]), 0)


@pytest.mark.parametrize("when", ["before", "after"])
def test_several_processes(gloo: None, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    optimizer = MAKE["adamw-8bit"](model.parameters())
    if when == "after":
        release_gradients(optimizer)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="gradient release in 2 processes: DDP and FSDP"):
        if when == "before":
            release_gradients(optimizer)
        else:
            backward(model, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# --- the end --------------------------------------------------------------------------------------------------------


def test_remove() -> None:
    plain, model = mlp(), mlp()
    a, b = MAKE["adamw-8bit"](plain.parameters()), MAKE["adamw-8bit"](model.parameters())
    handle = release_gradients(b)
    train(plain, a, 2)
    train(model, b, 2)
    handle.remove()
    backward(model, 2)
    assert live_gradients(model) > 0
    b.zero_grad()
    train(plain, a, 2, first=2)
    train(model, b, 2, first=2)
    assert_same(a, b)
    release_gradients(b)


def test_an_optimizer_that_is_gone_updates_nothing() -> None:
    model = mlp()
    optimizer = MAKE["adamw-8bit"](model.parameters())
    release_gradients(optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert live_gradients(model) > 0


# --- the Trainer ----------------------------------------------------------------------------------------------------


def trainer(tmp_path: Path, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")

    class Release(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
            release_gradients(optimizer)

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    arguments = dict(
        output_dir=str(tmp_path), use_cpu=True, max_steps=3, report_to="none", disable_tqdm=True, logging_steps=1,
        save_strategy="no", max_grad_norm=0.0, per_device_train_batch_size=2,
    )  # fmt: skip
    args = transformers.TrainingArguments(**{**arguments, **changes})
    ids = torch.arange(64).view(4, 16)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return transformers.Trainer(
        transformers.LlamaForCausalLM(config), args, train_dataset=rows, callbacks=[Release()],
        optimizer_cls_and_kwargs=(optim.AdamW, {"lr": 1e-2, "states": "8bit", "nonfinite": "element"}),
    )  # fmt: skip


def test_in_the_trainer(tmp_path: Path) -> None:
    used = trainer(tmp_path)
    before = next(used.model.parameters()).detach().clone()
    used.train()
    assert not torch.equal(before, next(used.model.parameters()))
    assert all(state["step"] == 3 for state in used.optimizer.optimizer.state.values())


@pytest.mark.parametrize("changes", [{"max_grad_norm": 1.0}, {"gradient_accumulation_steps": 2}], ids=str)
def test_in_a_trainer_that_needs_the_gradients(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="release"):
        trainer(tmp_path, **changes).train()


# --- host time ------------------------------------------------------------------------------------------------------


def test_the_plan_is_looked_through_once_per_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """With thousands of Parameters, a look at all of them for each is more than the step."""
    calls: list[int] = []
    current, note_states = Plan.current, Plan.note_states
    monkeypatch.setattr(Plan, "current", lambda *args: calls.append(1) or current(*args))
    noted: list[int] = []

    def counted(self: Plan, optimizer: Any, new: Any) -> None:
        before = self._keys
        note_states(self, optimizer, new)
        assert self._keys is before, "it was made anew"
        noted.append(len(new))

    monkeypatch.setattr(Plan, "note_states", counted)
    model = mlp(layers=10)
    optimizer = MAKE["adamw-8bit"](model.parameters())
    release_gradients(optimizer)
    for step in range(2):
        calls.clear()
        backward(model, step)
        assert len(calls) == (0 if step == 0 else 1), "the first backward makes the plan"
        optimizer.step()
        optimizer.zero_grad()
    assert noted == [1] * 20
