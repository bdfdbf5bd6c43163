# SPDX-License-Identifier: Apache-2.0
"""Rounded AXPYs and FP8 weights under FSDP2: the bits do not depend on the number of processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharding import Bag, Pair, differing, everything, sharded, take_steps
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from training import MAKE, bits

from hf_lowprec.loss_scaling import make_scaler
from hf_lowprec.optim import AdamW, mark_gemm_weights
from hf_lowprec.presets.fp8 import FP8_LM_O3_STATES
from hf_lowprec.presets.narrow import HFP8_STATES, WANG_STATES
from hf_lowprec.recipe import LossScale

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
RULES = {"wang": WANG_STATES, "o3": FP8_LM_O3_STATES, "hfp8": HFP8_STATES}
CASES = [("wang", "SGD", torch.bfloat16), ("o3", "AdamW", torch.bfloat16), ("o3", "AdamW", torch.float32),
         ("hfp8", "AdamW", torch.float32)]  # fmt: skip
SHAPES = [(520, 256), (17, 256), (129, 37), (4101,), (5,), (7, 13), (1, 4352)]


def trained(rule: str, name: str, dtype: torch.dtype, *, shard: bool = True) -> dict[str, torch.Tensor]:
    bag = sharded(dtype, SHAPES) if shard else Bag(dtype, SHAPES)
    mark_gemm_weights(bag, list(bag.parameters())[:-1])
    optimizer = MAKE[name](bag.parameters(), states=RULES[rule], lr=1e-3, weight_decay=0.0)
    take_steps(bag, optimizer, range(3))
    assert optimizer.skipped_steps == 0
    return everything(bag, optimizer)


@pytest.mark.parametrize(("rule", "name", "dtype"), CASES)
def test_two_processes_take_the_steps_of_one(pair, alone, rule, name, dtype):
    one, plain = trained(rule, name, dtype), trained(rule, name, dtype, shard=False)
    first, second = pair(trained, rule, name, dtype)
    assert not differing(first, second) and not differing(one, first)
    assert not [key for key in differing(plain, one) if key.startswith("weight")]
    assert not torch.equal(one["weight 1"], bits(Bag(dtype, SHAPES).weights[1])), "nothing was trained"


def test_marks_outlive_sharding(alone):
    """As accelerate has it: the optimizer is attached before `fully_shard` makes new Parameters, without marks."""
    bag = Bag(torch.bfloat16, SHAPES)
    optimizer = AdamW(bag.parameters(), states=FP8_LM_O3_STATES)
    mark_gemm_weights(bag, list(bag.parameters())[:2])
    optimizer.note_embeddings()
    fully_shard(bag)
    optimizer.param_groups[0]["params"] = list(bag.parameters())
    take_steps(bag, optimizer, range(1))
    assert optimizer.param_groups[0]["overrides"] == [*["fp8-lm-o3"] * 2, *["fp8-lm"] * (len(SHAPES) - 2)]


def saved(folder: str, rule: str) -> None:
    bag = sharded(torch.bfloat16, SHAPES)
    mark_gemm_weights(bag, bag.parameters())
    optimizer = AdamW(bag.parameters(), states=RULES[rule], lr=1e-3)
    take_steps(bag, optimizer, range(2))
    model, state = get_state_dict(bag, optimizer)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder)


def resumed(folder: str, rule: str) -> dict[str, torch.Tensor]:
    bag = sharded(torch.bfloat16, SHAPES)
    mark_gemm_weights(bag, bag.parameters())
    optimizer = AdamW(bag.parameters(), states=RULES[rule], lr=1e-3)
    model, state = get_state_dict(bag, optimizer)
    loaded = {"model": model, "optimizer": state}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(bag, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    take_steps(bag, optimizer, range(2, 4))
    return everything(bag, optimizer)


@pytest.mark.parametrize("rule", RULES)
def test_resharding(pair: Pair, alone: None, tmp_path: Path, rule: str) -> None:
    pair(saved, str(tmp_path / "two"), rule)
    one = resumed(str(tmp_path / "two"), rule)
    first, _ = pair(resumed, str(tmp_path / "two"), rule)
    assert not differing(one, first)


def scaled(bad_rank: int | None) -> list[tuple[float, list[float]]]:
    """(scale after it, how far weights moved) of every step; one element is Inf on one rank in the second."""
    bag = sharded(torch.float32, [(64, 8), (7, 5)])
    optimizer = torch.optim.SGD(bag.parameters(), lr=1.0)
    scaler, out = make_scaler(LossScale(method="dynamic", init=1024.0), "cpu"), []
    for step in range(3):
        scaler.scale(torch.zeros(()))
        for p in bag.parameters():
            grad = torch.full(p.shape, 1024.0)
            if step == 1 and bad_rank is not None:
                grad[-bad_rank, 0] = torch.inf
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements)
        before = bag.weights[0].to_local().clone()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        out.append((scaler.get_scale(), (before - bag.weights[0].to_local()).round(decimals=3).unique().tolist()))
    return out


@pytest.mark.parametrize("bad_rank", [None, 0, 1])
def test_ranks_agree_on_the_loss_scale(pair: Pair, bad_rank: int | None) -> None:
    first, second = pair(scaled, bad_rank)
    skipped = bad_rank is not None
    assert first == second == [(1024, [1.0]), (512 if skipped else 1024, [0.0 if skipped else 1.0]),
                               (512 if skipped else 1024, [2.0 if skipped else 1.0])]  # fmt: skip
