# SPDX-License-Identifier: Apache-2.0
"""`States.arithmetic`: every AXPY of an update in 1-6-9 (Wang et al., arXiv 1812.08011), against loops with gfloat."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import gfloat
import numpy as np
import pytest
import torch
from torch import nn
from training import MAKE, bits, held, parameters, same, set_gradients, snapshot, weights

from hf_lowprec.numerics import counter_hash, round_to_format
from hf_lowprec.optim import SGD, AdamW, algorithms
from hf_lowprec.optim import states as st
from hf_lowprec.presets.narrow import WANG_STATES
from hf_lowprec.recipe import NONE, Quant, Residual, Rounding, States

E6M9 = gfloat.FormatInfo(
    "e6m9", 16, 10, bias=31, is_signed=True, domain=gfloat.Domain.Extended, has_nz=True, num_high_nans=2**9 - 1,
    has_subnormals=True, is_twos_complement=False,
)  # fmt: skip
STREAMS = {"l2": 6, "momentum_buffer": 5, "master": 2}
NEAREST = replace(WANG_STATES, arithmetic=WANG_STATES.master)
F = np.float32


def oracle_round(values: list[float], mode: str, words: list[int]) -> list[np.float32]:
    out = []
    for value, word in zip(values, words, strict=True):
        if mode == "nearest":
            out.append(F(gfloat.round_float(E6M9, float(value), gfloat.RoundMode.TiesToEven, True)))
        else:
            mask = (1 << 14) - 1  # of 23 bits of a float32's mantissa, 14 are dropped
            out.append(
                F(gfloat.round_float(
                    E6M9, float(value), gfloat.RoundMode.StochasticFastest, True, srbits=word & mask, srnumbits=14,
                ))
            )  # fmt: skip
    return out


def words(index: int, stream: str, step: int, n: int) -> list[int]:
    seed = torch.tensor(step + ((8 * index + STREAMS[stream]) << 32))
    return [word & 0xFFFFFFFF for word in counter_hash(seed, n).tolist()]


class Oracle:
    """SGD of the paper, one element after the other: L2, momentum, weight."""

    def __init__(self, w: torch.Tensor, index: int, mode: str, lr: float, momentum: float, wd: float) -> None:
        self.w = [F(x) for x in w.flatten().tolist()]
        self.m, self.t = [F(0)] * len(self.w), 0
        self.index, self.mode, self.lr, self.momentum, self.wd = index, mode, F(lr), F(momentum), F(wd)

    def step(self, grad: torch.Tensor) -> None:
        self.t += 1
        g, n = [F(x) for x in grad.flatten().tolist()], len(self.w)

        def rounded(values: list[Any], stream: str) -> list[np.float32]:
            return oracle_round(values, self.mode, words(self.index, stream, self.t, n))

        g = rounded([F(F(w * self.wd) + x) for w, x in zip(self.w, g, strict=True)], "l2")
        self.m = rounded([F(F(m * self.momentum) + x) for m, x in zip(self.m, g, strict=True)], "momentum_buffer")
        self.w = rounded([F(w - F(m * self.lr)) for w, m in zip(self.w, self.m, strict=True)], "master")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("mode", ["nearest", "stochastic"])
def test_sgd_is_the_papers_three_axpys(mode, dtype):
    params = parameters([(), (7, 13), (65,)], dtype)
    states = WANG_STATES if mode == "stochastic" else NEAREST
    optimizer = SGD(params, lr=0.03, momentum=0.9, weight_decay=0.01, states=states)
    oracles = [Oracle(p.detach(), i, mode, 0.03, 0.9, 0.01) for i, p in enumerate(params)]
    for step in range(4):
        set_gradients(params, step)
        for oracle, p in zip(oracles, params, strict=True):
            oracle.step(p.grad)
        optimizer.step()
        for oracle, p in zip(oracles, params, strict=True):
            want = torch.from_numpy(np.array(oracle.w)).view(p.shape)
            momentum = torch.from_numpy(np.array(oracle.m)).view(p.shape)
            master = p.detach() if dtype == torch.float32 else held(optimizer, p, "master")
            assert torch.equal(bits(master), bits(want))
            assert torch.equal(held(optimizer, p, "momentum_buffer"), momentum)
            assert torch.equal(p.detach(), want.to(dtype))


def test_states_are_16_bits():
    param = nn.Parameter(torch.randn(64, 65).bfloat16())
    optimizer = SGD([param], lr=0.1, momentum=0.9, states=WANG_STATES)
    set_gradients([param], 0)
    optimizer.step()
    state = optimizer.state[param]
    assert {k: v.dtype for k, v in state.items() if v.dim()} == {
        "momentum_buffer_qdata": torch.int16,
        "master_qdata": torch.int16,
    }
    assert optimizer.state_bytes()[id(param)] == sum(v.nbytes for v in state.values()) == 4 * param.numel() + 12


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adam", "StableAdamW", "Lion"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_every_algorithm_keeps_weights_and_first_moments_in_the_format(name, dtype):
    params = parameters([(64, 65), (9,)], dtype)
    optimizer = MAKE[name](params, lr=1e-2, weight_decay=0.01, states=WANG_STATES)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    first = "momentum_buffer" if name == "SGD" else "exp_avg"
    for p in params:
        item = optimizer._plan_now().of(p)
        master = st.read_weight(item.state, p, item.states)
        for value in (master, held(optimizer, p, first)):
            assert torch.equal(value, round_to_format(value, "e6m9")) and value.abs().max() > 0
        if "exp_avg_sq" in item.slots:
            assert item.slots["exp_avg_sq"] is None and (item.state["exp_avg_sq"] > 0).all()


def test_adam_reads_the_rounded_moment():
    """The weight's AXPY has the momentum that is stored, and its own rounding comes last."""
    param = nn.Parameter(torch.randn(500))
    optimizer = AdamW([param], lr=1e-2, weight_decay=0.0, states=NEAREST)
    before = param.detach().clone()
    param.grad = torch.randn(500)
    optimizer.step()
    m, v = held(optimizer, param, "exp_avg"), optimizer.state[param]["exp_avg_sq"]
    assert torch.equal(m, round_to_format(param.grad * F(1 - 0.9), "e6m9"))
    update = (m * F(1e-2 / (1 - 0.9))) / (v.sqrt() * F(1 / np.sqrt(1 - 0.999)) + F(1e-8))
    want = before - update
    assert ((param.detach() - want).abs() <= 2.0**-10 * want.abs() + 1e-6).all()
    assert torch.equal(param.detach(), round_to_format(param.detach(), "e6m9"))


def low_rate(states: States, dtype: torch.dtype) -> float:
    """Percent by which weights move in 1000 steps of SGD of 5e-5 |w| each; 4.88 compounded."""
    param = nn.Parameter(torch.exp(torch.linspace(-4, 0, 500)).to(dtype))
    before, optimizer = param.detach().float().clone(), SGD([param], lr=5e-5, states=states)
    for _ in range(1000):
        item = optimizer._plan_now().of(param)
        param.grad = (st.read_weight(item.state, param, item.states) if item.state else before).to(dtype)
        optimizer.step()
    item = optimizer._plan_now().of(param)
    return 100 * (1 - (st.read_weight(item.state, param, item.states) / before).mean().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_stochastic_axpys_move_at_low_learning_rates(dtype):
    assert abs(low_rate(WANG_STATES, dtype) - 4.88) <= 0.25


def test_control_nearest_axpys_freeze():
    assert abs(low_rate(NEAREST, torch.float32)) < 0.1  # rounding of the first weights, and no more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_resume_is_the_uninterrupted_run(tmp_path, dtype):
    def built():
        params = parameters([(64, 65), (13,), ()], dtype)
        return params, SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01, states=WANG_STATES)

    params, optimizer = built()
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    torch.save({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    copied = copy.deepcopy((params, optimizer))
    others, resumed = built()
    loaded = torch.load(tmp_path / "saved.pt", weights_only=True)
    with torch.no_grad():
        for p, value in zip(others, loaded["params"], strict=True):
            p.copy_(value)
    resumed.load_state_dict(loaded["optimizer"])
    for some, one in ((params, optimizer), (others, resumed), copied):
        for step in range(3, 6):
            set_gradients(some, step)
            one.step()
        assert torch.equal(bits(weights(params)), bits(weights(some)))
        assert same(snapshot(optimizer), snapshot(one))


def test_an_edit_wins_and_a_refused_step_changes_nothing():
    param = nn.Parameter(torch.zeros(64, 128, dtype=torch.bfloat16))
    optimizer = SGD([param], lr=1e-3, momentum=0.9, states=WANG_STATES)
    for seed in range(2):
        set_gradients([param], seed)
        optimizer.step()
    with torch.no_grad():
        param.fill_(1.0)
    param.grad = torch.full_like(param, 0.01)
    optimizer.step()
    torch.testing.assert_close(param, torch.ones_like(param), rtol=0, atol=0.02)
    before, kept = snapshot(optimizer), param.detach().clone()
    param.grad[3, 5] = torch.inf
    optimizer.step()
    assert same(before, snapshot(optimizer)) and torch.equal(param, kept) and optimizer.skipped_steps == 1


def test_slices_and_whole_tensors_round_alike(monkeypatch):
    outcomes = []
    for size in (1 << 16, 1 << 6):
        monkeypatch.setattr(algorithms.cpu, "SLICE", size)
        params = parameters([(64, 65)], torch.bfloat16)
        optimizer = SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1, states=WANG_STATES)
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
        outcomes.append(snapshot(optimizer))
    assert same(*outcomes)


def test_random_bits_are_counted():
    states = replace(
        WANG_STATES, arithmetic=replace(WANG_STATES.arithmetic, rounding=Rounding(mode="stochastic", bits=1))
    )
    param = nn.Parameter(torch.full((2000,), 1.0))
    optimizer = SGD([param], lr=1.0, states=states)
    param.grad = torch.full_like(param, -(2.0**-9) * 0.4)  # below what one bit can see
    optimizer.step()
    assert torch.equal(param, torch.ones_like(param))
    param.grad = torch.full_like(param, -(2.0**-9) * 0.6)
    optimizer.step()
    assert 0.4 < (param > 1).float().mean() < 0.6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"master": None}, "master: must hold what arithmetic in e6m9 gives"),
        ({"master": Residual(bits=16)}, "master: must hold"),
        ({"exp_avg": Quant(format="e4m3fn", scaling=NONE)}, "exp_avg: must hold"),
        ({"arithmetic": Quant(format="e6m9")}, "arithmetic: results of operations have no scale"),
        ({"weight": Quant(format="e4m3fn", scaling=NONE)}, "arithmetic: not together with `weight`"),
    ],
)
def test_states_that_mean_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(WANG_STATES, **change)


def test_other_paths_refuse():
    from hf_lowprec.optim import fused

    param = nn.Parameter(torch.randn(64, 65))
    with pytest.raises(ValueError, match="compile=True: steps of states with `weight` or `arithmetic`"):
        SGD([param], states=WANG_STATES, compile=True)
    assert not fused.covers("sgd", WANG_STATES, param, param)
    with pytest.raises(ValueError, match=r"^master='sr': master: must hold"):
        SGD([nn.Parameter(torch.randn(4).bfloat16())], states=WANG_STATES, master="sr")
