# SPDX-License-Identifier: Apache-2.0
"""Kinds of tensors in an optimizer step: which states have a kernel, and how it is launched."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

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
FORMAT_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PLAIN_BLOCK = 256

CHUNK = 16384


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


# Measured on an H200 (copy 4.25 TB/s), ms per 1e9 bfloat16 parameters, look at the gradients included, by registers:
#   8bit      64: 3.86   72: 3.91   80: 3.95     tiles of 2048 with 8 warps 4.13, of 512 with 2 warps 3.95
#   compact   64: 4.95   80: 4.98   free: 4.99   2048 with 8 warps 5.20
#   fp8-lm    64: 5.41   72: 5.18   80: 4.92   free: 5.05
#   fp8       64: 5.10   80: 5.13   free: 5.16
#   4bit      64: 4.26   80: 4.30   free: 4.27
#   bf16      64: 4.00   free: 4.01; 2048 with 8 warps 3.97. fp32 on float32: 7.9, whatever it is
# On an H100 (3.0 TB/s), elements checked one by one: 8bit 64: 4.22   72: 4.34   80: 4.55; compact 72: 5.46   80: 5.48.
# Chunks of 8192 to 65536 elements make 3 % of difference. On an H100 two stages of loads lost 10 % to one.
_PLAIN = Config(1024, 4, 1, None)
_LOOKING_UP = Config(1024, 4, 1, 64)  # with four elements in a thread it would spill
_TIGHT = Config(1024, 4, 1, 80)
FORCED: Config | None = None  # for measurements


def config_of(kind: Kind) -> Config:
    if FORCED is not None:
        return FORCED
    moments = {kind.first, kind.second}
    if moments & {"dynamic8", "dynamic8u", "dynamic4"}:
        return _LOOKING_UP if kind.each == 8 else _TIGHT
    return _TIGHT if moments & {"e4m3p", "e4m3"} else _PLAIN


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
