# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings of converted models, put where their modeling file finds them.

A modeling file calls its `apply_rotary_pos_emb` as a global, so that is where the fused one goes: a wrapper with the
same bits, in that file's globals only, for as long as a converted model of the file lives. There is no less global
place: a forward of another class would be a copy of the model's code.

The wrapper takes the kernel for plain CUDA tensors that it knows, and the file's own function for everything else: on
the CPU, under torch.compile, functorch, `torch.jit.trace` and forward-mode differentiation, for other shapes, dtypes
and tensor classes, for cosines that train, and once a global that the function reads (`rotate_half`) is another one.
What another library has put there (liger-kernel, `kernels`) stays: before us, it is left alone; after us, it is not
undone.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from hf_lowprec.modules.rotary import Rule, turn
from hf_lowprec.modules.rotary_kind import RotaryKind, branches, plain_function, reads_of, rotary_kind, unchanged

_NAMED = re.compile(r"apply_\w*rotary\w*")
_HOMES = ("transformers", "transformers_modules")  # who replaces the function of a file lives elsewhere
_MOST = 4096  # rules that are kept: texts of many lengths have one each
_UNKNOWN: Any = object()
_functorch = torch._C._are_functorch_transforms_active
_tracing = torch._C._is_tracing


class _Patch:
    """One global of one file: the function that was found there, and the wrapper.

    users: tokens of the `RotaryUse`s that live. emulate: use the operator's plain-torch implementation for CPU
    tensors.
    """

    def __init__(self, file: dict[str, Any], name: str, original: Callable[..., Any], kind: RotaryKind) -> None:
        self.file, self.name, self.original = file, name, original
        self.users: set[object] = set()
        self.emulate = False
        self.rules: dict[tuple[Any, ...], Rule | None] = {}
        self.learn(kind)
        # What the `kernels` library exchanges, by giving the module a forward of its own.
        self._exchanged = original.__dict__ if isinstance(original, nn.Module) else {}
        self.wrapper = self._wrap()

    def learn(self, kind: RotaryKind) -> None:
        """kind: of the function with the globals that it reads now."""
        inner = plain_function(self.original)
        assert inner is not None
        self.kind, self.reads = kind, tuple(reads_of(inner))
        self.rules.clear()

    def _wrap(self) -> Callable[..., Any]:
        original, rules, users = self.original, self.rules, self.users

        @functools.wraps(original)
        def rotary_embedding(*args: Any, **kwargs: Any) -> Any:
            if is_compiling() or _tracing() or len(args) != 4 or not users:
                return original(*args, **kwargs)
            q, k, cos, sin = args
            if not (type(q) is type(k) is type(cos) is type(sin) is Tensor and (q.is_cuda or self.emulate)):
                return original(*args, **kwargs)
            dim = 1 if not kwargs else kwargs.get("unsqueeze_dim") if len(kwargs) == 1 else None
            key = (dim, q.dtype, k.dtype, cos.dtype, sin.dtype, q.shape, k.shape, cos.shape, sin.shape)
            rule = rules.get(key, _UNKNOWN)
            if rule is _UNKNOWN:
                rule = self._rule(key)
            if (
                rule is None
                or cos.requires_grad
                or sin.requires_grad
                or not (q.get_device() == k.get_device() == cos.get_device() == sin.get_device())
                or _functorch()
                or forward_ad._current_level >= 0
                or "forward" in self._exchanged
                or not unchanged(self.reads)
            ):
                return original(*args, **kwargs)
            return turn(q, k, cos, sin, rule)

        rotary_embedding._lowprec_patch = self  # type: ignore[attr-defined]
        return rotary_embedding

    def _rule(self, key: tuple[Any, ...]) -> Rule | None:
        if len(self.rules) >= _MOST:
            self.rules.clear()
        dim = key[0]
        rule = self.kind.rule(dim, key[1:5], key[5:]) if type(dim) is int else None
        self.rules[key] = rule
        return rule

    def enter(self, token: object) -> None:
        self.users.add(token)
        if self.file.get(self.name) is self.original:
            self.file[self.name] = self.wrapper

    def leave(self, token: object) -> None:
        self.users.discard(token)
        if not self.users and self.file.get(self.name) is self.wrapper:
            self.file[self.name] = self.original


class RotaryUse:
    """Has calls of one function take the kernel while it lives, or until `release`. Copies and pickles are further
    uses; where the function is another one by then, they are none.

    file: name of the module whose global `name` is.
    """

    def __init__(self, file: str, name: str) -> None:
        self.file, self.name = file, name
        found = _patch(_globals(file), name)
        self.patch = found if isinstance(found, _Patch) else None
        if self.patch is not None:
            token = object()
            self.patch.enter(token)
            self._finalizer = weakref.finalize(self, self.patch.leave, token)
            self._finalizer.atexit = False

    def release(self) -> None:
        if self.patch is not None:
            self._finalizer()

    def __reduce__(self) -> Any:
        return RotaryUse, (self.file, self.name)


def rotary_calls(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(file, name) of functions named like rotary embeddings that the code of `module`'s class calls as globals.

    file: its name in sys.modules, or empty where it is not there: code of `exec` or `runpy`, or loaded by its path.
    """
    seen = set()
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch."):
            continue
        for method in vars(cls).values():
            function = inspect.unwrap(method) if callable(method) else None
            if not isinstance(function, FunctionType):
                continue
            file = function.__globals__
            known = file.get("__name__", "")
            if getattr(sys.modules.get(known), "__dict__", None) is not file:
                known = ""
            for name in function.__code__.co_names:
                call = (known, name)
                if call not in seen and _NAMED.fullmatch(name) and callable(file.get(name)):
                    seen.add(call)
                    yield call


def problem(file: str, name: str) -> str | None:
    """Why this function stays as it is, or None."""
    if not file:
        return f"{name} is of code that is no module in sys.modules"
    found = _patch(_globals(file), name)
    return found if isinstance(found, str) else None


def _globals(file: str) -> dict[str, Any]:
    if file not in sys.modules:  # a pickle in a new process
        importlib.import_module(file)
    return vars(sys.modules[file])


_PATCHES: dict[tuple[str, str], _Patch] = {}


def _patch(file: dict[str, Any], name: str) -> _Patch | str:
    """The patch of a file's global, in place or not, or why there is none."""
    key = (file["__name__"], name)
    known, found = _PATCHES.get(key), file.get(name)
    ours = known is not None and known.file is file and found in (known.original, known.wrapper)
    if known is not None and ours:
        if unchanged(known.reads):
            return known
        found = known.original
    else:
        known = None
    theirs = getattr(found, "_lowprec_patch", None)
    if theirs is not None and theirs.wrapper is found:  # imported from another file while that was patched
        found = file[name] = theirs.original
    original: Any = found
    inner = plain_function(original)
    if inner is None:
        return f"{name} is no plain function of its file"
    home = str(inner.__globals__.get("__name__"))
    if home.partition(".")[0] not in (key[0].partition(".")[0], *_HOMES):
        return f"{name} was replaced by {home}"
    if branches(inner):
        return f"{name} may compute something else from call to call"
    kind = rotary_kind(original)
    if kind is None:
        return f"{name} is no rotary embedding that there is a kernel for"
    if known is not None:
        known.learn(kind)
        return known
    patch = _PATCHES[key] = _Patch(file, name, original, kind)
    return patch
