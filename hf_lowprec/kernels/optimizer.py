# SPDX-License-Identifier: Apache-2.0
"""Optimizer steps on CUDA: which states have a kernel, the tables the kernels read, the launches.

`Tables` holds what `triton/optimizer.py` wants to know of a list of tensors. They lie in device memory and are written
again only where something has changed: rows when an address did, gradients' addresses when one did, hyperparameters
when one did. Copies come from pinned memory and nobody waits for them. A step is then at most

    amax (if the step looks at all gradients first; else a sample of the Parameters that follow masters, if any do)
    + norm (with clipping, which looks before the step does)
    + prepare + one launch per kind of tensor (+ mu of the gradients)

Kinds differ in dtypes and states; a tensor whose addresses are not aligned, and the last chunk of one whose length is
no multiple of a tile, are a kind of their own, that loads element by element.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowprec.codebooks import dynamic_tree
from hf_lowprec.kernels.cells import dynamic_cells, signed32
from hf_lowprec.kernels.kinds import CHUNK, FORMAT_NUMBERS, Kind, config_of
from hf_lowprec.kernels.kinds import kind_of as kind_of
from hf_lowprec.kernels.launch import Bound, Launch, alignments_of, launch_all
from hf_lowprec.kernels.mirror import Mirror, capturing, int64
from hf_lowprec.kernels.wires import (
    AMAX,
    AMAX_TILE,
    AMAX_WARPS,
    EXTREMES,
    SEEN,
    Wire,
    native,
    observation,
    wire_numbers,
)
from hf_lowprec.kernels.wires import carries as carries
from hf_lowprec.numerics.compand import softsign_inverse

_PREPARED, _PREPARED_WARPS = 64, 2  # tensors per program of `prepare_kernel`
_GROUP_COLUMNS, _SCALARS, _EDITED = 16, 32, 19  # columns, and one of those of `_SCALARS`
# `T_FOLLOWS`, by master and Parameter; larger tensors than this are sampled, others always read.
_FOLLOWS = {("fp32", "bf16"): 1, ("fp32", "fp16"): 2, ("fp16p", "bf16"): 3, ("fp16p", "fp16"): 4}
SAMPLED_ABOVE = 1 << 16
_SAMPLE_WARPS = 4
NORM_BLOCK, _NORM_WARPS = 8192, 16  # sums of chunks that one program adds at a time


class Row(NamedTuple):
    """One tensor: its kind, the first `T_...` columns of `triton/columns.py`, and `T_START`."""

    kind: Kind
    numbers: tuple[int, ...]
    start: int = 0


_Slot = tuple[Tensor | None, Tensor | None]


def row(
    kind: Kind, *, param: Tensor, first: _Slot, second: _Slot, master: _Slot, amaxes: Sequence[Tensor | None],
    step: Tensor, group: int, index: int, grad_dtype: torch.dtype, start: int = 0,
) -> Row:  # fmt: skip
    """The row of a contiguous Parameter. first, second, master: (codes or values, scale) of the slots, None for what
    there is not. amaxes: theirs, None where the scale is not predicted. start: of a shard, the number of its first
    element in the whole tensor, by which random words go."""
    return Row(
        kind,
        (
            param.data_ptr(), *map(_address, first), *map(_address, second), _address(master[0]), param.numel(),
            step.data_ptr(), group, index, *map(_address, amaxes), _address(master[1]), FORMAT_NUMBERS[grad_dtype],
        ),
        start,
    )  # fmt: skip


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def group_numbers(
    *, lr: float | Tensor, betas: tuple[float, float], eps: float, decay: float, coupled: bool, maximize: bool,
    nesterov: bool, ratio: float,
) -> tuple[int, ...]:  # fmt: skip
    """The `G_...` columns. lr: a number, or a tensor on the device whose value is read by every step anew.

    Raises TypeError: a tensor that is neither float32 nor float64.
    """
    kind = 0
    if isinstance(lr, Tensor):
        if lr.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"lr: a tensor on the GPU is float32 or float64, got {lr.dtype}")
        kind = 1 if lr.dtype == torch.float32 else 2
        lr_word = lr.data_ptr()
    else:
        lr_word = _double_bits(lr)
    doubles = [_double_bits(value) for value in (*betas, eps, decay)]
    row = [lr_word, kind, *doubles, int(coupled), int(maximize), int(nesterov), _double_bits(ratio)]
    return (*row, *[0] * (_GROUP_COLUMNS - len(row)))


def _single_bits(value: float) -> int:
    return ctypes.c_int32.from_buffer(ctypes.c_float(value)).value  # beyond float32's range: Inf


def _double_bits(value: float) -> int:
    (bits,) = struct.unpack("q", struct.pack("d", value))
    return int(bits)


@cache
def look_up_tables(device: torch.device) -> Tensor:
    """int32 words, laid out as `triton/codecs.py` expects them: values of codes (float32), behind them the cells.

    dynamic8 at 0, dynamic8u at 1792, dynamic4 at 4992, the values of softsign8 (by the byte) at 5120.
    """
    words: list[Tensor] = []
    for signed, decades, values, size in ((True, 7, 256, 1792), (False, 7, 256, 3200), (True, 3, 16, 128)):
        tree = torch.tensor(dynamic_tree(signed, decades), dtype=torch.float32).view(torch.int32)
        cells = signed32(dynamic_cells(signed, decades).entries)
        rest = torch.zeros(size - values - len(cells), dtype=torch.int32)
        words += [tree, torch.tensor(cells, dtype=torch.int32), rest]
    z = torch.arange(256, dtype=torch.uint8).view(torch.int8).float() * (1 / 127)
    return torch.cat([*words, softsign_inverse(z).view(torch.int32)]).to(device)


class _Part(NamedTuple):
    kind: Kind
    fast: bool
    wired: bool
    begin: int
    chunks: int


_TABLE, _GRADS, _GROUPS, _CHUNKS = range(4)
# What captured graphs read and write: nobody tells when a graph is gone, so it is kept to the end of the process.
_CAPTURED: list[tuple[Any, ...]] = []


class Tables:
    """What the kernels know of a list of tensors on one device. Rows, gradients and wires are given in the same order.

    wires: how gradients pass through a format on their way into the step; none at all by default. amax: each step
    notes `weight_amax`.

    Raises RuntimeError while a CUDA graph is being captured: run the step once before.
    """

    def __init__(
        self, algorithm: str, rows: Sequence[Row], grads: Sequence[int], groups: Sequence[tuple[int, ...]],
        device: torch.device, wires: Sequence[Wire | None] = (), amax: bool = False,
    ) -> None:  # fmt: skip
        if capturing(device):
            raise RuntimeError("an optimizer step can be captured after it ran once with the same parameters: run it")
        self.algorithm, self.device = algorithm, device
        self.kinds = [row.kind for row in rows]
        self.predicted = any(kind.predicted for kind in self.kinds)
        self._wires = list(wires) or [None] * len(rows)
        self.wired = any(wire is not None for wire in self._wires)
        table = torch.tensor([row.numbers for row in rows], dtype=torch.int64)
        self._numel = table[:, 6]
        self._counts = (self._numel + CHUNK - 1) // CHUNK
        places = self._counts.cumsum(0) - self._counts
        numbers = [wire_numbers(*one) for one in zip(self._wires, self._numel.tolist(), strict=True)]
        self._starts = torch.tensor([row.start for row in rows], dtype=torch.int64)
        follows = torch.tensor([_FOLLOWS.get((kind.master, kind.param), 0) for kind in self.kinds])
        self._follows = bool(follows.any())
        follows = torch.where(self._numel > SAMPLED_ABOVE, follows, 0)
        columns = [places[:, None], torch.tensor(numbers), self._starts[:, None], follows[:, None]]
        self._table = torch.cat([table, *columns], 1)
        self._aligned = ((table[:, [0, 1, 3, 5]] & 15) == 0).all(1)
        self._arrange(int64(grads), torch.tensor(groups, dtype=torch.int64))
        self._seen = torch.zeros(len(rows), SEEN, dtype=torch.int32, device=device)
        self._notes_amax = amax
        self._scalars = torch.zeros(len(rows), _SCALARS, dtype=torch.int32, device=device)
        self._scalars[:, _EDITED] = 1  # until the first step that is not skipped
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        sums = int(self._counts.sum()) if algorithm == "stable_adam" else 0
        self._sums = torch.empty(sums, dtype=torch.float64, device=device)
        self._squares: Tensor | None = None
        self._factor: Tensor | None = None
        self._look_captured = self._staged = False  # the last look was; what it staged is still what there is
        self._look_up = look_up_tables(device)

    @property
    def weight_amax(self) -> Tensor:
        """float32 [rows]: the largest finite magnitude in each Parameter after the last step. Overwritten by the next.

        Raises RuntimeError: nobody asked for it.
        """
        if not self._notes_amax:
            raise RuntimeError("these tables do not note the Parameters' amax: make them with amax=True")
        return self._seen[:, 3].view(torch.float32)

    def _queue(
        self, launches: list[Launch], kernel: Any, programs: int, arguments: tuple[Tensor | int, ...],
        **constants: Any,
    ) -> None:  # fmt: skip
        bound = Bound.of(kernel, self.device, **constants)
        launches.append(Launch(bound, programs, arguments, alignments_of(arguments)))

    def set_grads(self, grads: Sequence[int]) -> None:
        """New addresses of the gradients."""
        self._staged = False
        values = int64(grads)
        if torch.equal((values & 15) == 0, self._grads_aligned):
            self._mirror.write(_GRADS, values)
        else:
            self._arrange(values, self._groups)

    def set_groups(self, groups: Sequence[tuple[int, ...]]) -> None:
        """New hyperparameters, `group_numbers` each."""
        self._staged = False
        self._groups = torch.tensor(groups, dtype=torch.int64)
        self._mirror.write(_GROUPS, self._groups)

    def _arrange(self, grads: Tensor, groups: Tensor) -> None:
        """Chunks of every kind in a row: those of whole tiles that move as words, then the others. Writes all anew."""
        if capturing(self.device):
            raise RuntimeError("gradients lie at less aligned addresses in this CUDA graph than in the step before it")
        self._groups = groups
        self._grads_aligned = (grads & 15) == 0
        aligned = self._aligned & self._grads_aligned
        parts: list[Tensor] = [torch.zeros(0, 2, dtype=torch.int64)]
        self._launches: list[_Part] = []
        self._last: tuple[tuple[Any, ...], list[Launch]] | None = None
        begin = 0
        for kind in dict.fromkeys(self.kinds):
            tile = config_of(kind).tile
            members = torch.tensor([i for i, other in enumerate(self.kinds) if other == kind])
            counts = self._counts[members]
            tensor = members.repeat_interleave(counts)
            number = torch.arange(len(tensor)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
            ragged = (number == self._counts[tensor] - 1) & (self._numel[tensor] % tile != 0)
            fast = aligned[tensor] & ~ragged & (self._starts[tensor] % tile == 0)
            for careful, chosen in ((0, fast), (1, ~fast)):
                if count := int(chosen.sum()):
                    parts.append(torch.stack([tensor[chosen] * 2 + careful, number[chosen]], 1))
                    if count % 2:  # every launch's part begins at 16 bytes; a chunk behind the last one is empty
                        some = parts[-1][-1, 0]
                        parts.append(torch.stack([some, self._counts[some >> 1]])[None])
                    wired = any(self._wires[i] is not None for i in members.tolist())
                    self._launches.append(_Part(kind, not careful, wired, begin, count))
                    begin += count + count % 2
        chunks = torch.cat(parts).to(torch.int32).view(-1).view(torch.int64)
        self._mirror = Mirror([self._table, grads, groups, chunks], self.device)
        self._parts = tuple(self._mirror.part(number) for number in (_TABLE, _GRADS, _GROUPS))
        self._chunks = self._mirror.part(_CHUNKS).view(torch.int32).view(-1, 2)
        self._parts_of = [self._chunks[launch.begin :] for launch in self._launches]

    def _capture(self) -> None:
        self._mirror.capture()
        _CAPTURED.append((self._mirror, *vars(self).values()))

    # --- a step --------------------------------------------------------------------------------------------------

    def look(self, limit: float | Tensor) -> tuple[Tensor, Tensor]:
        """The look at all gradients, before the step that is told `looked`; on the way their norm.

        limit: the norm that they are to be clipped to, a number or float32 0-d on the device.

        Returns (norm, factor) as `optim.clipping.norm_of` and `factor_of` have them, float32 0-d. The factor is
        overwritten by the next look, the norm is not. In a CUDA graph, its step belongs into the same one.

        Raises RuntimeError while a CUDA graph is being captured, if there was no look before.
        """
        from hf_lowprec.kernels.triton import gradient_norm, prepare

        self._look_captured = self._staged = capturing(self.device)
        if not self._look_captured:
            self._mirror.ready()
        elif self._squares is None:
            raise RuntimeError("clip_grad_norm_ can be captured after it ran once with the same parameters: run it")
        else:
            self._capture()
        count = int(self._counts.sum())
        if self._squares is None or self._factor is None:
            self._squares = torch.empty(count, dtype=torch.float32, device=self.device)
            self._factor = torch.ones((), dtype=torch.float32, device=self.device)
        norm = torch.empty((), dtype=torch.float32, device=self.device)
        self._seen[:, :EXTREMES].zero_()
        launches: list[Launch] = []
        if len(self._chunks):
            table, grads, _ = self._parts
            self._queue(
                launches, prepare.amax_kernel, len(self._chunks),
                (self._chunks, table, grads, self._seen, self._scalars, self._squares),
                WIRED=self.wired, SAMPLE=False, NORM=True, CHUNK=CHUNK, TILE=AMAX_TILE, num_warps=AMAX_WARPS,
                enable_fp_fusion=False,
            )  # fmt: skip
        most, bits = (limit, 0) if isinstance(limit, Tensor) else (self._factor, _single_bits(limit))
        self._queue(
            launches, gradient_norm.norm_kernel, 1, (self._squares, most, norm, self._factor, count, bits),
            TENSOR=isinstance(limit, Tensor), BLOCK=NORM_BLOCK, num_warps=_NORM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
        launch_all(launches, self.device)
        return norm, self._factor

    def step(
        self, *, clip: Tensor | None, finite: Tensor | None, elementwise: bool, coupled: bool, quick: bool,
        skipped_steps: Tensor, skipped_elements: Tensor, amaxes: Tensor | None = None, trusted: bool = False,
        looked: bool = False,
    ) -> Tensor:  # fmt: skip
        """Runs the kernels and returns whether the step was finite, 0-d bool.

        clip: float32 0-d. finite: 0-d bool that decides; None: the gradients do (or only `clip`, if `elementwise`),
        and a step that is skipped is counted. coupled: whether the decay of any group joins the gradient. quick: see
        `root_and_quotient`. amaxes: float32 [rows], of gradients that other ranks have parts of; with `finite` only.
        trusted: since the last step torch has counted no edit of a Parameter: one that follows a master is read only
        where a sample of it shows an edit. (A step in a CUDA graph reads them all, as does the first one.)
        looked: `look` was the last thing that happened here, and the gradients are what they were.
        """
        captured = capturing(self.device)
        looked = looked and captured == self._look_captured
        if captured:
            trusted = False
            if not (looked and self._staged):
                self._capture()
        else:
            self._mirror.ready()
        look = 0 if finite is not None else 2 if elementwise else 1
        amax = (look == 1 or self.predicted or self.wired) and len(self._chunks) > 0
        if looked:
            if self.wired or self._notes_amax:
                self._seen[:, EXTREMES:].zero_()
        elif amax or self._notes_amax:
            self._seen.zero_()
        if amaxes is not None:
            self._seen[:, AMAX] = amaxes.view(torch.int32)
        # Most steps launch what the last one did: nothing of it is looked up again.
        key = (elementwise, coupled, quick, trusted, looked, clip is None, id(skipped_steps), id(skipped_elements))
        alone = (clip is None or clip is self._factor) and finite is None
        if alone and self._last is not None and self._last[0] == key:
            launches = self._last[1]  # which keep the counters alive, and so their ids
        else:
            launches = self._made(
                look, amax, clip, finite, elementwise, coupled, quick, skipped_steps, skipped_elements,
                given=looked or amaxes is not None, trusted=trusted,
            )  # fmt: skip
            self._last = (key, launches) if alone else None
        launch_all(launches, self.device)
        return self._finite

    def _made(
        self, look: int, amax: bool, clip: Tensor | None, finite: Tensor | None, elementwise: bool, coupled: bool,
        quick: bool, skipped_steps: Tensor, skipped_elements: Tensor, *, given: bool, trusted: bool,
    ) -> list[Launch]:  # fmt: skip
        """The launches of a `step`. given: the gradients' amaxes are there."""
        from hf_lowprec.kernels.triton import optimizer as kernels
        from hf_lowprec.kernels.triton import prepare, sample

        launches: list[Launch] = []
        table, grads, groups = self._parts
        tensors, seen = len(self.kinds), self._seen
        if amax and not given:
            self._queue(
                launches, prepare.amax_kernel, len(self._chunks),
                (self._chunks, table, grads, seen, self._scalars, self._scalars),
                WIRED=self.wired, SAMPLE=self._follows, NORM=False, CHUNK=CHUNK, TILE=AMAX_TILE, num_warps=AMAX_WARPS,
            )  # fmt: skip
        if self._follows and (given or not amax) and len(self._chunks):
            self._queue(
                launches, sample.sample_kernel, len(self._chunks), (self._chunks, table, self._scalars),
                CHUNK=CHUNK, num_warps=_SAMPLE_WARPS,
            )  # fmt: skip
        flag = self._finite.view(torch.uint8)
        self._queue(
            launches, prepare.prepare_kernel, -(-tensors // _PREPARED),
            (table, groups, seen, self._scalars, flag if finite is None else finite.view(torch.uint8),
             self._scalars if clip is None else clip, flag, skipped_steps, tensors, int(trusted)),
            ALGORITHM=self.algorithm, LOOK=look, CLIP=clip is not None, PREDICTED=self.predicted, WIRED=self.wired,
            FOLLOWS=self._follows, FIRST_STREAM=5 if self.algorithm == "sgd" else 0, BLOCK=_PREPARED,
            num_warps=_PREPARED_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
        fast_cast = native(self.device)
        if self.algorithm == "stable_adam":
            for launch, chunks in zip(self._launches, self._parts_of, strict=True):
                kind, config = launch.kind, config_of(launch.kind)
                self._queue(
                    launches, kernels.square_kernel, launch.chunks,
                    (chunks, table, grads, self._scalars, flag, self._look_up, self._sums),
                    GRAD=kind.grad, SECOND=kind.second, ELEMENT=elementwise, WIRED=launch.wired, NATIVE=fast_cast,
                    FAST=launch.fast, EACH=kind.each, BLOCK=kind.block, CHUNK=CHUNK, TILE=config.tile,
                    STAGES=config.stages, enable_fp_fusion=False, **config.options,
                )  # fmt: skip
            self._queue(
                launches, prepare.rate_kernel, tensors, (table, groups, self._scalars, flag, self._sums),
                CHUNK=CHUNK, BLOCK=256, num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
        for launch, chunks in zip(self._launches, self._parts_of, strict=True):
            kind, config = launch.kind, config_of(launch.kind)
            self._queue(
                launches, kernels.step_kernel, launch.chunks,
                (chunks, table, grads, self._scalars, flag, self._look_up, skipped_elements, seen),
                ALGORITHM=self.algorithm, PARAM=kind.param, GRAD=kind.grad, FIRST=kind.first, SECOND=kind.second,
                MASTER=kind.master, STOCHASTIC=kind.stochastic, COUPLED=coupled, ELEMENT=elementwise,
                WIRED=launch.wired, NATIVE=fast_cast, AMAX=self._notes_amax, QUICK=quick, FAST=launch.fast,
                EACH=kind.each, BLOCK=kind.block, CHUNK=CHUNK, TILE=config.tile, STAGES=config.stages,
                enable_fp_fusion=False, **config.options,
            )  # fmt: skip
        if self.wired:
            launches.append(observation(table, seen, tensors, self.device))
        return launches
