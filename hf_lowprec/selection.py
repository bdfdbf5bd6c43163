# SPDX-License-Identifier: Apache-2.0
"""Which linears of a model are converted, and why the others are not.

Every `nn.Linear` and transformers `Conv1D`, except

- output embeddings and weights tied to an embedding (their errors reach every token, and tying shares one tensor);
- classification and value heads (`score`, `classifier`, `v_head`, ...), adapters (LoRA A/B), MoE routers: small and
  sensitive;
- sizes that no FP8 GEMM takes (a dimension not divisible by 16), and sizes that gain nothing from one
  (`break_even`), unless the recipe is emulated;
- what `modules_to_not_convert` names and what `module_filter_fn` refuses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_lowprec.modules import low_precision_class
from hf_lowprec.modules.linear import LowPrecMixin, forward_is_replaced
from hf_lowprec.recipe import Recipe
from hf_lowprec.report import ConversionReport

# Matched against whole dotted parts of a module's name.
_HEADS = ("lm_head", "embed_out", "score", "classifier", "classification_head", "qa_outputs", "v_head", "value_head",
          "reward_head", "summary", "output_projection")  # fmt: skip
_ROUTERS = ("router", "gate", "shared_expert_gate", "gating")
_ADAPTERS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_ALIGNMENT = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Choice:
    """What decides besides the model and its recipe.

    patterns: modules to leave alone.
    filter_fn: called with (module, name); False leaves the module alone.
    aligned: leave sizes alone that no native GEMM takes.
    min_numel: leave weights of fewer elements alone.
    left: linears to leave alone, each with its reason.
    """

    patterns: tuple[str, ...] = ()
    filter_fn: Callable[[nn.Module, str], bool] | None = None
    aligned: bool = False
    min_numel: int = 0
    left: Mapping[str, str] = field(default_factory=dict)


def select(model: nn.Module, recipe: Recipe, choice: Choice) -> tuple[ConversionReport, dict[str, nn.Module]]:
    """A report that names every linear, and those to convert by name, in model order."""
    report = ConversionReport(recipe)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or low_precision_class(m)}
    heads, tied, unused = _head_ids(model), _tied_ids(model), set(choice.patterns)
    chosen: dict[str, nn.Module] = {}
    for name, module in linears.items():
        matched = [p for p in choice.patterns if matches(p, name)]
        unused -= set(matched)
        reason = _reason(name, module, model, heads, tied, choice)
        if reason is None:
            reason = choice.left.get(name)
        if not recipe.quantises_gemms:
            reason = f"recipe {recipe.name} quantises no GEMM"
        elif matched:
            reason = f"named by modules_to_not_convert ({matched[0]})"
        elif reason is None and choice.filter_fn is not None and not choice.filter_fn(module, name):
            reason = "refused by module_filter_fn"
        if reason is None:
            chosen[name] = module
            report.converted.append(name)
            report.converted_parameters += weight_of(module).numel()
            report.converted_flops += weight_of(module).numel()
        else:
            report.skipped[name] = reason
        if id(module) not in heads:
            report.flops += weight_of(module).numel()
    for name, parameter in model.named_parameters():
        report.parameters += parameter.numel()
        if parameter.dim() == 3 and "expert" in name:
            report.unconvertible[name] = "3-D expert weights of a mixture of experts"
            report.flops += parameter.numel()
    # A pattern may also name a module that is no linear; only one that matches nothing at all is a likely typo.
    names = [n for n, _ in model.named_modules()]
    report.unmatched_patterns = sorted(p for p in unused if not any(matches(p, n) for n in names))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    report.bytes_per_parameter = size / max(1, report.parameters)
    return report, chosen


def _reason(
    name: str, module: nn.Module, model: nn.Module, heads: set[int], tied: set[int], choice: Choice
) -> str | None:
    """Why `module` is left alone, or None."""
    parts = name.split(".")
    if isinstance(module, LowPrecMixin):
        return "already converted"
    if low_precision_class(module) is None:
        return f"class {type(module).__name__} may have a forward of its own"
    if id(module) in heads:
        return "output embedding or head"
    weight = weight_of(module)
    if id(weight) in tied:
        return "weight tied to another module"
    if any(part in _ADAPTERS for part in parts):
        return "adapter"
    if any(part in _HEADS for part in parts):
        return "head"
    parent = model.get_submodule(".".join(parts[:-1]))
    # A `gate` beside `up` belongs to a gated MLP, one beside experts chooses among them.
    if parts[-1] in _ROUTERS and any("expert" in child for child, _ in parent.named_children()):
        return "router"
    if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return f"nn.{type(parent).__name__} reads its weight directly"
    if forward_is_replaced(module):
        return "its forward was replaced on the instance"
    if weight.dtype not in _DTYPES:
        return f"its weight is stored as {weight.dtype}"
    if choice.aligned and any(size % _ALIGNMENT for size in weight.shape):
        return f"a dimension of {tuple(weight.shape)} is not divisible by {_ALIGNMENT}"
    if weight.numel() < choice.min_numel:
        return f"FP8 gains nothing below {choice.min_numel} elements"
    return None


def weight_of(module: nn.Module) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight


def _head_ids(model: nn.Module) -> set[int]:
    heads = set()
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            try:
                head = getter()
            except (AttributeError, NotImplementedError):
                continue
            if head is not None:
                heads.add(id(head))
    return heads


def _tied_ids(model: nn.Module) -> set[int]:
    """ids of Parameters that more than one module owns."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {key for key, count in owners.items() if count > 1}


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` is the name, whole dotted parts of it or, as a regular expression, all of it."""
    if pattern == name or pattern in name.split(".") or name.endswith("." + pattern):
        return True
    if f".{pattern}." in f".{name}.":
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False
