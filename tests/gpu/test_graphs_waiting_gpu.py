# SPDX-License-Identifier: Apache-2.0
"""Graphs of layers that nobody asked for, on a GPU: what is measured, and what becomes of it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_lowprec
from hf_lowprec import _autoload
from hf_lowprec.conversion import report_of
from hf_lowprec.graphs import graph_layers, rehearsal
from hf_lowprec.graphs.gauge import CudaGauge, CudaMark
from hf_lowprec.graphs.rehearsal import BUSY_GPU

pytestmark = pytest.mark.gpu
WAITING = 40_000_000  # clock cycles, some 25 ms: longer than the host takes to issue a layer of these


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU waits for the host, whoever else computes on it meanwhile."""
    monkeypatch.setattr(CudaMark, "reached", lambda self: True)


def _llama(layers: int = 3) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, use_cache=False, attn_implementation="sdpa",
    )).to("cuda", torch.bfloat16)  # fmt: skip


def _ids(number: int) -> Tensor:
    return torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(number)).cuda()


def _train(model: Any, optimizer: Any, steps: int) -> list[Tensor]:
    losses = []
    for number in range(steps):
        loss = model(input_ids=_ids(number), labels=_ids(number)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        torch.cuda.synchronize()  # so that delayed scales are known after the same step in every run
    return losses


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def test_marks_do_not_wait() -> None:
    torch.cuda.synchronize()
    torch.cuda._sleep(20 * WAITING)
    mark = CudaGauge(torch.device("cuda", 0)).mark()
    assert not mark.reached()
    torch.cuda.synchronize()
    assert mark.reached()


def test_what_waits_is_found_and_nothing_else_is_said() -> None:
    gauge, x = CudaGauge(torch.device("cuda", 0)), torch.ones(4, device="cuda")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with gauge.waits() as found:
            (x * 2).sum()
        assert not found
        with gauge.waits() as found:
            x.sum().item()
            warnings.warn("from the layer itself", stacklevel=1)
    assert len(found) == 1 and found[0].startswith("test_graphs_waiting_gpu.py:")
    assert [str(w.message) for w in said] == ["from the layer itself"]
    assert torch.cuda.get_sync_debug_mode() == 0


def test_memory_that_is_missing() -> None:
    gauge = CudaGauge(torch.device("cuda", 0))
    free, total = torch.cuda.mem_get_info()
    assert gauge.lacks(0) == 0 or free < total / 8  # others may have taken it
    assert gauge.lacks(10 * total) > 8 * total


@pytest.mark.parametrize("recipe", ["fp8-lm", "te-current"])
def test_the_same_bits(recipe: str, reached: None) -> None:
    models = _llama(), _llama()
    for model in models:
        hf_lowprec.convert(model, recipe)
    graphs = graph_layers(models[0], when="waiting")
    losses = [_train(model, _adamw(model), 9) for model in models]
    assert graphs.captured == 3 and graphs.replays > 0, f"{graphs}; {graphs.eager}"
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_busy_gpu_is_left_alone() -> None:
    model = _llama()
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: torch.cuda._sleep(WAITING))
    graphs = graph_layers(model, when="waiting")
    _train(model, _adamw(model), 8)
    assert graphs.captured == 0 and str(graphs) == f"none of model.layers: {BUSY_GPU}"


class Routes(nn.Module):
    """Waits for the device, as routing by values does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x) * (1.0 if float(x.detach().sum()) > -1e9 else 2.0)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Routes() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def test_a_layer_that_waits_trains_on(reached: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "KNOWN", (*rehearsal.KNOWN, __name__.partition(".")[0]))
    torch.manual_seed(0)
    model = Routed().cuda()
    graphs = graph_layers(model, when="waiting")
    optimizer = _adamw(model)
    for number in range(8):
        model(torch.full((4, 64), 0.1 * number, device="cuda")).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert graphs.captured == 0 and "its forward waits for the device" in str(graphs), str(graphs)


@pytest.mark.parametrize("experts", [2])
def test_a_mixture_of_experts_trains(reached: None, experts: int) -> None:
    # Captured or not, as transformers routes without or with a look at the values; never an error.
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model: Any = MixtralForCausalLM(MixtralConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=experts, num_experts_per_tok=1, vocab_size=512, use_cache=False,
    )).to("cuda", torch.bfloat16)  # fmt: skip
    hf_lowprec.convert(model, "te-current")
    graphs = graph_layers(model, when="waiting")
    losses = _train(model, _adamw(model), 9)
    print(f"graphs of Mixtral: {graphs}; {graphs.eager}")
    assert all(torch.isfinite(loss) for loss in losses)


@pytest.mark.parametrize(("environment", "captured"), [("auto", 3), ("0", None)])
def test_by_accelerate(environment: str, captured: int | None, reached: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("HF_LOWPREC_GRAPHS", environment)
    _autoload.activate()
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(mixed_precision="fp8-lm")
        model = _llama().float()
        model, optimizer = accelerator.prepare(model, _adamw(model))
        for number in range(9):
            accelerator.backward(model(input_ids=_ids(number), labels=_ids(number)).loss)
            optimizer.step()
            optimizer.zero_grad()
        graphs = report_of(accelerator.unwrap_model(model)).graphs
        assert (None if graphs is None else graphs.captured) == captured
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
