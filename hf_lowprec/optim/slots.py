# SPDX-License-Identifier: Apache-2.0
"""One slot of an optimizer's state: float32 in, codes and scales out, and back.

A slot without a Quant is a float32 tensor under its own name (float64 for a float64 Parameter). With one it is

    <slot>_qdata    codes: torch's dtype of the format; int8 or uint8 integers for formats without exponent (`e0m7`,
                    `e0m8u`); indices of a codebook, uint8; of widths other than 8 and 16 bits packed into bytes, as
                    `numerics.containers` says (4 bits: two to a byte; B bits: 8 codes to B bytes)
    <slot>_scale    float32 0-d per tensor (1 if there is no scaling), or [blocks] in the dtype that the Quant stores
    <slot>_power, <slot>_center     float32 [blocks], compand `expand` only
    <slot>_amax     float32 0-d, predicted scaling only: largest magnitude of what was last written, before rounding

Codes have the Parameter's shape, packed ones are [bytes]. Blocks count over the flattened tensor, the last may
be short (`numerics.blocks`).

Codes never stand under the slot's own name: torch.optim.AdamW, given such a checkpoint, would take them for moments,
leave out the scale and train on. Without the name it stops at its first step with KeyError: 'exp_avg'.

Writing never decides on the host: `finite`, a 0-d bool on the device, selects between the new codes and the old ones,
so a step with a non-finite gradient leaves every bit as it was without anybody waiting for the GPU.

Predicted scaling. A scale from the new values themselves needs two passes over them. Instead it comes from a bound on
them that is known before: Adam's m' = b1 m + (1 - b1) g is at most b1 A + (1 - b1) G, G the amax of the gradient and A
what the slot can hold at most (`stored_amax`). The pass notes the true amax, from which the next bound starts anew.

Shards (`optim/shards.py`) are read and written like tensors of their own, with two differences. A scale of the whole
tensor takes all ranks. And blocks keep to rows, also where their length is no multiple of the block: such slots are
padded row by row on their way in and out, have scales [rows, blocks] and packed codes [rows, bytes], by which `read`
knows them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_lowprec import ops
from hf_lowprec.formats import Format, get_format
from hf_lowprec.numerics import ScaledTensor, counter_hash, dequantize, quantize, scale_from_amax
from hf_lowprec.numerics.blocks import decode_blocks, encode_blocks, parameter_names
from hf_lowprec.numerics.containers import (
    from_integers,
    group_of,
    integer_unit,
    is_packed,
    lift_zeros,
    pack_codes,
    stored_size,
    to_integers,
    unpack_codes,
)
from hf_lowprec.numerics.scaling import finite_amax, store_scale
from hf_lowprec.recipe import Quant, Rounding

if TYPE_CHECKING:
    from hf_lowprec.optim.shards import Shard

_NEAREST = Rounding()
# Who rounds stochastically, numbered. Checkpoints go on with these numbers: append, never reorder.
_STREAMS = ("exp_avg", "exp_avg_sq", "master", "parameter", "grad", "momentum_buffer", "l2")


def hp_dtype(of: Tensor | torch.dtype) -> torch.dtype:
    """The dtype in which a parameter is updated: float32, or float64 for a float64 one."""
    return torch.promote_types(of if isinstance(of, torch.dtype) else of.dtype, torch.float32)


def matrix(x: Tensor) -> Tensor:
    """Scalars and vectors as one row, so that row, column and tile scalings mean something for them too."""
    return x.reshape(1, -1) if x.ndim < 2 else x


def select_(target: Tensor, new: Tensor, finite: Tensor | None) -> None:
    """`target = new if finite else target`, in place, bit for bit, `finite` not read on the host; None is True."""
    if finite is None:
        target.copy_(new)
        return
    if target.dtype.itemsize == 1:  # torch.where knows no float8
        target, new = target.view(torch.uint8), new.view(torch.uint8)
    torch.where(finite, new.to(target.dtype), target, out=target)


def stream_seed(rounding: Rounding, index: int, stream: str, step: Tensor) -> Tensor | None:
    """0-d int64 seed with which `stream` of parameter number `index` rounds in step `step`; None if it draws nothing.

    seed = (8 * index + stream number) << 32 | step: a function of data that a checkpoint holds, so a resumed run
    rounds like the uninterrupted one, and of no host value that changes, so nothing waits for the device. `index`
    counts the parameters over all groups, as `state_dict` does; ranks that hold the same parameters agree.
    """
    if rounding.mode != "stochastic":
        return None
    return step.to(torch.int64) + ((8 * index + _STREAMS.index(stream)) << 32)


# --- read and write ------------------------------------------------------------------------------------------------


def read(
    state: Mapping[str, Tensor],
    slot: str,
    quant: Quant | None,
    dtype: torch.dtype = torch.float32,
    shape: torch.Size | None = None,
) -> Tensor:
    """`slot` in `dtype` (float32 or float64) and the Parameter's `shape`, which packed codes do not know.

    Without a Quant it is the state itself: only read it. Raises ValueError: packed codes without `shape`.
    """
    if quant is None:
        return state[slot]
    fmt, qdata = get_format(quant.format), state[f"{slot}_qdata"]
    if shape is None:
        if is_packed(fmt):
            raise ValueError(f"{slot} is packed: reading it needs the parameter's shape")
        shape = qdata.shape
    parameters = tuple(state[f"{slot}_{name}"] for name in parameter_names(quant))
    if width := _stored_width(qdata, parameters[0], quant):
        return _read_rows(qdata, parameters, quant, width, shape).to(dtype)
    codes = unpack_codes(qdata, shape.numel(), fmt) if is_packed(fmt) else qdata
    if _in_blocks(quant):
        return decode_blocks(codes.reshape(-1), parameters, quant).to(dtype).view(shape)
    if integer_unit(fmt) and fmt.min < 0:
        codes = from_integers(codes)
    return dequantize(ScaledTensor(matrix(codes.reshape(shape)), parameters[0]), quant, dtype).reshape(shape)


def write(
    state: Mapping[str, Tensor],
    slot: str,
    quant: Quant | None,
    value: Tensor,
    *,
    finite: Tensor | None,
    seed: Tensor | None = None,
    bound: Tensor | None = None,
    start: int = 0,
    shard: Shard | None = None,
) -> None:
    """Quantises `value` into `slot` in place, or keeps the old bits where `finite` (0-d bool; None is True) is False.

    seed: `stream_seed`. bound: float32 0-d, at least the largest magnitude of `value`, for predicted scaling.
    start: flat index at which `value` begins, where it is a slice, or the rows of `shard`.
    """
    for key, new in pack(slot, quant, value, seed=seed, bound=bound, start=start, shard=shard).items():
        select_(state[key], new, finite)


def pack(
    slot: str,
    quant: Quant | None,
    value: Tensor,
    *,
    seed: Tensor | None = None,
    bound: Tensor | None = None,
    start: int = 0,
    shard: Shard | None = None,
    copy: bool = False,
) -> dict[str, Tensor]:
    """The tensors of `slot` that hold `value`.

    A state that is made new has no step to draw from and no bound: without `seed` it is rounded to nearest, without
    `bound` a predicted scale comes from the amax.
    """
    if quant is None:
        return {slot: value.to(hp_dtype(value), copy=copy)}
    if seed is None and quant.rounding.mode == "stochastic":
        quant = replace(quant, rounding=_NEAREST)
    out: dict[str, Tensor] = {}
    scale = None
    if quant.scaling.method == "predicted":
        amax = value.detach().abs().amax().float() if value.numel() else value.new_zeros((), dtype=torch.float32)
        if bound is None:
            bound = amax = amax if shard is None else shard.maximum(amax)
        scale = scale_from_amax(bound, quant.format, quant.scaling)
        out[f"{slot}_amax"] = amax
    elif shard is not None and quant.scaling.granularity == "tensor" and quant.scaling.method == "current":
        scale = scale_from_amax(shard.maximum(finite_amax(value)), quant.format, quant.scaling)
        scale = store_scale(scale, quant.scaling)
    if shard is not None and (width := padded_width(quant, shard.columns)):
        codes, parameters = _encode_rows(value, quant, scale, seed, shard, width)
    else:
        codes, parameters = _encode(value, quant, scale, seed, start)
        fmt = get_format(quant.format)
        codes = pack_codes(codes, fmt) if is_packed(fmt) else codes.view(value.shape)
    out[f"{slot}_qdata"] = codes
    out.update({f"{slot}_{name}": p for name, p in zip(parameter_names(quant), parameters, strict=True)})
    return out


def _encode(
    value: Tensor, quant: Quant, scale: Tensor | None, seed: Tensor | None, start: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(codes in their container, (scale (, power, center)))."""
    if _in_blocks(quant):
        return encode_blocks(value, quant, scale=scale, seed=seed, start=start)
    if isinstance(start, Tensor) or start:  # the operator counts from 0
        words = None if seed is None else counter_hash(seed, value.numel(), start=start, device=value.device)
        codes, used = quantize(matrix(value), quant, scale=scale, words=words)
    else:
        codes, used = ops.quantize(matrix(value), ops.quant_key(quant), scale, fixed=scale is not None, seed=seed)
    codes, fmt = codes.reshape(value.shape), get_format(quant.format)
    if integer_unit(fmt) and fmt.min < 0:
        codes = to_integers(codes)
    if quant.nonzero:
        lift_zeros(codes, value.detach(), fmt)
    return codes, (used,)


def _in_blocks(quant: Quant) -> bool:
    """Whether `numerics.blocks` has it. `ops.quantize` has the other groups, and kernels for one scale per tensor."""
    if quant.scaling.granularity == "tensor":
        return get_format(quant.format).torch_dtype_name is None
    return quant.scaling.granularity == "block"


# --- rows of shards ------------------------------------------------------------------------------------------------


def row_widths(slot: str, quant: Quant, columns: int) -> dict[str, int]:
    """By key, the entries per row of what is not shaped like the Parameter, for rows of `columns` elements."""
    unit, fmt = _row_unit(quant), get_format(quant.format)
    width, out = -(-columns // unit) * unit, {}
    if is_packed(fmt):
        out[f"{slot}_qdata"] = stored_size(width, fmt)
    if quant.scaling.granularity == "block":
        out.update({f"{slot}_{name}": width // quant.scaling.block[0] for name in parameter_names(quant)})
    return out


def padded_width(quant: Quant, columns: int) -> int:
    """Elements of a row of `columns` in whole blocks and bytes, or 0 where it has them anyway."""
    unit = _row_unit(quant)
    return 0 if columns % unit == 0 else -(-columns // unit) * unit


def _row_unit(quant: Quant) -> int:
    block = quant.scaling.block[0] if quant.scaling.granularity == "block" else 1
    return math.lcm(block, group_of(get_format(quant.format))[0])


def _stored_width(qdata: Tensor, scale: Tensor, quant: Quant) -> int:
    """`padded_width` of a stored slot."""
    fmt = get_format(quant.format)
    if is_packed(fmt) and qdata.dim() == 2:
        codes, stored = group_of(fmt)
        return qdata.shape[1] // stored * codes
    return scale.shape[1] * quant.scaling.block[0] if quant.scaling.granularity == "block" and scale.dim() == 2 else 0


def _encode_rows(
    value: Tensor, quant: Quant, scale: Tensor | None, seed: Tensor | None, shard: Shard, width: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`_encode` of rows padded to `width`, packed. Random words go by the index in the padded whole tensor."""
    padded = _padded(value.detach().reshape(shard.rows, shard.columns), width)
    codes, parameters = _encode(padded, quant, scale, seed, shard.row * width)
    if quant.scaling.granularity == "block":
        parameters = tuple(p.view(shard.rows, width // quant.scaling.block[0]) for p in parameters)
    fmt = get_format(quant.format)
    if is_packed(fmt):
        return pack_codes(codes, fmt).view(shard.rows, stored_size(width, fmt)), parameters
    return codes.view(shard.rows, width)[:, : shard.columns].contiguous().view(value.shape), parameters


def _read_rows(qdata: Tensor, parameters: tuple[Tensor, ...], quant: Quant, width: int, shape: torch.Size) -> Tensor:
    columns, fmt = shape[1:].numel(), get_format(quant.format)
    if is_packed(fmt):
        codes = unpack_codes(qdata.view(-1), qdata.shape[0] * width, fmt)
    else:
        codes = _padded(qdata.reshape(len(parameters[0]), columns), width).view(-1)
    values = decode_blocks(codes, tuple(p.reshape(-1) if p.dim() else p for p in parameters), quant)
    return values.view(-1, width)[:, :columns].reshape(shape)


def _padded(rows: Tensor, width: int) -> Tensor:
    out = rows.new_zeros((rows.shape[0], width))
    out[:, : rows.shape[1]] = rows
    return out


# --- predicted scaling ---------------------------------------------------------------------------------------------


def is_predicted(quant: object) -> bool:
    """Whether the scale of this slot comes from a bound."""
    return isinstance(quant, Quant) and quant.scaling.method == "predicted"


def stored_amax(state: Mapping[str, Tensor], slot: str, quant: Quant) -> Tensor:
    """A, float32 0-d: what predicted `slot` holds is at most A (1 + 2^-man), man of its format; no look at the codes.

    The last amax, plus the smallest step of the scale it was written with: a value below that step may have been
    rounded up to it. An amax of 0 is 0.
    """
    amax = state[f"{slot}_amax"]
    smallest = get_format(quant.format).tiny
    return torch.where(amax > 0, amax + state[f"{slot}_scale"] * smallest, 0.0)


def rounding_bound(quant: Quant) -> float:
    """1 + 2^-man of the slot's format, by which rounding can enlarge a value."""
    fmt = get_format(quant.format)
    return 1.0 + 2.0**-fmt.man if isinstance(fmt, Format) else 2.0
