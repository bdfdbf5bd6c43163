# SPDX-License-Identifier: Apache-2.0
"""Formats whose range and mantissa width are tensors, so that they can be searched and learned (arXiv 2208.09225).

The paper's quantiser has n bits: the sign, M of mantissa, E = n - 1 - M of exponent; and a real-valued bias b that
puts the largest value at `maxval`:

    b = 2^E - log2(maxval) + log2(2 - 2^-M) - 1
    p = max(floor(log2 |x| + b), 1)
    q = round(clip(x, -maxval, maxval) / 2^(p - M - b)) * 2^(p - M - b)

That is an ordinary format without Inf and NaN under an ordinary scale, and is computed so:

    q = s * Q(x / s),   s = maxval / F,   F the largest value of e<E>m<M>

E = 0 is the integer grid of `Format(0, M)`, of 2^M - 1 steps on either side. (There the formula above would give half
a step more.) Gradients, straight through `round` and with p held (`gradients`):

    dq/dx       1 inside the range, 0 outside
    dq/dmaxval  (q - x) / maxval inside, sign(x) outside
    dq/dM       (q - x) * ln2 * (2^E ln2 - 1 - 1 / (2^(M+1) - 1)) inside, 0 outside

Elements that are not finite count as inside for x, and as nothing for maxval and M. Everything stays on the tensors'
device: M is read by no host.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowprec.formats import Format, get_format
from hf_lowprec.numerics.scaling import power_of_two

_LN2 = math.log(2.0)
_MOST_EXPONENT_BITS = 7  # with 8 the largest value is beyond what rounding by addition can hold in float32


class Layout(NamedTuple):
    """A format by its numbers, float32 tensors of the shape of its M. magic: 1.5 * 2^(23 - M)."""

    largest: Tensor
    lowest_binade: Tensor
    highest_binade: Tensor
    magic: Tensor


class Gradients(NamedTuple):
    """Of x, maxval and M, each in the shape of what it belongs to, float32."""

    x: Tensor
    maxval: Tensor
    man: Tensor


def least_man(bits: int) -> int:
    """The least mantissa width of formats of `bits` bits: 1, or what leaves 7 exponent bits."""
    return max(1, bits - 1 - _MOST_EXPONENT_BITS)


def splits(bits: int) -> range:
    """Mantissa widths that differ in more than the name: M = bits - 1 (integers) is M = bits - 2 at half the scale."""
    return range(least_man(bits), max(bits - 1, least_man(bits) + 1))


def mans_of(fmt: Format, *, free: bool) -> list[int]:
    """The mantissa widths that an operand of this format may take: its own, or those of all splits of its bits."""
    return list(splits(fmt.bits)) if free else [fmt.man]


def format_of(man: int, bits: int) -> Format:
    """The `Format` of `bits` bits with `man` of mantissa. Raises ValueError: there is none."""
    if not least_man(bits) <= man <= bits - 1:
        raise ValueError(f"{bits} bits hold {least_man(bits)} to {bits - 1} mantissa bits, got {man}")
    fmt = get_format(f"e{bits - 1 - man}m{man}none")
    assert isinstance(fmt, Format)
    return fmt


def rounded_man(man: Tensor, bits: int) -> Tensor:
    """M as the quantiser takes it: the nearest whole width that there is, int32."""
    return man.detach().round().clamp(least_man(bits), bits - 1).to(torch.int32)


def layout(man: Tensor, bits: int) -> Layout:
    """The format of every M of `man` (see `rounded_man`)."""
    m = rounded_man(man, bits)
    e = bits - 1 - m
    integer = (e == 0).to(torch.int32)
    m, e = m - integer, e + integer  # Format(0, M) is Format(1, M - 1) at half the scale
    top = torch.ones_like(e) << (e - 1)
    half_ulp = power_of_two(-(m + 1))
    return Layout(
        largest=(2.0 - 2.0 * half_ulp) * power_of_two(top),
        lowest_binade=power_of_two(2 - top),
        highest_binade=power_of_two(top),
        magic=1.5 * power_of_two(23 - m),
    )


def scale_of(maxval: Tensor, form: Layout) -> Tensor:
    """s, within the normal numbers, so that its reciprocal is one, too."""
    return (maxval.detach().float() / form.largest).clamp(2.0**-126, 2.0**126)


def smallest_of(maxval: Tensor, man: Tensor, bits: int) -> Tensor:
    """The smallest value above 0, float32, of the shape of `maxval`."""
    form = layout(man, bits)
    step = form.lowest_binade * (form.magic / (1.5 * 2.0**23))  # of the lowest binade
    return scale_of(maxval, form) * step


def flexible(x: Tensor, maxval: Tensor, man: Tensor, bits: int) -> Tensor:
    """q of `x` (any float dtype), float32. Not differentiable; NaN and Inf become NaN.

    maxval: float32, 0-dim or of a shape that broadcasts to x's; man: 0-dim, or likewise; bits: n.
    """
    form = layout(man, bits)
    scale = scale_of(maxval, form)
    x, limit = x.detach().float(), maxval.detach().float()
    z = torch.minimum(torch.maximum(x, -limit), limit) * (1.0 / scale)  # clipped: the product of any x is finite
    p = (z.contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)
    magic = torch.minimum(torch.maximum(p, form.lowest_binade), form.highest_binade) * form.magic
    r = (z + magic) - magic
    r = torch.minimum(torch.maximum(r, -form.largest), form.largest)
    # Inf * 0 is NaN, and -0 + -0 is -0. (The sign is x's: which zero is clipped to a range of 0 differs by device.)
    return (r.copysign(x) + 0.0 * x) * scale


def gradients(grad: Tensor, x: Tensor, q: Tensor, maxval: Tensor, man: Tensor, bits: int) -> Gradients:
    """Gradients of a loss whose gradient by q = flexible(x, ...) is `grad`; formulas in the module docstring."""
    x, grad, maxval = x.detach().float(), grad.detach().float(), maxval.detach().float()
    size = x.abs()
    outside = (size > maxval) & (size < torch.inf)
    error = torch.where(size <= maxval, q - x, 0.0)
    by_maxval = torch.where(outside, x.sign(), error / maxval.clamp(min=2.0**-126))
    m = rounded_man(man, bits).float()
    slope = _LN2 * (_LN2 * torch.exp2(bits - 1 - m) - 1.0 - 1.0 / (torch.exp2(m + 1.0) - 1.0))
    return Gradients(
        torch.where(outside, 0.0, grad),
        _sum_to(grad * by_maxval, maxval),
        _sum_to(grad * error * slope, man),
    )


def _sum_to(x: Tensor, like: Tensor) -> Tensor:
    """The sum over what `like` was broadcast along."""
    if like.dim() == 0:
        return x.sum()
    return x.sum_to_size(like.shape)
