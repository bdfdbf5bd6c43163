# SPDX-License-Identifier: Apache-2.0
"""A call of a layer as a graph sees it: tensors, and the constants that the graph has baked in. No CUDA in here.

Two calls are of one kind if their keys are equal: the same nesting of arguments, the same constants (None, booleans,
numbers, names), tensors of the same shapes, strides, dtypes and devices that need gradients alike, under the same
autocast and the same switches of torch that choose kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.utils._device import DeviceContext

PLAIN = (Tensor, nn.Parameter)
CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_TENSOR = "tensor"
NO_CACHE = "; pass use_cache=False, or set model.config.use_cache = False: training does not read it"


class Opaque(Exception):
    """An argument or a result that a graph cannot hold; the message says what and why."""


class Call(NamedTuple):
    """key: what makes two calls one kind. spec: the nesting, with the constants. leaves: the tensors in order."""

    key: Hashable
    spec: Any
    leaves: list[Tensor]


def flatten(value: Any, what: str = "the arguments") -> tuple[list[Tensor], Any]:
    """Tensors of nested lists, tuples and dicts, and a hashable spec of all the rest. Raises Opaque."""
    leaves: list[Tensor] = []
    return leaves, _flatten(value, leaves, what)


def _flatten(value: Any, leaves: list[Tensor], what: str) -> Any:
    kind = type(value)
    if kind in PLAIN:
        leaves.append(value)
        return _TENSOR
    if kind in CONSTANTS or isinstance(value, Enum):
        return ("constant", kind, value)  # the type, too: True is 1
    if kind is dict:
        if not all(type(key) is str for key in value):
            raise Opaque(f"{what} hold a dict whose keys are no names")
        return (dict, tuple(value), tuple(_flatten(item, leaves, key) for key, item in value.items()))
    if kind in (list, tuple) or (issubclass(kind, tuple) and hasattr(kind, "_fields")):
        return (kind, tuple(_flatten(item, leaves, what) for item in value))
    if isinstance(value, Tensor):
        raise Opaque(f"{what}: a {kind.__name__} is no plain tensor")
    hint = NO_CACHE if "Cache" in kind.__name__ else ""
    raise Opaque(f"{what}: a {kind.__name__}, which a graph cannot hold{hint}")


def unflatten(spec: Any, leaves: Iterator[Any]) -> Any:
    """The inverse of `flatten`."""
    if spec == _TENSOR:
        return next(leaves)
    kind = spec[0]
    if kind == "constant":
        return spec[2]
    if kind is dict:
        return {key: unflatten(item, leaves) for key, item in zip(spec[1], spec[2], strict=True)}
    items = [unflatten(item, leaves) for item in spec[1]]
    if kind in (list, tuple):
        return kind(items)
    return kind(*items)


def call_of(args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> Call:
    """Raises Opaque: an argument that is no constant, or a tensor that a graph on `device` cannot read."""
    leaves, spec = flatten((args, kwargs))
    parts: list[Hashable] = [spec, environment(device.type)]
    for leaf in leaves:
        if leaf.device != device:
            raise Opaque(f"a tensor on {leaf.device} among the arguments of a layer on {device}")
        if leaf.layout is not torch.strided or leaf.is_inference():
            raise Opaque("an argument is a sparse tensor, or was made in inference mode")
        parts.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.requires_grad))
    return Call(tuple(parts), spec, leaves)


def environment(device: str) -> Hashable:
    """What beside the arguments decides which kernels run."""
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    cuda = torch.backends.cuda
    return (
        autocast, torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
        cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(),
    )  # fmt: skip


_GLOBAL_HOOKS = (
    _module._global_forward_hooks, _module._global_forward_pre_hooks,
    _module._global_backward_hooks, _module._global_backward_pre_hooks,
)  # fmt: skip
_saved_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks  # type: ignore[attr-defined]


def refusal(device: str) -> str | None:
    """Why a call that is made now must run eagerly, whatever its arguments; None: it need not."""
    if not torch.is_grad_enabled():
        return "no gradients"
    if torch._C._current_graph_task_id() != -1:
        return "recomputed in a backward pass"
    if _saved_hooks(True) is not None:
        return "hooks on saved tensors (checkpointing, offloading)"
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return "a mode or a transform of torch is on"
    if torch._C._len_torch_function_stack() and any(
        not isinstance(mode, DeviceContext) for mode in torch.overrides._get_current_function_mode_stack()
    ):
        return "a mode or a transform of torch is on"
    if torch.is_anomaly_enabled():
        return "anomaly detection is on"
    if any(_GLOBAL_HOOKS):
        return "hooks on all modules"
    if device == "cuda" and torch.cuda.is_current_stream_capturing():
        return "somebody else captures a graph"
    return None
