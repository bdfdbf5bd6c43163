# SPDX-License-Identifier: Apache-2.0
"""Training on a GPU: which kernels ran, no waiting for the device, bit-identical repetition and resume, compile."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import hf_lowprec
from hf_lowprec.stepping import attach_optimizer

pytestmark = pytest.mark.gpu
FP8_RECIPES = ["fp8-lm", "fp8-lm-o1", "te-delayed", "te-current", "fp8-amax", "fp8-cscale"]


def _model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).to("cuda", dtype)


def _batch(seed: int) -> torch.Tensor:
    return torch.randint(0, 512, (2, 65), generator=torch.Generator().manual_seed(seed)).cuda()


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def _prepared(recipe: str, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = _model(dtype)
    hf_lowprec.convert(model, recipe)
    return model, attach_optimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-3))


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_three_fp8_gemms_per_linear_and_step(recipe: str) -> None:
    model, optimizer = _prepared(recipe)
    linears = len(model._hf_lowprec.report.converted)
    _step(model, optimizer, _batch(0))
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        _step(model, optimizer, _batch(1))
        torch.cuda.synchronize()
    events = {event.key: event for event in trace.key_averages()}
    gemms = events["aten::_scaled_mm"]
    assert gemms.count == 3 * linears
    assert gemms.device_time_total > 0
    # cuBLASLt spells an operand's format in the kernel's name: q = e4m3, r = e5m2 (h, t = 16 bit; s = float32).
    kernels = [e.name for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    fp8 = [k for k in kernels if re.search(r"nvjet_(sm\d+_)?[qr]{2}|e4m3|e5m2", k)]
    assert len(fp8) >= 3 * linears, "\n".join(sorted(set(kernels)))
    ran = model._hf_lowprec.report.kernels
    assert ran["_scaled_mm e4m3fn x e4m3fn"] >= linears and ran["_scaled_mm e5m2 x e4m3fn"] >= 2 * linears
    assert not any("emulated" in name for name in ran)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_a_step_never_waits_for_the_device(recipe: str, dtype: torch.dtype) -> None:
    model, optimizer = _prepared(recipe, dtype)
    batches = [_batch(i) for i in range(4)]
    _step(model, optimizer, batches[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [_step(model, optimizer, ids) for ids in batches[1:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(loss.isfinite() for loss in losses)


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_native_agrees_with_emulation(recipe: str) -> None:
    losses, grads = [], []
    for emulate in (False, True):
        model = _model()
        hf_lowprec.convert(model, recipe, emulate=emulate)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(_batch(0), labels=_batch(0)).loss
        loss.backward()
        losses.append(loss.item())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    # The sums run in another order and, in fprop, in fewer bits; the next cast turns an ulp into a step of E4M3.
    assert abs(losses[0] - losses[1]) < 5e-3 * losses[1]
    assert ((grads[0] - grads[1]).norm() / grads[1].norm()).item() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resume_is_bit_identical(dtype: torch.dtype, tmp_path: object) -> None:
    model, optimizer = _prepared("fp8-lm", dtype)
    for i in range(3):
        _step(model, optimizer, _batch(i))
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    straight = [_step(model, optimizer, _batch(i)).item() for i in range(3, 8)]

    model, optimizer = _prepared("fp8-lm", dtype)
    model.load_state_dict(weights)
    torch.save(state, f"{tmp_path}/optimizer.pt")
    optimizer.load_state_dict(torch.load(f"{tmp_path}/optimizer.pt", weights_only=True))
    assert [_step(model, optimizer, _batch(i)).item() for i in range(3, 8)] == straight


def test_activations_are_saved_in_one_byte() -> None:
    linear = torch.nn.Linear(1024, 1024, bias=False, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def held(run: Callable[[], torch.Tensor]) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = run()
        return torch.cuda.memory_allocated() - before - out.numel() * out.element_size()

    hf_lowprec.convert(linear, "te-current")
    linear(x)  # the weight's own copies, two bytes a parameter, stay
    assert held(lambda: linear(x * 1.0)) < 1.05 * x.numel()


def test_compile_breaks_no_graph_and_agrees() -> None:
    import torch._dynamo

    torch._dynamo.reset()
    eager, _ = _prepared("fp8-lm")
    compiled_model, optimizer = _prepared("fp8-lm")
    compiled = torch.compile(compiled_model, fullgraph=True)
    ids = _batch(0)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        expected, got = eager(ids, labels=ids).loss, compiled(ids, labels=ids).loss
    got.backward()
    optimizer.step()
    # Inductor fuses the bf16 elementwise work around the GEMMs and skips its intermediate roundings.
    torch.testing.assert_close(got, expected, rtol=5e-3, atol=0)
    history = compiled_model._hf_lowprec.scaling.history
    assert all((history[role][:, -1] > 0).all() for role in ("input", "grad_output"))


def test_generate_runs_quantised_and_leaves_the_history_alone() -> None:
    model, optimizer = _prepared("fp8-lm")
    _step(model, optimizer, _batch(0))
    before = copy.deepcopy(model._hf_lowprec.scaling.state_dict())
    model.eval()
    out = model.generate(_batch(1)[:1, :5], max_new_tokens=6, do_sample=False)
    assert out.shape == (1, 11)
    after = model._hf_lowprec.scaling.state_dict()
    for name, roles in before.items():
        for role, tensors in roles.items():
            assert all(torch.equal(value, after[name][role][key]) for key, value in tensors.items())
