# SPDX-License-Identifier: Apache-2.0
"""hf_lowprec: train any Hugging Face script in low precision by changing one word.

Everything here loads on first use: importing the package imports neither torch nor triton nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_lowprec import _autoload

__version__ = "0.1.0"

# A script that imports us by hand gets the launcher's recipes too, whether or not torch loaded the entry point.
_autoload.install()

_EXPORTS = {
    "convert": "conversion",
    "revert": "conversion",
    "high_precision": "conversion",
    "invalidate": "conversion",
    "calibrate": "calibration",
    "save_calibration": "calibration",
    "load_calibration": "calibration",
    "learned_parameters": "conversion",
    "attach_optimizer": "stepping",
    "graph_layers": "graphs",
    "ungraph_layers": "graphs",
    "grad_scaler": "loss_scaling",
    "ConversionError": "conversion",
    "NothingConvertedError": "conversion",
    "ConversionReport": "report",
    "Recipe": "recipe",
    "RecipeError": "recipe",
    "PRESETS": "presets",
    "export_pretrained": "checkpoint",
    "load_exported": "checkpoint",
    "LowPrecLinear": "modules",
    "StableEmbedding": "modules",
    "LowPrecConfig": "integrations.quantizer",
    "LowPrecCallback": "integrations.trainer",
    "LowPrecTrainingArguments": "integrations.trainer",
    "LowPrecSFTConfig": "integrations.trl",
    "LowPrecDPOConfig": "integrations.trl",
    "LowPrecRewardConfig": "integrations.trl",
    "LowPrecGRPOConfig": "integrations.trl",
}
_NAMESPACES = ("optim", "numerics", "monitor", "ptq")

__all__ = [*_EXPORTS, *_NAMESPACES]

if TYPE_CHECKING:
    from hf_lowprec.calibration import calibrate, load_calibration, save_calibration
    from hf_lowprec.checkpoint import export_pretrained, load_exported
    from hf_lowprec.conversion import (
        ConversionError,
        NothingConvertedError,
        convert,
        high_precision,
        invalidate,
        learned_parameters,
        revert,
    )
    from hf_lowprec.graphs import graph_layers, ungraph_layers
    from hf_lowprec.loss_scaling import grad_scaler
    from hf_lowprec.modules import LowPrecLinear, StableEmbedding
    from hf_lowprec.presets import PRESETS
    from hf_lowprec.recipe import Recipe, RecipeError
    from hf_lowprec.report import ConversionReport
    from hf_lowprec.stepping import attach_optimizer


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"hf_lowprec.{_EXPORTS[name]}"), name)
    if name in _NAMESPACES:
        return importlib.import_module(f"hf_lowprec.{name}")
    raise AttributeError(f"module 'hf_lowprec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
