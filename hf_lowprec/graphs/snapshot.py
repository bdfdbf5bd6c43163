# SPDX-License-Identifier: Apache-2.0
"""What a graph of a layer depends on beside its arguments, and whether it is still so. No CUDA in here.

A graph reads and writes fixed addresses, and has baked in what Python decided while it was captured. So before every
replay the layer is compared with what it was: its modules and their classes, the objects and the addresses of its
Parameters and buffers, whether they train, plain attributes (modes, flags, names of adapters, the config's fields),
hooks, and of converted linears what their forward branches on. It costs a microsecond or two per module.
"""

from __future__ import annotations

import copy
from enum import Enum
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


class _Module(NamedTuple):
    name: str
    module: nn.Module
    kind: type
    children: dict[str, Any]
    hooks: tuple[int, ...]
    size: int  # of __dict__
    values: tuple[tuple[str, Any], ...]  # compared by value
    objects: tuple[tuple[str, Any], ...]  # compared by identity


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
        self._configs: dict[int, tuple[Any, tuple[tuple[str, Any], ...]]] = {}
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
        values, objects = [], []
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
                if isinstance(getattr(value, "enabled", None), bool):  # of fused norms and MLPs
                    self._switches.append((f"{name}.{key}.enabled", value, value.enabled))
            if key == "config" and hasattr(value, "__dict__") and id(value) not in self._configs:
                fields = tuple((k, copy.deepcopy(v)) for k, v in vars(value).items() if _is_constant(v))
                self._configs[id(value)] = value, fields
        if isinstance(module, LowPrecMixin):
            self._states.append(_State(name, module._lowprec, _decisions(module._lowprec)))
        self._modules.append(
            _Module(name, module, type(module), dict(module._modules), hooks, len(own), tuple(values), tuple(objects))
        )

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
        for name, module, kind, children, hooks, size, values, objects in self._modules:
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
        for name, owner, key, tensor, address, dtype, trains in self._tensors:
            if owner.get(key) is not tensor or tensor.data_ptr() != address:
                return f"the memory of {name}"
            if tensor.requires_grad is not trains or tensor.dtype != dtype:
                return f"whether {name} trains, or its dtype"
        for name, state, then in self._states:
            now = _decisions(state)
            if now != then:
                return f"how {name} multiplies"
        for name, holder, enabled in self._switches:
            if holder.enabled is not enabled:
                return name
        for config, fields in self._configs.values():
            own = vars(config)
            for key, value in fields:
                now = own.get(key, _MISSING)
                if now is not value and now != value:
                    return f"config.{key}"
        return None

    def parameter_owners(self) -> list[tuple[dict[str, Any], str, Tensor]]:
        """Where the Parameters that train are held: dict, key, Parameter."""
        return [(t.owner, t.key, t.tensor) for t in self._tensors if t.trains]

    def states(self) -> list[nn.Module]:
        """The converted linears."""
        return [m.module for m in self._modules if isinstance(m.module, LowPrecMixin)]


def attributes(layer: nn.Module) -> dict[tuple[str, str], Any]:
    """What the modules of a layer hold."""
    return {
        (name, key): value
        for name, module in layer.named_modules()
        for key, value in (*module.__dict__.items(), *module._buffers.items())
        if key not in _INTERNAL
    }


def stored(before: dict[tuple[str, str], Any], after: dict[tuple[str, str], Any]) -> str | None:
    """What a forward between two calls of `attributes` has stored, if it is no constant that was there already."""
    for where in sorted({*before, *after}):
        old, new = before.get(where, _MISSING), after.get(where, _MISSING)
        if old is not new and not (_is_constant(old) and _is_constant(new) and old == new):
            return ".".join(filter(None, where))
    return None


def _decisions(state: LayerState) -> tuple[Any, ...]:
    """What the forward of a converted linear branches on, and which buffers it reads and writes."""
    cache = state.weight_cache
    return (
        state.enabled, state.ready, id(state.operands), id(state.sum_seeds), id(state.shared), state.least,
        cache.policy, cache.followed,
    )  # fmt: skip


def _is_constant(value: Any) -> bool:
    kind = type(value)
    if kind in CONSTANTS or isinstance(value, Enum):
        return True
    if kind in (list, tuple, set, frozenset):
        return all(_is_constant(item) for item in value)
    return kind is dict and all(_is_constant(key) and _is_constant(item) for key, item in value.items())
