# SPDX-License-Identifier: Apache-2.0
"""The look at sdpa's calls: which ones leave cuDNN out, that results do not change, and that nothing stays behind.

Which backend a GPU takes, and the NaN that is avoided, are tests/gpu/test_attention_gpu.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import llama, llama_config, rows
from torch import nn
from torch.nn.attention import SDPBackend
from transformers import LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_lowprec
from hf_lowprec.integrations import attention as A
from hf_lowprec.integrations.switches import Switches, settle

GPU = torch.device("cuda")
IDS = torch.stack([row["input_ids"] for row in rows(4)])


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which torch takes cuDNN for every model with sdpa."""
    choice = lambda model, *_: SDPBackend.CUDNN_ATTENTION if any(map(A._sdpa_config, model.modules())) else None  # noqa: E731
    monkeypatch.setattr(A, "backend", choice)
    monkeypatch.delenv("HF_LOWPREC_ATTENTION", raising=False)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool, bool]]:
    """(length of the keys, masked, cuDNN allowed) of each call that reaches torch."""
    calls: list[tuple[int, bool, bool]] = []
    sdpa = nn.functional.scaled_dot_product_attention

    def spy(query: Any, key: Any, value: Any, attn_mask: Any = None, **kwargs: Any) -> Any:
        calls.append((key.shape[2], attn_mask is not None, torch.backends.cuda.cudnn_sdp_enabled()))
        return sdpa(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    return calls


def model(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(num_hidden_layers=1, attn_implementation="sdpa", **changes)).train()


def test_masks_on_odd_multiples_of_64_and_decoding_leave_cudnn_out(
    hopper: None, seen: list[tuple[int, bool, bool]]
) -> None:
    m = model()
    assert A.watch(m, GPU) == A.watch(m, GPU) == "sdpa (cuDNN)"
    for length in (32, 64, 128, 192):
        ids = IDS.repeat(1, 12)[:, :length]
        mask = torch.ones_like(ids)
        m(input_ids=ids)
        mask[0, :5] = 0
        m(input_ids=ids, attention_mask=mask)
    assert seen == [
        (32, False, True), (32, True, True), (64, False, True), (64, True, False),
        (128, False, True), (128, True, True), (192, False, True), (192, True, False),
    ]  # fmt: skip
    seen.clear()
    m.eval().generate(IDS[:1], max_new_tokens=3, do_sample=False)
    assert [allowed for _, _, allowed in seen] == [True, False, False]
    assert torch.backends.cuda.cudnn_sdp_enabled()
    A.unwatch(m)


def test_numbers_do_not_change(hopper: None) -> None:
    m = model()
    ids = IDS.repeat(1, 4)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0

    def run() -> tuple[torch.Tensor, ...]:
        m.zero_grad()
        out = m(input_ids=ids, attention_mask=mask, labels=ids)
        out.loss.backward()
        return (out.logits.detach(), *(p.grad.clone() for p in m.parameters()))

    before = run()
    A.watch(m, GPU)
    assert all(torch.equal(a, b) for a, b in zip(run(), before, strict=True))
    A.unwatch(m)


def test_an_error_and_a_user_who_turned_cudnn_off_keep_their_flags(hopper: None) -> None:
    m = model()
    A.watch(m, GPU)
    q = torch.zeros(1, 1, 64, 8)
    with pytest.raises(RuntimeError):
        A.attention_forward(m, q, q, q[..., :4, :], torch.ones(3, 3))
    assert torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        A.attention_forward(m, q, q, q, torch.ones(1, 1, 64, 64, dtype=torch.bool))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    A.unwatch(m)


def test_compiles_without_a_break(hopper: None) -> None:
    m = model()
    ids = IDS.repeat(1, 4)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    expected = m(input_ids=ids, attention_mask=mask).logits
    A.watch(m, GPU)
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=ids, attention_mask=mask).logits, expected)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    A.unwatch(m)


def test_the_table_is_transformers_own_again_when_the_last_model_goes(hopper: None) -> None:
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    a, b = model(), model()
    for m in (a, b):
        report = hf_lowprec.convert(m, "te-current")
        settle(m, Switches(), GPU)
        assert report.attention == "sdpa (cuDNN)" and "attention sdpa (cuDNN)" in report.summary()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is A.attention_forward
    hf_lowprec.revert(a)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is A.attention_forward
    hf_lowprec.revert(b)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping


def test_what_somebody_else_put_into_the_table_stays(hopper: None) -> None:
    def theirs(*args: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(*args, **kwargs)

    m = model()
    ALL_ATTENTION_FUNCTIONS["sdpa"] = theirs
    try:
        A.watch(m, GPU)
        m(input_ids=IDS)
        A.unwatch(m)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is theirs
        A.watch(m, GPU)
        ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention_forward  # after us
        A.unwatch(m)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.pop("sdpa", None)


def test_switches_and_models_without_sdpa(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def phrase(m: nn.Module, device: torch.device = GPU, **said: Any) -> str | None:
        report = hf_lowprec.convert(m, "te-current")
        settle(m, Switches(**said), device)
        assert (ALL_ATTENTION_FUNCTIONS["sdpa"] is A.attention_forward) == (report.attention is not None)
        hf_lowprec.revert(m)
        return report.attention

    assert phrase(model()) is not None
    assert phrase(model(), torch.device("cpu")) is None
    assert phrase(model(), attention=False) is None
    eager = llama()
    eager.set_attn_implementation("eager")
    assert phrase(eager) is None
    monkeypatch.setenv("HF_LOWPREC_ATTENTION", "0")
    assert phrase(model()) is None and phrase(model(), attention=True) is not None


def test_another_backend_is_reported_and_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(A, "backend", lambda *_: SDPBackend.FLASH_ATTENTION)
    m = model()
    assert A.watch(m, GPU) == "sdpa (flash)" and ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_no_gpu_no_word() -> None:
    assert A.backend(model(), torch.device("cpu")) is None
