# SPDX-License-Identifier: Apache-2.0
"""A learning rate per weight: what reaches the weights, and that nobody outside of `step` can tell."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import decoder, rms, text
from torch.optim.lr_scheduler import LambdaLR

import hf_lowprec
from hf_lowprec import optim, stepping
from hf_lowprec.conversion import session_of
from hf_lowprec.decoder import find_decoder
from hf_lowprec.optim import rates
from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import Gemm, Recipe

uu = pytest.importorskip("unit_scaling")
lr_scale_func_adam = pytest.importorskip("unit_scaling.optim").lr_scale_func_adam

LR = 1e-3


def unquantised(name: str, **transform: Any) -> Recipe:
    recipe = PRESETS[name]
    changed = replace(recipe.transform, **transform)
    return replace(recipe, fprop=Gemm(), dgrad=Gemm(), wgrad=Gemm(), base="no", transform=changed)


def first_step(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The largest change of each Parameter."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (ids,) = text(1, length=16)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return {name: float((p.detach() - before[name]).abs().max()) for name, p in model.named_parameters()}


def fresh(
    recipe: str | Recipe, kind: str = "llama", lr: float = LR, **kwargs: Any
) -> tuple[Any, Any, dict[str, float]]:
    model = decoder(kind)
    std = {name: rms(p) for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, **{"weight_decay": 0.0, "eps": 1e-16, **kwargs})
    hf_lowprec.convert(model, recipe)
    return model, hf_lowprec.attach_optimizer(model, optimizer), std


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_unit_scaling_steps_are_the_stock_models_relative_to_the_weight(kind: str) -> None:
    model, optimizer, std = fresh(unquantised("unit-scaling"), kind)
    scales = {name: rms(p) for name, p in model.named_parameters()}
    assert kind == "llama" or scales["transformer.ln_f.weight"] == pytest.approx(2**0.5 / 8)
    for name, change in first_step(model, optimizer).items():
        expected = LR * (scales[name] / std[name] if std[name] else 1.0)
        if name == "transformer.ln_f.bias":  # as its gain, which stands in for the multiplier of the tied head
            expected = LR * scales["transformer.ln_f.weight"]
        if "wpe" not in name and "wte" not in name:  # rows that no token looked up
            assert change == pytest.approx(expected, rel=1e-3), name


def test_u_mup_anchors_eta_at_what_reads_the_stream() -> None:
    model, optimizer, std = fresh(unquantised("u-mup"))
    branches, scales = find_decoder(model).branches, {name: rms(p) for name, p in model.named_parameters()}
    changes = first_step(model, optimizer)
    sigma = math.sqrt(
        sum(std[f"{n}.weight"] ** 2 for b in branches for n in b.begin) / sum(len(b.begin) for b in branches)
    )
    unit = {name: change / scales[name] for name, change in changes.items()}  # steps of U = W / a
    eta = LR / sigma * math.sqrt(64 * 2)
    assert unit["model.layers.0.self_attn.q_proj.weight"] == pytest.approx(LR / sigma, rel=1e-3)
    assert unit["lm_head.weight"] == pytest.approx(eta, rel=1e-3)
    assert unit["model.embed_tokens.weight"] == pytest.approx(eta / 8, rel=1e-3)
    assert unit["model.layers.1.mlp.down_proj.weight"] == pytest.approx(eta / math.sqrt(128 * 2), rel=1e-3)
    assert changes["model.norm.weight"] == pytest.approx(LR, rel=1e-3)


def test_native_is_the_rule_of_the_unit_scaling_package() -> None:
    model, optimizer, _ = fresh(unquantised("u-mup", learning_rate="native"), lr=0.01)
    scales = {name: rms(p) for name, p in model.named_parameters()}
    changes = first_step(model, optimizer)
    for name, p in model.named_parameters():
        mup = "norm" if p.dim() == 1 else "output" if name.startswith("lm_head") else "weight"
        theirs = uu.Parameter(p.detach().clone(), mup, 2 if ".layers." in name else None)
        if name != "model.norm.weight":
            assert changes[name] / scales[name] == pytest.approx(0.01 * lr_scale_func_adam(theirs), rel=2e-3), name


@pytest.mark.parametrize("native", [False, True])
def test_decay_is_the_same_for_all(native: bool) -> None:
    """lr weight_decay per step of the optimizer's own lr; natively weight_decay, however large lr is."""
    recipe = unquantised("u-mup", learning_rate="native") if native else unquantised("u-mup")
    model, optimizer, _ = fresh(recipe, weight_decay=0.25)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    factor = 1 - (0.25 if native else 0.25 * LR)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * factor, msg=name)


def test_a_loaded_model_steps_as_the_stock_model() -> None:
    model = decoder("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    hf_lowprec.convert(model, unquantised("u-mup"), init=False)
    assert hf_lowprec.attach_optimizer(model, optimizer) is optimizer
    stock = copy.deepcopy(model)
    hf_lowprec.revert(stock)
    other = torch.optim.SGD(stock.parameters(), lr=LR, momentum=0.9)
    assert first_step(model, optimizer) == first_step(stock, other)


def test_groups_and_schedulers_see_nothing() -> None:
    model = decoder("llama")
    decay = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=LR, eps=1e-16)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    groups, lists = optimizer.param_groups, [group["params"] for group in optimizer.param_groups]
    hf_lowprec.convert(model, unquantised("unit-scaling"))
    optimizer = hf_lowprec.attach_optimizer(model, optimizer)
    changes = [first_step(model, optimizer)["lm_head.weight"]]
    scheduler.step()
    optimizer.zero_grad()
    for p in optimizer.state:
        (
            optimizer.state[p]["exp_avg"].zero_(),
            optimizer.state[p]["exp_avg_sq"].zero_(),
            optimizer.state[p]["step"].zero_(),
        )
    changes.append(first_step(model, optimizer)["lm_head.weight"])
    assert changes[1] == pytest.approx(changes[0] / 2, rel=0.02)  # and decay
    assert optimizer.param_groups is groups and [g["params"] for g in groups] == lists
    assert [g["lr"] for g in groups] == [LR / 2] * 2 and len(optimizer.state_dict()["param_groups"]) == 2


@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_our_optimizers_step_alike(states: str) -> None:
    changes = []
    for ours in (False, True):
        model = decoder("llama")
        kwargs = {"lr": LR, "weight_decay": 0.1, "eps": 1e-8}
        optimizer: Any = torch.optim.AdamW(model.parameters(), **kwargs)
        if ours:
            optimizer = optim.AdamW(model.named_parameters(), states=states, **kwargs)
        hf_lowprec.convert(model, unquantised("u-mup"))
        optimizer = hf_lowprec.attach_optimizer(model, optimizer)
        first_step(model, optimizer)
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
        optimizer.zero_grad()
        changes.append(first_step(model, optimizer))
    for name, change in changes[0].items():
        assert changes[1][name] == pytest.approx(change, rel=0.15 if states == "8bit" else 1e-4), name


def test_a_step_that_raised_leaves_nothing_behind() -> None:
    model, optimizer, _ = fresh(unquantised("u-mup"))
    groups = optimizer.param_groups
    (ids,) = text(1, length=16)

    def closure() -> float:
        raise RuntimeError("out of memory, say")

    with pytest.raises(RuntimeError, match="say"):
        optimizer.step(closure)
    assert len(optimizer.state_dict()["param_groups"]) == 1 and optimizer.param_groups is groups
    with pytest.raises(RuntimeError, match="say"):
        optimizer.step(closure)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert optimizer.param_groups is groups


def test_refuses_optimizers_whose_step_is_not_their_learning_rate() -> None:
    model = decoder("llama")
    hf_lowprec.convert(model, unquantised("u-mup"))
    with pytest.raises(ValueError, match=r"SGD.*init=False"):
        hf_lowprec.attach_optimizer(model, torch.optim.SGD(model.parameters(), lr=LR))
    with pytest.raises(ValueError, match="learning rate per weight: flat shards"):
        hf_lowprec.attach_optimizer(model, torch.optim.AdamW(model.parameters()), keep="flat shards")
    flat = torch.optim.AdamW([torch.zeros(8, requires_grad=True)])
    stepping.carry_state(session_of(model), flat)  # as an engine's optimizer is attached
    with pytest.raises(RuntimeError, match="holds flat shards"):
        flat.step()
    unattached = torch.optim.SGD(model.parameters(), lr=LR)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(TypeError, match="SGD"):
        unattached.step()
    rates.rejoin(unattached)


def test_gradient_release_is_refused() -> None:
    model = decoder("llama")
    optimizer = optim.AdamW(model.parameters(), lr=LR, states="fp32", nonfinite="element")
    hf_lowprec.convert(model, unquantised("u-mup"))
    optim.release_gradients(optimizer)
    (ids,) = text(1, length=16)
    with pytest.raises(RuntimeError, match="learning rate per weight"):
        model(input_ids=ids, labels=ids).loss.backward()
    assert session_of(model) is not None


SHARDED = """
import sys, tempfile
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from test_rates import first_step
from decoders import decoder
import hf_lowprec

dist.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
changes = []
for shard in (False, True):
    model, mesh = decoder("llama"), init_device_mesh("cpu", (1,))
    hf_lowprec.convert(model, "u-mup")
    for part in (*model.model.layers, model) if shard else ():
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = hf_lowprec.attach_optimizer(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    first_step(model, optimizer)
    changes.append([(p.detach() - b) for p, b in zip(model.parameters(), before)])
for plain, sharded in zip(*changes, strict=True):
    assert torch.equal(plain, sharded.full_tensor())
print("same", len(changes[0]))
"""


def test_shards_of_fsdp2_step_as_whole_weights() -> None:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    run = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["same", "21"]


def test_native_decay_under_a_warmup_by_hand_that_begins_at_zero() -> None:
    recipe = unquantised("u-mup", learning_rate="native")
    model, optimizer, _ = fresh(recipe, lr=0.0, weight_decay=0.5)
    weight = model.model.layers[0].self_attn.q_proj.weight
    for lr, shrunk in ((0.0, 0.0), (1e-2, 0.5), (5e-3, 0.25)):
        optimizer.param_groups[0]["lr"] = lr
        before = weight.detach().clone()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert torch.allclose(weight, before * (1 - shrunk), rtol=1e-5, atol=0)


RANKS = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from decoders import decoder, text
import hf_lowprec

rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2, timeout=timedelta(seconds=60))
for recipe in ("u-mup", "unit-scaling"):
    model = decoder("llama", seed=rank)
    hf_lowprec.convert(model, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = hf_lowprec.attach_optimizer(model, optimizer)
    for ids in text(2, length=16):
        ddp(input_ids=ids.roll(rank), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    assert torch.equal(*both), recipe
    layers = hf_lowprec.conversion.session_of(model).scaling.layers.values()
    scales = torch.stack([o.scale for layer in layers for o in layer.operands])
    both = [torch.empty_like(scales) for _ in range(2)]
    dist.all_gather(both, scales)
    assert torch.equal(*both), recipe
print("same")
"""


def test_ranks_without_a_common_seed_step_alike(tmp_path: Path) -> None:
    """DDP makes the weights the first rank's; the factors that follow from them must be, too."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen([sys.executable, "-c", RANKS, str(rank), str(tmp_path / "store")], env=environment,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    for run in runs:
        out, err = run.communicate(timeout=150)
        assert run.returncode == 0, err[-3000:]
        assert out.split() == ["same"]
