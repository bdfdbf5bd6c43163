# SPDX-License-Identifier: Apache-2.0
"""`from_pretrained(name, quantization_config=LowPrecConfig("fp8-lm"))`: a quantizer that converts and goes away.

transformers' quantizers own their model for life: a model with `hf_quantizer` ignores the state dict handed to
`save_pretrained` (the Trainer's way under FSDP and DeepSpeed), refuses `.float()`, and names a `quant_method` in
config.json that no stock loader knows. A converted model needs none of that, since its weights are plain Parameters.
So ours converts once the weights are loaded, takes every trace of itself off the model, and what is saved is a plain
checkpoint. The recipe belongs to the run, not to the weights: name it again to train on from a saved model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_lowprec import _autoload
from hf_lowprec.conversion import convert
from hf_lowprec.flags import check_switch
from hf_lowprec.integrations.switches import SWITCHES, Switches, settle
from hf_lowprec.presets import get_recipe
from hf_lowprec.recipe import Recipe

_METHOD = "hf_lowprec"


@register_quantization_config(_METHOD)
class LowPrecConfig(QuantizationConfigMixin):
    """Load a model ready to train in low precision.

    recipe: a preset's name, a recipe file, a dict, or a Recipe.
    modules_to_not_convert: names or regular expressions of modules to leave alone, added to the defaults.
    fuse, attention, liger, graphs: what comes with a recipe (integrations/switches.py); None follows the environment.

    Raises RecipeError for an unknown or malformed recipe, TypeError for a switch that is not True, False or None.
    """

    def __init__(
        self,
        recipe: str | Path | dict[str, Any] | Recipe,
        modules_to_not_convert: Sequence[str] | str | None = None,
        fuse: bool | None = None,
        attention: bool | None = None,
        liger: bool | None = None,
        graphs: bool | None = None,
        quant_method: str = _METHOD,
    ) -> None:
        if quant_method != _METHOD:
            raise ValueError(f"quant_method: {quant_method!r} is not {_METHOD!r}")
        self.quant_method = _METHOD  # type: ignore[assignment]  # an enum that is closed upstream
        for name, value in (("fuse", fuse), ("attention", attention), ("liger", liger), ("graphs", graphs)):
            check_switch(name, value)
        self.recipe = get_recipe(recipe)
        if isinstance(modules_to_not_convert, str):
            modules_to_not_convert = [modules_to_not_convert]
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)
        self.fuse, self.attention, self.liger, self.graphs = fuse, attention, liger, graphs

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `LowPrecConfig.from_dict` reads it back equal."""
        return {
            "quant_method": _METHOD,
            "recipe": self.recipe.to_dict(),
            "modules_to_not_convert": self.modules_to_not_convert,
            "fuse": self.fuse,
            "attention": self.attention,
            "liger": self.liger,
            "graphs": self.graphs,
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LowPrecConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # mutable, as transformers' configs are


@register_quantizer(_METHOD)
class LowPrecQuantizer(HfQuantizer):
    """Overrides only hooks that exist, with one meaning, in every transformers from 5.17 on."""

    requires_calibration = False
    quantization_config: LowPrecConfig

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self._detach(model)
        config = self.quantization_config
        switches = Switches(config.fuse, config.attention, config.liger, config.graphs)
        convert(model, config.recipe, modules_to_not_convert=config.modules_to_not_convert, fuse=config.fuse)
        settle(model, switches, model.device)
        model._hf_lowprec_request = config.recipe  # Accelerator.prepare attaches the optimizer of a marked model
        setattr(model, SWITCHES, switches)  # ... and settles what depends on the device that it trains on
        return model

    def _detach(self, model: PreTrainedModel) -> None:
        self.remove_quantization_config(model)
        for module in model.modules():
            # Each sub-model of a composite (vision, text) was flagged through its own config.
            if isinstance(module, PreTrainedModel) and hasattr(module.config, "_is_quantized"):
                del module.config._is_quantized

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


_autoload.activate()  # patch Accelerator also where the autoload hook is off: prepare attaches the optimizer
