# SPDX-License-Identifier: Apache-2.0
"""sdpa on a GPU: what the report says is what runs, masked calls keep off cuDNN, and its NaN does not come through."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")
from torch.nn.attention import SDPBackend
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowprec.integrations import attention as A

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


def model(head_dim: int = 64) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128, hidden_size=4 * head_dim, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    with GPU:
        return LlamaForCausalLM(config).bfloat16()


def kernels(call: object) -> str:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        call()  # type: ignore[operator]
        torch.cuda.synchronize()
    return " ".join(event.key.lower() for event in trace.key_averages())


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_report_names_what_runs(head_dim: int) -> None:
    m = model(head_dim)
    phrase = A.watch(m, GPU)
    ids = torch.randint(0, 128, (2, 256), device=GPU)
    run = kernels(lambda: m(input_ids=ids))
    assert ("cudnn" in run) == (phrase == "sdpa (cuDNN)"), run
    A.unwatch(m)


def test_a_mask_on_an_odd_multiple_of_64_gives_finite_gradients() -> None:
    """pytorch/pytorch#196678: every row's logsumexp below ln(FLT_MAX) in bfloat16."""
    m = model()
    if A.backend(m, GPU) is not SDPBackend.CUDNN_ATTENTION:
        pytest.skip("torch does not take cuDNN here")
    A.watch(m, GPU)
    torch.manual_seed(0)
    length, width = 704, 64
    q, k = (torch.randn(1, 1, length, width, device=GPU, dtype=torch.bfloat16) * 0.1 for _ in range(2))
    v = torch.randn_like(q)
    q[..., 0], k[..., 0] = 1.0, -120 * math.sqrt(width)
    mask = torch.ones(length, length, dtype=torch.bool, device=GPU).tril()[None, None]
    grads = []
    for tensors, dtype in (((q, k, v), torch.bfloat16), ((q, k, v), torch.float32)):
        x = [t.to(dtype).requires_grad_() for t in tensors]
        out, _ = A.attention_forward(torch.nn.Module(), *x, mask, is_causal=False)
        out.backward(torch.ones_like(out))
        grads.append([t.grad.float() for t in x])
    for found, truth in zip(*grads, strict=True):
        assert found.isfinite().all()
        assert (found - truth).norm() <= 0.05 * truth.norm() + 1e-3
    A.unwatch(m)
