# SPDX-License-Identifier: Apache-2.0
"""The three GEMMs of a linear layer, once, for every recipe.

    fprop:  output      = Q(input)          @ Q(weight).T     (+ bias)
    dgrad:  grad_input  = Q(grad_output)    @ Q(weight)
    wgrad:  grad_weight = Q(grad_output).T  @ Q(input)

Each Q is one of the recipe's six slots; a GEMM without slots runs in the base precision, and so does one of a single
slot, whose quantised operand is read back into it. Where both GEMMs that read an
operand read it in the same form, it is quantised once, in the two layouts that they need (`ops.cast_transpose`):

    input         both layouts in forward. The transposed one is what is saved for backward: one byte an element, as
                  the other would be, and backward need not transpose (4 bytes an element moved in all instead of 5).
                  One that comes with a source (`Quantized.source`) is not saved: backward makes it of that again.
    grad_output   both layouts in backward.
                  Where wgrad quantises nothing else, the codes of fprop are saved as they are and read back.
    weight        cached by the caller from optimizer step to optimizer step (`weight`), or cast in forward and once
                  more in backward with the scale of fprop, which costs a read and saves a byte per parameter.

Operator calls carry strings and tensors only, so torch.compile traces through without a break and without guards on
anything that changes between steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_dynamo_compiling

from hf_lowprec import kernels as _kernels  # noqa: F401  (registers the CUDA implementations of `ops`)
from hf_lowprec import ops
from hf_lowprec.operands import LinearSpec, OperandState, Quantized, base_dtype, shaped


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's `once_differentiable`, for a third of its host time where no second derivative is asked for."""
    refusing = once_differentiable(backward)

    @wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
        return refusing(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return wrapper


def applier(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply`; in eager mode without its preparations for functorch: 20 Python calls fewer."""
    eager = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply(*args: Any) -> Any:
        if is_dynamo_compiling() or torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        return eager(*args)

    return apply


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
        quantized: Q(input) as [rows, K]; needs `spec.common_input`. The input is read for a base-precision wgrad only.
            With a source, which needs `spec.shared_input`, its tensors are saved for backward instead of codes.
        quantized_weight: Q(weight) in the weight's own layout, from an earlier call; needs `spec.shared_weight`.
        sum_seeds: of fprop, dgrad and wgrad, 0-dim int64, where their sums round stochastically.

    Returns: [..., N] in the autocast dtype, or in the input's dtype without autocast.

    Raises:
        RuntimeError: dtypes of input and weight differ outside autocast; no kernel for this GPU (`emulate` runs it).
    """
    dtype = base_dtype(input, weight)
    call = _Call(
        spec, dtype, torch.is_grad_enabled(), input_state, weight_state, grad_state, ready, quantized_weight, sum_seeds
    )
    # Not in `call`, which lives until backward.
    out: Tensor = _apply(input, weight, bias, quantized, call)
    return out


def quantize_input(
    x: Tensor, spec: LinearSpec, state: OperandState, *, ready: bool, observe: bool, columns: bool
) -> Quantized:
    """Q(x) of [..., K] for fprop; transposed for wgrad, too, where one cast serves both (if `columns`)."""
    assert spec.fprop_input is not None
    if spec.shared_input:
        return quantize_matrix(x, spec.fprop_input, state, ready=ready, observe=observe, columns=columns)
    return Quantized(*_quantize(x.reshape(-1, x.shape[-1]), spec.fprop_input, state, observe))


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
        if spec.base[0]:
            if spec.fprop_input is not None and x is None:
                x = _quantize_input(input, call, keep_input)
            a = input.reshape(-1, input.shape[-1]).to(dtype) if x is None else _read(x, spec.fprop_input, dtype)
            b, w_scale = _base_weight(weight, call)
            out = F.linear(a, b, None if bias is None else bias.to(dtype))
        else:
            if x is None:
                x = _quantize_input(input, call, keep_input)
            if w is not None:
                w_nk, w_scale = (w.columns if spec.weight_is_kn else w.rows), w.scale
            else:
                w_nk, w_scale = _quantize_weight(weight, call)
            assert spec.fprop_input is not None and spec.fprop_weight is not None
            out = ops.scaled_mm(
                x.rows, x.scale, spec.fprop_input, w_nk, w_scale, spec.fprop_weight, bias,
                dtype=dtype, fast=spec.fast[0], emulate=spec.emulate,
                accumulation=spec.accumulation[0], seed=call.sum_seeds[0],
            )  # fmt: skip

        saved_x = saved_x_scale = None
        sources: tuple[Tensor | None, ...] = ()
        if keep_input:
            if spec.shared_input:
                assert x is not None
                saved_x_scale = x.scale
                if x.source is None:
                    saved_x = x.columns
                else:  # and the seed, so that a step that changes it before backward is noticed
                    ctx.remake, sources = x.source
                    ctx.remake.readers += 1
                    saved_x = call.input_state.seed
            elif spec.wgrad_input is None:
                saved_x = input.reshape(-1, input.shape[-1]).to(dtype)
            elif spec.kept_input:
                assert x is not None
                saved_x, saved_x_scale = x.rows, x.scale
            else:
                flat = input.reshape(-1, input.shape[-1])
                saved_x, saved_x_scale = _quantize(flat.t(), spec.wgrad_input, call.input_state, x is None)
        kept_scale = w_scale if spec.shared_weight else None
        kept_weight = weight if trains_input and w is None else None
        ctx.save_for_backward(saved_x, saved_x_scale, kept_scale, kept_weight, *sources)
        # Not saved tensors: backward writes to the states, and a layer that ran twice would find them "modified in
        # place"; a cached weight is no activation, which a hook on saved tensors would move to the CPU, say.
        ctx.call = call
        ctx.input_shape, ctx.input_dtype = shape, input.dtype
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        return out if len(shape) == 2 else shaped(out, (*shape[:-1], out.shape[1]))

    @staticmethod
    @first_order  # the gradient of a cast is not its straight-through estimate: refuse, do not guess
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved_x, x_scale, w_scale, weight, *sources = ctx.saved_tensors
        call: _Call = ctx.call
        spec = call.spec
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if sources and needs_weight:  # before dgrad: what it takes for a while is gone when that needs memory
            saved_x = ctx.remake.columns(sources, spec.wgrad_input, x_scale, saved_x)
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
            if spec.base[1]:
                hp_weight = _dgrad_base_weight(weight, w_scale, call)
                grad_input = (_base_grads(grads, g, call, low_input) @ hp_weight).to(ctx.input_dtype)
            else:
                assert spec.dgrad_grad_output is not None and spec.dgrad_weight is not None
                if g is not None:
                    g_mn, g_scale = g.rows, g.scale
                else:
                    g_mn, g_scale = _quantize(grads, spec.dgrad_grad_output, call.grad_state, call.observe)
                w_kn, w_kn_scale = _dgrad_weight(weight, w_scale, call)
                grad_input = ops.scaled_mm(
                    g_mn, g_scale, spec.dgrad_grad_output, w_kn, w_kn_scale, spec.dgrad_weight,
                    dtype=ctx.input_dtype, fast=spec.fast[1], emulate=spec.emulate,
                    accumulation=spec.accumulation[1], seed=call.sum_seeds[1],
                )  # fmt: skip
            if len(ctx.input_shape) != 2:
                grad_input = grad_input.reshape(ctx.input_shape)

        if needs_weight:
            if spec.base[2]:
                hp_input = _wgrad_base_input(saved_x, x_scale, call)
                hp_grads = _base_grads(grads, g, call, low_weight, first_look=not low_input, transposed=True)
                grad_weight = (hp_grads.t() @ hp_input).to(ctx.weight_dtype)
                grad_weight = grad_weight.t() if spec.weight_is_kn else grad_weight
            else:
                assert spec.wgrad_grad_output is not None and spec.wgrad_input is not None
                if g is not None:
                    g_nm, g_nm_scale = g.columns, g.scale
                else:
                    first_look = call.observe and not low_input
                    g_nm, g_nm_scale = _quantize(grads.t(), spec.wgrad_grad_output, call.grad_state, first_look)
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
        if call.weight is not None and not _graph_is_kept():
            ctx.call = None  # whoever keeps the loss must not keep the weight's copy (`modules.emission`)
        return grad_input, grad_weight, grad_bias, None, None


_apply = applier(_Linear)
# Inside backward: whether it was called with retain_graph=True. If not, saved tensors are gone when it is over.
_graph_is_kept: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph


def _nk(weight: Tensor, spec: LinearSpec) -> Tensor:
    return weight.t() if spec.weight_is_kn else weight


def _quantize_input(input: Tensor, call: _Call, keep: bool) -> Quantized:
    return quantize_input(input, call.spec, call.input_state, ready=call.ready[0], observe=call.observe, columns=keep)


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


# --- GEMMs with one quantised operand, or none: it is read back into the base precision, in which they run ----------


def _read(x: Quantized, quant: str | None, dtype: torch.dtype) -> Tensor:
    """Its values [R, C] in `dtype`."""
    assert quant is not None
    return ops.dequantize(x.rows, x.scale, quant, dtype)


def _base_weight(weight: Tensor, call: _Call) -> tuple[Tensor, Tensor | None]:
    """The weight as fprop reads it, [N, K] in the base precision, and the scale that dgrad casts it with."""
    spec = call.spec
    if spec.fprop_weight is None:
        return _nk(weight, spec).to(call.dtype), None
    if call.weight is not None:
        return _nk(_read(call.weight, spec.fprop_weight, call.dtype), spec), call.weight.scale
    qdata, scale = _quantize_weight(weight, call)
    return ops.dequantize(qdata, scale, spec.fprop_weight, call.dtype), scale


def _dgrad_base_weight(weight: Tensor | None, scale: Tensor | None, call: _Call) -> Tensor:
    """The weight as dgrad reads it, likewise."""
    spec, state = call.spec, call.weight_state
    if spec.dgrad_weight is None:
        assert weight is not None
        return _nk(weight, spec).to(call.dtype)
    if call.weight is not None:
        return _nk(_read(call.weight, spec.dgrad_weight, call.dtype), spec)
    assert weight is not None
    if spec.shared_weight:
        assert scale is not None
        rows, _, _ = ops.cast_transpose(
            weight, spec.dgrad_weight, scale, fixed=True, seed=state.seed, rows=True, columns=False
        )
        return _nk(ops.dequantize(rows, scale, spec.dgrad_weight, call.dtype), spec)
    qdata, scale = _dgrad_weight(weight, scale, call)
    return ops.dequantize(qdata, scale, spec.dgrad_weight, call.dtype).t()


def _wgrad_base_input(saved: Tensor, scale: Tensor | None, call: _Call) -> Tensor:
    """What forward saved for wgrad, [M, K] in the base precision."""
    spec = call.spec
    if spec.wgrad_input is None:
        return saved
    assert scale is not None
    if spec.kept_input:
        assert spec.fprop_input is not None
        return ops.dequantize(saved, scale, spec.fprop_input, call.dtype)
    return ops.dequantize(saved, scale, spec.wgrad_input, call.dtype).t()


def _base_grads(
    grads: Tensor,
    g: Quantized | None,
    call: _Call,
    quantised: bool,
    *,
    first_look: bool = True,
    transposed: bool = False,
) -> Tensor:
    """grad_output [M, N] in the base precision, as dgrad reads it, or (`transposed`) as wgrad does."""
    spec = call.spec
    if not quantised:
        return grads.to(call.dtype)
    quant = spec.wgrad_grad_output if transposed else spec.dgrad_grad_output
    assert quant is not None
    if g is not None:
        if g.qdata is not None:
            return _read(g, quant, call.dtype)
        return ops.dequantize(g.columns, g.scale, quant, call.dtype).t()[: grads.numel() // grads.shape[-1]]
    x = grads.t() if transposed else grads
    values = ops.dequantize(*_quantize(x, quant, call.grad_state, call.observe and first_look), quant, call.dtype)
    return values.t() if transposed else values


def _quantize(x: Tensor, quant: str, state: OperandState, observe: bool) -> tuple[Tensor, Tensor]:
    """Q(x) along its last axis: slots that differ, and granularities other than the tensor."""
    amax, counts = (state.amax, state.counts) if observe else (None, None)
    return ops.quantize(x, quant, state.scale, amax=amax, counts=counts, seed=state.seed)
