# SPDX-License-Identifier: Apache-2.0
"""What Adam remembers of a parameter, and in which precision.

A parameter has up to three *slots*: `exp_avg`, `exp_avg_sq` and, where the Parameter is held in 16 bits and the recipe
wants one, `master`. `recipe.States` gives each slot a `Quant` or None. None keeps a plain float32 tensor under the
slot's name; a Quant keeps codes under `<slot>_qdata` and their scale under `<slot>_scale`, each tensor its own
(FP8-LM, arXiv 2310.18313, section 2.2). A slot is read to float32, updated and written back; between two steps nothing
but the codes and the scales exists.

Codes never stand under the slot's own name: torch.optim.AdamW, given such a checkpoint, would take them for moments,
leave out the scale and train on. Without the name it stops at its first step with KeyError: 'exp_avg'.

Writing never decides on the host: `finite`, a 0-d bool on the device, selects between the new codes and the old ones,
so a step with a non-finite gradient leaves every bit as it was without anybody waiting for the GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.optim import Optimizer

from hf_lowprec import ops
from hf_lowprec.numerics import ScaledTensor, dequantize
from hf_lowprec.recipe import DECOUPLING, FP8_LM_STATES, PRESETS, Quant, Rounding, States

_NAMED: dict[str, States] = {
    "fp32": States(),
    "fp8-lm": FP8_LM_STATES,
    **{name: recipe.states for name, recipe in PRESETS.items() if recipe.states is not None},
    **DECOUPLING,
}
_ADAPTER = TypeAdapter(States)
_NEAREST = Rounding()
_HALF = (torch.float16, torch.bfloat16)
_STREAMS = ("exp_avg", "exp_avg_sq", "master", "parameter", "grad")  # whoever rounds stochastically, numbered


# --- the recipe ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def resolve_states(states: str | States) -> States:
    """`states` by name (`fp32`, `fp8-lm`, `#0` ... `#3` of FP8-LM's table 6, any that `states_name` gave), or itself.

    Raises ValueError: unknown name; `#4` (with the reason); scalings that an optimizer state cannot have.
    """
    if isinstance(states, str):
        states = _parse(states)
    for slot in ("exp_avg", "exp_avg_sq", "master"):
        quant = getattr(states, slot)
        if quant is not None and quant.scaling.method == "delayed":
            raise ValueError(f"states.{slot}: delayed scaling is for GEMM operands; a state is scaled by its own amax")
    return states


def _parse(name: str) -> States:
    if name in _NAMED:
        return _NAMED[name]
    try:
        if name == "#4":  # States itself knows why not
            return replace(FP8_LM_STATES, exp_avg_sq=FP8_LM_STATES.exp_avg)
        if name.startswith("{"):
            return _ADAPTER.validate_json(name)
    except ValidationError as error:
        reason = "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())
        raise ValueError(f"states {name!r}: {reason}") from None
    raise ValueError(f"unknown states {name!r}; known: {', '.join(_NAMED)}, or a hf_lowprec.recipe.States")


@functools.lru_cache(maxsize=64)
def states_name(states: str | States) -> str:
    """The name of `states`, or its JSON where it has none: plain text that a checkpoint can hold and compare."""
    resolved = resolve_states(states)
    for name, known in _NAMED.items():
        if resolved == known:
            return name
    return _ADAPTER.dump_json(resolved, exclude_defaults=True).decode()


# --- one parameter's slots -----------------------------------------------------------------------------------------


def check_parameter(param: Tensor) -> None:
    """Raises TypeError where these states have no meaning: integer or complex parameters, shards of parameters."""
    if not param.dtype.is_floating_point or param.dtype.itemsize < 2:
        raise TypeError(f"parameters must be float64, float32, bfloat16 or float16, got {param.dtype}")
    if hasattr(param, "to_local") or getattr(param, "_is_flat_param", False):
        raise TypeError(
            f"{type(param).__name__}: this optimizer does not take sharded parameters (FSDP): ranks would scale their "
            "shards differently and skip steps alone. Use torch.optim.AdamW and a recipe without states (`fp8-lm-o1`)"
        )


def check_adoptable(optimizer: Optimizer) -> None:
    """Raises, unless torch's Adam(W) can go on with these states.

    TypeError: a mode that they do not have, or parameters that `check_parameter` refuses. ValueError: it has loaded
    low-precision states, which torch casts to the parameters' dtype.
    """
    for mode in ("amsgrad", "differentiable"):
        if any(group.get(mode) for group in optimizer.param_groups):
            raise TypeError(
                f"cannot adopt an optimizer with {mode}=True: low-precision states have no such mode; "
                "use recipe fp8-lm-o1 or te-delayed, which keep your optimizer"
            )
    for param in (p for group in optimizer.param_groups for p in group["params"]):
        check_parameter(param)
    if any(key.endswith("_qdata") for state in optimizer.state.values() for key in state):
        raise ValueError(
            "a checkpoint with low-precision states was loaded into the torch optimizer before it was prepared: "
            "load the checkpoint after prepare"
        )


def layout(states: States, param: Tensor) -> dict[str, Quant | None]:
    """The slots of `param`. Only a 16-bit Parameter has a master; a float32 one is its own."""
    slots = {"exp_avg": states.exp_avg, "exp_avg_sq": states.exp_avg_sq}
    if states.master is not None and param.dtype in _HALF:
        slots["master"] = states.master
    return slots


def hp_dtype(param: Tensor) -> torch.dtype:
    """The dtype in which `param` is updated: float32, or float64 for a float64 Parameter."""
    return torch.promote_types(param.dtype, torch.float32)


def init_state(param: Tensor, states: States) -> dict[str, Tensor]:
    """Zero moments, step 0 and, where `layout` has one, the master: `param` itself, rounded to nearest."""
    check_parameter(param)
    zeros = torch.zeros_like(param, dtype=hp_dtype(param), memory_format=torch.contiguous_format)
    values = {"exp_avg": zeros, "exp_avg_sq": zeros, "master": param.detach()}
    state = {"step": torch.zeros((), dtype=torch.float32, device=param.device)}
    for name, quant in layout(states, param).items():
        state.update(_pack(name, quant, values[name], copy=True))
    return state


def read(state: Mapping[str, Tensor], name: str, quant: Quant | None, dtype: torch.dtype) -> Tensor:
    """Slot `name` in high precision, in the parameter's shape. Without a Quant it is the state: only read it."""
    if quant is None:
        return state[name]
    qdata = state[f"{name}_qdata"]
    value = dequantize(ScaledTensor(matrix(qdata), state[f"{name}_scale"]), quant, dtype)
    return value.reshape(qdata.shape)


def write(
    state: Mapping[str, Tensor],
    name: str,
    quant: Quant | None,
    value: Tensor,
    *,
    finite: Tensor,
    seed: Tensor | None = None,
) -> None:
    """Quantises `value` into slot `name` in place, or keeps the old bits where `finite` (0-d bool) is False."""
    for key, new in _pack(name, quant, value, seed=seed).items():
        select_(state[key], new, finite)


def select_(target: Tensor, new: Tensor, finite: Tensor) -> None:
    """`target = new if finite else target`, in place, bit for bit, without reading `finite` on the host."""
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


def _pack(
    name: str, quant: Quant | None, value: Tensor, *, seed: Tensor | None = None, copy: bool = False
) -> dict[str, Tensor]:
    if quant is None:
        return {name: value.to(hp_dtype(value), copy=copy)}
    if seed is None and quant.rounding.mode == "stochastic":  # a first conversion has no step to draw from
        quant = replace(quant, rounding=_NEAREST)
    qdata, scale = ops.quantize(matrix(value), ops.quant_key(quant), seed=seed)
    return {f"{name}_qdata": qdata.reshape(value.shape), f"{name}_scale": scale}


def matrix(x: Tensor) -> Tensor:
    """Scalars and vectors as one row, so that row, column and tile scalings mean something for them too."""
    return x.reshape(1, -1) if x.ndim < 2 else x


# --- checkpoints ---------------------------------------------------------------------------------------------------


def check_state(state: Mapping[str, Any], states: States, param: Tensor, label: str) -> None:
    """Raises ValueError saying what is wrong with the loaded `state` of `param`; changes nothing.

    Checked: exactly the keys of `layout`, their shapes and dtypes, finite and positive scales, finite values, a
    non-negative second moment and step.
    """
    expected = {"step": torch.zeros(()), **_expected(states, param)}
    _same_keys(set(state), set(expected), label)
    for key, like in expected.items():
        value = state[key]
        if not isinstance(value, Tensor):
            raise ValueError(f"{label}: {key} is a {type(value).__name__}, not a tensor")
        if value.shape != like.shape or value.dtype != like.dtype:
            want, got = f"{like.dtype} {tuple(like.shape)}", f"{value.dtype} {tuple(value.shape)}"
            raise ValueError(f"{label}: {key} should be {want}, the checkpoint holds {got}")
        if key.endswith("_scale") and not _all(value.float().isfinite() & (value.float() > 0)):
            raise ValueError(f"{label}: {key} holds a scale that is not finite and positive; the file is corrupt")
    if not _all(state["step"].isfinite() & (state["step"] >= 0)):
        raise ValueError(f"{label}: step is {state['step'].item()}")
    for name, quant in layout(states, param).items():
        try:
            value = read(state, name, quant, torch.float32)
        except IndexError:
            raise ValueError(f"{label}: {name}_qdata holds codes outside its format; the file is corrupt") from None
        if not _all(value.isfinite()):
            raise ValueError(f"{label}: {name} holds NaN or Inf; the file is corrupt")
        if name == "exp_avg_sq" and not _all(value >= 0):
            raise ValueError(f"{label}: exp_avg_sq holds negative values; the file is corrupt")


def _expected(states: States, param: Tensor) -> dict[str, Tensor]:
    shape = torch.empty(param.shape, dtype=param.dtype, device="meta")
    hp = shape.to(hp_dtype(param))
    return {
        key: like
        for name, quant in layout(states, param).items()
        for key, like in _pack(name, quant, shape if name == "master" else hp).items()
    }


def _same_keys(found: set[str], wanted: set[str], label: str) -> None:
    if missing := sorted(wanted - found):
        raise ValueError(f"{label}: the checkpoint lacks {', '.join(missing)}")
    if extra := sorted(found - wanted):
        hint = " (written for a 16-bit Parameter, this one is its own master)" if "master_qdata" in extra else ""
        raise ValueError(f"{label}: unexpected {', '.join(extra)} in the checkpoint{hint}")


def _all(condition: Tensor) -> bool:
    return bool(condition.all())


def from_torch(state: Mapping[str, Any], states: States, param: Tensor, label: str) -> dict[str, Tensor]:
    """The state of torch.optim.Adam(W) for `param`, quantised to `states`; the master is taken from `param`.

    Raises ValueError: amsgrad states, missing or misshapen moments, NaN or Inf in them.
    """
    check_parameter(param)
    if "max_exp_avg_sq" in state:
        raise ValueError(f"{label}: the checkpoint was written with amsgrad=True, which these states do not keep")
    _same_keys(set(state), {"step", "exp_avg", "exp_avg_sq"}, label)
    out = {"step": torch.as_tensor(state["step"], dtype=torch.float32).reshape(()).to(param.device, copy=True)}
    values = {"master": param.detach()}
    for name in ("exp_avg", "exp_avg_sq"):
        value = state[name]
        if not isinstance(value, Tensor) or value.shape != param.shape:
            raise ValueError(f"{label}: {name} does not have the parameter's shape {tuple(param.shape)}")
        if not _all(value.isfinite()):
            raise ValueError(f"{label}: {name} holds NaN or Inf")
        values[name] = value.to(param.device, hp_dtype(param))
    for name, quant in layout(states, param).items():
        out.update(_pack(name, quant, values[name], copy=True))
    return out


def to_bytes(value: Tensor) -> Tensor | tuple[Tensor, torch.dtype]:
    """A float8 tensor as its bytes and its dtype; any other as it is."""
    return (value.view(torch.uint8), value.dtype) if value.dtype.itemsize == 1 else value


def from_bytes(value: Tensor | tuple[Tensor, torch.dtype]) -> Tensor:
    """The inverse of `to_bytes`."""
    return value if isinstance(value, Tensor) else value[0].view(value[1])
