# SPDX-License-Identifier: Apache-2.0
"""What `Accelerator.prepare` does before accelerate's own: convert models, adopt optimizers, say so in one line.

Only a policy, a model that is trained, is converted on sight. A model prepared for evaluation alone may be the
reference of DPO or GRPO, whose forward pass must round exactly as the policy's (or the loss does not start at ln 2),
or a reward model or a teacher, which must stay as it is. It is converted when it turns out to be a twin of a policy:
the same class, loaded from the same place. References may be prepared before their policy, so they are remembered.

Scripts may also prepare an optimizer before its model; such an optimizer is swapped inside accelerate's wrapper once
the model arrives, and refuses to step if it never does.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hf_lowprec.conversion import (
    ConversionError,
    NothingConvertedError,
    convert,
    emulation_reason,
    native_problem,
    recipe_of,
    report_of,
)
from hf_lowprec.integrations.accelerate_scaler import scale_loss
from hf_lowprec.integrations.switches import SWITCHES, Switches, settle
from hf_lowprec.recipe import Recipe, RecipeError
from hf_lowprec.session import live_sessions, session_of
from hf_lowprec.stepping import attach_optimizer, carry_state

RECIPE = "_hf_lowprec_recipe"  # on the Accelerator: asked for by the launcher or the script
REQUEST = "_hf_lowprec_request"  # on a model: a Recipe left there by a Trainer callback

NO_DATA_PARALLEL = (
    "nn.DataParallel copies a model to its devices at every step, which converted layers do not survive. Start one "
    "process per device instead (accelerate launch --multi_gpu, or torchrun), or show one device only "
    "(CUDA_VISIBLE_DEVICES=0)."
)


class _Ledger:
    """What one Accelerator has met. Models are held weakly: they are the script's."""

    def __init__(self) -> None:
        self.trained: list[weakref.ref[nn.Module]] = []  # the model of the Trainer that owns the Accelerator
        self.policies: list[weakref.ref[nn.Module]] = []  # converted because they are trained
        self.evaluated: list[weakref.ref[nn.Module]] = []  # twin of a policy, or to be left alone
        self.adopted: weakref.WeakKeyDictionary[Optimizer, Optimizer] = weakref.WeakKeyDictionary()
        self.waiting: weakref.WeakKeyDictionary[Optimizer, Any] = weakref.WeakKeyDictionary()  # -> guard hook
        self.said: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


_ledgers: weakref.WeakKeyDictionary[Any, _Ledger] = weakref.WeakKeyDictionary()


def _ledger(accelerator: Any) -> _Ledger:
    return _ledgers.setdefault(accelerator, _Ledger())


def _alive(references: list[weakref.ref[nn.Module]]) -> list[nn.Module]:
    return [model for reference in references if (model := reference()) is not None]


def _add(references: list[weakref.ref[nn.Module]], model: nn.Module) -> None:
    if not any(model is known for known in _alive(references)):
        references.append(weakref.ref(model))


def _say(accelerator: Any, model: nn.Module, text: str) -> None:
    """A line about `model` on the main process's stderr (scripts under accelerate rarely set logging up), once."""
    said = _ledger(accelerator).said
    if accelerator.is_main_process and said.get(model) != text:
        said[model] = text
        print(text if text.startswith("hf_lowprec") else f"hf_lowprec: {text}", file=sys.stderr, flush=True)


# --- models --------------------------------------------------------------------------------------------------------


def _unwrap(model: nn.Module) -> nn.Module:
    """`model` without torch.compile, DDP and FSDP1 around it."""
    while True:
        if type(model).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
            model = model.module  # type: ignore[assignment]
        elif "_orig_mod" in model._modules:
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _base(model: nn.Module) -> nn.Module:
    """`model` without wrappers and without PEFT around it."""
    model = _unwrap(model)
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model  # type: ignore


def _request(accelerator: Any, model: nn.Module) -> Recipe | None:
    """The recipe for `model`: asked for on the model, by the launcher or script, or already in effect on it.

    Raises RecipeError if the first two differ.
    """
    asked: Recipe | None = getattr(accelerator, RECIPE, None)
    marked: Recipe | None = getattr(_unwrap(model), REQUEST, None) or getattr(_base(model), REQUEST, None)
    if marked is not None and asked is not None and marked != asked:
        raise RecipeError(
            f"the training arguments (or the callback) ask for recipe {marked.name!r}, the launcher for "
            f"{asked.name!r}; name one of them only"
        )
    return marked or asked or recipe_of(_unwrap(model))


def _switches(accelerator: Any, model: nn.Module) -> Switches:
    """What the Trainer's arguments and LowPrecConfig said about `model`; the arguments win."""
    said: Switches = getattr(accelerator, SWITCHES, Switches())
    for module in (_unwrap(model), _base(model)):
        said = said.over(getattr(module, SWITCHES, Switches()))
    return said


def _is_twin(model: nn.Module, policy: nn.Module) -> bool:
    """Same class and same origin: `name_or_path` of the configs or, where one has none, all parameters' shapes."""
    a, b = _base(model), _base(policy)
    if not (isinstance(a, type(b)) or isinstance(b, type(a))):  # fully_shard makes a subclass of the model's class
        return False
    paths = [str(getattr(getattr(m, "config", None), "name_or_path", "") or "").rstrip("/") for m in (a, b)]
    if all(paths):
        return paths[0] == paths[1]
    shapes = [{name: p.shape for name, p in m.named_parameters()} for m in (a, b)]
    return shapes[0] == shapes[1]


def _check_supported(accelerator: Any, model: nn.Module, recipe: Recipe) -> None:
    """Raises ConversionError where a converted model would train wrongly or not at all."""
    if any(isinstance(part, nn.DataParallel) for part in model.modules()):
        raise ConversionError(NO_DATA_PARALLEL)
    kind = _engine(accelerator)
    if kind in ("XLA", "MEGATRON_LM"):
        raise ConversionError(f"recipe {recipe.name!r} does not run under {kind}; use DDP, FSDP or DeepSpeed")
    if not recipe.quantises_gemms or report_of(_unwrap(model)) is not None:
        return
    parallelism = getattr(accelerator, "parallelism_config", None)
    if parallelism is not None and parallelism.tp_enabled:
        raise ConversionError(f"recipe {recipe.name!r} does not run with tensor parallelism yet; set tp_size to 1")
    # The model may still be on the CPU, where everything is emulated; what counts is where it is going.
    problem = native_problem(recipe, accelerator.device) if accelerator.device.type != "cpu" else None
    if problem is not None and emulation_reason(recipe, accelerator.device) is None:
        raise ConversionError(f"{problem}; use recipe 'bf16', or convert by hand with emulate=True")


def _engine(accelerator: Any) -> str:
    return str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))


def _meet(accelerator: Any, model: nn.Module, *, trained: bool) -> None:
    """Convert `model` if it is trained, else remember it as somebody's possible twin."""
    ledger, inner = _ledger(accelerator), _unwrap(model)
    known = [_base(m) for m in _alive(ledger.trained) + _alive(ledger.policies)]
    marked = hasattr(inner, REQUEST) or hasattr(_base(inner), REQUEST)
    if trained or marked or any(_base(inner) is m for m in known):
        recipe = _request(accelerator, model)
        if recipe is None:
            return
        _check_supported(accelerator, model, recipe)
        switches = _switches(accelerator, model)
        convert(inner, recipe, fuse=switches.fuse)
        scale_loss(accelerator, inner, recipe, _engine(accelerator))
        settle(inner, switches, accelerator.device, engine=_engine(accelerator))
        _add(ledger.policies, inner)
    else:
        _add(ledger.evaluated, inner)
        if not known and getattr(accelerator, RECIPE, None) is not None:
            _say(
                accelerator,
                model,
                f"{type(_base(model)).__name__} is only evaluated: left as it is until a copy is trained",
            )
    _settle_twins(accelerator)


def _settle_twins(accelerator: Any) -> None:
    """Convert the evaluated models that are twins of a policy; say of the others that they stay as they are."""
    ledger = _ledger(accelerator)
    policies = _alive(ledger.policies) or _alive(ledger.trained)
    recipes = [(policy, recipe) for policy in policies if (recipe := _request(accelerator, policy)) is not None]
    for model in _alive(ledger.evaluated) if recipes else ():
        name = type(_base(model)).__name__
        policy, recipe = next(((p, r) for p, r in recipes if _is_twin(model, p)), (None, None))
        if policy is not None and recipe is not None:
            fuse = _switches(accelerator, policy).fuse
            convert(model, recipe, module_filter_fn=_same_modules(policy), fuse=fuse)
            _say(accelerator, model, f"reference model {name} converted like the trained one")
        elif recipe_of(model) is None:
            _say(accelerator, model, f"{name}, evaluated only and no copy of the trained model, is left as it is")


def _same_modules(policy: nn.Module) -> Callable[[nn.Module, str], bool] | None:
    """Convert what is converted in `policy`, whose owner may have excluded more than the recipe does."""
    report = report_of(policy)
    if report is None or policy is not _base(policy):  # not there yet; PEFT's names are others
        return None
    names = set(report.converted)
    return lambda module, name: name in names


# --- optimizers and schedulers -------------------------------------------------------------------------------------


def _shares_parameters(optimizer: Optimizer, model: nn.Module) -> bool:
    mine = {id(p) for p in model.parameters()}
    return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])


def _attach(accelerator: Any, optimizer: Optimizer, others: Sequence[nn.Module]) -> Optimizer:
    """The optimizer to use instead of `optimizer`: itself, or the one that has adopted it.

    others: modules that are prepared but not converted. Raises ValueError if no prepared model has its parameters.
    """
    ledger = _ledger(accelerator)
    policies = _alive(ledger.policies)
    # a model that another Accelerator of this process has converted counts as well
    policies += [s.root for s in live_sessions() if s.owns(optimizer) and not any(s.root is m for m in policies)]
    engine = _engine(accelerator)
    flat = engine == "DEEPSPEED" or (engine == "FSDP" and not accelerator.is_fsdp2)
    keep = _no_states(engine) if flat else None
    # an engine's optimizer may hold flat shards, so there is no telling whose they are
    owners = policies if keep else [m for m in policies if _shares_parameters(optimizer, m)]
    if not owners and any(_shares_parameters(optimizer, m) for m in others):
        return optimizer
    if not policies:
        if getattr(accelerator, RECIPE, None) is not None:
            ledger.waiting[optimizer] = optimizer.register_step_pre_hook(_refuse_to_step)
        return optimizer
    new = optimizer
    for model in owners or policies[-1:]:  # no owner: attach_optimizer says what is wrong
        new = attach_optimizer(model, new, keep=keep)
    if optimizer in ledger.waiting:
        ledger.waiting.pop(optimizer).remove()
    if new is not optimizer:
        ledger.adopted[optimizer] = new
    return new


def _no_states(engine: str) -> str:
    # Both step flat shards, which do not say whose rows they hold; DeepSpeed's have no gradient of a weight either.
    if engine == "FSDP":
        return "low-precision states are not available under FSDP1, but are with fsdp_version=2"
    return f"low-precision states and weight gradients are not available under {engine} yet"


def _follow_deepspeed(accelerator: Any) -> None:
    """Have the optimizers that DeepSpeed makes itself end our steps and carry our state, too.

    It makes one where its config names an optimizer (the script then has a DummyOptim), and accelerate makes one where
    states are offloaded. They hold flat shards, by which nobody would know whose they are.
    """
    if "_prepare_deepspeed" in accelerator.__dict__:
        return
    own = accelerator._prepare_deepspeed

    def prepare_deepspeed(*objects: Any) -> Any:
        out = own(*objects)
        given = any(isinstance(o, Optimizer) for o in objects)
        for model in (o for o in out if isinstance(o, nn.Module)):
            session, made = session_of(model), getattr(model, "optimizer", None)
            while session is not None and made is not None:
                for optimizer in (made, getattr(made, "backup_optimizer", None)):
                    if not isinstance(optimizer, Optimizer):
                        continue
                    carry_state(session, optimizer)
                    session.scaling.distributed = accelerator.num_processes > 1
                    if not given:
                        why = f"{_no_states('DEEPSPEED')}), its states not counted"
                        session.report.optimizer = f"optimizer {type(optimizer).__name__} kept ({why}"
                made = getattr(made, "optimizer", None)
        _summarise(accelerator)
        return out

    accelerator._prepare_deepspeed = prepare_deepspeed


def _refuse_to_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    raise ConversionError(
        "a recipe is requested and this optimizer was prepared, but the model that it updates was not: pass the model "
        f"to Accelerator.prepare. If it is wrapped: {NO_DATA_PARALLEL}"
    )


def _attach_late(accelerator: Any) -> None:
    """Swap, inside accelerate's wrapper, the optimizers that were prepared before their model."""
    ledger = _ledger(accelerator)
    for wrapper in accelerator._optimizers:
        inner = wrapper.optimizer
        if inner in ledger.waiting and any(_shares_parameters(inner, m) for m in _alive(ledger.policies)):
            if wrapper.scaler is not None:  # accelerate has patched `step` of the old one
                raise ConversionError("with a loss scale, prepare the model before or with its optimizer")
            wrapper.optimizer = _attach(accelerator, inner, ())


def _repoint(ledger: _Ledger, schedulers: Sequence[Any]) -> None:
    """accelerate finds a scheduler's optimizer by identity."""
    for scheduler in schedulers:
        inner = getattr(scheduler, "scheduler", scheduler)
        optimizer = getattr(inner, "optimizer", None)
        if isinstance(optimizer, Optimizer) and optimizer in ledger.adopted:
            inner.optimizer = ledger.adopted[optimizer]


# --- called by integrations/accelerate.py --------------------------------------------------------------------------


def before_prepare(accelerator: Any, objects: tuple[Any, ...]) -> tuple[Any, ...]:
    """`objects` as accelerate's own `prepare` should get them: models converted in place, optimizers adopted."""
    new = [not getattr(o, "_is_accelerate_prepared", False) for o in objects]
    models = [o for o, is_new in zip(objects, new, strict=True) if isinstance(o, nn.Module) and is_new]
    _meet_all(accelerator, models)
    ledger = _ledger(accelerator)
    if getattr(accelerator, RECIPE, None) is None and not ledger.policies:
        return objects
    out = [
        _attach(accelerator, o, [*models, *accelerator._models]) if is_new and isinstance(o, Optimizer) else o
        for o, is_new in zip(objects, new, strict=True)
    ]
    _attach_late(accelerator)
    _repoint(ledger, [*(o for o in out if isinstance(o, LRScheduler)), *accelerator._schedulers])
    if _engine(accelerator) == "DEEPSPEED":
        _follow_deepspeed(accelerator)
    _summarise(accelerator)
    return tuple(out)


def _meet_all(accelerator: Any, models: Sequence[nn.Module]) -> None:
    """Meet the models of one call; one with nothing to convert is fine if another model had something."""
    nothing: NothingConvertedError | None = None
    for model in models:
        parameters = list(model.parameters())
        if not parameters and not isinstance(model, nn.DataParallel):
            continue  # a loss function
        try:
            _meet(accelerator, model, trained=any(p.requires_grad for p in parameters))
        except NothingConvertedError as error:
            nothing = error
    if nothing is not None and not _alive(_ledger(accelerator).policies):
        raise nothing


def before_prepare_model(accelerator: Any, model: nn.Module, evaluation_mode: bool) -> None:
    """Called for each model, by accelerate's own `prepare` (then there is nothing left to do) or directly."""
    if getattr(model, "_is_accelerate_prepared", False):
        return
    ledger, inner = _ledger(accelerator), _unwrap(model)
    if any(inner is m for m in _alive(ledger.policies) + _alive(ledger.evaluated)):
        return
    if evaluation_mode:
        _meet(accelerator, model, trained=False)
    else:
        _meet_all(accelerator, [model])
    _attach_late(accelerator)
    _summarise(accelerator)


def meet_trainer(accelerator: Any, model: nn.Module, args: Any) -> None:
    """A Trainer has been made: `model` is what it trains, by its TrainingArguments."""
    data_parallel = args.n_gpu > 1
    setattr(accelerator, SWITCHES, Switches(*(getattr(args, f"lowprec_{name}", None) for name in Switches._fields)))
    if data_parallel and _request(accelerator, model) is not None:
        raise ConversionError(NO_DATA_PARALLEL)
    _add(_ledger(accelerator).trained, _unwrap(model))


def _summarise(accelerator: Any) -> None:
    for model in _alive(_ledger(accelerator).policies):
        report = report_of(model)
        if report is not None:
            line = report.summary()
            if getattr(accelerator, "is_fsdp2", False) and accelerator.mixed_precision != "no":
                line += "; accelerate keeps trainable parameters in float32 under FSDP2"
            _say(accelerator, model, line)
