# SPDX-License-Identifier: Apache-2.0
"""The kernel of narrow sums against `numerics.accumulate`: bit for bit in Triton's interpreter and on a GPU; and
compiled for an H100, which needs none.

The interpreter must be chosen before Triton is imported, so that one test starts a process of its own.
"""

from __future__ import annotations

import sys

import interpreter
import pytest
import torch

from hf_lowprec import numerics, ops
from hf_lowprec.formats import get_format, get_sum_format
from hf_lowprec.ops.quantize import storage_dtype
from hf_lowprec.recipe import NONE, Accumulation, Quant, Rounding

SEED = 2**40 + 12345
SR = {bits: Rounding(mode="stochastic", bits=bits) for bits in (1, 9, 13, None)}
SUMS = [
    Accumulation(format="e6m9"),
    Accumulation(format="e6m9", chunk=8, outer="e6m9"),
    Accumulation(format="e6m9", chunk=7),
    Accumulation(format="e6m5", rounding=SR[13]),
    Accumulation(format="e6m5", rounding=SR[9], chunk=8, outer="e6m9"),
    Accumulation(format="e6m5", rounding=SR[1], chunk=100, outer="e6m5"),
    Accumulation(format="e6m5"),
    Accumulation(format="e5m10", rounding=Rounding(mode="away")),
    Accumulation(format="e6m9", rounding=SR[None]),
    Accumulation(format="e6m5", rounding=Rounding(mode="zero"), chunk=4, outer="e6m5"),
    Accumulation(format="e8m7"),
    Accumulation(format="tc14", rounding=Rounding(mode="zero"), chunk=16),
    Accumulation(format="e4m3"),  # saturates
]
OPERANDS = [
    ("e5m2", "e5m2"),
    ("e4m3b11fnuz", "e5m2"),
    ("e0m7", "e5m10"),
    ("e3m1", "e6m9"),
    ("e4m3b11normal0", "e4m3fn"),
]


def operand(rows: int, k: int, name: str, seed: int, device: str, strided: bool = False) -> torch.Tensor:
    """Codes of a matrix; as a transposed view if `strided`."""
    x = torch.randn((rows, k), generator=torch.Generator().manual_seed(seed))
    x *= 2.0 ** torch.randint(-6, 6, x.shape, generator=torch.Generator().manual_seed(seed + 1))
    codes = numerics.encode(x, name).view(storage_dtype(name))
    return (codes.t().contiguous().t() if strided else codes).to(device)


def values(codes: torch.Tensor, name: str) -> torch.Tensor:
    codes = codes.cpu()
    return codes.float() if codes.is_floating_point() else numerics.decode(codes, name)


# Sums that climb to the largest value and come down again. (operands, their largest, K, sums.) In e5m9 the first
# and the last of nine looks say that nothing saturates; in e6m9flush, scaled, the first; chunks have looks or a bound.
CLIMBS = [
    ("e3m1", 24.0, 570, Accumulation(format="e5m9", rounding=SR[None])),
    ("e5m2", 7168.0, 360, Accumulation(format="e6m9flush", rounding=SR[9])),
    ("e3m1", 24.0, 470, Accumulation(format="e5m9", rounding=SR[9], chunk=250, outer="e5m9")),
    ("e3m1", 24.0, 270, Accumulation(format="e5m9", rounding=SR[9], chunk=50, outer="e5m9")),
    ("e5m2", 57344.0, 40, Accumulation(format="e6m5", rounding=SR[13], chunk=16, outer="e6m5")),
    ("e3m1", 24.0, 270, Accumulation(format="e5m9")),
    ("e3m1", 24.0, 270, Accumulation(format="e5m9", rounding=Rounding(mode="zero"), chunk=250)),
]


def climbing(k: int, top: float, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of operands whose products are +-top^2: rows that rise, fall, or turn at half of K, and a random one."""
    up = torch.ones(k)
    turn = torch.cat([torch.ones(k // 2), -torch.ones(k - k // 2)])
    wild = torch.randn(k, generator=torch.Generator().manual_seed(8)).sign()
    a = torch.stack([up, -up, turn, -turn, wild, 0.25 * up]) * top
    b = torch.stack([up, torch.rand(k, generator=torch.Generator().manual_seed(9)), 0.0 * up]) * top
    codes = (numerics.encode(x, name).view(storage_dtype(name)) for x in (a, b))
    return tuple(codes)  # type: ignore[return-value]


def check_kernel(device: str) -> int:
    from hf_lowprec.kernels.triton import accumulate as kernels

    count, seed = 0, torch.tensor(SEED, device=device)

    def same(a: torch.Tensor, b: torch.Tensor, names: tuple[str, str], how: Accumulation, **tile: object) -> None:
        got = kernels.accumulate(a, names[0], b, names[1], how, seed, **tile).cpu()  # type: ignore[arg-type]
        truth = numerics.accumulate(values(a, names[0]), values(b, names[1]), how, seed=SEED)
        nan = truth.isnan()
        assert torch.equal(got.isnan(), nan)
        assert torch.equal(got.view(torch.int32)[~nan], truth.view(torch.int32)[~nan]), (how, names, a.shape)

    tile = {"setting": kernels.Setting(16, 16, 4, False, 4)}
    for i, how in enumerate(SUMS):
        tile = {"setting": kernels.Setting(16, 16, 4, i % 2 == 0, 4)}
        same(operand(5, 25, "e5m2", 0, device), operand(19, 25, "e5m2", 1, device), ("e5m2", "e5m2"), how, **tile)
        count += 1
    for names in OPERANDS:
        for how in SUMS[1:4:2]:
            a, b = operand(17, 20, names[0], 0, device, strided=True), operand(3, 20, names[1], 1, device)
            same(a, b, names, how, **tile)
            count += 1
    # Sums below the normal numbers of their formats.
    for i, how in enumerate(SUMS[:10]):
        codes = torch.randint(0, 256, (2, 12, 30), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        tiny, other = (codes & 0x83).view(torch.float8_e5m2).to(device)
        same(tiny, other, ("e5m2", "e5m2"), how, **tile)
        count += 1
    for m, n, k in ((1, 1, 1), (16, 16, 1), (33, 2, 65), (0, 3, 4), (3, 0, 4), (3, 4, 0)):
        same(operand(m, k, "e5m2", 2, device), operand(n, k, "e5m2", 3, device), ("e5m2", "e5m2"), SUMS[4], **tile)
        count += 1
    a, b = operand(6, 9, "e5m2", 0, device), operand(5, 9, "e4m3fn", 1, device)
    a.view(torch.uint8)[2, 3], a.view(torch.uint8)[4, 0] = 0x7C, 0xFF  # Inf and a NaN
    b.view(torch.uint8)[1, 1] = 0x7F
    same(a, b, ("e5m2", "e4m3fn"), SUMS[1], **tile)
    largest = torch.full((2, 40), get_format("e5m2").max, device=device).to(torch.float8_e5m2)
    for how in (SUMS[0], SUMS[3], SUMS[10], SUMS[11]):
        same(largest, largest, ("e5m2", "e5m2"), how, **tile)
    for i, (name, top, k, how) in enumerate(CLIMBS):
        a, b = (x.to(device) for x in climbing(k, top, name))
        truth = numerics.accumulate(values(a, name), values(b, name), how, seed=SEED)
        largest = get_sum_format(how.format).max
        assert bool((truth >= largest).any()) and bool((truth <= -largest).any())
        same(a, b, (name, name), how, setting=kernels.Setting(16, 16, 4, i % 2 == 0, 4))
        a.view(torch.uint8)[1, 3], b.view(torch.uint8)[1, 5] = (0x7F, 0x7C) if name == "e5m2" else (1, 1)  # NaN, Inf
        same(a, b, (name, name), how, setting=kernels.Setting(16, 16, 4, i % 2 == 1, 4))
        count += 1
    # In float32 it is the same order, without rounding.
    a, b = operand(5, 30, "e5m2", 4, device), operand(7, 30, "e5m2", 5, device)
    s = torch.zeros(5, 7)
    for i in range(30):
        s = s + values(a, "e5m2")[:, i, None] * values(b, "e5m2")[:, i]
    assert torch.equal(kernels.accumulate(a, "e5m2", b, "e5m2", None).cpu(), s)
    with pytest.raises(ValueError, match="needs a seed"):
        kernels.accumulate(a, "e5m2", b, "e5m2", SUMS[3])
    with pytest.raises(ValueError, match="no kernel decodes nf4"):
        kernels.accumulate(a, "nf4", b, "e5m2", SUMS[0])
    return count


def compile_for_h100() -> dict[str, int]:
    """Instructions that the sums of some recipes compile to."""
    import triton
    from triton.backends.compiler import GPUTarget

    from hf_lowprec.kernels.triton import accumulate as kernels

    found = {}
    names = kernels._sums_kernel.arg_names
    for label, how in (("float32", None), ("chunked", SUMS[1]), ("sr", SUMS[3]), ("general", SUMS[8])):
        constants = {**kernels._constants("e5m2", "e5m2", how), "TILE_M": 64, "TILE_N": 64}
        constants |= {"AHEAD": False, "UNROLL": 4}
        types = {name: "i32" for name in names if name not in constants}
        types |= {name: "*fp32" for name in ("a_ptr", "b_ptr", "out_ptr")}
        types |= {"a_top_ptr": "*i32", "b_top_ptr": "*i32", "seed_ptr": "*i64"}
        source = triton.compiler.ASTSource(fn=kernels._sums_kernel, signature=types, constexprs=constants)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        found[f"{label} fma"], found[f"{label} lines"] = ptx.count("fma.rn.f32"), len(ptx.splitlines())
    return found


def test_interpreter_agrees_with_numerics() -> None:
    assert int(interpreter.run(__file__, "interpret").split()[-1]) >= 46


@pytest.mark.slow
def test_compiles_for_an_h100(tmp_path: object) -> None:
    printed = interpreter.run(__file__, "compile", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    found = dict(line.split(": ") for line in printed.splitlines())
    # One fused instruction per product in float32; nearest rounding adds two.
    assert int(found["float32 fma"]) > 0 and int(found["chunked fma"]) >= 3 * int(found["float32 fma"]) * 0.9
    assert int(found["sr lines"]) > int(found["float32 lines"])


def test_operator_on_a_gpu_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where emulation is asked for: it is the same numbers."""
    pytest.importorskip("triton")
    from hf_lowprec.kernels import scaled_mm as kernels

    key = ops.quant_key(Quant(format="e5m2", scaling=NONE))
    a, b, one = operand(4, 16, "e5m2", 0, "cpu"), operand(5, 32, "e5m2", 1, "cpu"), torch.ones(())
    calls = []

    def fake(x: torch.Tensor, x_format: str, y: torch.Tensor, *rest: object) -> torch.Tensor:
        calls.append((tuple(x.shape), tuple(y.shape), *rest))
        return torch.ones(4, 5)

    monkeypatch.setattr(kernels, "accumulate", fake)
    how, seed = SUMS[3], torch.tensor(SEED)
    out = kernels.scaled_mm(
        a, 2 * one, key, b, one, key, torch.ones(5), torch.bfloat16, False, True, ops.accumulation_key(how), seed
    )
    assert calls == [((4, 16), (5, 16), "e5m2", how, seed)]
    assert out.dtype == torch.bfloat16 and bool((out == 3).all())


@pytest.mark.gpu
def test_gpu_agrees_with_numerics() -> None:
    assert check_kernel("cuda") >= 46


@pytest.mark.gpu
def test_recipes_on_a_gpu_give_the_bits_of_the_cpu() -> None:
    for m, n, k in ((130, 70, 513), (64, 256, 128)):
        a, b = operand(m, k, "e5m2", 0, "cuda"), operand(n, k, "e5m2", 1, "cuda")
        for how in SUMS[:5]:
            from hf_lowprec.kernels.triton.accumulate import accumulate

            got = accumulate(a, "e5m2", b, "e5m2", how, torch.tensor(SEED, device="cuda")).cpu()
            truth = numerics.accumulate(a.cpu().float(), b.cpu().float(), how, seed=SEED)
            assert torch.equal(got.view(torch.int32), truth.view(torch.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["hfp8", "fp8-chunked", "sr-mac"])
def test_a_layer_on_a_gpu_has_the_bits_of_the_cpu(name: str) -> None:
    """Casts and all three GEMMs, by kernels there and by plain torch here."""
    import hf_lowprec

    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        layer, x, grad = torch.nn.Linear(96, 80), torch.randn(33, 96), torch.randn(33, 80)
        model = torch.nn.Sequential(layer).to(device)
        hf_lowprec.convert(model, name)
        x = x.to(device).requires_grad_()
        out = model(x)
        out.backward(grad.to(device))
        results.append([t.detach().cpu() for t in (out, x.grad, layer.weight.grad)])
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(*results, strict=True))
    assert any(kernel.startswith("triton e") for kernel in ops.kernel_counts())


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "compile":
        print("\n".join(f"{name}: {count}" for name, count in compile_for_h100().items()))
    else:
        interpreter.mend()
        print("checked", check_kernel("cpu"))
