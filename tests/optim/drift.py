# SPDX-License-Identifier: Apache-2.0
"""Adam's moments in low precision beside float32 ones, on gradients whose scale falls; no optimizer, states alone.

    python tests/optim/drift.py        prints the table of `hf_lowprec.optim.named`

Gradients are normal, with lognormal scales per row, column and element: 1, 0.4 and 0.2 (natural logarithm), about 0.65
octaves within a block. (A Llama of 3 layers and width 128 after 600 steps on text: 0.2 to 0.4 in most matrices, 0.9 in
the worst, the down projections.) At half time those of `falling` elements fall to a third.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import NamedTuple

import torch

from hf_lowprec.optim import states as st
from hf_lowprec.recipe import Rounding, States

SR, NEAREST = Rounding(mode="stochastic"), Rounding()
EPS = 1e-8


class Drift(NamedTuple):
    error: float  # of the update, relative, mean of the last 100 steps
    largest: float  # max |update|, as a multiple of float32's own
    octaves: float  # median log2(v / v_ref) of the falling elements
    zeros: int  # of v, where v_ref is not 0
    needed: float  # predicted scales: largest magnitude / bound over all steps; 0 without


def drift(
    states: States,
    betas: tuple[float, float] = (0.9, 0.999),
    steps: int = 3000,
    falling: str = "all",
    shape: tuple[int, int] = (16, 128),
    seed: int = 0,
) -> Drift:
    """falling: `all`, a random `half`, or `none` of the elements."""
    (b1, b2), generator = betas, torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    rows, columns = shape
    scale = 1e-4 * torch.exp(normal(rows, 1) + 0.4 * normal(1, columns) + 0.2 * normal(*shape))
    chosen = torch.rand(shape, generator=generator) < {"all": 1.0, "half": 0.5, "none": 0.0}[falling]
    later = torch.where(chosen, scale / 3, scale)
    m, v = torch.zeros(shape), torch.zeros(shape)
    state, slots = st.init_state(m, states), st.layout(states, torch.float32)
    finite = torch.tensor(True)
    largest, largest_ref, needed, errors = 0.0, 0.0, 0.0, []
    for t in range(1, steps + 1):
        g = normal(*shape) * (scale if 2 * t <= steps else later)
        m, v = m + (g - m) * (1 - b1), v * b2 + g * g * (1 - b2)
        old = {name: st.read(state, name, slots[name], torch.float32, m.shape) for name in st.ADAM}
        new = {
            "exp_avg": old["exp_avg"] + (g - old["exp_avg"]) * (1 - b1),
            "exp_avg_sq": old["exp_avg_sq"] * b2 + g * g * (1 - b2),
        }
        top = {"exp_avg": g.abs().max(), "exp_avg_sq": (g * g).max()}
        for (name, value), beta in zip(new.items(), betas, strict=True):
            quant, bound = slots[name], None
            if st.is_predicted(quant):
                bound = (beta * st.stored_amax(state, name, quant) + (1 - beta) * top[name]) * st.rounding_bound(quant)
                needed = max(needed, (value.abs().max() / bound).item())
            seed_of = None if quant is None else st.stream_seed(quant.rounding, 0, name, torch.tensor(float(t)))
            st.write(state, name, quant, value, finite=finite, seed=seed_of, bound=bound)
        update, reference = (
            a / (1 - b1**t) / ((b / (1 - b2**t)).sqrt() + EPS)
            for a, b in ((new["exp_avg"], new["exp_avg_sq"]), (m, v))
        )
        largest, largest_ref = max(largest, update.abs().max().item()), max(largest_ref, reference.abs().max().item())
        if t > steps - 100:
            errors.append(((update - reference).norm() / reference.norm()).item())
    stored = st.read(state, "exp_avg_sq", slots["exp_avg_sq"], torch.float32, m.shape)
    octaves = (stored / v).log2()[chosen if falling != "none" else torch.ones_like(chosen)].median().item()
    zeros = int(((stored == 0) & (v > 0)).sum())
    return Drift(sum(errors) / len(errors), largest / largest_ref, octaves, zeros, needed)


def with_v(name: str, rounding: Rounding) -> States:
    states = st.resolve_states(name)
    assert states.exp_avg_sq is not None
    return replace(states, exp_avg_sq=replace(states.exp_avg_sq, rounding=rounding))


if __name__ == "__main__":
    torch.set_num_threads(1)
    names = sys.argv[1:] or ["bf16", "8bit", "4bit", "fp8", "fp8-expand", "fp8-lm", "compact"]
    for name in names:
        for falling in ("none", "all", "half"):
            nearest, stochastic = (drift(with_v(name, r), falling=falling, shape=(48, 128)) for r in (NEAREST, SR))
            print(
                f"{name:12} {falling:5} octaves {nearest.octaves:+.2f} / {stochastic.octaves:+.2f}   "
                f"error {nearest.error:.2f} / {stochastic.error:.2f}   "
                f"largest {nearest.largest:.2f} / {stochastic.largest:.2f}"
            )
