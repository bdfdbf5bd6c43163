# SPDX-License-Identifier: Apache-2.0
"""What a model's rotary embedding computes, found out by running its function.

Most modeling files of transformers bring an `apply_rotary_pos_emb` of their own, and most of these are one function
with four differences: whether it computes in float32, casts back, passes columns through, and where backward rounds.
No table of names: the function runs on made-up q, k, cos and sin, and results, layouts and gradients are compared with
the truth bit for bit (zeros of either sign are equal). Functions that pair neighbours instead of halves, take one
tensor, or turn the other way, agree with none.

Its code must be a straight line: a branch could go another way on a GPU than in the experiment.
"""

from __future__ import annotations

import dis
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_lowprec.modules.rotary import Rule
from hf_lowprec.numerics import rotary as truth
from hf_lowprec.ops.rotary import fits

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SIZE, _WIDTH = 16, 8
_BRANCHES = ("JUMP", "FOR_ITER", "SEND")


class RotaryKind(NamedTuple):
    """wide: q and k are taken as float32 (products follow torch's promotion otherwise). back: the result has their
    dtype. once: backward rounds to their dtype once, at the end. joined: takes cos narrower than q. either: takes
    `unsqueeze_dim=2`."""

    wide: bool
    back: bool
    once: bool
    joined: bool
    either: bool = True

    def rule(
        self, dim: int, dtypes: tuple[torch.dtype, ...], shapes: tuple[torch.Size, torch.Size, torch.Size, torch.Size]
    ) -> Rule | None:
        """How the function treats q, k, cos and sin of these dtypes and shapes; None: as no rule of ours does."""
        q, k, cos, sin = dtypes
        known = q in _DTYPES and cos in _DTYPES and q == k and cos == sin and shapes[2] == shapes[3]
        if not known or not (dim == 1 or self.either) or not fits(*shapes[:3], dim, self.joined):
            return None
        mid = torch.float32 if self.wide else torch.promote_types(q, cos)
        return Rule(dim, mid, q if self.back else mid, torch.float32 if self.once else q, self.joined)


class Read(NamedTuple):
    """A global that a function reads, as it was when somebody looked."""

    file: dict[str, Any]
    name: str
    value: Any


def unchanged(reads: Sequence[Read]) -> bool:
    for file, name, value in reads:
        if file.get(name) is not value:
            return False
    return True


_KINDS: dict[Callable[..., Any], tuple[tuple[Read, ...], RotaryKind | None]] = {}


def rotary_kind(function: Callable[..., Any]) -> RotaryKind | None:
    """Which rotary embedding `function(q, k, cos, sin, unsqueeze_dim=1)` is, or None."""
    known = _KINDS.get(function)
    if known is None or not unchanged(known[0]):
        inner = plain_function(function)
        known = _KINDS[function] = (() if inner is None else tuple(reads_of(inner)), _find(function))
    return known[1]


def plain_function(function: Any) -> FunctionType | None:
    """The Python function that `function` calls: itself, if it is one without decorators, or what the `kernels`
    library has put into a module without weights so that it can be exchanged. None: exchanged it is, or another."""
    if isinstance(function, nn.Module):
        if "forward" in function.__dict__ or [*function.parameters(), *function.buffers()]:
            return None
        forward = inspect.unwrap(type(function).forward)
        cells = [cell.cell_contents for cell in getattr(forward, "__closure__", None) or ()]
        found = [value for value in cells if isinstance(value, FunctionType)]
        function = found[0] if len(found) == 1 else None
    return function if isinstance(function, FunctionType) and not function.__closure__ else None


def branches(function: FunctionType) -> bool:
    """Whether its code, or that of Python functions which it names, is no straight line."""
    called = [read.value for read in reads_of(function) if isinstance(read.value, FunctionType)]
    steps = itertools.chain.from_iterable(dis.get_instructions(each) for each in (function, *called))
    return any(mark in step.opname for step in steps for mark in _BRANCHES)


def reads_of(function: FunctionType, seen: set[CodeType] | None = None) -> Iterator[Read]:
    """The globals that its code and that of Python functions which it names may read, but for modules."""
    seen = set() if seen is None else seen
    if function.__code__ in seen:
        return
    seen.add(function.__code__)
    file = function.__globals__
    for name in function.__code__.co_names:
        value = file.get(name)
        if value is None or isinstance(value, ModuleType):
            continue
        yield Read(file, name, value)
        if isinstance(value, FunctionType):
            yield from reads_of(value, seen)


def _find(function: Callable[..., Any]) -> RotaryKind | None:
    # A probe must leave no trace, and find the same wherever it is called.
    with (
        torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
    ):  # fmt: skip
        first = _Probe(torch.bfloat16, torch.float32, 1, _SIZE)
        results = first.run(function)
        if results is None:
            return None
        joined = _Probe(torch.float32, torch.float32, 1, _WIDTH).run(function) is not None
        either = _Probe(torch.float32, torch.float32, 2, _SIZE).run(function) is not None
        back = results[0].dtype == torch.bfloat16
        for wide, once in itertools.product((False, True), repeat=2):
            kind = RotaryKind(wide, back, once, joined, either)
            if all(probe.agrees(function, kind) for probe in _probes(kind)):
                return kind
    return None


def _probes(kind: RotaryKind) -> Iterator[_Probe]:
    for dtype, table in itertools.product(_DTYPES, repeat=2):
        for dim in (1, 2) if kind.either else (1,):
            for width in (_SIZE, _WIDTH) if kind.joined else (_SIZE,):
                yield _Probe(dtype, table, dim, width)


class _Probe:
    """q and k with 3 heads and 1, as models bring them; values of many binades."""

    def __init__(self, dtype: torch.dtype, table: torch.dtype, dim: int, width: int) -> None:
        generator = torch.Generator().manual_seed(width)

        def random(*shape: int) -> Tensor:
            binade = torch.randint(-9, 5, shape, generator=generator)
            return torch.randn(shape, generator=generator) * torch.exp2(binade)

        def view(heads: int, of: torch.dtype) -> Tensor:
            x = random(2, 5, heads, _SIZE).to(of)
            return x.transpose(1, 2) if dim == 1 else x

        self.dim, self.width = dim, width
        self.q, self.k = view(3, dtype), view(1, dtype)
        # More than half of the float32 values are no bfloat16 ones; the halves differ.
        self.cos, self.sin = (random(batches, 5, width).to(table) for batches in (1, 1))
        self.grads = view(3, torch.float32), view(1, torch.float32)

    def run(self, function: Callable[..., Any]) -> tuple[Tensor, ...] | None:
        """Results of q and k and their gradients; None: it takes something else, or returns something else."""
        q, k = (x.clone(memory_format=torch.preserve_format).requires_grad_() for x in (self.q, self.k))
        how = {} if self.dim == 1 else {"unsqueeze_dim": self.dim}
        try:
            results = function(q, k, self.cos.clone(), self.sin.clone(), **how)
            turned_q, turned_k = results
            if turned_q.shape != q.shape or turned_k.shape != k.shape:
                return None
            grads = torch.autograd.grad(
                [turned_q, turned_k], [q, k], [g.to(y.dtype) for g, y in zip(self.grads, results, strict=True)]
            )
        except Exception:  # whatever it is, it does not take what a rotary embedding takes
            return None
        return turned_q.detach(), turned_k.detach(), *grads

    def agrees(self, function: Callable[..., Any], kind: RotaryKind) -> bool:
        theirs = self.run(function)
        q, k, cos, sin = self.q, self.k, self.cos, self.sin
        dtypes = q.dtype, k.dtype, cos.dtype, sin.dtype
        rule = kind.rule(self.dim, dtypes, (q.shape, k.shape, cos.shape, sin.shape))
        if theirs is None or rule is None:
            return False
        _, mid, out, grad_mid, joined = rule
        for x, result, their_grad, grad in zip((self.q, self.k), theirs[:2], theirs[2:], self.grads, strict=True):
            y = truth.rotary(x, self.cos, self.sin, dim=self.dim, mid=mid, out=out, joined=joined)
            if result.dtype != y.dtype or result.stride() != y.stride() or not torch.equal(result, y):
                return False
            ours = truth.rotary_backward(
                grad.to(out), self.cos, self.sin, dim=self.dim, mid=grad_mid, out=x.dtype, stride=x.stride()
            )
            if their_grad.dtype != ours.dtype or not torch.equal(their_grad, ours):
                return False
        return True
