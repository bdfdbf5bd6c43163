# SPDX-License-Identifier: Apache-2.0
"""What the structure of a model allows to be computed together is, and the report says what was not, and why.

- Linears that read the same tensor quantise it once (`modules.sharing`).
- Norms run in one kernel each way (`modules.norm`).
- MLPs run their activation, product and quantisation in one kernel each way (`modules.glu`).
- Rotary embeddings of q and k run in one kernel each way (`modules.rotary`). These are functions, not modules: what is
  replaced is a global of the modeling file, as long as the conversion lives (`modules.rotary_use`).

Weights, names, children and hooks stay as they are: a fused module is its own class with another `forward`, which
calls its children as modules. `unfuse` takes it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from hf_lowprec.modules import LayerState
from hf_lowprec.modules.glu import GLU, LowPrecGLU, fuse_glu, unfuse_glu
from hf_lowprec.modules.linear import forward_is_replaced
from hf_lowprec.modules.norm import LowPrecNorm, fuse_norm, norm_kind, unfuse_norm
from hf_lowprec.modules.rotary_use import RotaryUse, problem, rotary_calls
from hf_lowprec.modules.sharing import share_input
from hf_lowprec.recipe import Recipe
from hf_lowprec.report import ConversionReport
from hf_lowprec.selection import matches
from hf_lowprec.structure import find_structure


def fuse(
    model: nn.Module,
    recipe: Recipe,
    layers: Mapping[str, LayerState],
    report: ConversionReport,
    *,
    emulate: bool,
    patterns: Sequence[str] = (),
) -> list[RotaryUse]:
    """Fuse what can be in a model whose linears are converted, and write it into `report`.

    emulate: the recipe is emulated on a GPU; norms then keep their own forward, which the fused one is compared with.
        MLPs are fused all the same, since that carries out the recipe's `saved`.
    patterns: of names of modules that stay as they are (`modules_to_not_convert`).

    Returns: what keeps rotary embeddings fused while it lives.
    """
    modules = dict(model.named_modules())

    def reason_to_leave(name: str) -> str | None:
        matched = next((pattern for pattern in patterns if matches(pattern, name)), None)
        return None if matched is None else f"named by modules_to_not_convert ({matched})"

    found = find_structure(model, {name: modules[name] for name in layers})
    report.untraced = {name or type(model).__name__: reason for name, reason in found.failures.items()}
    report.unfused_mlps = dict(found.unfused)
    for group in found.shared:
        # What is shared is one quantised copy that every product of every reader takes as it is.
        if all(layers[name].spec.common_input for name in group):
            share_input([layers[name] for name in group])
            report.shared.append(group)
        else:
            inside = recipe.input_norm is not None
            why = "each linear normalises it first" if inside else "the recipe casts it per product"
            report.unshared[" + ".join(group)] = why
    for name, norm in found.norms.items():
        reason = "the recipe is emulated" if emulate else reason_to_leave(name)
        reason = reason or _fuse_norm(modules[name])
        if reason is None:
            report.norms[name] = norm.readers
            if recipe.saved_inputs == "remade":
                _let_remake(modules[name], [layers[reader] for reader in norm.readers])
                report.remade.update(dict.fromkeys(norm.readers, f"by {name}"))
            if not norm.readers:
                report.unread[name] = norm.why
        else:
            report.unfused_norms[name] = reason
    for name, parts in found.mlps.items():
        reason = reason_to_leave(name) or _fuse_mlp(modules[name], parts, recipe)
        if reason is None:
            report.mlps[name] = formula(parts)
            if recipe.saved_inputs == "remade":
                down = _within(layers, f"{name}.{parts.down}" if name else parts.down)
                held = "" if recipe.saved is None else " as they are kept"
                report.remade.update(dict.fromkeys(down, f"from gate and up{held}"))
        else:
            report.unfused_mlps[name] = reason
    return _fuse_rotary(modules, report, reason_to_leave)


def _fuse_rotary(
    modules: Mapping[str, nn.Module], report: ConversionReport, reason_to_leave: Callable[[str], str | None]
) -> list[RotaryUse]:
    """Of the functions that modules call, fuse those that can be."""
    calls = [(name, *call) for name, module in modules.items() for call in rotary_calls(module)]
    problems = {(file, function): problem(file, function) for _, file, function in calls}
    uses: dict[tuple[str, str], RotaryUse] = {}
    for name, file, function in calls:
        where = f"{name}: {function}" if name else function
        reason = reason_to_leave(name) or problems[file, function]
        if reason is None:
            if (file, function) not in uses:
                uses[file, function] = RotaryUse(file, function)
            report.rotary[where] = file
        else:
            report.unfused_rotary[where] = reason
    return list(uses.values())


def _let_remake(norm: nn.Module, readers: Sequence[LayerState]) -> None:
    """What `norm` offers is found by all members of a group."""
    groups = {id(reader.shared): reader for reader in readers}
    norm._lowprec_norm.readers = tuple(groups.values())  # type: ignore[union-attr]


def _within(layers: Mapping[str, LayerState], name: str) -> list[str]:
    """The converted linear of that name, or the one inside an adapter's layer."""
    return [own for own in (name, f"{name}.base_layer") if own in layers]


def _fuse_norm(module: nn.Module) -> str | None:
    """Why `module` stays as it is, or None."""
    if forward_is_replaced(module):
        return "its forward was replaced on the instance"
    kind = norm_kind(module)
    if kind is None:
        return "no norm that there is a kernel for"
    fuse_norm(module, kind)
    return None


def _fuse_mlp(module: nn.Module, parts: GLU, recipe: Recipe) -> str | None:
    """Likewise."""
    try:
        fuse_glu(module, parts, recipe.saved)
    except ValueError as error:
        return str(error)
    return None


def formula(parts: GLU) -> str:
    """`down_proj(silu(gate_proj(x)) * up_proj(x))`."""
    if parts.up is None:
        inner = f"{parts.act}({parts.gate}(x))"
    elif parts.up == parts.gate:
        halves = ("1", "2") if parts.gate_first else ("2", "1")
        inner = f"{parts.act}({parts.gate}(x)[{halves[0]}]) * {parts.gate}(x)[{halves[1]}]"
    else:
        inner = f"{parts.act}({parts.gate}(x)) * {parts.up}(x)"
    out = f"{parts.down}({inner})"
    return out if parts.after is None else f"{parts.after}({out})"


def unfuse(module: nn.Module) -> None:
    """`module` as it was; nothing happens to one that is not fused."""
    if isinstance(module, LowPrecNorm):
        unfuse_norm(module)
    elif isinstance(module, LowPrecGLU):
        unfuse_glu(module)


def is_fused(module: nn.Module) -> bool:
    return isinstance(module, LowPrecNorm | LowPrecGLU)


def fused_states(model: nn.Module) -> Iterator[Any]:
    """What can be switched off by `enabled = False`."""
    for module in model.modules():
        for key in ("_lowprec_norm", "_lowprec_glu"):
            if key in module.__dict__:
                yield module.__dict__[key]
