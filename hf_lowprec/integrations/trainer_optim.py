# SPDX-License-Identifier: Apache-2.0
"""`lowprec_optim=`: an optimizer of ours, or bitsandbytes' paged one, as a training argument.

    8bit, 4bit, fp8, fp8-lm, compact, bf16, fp32, ...      AdamW with these states
    switchback                                             StableAdamW: the states of this recipe name it
    stable_adamw:8bit, adam:fp32, lion:8bit, sgd:8bit      another algorithm
    paged-8bit, paged-32bit, lion:paged-8bit               bitsandbytes.optim.PagedAdamW8bit and its kin

The Trainer's own seam is `get_optimizer_cls_and_kwargs(args, model)`, a static method that `create_optimizer` asks for
a class and its arguments; trainers that build their own parameter groups ask it, too. It is wrapped, and nothing else:
groups (with and without decay), schedulers, `accelerate` and checkpoints stay the Trainer's.

Learning rate, betas, eps and weight decay are the Trainer's arguments. As there are no others, `adam_beta1` and
`adam_beta2` are also the betas of Lion, and `adam_beta1` the momentum of SGD; `adam_epsilon` reaches Adam's family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from hf_lowprec import optim
from hf_lowprec.optim.states import resolve_states

ALGORITHMS: dict[str, type[optim.LowPrecOptimizer]] = {
    "adamw": optim.AdamW,
    "adam": optim.Adam,
    "stable_adamw": optim.StableAdamW,
    "lion": optim.Lion,
    "sgd": optim.SGD,
}
_PAGED = {  # (algorithm, bits) -> class of bitsandbytes.optim
    ("adamw", "8bit"): "PagedAdamW8bit", ("adamw", "32bit"): "PagedAdamW32bit",
    ("adam", "8bit"): "PagedAdam8bit", ("adam", "32bit"): "PagedAdam32bit",
    ("lion", "8bit"): "PagedLion8bit", ("lion", "32bit"): "PagedLion32bit",
}  # fmt: skip
_FOREIGN = ("optim_args", "optim_target_modules")  # arguments that only the Trainer's own optimizers read


class Choice(NamedTuple):
    """`lowprec_optim` taken apart. paged: the name of bitsandbytes' class; then `states` is its precision."""

    algorithm: str
    states: str
    paged: str | None = None


def parse(text: str) -> Choice:
    """Raises ValueError for an algorithm, states or a combination that do not exist."""
    algorithm, found, states = text.partition(":")
    named = bool(found) and not text.startswith("{")  # States as JSON have colons of their own
    if not named:
        algorithm, states = "adamw", text
    algorithm = algorithm.lower().replace("-", "_")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"lowprec_optim={text!r}: no algorithm {algorithm!r}; known: {', '.join(ALGORITHMS)}")
    if states.startswith("paged-"):
        bits = states.removeprefix("paged-")
        if (algorithm, bits) not in _PAGED:
            known = ", ".join(f"{name}:paged-{width}" for name, width in _PAGED)
            raise ValueError(f"lowprec_optim={text!r}: bitsandbytes pages no such optimizer; known: {known}")
        return Choice(algorithm, bits, _PAGED[algorithm, bits])
    try:
        wanted = resolve_states(states).algorithm
    except ValueError as error:
        raise ValueError(f"lowprec_optim={text!r}: {error}") from None
    if wanted is not None:
        if named and algorithm != wanted.replace("-", "_"):
            raise ValueError(f"lowprec_optim={text!r}: these states are those of {wanted}")
        algorithm = wanted.replace("-", "_")
    return Choice(algorithm, states)


def check_arguments(args: Any) -> None:
    """Raises ValueError where other arguments contradict `lowprec_optim`, or it says nothing that exists; ImportError
    where it needs bitsandbytes and that is missing."""
    choice = parse(args.lowprec_optim)
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    for name in ("optim", *_FOREIGN):
        value = getattr(args, name, None)
        if value != defaults[name]:
            raise ValueError(
                f"lowprec_optim={args.lowprec_optim!r} and {name}={getattr(value, 'value', value)!r}: choose one "
                f"({name} reaches the Trainer's own optimizers only)"
            )
    if choice.paged is not None:
        _bitsandbytes(choice)


def class_and_kwargs(args: Any, model: nn.Module | None) -> tuple[type[Optimizer], dict[str, Any]]:
    """What `Trainer.get_optimizer_cls_and_kwargs` returns."""
    choice = parse(args.lowprec_optim)
    kwargs: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if choice.algorithm == "sgd":
        kwargs["momentum"] = args.adam_beta1
    else:
        kwargs["betas"] = (args.adam_beta1, args.adam_beta2)
    if choice.algorithm not in ("sgd", "lion"):
        kwargs["eps"] = args.adam_epsilon
    if choice.paged is not None:
        return _paged(choice, model), kwargs
    return ALGORITHMS[choice.algorithm], {**kwargs, "states": choice.states}


def _bitsandbytes(choice: Choice) -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(
            f"lowprec_optim: {choice.paged} is bitsandbytes' own: pip install 'hf-lowprec[bitsandbytes]' ({error}); "
            f"states that stay on the device need no other package: lowprec_optim='{choice.algorithm}:8bit'"
        ) from error
    return bitsandbytes


def _paged(choice: Choice, model: nn.Module | None) -> type[Optimizer]:
    module = _bitsandbytes(choice)
    if choice.states == "8bit" and model is not None:
        # as the Trainer does for optim="paged_adamw_8bit"
        manager = module.optim.GlobalOptimManager.get_instance()
        for part in model.modules():
            if isinstance(part, nn.Embedding):
                manager.register_module_override(part, "weight", {"optim_bits": 32})
    chosen: type[Optimizer] = getattr(module.optim, str(choice.paged))
    return chosen


def seam(original: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """`Trainer.get_optimizer_cls_and_kwargs` that knows `lowprec_optim`."""

    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
        if getattr(args, "lowprec_optim", None) is None:
            return original(args, model)
        return class_and_kwargs(args, model)

    get_optimizer_cls_and_kwargs.__doc__ = original.__doc__
    return get_optimizer_cls_and_kwargs


def verify(args: Any, optimizer: Any) -> None:
    """Raises RuntimeError when training starts with another optimizer than `lowprec_optim` names."""
    choice = parse(args.lowprec_optim)
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
        optimizer = optimizer.optimizer
    if choice.paged is not None:
        right = type(optimizer).__name__ == choice.paged
    else:
        wanted = resolve_states(choice.states)
        right = type(optimizer) is ALGORITHMS[choice.algorithm] and all(
            resolve_states(group["states"]) == wanted for group in optimizer.param_groups
        )
    if not right:
        raise RuntimeError(
            f"lowprec_optim={args.lowprec_optim!r} was asked for, but the Trainer trains with "
            f"{type(optimizer).__module__}.{type(optimizer).__qualname__}: choose one of lowprec_optim, optimizers= "
            "and optimizer_cls_and_kwargs=; a DeepSpeed config that names an optimizer wins over all of them"
        )


def mark_for(trainer: Any, model: nn.Module | None) -> None:
    """After a Trainer made an optimizer of ours, or took the script's for its own: mark the embeddings."""
    optimizer = trainer.optimizer
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):  # accelerate's wrapper, in a second `train()`
        optimizer = optimizer.optimizer
    if isinstance(optimizer, optim.LowPrecOptimizer):
        optim.mark_embeddings(trainer.model if model is None else model)
        optimizer.note_embeddings()
