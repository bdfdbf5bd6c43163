# SPDX-License-Identifier: Apache-2.0
"""The rotary kernel: in Triton's interpreter bit for bit the plain-torch truth, zeros' signs included; and compiled
for an H100, without a GPU, with wide loads and no fused multiply-add."""

from __future__ import annotations

import itertools
import re

import interpreter
import pytest
import torch
from torch import Tensor

from hf_lowprec.ops.rotary import default_rotary, default_rotary_backward

F, B, H = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F, F, F), (B, B, B), (H, H, H), (B, F, F), (B, F, B), (H, B, F), (F, B, F)]  # of q, of cos, of the result
# heads of q and k, columns, of which turned
HEADS = [(3, 1, 16, 16), (4, 4, 12, 12), (2, 1, 24, 10), (1, 5, 8, 4), (9, 2, 2, 2)]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16 if x.dtype.itemsize == 2 else torch.int32)


def tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Values of many binades, some of them zeros of either sign."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-12, 4, shape, generator=generator))
    return torch.where(x.abs() < 0.003, x.sign() * 0.0, x).to(dtype)


def layout(x: Tensor) -> list[int]:
    """Strides, but where they say nothing: of dimensions of one, in which torch's own operators differ by device."""
    return [step for step, length in zip(x.stride(), x.shape, strict=True) if length != 1]


def layouts(heads: tuple[int, int], size: int, dtype: torch.dtype) -> list[tuple[str, int, Tensor, Tensor]]:
    """(name, dim, q, k) as models bring them."""
    b, s = 2, 3
    q, k = (tensor((b, s, n, size), dtype, n) for n in heads)
    packed = tensor((b, s, sum(heads) + 2, size), dtype, 5)
    in_packed = packed[:, :, : heads[0]], packed[:, :, heads[0] : sum(heads)]
    return [
        ("[B, S, H, D] as [B, H, S, D]", 1, q.transpose(1, 2), k.transpose(1, 2)),
        ("[B, S, H, D]", 2, q, k),
        ("[B, H, S, D]", 1, q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous()),
        ("slices", 1, in_packed[0].transpose(1, 2), in_packed[1].transpose(1, 2)),
        ("one apart", 1, tensor((b, heads[0], s, size + 1), dtype, 8)[..., 1:], k.transpose(1, 2)),
        ("one text for all", 2, q[:1].expand(b, -1, -1, -1), k),
        ("a gap in the last dimension", 2, tensor((b, s, heads[0], size, 2), dtype, 7)[..., 0], k),
        ("nothing", 2, q[:, :0], k[:, :0]),
    ]


def check() -> int:
    from hf_lowprec.kernels.rotary import rotary, rotary_backward
    from hf_lowprec.kernels.triton.rotary import Launch

    checked = 0
    launches = [None, Launch(1, 16, 8, 1), Launch(4, 4, 2, 1)]
    for turn, ((n, m, size, width), (dtype, table, out)) in enumerate(itertools.product(HEADS, DTYPES)):
        mid = torch.promote_types(dtype, table)
        for place, (name, dim, q, k) in enumerate(layouts((n, m), size, dtype)):
            if (turn + place) % 4:  # all layouts meet all heads and dtypes, not all pairs of them
                continue
            cos, sin = (tensor((1 + place % 2, q.shape[3 - dim], width), table, 20 + i) for i in range(2))
            launch = launches[turn % 3] if n < 4 and m < 5 else None
            for joined in {width < size, True}:
                args = (q, k, cos, sin, dim, mid, out, joined)
                got, expected = rotary(*args, launch), default_rotary(*args)
                for a, b in zip(got, expected, strict=True):
                    assert a.dtype == b.dtype == out and torch.equal(bits(a), bits(b)), (name, dtype, table, out)
                    assert layout(a) == layout(b), name
            grads = [tensor(tuple(t.shape), out, 30).transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k)]
            for chosen in ((0, 1), (turn % 2,)):
                some = [grads[i] if i in chosen else None for i in range(2)]
                for grad_mid in {dtype, F}:
                    args = (*some, cos, sin, dim, grad_mid, dtype, q.stride(), k.stride())
                    got = rotary_backward(*args, *([launch] * (len(chosen) > 1)))
                    expected = default_rotary_backward(*args)
                    for a, b in zip(got, expected, strict=True):
                        assert a.dtype == b.dtype == dtype and torch.equal(bits(a), bits(b)), (name, dtype, table, out)
                        assert layout(a) == layout(b), name
            checked += 1
    return checked


def test_interpreter_agrees_with_the_truth() -> None:
    assert int(interpreter.run(__file__).split()[-1]) == len(HEADS) * len(DTYPES) * 2


@pytest.mark.parametrize("types", [("bf16", "bf16", "bf16"), ("bf16", "fp32", "fp32"), ("fp32", "fp32", "fp32")])
def test_compiles_for_an_h100(types: tuple[str, str, str]) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_lowprec.kernels.triton import rotary

    x, table, out = types
    tl = {"bf16": triton.language.bfloat16, "fp32": triton.language.float32}
    launch = rotary.launch_for(32, 8, 128)
    names = rotary._rotary_kernel.arg_names
    pointers = dict(zip(names[:6], (x, x, table, table, out, out), strict=True))
    integers = names[6:22]
    constants = dict(zip(names[22:], (32, 8, 128, 128, tl[table], False, *launch[:3], 64, 1), strict=True))
    signature = {
        name: f"*{pointers[name]}" if name in pointers else "i32" if name in integers else "constexpr"
        for name in names
    }
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *integers)}
    source = ASTSource(fn=rotary._rotary_kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": launch.warps, "enable_fp_fusion": False}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert not re.search(r"\bfma\.", ptx)
    loads = re.findall(r"ld\.global(?:\.v(\d))?\.b(\d+)", ptx)
    narrowest = min(int(vector or 1) * int(width) for vector, width in loads)
    assert narrowest >= 32, loads
    assert sum(int(v or 1) * int(w) >= 64 for v, w in loads) >= 4, loads


if __name__ == "__main__":
    interpreter.mend()
    print(check())
