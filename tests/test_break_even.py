# SPDX-License-Identifier: Apache-2.0
"""The rule that leaves to bf16 what FP8 would slow down: by synthetic measurements, as no number here is measured."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from core import llama, mlp, token_ids
from torch import nn

import hf_lowprec
from hf_lowprec import break_even
from hf_lowprec.break_even import BreakEven, find, least_tokens
from hf_lowprec.modules.linear import FEW_TOKENS
from hf_lowprec.ops import kernel_counts
from hf_lowprec.session import session_of

GPU = "NVIDIA Imaginary 80GB"


def test_the_rule_follows_from_the_cells() -> None:
    cells = [
        # never; from 2048 on, although 512 gained by chance; everywhere
        [1024, 512, 1.0, 1.2], [1024, 2048, 2.0, 2.0], [1024, 8192, 8.0, 8.1],
        [2048, 512, 1.0, 0.9], [2048, 1024, 1.0, 1.1], [2048, 8192, 9.0, 6.0], [2048, 2048, 3.0, 2.9],
        [4096, 512, 1.0, 0.9], [4096, 8192, 9.0, 6.0],
    ]  # fmt: skip
    steps = least_tokens(cells)
    assert steps == [[1024**2, None], [2048**2, 2048], [4096**2, 512]]
    rule = BreakEven(GPU, tuple(map(tuple, steps)))  # type: ignore[arg-type]
    sizes = {1: None, 1024**2: None, 2048**2 - 1: None, 2048**2: 2048, 2048 * 8192: 512, 10**9: 512}
    assert {size: rule.tokens(size) for size in sizes} == sizes
    assert rule.min_numel == 2048**2
    never = BreakEven(GPU, ((16, 8), (64, None)))
    assert never.min_numel == 65 and never.tokens(32) == 8, "what gains below a size that does not is left, too"


def test_a_recipe_that_was_not_measured_has_the_most_cautious_rule() -> None:
    table = {GPU: {"a": {"least_tokens": [[16, 512], [64, 256]]}, "b": {"least_tokens": [[16, None], [64, 1024]]}}}
    assert find(table, GPU, "a") == BreakEven(GPU, ((16, 512), (64, 256)))
    assert find(table, GPU, "other") == BreakEven(GPU, ((16, None), (64, 1024)))
    assert find(table, "another GPU", "a") is None and find({}, GPU, "a") is None


def test_the_file_that_is_shipped_is_read() -> None:
    data = json.loads(break_even.PATH.read_text())
    assert set(data) == {"about", "gpus"}
    for gpu, recipes in data["gpus"].items():
        for recipe, entry in recipes.items():
            rule = find(data["gpus"], gpu, recipe)
            assert rule is not None and rule.steps == tuple(sorted(rule.steps)) and entry["environment"]["gpu"] == gpu


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A GPU on which weights of 32 x 48 and more gain from 6 tokens on, and 32 x 32 from 10 on."""
    steps = [[32 * 16, None], [32 * 32, 10], [32 * 48, 6]]
    llama()  # has transformers imported before there seems to be a GPU
    path = tmp_path / "break_even.json"
    path.write_text(json.dumps({"about": "", "gpus": {GPU: {"fp8-lm": {"least_tokens": steps}}}}))
    monkeypatch.setenv("HF_LOWPREC_BREAK_EVEN", "1")
    monkeypatch.setattr(break_even, "PATH", path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.mark.usefixtures("measured")
def test_the_rule_of_the_gpu_at_hand_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    report = hf_lowprec.convert(model, "fp8-lm")
    small = {name for name, why in report.skipped.items() if why == "FP8 gains nothing below 1024 elements"}
    assert {name.rpartition(".")[2] for name in small} == {"k_proj", "v_proj"}
    assert {report.least_tokens[name] for name in report.converted if "self_attn" in name} == {10}
    assert {report.least_tokens[name] for name in report.converted if "mlp" in name} == {6}
    assert f"native GEMMs from 6 to 10 tokens a call on, measured on {GPU}; fused" in report.summary()
    assert "base precision below 10 tokens a call: 2 x model.layers.*.self_attn.q_proj" in str(report)
    assert hf_lowprec.convert(model, "fp8-lm") is report

    everything = hf_lowprec.convert(llama(), "fp8-lm", min_numel=0, min_tokens=0)
    assert len(everything.converted) == 14 and not everything.least_tokens and "tokens a call" not in str(everything)
    sizes = hf_lowprec.convert(llama(), "fp8-lm", min_numel=0)
    assert len(sizes.converted) == 14 and len(sizes.least_tokens) == 10, "no number of tokens is known to be enough"
    emulated = hf_lowprec.convert(llama(), "fp8-lm", emulate=True)
    assert len(emulated.converted) == 14 and not emulated.least_tokens, "emulation is not for speed"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "unheard of")
    assert len(hf_lowprec.convert(llama(), "fp8-lm").converted) == 14, "nothing is known of this GPU"


@pytest.mark.usefixtures("measured")
def test_a_user_may_ignore_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    small = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(hf_lowprec.NothingConvertedError, match=r"min_numel=0 or HF_LOWPREC_BREAK_EVEN=0 converts"):
        hf_lowprec.convert(copy.deepcopy(small), "fp8-lm")
    assert hf_lowprec.convert(copy.deepcopy(small), "fp8-lm", min_numel=0, min_tokens=0).converted
    monkeypatch.setenv("HF_LOWPREC_BREAK_EVEN", "0")
    report = hf_lowprec.convert(small, "fp8-lm")
    assert report.converted and not report.least_tokens and "measured on" not in str(report)
    monkeypatch.setenv("HF_LOWPREC_BREAK_EVEN", "no")
    with pytest.raises(ValueError, match="HF_LOWPREC_BREAK_EVEN='no': 0 or 1"):
        hf_lowprec.convert(nn.Sequential(nn.Linear(16, 16)), "fp8-lm")


@pytest.mark.usefixtures("measured")
def test_graphs_lift_the_bound_on_tokens() -> None:
    model = llama()
    report = hf_lowprec.convert(model, "fp8-lm")
    layers = report_layers(model)
    before, bounds = dict(report.least_tokens), {name: state.least for name, state in layers.items()}
    assert set(bounds.values()) == {10 * 32, 6 * 32, 6 * 48}
    graphs = hf_lowprec.graph_layers(model, device_type="cpu")
    assert not report.least_tokens and not any(state.least for state in layers.values())
    assert graphs.lifted == before and "tokens a call" not in report.summary()
    hf_lowprec.ungraph_layers(model)
    assert report.least_tokens == before and {name: state.least for name, state in layers.items()} == bounds

    asked = llama()
    report = hf_lowprec.convert(asked, "fp8-lm", min_tokens=4)
    hf_lowprec.graph_layers(asked, device_type="cpu")
    assert set(report.least_tokens.values()) == {4}, "the user's own bound stays"


@pytest.mark.usefixtures("measured")
def test_graphs_lift_the_bound_of_linears_that_were_wrapped_since() -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: torch.Tensor) -> Any:
            return self.base(x)

    model = llama()
    report = hf_lowprec.convert(model, "fp8-lm")
    layers = report_layers(model)
    before, bounds = dict(report.least_tokens), {name: state.least for name, state in layers.items()}
    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapter(attention.q_proj)
    graphs = hf_lowprec.graph_layers(model, device_type="cpu")
    assert graphs.lifted == before and not report.least_tokens and not any(s.least for s in layers.values())
    hf_lowprec.ungraph_layers(model)
    assert report.least_tokens == before and {name: state.least for name, state in layers.items()} == bounds


def report_layers(model: nn.Module) -> dict[str, Any]:
    session = session_of(model)
    assert session is not None
    return session.scaling.layers


def test_a_wrong_switch_is_an_error_where_nothing_is_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_LOWPREC_BREAK_EVEN", "false")
    with pytest.raises(ValueError, match="HF_LOWPREC_BREAK_EVEN='false': 0 or 1"):
        hf_lowprec.convert(nn.Sequential(nn.Linear(16, 16)), "te-current", emulate=True)


@pytest.mark.parametrize("fuse", [False, True])
def test_few_tokens_run_as_they_did(fuse: bool) -> None:
    plain, model = mlp(bias=True), mlp(bias=True)
    hf_lowprec.convert(model, "fp8-lm", fuse=fuse, min_tokens=6)
    few, enough = torch.randn(5, 32), torch.randn(2, 3, 32)
    before = kernel_counts()[FEW_TOKENS]
    out, expected = model(few), plain(few)
    out.sum().backward()
    expected.sum().backward()
    assert kernel_counts()[FEW_TOKENS] - before == 2
    # Fused, the middle of the MLP rounds as its kernel does: float32 here, and nothing is kept in low precision less.
    torch.testing.assert_close(out, expected, rtol=0 if not fuse else 1e-6, atol=0 if not fuse else 1e-6)
    if not fuse:
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert not torch.equal(model(enough), plain(enough)), "rows count, not leading dimensions"
    assert kernel_counts()[FEW_TOKENS] - before == 2


def test_the_threshold_is_of_rows_whatever_the_width() -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32))
    hf_lowprec.convert(model, "te-current", min_tokens=4)
    before = kernel_counts()[FEW_TOKENS]
    model(torch.randn(4, 32))
    assert kernel_counts()[FEW_TOKENS] == before
    model(torch.randn(3, 32))
    assert kernel_counts()[FEW_TOKENS] == before + 2


def test_shared_inputs_and_steps_with_calls_of_both_kinds() -> None:
    """A model whose calls are now above, now below: as one that quantises and one that does not, call by call."""
    torch.manual_seed(0)
    model = llama()
    twin = copy.deepcopy(model)
    hf_lowprec.convert(model, "fp8-lm", min_tokens=8)
    hf_lowprec.convert(twin, "fp8-lm", min_tokens=0)
    for count in (8, 4, 12):
        ids = token_ids(1, count)
        out = model(ids, labels=ids).loss
        if count < 8:
            with hf_lowprec.high_precision(twin):
                reference = twin(ids).logits
            assert (model(ids).logits - reference).abs().max() < 0.05
        else:
            assert torch.equal(out, twin(ids, labels=ids).loss)
        out.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_only_some_of_a_group_below_the_threshold() -> None:
    """Members of one input decide for themselves: q in low precision, k and v not."""
    model, twin = llama(), llama()
    for m in (model, twin):
        hf_lowprec.convert(m, "fp8-lm")
    for name, module in model.named_modules():
        if name.endswith(("k_proj", "v_proj")):
            module._lowprec.least = 10**9
    ids = token_ids(1, 16)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert abs(loss - twin(ids, labels=ids).loss) < 0.1 and not torch.equal(loss, twin(ids, labels=ids).loss)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_layers_with_ranges_of_their_own_have_no_such_rule() -> None:
    with pytest.raises(hf_lowprec.ConversionError, match="min_tokens is for layers without"):
        hf_lowprec.convert(mlp(), "fp8-flex", min_tokens=4)


def test_compiled_models_ignore_the_number_of_tokens() -> None:
    torch._dynamo.reset()
    layer = nn.Linear(32, 32)
    hf_lowprec.convert(layer, "te-current", min_tokens=100)
    before = kernel_counts()
    x: Any = torch.randn(4, 32)
    torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert kernel_counts()[FEW_TOKENS] == before[FEW_TOKENS]
    assert sum((kernel_counts() - before).values()) == 1
