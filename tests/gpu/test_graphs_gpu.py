# SPDX-License-Identifier: Apache-2.0
"""Graphs of layers on a GPU: training with and without them has the same bits, and fewer launches."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import hf_lowprec
from hf_lowprec.graphs import GraphError
from hf_lowprec.stepping import attach_optimizer

pytestmark = pytest.mark.gpu
RECIPES = ["bf16", "fp8-lm", "te-current", "te-delayed"]
STEPS, MICRO = 10, 2


@pytest.fixture(autouse=True)
def _free() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def _ids(number: int, length: int = 64) -> Tensor:
    return torch.randint(0, 512, (2, length), generator=torch.Generator().manual_seed(number)).cuda()


class Run:
    """A 2-layer Llama in training. `bf16`: not converted."""

    def __init__(self, recipe: str, graphs: bool, dtype: torch.dtype = torch.bfloat16, **config: Any) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        known = dict(
            hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=512, use_cache=False, attn_implementation="sdpa",
        )  # fmt: skip
        self.model: Any = LlamaForCausalLM(LlamaConfig(**{**known, **config})).to("cuda", dtype)
        self.autocast = dtype == torch.float32
        if recipe != "bf16":
            hf_lowprec.convert(self.model, recipe)
        self.graphs = hf_lowprec.graph_layers(self.model, warmup_steps=2) if graphs else None
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        if recipe != "bf16":
            self.optimizer = attach_optimizer(self.model, self.optimizer)
        self.losses: list[Tensor] = []
        self.grads: list[Tensor] = []

    def loss(self, ids: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.autocast):
            return self.model(input_ids=ids, labels=ids).loss

    def step(self, number: int, *, micro: int = MICRO, length: int = 64, clip: float | None = 1.0) -> None:
        for m in range(micro):
            loss = self.loss(_ids(100 * number + m, length))
            loss.backward()
            self.losses.append(loss.detach())
        if clip is not None:
            self.grads.append(torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip))
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch.cuda.synchronize()  # so that delayed scales are known after the same step in every run

    def state(self) -> dict[str, Tensor]:
        out = {f"weight {n}": p.detach() for n, p in self.model.named_parameters()}
        out["losses"] = torch.stack(self.losses)
        if self.grads:
            out["gradient norms"] = torch.stack(self.grads)
        session = self.model.__dict__.get("_hf_lowprec")
        if session is not None:
            for name, roles in session.scaling.state_dict().items():
                out.update({f"{name} {r} {k}": t for r, tensors in roles.items() for k, t in tensors.items()})
        return out


def _same(a: Run, b: Run) -> None:
    mine, other = a.state(), b.state()
    assert mine.keys() == other.keys()
    differ = [name for name, tensor in mine.items() if not torch.equal(tensor, other[name])]
    first = next((i for i, (x, y) in enumerate(zip(a.losses, b.losses, strict=True)) if x != y), None)
    replays = None if a.graphs is None else (a.graphs.replays, a.graphs.eager)
    assert not differ, f"{len(differ)} of {len(mine)} differ, first loss {first}, {differ[:6]}; replays {replays}"


def _captured(run: Run) -> None:
    assert run.graphs is not None
    assert run.graphs.captured == 2 and run.graphs.replays > 0, f"{run.graphs}; {run.graphs.eager}"


def _pair(recipe: str, **config: Any) -> tuple[Run, Run]:
    return Run(recipe, True, **config), Run(recipe, False, **config)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_bits_with_accumulation_and_clipping(recipe: str) -> None:
    pair = _pair(recipe)
    for run in pair:
        for number in range(STEPS):
            run.step(number)
    _captured(pair[0])
    _same(*pair)


@pytest.mark.parametrize("recipe", ["bf16", "fp8-lm"])
def test_float32_weights_under_autocast(recipe: str) -> None:
    pair = _pair(recipe, dtype=torch.float32)
    for run in pair:
        for number in range(STEPS):
            run.step(number)
    _captured(pair[0])
    _same(*pair)


def test_another_length_evaluation_and_weights_written_by_hand() -> None:
    pair = _pair("fp8-lm")
    for run in pair:
        for number in range(STEPS):
            run.step(number, length=96 if number == 8 else 64)
            if number == 6:
                with torch.no_grad():
                    run.model.model.layers[0].mlp.up_proj.weight.mul_(1.25)
                    run.model.eval()
                    run.losses.append(run.loss(_ids(999)))
                    run.model.train()
    _captured(pair[0])
    _same(*pair)


def test_weights_that_move_are_captured_anew() -> None:
    pair = _pair("te-current")
    for run in pair:
        for number in range(STEPS + 3):
            run.step(number)
            if number == 6:
                weight = run.model.model.layers[1].self_attn.q_proj.weight
                weight.data = weight.data.clone() * 0.5
    _captured(pair[0])
    assert pair[0].graphs is not None and pair[0].graphs.lists[0]._record is not None
    assert pair[0].graphs.lists[0]._record.drops == 1
    _same(*pair)


def test_two_forward_passes_before_a_backward_pass() -> None:
    pair = _pair("fp8-lm")
    for run in pair:
        for number in range(7):
            run.step(number)
        loss = run.loss(_ids(1)) - 0.5 * run.loss(_ids(2))
        loss.backward()
        run.losses.append(loss.detach())
        run.step(8)
    _captured(pair[0])
    assert pair[0].graphs is not None
    assert pair[0].graphs.eager["an earlier pass has its backward pass still to come"] == 2
    _same(*pair)


def test_masks_that_change() -> None:
    pair = _pair("fp8-lm")
    for run in pair:
        for number in range(STEPS):
            ids = _ids(number, 128)
            mask = torch.ones_like(ids)
            mask[0, 100 + number :] = 0
            loss = run.model(input_ids=ids, attention_mask=mask, labels=ids).loss
            loss.backward()
            run.losses.append(loss.detach())
            run.optimizer.step()
            run.optimizer.zero_grad()
            torch.cuda.synchronize()
    _captured(pair[0])
    _same(*pair)


def test_dropout_draws_new_numbers() -> None:
    run = Run("bf16", True, attention_dropout=0.5)
    for number in range(6):
        run.step(number)
    _captured(run)
    ids = _ids(5)
    losses = []
    for _ in range(3):
        loss = run.loss(ids)
        loss.backward()
        losses.append(loss.item())
        run.optimizer.zero_grad()
    assert len(set(losses)) == 3, losses


@pytest.mark.parametrize("recipe", ["bf16", "fp8-lm"])
def test_there_are_fewer_launches(recipe: str) -> None:
    counts = []
    for run in _pair(recipe):
        for number in range(8):
            run.step(number)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            for m in range(2):
                run.loss(_ids(m)).backward()
            torch.cuda.synchronize()
        names = {e.key: e.count for e in trace.key_averages()}
        launches = sum(c for n, c in names.items() if "LaunchKernel" in n or n == "cudaMemcpyAsync")
        counts.append((launches, names.get("cudaGraphLaunch", 0)))
    (with_graphs, replays), (without, none) = counts
    assert none == 0 and replays == 2 * 2 * 2, counts
    assert with_graphs < 0.6 * without, counts


def test_a_step_of_replays_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers looks, on the host, whether several texts are packed into a row.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    run = Run("fp8-lm", True)
    for number in range(8):
        run.step(number)
    _captured(run)
    batches = [_ids(i) for i in range(3)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for ids in batches:
            run.loss(ids).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_dropping_graphs_gives_their_memory_back_and_they_come_again() -> None:
    run = Run("fp8-lm", True, num_hidden_layers=4)
    for number in range(7):
        run.step(number)
    assert run.graphs is not None and run.graphs.captured == 4, run.graphs.eager
    run.graphs.clear()
    assert run.graphs.captured == 0
    for number in range(7, 12):
        run.step(number)
    assert run.graphs.captured == 4, run.graphs.eager
    hf_lowprec.ungraph_layers(run.model)
    run.step(12)


def test_gradients_twice_are_refused() -> None:
    run = Run("bf16", True)
    for number in range(6):
        run.step(number)
    _captured(run)
    loss = run.loss(_ids(0))
    loss.backward(retain_graph=True)
    with pytest.raises(GraphError, match="asked for twice"):
        loss.backward()
