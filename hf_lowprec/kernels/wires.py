# SPDX-License-Identifier: Apache-2.0
"""Gradients through the format of communication on CUDA: which formats have kernels, and g' for any optimizer.

Our own optimizers quantise inside their step (`kernels.optimizer`). For others, `Exchange` makes new tensors of all
gradients of a device in three launches, however many they are: the look at all of them, the cast, mu.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hf_lowprec.kernels.kinds import CHUNK, FORMAT_NUMBERS
from hf_lowprec.kernels.launch import Bound, Launch, launch_all
from hf_lowprec.kernels.mirror import Mirror, capturing, int64
from hf_lowprec.recipe import Quant, Scaling

# Columns of the kernels' tables, see `triton/columns.py`.
COLUMNS = 25
WIRE_COLUMNS = slice(16, 23)
SEEN, AMAX, FINITE, EXTREMES = 4, 0, 1, 2  # columns of what the kernels saw: how many, and some of them
AMAX_TILE, AMAX_WARPS = 2048, 8
_OBSERVED = 128  # tensors per program of `observe_kernel`
_TILE, _WARPS = 1024, 4
_CARRIED = Quant(format="e4m3fn", scaling=Scaling(snap="rceil"))


@dataclass(frozen=True, eq=False, slots=True)
class Wire:
    """How one gradient passes through the format: where mu's state is kept, and what moves it.

    k, saturated, count: of a `GradientQuantizer`, on the gradients' device; place: the gradient's element in them.
    auto: whether there is a mu. It halves above the share `saturation`, else doubles in `growth` steps, up to
    k = `upper`. numel: of the whole tensor, if the gradient is a shard of one.
    """

    k: Tensor
    saturated: Tensor
    count: Tensor
    place: int
    auto: bool
    saturation: float
    growth: int
    upper: int
    numel: int | None = None


def carries(gradient: Quant) -> bool:
    """Whether the kernels have this format of gradients."""
    return gradient == _CARRIED


def wire_numbers(wire: Wire | None, numel: int) -> tuple[int, ...]:
    """The `T_WIRE_...` columns for a gradient of so many elements; all 0 for one that passes as it is."""
    if wire is None:
        return (0,) * 7
    numel = numel if wire.numel is None else wire.numel
    limit = int((torch.tensor(numel).float() * wire.saturation).view(torch.int32))
    k = wire.k.data_ptr() + 4 * wire.place if wire.auto else 0
    mu = mu_table(wire.growth, wire.k.device).data_ptr() if wire.auto else 0
    return (
        k, wire.saturated.data_ptr() + 8 * wire.place, wire.count.data_ptr() + 8 * wire.place, mu, wire.growth,
        wire.upper, limit,
    )  # fmt: skip


@cache
def mu_table(growth: int, device: torch.device) -> Tensor:
    """2 ** (r / growth) for r = 0, ..., growth - 1: mu without its power of two, the same on every device."""
    return torch.exp2(torch.arange(growth, dtype=torch.float64) / growth).float().to(device)


@cache
def native(device: torch.device) -> bool:
    """Whether the GPU has casts to E4M3 itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def observation(table: Tensor, seen: Tensor, tensors: int, device: torch.device) -> Launch:
    """The launch that moves mu's state on, from what the kernels saw of the gradients."""
    from hf_lowprec.kernels.triton.wire import observe_kernel

    bound = Bound.of(observe_kernel, device, BLOCK=_OBSERVED, num_warps=4, enable_fp_fusion=False)
    return Launch(bound, -(-tensors // _OBSERVED), (table, seen, tensors))


class Exchange:
    """New gradients for a list of contiguous ones on one device, whose sizes, dtypes and wires stay as they are.

    Raises TypeError: a gradient that is not float32, bfloat16 or float16.
    """

    def __init__(self, grads: Sequence[Tensor], wires: Sequence[Wire]) -> None:
        self.device = grads[0].device
        for grad in grads:
            if grad.dtype not in FORMAT_NUMBERS:
                raise TypeError(f"a gradient of {grad.dtype} cannot be quantised here")
        self._wires, self._shapes = list(wires), [grad.shape for grad in grads]
        table = torch.zeros(len(grads), COLUMNS, dtype=torch.int64)
        self._numel = table[:, 6] = torch.tensor([grad.numel() for grad in grads])
        table[:, 14] = torch.tensor([FORMAT_NUMBERS[grad.dtype] for grad in grads])
        table[:, WIRE_COLUMNS] = torch.tensor([wire_numbers(w, g.numel()) for w, g in zip(wires, grads, strict=True)])
        self._table = table
        self._seen = torch.zeros(len(grads), SEEN, dtype=torch.int32, device=self.device)
        # Results of one dtype share an allocation; each begins at a multiple of 16 bytes.
        self._dtypes: dict[torch.dtype, tuple[list[int], list[int], int]] = {}
        for dtype in dict.fromkeys(grad.dtype for grad in grads):
            members = [i for i, grad in enumerate(grads) if grad.dtype == dtype]
            sizes = torch.tensor([-(-grads[i].numel() // 16) * 16 for i in members])
            ends = sizes.cumsum(0)
            self._dtypes[dtype] = members, (ends - sizes).tolist(), int(ends[-1])
        self._addresses: list[int] = []
        self._aligned: Tensor | None = None
        self._mirror: Mirror

    def run(
        self,
        grads: Sequence[Tensor],
        between: Callable[[Tensor], None] | None = None,
        after: Callable[[Tensor], None] | None = None,
    ) -> list[Tensor]:
        """g' in shape and dtype of every gradient; mu's state has moved on.

        between, after: get int32 [n, SEEN], what was seen of each gradient, and may change it, for gradients that are
        shards: `between` when the bits of the largest magnitudes stand in AMAX and FINITE (without Inf and NaN),
        `after` when the number of codes at the maximum stands in EXTREMES.
        """
        from hf_lowprec.kernels.triton.prepare import amax_kernel
        from hf_lowprec.kernels.triton.wire import exchange_kernel

        outs: list[Tensor] = [grads[0]] * len(grads)
        for dtype, (members, begins, total) in self._dtypes.items():
            whole = torch.empty(total, dtype=dtype, device=self.device)
            for i, begin in zip(members, begins, strict=True):
                outs[i] = whole[begin : begin + self._numel_of(i)].view(self._shapes[i])
        addresses = [*map(Tensor.data_ptr, grads), *map(Tensor.data_ptr, outs)]
        self._send(addresses)
        if capturing(self.device):
            self._mirror.capture()
        else:
            self._mirror.ready()
        table, pointers, chunks = self._parts
        count, tensors = len(chunks), len(grads)
        self._seen.zero_()
        look = Launch(
            Bound.of(
                amax_kernel, self.device, WIRED=True, SAMPLE=False, NORM=False, CHUNK=CHUNK, TILE=AMAX_TILE,
                num_warps=AMAX_WARPS,
            ),
            count, (chunks, table, pointers, self._seen, self._seen, self._seen),
        )  # fmt: skip
        cast = Launch(
            Bound.of(
                exchange_kernel, self.device, NATIVE=native(self.device), CHUNK=CHUNK, TILE=_TILE, num_warps=_WARPS,
                enable_fp_fusion=False,
            ),
            count, (chunks, table, pointers, self._seen, tensors),
        )  # fmt: skip
        close = observation(table, self._seen, tensors, self.device)
        if between is None and after is None:
            launch_all([look, cast, close] if count else [close], self.device)
            return outs
        launch_all([look] if count else [], self.device)
        if between is not None:
            between(self._seen)
        launch_all([cast] if count else [], self.device)
        if after is not None:
            after(self._seen)
        launch_all([close], self.device)
        return outs

    def _numel_of(self, number: int) -> int:
        return self._shapes[number].numel()

    def _send(self, addresses: list[int]) -> None:
        """Lets the device know where gradients and results are."""
        if addresses == self._addresses:
            return
        self._addresses = addresses
        pointers = int64(addresses)
        aligned = (pointers[: len(self._shapes)] & 15) == 0
        if self._aligned is not None and torch.equal(aligned, self._aligned):
            self._mirror.write(1, pointers)
            return
        if capturing(self.device):
            raise RuntimeError("gradients can be captured after they were quantised once: run a step before")
        self._aligned = aligned
        counts = (self._numel + CHUNK - 1) // CHUNK
        tensor = torch.arange(len(counts)).repeat_interleave(counts)
        number = torch.arange(len(tensor)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        ragged = (number == counts[tensor] - 1) & (self._numel[tensor] % 8 != 0)
        careful = ragged | ~aligned[tensor]
        chunks = torch.stack([2 * tensor + careful, number], 1).to(torch.int32)
        self._mirror = Mirror([self._table, pointers, chunks.view(-1).view(torch.int64)], self.device)
        table, pointers, chunks = (self._mirror.part(i) for i in range(3))
        self._parts = table, pointers, chunks.view(torch.int32).view(-1, 2)
