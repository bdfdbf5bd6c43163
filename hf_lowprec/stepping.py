# SPDX-License-Identifier: Apache-2.0
"""What happens around `optimizer.step()`, for any optimizer: two global hooks and two state-dict hooks.

    before: weight gradients pass through the recipe's communication format (`optim/gradient.py`)
    after:  amax histories roll, new scales, cached low-precision weights are dropped, learned ranges step; after our
            own optimizers the weights will be cast anew all at once (`modules/emission.py`)

torch's global optimizer hooks fire for optimizers that a script built itself and for those that we never saw.
The amax histories, mu, counters and the recipe ride in `optimizer.state_dict()["hf_lowprec"]`, so an unmodified
Trainer or `Accelerator.save_state` saves and resumes them. (Of sharded Parameters they ride in the first group.)
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hf_lowprec import optim
from hf_lowprec.modules import LayerState, weights_changed
from hf_lowprec.modules.emission import Emission
from hf_lowprec.ops import parse_quant
from hf_lowprec.optim import rates
from hf_lowprec.optim import states as st
from hf_lowprec.optim.checkpoints import BEFORE_CHECKPOINT
from hf_lowprec.optim.release import AFTER_UPDATE, BEFORE_UPDATE, is_released
from hf_lowprec.optim.shards import is_sharded
from hf_lowprec.recipe import Quant, Residual
from hf_lowprec.session import Session, live_sessions, session_of

STATE_KEY = "hf_lowprec"
_CARRIED = "_hf_lowprec_sessions"  # on an optimizer: the sessions whose state its state dict carries
_TORCH_KNOWN = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)  # whose states the report can count
_installed = False


class _Followed(NamedTuple):
    """A session whose Parameters an optimizer steps.

    swap: what goes with its gradients. weights: those that are kept in low precision with a scale from their amax,
    which our own optimizers find on their way, and whose layers (None: gone). emission: casts weights after its steps.
    """

    session: weakref.ref[Session]
    swap: optim.GradientSwap | None
    weights: list[tuple[weakref.ref[LayerState], torch.Tensor]]
    emission: Emission | None


# Asking again at every step would walk all Parameters.
_FOLLOWED: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[tuple[int, ...], list[_Followed]]] = (
    weakref.WeakKeyDictionary()
)


# One per session: a step of torch's optimizers that raised leaves its swap to be undone by the next one or `revert`.
_SWAPS: weakref.WeakKeyDictionary[Session, optim.GradientSwap] = weakref.WeakKeyDictionary()

# The optimizers attached to a session, and what the report says of each.
_ATTACHED: weakref.WeakKeyDictionary[Session, list[tuple[weakref.ref[torch.optim.Optimizer], str]]] = (
    weakref.WeakKeyDictionary()
)


def install_hooks() -> None:
    """Register the two step hooks, and have our optimizers look for their sessions before they save or load; once."""
    global _installed
    if not _installed:
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
        BEFORE_CHECKPOINT.append(_followed)
        BEFORE_UPDATE.append(_before_update)
        AFTER_UPDATE.append(weights_changed)
        _installed = True


def attach_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: str | None = None
) -> torch.optim.Optimizer:
    """Make `optimizer` follow the model's recipe, and its state dict carry the recipe's state. Idempotent.

    `Accelerator.prepare` calls it. Optimizers of `hf_lowprec.optim` save and load the recipe's state without it. Any
    other optimizer works without it, and saves that state from its first step on; but torch offers no way to notice
    what it loads before, and the state in that checkpoint is dropped silently: attach before `load_state_dict`.

    Adam and AdamW are replaced by `hf_lowprec.optim.AdamW` over the same param groups when the recipe names optimizer
    states, and SGD where these say how weights are updated; any other optimizer is kept, and the report says so.
    Parameters are marked (`optim.mark_embeddings`, `optim.mark_gemm_weights`).

    keep: a reason not to replace the optimizer, e.g. that its Parameters are shards (which need not be the model's).

    Raises:
        ValueError: the model is not converted, or the optimizer holds none of its Parameters.
    """
    session = session_of(model)
    if session is None:
        raise ValueError("convert the model before attaching an optimizer to it")
    if keep is None and not session.owns(optimizer):
        raise ValueError(
            "the optimizer holds none of the model's parameters: build it from the parameters of the model that is "
            "prepared, after any step that replaces them (PEFT, resize_token_embeddings, from_pretrained)"
        )
    if session.has_rates:
        _check_rates(session, optimizer, keep)
    optim.mark_embeddings(session.root)
    optim.mark_gemm_weights(session.root, session.weights().values())
    states = session.recipe.states
    if keep is not None:
        how = f"kept ({keep})"
    elif isinstance(optimizer, optim.LowPrecOptimizer):
        optimizer.note_embeddings()
        how = f"with {_describe(optimizer)}"
    elif states is None:
        how = "kept (as asked)"
    elif type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        before = type(optimizer).__name__
        optimizer = optim.AdamW.adopt(optimizer, states)
        how = f"with {_describe(optimizer)}"
        how = f"in place of {before}, {how}" if states.algorithm is not None else how
    elif states.of_weights and type(optimizer) is torch.optim.SGD:
        optimizer = optim.SGD.adopt(optimizer, states)
        how = f"with {_describe(optimizer)}"
    elif states.algorithm is not None:
        how = f"kept ({states.algorithm} takes over from Adam and AdamW only)"
    else:
        whose = "Adam, AdamW and SGD" if states.of_weights else "Adam and AdamW"
        how = f"kept (only {whose} have low-precision states)"
    if session.ranges is not None and session.ranges.parameters:
        how += ", steps the learned ranges too"
    _report(session, optimizer, f"optimizer {type(optimizer).__name__} {how}")
    session.scaling.distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if session.has_rates:
        rates.foresee(optimizer)
    carry_state(session, optimizer)
    return optimizer


def _check_rates(session: Session, optimizer: torch.optim.Optimizer, keep: str | None) -> None:
    """Raises ValueError where the learning rates of a model at unit scale cannot reach the optimizer's Parameters."""
    remedy = "keep the weights as they are with convert(model, recipe, init=False) before prepare"
    if keep is not None:
        raise ValueError(f"recipe {session.recipe.name!r} has a learning rate per weight: {keep}; or {remedy}")
    try:
        rates.check(optimizer)
    except TypeError as error:
        raise ValueError(f"recipe {session.recipe.name!r}: {error}") from None


def carry_state(session: Session, optimizer: torch.optim.Optimizer) -> None:
    """Make `optimizer.state_dict()` carry the session's state, beside that of other models it updates. Idempotent."""
    has_hooks = _CARRIED in optimizer.__dict__
    sessions = [s for s in optimizer.__dict__.get(_CARRIED, ()) if s.live and s is not session]
    optimizer.__dict__[_CARRIED] = [*sessions, session]
    if has_hooks:
        return
    pending: list[tuple[Session, Any]] = []

    def save(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        states = [s.state_dict() for s in _carried(optimizer)]
        if states:
            # torch.distributed.checkpoint, which FSDP2 saves by, drops all but `state` and `param_groups`.
            sharded = is_sharded(p for group in optimizer.param_groups for p in group["params"])
            place = state_dict["param_groups"][0] if sharded else state_dict
            place[STATE_KEY] = states[0] if len(states) == 1 else {"models": states}

    # Checked before torch touches its own states and loaded after them, so that a refusal changes nothing.
    def check(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        pending.clear()
        saved = state_dict.get(STATE_KEY)
        groups = state_dict.get("param_groups")
        if groups and STATE_KEY in groups[0]:  # `state_dict` is a copy that torch has made, its groups are not
            saved = groups[0][STATE_KEY]
            first = {key: value for key, value in groups[0].items() if key != STATE_KEY}
            state_dict["param_groups"] = [first, *groups[1:]]
        if saved is None:
            return
        sessions = _carried(optimizer)
        states = saved["models"] if isinstance(saved, dict) and "models" in saved else [saved]
        if len(states) != len(sessions):
            raise ValueError(f"low-precision state of {len(states)} models; this optimizer updates {len(sessions)}")
        for session, state in zip(sessions, states, strict=True):
            session.check(state)
        pending.extend(zip(sessions, states, strict=True))

    def load(_: torch.optim.Optimizer) -> None:
        while pending:
            session, state = pending.pop()
            session.load_state_dict(state)

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(check)
    optimizer.register_load_state_dict_post_hook(load)


def _carried(optimizer: torch.optim.Optimizer) -> list[Session]:
    return [session for session in optimizer.__dict__.get(_CARRIED, ()) if session.live]


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
    followers = _followed(optimizer)
    _split_rates(optimizer, followers)
    for followed in followers:
        if followed.weights and isinstance(optimizer, optim.LowPrecOptimizer):
            optimizer.note_amax()
        if followed.swap is not None:
            args, kwargs = followed.swap.pre_step(optimizer, args, kwargs) or (args, kwargs)
    return args, kwargs


def _split_rates(optimizer: torch.optim.Optimizer, followers: list[_Followed]) -> None:
    """A learning rate per weight for models at unit scale, asked for anew: FSDP2 and checkpoints replace both."""
    sessions = [s for followed in followers if (s := followed.session()) is not None and s.transform is not None]
    for session in sessions:
        if session.scaling.distributed and not session.transform.agreed:  # type: ignore[union-attr]
            session.transform.agree(session.root)  # type: ignore[union-attr]
    sessions = [session for session in sessions if session.has_rates]
    if sessions:
        factors = {key: factor for session in sessions for key, factor in session.learning_rates().items()}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if held.isdisjoint(factors) and not any(session.owns(optimizer) for session in sessions):
            raise RuntimeError(
                f"{type(optimizer).__name__} holds flat shards of a model at unit scale, which do not say whose "
                "learning rates they need: use FSDP2, or convert(model, recipe, init=False) before prepare"
            )
        native = any(session.recipe.transform.learning_rate == "native" for session in sessions)
        rates.split(optimizer, factors, independent=native)


def _before_update(optimizer: optim.LowPrecOptimizer) -> None:
    """With gradient release a gradient is quantised where it is used, inside backward."""
    for followed in _followed(optimizer):
        session = followed.session()
        if session is not None and session.has_rates:
            raise RuntimeError("a model at unit scale has a learning rate per weight, which steps in backward do not")
        if followed.weights:
            optimizer.note_amax()
        if followed.swap is not None:
            followed.swap.tell(optimizer)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    rates.rejoin(optimizer)
    weights_changed()
    for followed in _followed(optimizer):
        if followed.swap is not None:
            followed.swap.post_step(optimizer, args, kwargs)
        session = followed.session()
        if session is None:
            continue
        if session.ranges is not None:
            session.ranges.step(optimizer, distributed=session.scaling.distributed)
        emission = followed.emission if session.root.training and not is_released(optimizer) else None
        copies = [] if emission is None else emission.copies()
        session.scaling.roll()
        if isinstance(optimizer, optim.LowPrecOptimizer):
            for ref, weight in followed.weights:
                layer, amax = ref(), optimizer.weight_amax(weight)
                if layer is not None and amax is not None:
                    layer.weight_cache.note_amax(weight, amax)
            if emission is not None:
                emission.defer(copies)


def _followed(optimizer: torch.optim.Optimizer) -> list[_Followed]:
    sessions = live_sessions()
    if not sessions:
        return []
    rates.rejoin(optimizer)  # after a step that raised
    key = (sum(len(group["params"]) for group in optimizer.param_groups), *(s.number for s in sessions))
    known = _FOLLOWED.get(optimizer)
    if known is None or known[0] != key:
        attached = _carried(optimizer)
        mine = [s for s in sessions if s in attached or s.owns(optimizer)]
        for session in mine:  # an optimizer that nobody attached saves the state from its first step on
            carry_state(session, optimizer)
        known = (key, [_follow(optimizer, session) for session in mine])
        _FOLLOWED[optimizer] = known
    return known[1]


def _follow(optimizer: torch.optim.Optimizer, session: Session) -> _Followed:
    held = _held(optimizer)
    layers = session.scaling.layers
    weights: list[tuple[LayerState, torch.Tensor]]
    weights = [(layers[name], weight) for name, weight in session.weights().items() if id(weight) in held]
    if session.recipe.weight_cache == "none":
        weights = []
    noted = [(weakref.ref(layer), weight) for layer, weight in weights if _by_amax(layer)]
    ours = isinstance(optimizer, optim.LowPrecOptimizer)
    return _Followed(weakref.ref(session), _swap(session), noted, Emission(weights) if ours and weights else None)


def _swap(session: Session) -> optim.GradientSwap | None:
    if session.gradients is None:
        return None
    index: dict[torch.Tensor, int] = {w: i for i, w in enumerate(session.weights().values())}
    swap = _SWAPS.get(session)
    if swap is None:
        swap = _SWAPS[session] = optim.GradientSwap(session.gradients, index)
        session.on_end(swap.close)
    swap.index = index
    return swap


def _by_amax(layer: LayerState) -> bool:
    """Whether the scale of the layer's weight may come from its own amax."""
    if layer.spec.fprop_weight is None:
        return False
    scaling = parse_quant(layer.spec.fprop_weight).scaling
    by_amax = scaling.method in ("current", "delayed") and scaling.statistic == "amax"
    return by_amax and scaling.granularity == "tensor"


# --- what the report says -------------------------------------------------------------------------------------------


def _describe(optimizer: optim.LowPrecOptimizer) -> str:
    """The formats of what the optimizer's groups keep of a large parameter."""
    said = dict.fromkeys(_describe_group(optimizer, group) for group in optimizer.param_groups if group["params"])
    return " / ".join(said)


def _describe_group(optimizer: optim.LowPrecOptimizer, group: dict[str, Any]) -> str:
    dtype = min((p.dtype for p in group["params"]), key=lambda dtype: dtype.itemsize)  # 16 bits have the master
    states = st.with_master(st.resolve_states(group["states"]), group["master"])
    words = []
    for slot, kept in st.layout(states, dtype, optimizer.moments(group, {})).items():
        if isinstance(kept, Quant):
            words.append(f"{slot} {kept.format}")
        elif isinstance(kept, Residual):
            words.append(f"{slot} bf16+{kept.bits}")
        elif slot == "master":
            words.append("master float32")
    words = words or ["float32 states"]
    if states.weight is not None:
        words.append(f"GEMM weights {states.weight.format}")
    if states.arithmetic is not None:
        how = " stochastically" if states.arithmetic.rounding.mode == "stochastic" else ""
        words.append(f"AXPYs rounded{how} to {states.arithmetic.format}")
    if states.master is None and states.update.mode == "stochastic":
        alone = "float32 weights are not rounded: load the model in bfloat16 for that"
        words.append("weights rounded stochastically" if dtype.itemsize == 2 else alone)
    return ", ".join(words)


def _report(session: Session, optimizer: torch.optim.Optimizer, line: str) -> None:
    """Report on all optimizers of the model. Attaching one over Parameters of an earlier one replaces that."""
    mine = _held(optimizer).keys()
    known = ((ref(), said) for ref, said in _ATTACHED.get(session, ()))
    attached = [
        (o, said) for o, said in known if o is not None and o is not optimizer and mine.isdisjoint(_held(o).keys())
    ]
    attached.append((optimizer, line if _counted(optimizer) else f"{line}, its states not counted"))
    _ATTACHED[session] = [(weakref.ref(o), said) for o, said in attached]
    session.report.optimizer = "; ".join(dict.fromkeys(said for _, said in attached))
    session.report.bytes_per_parameter = _bytes_per_parameter(session, [o for o, _ in attached])


def _held(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


def _bytes_per_parameter(session: Session, optimizers: list[torch.optim.Optimizer]) -> float:
    """Weights, gradients and optimizer states of what trains; frozen Parameters count as weights."""
    states = {key: size for optimizer in optimizers for key, size in _state_bytes(optimizer).items()}
    total = count = 0
    for parameter in session.root.parameters():
        size = parameter.numel() * parameter.element_size()
        total += size
        if parameter.requires_grad and id(parameter) in states:
            total += size + states[id(parameter)]
        count += parameter.numel()
    return total / max(1, count)


def _counted(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `_state_bytes` knows its states: ours, and torch's Adam, AdamW and SGD. Subclasses may add others."""
    return isinstance(optimizer, optim.LowPrecOptimizer) or type(optimizer) in _TORCH_KNOWN


def _state_bytes(optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """What the optimizer keeps of each parameter, by its id; 0 for the unknown."""
    if isinstance(optimizer, optim.LowPrecOptimizer):
        return optimizer.state_bytes()
    sizes = {}
    for group in optimizer.param_groups:
        slots_kept = 0
        if isinstance(optimizer, torch.optim.SGD):
            slots_kept = 1 if group["momentum"] else 0
        elif _counted(optimizer):
            slots_kept = 3 if group["amsgrad"] else 2
        sizes.update({id(p): slots_kept * p.numel() * p.element_size() for p in group["params"]})
    return sizes
