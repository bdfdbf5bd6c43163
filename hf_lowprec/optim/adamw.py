# SPDX-License-Identifier: Apache-2.0
"""AdamW and Adam whose states are data: any format, scaling and rounding that a recipe can say.

    m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
    w = w (1 - lr wd) - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

One parameter at a time: its slots (`optim/states.py`) are read to float32, updated, and written back. With all states
in float32 the arithmetic is torch.optim.AdamW's, operation by operation.

Which tensor is the master depends on how the Parameter was loaded:

    float32 Parameter                  the Parameter is the master, updated in float32
    16-bit Parameter, states.master    the master lives in the state; Parameter = cast(master) after every step
    16-bit Parameter, no master        the Parameter is updated in place, rounded as `states.update` says

A 2-byte master cannot take an update below half its ulp: with learning rates of fine-tuning, nearest rounding freezes
it altogether. Recipes therefore round masters stochastically unless a paper says otherwise.

An element of a Parameter that somebody edited (loading weights, merging an adapter) no longer equals cast(master);
there the Parameter wins and the master follows.

A step in which any gradient holds NaN or Inf (or a value whose square overflows float32) does nothing but count itself
in `skipped_steps`. Nothing in a step waits for the device: `step` counts, bias corrections and that decision are
tensors. Loading and adopting do wait.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_lowprec.formats import get_format
from hf_lowprec.numerics import round_to_format
from hf_lowprec.optim import states as st
from hf_lowprec.recipe import Quant, States

_DROPPED = ("amsgrad", "foreach", "fused", "capturable", "differentiable")  # keys of torch's groups with no use here
_FORMAT = {torch.float16: get_format("e5m10"), torch.bfloat16: get_format("e8m7")}
_ADOPTED_BY = "_hf_lowprec_adopted_by"  # on an adopted optimizer: the one it forwards to
_State = defaultdict[Tensor, dict[str, Tensor]]

# Called with an AdamW before it saves or loads. An optimizer knows Parameters, not models: `stepping`, a layer above,
# puts here what finds the converted models they belong to, so that their amax histories travel in the checkpoint.
BEFORE_CHECKPOINT: list[Callable[[Optimizer], object]] = []


class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv 1711.05101) and low-precision states (FP8-LM, arXiv 2310.18313, 2.2).

    params: tensors or groups, as for torch's optimizers; a group may name its own `states`.
    lr: float or 0-d tensor.
    states: `fp32`; `fp8-lm` (E4M3 first moment, FP16 second moment, FP16 master, each with a scale per tensor); `#0`,
        `#1`, `#2a`, `#2b`, `#3` of FP8-LM's decoupling study; or a `recipe.States`.
    decoupled: False is Adam's L2 regularisation: the decay joins the gradient, and so the moments.

    state per parameter: `step` float32 0-d; the slots `exp_avg`, `exp_avg_sq` and, for 16-bit Parameters, `master`. A
    float32 slot stands under its name; a quantised one is `<slot>_qdata`, codes in its format, and `<slot>_scale`, so
    that torch's own Adam, loading this state, stops with a KeyError instead of reading codes as moments.

    skipped_steps: int64 0-d on the device, steps that met a non-finite gradient.

    Raises ValueError for hyperparameters out of range and for states that diverge (`#4`) or do not exist; TypeError
    for parameters that are sharded or not floating point; RuntimeError in `step` for sparse gradients.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        states: str | States = "fp8-lm",
        maximize: bool = False,
        decoupled: bool = True,
    ) -> None:
        if not isinstance(lr, Tensor) and not lr >= 0:
            raise ValueError(f"lr: {lr} is not >= 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: {betas} are not both in [0, 1)")
        if not eps >= 0 or not weight_decay >= 0:
            raise ValueError(f"eps, weight_decay: {eps}, {weight_decay} are not both >= 0")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled,
            "states": st.states_name(states),
        }
        super().__init__(params, defaults)
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=next(self._parameters()).device)

    def _parameters(self) -> Iterator[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group's own `states`, if any, may be a name or a `recipe.States`."""
        if "states" in param_group:
            param_group["states"] = st.states_name(param_group["states"])
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            st.check_parameter(param)

    # --- the step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; none of any, if one gradient is not finite.

        Returns the closure's value. Raises RuntimeError on sparse gradients, before anything changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [
            (index, param, param.grad, group)
            for index, (param, group) in enumerate((p, g) for g in self.param_groups for p in g["params"])
            if param.grad is not None
        ]
        if not work:
            return loss
        finite = _all_finite([grad for _, _, grad, _ in work])
        for index, param, grad, group in work:
            _update(self.state[param], param, grad, group, index, finite.to(param.device))
        self.skipped_steps = self.skipped_steps.to(finite.device)
        self.skipped_steps += finite.logical_not()
        return loss

    # --- adoption --------------------------------------------------------------------------------------------------

    @classmethod
    def adopt(cls, optimizer: Optimizer, states: str | States) -> AdamW:
        """Takes over from a torch.optim.AdamW (gives an AdamW) or torch.optim.Adam (gives an Adam).

        The new optimizer has the same `param_groups` list and the same hooks, so LR schedulers built on the old one
        go on driving it. Moments that exist are quantised. The old optimizer shares the new one's `state` and forwards
        its methods, so a script may go on using, saving and loading either; adopted again, it gives the same new one.
        Nothing has changed when it raises: TypeError for another class, or a mode that has no counterpart here
        (amsgrad, differentiable); ValueError for moments that hold NaN or Inf, low-precision states that a torch
        optimizer has loaded, or one that was adopted with other states.
        """
        if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
            raise TypeError(f"adopt takes a torch.optim.Adam or AdamW, not a {type(optimizer).__qualname__}")
        name, resolved = st.states_name(states), st.resolve_states(states)
        known: AdamW | None = optimizer.__dict__.get(_ADOPTED_BY)
        if known is not None:
            if known.defaults["states"] == name:
                return known
            raise ValueError(
                f"the optimizer was adopted with states {known.defaults['states']}; build a new one for {name}"
            )
        st.check_adoptable(optimizer)
        decoupled = isinstance(optimizer, torch.optim.AdamW)
        state: _State = defaultdict(dict)
        for param, old in optimizer.state.items():
            if old:
                state[param] = st.from_torch(old, resolved, param, "adopted optimizer")

        new = AdamW.__new__(AdamW if decoupled else Adam)
        new.__dict__.update(optimizer.__dict__)  # groups and hooks are shared, not copied
        new.__dict__.pop("step", None)  # a scheduler's wrapper, bound to the old optimizer
        new.__dict__.pop("_step_supports_amp_scaling", None)  # a claim of the fused one
        new._patch_step_function()
        new.state, new.defaults = state, dict(optimizer.defaults)
        for group in (new.defaults, *new.param_groups):
            for key in _DROPPED:
                group.pop(key, None)
            group.setdefault("decoupled_weight_decay", decoupled)
            group["states"] = name
        new.skipped_steps = torch.zeros((), dtype=torch.int64, device=next(new._parameters()).device)
        _forward(optimizer, new)
        return new

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's, plus `skipped_steps`. States keep their low-precision dtypes; each group names its `states`."""
        _before_checkpoint(self)
        state_dict = super().state_dict()
        state_dict["skipped_steps"] = self.skipped_steps
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, bit for bit, or the states of torch.optim.Adam(W), quantised (it warns).

        Everything is checked first: ValueError says what is wrong, and nothing has changed (pre-hooks have run: what
        restores other things belongs in a post-hook). torch's own method would cast every state to its parameter's
        dtype, and would replace the group dicts that schedulers share.
        """
        _before_checkpoint(self)
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        groups = self._checked_groups(state_dict)
        state = self._checked_state(state_dict["state"], groups)
        skipped = state_dict.get("skipped_steps", self.skipped_steps)
        if not isinstance(skipped, Tensor) or skipped.shape != () or skipped.dtype != torch.int64:
            raise ValueError("skipped_steps should be a 0-d int64 tensor")

        for group, loaded in zip(self.param_groups, groups, strict=True):
            group.update({key: value for key, value in loaded.items() if key not in ("params", *_DROPPED)})
        self.state.clear()  # in place: an optimizer that this one has adopted shares it
        self.state.update(state)
        self.skipped_steps = skipped.to(self.skipped_steps.device, copy=True)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _checked_groups(self, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
        if missing := {"state", "param_groups"} - set(state_dict):
            raise ValueError(f"not an optimizer's state_dict: it lacks {', '.join(sorted(missing))}")
        groups: list[dict[str, Any]] = deepcopy(state_dict["param_groups"])
        ours, theirs = ([len(g["params"]) for g in source] for source in (self.param_groups, groups))
        if ours != theirs:
            raise ValueError(f"parameters per group: the optimizer has {ours}, the checkpoint {theirs}")
        for mine, loaded in zip(self.param_groups, groups, strict=True):
            if loaded.get("amsgrad"):
                raise ValueError("the checkpoint was written with amsgrad=True, which these states do not keep")
            for key in ("states", "decoupled_weight_decay"):
                if key in loaded and loaded[key] != mine[key]:
                    raise ValueError(
                        f"the checkpoint was written with {key}={loaded[key]!r}, this optimizer has {mine[key]!r}; "
                        "build it like the one that was saved"
                    )
        return groups

    def _checked_state(self, loaded_state: dict[Any, Any], groups: list[dict[str, Any]]) -> _State:
        owners = {
            key: (param, label, mine["states"], "states" not in loaded)
            for mine, loaded in zip(self.param_groups, groups, strict=True)
            for key, param, label in zip(
                loaded["params"], mine["params"], mine.get("param_names", loaded["params"]), strict=True
            )
        }
        state: _State = defaultdict(dict)
        quantised: set[str] = set()
        for key, values in loaded_state.items():
            if key not in owners:
                raise ValueError(f"the checkpoint has a state for {key!r}, which is in none of its groups")
            if not values:  # somebody looked up a parameter that has not been stepped: `state` is a defaultdict
                continue
            param, label, name, foreign = owners[key]
            label, states = f"state of parameter {label}", st.resolve_states(name)
            if foreign:
                state[param] = st.from_torch(values, states, param, label)
                quantised.update(name for quant in st.layout(states, param).values() if quant is not None)
            else:
                st.check_state(values, states, param, label)
                own = self.state.get(param, {})
                state[param] = {k: v if v is own.get(k) else v.to(param.device, copy=True) for k, v in values.items()}
        if quantised:
            names = ", ".join(sorted(quantised))
            warnings.warn(f"states of a torch optimizer were loaded and quantised to {names}", stacklevel=3)
        return state

    def __getstate__(self) -> dict[str, Any]:
        # Plain pickle writes float8 tensors and cannot read them (torch 2.13, `_legacy_load`: UntypedStorage has no
        # dtype); as (bytes, dtype) they pass. torch.save of the state_dict needs none of this.
        state = {param: {k: st.to_bytes(v) for k, v in values.items()} for param, values in self.state.items()}
        return {**super().__getstate__(), "state": state, "skipped_steps": self.skipped_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        loaded = {param: {k: st.from_bytes(v) for k, v in values.items()} for param, values in self.state.items()}
        self.state = defaultdict(dict, loaded)


class Adam(AdamW):
    """Adam with L2 regularisation (arXiv 1412.6980): `AdamW` with `decoupled=False` and no decay by default."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        states: str | States = "fp8-lm",
        maximize: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, states=states, maximize=maximize, decoupled=False)


def _all_finite(grads: list[Tensor]) -> Tensor:
    """0-d bool on the first gradient's device: every gradient is finite, and so is its square in float32."""
    for grad in grads:
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"{grad.layout} gradient: low-precision states are dense; build the embedding with sparse=False"
            )
    norm = torch.nn.utils.get_total_norm([grad for grad in grads if grad.numel()], math.inf).float()
    return norm.square().isfinite()


def _update(
    state: dict[str, Tensor], param: Tensor, grad: Tensor, group: dict[str, Any], index: int, finite: Tensor
) -> None:
    """The equations of the module docstring for parameter number `index`, or nothing where `finite` is False."""
    states = st.resolve_states(group["states"])
    if not state:
        state.update(st.init_state(param, states))
    slots, hp = st.layout(states, param), st.hp_dtype(param)
    (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
    step = state["step"] + 1
    t = step.double()  # 1 - beta2^t cancels: float32 would cost the first steps four digits

    grad = grad.to(hp)
    if group["maximize"]:
        grad = -grad
    weight = _weight(state, param, slots)
    if decay and group["decoupled_weight_decay"]:
        weight = weight * (1 - lr * decay)
    elif decay:
        grad = grad.add(weight, alpha=decay)

    exp_avg = st.read(state, "exp_avg", slots["exp_avg"], hp).lerp(grad, 1 - beta1)
    exp_avg_sq = st.read(state, "exp_avg_sq", slots["exp_avg_sq"], hp).mul(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / (1 - beta2**t).sqrt().to(hp)).add_(group["eps"])
    weight = weight + (exp_avg * (-lr / (1 - beta1**t)).to(hp)).div_(denominator)

    for name, value in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        quant = slots[name]
        seed = None if quant is None else st.stream_seed(quant.rounding, index, name, step)
        st.write(state, name, quant, value, finite=finite, seed=seed)
    _write_weight(state, param, weight, states, index, step, finite)
    st.select_(state["step"], step, finite)


def _weight(state: dict[str, Tensor], param: Tensor, slots: dict[str, Quant | None]) -> Tensor:
    """What is updated, in high precision: the master, or the Parameter where it is its own or was edited."""
    weight = param.detach().to(st.hp_dtype(param))
    if slots.get("master") is None:
        return weight
    master = st.read(state, "master", slots["master"], weight.dtype)
    return torch.where(_cast(master, param.dtype) == param, master, weight)


def _write_weight(
    state: dict[str, Tensor],
    param: Tensor,
    weight: Tensor,
    states: States,
    index: int,
    step: Tensor,
    finite: Tensor,
) -> None:
    """Stores the updated weight in the master, if there is one, and in the Parameter."""
    quant = st.layout(states, param).get("master")
    if quant is not None:
        seed = st.stream_seed(quant.rounding, index, "master", step)
        st.write(state, "master", quant, weight, finite=finite, seed=seed)
        weight = _cast(st.read(state, "master", quant, weight.dtype), param.dtype)
    elif param.dtype in _FORMAT:
        seed = st.stream_seed(states.update, index, "parameter", step)
        weight = round_to_format(weight, _FORMAT[param.dtype], states.update, seed=seed).to(param.dtype)
    st.select_(param, weight, finite)


def _cast(master: Tensor, dtype: torch.dtype) -> Tensor:
    """To nearest, saturating: a scaled float16 master reaches beyond float16's own largest value."""
    limit = torch.finfo(dtype).max
    return master.clamp(-limit, limit).to(dtype)


def _before_checkpoint(optimizer: Optimizer) -> None:
    for hook in BEFORE_CHECKPOINT:
        hook(optimizer)


def _forward(old: Optimizer, new: AdamW) -> None:
    """Makes `old` act as `new` for a script that holds on to it, e.g. to save; LR schedulers may know either.

    torch's LRScheduler wraps the `step` of its optimizer to set `_opt_called`, marks it `_wrapped_by_lr_sched`, and
    warns of a wrong call order when either is missing. This step sets the one on both and carries the other.
    """

    @functools.wraps(type(new).step)
    def step(*args: Any, **kwargs: Any) -> Any:
        for optimizer in (old, new):
            optimizer._opt_called = True  # type: ignore[attr-defined]
        return type(new).step(new, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    old.step = new.step = step  # type: ignore[method-assign]
    for name in ("state", "state_dict", "load_state_dict", "zero_grad", "add_param_group"):
        setattr(old, name, getattr(new, name))
    old.__dict__[_ADOPTED_BY] = new
