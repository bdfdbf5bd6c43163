# SPDX-License-Identifier: Apache-2.0
"""optim.AdamW and Adam: the kinds of master, any recipe, what a step refuses, what states cost."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import NAMES, bits, held, model_of, same, slow_beside, small, snapshot, train, weights

from hf_lowprec.optim import Adam, AdamW, GradientQuantizer, GradientSwap, StableAdamW
from hf_lowprec.optim import states as st
from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import Quant, Rounding, Scaling, States

SR = Rounding(mode="stochastic")
FP8_LM = small("fp8-lm")


class NoHostReads(TorchDispatchMode):
    """Raises where an operator hands a value of a tensor to Python."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero"), name
        return func(*args, **(kwargs or {}))


# --- parity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs, ours", [(torch.optim.AdamW, AdamW), (torch.optim.Adam, Adam)])
@pytest.mark.parametrize("states", [small("fp8-lm-exact"), "#2a"], ids=["fp8-lm-exact", "#2a"])
def test_four_steps_stay_within_ms_amps_own_tolerance(theirs, ours, states):
    # MS-AMP tests its LBAdam(W) like this: 4 x 4 linear, 4 steps, weight decay 1e-3, atol 3e-4
    torch.manual_seed(0)
    reference = nn.Linear(4, 4)
    candidate = copy.deepcopy(reference)
    for model, optimizer in (
        (reference, theirs(reference.parameters(), lr=1e-3, weight_decay=1e-3)),
        (candidate, ours(candidate.parameters(), lr=1e-3, weight_decay=1e-3, states=states)),
    ):
        for step in range(4):
            optimizer.zero_grad()
            model(torch.randn(4, 4, generator=torch.Generator().manual_seed(step))).sum().backward()
            optimizer.step()
    torch.testing.assert_close(weights(candidate), weights(reference), rtol=0, atol=3e-4)


def test_l2_states_are_those_of_the_decayed_gradient():
    # MS-AMP's LBAdam stores moments of the raw gradient but applies the decayed one
    param = nn.Parameter(torch.tensor([2.0, -4.0, 8.0]))
    optimizer = Adam([param], lr=0.0, betas=(0.9, 0.99), weight_decay=0.5, states="fp32")
    param.grad = torch.tensor([1.0, 1.0, 1.0])
    optimizer.step()
    decayed = torch.tensor([2.0, -1.0, 5.0])
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], 0.1 * decayed)
    torch.testing.assert_close(optimizer.state[param]["exp_avg_sq"], 0.01 * decayed.square())


def test_l2_states_in_low_precision_are_those_of_the_decayed_gradient():
    torch.manual_seed(0)
    initial = torch.randn(64, 32)
    stored = {}
    for states in ("fp32", small("fp8-lm-exact")):
        param = nn.Parameter(initial.clone())
        optimizer = Adam([param], lr=1e-3, weight_decay=0.5, states=states)
        for _ in range(3):
            param.grad = torch.full_like(param, 1e-3)
            optimizer.step()
        stored[states] = held(optimizer, param, "exp_avg_sq")
    low, full = stored[small("fp8-lm-exact")], stored["fp32"]
    torch.testing.assert_close(low, full, rtol=2e-3, atol=1e-9)


# --- where the master lives ----------------------------------------------------------------------------------------


def test_float32_parameter_is_its_own_master():
    model = model_of()
    optimizer = AdamW(model.parameters(), states=FP8_LM)
    train(model, optimizer, 1)
    slots = {f"{slot}_{part}" for slot in ("exp_avg", "exp_avg_sq") for part in ("qdata", "scale", "amax")}
    for state in optimizer.state.values():
        assert set(state) == {"step", *slots}
        assert state["exp_avg_qdata"].dtype == torch.float8_e4m3fn
        assert state["exp_avg_sq_qdata"].dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameter_follows_its_scaled_float16_master(dtype):
    model = model_of(dtype)
    optimizer = AdamW(model.parameters(), lr=1e-3, states=FP8_LM)
    train(model, optimizer, 3)
    for param in model.parameters():
        state = optimizer.state[param]
        assert state["master_qdata"].dtype == torch.float16
        assert torch.equal(param, (state["master_qdata"].float() * state["master_scale"]).to(dtype))
    if dtype == torch.bfloat16:  # three bits more
        state = optimizer.state[model[0].weight]
        assert (state["master_qdata"].float() * state["master_scale"] != model[0].weight).any()


@pytest.mark.parametrize(
    "states", [FP8_LM, small("fp8-lm-exact"), States(master="float32")], ids=["predicted", "exact", "float32"]
)
def test_an_edited_parameter_wins_over_its_master(states):
    param = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = AdamW([param], lr=1e-6, weight_decay=0.0, states=states)
    param.grad = torch.ones_like(param)
    optimizer.step()
    untouched = held(optimizer, param, "master")[1:]
    with torch.no_grad():
        param[0] = 3.0
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    master = held(optimizer, param, "master")
    assert (master[0] == 3).all() and (param[0] == 3).all()
    torch.testing.assert_close(master[1:], untouched, rtol=2e-3, atol=0)


@pytest.mark.parametrize("update, moves", [(Rounding(), False), (SR, True)])
def test_16_bit_parameter_without_master_is_rounded_as_the_recipe_says(update, moves):
    param = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = AdamW([param], lr=1e-4, weight_decay=0.0, states=States(update=update))
    for _ in range(20):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert param.dtype == torch.bfloat16 and not any("master" in key for key in optimizer.state[param])
    moved = 1 - param.float().mean().item()
    assert abs(moved - 20e-4) < 4e-4 if moves else moved == 0


def test_mixed_dtypes_groups_and_their_own_states():
    full, half = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4).bfloat16())
    unused = nn.Parameter(torch.randn(4))
    optimizer = AdamW([{"params": [full, unused]}, {"params": [half], "states": FP8_LM}], states="fp32")
    late = nn.Parameter(torch.randn(3))
    optimizer.add_param_group({"params": [late], "lr": 0.5, "states": "#2b"})
    before = late.detach().clone()
    for p in (full, half, late):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[full]["exp_avg"].dtype == torch.float32
    assert optimizer.state[half]["exp_avg_qdata"].dtype == torch.float8_e4m3fn
    assert optimizer.state[late]["exp_avg_sq_qdata"].dtype == torch.float16
    assert unused not in optimizer.state
    torch.testing.assert_close(before - late, torch.full_like(late, 0.5) + 0.5 * 0.01 * before, rtol=1e-5, atol=1e-6)
    assert [g["states"] for g in optimizer.param_groups] == ["fp32", st.states_name(FP8_LM), "#2b"]


# --- any recipe ----------------------------------------------------------------------------------------------------

SCALINGS = {
    "none": Scaling(method="none"),
    "static": Scaling(method="static", exponent=-4),
    "tensor": Scaling(),
    "tensor-pow2": Scaling(snap="rceil"),
    "row": Scaling(granularity="row"),
    "block": Scaling(granularity="block", block=(32,)),
    "block-e8m0": Scaling(granularity="block", block=(32,), snap="rceil", store="e8m0"),
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("rounding", [Rounding(), SR], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("fmt", slow_beside(["e4m3fn", "e8m7"], ["e5m2", "e3m4", "e5m10", "e6m9"]))
def test_any_quant_runs_and_trains(scaling, rounding, fmt):
    quant = Quant(format=fmt, scaling=scaling, rounding=rounding)
    wide = Quant(format="e8m7", rounding=rounding)  # 8-bit second moments need blocks; that is another test
    states = States(exp_avg=quant, exp_avg_sq=wide, master=quant)
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype))
              for shape in [(), (5,), (3, 40), (2, 3, 5, 3)] for dtype in (torch.float32, torch.bfloat16)]  # fmt: skip
    optimizer = AdamW(params, lr=0.05, weight_decay=0.0, states=states)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        before = [p.detach().float().clone() for p in params]
        optimizer.step()
    assert all(p.isfinite().all() for p in params)
    assert sum(((b - p.float()).mean() > 0).item() for b, p in zip(before, params, strict=True)) >= 6
    optimizer.load_state_dict(optimizer.state_dict())


def test_names_resolve_and_unknown_ones_say_what_there_is():
    param = nn.Parameter(torch.zeros(2))
    for name in st.NAMED:
        master = "default" if st.NAMED[name].op_by_op else None  # rules of papers have one of their own
        algorithm = StableAdamW if st.NAMED[name].algorithm == "stable-adamw" else AdamW
        kept = algorithm([param], states=name, master=master).param_groups[0]["states"]
        assert st.resolve_states(kept) == st.NAMED[name]
    assert AdamW([param]).param_groups[0]["states"] == "8bit"
    with pytest.raises(ValueError, match="unknown states 'fp9'; known: fp32, bf16, 8bit"):
        AdamW([param], states="fp9")


def test_variant_4_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"'#4'.*round small second moments to zero.*diverges"):
        AdamW([nn.Parameter(torch.zeros(2))], states="#4")


def test_delayed_states_are_refused():
    delayed = Quant(format="e4m3fn", scaling=Scaling(method="delayed", history=16))
    with pytest.raises(ValueError, match=r"states\.exp_avg: delayed"):
        AdamW([nn.Parameter(torch.zeros(2))], states=replace(FP8_LM, exp_avg=delayed))


# --- what a step refuses, and what it survives ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("states", [FP8_LM, small("8bit"), small("fp8-expand")], ids=["fp8-lm", "8bit", "fp8-expand"])
def test_one_bad_gradient_element_skips_the_whole_step(dtype, bad, states):
    model = model_of(dtype)
    optimizer = AdamW(model.parameters(), lr=1e-2, states=states)
    train(model, optimizer, 2)
    before, kept = bits(weights(model)).clone(), snapshot(optimizer)
    model[0].weight.grad[1, 3] = bad
    optimizer.step()
    assert torch.equal(bits(weights(model)), before) and same(snapshot(optimizer), kept)
    assert optimizer.skipped_steps.item() == 1
    train(model, optimizer, 1)
    assert not torch.equal(bits(weights(model)), before) and optimizer.skipped_steps.item() == 1
    assert all(state["step"] == 3 for state in optimizer.state.values())


def test_a_bad_first_gradient_leaves_fresh_states():
    param = nn.Parameter(torch.tensor([1.0, -0.0]))
    optimizer = AdamW([param], lr=1.0, states=FP8_LM)
    param.grad = torch.tensor([math.nan, 1.0])
    optimizer.step()
    assert torch.equal(bits(param), bits(torch.tensor([1.0, -0.0])))
    assert optimizer.state[param]["step"] == 0 and (optimizer.state[param]["exp_avg_scale"] == 1).all()


def test_a_gradient_whose_square_overflows_counts_as_bad():
    param = nn.Parameter(torch.ones(2))
    optimizer = AdamW([param])
    param.grad = torch.tensor([1e20, 1.0])
    optimizer.step()
    assert optimizer.skipped_steps.item() == 1 and (param == 1).all()


@pytest.mark.parametrize("states", NAMES)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-19, 1e-10, 1e10, 1e18])
def test_extreme_but_finite_gradients_keep_states_finite(magnitude, states):
    param = nn.Parameter(torch.ones(8, 8))
    optimizer = AdamW([param], lr=1e-3, states=small(states))
    for _ in range(3):
        param.grad = torch.linspace(-magnitude, magnitude, 64).reshape(8, 8)
        optimizer.step()
    assert param.isfinite().all() and optimizer.skipped_steps.item() == 0
    assert (param - 1).abs().max() < 2 * 3e-3, "no update blows up"
    for slot in ("exp_avg", "exp_avg_sq"):
        assert held(optimizer, param, slot).isfinite().all(), slot


@pytest.mark.parametrize("states", NAMES)
def test_zero_weights_zero_gradients_and_empty_tensors(states):
    zero, empty = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(0, 4))
    half = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    optimizer = AdamW([zero, empty, half], lr=1.0, states=small(states))
    for _ in range(3):
        for p in (zero, empty, half):
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert (zero == 0).all() and (half == 0).all() and optimizer.skipped_steps.item() == 0
    assert all(torch.isfinite(v.float()).all() for s in optimizer.state.values() for v in s.values())


def test_under_a_grad_scaler_of_fp16_training():
    param = nn.Parameter(torch.ones(4))
    optimizer = AdamW([param], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (1.0, torch.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.state[param]["step"] == 2 and scaler.get_scale() == 512 and (param < 0.9).all()


def test_no_gradients_is_no_step():
    optimizer = AdamW([nn.Parameter(torch.ones(2))])
    optimizer.step()
    assert not optimizer.state and optimizer.skipped_steps.item() == 0


def test_closure_runs_with_gradients_and_its_loss_comes_back():
    param = nn.Parameter(torch.ones(2))
    optimizer = AdamW([param], lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2 and (param < 1).all()


def test_sparse_gradients_are_refused_before_anything_changed():
    embedding, dense = nn.Embedding(4, 2, sparse=True), nn.Parameter(torch.ones(2))
    optimizer = AdamW([dense, *embedding.parameters()])
    (embedding(torch.tensor([1])).sum() + dense.sum()).backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()
    assert (dense == 1).all() and not optimizer.state


def test_parameters_without_meaning_are_refused():
    with pytest.raises(TypeError, match="complex64"):
        AdamW([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    flat = nn.Parameter(torch.zeros(2))
    flat._is_flat_param = True
    with pytest.raises(TypeError, match="flat parameters"):
        AdamW([flat])


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1e-8}, {"weight_decay": -0.1}])
def test_hyperparameters_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AdamW([nn.Parameter(torch.zeros(2))], **options)


@pytest.mark.parametrize("states", NAMES)
def test_a_step_reads_no_tensor_on_the_host(monkeypatch, states):
    """Everything a step decides, it decides on the device; `.item()`, `bool` and `nonzero` would show here."""
    params = [
        nn.Parameter(torch.randn(64, 64)),
        nn.Parameter(torch.randn(4096).bfloat16()),
        nn.Parameter(torch.ones(3)),
    ]
    optimizer = AdamW(params, lr=torch.tensor(1e-3), states=states)
    swap = GradientSwap(GradientQuantizer(PRESETS["fp8-lm"].communication, 3), {p: i for i, p in enumerate(params)})
    swap.attach(optimizer)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # on the CPU, numerics reads to save a pass
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        with NoHostReads():
            optimizer.step()
    assert all((state["step"] == 2).all() for state in optimizer.state.values())


# --- determinism, memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", NAMES)
def test_two_runs_agree_in_every_bit(states):
    results = []
    for _ in range(2):
        model = model_of(torch.bfloat16)
        optimizer = AdamW(model.parameters(), lr=1e-3, states=small(states))
        train(model, optimizer, 5)
        results.append((bits(weights(model)), snapshot(optimizer)))
    assert torch.equal(results[0][0], results[1][0]) and same(results[0][1], results[1][1])


def test_stochastic_words_differ_between_steps_and_parameters():
    params = [nn.Parameter(torch.ones(1000, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = AdamW(params, lr=1e-3, weight_decay=0.0, states="bf16-sr")
    ups = []
    for _ in range(2):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        ups.append([p != b for p, b in zip(params, before, strict=True)])
    pairs = [(ups[0][0], ups[0][1]), (ups[0][0], ups[1][0])]  # parameter 0 with 1, step 1 with 2
    for a, b in pairs:
        expected = (a.float().mean() * b.float().mean()).item()
        assert abs((a & b).float().mean().item() - expected) < 0.06


@pytest.mark.parametrize("dtype, per_element", [(torch.float32, 1 + 2), (torch.bfloat16, 1 + 2 + 2)])
def test_states_cost_exactly_what_the_formula_says(dtype, per_element):
    model = model_of(dtype)
    optimizer = AdamW(model.parameters(), states=FP8_LM)
    announced = optimizer.state_bytes()
    train(model, optimizer, 2)
    for param, state in optimizer.state.items():
        slots = 2 if dtype == torch.float32 else 3
        expected = per_element * param.numel() + 8 * slots + 4  # a float32 scale and amax per slot, the step
        assert sum(v.numel() * v.itemsize for v in state.values()) == expected == announced[id(param)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", NAMES)
def test_state_bytes_are_those_of_the_states(states, dtype):
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in [(), (7,), (64, 65), (4096,), (3, 37, 41)]]
    optimizer = AdamW(params, states=states)
    announced = optimizer.state_bytes()
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert announced == {id(p): sum(v.nbytes for v in optimizer.state[p].values()) for p in params}
