# SPDX-License-Identifier: Apache-2.0
"""State dicts to and from real bitsandbytes: codes and absmax unchanged, and the next step the same on both sides."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowprec import optim
from hf_lowprec.optim.bitsandbytes import load_bitsandbytes, to_bitsandbytes

bnb = pytest.importorskip("bitsandbytes")

NESTED = "__bnb_optimizer_quant_state__"
# One step on float32 weights from the same codes: operations in another order.
WEIGHT = dict(rtol=1e-5, atol=1e-8)
# After it absmax agrees to rounding; a value between two codes may get the other one (of the smallest codes, whose
# distance is a few roundings, the next but one), so one value in 200 may differ by a step of the top decade, .9 / 64.
ABSMAX, OTHER_CODES, STEP = 1e-5, 5e-3, 0.0141
SHAPES = {"large": (48, 100), "ragged": (4097,), "small": (31, 33)}  # small: fewer than 4096 elements

PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "AdamW8bit": (bnb.optim.AdamW8bit, optim.AdamW, {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}),
    "Adam8bit": (bnb.optim.Adam8bit, optim.Adam, {"lr": 1e-2}),
    "Adam8bit-decay": (bnb.optim.Adam8bit, optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),  # it decouples, too
    "Lion8bit": (bnb.optim.Lion8bit, optim.Lion, {"lr": 1e-3, "betas": (0.9, 0.98), "weight_decay": 0.1}),
    "SGD8bit": (bnb.optim.SGD8bit, optim.SGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}),
    "AdamW": (bnb.optim.AdamW32bit, optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "states": "fp32"}),
}


@pytest.fixture(autouse=True)
def no_overrides() -> None:
    """bitsandbytes keeps overrides by place, (group, number), for the whole process: other tests' would hold here."""
    bnb.optim.GlobalOptimManager.get_instance().initialize()


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES.values()]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = (0.01 * torch.randn(param.shape, generator=generator)).to(param.dtype)


def steps(optimizer: Any, params: list[nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        set_gradients(params, step)
        optimizer.step()


def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, list[nn.Parameter], Any, list[nn.Parameter]]:
    """Theirs and ours over equal parameters, neither has stepped; ours starts with other hyperparameters."""
    make_theirs, make_ours, kwargs = PAIRS[name]
    theirs, ours = parameters(dtype), parameters(dtype)
    states = {"states": kwargs.get("states", "8bit")}
    common = {key: value for key, value in kwargs.items() if key != "states"}
    return make_theirs(theirs, **common), theirs, make_ours(ours, **{**common, "lr": 0.5}, **states), ours


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    out: dict[str, Any] = torch.load(buffer, weights_only=True)
    return out


def copy_weights(source: list[nn.Parameter], target: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for a, b in zip(source, target, strict=True):
            b.copy_(a)


def quantised(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our slots under bitsandbytes' names."""
    names = {"exp_avg": "1", "momentum_buffer": "1", "exp_avg_sq": "2"}
    out = {}
    for slot, i in names.items():
        if f"{slot}_qdata" in state:
            out |= {f"state{i}": state[f"{slot}_qdata"], f"absmax{i}": state[f"{slot}_scale"]}
        elif slot in state:
            out[f"state{i}"] = state[slot]
    return out


def assert_next_steps_agree(theirs: Any, a: list[nn.Parameter], ours: Any, b: list[nn.Parameter]) -> None:
    steps(theirs, a, 10, 11)
    steps(ours, b, 10, 11)
    for one, two in zip(a, b, strict=True):
        torch.testing.assert_close(one, two, **WEIGHT)
        for key, value in quantised(ours.state[two]).items():
            expected = theirs.state[one][key]
            if value.dtype == torch.uint8:
                table = theirs.state[one][key.replace("state", "qmap")]
                assert (table[value.int()] - table[expected.int()]).abs().max() <= STEP, key
                assert (value != expected).float().mean() < OTHER_CODES, key
            else:
                torch.testing.assert_close(value, expected, rtol=ABSMAX, atol=1e-9)


@pytest.mark.parametrize("name", PAIRS)
def test_from_bitsandbytes(name: str) -> None:
    theirs, a, ours, b = pair(name)
    steps(theirs, a, 0, 5)
    copy_weights(a, b)
    load_bitsandbytes(ours, through_a_file(theirs.state_dict()))
    assert ours.param_groups[0]["lr"] == PAIRS[name][2]["lr"]
    for one, two in zip(a, b, strict=True):
        assert ours.state[two]["step"] == 5
        for key, value in quantised(ours.state[two]).items():
            assert torch.equal(value, theirs.state[one][key]), key
        large = one.numel() >= 4096 and "8bit" in name
        assert any(key.endswith("_qdata") for key in ours.state[two]) is large
    assert_next_steps_agree(theirs, a, ours, b)


@pytest.mark.parametrize("name", PAIRS)
def test_to_bitsandbytes(name: str) -> None:
    theirs, a, ours, b = pair(name)
    for group in ours.param_groups:
        group["lr"] = PAIRS[name][2]["lr"]
    steps(ours, b, 0, 5)
    copy_weights(b, a)
    theirs.param_groups[0]["lr"] = 7.0
    theirs.load_state_dict(through_a_file(to_bitsandbytes(ours)))
    assert theirs.param_groups[0]["lr"] == PAIRS[name][2]["lr"]
    for one, two in zip(a, b, strict=True):
        assert theirs.state[one]["step"] == 5
        for key, value in quantised(ours.state[two]).items():
            assert torch.equal(theirs.state[one][key], value), key
    assert_next_steps_agree(theirs, a, ours, b)


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "SGD8bit"])
def test_there_and_back_is_the_same_state_dict(name: str) -> None:
    theirs, a, ours, _ = pair(name)
    steps(theirs, a, 0, 3)
    with torch.no_grad():  # a block that was never written, as all are before the first step
        theirs.state[a[0]]["state1"].view(-1)[:256] = 0
        theirs.state[a[0]]["absmax1"][0] = 0
    before = theirs.state_dict()
    load_bitsandbytes(ours, before)
    assert not ours.state[ours.param_groups[0]["params"][0]]["step"].isnan()
    after = to_bitsandbytes(ours)
    assert after["state"].keys() == before["state"].keys()
    for key, values in before["state"].items():
        assert after["state"][key].keys() == values.keys()
        assert after["state"][key]["step"] == values["step"]
        for slot, value in values[NESTED].items():
            other = after["state"][key][NESTED][slot]
            if slot.startswith("qmap"):
                torch.testing.assert_close(other, value, rtol=2e-7, atol=0)  # an ulp
            elif slot == "state1" and key == 0:
                assert torch.equal(other.view(-1)[256:], value.view(-1)[256:])
                assert (other.view(-1)[:256] == 127).all()  # the code of zero, where absmax 0 said so
            else:
                assert torch.equal(other, value), (key, slot)


def test_defaults_of_both_agree_over_many_steps() -> None:
    """Not one step but fifty, each from its own states, with bitsandbytes' bounds (its tests/test_optim.py)."""
    theirs, a, ours, b = pair("AdamW8bit")
    ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = 1e-3
    steps(theirs, a, 0, 50)
    steps(ours, b, 0, 50)
    for one, two in zip(a, b, strict=True):
        assert (one - two).abs().mean() < 6e-5 and ((one - two).abs() / one.abs().clamp(min=1e-3)).mean() < 6e-4


# --- where the two keep different things ----------------------------------------------------------------------------


@pytest.mark.parametrize("states", ["fp32", "compact", "fp8-lm", "4bit"])
def test_8_bits_into_other_states(states: str) -> None:
    """Values are read and quantised anew."""
    theirs, a, eight, b = pair("AdamW8bit")
    steps(theirs, a, 0, 5)
    other = optim.AdamW(b, states=states)
    load_bitsandbytes(other, theirs.state_dict())
    exact = optim.AdamW(parameters(), states="fp32")
    load_bitsandbytes(exact, theirs.state_dict())
    assert set(other.state[b[0]]) != set(eight.state[b[0]])
    for param, same in zip(b, exact.param_groups[0]["params"], strict=True):
        moments = exact.state[same]
        for slot in ("exp_avg", "exp_avg_sq"):
            assert moments[slot].dtype == torch.float32 and moments[slot].any()
            if states == "fp32":
                assert torch.equal(other.state[param][slot], moments[slot])
    table = bnb.functional.create_dynamic_map(signed=True)
    codes, absmax = theirs.state[a[1]]["state1"], theirs.state[a[1]]["absmax1"]
    value = table[codes.int()] * absmax.repeat_interleave(256)[: codes.numel()]
    torch.testing.assert_close(exact.state[exact.param_groups[0]["params"][1]]["exp_avg"], value, rtol=1e-6, atol=0)
    steps(other, b, 5, 6)


def test_embeddings_get_their_32_bits() -> None:
    embedding, copied = nn.Embedding(100, 64), nn.Embedding(100, 64)
    theirs = bnb.optim.AdamW8bit(embedding.parameters())  # 8 bits: nobody registered an override
    optim.mark_embeddings(copied)
    ours = optim.AdamW(copied.parameters(), states="8bit")
    steps(theirs, list(embedding.parameters()), 0, 3)
    load_bitsandbytes(ours, theirs.state_dict())
    assert theirs.state[embedding.weight]["state1"].dtype == torch.uint8
    assert ours.state[copied.weight]["exp_avg"].dtype == torch.float32
    steps(ours, list(copied.parameters()), 3, 4)
    again = bnb.optim.AdamW8bit(embedding.parameters())
    again.load_state_dict(to_bitsandbytes(ours))
    assert again.state[embedding.weight]["state1"].dtype == torch.float32
    steps(again, list(embedding.parameters()), 4, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_parameters(dtype: torch.dtype) -> None:
    theirs, a, _, b = pair("AdamW8bit", dtype)
    ours = optim.AdamW(b, states="8bit", master="fp32")
    steps(theirs, a, 0, 2)
    copy_weights(a, b)
    load_bitsandbytes(ours, theirs.state_dict())
    assert torch.equal(ours.state[b[0]]["exp_avg_qdata"], theirs.state[a[0]]["state1"])
    assert torch.equal(ours.state[b[0]]["master"], b[0].float())
    with pytest.warns(UserWarning, match="keeps no master"):
        out = to_bitsandbytes(ours)
    theirs.load_state_dict(out)
    assert theirs.state[a[2]]["state1"].dtype == torch.float32
    steps(theirs, a, 2, 3)


def test_groups_and_schedulers() -> None:
    a, b = parameters(), parameters()
    split: Callable[[list[nn.Parameter]], Any] = lambda p: [{"params": p[:1]}, {"params": p[1:], "weight_decay": 0.0}]  # noqa: E731
    theirs, ours = bnb.optim.AdamW8bit(split(a), lr=1e-2), optim.AdamW(split(b), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(theirs, lambda step: 1 / (1 + step))
    steps(theirs, a, 0, 2)
    schedule.step()
    load_bitsandbytes(ours, theirs.state_dict())
    assert [g["lr"] for g in ours.param_groups] == [5e-3, 5e-3]
    assert [g["initial_lr"] for g in ours.param_groups] == [1e-2, 1e-2]
    assert [g["weight_decay"] for g in ours.param_groups] == [1e-2, 0.0]
    out = to_bitsandbytes(ours)
    assert [g["params"] for g in out["param_groups"]] == [[0], [1, 2]]
    assert [g["initial_lr"] for g in out["param_groups"]] == [1e-2, 1e-2]


# --- refused --------------------------------------------------------------------------------------------------------


def broken(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    theirs, a, *_ = pair("AdamW8bit")
    steps(theirs, a, 0, 1)
    state_dict = copy.deepcopy(theirs.state_dict())
    change(state_dict)
    return state_dict


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("state"), "not an optimizer's state_dict"),
        (lambda s: s["param_groups"][0]["params"].pop(), r"parameters per group: the optimizer has \[3\]"),
        (lambda s: s["state"].update({9: {"step": 1}}), "in none of its groups"),
        (lambda s: s["state"][0][NESTED].pop("state2"), "parameter 0: the checkpoint lacks state2"),
        (lambda s: s["state"][0].pop("step"), "lacks step"),
        (lambda s: s["state"][0].update(unorm_vec=torch.zeros(1)), "unorm_vec belong to another optimizer"),
        (lambda s: s["state"][0][NESTED].update(max1=torch.zeros(1)), "max1 belong to another optimizer or an old"),
        (lambda s: s["state"][0][NESTED].update(state1=torch.zeros(2, 48, 100)), "state1 is"),
        (lambda s: s["state"][0][NESTED].pop("absmax1"), "no absmax1"),
        (lambda s: s["state"][0][NESTED].update(absmax1=torch.ones(3)), "one per 256 elements"),
        (lambda s: s["state"][0][NESTED].update(qmap1=torch.linspace(-1, 1, 256)), "qmap1 is not the dynamic"),
        (lambda s: s["state"][2][NESTED]["state1"].fill_(torch.nan), "NaN or Inf"),
    ],
)
def test_load_refuses(change: Callable[[dict[str, Any]], object], message: str) -> None:
    _, _, ours, b = pair("AdamW8bit")
    steps(ours, b, 0, 1)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=message):
        load_bitsandbytes(ours, broken(change))
    after = ours.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, values in before["state"].items():
        assert all(torch.equal(value, after["state"][key][slot]) for slot, value in values.items())


def test_one_moment_is_not_two() -> None:
    lion, a, *_ = pair("Lion8bit")
    steps(lion, a, 0, 1)
    with pytest.raises(ValueError, match="lacks state2"):
        load_bitsandbytes(optim.AdamW(parameters()), lion.state_dict())
    adam, a, *_ = pair("AdamW8bit")
    steps(adam, a, 0, 1)
    with pytest.raises(ValueError, match="absmax2, qmap2, state2 belong to another"):
        load_bitsandbytes(optim.Lion(parameters()), adam.state_dict())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: optim.Adam(p, weight_decay=0.1), "decouples weight decay in Adam8bit"),
        (lambda p: optim.AdamW(p, maximize=True), "ignores maximize=True"),
        (lambda p: optim.SGD(p, momentum=0.9, nesterov=True), "ignores nesterov=True"),
        (lambda p: optim.SGD(p, momentum=0.9, dampening=0.1), "ignores dampening=0.1"),
        (lambda p: optim.SGD(p), "no SGD without momentum"),
        (lambda p: optim.StableAdamW(p), "no StableAdamW"),
        (lambda p: optim.AdamW(p, states="compact"), "kept as e0m7; bitsandbytes knows 8bit and fp32"),
    ],
)
def test_save_refuses(make: Callable[..., Any], message: str) -> None:
    params = parameters()
    optimizer = make(params)
    steps(optimizer, params, 0, 1)
    with pytest.raises(ValueError, match=message):
        to_bitsandbytes(optimizer)


def test_load_refuses_decay_that_would_be_coupled() -> None:
    theirs, a, *_ = pair("Adam8bit-decay")
    steps(theirs, a, 0, 1)
    with pytest.raises(ValueError, match=r"use hf_lowprec\.optim\.AdamW"):
        load_bitsandbytes(optim.Adam(parameters()), theirs.state_dict())
