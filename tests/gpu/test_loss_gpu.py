# SPDX-License-Identifier: Apache-2.0
"""lowprec_liger with liger-kernel's own kernels: loss and gradients beside the stock ones and the float64 truth."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("liger_kernel")
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowprec.integrations import loss as L

pytestmark = pytest.mark.gpu


def step(model: nn.Module, ids: Tensor, amp: bool, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    labels = ids.clone()
    labels[:, :7] = -100
    with torch.autocast("cuda", torch.bfloat16, enabled=amp):
        out = model(input_ids=ids, labels=labels, **kwargs)
    (out.loss / 4).backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("dtype", "amp"), [(torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("kwargs", [{}, {"num_items_in_batch": 1000}])
@pytest.mark.parametrize(("vocab", "tied"), [(32000, False), (5003, True)])
def test_loss_gradients_and_logits(
    dtype: torch.dtype, amp: bool, kwargs: dict[str, Any], vocab: int, tied: bool
) -> None:
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(dtype).train()
        ids = torch.randint(0, vocab, (3, 333))
    _, truth = step(copy.deepcopy(model).double(), ids, False, **kwargs)
    stock, stock_grads = step(model, ids, amp, **kwargs)
    L.fuse_loss(model)
    found, grads = step(model, ids, amp, **kwargs)
    assert isinstance(found.logits, L.DeferredLogits)
    torch.testing.assert_close(found.loss, stock.loss, rtol=1e-5, atol=0)
    for name, exact in truth.items():
        mine, theirs = ((g[name].double() - exact).norm() / exact.norm() for g in (grads, stock_grads))
        assert mine <= 1.2 * theirs + 1e-5, name
    model.lm_head._lowprec_loss.deferred = 100
    assert torch.equal(found.logits.detach(), stock.logits.detach())
    L.unfuse_loss(model)


def test_the_logits_of_a_training_step_take_no_memory() -> None:
    config = LlamaConfig(vocab_size=128256, hidden_size=512, intermediate_size=512, num_hidden_layers=1,
                         num_attention_heads=4, use_cache=False)  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).bfloat16().train()
        ids = torch.randint(0, 1000, (2, 4096))
    peaks = []
    for fused in (False, True):
        if fused:
            L.fuse_loss(model)
        step(model, ids, False)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, _ = step(model, ids, False)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del out
    logits = ids.numel() * config.vocab_size * 2
    assert peaks[0] - peaks[1] > 2 * logits  # stock: bfloat16, float32, and the gradient of both
    L.unfuse_loss(model)
