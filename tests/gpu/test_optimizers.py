# SPDX-License-Identifier: Apache-2.0
"""The optimizers' kernels on a GPU against the truth on the CPU, bit for bit; and what a step costs the host."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from core import same_bits
from torch import nn

from hf_lowprec.optim import SGD, Adam, AdamW, Lion, LowPrecOptimizer, StableAdamW
from hf_lowprec.optim import states as st

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16
NAMES = ("fp32", "bf16", "8bit", "4bit", "fp8", "fp8-lm", "compact")  # those with kernels
ELEMENTWISE = ("fp32", "bf16", "8bit", "4bit", "fp8", "compact")
# Around the 4096 elements below which moments stay float32; multiples of 8, of a block, of a chunk (16384), and not.
SHAPES = [(), (0,), (5,), (15, 273), (64, 64), (4096, 1), (33, 157), (2, 3, 1021), (40_009,), (32_768,)]
BEYOND = 2**31 + 4096 + 17  # elements of the tensor whose offsets do not fit into 32 bits


def parameters(device: str, dtypes: tuple[torch.dtype, ...]) -> list[nn.Parameter]:
    """One of every shape and dtype; then one that is not aligned to 16 bytes, and one that is not contiguous."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for dtype in dtypes:
        out += [nn.Parameter((torch.randn(s, generator=generator) * 0.02).to(device, dtype)) for s in SHAPES]
        buffer = (torch.randn(5001, generator=generator) * 0.02).to(device, dtype)
        out.append(nn.Parameter(buffer[1:]))
        out.append(nn.Parameter((torch.randn(90, 70, generator=generator) * 0.02).to(device, dtype).t()))
    return out


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    """The same for the same step, of very different sizes, some exactly 0."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        grad = torch.randn(p.shape, generator=generator) * 0.01
        grad = grad * 10.0 ** torch.randn(p.shape, generator=generator)
        p.grad = torch.where(torch.rand(p.shape, generator=generator) < 0.05, 0.0, grad).to(p.device, p.dtype)


def two_groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[::2], "weight_decay": 0.0, "lr": 3e-3}, {"params": params[1::2], "weight_decay": 0.1}]


Sets = list[tuple[list[nn.Parameter], LowPrecOptimizer]]


def pair(make: Callable[..., LowPrecOptimizer], dtypes: tuple[torch.dtype, ...], **options: Any) -> Sets:
    """Parameters and optimizers of the CPU and of the GPU."""
    out = []
    for device in ("cpu", "cuda"):
        params = parameters(device, dtypes)
        out.append((params, make(two_groups(params), **options)))
    return out


def assert_same(sets: Sets) -> None:
    (cpu_params, cpu), (gpu_params, gpu) = sets
    for i, (a, b) in enumerate(zip(cpu_params, gpu_params, strict=True)):
        theirs = {"param": a.detach(), **cpu.state[a]}
        ours = {"param": b.detach(), **gpu.state[b]}
        assert theirs.keys() == ours.keys()
        for name, truth in theirs.items():
            found = ours[name].cpu()
            wrong = (truth.float() != found.float()).sum() if truth.shape == found.shape else "shape"
            assert same_bits(truth, found), f"{i}: {tuple(a.shape)} {a.dtype} {name}: {wrong} of {truth.numel()}"
    for name in ("skipped_steps", "skipped_elements"):
        assert int(getattr(cpu, name)) == int(getattr(gpu, name)), name


def run(
    sets: Sets,
    steps: int = 3,
    clip: float | None = None,
    spoil: Callable[[list, int], None] | None = None,
    norm: float | None = None,
) -> None:
    """Steps of both, compared after each one; and the GPU's took the kernels. norm: what gradients are clipped to."""
    for step in range(steps):
        norms = []
        for params, optimizer in sets:
            set_gradients(params, step)
            if spoil is not None:
                spoil(params, step)
            if norm is not None:
                norms.append(optimizer.clip_grad_norm_(norm).cpu())
            optimizer.step(clip=None if clip is None else torch.tensor(clip, device=params[0].device))
        assert_same(sets)
        assert not norms or same_bits(*norms), norms
    assert [covered for _, covered in sets[1][1]._plan.routes] == [True]


def snapshot(params: list[nn.Parameter], optimizer: LowPrecOptimizer) -> list[torch.Tensor]:
    tensors = [t for p in params for t in (p.detach(), *optimizer.state[p].values())]
    return [t.clone() for t in tensors]


# --- the CPU's bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP32, FP16], ids=str)
@pytest.mark.parametrize("states", NAMES)
def test_adamw(states: str, dtype: torch.dtype) -> None:
    master = "sr" if states == "compact" and dtype is FP16 else "default"  # a residual needs bfloat16
    run(pair(AdamW, (dtype,), states=states, master=master), clip=0.37)


@pytest.mark.parametrize("master", ["fp32", "fp16-scaled", "bf16+8", "bf16+16", None])
def test_masters(master: str | None) -> None:
    run(pair(AdamW, (BF16,), states="8bit", master=master))


def test_masters_of_float16() -> None:
    run(pair(AdamW, (FP16,), states="fp32", master="fp32"))


@pytest.mark.parametrize(
    ("make", "states", "options"),
    [
        (Adam, "8bit", {"weight_decay": 0.1}),
        (Adam, "fp8-lm", {"weight_decay": 0.0}),
        (StableAdamW, "8bit", {}),
        (StableAdamW, "compact", {}),
        (StableAdamW, "bf16", {}),
        (Lion, "8bit", {}),
        (Lion, "fp8-lm", {}),
        (Lion, "4bit", {}),
        (SGD, "8bit", {"momentum": 0.9, "dampening": 0.1}),
        (SGD, "fp8", {"momentum": 0.9, "nesterov": True}),
        (SGD, "8bit", {}),
        (AdamW, "8bit", {"maximize": True}),
        (AdamW, "8bit", {"eps": 1e-20, "betas": (0.0, 0.5)}),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", None) or "-".join(value),
)
def test_other_optimizers(make: Callable[..., LowPrecOptimizer], states: str, options: dict[str, Any]) -> None:
    if make is Adam and states == "fp8-lm":  # its bound needs to know the decay: of no group
        sets = [(params := parameters(device, (BF16,)), make(params, states=states)) for device in ("cpu", "cuda")]
    else:
        sets = pair(make, (BF16,), states=states, **options)
    run(sets)


@pytest.mark.parametrize("make", [AdamW, StableAdamW, Lion, SGD])
@pytest.mark.parametrize("states", ["8bit", "fp8-lm", "compact", "fp32"])
def test_clipped_by_the_norm(make: Callable[..., LowPrecOptimizer], states: str) -> None:
    """The norm has the CPU's bits, too, before the first step and in later ones, and a NaN skips the step."""

    def spoil(params: list, step: int) -> None:
        if step == 2:
            params[3].grad[1, 2] = float("nan")

    run(pair(make, (BF16, FP32, FP16), states="8bit" if states == "compact" else states), 4, spoil=spoil, norm=0.05)
    run(pair(make, (BF16,), states=states), norm=0.05)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_clipped_as_torch_clips(dtype: torch.dtype) -> None:
    """Norm and step of torch.nn.utils.clip_grad_norm_ and `step()`, up to rounding: in float32 that of two sums."""
    (ours, optimizer), (theirs, other) = ((p := parameters("cuda", (dtype,)), AdamW(p, states="fp32")) for _ in "ab")
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        wide = torch.nn.utils.get_total_norm([p.grad.float() for p in theirs])
        norm = optimizer.clip_grad_norm_(0.05)
        torch.testing.assert_close(norm, wide, rtol=1e-5, atol=0)
        expected = torch.nn.utils.clip_grad_norm_(theirs, 0.05)
        torch.testing.assert_close(norm, expected.float(), rtol=1e-5 if dtype == FP32 else 1e-2, atol=0)
        optimizer.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == FP32 else 2**-7, atol=1e-6 if dtype == FP32 else 1e-4)


def test_the_norm_of_many_chunks() -> None:
    """More than one row of sums, 8192 chunks of 16384, and a tail."""
    param = nn.Parameter(torch.zeros(8192 * 16384 + 16390, device="cuda", dtype=BF16))
    param.grad = torch.randn_like(param)
    twin = nn.Parameter(param.detach().cpu())
    twin.grad = param.grad.cpu()
    norm = SGD([param], lr=0.1).clip_grad_norm_(1.0)
    assert same_bits(norm.cpu(), SGD([twin], lr=0.1).clip_grad_norm_(1.0))
    torch.testing.assert_close(norm, torch.nn.utils.get_total_norm([param.grad.float()]), rtol=1e-5, atol=0)


def test_dtypes_side_by_side() -> None:
    run(pair(AdamW, (BF16, FP32), states="8bit"))


@pytest.mark.parametrize("states", ["8bit", "fp8-lm", "compact"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_gradient_leaves_every_bit(states: str, value: float) -> None:
    sets = pair(AdamW, (BF16,), states=states)
    run(sets, steps=1)
    params, optimizer = sets[1]
    before = snapshot(params, optimizer)
    set_gradients(params, 1)
    params[8].grad[40_000] = value
    optimizer.step()
    assert all(same_bits(a, b) for a, b in zip(before, snapshot(params, optimizer), strict=True))
    assert int(optimizer.skipped_steps) == 1
    optimizer.step(clip=torch.tensor(value, device="cuda"))
    assert all(same_bits(a, b) for a, b in zip(before, snapshot(params, optimizer), strict=True))
    assert int(optimizer.skipped_steps) == 2
    set_gradients(params, 2)
    optimizer.step()
    assert int(optimizer.skipped_steps) == 2
    assert not all(same_bits(a, b) for a, b in zip(before, snapshot(params, optimizer), strict=True))


@pytest.mark.parametrize("states", ELEMENTWISE)
def test_bad_elements_are_left_alone(states: str) -> None:
    def spoil(params: list[nn.Parameter], step: int) -> None:
        if step == 1:
            params[8].grad[[3, 40_001, 40_008]] = torch.tensor([float("nan"), float("inf"), -float("inf")]).to(
                params[8].grad
            )
            params[5].grad[:2] = float("nan")

    sets = pair(AdamW, (BF16,), states=states, nonfinite="element")
    run(sets, spoil=spoil)
    assert int(sets[1][1].skipped_elements) == 5 and int(sets[1][1].skipped_steps) == 0


@pytest.mark.parametrize("states", ["fp8-expand", "fp8-lm-exact"])
def test_states_without_kernels_run_op_by_op(states: str) -> None:
    sets = pair(AdamW, (BF16,), states=states)
    for step in range(3):
        for params, optimizer in sets:
            set_gradients(params, step)
            optimizer.step()
    assert False in [covered for _, covered in sets[1][1]._plan.routes]
    for cpu, gpu in zip(sets[0][0], sets[1][0], strict=True):  # logarithms of a GPU are other ones
        difference = (gpu.detach().cpu().float() - cpu.detach().float()).abs()
        assert not difference.numel() or (difference.max() < 1e-2 and difference.mean() < 5e-4)


def test_a_checkpoint_continues_bit_for_bit() -> None:
    for states in ("8bit", "fp8-lm"):
        params = parameters("cuda", (BF16,))
        optimizer = AdamW(two_groups(params), states=states)
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
        twins = [nn.Parameter(p.detach().clone()) for p in params]
        twin = AdamW(two_groups(twins), states=states)
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"] = {k: {n: v.cpu() for n, v in s.items()} for k, s in saved["state"].items()}
        twin.load_state_dict(saved)
        for step in range(2, 4):
            for group, each in ((params, optimizer), (twins, twin)):
                set_gradients(group, step)
                each.step()
        pairs = zip(snapshot(params, optimizer), snapshot(twins, twin), strict=True)
        assert all(same_bits(a, b) for a, b in pairs)


# --- more than 2^31 elements ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", ["8bit", "bf16"])
def test_a_tensor_beyond_32_bit_offsets(states: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Around 2^31 and at both ends it is what the CPU makes of those elements alone, told where they lie."""
    needed = BEYOND * (2 + 2 + (2.1 if states == "8bit" else 4)) * 1.25
    if torch.cuda.mem_get_info()[0] < max(needed, 30e9):
        pytest.skip("needs 30 GB of free GPU memory")
    generator = torch.Generator(device="cuda").manual_seed(0)
    param = nn.Parameter(torch.empty(BEYOND, dtype=BF16, device="cuda"))
    with torch.no_grad():
        param.normal_(0, 0.02, generator=generator)
    param.grad = torch.empty_like(param).normal_(0, 1e-3, generator=generator)
    parts = [(0, 4096), (2**31 - 4096, 2**31 + 4096), (2**31 - 2**29, 2**31 - 2**29 + 5000), (2**31, BEYOND)]
    before = [(param.detach()[a:b].cpu(), param.grad[a:b].cpu()) for a, b in parts]
    optimizer = AdamW([param], states=states, lr=1e-3)
    like = AdamW([nn.Parameter(torch.zeros(4096, dtype=BF16, device="cuda"))], states=states)
    like.param_groups[0]["params"][0].grad = torch.full_like(param.grad[:4096], float("nan"))
    like.step()  # skipped: zero states, which would take many times their own size to make for `param`
    for name, value in next(iter(like.state.values())).items():
        size = -(-BEYOND * len(value) // 4096) if value.dim() else ()
        fill = value.flatten()[0]
        optimizer.state[param][name] = fill.clone() if size == () else fill.repeat(size)
    with monkeypatch.context() as patch:
        patch.setattr(st, "init_state", lambda *args, **kwargs: {})
        optimizer.step()
    optimizer.step()
    assert [covered for _, covered in optimizer._plan.routes] == [True]
    for (begin, end), (weight, grad) in zip(parts, before, strict=True):
        piece = nn.Parameter(weight)
        piece.grad = grad
        truth = AdamW([piece], states=states, lr=1e-3)
        for _ in range(2):
            items = truth._collect()
            items[0].start = begin
            truth._update(items)
            truth._release(items)
        whole = (end - begin) // 256 * 256  # a last block that the piece cuts short has another scale
        length = end - begin if end == BEYOND else whole
        assert same_bits(piece.detach()[:length], param.detach()[begin : begin + length].cpu()), begin
        for name, value in truth.state[piece].items():
            found = optimizer.state[param][name]
            if value.dim():
                per = 256 if name.endswith("_scale") else 1
                first, last = begin // per, -(-(begin + length) // per)
                value, found = value[: last - first], found[first:last]
            assert same_bits(value, found.cpu()), (begin, name)
    del param, optimizer
    torch.cuda.empty_cache()


# --- Parameters that somebody edits ---------------------------------------------------------------------------------


def edit_all(params: list[nn.Parameter], how: str) -> None:
    with torch.no_grad():
        for p in params:
            if how == "copy_":
                p.copy_(p * 1.5)
            elif how == "item":  # outside of the sample
                p.view(-1)[40:41] = 0.0625
            elif how == "data":
                p.data.mul_(1.5)
            elif how == "row":
                p.data.view(-1)[1000:2121] = 0.0625
            elif how == "moved":
                p.data = p.data * 1.5


@pytest.mark.parametrize("how", ["copy_", "item", "data", "row", "moved", "skipped"])
@pytest.mark.parametrize("master, states", [("default", "fp8-lm"), ("fp32", "8bit"), ("fp16-scaled", "fp8")])
def test_an_edited_parameter_wins(master: str, states: str, how: str) -> None:
    """Large ones (sampled), with ends of tiles, and small ones (always read)."""
    sets: Sets = []
    for device in ("cpu", "cuda"):
        params = []
        for i, shape in enumerate([(1024, 128), (131_083,), (33, 157), (64,), (257, 300)]):
            values = torch.randn(shape, generator=torch.Generator().manual_seed(i)) * 0.02
            params.append(nn.Parameter(values.to(device, FP16 if i == 4 else BF16)))
        sets.append((params, AdamW(two_groups(params), states=states, master=master)))
    for step in range(6):
        for params, optimizer in sets:
            set_gradients(params, step)
            if step in (2, 4):
                edit_all(params, "item" if how == "skipped" else how)
            if how == "skipped" and step == 2:  # the edit is for the next step to see
                params[0].grad.view(-1)[7] = float("nan")
            optimizer.step()
        assert_same(sets)


def test_a_parameter_that_nobody_edited_is_not_read() -> None:
    """What the sample and torch's count do not see goes unnoticed, as the documentation says."""
    params = [nn.Parameter(torch.full((1 << 17,), 0.02, device="cuda", dtype=BF16)) for _ in range(2)]
    for p in params:
        optimizer = AdamW([p], states="fp8-lm")
        for step in range(3):
            if step == 2 and p is params[0]:
                p.data[40] = 0.5
            set_gradients([p], step)
            optimizer.step()
    assert same_bits(*params)


# --- what a step costs ----------------------------------------------------------------------------------------------


def model_like(count: int) -> list[nn.Parameter]:
    """Matrices and vectors, the vectors in two dtypes, as of a bfloat16 model whose norms were left in float32."""
    params = []
    for i in range(count):
        shape, dtype = ((64, 128), BF16) if i % 3 == 0 else ((128,), BF16 if i % 3 == 1 else FP32)
        params.append(nn.Parameter(torch.randn(shape, device="cuda").to(dtype)))
        params[-1].grad = torch.randn_like(params[-1])
    return params


@pytest.mark.parametrize("norm", [None, 0.5], ids=["plain", "norm"])
@pytest.mark.parametrize("count", [90, 2000])
@pytest.mark.parametrize(
    "states, options",
    [("8bit", {}), ("fp8-lm", {}), ("8bit", {"master": "fp32"}), ("fp8", {"master": "fp32", "nonfinite": "element"})],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else value,
)
def test_a_step_is_a_few_kernels(states: str, options: dict[str, str], count: int, norm: float | None) -> None:
    """Clipping by the norm included, which has the one look at all gradients."""
    from torch.profiler import ProfilerActivity, profile

    params = model_like(count)
    optimizer = AdamW(two_groups(params), states=states, **options)

    def step() -> None:
        if norm is not None:
            optimizer.clip_grad_norm_(norm)
        optimizer.step()

    for _ in range(2):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    names = [e.name for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 2 <= len(names) <= 8, names
    looks = sum("amax_kernel" in name for name in names)
    assert looks == (norm is not None or "nonfinite" not in options)
    assert sum("norm_kernel" in name for name in names) == (norm is not None)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("states, master", [("fp8-lm", "default"), ("8bit", "fp32")])
def test_edited_parameters_make_no_step_wait(states: str, master: str) -> None:
    params = [nn.Parameter(torch.randn(300, 300, device="cuda").to(BF16)) for _ in range(3)]
    optimizer = AdamW(params, states=states, master=master)
    for step in range(5):
        set_gradients(params, step)
        if step < 2:
            optimizer.step()
            continue
        with no_synchronisation():
            edit_all(params, "copy_" if step == 2 else "data")
            optimizer.step()


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("lr", ["float", "cuda"])
def test_steps_do_not_wait_for_the_gpu(lr: str, clip: float | None) -> None:
    params = parameters("cuda", (BF16, FP32))
    optimizer = AdamW(params, lr=1e-3 if lr == "float" else torch.tensor(1e-3, device="cuda"))
    factor = None if clip is None else torch.tensor(clip, device="cuda")
    for step in range(4):
        set_gradients(params, step)  # new addresses each time
        if step == 0:
            optimizer.step(clip=factor)
            continue
        optimizer.param_groups[0]["weight_decay"] = 0.01 * step
        with no_synchronisation():
            optimizer.step(clip=factor)
    assert all(int(state["step"]) == 4 for state in optimizer.state.values())


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("states", ["8bit", "fp8-lm"])
def test_clipping_does_not_wait_for_the_gpu(states: str, tensor: bool) -> None:
    params = parameters("cuda", (BF16, FP32))
    optimizer = AdamW(params, states=states)
    limit = torch.tensor(0.05, device="cuda") if tensor else 0.05
    norms = []
    for step in range(4):
        set_gradients(params, step)
        if step == 0:
            optimizer.clip_grad_norm_(limit)
            optimizer.step()
            continue
        with no_synchronisation():
            norms.append(optimizer.clip_grad_norm_(limit))
            if step == 2:
                optimizer.apply_clip()
            optimizer.step()
    assert len({float(norm) for norm in norms}) == 3, "norms are not overwritten by later ones"


@pytest.mark.parametrize("states", ["8bit", "fp8-lm"])
def test_a_clip_in_a_cuda_graph(states: str) -> None:
    made = [(p := parameters("cuda", (BF16,)), AdamW(p, states=states)) for _ in "ab"]
    (params, optimizer), (twins, twin) = made
    for some in (params, twins):
        set_gradients(some, 0)
    for one in (optimizer, twin):
        one.clip_grad_norm_(0.05)
        one.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = optimizer.clip_grad_norm_(0.05)
        optimizer.step()
    for step in range(1, 3):
        source = [nn.Parameter(p.detach()) for p in params]
        set_gradients(source, step)
        set_gradients(twins, step)
        for p, s in zip(params, source, strict=True):
            p.grad.copy_(s.grad)
        graph.replay()
        assert same_bits(norm, twin.clip_grad_norm_(0.05)), step
        twin.step()
        pairs = zip(snapshot(params, optimizer), snapshot(twins, twin), strict=True)
        assert all(same_bits(a, b) for a, b in pairs), step
    for one in (optimizer, twin):  # eager again, between replays
        one.clip_grad_norm_(0.05)
        one.step()
    graph.replay()
    twin.clip_grad_norm_(0.05)
    twin.step()
    assert all(same_bits(a, b) for a, b in zip(snapshot(params, optimizer), snapshot(twins, twin), strict=True))


@pytest.mark.parametrize("states", ["8bit", "fp8-lm"])
def test_replays_of_a_cuda_graph_are_eager_steps(states: str) -> None:
    def made() -> tuple[list[nn.Parameter], torch.Tensor, AdamW]:
        params = parameters("cuda", (BF16,))
        for p in params:
            p.grad = torch.zeros_like(p)
        lr = torch.tensor(1e-3, device="cuda")
        return params, lr, AdamW(params, lr=lr, states=states)

    def prepare(params: list[nn.Parameter], lr: torch.Tensor, step: int) -> None:
        source = [nn.Parameter(p.detach()) for p in params]
        set_gradients(source, step)
        for p, s in zip(params, source, strict=True):
            p.grad.copy_(s.grad)
        lr.fill_(1e-3 * (step + 1))

    (params, lr, optimizer), (twins, twin_lr, twin) = made(), made()
    prepare(params, lr, 0)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    prepare(twins, twin_lr, 0)
    twin.step()
    for step in range(1, 5):
        prepare(params, lr, step)
        prepare(twins, twin_lr, step)
        if step == 3:  # skipped in a replay as elsewhere
            params[8].grad[7] = twins[8].grad[7] = float("nan")
        graph.replay()
        twin.step()
        pairs = zip(snapshot(params, optimizer), snapshot(twins, twin), strict=True)
        assert all(same_bits(a, b) for a, b in pairs), step
    assert int(optimizer.skipped_steps) == int(twin.skipped_steps) == 1
    optimizer.step()  # an eager step between replays
    twin.step()
    graph.replay()
    twin.step()
    assert all(same_bits(a, b) for a, b in zip(snapshot(params, optimizer), snapshot(twins, twin), strict=True))
