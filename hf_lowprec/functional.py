# SPDX-License-Identifier: Apache-2.0
"""The three GEMMs of a linear layer, once, for every recipe.

    fprop:  output      = Q(input)          @ Q(weight).T     (+ bias)
    dgrad:  grad_input  = Q(grad_output)    @ Q(weight)
    wgrad:  grad_weight = Q(grad_output).T  @ Q(input)

Each Q is one of the recipe's six slots; a GEMM without slots runs in the base precision. Where wgrad reads the input
in the same form as fprop, the quantised input is what is saved for backward: one byte an element instead of two. The
weight is not saved in low precision: backward casts it again with the scale of fprop, which costs a read of the weight
and saves a byte per parameter while the activations peak.

Operator calls carry strings and tensors only, so torch.compile traces through without a break and without guards on
anything that changes between steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_lowprec import kernels as _kernels  # noqa: F401  (registers the CUDA implementations of `ops`)
from hf_lowprec import ops
from hf_lowprec.recipe import Quant, Recipe


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


class LinearSpec(NamedTuple):
    """A recipe as a linear layer sees it: one `ops.quant_key` per slot, None = base precision.

    shared_*: one quantised copy serves both GEMMs that read the operand, though they reduce along different axes: the
        policies are equal and one scale covers the tensor.
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

    @classmethod
    def from_recipe(cls, recipe: Recipe, *, weight_is_kn: bool = False, emulate: bool = False) -> LinearSpec:
        """weight_is_kn: the weight is stored [in, out] (transformers' Conv1D) instead of [out, in]."""

        def key(quant: Quant | None) -> str | None:
            return None if quant is None else ops.quant_key(quant)

        def shared(first: Quant | None, second: Quant | None) -> bool:
            return first is not None and first == second and first.scaling.granularity == "tensor"

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
        )


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: LinearSpec,
    input_state: OperandState,
    weight_state: OperandState,
    grad_state: OperandState,
    frozen: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`F.linear` in low precision.

    Args:
        input: [..., K], any number of leading dimensions and rows, zero rows included.
        weight: [N, K], or [K, N] with `spec.weight_is_kn`.
        bias: [N] or None.
        frozen: (qdata, scale) of a weight that does not train, quantised earlier.

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
    observe = torch.is_grad_enabled()
    qdata, scale = frozen if frozen is not None else (None, None)
    out: Tensor = _Linear.apply(
        input, weight, bias, spec, dtype, observe, qdata, scale, *input_state, *weight_state, *grad_state
    )
    return out


def quantize_weight(weight: Tensor, spec: LinearSpec, state: OperandState) -> tuple[Tensor, Tensor]:
    """(qdata, scale) of a frozen weight, in the weight's own layout; `spec.fprop_weight` must be set."""
    assert spec.fprop_weight is not None
    return ops.quantize(weight.detach(), spec.fprop_weight, state.scale, seed=state.seed)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spec: LinearSpec,
        dtype: torch.dtype,
        observe: bool,
        w_qdata: Tensor | None,
        w_scale: Tensor | None,
        *flat: Tensor | None,
    ) -> Tensor:
        x_state, w_state, g_state = (OperandState(*flat[i : i + 4]) for i in (0, 4, 8))  # type: ignore[arg-type]
        x = input.reshape(-1, input.shape[-1])
        trains_input, trains_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        n = weight.shape[1] if spec.weight_is_kn else weight.shape[0]

        x_qdata = x_scale = None
        cached = w_qdata is not None
        if spec.fprop_input is None or spec.fprop_weight is None:
            out = F.linear(x.to(dtype), _nk(weight, spec).to(dtype), None if bias is None else bias.to(dtype))
        else:
            x_qdata, x_scale = _quantize(x, spec.fprop_input, x_state, observe)
            if w_qdata is None or w_scale is None:
                w_qdata, w_scale = _quantize_weight(weight, spec, w_state, observe)
            else:
                w_qdata = _nk(w_qdata, spec)
            out = ops.scaled_mm(
                x_qdata, x_scale, spec.fprop_input, w_qdata, w_scale, spec.fprop_weight, bias,
                dtype=dtype, fast=spec.fast[0], emulate=spec.emulate,
            )  # fmt: skip

        saved_x = saved_x_scale = None
        if trains_weight:
            if spec.shared_input:
                saved_x, saved_x_scale = x_qdata, x_scale
            elif spec.wgrad_input is None:
                saved_x = x.to(dtype)
            else:
                first_look = observe and x_qdata is None
                saved_x, saved_x_scale = _quantize(x.t(), spec.wgrad_input, x_state, first_look)
        # A cached weight is there anyway: dgrad reads it. Any other would be a byte per parameter kept for backward.
        keep_qdata = cached and spec.shared_weight
        ctx.save_for_backward(
            saved_x, saved_x_scale,
            w_qdata if keep_qdata and trains_input else None,
            w_scale,
            weight if trains_input and not keep_qdata else None,
        )  # fmt: skip
        # Not saved tensors: backward writes to them, and a layer that ran twice would find them "modified in place".
        ctx.w_state, ctx.g_state = w_state, g_state
        ctx.spec, ctx.dtype, ctx.observe = spec, dtype, observe
        ctx.input_shape, ctx.input_dtype = input.shape, input.dtype
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        return out.reshape(*input.shape[:-1], n)

    @staticmethod
    @once_differentiable  # the gradient of a cast is not its straight-through estimate: refuse, do not guess
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved_x, x_scale, w_qdata, w_scale, weight = ctx.saved_tensors
        w_state, g_state, spec = ctx.w_state, ctx.g_state, ctx.spec
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        g = grad_output.reshape(-1, grad_output.shape[-1])
        grad_input = grad_weight = grad_bias = None

        g_qdata = g_scale = None
        if needs_input:
            if spec.dgrad_grad_output is None:
                hp_weight = _nk(weight, spec).to(ctx.dtype)
                grad_input = (g.to(ctx.dtype) @ hp_weight).to(ctx.input_dtype)
            else:
                g_qdata, g_scale = _quantize(g, spec.dgrad_grad_output, g_state, ctx.observe)
                if w_qdata is not None:
                    w_kn = w_qdata.t()
                elif spec.shared_weight:
                    w_kn, _ = ops.quantize(weight, spec.dgrad_weight, w_scale, fixed=True, seed=w_state.seed)
                    w_kn = w_kn if spec.weight_is_kn else w_kn.t()
                else:
                    first_look = ctx.observe and spec.fprop_weight is None
                    w_kn, w_scale = _quantize(_nk(weight, spec).t(), spec.dgrad_weight, w_state, first_look)
                grad_input = ops.scaled_mm(
                    g_qdata, g_scale, spec.dgrad_grad_output, w_kn, w_scale, spec.dgrad_weight,
                    dtype=ctx.input_dtype, fast=spec.fast[1], emulate=spec.emulate,
                )  # fmt: skip
            grad_input = grad_input.reshape(ctx.input_shape)

        if needs_weight:
            if spec.wgrad_grad_output is None:
                grad_weight = (g.to(ctx.dtype).t() @ saved_x.to(ctx.dtype)).to(ctx.weight_dtype)
            else:
                if g_qdata is not None and spec.shared_grad_output:
                    g_nm = g_qdata.t()
                else:
                    first_look = ctx.observe and g_qdata is None
                    g_nm, g_scale = _quantize(g.t(), spec.wgrad_grad_output, g_state, first_look)
                x_km = saved_x.t() if spec.shared_input else saved_x
                assert g_scale is not None
                grad_weight = ops.scaled_mm(
                    g_nm, g_scale, spec.wgrad_grad_output, x_km, x_scale, spec.wgrad_input,
                    dtype=ctx.weight_dtype, fast=spec.fast[2], emulate=spec.emulate,
                )  # fmt: skip
            if spec.weight_is_kn:
                grad_weight = grad_weight.t()

        if needs_bias:
            grad_bias = g.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, *([None] * 17)


def _nk(weight: Tensor, spec: LinearSpec) -> Tensor:
    return weight.t() if spec.weight_is_kn else weight


def _quantize(x: Tensor, quant: str | None, state: OperandState, observe: bool) -> tuple[Tensor, Tensor]:
    assert quant is not None
    return ops.quantize(
        x,
        quant,
        state.scale,
        amax=state.amax if observe else None,
        counts=state.counts if observe else None,
        seed=state.seed,
    )


def _quantize_weight(weight: Tensor, spec: LinearSpec, state: OperandState, observe: bool) -> tuple[Tensor, Tensor]:
    """Q(weight) as [N, K] for fprop: cast in its stored order where the policy has no axis."""
    if not spec.shared_weight:
        return _quantize(_nk(weight, spec), spec.fprop_weight, state, observe)
    qdata, scale = _quantize(weight, spec.fprop_weight, state, observe)
    return _nk(qdata, spec), scale
