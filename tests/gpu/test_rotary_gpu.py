# SPDX-License-Identifier: Apache-2.0
"""The rotary kernel on a GPU: bit for bit transformers' function and its gradients, in every launch; and a model that
trains as without it."""

from __future__ import annotations

import importlib
import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import hf_lowprec
from hf_lowprec import ops
from hf_lowprec.conversion import session_of
from hf_lowprec.modules.rotary import turn
from hf_lowprec.modules.rotary_kind import rotary_kind
from hf_lowprec.ops.rotary import rotary, rotary_backward

pytestmark = pytest.mark.gpu
pytest.importorskip("transformers")
F, B, H = torch.float32, torch.bfloat16, torch.float16
NAME = "apply_rotary_pos_emb"


def file(model: str) -> Any:
    return importlib.import_module(f"transformers.models.{model}.modeling_{model}")


def bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(torch.int16 if x.dtype.itemsize == 2 else torch.int32)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Values of many binades, some of them zeros of either sign."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-12, 4, shape, generator=generator))
    return torch.where(x.abs() < 0.003, x.sign() * 0.0, x).to("cuda", dtype)


def layout(x: Tensor) -> list[int]:
    return [step for step, length in zip(x.stride(), x.shape, strict=True) if length != 1]


def views(heads: tuple[int, int], size: int, dtype: torch.dtype) -> list[tuple[str, int, Tensor, Tensor]]:
    b, s = 2, 37
    q, k = (random(b, s, n, size, dtype=dtype, seed=n) for n in heads)
    packed = random(b, s, sum(heads) + heads[1], size, dtype=dtype, seed=3).transpose(1, 2)
    return [
        ("[B, S, H, D] as [B, H, S, D]", 1, q.transpose(1, 2), k.transpose(1, 2)),
        ("[B, S, H, D]", 2, q, k),
        ("[B, H, S, D]", 1, q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous()),
        ("slices", 1, packed[:, : heads[0]], packed[:, heads[0] : sum(heads)]),
        ("not aligned", 2, random(b, s, heads[0], size + 1, dtype=dtype)[..., 1:], k),
        ("decoding", 1, q[:, :1].transpose(1, 2), k[:, :1].transpose(1, 2)),
        ("a gap in the last dimension", 2, random(b, s, heads[0], size, 2, dtype=dtype)[..., 0], k),
    ]


@pytest.mark.parametrize("dtypes", list(itertools.product((F, B, H), repeat=2)), ids=str)
@pytest.mark.parametrize("model", ["llama", "gpt_neox", "phi3", "olmo2", "modernbert", "hunyuan_vl"])
def test_bits_of_transformers_function(model: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    function, (dtype, table) = getattr(file(model), NAME), dtypes
    kind = rotary_kind(function)
    assert kind is not None
    for heads, size, width in (((32, 8), 128, 128), ((14, 2), 64, 64), ((4, 4), 80, 80), ((3, 1), 96, 24)):
        if width < size and not kind.joined:
            continue
        for place, (name, dim, q, k) in enumerate(views(heads, size, dtype)):
            tokens = q.shape[3 - dim]
            cos, sin = (random(1 + place % 2, tokens, width, dtype=table, seed=9 + i) for i in range(2))
            rule = kind.rule(dim, (dtype, dtype, table, table), (q.shape, k.shape, cos.shape, sin.shape))
            assert rule is not None
            found = []
            for fused in (False, True):
                leaves = [x.detach().requires_grad_() for x in (q, k)]
                if fused:
                    before = ops.kernel_counts()["fused rotary embedding"]
                    results = turn(*leaves, cos, sin, rule)
                    taken = ops.kernel_counts()["fused rotary embedding"] - before
                    assert taken == (name != "a gap in the last dimension")
                else:
                    results = function(*leaves, cos, sin, unsqueeze_dim=dim)
                grads = [random(*y.shape, dtype=y.dtype, seed=5) for y in results]
                found.append([*results, *torch.autograd.grad(results, leaves, grads)])
            for place_in, (theirs, ours) in enumerate(zip(*found, strict=True)):
                assert theirs.dtype == ours.dtype and torch.equal(bits(theirs), bits(ours)), (name, heads)
                assert place_in > 1 or layout(theirs) == layout(ours), (name, heads)


def test_every_launch() -> None:
    from hf_lowprec.kernels.rotary import rotary as kernel
    from hf_lowprec.kernels.rotary import rotary_backward as backward_kernel
    from hf_lowprec.kernels.triton.rotary import Launch

    checked = 0
    for heads, size, width in (((32, 8), 128, 128), ((14, 2), 64, 64), ((6, 6), 96, 32)):
        for dtype, table, out in ((B, B, B), (B, F, F), (F, F, F)):
            q, k = (random(2, 9, n, size, dtype=dtype, seed=n).transpose(1, 2) for n in heads)
            cos, sin = (random(1, 9, width, dtype=table, seed=i) for i in range(2))
            args = (q, k, cos, sin, 1, out, out, width < size)
            expected = rotary(*args)
            back = (*expected, cos, sin, 1, dtype, dtype, q.stride(), k.stride())
            expected_back = rotary_backward(*back)
            for parts, warps in itertools.product((1, 2, 4, 8), (1, 2, 4, 8)):
                rows = [1 << max(0, -(-n // parts) - 1).bit_length() for n in heads]
                launch = Launch(parts, rows[0], rows[1], warps)
                pairs = zip((*kernel(*args, launch), *backward_kernel(*back, launch)), (*expected, *expected_back),
                            strict=True)  # fmt: skip
                assert all(torch.equal(bits(a), bits(b)) for a, b in pairs), launch
                checked += 1
    assert checked == 144


def test_more_than_int32_elements() -> None:
    tokens = 2**31 // 4096 + 3
    q, k = (torch.zeros(1, tokens, n, 128, dtype=B, device="cuda") for n in (32, 1))
    q[:, -2:], k[:, -2:] = random(1, 2, 32, 128, dtype=B), random(1, 2, 1, 128, dtype=B)
    cos, sin = (random(1, 2, 128, dtype=B, seed=i).repeat(1, tokens // 2 + 1, 1)[:, -tokens:] for i in range(2))
    for dim in (2, 1):
        a, b = (q, k) if dim == 2 else (q.transpose(1, 2), k.transpose(1, 2))
        turned, _ = rotary(a, b, cos, sin, dim, B, B, False)
        last = turned[:, -2:] if dim == 2 else turned.transpose(1, 2)[:, -2:]
        few, _ = rotary(q[:, -2:].clone(), k[:, -2:].clone(), cos[:, -2:], sin[:, -2:], 2, B, B, False)
        assert torch.equal(last, few) and not turned.flatten()[:1000].any()
        del turned, last


def llama(dtype: torch.dtype, **changes: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager", **changes,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to("cuda", dtype).train()


def losses_and_gradients(model: Any, autocast: bool) -> list[Tensor]:
    optimizer, out = torch.optim.SGD(model.parameters(), lr=1e-2), []
    for step in range(3):
        ids = torch.randint(0, 128, (4, 64), generator=torch.Generator().manual_seed(step)).to("cuda")
        with torch.autocast("cuda", B, autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        out += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
        optimizer.step()
        optimizer.zero_grad()
    return out


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("weights", [F, B], ids=str)
def test_a_llama_trains_as_without_it(
    weights: torch.dtype, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same losses and gradients, bit for bit; all layers' calls take the kernel, twice where they are recomputed."""
    results, counts = [], []
    for fused in (True, False):
        model = llama(weights)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        report = hf_lowprec.convert(model, "te-current")
        assert len(report.rotary) == 2
        if not fused:  # whoever else lives and keeps the kernel in place for all of the file
            monkeypatch.setattr(file("llama"), NAME, inspect.unwrap(getattr(file("llama"), NAME)))
        before = ops.kernel_counts()["fused rotary embedding"]
        results.append(losses_and_gradients(model, weights == F))
        counts.append(ops.kernel_counts()["fused rotary embedding"] - before)
        hf_lowprec.revert(model)
    assert counts == [2 * 3 * (1 + checkpointing), 0]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_launches() -> None:
    """Of the function's 14 and 20 one each is left."""
    function = inspect.unwrap(getattr(file("llama"), NAME))
    kind = rotary_kind(function)
    q, k = (random(2, 64, n, 128, dtype=B, seed=n).transpose(1, 2).requires_grad_() for n in (8, 2))
    cos, sin = (random(1, 64, 128, dtype=B, seed=i) for i in range(2))
    assert kind is not None
    rule = kind.rule(1, (B,) * 4, (q.shape, k.shape, cos.shape, sin.shape))
    assert rule is not None
    found = []
    for call in (lambda: function(q, k, cos, sin), lambda: turn(q, k, cos, sin, rule)):
        grads = [torch.ones_like(y) for y in call()]
        torch.autograd.grad(call(), (q, k), grads)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            torch.autograd.grad(call(), (q, k), grads)
            torch.cuda.synchronize()
        found.append(sum(e.device_type == torch.autograd.DeviceType.CUDA for e in trace.events()))
    assert found[1] == 2 and found[0] >= 25, found


def test_generation_and_compile() -> None:
    model = llama(B).eval()
    ids = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(0)).to("cuda")
    hf_lowprec.convert(model, "te-current")
    before = ops.kernel_counts()["fused rotary embedding"]
    got = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert ops.kernel_counts()["fused rotary embedding"] - before == 2 * 5
    hf_lowprec.revert(model)
    hf_lowprec.convert(model, "te-current")
    for use in session_of(model).rotary:
        use.release()
    assert torch.equal(got, model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False))


def test_cuda_graph() -> None:
    q, k = (random(2, 8, n, 64, dtype=B, seed=n).transpose(1, 2) for n in (4, 2))
    cos, sin = (random(1, 8, 64, dtype=B, seed=i) for i in range(2))
    expected = rotary(q, k, cos, sin, 1, B, B, False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = rotary(q, k, cos, sin, 1, B, B, False)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
