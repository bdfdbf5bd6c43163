# SPDX-License-Identifier: Apache-2.0
"""Steps on the CPU in C++, on slices of a few sizes: `native` where it has the states, the truth itself for the
rest, through torch.compile.

Inductor runs `algorithms.update` as a few loops over vectors, with OpenMP threads, and without fused multiply-adds
(`cpp.enable_floating_point_contract_flag` is off by default), so that it gives the bits of the eager step. What
changes from step to step (scalars, seeds, where a slice begins) is passed as 0-d tensors; what does not is in a
`_Kind`, and each kind and size is compiled once, in some seconds, for 2^18 and for 2^16 elements. `native` has no
temporaries and takes 2^22, so that its threads start less often. What is left of a tensor after slices of these
sizes, and tensors smaller than those, take the eager step.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hf_lowprec.optim import cpu, native
from hf_lowprec.recipe import Quant, States

if TYPE_CHECKING:
    from hf_lowprec.optim.algorithms import Item

SIZES = (1 << 22, 1 << 18, 1 << 16)
_LARGEST = 1 << 18  # of torch.compile's, whose temporaries stay in the cache
_NUMBERS = itertools.count()
_FLAGS = ("weight_decay", "decoupled_weight_decay", "maximize", "momentum", "nesterov")
_OPTIONS: dict[str, Any] = {
    # A moment that is read three times is stored, not computed three times; codes are known to be in their tables.
    "realize_reads_threshold": 2,
    "assert_indirect_indexing": False,
    # Or a value that has been rounded to 16 bits goes on in float32, unrounded.
    "emulate_precision_casts": True,
    # A `_Kind` never changes: of the guards, only those on tensors are left, or a call would cost more than its slice.
    "guard_filter_fn": lambda guards: [guard.guard_type == "TENSOR_MATCH" for guard in guards],
}


class _Kind(NamedTuple):
    """What a compiled step is made for."""

    algorithm: str
    states: States
    slots: tuple[tuple[str, Any], ...]
    moments: tuple[str, ...]
    flags: tuple[tuple[str, Any], ...]
    keys: tuple[str, ...]
    scalars: tuple[str, ...]
    limits: tuple[str, ...]
    dtypes: tuple[torch.dtype, torch.dtype]
    clipped: bool
    elementwise: bool
    size: int
    threads: int


def check_compiler() -> None:
    """Raises RuntimeError: there is no C++ compiler, so that torch.compile could not compile for the CPU."""
    if native.compiler() is None:
        raise RuntimeError(
            f"compile=True: no C++ compiler ({', '.join(native.compilers())}) on the PATH; install one, or leave "
            "compile out: the eager step gives the same bits"
        )


def check(algorithm: str, item: Item) -> None:
    """Raises ValueError: a parameter or an algorithm whose steps would not be compiled, whatever its size."""
    from hf_lowprec.optim.algorithms import ALGORITHMS

    if item.param.device.type not in ("cpu", "meta"):
        raise ValueError(
            f"compile=True: is for Parameters on the CPU, one is on {item.param.device}, where kernels run"
        )
    if not ALGORITHMS[algorithm].elementwise:
        raise ValueError(f"compile=True: a step of {algorithm!r} looks at whole tensors, and is not compiled")
    if item.states.op_by_op:
        raise ValueError("compile=True: steps of states with `weight` or `arithmetic` are not compiled; leave it out")
    if any(isinstance(slot, Quant) and slot.compand == "expand" for slot in item.slots.values()):
        raise ValueError(
            "compile=True: states with compand 'expand' take powers, which C++ and torch round differently; choose fp8"
        )
    if not cpu.alignment(item):
        raise ValueError(
            "compile=True: these states have scales that need a look at all new values (or, under FSDP2, rows that "
            "end within a block), so their steps are not compiled; choose states in blocks (8bit, compact, ...) or "
            "with predicted scales"
        )


def covers(item: Item) -> bool:
    """Whether `stepper` has this item, which may be a slice."""
    n, last = item.param.numel(), item.start + item.param.numel() - 1
    tensors = (item.param, *item.state.values())
    return n in SIZES and item.start >> 32 == last >> 32 and all(tensor.is_contiguous() for tensor in tensors)


def stepper(
    algorithm: str, item: Item, s: dict[str, Any], limit: dict[str, Tensor], clip: Tensor | None, elementwise: bool
) -> Callable[[Item], Tensor | None]:
    """What `algorithms.update` does to covered slices of `item`; elementwise: and how many elements it skipped."""
    if not elementwise and native.covers(algorithm, item):
        return native.stepper(algorithm, item, s, clip)
    scalars = {name: value if isinstance(value, Tensor) else torch.tensor(value) for name, value in s.items()}
    index, limits = torch.tensor(item.index), list(limit.values())
    functions: dict[int, Callable[..., Tensor | None]] = {}

    def kind(size: int) -> _Kind:
        return _Kind(
            algorithm,
            item.states,
            tuple(item.slots.items()),
            item.moments,
            tuple((name, _flag(item.group[name])) for name in _FLAGS if name in item.group),
            tuple(item.state),
            tuple(scalars),
            tuple(limit),
            (item.param.dtype, item.grad.dtype),
            clip is not None,
            elementwise,
            size,
            torch.get_num_threads(),
        )

    def step(part: Item) -> Tensor | None:
        n = part.param.numel()
        if n > _LARGEST:
            left = [step(piece) for piece in cpu.slices(part, _LARGEST)]
            return torch.stack([one for one in left if one is not None]).sum() if elementwise else None
        if n not in functions:
            functions[n] = _function(kind(n))
        return functions[n](
            part.param.detach().view(-1),
            part.grad.detach().reshape(-1),
            [part.state[key].view(-1) if part.state[key].dim() else part.state[key] for key in item.state],
            list(scalars.values()),
            limits,
            clip,
            index,
            torch.tensor(part.start),
        )

    return step


def _flag(value: Any) -> Any:
    """A hyperparameter of which the step only asks whether it is 0."""
    return value if isinstance(value, bool) else bool(value)


@functools.cache
def _function(kind: _Kind) -> Callable[..., Tensor | None]:
    from hf_lowprec.optim import algorithms

    group = dict(kind.flags)

    def step(
        param: Tensor,
        grad: Tensor,
        state: list[Tensor],
        scalars: list[Tensor],
        limits: list[Tensor],
        clip: Tensor | None,
        index: Any,
        start: Any,
    ) -> Tensor | None:
        item = algorithms.Item(
            param, dict(zip(kind.keys, state, strict=True)), kind.states, group, 0, index,
            grad=grad, moments=kind.moments, slots=dict(kind.slots), start=start,
        )  # fmt: skip
        good = algorithms.finite_elements(grad) if kind.elementwise else None
        s, limit = dict(zip(kind.scalars, scalars, strict=True)), dict(zip(kind.limits, limits, strict=True))
        algorithms.update(kind.algorithm, item, s, limit, clip, None, good)
        return None if good is None else good.logical_not().sum()

    # Dynamo counts what it has compiled, and gives up, by code object; these are different functions.
    own = types.FunctionType(
        step.__code__.replace(co_name=f"step_{next(_NUMBERS)}"), globals(), None, None, step.__closure__
    )
    compiled: Callable[..., Tensor | None] = torch.compile(own, fullgraph=True, dynamic=False, options=_OPTIONS)
    return compiled
