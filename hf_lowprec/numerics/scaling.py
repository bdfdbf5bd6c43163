# SPDX-License-Identifier: Apache-2.0
"""Scales: which elements share one, and how it follows from their largest magnitude.

A scale always multiplies codes: x ~ qdata * scale. From amax a, the format's largest value F, e = floor(log2 F) and
`margin` m:

    exact   a / F * 2^m
    rceil   2^(ceil(log2(a / F)) + m)     the least power of two that keeps a within the format: Perez' bias
                                          (arXiv 2309.17224), TransformerEngine's power_2_scale, NVIDIA's MX rule
    ocp     2^(floor(log2 a) - e + m)     OCP MX v1.0, section 6.3 (arXiv 2310.10537, algorithm 1); may saturate a
    ceil    2^(ceil(log2 a) - e + m)
    even    2^(floor(log2 a') - e + m)    a' = a rounded half up to the format's mantissa

`target` takes the place of F. With `statistic="mean"` a is the mean magnitude and F is 1, unless `target` says
otherwise; `floor` is the least that a counts for. With `inverse` what is kept is factor = (1 / a) * F, in two
roundings as BitNet's code has it (arXiv 2402.17764). It multiplies on the way in and divides on the way out, where a
scale does the opposite; values differ in their last bits.

Exponents come from the bits of a float, never from a rounded logarithm, which is wrong just below powers of two.

Stated results. amax 0: scale 1 (2^-127 in E8M0, as OCP; 2^-126 for a format that has no zero). amax Inf or NaN: scale
NaN, and the whole group decodes to NaN; the amax functions here leave non-finite elements out, so that this needs
`nonfinite="group"`. Scales stay within the normal float32 numbers, [2^-126, 2^126] (E8M0: [2^-127, 2^127]), so that
the reciprocal is finite too.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hf_lowprec.formats import Codebook, Format, get_format
from hf_lowprec.recipe import Scaling

NonFinite = Literal["element", "group"]
_CHUNK = 1 << 17  # elements of one slice on the CPU


# --- groups ---------------------------------------------------------------------------------------------------------


def group_view(x: Tensor, scaling: Scaling, reduction_axis: int = -1) -> tuple[Tensor, tuple[int, ...]]:
    """`x` with every group on dimensions of its own, zero-padded to whole groups, and those dimensions.

    block(k) along axis a: [..., K, ...] -> [..., K/k, k, ...]; tile(m, n): [..., M, N] -> [..., M/m, m, N/n, n].
    """
    if scaling.granularity == "block":
        axis = reduction_axis % x.dim()
        (k,) = scaling.block
        x = _pad(x, axis, k)
        return torch.unflatten(x, axis, (x.shape[axis] // k, k)), (axis + 1,)
    if scaling.granularity == "tile":
        if x.dim() < 2:
            raise ValueError(f"tile scaling needs a matrix, got shape {tuple(x.shape)}")
        m, n = scaling.block
        x = _pad(_pad(x, x.dim() - 2, m), x.dim() - 1, n)
        x = torch.unflatten(x, -1, (x.shape[-1] // n, n))
        x = torch.unflatten(x, -3, (x.shape[-3] // m, m))
        return x, (x.dim() - 3, x.dim() - 1)
    if scaling.granularity == "row":
        return x, (x.dim() - 1,)
    if scaling.granularity == "column":
        return x, tuple(range(x.dim() - 1))
    return x, tuple(range(x.dim()))


def _pad(x: Tensor, axis: int, multiple: int) -> Tensor:
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    shape = list(x.shape)
    shape[axis] += missing
    out = x.new_zeros(shape)  # not by torch.cat, which autocast on a CPU refuses for float16 and float64
    out.narrow(axis, 0, x.shape[axis]).copy_(x)
    return out


def scale_shape(shape: tuple[int, ...], scaling: Scaling, reduction_axis: int = -1) -> tuple[int, ...]:
    """Shape of the scale of a tensor of `shape`: () per tensor, [..., 1] per row, [1, ..., N] per column,
    [..., ceil(K/k), ...] per block, [..., ceil(M/m), ceil(N/n)] per tile."""
    out = list(shape)
    if scaling.granularity == "tensor" or scaling.method in ("none", "static"):
        return ()
    if scaling.granularity == "row":
        return (*out[:-1], 1)
    if scaling.granularity == "column":
        return (*[1] * (len(out) - 1), out[-1])
    axes = (reduction_axis,) if scaling.granularity == "block" else (-2, -1)
    for axis, size in zip(axes, scaling.block, strict=True):
        out[axis] = -(-out[axis] // size)
    return tuple(out)


def scale_like(x: Tensor, scaling: Scaling, reduction_axis: int = -1) -> Tensor:
    """An empty float32 tensor of the shape that `amax_per_group(x, ...)` has."""
    return x.new_empty(scale_shape(tuple(x.shape), scaling, reduction_axis), dtype=torch.float32)


def expand_scale(scale: Tensor, shape: tuple[int, ...], scaling: Scaling, reduction_axis: int = -1) -> Tensor:
    """A scale of `scale_shape` as a tensor that multiplies elements of `shape`."""
    if scale.dim() == 0 or scaling.granularity in ("tensor", "row", "column"):
        return scale
    axes = (reduction_axis,) if scaling.granularity == "block" else (-2, -1)
    for axis, size in zip(axes, scaling.block, strict=True):
        scale = scale.repeat_interleave(size, axis).narrow(axis, 0, shape[axis])
    return scale


# --- amax -----------------------------------------------------------------------------------------------------------


def finite_amax(x: Tensor, dims: tuple[int, ...] | None = None, *, keepdim: bool = False) -> Tensor:
    """Largest finite magnitude over `dims` (all by default), float32; Inf and NaN are left out, none left gives 0."""
    dims = tuple(range(x.dim())) if dims is None else dims
    return _amax(x.detach(), dims, keepdim, "element")


def _amax(x: Tensor, dims: tuple[int, ...], keepdim: bool, nonfinite: NonFinite) -> Tensor:
    if any(x.shape[d] == 0 for d in dims):
        shape = [1 if d in dims else n for d, n in enumerate(x.shape) if keepdim or d not in dims]
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    if x.dim() == 0:
        plain = x.abs()
    elif len(dims) == x.dim() and not keepdim:
        low, high = torch.aminmax(x)
        plain = torch.maximum(high, -low)
    elif dims == (x.dim() - 1,) and not keepdim and _reads_bits(x):
        plain = _row_amax(x)
    else:
        plain = torch.maximum(x.amax(dims, keepdim=keepdim), -x.amin(dims, keepdim=keepdim))
    plain = plain.to(torch.float32).abs()
    if nonfinite == "group":
        return plain
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and bool(plain.isfinite().all()):
        return plain  # the usual case; the host reads a CPU tensor for free
    finite = torch.where(x.isfinite(), x.abs(), 0)
    return finite.amax(dims, keepdim=keepdim).to(torch.float32)


def amax_per_group(
    x: Tensor, scaling: Scaling, reduction_axis: int = -1, *, nonfinite: NonFinite = "element"
) -> Tensor:
    """Largest magnitude of each group of `x`, float32 of `scale_shape`.

    nonfinite: `element`: Inf and NaN are left out. `group`: they make their group's amax Inf or NaN.

    Raises ValueError: tile scaling of a vector.
    """
    view, dims = group_view(x.detach(), scaling, reduction_axis)
    keep = scaling.granularity in ("row", "column")
    return _amax(view, dims, keep, nonfinite)


def _reads_bits(x: Tensor) -> bool:
    eager = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return eager and x.dtype == torch.float32 and x.is_contiguous()


def _row_amax(x: Tensor) -> Tensor:
    """Largest magnitude over the last dimension, as integers: one pass in cache-sized slices. A NaN is the largest."""
    rows = x.reshape(-1, x.shape[-1]).view(torch.int32)
    out = torch.empty(rows.shape[0], dtype=torch.int32)
    size = max(1, _CHUNK // rows.shape[1])
    for start in range(0, rows.shape[0], size):
        torch.amax(rows[start : start + size] & 0x7FFFFFFF, 1, out=out[start : start + size])
    return out.view(torch.float32).view(x.shape[:-1])


def mean_per_group(x: Tensor, scaling: Scaling, *, magnitude: bool = False) -> Tensor:
    """Mean of each group of `x`, or of its magnitudes, float32 of `scale_shape`; 0 for a group of no elements.

    A group with Inf or NaN has a mean that is neither finite. Tensor, row and column granularity.
    """
    view, dims = group_view(x.detach(), scaling)
    view = view.float()
    if not view.numel():
        return torch.zeros(scale_shape(tuple(x.shape), scaling), dtype=torch.float32, device=x.device)
    if magnitude:
        view = view.abs()
    return view.mean() if scaling.granularity == "tensor" else view.mean(dims, keepdim=True)


def statistic_per_group(
    x: Tensor, scaling: Scaling, reduction_axis: int = -1, *, nonfinite: NonFinite = "element"
) -> Tensor:
    """What the scale of each group follows from: `amax_per_group`, or the mean magnitude."""
    if scaling.statistic == "amax":
        return amax_per_group(x, scaling, reduction_axis, nonfinite=nonfinite)
    mean = mean_per_group(x, scaling, magnitude=True)
    if nonfinite == "group":
        return mean
    finite = x.detach().isfinite()
    rest = mean_per_group(torch.where(finite, x.detach(), 0), scaling, magnitude=True)
    return torch.where(mean.isfinite(), mean, rest / mean_per_group(finite, scaling).clamp(min=2.0**-24))


# --- scale ----------------------------------------------------------------------------------------------------------


def scale_from_amax(amax: Tensor, fmt: str | Format | Codebook, scaling: Scaling) -> Tensor:
    """The scale of every group, float32 of the shape of `amax`; formulas and stated results in the module docstring.

    With `scaling.inverse` it is the factor; with `statistic="mean"`, `amax` is a mean.

    `none` and `static` ignore `amax`. Raises ValueError: `even` for a codebook, which has no mantissa.
    """
    fmt = get_format(fmt)
    amax = amax.to(torch.float32)
    if scaling.method in ("none", "static"):
        return torch.full_like(amax, 2.0**scaling.exponent)
    man = fmt.man if isinstance(fmt, Format) else None
    top = 1.0 if scaling.statistic == "mean" else fmt.max
    top = top if scaling.target is None else scaling.target
    if scaling.floor:
        amax = amax.clamp(min=scaling.floor)
    if scaling.inverse:
        factor = torch.where(amax > 0, (amax.reciprocal() * top).clamp(2.0**-126, 2.0**126), 1.0)
        return torch.where(amax.isfinite(), factor, torch.nan)
    fmt_max = torch.full((), top, dtype=torch.float32, device=amax.device)
    scale = _scale(amax, fmt_max, scaling, man)
    return scale if fmt.has_zero or scaling.store == "e8m0" else torch.where(amax == 0, 2.0**-126, scale)


def _scale(amax: Tensor, fmt_max: Tensor, scaling: Scaling, man: int | None) -> Tensor:
    if scaling.snap == "exact":
        scale = (amax / fmt_max * 2.0**scaling.margin).clamp(2.0**-126, 2.0**126)
    else:
        exponent = _snapped_exponent(amax, fmt_max, scaling.snap, man) + scaling.margin
        limit = 127 if scaling.store == "e8m0" else 126
        scale = power_of_two(exponent.clamp(-limit, limit))
    scale = torch.where(amax > 0, scale, 2.0**-127 if scaling.store == "e8m0" else 1.0)
    return torch.where(amax.isfinite(), scale, torch.nan)


def way_in(scale: Tensor, scaling: Scaling) -> Tensor:
    """What a stored float32 scale multiplies elements by before they are rounded."""
    return scale if scaling.inverse else 1.0 / scale


def multiplier(scale: Tensor, scaling: Scaling) -> Tensor:
    """What multiplies codes, or sums of products of codes, to give values."""
    return 1.0 / scale if scaling.inverse else scale


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent for int32 in [-127, 127], float32, built from bits: no backend can round it or flush 2^-127."""
    return torch.where(exponent < -126, 1 << 22, (exponent + 127) << 23).view(torch.float32)


def _snapped_exponent(amax: Tensor, fmt_max: Tensor, snap: str, man: int | None) -> Tensor:
    """Exponent of the power-of-two scale, int32."""
    a, a_exp = torch.frexp(amax)  # a in [0.5, 1): exact, subnormals included
    top, top_exp = torch.frexp(fmt_max)
    if snap == "rceil":
        return a_exp - top_exp + (a > top).to(torch.int32)
    if snap == "ceil":
        return a_exp - top_exp + (a > 0.5).to(torch.int32)
    if snap == "even":
        if man is None:
            raise ValueError("snap 'even' rounds to the mantissa of a Format; choose another")
        # a' reaches the next power of two from half a unit of the last mantissa bit below it.
        return a_exp - top_exp + (a >= 1.0 - 2.0 ** -(man + 2)).to(torch.int32)
    return a_exp - top_exp


def store_scale(scale: Tensor, scaling: Scaling) -> Tensor:
    """The scale as it is stored: float32, torch.float8_e8m0fnu, or float16 or bfloat16, rounded up within its range.

    Up, so that |x| / scale stays within the format; by one unit at most, and the stored scale is the one that is used.
    """
    if scaling.store in ("float32", "e8m0"):
        return scale.to(torch.float8_e8m0fnu) if scaling.store == "e8m0" else scale
    dtype = torch.float16 if scaling.store == "float16" else torch.bfloat16
    near = scale.clamp(max=torch.finfo(dtype).max).to(dtype)
    above = (near.view(torch.int16) + 1).view(dtype)
    return torch.where(near.float() < scale, above, near).clamp(max=torch.finfo(dtype).max)


def delayed_update(history: Tensor, scale: Tensor, fmt_max: Tensor, scaling: Scaling) -> None:
    """TransformerEngine's delayed scaling (`delayed_scaling.cu`), in place, for n tensors at once, no host sync.

    history [n, L] float32: column 0 holds the amax of the step that ends, the others the older ones.
    scale [n] float32: the dequantisation multipliers. fmt_max [n] float32: largest value of each tensor's format.

    Per row: a = max(H) or H[0]; H = roll(H, -1); H[0] = 0; if a is finite and > 0, scale = rule(a), else it stays.
    A row with H[0] == 0 had no amax in this step and is left as it is.

    Raises ValueError: shapes that do not fit, or snap `even`, whose mantissa differs per row.
    """
    if history.dim() != 2 or history.shape[:1] != scale.shape or scale.shape != fmt_max.shape:
        raise ValueError(
            f"history [n, L], scale [n], fmt_max [n]; got {tuple(history.shape)}, {tuple(scale.shape)}, "
            f"{tuple(fmt_max.shape)}"
        )
    fresh = history[:, 0] != 0
    amax = history.amax(1) if scaling.algorithm == "max" else history[:, 0].clone()
    rolled = torch.roll(history, -1, 1)
    rolled[:, 0] = 0
    history.copy_(torch.where(fresh[:, None], rolled, history))
    usable = fresh & amax.isfinite() & (amax > 0)
    scale.copy_(torch.where(usable, _scale(amax, fmt_max, scaling, None), scale))
