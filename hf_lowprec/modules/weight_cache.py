# SPDX-License-Identifier: Apache-2.0
"""Low-precision copies of weights, kept from one optimizer step to the next.

In training a weight changes once per step and is read twice per micro-batch, and once more where activations are
recomputed; each cast costs as much memory traffic as several products at small batches.

A copy is kept only where steps tell when it is outdated: in training mode with grad mode on, once an optimizer that
follows the model has stepped (`close_step`). A model may be trained by hand through `.data`, with no optimizer at all,
and moving averages are swapped in through `.data` to be evaluated: without such a step, in eval mode and under no_grad
(`generate`, the first pass of reentrant checkpointing) a weight is cast at each use.

Nor does a single sign tell, in training, that a weight has changed. A copy is outdated by each of these:

    any optimizer's step            torch's fused AdamW and our own kernels raise no `_version`, so a global count of
                                    steps is part of the key; of all optimizers, because TRL writes the weights of a
                                    reference model after the steps of another model's optimizer
    `_version`, `data_ptr`          in-place writes that autograd sees, load_state_dict, `.data = other`
    model.train(), model.eval()     weights are written in between through `.data` (moving averages)
    hf_lowprec.invalidate(model)    everything else that writes `.data` in training, right after a step too

After a step of our own optimizers the first layer that needs its copy has all weights cast at once whose copies were
used before (`modules.emission`). `keep` is given the new copies, which are outdated by the same signs. What such a
cast saw counts for its layer once the copy is used, as that of a cast in the forward pass would.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hf_lowprec.functional import quantize_matrix
from hf_lowprec.operands import LinearSpec, OperandState, Quantized

Policy = Literal["both", "one", "none"]
_steps = 0


def weights_changed() -> None:
    """An optimizer has written weights: all copies, of all models, are outdated."""
    global _steps
    _steps += 1


def steps() -> int:
    """How often `weights_changed` was called in this process."""
    return _steps


def _key(weight: Tensor) -> tuple[int, int, int]:
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version, _steps


class News(NamedTuple):
    """What a cast saw that its layer's counters do not hold yet: counts, int64 [4], and with a delayed scale the
    weight's amax, 0-dim float32 (`OperandState`)."""

    counts: Tensor
    amax: Tensor


class _Entry(NamedTuple):
    key: tuple[int, int, int]
    quantized: Quantized
    storage: torch.UntypedStorage
    news: News | None = None


class WeightCache:
    """The copy of one layer's weight.

    policy: `both` layouts (2 bytes per parameter, no transpose in backward), `one` (1 byte; backward transposes), or
        `none`: the weight is cast in every forward and backward pass.
    followed: whether a step of an optimizer that follows the layer's model has been seen, or its state been loaded.
    asked: whether a copy was given out since somebody set it to False.
    lent: what a captured call reads.
    """

    def __init__(self, policy: Policy = "both") -> None:
        self.policy = policy
        self.followed = False
        self._entry: _Entry | None = None
        self._amax: tuple[tuple[int, int, int], Tensor] | None = None
        self._news: News | None = None
        self._awaited: tuple[Callable[[], None], Quantized] | None = None
        self._held: Quantized | None = None
        self._given: Quantized | None = None  # the tuple by which it was last given out
        self.asked = False
        self.lent: Quantized | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts empty: what is kept belongs to one weight, and a pickle could not hold float8. Nor does the
        # optimizer follow the copy (a moving average, say).
        return {
            **self.__dict__, "followed": False, "_entry": None, "_amax": None, "_news": None,
            "_awaited": None,
            **_NOTHING_HELD,
        }  # fmt: skip

    @property
    def quantized(self) -> Quantized | None:
        """What is kept now, outdated or not."""
        return None if self._entry is None else self._entry.quantized

    @property
    def worth_keeping(self) -> Quantized | None:
        """What is kept now, if it was used, so that one is likely to be wanted after the next step, too."""
        if self._entry is None or self._entry.news is not None:
            return None
        return self._entry.quantized

    def note_amax(self, weight: Tensor, amax: Tensor) -> None:
        """The weight's finite amax as it is now, 0-dim float32, from an optimizer that has just written it."""
        self._amax = _key(weight), amax

    def noted_amax(self, weight: Tensor) -> Tensor | None:
        """That of `note_amax`, unless the weight has been written since in a way that shows."""
        return self._amax[1] if self._amax is not None and self._amax[0] == _key(weight) else None

    def await_cast(self, cast: Callable[[], None], memory: Quantized) -> None:
        """Until it is dropped: `cast` makes this copy and others' once one of them is needed; it takes the memory with
        `take_memory` and gives the copy to `keep`, or does not."""
        self._awaited = cast, memory

    def take_memory(self) -> Quantized | None:
        """What `await_cast` was given, once."""
        awaited, self._awaited = self._awaited, None
        return None if awaited is None else awaited[1]

    def keep(self, weight: Tensor, quantized: Quantized, news: News) -> None:
        """A copy of the weight as it is now, from its cast by others, and what that saw (see `take_news`)."""
        self._entry = _Entry(_key(weight), quantized, weight.untyped_storage(), news)

    def gives(self, copy: Quantized) -> bool:
        """Whether the cache holds this tuple for the sake of graphs."""
        return self._given is copy

    def take_news(self) -> News | None:
        """Of a copy given to `keep` that was used since the last call; to be taken before the next copy is made."""
        news, self._news = self._news, None
        return news

    def drop(self) -> None:
        self._entry = self._amax = self._awaited = None

    def hold(self) -> None:
        """Have later copies written to the memory of the one that is kept now, as long as they have its layouts."""
        if self._entry is not None and self._entry.quantized is not self._given:
            self._given = self._entry.quantized
            self._held = Quantized(*self._given)  # another tuple: who holds the one that is given out can be counted

    def holds(self, copy: Quantized) -> bool:
        """Whether later copies will be written there."""
        return self._held is not None and same_place(self._held, copy)

    def release(self) -> None:
        """The end of `hold`."""
        self._held = self._given = None

    def close_step(self) -> None:
        """Drop the copy at the end of an optimizer step; for good if the weight's memory comes and goes.

        FSDP frees a gathered weight behind its layer. To keep a copy of it would undo the sharding.
        """
        if self._entry is not None and self._entry.storage.nbytes() == 0:
            self.policy = "none"
        self.followed = True
        self.drop()

    def wanted(self, weight: Tensor, spec: LinearSpec) -> Policy:
        """What is kept of this weight in training."""
        if not spec.shared_weight or type(weight) not in (Tensor, nn.Parameter):
            return "none"
        if weight.requires_grad:
            return self.policy if self.followed else "none"
        return "one" if weight.dtype == torch.float32 else "none"

    def get(
        self, weight: Tensor, spec: LinearSpec, state: OperandState, *, ready: bool, training: bool
    ) -> Quantized | None:
        """The copy of `weight`, made now if need be; None where none is to be kept. Eager mode only."""
        if not training or not torch.is_grad_enabled():
            return None
        wanted = self.wanted(weight, spec)
        if wanted == "none":
            return None
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return self.lent  # None: a graph that is replayed after the next step has to cast
        key = _key(weight)
        self.asked = True
        if self._awaited is not None:
            self._awaited[0]()
        if self._entry is not None and self._entry.key == key:
            if self._entry.news is not None:
                self._news, self._entry = self._entry.news, self._entry._replace(news=None)
            if self._held is not None and self._entry.quantized is not self._given:
                self._entry = self._entry._replace(quantized=self._into_held(self._entry.quantized))
            return self._entry.quantized
        assert spec.fprop_weight is not None
        self._entry = None  # before the new one is made: its memory can serve
        quantized = quantize_matrix(
            weight, spec.fprop_weight, state, ready=ready, observe=True, partials=self.noted_amax(weight),
            columns=wanted == "both",
        )  # fmt: skip
        quantized = self._into_held(quantized)
        self._entry = _Entry(key, quantized, weight.untyped_storage())
        return quantized

    def _into_held(self, new: Quantized) -> Quantized:
        """The held copy with the contents of `new`; `new` itself where none is held or somebody still reads it."""
        if self._held is None:
            return new
        if not _alike(self._held, new):
            self.release()
            return new
        if self._given is not None and sys.getrefcount(self._given) != _ALONE:
            return new
        for old, fresh in zip(_tensors(self._held), _tensors(new), strict=True):
            if old is not None and fresh is not None:
                old.copy_(fresh)
        self._given = Quantized(*self._held)
        return self._given


class _Given:
    def __init__(self) -> None:
        self.given = Quantized(None, torch.zeros(()))

    def count(self) -> int:
        return sys.getrefcount(self.given)


_ALONE = _Given().count()  # of what an attribute alone holds; versions of Python count differently
_NOTHING_HELD = {"_held": None, "_given": None, "lent": None}


def same_place(a: Quantized, b: Quantized) -> bool:
    """Whether two copies are the same tensors."""
    return all(x is y for x, y in zip(_tensors(a), _tensors(b), strict=True))


def _tensors(copy: Quantized) -> tuple[Tensor | None, ...]:
    return copy.qdata, copy.scale, copy.transposed


def _alike(a: Quantized, b: Quantized) -> bool:
    """Whether two copies have the same layouts."""
    kinds = [tuple(None if t is None else (t.shape, t.dtype, t.device) for t in _tensors(copy)) for copy in (a, b)]
    return kinds[0] == kinds[1]
