# SPDX-License-Identifier: Apache-2.0
"""The cast and transpose kernels in Triton's interpreter, against the plain-torch operator.

Codes are compared for float16 only: Triton 3.6's interpreter casts float32 to float8 wrongly (1.887 becomes 1.0 in
E4M3). Scales, amax and counters of the float8 formats do not depend on that cast and are compared. The codes' turn is
on the GPU (tests/gpu/test_kernels.py).
"""

import os
import subprocess
import sys

import pytest
import torch

from hf_lowprec import ops
from hf_lowprec.ops.quantize import default_current_scale, default_quantize, sample_stride, storage_dtype
from hf_lowprec.recipe import Quant, Scaling

SCALINGS = [Scaling(), Scaling(snap="rceil"), Scaling(method="delayed", history=4, snap="rceil", margin=1)]


def check_cast() -> int:
    from hf_lowprec.kernels import quantize as kernel

    checked = 0
    # Every launch is 512 Python loops here, so few sizes: less than a block, several, a sampled one, zeros.
    for name in ("e5m10", "e4m3fn"):
        for scaling in SCALINGS if name == "e5m10" else SCALINGS[2:]:
            key = ops.quant_key(Quant(format=name, scaling=scaling))
            sizes = ((777, float("nan")), (9000, -float("inf")), (64, 0.0), (200001, None))
            for n, special in sizes if scaling is SCALINGS[2] else sizes[1:3]:
                x = torch.randn(n, generator=torch.Generator().manual_seed(n)) * 50
                if special is not None:
                    x[n // 2] = special
                x = torch.zeros_like(x) if special == 0.0 else x
                starts = (0.0, 0.25) if scaling.method == "delayed" else (None,)
                for start in starts:
                    outs = []
                    for quantize in (default_quantize, kernel.quantize):
                        delayed = None if start is None else torch.tensor(start)
                        amax = None if start is None else torch.tensor(1.5)
                        counts = torch.ones(4, dtype=torch.int64)
                        outs.append((*quantize(x, key, delayed, False, amax, counts, None), amax, counts))
                    truth, ours = outs
                    assert ours[0].dtype == storage_dtype(name) and ours[0].shape == x.shape
                    assert torch.equal(ours[1], truth[1]) and torch.equal(ours[3], truth[3])
                    assert (start is None and ours[2] is None) or torch.equal(ours[2], truth[2])
                    if name == "e5m10":
                        nan = truth[0].isnan()
                        assert torch.equal(nan, ours[0].isnan())
                        assert torch.equal(ours[0].view(torch.int16)[~nan], truth[0].view(torch.int16)[~nan])
                    checked += 1
                if scaling.method == "current":
                    assert torch.equal(kernel.current_scale(x, key), default_current_scale(x, key))
    assert sample_stride(200001) > 1  # so that the sampled counters above were not those of every element
    return checked


def check_transpose() -> int:
    from hf_lowprec.kernels.triton.transpose import transpose

    shapes = [(16, 16), (17, 33), (64, 1), (1, 5), (100, 129)]
    for shape in shapes:
        x = torch.randint(0, 255, shape, dtype=torch.uint8)
        padded = transpose(x.t(), pad_to=16)
        assert padded.is_contiguous() and padded.shape == (shape[1], -(-shape[0] // 16) * 16)
        assert torch.equal(padded[:, : shape[0]], x.t()) and not padded[:, shape[0] :].any()
    return len(shapes)


def test_interpreter_agrees_with_the_operator() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert int(run.stdout.split()[-1]) == 25


def let_the_interpreter_count() -> None:
    """Triton 3.6's interpreter turns loop bounds into ints by `int(array)`, which numpy >= 2.4 refuses for [1] arrays.

    To be deleted when the interpreter writes `.item()` there.
    """
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if __name__ == "__main__":
    torch.set_num_threads(1)
    let_the_interpreter_count()
    print("checked", check_cast() + check_transpose())
