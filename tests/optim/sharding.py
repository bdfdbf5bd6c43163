# SPDX-License-Identifier: Apache-2.0
"""Two processes that run functions of a test module, and FSDP2 over one or two of them with gradients made by hand."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from training import MAKE, bits

from hf_lowprec.optim import LowPrecOptimizer

# Whole blocks of 256 in every row, evenly divided (more than one slice of the CPU's path), unevenly, and all on one of
# two ranks; rows that end within a block, of odd and even length, with as many elements as whole blocks have; vectors
# above and below 4096 elements; a kernel; small ones.
SHAPES = [(520, 256), (17, 256), (1, 4352), (129, 37), (64, 1000), (4101,), (5,), (12, 16, 5, 5), (7, 13), (3, 1)]
REGULAR = [0, 1, 2, 6, 8, 9]  # whole blocks per row, or float32 states: the same states without sharding


class Pair:
    """Two processes with gloo between them. Call it with a function at the top level of a module and its arguments.

    A rank that raises leaves the other one waiting: both are stopped, and made anew for the next call.
    """

    def __init__(self, folder: str) -> None:
        self._folder, self._count = folder, 0
        self._ends: list[Any] = []
        self._processes: list[Any] = []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        pipes = [context.Pipe() for _ in range(2)]
        self._count += 1
        self._ends = [mine for mine, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, f"{self._folder}/{self._count}", theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """What the function returns on each rank. Raises AssertionError: what one of them raised."""
        if not self._processes:
            self._start()
        for end in self._ends:
            end.send((function, args, kwargs))
        answers: dict[int, tuple[str | None, Any]] = {}
        deadline = time.monotonic() + 100
        while len(answers) < 2 and time.monotonic() < deadline:
            for rank, end in enumerate(self._ends):
                if rank not in answers and end.poll(0.01):
                    answers[rank] = end.recv()
                    if answers[rank][0] is not None:
                        deadline = min(deadline, time.monotonic() + 2)
        errors = [f"rank {rank}: {error}" for rank, (error, _) in answers.items() if error is not None]
        if errors or len(answers) < 2:
            self.stop()
            raise AssertionError("\n".join(errors) or "the ranks wait for each other")
        return [answers[rank][1] for rank in range(2)]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []


def _serve(rank: int, store: str, end: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    while True:
        function, args, kwargs = end.recv()
        torch.manual_seed(0)
        try:
            answer = None, function(*args, **kwargs)
        except BaseException:
            answer = traceback.format_exc(), None
        end.send(answer)


@contextmanager
def one_process(folder: str) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/one", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
        os.unlink(f"{folder}/one")


class Bag(nn.Module):
    """Parameters, the same ones for the same dtype; some ranks have small values only."""

    def __init__(self, dtype: torch.dtype = torch.float32, shapes: list[tuple[int, ...]] = SHAPES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(shape, generator=generator) for shape in shapes]
        for weight in weights:
            weight[: len(weight) // 2] *= 1e-10
        self.weights = nn.ParameterList([weight.to(dtype) for weight in weights])


def world() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def sharded(
    dtype: torch.dtype = torch.float32, shapes: list[tuple[int, ...]] = SHAPES, mesh: DeviceMesh | None = None
) -> Bag:
    return fully_shard(Bag(dtype, shapes), mesh=mesh or world())


def gradient(step: int, i: int, like: Tensor) -> Tensor:
    """Of the whole parameter; of changing size, some far from 1."""
    generator = torch.Generator().manual_seed(1000 * step + i)
    return (torch.randn(like.shape, generator=generator) * 10.0 ** ((i + step) % 4 - 3)).to(like.dtype)


def set_gradients(bag: Bag, step: int) -> None:
    for i, p in enumerate(bag.weights):
        whole = gradient(step, i, p)
        p.grad = distribute_tensor(whole, p.device_mesh, p.placements) if isinstance(p, DTensor) else whole


def take_steps(bag: Bag, optimizer: LowPrecOptimizer, steps: range) -> None:
    for step in steps:
        set_gradients(bag, step)
        optimizer.step()


def whole(value: Tensor) -> Tensor:
    return bits(value.full_tensor() if isinstance(value, DTensor) else value).clone()


def everything(bag: Bag, optimizer: LowPrecOptimizer) -> dict[str, Tensor]:
    """The bits of all weights and states, whole."""
    out = {f"weight {i}": whole(p) for i, p in enumerate(bag.weights)}
    for i, state in optimizer.state_dict()["state"].items():
        out.update({f"{key} {i}": whole(value) for key, value in state.items()})
    return out


def trained(name: str, dtype: torch.dtype, steps: int, shard: bool = True, **options: Any) -> dict[str, Tensor]:
    """Some steps of optimizer `name` of `training.MAKE`."""
    bag = sharded(dtype) if shard else Bag(dtype)
    optimizer = MAKE[name](bag.parameters(), **options)
    take_steps(bag, optimizer, range(steps))
    assert optimizer.skipped_steps.item() == 0
    return everything(bag, optimizer)


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    keys = sorted(a.keys() | b.keys())
    return [key for key in keys if key not in a or key not in b or not torch.equal(a[key], b[key])]
