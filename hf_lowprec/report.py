# SPDX-License-Identifier: Apache-2.0
"""What a conversion did: numbers for programs, one line for logs, a table for people."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from hf_lowprec.ops import kernel_counts
from hf_lowprec.recipe import Recipe


@dataclass
class ConversionReport:
    """Returned by `hf_lowprec.convert`.

    converted: module names, in model order.
    skipped: module name -> reason, for every linear that was left alone.
    unconvertible: parameter name -> reason, for weights of GEMMs that are no linear (3-D expert weights of MoE).
    unmatched_patterns: entries of `modules_to_not_convert` that matched no module.
    parameters, converted_parameters: elements of all Parameters, and of the converted weights.
    flops, converted_flops: multiply-adds per token of the layers' GEMMs; output embeddings are not counted, as in
        the papers.
    shared: groups of linears that read the same tensor and quantise it once.
    unshared: such a group that does not -> why each of its linears quantises for itself.
    norms, unfused_norms: norm -> the converted linears that read it; or -> why it runs unfused.
    unread: fused norm -> why it has no such linears.
    mlps, unfused_mlps: MLP -> what it computes; or -> why it runs unfused.
    remade: linear that keeps no codes of its input -> what backward makes them of (`Recipe.saved_inputs`). Attention
        is not among these: which of its kernels runs is known at a call.
    rotary, unfused_rotary: "module: function" for each rotary embedding -> the file it is from; or -> why it runs
        unfused.
    untraced: model or part of it -> why nobody knows which of its modules read the same tensors.
    emulated, why_emulated: whether GEMMs are computed slowly, and why that is so although nobody asked for it.
    least_tokens: converted linear -> rows of its input below which a call runs in the base precision.
    measured_on: the GPU on which such numbers were measured, if they were.
    optimizer: one line about the optimizer, once one is attached.
    transform: how the model came to unit scale, in a few words.
    attention, loss, loss_scale: what else was chosen for this model, in a few words.
    graphs: the state of its layers' CUDA graphs; `str()` of it are the words.
    formats: of calibrated models: layer -> formats of its input and of its weight; calibration: how they were found.
    """

    recipe: Recipe
    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    unconvertible: dict[str, str] = field(default_factory=dict)
    unmatched_patterns: list[str] = field(default_factory=list)
    shared: list[tuple[str, ...]] = field(default_factory=list)
    unshared: dict[str, str] = field(default_factory=dict)
    norms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unfused_norms: dict[str, str] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    mlps: dict[str, str] = field(default_factory=dict)
    unfused_mlps: dict[str, str] = field(default_factory=dict)
    remade: dict[str, str] = field(default_factory=dict)
    rotary: dict[str, str] = field(default_factory=dict)
    unfused_rotary: dict[str, str] = field(default_factory=dict)
    untraced: dict[str, str] = field(default_factory=dict)
    least_tokens: dict[str, int] = field(default_factory=dict)
    measured_on: str | None = None
    parameters: int = 0
    converted_parameters: int = 0
    flops: int = 0
    converted_flops: int = 0
    bytes_per_parameter: float = 0.0
    emulated: bool = False
    why_emulated: str = ""
    optimizer: str = "no optimizer attached"
    transform: str | None = None
    attention: str | None = None
    loss: str | None = None
    loss_scale: str | None = None
    graphs: object | None = None
    formats: dict[str, tuple[str, str]] = field(default_factory=dict)
    calibration: str | None = None
    _kernels_before: Counter[str] = field(default_factory=kernel_counts, repr=False)

    @property
    def total_linears(self) -> int:
        return len(self.converted) + len(self.skipped)

    @property
    def parameter_share(self) -> float:
        return self.converted_parameters / self.parameters if self.parameters else 0.0

    @property
    def flop_share(self) -> float:
        return self.converted_flops / self.flops if self.flops else 0.0

    @property
    def kernels(self) -> dict[str, int]:
        """GEMM kernels that this process ran since the conversion, and how often."""
        return dict(kernel_counts() - self._kernels_before)

    def summary(self) -> str:
        """One line for the log."""
        how = ("emulated" if self.emulated else "native") + " GEMMs"
        how += f" ({self.why_emulated})" if self.emulated and self.why_emulated else ""
        how += self._from_tokens() + self._fused()
        return (
            f"hf_lowprec: recipe {self.recipe.name}: converted {len(self.converted)} of {self.total_linears} linears "
            f"({self.parameter_share:.1%} of parameters, {self.flop_share:.1%} of layer GEMM FLOPs), {how}; "
            f"{self.optimizer}; {self.bytes_per_parameter:.2f} bytes per parameter{self._chosen()}{self._warnings()}"
        )

    def _from_tokens(self) -> str:
        """` from 1024 to 4096 tokens a call on, measured on NVIDIA H100`."""
        if not self.least_tokens:
            return ""
        counts = sorted(set(self.least_tokens.values()))
        source = "" if self.measured_on is None else f", measured on {self.measured_on}"
        return f" from {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} tokens a call on{source}"

    def _fused(self) -> str:
        """`; fused: 64 of 65 norms, 32 of 32 MLPs, 32 of 32 rotary embeddings, 64 shared inputs`, without what the
        model does not have."""
        kinds = (
            ("norms", self.norms, self.unfused_norms), ("MLPs", self.mlps, self.unfused_mlps),
            ("rotary embeddings", self.rotary, self.unfused_rotary),
        )  # fmt: skip
        words = [f"{len(fused)} of {len(fused) + len(left)} {what}" for what, fused, left in kinds if fused or left]
        words += [f"{len(self.shared)} shared inputs"] if self.shared else []
        return f"; fused: {', '.join(words)}" if words else ""

    def _chosen(self) -> str:
        parts = (
            ("unit scale:", self.transform), ("attention", self.attention), ("loss", self.loss),
            ("loss scale", self.loss_scale), ("calibrated", self.calibration),
            ("CUDA graphs:", self.graphs),
        )  # fmt: skip
        return "".join(f"; {what} {words}" for what, words in parts if words is not None)

    def _warnings(self) -> str:
        """What a reader of the one line has to know beside the success."""
        out = ""
        if self.unmatched_patterns:
            out += f"; modules_to_not_convert matched nothing: {', '.join(self.unmatched_patterns)}"
        if self.unconvertible:
            out += f"; not converted: {len(self.unconvertible)} 3-D expert weights"
        return out

    def __str__(self) -> str:
        lines = [self.summary()]
        for reason, names in _grouped(self.skipped).items():
            lines.append(f"  left alone, {reason}: {_shorten(names)}")
        for reason, names in _grouped(self.unconvertible).items():
            lines.append(f"  not a linear, {reason}: {_shorten(names)}")
        kinds = (f"{name}: input {a}, weight {b}" for name, (a, b) in self.formats.items())
        lines.extend(f"  calibrated {words}" for words in _kinds(kinds))
        for tokens in sorted(set(self.least_tokens.values())):
            few = (name for name, least in self.least_tokens.items() if least == tokens)
            lines += [f"  base precision below {tokens} tokens a call: {words}" for words in _kinds(few)]
        lines.extend(self._structure())
        lines.extend(f"  ran {count} x {kernel}" for kernel, count in sorted(self.kernels.items()))
        return "\n".join(lines)

    def _structure(self) -> list[str]:
        """What runs together, one line per kind of layer."""
        lines = [f"  one input: {words}" for words in _kinds(" + ".join(_brief(group)) for group in self.shared)]
        norms = (f"{name} -> {' + '.join(_brief(readers))}" for name, readers in self.norms.items() if readers)
        lines += [f"  fused norm: {words}" for words in _kinds(norms)]
        for reason, groups in _grouped(self.unshared).items():
            named = (" + ".join(_brief(tuple(group.split(" + ")))) for group in groups)
            lines += [f"  one input, not shared, {reason}: {words}" for words in _kinds(named)]
        for reason, names in _grouped(self.unread).items():
            lines += [f"  fused norm, {reason}: {words}" for words in _kinds(names)]
        lines += [f"  fused MLP: {words}" for words in _kinds(f"{name} = {what}" for name, what in self.mlps.items())]
        lines += [f"  fused rotary embedding: {words}" for words in _kinds(self.rotary)]
        for reason, names in _grouped({**self.unfused_norms, **self.unfused_mlps, **self.unfused_rotary}).items():
            lines += [f"  unfused, {reason}: {words}" for words in _kinds(names)]
        if self.recipe.saved_inputs == "remade":
            made = (f"{name}, {how}" for name, how in self.remade.items())
            lines += [f"  input made again in backward: {words}" for words in _kinds(made)]
            kept = (name for name in self.converted if name not in self.remade)
            lines += [f"  input kept as codes unless attention keeps it: {words}" for words in _kinds(kept)]
        lines += [f"  structure of {name} not found: {reason}" for name, reason in self.untraced.items()]
        return lines


def _brief(names: tuple[str, ...]) -> list[str]:
    """Full names, but for what the later ones have in common with the first."""
    first = names[0].rpartition(".")[0]
    inside = all(name.rpartition(".")[0] == first for name in names)
    return [names[0], *(name.rpartition(".")[2] if inside else name for name in names[1:])]


def _kinds(lines: Iterable[str]) -> list[str]:
    """Equal lines but for the numbers of layers folded into one, with a count."""
    counts = Counter(re.sub(r"(?<![^. ])\d+(?![^. ])", "*", line) for line in lines)
    return [line if count == 1 else f"{count} x {line}" for line, count in counts.items()]


def _grouped(reasons: dict[str, str]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        out.setdefault(reason, []).append(name)
    return out


def _shorten(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
