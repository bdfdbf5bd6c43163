# SPDX-License-Identifier: Apache-2.0
"""Weight gradients on their way into the optimizer: one low-precision format, and FP8-LM's factor mu.

    s    = 2 ** floor(log2(max / amax))         of the unscaled gradient g; max of E4M3 is 448
    code = saturate(g * s * mu)                 what a wire or a buffer would hold
    g'   = code / (s * mu)                      what the optimizer sees

mu trades the two ends of the format (FP8-LM, arXiv 2310.18313, section 2.1): when more than 1e-5 of a tensor's codes
sit at the format's maximum, mu halves for the next step, otherwise it grows by 2 ** (1/1000), doubling in 1000 steps.
It is kept as an integer k, mu = 2 ** (k / 1000), so that 1000 clean steps are exactly a factor of 2, on every machine.

What the paper leaves open is settled here. The largest element sits at the maximum by right, so one such code per
tensor is no saturation. On one process nothing is summed, mu > 1 could only saturate, and mu stays in [2**-16, 1];
with several ranks it stays in [2**-16, 2**16]. A gradient that is zero or not finite teaches nothing and leaves mu
alone. Elements that are not finite become NaN, which an optimizer of ours answers by skipping the step.

`attach` puts this in front of any optimizer's `step`. For an optimizer of this package that is a note: its kernels
quantise a gradient where they use it, in registers (`optim/fused.py`), and nobody sees g'. For any other one `p.grad`
is swapped for g' before the step and put back after.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hf_lowprec import ops
from hf_lowprec.formats import get_format
from hf_lowprec.numerics import ScaledTensor, counter_hash, dequantize, finite_amax, quantize, scale_from_amax
from hf_lowprec.optim.base import LowPrecOptimizer
from hf_lowprec.optim.shards import Shard, by_ranks, shard_of
from hf_lowprec.optim.states import matrix, stream_seed
from hf_lowprec.recipe import Communication

if TYPE_CHECKING:
    from hf_lowprec.kernels.wires import Exchange, Wire

_REACH = 16  # mu stays within 2 ** -16 and, with several ranks, 2 ** 16
_STATE = ("k", "saturated", "count")
_KERNELS = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of gradients that they take
_EXCHANGES = 16  # lists of gradients whose tables are kept, or more


class Seen(NamedTuple):
    """0-d: how many codes are at the format's maximum; whether all elements are finite; whether one is not zero."""

    extremes: Tensor
    finite: Tensor
    nonzero: Tensor


class GradientQuantizer:
    """Quantises the gradients of `n` parameters as `communication` says, with one mu each.

    world_size: ranks that share the gradients; None asks torch.distributed at each call.

    State, all of it on the device of the gradients, [n] each: `k` int32, mu = 2 ** (k / growth); `saturated` int64,
    codes at the maximum beyond one per tensor, summed over all steps; `count` int64, gradients quantised.

    Raises ValueError: a delayed scaling (a gradient is scaled by its own amax).
    """

    def __init__(self, communication: Communication, n: int, *, world_size: int | None = None) -> None:
        if communication.gradient.scaling.method == "delayed":
            raise ValueError("communication.gradient: delayed scaling is for GEMM operands, not for weight gradients")
        self.communication = communication
        self.world_size = world_size
        self.k = torch.zeros(n, dtype=torch.int32)
        self.saturated = torch.zeros(n, dtype=torch.int64)
        self.count = torch.zeros(n, dtype=torch.int64)
        self._layouts: dict[tuple[tuple[int, int], ...], tuple[Tensor, Tensor]] = {}
        self._exchanges: dict[tuple[Any, ...], tuple[Exchange, list[Tensor]]] = {}
        fmt = get_format(communication.gradient.format)
        self._extremes = {fmt.encode(value) for value in (fmt.max, fmt.min) if value}

    @property
    def mu(self) -> Tensor:
        """[n] float32, the factors of the next step; all 1 without `auto_scale`."""
        return self._mu(self.k)

    def _mu(self, k: Tensor) -> Tensor:
        return torch.exp2(k.clamp(max=self._upper()).double() / self.communication.growth).float()

    @torch.no_grad()
    def quantize(self, index: int, grad: Tensor) -> Tensor:
        """g' for the gradient of parameter number `index`, in its dtype and shape; advances that mu. Never waits.

        A sharded gradient (FSDP2's DTensor) has one scale and one mu on all ranks, which takes two small collectives
        for all gradients together. (Scales per column or tile would be of this rank's rows.)

        Raises RuntimeError: a sparse gradient.
        """
        return self.quantize_all({index: grad})[index]

    @torch.no_grad()
    def quantize_all(self, grads: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """`quantize` for several gradients of one device at once: mu's state machine runs once for all of them."""
        if not grads:
            return {}
        for grad in grads.values():
            if grad.layout != torch.strided:
                raise RuntimeError(
                    f"{grad.layout} gradient cannot be quantised; build the embedding with sparse=False"
                )
        local = {i: g.to_local() if isinstance(g, DTensor) else g for i, g in grads.items()}
        self.to(next(iter(local.values())).device)
        ranks = by_ranks(grads)
        if self._have_kernels(local):
            return self._exchange(grads, local, ranks)
        factors = self.mu.unbind() if self.communication.auto_scale else None
        scales = self._shared_scales(local, ranks)
        out: dict[int, Tensor] = {}
        seen: dict[int, Seen] = {}
        for index, grad in local.items():
            mu, scale = None if factors is None else factors[index], scales.get(index)
            value, seen[index] = self._cast(index, grad, mu, scale, self._start(grads[index]))
            out[index] = _as_shard(value, grads[index])
        for shard, members in ranks:
            seen.update(zip(members, _seen_by_all(shard, [seen[i] for i in members]), strict=True))
        indices, numel = self._layout(tuple((index, grad.numel()) for index, grad in grads.items()))
        extremes, finite, nonzero = (torch.stack(some) for some in zip(*seen.values(), strict=True))
        self.observe(indices, extremes, numel, finite & nonzero)
        return out

    @property
    def carried(self) -> bool:
        """Whether kernels have this format."""
        from hf_lowprec.kernels.wires import carries

        return carries(self.communication.gradient)

    def wire(self, index: int, numel: int) -> Wire:
        """What kernels know of the way of gradient number `index`: mu and counters, which they advance in place.

        numel: elements of the whole tensor.
        """
        from hf_lowprec.kernels.wires import Wire

        policy = self.communication
        return Wire(
            self.k, self.saturated, self.count, index, auto=policy.auto_scale, saturation=policy.saturation,
            growth=policy.growth, upper=self._upper(), numel=numel,
        )  # fmt: skip

    def marks(self) -> tuple[Any, ...]:
        """What a `wire` was made from, to be compared."""
        return id(self.k), id(self.saturated), id(self.count), self._upper()

    def _have_kernels(self, grads: Mapping[int, Tensor]) -> bool:
        if self.k.device.type != "cuda":
            return False
        from hf_lowprec.optim.fused import available

        known = all(grad.dtype in _KERNELS for grad in grads.values())
        return known and available(self.k.device) and self.carried

    def _exchange(
        self, grads: Mapping[int, Tensor], local: Mapping[int, Tensor], ranks: Sequence[tuple[Shard, list[int]]]
    ) -> dict[int, Tensor]:
        """`quantize_all` in a few launches for all of them. Ranks that share gradients reduce what kernels saw."""
        from hf_lowprec.kernels.wires import AMAX, EXTREMES, FINITE, Exchange

        key = (self._upper(), *((i, grad.shape, grads[i].shape, grad.dtype) for i, grad in local.items()))
        values = [grad.contiguous() for grad in local.values()]
        if key not in self._exchanges:
            if len(self._exchanges) > max(_EXCHANGES, len(self.k)):  # one for all, or (gradient release) for each
                self._exchanges.clear()
            made = Exchange(values, [self.wire(index, grad.numel()) for index, grad in grads.items()])
            place = {index: row for row, index in enumerate(local)}
            rows = [torch.tensor([place[i] for i in members]).to(self.k.device) for _, members in ranks]
            self._exchanges[key] = made, rows
        exchange, rows = self._exchanges[key]
        shared = [(shard, some) for (shard, _), some in zip(ranks, rows, strict=True) if shard.group is not None]

        def before_the_cast(seen: Tensor) -> None:
            for shard, some in shared:
                for column in (AMAX, FINITE):
                    largest = shard.maximum(seen[some, column].view(torch.float32))
                    seen[some, column] = largest.view(torch.int32)

        def before_mu(seen: Tensor) -> None:
            for shard, some in shared:
                seen[some, EXTREMES] = shard.total(seen[some, EXTREMES])

        with torch.cuda.device(self.k.device) if self.k.is_cuda else nullcontext():  # Triton launches on the current
            out = exchange.run(values, before_the_cast, before_mu) if shared else exchange.run(values)
        return {index: _as_shard(value, grads[index]) for index, value in zip(local, out, strict=True)}

    def _start(self, grad: Tensor) -> int:
        """Where stochastic rounding begins to count."""
        shard = shard_of(grad) if self.communication.gradient.rounding.mode == "stochastic" else None
        return 0 if shard is None else shard.start

    def _shared_scales(
        self, local: Mapping[int, Tensor], ranks: Sequence[tuple[Shard, list[int]]]
    ) -> dict[int, Tensor]:
        """Scales of sharded gradients that have one for the whole tensor."""
        quant = self.communication.gradient
        out: dict[int, Tensor] = {}
        if quant.scaling.granularity == "tensor" and quant.scaling.method == "current":
            for shard, members in ranks:
                amax = shard.maximum(torch.stack([finite_amax(local[i]) for i in members]))
                out.update(zip(members, scale_from_amax(amax, quant.format, quant.scaling).unbind(), strict=True))
        return out

    def _layout(self, key: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
        """Indices and sizes on the device; copied there once, because a copy per step would wait for the host."""
        if key not in self._layouts:
            if len(self._layouts) > len(self.k):  # one for all, or with gradient release one for each
                self._layouts.clear()
            table = torch.tensor(key, dtype=torch.int64).to(self.k.device)
            self._layouts[key] = table[:, 0].contiguous(), table[:, 1].contiguous()
        return self._layouts[key]

    def _cast(
        self, index: int, grad: Tensor, mu: Tensor | None, scale: Tensor | None, start: int
    ) -> tuple[Tensor, Seen]:
        """g', and what the cast saw.

        scale: None: from this tensor. start: its flat index in the whole tensor.
        """
        quant = self.communication.gradient
        hp = matrix(grad.float())
        scale = ops.current_scale(hp, ops.quant_key(quant)) if scale is None else scale
        seed = stream_seed(quant.rounding, index, "grad", self.count[index])
        used = scale if mu is None else scale / mu
        if start:  # the operator counts from 0
            words = None if seed is None else counter_hash(seed, hp.numel(), start=start, device=hp.device)
            scaled = quantize(hp, quant, scale=used, words=words)
        else:
            scaled = ScaledTensor(*ops.quantize(hp, ops.quant_key(quant), used, fixed=True, seed=seed))
        finite = hp.isfinite()
        value = torch.where(finite, dequantize(scaled, quant, torch.float32), torch.nan)
        seen = Seen(self._at_extremes(scaled), finite.all(), hp.any())
        return value.reshape(grad.shape).to(grad.dtype), seen

    def observe(self, index: int | Tensor, extremes: Tensor, numel: int | Tensor, valid: Tensor | bool = True) -> None:
        """One step of mu's state machine for parameter `index`, of whose `numel` codes `extremes` sit at the maximum.

        For several parameters at once every argument is a tensor [m]. valid: False (zero or non-finite gradient)
        leaves mu where it is.
        """
        policy = self.communication
        saturated = (extremes - 1).clamp(min=0)
        if policy.auto_scale:
            k = self.k[index]
            moved = torch.where(saturated > policy.saturation * numel, k - policy.growth, k + 1)
            moved = moved.clamp(-_REACH * policy.growth, self._upper()).to(k.dtype)
            self.k[index] = torch.where(torch.as_tensor(valid, device=k.device), moved, k)
        self.saturated[index] += saturated
        self.count[index] += 1

    def _at_extremes(self, scaled: ScaledTensor) -> Tensor:
        codes = scaled.qdata
        codes = codes.view(torch.uint8) if codes.dtype.itemsize == 1 else codes.view(torch.int16).int() & 0xFFFF
        at = torch.zeros_like(codes, dtype=torch.bool)
        for code in self._extremes:
            at |= codes == code
        return at.sum()

    def _upper(self) -> int:
        ranks = self.world_size
        if ranks is None:
            ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        return _REACH * self.communication.growth if ranks > 1 else 0

    def to(self, device: torch.device) -> None:
        if self.k.device != device:
            self._layouts.clear()
            self._exchanges.clear()
            for name in _STATE:
                setattr(self, name, getattr(self, name).to(device))

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).clone() for name in _STATE}

    def check(self, state_dict: Any) -> None:
        """Raises ValueError: missing keys, wrong shape or dtype, mu or counters out of their range."""
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"gradient quantizer: the state is a {type(state_dict).__name__}, not a dict")
        for name in _STATE:
            value, own = state_dict.get(name), getattr(self, name)
            if not isinstance(value, Tensor) or value.shape != own.shape or value.dtype != own.dtype:
                what = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"gradient quantizer: {name} should be {own.dtype} {tuple(own.shape)}, got {what}")
        limit = _REACH * self.communication.growth
        if not bool((state_dict["k"].abs() <= limit).all()):
            raise ValueError(f"gradient quantizer: k beyond +-{limit}; the file is corrupt, or of another growth")
        if not all(bool((state_dict[name] >= 0).all()) for name in ("saturated", "count")):
            raise ValueError("gradient quantizer: negative counters; the file is corrupt")

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Raises what `check` raises, before anything changed."""
        self.check(state_dict)
        for name in _STATE:  # in place: kernels know the addresses
            getattr(self, name).copy_(state_dict[name])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layouts": {}, "_exchanges": {}}  # a copy's tables would hold addresses of this one


def _seen_by_all(shard: Shard, seen: Sequence[Seen]) -> list[Seen]:
    """Of whole gradients, from what every rank saw of its rows."""
    extremes, finite, nonzero = (torch.stack(some).to(torch.int64) for some in zip(*seen, strict=True))
    total = shard.total(torch.stack([extremes, 1 - finite, nonzero]))
    columns = (total[0].unbind(), (total[1] == 0).unbind(), (total[2] > 0).unbind())
    return [Seen(*one) for one in zip(*columns, strict=True)]


def _as_shard(value: Tensor, grad: Tensor) -> Tensor:
    """`value` placed like `grad`, if that is a DTensor."""
    if not isinstance(grad, DTensor):
        return value
    mesh, placements = grad.device_mesh, grad.placements
    return DTensor.from_local(value, mesh, placements, run_check=False, shape=grad.shape, stride=grad.stride())


class GradientSwap:
    """Shows an optimizer quantised gradients during its step; `p.grad` is the caller's own tensor before and after.

    index: the parameters whose gradients are quantised, and their numbers in `quantizer`. Others pass untouched, so
    the hooks fit one optimizer (`attach`) as well as torch's global ones (`register_optimizer_step_pre_hook`).

    An optimizer of this package is told once and quantises where it reads a gradient. Any other finds g' in `p.grad`:
    there both gradients of a parameter exist during the step; it is the price of handing back what was there. A
    closure computes gradients inside the step: they are swapped when it returns.
    """

    def __init__(self, quantizer: GradientQuantizer, index: Mapping[Tensor, int]) -> None:
        self.quantizer = quantizer
        self.index = dict(index)
        self._swapped: dict[Tensor, tuple[Tensor, Tensor]] = {}  # parameter -> its own gradient, the quantised one
        self._told: weakref.WeakSet[LowPrecOptimizer] = weakref.WeakSet()  # by `tell`, until `forget`

    def attach(self, optimizer: Optimizer) -> Callable[[], None]:
        """Puts itself in front of `optimizer.step`; returns the function that undoes it."""
        if isinstance(optimizer, LowPrecOptimizer):
            optimizer.swaps.append(self)
            return functools.partial(_remove, optimizer.swaps, self)
        handles = (
            optimizer.register_step_pre_hook(self.pre_step),
            optimizer.register_step_post_hook(self.post_step),
        )

        def detach() -> None:
            for handle in handles:
                handle.remove()

        return detach

    def tell(self, optimizer: LowPrecOptimizer) -> None:
        """The gradients that it uses until the end of its next step are to be quantised."""
        if self not in optimizer.swaps:
            optimizer.swaps.append(self)
            self._told.add(optimizer)

    def forget(self, optimizer: LowPrecOptimizer) -> None:
        """Undoes `tell`, not `attach`. `optimizer.step` calls it when it ends, also by raising."""
        if optimizer in self._told:
            self._told.discard(optimizer)
            _remove(optimizer.swaps, self)

    def close(self) -> None:
        """Undoes what is left of steps that were begun and never ended."""
        self.restore()
        for optimizer in list(self._told):
            self.forget(optimizer)

    def pre_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.restore()  # a step that raised never reached post_step
        if isinstance(optimizer, LowPrecOptimizer):
            self.tell(optimizer)
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._swap(optimizer)
            return None

        def quantising_closure() -> Any:
            self.restore()
            loss = closure()
            self._swap(optimizer)
            return loss

        return (args[0],), {**kwargs, "closure": quantising_closure}

    def post_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.restore()
        if isinstance(optimizer, LowPrecOptimizer):
            self.forget(optimizer)

    def _swap(self, optimizer: Optimizer) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        mine = {self.index[p]: p for p in params if p in self.index}
        for device in {p.device for p in mine.values()}:
            own = {i: p.grad for i, p in mine.items() if p.device == device}
            for i, quantised in self.quantizer.quantize_all(own).items():
                mine[i].grad = quantised
                self._swapped[mine[i]] = (own[i], quantised)

    def restore(self) -> None:
        """Puts the caller's gradients back, except where somebody has replaced ours meanwhile."""
        for param, (own, quantised) in self._swapped.items():
            if param.grad is quantised:
                param.grad = own
        self._swapped.clear()


def _remove(swaps: list[GradientSwap], swap: GradientSwap) -> None:
    if swap in swaps:
        swaps.remove(swap)
