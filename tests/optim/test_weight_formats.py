# SPDX-License-Identifier: Apache-2.0
"""`States.weight`: Parameters that hold a narrow format's values: of a master (FP8-LM O3), with a round-off (HFP8)."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn
from training import MAKE, bits, parameters, same, set_gradients, snapshot, weights

import hf_lowprec
from hf_lowprec import optim
from hf_lowprec.formats import get_format
from hf_lowprec.numerics import dequantize, quantize, round_to_format
from hf_lowprec.numerics.residual import rejoin
from hf_lowprec.optim import algorithms
from hf_lowprec.optim import states as st
from hf_lowprec.presets import PRESETS
from hf_lowprec.presets.fp8 import FP8_LM_O3_STATES, FP8_LM_STATES
from hf_lowprec.presets.narrow import HFP8_STATES
from hf_lowprec.recipe import NONE, Quant, Residual, Rounding, RoundOff, Scaling, States

KINDS = {
    "o3": FP8_LM_O3_STATES,
    "hfp8": HFP8_STATES,
    "o3-float32": replace(FP8_LM_O3_STATES, master="float32"),
}
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(64, 65), (7, 13), (40, 128)]
F = np.float32


def ids(value: Any) -> str:
    return str(value)[6:] if isinstance(value, torch.dtype) else str(value)


def built(kind: str, dtype: torch.dtype, name: str = "AdamW", gemm: int = 2, **options: Any):
    """Parameters, of which the first `gemm` are weights of quantised GEMMs."""
    params = [nn.Parameter(p.detach() * 0.02) for p in parameters(SHAPES, dtype)]
    optim.mark_gemm_weights(nn.ParameterList(params), params[:gemm])
    defaults = {"lr": 1e-3, "weight_decay": 0.0, "states": KINDS[kind]}
    return params, MAKE[name](params, **{**defaults, **options})


def run(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def master(optimizer: Any, param: nn.Parameter) -> torch.Tensor:
    item = optimizer._plan_now().of(param)
    return st.read_weight(item.state, param, item.states)


# --- HFP8 ----------------------------------------------------------------------------------------------------------


def e4m3b11(x: np.ndarray) -> np.ndarray:
    """By ml_dtypes, whose cast does not saturate."""
    return np.clip(x, -30, 30).astype(ml_dtypes.float8_e4m3b11fnuz).astype(np.float32)


def e6m9(x: float) -> float:
    """To nearest, in float64, from the definition: ten significant bits down to 2^-30, then steps of 2^-39."""
    exponent = max(np.frexp(x)[1] - 1, -30)
    unit = 2.0 ** (exponent - 9)
    return float(np.round(x / unit) * unit)  # half to even


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_hfp8_is_the_papers_update(dtype):
    """t = w8 + res - lr g; w8 = Q143(t); res = fl16(t - w8), from ml_dtypes and a definition of 1-6-9."""
    nearest = replace(HFP8_STATES, master=RoundOff(residual=Quant(format="e6m9", scaling=NONE)))
    torch.manual_seed(0)
    param = nn.Parameter((torch.randn(400) * 0.1).to(dtype))
    optim.mark_gemm_weights(nn.ParameterList([param]), [param])
    optimizer = optim.SGD([param], lr=0.01, states=nearest)
    w8, res = param.detach().float().numpy().copy(), np.zeros(400, F)
    for step in range(20):
        param.grad = torch.randn(400, generator=torch.Generator().manual_seed(step)).to(dtype)
        t = ((w8 + res).astype(F) - (param.grad.float().numpy() * F(0.01)).astype(F)).astype(F)
        w8 = e4m3b11(t)
        res = np.array([e6m9(float(x)) for x in (t - w8).astype(F)], F)
        optimizer.step()
        np.testing.assert_array_equal(param.detach().float().numpy(), w8)
        held = st.read(optimizer.state[param], "round_off", nearest.master.residual, torch.float32, param.shape)
        np.testing.assert_array_equal(held.numpy(), res)
    assert (res != 0).mean() > 0.9


def test_the_residual_holds_what_saturates():
    param = nn.Parameter(torch.full((16,), 29.9))
    optim.mark_gemm_weights(nn.ParameterList([param]), [param])
    optimizer = optim.SGD([param], lr=1.0, states=HFP8_STATES)
    for _ in range(4):
        param.grad = torch.full((16,), -2.0)
        optimizer.step()
    assert torch.equal(param.detach(), torch.full((16,), 30.0))
    torch.testing.assert_close(master(optimizer, param), torch.full((16,), 37.9), rtol=0, atol=0.05)


def test_every_weight_with_every_residual_is_found_again():
    """Q(p + res / 2) = p for every code p and every |res| of at most half its unit, both signs."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return round_to_format(x, "e4m3b11")

    values = torch.tensor(sorted(set(get_format("e4m3b11").values())))
    middles = (values[1:] + values[:-1]) / 2
    for fraction in (0.0, 1e-3, 0.5, 1.0):
        for ends, other in ((values[:-1], middles), (values[1:], middles)):
            residual = (other - ends) * fraction
            assert torch.equal(rejoin(ends, residual, rounded), ends + residual)


# --- FP8-LM O3 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_o3_keeps_fp8_weights_of_an_fp16_master(dtype):
    """MS-AMP's O3: FP8 weight, FP16 master with a scale, FP8 and FP16 moments; other Parameters as in O2."""
    params, optimizer = built("o3", dtype)
    twins, plain = built("o3", dtype, states=FP8_LM_STATES)
    run(params, optimizer, range(4))
    run(twins, plain, range(4))
    quant = PRESETS["fp8-lm-o3"].fprop.weight
    assert quant == FP8_LM_O3_STATES.weight
    for p in params[:2]:
        state = optimizer.state[p]
        assert state["master_qdata"].dtype == torch.float16
        seen = dequantize(quantize(p.detach().float(), quant), quant, torch.float32)
        assert torch.equal(seen, p.detach().float()), "the GEMM's own cast finds the same values"
        wide = master(optimizer, p)
        scale = 2.0 ** np.ceil(np.log2(wide.abs().max().item() / 448))
        want = (wide / scale).to(torch.float8_e4m3fn).float() * scale
        assert torch.equal(p.detach().float(), want)
        assert (p.detach().float() != wide).float().mean() > 0.9
    large = optimizer.state[params[0]]
    assert large["exp_avg_qdata"].dtype == torch.float8_e4m3fn and large["exp_avg_sq_qdata"].dtype == torch.float16
    assert torch.equal(params[2], twins[2]) and same([optimizer.state[params[2]]], [plain.state[twins[2]]])
    assert ("master_qdata" in optimizer.state[params[2]]) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("amax", [448.0, 448.0001, 224.0001, 230.0, 1.0, 447.0, 463.9, 3e-5])
def test_the_gemms_cast_is_idempotent_for_every_amax(amax):
    """Where the largest weight rounds down to a power of two the scale halves, and all codes double: same values."""
    quant = FP8_LM_O3_STATES.weight
    assert quant is not None
    x = torch.linspace(-1, 1, 4097) * amax
    once = st.on_grid(x, quant)
    assert torch.equal(st.on_grid(once, quant), once) and torch.equal(once, once.bfloat16().float())


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_o3_bytes(dtype):
    params, optimizer = built("o3", dtype)
    run(params, optimizer, range(1))
    n = params[0].numel()
    # m 1, v 2, master 2; a float32 Parameter is no master here
    assert optimizer.state_bytes()[id(params[0])] == sum(v.nbytes for v in optimizer.state[params[0]].values())
    assert 5 * n <= optimizer.state_bytes()[id(params[0])] <= 5 * n + 40


# --- both -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Lion"])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_the_uninterrupted_run(tmp_path, kind, name, dtype):
    params, optimizer = built(kind, dtype, name)
    run(params, optimizer, range(3))
    torch.save({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    copied = copy.deepcopy((params, optimizer))
    others, resumed = built(kind, dtype, name)
    loaded = torch.load(tmp_path / "saved.pt", weights_only=True)
    with torch.no_grad():
        for p, value in zip(others, loaded["params"], strict=True):
            p.copy_(value)
    resumed.load_state_dict(loaded["optimizer"])
    for some, one in ((params, optimizer), (others, resumed), copied):
        run(some, one, range(3, 6))
        assert torch.equal(bits(weights(params)), bits(weights(some)))
        assert same(snapshot(optimizer), snapshot(one))


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_wins(kind, dtype):
    params, optimizer = built(kind, dtype, lr=1e-4)
    run(params, optimizer, range(2))
    for value, tolerance in ((1.0, 0.02), (0.7311, 0.04), (3e-3, 6e-4)):
        with torch.no_grad():
            for p in params:
                p.fill_(value)
        for p in params:
            p.grad = torch.full_like(p, 1e-6)
        optimizer.step()
        for p in params:
            torch.testing.assert_close(p.detach().float(), torch.full(p.shape, value), rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_an_edited_value_between_two_codes_is_taken_exactly(kind):
    params, optimizer = built(kind, torch.float32)
    run(params, optimizer, range(2))
    with torch.no_grad():
        params[0].fill_(0.7311)
    assert torch.equal(master(optimizer, params[0]), params[0].detach())


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_step_changes_nothing(kind):
    params, optimizer = built(kind, torch.bfloat16)
    run(params, optimizer, range(2))
    before, kept = snapshot(optimizer), weights(params).clone()
    set_gradients(params, 2)
    params[1].grad[0, 0] = torch.nan
    optimizer.step()
    assert same(before, snapshot(optimizer)) and torch.equal(kept, weights(params)) and optimizer.skipped_steps == 1


@pytest.mark.parametrize("kind", KINDS)
def test_slices_and_whole_tensors_round_alike(kind, monkeypatch):
    outcomes = []
    for size in (1 << 16, 1 << 6):
        monkeypatch.setattr(algorithms.cpu, "SLICE", size)
        params, optimizer = built(kind, torch.bfloat16)
        run(params, optimizer, range(2))
        outcomes.append(snapshot(optimizer))
    assert same(*outcomes)


def moved(states: States, dtype: torch.dtype, rate: float = 5e-5, steps: int = 1000) -> float:
    """Percent by which masters move in updates of `rate` |w| each: 5.13 compounded at 5e-5."""
    param = torch.exp(torch.linspace(-4, 0, 2000)).to(dtype)
    before, state, finite = param.float().clone(), st.init_state(param, states), torch.tensor(True)
    for t in range(1, steps + 1):
        weight = st.read_weight(state, param, states)
        new = weight + weight * rate
        step = torch.tensor(float(t))
        st.write_weight(state, param, states, new, index=0, step=step, finite=finite, bound=new.abs().amax())
    return 100 * (st.read_weight(state, param, states) / before - 1).mean().item()


@pytest.mark.parametrize(("kind", "dtype"), [("o3", torch.bfloat16), ("hfp8", torch.float32)], ids=ids)
def test_low_learning_rates_move_the_master(kind, dtype):
    assert abs(moved(KINDS[kind], dtype) - 5.13) <= 0.25


def test_control_a_nearest_round_off_loses_small_updates():
    nearest = replace(HFP8_STATES, master=RoundOff(residual=Quant(format="e6m9", scaling=NONE)))
    assert abs(moved(HFP8_STATES, torch.float32, 1e-5) - 1.005) < 0.05
    assert moved(nearest, torch.float32, 1e-5) < 0.5


def regression(states: str | States, dtype: torch.dtype, after: Any = None) -> tuple[float, float]:
    """Least squares, 48 at the start: the loss of the Parameter at the end, and of the solution in `E4M3`."""
    generator = torch.Generator().manual_seed(0)
    x, solution = (torch.randn(shape, generator=generator) for shape in ((128, 48), (48, 96)))
    weight = nn.Parameter(torch.zeros(48, 96, dtype=dtype))
    optim.mark_gemm_weights(nn.ParameterList([weight]), [weight])
    optimizer = optim.AdamW([weight], lr=0.05, weight_decay=0.0, states=states)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 200)
        optimizer.zero_grad()
        (x @ weight.float() - x @ solution).square().mean().backward()
        optimizer.step()
        if after is not None:
            weight.data = after(weight.data)
    rounded = st.on_grid(solution, FP8_LM_O3_STATES.weight)
    return tuple((x @ (w.float() - solution)).square().mean().item() for w in (weight.detach(), rounded))


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_learn_as_far_as_their_format_reaches(kind, dtype):
    loss, floor = regression(KINDS[kind], dtype)
    assert 0.01 < floor < 0.05 and loss < 3 * floor


def test_control_without_a_master_they_stick():
    loss, floor = regression("fp32", torch.float32, lambda w: st.on_grid(w, FP8_LM_O3_STATES.weight))
    assert loss > 30 * floor


def test_unmarked_parameters_are_an_error_and_named_ones_are_not():
    param = nn.Parameter(torch.randn(64, 65))
    optimizer = optim.AdamW([param], states=HFP8_STATES)
    param.grad = torch.ones_like(param)
    before = param.detach().clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"call hf_lowprec\.convert\(model, \.\.\.\) before the first step"):
            optimizer.step()
    assert torch.equal(param, before) and not optimizer.state
    optim.mark_gemm_weights(nn.ParameterList([param]), [param])
    optimizer.step()
    assert torch.equal(param.detach(), round_to_format(param.detach(), "e4m3b11"))
    other = nn.Parameter(torch.randn(64, 65))
    named = optim.AdamW([("w", other)], states="fp32", overrides={"w": HFP8_STATES})
    other.grad = torch.ones_like(other)
    named.step()
    assert torch.equal(other.detach(), round_to_format(other.detach(), "e4m3b11"))


def test_converting_marks_and_marks_copies_again():
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))
    hf_lowprec.convert(model, "fp8-lm-o3")
    for one in (model, copy.deepcopy(model)):
        hf_lowprec.convert(one, "fp8-lm-o3")
        optimizer = optim.AdamW(one.parameters(), states="fp8-lm-o3")
        one(torch.randn(4, 64)).sum().backward()
        optimizer.step()
        names = [*["fp8-lm-o3", "fp8-lm"], *["fp8-lm"] * 2, *["fp8-lm-o3", "fp8-lm"]]
        assert optimizer.param_groups[0]["overrides"] == names


@pytest.mark.parametrize("kind", KINDS)
def test_an_adam_that_has_stepped_is_taken_over(kind):
    params, _ = built(kind, torch.bfloat16, states="fp32")
    own = torch.optim.AdamW(params, lr=1e-3)
    run(params, own, range(2))
    weights_before = weights(params).float()
    ours = optim.AdamW.adopt(own, KINDS[kind])
    for p in params:
        item = ours._plan_now().of(p)
        torch.testing.assert_close(master(ours, p), p.detach().float(), rtol=1e-3, atol=1e-6)
        st.check_state(item.state, item.states, p, "x")
    run(params, ours, range(2, 3))
    assert 0 < (weights(params).float() - weights_before).abs().max() < 0.01
    with pytest.raises(ValueError, match="an optimizer cannot know which Parameters are"):
        other = nn.Parameter(torch.randn(64, 65))
        stock = torch.optim.AdamW([other])
        other.grad = torch.ones_like(other)
        stock.step()
        optim.AdamW.adopt(stock, KINDS[kind])


def test_float16_parameters():
    half = nn.Parameter(torch.randn(64, 65).half())
    optim.mark_gemm_weights(nn.ParameterList([half]), [half])
    with pytest.raises(ValueError, match="may leave the range of a float16 Parameter"):
        optim.AdamW([half], states=FP8_LM_O3_STATES)
    optimizer = optim.AdamW([half], states=HFP8_STATES)
    half.grad = torch.ones_like(half)
    optimizer.step()
    assert torch.equal(half.detach().float(), round_to_format(half.detach().float(), "e4m3b11"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": None}, "master: a round-off is that of `weight`"),
        ({"master": None}, "weight: needs a master"),
        ({"master": Residual(bits=8)}, "weight: needs a master"),
        ({"weight": Quant(format="e4m3fn", scaling=Scaling(snap="rceil"))}, "beside a round-off"),
        ({"weight": Quant(format="e4m3fn"), "master": "float32"}, "choose snap rceil"),
        ({"weight": Quant(format="e4m3fn", scaling=Scaling(granularity="row", snap="rceil"))}, "one scale per tensor"),
        ({"weight": Quant(format="e4m3fn", scaling=NONE, rounding=Rounding(mode="stochastic"))}, "found again"),
    ],
)
def test_states_that_mean_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(HFP8_STATES, **change)


def test_other_paths_refuse():
    from hf_lowprec.optim import fused

    param = nn.Parameter(torch.randn(64, 65))
    optim.mark_gemm_weights(nn.ParameterList([param]), [param])
    with pytest.raises(ValueError, match="compile=True: steps of states with `weight`"):
        optim.AdamW([param], states=HFP8_STATES, compile=True)
    for states in KINDS.values():
        assert not fused.covers("adam", states, param, param)
