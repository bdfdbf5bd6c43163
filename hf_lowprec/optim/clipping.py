# SPDX-License-Identifier: Apache-2.0
"""Clipping by the global norm, as a factor for `step(clip=)` instead of a pass over all gradients.

The norm in one order of summation, with one bit pattern on the CPU and in kernels (`Tables.look`):

    squares   in float32 (float64 for float64), of chunks of 16384 elements of a gradient in row-major order
    a chunk   8 tiles of 2048, lane by lane, one after the other; then the 2048 lanes in pairs of neighbours
    the norm  sums of chunks in float64, in the order of the parameters: rows of 8192, lane by lane, then in pairs; its
              root, rounded to float32
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowprec.optim.shards import by_ranks, local_of

CHUNK, TILE, ROW = 16384, 2048, 8192  # the kernels'; tests hold them to each other
_AT_ONCE = 64  # chunks, 4 MiB in float32
_GRAD = operator.attrgetter("grad")


@torch.no_grad()
def clip_factor(
    params: Tensor | Iterable[Tensor], max_norm: float | Tensor, norm_type: float = 2.0
) -> tuple[Tensor, Tensor]:
    """(factor, total norm), float32 0-d on the device of the first gradient, without waiting for it.

    factor = min(1, max_norm / (norm + 1e-6)), torch.nn.utils.clip_grad_norm_'s; gradients are left as they are. Norms
    of 16-bit gradients are summed in float32, of sharded ones over all ranks (together). Without gradients: (1, 0). A
    gradient that is not finite makes the factor NaN and the norm NaN or Inf; `step` skips itself then.
    """
    grads = [p.grad for p in ([params] if isinstance(params, Tensor) else params) if p.grad is not None]
    if not grads:
        return torch.ones(()), torch.zeros(())
    home = grads[0].device
    whole = _norm([grad for grad in grads if not isinstance(grad, DTensor)], norm_type, home)
    parts = [
        shard.norm(_norm([local_of(grads[i]) for i in some], norm_type, home), norm_type)
        for shard, some in by_ranks(dict(enumerate(grads)))
    ]
    total = torch.linalg.vector_norm(torch.stack([whole, *parts]), norm_type) if parts else whole
    limit = max_norm.to(home, torch.float32) if isinstance(max_norm, Tensor) else max_norm
    factor = torch.clamp(limit / (total + 1e-6), max=1.0)
    return torch.where(total.isfinite(), factor, torch.nan), total


def _norm(grads: list[Tensor], norm_type: float, home: torch.device) -> Tensor:
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        if grad.numel():
            by_kind.setdefault((grad.device, grad.dtype), []).append(grad)
    norms = [
        norm.to(home, torch.float32)
        for (_, dtype), some in by_kind.items()
        for norm in torch._foreach_norm(some, norm_type, dtype=torch.promote_types(dtype, torch.float32))
    ]
    return torch.linalg.vector_norm(torch.stack(norms), norm_type) if norms else torch.zeros((), device=home)


# --- the norm in our order ------------------------------------------------------------------------------------------


def _in_pairs(x: Tensor) -> Tensor:
    """[m, n] to [m]: ((x0 + x1) + (x2 + x3)) + ..., n a power of two."""
    while x.shape[1] > 1:
        x = x[:, 0::2] + x[:, 1::2]
    return x[:, 0]


def square_sums(grad: Tensor) -> Tensor:
    """Sums of squares of the chunks of a gradient, [chunks] float32, of a float64 one float64."""
    flat, out = grad.detach().reshape(-1), []
    for piece in flat.split(_AT_ONCE * CHUNK) if flat.numel() else ():
        wide = piece.to(torch.promote_types(grad.dtype, torch.float32))
        wide = wide * wide
        if missing := -wide.numel() % CHUNK:
            wide = torch.nn.functional.pad(wide, (0, missing))
        lanes, *others = wide.view(-1, CHUNK // TILE, TILE).unbind(1)
        for tile in others:
            lanes += tile  # in this memory, which is ours
        out.append(_in_pairs(lanes))
    return torch.cat(out) if out else flat.new_zeros(0, dtype=torch.float32)


def norm_of(grads: Iterable[Tensor]) -> Tensor:
    """The L2 norm of all gradients, float32 0-d: what kernels give, bit for bit."""
    sums = torch.cat([square_sums(grad).double() for grad in grads])
    lanes = sums.new_zeros(1, ROW)
    for row in sums.split(ROW):
        lanes = lanes + torch.nn.functional.pad(row, (0, ROW - row.numel()))
    return _in_pairs(lanes).sqrt().float().reshape(())


def factor_of(norm: Tensor, max_norm: float | Tensor) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)), float32 0-d: divided as IEEE has it; NaN where the norm is not finite."""
    limit = torch.as_tensor(max_norm, dtype=torch.float64, device=norm.device).float().reshape(())
    return torch.where(norm.isfinite(), torch.clamp(limit / (norm + 1e-6), max=1.0), torch.nan)


# --- a clip that waits for its step ---------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Look:
    """What a look at all gradients found, for the step that follows it.

    norm, factor: float32 0-d. amax: `algorithms.gradient_amax` of `keys`' gradients, where the CPU looked. tables: of
    the kernels that looked, with the gradients at these addresses.
    """

    norm: Tensor
    factor: Tensor
    amax: Tensor | None = None
    keys: Sequence[Tensor] = ()
    tables: Any = None
    addresses: Sequence[int] = ()

    def amax_of(self, keys: Sequence[Tensor]) -> Tensor | None:
        """The amaxes, if they are of these parameters' gradients."""
        same = len(keys) == len(self.keys) and all(map(operator.is_, keys, self.keys))
        return self.amax if same else None


class Waiting:
    """A clip that the next step applies, and which gradients it was meant for (which this does not keep alive)."""

    def __init__(self, params: Sequence[Tensor], look: Look) -> None:
        self.look = look
        self._params = list(params)
        grads = list(map(_GRAD, self._params))
        self._refs = [_nothing if grad is None else weakref.ref(grad) for grad in grads]
        self._marks = _marks(grads)

    def gone(self) -> bool:
        """Whether no Parameter has the gradient that it had."""
        old = [ref() for ref in self._refs]
        return not any(a is b for a, b in zip(map(_GRAD, self._params), old, strict=True) if b is not None)

    def unchanged(self) -> bool:
        """Whether every gradient is as it was; False: some Parameters have none any more, which the clip outlives.

        Raises RuntimeError: one came, or was written or replaced. Whoever did that took the gradients for clipped:
        neither with the factor nor without it would the step be what was meant.
        """
        grads, old = list(map(_GRAD, self._params)), [ref() for ref in self._refs]
        marks = _marks(grads)
        if marks == self._marks and all(map(operator.is_, grads, old)):
            return True
        for param, grad, before, mark, known in zip(self._params, grads, old, marks, self._marks, strict=True):
            if grad is not None and (grad is not before or mark != known):
                raise RuntimeError(
                    f"the gradient of a Parameter of shape {tuple(param.shape)} was written, or set anew, between "
                    "clip_grad_norm_ and step, where p.grad is not clipped yet. Change gradients before they are "
                    "clipped, or call optimizer.apply_clip() before you do; clip with torch.nn.utils.clip_grad_norm_ "
                    "(under Accelerate and the Trainer: HF_LOWPREC_CLIP=0); or drop them all by optimizer.zero_grad()"
                )
        return False

    def apply(self) -> None:
        """Clips the gradients in place, as torch would have. Raises what `unchanged` raises."""
        self.unchanged()
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for grad in map(_GRAD, self._params):
            if grad is not None:
                by_kind.setdefault((grad.device, grad.dtype), []).append(local_of(grad))
        for (device, _), some in by_kind.items():
            torch._foreach_mul_(some, self.look.factor.to(device))


def _nothing() -> None:
    return None


def _marks(grads: Sequence[Any]) -> list[tuple[int, int] | None]:
    """By gradient: where it lies and how often torch has counted a write to it."""
    return [None if grad is None else (_address(grad), grad._version) for grad in grads]


def _address(grad: Tensor) -> int:
    return 0 if isinstance(grad, DTensor) else grad.data_ptr()
