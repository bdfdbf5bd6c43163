# SPDX-License-Identifier: Apache-2.0
"""What a quantised linear works on: the state of an operand, its quantised form, and the recipe as a layer sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowprec import ops
from hf_lowprec.recipe import Quant, Recipe, Scaling

# `view` of a result inside an autograd.Function that is no view to autograd, which would refuse to have it written in
# place: `+=`, nn.ReLU(inplace=True). Nothing else may use the memory.
shaped: Callable[[Tensor, Sequence[int]], Tensor] = torch.ops.aten._unsafe_view.default


class OperandState(NamedTuple):
    """What one operand of one layer carries from step to step. All tensors live on the layer's device.

    scale: 0-dim float32, the delayed scale (0 = none yet), or None where the recipe does not delay.
    amax: 0-dim float32, the largest finite magnitude since the last optimizer step, or None likewise.
    counts: int64 [4]: elements looked at, saturated, underflowed to zero, non-finite.
    seed: 0-dim int64, or None without stochastic rounding.
    """

    scale: Tensor | None
    amax: Tensor | None
    counts: Tensor
    seed: Tensor | None


class Remake:
    """The transposed codes of a tensor, made again in backward, once for all linears that read it.

    make: the tensor [..., C] as forward had it, out of the tensors of its `Source`. It holds none of them itself:
        autograd does, so that its hooks and its check of versions see them.
    readers: linears whose backward will ask, all with one scale.
    """

    def __init__(self, make: Callable[[Sequence[Tensor]], Tensor]) -> None:
        self.readers = 0
        self._make = make
        self._left = 0
        self._columns: Tensor | None = None

    def columns(self, tensors: Sequence[Tensor], quant: str, scale: Tensor, seed: Tensor | None) -> Tensor:
        """[C, R rounded up to 16], cast with the scale of forward; nothing is noted or counted. In backward only.

        Raises RuntimeError: the memory of one of the tensors was freed since forward (by FSDP).
        """
        columns = self._columns
        if columns is None:
            if any(t is not None and t.numel() and not t.untyped_storage().nbytes() for t in tensors):
                raise RuntimeError(
                    "saved_inputs 'remade': a norm's weight is freed before its linears' backward. Shard a norm "
                    "together with the linears that read it, or train with saved_inputs 'codes'"
                )
            _, columns, _ = ops.cast_transpose(
                self._make(tensors), quant, scale, fixed=True, seed=seed, rows=False, columns=True
            )
            self._left = self.readers
            if self._left > 1:
                self._columns = columns
                # For readers that this backward pass does not reach.
                torch.autograd.Variable._execution_engine.queue_callback(self.drop)
        self._left -= 1
        if not self._left:
            self.drop()
        return columns

    def drop(self) -> None:
        self._columns = None


class Source(NamedTuple):
    """What a tensor is made of again in backward (`Recipe.saved_inputs`); None among the tensors is passed on."""

    remake: Remake
    tensors: tuple[Tensor | None, ...]


class Quantized(NamedTuple):
    """A quantised matrix [R, C], x ~ qdata * scale, in one or both of the layouts that GEMMs read.

    qdata: [R, C] contiguous, or None where nobody reads it.
    scale: 0-dim float32, or [R, 1] (without `transposed`).
    transposed: [C, R rounded up to 16] contiguous, with zeros at the end, or None where it was not made.
    source: what backward makes `transposed` of again, so that nobody keeps it.
    """

    qdata: Tensor | None
    scale: Tensor
    transposed: Tensor | None = None
    source: Source | None = None

    @property
    def rows(self) -> Tensor:
        """[R, C], for a product that sums over C."""
        assert self.qdata is not None
        return self.qdata

    @property
    def columns(self) -> Tensor:
        """[C, R] or longer, for a product that sums over R."""
        if self.transposed is not None:
            return self.transposed
        assert self.qdata is not None
        return self.qdata.t()


# The constants of a model at unit scale (`hf_lowprec.transform`) reach a cast as a delayed scale that never changes.
_CARRIED = Scaling(method="delayed")


class LinearSpec(NamedTuple):
    """A recipe as a linear layer sees it: one `ops.quant_key` per slot, None = base precision.

    shared_*: one quantised copy serves both GEMMs that read the operand, though they reduce along different axes: the
        policies are equal and one scale covers the tensor.
    kept_input: wgrad reads back the very codes of fprop, with their scales per tensor or per token, and quantises
        nothing else.
    base: of fprop, dgrad and wgrad, whether it runs in the base precision, one operand quantised or none.
    common_input: linears that read one tensor can quantise it once (`modules.sharing`).
    accumulation: of fprop, dgrad and wgrad: an `ops.accumulation_key`, empty for float32 sums.
    remade: no codes of the input are kept where backward can make them again; needs `shared_input`.
    """

    fprop_input: str | None
    fprop_weight: str | None
    dgrad_grad_output: str | None
    dgrad_weight: str | None
    wgrad_input: str | None
    wgrad_grad_output: str | None
    shared_input: bool
    shared_weight: bool
    shared_grad_output: bool
    fast: tuple[bool, bool, bool]
    weight_is_kn: bool
    emulate: bool
    kept_input: bool
    base: tuple[bool, bool, bool]
    common_input: bool
    accumulation: tuple[str, str, str] = ("", "", "")
    remade: bool = False

    @classmethod
    def from_recipe(cls, recipe: Recipe, *, weight_is_kn: bool = False, emulate: bool = False) -> LinearSpec:
        """weight_is_kn: the weight is stored [in, out] (transformers' Conv1D) instead of [out, in]."""

        def key(quant: Quant | None) -> str | None:
            if quant is not None and recipe.transform.method != "none":
                quant = replace(quant, scaling=_CARRIED)
            return None if quant is None else ops.quant_key(quant)

        def shared(first: Quant | None, second: Quant | None) -> bool:
            shares = first is not None and first == second and first.scaling.granularity == "tensor"
            return shares and not recipe.flexible  # whose layers quantise for themselves (functional_flexible)

        x, kept = recipe.fprop.input, recipe.wgrad.input
        read_back = kept is not None and recipe.wgrad.grad_output is None
        shared_input = shared(x, kept) and not read_back and recipe.input_norm is None
        kept_input = x is not None and read_back and x == seen_transposed(kept) and x.rounding.mode != "stochastic"
        once = kept_input or recipe.wgrad.input is None
        per_row = x is not None and x.scaling.granularity in ("tensor", "row") and x.scaling.method == "current"
        return cls(
            fprop_input=key(recipe.fprop.input),
            fprop_weight=key(recipe.fprop.weight),
            dgrad_grad_output=key(recipe.dgrad.grad_output),
            dgrad_weight=key(recipe.dgrad.weight),
            wgrad_input=key(recipe.wgrad.input),
            wgrad_grad_output=key(recipe.wgrad.grad_output),
            shared_input=shared_input,
            shared_weight=shared(recipe.fprop.weight, recipe.dgrad.weight),
            shared_grad_output=shared(recipe.dgrad.grad_output, recipe.wgrad.grad_output),
            fast=(recipe.fprop.accumulation.fast, recipe.dgrad.accumulation.fast, recipe.wgrad.accumulation.fast),
            weight_is_kn=weight_is_kn,
            emulate=emulate,
            kept_input=kept_input,
            base=(
                recipe.fprop.input is None or recipe.fprop.weight is None,
                recipe.dgrad.grad_output is None or recipe.dgrad.weight is None,
                recipe.wgrad.input is None or recipe.wgrad.grad_output is None,
            ),
            common_input=shared_input or (once and per_row and recipe.input_norm is None),
            accumulation=tuple(  # type: ignore[arg-type]
                ops.accumulation_key(gemm.accumulation) for gemm in (recipe.fprop, recipe.dgrad, recipe.wgrad)
            ),
            remade=recipe.saved_inputs == "remade",
        )


def seen_transposed(quant: Quant | None) -> Quant | None:
    """The policy of the transposed tensor that gives the same codes: scales of rows are scales of columns."""
    if quant is None:
        return None
    other = {"row": "column", "column": "row", "tensor": "tensor"}.get(quant.scaling.granularity)
    return None if other is None else replace(quant, scaling=replace(quant.scaling, granularity=other))  # type: ignore[arg-type]


def base_dtype(input: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of a linear's output: autocast's, or without autocast that of both.

    Raises RuntimeError: they differ, outside autocast.
    """
    device = input.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    if input.dtype != weight.dtype:
        raise RuntimeError(
            f"input is {input.dtype} and weight is {weight.dtype}: cast one of them, or run under torch.autocast"
        )
    return input.dtype
