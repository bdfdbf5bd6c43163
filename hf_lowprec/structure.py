# SPDX-License-Identifier: Apache-2.0
"""What of a model can be computed together, found by looking at it: which linears read one tensor, which norm makes
that tensor, which modules are MLPs that are an activation and a product between linears.

There is no table of model classes. Who reads what is seen in one forward pass without arithmetic (`tracing`); what an
MLP computes is read off the graph of its own forward (torch.fx), if that is straight-line code; which function its
activation is, by calling it.

Nothing that is found here is trusted with correctness. A quantised tensor is handed from module to module with the
identity of the tensor that it belongs to, so a forward pass that goes another way only loses the gain.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from hf_lowprec import numerics, tracing
from hf_lowprec.modules.glu import GLU
from hf_lowprec.modules.linear import forward_is_replaced


@dataclass(frozen=True)
class Norm:
    """A module that may be a norm: no children, a weight of one dimension or none.

    readers: the linears that read exactly what it returns.
    why: why there are no readers.
    """

    readers: tuple[str, ...] = ()
    why: str = ""


@dataclass
class Structure:
    """shared: groups of at least two linears that read the same tensor, in the order in which they run.
    norms: norm -> who reads it.
    mlps: module -> its parts, as names of its children.
    unfused: module -> why it is none of these, though it looks like one.
    failures: model or sub-model -> why its forward pass could not be followed.
    """

    shared: list[tuple[str, ...]] = field(default_factory=list)
    norms: dict[str, Norm] = field(default_factory=dict)
    mlps: dict[str, GLU] = field(default_factory=dict)
    unfused: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def find_structure(model: nn.Module, linears: Mapping[str, nn.Module]) -> Structure:
    """The structure around `linears` (names as in `model.named_modules()`). Leaves the model as it is; never raises.

    Where a forward pass cannot be followed, there are no norms and fewer shared tensors, and `failures` says why.
    """
    seen = tracing.trace(model, linears)
    out = Structure(failures=seen.failures)
    out.shared, scattered = _shared(seen)
    out.norms = _norms(model, seen, scattered)
    _find_mlps(model, linears, out)
    return out


# --- tensors --------------------------------------------------------------------------------------------------------


def _readers(seen: tracing.Trace) -> dict[int, tuple[str, ...]]:
    readers: dict[int, dict[str, None]] = {}
    for name, tensors in seen.reads.items():
        for tensor in tensors:
            readers.setdefault(tensor, {})[name] = None
    return {tensor: tuple(names) for tensor, names in readers.items()}


def _shared(seen: tracing.Trace) -> tuple[list[tuple[str, ...]], set[str]]:
    """Groups, and the linears that read one tensor with these and another one with those partners."""
    readers = _readers(seen)
    groups = {name: {readers[tensor] for tensor in tensors} for name, tensors in seen.reads.items()}
    scattered = {name for name, partners in groups.items() if len(partners) > 1}
    shared = dict.fromkeys(names for names in readers.values() if len(names) > 1 and scattered.isdisjoint(names))
    return list(shared), scattered


def _norms(model: nn.Module, seen: tracing.Trace, scattered: set[str]) -> dict[str, Norm]:
    readers, made = _readers(seen), dict[str, list[int]]()
    for tensor, name in seen.makers.items():
        made.setdefault(name, []).append(tensor)
    out = {}
    for name, module in model.named_modules():
        if not _may_be_norm(module):
            continue
        tensors = made.get(name, [])
        groups = {readers.get(tensor, ()) for tensor in tensors}
        if not tensors:
            out[name] = Norm(why="its output was not followed")
        elif len(groups) > 1 or not scattered.isdisjoint(*groups):
            out[name] = Norm(why="other linears read it from call to call")
        elif groups == {()}:
            view = any(seen.viewed.get(tensor) == name for tensor in readers)
            out[name] = Norm(why="linears read it in another shape" if view else "no converted linear reads it")
        else:
            out[name] = Norm(readers=groups.pop())
    return out


def _may_be_norm(module: nn.Module) -> bool:
    own = {name: p for name, p in module._parameters.items() if p is not None}
    if module._modules or any(b is not None for b in module._buffers.values()):
        return False
    if not own:  # OLMo's norm has no weight, and neither has an activation
        return any("eps" in key or key == "normalized_shape" for key in module.__dict__)
    return "weight" in own and set(own) <= {"weight", "bias"} and all(p.dim() == 1 for p in own.values())


# --- MLPs -----------------------------------------------------------------------------------------------------------


def _find_mlps(model: nn.Module, linears: Mapping[str, nn.Module], out: Structure) -> None:
    in_group = {name for group in out.shared for name in group}
    names = {id(module): name for name, module in linears.items()}
    for name, module in model.named_modules():
        units = {child: unit for child, part in module._modules.items() if (unit := _unit(part, names)) is not None}
        if not 2 <= len(units) <= 3 or any(p is not None and p._modules for c, p in module._modules.items()
                                           if c not in units):  # fmt: skip
            continue
        try:
            if forward_is_replaced(module):
                raise _NoMatch("its forward was replaced on the instance")
            skeleton = tracing.skeleton_of(module)
            problem = tracing.straight_line(skeleton)
            if problem is not None:
                raise _NoMatch(f"its forward {problem}")
            found, in_training = (
                _Matcher(_in_mode(skeleton, mode), module, set(units)).match() for mode in (False, True)
            )
            if found != in_training:
                raise _NoMatch("it computes something else in training")
        except Exception as error:  # a forward that fx cannot follow may raise anything
            if _has_activation(module, units):
                out.unfused[name] = str(error) if isinstance(error, _NoMatch) else f"its forward: {_short(error)}"
            continue
        out.mlps[name] = found
        pair = [units[found.gate], units[found.up]] if found.up not in (None, found.gate) else []
        if pair and in_group.isdisjoint(pair):
            out.shared.append(tuple(pair))


def _unit(module: nn.Module | None, names: Mapping[int, str]) -> str | None:
    """The linear that `module` is, or wraps as PEFT's adapters do."""
    if module is None:
        return None
    return names.get(id(module)) or names.get(id(module._modules.get("base_layer")))


def _has_activation(module: nn.Module, units: Mapping[str, str]) -> bool:
    others = (part for child, part in module._modules.items() if child not in units and part is not None)
    return any(name not in (None, "identity") for part in others for name in _names(part))


def _short(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120]}" if text else type(error).__name__


class _NoMatch(Exception):
    """The graph is another one; the message says where."""


class _Children(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class _Matcher:
    """`down(act(gate(x)) * up(x))`, the same with one linear for gate and up, or `down(act(up(x)))`; nothing else."""

    def __init__(self, skeleton: nn.Module, module: nn.Module, units: set[str]) -> None:
        self.module = module
        self.units = units
        self.graph = _Children().trace(skeleton)
        self.visited: set[fx.Node] = set()

    def match(self) -> GLU:
        (result,) = next(node for node in self.graph.nodes if node.op == "output").args
        after, result = self._after(result)
        down, product = self._call(result, "its last step is no linear")
        if self._is_product(product):
            glu = self._gated(down, product, after)
        else:
            act, inner = self._activation(product)
            first, x = self._call(inner, "what its activation reads is no linear")
            self._input(x)
            glu = GLU(gate=first, up=None, down=down, act=act, after=after)
        left = [n for n in self.graph.nodes if n not in self.visited and n.op not in ("output", "placeholder")]
        if left:
            raise _NoMatch(f"its forward also computes {left[0].name}")
        return glu

    def _gated(self, down: str, product: fx.Node, after: str | None) -> GLU:
        first, second = product.args
        if isinstance(first, fx.Node) and (first.target in self.units or first.target is operator.getitem):
            first, second = second, first
        act, gated = self._activation(first)
        one, two = self._half(gated), self._half(second)
        if one is not None and two is not None:
            (packed, i), (other, j) = one, two
            if packed is not other or i == j:
                raise _NoMatch("the halves of its product come from different tensors")
            name, x = self._call(packed, "what it splits comes from no linear")
            self._input(x)
            return GLU(gate=name, up=name, down=down, act=act, gate_first=i == 0, after=after)
        gate, x = self._call(gated, "what its activation reads is no linear")
        up, y = self._call(second, "the other factor of its product is no linear")
        if x is not y or gate == up:
            raise _NoMatch("gate and up read different tensors")
        self._input(x)
        return GLU(gate=gate, up=up, down=down, act=act, after=after)

    def _after(self, node: Any) -> tuple[str | None, Any]:
        """A child that is called on the result, such as GPT-2's dropout."""
        if not isinstance(node, fx.Node):
            return None, node
        if node.op == "call_module" and str(node.target) not in self.units:
            self.visited.add(node)
            return str(node.target), self._only(node)
        if node.target is F.dropout and node.kwargs.get("p", node.args[1:2]) in (0, (0,)):
            self.visited.add(node)
            return None, node.args[0]
        return None, node

    def _call(self, node: Any, otherwise: str) -> tuple[str, Any]:
        if not isinstance(node, fx.Node) or node.op != "call_module" or node.target not in self.units:
            raise _NoMatch(otherwise)
        self.visited.add(node)
        return str(node.target), self._only(node)

    def _only(self, node: fx.Node) -> Any:
        if len(node.args) != 1 or node.kwargs:
            raise _NoMatch(f"{node.target} is called with more than a tensor")
        return node.args[0]

    def _input(self, node: Any) -> None:
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        if node is not inputs[0]:
            raise _NoMatch("its linears do not read its first argument")
        if any(n.users for n in inputs[1:]):
            raise _NoMatch("its forward reads more than one argument")

    def _is_product(self, node: Any) -> bool:
        if not isinstance(node, fx.Node) or node.target not in (operator.mul, torch.mul, "mul") or node.kwargs:
            return False
        self.visited.add(node)
        return len(node.args) == 2

    def _half(self, node: Any) -> tuple[fx.Node, int] | None:
        """(what is split in two along its last axis, which half)."""
        if not isinstance(node, fx.Node) or node.target is not operator.getitem:
            return None
        whole, index = node.args
        if not isinstance(whole, fx.Node) or whole.target not in (torch.chunk, "chunk") or index not in (0, 1):
            return None
        bound = dict(zip(("input", "chunks", "dim"), whole.args, strict=False), **whole.kwargs)
        if bound.get("chunks") != 2 or bound.get("dim") != -1 or not isinstance(bound["input"], fx.Node):
            return None
        self.visited.update((node, whole))
        return bound["input"], 1 if index else 0

    def _activation(self, node: Any) -> tuple[str, Any]:
        if not isinstance(node, fx.Node) or not node.args or not isinstance(node.args[0], fx.Node):
            raise _NoMatch("no activation stands before its last linear")
        name = None
        if node.op == "call_module" and node.target not in self.units:
            part = self.module.get_submodule(str(node.target))
            self._only(node)
            if _hooks(part):
                raise _NoMatch(f"hooks sit on {node.target}")
            for inner in part.modules():
                own = not type(inner).__module__.startswith("torch.")
                if own and (problem := tracing.straight_line(inner)) is not None:
                    raise _NoMatch(f"the forward of {node.target} {problem}")
            name = activation_name(part)
        elif node.op == "call_function" and callable(node.target):
            constants = [*node.args[1:], *node.kwargs.values()]
            if not any(isinstance(value, fx.Node) for value in constants):
                target: Callable[..., Any] = node.target
                name = activation_name(lambda x: target(x, *node.args[1:], **node.kwargs))
        if name is None or name == "identity":
            what = getattr(node.target, "__name__", node.target)
            raise _NoMatch(f"{what} stands where an activation that is known is expected")
        self.visited.add(node)
        return name, node.args[0]


def _hooks(module: nn.Module) -> bool:
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(kinds)


_POINTS = torch.cat([torch.linspace(-6.0, 6.0, 49), torch.tensor([-30.0, -12.0, 12.0, 30.0])]).double()


def activation_name(function: nn.Module | Callable[[Tensor], Any]) -> str | None:
    """Which of `numerics.ACTIVATIONS` it computes, found by calling it; None for another one, one with weights, or a
    module that computes something else in training."""
    names = _names(function)
    return names.pop() if len(names) == 1 else None


def _in_mode(module: nn.Module, training: bool) -> nn.Module:
    """`module`, whose own `train`, which may do more, is not called."""
    for part in module.modules():
        part.training = training
    return module


def _names(function: nn.Module | Callable[[Tensor], Any]) -> set[str | None]:
    """What it computes in evaluation and in training. Leaves its mode as it is."""
    if not isinstance(function, nn.Module):
        return {_named(function)}
    if [*function.parameters(), *function.buffers()]:
        return {None}
    modes = [(module, module.training) for module in function.modules()]
    try:
        return {_named(_in_mode(function, mode)) for mode in (False, True)}
    finally:
        for module, mode in modes:
            module.training = mode


def _named(function: Callable[[Tensor], Any]) -> str | None:
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
            values = function(_POINTS.clone())
    except Exception:
        return None
    if not isinstance(values, Tensor) or values.shape != _POINTS.shape:
        return None
    for name in numerics.ACTIVATIONS:
        if torch.allclose(values.double(), numerics.activation(name, _POINTS), rtol=1e-6, atol=1e-6):
            return name
    return None
