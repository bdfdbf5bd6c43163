# SPDX-License-Identifier: Apache-2.0
"""What a conversion did: numbers for programs, one line for logs, a table for people."""

from __future__ import annotations

from collections import Counter
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
    optimizer: one line about the optimizer, once one is attached.
    """

    recipe: Recipe
    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    unconvertible: dict[str, str] = field(default_factory=dict)
    unmatched_patterns: list[str] = field(default_factory=list)
    parameters: int = 0
    converted_parameters: int = 0
    flops: int = 0
    converted_flops: int = 0
    bytes_per_parameter: float = 0.0
    emulated: bool = False
    optimizer: str = "no optimizer attached"
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
        how = "emulated" if self.emulated else "native"
        return (
            f"hf_lowprec: recipe {self.recipe.name}: converted {len(self.converted)} of {self.total_linears} linears "
            f"({self.parameter_share:.1%} of parameters, {self.flop_share:.1%} of layer GEMM FLOPs), {how} GEMMs; "
            f"{self.optimizer}; {self.bytes_per_parameter:.2f} bytes per parameter{self._warnings()}"
        )

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
        lines.extend(f"  ran {count} x {kernel}" for kernel, count in sorted(self.kernels.items()))
        return "\n".join(lines)


def _grouped(reasons: dict[str, str]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        out.setdefault(reason, []).append(name)
    return out


def _shorten(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
