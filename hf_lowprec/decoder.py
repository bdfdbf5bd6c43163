# SPDX-License-Identifier: Apache-2.0
"""The residual stream of a decoder: what writes to it, what reads it, in the order in which they run.

    stream = embedding (+ embedding ...)
    stream = stream + ending(... beginnings(norm(stream)))          once per branch: attention, MLP
    logits = head(norm(stream))

Unit scaling needs to know each of these parts, and that there is nothing else. No table of model classes says so, but
one forward pass without arithmetic (`tracing`), in which every sum is seen. A model that computes another thing, such
as a norm behind a branch or a multiplier on the stream, is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_lowprec import tracing
from hf_lowprec.modules import low_precision_class
from hf_lowprec.modules.glu import GLU
from hf_lowprec.modules.linear import original_class
from hf_lowprec.modules.norm_kind import NormKind, norm_kind
from hf_lowprec.structure import find_structure


class NoDecoder(Exception):
    """The model's forward pass has another structure; the message says where."""


@dataclass
class Branch:
    """norm: what makes its input of the stream. begin: linears that read that, in the order in which they run.
    end: the linear whose output is added.
    glu: what an MLP computes, its parts under their full names; None: attention.
    """

    norm: str
    begin: list[str]
    end: str
    glu: GLU | None = None


@dataclass
class Decoder:
    """Names of modules of the model that it was found in.

    embeddings: what is summed at the beginning. tied: the head's weight is the first embedding's.
    width: of the stream. linears: every linear that is one of the parts, the head included.
    kinds: what the norms compute, by name.
    """

    embeddings: list[str]
    branches: list[Branch]
    norm: str
    head: str
    tied: bool
    width: int
    linears: dict[str, nn.Module]
    kinds: dict[str, NormKind] = field(default_factory=dict)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or low_precision_class(module) is not None


def in_features(module: nn.Module) -> int:
    return int(_shape(module)[1])


def out_features(module: nn.Module) -> int:
    return int(_shape(module)[0])


def _shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear; transformers' Conv1D stores [in, out]."""
    shape: Any = module.weight.shape  # type: ignore[union-attr]
    return (shape[0], shape[1]) if isinstance(module, nn.Linear) else (shape[1], shape[0])


def find_decoder(model: nn.Module) -> Decoder:
    """Raises NoDecoder."""
    part, head = _language_model(model)
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    prefix = names[id(part)]
    inside = {
        name for name, _ in model.named_modules() if not prefix or name == prefix or name.startswith(prefix + ".")
    }
    linears = {n: m for n, m in model.named_modules() if n in inside and is_linear(m) and not adapts(n)}
    experts = next((n for n, p in part.named_parameters() if p.dim() == 3), None)
    if experts is not None:
        raise NoDecoder(f"{experts} holds the weights of several experts in one tensor")
    watcher = _Watcher({id(m): n for n, m in linears.items()}, names[id(head)])
    with watcher.sums:
        problem = tracing.follow(model, part, watcher)
    if watcher.problem:
        raise NoDecoder(watcher.problem)
    if problem:
        raise NoDecoder(f"its forward pass could not be followed: {problem}")
    found = watcher.result()
    found.linears = linears
    tied = [n for n in found.embeddings if model.get_submodule(n).weight is head.weight]
    found.embeddings.sort(key=lambda name: name not in tied)
    found.tied = bool(tied)
    found.width = in_features(head)
    _name_mlps(model, found, watcher.attended)
    for name in (*(branch.norm for branch in found.branches), found.norm):
        kind = norm_kind(model.get_submodule(name))
        if kind is None:
            raise NoDecoder(f"{name} is no RMSNorm or LayerNorm")
        found.kinds[name] = kind
    return found


def _language_model(model: nn.Module) -> tuple[nn.Module, Any]:
    """The part of `model` that has an output embedding, and that embedding."""
    other = ""
    for part in model.modules():
        getter = getattr(type(part), "get_output_embeddings", None)
        if getter is None or not hasattr(part, "config") or not hasattr(type(part), "main_input_name"):
            continue
        try:
            head = part.get_output_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            continue
        if head is not None and is_linear(head):
            return part, head
        other = other or ("" if head is None else f" that is a linear, but a {type(head).__name__}")
    raise NoDecoder(f"{type(model).__name__} has no language-model head (get_output_embeddings){other}")


def adapts(name: str) -> bool:
    return any(part.startswith(("lora_", "modules_to_save")) for part in name.split("."))


def _name_mlps(model: nn.Module, found: Decoder, attended: set[str]) -> None:
    """Which branches are MLPs, and of what; the others are attention, and have been seen to be."""
    structure = find_structure(model, found.linears)
    mlps: dict[str, GLU] = {}
    for name, parts in structure.mlps.items():
        full = {key: _inner(model, f"{name}.{getattr(parts, key)}") for key in ("gate", "down")}
        up = None if parts.up is None else _inner(model, f"{name}.{parts.up}")
        mlps[full["down"]] = GLU(full["gate"], up, full["down"], parts.act, parts.gate_first)
    for branch in found.branches:
        glu = branch.glu = mlps.get(branch.end)
        if glu is not None:
            if set(branch.begin) != {glu.gate, glu.up or glu.gate}:
                raise NoDecoder(f"{branch.norm} feeds {', '.join(branch.begin)}, which is no MLP with {branch.end}")
        elif branch.end not in attended:
            why = next((r for n, r in structure.unfused.items() if branch.end.startswith(n + ".")), "unknown")
            raise NoDecoder(f"{branch.end} ends neither attention nor an MLP that is understood ({why})")


def _inner(model: nn.Module, name: str) -> str:
    """The linear inside of PEFT's layer."""
    return name if is_linear(model.get_submodule(name)) else f"{name}.base_layer"


# --- watching a forward pass ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Is:
    """What a tensor is: `stream`, `embedding`, `normed`, `linear` (the output of one), `scaled` (one of these times a
    number). names: the embeddings; the norm; the linear."""

    what: str
    names: tuple[str, ...] = ()


_ADDS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
_PRODUCTS = (torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__,
             torch.div, Tensor.div, Tensor.__truediv__)  # fmt: skip
_ATTENTION = (F.softmax, torch.softmax, Tensor.softmax, F.scaled_dot_product_attention)


class _Watcher(tracing.Recorder):
    def __init__(self, linears: dict[int, str], head: str) -> None:
        super().__init__(linears)
        self.head = head
        self.sums = _Sums(self)
        self.problem = ""
        self.start()

    def start(self) -> None:
        self.branches: list[Branch] = []
        self.added: set[str] = set()
        self.attended: set[str] = set()
        self.final: str | None = None
        self._is: dict[int, _Is] = {}
        self._begin: list[tuple[str, str]] = []  # (norm, linear), until a linear ends the branch
        self._attends = False
        self._embeddings: tuple[str, ...] = ()

    def _refused(self, why: str) -> NoDecoder:
        """The first reason is the one; the pass is tried again with other inputs."""
        self.problem = self.problem or why
        return NoDecoder(why)

    def _what(self, tensor: Any) -> _Is:
        return self._is.get(self.seen(tensor), _Is("")) if isinstance(tensor, Tensor) else _Is("")

    def _note(self, tensor: Tensor, what: _Is) -> None:
        self._is[self.seen(tensor)] = what

    def stand_in(self, name: str | None, width: int) -> Callable[..., Tensor]:
        inner = super().stand_in(name, width)

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            out = inner(*args, **kwargs)
            if name is not None:
                self._linear(name, args[0] if args else next(iter(kwargs.values())))
                self._note(out, _Is("linear", (name,)))
            return out

        return forward

    def _linear(self, name: str, input: Tensor) -> None:
        what = self._what(input)
        if name == self.head:
            if what.what != "normed":
                raise self._refused(f"{name} reads something else than a norm of the residual stream")
            self.final = what.names[0]
        elif what.what == "normed":
            self._begin.append((what.names[0], name))
        elif what.what in ("stream", "embedding"):
            raise self._refused(f"{name} reads the residual stream without a norm")
        elif not self._begin:
            raise self._refused(f"{name} reads neither a norm of the residual stream nor the inside of a branch")
        else:
            norms = dict.fromkeys(norm for norm, _ in self._begin)
            if len(norms) > 1:
                raise self._refused(f"{name} ends a branch that begins with {' and '.join(norms)}")
            self.branches.append(Branch(next(iter(norms)), [linear for _, linear in self._begin], name))
            if self._attends:
                self.attended.add(name)
            self._begin, self._attends = [], False

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        inner = super().hook(name)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            inner(module, args, output)
            if not isinstance(output, Tensor):
                return
            if isinstance(module, nn.Embedding):
                if type(module).forward is not nn.Embedding.forward:
                    raise self._refused(f"{name} is a {type(module).__name__}, which may scale what it looks up")
                self._note(output, _Is("embedding", (name,)))
            elif args and _holds_vector(module):
                what = self._what(args[0])
                if what.what == "scaled":
                    raise self._refused(f"what {name} reads of the residual stream was multiplied by a number")
                if what.what in ("stream", "embedding"):
                    self._note(output, _Is("normed", (name,)))

        return hook

    def called(self, function: Any, args: tuple[Any, ...], out: Any) -> None:
        if function in _ATTENTION:
            self._attends = True
        tensors = [a for a in args if isinstance(a, Tensor)]
        if not isinstance(out, Tensor) or not tensors:
            return
        if self.problem:
            return
        if function in _ADDS and len(tensors) == 2:
            self._note(out, self._sum(*(self._what(t) for t in tensors)))
        elif function in _PRODUCTS and len(tensors) == 1:
            what = self._what(tensors[0])
            if what.what in ("stream", "embedding", "linear"):
                self._note(out, _Is("scaled", what.names))
        elif self.seen(out) not in self._is and (function is torch.empty_like or _same_memory(tensors[0], out)):
            self._note(out, self._what(tensors[0]))  # a dropout; a view; the same in another dtype

    def _sum(self, a: _Is, b: _Is) -> _Is:
        kinds = {a.what, b.what}
        if kinds == {"embedding"}:
            return _Is("embedding", (*a.names, *b.names))
        if "scaled" in kinds and kinds & {"stream", "embedding", "linear"}:
            raise self._refused(
                f"{' '.join((a if a.what == 'scaled' else b).names)} is multiplied by a number before a sum"
            )
        for stream, branch in ((a, b), (b, a)):
            if stream.what not in ("stream", "embedding"):
                continue
            if stream.what == "embedding":
                self._embeddings = stream.names
            if branch.what != "linear" or branch.names[0] not in {known.end for known in self.branches}:
                raise self._refused("something that is no linear's output is added to the residual stream")
            self.added.add(branch.names[0])
            return _Is("stream")
        if "linear" in kinds and "" in kinds:  # an adapter beside the linear
            return a if a.what == "linear" else b
        return _Is("")

    def result(self) -> Decoder:
        if self.final is None:
            raise NoDecoder("its forward pass does not reach the output embedding")
        loose = [n for _, n in self._begin] + [b.end for b in self.branches if b.end not in self.added]
        if loose:
            raise NoDecoder(f"{loose[0]} is no part of a branch whose output is added to the residual stream")
        names = [name for branch in self.branches for name in (*branch.begin, branch.end)]
        if len(set(names)) != len(names):
            raise NoDecoder("a layer runs more than once")
        if not self.branches:
            raise NoDecoder("there is no residual branch")
        return Decoder(list(self._embeddings), self.branches, self.final, self.head, False, 0, {})


class _Sums(TorchFunctionMode):
    def __init__(self, watcher: _Watcher) -> None:
        super().__init__()
        self.watcher = watcher

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.watcher.called(func, args, out)
        return out


def _holds_vector(module: nn.Module) -> bool:
    """A norm, as far as can be seen from outside: its weight has one dimension, or it has none but an eps."""
    own = [p for p in module._parameters.values() if p is not None]
    return all(p.dim() == 1 for p in own) and (bool(own) or any("eps" in key for key in module.__dict__))


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a is not b and a.numel() == b.numel() and a.untyped_storage()._cdata == b.untyped_storage()._cdata


def parts(found: Decoder) -> Iterator[tuple[str, Branch | None]]:
    """Every linear, with the branch that it belongs to; the head has none."""
    for branch in found.branches:
        for name in (*branch.begin, branch.end):
            yield name, branch
    yield found.head, None


__all__ = ["Branch", "Decoder", "NoDecoder", "adapts", "find_decoder", "in_features", "is_linear", "original_class",
           "out_features", "parts"]  # fmt: skip
