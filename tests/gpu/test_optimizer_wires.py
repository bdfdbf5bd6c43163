# SPDX-License-Identifier: Apache-2.0
"""Gradients that pass through the communication format on a GPU, inside the step and for other optimizers, against the
truth on the CPU; and the amax of new Parameters.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core import same_bits
from test_optimizers import BF16, FP16, FP32, assert_same, model_like, no_synchronisation, pair, parameters, run
from test_optimizers import set_gradients as set_gradients
from torch import nn

from hf_lowprec.optim import AdamW, Lion, LowPrecOptimizer, StableAdamW
from hf_lowprec.optim.gradient import GradientQuantizer, GradientSwap
from hf_lowprec.presets import PRESETS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

COMMUNICATION = PRESETS["fp8-lm"].communication
assert COMMUNICATION is not None
STATE = ("k", "saturated", "count")


def wire(params: list[nn.Parameter], optimizer: Any, ranks: int) -> GradientQuantizer:
    """Has every other gradient quantised, with a mu that is on its way."""
    index = {p: i for i, p in enumerate(params[::2])}
    quantizer = GradientQuantizer(COMMUNICATION, len(index), world_size=ranks)
    quantizer.k += torch.arange(len(index), dtype=torch.int32) * 377 - 700 * (ranks == 1)
    GradientSwap(quantizer, index).attach(optimizer)
    return quantizer


def assert_same_mu(truth: GradientQuantizer, found: GradientQuantizer) -> None:
    for name in STATE:
        assert getattr(truth, name).tolist() == getattr(found, name).tolist(), name


@pytest.mark.parametrize("dtype", [BF16, FP32, FP16], ids=str)
@pytest.mark.parametrize(
    ("make", "states", "ranks", "options"),
    [
        (AdamW, "fp8-lm", 1, {}),
        (AdamW, "fp8-lm", 2, {}),
        (AdamW, "8bit", 1, {"nonfinite": "element"}),
        (Lion, "fp8-lm", 1, {}),
        (StableAdamW, "8bit", 1, {}),
    ],
    ids=["fp8-lm", "ranks", "element", "lion", "stable"],
)
def test_gradients_are_quantised_in_the_step(
    make: type[LowPrecOptimizer], states: str, ranks: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    def spoil(params: list[nn.Parameter], step: int) -> None:
        params[4].grad.fill_(448.0)  # all codes at the maximum
        if step == 1:
            params[8].grad[40_000] = float("inf")

    sets = pair(make, (dtype,), states=states, **options)
    quantizers = [wire(*some, ranks) for some in sets]
    run(sets, clip=0.37, spoil=spoil)
    assert_same_mu(*quantizers)
    assert int(quantizers[1].saturated[2]) > 0


def test_a_wired_step_is_a_few_kernels_and_waits_for_nobody() -> None:
    from torch.profiler import ProfilerActivity, profile

    params = model_like(90)
    optimizer = AdamW(params, states="fp8-lm")
    wire(params, optimizer, 1)
    for _ in range(2):
        optimizer.step()
    with no_synchronisation():
        optimizer.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        optimizer.step()
        torch.cuda.synchronize()
    names = [e.name for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 2 <= len(names) <= 8, names


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_of_other_optimizers(ranks: int) -> None:
    """`quantize_all` on the GPU: new tensors in a few launches, mu on its way, the caller's gradients untouched."""
    sets = [parameters(device, (BF16, FP32, FP16)) for device in ("cpu", "cuda")]
    quantizers = [GradientQuantizer(COMMUNICATION, len(sets[0]), world_size=ranks) for _ in sets]
    for quantizer in quantizers:
        quantizer.k += torch.arange(len(sets[0]), dtype=torch.int32) * 377 - 700 * (ranks == 1)
    for step in range(4):
        for params in sets:
            set_gradients(params, step)
            params[4].grad.fill_(448.0)
            if step == 1:
                params[8].grad[[7, 40_000]] = torch.tensor([float("nan"), -float("inf")]).to(params[8].grad)
        before = [p.grad.clone() for p in sets[1]]
        truth, found = (
            quantizer.quantize_all(dict(enumerate(p.grad for p in params)))
            for quantizer, params in zip(quantizers, sets, strict=True)
        )
        for i, grad in found.items():
            assert grad.shape == truth[i].shape and grad.dtype == truth[i].dtype and grad.is_cuda
            a, b = truth[i], grad.cpu()
            assert torch.equal(a.isnan(), b.isnan()), i
            assert same_bits(a.nan_to_num(0.5), b.nan_to_num(0.5)), f"step {step}: {i} {tuple(grad.shape)} {a.dtype}"
        assert all(same_bits(a.nan_to_num(0.5), p.grad.nan_to_num(0.5)) for a, p in zip(before, sets[1], strict=True))
        assert_same_mu(*quantizers)


@pytest.mark.parametrize("states", ["8bit", "fp8-lm", "compact"])
def test_amax_of_new_parameters(states: str) -> None:
    sets = pair(AdamW, (BF16, FP32), states=states)
    sets[1][1].note_amax()
    for step in range(3):
        for params, optimizer in sets:
            set_gradients(params, step)
            if step == 1:  # skipped
                params[8].grad[40_000] = float("inf")
            optimizer.step()
        assert_same(sets)
        for i, (truth, param) in enumerate(zip(*(params for params, _ in sets), strict=True)):
            largest = truth.detach().float().abs().amax().item() if truth.numel() else 0.0
            assert sets[1][1].weight_amax(param).item() == largest, f"step {step}, tensor {i}"
    assert int(sets[1][1].skipped_steps) == 1
