# SPDX-License-Identifier: Apache-2.0
"""Models at unit scale on a GPU: native GEMMs on constants, without a pass for an amax and without waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import decoder, text

import hf_lowprec
from hf_lowprec.conversion import session_of

pytestmark = pytest.mark.gpu
SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


def prepared(name: str, *, emulate: bool = False) -> tuple[Any, Any]:
    model = decoder("llama", **SIZES).cuda()
    hf_lowprec.convert(model, name, emulate=emulate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return model, hf_lowprec.attach_optimizer(model, optimizer)


def step(model: Any, optimizer: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@pytest.mark.parametrize("name", ["unit-scaling", "u-mup"])
def test_native_training_is_that_of_the_emulation(name: str) -> None:
    batches, losses = [ids.cuda() for ids in text(12)], []
    for emulate in (False, True):
        model, optimizer = prepared(name, emulate=emulate)
        losses.append(torch.stack([step(model, optimizer, ids) for ids in batches]))
        report = hf_lowprec.convert(model, name)
        assert any("emulated" in kernel for kernel in report.kernels) == emulate
    assert float(losses[0][-1]) < float(losses[0][0]) - 0.5
    torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0.02)


def test_a_step_does_not_wait_for_the_device() -> None:
    model, optimizer = prepared("unit-scaling")
    batches = [ids.cuda() for ids in text(4)]
    for ids in batches[:2]:
        step(model, optimizer, ids)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for ids in batches[2:]:
            step(model, optimizer, ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_constants_live_where_the_model_does() -> None:
    model, _ = prepared("u-mup")
    session = session_of(model)
    assert session is not None
    model(input_ids=text(1)[0].cuda())
    assert all(o.scale.is_cuda for layer in session.scaling.layers.values() for o in layer.operands)
    assert all(layer.ready == (True, True, True) for layer in session.scaling.layers.values())
