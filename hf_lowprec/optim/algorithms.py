# SPDX-License-Identifier: Apache-2.0
"""The algorithms, one each: what a step does to one parameter. Kernels (`optim/fused.py`) give the same bits.

Elementwise in float32 (float64 for float64 Parameters), one rounding per operation, in the order written, no fused
multiply-add. Scalars are computed in float64 from `step` and the group, on the device, and rounded once. t is the
number of this step; c the clipping factor; g = grad * c, negated to maximize. Coupled decay: g = g + w * wd.

    adam          m = m + (g - m) * (1 - b1);  v = v * b2 + (g * (1 - b2)) * g                         arXiv 1412.6980
                  decoupled decay: w = w * (1 - lr * wd)                                               arXiv 1711.05101
                  w = w - (m * (lr / (1 - b1^t))) / (sqrt(v) * (1 / sqrt(1 - b2^t)) + eps)
    stable_adam   b^ = b * (1 - b^(t-1)) / (1 - b^t) in place of both b                       arXiv 2304.13013, alg. 2
                  eta = lr / max(1, sqrt(mean(g * g / max(v, eps^2))))
                  w = w * (1 - eta * wd);  w = w - (m * eta) / (sqrt(v) + eps)
    lion          c = m + (g - m) * (1 - b1);  m = m + (g - m) * (1 - b2)                              arXiv 2302.06675
                  w = w * (1 - lr * wd) - sign(c) * lr
    sgd           m = m * momentum + g * (1 - dampening), m = g in the first step                        as torch.optim
                  w = w - m * lr;  nesterov: w = w - (g + m * momentum) * lr;  no momentum: w = w - g * lr

Where a state's scale is `predicted`, it comes from a bound on the new values (`optim/bounds.py`).

Where `states.arithmetic` names a format, the results of three AXPYs are rounded to it, stochastically or to nearest,
before anything reads them (arXiv 1812.08011): g + w * wd; the new m; the new w. For SGD these are all there is. Of the
others v, the ratio, and decoupled decay (a part of the last AXPY) stay in float32: in 1-6-9, which ends at 2^-39, a v
of ordinary gradients would be 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowprec.numerics import sqrt_rn
from hf_lowprec.optim import compiled, cpu, inplace
from hf_lowprec.optim import states as st
from hf_lowprec.optim.bounds import adam_ratio as adam_ratio
from hf_lowprec.optim.bounds import bounds, coupled, float32
from hf_lowprec.optim.shards import Shard
from hf_lowprec.recipe import Quant, Residual, States

Group = dict[str, Any]
Scalars = dict[str, Any]  # 0-d tensors, and floats that the host knows
Moments = dict[str, Tensor]
_STEP_BITS = 31


@dataclass(slots=True, eq=False)
class Item:
    """One parameter in a step. An optimizer keeps its items from step to step; `grad` is set in between only.

    states: what this parameter really keeps (`overrides.of_parameter`). slots: `states.layout` of them.
    position, index: its place in the group, and over all groups (which seeds stochastic rounding).
    version: of the Parameter after the last step, where an edit of it matters (`base._widen`), else -1.
    route: -1 not known yet, else an index of the optimizer's (device, has a kernel).
    start: flat index at which `param` begins, where the item is a slice of one (`cpu.slices`), or of a shard.
    key: the Parameter as the optimizer knows it. It is `param`, but for a DTensor: then `param`, `grad` and `state`
        are this rank's rows of it, which `shard` describes.
    wires: (GradientQuantizer, number) of the communication formats that its gradient passes through before the step.
    """

    param: Tensor
    state: dict[str, Tensor]
    states: States
    group: Group
    position: int
    index: int
    grad: Any = None
    moments: tuple[str, ...] = ()
    slots: dict[str, Quant | Residual | str | None] = field(default_factory=dict)
    grad_dtype: torch.dtype | None = None
    version: int = -1
    route: int = -1
    start: int = 0
    key: Any = None
    shard: Shard | None = None
    wires: tuple[tuple[Any, int], ...] = ()

    def quant(self, moment: str) -> Quant | None:
        """How the moment is kept."""
        slot = self.slots[moment]
        assert slot is None or isinstance(slot, Quant)
        return slot

    @property
    def predicted(self) -> list[str]:
        """The slots whose scale is predicted."""
        return [name for name, quant in self.slots.items() if st.is_predicted(quant)]


# --- scalars -------------------------------------------------------------------------------------------------------


def _power(beta: float, t: int) -> float:
    result = 1.0
    while t:
        result, beta, t = result * beta if t & 1 else result, beta * beta, t >> 1
    return result


def power(beta: float, t: Tensor) -> Tensor:
    """beta^t in float64 for whole t in [0, 2^31): squarings on the host, then at most 31 products, lowest bit first.

    `pow` differs between libraries and devices in the last bit; multiplications do not.
    """
    bits = t.to(torch.int64)
    if t.device.type == "cpu" and not torch.compiler.is_compiling():  # the same products, without 93 tiny operations
        steps = bits.reshape(-1).tolist()
        known = {step: _power(beta, step) for step in set(steps)}
        return torch.tensor([known[step] for step in steps], dtype=torch.float64, device=t.device).view(t.shape)
    result = torch.ones_like(t, dtype=torch.float64)
    for k in range(_STEP_BITS):
        result = torch.where((bits >> k) & 1 == 1, result * beta, result)
        beta = beta * beta
    return result


def _adam_scalars(group: Group, t: Tensor) -> Scalars:
    (b1, b2), lr = group["betas"], _lr(group, t.device)
    return {
        "b2": b2,
        "omb1": 1 - b1,
        "omb2": 1 - b2,
        "b1": b1,
        "alpha": lr / (1 - power(b1, t)),
        "rbc2": 1 / (1 - power(b2, t)).sqrt(),
        "decay": 1 - lr * group["weight_decay"],
    }


def _stable_adam_scalars(group: Group, t: Tensor) -> Scalars:
    b1, b2 = (b * (1 - power(b, t - 1)) / (1 - power(b, t)) for b in group["betas"])
    return {"b1": b1, "b2": b2, "omb1": 1 - b1, "omb2": 1 - b2, "eps2": group["eps"] * group["eps"]}


def _lion_scalars(group: Group, t: Tensor) -> Scalars:
    b1, b2 = group["betas"]
    return {"b2": b2, "omb1": 1 - b1, "omb2": 1 - b2, "decay": 1 - _lr(group, t.device) * group["weight_decay"]}


def _sgd_scalars(group: Group, t: Tensor) -> Scalars:
    return {"momentum": group["momentum"], "damped": torch.where(t == 1, torch.ones_like(t), 1 - group["dampening"])}


def _lr(group: Group, device: torch.device) -> Any:
    """The learning rate in float64. A 0-d tensor of the CPU goes with those of any device, without a copy."""
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        return lr
    return (lr if lr.device.type == "cpu" else lr.to(device)).double().reshape(())


def _scalars(algorithm: str, items: Sequence[Item]) -> list[Scalars]:
    """Scalars of items of one group and one precision, for all of them at once: a step's worth of tiny operations."""
    group, hp = items[0].group, st.hp_dtype(items[0].param)
    t = torch.stack([item.state["step"] for item in items]).double() + 1
    shared = {"lr": _lr(group, t.device), "wd": group["weight_decay"], "eps": group.get("eps", 0.0)}
    out: list[Scalars] = [{} for _ in items]
    for name, value in {**shared, **ALGORITHMS[algorithm].scalars(group, t)}.items():
        if not isinstance(value, Tensor):
            values: Iterable[Any] = [float32(value) if hp == torch.float32 else value] * len(items)
        else:
            values = value.to(hp).unbind() if value.dim() else [value.to(hp)] * len(items)
        for scalars, one in zip(out, values, strict=True):
            scalars[name] = one
    return out


# --- one step of one parameter: (g, w, moments) -> (w, moments); arguments are only read ----------------------------


def _adam(g: Tensor, w: Tensor, old: Moments, s: Scalars, item: Item) -> tuple[Tensor, Moments]:
    new = _adam_moments(g, old, s, item)
    if item.group["weight_decay"] and item.group["decoupled_weight_decay"]:
        w = w * s["decay"]
    denominator = sqrt_rn(new["exp_avg_sq"]).mul_(s["rbc2"]).add_(s["eps"])
    return w - (new["exp_avg"] * s["alpha"]).div_(denominator), new


def _adam_moments(g: Tensor, old: Moments, s: Scalars, item: Item) -> Moments:
    m = _rounded((g - old["exp_avg"]).mul_(s["omb1"]).add_(old["exp_avg"]), "exp_avg", item)
    v = (g * s["omb2"]).mul_(g).add_(old["exp_avg_sq"] * s["b2"])
    return {"exp_avg": m, "exp_avg_sq": v}


def _stable_adam(g: Tensor, w: Tensor, old: Moments, s: Scalars, item: Item) -> tuple[Tensor, Moments]:
    new = _adam_moments(g, old, s, item)
    m, v = new["exp_avg"], new["exp_avg_sq"]
    square, numel = (g * g).div_(v.clamp(min=s["eps2"])).sum(dtype=torch.float64), g.numel()
    if item.shard is not None:
        square, numel = item.shard.total(square), item.shard.shape.numel()
    square = square / max(1, numel)
    eta = (_lr(item.group, g.device) / square.sqrt().clamp(min=1)).to(w.dtype)
    if item.group["weight_decay"]:
        w = w * (1 - eta * s["wd"])
    return w - (m * eta).div_(sqrt_rn(v).add_(s["eps"])), new


def _lion(g: Tensor, w: Tensor, old: Moments, s: Scalars, item: Item) -> tuple[Tensor, Moments]:
    m = old["exp_avg"]
    difference = g - m
    direction = (difference * s["omb1"]).add_(m).sign_()
    if item.group["weight_decay"]:
        w = w * s["decay"]
    new = _rounded(difference.mul_(s["omb2"]).add_(m), "exp_avg", item)
    return w - direction.mul_(s["lr"]), {"exp_avg": new}


def _sgd(g: Tensor, w: Tensor, old: Moments, s: Scalars, item: Item) -> tuple[Tensor, Moments]:
    new: Moments = {}
    if item.group["momentum"]:
        m = (old["momentum_buffer"] * s["momentum"]).add_(g * s["damped"])
        m = new["momentum_buffer"] = _rounded(m, "momentum_buffer", item)
        g = (m * s["momentum"]).add_(g) if item.group["nesterov"] else m
    return w - g * s["lr"], new


def _rounded(value: Tensor, stream: str, item: Item) -> Tensor:
    """The result of an AXPY, in `states.arithmetic`."""
    if item.states.arithmetic is None:
        return value
    step = item.state["step"] + 1
    return st.round_result(value, item.states, stream, index=item.index, step=step, start=item.start)


# --- a step --------------------------------------------------------------------------------------------------------


class Algorithm(NamedTuple):
    scalars: Callable[[Group, Tensor], Scalars]
    update: Callable[[Tensor, Tensor, Moments, Scalars, Item], tuple[Tensor, Moments]]
    elementwise: bool = True  # nothing in it looks at the whole tensor


ALGORITHMS = {
    "adam": Algorithm(_adam_scalars, _adam),
    "stable_adam": Algorithm(_stable_adam_scalars, _stable_adam, elementwise=False),
    "lion": Algorithm(_lion_scalars, _lion),
    "sgd": Algorithm(_sgd_scalars, _sgd),
}


def gradient_amax(items: Sequence[Item]) -> Tensor:
    """[n] float32 on the device of the items: the largest magnitude of each gradient; NaN or Inf if it holds one."""
    grads = [item.grad for item in items]
    some = [grad for grad in grads if grad.numel()]
    if some and some[0].device.type == "cpu":  # an infinity norm takes twenty times as long there
        norms = iter([torch.maximum(high, -low) for low, high in map(torch.aminmax, some)])
    else:
        norms = iter(_infinity_norms(some))
    nothing = torch.zeros((), dtype=torch.float32, device=grads[0].device)
    return torch.stack([next(norms).float() if grad.numel() else nothing for grad in grads])


def _infinity_norms(grads: Sequence[Tensor]) -> list[Tensor]:
    """In float32 or float64, in few launches."""
    out: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(grad.dtype for grad in grads):
        members = [i for i, grad in enumerate(grads) if grad.dtype == dtype]
        some, wide = [grads[i] for i in members], torch.promote_types(dtype, torch.float32)
        out.update(zip(members, torch._foreach_norm(some, math.inf, dtype=wide), strict=True))
    return [out[i] for i in range(len(grads))]


def all_finite(amax: Tensor) -> Tensor:
    """0-d bool: every gradient is finite, and so is its square in float32."""
    return amax.square().isfinite().all()


def step(
    algorithm: str,
    items: Sequence[Item],
    *,
    amax: Tensor | None,
    clip: Tensor | None,
    finite: Tensor,
    elementwise: bool = False,
    compile: bool = False,
) -> Tensor:
    """One step of `items`, all of one device, or nothing where `finite` (0-d bool) is False.

    amax: `gradient_amax`; needed by predicted scales only. clip: float32 0-d. elementwise: elements whose gradient
    is not finite keep their weight and moments. compile: on the CPU, by `optim/compiled.py`. Returns the number of
    elements that were left alone, int64 0-d.
    """
    kinds: dict[tuple[int, torch.dtype], list[int]] = {}
    for i, item in enumerate(items):
        kinds.setdefault((id(item.group), st.hp_dtype(item.param)), []).append(i)
    skipped = finite.new_zeros((), dtype=torch.int64)
    on_host = finite.device.type == "cpu" and not torch.compiler.is_compiling()  # looking at `finite` is free
    if on_host and not finite:
        return skipped
    for members in kinds.values():
        chosen = [items[i] for i in members]
        for i, item, scalars in zip(members, chosen, _scalars(algorithm, chosen), strict=True):
            limit = {}
            if amax is not None:
                limit = bounds(algorithm, item, scalars, amax[i] if clip is None else amax[i] * clip)
            decision = None if on_host else finite
            fast = on_host and not elementwise and inplace.covers(algorithm, item)
            sliced = on_host and ALGORITHMS[algorithm].elementwise
            sizes = compiled.SIZES if compile else (inplace.SLICE if fast else cpu.SLICE,)
            native = (
                compiled.stepper(algorithm, item, scalars, limit, clip, elementwise) if compile and sliced else None
            )
            for part in cpu.slices(item, *sizes) if sliced else (item,):
                if native is not None and compiled.covers(part):
                    left = native(part)
                    skipped += 0 if left is None else left
                    continue
                if fast and inplace.whole(part):
                    inplace.update(algorithm, part, scalars, clip)
                    continue
                good = finite_elements(part.grad) if elementwise else None
                update(algorithm, part, scalars, limit, clip, decision, good)
                if good is not None:
                    skipped += good.logical_not().sum()
            st.select_(item.state["step"], item.state["step"] + 1, decision)
    return skipped


def finite_elements(grad: Tensor) -> Tensor:
    return grad.float().square().isfinite()


def update(
    algorithm: str,
    item: Item,
    s: Scalars,
    limit: Moments,
    clip: Tensor | None,
    finite: Tensor | None,
    good: Tensor | None,
) -> None:
    """Everything but `step`. finite: as `states.write` has it."""
    state, hp = item.state, st.hp_dtype(item.param)
    step = state["step"] + 1
    w = st.read_weight(state, item.param, item.states, item.shard)
    old = {name: st.read(state, name, item.quant(name), hp, item.param.shape) for name in item.moments}

    g = item.grad.to(hp)
    if good is not None:
        g = torch.where(good, g, 0)
    if clip is not None:
        g = g * clip
    if item.group["maximize"]:
        g = -g
    if coupled(algorithm, item.group) and item.group["weight_decay"]:
        g = _rounded(w * s["wd"] + g, "l2", item)
    new_w, new = ALGORITHMS[algorithm].update(g, w, old, s, item)
    new_w = _rounded(new_w, "master", item)
    if good is not None:
        new_w = torch.where(good, new_w, w)
        new = {name: torch.where(good, value, old[name]) for name, value in new.items()}

    for name, value in new.items():
        quant = item.quant(name)
        seed = None if quant is None else st.stream_seed(quant.rounding, item.index, name, step)
        st.write(
            state, name, quant, value,
            finite=finite, seed=seed, bound=limit.get(name), start=item.start, shard=item.shard,
        )  # fmt: skip
    st.write_weight(
        state, item.param, item.states, new_w,
        index=item.index, step=step, finite=finite, bound=limit.get("master"), start=item.start, shard=item.shard,
    )  # fmt: skip
