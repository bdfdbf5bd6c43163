# SPDX-License-Identifier: Apache-2.0
"""Graphs of layers that nobody asked for: taken where they gain, and never at a price."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from core import llama
from graph_cases import FakeCapturer, FakeGauge, Layer, Stack, batch, stack
from torch import Tensor, nn

import hf_lowprec
from hf_lowprec.conversion import report_of
from hf_lowprec.graphs import GraphError, LayerGraphs, graph_layers, lists, rehearsal
from hf_lowprec.graphs.rehearsal import BUSY_GPU, ORDER, Rehearsal
from hf_lowprec.integrations import switches
from hf_lowprec.integrations.switches import Switches, settle


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "KNOWN", (*rehearsal.KNOWN, "graph_cases", "test_rehearsal"))


def waiting(model: nn.Module, gauge: FakeGauge, **options: Any) -> LayerGraphs:
    return graph_layers(
        model, when="waiting", capturer=FakeCapturer, gauge=gauge, device_type="cpu", **{"warmup_steps": 3, **options}
    )


def train(model: nn.Module, steps: int, micro: int = 2, lengths: tuple[int, ...] = (8,)) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        for m in range(micro):
            loss = model(batch(step * micro + m, lengths[step % len(lengths)]))
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_where_the_gpu_waits_layers_are_captured_and_train_alike() -> None:
    model, plain, gauge = stack(), stack(), FakeGauge()
    graphs = waiting(model, gauge)
    assert str(graphs) == "layers if the GPU waits for the host" and graphs.automatic
    assert train(model, 7) == train(plain, 7)
    assert graphs.captured == 3 and graphs.replays > 0 and str(graphs) == "3 of 3 layers of layers"
    assert gauge.asked == [sum(p.numel() * 4 for p in model.layers.parameters())], "a copy of all gradients"


@pytest.mark.parametrize(("gauge", "said"), [
    (FakeGauge(waiting=False), BUSY_GPU),
    (FakeGauge(lacking=3 << 20), "3 MiB of memory are missing for them"),
    (FakeGauge(waits=["modeling.py:7"]), r"its forward waits for the device (modeling.py:7)"),
])  # fmt: skip
def test_what_speaks_against_it(gauge: FakeGauge, said: str, recwarn: pytest.WarningsRecorder) -> None:
    model, plain = stack(), stack()
    graphs = waiting(model, gauge)
    assert train(model, 7) == train(plain, 7)
    assert graphs.captured == 0 and str(graphs) == f"none of layers: {said}"
    assert not recwarn.list, "nobody has asked for graphs"


def test_a_cache_that_nobody_reads_is_said() -> None:
    model = llama()
    model.train().config.use_cache = True
    waiting(model, FakeGauge())
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.warns(UserWarning, match="use_cache=False, or set model.config.use_cache = False"):
        for _ in range(4):
            model(input_ids=ids)
    model = llama()
    model.train().config.use_cache = False
    graphs = waiting(model, FakeGauge())
    assert not graphs.eager
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            model(input_ids=ids).logits.sum().backward()


class Counts(Layer):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x, *args, **kwargs)


class Draws(Layer):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(x, *args, **kwargs) * (1 + 0 * random.random())


def _of(kind: type[Layer]) -> Stack:
    torch.manual_seed(0)
    model = Stack()
    model.layers = nn.ModuleList(kind(16) for _ in range(3))
    return model


def test_a_forward_that_keeps_count_stays_eager() -> None:
    model = _of(Counts)
    graphs = waiting(model, FakeGauge())
    assert train(model, 60) == train(_of(Counts), 60)
    assert graphs.captured == 0 and str(graphs).startswith("none of layers: ")
    assert all(layer.calls == 120 for layer in model.layers)


def test_what_only_a_capture_shows_is_no_error() -> None:
    model = _of(Draws)
    graphs = waiting(model, FakeGauge())
    assert train(model, 8) == train(_of(Draws), 8)
    assert graphs.captured == 0 and "draws random numbers on the host" in str(graphs)


class Fails(FakeCapturer):
    def record(self, function: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_capture_that_fails_on_the_device_is_an_error() -> None:
    # torch does not say in which state it leaves streams and generators, so nothing goes on.
    model = stack()
    graph_layers(model, when="waiting", capturer=Fails, gauge=FakeGauge(), device_type="cpu")
    with pytest.raises(GraphError, match="HF_LOWPREC_GRAPHS=0"):
        train(model, 7)


def test_gradients_twice_and_passes_without_gradients_stay_eager() -> None:
    for kind in ("twice", "dropped"):
        model = stack()
        graphs = waiting(model, FakeGauge())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(8):
            loss = model(batch(step))
            if kind == "twice":
                loss.backward(retain_graph=True)
                loss.backward()
            elif step % 2:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert graphs.captured == 0 and ORDER in str(graphs), kind


def test_a_share_of_marks_decides() -> None:
    for reached, captured in ((3, False), (6, True)):  # of ten
        gauge = FakeGauge()
        one = Rehearsal(gauge)
        one.begin()
        for index in range(11):
            gauge.waiting = index < reached
            one.call(index, Layer(4), lambda: torch.zeros(1))
        assert one.verdict(0) == (None if captured else BUSY_GPU)


@pytest.mark.parametrize("backward", [True, False])
def test_the_backward_pass_counts(backward: bool) -> None:
    gauge = FakeGauge(waiting=True)
    one = Rehearsal(gauge)
    one.begin()
    x = torch.ones(1, requires_grad=True)
    for index in range(5):
        x = one.call(index, Layer(4), lambda x=x: 2 * x)
    gauge.waiting = backward
    x.sum().backward()
    assert one.verdict(0) == (None if backward else BUSY_GPU)


def test_lengths_that_change_all_the_time_are_given_up() -> None:
    model = stack()
    graphs = waiting(model, FakeGauge())
    train(model, 60, micro=1, lengths=tuple(range(4, 64)))
    assert str(graphs) == "none of layers: no call was like those of 3 steps before"


def test_a_busy_gpu_is_asked_again() -> None:
    model, gauge = stack(), FakeGauge(waiting=False)
    graphs = waiting(model, gauge)
    train(model, 6)
    assert graphs.captured == 0
    gauge.waiting = True
    train(model, 20)
    assert graphs.captured == 0 and not graphs.lists[0]._records, "calls are not looked at meanwhile"
    train(model, lists._PAUSE - 15)
    assert graphs.captured == 3


def test_another_batch_is_another_decision() -> None:
    model, gauge = stack(), FakeGauge()
    graphs = waiting(model, gauge)
    train(model, 6)
    assert graphs.captured == 3
    gauge.waiting = False
    train(model, 6, lengths=(12,))
    assert graphs.captured == 3 and graphs.lists[0].kinds == 1
    replays = graphs.replays
    train(model, 1)
    assert graphs.replays > replays


def test_whoever_asks_gets_graphs() -> None:
    model = stack()
    graphs = waiting(model, FakeGauge(waiting=False))
    train(model, 6)
    assert graphs.captured == 0
    assert graph_layers(model, capturer=FakeCapturer, device_type="cpu") is graphs and not graphs.automatic
    train(model, 6)
    assert graphs.captured == 3


def test_layers_that_are_not_known_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "KNOWN", ("torch",))
    with pytest.raises(GraphError, match="Layer is of graph_cases, whose layers are captured where asked for only"):
        waiting(stack(), FakeGauge())
    model = stack()
    model.layers[1].to("meta")
    monkeypatch.setattr(rehearsal, "KNOWN", ("torch", "graph_cases"))
    with pytest.raises(GraphError, match="several devices"):
        waiting(model, FakeGauge())


def test_arguments() -> None:
    with pytest.raises(ValueError, match="always or waiting"):
        graph_layers(stack(), when="sometimes", capturer=FakeCapturer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="watches a step"):
        waiting(stack(), FakeGauge(), warmup_steps=1)


GPU = torch.device("cuda")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `settle` asks of `graph_layers`, which here has a CPU's stand-in."""
    seen: list[str] = []

    def graphs(model: nn.Module, when: str = "always") -> LayerGraphs:
        seen.append(when)
        if when == "waiting":
            return waiting(model, FakeGauge())
        return graph_layers(model, capturer=FakeCapturer, device_type="cpu")

    monkeypatch.setattr(switches, "graph_layers", graphs)
    monkeypatch.delenv("HF_LOWPREC_GRAPHS", raising=False)
    monkeypatch.setenv("HF_LOWPREC_ATTENTION", "0")
    return seen


def _converted() -> nn.Module:
    model = llama()
    hf_lowprec.convert(model, "te-current")
    return model


@pytest.mark.parametrize(("said", "environment", "expected"), [
    (None, None, ["waiting"]), (None, "auto", ["waiting"]), (None, "0", []), (False, None, []), (False, "1", []),
    (True, "0", ["always"]), (None, "1", ["always"]),
])  # fmt: skip
def test_the_switch(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, no_sessions: None,
    said: bool | None, environment: str | None, expected: list[str],
) -> None:  # fmt: skip
    if environment is not None:
        monkeypatch.setenv("HF_LOWPREC_GRAPHS", environment)
    model = _converted()
    settle(model, Switches(graphs=said), GPU)
    settle(model, Switches(graphs=said), torch.device("cpu"))
    assert list(dict.fromkeys(asked)) == expected
    words = report_of(model).summary()
    assert ("CUDA graphs: model.layers if the GPU waits" in words) == (expected == ["waiting"])


def test_a_later_word_wins_over_none(asked: list[str], no_sessions: None) -> None:
    model = _converted()
    settle(model, Switches(), GPU)
    settle(model, Switches(graphs=False), GPU)
    assert report_of(model).graphs is None
    settle(model, Switches(graphs=True), GPU)
    assert "0 of 2 layers" in str(report_of(model).graphs)


def test_sharding_and_unknown_words(asked: list[str], monkeypatch: pytest.MonkeyPatch, no_sessions: None) -> None:
    model = _converted()
    settle(model, Switches(), GPU, engine="FSDP")
    assert not asked and report_of(model).graphs is None
    monkeypatch.setenv("HF_LOWPREC_GRAPHS", "yes")
    with pytest.raises(ValueError, match="0, 1 or auto"):
        settle(model, Switches(), GPU)


def test_what_cannot_be_graphed_is_said_and_no_error(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, no_sessions: None
) -> None:
    monkeypatch.setattr(rehearsal, "KNOWN", ())
    model = _converted()
    settle(model, Switches(), GPU)
    assert "CUDA graphs: none (" in report_of(model).summary()
