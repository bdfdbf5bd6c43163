# SPDX-License-Identifier: Apache-2.0
"""lowprec_liger: loss and gradients are the stock ones, and whoever reads logits gets them.

liger-kernel needs a GPU (tests/gpu/test_loss_gpu.py); here plain torch answers the same call, a few tokens at a time.
"""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny import llama, llama_config, rows, tokenizer
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import hf_lowprec
from hf_lowprec.integrations import loss as L
from hf_lowprec.integrations.switches import Switches, settle
from hf_lowprec.integrations.trainer import LowPrecTrainingArguments

IDS = torch.stack([row["input_ids"] for row in rows(4)])
LABELS = IDS.clone()
LABELS[:, :3] = -100
LABELS[1] = -100


class _Chunked(torch.autograd.Function):
    """What liger-kernel does: gradients are computed with the loss, chunk by chunk, and scaled afterwards."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore: int, reduction: str
    ):
        count = (target != ignore).sum() if reduction == "mean" else 1
        total, dx, dw = (
            torch.zeros((), dtype=torch.float32),
            torch.zeros_like(hidden),
            torch.zeros_like(weight).float(),
        )
        for part in torch.arange(len(hidden)).split(7):
            logits = nn.functional.linear(hidden[part], weight, bias).float().requires_grad_()
            with torch.enable_grad():
                loss = nn.functional.cross_entropy(logits, target[part], ignore_index=ignore, reduction="sum") / count
            g = torch.autograd.grad(loss, logits)[0].to(hidden.dtype)
            total += loss.detach()
            dx[part] = g @ weight
            dw += g.T.float() @ hidden[part].float()
        ctx.save_for_backward(dx, dw.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        dx, dw = ctx.saved_tensors
        return dx * grad, dw * grad, None, None, None, None


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    calls: list[int] = []

    def fused(
        hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *, ignore_index: int, reduction: str
    ):
        assert not torch.is_autocast_enabled("cpu") and hidden.dtype == weight.dtype
        calls.append(len(hidden))
        return _Chunked.apply(hidden, weight, bias, target, ignore_index, reduction)

    monkeypatch.setattr(L, "fused_linear_cross_entropy", fused)
    monkeypatch.setattr(L, "_runs_on", lambda _: True)
    monkeypatch.setattr(L, "installed", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("HF_LOWPREC_LIGER", raising=False)
    AcceleratorState._reset_state(True)
    yield calls
    AcceleratorState._reset_state(True)


def train_step(
    model: nn.Module, amp: bool = False, scale: float = 1.0, **kwargs: Any
) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out = model(input_ids=IDS, labels=LABELS, **kwargs)
    (out.loss * scale).backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name].double() - b[name].double()).norm() / b[name].double().norm()) for name in b)


# --- numerics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "amp"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("kwargs", [{}, {"num_items_in_batch": torch.tensor(29)}, {"num_items_in_batch": 29}])
def test_loss_and_gradients_are_the_stock_ones(
    dtype: torch.dtype, amp: bool, kwargs: dict[str, Any], stand_in: list[int]
) -> None:
    model = llama(dtype=dtype).train()
    truth = llama(dtype=dtype).double().train()
    _, exact_grads = train_step(truth, scale=0.25, **kwargs)
    stock, stock_grads = train_step(model, amp, scale=0.25, **kwargs)
    L.fuse_loss(model)
    found, grads = train_step(model, amp, scale=0.25, **kwargs)
    assert stand_in == [IDS.numel()]
    assert found.loss.dtype == stock.loss.dtype == torch.float32
    rounding = 1e-6 if dtype == torch.float32 and not amp else 2**-8
    torch.testing.assert_close(found.loss, stock.loss, rtol=2e-6, atol=0)
    assert distance(grads, stock_grads) < 4 * rounding
    assert distance(grads, exact_grads) < 1.2 * distance(stock_grads, exact_grads) + 1e-6
    assert isinstance(found.logits, L.DeferredLogits)
    L.unfuse_loss(model)
    again, again_grads = train_step(model, amp, scale=0.25, **kwargs)
    assert torch.equal(again.loss, stock.loss) and all(
        torch.equal(again_grads[n], stock_grads[n]) for n in stock_grads
    )
    assert type(model.lm_head) is nn.Linear and "_loss_function" not in model.__dict__


@pytest.mark.parametrize("keep", [0, 4])
def test_given_shifts_and_a_slice_of_the_logits(keep: int, stand_in: list[int]) -> None:
    model = llama().train()
    shifted = torch.nn.functional.pad(LABELS, (0, 1), value=-100)[..., 1:].contiguous()
    if keep:
        kwargs: dict[str, Any] = {"logits_to_keep": keep, "shift_labels": shifted[:, -keep:].contiguous()}
    else:
        kwargs = {"shift_labels": shifted}
    stock, grads = train_step(model, **kwargs)
    L.fuse_loss(model)
    found, mine = train_step(model, **kwargs)
    torch.testing.assert_close(found.loss, stock.loss, rtol=2e-6, atol=0)
    assert distance(mine, grads) < 4e-6 and stand_in == [4 * (keep or IDS.shape[1])]
    L.unfuse_loss(model)


def test_another_ignore_index(stand_in: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama().train()
    monkeypatch.setitem(globals(), "LABELS", torch.where(LABELS < 0, 5, LABELS))
    stock, grads = train_step(model, ignore_index=5)
    L.fuse_loss(model)
    found, mine = train_step(model, ignore_index=5)
    torch.testing.assert_close(found.loss, stock.loss, rtol=2e-6, atol=0)
    assert distance(mine, grads) < 4e-6 and stand_in
    L.unfuse_loss(model)


def test_tied_and_frozen_embeddings(stand_in: list[int]) -> None:
    tied = llama(tie_word_embeddings=True).train()
    _, stock = train_step(tied)
    L.fuse_loss(tied)
    assert distance(train_step(tied)[1], stock) < 4e-6
    L.unfuse_loss(tied)
    frozen = llama().train()
    frozen.lm_head.weight.requires_grad_(False)
    _, stock = train_step(frozen)
    L.fuse_loss(frozen)
    assert distance(train_step(frozen)[1], stock) < 4e-6
    L.unfuse_loss(frozen)
    assert len(stand_in) == 2


# --- whoever reads logits gets them ----------------------------------------------------------------------------------

READERS = {
    "argmax": lambda x: x.argmax(-1),
    "slice and softmax": lambda x: torch.softmax(x[..., :-1, :].float(), -1),
    "arithmetic": lambda x: 2.0 * x / 3 + x,
    "functions of lists": lambda x: torch.cat([x, x]),
    "numpy": lambda x: torch.from_numpy(x.detach().float().numpy()),
    "to": lambda x: x.to("cpu", torch.float64),
    "iteration": lambda x: next(iter(x)),
    "double": lambda x: x.double().mean(),
    "pickle": lambda x: pickle.loads(pickle.dumps(x.detach())),
    "clone": lambda x: x.clone(),
    "repr": lambda x: torch.tensor(len(repr(x))),
}


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_sees_the_stock_logits(reader: str, amp: bool) -> None:
    model = llama().train()
    expected = READERS[reader](train_step(model, amp)[0].logits)
    L.fuse_loss(model)
    model.lm_head._lowprec_loss.deferred = 100  # the reader is an exception
    logits = train_step(model, amp)[0].logits
    assert isinstance(logits, Tensor) and logits.shape == (*IDS.shape, 128) and logits.requires_grad
    found = READERS[reader](logits)
    assert type(found) is Tensor and torch.equal(found, expected)
    assert torch.equal(READERS[reader](logits), expected), "and twice"
    L.unfuse_loss(model)


def test_shape_and_dtype_cost_nothing() -> None:
    model = llama().train()
    L.fuse_loss(model)
    logits = train_step(model, amp=True)[0].logits
    assert logits.dtype == torch.bfloat16 and logits.float().dtype == logits.to(torch.float32).dtype == torch.float32
    assert logits.size(-1) == 128 and logits.dim() == logits.ndim == 3 and len(logits) == 4 and not logits.is_cuda
    assert logits.numel() == IDS.numel() * 128 and logits.device.type == "cpu" and logits.is_floating_point()
    assert logits.untouched() and logits.float().untouched()
    L.unfuse_loss(model)


def test_a_loss_of_ones_own_reaches_all_parameters() -> None:
    def own(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        logits = model(input_ids=IDS).logits
        nn.functional.cross_entropy(logits.view(-1, 128), IDS.view(-1), label_smoothing=0.1).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    model = llama().train()
    stock = own(model)
    L.fuse_loss(model)
    with pytest.warns(UserWarning, match="reads the logits"):
        mine = own(model)
    assert all(torch.equal(mine[name], stock[name]) for name in stock)
    assert not isinstance(model(input_ids=IDS).logits, L.DeferredLogits), "the stock path is back"
    L.unfuse_loss(model)


def test_logits_changed_in_place_before_the_loss_count() -> None:
    class Masking(type(llama())):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.mask = False

    def masked(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        logits[..., :10] = -30.0
        return L.causal_lm_loss(logits, labels, vocab_size, **kwargs)

    model = llama().train()
    model.loss_function = masked
    stock, grads = train_step(model)
    del model._loss_function
    L.fuse_loss(model)
    model.loss_function = masked
    with pytest.warns(UserWarning, match="reads the logits"):
        found, mine = train_step(model)
    assert torch.equal(found.loss, stock.loss) and all(torch.equal(mine[n], grads[n]) for n in grads)
    del model._loss_function
    L.unfuse_loss(model)


def test_soft_capping_comes_out_right_and_switches_itself_off(stand_in: list[int]) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, final_logit_softcapping=5.0, use_cache=False,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).train()
    stock, grads = train_step(model)
    L.fuse_loss(model)
    with pytest.warns(UserWarning, match="reads the logits"):
        found, mine = train_step(model)
    assert torch.equal(found.loss, stock.loss) and all(torch.equal(mine[n], grads[n]) for n in grads)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_step(model)
    assert not stand_in
    L.unfuse_loss(model)


def test_a_rare_reader_does_not_switch_it_off(stand_in: list[int]) -> None:
    model = llama().train()
    L.fuse_loss(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1, 13):
            logits = train_step(model)[0].logits
            if step in (6, 12):
                logits.argmax(-1)
    assert len(stand_in) == 12
    L.unfuse_loss(model)


def test_what_could_only_be_wrong_is_an_error() -> None:
    model = llama().train()
    L.fuse_loss(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    logits = train_step(model)[0].logits
    with pytest.raises(RuntimeError, match="never see a gradient"):
        logits.register_hook(print)
    with pytest.raises(RuntimeError, match="never see a gradient"):
        logits.retain_grad()
    with pytest.raises(RuntimeError, match="used in the graph"), pytest.warns(UserWarning, match="reads"):
        out = model(input_ids=IDS, labels=LABELS)
        torch.autograd.grad(out.loss, out.logits)
    optimizer.step()
    with pytest.raises(RuntimeError, match="after the optimizer's step"):
        logits.argmax(-1)
    L.unfuse_loss(model)


# --- when it applies -------------------------------------------------------------------------------------------------


def test_evaluation_generation_and_no_grad_are_stock(stand_in: list[int]) -> None:
    model = llama().train()
    L.fuse_loss(model)
    with torch.no_grad():
        assert type(model(input_ids=IDS, labels=LABELS).logits) is Tensor
    model.eval()
    assert type(model(input_ids=IDS, labels=LABELS).logits) is Tensor
    model.generate(IDS[:1, :4], max_new_tokens=3, do_sample=False)
    assert not stand_in
    model.train()
    model.lm_head.register_forward_hook(lambda *_: None)  # it would see no values
    assert type(model(input_ids=IDS, labels=LABELS).logits) is Tensor
    L.unfuse_loss(model)


def test_fp16_is_left_alone(stand_in: list[int]) -> None:
    head = L.DeferringHead(8, 16)
    head._lowprec_loss = L.LossState()
    assert type(head(torch.randn(2, 8, requires_grad=True))) is L.DeferredLogits
    half = head.half()
    assert type(half(torch.randn(2, 8, dtype=torch.float16, requires_grad=True))) is Tensor


def test_compiled_models_keep_the_stock_loss(stand_in: list[int]) -> None:
    model = llama(num_hidden_layers=1).train()
    L.fuse_loss(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    out = compiled(input_ids=IDS, labels=LABELS)
    out.loss.backward()
    assert type(out.logits) is Tensor and not stand_in and model.lm_head.weight.grad is not None
    L.unfuse_loss(model)


def test_copies_and_pickles_of_a_fused_model_work(stand_in: list[int]) -> None:
    model = llama().train()
    L.fuse_loss(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(train_step(twin)[0].logits, L.DeferredLogits)
        assert twin.lm_head._lowprec_loss is not model.lm_head._lowprec_loss
    assert set(model.state_dict()) == set(llama().state_dict())
    L.unfuse_loss(model)


def test_the_count_of_optimizer_steps_ends_with_the_models(no_sessions: None) -> None:
    model = llama()
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    L.fuse_loss(model)
    optimizer.step()
    assert L._counting
    del model
    gc.collect()
    assert not L._counting or L._fused


def test_models_are_recognised_by_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                            num_attention_heads=4)).train()  # fmt: skip
    stock, grads = train_step(neox)
    assert L.fuse_loss(neox) == L.fuse_loss(neox) == L.FUSED
    found, mine = train_step(neox)
    torch.testing.assert_close(found.loss, stock.loss, rtol=2e-6, atol=0)
    assert distance(mine, grads) < 1e-5
    L.unfuse_loss(neox)
    with pytest.raises(ValueError, match="no output embedding"):
        L.fuse_loss(LlamaForSequenceClassification(llama_config(num_labels=2)))
    other = llama()
    other.loss_function = nn.functional.cross_entropy
    with pytest.raises(ValueError, match="cross_entropy, not ForCausalLMLoss"):
        L.fuse_loss(other)
    monkeypatch.setattr(L, "installed", lambda: False)
    with pytest.raises(ImportError, match=r"hf-lowprec\[gpu\]"):
        L.fuse_loss(llama())


# --- through the integrations ----------------------------------------------------------------------------------------


def test_settled_by_argument_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def report(**said: Any) -> str | None:
        model = llama()
        found = hf_lowprec.convert(model, "te-current")
        settle(model, Switches(**said), torch.device("cpu"))
        settle(model, Switches(**said), torch.device("cpu"))
        loss = found.loss
        assert (loss is None) == (type(model.lm_head) is nn.Linear) and (loss is None or loss in found.summary())
        hf_lowprec.revert(model)
        assert type(model.lm_head) is nn.Linear and "_loss_function" not in model.__dict__
        return loss

    assert report() is None and report(liger=True) == L.FUSED
    monkeypatch.setenv("HF_LOWPREC_LIGER", "1")
    assert report() == L.FUSED and report(liger=False) is None
    monkeypatch.setenv("HF_LOWPREC_LIGER", "yes")
    with pytest.raises(ValueError, match="0 or 1"):
        report()


def test_accelerate_casts_the_outputs_without_computing_them(
    stand_in: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_LOWPREC_LIGER", "1")
    accelerator = Accelerator(mixed_precision="te-current")
    model = llama().train()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    losses = []
    for _ in range(5):
        out = model(input_ids=IDS, labels=LABELS)
        accelerator.backward(out.loss)
        assert out.logits.dtype == torch.float32 and out.logits.untouched()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(out.loss))
    assert losses[-1] < losses[0] and len(stand_in) == 5


def test_trainer_argument(tmp_path: Any, stand_in: list[int]) -> None:
    def run(**kwargs: Any) -> tuple[list[float], Trainer]:
        AcceleratorState._reset_state(True)
        arguments = LowPrecTrainingArguments(
            tmp_path, lowprec="te-current", max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", learning_rate=1e-3, **kwargs,
        )  # fmt: skip
        trainer = Trainer(
            llama(), arguments, train_dataset=rows(32), eval_dataset=rows(4, seed=1),
            compute_metrics=lambda p: {"right": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        )  # fmt: skip
        trainer.train()
        assert "eval_right" in trainer.evaluate()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer

    stock, _ = run()
    assert not stand_in
    fused, trainer = run(lowprec_liger=True)
    assert len(stand_in) == 8 and isinstance(trainer.model.lm_head, L.DeferringHead)
    assert fused == pytest.approx(stock, rel=1e-3)
    with pytest.warns(UserWarning, match="reads the logits"):  # label smoothing is the Trainer's own loss, of logits
        smooth, _ = run(lowprec_liger=True, label_smoothing_factor=0.1)
    assert smooth == pytest.approx(run(label_smoothing_factor=0.1)[0], rel=1e-3)
    assert len(stand_in) == 8


def test_an_argument_that_nothing_reads_is_an_error(tmp_path: Any) -> None:
    arguments = LowPrecTrainingArguments(
        tmp_path, lowprec_liger=True, max_steps=1, report_to=[], use_cpu=True, save_strategy="no"
    )
    with pytest.raises(RuntimeError, match="comes with a recipe"):
        Trainer(llama(), arguments, train_dataset=rows(8)).train()


def test_trl_computes_its_metrics_by_a_fused_head_of_its_own(tmp_path: Any) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from hf_lowprec.integrations.trl import LowPrecSFTConfig

    data = datasets.Dataset.from_dict({"text": ["one two three", "four five six"] * 4})
    metrics = []
    for liger in (False, True):
        AcceleratorState._reset_state(True)
        arguments = LowPrecSFTConfig(
            tmp_path, lowprec="te-current", lowprec_liger=liger, max_steps=2, report_to=[], use_cpu=True,
            max_length=32, per_device_train_batch_size=2, logging_steps=1, save_strategy="no",
        )  # fmt: skip
        trainer = trl.SFTTrainer(llama(), arguments, train_dataset=data, processing_class=tokenizer())
        trainer.train()
        metrics += [[(e["loss"], e["entropy"], e["mean_token_accuracy"]) for e in trainer.state.log_history[:2]]]
        assert isinstance(trainer.model.lm_head, L.DeferringHead) == liger
    for stock, fused in zip(*metrics, strict=True):
        assert fused == pytest.approx(stock, rel=2e-3)


def test_plain_arguments_know_nothing_of_it(tmp_path: Any) -> None:
    assert not hasattr(TrainingArguments(tmp_path), "lowprec_liger")
