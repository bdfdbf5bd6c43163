# SPDX-License-Identifier: Apache-2.0
"""What a graph of a layer depends on beside its arguments, and whether it is still so. No CUDA in here.

A graph reads and writes fixed addresses, and has baked in what Python decided while it was captured. So before every
replay the layer is compared with what it was: its modules and their classes, the objects and the addresses of its
Parameters and buffers, whether they train, plain attributes (modes, flags, names of adapters), what lies in lists and
dicts, fields of the config and of other objects, hooks, and of converted linears what their forward branches on. It
costs a microsecond or two per module.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import deque
from collections.abc import Iterator
from enum import Enum
from operator import is_not as _is_not
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_lowprec.graphs.calls import CONSTANTS, PLAIN
from hf_lowprec.modules.linear import LowPrecMixin, forward_is_replaced
from hf_lowprec.modules.state import LayerState

RUNNER = "_lowprec_graph"  # in a graphed layer's __dict__
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_INTERNAL = {*vars(nn.Module()), RUNNER} - {"training"}
_MISSING = object()
_OURS = ("hf_lowprec", "torch")  # whose objects change in a forward, and are looked at for what matters of them


class _Module(NamedTuple):
    name: str
    module: nn.Module
    kind: type
    children: dict[str, Any]
    hooks: tuple[int, ...]
    size: int  # of __dict__
    values: tuple[tuple[str, Any], ...]  # compared by value
    objects: tuple[tuple[str, Any], ...]  # compared by identity
    containers: tuple[tuple[str, Any, tuple[Any, ...]], ...]  # those among them with parts, which are compared, too


class _Tensor(NamedTuple):
    name: str
    owner: dict[str, Any]
    key: str
    tensor: Tensor
    address: int
    dtype: torch.dtype
    trains: bool


class _State(NamedTuple):
    name: str
    state: LayerState
    then: tuple[Any, ...]
    objects: tuple[Any, ...]


class Snapshot:
    """A layer as it is now.

    refusal: why it must run eagerly as it is, or None.
    parameters: those that train, each once.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._modules: list[_Module] = []
        self._tensors: list[_Tensor] = []
        self._states: list[_State] = []
        self._switches: list[tuple[str, Any, bool]] = []
        self._fields: dict[int, tuple[str, Any, tuple[tuple[str, Any], ...]]] = {}  # of objects, by their ids
        self.refusal: str | None = None
        for name, module in layer.named_modules():
            self._look(name or "the layer", module, outermost=module is layer)
        self.parameters = list({id(t.tensor): t.tensor for t in self._tensors if t.trains}.values())
        if self.refusal is None and not self.parameters:
            self.refusal = "nothing in it trains"

    def _refuse(self, why: str) -> None:
        self.refusal = self.refusal or why

    def _look(self, name: str, module: nn.Module, *, outermost: bool) -> None:
        own = module.__dict__
        # Those of the layer itself run outside of its forward.
        hooks = () if outermost else tuple(len(own[key]) for key in _HOOKS)
        if any(hooks):
            self._refuse(f"hooks on {name}")
        if outermost and forward_is_replaced(module):
            self._refuse("its forward was replaced on the instance")
        if getattr(module, "gradient_checkpointing", False) is True and module.training:
            self._refuse("gradient checkpointing")
        if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
            self._refuse("FSDP moves its weights")
        for owner in (module._parameters, module._buffers):
            for key, tensor in owner.items():
                if tensor is not None:
                    self._tensor(f"{name}.{key}", owner, key, tensor)
        values, objects, containers = [], [], []
        for key, value in own.items():
            if key in _INTERNAL:
                continue
            if isinstance(value, Tensor):
                self._tensor(f"{name}.{key}", own, key, value)
                if value.requires_grad:
                    self._refuse(f"{name}.{key} needs a gradient and is no Parameter")
            elif _is_constant(value):
                values.append((key, copy.deepcopy(value)))
            else:
                objects.append((key, value))
                if isinstance(value, _CONTAINERS):
                    containers.append((key, value, tuple(_parts(value))))
                if isinstance(getattr(value, "enabled", None), bool):  # of fused norms and MLPs
                    self._switches.append((f"{name}.{key}.enabled", value, value.enabled))
            if id(value) not in self._fields and _has_fields(value):
                known = _is_constant if key == "config" else _is_scalar  # others may hold a vocabulary
                fields = tuple((k, copy.deepcopy(v)) for k, v in vars(value).items() if known(v))
                self._fields[id(value)] = key if key == "config" else f"{name}.{key}", value, fields
        if isinstance(module, LowPrecMixin):
            state = module._lowprec
            self._states.append(_State(name, state, _decisions(state), _objects(state)))
        self._modules.append(
            _Module(
                name, module, type(module), dict(module._modules), hooks, len(own), tuple(values), tuple(objects),
                tuple(containers),
            )
        )  # fmt: skip

    def _tensor(self, name: str, owner: dict[str, Any], key: str, tensor: Tensor) -> None:
        if type(tensor) not in PLAIN:
            self._refuse(f"{name} is a {type(tensor).__name__}, which may be sharded")
            return
        if hasattr(tensor, "ds_id") or (tensor.numel() and tensor.untyped_storage().nbytes() == 0):
            self._refuse(f"the memory of {name} comes and goes")
            return
        self._tensors.append(_Tensor(name, owner, key, tensor, tensor.data_ptr(), tensor.dtype, tensor.requires_grad))

    def change(self) -> str | None:
        """What has changed since, or None."""
        for name, module, kind, children, hooks, size, values, objects, containers in self._modules:
            own = module.__dict__
            if module.__class__ is not kind:
                return f"{name} is another class"
            if own["_modules"] != children:
                return f"{name} has other parts"
            if hooks and hooks != tuple([len(own[key]) for key in _HOOKS]):
                return f"hooks on {name}"
            if len(own) != size:
                return f"attributes of {name}"
            for key, value in values:
                now = own.get(key, _MISSING)
                if now is not value and now != value:
                    return f"{name}.{key}"
            for key, value in objects:
                if own.get(key, _MISSING) is not value:
                    return f"{name}.{key}"
            for key, value, parts in containers:
                if not _equal(tuple(_parts(value)), parts):
                    return f"what is in {name}.{key}"
        for name, owner, key, tensor, address, dtype, trains in self._tensors:
            if owner.get(key) is not tensor or tensor.data_ptr() != address:
                return f"the memory of {name}"
            if tensor.requires_grad is not trains or tensor.dtype != dtype:
                return f"whether {name} trains, or its dtype"
        for name, state, then, held in self._states:
            if _decisions(state) != then or any(map(_is_not, _objects(state), held)):
                return f"how {name} multiplies"
        for name, holder, enabled in self._switches:
            if holder.enabled is not enabled:
                return name
        for name, holder, fields in self._fields.values():
            own = vars(holder)
            for key, value in fields:
                now = own.get(key, _MISSING)
                if now is not value and now != value:
                    return f"{name}.{key}"
        return None

    def parameter_owners(self) -> list[tuple[dict[str, Any], str, Tensor]]:
        """Where the Parameters that train are held: dict, key, Parameter."""
        return [(t.owner, t.key, t.tensor) for t in self._tensors if t.trains]

    def states(self) -> list[nn.Module]:
        """The converted linears."""
        return [m.module for m in self._modules if isinstance(m.module, LowPrecMixin)]


Attributes = dict[tuple[str, str], tuple[Any, tuple[Any, ...]]]


def attributes(layer: nn.Module) -> Attributes:
    """What the modules of a layer hold, and what lies therein: parts of containers, fields of objects."""
    return {
        (name, key): (value, tuple(_parts(vars(value) if _has_fields(value) else value)))
        for name, module in layer.named_modules()
        for key, value in (*module.__dict__.items(), *module._buffers.items())
        if key not in _INTERNAL
    }


def stored(before: Attributes, after: Attributes) -> str | None:
    """What a forward between two calls of `attributes` has stored, if it is no constant that was there already."""
    nothing = (_MISSING, ())
    for where in sorted({*before, *after}):
        (old, parts), (new, now) = before.get(where, nothing), after.get(where, nothing)
        if not _equal((old,), (new,)) or not _equal(parts, now):
            return ".".join(filter(None, where))
    return None


def host_random(device: torch.device) -> tuple[Any, ...]:
    """The state of the generators by which a forward on `device` may decide what to do."""
    numpy = sys.modules.get("numpy")
    return (
        random.getstate(),
        None if numpy is None else repr(numpy.random.get_state()[2:]),
        None if device.type == "cpu" else torch.get_rng_state().numpy().tobytes(),
    )


def _decisions(state: LayerState) -> tuple[Any, ...]:
    """What the forward of a converted linear branches on, and which buffers it reads and writes."""
    cache = state.weight_cache
    return state.enabled, state.ready, state.least, cache.policy, cache.followed


def _objects(state: LayerState) -> tuple[Any, ...]:
    """The objects among them. To compare their ids would not do: a new one may lie where one lay."""
    return state.operands, state.sum_seeds, state.shared


_CONTAINERS = (list, tuple, set, frozenset, deque, dict)


def _parts(value: Any) -> Iterator[Any]:
    """What lies in nested containers, keys included; nothing of what is none."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    elif not isinstance(value, _CONTAINERS):
        return
    for item in value:
        yield item
        yield from _parts(item)


def _equal(old: tuple[Any, ...], new: tuple[Any, ...]) -> bool:
    """Whether these are the same objects, or equal constants."""
    return len(old) == len(new) and all(
        a is b or (_is_constant(a) and _is_constant(b) and a == b) for a, b in zip(old, new, strict=True)
    )


def _has_fields(value: Any) -> bool:
    """A config, a namespace, an object of the model's own that its forward may read or write."""
    if isinstance(value, (nn.Module, type, ModuleType)) or not hasattr(value, "__dict__"):
        return False
    return type(value).__module__.partition(".")[0] not in _OURS


def _is_scalar(value: Any) -> bool:
    return type(value) in CONSTANTS or isinstance(value, Enum)


def _is_constant(value: Any) -> bool:
    if _is_scalar(value):
        return True
    kind = type(value)
    if kind in (list, tuple, set, frozenset):
        return all(_is_constant(item) for item in value)
    return kind is dict and all(_is_constant(key) and _is_constant(item) for key, item in value.items())
