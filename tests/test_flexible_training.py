# SPDX-License-Identifier: Apache-2.0
"""fp8-flex in training: the numbers of a second implementation by autograd, ranges that train with every optimizer.

The reference quantises by a table of the format's values and takes gradients from torch's own autograd.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from core import assert_same_state, batch, bits_of, llama, mlp, same_bits, token_ids
from torch import Tensor, nn

import hf_lowprec
from hf_lowprec import optim
from hf_lowprec.conversion import recipe_of, session_of
from hf_lowprec.modules.flexible import Flexible
from hf_lowprec.monitor import per_layer
from hf_lowprec.numerics.flexible import format_of
from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import Recipe, RecipeError

FLEX = PRESETS["fp8-flex"]


def changed(**quant: Any) -> dict[str, Any]:
    """fp8-flex with these fields of its operands; `scaling` is merged."""
    data = copy.deepcopy(FLEX.to_dict())
    data["name"] = "mine"
    for gemm, slot in (("fprop", "input"), ("fprop", "weight"), ("dgrad", "weight"), ("wgrad", "input")):
        operand = data[gemm][slot]
        operand["scaling"].update(quant.get("scaling", {}))
        operand.update({k: v for k, v in quant.items() if k != "scaling"})
    return data


def flexible_of(module: Any) -> Flexible:
    found = module._lowprec.flexible
    assert isinstance(found, Flexible)
    return found


# --- one layer ------------------------------------------------------------------------------------------------------


def by_table(x: Tensor, maxval: Tensor, man: Tensor) -> Tensor:
    """Q(x), straight through: differentiable in x, maxval and man (which are exact: no codes change)."""
    fmt = format_of(round(float(man.detach())), 8)
    values = torch.tensor([v for v in fmt.values() if v >= 0], dtype=torch.float64)
    middles = (values[1:] + values[:-1]) / 2
    y = (x.detach().double() / (maxval.detach().double() / fmt.max)).clamp(-fmt.max, fmt.max)
    q = values[torch.bucketize(y.abs(), middles)].copysign(y) * (maxval.detach().double() / fmt.max)
    clipped = torch.where(x.abs() <= maxval, x, x.sign() * maxval)
    residue = (q - clipped.detach()).float()
    # x + residue * s(maxval, M) / s: the step s with its binade held.
    bias = torch.exp2(7 - man) - maxval.log2() + torch.log2(2 - torch.exp2(-man)) - 1
    step = torch.exp2(-man - bias)
    return clipped + residue * (step / step.detach())


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_equals_autograd_through_a_table(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24, bias=bias))
    reference = copy.deepcopy(model[0])
    hf_lowprec.convert(model, "fp8-flex")
    x, grad = 3 * batch(2, 9, 32, seed=1), batch(2, 9, 24, seed=2)
    model(x)  # finds the ranges
    flexible = flexible_of(model[0])
    with torch.no_grad():  # so that something lies outside
        flexible.input.maxval.mul_(0.4)
        flexible.weight.maxval.mul_(0.7)
    ranges = [p.detach().clone().requires_grad_() for o in flexible.operands.values() for p in (o.maxval, o.man)]
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    out = model(inputs[0])
    expected = nn.functional.linear(
        by_table(inputs[1], *ranges[:2]), by_table(reference.weight, *ranges[2:]), reference.bias
    )
    assert torch.allclose(out, expected, rtol=1e-5, atol=1e-5)
    out.backward(grad)
    expected.backward(grad)
    close = {"rtol": 1e-4, "atol": 1e-4}
    assert torch.allclose(inputs[0].grad, inputs[1].grad, **close)
    assert torch.allclose(model[0].weight.grad, reference.weight.grad, **close)
    assert not bias or torch.allclose(model[0].bias.grad, reference.bias.grad, **close)
    found = [p for o in flexible.operands.values() for p in (o.maxval, o.man)]
    for parameter, wanted in zip(found, ranges, strict=True):
        assert parameter.grad.shape == wanted.shape
        assert torch.allclose(parameter.grad, wanted.grad, rtol=1e-3, atol=1e-3 * float(wanted.grad.abs().max()))
    # Between a value and its neighbour a tie may go either way in float64 and float32; no element was lost to it.
    assert per_layer(model)["0"]["input"][1] == int((x.abs() > flexible.input.maxval).sum()) > 0


def test_saved_for_backward_is_the_input_as_it_came() -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 16))
    hf_lowprec.convert(model, "fp8-flex")
    model(batch(4, 32))
    saved: list[Tensor] = []
    keep = lambda t: saved.append(t) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        model(batch(4, 32))
    known = {p.data_ptr() for p in [*model.parameters(), *hf_lowprec.learned_parameters(model)]}
    kept = [(t.dtype, tuple(t.shape)) for t in saved if t.data_ptr() not in known]
    assert sorted(kept, key=str) == [(torch.bfloat16, (4, 48)), (torch.float32, (4, 32))]


def test_mixed_dtypes_need_autocast_and_no_tokens_are_fine() -> None:
    model = nn.Sequential(nn.Linear(32, 16))
    hf_lowprec.convert(model, "fp8-flex")
    assert model(torch.zeros(0, 32)).shape == (0, 16)
    assert not flexible_of(model[0]).input.found, "nothing to learn a range from"
    model(torch.zeros(0, 32)).sum().backward()
    with pytest.raises(RuntimeError, match=r"input is torch.bfloat16 and weight is torch.float32"):
        model(batch(4, 32).bfloat16())
    assert model(batch(3, 32)).isfinite().all() and flexible_of(model[0]).input.found


# --- conversion -----------------------------------------------------------------------------------------------------


def test_checkpoints_and_parameters_stay_those_of_the_model() -> None:
    model = llama()
    names = [n for n, _ in model.named_parameters()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hf_lowprec.convert(model, "fp8-flex")
    model(input_ids=token_ids(2, 8), labels=token_ids(2, 8)).loss.backward()
    assert [n for n, _ in model.named_parameters()] == names and model.state_dict().keys() == before.keys()
    learned = hf_lowprec.learned_parameters(model)
    assert len(learned) == 4 * 14 and all(isinstance(p, nn.Parameter) and p.requires_grad for p in learned)
    assert learned[2].shape == (32, 1) and learned[0].shape == learned[1].shape == ()
    with hf_lowprec.high_precision(model):
        assert same_bits(model(input_ids=token_ids(2, 8)).logits, llama()(input_ids=token_ids(2, 8)).logits)
    hf_lowprec.revert(model)
    assert recipe_of(model) is None and hf_lowprec.learned_parameters(model) == []
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert_same_state(model.state_dict(), before)


def test_copies_have_ranges_of_their_own() -> None:
    model = mlp()
    hf_lowprec.convert(model, "fp8-flex")
    x = batch(8, 32)
    model(x)
    twin = copy.deepcopy(model)
    assert same_bits(twin(x), model(x))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    before = bits_of(session_of(model).scaling.state_dict())
    twin(x).square().mean().backward()
    optimizer.step()
    after = bits_of(session_of(model).scaling.state_dict())
    assert all(same_bits(before[k], after[k]) for k in before if not k.endswith("counts"))
    assert not torch.equal(flexible_of(twin.up).input.maxval, flexible_of(model.up).input.maxval)


def test_a_search_recipe_says_what_it_needs() -> None:
    model = mlp()
    hf_lowprec.convert(model, changed(scaling={"method": "search"}))
    with pytest.raises(RuntimeError, match=r"never trains them; call hf_lowprec.calibrate\(model, data\)"):
        model(batch(2, 32))
    assert hf_lowprec.learned_parameters(model) == []
    with hf_lowprec.high_precision(model):
        model(batch(2, 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(format="e4m3fn"), r"format: method 'learned' takes signed formats without Inf and NaN"),
        (changed(format="e8m3none"), r"format: method 'learned' takes .* at most 7 exponent bits"),
        (changed(format="e0m12"), "3 to 12 bits, e0m12 has 13"),
        (changed(rounding={"mode": "stochastic"}), "rounds to nearest and saturates"),
        (changed(scaling={"granularity": "column"}), "granularity: a range is learned per tensor or per row"),
        (changed(scaling={"granularity": "row"}), r"fprop.input: the range of an input is one for the tensor"),
        (changed(scaling={"snap": "rceil"}), "method 'learned' finds the range itself"),
        ({**FLEX.to_dict(), "dgrad": {}}, "dgrad.weight is fprop.weight"),
        ({**FLEX.to_dict(), "base": "fp16"}, "base: method 'learned' would take the gradients"),
        ({**changed(), "fprop": {**changed()["fprop"], "weight": {"format": "e4m3fn"}}}, "does not go together"),
        ({**changed(), "saved": changed()["fprop"]["input"]}, "saved: method 'learned' is for the operands"),
        ({"name": "x", "fprop": {"input": {"format": "e4m3fn", "split": "free"}, "weight": {"format": "e4m3fn"}}},
         "split: only with method"),
    ],
)  # fmt: skip
def test_recipes_that_mean_nothing_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(change)


# --- ranges train ---------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3),
    "ours": lambda p: optim.AdamW(p, lr=1e-3, states="8bit"),
}


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[float]:
    out = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = model(batch(16, 32, seed=step)).square().mean()
        loss.backward()
        optimizer.step()
        out.append(loss.item())
    return out


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_them_and_schedulers_go_on(name: str) -> None:
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)  # before the conversion
    hf_lowprec.convert(model, "fp8-flex")
    run(model, optimizer, 1)
    scheduler.step()
    learned = hf_lowprec.learned_parameters(model)
    before = [p.detach().clone() for p in learned]
    run(model, optimizer, 1, first=1)
    # Adam's second step: every element moves by at most about lr; 10 times the (halved) rate, ranges in octaves.
    limit = 10 * 5e-4 * 1.5
    for old, new in zip(before, learned, strict=True):
        new_value = new.detach()
        change = (new_value / old).log2() if new is not learned[1] and new.shape != () else new_value - old
        assert 0 < float(change.abs().max()) < max(limit, 0.02) and new.grad is None
    assert len(optimizer.param_groups) == 1


def test_ranges_that_are_wrong_are_found_again() -> None:
    """From a range 16 times too small, by gradients alone; the weights do not move."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    exact = copy.deepcopy(model)
    hf_lowprec.convert(model, changed(split="fixed"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(batch(64, 32))
    flexible = flexible_of(model[0])
    with torch.no_grad():
        flexible.input.maxval.div_(16)
    losses = []
    for step in range(60):
        x = batch(64, 32, seed=step)
        loss = (model(x) - exact(x)).square().mean()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 1e-2
        session_of(model).ranges.step(optimizer, distributed=False)
        losses.append(loss.item())
        model.zero_grad()
    assert losses[-1] < losses[0] / 100
    assert hf_lowprec.learned_parameters(model) == [flexible.input.maxval, flexible.weight.maxval]


@pytest.mark.parametrize("lr", [1.0, None])
def test_learning_rates_that_are_not_adams(lr: float | None) -> None:
    """SGD's are too large for ranges; Adafactor's groups have none."""
    model = mlp()
    hf_lowprec.convert(model, "fp8-flex")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(batch(4, 32)).square().mean().backward()
    before = [p.detach().clone() for p in hf_lowprec.learned_parameters(model)]
    optimizer.param_groups[0]["lr"] = lr
    session_of(model).ranges.step(optimizer, distributed=False)
    most = 0.1 if lr else 0.01
    for layer in (model.up, model.down):
        for operand in flexible_of(layer).operands.values():
            old = before.pop(0)
            octaves = float((operand.maxval.detach() / old).log2().abs().max())
            assert 0.9 * most < octaves < 1.01 * most
            old = before.pop(0)
            assert 0 < float((operand.man.detach() - old).abs()) < 1.01 * most


def test_an_optimizer_of_ones_own_has_them_alone() -> None:
    model = mlp()
    hf_lowprec.convert(model, "fp8-flex")
    model(batch(4, 32))
    learned = hf_lowprec.learned_parameters(model)
    groups = [{"params": list(model.parameters())}, {"params": learned, "lr": 0.0, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    before = [p.detach().clone() for p in learned]
    run(model, optimizer, 2)
    assert all(same_bits(a, b.detach()) for a, b in zip(before, learned, strict=True)), "at its rate: zero"
    assert all(p.grad is not None for p in learned), "and its gradients are its own to clear"


def test_gradients_that_are_not_finite_move_nothing() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    hf_lowprec.convert(model, "fp8-flex")
    model(batch(4, 32))
    learned = hf_lowprec.learned_parameters(model)
    before = [p.detach().clone() for p in learned]
    (model(batch(4, 32)).sum() * float("nan")).backward()
    optimizer.param_groups[0]["lr"] = 1e-2
    session_of(model).ranges.step(optimizer, distributed=False)
    assert all(same_bits(a, b.detach()) for a, b in zip(before, learned, strict=True))
    assert session_of(model).ranges.state_dict()["exp_avg"].isfinite().all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resuming_is_bit_identical(name: str) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = mlp()
        hf_lowprec.convert(model, "fp8-flex")
        return model, hf_lowprec.attach_optimizer(model, OPTIMIZERS[name](model.parameters()))

    model, optimizer = start()
    run(model, optimizer, 2)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    expected = run(model, optimizer, 2, first=2)

    again, resumed = start()
    saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert run(again, resumed, 2, first=2) == expected
    assert_same_state(session_of(again).state_dict(), session_of(model).state_dict())

    broken = copy.deepcopy(saved["optimizer"])
    broken["hf_lowprec"]["layers"]["up"]["input"]["maxval"].fill_(float("nan"))
    with pytest.raises(ValueError, match=r"up.input.maxval is negative or not finite"):
        resumed.load_state_dict(broken)
    broken = copy.deepcopy(saved["optimizer"])
    broken["hf_lowprec"]["ranges"]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"ranges.exp_avg is missing or of another shape"):
        resumed.load_state_dict(broken)


def test_a_first_batch_of_zeros_says_nothing() -> None:
    """Nor does a row of zeros in the weight hinder the others."""
    model = mlp()
    hf_lowprec.convert(model, "fp8-flex")
    model.up.weight.data[3].zero_()
    model.norm.weight.data.zero_()
    model.norm.bias.data.zero_()
    model(batch(4, 32))
    flexible = flexible_of(model.up)
    assert not flexible.input.found and not flexible.input.maxval.any() and flexible.weight.found
    model.norm.weight.data.fill_(1.0)
    out = model(batch(4, 32))
    assert flexible.input.found and 1.0 < flexible.input.maxval.item() < 8.0 and out.isfinite().all()
    assert flexible.weight.maxval[3].isfinite() and flexible.weight.maxval[3] > 0


# --- launched -------------------------------------------------------------------------------------------------------


def test_trains_through_accelerate_and_saves_a_stock_checkpoint(tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="fp8-flex")
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    assert recipe_of(model) == FLEX
    said = session_of(model).report.optimizer
    assert said == "optimizer AdamW kept (as asked), steps the learned ranges too"
    ids = token_ids(4, 16)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    inner = accelerator.unwrap_model(model)
    inner.save_pretrained(tmp_path)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_state(stock.state_dict(), inner.state_dict())
