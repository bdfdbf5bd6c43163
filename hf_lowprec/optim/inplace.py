# SPDX-License-Identifier: Apache-2.0
"""A step of one slice on the CPU, in place: the bits of `algorithms`, and nothing allocated.

The truth makes a new tensor for every result. At a tenth of a nanosecond per element and pass, what that costs (page
faults where malloc gives memory back, buffers that push each other out of the cache, and dozens of tiny operations for
scales) is half of the time. Here moments are decoded into buffers that stay, updated there, and encoded from there; a
float32 Parameter and float32 moments are updated where they are.

It has `adam`, `lion` and `sgd` with moments in float32, or in blocks of 8-bit codes that are rounded to nearest by a
table (`numerics.lookup`): `8bit`, and what every other named state keeps of small tensors. The rest is the truth's.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from hf_lowprec.formats import Format, get_format
from hf_lowprec.numerics import counter_hash, sqrt_rn
from hf_lowprec.numerics.codes import value_table
from hf_lowprec.numerics.containers import integer_unit, is_packed
from hf_lowprec.numerics.hashing import folded
from hf_lowprec.numerics.lookup import Lookup
from hf_lowprec.numerics.rounding import code_table, stochastic_truncation
from hf_lowprec.optim import states as st
from hf_lowprec.optim.bounds import coupled
from hf_lowprec.recipe import Quant, Rounding

if TYPE_CHECKING:
    from hf_lowprec.optim.algorithms import Item

# Elements of a slice: measured, 2^17 pays for Python and scales, 2^19 for the last-level cache.
SLICE = 1 << 18
_CPU = torch.device("cpu")
_BF16 = cast(Format, get_format("e8m7"))
_16, _LOW = torch.tensor(16, dtype=torch.int32), torch.tensor(0xFFFF, dtype=torch.int32)  # faster than Python's
_ALL_BITS = Rounding(mode="stochastic")
_FAR = 2.0**127  # from where rounding to bfloat16 may have to saturate


class Codec(NamedTuple):
    """A slot in blocks. values, pairs: float32 of every code, and of every two; top: the largest; words: `Lookup`."""

    block: int
    values: Tensor
    pairs: Tensor
    top: float
    words: Lookup
    signed: bool
    nonzero: bool


@functools.lru_cache(maxsize=64)
def codec_of(quant: Quant) -> Codec | None:
    """None: another layout, rounding or scale than this module has."""
    fmt, scaling = get_format(quant.format), quant.scaling
    plain = (scaling.granularity, scaling.method, scaling.snap, scaling.store, scaling.margin, quant.compand) == (
        "block", "current", "exact", "float32", 0, "none",
    )  # fmt: skip
    if not plain or integer_unit(fmt) or is_packed(fmt) or (quant.nonzero and fmt.min < 0):
        return None
    words = code_table(fmt, quant.rounding.mode, quant.overflow, _CPU, nonzero=quant.nonzero)
    values = value_table(fmt, _CPU, torch.float32) if words is not None else None
    if words is None or values is None or not bool((values == 0).any()):
        return None
    # A float64 holds two float32, and one look-up finds both.
    two = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.uint8).to(torch.int32)
    pairs = torch.nn.functional.pad(values, (0, 256 - values.numel()))[two].view(torch.float64)
    return Codec(scaling.block[0], values, pairs, fmt.max, words, fmt.min < 0, quant.nonzero)


class _Buffers(threading.local):
    """float32 and int32 buffers of one thread, which grow to the largest slice that it has seen."""

    def __init__(self) -> None:
        self._of: dict[Any, Tensor] = {}

    def take(self, name: str, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The first n elements of buffer `name`; whoever takes it again overwrites it."""
        found = self._of.get(name)
        if found is None or found.numel() < n:
            found = self._of[name] = torch.empty(n, dtype=dtype)
        return found[:n]

    def folded(self, n: int) -> Tensor:
        """`hashing.folded(n)`: only read it."""
        if "folded" not in self._of or self._of["folded"].numel() < n:
            self._of["folded"] = folded(n)
        return self._of["folded"][:n]


_BUFFERS = _Buffers()


def _integers(n: int) -> tuple[Tensor, Tensor]:
    """int32 [n] twice, for indices and codes."""
    both = _BUFFERS.take("integers", 2 * n, torch.int32)
    return both[:n], both[n:]


def covers(algorithm: str, item: Item) -> bool:
    """Whether `update` has this item, and its slices of whole blocks."""
    if item.states.op_by_op:
        return False
    if algorithm not in _UPDATES or not item.param.is_contiguous() or st.hp_dtype(item.param) != torch.float32:
        return False
    if algorithm == "sgd" and item.moments and not item.group["momentum"]:
        return False  # a momentum that was switched off keeps its bits
    for name in item.moments:
        quant = item.quant(name)
        if quant is not None and codec_of(quant) is None:
            return False
        if quant is not None and item.state[f"{name}_scale"].dim() > 1:  # a shard's blocks of rows, some of them short
            return False
    return not item.predicted and all(value.is_contiguous() for value in item.state.values())


def whole(item: Item) -> bool:
    """Whether a slice of a covered item is whole blocks: all are, but for the last."""
    codecs = (codec_of(quant) for quant in map(item.quant, item.moments) if quant is not None)
    return not any(codec is None or item.param.numel() % codec.block for codec in codecs)


def update(algorithm: str, item: Item, s: dict[str, Any], clip: Tensor | None) -> None:
    """What `algorithms.update` does with whole blocks, where all gradients are finite."""
    group, n = item.group, item.param.numel()
    if n == 0:
        return
    w = _read_weight(item)
    g = item.grad.detach().reshape(-1)
    if g.dtype != torch.float32:
        g = _BUFFERS.take("g", n).copy_(g)
    if clip is not None:
        g = torch.mul(g, clip, out=_BUFFERS.take("g", n))
    if group["maximize"]:
        g = torch.neg(g, out=_BUFFERS.take("g", n))
    if coupled(algorithm, group) and group["weight_decay"]:
        g = torch.mul(w, s["wd"], out=_BUFFERS.take("l2", n)).add_(g)
    moments = {name: _load(item, name) for name in item.moments}
    _UPDATES[algorithm](g, w, moments, s, item)
    for name, value in moments.items():
        quant = item.quant(name)
        if quant is not None:
            _store(item, name, quant, value)
    _write_weight(item, w)


def _read_weight(item: Item) -> Tensor:
    """float32 [n]: the Parameter itself, if it is float32, else something that may be overwritten."""
    param = item.param.detach().view(-1)
    if param.dtype == torch.float32:
        return param
    if "master" in item.slots:
        return st.read_weight(item.state, item.param, item.states).view(-1)
    return _BUFFERS.take("w", param.numel()).copy_(param)


def _write_weight(item: Item, w: Tensor) -> None:
    param, rounding, n = item.param.detach().view(-1), item.states.update, w.numel()
    if param.dtype == torch.float32:
        return
    step = item.state["step"] + 1
    if "master" not in item.slots and param.dtype == torch.bfloat16 and rounding == _ALL_BITS:
        seed = st.stream_seed(rounding, item.index, "parameter", step)
        assert seed is not None
        words, other = _integers(n)
        counter_hash(seed, n, start=item.start, buffers=(words, other, _BUFFERS.folded(n))).bitwise_and_(_LOW)
        if n and bool(torch.stack(torch.aminmax(w)).abs_().amax() < _FAR):  # of nothing there is no maximum
            param.view(torch.int16).copy_(words.add_(w.view(torch.int32)).bitwise_right_shift_(_16))
        else:
            param.copy_(stochastic_truncation(w, _BF16, words, out=_BUFFERS.take("t", n)))
        return
    st.write_weight(
        item.state, item.param, item.states, w.view(item.param.shape),
        index=item.index, step=step, finite=None, start=item.start, shard=item.shard,
    )  # fmt: skip


def _load(item: Item, name: str) -> Tensor:
    """The moment in float32: the state itself, or decoded into a buffer."""
    quant = item.quant(name)
    if quant is None:
        return item.state[name].view(-1)
    codec = codec_of(quant)
    assert codec is not None
    codes = item.state[f"{name}_qdata"].view(-1).view(torch.uint8)
    value, table, n = _BUFFERS.take(name, codes.numel()), codec.values, codes.numel()
    if (n | int(codes.storage_offset())) % 2 == 0:
        codes, table, n = codes.view(torch.uint16), codec.pairs, n // 2
    torch.index_select(table, 0, _integers(n)[0].copy_(codes), out=value.view(table.dtype))
    value.view(-1, codec.block).mul_(item.state[f"{name}_scale"].view(-1, 1))
    return value


def _store(item: Item, name: str, quant: Quant, value: Tensor) -> None:
    """Encodes `value`, which is no more then."""
    codec, n = codec_of(quant), value.numel()
    assert codec is not None
    rows, other = value.view(-1, codec.block), _BUFFERS.take("t", n)
    magnitude = torch.abs(value, out=other).view(rows.shape) if codec.signed else rows
    scale = torch.amax(magnitude, 1, keepdim=True, out=item.state[f"{name}_scale"].view(-1, 1))
    nothing = scale == 0
    if codec.top != 1.0:
        scale.div_(codec.top)
    scale.clamp_(2.0**-126, 2.0**126).masked_fill_(nothing, 1.0)
    factor = scale.reciprocal()
    if codec.nonzero and not bool((factor >= 1).all()):  # the product may underflow where the value is positive
        torch.clamp(value, max=2.0**-149, out=other)
        rows.mul_(factor)
        torch.maximum(value, other, out=value)
    else:
        rows.mul_(factor)
    bits = value.view(torch.int32)
    cells, codes = _integers(n)
    torch.bitwise_right_shift(bits, _16, out=cells)
    if codec.signed:
        cells.bitwise_and_(_LOW)
    torch.index_select(codec.words.words, 0, cells, out=codes)
    codes.add_(bits).bitwise_right_shift_(_16)
    if codec.words.falling:
        codes.abs_()
    item.state[f"{name}_qdata"].view(-1).view(torch.uint8).copy_(codes)


# --- the algorithms, in place; `algorithms` has the equations -------------------------------------------------------


def _adam(g: Tensor, w: Tensor, moments: dict[str, Tensor], s: dict[str, Any], item: Item) -> None:
    m, v, t = moments["exp_avg"], moments["exp_avg_sq"], _BUFFERS.take("t", g.numel())
    m.add_(torch.sub(g, m, out=t).mul_(s["omb1"]))
    v.mul_(s["b2"]).add_(torch.mul(g, s["omb2"], out=t).mul_(g))
    if item.group["weight_decay"] and item.group["decoupled_weight_decay"]:
        w.mul_(s["decay"])
    denominator = sqrt_rn(v, out=t)
    denominator.mul_(s["rbc2"]).add_(s["eps"])
    w.sub_(torch.mul(m, s["alpha"], out=_BUFFERS.take("u", g.numel())).div_(denominator))


def _lion(g: Tensor, w: Tensor, moments: dict[str, Tensor], s: dict[str, Any], item: Item) -> None:
    m, t = moments["exp_avg"], _BUFFERS.take("t", g.numel())
    difference = torch.sub(g, m, out=t)
    direction = torch.mul(difference, s["omb1"], out=_BUFFERS.take("u", g.numel())).add_(m).sign_()
    m.add_(difference.mul_(s["omb2"]))
    if item.group["weight_decay"]:
        w.mul_(s["decay"])
    w.sub_(direction.mul_(s["lr"]))


def _sgd(g: Tensor, w: Tensor, moments: dict[str, Tensor], s: dict[str, Any], item: Item) -> None:
    t = _BUFFERS.take("t", g.numel())
    if item.group["momentum"]:
        m = moments["momentum_buffer"]
        m.mul_(s["momentum"]).add_(torch.mul(g, s["damped"], out=t))
        g = torch.mul(m, s["momentum"], out=_BUFFERS.take("u", g.numel())).add_(g) if item.group["nesterov"] else m
    w.sub_(torch.mul(g, s["lr"], out=t))


_UPDATES = {"adam": _adam, "lion": _lion, "sgd": _sgd}
