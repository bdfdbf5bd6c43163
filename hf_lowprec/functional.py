# SPDX-License-Identifier: Apache-2.0
"""The three GEMMs of a linear layer, once, for every recipe.

    fprop:  output      = Q(input)          @ Q(weight).T     (+ bias)
    dgrad:  grad_input  = Q(grad_output)    @ Q(weight)
    wgrad:  grad_weight = Q(grad_output).T  @ Q(input)

Each Q is one of the recipe's six slots; a GEMM without slots runs in the base precision. Where both GEMMs that read an
operand read it in the same form, it is quantised once, in the two layouts that they need (`ops.cast_transpose`):

    input         both layouts in forward. The transposed one is what is saved for backward: one byte an element, as
                  the other would be, and backward need not transpose (4 bytes an element moved in all instead of 5).
    grad_output   both layouts in backward.
    weight        cached by the caller from optimizer step to optimizer step (`weight`), or cast in forward and once
                  more in backward with the scale of fprop, which costs a read and saves a byte per parameter.

Operator calls carry strings and tensors only, so torch.compile traces through without a break and without guards on
anything that changes between steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_dynamo_compiling

from hf_lowprec import kernels as _kernels  # noqa: F401  (registers the CUDA implementations of `ops`)
from hf_lowprec import ops
from hf_lowprec.recipe import Quant, Recipe, Scaling


def first_order(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """torch's `once_differentiable`, for a third of its host time where no second derivative is asked for."""
    refusing = once_differentiable(backward)

    @wraps(backward)
    def wrapper(ctx: Any, grad: Tensor) -> Any:
        return refusing(ctx, grad) if torch.is_grad_enabled() else backward(ctx, grad)

    return wrapper


def applier(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply`; in eager mode without its preparations for functorch: 20 Python calls fewer."""
    eager = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply(*args: Any) -> Any:
        if is_dynamo_compiling() or torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        return eager(*args)

    return apply


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


class Quantized(NamedTuple):
    """A quantised matrix [R, C], x ~ qdata * scale, in one or both of the layouts that GEMMs read.

    qdata: [R, C] contiguous, or None where nobody reads it.
    scale: 0-dim float32.
    transposed: [C, R rounded up to 16] contiguous, with zeros at the end, or None where it was not made.
    """

    qdata: Tensor | None
    scale: Tensor
    transposed: Tensor | None = None

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
    accumulation: of fprop, dgrad and wgrad: an `ops.accumulation_key`, empty for float32 sums.
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
    accumulation: tuple[str, str, str] = ("", "", "")

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

        return cls(
            fprop_input=key(recipe.fprop.input),
            fprop_weight=key(recipe.fprop.weight),
            dgrad_grad_output=key(recipe.dgrad.grad_output),
            dgrad_weight=key(recipe.dgrad.weight),
            wgrad_input=key(recipe.wgrad.input),
            wgrad_grad_output=key(recipe.wgrad.grad_output),
            shared_input=shared(recipe.fprop.input, recipe.wgrad.input),
            shared_weight=shared(recipe.fprop.weight, recipe.dgrad.weight),
            shared_grad_output=shared(recipe.dgrad.grad_output, recipe.wgrad.grad_output),
            fast=(recipe.fprop.accumulation.fast, recipe.dgrad.accumulation.fast, recipe.wgrad.accumulation.fast),
            weight_is_kn=weight_is_kn,
            emulate=emulate,
            accumulation=tuple(  # type: ignore[arg-type]
                ops.accumulation_key(gemm.accumulation) for gemm in (recipe.fprop, recipe.dgrad, recipe.wgrad)
            ),
        )


class _Call(NamedTuple):
    """One call of `linear` beside its tensors with gradients: a single argument, as autograd looks at each."""

    spec: LinearSpec
    dtype: torch.dtype
    observe: bool
    input_state: OperandState
    weight_state: OperandState
    grad_state: OperandState
    ready: tuple[bool, bool, bool]
    weight: Quantized | None
    sum_seeds: tuple[Tensor | None, Tensor | None, Tensor | None]


_NOT_READY = (False, False, False)
_NO_SEEDS = (None, None, None)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: LinearSpec,
    input_state: OperandState,
    weight_state: OperandState,
    grad_state: OperandState,
    *,
    ready: tuple[bool, bool, bool] = _NOT_READY,
    quantized: Quantized | None = None,
    quantized_weight: Quantized | None = None,
    sum_seeds: tuple[Tensor | None, Tensor | None, Tensor | None] = _NO_SEEDS,
) -> Tensor:
    """`F.linear` in low precision.

    Args:
        input: [..., K], any number of leading dimensions and rows, zero rows included.
        weight: [N, K], or [K, N] with `spec.weight_is_kn`.
        bias: [N] or None.
        ready: of each state, whether the host knows that the delayed scale is not 0 (`ops.quantize`).
        quantized: Q(input) as [rows, K]; needs `spec.shared_input` if the weight trains. The input is not read then.
        quantized_weight: Q(weight) in the weight's own layout, from an earlier call; needs `spec.shared_weight`.
        sum_seeds: of fprop, dgrad and wgrad, 0-dim int64, where their sums round stochastically.

    Returns: [..., N] in the autocast dtype, or in the input's dtype without autocast.

    Raises:
        RuntimeError: dtypes of input and weight differ outside autocast; no kernel for this GPU (`emulate` runs it).
    """
    device = input.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    elif input.dtype != weight.dtype:
        raise RuntimeError(
            f"input is {input.dtype} and weight is {weight.dtype}: cast one of them, or run under torch.autocast"
        )
    else:
        dtype = input.dtype
    call = _Call(
        spec, dtype, torch.is_grad_enabled(), input_state, weight_state, grad_state, ready, quantized_weight, sum_seeds
    )
    # Not in `call`, which lives until backward.
    out: Tensor = _apply(input, weight, bias, quantized, call)
    return out


def quantize_matrix(
    x: Tensor,
    quant: str,
    state: OperandState,
    *,
    ready: bool,
    observe: bool,
    partials: Tensor | None = None,
    rows: bool = True,
    columns: bool = True,
) -> Quantized:
    """Q(x) of [..., C] as a matrix, one scale for the tensor, in the layouts that are asked for."""
    amax, counts = (state.amax, state.counts) if observe else (None, None)
    a, b, scale = ops.cast_transpose(
        x, quant, state.scale, amax=amax, counts=counts, seed=state.seed, ready=ready, partials=partials, rows=rows,
        columns=columns,
    )  # fmt: skip
    return Quantized(a if rows else None, scale, b if columns else None)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, quantized: Quantized | None, call: _Call
    ) -> Tensor:
        spec, dtype, observe = call.spec, call.dtype, call.observe
        trains_input, trains_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        keep_input = observe and trains_weight
        shape = input.shape

        x = quantized
        w = call.weight
        w_scale = None
        if spec.fprop_input is None or spec.fprop_weight is None:
            flat = input.reshape(-1, input.shape[-1])
            out = F.linear(flat.to(dtype), _nk(weight, spec).to(dtype), None if bias is None else bias.to(dtype))
        else:
            if x is None:
                x = _quantize_input(input, call, keep_input)
            if w is not None:
                w_nk, w_scale = (w.columns if spec.weight_is_kn else w.rows), w.scale
            else:
                w_nk, w_scale = _quantize_weight(weight, call)
            out = ops.scaled_mm(
                x.rows, x.scale, spec.fprop_input, w_nk, w_scale, spec.fprop_weight, bias,
                dtype=dtype, fast=spec.fast[0], emulate=spec.emulate,
                accumulation=spec.accumulation[0], seed=call.sum_seeds[0],
            )  # fmt: skip

        saved_x = saved_x_scale = None
        if keep_input:
            if spec.shared_input:
                assert x is not None
                saved_x, saved_x_scale = x.columns, x.scale
            elif spec.wgrad_input is None:
                saved_x = input.reshape(-1, input.shape[-1]).to(dtype)
            else:
                flat = input.reshape(-1, input.shape[-1])
                saved_x, saved_x_scale = _quantize(flat.t(), spec.wgrad_input, call.input_state, x is None)
        kept_scale = w_scale if spec.shared_weight else None
        ctx.save_for_backward(saved_x, saved_x_scale, kept_scale, weight if trains_input and w is None else None)
        # Not saved tensors: backward writes to the states, and a layer that ran twice would find them "modified in
        # place"; a cached weight is no activation, which a hook on saved tensors would move to the CPU, say.
        ctx.call = call
        ctx.input_shape, ctx.input_dtype = shape, input.dtype
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        return out if len(shape) == 2 else out.view(*shape[:-1], out.shape[1])

    @staticmethod
    @first_order  # the gradient of a cast is not its straight-through estimate: refuse, do not guess
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved_x, x_scale, w_scale, weight = ctx.saved_tensors
        call: _Call = ctx.call
        spec = call.spec
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_input = grad_weight = grad_bias = None

        g = None
        low_input = needs_input and spec.dgrad_grad_output is not None
        low_weight = needs_weight and spec.wgrad_grad_output is not None
        if spec.shared_grad_output and (low_input or low_weight):
            g = quantize_matrix(
                grad_output, spec.dgrad_grad_output, call.grad_state,  # type: ignore[arg-type]
                ready=call.ready[2], observe=call.observe, rows=low_input, columns=low_weight,
            )  # fmt: skip
        grads = grad_output
        if (g is None or needs_bias) and grad_output.dim() != 2:
            grads = grad_output.reshape(-1, grad_output.shape[-1])

        if needs_input:
            if spec.dgrad_grad_output is None:
                hp_weight = _nk(weight, spec).to(call.dtype)
                grad_input = (grads.to(call.dtype) @ hp_weight).to(ctx.input_dtype)
            else:
                if g is not None:
                    g_mn, g_scale = g.rows, g.scale
                else:
                    g_mn, g_scale = _quantize(grads, spec.dgrad_grad_output, call.grad_state, call.observe)
                assert spec.dgrad_weight is not None
                w_kn, w_kn_scale = _dgrad_weight(weight, w_scale, call)
                grad_input = ops.scaled_mm(
                    g_mn, g_scale, spec.dgrad_grad_output, w_kn, w_kn_scale, spec.dgrad_weight,
                    dtype=ctx.input_dtype, fast=spec.fast[1], emulate=spec.emulate,
                    accumulation=spec.accumulation[1], seed=call.sum_seeds[1],
                )  # fmt: skip
            if len(ctx.input_shape) != 2:
                grad_input = grad_input.reshape(ctx.input_shape)

        if needs_weight:
            if spec.wgrad_grad_output is None:
                grad_weight = (grads.to(call.dtype).t() @ saved_x.to(call.dtype)).to(ctx.weight_dtype)
                grad_weight = grad_weight.t() if spec.weight_is_kn else grad_weight
            else:
                if g is not None:
                    g_nm, g_nm_scale = g.columns, g.scale
                else:
                    first_look = call.observe and not low_input
                    g_nm, g_nm_scale = _quantize(grads.t(), spec.wgrad_grad_output, call.grad_state, first_look)
                assert spec.wgrad_input is not None
                a: tuple[Tensor, Tensor, str] = (g_nm, g_nm_scale, spec.wgrad_grad_output)
                b: tuple[Tensor, Tensor, str] = (saved_x, x_scale, spec.wgrad_input)
                if spec.weight_is_kn:  # the gradient comes in the weight's own layout
                    a, b = b, a
                grad_weight = ops.scaled_mm(
                    *a, *b, dtype=ctx.weight_dtype, fast=spec.fast[2], emulate=spec.emulate,
                    accumulation=spec.accumulation[2], seed=call.sum_seeds[2],
                )  # fmt: skip

        if needs_bias:
            grad_bias = grads.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, None, None


_apply = applier(_Linear)


def _nk(weight: Tensor, spec: LinearSpec) -> Tensor:
    return weight.t() if spec.weight_is_kn else weight


def _quantize_input(input: Tensor, call: _Call, keep: bool) -> Quantized:
    """Q(input) for fprop, and for wgrad where one cast serves both."""
    spec = call.spec
    assert spec.fprop_input is not None
    if spec.shared_input:
        return quantize_matrix(
            input, spec.fprop_input, call.input_state, ready=call.ready[0], observe=call.observe, columns=keep
        )
    qdata, scale = _quantize(input.reshape(-1, input.shape[-1]), spec.fprop_input, call.input_state, call.observe)
    return Quantized(qdata, scale)


def _quantize_weight(weight: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    """Q(weight) as [N, K] for fprop."""
    spec, state = call.spec, call.weight_state
    assert spec.fprop_weight is not None
    if not spec.shared_weight:
        return _quantize(_nk(weight, spec), spec.fprop_weight, state, call.observe)
    kn = spec.weight_is_kn
    w = quantize_matrix(
        weight, spec.fprop_weight, state, ready=call.ready[1], observe=call.observe, rows=not kn, columns=kn
    )
    return (w.columns if kn else w.rows), w.scale


def _dgrad_weight(weight: Tensor | None, scale: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
    """Q(weight) as [K, N] for dgrad: the cached one, or cast again with the scale of fprop."""
    spec, state = call.spec, call.weight_state
    kn = spec.weight_is_kn
    if call.weight is not None:
        return (call.weight.rows if kn else call.weight.columns), call.weight.scale
    assert weight is not None and spec.dgrad_weight is not None
    if spec.shared_weight:
        assert scale is not None
        rows, columns, _ = ops.cast_transpose(
            weight, spec.dgrad_weight, scale, fixed=True, seed=state.seed, rows=kn, columns=not kn
        )
        return (rows if kn else columns), scale
    first_look = call.observe and spec.fprop_weight is None
    return _quantize(_nk(weight, spec).t(), spec.dgrad_weight, state, first_look)


def _quantize(x: Tensor, quant: str, state: OperandState, observe: bool) -> tuple[Tensor, Tensor]:
    """Q(x) along its last axis: slots that differ, and granularities other than the tensor."""
    amax, counts = (state.amax, state.counts) if observe else (None, None)
    return ops.quantize(x, quant, state.scale, amax=amax, counts=counts, seed=state.seed)
