# SPDX-License-Identifier: Apache-2.0
"""State dicts of bitsandbytes' optimizers (0.44 and newer), both ways; bitsandbytes itself is not needed.

    bitsandbytes                                  here (states "8bit")
    state1, state2     uint8 codes                exp_avg_qdata, exp_avg_sq_qdata (SGD: momentum_buffer_qdata)
    absmax1, absmax2   float32 per 256 elements   the same slots' _scale; 0 of an all-zero block is 1 here
    qmap1, qmap2       the codebooks, 256 values  `dynamic8`, `dynamic8u`: in no state (ours are bit-equal)
    state1, state2     float32 (small tensors)    exp_avg, exp_avg_sq
    step               int                        float32 0-d

Codes and absmax pass unchanged where both sides keep 8 bits. Where they do not (embeddings; states of another name)
values are read and, coming in, quantised to what the optimizer keeps. What bitsandbytes computes differently: its
Adam8bit decouples weight decay as AdamW8bit does; its SGD ignores dampening and Nesterov; 16-bit weights are rounded
to nearest, ours stochastically; it knows no master.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_lowprec.formats import get_format
from hf_lowprec.optim import overrides
from hf_lowprec.optim import states as st
from hf_lowprec.optim.base import LowPrecOptimizer
from hf_lowprec.optim.shards import is_sharded
from hf_lowprec.recipe import Quant, Scaling, States

_NESTED = "__bnb_optimizer_quant_state__"  # hides what is not shaped like the parameter from FSDP1
_BLOCK = Scaling(granularity="block", block=(256,))
_QUANTISED = ("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2")
_SAME = ("lr", "weight_decay", "initial_lr")  # group entries of one name and meaning


def load_bitsandbytes(optimizer: LowPrecOptimizer, state_dict: Mapping[str, Any]) -> None:
    """Loads what `state_dict()` of bitsandbytes' AdamW8bit, Adam8bit, Lion8bit or SGD8bit (or the 32-bit and paged
    classes of these) returned into our optimizer of the same algorithm, over the same parameters in the same groups.

    Moments, steps and hyperparameters come from the checkpoint, masters from the Parameters. Everything is checked
    first; nothing has changed when it raises. (One moment alone does not tell Lion from SGD or RMSprop: it is the
    caller who knows what was saved.)

    Raises ValueError: another number of moments or parameters; a codebook, block size or optimizer (LAMB, LARS,
    AdEMAMix) that has no counterpart; Adam's coupled weight decay, which bitsandbytes does not have; shards.
    """
    _check_whole(optimizer)
    own = optimizer.state_dict()
    groups = deepcopy(own["param_groups"])
    theirs = state_dict.get("param_groups")
    if theirs is None or "state" not in state_dict:
        raise ValueError("not an optimizer's state_dict: it lacks state or param_groups")
    counts = [[len(group["params"]) for group in source] for source in (groups, theirs)]
    if counts[0] != counts[1]:
        raise ValueError(f"parameters per group: the optimizer has {counts[0]}, the checkpoint {counts[1]}")
    state: dict[int, dict[str, Tensor]] = {}
    known: set[Any] = set()
    for number, (group, loaded) in enumerate(zip(groups, theirs, strict=True)):
        _take_hyperparameters(group, loaded)
        live = optimizer.param_groups[number]
        for position, (mine, key) in enumerate(zip(group["params"], loaded["params"], strict=True)):
            known.add(key)
            if live["overrides"][position] is None and overrides.is_embedding(live["params"][position]):
                group["overrides"][position] = overrides.embedding_name(live)
            if state_dict["state"].get(key):
                state[mine] = _incoming(state_dict["state"][key], live, position, f"state of parameter {key}")
    if unknown := set(state_dict["state"]) - known:
        raise ValueError(f"the checkpoint has a state for {sorted(unknown)}, which is in none of its groups")
    optimizer.load_state_dict({**own, "state": state, "param_groups": groups})


def to_bitsandbytes(optimizer: LowPrecOptimizer) -> dict[str, Any]:
    """The state dict that bitsandbytes' class of the same algorithm loads. Tensors are copies.

    Raises ValueError: StableAdamW; states other than `8bit` and float32; coupled weight decay, `maximize`, Nesterov or
    dampening, which bitsandbytes would silently leave out. Warns that masters are left behind, where there are some.
    """
    _check_whole(optimizer)
    own = optimizer.state_dict()
    out: dict[str, Any] = {"state": {}, "param_groups": []}
    masters = False
    for number, group in enumerate(own["param_groups"]):
        out["param_groups"].append(_outgoing_group(group))
        live = optimizer.param_groups[number]
        for position, key in enumerate(group["params"]):
            values = own["state"].get(key)
            if not values:
                continue
            label = f"state of parameter {live.get('param_names', group['params'])[position]}"
            out["state"][key] = _outgoing(values, live, position, label)
            masters |= any(name.startswith("master") for name in values)
    if masters:
        warnings.warn("bitsandbytes keeps no master: it goes on from the 16-bit Parameters", stacklevel=2)
    return out


def _check_whole(optimizer: LowPrecOptimizer) -> None:
    """Raises ValueError: sharded parameters."""
    if is_sharded(p for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "bitsandbytes' blocks cross rows, so they do not fit FSDP2's shards: convert without sharding"
        )


# --- groups ---------------------------------------------------------------------------------------------------------


def _moments(group: Mapping[str, Any]) -> tuple[str, ...]:
    """The slots that stand for state1 and state2. Raises ValueError where bitsandbytes has no such optimizer."""
    algorithm = group["algorithm"]
    if algorithm == "stable_adam":
        raise ValueError("bitsandbytes has no StableAdamW: its moments are corrected otherwise; use AdamW")
    if algorithm == "sgd" and not group["momentum"]:
        raise ValueError("bitsandbytes has no SGD without momentum")
    moments = {"adam": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",), "sgd": ("momentum_buffer",)}
    return moments[algorithm]


def _check_same_algorithm(group: Mapping[str, Any]) -> None:
    """Raises ValueError for what the group asks for and bitsandbytes does not compute."""
    if group["algorithm"] == "adam" and group["weight_decay"] and not group["decoupled_weight_decay"]:
        raise ValueError("bitsandbytes decouples weight decay in Adam8bit, too; use hf_lowprec.optim.AdamW")
    for name in ("maximize", "nesterov", "dampening"):
        if group.get(name):
            raise ValueError(f"bitsandbytes ignores {name}={group[name]!r}")


def _take_hyperparameters(group: dict[str, Any], loaded: Mapping[str, Any]) -> None:
    """The checkpoint's into our group, as `load_state_dict` does."""
    for name in _SAME:
        if name in loaded:
            group[name] = loaded[name]
    if group["algorithm"] == "sgd":
        group["momentum"] = loaded["betas"][0]
    else:
        group["betas"] = tuple(loaded["betas"][:2])
    if group["algorithm"] == "adam":
        group["eps"] = loaded["eps"]
    _moments(group)
    _check_same_algorithm(group)


def _outgoing_group(group: Mapping[str, Any]) -> dict[str, Any]:
    _moments(group)
    _check_same_algorithm(group)
    out = {name: _number(group[name]) for name in _SAME if name in group}
    betas = (group["momentum"], 0.0) if group["algorithm"] == "sgd" else tuple(group["betas"])
    out |= {"betas": betas, "eps": group.get("eps", 0.0), "params": list(group["params"])}
    if group["algorithm"] == "adam":  # as Optimizer2State writes them
        out |= {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
    return out


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


# --- one parameter --------------------------------------------------------------------------------------------------


def _layout(group: Mapping[str, Any], position: int) -> tuple[Tensor, States, dict[str, Any]]:
    param = group["params"][position]
    states = overrides.of_parameter(group, position, param.numel(), marked=overrides.is_embedding(param))
    return param, states, st.layout(states, param.dtype, _moments(group))


def _is_8bit(quant: Any) -> bool:
    """Whether `quant` is the layout of bitsandbytes, whatever it does with values that round to zero."""
    known = isinstance(quant, Quant) and quant.format in ("dynamic8", "dynamic8u")
    return known and quant.scaling == _BLOCK and quant.compand == "none"


def _incoming(found: Mapping[str, Any], group: Mapping[str, Any], position: int, label: str) -> dict[str, Tensor]:
    param, states, layout = _layout(group, position)
    found = {**found, **found.get(_NESTED, {})}
    found.pop(_NESTED, None)
    moments = _moments(group)
    wanted = {f"state{i + 1}" for i in range(len(moments))}
    allowed = {"step", *wanted, *(f"{kind}{name[-1]}" for name in wanted for kind in ("qmap", "absmax"))}
    if missing := (wanted | {"step"}) - set(found):
        raise ValueError(f"{label}: the checkpoint lacks {', '.join(sorted(missing))}; of another optimizer?")
    if extra := set(found) - allowed:
        raise ValueError(f"{label}: {', '.join(sorted(extra))} belong to another optimizer or an old bitsandbytes")
    values: dict[str, Tensor] = {"step": torch.as_tensor(found["step"], dtype=torch.float32).reshape(())}
    passed: dict[str, Tensor] = {}
    for i, name in enumerate(moments, start=1):
        codes = found[f"state{i}"]
        if codes.shape != param.shape:
            raise ValueError(f"{label}: state{i} is {tuple(codes.shape)}, the parameter {tuple(param.shape)}")
        if codes.dtype != torch.uint8:
            values[name] = codes.float()
            continue
        codes, scale = _checked_codes(found, i, signed=name != "exp_avg_sq", label=label)
        values[name] = _decode(codes, scale, "dynamic8" if name != "exp_avg_sq" else "dynamic8u")
        if _is_8bit(layout[name]):
            passed |= {f"{name}_qdata": codes.to(param.device), f"{name}_scale": scale.to(param.device)}
    return {**st.from_torch(values, states, param, label, moments), **passed}


def _checked_codes(found: Mapping[str, Any], i: int, *, signed: bool, label: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of state number i; blocks that were never written (absmax 0) hold the code of zero."""
    codes, absmax, qmap = found[f"state{i}"], found.get(f"absmax{i}"), found.get(f"qmap{i}")
    if absmax is None or qmap is None:
        raise ValueError(f"{label}: state{i} has 8 bits, but no absmax{i} or no qmap{i} beside it")
    if absmax.numel() != -(-codes.numel() // _BLOCK.block[0]):
        raise ValueError(f"{label}: absmax{i} is not one per 256 elements, as bitsandbytes has it since 0.44")
    values = torch.tensor(_values(signed))
    if not torch.equal(qmap.float().cpu(), values):
        raise ValueError(f"{label}: qmap{i} is not the dynamic codebook of bitsandbytes' optimizers")
    absmax = absmax.float().flatten()
    unused = _per_element(absmax == 0, codes)
    zero = torch.tensor(_values(signed).index(0.0), dtype=torch.uint8, device=codes.device)
    return torch.where(unused, zero, codes), torch.where(absmax == 0, torch.ones_like(absmax), absmax)


def _values(signed: bool) -> tuple[float, ...]:
    return cast(tuple[float, ...], get_format("dynamic8" if signed else "dynamic8u").values)  # type: ignore[union-attr]


def _per_element(per_block: Tensor, like: Tensor) -> Tensor:
    return per_block.repeat_interleave(_BLOCK.block[0])[: like.numel()].reshape(like.shape)


def _decode(codes: Tensor, scale: Tensor, name: str) -> Tensor:
    table = torch.tensor(_values(name == "dynamic8"), device=codes.device)
    return table[codes.int()] * _per_element(scale, codes)


def _outgoing(values: Mapping[str, Tensor], group: Mapping[str, Any], position: int, label: str) -> dict[str, Any]:
    param, _, layout = _layout(group, position)
    nested: dict[str, Tensor] = {}
    for i, name in enumerate(_moments(group), start=1):
        quant = layout[name]
        if quant is None:
            nested[f"state{i}"] = values[name].detach().to(torch.float32, copy=True)
            continue
        if not _is_8bit(quant):
            raise ValueError(
                f"{label}: {name} is kept as {quant.format}; bitsandbytes knows 8bit and fp32 states only"
            )
        signed = quant.format == "dynamic8"
        codes, scale = values[f"{name}_qdata"].reshape(param.shape).clone(), values[f"{name}_scale"]
        written = codes.flatten() != _values(signed).index(0.0)
        block = _BLOCK.block[0]
        used = F.pad(written, (0, -codes.numel() % block)).view(-1, block).any(1)  # absmax 0 where all is zero
        nested |= {f"state{i}": codes, f"absmax{i}": scale * used}
        nested[f"qmap{i}"] = torch.tensor(_values(signed), device=codes.device)
    return {"step": int(values["step"].item()), _NESTED: nested}
