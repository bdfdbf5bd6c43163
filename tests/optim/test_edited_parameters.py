# SPDX-License-Identifier: Apache-2.0
"""What a script does to Parameters and optimizers between two steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_lowprec import optim


def step(optimizer: torch.optim.Optimizer, param: nn.Parameter, seed: int = 0) -> None:
    param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed)).to(param) * 1e-3
    optimizer.step()


@pytest.mark.parametrize("states", ["fp8-lm", "fp8-lm-exact", "compact", "8bit"])
def test_an_edit_wins_over_the_master(states: str) -> None:
    """Zeros (LoRA's B) that become ones are far beyond what a scale from a bound was made for."""
    param = nn.Parameter(torch.zeros(64, 128, dtype=torch.bfloat16))
    optimizer = optim.AdamW([param], lr=1e-4, states=states, weight_decay=0.0)
    step(optimizer, param)
    with torch.no_grad():
        param.fill_(1.0)
    for seed in range(3):
        step(optimizer, param, seed)
    torch.testing.assert_close(param, torch.ones_like(param), rtol=0, atol=0.02)


def test_an_edit_is_noticed_by_a_resumed_optimizer() -> None:
    param = nn.Parameter(torch.full((64, 128), 1e-3, dtype=torch.bfloat16))
    first = optim.AdamW([param], lr=1e-4, states="fp8-lm", weight_decay=0.0)
    step(first, param)
    other = nn.Parameter(torch.ones_like(param))
    second = optim.AdamW([other], lr=1e-4, states="fp8-lm", weight_decay=0.0)
    second.load_state_dict(first.state_dict())
    step(second, other)
    torch.testing.assert_close(other, torch.ones_like(other), rtol=0, atol=0.02)


@pytest.mark.parametrize("states", ["fp8-lm", "compact"])
def test_another_dtype_after_the_first_step_is_refused(states: str) -> None:
    model = nn.Linear(64, 128, bias=False)
    optimizer = optim.AdamW(model.parameters(), states=states)
    step(optimizer, model.weight)
    model.bfloat16()
    with pytest.raises(RuntimeError, match="made for another dtype"):
        step(optimizer, model.weight)


def test_an_adopted_fused_optimizer_leaves_unscaling_to_the_scaler() -> None:
    param = nn.Parameter(torch.randn(64, 128))
    old = torch.optim.AdamW([param], fused=True)
    assert old._step_supports_amp_scaling
    new = optim.AdamW.adopt(old, "fp32")
    for optimizer in (old, new):
        assert not getattr(optimizer, "_step_supports_amp_scaling", False)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_clip_factor_of_a_non_finite_norm_skips_the_step(value: float) -> None:
    param = nn.Parameter(torch.ones(64, 128))
    optimizer = optim.AdamW([param], nonfinite="element")
    param.grad = torch.ones_like(param)
    param.grad[0, 0] = value
    factor, _ = optim.clip_factor([param], 1.0)
    optimizer.step(clip=factor)
    assert torch.equal(param, torch.ones_like(param))
    assert optimizer.skipped_steps == 1


def test_groups_may_be_empty() -> None:
    optimizer = optim.AdamW([{"params": []}])
    param = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [param]})
    step(optimizer, param)
    assert not torch.equal(param, torch.ones_like(param))
