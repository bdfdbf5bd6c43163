# SPDX-License-Identifier: Apache-2.0
"""Moments and masters of any width, packed: exactly their bits, the values of their formats, the same steps in slices
and in shards, checkpoints that resume bit for bit, and models that train."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from sharding import REGULAR, differing, trained
from test_cpu_path import MAKE, NUMEL, SIZE, assert_same, counted, without_slices
from test_cpu_path import train as train_one
from torch import Tensor, nn

from hf_lowprec.formats import get_format
from hf_lowprec.numerics import encode, scale_from_amax
from hf_lowprec.numerics.containers import pack_codes, stored_size, unpack_codes
from hf_lowprec.optim import AdamW, algorithms, compiled, cpu, inplace
from hf_lowprec.optim import states as st
from hf_lowprec.recipe import NONE, Quant, Rounding, Scaling, States

SR = Rounding(mode="stochastic")
# Width: first moment, second moment. Blocks of 32; the second moment is never 0 where it was not.
LAYOUTS = {
    3: ("e2m0", "e3m0u"),
    5: ("e2m2", "e4m1u"),
    6: ("e3m2", "e4m2u"),
    7: ("e3m3", "e5m2noneu"),
    9: ("e4m4", "e5m4u"),
}


def packed_states(bits: int, granularity: str = "block", **more: Any) -> States:
    block = (32,) if granularity == "block" else ()
    scaling = Scaling(granularity=granularity, block=block, snap="rceil", store="e8m0")
    first, second = LAYOUTS[bits]
    m = Quant(format=first, scaling=scaling, rounding=SR)
    return States(exp_avg=m, exp_avg_sq=Quant(format=second, scaling=scaling, rounding=SR, nonzero=True), **more)


# --- bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 16))
def test_codes_in_memory(bits: int) -> None:
    """8 codes to B bytes (4 bits: 2 to a byte), and a cut at whole groups is a cut of the bytes."""
    fmt = get_format(f"e{min(bits - 1, 5)}m{bits - 1 - min(bits - 1, 5)}")
    if bits == 8:
        return
    for n in (0, 1, 8, 13, 64):
        codes = torch.randint(0, 1 << bits, (n,)).to(torch.uint8 if bits < 8 else torch.int16)
        packed = pack_codes(codes, fmt)
        assert packed.dtype == torch.uint8
        assert packed.numel() == stored_size(n, fmt) == (-(-n // 2) if bits == 4 else -(-n // 8) * bits)
        assert torch.equal(unpack_codes(packed, n, fmt), codes)
        assert torch.equal(unpack_codes(packed[stored_size(8, fmt) :], max(n - 8, 0), fmt), codes[8:])


@pytest.mark.parametrize("bits", LAYOUTS)
def test_state_bytes_are_the_formula(bits: int) -> None:
    for shape in ((33,), (7, 13), (64, 65)):
        param = nn.Parameter(torch.randn(shape))
        states = packed_states(bits)
        optimizer = AdamW([param], lr=1e-2, states=states)
        param.grad = torch.randn(shape)
        optimizer.step()
        state, n = optimizer.state[param], param.numel()
        for slot in ("exp_avg", "exp_avg_sq"):
            assert state[f"{slot}_qdata"].nbytes == -(-n // 8) * bits
            assert state[f"{slot}_scale"].nbytes == -(-n // 32)
        total = 2 * (-(-n // 8) * bits + -(-n // 32)) + 4  # and the step
        assert sum(v.nbytes for v in state.values()) == total == st.state_bytes(states, torch.float32, shape)


@pytest.mark.parametrize("granularity", ["block", "row", "tensor"])
@pytest.mark.parametrize("name", ["e2m0", "e2m2", "e3m3", "e4m4", "e0m6", "e6m5"])
def test_values_are_those_of_the_format(name: str, granularity: str) -> None:
    block = (50,) if granularity == "block" else ()
    scaling = Scaling(granularity=granularity, block=block, snap="ocp", store="e8m0")
    quant, x, fmt = Quant(format=name, scaling=scaling), torch.randn(7, 100), get_format(name)
    state = st.init_state(x, States(exp_avg=quant), ("exp_avg",))
    st.write(state, "exp_avg", quant, x, finite=None)
    groups = {"block": x.view(-1, 50), "row": x, "tensor": x.view(1, -1)}[granularity]
    scale = scale_from_amax(groups.abs().amax(1), fmt, scaling)[:, None]
    values = torch.tensor([fmt.decode(int(c) & 0xFFFF) for c in encode(groups / scale, fmt).view(-1)])
    wanted = (values.view(groups.shape) * scale).view(x.shape)
    assert torch.equal(st.read(state, "exp_avg", quant, torch.float32, x.shape), wanted)


def test_a_packed_master() -> None:
    """12 bits beside a bfloat16 Parameter."""
    param = nn.Parameter(torch.randn(40, 16).bfloat16())
    states = States(master=Quant(format="e6m5", scaling=NONE, rounding=SR))
    optimizer = AdamW([param], lr=1e-2, states=states)
    for _ in range(3):
        param.grad = torch.randn_like(param)
        optimizer.step()
    master = optimizer.state[param]["master_qdata"]
    assert master.nbytes == 640 * 12 // 8
    assert torch.equal(
        st.read(optimizer.state[param], "master", states.master, torch.float32, param.shape).bfloat16(), param
    )


# --- steps ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(cpu, "SLICE", SIZE)
    monkeypatch.setattr(inplace, "SLICE", 2 * SIZE)
    monkeypatch.setattr(compiled, "SIZES", (SIZE,))
    return monkeypatch


@pytest.mark.parametrize("bits", LAYOUTS)
def test_slices_give_the_bits_of_the_truth(plain: pytest.MonkeyPatch, bits: int) -> None:
    arguments = (MAKE["adamw"], NUMEL, torch.bfloat16)
    expected = without_slices(plain, *arguments, states=packed_states(bits))
    sizes = counted(plain, algorithms, "update")
    assert_same(train_one(*arguments, states=packed_states(bits)), expected)
    assert sizes and max(sizes) <= SIZE


@pytest.mark.parametrize("bits", [3, 6, 9])
def test_shards_take_the_steps_of_an_ordinary_tensor(alone: None, bits: int) -> None:
    """Rows are packed by themselves; where they are whole blocks, into the same bytes."""
    states = packed_states(bits, min_numel=4096)
    one, shards = (trained("AdamW", torch.float32, 3, shard=shard, states=states) for shard in (False, True))
    assert not [key for key in differing(one, shards) if key.startswith("weight") and int(key[7:]) in REGULAR]


# --- training ------------------------------------------------------------------------------------------------------


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 8))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> float:
    target = torch.randn(16, 8, generator=torch.Generator().manual_seed(9))
    for step in steps:
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = (model(x) - (x @ target).tanh()).square().mean()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@functools.cache
def loss_after(steps: int, states: str | States = "fp32") -> float:
    model = model_of()
    return train(model, AdamW(model.parameters(), lr=1e-2, states=states), range(steps))


@pytest.mark.parametrize(("bits", "granularity"), [*((bits, "block") for bits in LAYOUTS), (5, "row")])
def test_a_model_trains(bits: int, granularity: str) -> None:
    """To the loss of float32 states, within a tenth of the way that they came; 3 bits within a fifth."""
    start, exact = loss_after(1), loss_after(40)
    way = start - exact
    assert way > 0.5 * start
    assert loss_after(40, packed_states(bits, granularity)) < exact + way / (5 if bits == 3 else 10)


def through_torch(value: dict[str, Any], path: Path) -> dict[str, Any]:
    torch.save(value, path)
    return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


def through_safetensors(value: dict[str, Any], path: Path) -> dict[str, Any]:
    """The states by themselves: every tensor is one that safetensors holds."""
    safetensors = pytest.importorskip("safetensors.torch")
    flat = {f"{i}.{k}": v.contiguous() for i, s in value["state"].items() for k, v in s.items()}
    safetensors.save_file(flat, path)
    loaded = safetensors.load_file(path)
    state = {i: {k: loaded[f"{i}.{k}"] for k in s} for i, s in value["state"].items()}
    return {**value, "state": state}


@pytest.mark.parametrize("through", [through_torch, through_safetensors])
@pytest.mark.parametrize("bits", [3, 7])
def test_a_resumed_run_is_bit_identical(bits: int, through: Any, tmp_path: Path) -> None:
    def start() -> tuple[nn.Module, AdamW]:
        model = model_of()
        return model, AdamW(model.parameters(), lr=1e-2, states=packed_states(bits))

    model, optimizer = start()
    train(model, optimizer, range(4))
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    saved = through(optimizer.state_dict(), tmp_path / "state")
    train(model, optimizer, range(4, 8))
    resumed, new = start()
    resumed.load_state_dict(weights)
    new.load_state_dict(saved)
    train(resumed, new, range(4, 8))
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in optimizer.state[a].items():
            assert torch.equal(bytes_of(value), bytes_of(new.state[b][key])), key


def bytes_of(value: Tensor) -> Tensor:
    return value.contiguous().view(-1).view(torch.uint8)


def test_a_checkpoint_of_another_width_is_refused() -> None:
    model = model_of()
    optimizer = AdamW(model.parameters(), lr=1e-2, states=packed_states(5))
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg_qdata"] = saved["state"][0]["exp_avg_qdata"][:-1]
    with pytest.raises(ValueError, match="exp_avg_qdata should be"):
        optimizer.load_state_dict(saved)
