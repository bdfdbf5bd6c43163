# SPDX-License-Identifier: Apache-2.0
"""Low-precision states through state_dict, torch.save, pickle, deepcopy, accelerate: bit for bit, or refused whole."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from training import NAMES, bits, small

from hf_lowprec.optim import Adam, AdamW
from hf_lowprec.recipe import Quant, Residual, Scaling, States

BLOCKS = States(
    exp_avg=Quant(format="e4m3fn", scaling=Scaling(granularity="block", block=(32,), snap="rceil", store="e8m0")),
    exp_avg_sq=Quant(format="e3m4", scaling=Scaling(granularity="block", block=(32,))),
)
FP8_LM = small("fp8-lm")
SECOND = States(exp_avg_sq=Quant(format="e5m10"))  # the first moment stays float32


def built(dtype: torch.dtype = torch.bfloat16, states: str | States = FP8_LM) -> tuple[nn.Module, AdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    decay, rest = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decay}, {"params": rest, "weight_decay": 0.0}]
    return model, AdamW(groups, lr=1e-2, states=states)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(16, 40, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        (model(x) - x[:, :4]).square().mean().backward()
        optimizer.step()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    tensors = list(model.parameters())
    for state in optimizer.state_dict()["state"].values():
        tensors += [state[key] for key in sorted(state)]
    return [bits(t).clone() for t in tensors]


def pointers(optimizer: torch.optim.Optimizer) -> list[int]:
    return [value.data_ptr() for state in optimizer.state.values() for value in state.values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


CASES = [
    pytest.param(dtype, states, id=f"{str(dtype)[6:]}-{name}")
    for dtype in (torch.float32, torch.bfloat16)
    for name, states in {
        **{name: small(name) for name in (*NAMES, "#2b", "#3", "bf16-sr")},
        "blocks": BLOCKS,
        "float32 master": replace(small("8bit"), master="float32"),
        "32 bits": replace(small("8bit"), master=Residual(bits=16)),
    }.items()
]


@pytest.mark.parametrize("dtype, states", CASES)
def test_resume_from_disk_is_the_uninterrupted_run(tmp_path, dtype, states):
    model, optimizer = built(dtype, states)
    train(model, optimizer, range(5))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    train(model, optimizer, range(5, 10))

    resumed, fresh = built(dtype, states)
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(loaded["model"])
    fresh.load_state_dict(loaded["optimizer"])
    train(resumed, fresh, range(5, 10))
    assert same(everything(model, optimizer), everything(resumed, fresh))


@pytest.mark.parametrize("dtype, states", CASES)
def test_loading_its_own_state_dict_changes_no_bit(dtype, states):
    """What AcceleratedOptimizer.__init__ and Trainer's resume do; torch's own method casts the states."""
    model, optimizer = built(dtype, states)
    optimizer.load_state_dict(optimizer.state_dict())  # before the first step, as `prepare` does
    train(model, optimizer, range(3))
    before, addresses = everything(model, optimizer), pointers(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert same(everything(model, optimizer), before)
    assert pointers(optimizer) == addresses, "a copy of all states for nothing"


def test_loading_keeps_the_group_objects_that_schedulers_share():
    model, optimizer = built()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    groups, dicts = optimizer.param_groups, [id(group) for group in optimizer.param_groups]
    train(model, optimizer, range(1))
    scheduler.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is groups and [id(group) for group in groups] == dicts
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 3)


def test_two_optimizers_share_no_memory_after_loading():
    model, optimizer = built()
    train(model, optimizer, range(2))
    other_model, other = built()
    other.load_state_dict(optimizer.state_dict())
    other_model.load_state_dict(model.state_dict())
    before = everything(model, optimizer)
    train(other_model, other, range(2, 4))
    assert same(everything(model, optimizer), before)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_deepcopy_and_pickle(way):
    model, optimizer = built()
    train(model, optimizer, range(3))
    optimizer.skipped_steps += 7
    other_model, other = way((model, optimizer))
    assert other.skipped_steps.item() == 7
    train(model, optimizer, range(3, 5))
    train(other_model, other, range(3, 5))
    assert same(everything(model, optimizer), everything(other_model, other))


def test_looking_up_a_parameter_without_state_does_no_harm():
    model, optimizer = built()
    assert optimizer.state[next(model.parameters())] == {}
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(1))
    assert len(optimizer.state) == 4


def test_skipped_steps_travel():
    model, optimizer = built()
    train(model, optimizer, range(1))
    next(model.parameters()).grad.fill_(torch.nan)
    optimizer.step()
    _, other = built()
    other.load_state_dict(optimizer.state_dict())
    assert other.skipped_steps.item() == 1


# --- refused, and nothing changed ----------------------------------------------------------------------------------


def corrupt(change):
    def apply(state_dict):
        change(state_dict["state"][1])

    return apply


BROKEN = {
    "missing scale": (corrupt(lambda s: s.pop("exp_avg_scale")), "parameter 1: the checkpoint lacks exp_avg_scale"),
    "missing master": (
        corrupt(lambda s: (s.pop("master_qdata"), s.pop("master_scale"))),
        "lacks master_qdata, master_scale",
    ),
    "codes as a plain slot": (
        corrupt(lambda s: s.update(exp_avg=s.pop("exp_avg_qdata"))),
        "parameter 1: the checkpoint lacks exp_avg_qdata",
    ),
    "unknown key": (corrupt(lambda s: s.update(momentum=torch.zeros(()))), "unexpected momentum"),
    "shape": (
        corrupt(lambda s: s.update(exp_avg_qdata=s["exp_avg_qdata"][:2])),
        r"exp_avg_qdata should be .*\(4, 8\)",
    ),
    "cast dtype": (
        corrupt(lambda s: s.update(exp_avg_qdata=s["exp_avg_qdata"].bfloat16())),
        "exp_avg_qdata should be torch.float8_e4m",
    ),
    "not a tensor": (corrupt(lambda s: s.update(exp_avg_qdata=[1.0])), "exp_avg_qdata is a list"),
    "NaN scale": (corrupt(lambda s: s.update(exp_avg_scale=s["exp_avg_scale"] * torch.nan)), "finite and positive"),
    "zero scale": (corrupt(lambda s: s.update(exp_avg_sq_scale=s["exp_avg_sq_scale"] * 0)), "finite and positive"),
    "NaN code": (
        corrupt(lambda s: s.update(exp_avg_qdata=torch.full((4, 8), torch.nan).to(torch.float8_e4m3fn))),
        "exp_avg holds NaN or Inf",
    ),
    "Inf master": (corrupt(lambda s: s.update(master_qdata=s["master_qdata"] * torch.inf)), "master holds NaN or Inf"),
    "negative v": (corrupt(lambda s: s.update(exp_avg_sq_qdata=-s["exp_avg_sq_qdata"] - 1)), "negative values"),
    "step": (corrupt(lambda s: s.update(step=torch.tensor(-1.0))), "step is -1"),
    "stranger": (lambda d: d["state"].update({99: d["state"][1]}), "state for 99"),
    "groups": (lambda d: d["param_groups"].pop(), r"parameters per group: the optimizer has \[2, 2\]"),
    "no state": (lambda d: d.pop("state"), "lacks state"),
    "other states": (lambda d: [g.update(states="#2b") for g in d["param_groups"]], "states='#2b'.*has '{\"exp_avg\""),
    "other algorithm": (
        lambda d: d["param_groups"][0].update(algorithm="stable_adam"),
        "algorithm='stable_adam', this optimizer has 'adam'",
    ),
    "other master": (
        lambda d: d["param_groups"][1].update(master="fp32"),
        "master='fp32', this optimizer has 'default'",
    ),
    "overrides": (
        lambda d: d["param_groups"][0].update(overrides=[None, "fp32"]),
        "parameter 1: the checkpoint was written with states 'fp32', this optimizer has",
    ),
    "overrides of others": (lambda d: d["param_groups"][0].update(overrides=["fp32"]), "overrides: .* do not fit"),
    "predicted amax": (corrupt(lambda s: s.update(exp_avg_amax=torch.tensor(torch.nan))), "exp_avg_amax"),
    "Adam": (
        lambda d: d["param_groups"][0].update(decoupled_weight_decay=False),
        "decoupled_weight_decay=False, this optimizer has True",
    ),
    "counter": (lambda d: d.update(skipped_steps=3), "skipped_steps"),
}


@pytest.mark.parametrize("change, message", BROKEN.values(), ids=BROKEN)
def test_broken_checkpoints_are_refused_and_nothing_changes(change, message):
    model, optimizer = built()
    train(model, optimizer, range(2))
    broken = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(2, 3))
    before = everything(model, optimizer)
    for group in broken["param_groups"]:
        group["lr"] = 123.0
    change(broken)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(broken)
    assert same(everything(model, optimizer), before)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-2]


def test_a_master_for_a_float32_parameter_is_refused():
    model, optimizer = built(torch.bfloat16)
    train(model, optimizer, range(1))
    _, full = built(torch.float32)
    with pytest.raises(ValueError, match=r"unexpected master_amax, master_qdata.*16-bit Parameter"):
        full.load_state_dict(optimizer.state_dict())


def test_named_parameters_are_named_in_errors():
    model = nn.Linear(2, 2)
    optimizer = AdamW(model.named_parameters(), states=FP8_LM)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    broken = copy.deepcopy(optimizer.state_dict())
    del broken["state"][1]["exp_avg_qdata"]
    with pytest.raises(ValueError, match="state of parameter bias: the checkpoint lacks exp_avg_qdata"):
        optimizer.load_state_dict(broken)


def test_state_dict_hooks_of_others_are_honoured():
    """`convert` keeps amax histories and mu in the optimizer's state_dict this way."""
    model, optimizer = built()
    train(model, optimizer, range(1))
    seen = []
    optimizer.register_state_dict_post_hook(lambda _, state_dict: state_dict.update(extra=42))
    optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: seen.append(state_dict.pop("extra")))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("after"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [42, "after"]


# --- checkpoints of torch's own optimizers -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_checkpoints_are_converted_with_a_warning(dtype):
    model, _ = built(dtype)
    decay, rest = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim == 1]
    stock = torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=3e-3)
    train(model, stock, range(5))
    _, optimizer = built(dtype, states=small("fp8-lm-exact"))
    with pytest.warns(UserWarning, match="quantised to {.*e4m3fn"):
        optimizer.load_state_dict(stock.state_dict())
    assert optimizer.param_groups[0]["lr"] == 3e-3 and "foreach" not in optimizer.param_groups[0]
    ours, theirs = optimizer.state_dict()["state"], stock.state_dict()["state"]
    for key, mine in ours.items():
        assert mine["step"] == theirs[key]["step"] == 5
        m, v = (mine[f"{name}_qdata"].float() * mine[f"{name}_scale"] for name in ("exp_avg", "exp_avg_sq"))
        tiny = mine["exp_avg_scale"].item() / 512
        torch.testing.assert_close(m, theirs[key]["exp_avg"].float(), rtol=1 / 16, atol=tiny)
        torch.testing.assert_close(v, theirs[key]["exp_avg_sq"].float(), rtol=1e-3, atol=1e-9)
    optimizer.load_state_dict(optimizer.state_dict())


def test_torch_checkpoints_into_float32_states_are_exact_and_silent(recwarn):
    _, optimizer = built(torch.float32, "fp32")
    stock = torch.optim.AdamW(copy.deepcopy(optimizer.param_groups), lr=1e-2, foreach=False)
    twin_params = [p for g in stock.param_groups for p in g["params"]]
    params = [p for g in optimizer.param_groups for p in g["params"]]
    for step in range(4):
        for p, twin in zip(params, twin_params, strict=True):
            twin.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        stock.step()
    with torch.no_grad():
        for p, twin in zip(params, twin_params, strict=True):
            p.copy_(twin)
    optimizer.load_state_dict(stock.state_dict())
    for p, twin in zip(params, twin_params, strict=True):
        assert all(torch.equal(optimizer.state[p][k], stock.state[twin][k]) for k in ("step", "exp_avg", "exp_avg_sq"))
        p.grad = twin.grad
    stock.step()
    optimizer.step()
    for p, twin in zip(params, twin_params, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-7)
    assert not [w for w in recwarn if "quantised" in str(w.message)]


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("states, lacking", [(FP8_LM, "exp_avg"), (BLOCKS, "exp_avg"), (SECOND, "exp_avg_sq")])
def test_torch_stops_at_our_checkpoints_instead_of_reading_codes_as_moments(states, lacking, foreach):
    model, optimizer = built(torch.float32, states)
    train(model, optimizer, range(3))
    stock = torch.optim.AdamW(copy.deepcopy(optimizer.param_groups), foreach=foreach)
    stock.load_state_dict(optimizer.state_dict())
    params = [p for group in stock.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(KeyError, match=f"^'{lacking}'$"):
        stock.step()
    assert same(params, before)


def test_torch_checkpoints_that_cannot_be_converted():
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    amsgrad = torch.optim.AdamW([param], amsgrad=True)
    amsgrad.step()
    with pytest.raises(ValueError, match="amsgrad"):
        AdamW([param]).load_state_dict(amsgrad.state_dict())
    l2 = torch.optim.Adam([param])
    l2.step()
    with pytest.raises(ValueError, match="decoupled_weight_decay=False"):
        AdamW([param]).load_state_dict(l2.state_dict())
    with pytest.warns(UserWarning, match="quantised"):
        Adam([param], states=FP8_LM).load_state_dict(l2.state_dict())
    sgd = torch.optim.SGD([param], lr=0.1, momentum=0.9)
    sgd.step()
    with pytest.raises(ValueError, match="lacks exp_avg, exp_avg_sq, step"):
        AdamW([param]).load_state_dict(sgd.state_dict())


# --- accelerate ----------------------------------------------------------------------------------------------------


def test_accelerate_prepare_save_and_load_state(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = built()
    prepared_model, prepared = accelerator.prepare(model, optimizer)
    train(prepared_model, prepared, range(3))
    accelerator.save_state(str(tmp_path / "state"))
    saved = everything(prepared_model, prepared)
    train(prepared_model, prepared, range(3, 6))
    ahead = everything(prepared_model, prepared)
    assert not same(saved, ahead)
    accelerator.load_state(str(tmp_path / "state"))
    assert same(everything(prepared_model, prepared), saved)
    train(prepared_model, prepared, range(3, 6))
    assert same(everything(prepared_model, prepared), ahead)
