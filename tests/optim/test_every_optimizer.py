# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, copies and foreign states of every optimizer: bit for bit, or refused whole."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from training import MAKE, NAMES, bits, held, parameters, same, set_gradients, small, snapshot, weights

from hf_lowprec.optim import SGD, Adam, AdamW, Lion, StableAdamW
from hf_lowprec.recipe import States

SHAPES = [(64, 65), (7, 13), (4097,), ()]
DTYPES = [torch.float32, torch.bfloat16]


def built(name: str, dtype: torch.dtype, states: str | States, **options: Any):
    params = parameters(SHAPES, dtype)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 3e-3}]
    return params, MAKE[name](groups, **{"lr": 1e-2, "weight_decay": 0.0, "states": states, **options})


def run(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("states", NAMES)
@pytest.mark.parametrize("name", MAKE)
def test_resume_is_the_uninterrupted_run(tmp_path, name, states, dtype):
    params, optimizer = built(name, dtype, states)
    optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does, before the first step
    run(params, optimizer, range(3))
    torch.save({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    pickled = pickle.dumps((params, optimizer))
    copied = copy.deepcopy((params, optimizer))
    run(params, optimizer, range(3, 6))

    resumed, fresh = built(name, dtype, states)
    loaded = torch.load(tmp_path / "saved.pt", weights_only=True)
    with torch.no_grad():
        for p, value in zip(resumed, loaded["params"], strict=True):
            p.copy_(value)
    fresh.load_state_dict(loaded["optimizer"])
    for others, other in ((resumed, fresh), pickle.loads(pickled), copied):
        run(others, other, range(3, 6))
        assert torch.equal(bits(weights(params)), bits(weights(others)))
        assert same(snapshot(optimizer), snapshot(other))


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("other", MAKE)
def test_a_checkpoint_of_another_algorithm_is_refused(name, other):
    params, optimizer = built(name, torch.float32, "8bit")
    run(params, optimizer, range(1))
    taker_params, taker = built(other, torch.float32, "8bit")
    run(taker_params, taker, range(2))
    before = snapshot(taker)
    if name == other:
        taker.load_state_dict(optimizer.state_dict())
        return
    decay = {name, other} == {"Adam", "AdamW"}
    with pytest.raises(
        ValueError, match="written with decoupled_weight_decay" if decay else "written with algorithm="
    ):
        taker.load_state_dict(optimizer.state_dict())
    assert same(before, snapshot(taker))


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("missing", ["qdata", "scale"])
def test_a_damaged_checkpoint_names_the_parameter(name, missing):
    params, optimizer = built(name, torch.float32, "8bit")
    run(params, optimizer, range(1))
    moment = optimizer.moments(optimizer.param_groups[0])[0]
    broken = copy.deepcopy(optimizer.state_dict())
    del broken["state"][0][f"{moment}_{missing}"]
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"state of parameter 0: the checkpoint lacks {moment}_{missing}"):
        optimizer.load_state_dict(broken)
    broken = copy.deepcopy(optimizer.state_dict())
    broken["state"][2][f"{moment}_scale"][3] = torch.nan
    with pytest.raises(ValueError, match=f"state of parameter 2: {moment}_scale"):
        optimizer.load_state_dict(broken)
    assert same(before, snapshot(optimizer))


def test_other_states_are_refused_by_name():
    params, optimizer = built("Lion", torch.bfloat16, "8bit")
    run(params, optimizer, range(1))
    with pytest.raises(ValueError, match="states='8bit', this optimizer has 'fp8'"):
        built("Lion", torch.bfloat16, "fp8")[1].load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="master='default', this optimizer has 'fp32'"):
        built("Lion", torch.bfloat16, "8bit", master="fp32")[1].load_state_dict(optimizer.state_dict())


# --- torch's own states ---------------------------------------------------------------------------------------------

STOCK = [
    (AdamW, torch.optim.AdamW, {}),
    (Adam, torch.optim.Adam, {}),
    (SGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
]


@pytest.mark.parametrize("cls, stock, options", STOCK, ids=lambda x: getattr(x, "__name__", ""))
def test_torchs_states_go_on_exactly_in_float32(cls, stock, options):
    params = parameters(SHAPES)
    theirs = stock(params, lr=1e-3, foreach=False, **options)
    run(params, theirs, range(3))
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    ours = cls(twins, lr=1.0, states="fp32")
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 1e-3 and ours.param_groups[0].get("momentum") == options.get("momentum")
    run(params, theirs, range(3, 8))
    run(twins, ours, range(3, 8))
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(twin, p, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("cls, stock, options", STOCK, ids=lambda x: getattr(x, "__name__", ""))
def test_torchs_states_are_quantised_with_a_warning(cls, stock, options):
    params = parameters(SHAPES)
    theirs = stock(params, lr=1e-3, **options)
    run(params, theirs, range(3))
    ours = cls(params, states=small("8bit"))
    with pytest.warns(UserWarning, match="quantised to"):
        ours.load_state_dict(theirs.state_dict())
    for p in params:
        for slot in ours.moments(ours.param_groups[0]):
            expected = theirs.state[p][slot]
            value = held(ours, p, slot)
            torch.testing.assert_close(value, expected, rtol=0.06, atol=1e-6 + 0.01 * expected.abs().max().item())


def test_states_without_a_counterpart_here_or_there():
    params = parameters(SHAPES)
    adamw, sgd = torch.optim.AdamW(params), torch.optim.SGD(params, lr=0.1)
    run(params, adamw, range(1))
    for cls in (StableAdamW, Lion):
        with pytest.raises(ValueError, match=f"not written by hf_lowprec.optim.{cls.__name__}"):
            cls(params).load_state_dict(adamw.state_dict())
    with pytest.raises(ValueError, match=r"unexpected exp_avg, exp_avg_sq|lacks momentum_buffer"):
        SGD(params, momentum=0.9).load_state_dict(adamw.state_dict())
    run(params, sgd, range(1))
    ours = SGD(params, lr=1.0)
    ours.load_state_dict(sgd.state_dict())
    assert ours.param_groups[0]["lr"] == 0.1 and all(set(s) == {"step"} for s in ours.state.values())


# --- SGD's momentum, on and off -------------------------------------------------------------------------------------


def test_momentum_switched_on_and_off():
    params = parameters(SHAPES)
    optimizer = SGD(params, lr=1e-3, states="8bit")
    run(params, optimizer, range(2))
    assert all(set(state) == {"step"} for state in optimizer.state.values())
    optimizer.param_groups[0]["momentum"] = 0.9
    run(params, optimizer, range(2, 4))
    assert set(optimizer.state[params[0]]) == {"step", "momentum_buffer_qdata", "momentum_buffer_scale"}
    kept = snapshot(optimizer)
    optimizer.param_groups[0]["momentum"] = 0.0
    before = weights(params)
    run(params, optimizer, range(4, 5))
    moved = torch.cat([p.grad.flatten() for p in params]) * 1e-3
    torch.testing.assert_close(weights(params), before - moved)
    for state, old in zip(snapshot(optimizer), kept, strict=True):
        assert all(torch.equal(state[k], old[k]) for k in old if k != "step")
    twin = SGD(parameters(SHAPES), states="8bit")
    twin.load_state_dict(optimizer.state_dict())
    assert same(snapshot(optimizer), snapshot(twin))
