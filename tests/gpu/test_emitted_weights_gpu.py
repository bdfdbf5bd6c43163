# SPDX-License-Identifier: Apache-2.0
"""Weights cast by one launch after a step of our optimizers: bit for bit what each layer would cast, by how many
launches, without waiting for the device, in a CUDA graph, and in no more memory."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from weight_casts import SHAPES, check, weights

import hf_lowprec
from hf_lowprec import optim
from hf_lowprec.modules import emission
from hf_lowprec.modules.linear import LowPrecMixin
from hf_lowprec.stepping import attach_optimizer

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16]


def prepared(recipe: str, dtype: torch.dtype, **config: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=512)  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **config})).to("cuda", dtype)
    hf_lowprec.convert(model, recipe)
    if recipe == "fp8-lm":
        return model, attach_optimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    return model, optim.AdamW(model.parameters(), lr=1e-3, states="8bit")  # these recipes keep torch's


def backward(model: nn.Module, seed: int) -> Tensor:
    ids = torch.randint(0, 512, (2, 65), device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    return loss


def layers(model: nn.Module) -> list[Any]:
    return [module._lowprec for module in model.modules() if isinstance(module, LowPrecMixin)]


def copies(model: nn.Module) -> list[Tensor]:
    return [t for layer in layers(model) for t in layer.weight_cache.quantized or () if t is not None]


def need(model: nn.Module) -> None:
    """As the first layer does that needs its copy after a step."""
    for layer in layers(model):
        if layer.weight_cache._awaited is not None:
            layer.weight_cache._awaited[0]()


def raw(tensors: list[Tensor]) -> list[Tensor]:
    return [t.view(torch.uint8).clone() if t.dim() else t.clone() for t in tensors]


def train(recipe: str, dtype: torch.dtype, steps: int, *, lazy: bool = False) -> dict[str, Any]:
    """Losses, codes and scales after every forward pass, the session's state at the end."""
    with pytest.MonkeyPatch.context() as patch:
        if lazy:
            patch.setattr(emission, "table_for", lambda device: None)
        model, optimizer = prepared(recipe, dtype)
        losses, codes, places = [], [], []
        for step in range(steps):
            for micro in range(2):
                loss = backward(model, 2 * step + micro)
                losses.append(loss.detach())
            codes.append(raw(copies(model)))
            places.append([t.data_ptr() for t in copies(model)])
            optimizer.step()
            optimizer.zero_grad()
    state = model._hf_lowprec.scaling.state_dict()
    return {"losses": losses, "codes": codes, "places": places, "state": state, "linears": len(layers(model))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_table_is_bit_for_bit_a_cast_of_each(dtype: torch.dtype) -> None:
    table = emission.table_for(torch.device("cuda", 0))
    cases = [case for case in weights((*SHAPES, (4096, 2064), (257, 129), (2048, 512))) if case[0].dtype == dtype]
    assert check(table, cases, "cuda") >= 3
    assert check(table, cases[::-2], "cuda") >= 1, "fewer, in another order"


@pytest.mark.parametrize("recipe", ["fp8-lm", "te-delayed", "te-current"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_is_the_same_bit_for_bit(dtype: torch.dtype, recipe: str) -> None:
    emitted, lazy = train(recipe, dtype, 5), train(recipe, dtype, 5, lazy=True)
    assert all(map(torch.equal, emitted["losses"], lazy["losses"]))
    for step, (a, b) in enumerate(zip(emitted["codes"], lazy["codes"], strict=True)):
        assert len(a) == (3 * emitted["linears"] if step else 0) and all(map(torch.equal, a, b)), step
    assert emitted["places"][1:] == [emitted["places"][1]] * 4, "in the memory of the first copies"
    for name, roles in lazy["state"].items():
        for role, tensors in roles.items():
            for key, value in tensors.items():
                assert torch.equal(value, emitted["state"][name][role][key]), (name, role, key)


def kernels_of_a_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Counter[str]:
    """Without copies and fills by the driver: a table is sent again where the allocator has moved a gradient, say."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        backward(model, 9)
        optimizer.step()
        torch.cuda.synchronize()
    names = [e.name for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return Counter(name for name in names if not name.startswith(("Memcpy", "Memset")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_launch_in_place_of_one_per_linear(dtype: torch.dtype) -> None:
    found = []
    for lazy in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if lazy:
                patch.setattr(emission, "table_for", lambda device: None)
            model, optimizer = prepared("fp8-lm", dtype)
            for step in range(5):
                backward(model, step)
                optimizer.step()
                optimizer.zero_grad()
                torch.cuda.synchronize()  # what is sent to the host arrives
            found.append(kernels_of_a_step(model, optimizer))
    ours, theirs = found
    linears = len(layers(model))
    more, fewer = ours - theirs, theirs - ours
    said = "\n".join(
        f"{sign}{count} {name}" for sign, found in (("+", more), ("-", fewer)) for name, count in found.items()
    )
    assert fewer == {"_cast_transpose_kernel": linears}, said
    # Beside it counters are cleared, and those of the copies used since the step before are added up.
    assert more.pop("cast_weights_kernel") == 1, said
    assert sorted(more.values()) == [1, 1], said
    assert sum("FillFunctor<long>" in name for name in more) == 1, said
    assert sum("multi_tensor_apply" in name and "plus<long>" in name for name in more) == 1, said


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nobody_waits_and_a_skipped_step_changes_nothing(dtype: torch.dtype) -> None:
    model, optimizer = prepared("fp8-lm", dtype)
    kept: list[list[Tensor]] = []
    for step in range(5):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            backward(model, step)
            if step == 4:
                next(model.parameters()).grad.view(-1)[:1].fill_(float("nan"))
            optimizer.step()
            optimizer.zero_grad()
            need(model)
            kept.append(raw(copies(model)))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert int(optimizer.skipped_steps) == 1
    assert not kept[0] and all(map(torch.equal, kept[4], kept[3])) and not all(map(torch.equal, kept[3], kept[2]))
    hf_lowprec.invalidate(model)
    backward(model, 5)
    assert all(map(torch.equal, raw(copies(model)), kept[4])), "cast by the layers"


@pytest.mark.parametrize("recipe", ["fp8-lm", "te-delayed", "te-current"])
def test_replays_of_a_captured_step_cast_into_the_same_copies(recipe: str) -> None:
    """Forward and backward passes run eagerly in between, and multiply what replays have cast."""

    def run(captured: bool) -> tuple[list[Tensor], list[list[Tensor]], list[list[int]]]:
        model, optimizer = prepared(recipe, torch.bfloat16)
        losses, codes, places = [], [], []
        graph: torch.cuda.CUDAGraph | None = None
        for step in range(7):
            losses.append(backward(model, step).detach())
            if step:
                codes.append(raw(copies(model)))
                places.append([t.data_ptr() for t in copies(model)])
            if not captured or step < 3:
                optimizer.step()
            elif graph is None:
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    optimizer.step()
                graph.replay()
            else:
                graph.replay()
            optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        return losses, codes, places

    eager, replayed = run(False), run(True)
    assert all(map(torch.equal, eager[0], replayed[0]))
    for a, b in zip(eager[1], replayed[1], strict=True):
        assert len(a) == len(b) and all(map(torch.equal, a, b))
    assert replayed[2] == [replayed[2][0]] * len(replayed[2])


def test_memory_is_that_of_casts_in_the_layers() -> None:
    peaks = []
    gc.collect()
    for lazy in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if lazy:
                patch.setattr(emission, "table_for", lambda device: None)
            model, optimizer = prepared("fp8-lm", torch.bfloat16, hidden_size=1024, intermediate_size=4096)
            for step in range(4):
                if step == 2:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                loss = backward(model, step)
                optimizer.step()
                optimizer.zero_grad()
                assert loss.isfinite()
            peaks.append(torch.cuda.max_memory_allocated())
            del model, optimizer, loss
            gc.collect()
            torch.cuda.empty_cache()
    assert peaks[1] <= peaks[0] + (1 << 18), peaks


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_two_devices() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128).to("cuda:0"), nn.Linear(128, 64).to("cuda:1")).bfloat16()
    hf_lowprec.convert(model, "te-current")
    optimizer = optim.AdamW(model.parameters(), lr=1e-2, states="8bit")
    for _ in range(4):
        h = model[0](torch.ones(32, 64, device="cuda:0", dtype=torch.bfloat16))
        model[1](h.to("cuda:1")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer in model:
        kept = raw(list(layer._lowprec.weight_cache.quantized))
        hf_lowprec.invalidate(model)
        state = layer._lowprec
        mine = state.weight_cache.get(layer.weight, state.spec, state.operands[1], ready=False, training=True)
        assert all(map(torch.equal, kept, raw(list(mine))))
