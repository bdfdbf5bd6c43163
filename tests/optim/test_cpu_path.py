# SPDX-License-Identifier: Apache-2.0
"""Steps on the CPU: slices, in place and compiled, give the bits of the plain truth over whole tensors."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowprec.optim import SGD, Adam, AdamW, Lion, StableAdamW, algorithms, compiled, cpu, inplace, native
from hf_lowprec.optim.algorithms import Item
from hf_lowprec.recipe import Quant, Rounding, Scaling, States

MAKE = {
    "adamw": lambda params, **more: AdamW(params, lr=1e-2, **more),
    "adam": lambda params, **more: Adam(params, lr=1e-2, weight_decay=0.1, **more),
    "maximize": lambda params, **more: AdamW(params, lr=1e-2, weight_decay=0, maximize=True, **more),
    "lion": lambda params, **more: Lion(params, lr=1e-3, **more),
    "sgd": lambda params, **more: SGD(params, lr=1e-2, momentum=0.9, weight_decay=1e-2, **more),
    "nesterov": lambda params, **more: SGD(params, lr=1e-2, momentum=0.9, nesterov=True, **more),
    "no momentum": lambda params, **more: SGD(params, lr=1e-2, **more),
}
SIZE = 4096
NUMEL = 5 * SIZE + 3 * 256 + 17  # slices, whole blocks that are less, and less than a block
compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


def whole(item: Item, *sizes: int) -> Iterator[Item]:
    yield item


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Small slices; within its context, none at all."""
    monkeypatch.setattr(cpu, "SLICE", SIZE)
    monkeypatch.setattr(inplace, "SLICE", 2 * SIZE)
    monkeypatch.setattr(compiled, "SIZES", (SIZE,))
    return monkeypatch


def gradients(numel: int, steps: int) -> list[Tensor]:
    """Of many magnitudes, some exactly zero, one block all zero; the third is not finite."""
    generator = torch.Generator().manual_seed(1)
    out = [
        torch.randn(numel, generator=generator) * torch.rand(numel, generator=generator).pow(12) for _ in range(steps)
    ]
    for grad in out:
        grad[::7] = 0
        grad[: min(300, numel // 2)] = 0
    if steps > 2:
        out[2][numel // 2] = torch.inf
    return out


def train(
    make: Any,
    numel: int,
    dtype: torch.dtype,
    steps: int = 4,
    clip: bool = True,
    grad_dtype: torch.dtype | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Weights and states after some steps, and what was skipped."""
    param = torch.nn.Parameter(torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(dtype))
    param.grad_dtype = grad_dtype or dtype
    optimizer = make([param], **options)
    for step, grad in enumerate(gradients(numel, steps)):
        param.grad = grad.to(param.grad_dtype)
        optimizer.step(clip=torch.tensor(0.37) if clip and step == 1 else None)
    counters = {"steps": optimizer.skipped_steps, "elements": optimizer.skipped_elements}
    return {"param": param.detach(), **optimizer.state[param], **counters}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(
            value.contiguous().view(-1).view(torch.uint8), b[key].contiguous().view(-1).view(torch.uint8)
        ), key


def without_slices(plain: pytest.MonkeyPatch, *arguments: Any, **options: Any) -> dict[str, Tensor]:
    with plain.context() as patch:
        patch.setattr(cpu, "slices", whole)
        patch.setattr(inplace, "covers", lambda algorithm, item: False)
        return train(*arguments, **options)


def counted(patch: pytest.MonkeyPatch, module: Any, name: str) -> list[int]:
    """Sizes that a function of slices was called with."""
    sizes: list[int] = []
    real = getattr(module, name)

    def spy(algorithm: str, item: Item, *rest: Any) -> Any:
        sizes.append(item.param.numel())
        return real(algorithm, item, *rest)

    patch.setattr(module, name, spy)
    return sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("states", ["8bit", "fp32"])
@pytest.mark.parametrize("name", MAKE)
def test_in_place_steps_give_the_bits_of_the_truth(
    plain: pytest.MonkeyPatch, name: str, states: str, dtype: torch.dtype
) -> None:
    expected = without_slices(plain, MAKE[name], NUMEL, dtype, states=states)
    sizes = counted(plain, inplace, "update")
    assert_same(train(MAKE[name], NUMEL, dtype, states=states), expected)
    assert max(sizes) == 2 * SIZE and len(sizes) >= 3 * 3  # three steps that were not skipped
    assert int(expected["steps"]) == 1 and int(expected["step"]) == 3


@pytest.mark.parametrize("master", ["default", "fp32", "fp16-scaled", "bf16+8", "bf16+16", "sr", None])
@pytest.mark.parametrize("states", ["8bit", "4bit", "fp8", "fp8-lm", "compact", "bf16"])
def test_slices_give_the_bits_of_the_truth(plain: pytest.MonkeyPatch, states: str, master: str | None) -> None:
    arguments = (MAKE["adamw"], NUMEL, torch.bfloat16)
    expected = without_slices(plain, *arguments, states=states, master=master)
    sizes = counted(plain, algorithms, "update")
    assert_same(train(*arguments, states=states, master=master), expected)
    assert sizes and max(sizes) <= SIZE


@pytest.mark.parametrize("numel", [1, 4095, SIZE, SIZE + 1, 2 * SIZE + 256])
def test_sizes_around_a_slice(plain: pytest.MonkeyPatch, numel: int) -> None:
    for dtype in (torch.float32, torch.float16, torch.float64):
        master = "default" if dtype != torch.float16 else "fp32"
        expected = without_slices(plain, MAKE["adamw"], numel, dtype, states="8bit", master=master)
        assert_same(train(MAKE["adamw"], numel, dtype, states="8bit", master=master), expected)


@pytest.mark.parametrize("states", ["8bit", "compact"])
def test_elements_that_are_not_finite_are_skipped_in_slices_too(plain: pytest.MonkeyPatch, states: str) -> None:
    arguments, options = (MAKE["adamw"], NUMEL, torch.bfloat16), {"states": states, "nonfinite": "element"}
    expected = without_slices(plain, *arguments, **options)
    assert_same(train(*arguments, **options), expected)
    assert int(expected["elements"]) == 1


def test_a_tiny_positive_second_moment_beside_a_huge_one_is_not_zero(plain: pytest.MonkeyPatch) -> None:
    """Where the product with 1 / scale underflows, the code is still not that of zero."""
    results = []
    for slices in (True, False):
        with plain.context() as patch:
            if not slices:
                patch.setattr(inplace, "covers", lambda algorithm, item: False)
            param = torch.nn.Parameter(torch.zeros(4096))
            optimizer = AdamW([param], states="8bit")
            param.grad = torch.full((4096,), 1e-21)  # its square is a subnormal number
            param.grad[0] = 1e16
            optimizer.step()
            results.append({"param": param.detach(), **optimizer.state[param]})
    assert_same(*results)
    codes = results[0]["exp_avg_sq_qdata"]
    assert int(codes[0]) == 255 and bool((codes[1:256] == 1).all())


@pytest.mark.parametrize("way", ["in place", pytest.param("native", marks=compiles)])
@pytest.mark.parametrize("largest", [True, False])
def test_stochastic_rounding_of_a_slice(largest: bool, way: str) -> None:
    """Weights that would round to Inf stay the largest; indices beyond 2^32 draw the words of the truth."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(SIZE, generator=generator).sign()
    weight = signs * torch.finfo(torch.bfloat16).max if largest else signs * torch.rand(SIZE, generator=generator)
    param = torch.nn.Parameter(weight.bfloat16())
    optimizer = AdamW([param], states="8bit", lr=1e36 if largest else 1e-3, weight_decay=0)
    param.grad = (-signs).bfloat16()  # outwards, and inwards
    param.grad[::2] *= -1
    item = optimizer._collect()[0]
    scalars = algorithms._scalars("adam", [item])[0]
    results = []
    for name in ("truth", way):
        state = {key: value.clone() for key, value in item.state.items()}
        part = replace(item, param=param.detach().clone(), state=state, start=(1 << 32) + SIZE)
        if name == "truth":
            algorithms.update("adam", part, scalars, {}, None, None, None)
        elif name == "native":
            native.stepper("adam", item, scalars, None)(part)
        else:
            inplace.update("adam", part, scalars, None)
        results.append({"param": part.param, **state})
    assert_same(*results)
    assert bool(results[0]["param"].isfinite().all()) and len(results[0]["param"].unique()) > 2


@pytest.mark.parametrize("block", [15, 64])
def test_in_place_steps_of_other_blocks(plain: pytest.MonkeyPatch, block: int) -> None:
    """Slices of odd size, too, where codes cannot be read in pairs."""
    moment = Quant(format="e4m3fn", scaling=Scaling(granularity="block", block=(block,)))
    states = States(exp_avg=moment, exp_avg_sq=moment)
    expected = without_slices(plain, MAKE["adamw"], NUMEL, torch.float32, states=states)
    sizes = counted(plain, inplace, "update")
    assert_same(train(MAKE["adamw"], NUMEL, torch.float32, states=states), expected)
    assert {size % 2 for size in sizes} == ({0, 1} if block == 15 else {0})


def test_parameters_that_are_not_contiguous(plain: pytest.MonkeyPatch) -> None:
    results = []
    for transposed in (False, True):
        torch.manual_seed(0)
        weight, grad = torch.randn(64, 256), torch.randn(64, 256)
        param = torch.nn.Parameter(weight.t().contiguous().t() if transposed else weight)
        param.grad = grad
        assert param.is_contiguous() != transposed
        AdamW([param]).step()
        results.append(param.detach().contiguous())
    assert torch.equal(*results)


# --- compiled -------------------------------------------------------------------------------------------------------


def compare_compiled(plain: pytest.MonkeyPatch, make: Any, dtype: torch.dtype, **options: Any) -> None:
    """With slices of slices, too."""
    plain.setattr(compiled, "SIZES", (4 * SIZE, SIZE))
    plain.setattr(compiled, "_LARGEST", SIZE)
    expected = without_slices(plain, make, NUMEL, dtype, **options)
    seen: list[int] = []
    real = compiled._function

    def spy(kind: Any) -> Any:
        seen.append(kind.size)
        return real(kind)

    plain.setattr(compiled, "_function", spy)
    assert_same(train(make, NUMEL, dtype, compile=True, **options), expected)
    assert set(seen) == {SIZE}


@compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in MAKE if name != "no momentum"])
def test_native_steps_give_the_bits_of_the_truth(plain: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    expected = without_slices(plain, MAKE[name], NUMEL, dtype, states="8bit")
    plain.setattr(compiled, "_function", None)  # nothing is left to torch.compile
    for threads in (1, 3):
        plain.setattr(native, "_SHARE", SIZE // 3)
        plain.setattr(torch, "get_num_threads", lambda n=threads: n)
        assert_same(train(MAKE[name], NUMEL, dtype, states="8bit", compile=True), expected)


@compiles
def test_native_steps_of_other_blocks_and_gradients(plain: pytest.MonkeyPatch) -> None:
    """Blocks of 64 in E4M3, whose largest value is not 1; float32 gradients of a bfloat16 Parameter."""
    moment = Quant(format="e4m3fn", scaling=Scaling(granularity="block", block=(64,)))
    states = States(exp_avg=moment, exp_avg_sq=moment, update=Rounding(mode="stochastic"))
    options = {"states": states, "grad_dtype": torch.float32}
    expected = without_slices(plain, MAKE["adamw"], NUMEL, torch.bfloat16, **options)
    plain.setattr(compiled, "_function", None)
    assert_same(train(MAKE["adamw"], NUMEL, torch.bfloat16, compile=True, **options), expected)


@compiles
def test_native_has_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def covered(dtype: torch.dtype = torch.float32, grad: torch.dtype | None = None, **options: Any) -> bool:
        param = torch.nn.Parameter(torch.zeros(4096, dtype=dtype))
        optimizer = AdamW([param], **options)
        param.grad_dtype = grad or dtype
        param.grad = torch.zeros(4096, dtype=grad or dtype)
        return native.covers("adam", optimizer._collect()[0])

    assert covered() and covered(torch.bfloat16) and covered(grad=torch.bfloat16)
    assert not covered(torch.bfloat16, master=None) and not covered(torch.bfloat16, master="bf16+16")
    assert not covered(torch.float16, master="fp32") and not covered(states="fp32") and not covered(states="compact")


@compiles
def test_a_native_step_counts_as_a_change_of_the_parameter(plain: pytest.MonkeyPatch) -> None:
    param = torch.nn.Parameter(torch.ones(SIZE))
    loss = (param * param).sum()
    param.grad = torch.ones(SIZE)
    AdamW([param], compile=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@compiles
def test_what_does_not_compile_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_EXACT", ("-DBLOCK=none",))
    with pytest.raises(RuntimeError, match=r"(?s)compile=True: .* failed:.*none"):
        native._function("ALGORITHM=ADAM", "WEIGHT=FLOAT", "GRADIENT=FLOAT", "COUPLED=0", "NESTEROV=0")


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("states", ["fp32", "bf16", "4bit", "fp8", "fp8-lm", "compact"])
def test_compiled_steps_of_other_states(plain: pytest.MonkeyPatch, states: str) -> None:
    compare_compiled(plain, MAKE["adamw"], torch.bfloat16, states=states)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("name", MAKE)
def test_compiled_steps_of_other_algorithms(plain: pytest.MonkeyPatch, name: str) -> None:
    plain.setattr(native, "covers", lambda algorithm, item: False)
    compare_compiled(plain, MAKE[name], torch.float32, states="8bit")


@compiles
@pytest.mark.slow
def test_compiled_steps_skip_elements(plain: pytest.MonkeyPatch) -> None:
    compare_compiled(plain, MAKE["adamw"], torch.bfloat16, states="8bit", nonfinite="element")


@compiles
@pytest.mark.parametrize("states", ["8bit", pytest.param("compact", marks=pytest.mark.slow)])
def test_learning_rates_and_parameters_do_not_compile_anew(plain: pytest.MonkeyPatch, states: str) -> None:
    params = [torch.nn.Parameter(torch.randn(SIZE * (i + 1), dtype=torch.float32).bfloat16()) for i in range(3)]
    optimizer = AdamW(params, states=states, compile=True)
    made = native._function if states == "8bit" else compiled._function
    made.cache_clear()
    torch._dynamo.utils.counters.clear()
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        for param in params:
            param.grad = torch.randn(param.shape).bfloat16()
        optimizer.step(clip=torch.tensor(0.5) if step else None)
    kinds = 1 if states == "8bit" else 2  # torch.compile's have a clipping factor or none
    assert made.cache_info().misses == kinds
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (0 if states == "8bit" else kinds)


def test_without_a_compiler_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="compile=True: no C\\+\\+ compiler"):
        AdamW([torch.nn.Parameter(torch.zeros(4))], compile=True)


@compiles
def test_what_is_not_compiled_says_so() -> None:
    param = torch.nn.Parameter(torch.zeros(8, 1024))
    with pytest.raises(ValueError, match="'stable_adam' looks at whole tensors"):
        StableAdamW([param], compile=True)
    with pytest.raises(ValueError, match="compand 'expand' take powers"):
        AdamW([param], states="fp8-expand", compile=True)
    with pytest.raises(ValueError, match="a look at all new values"):
        AdamW([param], states="fp8-lm-exact", compile=True)
