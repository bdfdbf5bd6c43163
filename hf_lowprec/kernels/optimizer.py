# SPDX-License-Identifier: Apache-2.0
"""Optimizer steps on CUDA: which states have a kernel, the tables the kernels read, the launches.

`Tables` holds what `triton/optimizer.py` wants to know of a list of tensors. They lie in device memory and are written
again only where something has changed: rows when an address did, gradients' addresses when one did, hyperparameters
when one did. Copies come from pinned memory and nobody waits for them. A step is then at most

    amax (if the step looks at all gradients first) + prepare + one launch per kind of tensor

Kinds differ in dtypes and states; a tensor whose addresses are not aligned, and the last few elements of one whose
length is no multiple of 8, are a kind of their own, that loads element by element.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowprec.codebooks import dynamic_tree
from hf_lowprec.kernels.cells import dynamic_cells, signed32
from hf_lowprec.numerics.compand import softsign_inverse
from hf_lowprec.recipe import NONE, Quant, Residual, Rounding, Scaling

_SR = Rounding(mode="stochastic")


def _blocks(size: int, half: bool = False) -> Scaling:
    return Scaling(granularity="block", block=(size,), store="bfloat16" if half else "float32")


_PREDICTED = Scaling(method="predicted", snap="rceil")
_BF16 = Quant(format="e8m7", scaling=NONE, rounding=_SR)
# Codecs of `triton/codecs.py` and the size of their blocks, 0 for none.
_FIRST: dict[Quant, tuple[str, int]] = {
    _BF16: ("bf16", 0),
    Quant(format="dynamic8", scaling=_blocks(256)): ("dynamic8", 256),
    Quant(format="dynamic4", scaling=_blocks(128)): ("dynamic4", 128),
    Quant(format="e4m3fn", scaling=_blocks(128)): ("e4m3", 128),
    Quant(format="e0m7", scaling=_blocks(32, half=True), compand="softsign"): ("softsign8", 32),
    Quant(format="e4m3fn", scaling=_PREDICTED, rounding=_SR): ("e4m3p", 0),
}
_SECOND: dict[Quant, tuple[str, int]] = {
    _BF16: ("bf16", 0),
    Quant(format="dynamic8u", scaling=_blocks(256), nonzero=True): ("dynamic8u", 256),
    Quant(format="e3m1normal0u", scaling=_blocks(128), rounding=_SR, nonzero=True): ("e3m1u", 128),
    Quant(format="e4m3fn", scaling=_blocks(128), rounding=_SR, nonzero=True): ("e4m3n", 128),
    Quant(format="e0m8u", scaling=_blocks(32, half=True), rounding=_SR, compand="sqrt", nonzero=True): ("sqrt8", 32),
    Quant(format="e5m10", scaling=_PREDICTED, nonzero=True): ("fp16p", 0),
}
_MASTER: dict[Quant | Residual | str, str] = {
    "float32": "fp32",
    Quant(format="e5m10", scaling=Scaling(method="predicted", snap="rceil", margin=4), rounding=_SR): "fp16p",
    Residual(bits=8): "residual8",
    Residual(bits=8, rounding=_SR): "residual8s",
    Residual(bits=16): "residual16",
}
_FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_FORMAT_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PLAIN_BLOCK = 256

CHUNK = 16384
_AMAX_TILE, _AMAX_WARPS = 2048, 8
_PREPARED, _PREPARED_WARPS = 64, 2  # tensors per program of `prepare_kernel`
COLUMNS, GROUP_COLUMNS, SCALARS = 16, 16, 32


class Config(NamedTuple):
    """How a kind is launched: elements per tile, warps, pipeline stages of loads, registers (None: as it comes)."""

    tile: int
    warps: int
    stages: int
    registers: int | None

    @property
    def options(self) -> dict[str, int]:
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, **limit}


# Measured on an H100, ms per 1e9 bfloat16 parameters of `8bit` and `compact` (nonfinite="element"): 72 registers 5.8
# and 7.4, 80: 5.8 and 7.9, no limit 6.0 and 7.1; 256 threads and tiles of 2048: 6.3 and 8.2; two stages: 6.5 and 9.3;
# chunks of 8192: 6.4 and 7.6. The other kinds were not tuned.
_PLAIN = Config(1024, 4, 1, None)
_LOOKING_UP = Config(1024, 4, 1, 80)  # six programs on a multiprocessor hide each other's barriers
FORCED: Config | None = None  # for measurements


def config_of(kind: Kind) -> Config:
    return FORCED or (_LOOKING_UP if "dynamic8" in (kind.first, kind.second) else _PLAIN)


class Kind(NamedTuple):
    """What tensors of one launch have in common, in the words of `step_kernel`."""

    param: str
    grad: str
    first: str
    second: str
    master: str
    stochastic: bool
    block: int

    @property
    def each(self) -> int:
        """Elements side by side in a thread, so that the widest of them are 16 bytes."""
        return 4 if "fp32" in self[:5] else 8

    @property
    def predicted(self) -> bool:
        return "e4m3p" in self[2:5] or "fp16p" in self[2:5]


def kind_of(
    algorithm: str,
    param: torch.dtype,
    grad: torch.dtype,
    slots: dict[str, Quant | Residual | str | None],
    update: Rounding,
) -> Kind | None:
    """The kind of a tensor with these slots (`optim.states.layout`), or None: no kernel has it.

    update: rounding of a 16-bit Parameter without master.
    """
    moments = [slots[name] for name in slots if name != "master"]
    first = _codec(_FIRST, moments[0]) if moments else ("none", 0)
    second = _codec(_SECOND, moments[1]) if len(moments) > 1 else ("none", 0)
    master = _MASTER.get(slots["master"]) if slots.get("master") is not None else "none"  # type: ignore[arg-type]
    if param not in _FORMATS or grad not in _FORMATS or first is None or second is None or master is None:
        return None
    if update not in (Rounding(), _SR) or (first[1] and second[1] and first[1] != second[1]):
        return None
    if algorithm == "sgd" and master == "fp16p" and first[0] not in ("none", "e4m3p"):
        return None  # the master's bound would need a look at the momentum
    stochastic = param != torch.float32 and master == "none" and update == _SR
    block = first[1] or second[1] or _PLAIN_BLOCK
    return Kind(_FORMATS[param], _FORMATS[grad], first[0], second[0], master, stochastic, block)


def _codec(known: dict[Quant, tuple[str, int]], quant: Any) -> tuple[str, int] | None:
    return ("fp32", 0) if quant is None else known.get(quant)


class Row(NamedTuple):
    """One tensor: its kind and the `T_...` columns of `triton/optimizer.py`, but the last."""

    kind: Kind
    numbers: tuple[int, ...]


_Slot = tuple[Tensor | None, Tensor | None]


def row(
    kind: Kind, *, param: Tensor, first: _Slot, second: _Slot, master: _Slot, amaxes: Sequence[Tensor | None],
    step: Tensor, group: int, index: int, grad_dtype: torch.dtype,
) -> Row:  # fmt: skip
    """The row of a contiguous Parameter. first, second, master: (codes or values, scale) of the slots, None for what
    there is not. amaxes: theirs, None where the scale is not predicted."""
    return Row(
        kind,
        (
            param.data_ptr(), *map(_address, first), *map(_address, second), _address(master[0]), param.numel(),
            step.data_ptr(), group, index, *map(_address, amaxes), _address(master[1]), _FORMAT_NUMBERS[grad_dtype],
        ),
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
    return (*row, *[0] * (GROUP_COLUMNS - len(row)))


def _double_bits(value: float) -> int:
    (bits,) = struct.unpack("q", struct.pack("d", value))
    return int(bits)


@cache
def look_up_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """(values of codes float32, cells int32), laid out as `triton/codecs.py` expects them.

    values: dynamic8 at 0, dynamic8u at 256, dynamic4 at 512, softsign8 (by the byte) at 768. cells: of the same trees
    at 0, 1024 and 3072.
    """
    trees = torch.tensor([*dynamic_tree(True), *dynamic_tree(False), *dynamic_tree(True, 3), *[0.0] * 240])
    z = torch.arange(256, dtype=torch.uint8).view(torch.int8).float() * (1 / 127)
    entries = []
    for signed, decades, size in ((True, 7, 1024), (False, 7, 2048), (True, 3, 32)):
        found = signed32(dynamic_cells(signed, decades).entries)
        entries += [*found, *[0] * (size - len(found))]
    cells = torch.tensor(entries, dtype=torch.int32)
    return torch.cat([trees, softsign_inverse(z)]).to(device), cells.to(device)


# --- memory that follows the host ------------------------------------------------------------------------------------


class _Mirror:
    """Parts of one int64 tensor on the device, and how they get new contents without anybody waiting.

    A CUDA graph copies at every replay from the pinned memory that it saw when it was captured. That memory is
    allocated before (during a capture nothing may be), given to the graph for good, and never written again. A graph
    writes all parts, so that what other steps wrote in between does not concern it.
    """

    def __init__(self, parts: Sequence[Tensor], device: torch.device) -> None:
        self._host = torch.cat([part.reshape(-1) for part in parts])
        self._whole = torch.empty_like(self._host, device=device)
        self._ends = torch.tensor([0, *(part.numel() for part in parts)]).cumsum(0).tolist()
        self._pinned = device.type == "cuda"
        self._spare: Tensor | None = None
        self._graphs: list[Tensor] = []
        self._send(0, len(self._host))

    def part(self, number: int) -> Tensor:
        return self._whole[self._ends[number] : self._ends[number + 1]]

    def write(self, number: int, values: Tensor) -> None:
        """New contents of one part. While a graph is captured they are only noted, for `capture`."""
        begin, end = self._ends[number : number + 2]
        self._host[begin:end] = values.reshape(-1)
        if not capturing(self._whole.device):
            self._send(begin, end)

    def ready(self) -> None:
        """Makes sure that a capture finds memory, and undoes what replays of captured graphs have written here."""
        if self._graphs:
            self._send(0, len(self._host))
        if self._pinned and self._spare is None:
            self._spare = torch.empty_like(self._host, pin_memory=True)

    def capture(self) -> None:
        """Has the graph that is being captured write everything. Raises RuntimeError: no memory was made ready."""
        if self._spare is None:
            raise RuntimeError("an optimizer step was captured twice without a step between: run one")
        staged, self._spare = self._spare, None
        self._graphs.append(staged.copy_(self._host))
        self._whole.copy_(staged, non_blocking=True)

    def _send(self, begin: int, end: int) -> None:
        # A fresh pinned block each time: torch gives it out again only after the copy.
        some = self._host[begin:end]
        self._whole[begin:end].copy_(some.pin_memory() if self._pinned else some, non_blocking=self._pinned)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class _Launch(NamedTuple):
    kind: Kind
    fast: bool
    begin: int
    chunks: int


_TABLE, _GRADS, _GROUPS, _CHUNKS = range(4)
# What captured graphs read and write: nobody tells when a graph is gone, so it is kept to the end of the process.
_CAPTURED: list[tuple[Any, ...]] = []


class Tables:
    """What the kernels know of a list of tensors on one device. Rows and gradients are given in the same order.

    Raises RuntimeError while a CUDA graph is being captured: run the step once before.
    """

    def __init__(
        self, algorithm: str, rows: Sequence[Row], grads: Sequence[int], groups: Sequence[tuple[int, ...]],
        device: torch.device,
    ) -> None:  # fmt: skip
        if capturing(device):
            raise RuntimeError("an optimizer step can be captured after it ran once with the same parameters: run it")
        self.algorithm, self.device = algorithm, device
        self.kinds = [row.kind for row in rows]
        self.predicted = any(kind.predicted for kind in self.kinds)
        table = torch.tensor([row.numbers for row in rows], dtype=torch.int64)
        self._numel = table[:, 6]
        self._counts = (self._numel + CHUNK - 1) // CHUNK
        places = self._counts.cumsum(0) - self._counts
        self._table = torch.cat([table, places[:, None]], 1)
        self._aligned = ((table[:, [0, 1, 3, 5]] & 15) == 0).all(1)
        self._arrange(_int64(grads), torch.tensor(groups, dtype=torch.int64))
        self._amaxes = torch.zeros(len(rows), dtype=torch.int32, device=device)
        self._scalars = torch.zeros(len(rows), SCALARS, dtype=torch.int32, device=device)
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        sums = int(self._counts.sum()) if algorithm == "stable_adam" else 0
        self._sums = torch.empty(sums, dtype=torch.float64, device=device)
        self._values, self._cells = look_up_tables(device)

    def set_grads(self, grads: Sequence[int]) -> None:
        """New addresses of the gradients."""
        values = _int64(grads)
        if torch.equal((values & 15) == 0, self._grads_aligned):
            self._mirror.write(_GRADS, values)
        else:
            self._arrange(values, self._groups)

    def set_groups(self, groups: Sequence[tuple[int, ...]]) -> None:
        """New hyperparameters, `group_numbers` each."""
        self._groups = torch.tensor(groups, dtype=torch.int64)
        self._mirror.write(_GROUPS, self._groups)

    def _arrange(self, grads: Tensor, groups: Tensor) -> None:
        """Chunks of every kind in a row: those that move as words, then the others. Writes everything anew."""
        if capturing(self.device):
            raise RuntimeError("gradients lie at less aligned addresses in this CUDA graph than in the step before it")
        self._groups = groups
        self._grads_aligned = (grads & 15) == 0
        aligned = self._aligned & self._grads_aligned
        parts: list[Tensor] = [torch.zeros(0, 2, dtype=torch.int64)]
        self._launches: list[_Launch] = []
        begin = 0
        for kind in dict.fromkeys(self.kinds):
            members = torch.tensor([i for i, other in enumerate(self.kinds) if other == kind])
            counts = self._counts[members]
            tensor = members.repeat_interleave(counts)
            number = torch.arange(len(tensor)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
            ragged = (number == self._counts[tensor] - 1) & (self._numel[tensor] % 8 != 0)
            fast = aligned[tensor] & ~ragged
            for careful, chosen in ((0, fast), (1, ~fast)):
                if count := int(chosen.sum()):
                    parts.append(torch.stack([tensor[chosen] * 2 + careful, number[chosen]], 1))
                    if count % 2:  # every launch's part begins at 16 bytes; a chunk behind the last one is empty
                        some = parts[-1][-1, 0]
                        parts.append(torch.stack([some, self._counts[some >> 1]])[None])
                    self._launches.append(_Launch(kind, not careful, begin, count))
                    begin += count + count % 2
        chunks = torch.cat(parts).to(torch.int32).view(-1).view(torch.int64)
        self._mirror = _Mirror([self._table, grads, groups, chunks], self.device)

    # --- a step --------------------------------------------------------------------------------------------------

    def step(
        self, *, clip: Tensor | None, finite: Tensor | None, elementwise: bool, coupled: bool, quick: bool,
        skipped_steps: Tensor, skipped_elements: Tensor,
    ) -> Tensor:  # fmt: skip
        """Runs the kernels and returns whether the step was finite, 0-d bool.

        clip: float32 0-d. finite: 0-d bool that decides; None: the gradients do (or only `clip`, if `elementwise`),
        and a step that is skipped is counted. coupled: whether the decay of any group joins the gradient. quick: see
        `triton/roots.py`.
        """
        from hf_lowprec.kernels.triton import optimizer as kernels

        if capturing(self.device):
            self._mirror.capture()
            _CAPTURED.append((self._mirror, *vars(self).values()))
        else:
            self._mirror.ready()
        table, grads, groups = (self._mirror.part(number) for number in (_TABLE, _GRADS, _GROUPS))
        chunks = self._mirror.part(_CHUNKS).view(torch.int32).view(-1, 2)
        tensors = len(self.kinds)
        look = 0 if finite is not None else 2 if elementwise else 1
        amax = (look == 1 or self.predicted) and len(chunks) > 0
        if amax:
            self._amaxes.zero_()
            kernels.amax_kernel[(len(chunks),)](
                chunks, table, grads, self._amaxes, CHUNK=CHUNK, TILE=_AMAX_TILE, num_warps=_AMAX_WARPS
            )
        flag = self._finite.view(torch.uint8)
        kernels.prepare_kernel[(-(-tensors // _PREPARED),)](
            table, groups, self._amaxes, self._scalars, flag if finite is None else finite.view(torch.uint8),
            self._scalars if clip is None else clip, flag, skipped_steps, tensors,
            ALGORITHM=self.algorithm, LOOK=look, CLIP=clip is not None, PREDICTED=self.predicted,
            FIRST_STREAM=5 if self.algorithm == "sgd" else 0, BLOCK=_PREPARED, num_warps=_PREPARED_WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip
        if self.algorithm == "stable_adam":
            for launch in self._launches:
                kind, config = launch.kind, config_of(launch.kind)
                kernels.square_kernel[(launch.chunks,)](
                    chunks[launch.begin :], table, grads, self._scalars, flag, self._values, self._sums,
                    GRAD=kind.grad, SECOND=kind.second, ELEMENT=elementwise, FAST=launch.fast, EACH=kind.each,
                    BLOCK=kind.block, CHUNK=CHUNK, TILE=config.tile, STAGES=config.stages, enable_fp_fusion=False,
                    **config.options,
                )  # fmt: skip
            kernels.rate_kernel[(tensors,)](
                table, groups, self._scalars, flag, self._sums, CHUNK=CHUNK, BLOCK=256, num_warps=1,
                enable_fp_fusion=False,
            )  # fmt: skip
        for launch in self._launches:
            kind, config = launch.kind, config_of(launch.kind)
            kernels.step_kernel[(launch.chunks,)](
                chunks[launch.begin :], table, grads, self._scalars, flag, self._values, self._cells, skipped_elements,
                ALGORITHM=self.algorithm, PARAM=kind.param, GRAD=kind.grad, FIRST=kind.first, SECOND=kind.second,
                MASTER=kind.master, STOCHASTIC=kind.stochastic, COUPLED=coupled, ELEMENT=elementwise,
                QUICK=quick, FAST=launch.fast, EACH=kind.each, BLOCK=kind.block, CHUNK=CHUNK, TILE=config.tile,
                STAGES=config.stages, enable_fp_fusion=False, **config.options,
            )  # fmt: skip
        return self._finite


def _int64(values: Sequence[int]) -> Tensor:
    """int64 [n] of Python ints, without a look at each."""
    if not len(values):
        return torch.zeros(0, dtype=torch.int64)
    return torch.frombuffer(array("q", values), dtype=torch.int64)
