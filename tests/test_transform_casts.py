# SPDX-License-Identifier: Apache-2.0
"""Constants in the casts of a model at unit scale: a layer against the slot-by-slot reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from core import ReferenceLinear, close_in
from decoders import decoder

import hf_lowprec
from hf_lowprec.conversion import session_of
from hf_lowprec.decoder import in_features
from hf_lowprec.modules.state import ROLES
from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import Gemm, Recipe, Scaling, Transform


def carrying(recipe: Recipe) -> Recipe:
    """Its slots with delayed scales, which is how constants reach a cast."""

    def with_scale(gemm: Gemm) -> Gemm:
        slots = {s: getattr(gemm, s) for s in ("input", "weight", "grad_output")}
        delayed = Scaling(method="delayed")
        return replace(gemm, **{s: q if q is None else replace(q, scaling=delayed) for s, q in slots.items()})

    gemms = {name: with_scale(getattr(recipe, name)) for name in ("fprop", "dgrad", "wgrad")}
    return replace(recipe, **gemms, transform=Transform())


@pytest.mark.parametrize(
    "kind,name", [("llama", "model.layers.1.mlp.down_proj"), ("gpt2", "transformer.h.0.attn.c_attn")]
)
def test_a_layer_equals_the_slot_by_slot_reference(kind: str, name: str) -> None:
    model = decoder(kind)
    hf_lowprec.convert(model, "unit-scaling")
    module, session = model.get_submodule(name), session_of(model)
    assert session is not None
    scales = [operand.scale for operand in session.scaling.layers[name].operands]
    reference = ReferenceLinear(carrying(PRESETS["unit-scaling"]), dict(zip(ROLES, scales, strict=True)))
    x, weight = torch.randn(24, in_features(module), requires_grad=True), module.weight.detach()
    kn = kind == "gpt2"
    grad = torch.randn(24, weight.shape[1 if kn else 0]) * float(scales[2])
    y = module(x)
    y.backward(grad)
    nk, bias = weight.t() if kn else weight, module.bias
    out, grad_input, grad_weight, _ = reference.run(
        x.detach(), nk, None if bias is None else bias.detach(), grad, x.dtype
    )
    close_in(y.detach(), out, ulps=4)
    close_in(x.grad, grad_input, ulps=4)
    close_in(module.weight.grad.t() if kn else module.weight.grad, grad_weight, ulps=4)
