# SPDX-License-Identifier: Apache-2.0
"""Many weights cast at once on a GPU: the table that `triton/cast_weights.py` reads, and the launches.

One launch per kind of weight (dtype, policy, layouts). The table is written again only where an address has changed,
by a copy that nobody waits for. A CUDA graph that captures a run writes its own table at every replay (`mirror`), and
what it casts into is kept for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowprec.kernels.launch import Bound, Launch, launch_all
from hf_lowprec.kernels.mirror import Mirror, capturing
from hf_lowprec.ops.cast_weights import WeightCast
from hf_lowprec.ops.quantize import parse_quant, sample_stride

_COLUMNS = 16
_INPUTS = (torch.float32, torch.bfloat16, torch.float16)
_SPAN, _PROGRAMS = 16, 4096  # tiles of a program, but fewer where that leaves fewer programs than these
# What captured graphs read and write: nobody tells when a graph is gone, so it is kept to the end of the process.
_CAPTURED: list[tuple[Any, ...]] = []


class _Kind(NamedTuple):
    quant: str
    method: int
    dtype: torch.dtype
    transposed: bool
    fast: bool


class _Part(NamedTuple):
    kind: _Kind
    chunks: Tensor
    programs: int


class WeightTable:
    """`ops.cast_weights.PlainTable` in kernels, whose casts name the amax wherever a scale may come from it.

    Raises RuntimeError in `run` while a CUDA graph is being captured and the weights are not those of the last run.
    """

    finds_amax = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._keys: list[tuple[Any, ...]] = []
        self._kinds: list[_Kind] = []
        self._shapes: list[torch.Size] = []
        self._parts: list[_Part] = []
        self._mirror: Mirror | None = None

    @staticmethod
    def takes(weight: Tensor, quant: str) -> bool:
        return (
            _covers(quant)
            and weight.dtype in _INPUTS
            and weight.is_contiguous()
            and weight.numel() > 0
            and max(weight.shape) < 1 << 24  # offsets within a tile have 32 bits
        )

    def run(self, casts: Sequence[WeightCast], counts: Tensor, seen: Tensor) -> None:
        from hf_lowprec.kernels.triton.cast import SAMPLES
        from hf_lowprec.kernels.triton.cast_transpose import TILE, TYPES
        from hf_lowprec.kernels.triton.cast_weights import cast_weights_kernel

        keys = [_key(cast) for cast in casts]
        keys.append((counts.data_ptr(), seen.data_ptr()))
        if keys != self._keys:
            self._write(casts, counts, seen)
            self._keys = keys
        assert self._mirror is not None
        if capturing(self._device):
            self._mirror.capture()
            _CAPTURED.append((self._mirror, list(casts), counts, seen))
        else:
            self._mirror.ready()
        counts.zero_()
        launches = []
        for kind, chunks, programs in self._parts:
            plan = _plan(kind.quant)
            constants = dict(zip(_CONSTANTS, plan.constants, strict=True))
            bound = Bound.of(
                cast_weights_kernel, self._device, **constants, METHOD=kind.method, X=_input_type(kind.dtype),
                Q=TYPES[plan.dtype], TRANSPOSED=kind.transposed, FAST=kind.fast, SAMPLES=SAMPLES, TILE_R=TILE.rows,
                TILE_C=TILE.columns, num_warps=TILE.warps,
            )  # fmt: skip
            launches.append(Launch(bound, programs, (chunks, self._mirror.part(0))))
        launch_all(launches, self._device)

    def _write(self, casts: Sequence[WeightCast], counts: Tensor, seen: Tensor) -> None:
        """The table anew; the chunks too, where kinds or shapes are others."""
        from hf_lowprec.kernels.triton.cast_transpose import TILE

        kinds = [_kind(cast) for cast in casts]
        shapes = [cast.weight.shape for cast in casts]
        tiles = [-(-r // TILE.rows) * -(-c // TILE.columns) for r, c in shapes]
        span = max(1, min(_SPAN, sum(tiles) // _PROGRAMS))
        parts = [-(-count // span) for count in tiles]
        notes = zip(counts.unbind(), seen.unbind(), strict=True)
        rows = [_row(cast, *note, n) for cast, note, n in zip(casts, notes, parts, strict=True)]
        table = torch.tensor(rows, dtype=torch.int64)
        if self._mirror is not None and kinds == self._kinds and shapes == self._shapes:
            self._mirror.write(0, table)
            return
        if capturing(self._device):
            raise RuntimeError("an optimizer step can be captured after it ran once with the same parameters: run it")
        pieces: list[Tensor] = []
        places: list[tuple[_Kind, int, int]] = []
        begin = 0
        for kind in dict.fromkeys(kinds):
            members = torch.tensor([i for i, other in enumerate(kinds) if other == kind])
            each = torch.tensor(parts)[members]
            weight = members.repeat_interleave(each)
            part = torch.arange(len(weight)) - (each.cumsum(0) - each).repeat_interleave(each)
            pieces.append(torch.stack([weight, part], 1))
            places.append((kind, begin, len(weight)))
            if len(weight) % 2:  # every launch's chunks begin at 16 bytes
                pieces.append(pieces[-1][-1:])
            begin += len(weight) + len(weight) % 2
        chunks = torch.cat(pieces).to(torch.int32).view(-1).view(torch.int64)
        self._mirror = Mirror([table, chunks], self._device)
        there = self._mirror.part(1).view(torch.int32).view(-1, 2)
        self._parts = [_Part(kind, there[first:], programs) for kind, first, programs in places]
        self._kinds, self._shapes = kinds, shapes


@cache
def _covers(quant: str) -> bool:
    from hf_lowprec.kernels.quantize import plan_of

    plan = plan_of(quant)
    return plan is not None and plan.dtype.itemsize == 1


_CONSTANTS = ("FMT_MAX", "HALF_TINY", "TOP_EXP", "TOP_MAN", "MARGIN", "POW2")


def _plan(quant: str) -> Any:
    from hf_lowprec.kernels.quantize import plan_of

    plan = plan_of(quant)
    assert plan is not None  # `takes` said so
    return plan


def _input_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _key(cast: WeightCast) -> tuple[Any, ...]:
    weight, quant, *others = cast
    return (weight.data_ptr(), weight.shape, weight.dtype, quant, *map(_address, others))


def _kind(cast: WeightCast) -> _Kind:
    from hf_lowprec.kernels.triton.cast import CURRENT, DELAYED, GIVEN

    method = parse_quant(cast.quant).scaling.method
    if method in ("none", "static"):
        how = GIVEN
    else:
        how = DELAYED if method == "delayed" and cast.given is not None else CURRENT
        if cast.amax is None:
            raise ValueError(f"a weight with {method} scaling whose amax is not known")
    fast = cast.weight.shape[1] % 16 == 0 and not (cast.weight.data_ptr() | cast.qdata.data_ptr()) & 15
    return _Kind(cast.quant, how, cast.weight.dtype, cast.transposed is not None, fast)


def _row(cast: WeightCast, counts: Tensor, seen: Tensor, parts: int) -> tuple[int, ...]:
    """The `W_...` columns."""
    from hf_lowprec.kernels.quantize import kept_constant

    (r, c), given, plan = cast.weight.shape, cast.given, _plan(cast.quant)
    if plan.method in ("none", "static"):
        given = kept_constant(plan.constant_scale, cast.weight.device)
    every = sample_stride(r * c)
    row = (
        cast.weight.data_ptr(), cast.qdata.data_ptr(), _address(cast.transposed), cast.scale.data_ptr(),
        _address(cast.amax), _address(given), counts.data_ptr(), seen.data_ptr(), r, c, -(-r // 16),
        -(-r * c // every), every, parts,
    )  # fmt: skip
    return (*row, *[0] * (_COLUMNS - len(row)))
