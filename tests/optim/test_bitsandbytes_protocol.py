# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes' own test of its 8-bit optimizers (0.50, `test_optimizer8bit`), with ours beside theirs: fifty steps,
after each of them weights and moments against float32, every ten steps a state dict through a file, both ways.

Then all go on from our weights and codes, so that every step is judged by itself. Their bounds are wide (3e-3 where
moments are 1e-3); the narrow ones below are between what both computed from the same codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_bitsandbytes import NESTED, PAIRS, no_overrides, quantised, through_a_file
from torch import Tensor, nn

from hf_lowprec.formats import get_format
from hf_lowprec.optim.bitsandbytes import load_bitsandbytes, to_bitsandbytes

__all__ = ["no_overrides"]  # a fixture of every test here

F, B, H = torch.float32, torch.bfloat16, torch.float16
ROWS, COLUMNS, STEPS = 1024, (32, 1024, 4097), 50
MISSES = 20  # moments per step further off than atol 3e-3, rtol 1e-3
WEIGHTS = {F: (1e-5, 1e-3), H: (1e-5, 1e-3), B: (1e-4, 1e-2)}  # atol, rtol of every weight
MEANS = {F: (6e-5, 6e-4), H: (6e-5, 6e-4), B: (1.7e-4, 1.6e-3)}  # of the difference, absolute and relative
# Their CPU library looks codes up by x / absmax in steps of 2^-15, and may miss the nearest by as much. Ours does not.
THEIR_STEP = 2.0**-15
FLIPS = 4  # Lion: signs of a sum that is 0 but for roundings


class Lion(torch.optim.Optimizer):
    """arXiv 2302.06675 in float32, which torch does not have."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p.data))
                p.data.mul_(1 - lr * group["weight_decay"])
                p.data.sub_(lr * (b1 * m + (1 - b1) * p.grad).sign())
                m.mul_(b2).add_(p.grad, alpha=1 - b2)


TRUTHS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW8bit": torch.optim.AdamW,
    "Adam8bit": torch.optim.Adam,
    "Lion8bit": Lion,
    "SGD8bit": torch.optim.SGD,
}
SLOTS = {"AdamW8bit": ("exp_avg", "exp_avg_sq"), "Adam8bit": ("exp_avg", "exp_avg_sq"), "Lion8bit": ("exp_avg",)}
QUICK = {(name, 32, dtype) for name in TRUTHS for dtype in (F, B, H)} | {("Lion8bit", 1024, B)}  # the rest is slow
CASES = [
    pytest.param(
        name, columns, dtype, id=f"{name}-{columns}-{str(dtype)[6:]}",
        marks=() if (name, columns, dtype) in QUICK else pytest.mark.slow,
    )
    for name in TRUTHS for columns in COLUMNS for dtype in (F, B, H)
]  # fmt: skip


def decoded(codes: Tensor, absmax: Tensor, table: Tensor) -> Tensor:
    per_element = absmax.repeat_interleave(256)[: codes.numel()].view(codes.shape)
    return table[codes.int()] * per_element


def assert_nearest(codes: Tensor, absmax: Tensor, table: Tensor, value: Tensor, slack: float, what: object) -> None:
    """Each code is the nearest to value / absmax, or no more than `slack` further off."""
    blocks = nn.functional.pad(value.abs().flatten(), (0, -value.numel() % 256)).view(-1, 256)
    torch.testing.assert_close(absmax, blocks.amax(1), rtol=1e-6, atol=0)
    z = value.double() / absmax.double().repeat_interleave(256)[: value.numel()].view(value.shape)
    table = table.double()
    nearest = table[torch.searchsorted((table[1:] + table[:-1]) / 2, z)]
    excess = (z - table[codes.int()]).abs() - (z - nearest).abs()
    assert excess.max() <= slack, (what, excess.max())


def assert_rounded(found: Tensor, exact: Tensor, flips: int, what: object) -> None:
    """16 bits: the nearest, one in 1000 a unit of the last place further off; float32: but for the order of roundings.
    But for `flips` elements."""
    if found.dtype == F:
        wrong = ~torch.isclose(found, exact, rtol=1e-5, atol=1e-8)
    else:
        near = exact.to(found.dtype)
        off = found != near
        assert off.float().mean() <= 1e-3, (what, off.sum())
        ulp = torch.finfo(found.dtype).eps * near.float().abs() + 1e-7  # where a weight and its update cancel
        wrong = (found.float() - near.float()).abs() > ulp
    assert wrong.sum() <= flips, (what, wrong.sum())


def assert_state_round_trip(
    name: str, theirs: Any, ours: Any, weight: Tensor, table: dict[str, Tensor]
) -> tuple[Any, Any]:
    """State dicts of both through files into new optimizers of both; returns the new ones."""
    make_theirs, make_ours, kwargs = PAIRS[name]
    (mine,) = ours.param_groups[0]["params"]
    before = {key: value.clone() for key, value in quantised(ours.state[mine]).items()}

    same = nn.Parameter(weight.clone())
    again = make_theirs([same], **{**kwargs, "lr": 7.0})
    again.load_state_dict(through_a_file(to_bitsandbytes(ours)))
    crossed = nn.Parameter(weight.clone())
    from_theirs = make_ours([crossed], states="8bit", master=None, **kwargs)
    load_bitsandbytes(from_theirs, through_a_file(again.state_dict()))
    plain = nn.Parameter(weight.clone())
    from_ours = make_ours([plain], states="8bit", master=None, **kwargs)
    from_ours.load_state_dict(through_a_file(ours.state_dict()))

    assert again.param_groups[0]["lr"] == kwargs["lr"] and again.state[same]["step"] == int(ours.state[mine]["step"])
    for key, value in before.items():
        assert value.dtype == (torch.uint8 if key.startswith("state") else F)
        assert torch.equal(again.state[same][key], value), key
        assert torch.equal(quantised(from_theirs.state[crossed])[key], value), key
        assert torch.equal(quantised(from_ours.state[plain])[key], value), key
    for key, values in table.items():
        assert torch.equal(again.state[same][f"qmap{key}"], values)
        assert torch.equal(again.state_dict()["state"][0][NESTED][f"qmap{key}"], values)
    return again, from_theirs


@pytest.mark.parametrize("name, columns, dtype", CASES)
def test_steps(name: str, columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(columns)
    weight = (0.1 * torch.randn(ROWS, columns, generator=generator)).to(dtype)
    make_theirs, make_ours, kwargs = PAIRS[name]
    truth = nn.Parameter(weight.float())
    a, b = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    exact = TRUTHS[name]([truth], kwargs) if name == "Lion8bit" else TRUTHS[name]([truth], **kwargs)
    theirs = make_theirs([a], **kwargs)
    ours = make_ours([b], states="8bit", master=None, **kwargs)  # they round 16 bits to nearest
    slots = SLOTS.get(name, ("momentum_buffer",))
    formats = {"1": "dynamic8", "2": "dynamic8u"}
    tables = {str(i): torch.tensor(get_format(formats[str(i)]).values) for i in range(1, len(slots) + 1)}
    flips = FLIPS if name == "Lion8bit" else 0
    for step in range(STEPS):
        grad = (0.01 * torch.randn(ROWS, columns, generator=generator)).to(dtype)
        truth.grad, a.grad, b.grad = grad.float(), grad.clone(), grad.clone()
        for optimizer in (exact, theirs, ours):
            optimizer.step()

        found, best = b.detach(), truth.detach()
        far = ~torch.isclose(found.float(), best, atol=WEIGHTS[dtype][0], rtol=WEIGHTS[dtype][1])
        assert far.sum() <= flips, (step, far.sum())
        error = (found.float() - best).abs()
        assert error.mean() < MEANS[dtype][0] and (error / (best.abs() + 1e-9)).mean() < MEANS[dtype][1], step
        assert_rounded(found, best, flips, (step, "float32"))
        assert_rounded(found, a.detach().float(), flips, (step, "bitsandbytes"))

        state, other = quantised(ours.state[b]), theirs.state[a]
        for (key, table), slot in zip(tables.items(), slots, strict=True):
            codes, absmax = state[f"state{key}"], state[f"absmax{key}"]
            moment = exact.state[truth][slot]
            assert torch.equal(table, other[f"qmap{key}"])
            value = decoded(codes, absmax, table)
            assert (~torch.isclose(value, moment, atol=3e-3, rtol=1e-3)).sum() < MISSES, (step, slot)
            if key == "1":
                assert (codes != other["state1"]).float().mean() < 5e-3, step  # see `THEIR_STEP`
            if columns > 32 and step % 10 != 9:
                continue  # what follows takes five times as long as the steps
            # A second moment that is not 0 is never kept as 0: half of the smallest code further off, at most.
            slack = 5e-7 if key == "1" else float(table[1])
            assert_nearest(codes, absmax, table, moment, slack, (step, slot, "ours"))
            codes_of_zero = codes == int((table == 0).nonzero())
            assert key == "1" or not (codes_of_zero & (moment != 0)).any()
            codes, absmax = other[f"state{key}"], other[f"absmax{key}"]
            assert_nearest(codes, absmax, table, moment, THEIR_STEP, (step, slot, "theirs"))

        if step and step % 10 == 0:
            theirs, ours = assert_state_round_trip(name, theirs, ours, b.detach(), tables)
            ((a,), (b,)) = (optimizer.param_groups[0]["params"] for optimizer in (theirs, ours))
            state, other = quantised(ours.state[b]), theirs.state[a]
        with torch.no_grad():
            truth.copy_(b)
            a.copy_(b)
            for (key, table), slot in zip(tables.items(), slots, strict=True):
                codes, absmax = state[f"state{key}"], state[f"absmax{key}"]
                other[f"state{key}"].copy_(codes)
                other[f"absmax{key}"].copy_(absmax)
                exact.state[truth][slot].copy_(decoded(codes, absmax, table))
