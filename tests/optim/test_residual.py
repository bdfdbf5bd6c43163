# SPDX-License-Identifier: Apache-2.0
"""The low bits beside a bfloat16 Parameter: exhaustive over its codes, exact where it must be, never infinite."""

from __future__ import annotations

import pytest
import torch

from hf_lowprec.numerics.residual import join, split
from hf_lowprec.optim import states as st
from hf_lowprec.recipe import Residual, Rounding

SR = Rounding(mode="stochastic")
TOP = 0x7F7F8000  # bits of the least float32 that bfloat16 cannot hold to nearest
LARGEST = torch.finfo(torch.float32).max


def floats(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int32).view(torch.float32)


def ints(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.itemsize]).to(torch.int64)


def params() -> torch.Tensor:
    """Every finite bfloat16."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return every[every.isfinite()]


def samples(n: int = 1 << 20) -> torch.Tensor:
    """Every finite float32 is as likely as every other; then ties, subnormals and both ends of the range."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 0x7F800000, (n,), generator=generator)
    high = torch.arange(0x7F80) << 16
    edges = [high + low for low in (0, 1, 0x7F, 0x80, 0x81, 0x7FFF, 0x8000, 0x8001, 0x8080, 0xFFFF)]
    bits = torch.cat([bits, torch.arange(1 << 12), torch.arange(TOP - (1 << 12), 0x7F800000), *edges])
    return torch.cat([floats(bits), -floats(bits)])


def test_every_parameter_with_every_8_bit_residual_is_a_fixed_point():
    p = params()
    for r in range(-128, 128):
        residual = torch.full(p.shape, r, dtype=torch.int8)
        master = join(p, residual)
        assert master.isfinite().all()
        lost = (p == 0) & (r < 0)  # what split never gives
        assert torch.equal(ints(master)[~lost], (ints(p)[~lost] << 16) + (r << 8))
        words = None if r % 2 else torch.full(p.shape, 255, dtype=torch.int32)
        again = split(master, 8, words)
        assert torch.equal(ints(again[0]), ints(p))
        assert torch.equal(again[1][~lost], residual[~lost]) and not again[1][lost].any()


def test_every_parameter_with_16_bit_residuals_is_a_fixed_point():
    p = params()
    every = torch.arange(-(1 << 15), 1 << 15, 509).tolist()
    for r in [-(1 << 15), -(1 << 15) + 1, -1, 0, 1, (1 << 15) - 2, (1 << 15) - 1, *every]:
        residual = torch.full(p.shape, r, dtype=torch.int16)
        lost = (p == 0) & (r < 0)
        again = split(join(p, residual), 16)
        assert torch.equal(ints(again[0]), ints(p))
        assert torch.equal(again[1][~lost], residual[~lost])


def test_16_bits_are_exact_and_the_parameter_is_the_nearest():
    x = samples()
    p, r = split(x, 16)
    assert p.dtype == torch.bfloat16 and r.dtype == torch.int16 and p.isfinite().all()
    bits, inside = ints(x), (ints(x) & 0x7FFFFFFF) < TOP
    assert torch.equal(ints(join(p, r))[inside], bits[inside]), "signed zeros and subnormals, too"
    away = (bits + 0x8000) >> 16
    assert torch.equal(ints(p)[inside], away[inside])
    plain = x.to(torch.bfloat16)
    tie = (bits & 0xFFFF) == 0x8000
    assert torch.equal(p[inside & ~tie], plain[inside & ~tie])
    # Beyond: the largest p and r. Half a unit of p is 2^15 units of x.
    beyond = (bits & 0x7FFFFFFF)[~inside] - (ints(join(p, r)) & 0x7FFFFFFF)[~inside]
    assert (beyond > 0).all() and beyond.max() == 1 << 15


def test_8_bits_to_nearest_are_a_24_bit_master():
    x = samples()
    p, r = split(x, 8)
    assert r.dtype == torch.int8 and p.isfinite().all()
    bits, held = ints(x), ints(join(p, r))
    inside = (bits & 0x7FFFFFFF) < TOP - 0x80
    error = (held - bits)[inside]
    assert error.abs().max() == 128 and torch.equal(held & 0xFF, torch.zeros_like(held))
    ties = error.abs() == 128
    assert ((held[inside][ties] >> 8) & 1 == 0).all() and ties.sum() > 1000
    away = (held + 0x8000) >> 16
    assert torch.equal(ints(p)[inside], away[inside]), "p is bfloat16 of the 24-bit master"


def test_8_bits_stochastic_are_unbiased():
    """Over all 256 words the mean is the value itself, and every result is one of its two neighbours."""
    x = samples(1 << 12)[::13]
    x = x[(ints(x) & 0x7FFFFFFF) < TOP - 0x100]
    total = torch.zeros(x.shape, dtype=torch.int64)
    for word in range(256):
        words = torch.full(x.shape, word | 0x5A5A5A00, dtype=torch.int32)  # higher bits mean nothing
        held = ints(join(*split(x, 8, words)))
        assert ((held - ints(x)).abs() < 256).all()
        total += held - ints(x)
    assert not total.any()


@pytest.mark.parametrize("bits", [8, 16])
def test_non_finite_masters(bits):
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, LARGEST, -LARGEST])
    p, r = split(x, bits, torch.full((5,), 255, dtype=torch.int32) if bits == 8 else None)
    back = join(p, r)
    assert torch.equal(back[:2], x[:2]) and back[2].isnan() and back[3:].isfinite().all()
    assert (back[3:] / x[3:] > 1 - 2.0**-8).all() and not r[:3].any()
    nans = floats(torch.tensor([0x7FFFFFFF, 0x7F800001, -1, -(1 << 23) + 1]))
    assert join(*split(nans, bits)).isnan().all()


@pytest.mark.parametrize(("dtype", "worst"), [(torch.int8, 127), (torch.int8, -128), (torch.int16, 32767),
                                             (torch.int16, -32768)])  # fmt: skip
def test_an_edited_parameter_wins(dtype, worst):
    p = params()
    master = join(p, torch.full(p.shape, worst, dtype=dtype))
    assert master.isfinite().all()
    assert ((ints(master) - (ints(p) << 16)).abs() <= 0x8000).all(), "half a unit of bfloat16"
    assert (master[p == 0] != 0).all() if worst > 0 else (master[p == 0] == 0).all()
    broken = torch.tensor([torch.inf, -torch.inf, torch.nan]).bfloat16()
    read = join(broken, torch.full((3,), worst, dtype=dtype))
    assert torch.equal(read[:2], broken[:2].float()) and read[2].isnan()


@pytest.mark.parametrize(("bits", "bound"), [(8, 7e-6), (16, 0.0)])
def test_precision_of_ordinary_weights(bits, bound):
    """BF16 + INT8 6.5e-6 relative RMS, against 1.7e-3 of bfloat16 and 2.1e-4 of a scaled FP16 master."""
    w = torch.randn(1 << 18, generator=torch.Generator().manual_seed(1)) * 0.02
    error = (join(*split(w, bits)) - w).square().mean().sqrt() / w.square().mean().sqrt()
    assert error <= bound and (w.bfloat16().float() - w).norm() / w.norm() > 100 * bound


# --- in an optimizer's state ---------------------------------------------------------------------------------------


def moved(master: str | None, steps: int = 1000) -> float:
    """Mean move in percent of bfloat16 weights after 1000 updates of 5e-5 |w| each: 5.13 compounded."""
    states = st.with_master(st.resolve_states("fp32"), master)
    param = torch.exp(torch.linspace(-4, 0, 2000)).bfloat16()
    before, state, finite = param.float(), st.init_state(param, states), torch.tensor(True)
    for t in range(1, steps + 1):
        step = torch.tensor(float(t))
        weight = st.read_weight(state, param, states)
        new = weight + weight * 5e-5
        st.write_weight(state, param, states, new, index=0, step=step, finite=finite, bound=new.abs().amax())
    return 100 * (st.read_weight(state, param, states) / before - 1).mean().item()


@pytest.mark.parametrize("master", ["fp32", "fp16-scaled", "bf16+8", "bf16+16", "sr"])
def test_masters_move_at_low_learning_rates(master):
    assert abs(moved(master) - 5.13) <= 0.25


def test_control_bfloat16_to_nearest_freezes():
    assert moved(None) == 0.0


def test_residual_needs_bfloat16():
    states = st.with_master(st.resolve_states("8bit"), "bf16+8")
    assert "master" not in st.layout(states, torch.float32)
    with pytest.raises(ValueError, match=r"bf16\+8.*float16; use master 'fp32', 'fp16-scaled', 'sr' or None"):
        st.init_state(torch.ones(3, dtype=torch.float16), states)


def test_a_refused_step_keeps_parameter_and_residual():
    states = st.with_master(st.resolve_states("fp32"), "bf16+8")
    param = torch.randn(33).bfloat16()
    state = st.init_state(param, states)
    assert state["master_residual"].dtype == torch.int8 and not state["master_residual"].any()
    yes, no, step = torch.tensor(True), torch.tensor(False), torch.tensor(1.0)
    new = param.float() * 1.001
    st.write_weight(state, param, states, new, index=0, step=step, finite=yes)
    kept, residual = param.clone(), state["master_residual"].clone()
    assert residual.any() and (st.read_weight(state, param, states) - new).abs().max() < 1e-4
    st.write_weight(state, param, states, torch.full_like(new, torch.nan), index=0, step=step, finite=no)
    assert torch.equal(param, kept) and torch.equal(state["master_residual"], residual)


def test_rounding_is_the_seed_s_alone():
    states = st.with_master(st.resolve_states("fp32"), "bf16+8")
    first = torch.randn(4097).bfloat16()
    results = []
    for index, t in ((3, 7.0), (3, 7.0), (4, 7.0), (3, 8.0)):
        param = first.clone()
        state = st.init_state(param, states)
        new = st.read_weight(state, param, states) * 1.0001
        st.write_weight(state, param, states, new, index=index, step=torch.tensor(t), finite=torch.tensor(True))
        results.append(st.read_weight(state, param, states))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2]) and not torch.equal(results[0], results[3])


def test_recipes_refuse_residuals_that_mean_nothing():
    assert Residual(bits=8, rounding=SR).bits == 8
    for wrong in ({"bits": 12}, {"bits": 16, "rounding": SR}, {"bits": 8, "rounding": Rounding(mode="zero")},
                  {"bits": 8, "rounding": Rounding(mode="stochastic", bits=4)}):  # fmt: skip
        with pytest.raises(ValueError):
            Residual(**wrong)
