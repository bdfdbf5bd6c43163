# SPDX-License-Identifier: Apache-2.0
"""FSDP2's shards: the bits do not depend on the number of processes, and checkpoints move between them."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import learned_ranges
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharding import (
    REGULAR,
    SHAPES,
    Bag,
    Pair,
    differing,
    everything,
    set_gradients,
    sharded,
    take_steps,
    trained,
    whole,
    world,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from training import MAKE, NAMES, bits

from hf_lowprec.optim import AdamW, GradientQuantizer, clip_factor, mark_embeddings, to_bitsandbytes
from hf_lowprec.recipe import Communication, Quant, Rounding, Scaling, States

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
BF16, F32 = torch.bfloat16, torch.float32
MASTERS = ("fp32", "fp16-scaled", "bf16+8", "bf16+16", "sr", None)
ABLATIONS = ("#0", "#2a", "#2b", "#3")
CASES = [
    *((BF16, states) for states in NAMES),
    *((F32, states) for states in ("4bit", "fp8-lm")),
    *(pytest.param(F32, states, marks=pytest.mark.slow) for states in NAMES if states not in ("4bit", "fp8-lm")),
]


def test_learned_ranges_are_one_over_ranks(pair: Pair) -> None:
    """Each rank finds a range in its own first batch; from the first step on all train that of the first."""
    one, two = pair(learned_ranges.train, 0)
    assert torch.equal(one["weight"], two["weight"])
    assert float(two["first"]) > 4 * float(one["first"]), "found by itself"
    assert all(map(torch.equal, one["ranges"], two["ranges"])) and float(one["ranges"][0]) < 1.5 * float(one["first"])
    assert int(one["moments"]["step"]) == 3 and bool(one["moments"]["exp_avg_sq"].any())
    assert torch.equal(one["moments"]["exp_avg"], two["moments"]["exp_avg"])


# --- the number of processes ---------------------------------------------------------------------------------------


def check_two_are_one(pair: Pair, *args: Any, **options: Any) -> dict[str, torch.Tensor]:
    one = trained(*args, **options)
    first, second = pair(trained, *args, **options)
    assert not differing(first, second), "ranks gather different states"
    assert not differing(one, first)
    return one


@pytest.mark.parametrize(("dtype", "states"), CASES)
def test_two_processes_take_the_steps_of_one(pair: Pair, alone: None, dtype: torch.dtype, states: str) -> None:
    found = check_two_are_one(pair, "AdamW", dtype, 3, states=states)
    assert not torch.equal(found["weight 1"], bits(Bag(dtype).weights[1])), "nothing was trained"


@pytest.mark.parametrize("states", ["8bit", "fp8-lm"])
@pytest.mark.parametrize("name", ["Adam", "StableAdamW", "Lion", "SGD"])
def test_other_optimizers(pair: Pair, alone: None, name: str, states: str) -> None:
    check_two_are_one(pair, name, BF16, 3, states=states)


@pytest.mark.parametrize("master", MASTERS)
def test_masters(pair: Pair, alone: None, master: str | None) -> None:
    check_two_are_one(pair, "AdamW", BF16, 3, states="8bit", master=master)


OPTIONS: dict[str, dict[str, Any]] = {
    "Adam": {"weight_decay": 0.1, "states": "fp8-lm-exact"},
    "SGD": {"nesterov": True, "weight_decay": 0.1, "states": "compact"},
    "StableAdamW": {"weight_decay": 0.1, "states": "4bit", "lr": 1.0},
    "AdamW": {"maximize": True, "lr": torch.tensor(0.01), "weight_decay": 0.5, "states": "fp8-lm"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(pair: Pair, alone: None, name: str) -> None:
    check_two_are_one(pair, name, BF16, 3, **OPTIONS[name])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16, torch.float64])
@pytest.mark.parametrize("states", [*NAMES, *ABLATIONS])
@pytest.mark.parametrize("name", MAKE)
def test_every_combination(pair: Pair, alone: None, name: str, states: str, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and states == "compact":
        pytest.skip("a residual needs bfloat16")
    if dtype == torch.float64 and name == "StableAdamW":
        pytest.skip("the last bits of a float64 sum depend on the number of ranks")
    check_two_are_one(pair, name, dtype, 12, states=states)


@pytest.mark.parametrize(("dtype", "states"), CASES)
def test_shards_take_the_steps_of_an_ordinary_tensor(alone: None, dtype: torch.dtype, states: str) -> None:
    """Everything but blocks counts over the flattened tensor; and so do blocks, where rows are whole blocks."""
    plain, shards = (trained("AdamW", dtype, 3, shard=shard, states=states) for shard in (False, True))
    blocks = states in ("8bit", "4bit", "fp8", "fp8-expand", "compact")
    indices = REGULAR if blocks else range(len(SHAPES))
    assert not [key for key in differing(plain, shards) if key.startswith("weight") and int(key[7:]) in indices]


# --- what ranks tell each other ------------------------------------------------------------------------------------


def poisoned(states: str, value: float, **options: Any) -> tuple[int, int, bool]:
    """One bad element, in the last row of the second parameter: on rank 1 alone, if there are two."""
    bag = sharded(BF16)
    optimizer = AdamW(bag.parameters(), states=states, **options)
    take_steps(bag, optimizer, range(2))
    before = everything(bag, optimizer)
    set_gradients(bag, 2)
    local = bag.weights[1].grad.to_local()
    if dist.get_rank() == dist.get_world_size() - 1:
        local[-1, -1] = value
    optimizer.step()
    changed = differing(before, everything(bag, optimizer))
    return int(optimizer.skipped_steps), int(optimizer.skipped_elements), bool(changed)


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e30])
@pytest.mark.parametrize("states", ["8bit", "fp8-lm", "fp8-lm-exact"])
def test_a_bad_gradient_on_one_rank_stops_all(pair: Pair, states: str, value: float) -> None:
    assert pair(poisoned, states, value) == [(1, 0, False), (1, 0, False)]


def skipped_at_once(states: str) -> dict[str, torch.Tensor]:
    """States as they are made: the first step is refused."""
    bag = sharded(BF16)
    optimizer = AdamW(bag.parameters(), states=states)
    set_gradients(bag, 0)
    bag.weights[0].grad.to_local()[0, 0] = torch.nan
    optimizer.step()
    assert optimizer.skipped_steps.item() == 1
    return everything(bag, optimizer)


@pytest.mark.parametrize("states", ["fp8-lm", "fp8-lm-exact"])
def test_new_states(pair: Pair, alone: None, states: str) -> None:
    one = skipped_at_once(states)
    for other in pair(skipped_at_once, states):
        assert not differing(one, other)


def test_elements_are_skipped_where_they_are(pair: Pair) -> None:
    assert pair(poisoned, "8bit", torch.nan, nonfinite="element") == [(0, 0, True), (0, 1, True)]


def collectives(states: str) -> list[int]:
    """Of the first step and of a later one."""
    bag = sharded(BF16, [(64, 256), (5000,), (3,)])
    optimizer = AdamW(bag.parameters(), states=states)
    counts, own = [], dist.all_reduce
    for step in range(2):
        calls = []
        dist.all_reduce = lambda *args, calls=calls, **kwargs: (calls.append(args), own(*args, **kwargs))[1]
        try:
            take_steps(bag, optimizer, range(step, step + 1))
        finally:
            dist.all_reduce = own
        counts.append(len(calls))
    return counts


def test_one_collective_per_step(pair: Pair) -> None:
    assert pair(collectives, "8bit")[0] == [1, 1]
    assert pair(collectives, "fp8-lm")[0] == [4, 1]  # a master's first scale is of its values


def no_rows(shapes: list[tuple[int, ...]], silent: bool) -> tuple[int, dict[str, torch.Tensor]]:
    bag = sharded(BF16, shapes)
    optimizer = AdamW(bag.parameters(), states="fp8-lm")
    for step in range(3):
        set_gradients(bag, step)
        if silent:
            bag.weights[0].grad = None
        optimizer.step()
    return sum(p.to_local().numel() for p in bag.weights), everything(bag, optimizer)


@pytest.mark.parametrize("silent", [False, True])
def test_a_rank_without_any_rows_takes_part(pair: Pair, alone: None, silent: bool) -> None:
    shapes = [(1, 5000), (1,), (1, 7, 3)]
    (_, first), (count, second) = pair(no_rows, shapes, silent)
    assert count == 0 and not differing(first, second) and not differing(first, no_rows(shapes, silent)[1])
    assert ("step 0" in first) != silent


def test_no_gradients_at_all(pair: Pair) -> None:
    pair(no_rows, [(4, 4)], True)


def pruned() -> int:
    """Who has no rows of anything has no gradients either; rank 0 finds one that is not finite."""
    bag = sharded(BF16, [(1, 5000)])
    optimizer = AdamW(bag.parameters(), states="8bit")
    for step in range(2):
        set_gradients(bag, step)
        p = bag.weights[0]
        if not p.to_local().numel():
            p.grad = None
        elif step:
            p.grad.to_local()[0, 7] = torch.nan
        optimizer.step()
    return optimizer.skipped_steps.item()


def test_a_rank_without_any_gradient_takes_part(pair: Pair) -> None:
    assert pair(pruned) == [1, 1]


def agreed() -> bool:
    """0-d states are the same numbers everywhere."""
    bag = sharded(BF16)
    optimizer = AdamW(bag.parameters(), states="fp8-lm", lr=0.1)
    take_steps(bag, optimizer, range(3))
    mine = torch.stack([
        value.double()
        for state in optimizer.state_dict()["state"].values()
        for value in state.values()
        if not isinstance(value, DTensor)
    ])  # fmt: skip
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert len(mine) == len(SHAPES) * 3 + sum(torch.Size(s).numel() >= 4096 for s in SHAPES) * 4
    return torch.equal(*both)


def test_numbers_are_equal_on_all_ranks(pair: Pair) -> None:
    assert pair(agreed) == [True, True]


def clipped(shard: bool, norm_type: float, how: str = "factor") -> tuple[float, float, list[torch.Tensor]]:
    bag = sharded() if shard else Bag()
    optimizer = AdamW(bag.parameters(), lr=0.1, states="fp32")
    set_gradients(bag, 1)
    factor, norm = clip_factor(bag.parameters(), 0.5, norm_type)
    if how == "factor":
        optimizer.step(clip=factor)
    else:
        assert torch.equal(optimizer.clip_grad_norm_(0.5, norm_type), norm)
        if how == "in place":
            optimizer.apply_clip()
        optimizer.step()
    return factor.item(), norm.item(), [whole(p).view(F32) for p in bag.weights]


@pytest.mark.parametrize(
    ("norm_type", "how"),
    [(1.0, "factor"), (2.0, "factor"), (torch.inf, "factor"), (2.0, "optimizer"), (2.0, "in place")],
)
def test_clipping_by_the_norm_of_all_ranks(pair: Pair, norm_type: float, how: str) -> None:
    factor, norm, weights = clipped(False, norm_type)
    assert factor < 0.5
    for one, two, theirs in pair(clipped, True, norm_type, how):
        assert (one, two) == pytest.approx((factor, norm), rel=1e-5)
        for a, b in zip(weights, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def norm_with_a_nan(rank: int, norm_type: float) -> float:
    bag = sharded()
    set_gradients(bag, 0)
    if dist.get_rank() == rank:
        bag.weights[0].grad.to_local()[0, 0] = torch.nan
    return clip_factor(bag.parameters(), 1.0, norm_type)[1].item()


@pytest.mark.parametrize("norm_type", [2.0, torch.inf])
@pytest.mark.parametrize("rank", [0, 1])
def test_no_rank_overlooks_a_nan(pair: Pair, rank: int, norm_type: float) -> None:
    assert all(math.isnan(norm) for norm in pair(norm_with_a_nan, rank, norm_type))


def quantised(rounding: str) -> list[torch.Tensor]:
    """Gradients after `GradientQuantizer`, and its state; one of them is not finite in the last row."""
    policy = Quant(format="e4m3fn", scaling=Scaling(snap="rceil"), rounding=Rounding(mode=rounding))
    bag = sharded(BF16)
    quantizer = GradientQuantizer(Communication(gradient=policy, auto_scale=True), len(SHAPES), world_size=2)
    quantizer.k += 1500  # mu beyond 1 saturates
    for step in range(3):
        set_gradients(bag, step)
        if step == 1 and dist.get_rank() == dist.get_world_size() - 1:
            bag.weights[1].grad.to_local()[-1, -1] = torch.inf
        out = quantizer.quantize_all({i: p.grad for i, p in enumerate(bag.weights)})
    assert (quantizer.k != 1500).all() and (quantizer.saturated > 0).any()
    return [*map(whole, out.values()), *quantizer.state_dict().values()]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_quantised_gradients(pair: Pair, alone: None, rounding: str) -> None:
    one = quantised(rounding)
    for other in pair(quantised, rounding):
        assert all(map(torch.equal, one, other))


def replicated(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    bag = sharded(BF16, mesh=mesh)
    optimizer = AdamW(bag.parameters(), states="fp8-lm", lr=0.02)
    take_steps(bag, optimizer, range(3))
    return everything(bag, optimizer)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_hybrid_sharding(pair: Pair, alone: None, shape: tuple[int, int]) -> None:
    first, second = pair(replicated, shape)
    assert not differing(first, second) and not differing(first, trained("AdamW", BF16, 3, states="fp8-lm", lr=0.02))


def in_ddp(states: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).to(BF16)
    model, optimizer = nn.parallel.DistributedDataParallel(inner), None
    optimizer = AdamW(inner.parameters(), lr=0.01, states=states)
    for step in range(5):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(2 * step + dist.get_rank())).to(BF16)
        optimizer.zero_grad()
        (model(x) - x).float().square().mean().backward()
        optimizer.step()
    states_ = [bits(v) for state in optimizer.state_dict()["state"].values() for v in state.values()]
    return [*(bits(p) for p in inner.parameters()), *states_]


@pytest.mark.parametrize("states", ["8bit", "fp8-lm", "compact"])
def test_ranks_under_ddp_stay_equal(pair: Pair, states: str) -> None:
    first, second = pair(in_ddp, states)
    assert len(first) == len(second) and all(map(torch.equal, first, second))


# --- checkpoints ---------------------------------------------------------------------------------------------------


def built(dtype: torch.dtype, states: str) -> tuple[Bag, AdamW]:
    bag = sharded(dtype)
    decay = [p for p in bag.parameters() if p.ndim > 1]
    rest = [p for p in bag.parameters() if p.ndim == 1]
    return bag, AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=0.02, states=states)


def saved(folder: str, dtype: torch.dtype, states: str) -> None:
    bag, optimizer = built(dtype, states)
    take_steps(bag, optimizer, range(2))
    optimizer.skipped_steps += 3
    model_state, state = get_state_dict(bag, optimizer)
    dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=folder)


def resumed(folder: str, dtype: torch.dtype, states: str) -> dict[str, torch.Tensor]:
    bag, optimizer = built(dtype, states)
    model_state, state = get_state_dict(bag, optimizer)
    dcp.load({"model": model_state, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(bag, optimizer, model_state_dict=model_state, optim_state_dict=state)
    assert optimizer.skipped_steps.item() == 3 and "skipped_steps" not in optimizer.param_groups[0]
    take_steps(bag, optimizer, range(2, 4))
    return everything(bag, optimizer)


def uninterrupted(dtype: torch.dtype, states: str) -> dict[str, torch.Tensor]:
    bag, optimizer = built(dtype, states)
    take_steps(bag, optimizer, range(4))
    return everything(bag, optimizer)


CHECKPOINTS = [(BF16, "8bit"), (F32, "4bit"), (BF16, "fp8-lm"), (BF16, "compact")]


@pytest.mark.parametrize(
    ("dtype", "states"),
    [*CHECKPOINTS, *(pytest.param(d, s, marks=pytest.mark.slow) for d in (F32, BF16) for s in (*NAMES, *ABLATIONS))],
)
def test_resharding(pair: Pair, alone: None, tmp_path: Path, dtype: torch.dtype, states: str) -> None:
    """By torch.distributed.checkpoint, from 2 processes to 1 and back; the run goes on as if nothing had happened."""
    expected = uninterrupted(dtype, states)
    pair(saved, str(tmp_path / "two"), dtype, states)
    assert not differing(expected, resumed(str(tmp_path / "two"), dtype, states))
    saved(str(tmp_path / "one"), dtype, states)
    first, second = pair(resumed, str(tmp_path / "one"), dtype, states)
    assert not differing(expected, first) and not differing(expected, second)


OPTIONS_OF_DCP = {
    "full": StateDictOptions(full_state_dict=True),
    "rank 0": StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "offloaded": StateDictOptions(cpu_offload=True),
}


def by_option(states: str, way: str) -> list[str]:
    """What differs after `get_optimizer_state_dict` and `set_optimizer_state_dict`."""
    bag, optimizer = built(BF16, states)
    take_steps(bag, optimizer, range(2))
    expected = everything(bag, optimizer)
    state = get_optimizer_state_dict(bag, optimizer, options=OPTIONS_OF_DCP[way])
    if way == "full":
        assert not any(isinstance(v, DTensor) for values in state["state"].values() for v in values.values())
    fresh, other = built(BF16, states)
    set_optimizer_state_dict(fresh, other, state, options=OPTIONS_OF_DCP[way])
    return [key for key in differing(expected, everything(fresh, other)) if not key.startswith("weight")]


@pytest.mark.parametrize(
    ("way", "states"), [*((way, "fp8-lm") for way in OPTIONS_OF_DCP), ("full", "4bit"), ("full", "compact")]
)
def test_state_dict_options(pair: Pair, way: str, states: str) -> None:
    assert pair(by_option, states, way) == [[], []]


def own_state_dict(states: str) -> None:
    bag, optimizer = built(BF16, states)
    take_steps(bag, optimizer, range(2))
    before, pointers = everything(bag, optimizer), [v.data_ptr() for s in optimizer.state.values() for v in s.values()]
    state_dict = optimizer.state_dict()
    for i, (p, state) in enumerate(optimizer.state.items()):
        for key, local in state.items():
            value = state_dict["state"][i][key]
            assert value.dtype == local.dtype or value.dtype == torch.uint8
            if local.dim():
                assert value.placements == p.placements and value.shape[0] == p.shape[0]
                assert value.to_local().data_ptr() == local.data_ptr(), (key, local.shape, local.stride())
    optimizer.load_state_dict(state_dict)
    assert [v.data_ptr() for s in optimizer.state.values() for v in s.values()] == pointers
    assert not differing(before, everything(bag, optimizer))


@pytest.mark.parametrize("states", ["8bit", "4bit", "fp8-lm", "compact"])
def test_its_own_state_dict(pair: Pair, states: str) -> None:
    pair(own_state_dict, states)


def to_shards(state_dict: dict[str, Any], states: str, indices: list[int]) -> dict[str, torch.Tensor]:
    bag = sharded(BF16, [SHAPES[i] for i in indices])
    optimizer = AdamW(bag.parameters(), lr=0.02, states=states)
    optimizer.load_state_dict(state_dict)
    return {key: value for key, value in everything(bag, optimizer).items() if not key.startswith("weight")}


@pytest.mark.parametrize("states", ["8bit", "4bit", "fp8-lm", "compact"])
def test_checkpoints_without_sharding(pair: Pair, states: str) -> None:
    """Whole tensors go into shards, and what shards saved whole into one tensor, where rows are whole blocks."""
    bag = Bag(BF16, [SHAPES[i] for i in REGULAR])
    optimizer = AdamW(bag.parameters(), lr=0.02, states=states)
    take_steps(bag, optimizer, range(3))
    expected = everything(bag, optimizer)
    found, _ = pair(to_shards, optimizer.state_dict(), states, REGULAR)
    assert found.keys() == {key for key in expected if not key.startswith("weight")}
    for key, value in found.items():  # the same bytes, in other shapes
        assert torch.equal(value.flatten().view(torch.uint8), expected[key].flatten().view(torch.uint8)), key

    bag = Bag(BF16, [SHAPES[3]])
    optimizer = AdamW(bag.parameters(), lr=0.02, states=states)
    take_steps(bag, optimizer, range(1))
    pair(to_shards if states == "fp8-lm" else refused_by_shards, optimizer.state_dict(), states, [3])


def refused_by_shards(*args: Any) -> None:
    with pytest.raises(ValueError, match=r"state of parameter 0: exp_avg_(scale|qdata) should be"):
        to_shards(*args)


def from_shards(states: str, indices: list[int]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    bag = sharded(BF16, [SHAPES[i] for i in indices])
    optimizer = AdamW(bag.parameters(), lr=0.02, states=states)
    take_steps(bag, optimizer, range(3))
    state_dict = optimizer.state_dict()
    for state in state_dict["state"].values():
        state.update({k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()})
    return state_dict


@pytest.mark.parametrize("states", ["8bit", "4bit", "fp8-lm", "compact"])
def test_a_whole_checkpoint_of_shards_without_sharding(pair: Pair, states: str) -> None:
    bag = Bag(BF16, [SHAPES[i] for i in REGULAR])
    optimizer = AdamW(bag.parameters(), lr=0.02, states=states)
    take_steps(bag, optimizer, range(3))
    expected = everything(bag, optimizer)
    other = AdamW(Bag(BF16, [SHAPES[i] for i in REGULAR]).parameters(), lr=0.02, states=states)
    other.load_state_dict(pair(from_shards, states, REGULAR)[0])
    found = {k for k in differing(expected, everything(bag, other)) if not k.startswith("weight")}
    assert not found
    other = AdamW(Bag(BF16, [SHAPES[3]]).parameters(), lr=0.02, states=states)
    ragged = pair(from_shards, states, [3])[0]
    if states == "fp8-lm":
        other.load_state_dict(ragged)
    else:
        with pytest.raises(ValueError, match=r"exp_avg_(scale|qdata) should be"):
            other.load_state_dict(ragged)


def torchs_into_ours(states: str) -> None:
    """A torch AdamW with moments on shards: adopted, and as a checkpoint."""
    bag = sharded(F32)
    theirs = torch.optim.AdamW(bag.parameters(), lr=0.01)
    for step in range(2):
        set_gradients(bag, step)
        theirs.step()
    loaded = AdamW(bag.parameters(), lr=0.01, states=states)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded.load_state_dict(theirs.state_dict())
    moments = [whole(state["exp_avg"]).view(F32) for state in theirs.state.values()]
    adopted = AdamW.adopt(theirs, states)
    assert not differing(everything(bag, loaded), everything(bag, adopted))
    for i, moment in enumerate(moments):
        item = adopted._plan_now().items[i]
        assert item.state["step"].item() == 2
        slot = "exp_avg" if "exp_avg" in item.state else "exp_avg_qdata"
        assert item.state[slot].shape == bag.weights[i].to_local().shape
        assert moment.abs().max() > 0
    take_steps(bag, adopted, range(2, 4))
    assert adopted.skipped_steps.item() == 0


@pytest.mark.parametrize("states", ["8bit", "fp8-lm", "fp8-lm-exact"])
def test_taking_over_from_torch(pair: Pair, states: str) -> None:
    pair(torchs_into_ours, states)


# --- what is kept, what is refused ---------------------------------------------------------------------------------


def bytes_held(states: str) -> tuple[int, int]:
    bag = sharded(BF16)
    optimizer = AdamW(bag.parameters(), states=states)
    take_steps(bag, optimizer, range(1))
    mine = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if v.dim())
    return mine, sum(optimizer.state_bytes().values())


@pytest.mark.parametrize("states", ["8bit", "4bit", "fp8-lm", "compact"])
def test_state_bytes(pair: Pair, alone: None, states: str) -> None:
    numbers = sum(v.numel() * v.itemsize for k, v in trained("AdamW", BF16, 1, states=states).items() if v.dim() == 0)
    (first, total), (second, same) = pair(bytes_held, states)
    assert total == same == first + second + numbers


def test_rows_that_move(alone: None) -> None:
    """FSDP2 pads and reallocates rows, e.g. before the first forward after loading weights."""
    results = []
    for moving in (False, True):
        bag = sharded(BF16)
        optimizer = AdamW(bag.parameters(), states="compact", lr=0.1)
        for step in range(3):
            take_steps(bag, optimizer, range(step, step + 1))
            for p in bag.weights if moving else ():
                p._local_tensor = p._local_tensor.clone()  # as FSDPParam.reset_sharded_param
        results.append(everything(bag, optimizer))
    assert not differing(*results)


def test_vectors_keep_float32_instead_of_blocks(alone: None) -> None:
    bag = sharded(F32, [(5000,), (50, 100)])
    for states, kept in (("8bit", "exp_avg"), ("fp8-lm", "exp_avg_qdata"), ("bf16", "exp_avg_qdata")):
        optimizer = AdamW(bag.parameters(), states=states)
        take_steps(bag, optimizer, range(1))
        vector, matrix = optimizer.state.values()
        assert kept in vector and "exp_avg_qdata" in matrix


def test_small_tensors_are_small_before_sharding(pair: Pair) -> None:
    assert pair(kept_of_small) == [["exp_avg", "exp_avg_qdata"]] * 2


def kept_of_small() -> list[str]:
    bag = sharded(F32, [(15, 256), (16, 256)])
    optimizer = AdamW(bag.parameters(), states="8bit")
    take_steps(bag, optimizer, range(1))
    return [next(key for key in state if key.startswith("exp_avg")) for state in optimizer.state.values()]


def test_embeddings_marked_before_sharding(alone: None) -> None:
    model = nn.Sequential(nn.Embedding(64, 128), nn.Linear(128, 64, bias=False))
    early = AdamW(model.parameters(), states="8bit")
    mark_embeddings(model)
    early.note_embeddings()
    late = AdamW(model.parameters(), states="8bit")
    assert early.param_groups[0]["overrides"] == late.param_groups[0]["overrides"]
    fully_shard(model, mesh=world())
    for optimizer in (early, late):
        optimizer.param_groups[0]["params"][:] = list(model.parameters())  # as accelerate does
        model(torch.arange(8)).sum().backward()
        optimizer.step()
        embedding, linear = optimizer.state.values()
        assert "exp_avg" in embedding and "exp_avg_qdata" in linear


def test_refusals(alone: None) -> None:
    wide = nn.Parameter(distribute_tensor(torch.zeros(4, 8), world(), [Shard(1)]))
    with pytest.raises(TypeError, match="whole rows of dimension 0"):
        AdamW([wide])
    bag = sharded(F32, [(8, 8)])
    for scaling in (Scaling(granularity="column"), Scaling(granularity="tile", block=(4, 4))):
        with pytest.raises(ValueError, match=f"exp_avg: no {scaling.granularity} scaling on a sharded parameter"):
            AdamW(bag.parameters(), states=States(exp_avg=Quant(format="e4m3fn", scaling=scaling)))
    with pytest.raises(ValueError, match="do not fit FSDP2's shards"):
        to_bitsandbytes(AdamW(bag.parameters(), states="8bit"))


# --- a model -------------------------------------------------------------------------------------------------------


def model_and_optimizer(states: str) -> tuple[nn.Module, AdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 129), nn.GELU(), nn.LayerNorm(129), nn.Linear(129, 64)).to(BF16)
    for layer in model:
        fully_shard(layer, mesh=world()) if list(layer.parameters()) else None
    fully_shard(model, mesh=world())
    return model, AdamW(model.parameters(), lr=0.01, states=states)


def learn(model: nn.Module, optimizer: AdamW, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step % 4)).to(BF16)
        optimizer.zero_grad()
        loss = (model(x) - x).float().square().mean()
        loss.backward()
        optimizer.step(clip=clip_factor(model.parameters(), 1.0)[0])
        losses.append(loss.item())
    return losses


def learn_and_resume(states: str, folder: str) -> list[float]:
    model, optimizer = model_and_optimizer(states)
    losses = learn(model, optimizer, range(12))
    model_state, state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=folder)
    losses += learn(model, optimizer, range(12, 20))

    model, optimizer = model_and_optimizer(states)
    model_state, state = get_state_dict(model, optimizer)
    dcp.load({"model": model_state, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=state)
    assert learn(model, optimizer, range(12, 20)) == losses[12:]
    return losses


@pytest.mark.parametrize("states", ["8bit", "fp8-lm"])
def test_a_model_learns_and_resumes(pair: Pair, tmp_path: Path, states: str) -> None:
    first, second = pair(learn_and_resume, states, str(tmp_path))
    assert first == second and first[-1] < 0.5 * first[0]
