# SPDX-License-Identifier: Apache-2.0
"""BitNet and SwitchBack in transformers: equal to its own BitNet layers, and trainable through every way in."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny import LINEARS, converted, llama, rows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer
from transformers.integrations.bitnet import AutoBitLinear

import hf_lowprec
from hf_lowprec import LowPrecConfig, LowPrecTrainingArguments, _autoload
from hf_lowprec.optim import AdamW, StableAdamW
from hf_lowprec.optim.overrides import resolve
from hf_lowprec.stepping import attach_optimizer

_autoload.activate()
NAMES = ["bitnet", "bitnet-b1.58", "switchback", "switchback-m", "switchback-q"]
RATES = {"bitnet": 2e-2}  # latent weights have to move before their signs do


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# --- transformers' AutoBitLinear, online -----------------------------------------------------------------------------


def both(module: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = module(x)
    out.backward(grad.to(out.dtype))
    return [out.detach(), x.grad, *(p.grad for p in module.parameters())]


def pair(k: int, n: int, bias: bool, dtype: torch.dtype, scale: float) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(k + n)
    theirs = AutoBitLinear(k, n, bias=bias, online_quant=True, dtype=dtype)
    with torch.no_grad():
        theirs.weight.mul_(scale)
    ours = nn.Linear(k, n, bias=bias, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    model = nn.Sequential(ours)
    hf_lowprec.convert(model, "bitnet-b1.58")
    return theirs, model


SIZES = [(32, 48), (160, 96), (5, 7), (512, 256), (1536, 64)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_equals_autobitlinear(size: tuple[int, int], bias: bool) -> None:
    """Output and every gradient, difference 0, in float32."""
    k, n = size
    for shape, scale in itertools.product([(9,), (2, 9), (3, 4, 5)], [1.0, 1e-5, 30.0]):
        theirs, ours = pair(k, n, bias, torch.float32, scale)
        x, grad = 3 * torch.randn(*shape, k), torch.randn(*shape, n)
        x.view(-1, k)[0] = 0.0
        x.view(-1, k)[1] *= 1e-7  # below the floor of the scale
        with torch.compiler.set_stance("force_eager"):
            expected = both(theirs, x, grad)
        for name, a, b in zip(("out", "input", "weight", "bias"), both(ours, x, grad), expected, strict=False):
            assert torch.equal(a, b), (name, shape, scale, float((a - b).abs().max()))


@pytest.mark.slow
def test_equals_autobitlinear_as_it_compiles_itself() -> None:
    """Its quantisers are compiled, and the compiler may sum the weights in another order: half an ulp of a mean."""
    theirs, ours = pair(64, 48, True, torch.float32, 1.0)
    x, grad = torch.randn(7, 64), torch.randn(7, 48)
    for a, b in zip(both(ours, x, grad), both(theirs, x, grad), strict=True):
        assert torch.allclose(a, b, rtol=2.0**-20, atol=2.0**-20 * float(b.abs().max()))


@pytest.mark.parametrize("autocast", [True, False])
def test_autobitlinear_in_bfloat16(autocast: bool) -> None:
    """It rounds the quantised operands and the output to bfloat16, we the output alone: 3 roundings of 2^-9 apart."""
    dtype = torch.float32 if autocast else torch.bfloat16
    theirs, ours = pair(160, 96, False, dtype, 1.0)
    x, grad = torch.randn(33, 160, dtype=dtype), torch.randn(33, 96, dtype=dtype)
    with torch.compiler.set_stance("force_eager"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = both(ours, x, grad)
        try:
            expected = both(theirs, x, grad)
        except RuntimeError as error:  # 5.17 multiplies bfloat16 inputs with float32 weights
            if autocast or "same dtype" not in str(error):
                raise
            pytest.skip(f"this transformers' AutoBitLinear does not run in bfloat16: {error}")
    w = theirs.weight.detach().float()
    size = x.float().abs().sum(-1, keepdim=True) * w.abs().mean()  # of the products of a sum, at most
    assert bool(((got[0].float() - expected[0].float()).abs() <= 2.0**-8 * size).all())
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert a.dtype == b.dtype and float((a.float() - b.float()).norm()) <= 2.0**-7 * float(b.float().norm())


# --- every way in ----------------------------------------------------------------------------------------------------


def arguments(folder: Any, name: str, **changes: Any) -> LowPrecTrainingArguments:
    options: dict[str, Any] = dict(
        output_dir=str(folder), use_cpu=True, max_steps=8, per_device_train_batch_size=8, logging_steps=1,
        learning_rate=RATES.get(name, 1e-2), lr_scheduler_type="constant", save_strategy="no", report_to="none",
        disable_tqdm=True, lowprec=name,
    )  # fmt: skip
    return LowPrecTrainingArguments(**{**options, **changes})


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def inner(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)


@pytest.mark.parametrize("name", NAMES)
def test_trainer_argument_and_resume(name: str, tmp_path: Any) -> None:
    """A tiny Llama learns to count; stopped half-way and resumed, it ends with the same bits."""
    trainer = Trainer(llama(), arguments(tmp_path, name, save_strategy="steps", save_steps=4), train_dataset=rows())
    trainer.train()
    whole = losses(trainer)
    assert len(converted(trainer.model)) == LINEARS and whole[-1] < 0.9 * whole[0], whole
    wanted = StableAdamW if name.startswith("switchback") else torch.optim.AdamW
    assert type(inner(trainer.optimizer)) is wanted
    again = Trainer(llama(), arguments(tmp_path, name), train_dataset=rows())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(again)[-4:] == whole[-4:]
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], value), key
    assert {float(state["step"]) for state in inner(again.optimizer).state.values()} == {8.0}


@pytest.mark.parametrize("name", NAMES)
def test_accelerate(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    accelerator = Accelerator(mixed_precision=name, cpu=True)
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATES.get(name, 1e-2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    said = capsys.readouterr().err
    assert f"recipe {name}: converted {LINEARS} of {LINEARS + 1} linears" in said and "emulated GEMMs" in said
    assert ("StableAdamW in place of AdamW" in said) is name.startswith("switchback")
    ids = torch.stack([row["input_ids"] for row in rows()])
    seen = []
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        seen.append(float(loss))
    assert seen[-1] < 0.9 * seen[0]


@pytest.mark.parametrize("name", NAMES)
def test_from_pretrained_and_generate(name: str, tmp_path: Any) -> None:
    llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=LowPrecConfig(name)).eval()
    assert len(converted(model)) == LINEARS
    ids = torch.arange(3, 19)[None]
    plain = llama().eval()
    assert not torch.equal(model(ids).logits, plain(ids).logits)
    with hf_lowprec.high_precision(model):
        assert torch.equal(model(ids).logits, plain(ids).logits), "input norms and all"
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=2)
    out = model.generate(ids, **options)
    assert out.shape == (1, 21)
    if name != "bitnet":  # a token's codes are its own: cache or no cache, the same tokens
        assert torch.equal(out, model.generate(ids, use_cache=False, **options))
    model.save_pretrained(tmp_path / "saved")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for key, value in plain.state_dict().items():
        assert torch.equal(stock.state_dict()[key], value), key


# --- what surrounds a model -----------------------------------------------------------------------------------------


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_recomputes_the_same(name: str) -> None:
    ids = torch.stack([row["input_ids"] for row in rows(4)])
    model = llama()
    hf_lowprec.convert(model, name)
    expected = gradients(model, ids)
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        got = gradients(model, ids)
        assert got.keys() == expected.keys()
        for key, value in got.items():
            assert torch.equal(value, expected[key]), (key, reentrant)
        model.gradient_checkpointing_disable()


@pytest.mark.parametrize("name", NAMES)
def test_adapters_on_a_converted_base(name: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    hf_lowprec.convert(model, name)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = attach_optimizer(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2))
    assert isinstance(optimizer, StableAdamW) is name.startswith("switchback")
    ids = torch.stack([row["input_ids"] for row in rows(16)])
    seen = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        seen.append(float(loss))
    assert seen[-1] < seen[0] - 0.1, seen
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_revert(name: str) -> None:
    ids = torch.stack([row["input_ids"] for row in rows(2)])
    model = llama()
    hf_lowprec.convert(model, name)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, model(ids).logits)
    hf_lowprec.revert(model)
    assert torch.equal(model(ids).logits, llama()(ids).logits) and not converted(model)


# --- lowprec_optim ---------------------------------------------------------------------------------------------------


def test_lowprec_optim_by_the_name_of_a_recipe(tmp_path: Any) -> None:
    args = arguments(tmp_path, "switchback", lowprec_optim="switchback", max_steps=2)
    trainer = Trainer(llama(), args, train_dataset=rows())
    trainer.train()
    assert type(inner(trainer.optimizer)) is StableAdamW
    args = arguments(tmp_path, "switchback", lowprec_optim="stable_adamw:8bit", max_steps=2)
    trainer = Trainer(llama(), args, train_dataset=rows())
    trainer.train()
    assert type(inner(trainer.optimizer)) is StableAdamW
    assert resolve(inner(trainer.optimizer).param_groups[0]["states"], None, 10**6).exp_avg.format == "dynamic8"
    args = arguments(tmp_path, "switchback", lowprec_optim="8bit", max_steps=2)
    trainer = Trainer(llama(), args, train_dataset=rows())
    trainer.train()
    assert type(inner(trainer.optimizer)) is AdamW, "an optimizer that the arguments name is the user's choice"
    with pytest.raises(ValueError, match="these states are those of stable-adamw"):
        arguments(tmp_path, "switchback", lowprec_optim="adam:switchback")
