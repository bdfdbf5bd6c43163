# SPDX-License-Identifier: Apache-2.0
"""MX, eXmY and packed states on a GPU: the codes of the CPU, steps that wait for nobody, a resumed run bit for bit; on
one with MX tensor cores (sm_100) the native GEMM against the emulated one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import hf_lowprec
from hf_lowprec import numerics, ops
from hf_lowprec.numerics import packing
from hf_lowprec.optim import AdamW
from hf_lowprec.presets import get_recipe
from hf_lowprec.recipe import Quant, Rounding, Scaling, States
from hf_lowprec.stepping import attach_optimizer

pytestmark = pytest.mark.gpu
NAMES = ["mxfp8", "mxfp6", "mxfp6-e2m3", "mxfp4", "mxint8", "exmy:e3m1", "exmy:e4m3/row"]
# ||native - emulated|| / ||emulated|| of one GEMM on N(0,1) operands: float32 sums in another order, then the output.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.5e-3}


def has_mx() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (10, 0)


@pytest.mark.parametrize("format", ["e4m3fn", "e2m1", "e0m7", "e6m9"])
@pytest.mark.parametrize("scale", [Scaling(granularity="block", block=(32,), snap="ocp", store="e8m0"), Scaling()])
def test_emulated_products_on_tensor_cores(format: str, scale: Scaling) -> None:
    """Operands that bfloat16 holds are multiplied by its GEMM, under autocast too: the CPU's numbers up to the order
    of sums."""
    quant = Quant(format=format, scaling=scale)
    key = ops.quant_key(quant)
    a, b = (numerics.quantize(torch.randn(rows, 4096), quant) for rows in (64, 48))
    bias = torch.randn(48)
    truth = ops.scaled_mm(*a, key, *b, key, bias, dtype=torch.float32, emulate=True)
    on_gpu = [t.cuda() for t in (*a, *b, bias)]
    with torch.autocast("cuda", torch.float16):
        found = ops.scaled_mm(
            *on_gpu[:2], key, *on_gpu[2:4], key, on_gpu[4], dtype=torch.float32, emulate=True
        )  # fmt: skip
    assert float((found.cpu() - truth).norm()) <= TOLERANCE[torch.float32] * float(truth.norm())


def spread(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp2(
        torch.randint(-90, 90, shape, generator=generator).float()
    )


def raw(x: Tensor) -> Tensor:
    return x.detach().cpu().contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_codes_and_scales_are_the_cpus(name: str, dtype: torch.dtype) -> None:
    recipe = get_recipe(name)
    for shape in ((7, 96), (33, 50), (300, 256), (0, 32)):
        x = spread(*shape).to(dtype)
        for slot in (recipe.fprop.input, recipe.fprop.weight):
            here, there = (ops.quantize(t, ops.quant_key(slot)) for t in (x, x.cuda()))
            assert all(torch.equal(raw(a), raw(b)) for a, b in zip(here, there, strict=True)), shape


@pytest.mark.parametrize("bits", range(2, 10))
def test_planes(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (999,)).to(torch.uint8 if bits <= 8 else torch.int16)
    packed = packing.pack(codes.cuda(), bits)
    assert torch.equal(packed.cpu(), packing.pack(codes, bits))
    assert torch.equal(packing.unpack(packed, bits, 999).cpu(), codes)


def model_of() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).cuda()


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> Tensor:
    ids = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(seed)).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def start(name: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = model_of()
    report = hf_lowprec.convert(model, name)
    assert report.emulated == (name != "mxfp8" or not has_mx())
    return model, attach_optimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-3))


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "exmy:e3m1", "exmy:e4m3/row"])
def test_training_resumes_bit_for_bit(name: str) -> None:
    model, optimizer = start(name)
    losses = [step(model, optimizer, 0) for _ in range(6)]
    assert float(losses[-1]) < float(losses[0])
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    wanted = [step(model, optimizer, seed) for seed in (1, 2)]
    resumed, new = start(name)
    resumed.load_state_dict(weights)
    new.load_state_dict(state)
    assert [float(step(resumed, new, seed)) for seed in (1, 2)] == [float(loss) for loss in wanted]


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "exmy:e3m1/row"])
def test_a_step_waits_for_nobody(name: str) -> None:
    model, optimizer = start(name)
    for seed in range(2):
        step(model, optimizer, seed)
    ids = torch.randint(0, 256, (2, 33)).cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bits", [("e2m0", "e3m0u"), ("e2m2", "e4m1u"), ("e3m3", "e5m2noneu")])
def test_packed_states_are_the_cpus(bits: tuple[str, str]) -> None:
    scaling = Scaling(granularity="block", block=(32,), snap="rceil", store="e8m0")
    m, v = (Quant(format=f, scaling=scaling, rounding=Rounding(mode="stochastic")) for f in bits)
    states, found = States(exp_avg=m, exp_avg_sq=v), []
    for device in ("cpu", "cuda"):
        param = torch.nn.Parameter(torch.randn(65, 127, generator=torch.Generator().manual_seed(0)).to(device))
        optimizer = AdamW([param], lr=1e-2, states=states)
        for seed in range(3):
            param.grad = torch.randn(65, 127, generator=torch.Generator().manual_seed(seed)).to(device)
            optimizer.step()
        found.append({"param": raw(param), **{k: raw(t) for k, t in optimizer.state[param].items()}})
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


@pytest.mark.skipif(not has_mx(), reason="needs MX tensor cores (sm_100)")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(128, 128, 128), (33, 48, 96), (257, 512, 100), (1, 16, 4096), (0, 32, 64)])
def test_the_native_gemm(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, k = shape
    quant = get_recipe("mxfp8").fprop.input
    key = ops.quant_key(quant)
    a, b = (ops.quantize(torch.randn(rows, k, device="cuda"), key) for rows in (m, n))
    bias = torch.randn(n, device="cuda")
    native, emulated = (
        ops.scaled_mm(*a, key, *b, key, bias, dtype=dtype, emulate=emulate).float() for emulate in (False, True)
    )
    assert native.shape == (m, n) and ops.kernel_counts()["scaled_mm MX e4m3fn x e4m3fn"] > 0
    assert float((native - emulated).norm()) <= TOLERANCE[dtype] * float(emulated.norm())


@pytest.mark.skipif(not has_mx(), reason="needs MX tensor cores (sm_100)")
def test_the_native_gemm_reads_nan_scales() -> None:
    key = ops.quant_key(get_recipe("mxfp8").fprop.input)
    x = torch.randn(32, 64, device="cuda")
    x[3, 7] = float("nan")
    a, b = ops.quantize(x, key), ops.quantize(torch.randn(16, 64, device="cuda"), key)
    out = ops.scaled_mm(*a, key, *b, key, dtype=torch.bfloat16)
    assert out[3].isnan().all() and int(out.isnan().sum()) == 16
    values = numerics.dequantize(numerics.ScaledTensor(*a), get_recipe("mxfp8").fprop.input)
    assert int(values.isnan().sum()) == 1
