# SPDX-License-Identifier: Apache-2.0
"""All slots of one parameter: which they are, how they begin, and where its weight is.

    float32 Parameter            it is its own master
    16-bit, master a Quant       the master lives in the state, in low precision; Parameter = cast(master)
    16-bit, master "float32"     the same in float32, under `master`
    bfloat16, master a Residual  the Parameter holds the high bits, `master_residual` the low (`numerics.residual`)
    16-bit, no master            the Parameter is updated in place, rounded as `states.update` says
    any, `states.weight`         it holds that format's values: of a master in the state, or beside a `round_off` there

An element of a Parameter that somebody edited (loading weights, merging an adapter) no longer equals cast(master);
there the Parameter wins and the master follows. An edited Parameter keeps its residual, which makes the master differ
from the edit by at most half an ulp of bfloat16; with a round-off it is less than an ulp of that format.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_lowprec.formats import get_format
from hf_lowprec.numerics import counter_hash, round_to_format
from hf_lowprec.numerics.residual import join, rejoin, residual_dtype, split
from hf_lowprec.optim.shards import Shard, shard_of
from hf_lowprec.optim.slots import hp_dtype, pack, read, select_, stream_seed, write
from hf_lowprec.recipe import Quant, Residual, Rounding, RoundOff, States

Slot = Quant | Residual | str | None
ADAM = ("exp_avg", "exp_avg_sq")
_HALF = (torch.float16, torch.bfloat16)
_FORMAT = {torch.float16: get_format("e5m10"), torch.bfloat16: get_format("e8m7")}


def check_parameter(param: Tensor) -> None:
    """Raises TypeError where these states have no meaning: integers, complex numbers, shards other than FSDP2's."""
    if not param.dtype.is_floating_point or param.dtype.itemsize < 2:
        raise TypeError(f"parameters must be float64, float32, bfloat16 or float16, got {param.dtype}")
    if getattr(param, "_is_flat_param", False):
        raise TypeError(
            f"{type(param).__name__}: this optimizer does not take FSDP1's flat parameters, which do not say whose "
            "rows they hold. Use FSDP2 (fully_shard; fsdp_version=2), or torch.optim.AdamW and a recipe without "
            "states (`fp8-lm-o1`)"
        )
    shard_of(param)


@functools.lru_cache(maxsize=1024)
def _layout(states: States, dtype: torch.dtype, moments: tuple[str, ...]) -> dict[str, Slot]:
    kept = {"exp_avg": states.exp_avg, "exp_avg_sq": states.exp_avg_sq, "momentum_buffer": states.exp_avg}
    slots: dict[str, Slot] = {name: kept[name] for name in moments}
    if states.weight is not None:
        _check_holds(dtype, states.weight)
        if isinstance(states.master, RoundOff):
            return {**slots, "round_off": states.master.residual}
        return {**slots, "master": states.master}
    if states.master is not None and dtype in _HALF:
        assert not isinstance(states.master, RoundOff)  # States, and `named.effective`
        if isinstance(states.master, Residual) and dtype != torch.bfloat16:
            raise ValueError(
                f"master 'bf16+{states.master.bits}' holds the low bits of a bfloat16 Parameter, this one is {dtype}; "
                "use master 'fp32', 'fp16-scaled', 'sr' or None"
            )
        slots["master"] = states.master
    return slots


def _check_holds(dtype: torch.dtype, quant: Quant) -> None:
    """Raises ValueError: a Parameter of `dtype` cannot hold the values of `quant` exactly, whatever their scale."""
    if dtype == torch.float16 and quant.scaling.method != "none":
        raise ValueError(
            f"weight {quant.format} with a scale may leave the range of a float16 Parameter: load the model in "
            "bfloat16 or float32"
        )
    if quant.scaling.method == "none":
        round_to_format(torch.zeros((), dtype=dtype), quant.format)


def layout(states: States, dtype: torch.dtype, moments: Sequence[str] = ADAM) -> dict[str, Slot]:
    """The slots of a Parameter of `dtype` under (effective) `states`, moments first; None is float32.

    moments: `ADAM`; ("exp_avg",) for Lion; ("momentum_buffer",) or () for SGD.
    Only a 16-bit Parameter has a master, unless `states.weight` is set: then every one has, or a `round_off`.
    Raises ValueError: a residual beside a float16 Parameter; a Parameter that cannot hold its values.
    """
    cached = not torch.compiler.is_compiling()  # Dynamo warns of caches, and looks through them
    return dict((_layout if cached else _layout.__wrapped__)(states, dtype, tuple(moments)))


def init_state(
    param: Tensor, states: States, moments: Sequence[str] = ADAM, *, shard: Shard | None = None
) -> dict[str, Tensor]:
    """Zero moments, step 0 and, where `layout` has one, the master: `param` itself, rounded to nearest.

    shard: whose rows `param` is.
    """
    check_parameter(param)
    zeros = torch.zeros_like(param, dtype=hp_dtype(param), memory_format=torch.contiguous_format)
    state = {"step": torch.zeros((), dtype=torch.float32, device=param.device)}
    for name, slot in layout(states, param.dtype, moments).items():
        if name == "master":
            state.update(make_master(param, slot, shard))
        elif name == "round_off":
            assert isinstance(slot, Quant)
            state.update(pack(name, slot, zeros.float(), shard=shard and shard.alone(), copy=True))
        else:
            assert slot is None or isinstance(slot, Quant)
            state.update(pack(name, slot, zeros, shard=shard and shard.alone(), copy=True))
    return state


def make_master(param: Tensor, slot: Slot, shard: Shard | None = None) -> dict[str, Tensor]:
    """The master's tensors for a Parameter that has just been loaded; nothing rounds but a Quant, to nearest."""
    if isinstance(slot, Residual):
        dtype = residual_dtype(slot.bits)
        return {"master_residual": torch.zeros(param.shape, dtype=dtype, device=param.device)}
    if isinstance(slot, Quant):
        return pack("master", slot, param.detach(), shard=shard, copy=True)
    # A copy: beside `states.weight` a float32 Parameter has a master, too.
    return {"master": param.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)}


def state_bytes(
    states: States,
    dtype: torch.dtype,
    numel: int | Sequence[int],
    moments: Sequence[str] = ADAM,
    *,
    sharded: bool = False,
) -> int:
    """Bytes of all state tensors of a Parameter of `numel` elements (or of that shape), under effective `states`.

    sharded: on all ranks together.
    """
    shape = (numel,) if isinstance(numel, int) else tuple(numel)
    return sum(value.nbytes for value in blank_state(states, dtype, shape, tuple(moments), sharded=sharded).values())


@functools.lru_cache(maxsize=4096)
def blank_state(
    states: States, dtype: torch.dtype, shape: tuple[int, ...], moments: tuple[str, ...], *, sharded: bool = False
) -> Mapping[str, Tensor]:
    """`init_state` without memory, for its keys, shapes and dtypes. sharded: of a shard of that shape."""
    param = torch.empty(shape, dtype=dtype, device="meta")
    shard = Shard(param.shape, 0, shape[0] if shape else 1) if sharded else None
    return init_state(param, states, moments, shard=shard)


# --- the weight ----------------------------------------------------------------------------------------------------


def read_weight(state: Mapping[str, Tensor], param: Tensor, states: States, shard: Shard | None = None) -> Tensor:
    """What is updated, in high precision: the Parameter, its master, or Parameter + residual. Only read it.

    shard: whose rows `param` is; needed by `states.weight` only.
    """
    slots = layout(states, param.dtype, ())
    slot = slots.get("master")
    if isinstance(slot, Residual):
        return join(param.detach(), state["master_residual"])
    weight = param.detach().to(hp_dtype(param))
    if "round_off" in slots:
        assert states.weight is not None and isinstance(slots["round_off"], Quant)
        rest = read(state, "round_off", slots["round_off"], weight.dtype, param.shape)
        return rejoin(weight, rest, functools.partial(on_grid, quant=states.weight, shard=shard))
    if slot is None:
        return weight
    quant = slot if isinstance(slot, Quant) else None
    master = read(state, "master", quant, weight.dtype, param.shape)
    return torch.where(_parameter(master, param.dtype, states, shard) == param.detach(), master, weight)


def write_weight(
    state: Mapping[str, Tensor],
    param: Tensor,
    states: States,
    weight: Tensor,
    *,
    index: int,
    step: Tensor,
    finite: Tensor | None,
    bound: Tensor | None = None,
    start: int = 0,
    shard: Shard | None = None,
) -> None:
    """Stores the updated `weight` in the master, if there is one, and in the Parameter, or nothing if not `finite`.

    index, step: of the parameter and of this step, see `stream_seed`. bound: of a predicted master. start: flat index
    at which `weight` begins, where all of this is a slice, or the rows of `shard`.
    """
    target = param.detach()
    slots = layout(states, param.dtype, ())
    slot = slots.get("master")
    if "round_off" in slots:
        rest = slots["round_off"]
        assert states.weight is not None and isinstance(rest, Quant)
        new = on_grid(weight, states.weight, shard)
        seed = stream_seed(rest.rounding, index, "master", step)
        write(state, "round_off", rest, weight - new, finite=finite, seed=seed, start=start, shard=shard)
    elif isinstance(slot, Residual):
        words = _words(slot.rounding, index, "master", step, weight, start)
        new, residual = split(weight, slot.bits, words)
        select_(state["master_residual"], residual, finite)
    elif slot is not None:
        quant = slot if isinstance(slot, Quant) else None
        seed = None if quant is None else stream_seed(quant.rounding, index, "master", step)
        write(state, "master", quant, weight, finite=finite, seed=seed, bound=bound, start=start, shard=shard)
        # Where the step is refused, this is the cast of the old master, and is not stored either.
        new = _parameter(read(state, "master", quant, weight.dtype, param.shape), param.dtype, states, shard)
    elif param.dtype in _FORMAT:
        words = _words(states.update, index, "parameter", step, weight, start)
        new = round_to_format(weight, _FORMAT[param.dtype], states.update, words=words).to(param.dtype)
    else:
        new = weight
    select_(target, new, finite)


def _words(rounding: Rounding, index: int, stream: str, step: Tensor, like: Tensor, start: int) -> Tensor | None:
    seed = stream_seed(rounding, index, stream, step)
    if seed is None:
        return None
    return counter_hash(seed, like.numel(), start=start, device=like.device).view(like.shape)


def _cast(master: Tensor, dtype: torch.dtype) -> Tensor:
    """To nearest, saturating: a scaled float16 master reaches beyond float16's own largest value."""
    limit = torch.finfo(dtype).max
    return master.clamp(-limit, limit).to(dtype)


def _parameter(master: Tensor, dtype: torch.dtype, states: States, shard: Shard | None) -> Tensor:
    """What the Parameter holds of a master."""
    return _cast(master if states.weight is None else on_grid(master, states.weight, shard), dtype)


def on_grid(values: Tensor, quant: Quant, shard: Shard | None = None) -> Tensor:
    """`values` rounded to `quant`, codes times scale, in their dtype. Of a shard, all ranks share the scale."""
    packed = pack("weight", quant, values, shard=shard)
    return read(packed, "weight", quant, values.dtype, values.shape)


def round_result(value: Tensor, states: States, stream: str, *, index: int, step: Tensor, start: int = 0) -> Tensor:
    """The result of an AXPY in the precision of `states.arithmetic`; itself, if there is none.

    stream: `l2`, the moment's name, or `master`; index, step, start: as in `write_weight`.
    """
    quant = states.arithmetic
    if quant is None:
        return value
    words = _words(quant.rounding, index, stream, step, value, start)
    return round_to_format(value, quant.format, quant.rounding, quant.overflow, words=words)
