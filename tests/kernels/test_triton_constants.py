# SPDX-License-Identifier: Apache-2.0
"""Constants of a model at unit scale in the kernels: a scale that is there from the start, and no amax beside it."""

from __future__ import annotations

import interpreter
import torch

from hf_lowprec.operands import LinearSpec
from hf_lowprec.ops.glu import default_glu
from hf_lowprec.ops.quantize import default_cast_transpose, default_quantize
from hf_lowprec.presets import PRESETS


def check() -> int:
    from hf_lowprec.kernels.glu import glu
    from hf_lowprec.kernels.quantize import cast_transpose, quantize

    spec, checked = LinearSpec.from_recipe(PRESETS["unit-scaling"]), 0
    assert spec.shared_input and spec.shared_weight and spec.shared_grad_output
    for key in (spec.fprop_input, spec.dgrad_grad_output):
        for ready in (False, True):
            for exponent in (-9, 0, 3):
                x = torch.randn(40, 48, generator=torch.Generator().manual_seed(exponent + 9)) * 2.0**exponent
                scale, counts, expected_counts = torch.tensor(2.0**exponent), *torch.zeros(2, 4, dtype=torch.int64)
                truth = x.div(scale).to(torch.float8_e4m3fn if key == spec.fprop_input else torch.float8_e5m2)
                for kernel, default, flags in (
                    (quantize, default_quantize, ()),
                    (cast_transpose, default_cast_transpose, (None, True, True)),
                ):
                    assert key is not None
                    got = kernel(x, key, scale, False, None, counts, None, ready, *flags)
                    expected = default(x, key, scale, False, None, expected_counts, None, ready, *flags)
                    for a, b in zip(got, expected, strict=True):
                        view = torch.uint8 if a.dtype.itemsize == 1 else torch.int32
                        assert torch.equal(a.view(view), b.view(view))
                    assert torch.equal(got[0].view(torch.uint8), truth.view(torch.uint8))
                    assert float(got[-1]) == 2.0**exponent and torch.equal(counts, expected_counts)
                    checked += 1
    gate, up = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0)).unbind()
    key, scale = spec.fprop_input, torch.tensor(0.5)
    got = glu(gate, up, "silu", True, key, scale, None, None, None, True, None)
    expected = default_glu(gate, up, "silu", True, key, scale, None, None, None, True, None)
    assert float(got[2]) == float(expected[2]) == 0.5
    assert float((got[1].float() - expected[1].float()).abs().max()) <= 0.5  # the activations differ in a last bit
    return checked


def test_interpreter_agrees_with_the_operators() -> None:
    assert int(interpreter.run(__file__).split()[-1]) == 24


if __name__ == "__main__":
    interpreter.mend()
    interpreter.few_programs()
    print(check())
