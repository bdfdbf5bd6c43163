# SPDX-License-Identifier: Apache-2.0
"""States on their way in and out of checkpoints: checked before anything changes, or made from torch's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_lowprec.formats import get_format
from hf_lowprec.optim.shards import local_of, shard_of
from hf_lowprec.optim.slots import hp_dtype, pack, read
from hf_lowprec.optim.weights import ADAM, blank_state, check_parameter, init_state, layout, make_master
from hf_lowprec.recipe import Quant, States


def check_adoptable(optimizer: Optimizer) -> None:
    """Raises, unless a torch optimizer can go on with these states.

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
    if any(key.endswith(("_qdata", "_residual")) for state in optimizer.state.values() for key in state):
        raise ValueError(
            "a checkpoint with low-precision states was loaded into the torch optimizer before it was prepared: "
            "load the checkpoint after prepare"
        )


def check_state(
    state: Mapping[str, Any],
    states: States,
    param: Tensor,
    label: str,
    moments: Sequence[str] = ADAM,
    *,
    sharded: bool = False,
) -> None:
    """Raises ValueError saying what is wrong with the loaded `state` of `param`; changes nothing.

    sharded: `param` is this rank's rows of a shard, and `state` theirs.

    Checked: exactly the keys of `init_state`, their shapes and dtypes, finite and positive scales, codes that exist,
    finite values, a non-negative second moment and step.
    """
    expected = blank_state(states, param.dtype, tuple(param.shape), tuple(moments), sharded=sharded)
    _same_keys(set(state), set(expected), label)
    for key, like in expected.items():
        value = state[key]
        if not isinstance(value, Tensor):
            raise ValueError(f"{label}: {key} is a {type(value).__name__}, not a tensor")
        if value.shape != like.shape or value.dtype != like.dtype:
            want, got = f"{like.dtype} {tuple(like.shape)}", f"{value.dtype} {tuple(value.shape)}"
            raise ValueError(f"{label}: {key} should be {want}, the checkpoint holds {got}")
    if not _all(state["step"].isfinite() & (state["step"] >= 0)):
        raise ValueError(f"{label}: step is {state['step'].item()}")
    for name, slot in layout(states, param.dtype, moments).items():
        if isinstance(slot, Quant):
            _check_parameters(state, name, slot, label)
        if slot is not None and not isinstance(slot, (Quant, str)):
            continue  # every residual is one
        quant = slot if isinstance(slot, Quant) else None
        try:
            value = read(state, name, quant, torch.float32, param.shape)
        except IndexError:
            raise ValueError(f"{label}: {name}_qdata holds codes outside its format; the file is corrupt") from None
        if not _all(value.isfinite()):
            raise ValueError(f"{label}: {name} holds NaN or Inf; the file is corrupt")
        if name == "exp_avg_sq" and not _all(value >= 0):
            raise ValueError(f"{label}: exp_avg_sq holds negative values; the file is corrupt")


def _check_parameters(state: Mapping[str, Tensor], name: str, quant: Quant, label: str) -> None:
    """Scales, powers and centers are finite and positive; amaxes not negative."""
    for key in ("scale", "power", "center", "amax"):
        value = state.get(f"{name}_{key}")
        if value is None:
            continue
        low = value.float() >= 0 if key == "amax" or not _zero_code(quant) else value.float() > 0
        if not _all(value.float().isfinite() & low):
            raise ValueError(
                f"{label}: {name}_{key} holds a {key} that is not finite and positive; the file is corrupt"
            )


def _zero_code(quant: Quant) -> bool:
    """Whether some code is zero; otherwise a block of zeros has scale 0."""
    fmt = get_format(quant.format)
    return 0.0 in (fmt.values() if callable(fmt.values) else fmt.values)


def _same_keys(found: set[str], wanted: set[str], label: str) -> None:
    if missing := sorted(wanted - found):
        raise ValueError(f"{label}: the checkpoint lacks {', '.join(missing)}")
    if extra := sorted(found - wanted):
        master = {"master_qdata", "master_residual", "master"} & set(extra)
        hint = " (written for a 16-bit Parameter, this one is its own master)" if master else ""
        raise ValueError(f"{label}: unexpected {', '.join(extra)} in the checkpoint{hint}")


def _all(condition: Tensor) -> bool:
    return bool(condition.all())


def from_torch(
    state: Mapping[str, Any], states: States, param: Tensor, label: str, moments: Sequence[str] = ADAM
) -> dict[str, Tensor]:
    """The state of a torch optimizer for `param`, quantised to `states`; the master is taken from `param`.

    Of a DTensor the state of this rank's rows, from DTensors or whole tensors; a collective, where a scale is shared.
    torch's SGD keeps no `step`; it becomes 1, because its momentum exists.
    Raises ValueError: amsgrad states, missing or misshapen moments, NaN or Inf in them.
    """
    check_parameter(param)
    shard, param = shard_of(param), local_of(param)
    if "max_exp_avg_sq" in state:
        raise ValueError(f"{label}: the checkpoint was written with amsgrad=True, which these states do not keep")
    stepless = "momentum_buffer" in moments and "step" not in state
    _same_keys({*state, "step"} if stepless else set(state), {"step", *moments}, label)
    step = torch.as_tensor(1.0 if stepless else state["step"], dtype=torch.float32)
    out = {"step": step.reshape(()).to(param.device, copy=True)}
    for name, slot in layout(states, param.dtype, moments).items():
        if name == "master":
            out.update(make_master(param, slot, shard))
            continue
        if name == "round_off":
            out.update(
                {key: value for key, value in init_state(param, states, (), shard=shard).items() if key != "step"}
            )
            continue
        value = state[name]
        if shard is not None and isinstance(value, Tensor) and value.dim():
            value = shard.unwrap(value)
        if not isinstance(value, Tensor) or value.shape != param.shape:
            raise ValueError(f"{label}: {name} does not have the parameter's shape {tuple(param.shape)}")
        if not _all(value.isfinite()):
            raise ValueError(f"{label}: {name} holds NaN or Inf")
        assert slot is None or isinstance(slot, Quant)
        out.update(pack(name, slot, value.to(param.device, hp_dtype(param)), shard=shard, copy=True))
    return out


def to_bytes(value: Tensor) -> Tensor | tuple[Tensor, torch.dtype]:
    """A float8 tensor as its bytes and its dtype; any other as it is."""
    float8 = value.dtype.itemsize == 1 and value.is_floating_point()
    return (value.view(torch.uint8), value.dtype) if float8 else value


def from_bytes(value: Tensor | tuple[Tensor, torch.dtype]) -> Tensor:
    """The inverse of `to_bytes`."""
    return value if isinstance(value, Tensor) else value[0].view(value[1])
