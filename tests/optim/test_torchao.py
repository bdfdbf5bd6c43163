# SPDX-License-Identifier: Apache-2.0
"""torchao's low-bit Adam (0.18, `torchao.optim`) against ours with the same codebooks and blocks: weights, scales and
codes over many steps. What the two do differently has a test of its own below.

torchao compiles its step; here it runs eagerly, so that every operation rounds once, as ours do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowprec import optim
from hf_lowprec.formats import get_format
from hf_lowprec.numerics.containers import unpack_codes
from hf_lowprec.recipe import Quant, Scaling, States

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ao = pytest.importorskip("torchao.optim")
    from torchao.optim import subclass_4bit, subclass_8bit

F, B = torch.float32, torch.bfloat16
SLOTS = ("exp_avg", "exp_avg_sq")
BETA1, BETA2 = 0.9, 0.999


def blocks(first: str, second: str, size: int) -> States:
    """torchao's layout where ours of that name is another one; both moments rounded to nearest."""
    scaling = Scaling(granularity="block", block=(size,))
    return States(exp_avg=Quant(format=first, scaling=scaling), exp_avg_sq=Quant(format=second, scaling=scaling),
                  min_numel=4096)  # fmt: skip


@dataclass(frozen=True)
class Case:
    theirs: Callable[..., Any]
    ours: Callable[..., Any]
    states: str | States
    block: int


CASES = {
    "AdamW8bit": Case(ao.AdamW8bit, optim.AdamW, "8bit", 256),
    "Adam8bit": Case(ao.Adam8bit, optim.Adam, "8bit", 256),  # both: the decay joins the gradient
    "AdamW4bit": Case(ao.AdamW4bit, optim.AdamW, blocks("dynamic4", "linear4u", 128), 128),
    "AdamWFp8": Case(ao.AdamWFp8, optim.AdamW, blocks("e4m3fn", "e4m3fn", 256), 256),
}


@pytest.fixture(autouse=True)
def eagerly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    yield


def pair(name: str, dtype: torch.dtype, shape: tuple[int, ...] = (64, 128)) -> tuple[Any, nn.Parameter, Any, Any]:
    """Theirs and ours over equal parameters; 16 bits are rounded to nearest."""
    case = CASES[name]
    weight = (0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    a, b = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    options = {"lr": 1e-3, "betas": (BETA1, BETA2), "weight_decay": 0.1}
    return case.theirs([a], **options), a, case.ours([b], states=case.states, master=None, **options), b


def step(optimizers: tuple[Any, ...], params: tuple[nn.Parameter, ...], number: int) -> None:
    grad = 0.01 * torch.randn(params[0].shape, generator=torch.Generator().manual_seed(100 + number))
    for optimizer, param in zip(optimizers, params, strict=True):
        param.grad = grad.to(param.dtype)
        optimizer.step()


def codes_of(state: dict[str, Any], slot: str, shape: torch.Size) -> Tensor:
    """One to a byte, of either."""
    if f"{slot}_qdata" in state:
        codes = state[f"{slot}_qdata"].view(torch.uint8)
        fmt = get_format("dynamic4")
        return codes if codes.shape == shape else unpack_codes(codes, shape.numel(), fmt).view(shape)
    codes = state[slot].codes.view(torch.uint8)
    # Two elements in a byte: theirs begin with the upper half, ours with the lower.
    return codes if codes.shape == shape else torch.stack([codes >> 4, codes & 15], 1).view(shape)


def set_codes(state: dict[str, Any], slot: str, source: dict[str, Any], shape: torch.Size) -> None:
    """Theirs from ours."""
    codes = codes_of(source, slot, shape)
    if state[slot].codes.shape != shape:
        codes = (codes.flatten()[::2] << 4) | codes.flatten()[1::2]
    state[slot].codes.view(torch.uint8).copy_(codes)
    state[slot].scale.copy_(source[f"{slot}_scale"])


def differing(theirs: dict[str, Any], ours: dict[str, Any], slot: str, shape: torch.Size) -> Tensor:
    return codes_of(theirs, slot, shape) != codes_of(ours, slot, shape)


def zeros_of(theirs: dict[str, Any], slot: str) -> Tensor:
    """Where theirs are the code of 0 of a second moment, which ours never are."""
    return (codes_of(theirs, slot, theirs[slot].shape) == 0) & (theirs[slot].dequantize() == 0)


# --- what is the same -----------------------------------------------------------------------------------------------


def test_codebooks_are_the_same() -> None:
    for theirs, ours in (
        (subclass_8bit.get_qmap_signed(), "dynamic8"),
        (subclass_8bit.get_qmap_unsigned(), "dynamic8u"),
        (subclass_4bit.get_qmap_signed(), "dynamic4"),
        (subclass_4bit.get_qmap_unsigned(), "linear4u"),
    ):
        assert torch.equal(torch.tensor(theirs), torch.tensor(get_format(ours).values)), ours


@pytest.mark.parametrize("dtype", [F, B], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_step_from_the_same_states(name: str, dtype: torch.dtype) -> None:
    """60 of them. Operations are in another order: a weight may be a rounding off, a value between two codes may get
    the other one of them, which is one in thousands."""
    theirs, a, ours, b = pair(name, dtype)
    elements, others, off, shape = 0, 0, 0, a.shape
    for number in range(60):
        step((theirs, ours), (a, b), number)
        if dtype == F:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=3e-8)
        else:
            torch.testing.assert_close(a, b, rtol=2.0**-7, atol=1e-7)  # a unit of the last place
            off += int((a != b).sum())
        state, other = ours.state[b], theirs.state[a]
        elements += a.numel()
        for slot in SLOTS:
            assert other[slot].block_size == CASES[name].block
            torch.testing.assert_close(other[slot].scale, state[f"{slot}_scale"], rtol=1e-6, atol=0)
            wrong = differing(other, state, slot, shape)
            apart = codes_of(other, slot, shape).int() - codes_of(state, slot, shape).int()
            assert not wrong.any() or apart.abs().max() == 1
            others += int((wrong & ~zeros_of(other, slot) if slot == "exp_avg_sq" else wrong).sum())
            set_codes(other, slot, state, shape)
            assert not differing(other, state, slot, shape).any()
        with torch.no_grad():
            a.copy_(b)
    assert others <= 5e-4 * elements and off <= 5e-4 * elements, (others, off, elements)


@pytest.mark.parametrize("name", CASES)
def test_two_hundred_steps(name: str) -> None:
    """Nothing is copied across: what differs is a code here and there, and by it a few weights by part of a step."""
    theirs, a, ours, b = pair(name, F)
    first = b.detach().clone()
    for number in range(200):
        step((theirs, ours), (a, b), number)
    error, moved = (a - b).detach().abs(), (b - first).abs().mean()
    assert moved > 5e-3
    assert error.mean() < 1e-4 * moved and error.flatten().quantile(0.99) < 2e-6, (error.mean(), moved)
    state, other = ours.state[b], theirs.state[a]
    for slot in SLOTS:
        torch.testing.assert_close(other[slot].scale, state[f"{slot}_scale"], rtol=2e-5, atol=0)
        assert differing(other, state, slot, a.shape).float().mean() < 2e-3


# --- what is not ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamWFp8"])
def test_a_second_moment_that_is_not_0_is_kept_as_0_by_theirs_only(name: str) -> None:
    states = {"AdamW8bit": "8bit", "AdamWFp8": "fp8"}[name]
    theirs, a, _, b = pair(name, F)
    ours = optim.AdamW([b], states=states)
    grad = torch.linspace(1e-8, 1e-4, a.numel()).view(a.shape)
    grad[:, 0] = 1.0  # one in every row, and so in every block
    for optimizer, param in ((theirs, a), (ours, b)):
        param.grad = grad.clone()
        optimizer.step()
    zeros = theirs.state[a]["exp_avg_sq"].dequantize() == 0
    assert zeros[:, 1:].all() and not zeros[:, 0].any()
    assert (codes_of(ours.state[b], "exp_avg_sq", a.shape) != 0).all()
    # In the next step theirs divides by what is left of one gradient, which then is anything.
    for optimizer, param in ((theirs, a), (ours, b)):
        before = param.detach().clone()
        param.grad = torch.full_like(grad, 1e-12)
        optimizer.step()
        moved = (param.detach() - before)[:, 1:].abs().max()
        assert (moved > 0.05) == (param is a), moved


def test_a_ragged_last_block() -> None:
    """Ours is in codes, too; theirs leaves such a tensor in the Parameter's own dtype."""
    theirs, a, ours, b = pair("AdamW8bit", B, shape=(41, 100))
    step((theirs, ours), (a, b), 0)
    assert type(theirs.state[a]["exp_avg"]) is Tensor and theirs.state[a]["exp_avg"].dtype == B
    assert ours.state[b]["exp_avg_qdata"].shape == (41, 100) and ours.state[b]["exp_avg_scale"].shape == (17,)


def test_moments_of_small_tensors_have_32_bits_in_ours() -> None:
    theirs, a, ours, b = pair("AdamW8bit", B, shape=(31, 33))
    step((theirs, ours), (a, b), 0)
    assert [theirs.state[a][slot].dtype for slot in SLOTS] == [B, B]
    assert [ours.state[b][slot].dtype for slot in SLOTS] == [F, F]
    assert a.grad is not None
    grad = a.grad.float()
    torch.testing.assert_close(ours.state[b]["exp_avg"], grad * (1 - BETA1), rtol=1e-6, atol=0)


def test_a_block_of_zeros() -> None:
    """Reads as zeros in both; by a scale of 1 in ours, of 1e-12 in theirs."""
    theirs, a, ours, b = pair("AdamW8bit", F)
    for optimizer, param in ((theirs, a), (ours, b)):
        param.grad = torch.zeros_like(param)
        param.grad[0, 0] = 1.0
        optimizer.step()
    state, other = ours.state[b], theirs.state[a]
    for slot in SLOTS:
        assert (other[slot].scale[1:] == 1e-12).all() and (state[f"{slot}_scale"][1:] == 1.0).all()
        assert not other[slot].dequantize()[2:].any() and not differing(other, state, slot, a.shape).any()
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_stochastic_rounding_of_weights() -> None:
    """An option of theirs, what ours does by itself. Words are others; neither ever leaves the two neighbours of the
    exact result, or is off on average."""
    exact, c, _, _ = pair("AdamW8bit", F, shape=(256, 256))
    weight = c.detach().bfloat16()
    with torch.no_grad():
        c.copy_(weight)
    a, b = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    options = {"lr": 1e-3, "betas": (BETA1, BETA2), "weight_decay": 0.1}
    theirs, ours = ao.AdamW8bit([a], bf16_stochastic_round=True, **options), optim.AdamW([b], **options)
    grad = (0.01 * torch.randn(c.shape, generator=torch.Generator().manual_seed(7))).bfloat16()
    for optimizer, param in ((exact, c), (theirs, a), (ours, b)):
        param.grad = grad.to(param.dtype)
        optimizer.step()
    best = c.detach()
    ulp = torch.exp2(torch.floor(torch.log2(best.abs().clamp(min=1e-30))) - 7)
    part = (best / ulp) % 1
    expected = (2 * part * (1 - part)).mean()
    assert torch.minimum(part, 1 - part).mean() < expected - 0.03  # what rounding to nearest would be off
    large = best.abs() > 1e-4  # a weight and its update do not cancel
    for param in (a, b):
        off = ((param.detach().float() - best) / ulp)[large]
        assert off.abs().max() < 1.001
        assert abs(off.mean()) < 5 * 0.5 / 256 and abs(off.abs().mean() - expected) < 5 * 0.5 / 256


@pytest.mark.parametrize(
    "name, states, block, second",
    [("AdamW8bit", "8bit", 256, "dynamic8u"), ("AdamW4bit", "4bit", 128, "e3m1normal0u"),
     ("AdamWFp8", "fp8", 128, "e4m3fn")],
)  # fmt: skip
def test_our_own_states_of_these_widths(name: str, states: str, block: int, second: str) -> None:
    """4bit: second moments in eight binades, theirs in 16 equal steps. fp8: smaller blocks. Both: rounded
    stochastically, so that they can fall."""
    theirs, a, _, b = pair(name, F)
    ours = optim.AdamW([b], states=states)
    step((theirs, ours), (a, b), 0)
    quant = optim.states.resolve_states(states).exp_avg_sq
    assert quant is not None and quant.format == second and quant.nonzero
    assert quant.rounding.mode == ("nearest" if name == "AdamW8bit" else "stochastic")
    assert ours.state[b]["exp_avg_sq_scale"].numel() == a.numel() // block
    assert theirs.state[a]["exp_avg_sq"].block_size == CASES[name].block
    bytes_of_theirs = sum(theirs.state[a][slot].codes.numel() for slot in SLOTS)
    assert sum(ours.state[b][f"{slot}_qdata"].nbytes for slot in SLOTS) == bytes_of_theirs
