# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer: a recipe as a training argument, as a callback, and its counters in the logs.

The Trainer builds an Accelerator from its arguments and hands it model and optimizer; there the work is done
(integrations/accelerate.py). Everything here only carries the recipe to that point:

    LowPrecTrainingArguments(lowprec="fp8-lm")  its `mixed_precision` goes to Accelerator(mixed_precision="fp8-lm")
    LowPrecCallback("fp8-lm")                   marks the model; `Accelerator.prepare` reads the mark
    LowPrecTrainingArguments(lowprec_optim="8bit")  the Trainer asks for an optimizer class and gets ours
                                                    (integrations/trainer_optim.py); with or without a recipe

and looks whether it arrived: training does not start with a model that nobody converted. No class is made at run time,
since the Trainer pickles its arguments into every checkpoint.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowprec import _autoload, optim
from hf_lowprec.conversion import recipe_of
from hf_lowprec.integrations import trainer_optim
from hf_lowprec.monitor import statistics
from hf_lowprec.presets import get_recipe
from hf_lowprec.recipe import Recipe, RecipeError

_MARK = "_hf_lowprec_request"  # read by Accelerator.prepare


@dataclass
class LowPrecArguments:
    """Mixin for any TrainingArguments class: `class MyArguments(LowPrecArguments, TrainingArguments)`.

    lowprec: a recipe's name or the path of a .yaml or .json recipe file; None trains as if the mixin were not there.
        No Recipe and no dict, since arguments are saved as text in every checkpoint; LowPrecCallback takes those.
    lowprec_optim: an optimizer with low-precision states: `8bit`, `fp8-lm`, ... (AdamW), `stable_adamw:8bit`,
        `lion:8bit`, ..., or `paged-8bit` (bitsandbytes). With a recipe it replaces the states that the recipe names.
    lowprec_fuse, lowprec_attention, lowprec_liger, lowprec_graphs: what comes with a recipe
        (integrations/switches.py).
    bf16: None follows the recipe's base precision, so that an explicit False can be told from the default.

    Raises RecipeError for an unknown recipe or another type, and ValueError where `bf16`/`fp16` contradict the
    recipe's base precision, or `optim` contradicts `lowprec_optim`.
    """

    lowprec: str | None = field(
        default=None,
        metadata={"help": "Low-precision recipe to train with: a name such as fp8-lm, or a .yaml/.json recipe file."},
    )
    lowprec_optim: str | None = field(
        default=None,
        metadata={
            "help": "Optimizer with low-precision states: 8bit, 4bit, fp8, fp8-lm, compact, ... (AdamW), or "
            "stable_adamw:8bit, adam:8bit, lion:8bit, sgd:8bit; paged-8bit for bitsandbytes' paged AdamW."
        },
    )
    lowprec_fuse: bool | None = field(
        default=None,
        metadata={"help": "Fused norms, MLPs, rotary embeddings, shared inputs; unset, HF_LOWPREC_FUSE decides (on)."},
    )
    lowprec_attention: bool | None = field(
        default=None,
        metadata={"help": "Keep sdpa off cuDNN where that is wrong; unset, HF_LOWPREC_ATTENTION decides (on)."},
    )
    lowprec_liger: bool | None = field(
        default=None,
        metadata={
            "help": "Output embedding and loss fused by liger-kernel, without storing the logits of training "
            "steps; unset, HF_LOWPREC_LIGER decides (off)."
        },
    )
    lowprec_graphs: bool | None = field(
        default=None,
        metadata={
            "help": "CUDA graphs of the layers, for steps that wait for the host; unset, HF_LOWPREC_GRAPHS "
            "decides (auto: where they gain)."
        },
    )
    # `bool`, not `bool | None`: HfArgumentParser then takes a bare `--bf16`.
    bf16: bool = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "Use bf16 mixed precision instead of 32-bit. Unset, it follows the recipe of --lowprec."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.lowprec, Path):
            self.lowprec = str(self.lowprec)
        if not isinstance(self.lowprec, str | None):
            raise RecipeError(
                f"lowprec is a {type(self.lowprec).__name__}: pass a recipe's name or a file (write it with "
                "Recipe.to_yaml()), or hand the recipe itself to LowPrecCallback"
            )
        recipe = None if self.lowprec is None else get_recipe(self.lowprec)
        if recipe is not None:
            self._set_base(recipe)
        super().__post_init__()  # type: ignore[misc]
        self.bf16 = bool(self.bf16)
        if recipe is not None:
            # Set late: DeepSpeed and FSDP read the base precision, a word they know, in the line above.
            self.mixed_precision = self.lowprec
        if self.lowprec_optim is not None:
            trainer_optim.check_arguments(self)

    def _set_base(self, recipe: Recipe) -> None:
        fp16 = getattr(self, "fp16", None)
        said = {"bf16=True": self.bf16 is True, "bf16=False": self.bf16 is False, "fp16=True": fp16 is True}
        compatible = {"bf16": {"bf16=True"}, "fp16": {"bf16=False", "fp16=True"}, "no": {"bf16=False"}}[recipe.base]
        for word in (word for word, is_said in said.items() if is_said and word not in compatible):
            raise ValueError(
                f"lowprec={self.lowprec!r} has the base precision {recipe.base!r}, but the arguments say {word}; "
                f"drop {word}, or choose a recipe with another base"
            )
        self.bf16, self.fp16 = recipe.base == "bf16", recipe.base == "fp16"


@dataclass
class LowPrecTrainingArguments(LowPrecArguments, TrainingArguments):
    """transformers.TrainingArguments with `lowprec=` and `lowprec_optim=`, on the command line `--lowprec` and
    `--lowprec_optim` (HfArgumentParser).

    TRL's trainers want their own: LowPrecSFTConfig, LowPrecDPOConfig, LowPrecRewardConfig, LowPrecGRPOConfig.
    """


class LowPrecCallback(TrainerCallback):
    """Trains any Trainer's model with `recipe`: `Trainer(..., callbacks=[LowPrecCallback("fp8-lm")])`.

    recipe: a preset's name, a recipe file, a dict, or a Recipe.

    A callback comes after the Trainer chose its autocast, so the arguments must name the recipe's base precision
    (`bf16=True` for most) unless the weights already have it. Raises RecipeError for an unknown recipe, ValueError for
    another base precision, and RuntimeError when training starts and the model was not converted.
    """

    def __init__(self, recipe: str | Path | dict[str, Any] | Recipe) -> None:
        self.recipe = get_recipe(recipe)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self.request(model, args)

    def request(self, model: nn.Module, args: TrainingArguments) -> None:
        """Mark `model` for Accelerator.prepare."""
        asked = getattr(args, "lowprec", None)
        if asked is not None and get_recipe(asked) != self.recipe:
            raise ValueError(f"LowPrecCallback({self.recipe.name!r}) and lowprec={asked!r}: choose one recipe")
        if asked is None:
            _check_base(self.recipe, args.mixed_precision, model)
        setattr(model, _MARK, self.recipe)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        _verify(self.recipe, model, args)


def _check_base(recipe: Recipe, mixed_precision: str, model: nn.Module) -> None:
    if mixed_precision == recipe.base:
        return
    dtypes = {str(p.dtype) for p in model.parameters() if p.is_floating_point()}
    if mixed_precision == "no" and dtypes == {{"bf16": "torch.bfloat16", "fp16": "torch.float16"}.get(recipe.base)}:
        return  # weights already in the base precision need no autocast
    fix = "bf16=False, fp16=False" if recipe.base == "no" else f"{recipe.base}=True"
    raise ValueError(
        f"recipe {recipe.name!r} has the base precision {recipe.base!r}, but this Trainer runs in {mixed_precision!r} "
        f"with weights in {', '.join(sorted(dtypes))}; pass TrainingArguments({fix}), or use "
        f"LowPrecTrainingArguments(lowprec={recipe.name!r}) instead of the callback, which sets it"
    )


def _verify(recipe: Recipe, model: nn.Module, args: TrainingArguments) -> None:
    found = recipe_of(model)
    if found == recipe or (found is None and not recipe.quantises_gemms):
        return
    cause = "it was converted with " + repr(found.name) if found else "nothing in it was converted"
    hint = ""
    if found is None and args.n_gpu > 1:
        hint = (
            f"; one process drives {args.n_gpu} GPUs through nn.DataParallel, which copies the model in every step: "
            "start one process per GPU (accelerate launch, torchrun) or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    raise RuntimeError(f"recipe {recipe.name!r} was asked for, but the model does not train with it: {cause}{hint}")


class LowPrecMonitorCallback(TrainerCallback):
    """In every Trainer: checks that a recipe and an optimizer in the arguments arrived, and logs the counters of a
    converted model."""

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        # Usually `create_optimizer` marks them (patch_trainer); trainers that override it are reached here only.
        if getattr(args, "lowprec_optim", None) is not None:
            optim.mark_embeddings(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        asked = getattr(args, "lowprec", None)
        if asked is not None:
            _verify(get_recipe(asked), model, args)
        if getattr(args, "lowprec_optim", None) is not None:
            trainer_optim.verify(args, kwargs.get("optimizer"))
        if getattr(args, "lowprec_liger", None) and recipe_of(model) is None:
            raise RuntimeError("lowprec_liger=True comes with a recipe, and this model was converted with none")
        if getattr(args, "lowprec_graphs", None) and recipe_of(model) is None:
            raise RuntimeError(
                "lowprec_graphs=True comes with a recipe, and this model was converted with none; "
                "hf_lowprec.graph_layers(model) does without"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if model is None or logs is None or "loss" not in logs or recipe_of(model) is None:
            return
        counters = statistics(model, reset=True)  # since the last log, so that a spike shows
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        if scaler is not None:
            counters["lowprec/loss_scale"] = scaler.get_scale()
        logs.update(counters)  # the dict that the reporters after us receive
        state.log_history[-1].update(counters)  # a copy of it, made before any callback ran


def _call_model_init(self: Trainer, *args: Any, **kwargs: Any) -> nn.Module:
    """Trainer.call_model_init for LowPrecCallback: `train()` builds a new model, and no event tells a callback so."""
    model = _original_call_model_init(self, *args, **kwargs)
    handler = getattr(self, "callback_handler", None)  # not there yet in Trainer.__init__; on_init_end follows
    for callback in handler.callbacks if handler else ():
        if isinstance(callback, LowPrecCallback):
            callback.request(model, self.args)
    return model


_original_call_model_init = Trainer.call_model_init
_optimizer_cls_and_kwargs = trainer_optim.seam(Trainer.get_optimizer_cls_and_kwargs)


def install(module: ModuleType | None = None) -> None:
    """Patch Accelerator (also where the autoload hook is off) and give every Trainer our monitor. Idempotent.

    module: transformers.trainer, when the autoload hook calls; it may not be an attribute of its package yet.
    """
    _autoload.activate()
    defaults = (module or sys.modules[Trainer.__module__]).DEFAULT_CALLBACKS  # type: ignore[attr-defined]
    if LowPrecMonitorCallback not in defaults:
        defaults.insert(1, LowPrecMonitorCallback)  # before the reporting callbacks, so that they see the counters
    Trainer.call_model_init = _call_model_init  # type: ignore[method-assign]
    Trainer.get_optimizer_cls_and_kwargs = staticmethod(_optimizer_cls_and_kwargs)  # type: ignore[method-assign]


install()
