# SPDX-License-Identifier: Apache-2.0
"""Rounding of tensors to a `Format`: the specification that every kernel imitates bit for bit.

Two methods give the same bits. The general one works on integers: it shifts the bits of |x| so that they count in
units of the format's codes, adds something below the last kept bit, and drops the rest (`codes`):

    nearest     half a unit minus one, plus the last kept bit        (ties to the even code)
    away        half a unit                                          (ties away from zero)
    zero        nothing                                              (toward zero)
    stochastic  r random bits in the highest r dropped places        (up with probability floor(2^r d) / 2^r,
                                                                      d the dropped fraction)

The last one is what hardware does (arXiv 2404.14010, lazy rounding) and what gfloat calls StochasticFastest. The other
method serves `nearest` at the speed of memory: with p = 2^floor(log2 |x|), not less than the lowest normal binade,

    (x + C) - C,  C = 1.5 * 2^(23 - man) * p

lets the FPU round to the format's step. Its two traps: it loses the sign of a zero, and C must not overflow.

The arithmetic is float32, exact for float32, bfloat16 and float16 input. Float64 input, and formats that reach beyond
float32's normal range (E8M0), run in float64 by the general method: nothing is rounded twice.

Codes of at most 8 bits come from a table of what the general method gives (`lookup`), wherever it has one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor

from hf_lowprec.formats import Codebook, Format, get_format
from hf_lowprec.numerics.codes import (
    F32,
    carrier_of,
    code_values,
    codes_of,
    count_codes,
    random_bits,
    round_to_codebook,
    value_table,
)
from hf_lowprec.numerics.containers import lift_zeros
from hf_lowprec.numerics.hashing import counter_hash, folded
from hf_lowprec.numerics.lookup import Lookup, build, look_up
from hf_lowprec.recipe import Rounding

Overflow = Literal["saturate", "saturate_inf", "inf", "nan", "error"]
# part(slice, start, out): a function of elements start, start + 1, ... of a tensor; it may write its result to out.
Part = Callable[[Tensor, int, Tensor | None], Tensor]

NEAREST = Rounding()
# Elements per pass on the CPU: a slice and its scratch buffers stay in cache, and calls from Python are few. Measured
# on 2^22 float32, to nearest: 6.7 ms by 2^16, 5.3 by 2^17, 4.8 by 2^18; 10 and more by 2^14.
_CHUNK = 1 << 18


# --- public ---------------------------------------------------------------------------------------------------------


def round_to_format(
    x: Tensor,
    fmt: str | Format | Codebook,
    rounding: Rounding = NEAREST,
    overflow: Overflow = "saturate",
    *,
    seed: int | Tensor | None = None,
    words: Tensor | None = None,
) -> Tensor:
    """The values of `fmt` that the elements of `x` round to, in the dtype and shape of `x`. Not differentiable.

    overflow, for finite values that round beyond the largest: `saturate` to it; `inf`; `nan`; `error`. A NaN stays NaN
        everywhere. An infinite element becomes NaN, but stays infinite under `inf` and saturates under `saturate_inf`,
        which is otherwise `saturate`. Negative values beyond an unsigned format (for E8M0, which has no zero, all
        below half its least) go by the same rule.
    seed, words: for stochastic rounding, one of them. `words` are integers of which the low `rounding.bits` are used,
        one per element; `seed` draws them by `counter_hash(seed, i)`, i the element's index in row-major order.

    Raises TypeError: `x` is not floating point. ValueError: the dtype of `x` cannot hold the format's values
    (e.g. bfloat16 and e5m10: convert `x` first), `inf` for a format without Inf, seed and words not as said.
    OverflowError: under `error`, which reads the result back to the host.
    """
    fmt = get_format(fmt)
    check(x, fmt, rounding, overflow, seed, words)
    if not _holds(x.dtype, fmt):
        raise ValueError(f"{x.dtype} cannot hold the values of {fmt}; round x.float() instead")
    return map_chunks(rounder(fmt, x.dtype, rounding, overflow, seed, words), x.detach(), x.dtype)


def encode(
    x: Tensor,
    fmt: str | Format | Codebook,
    rounding: Rounding = NEAREST,
    overflow: Overflow = "saturate",
    *,
    seed: int | Tensor | None = None,
    words: Tensor | None = None,
) -> Tensor:
    """The codes of `round_to_format(x, ...)`: uint8 for at most 8 bits, else int16 that holds the 16 bits.

    Raises what `round_to_format` raises, and ValueError where a result is NaN and the format has no NaN (this reads a
    flag back to the host).
    """
    fmt = get_format(fmt)
    check(x, fmt, rounding, overflow, seed, words)
    container = torch.uint8 if fmt.bits <= 8 else torch.int16
    table = None if x.dtype == torch.float64 else code_table(fmt, rounding.mode, overflow, x.device)
    if table is None:
        round_part = rounder(fmt, x.dtype, rounding, overflow, seed, words)
        return map_chunks(lambda hp, start, _: codes_of(round_part(hp, start, None), fmt), x.detach(), container)

    def part(hp: Tensor, start: int, out: Tensor | None) -> Tensor:
        hp = hp.float().contiguous()
        # Where a format cannot say NaN, `codes_of` raises. (aminmax takes a tenth of the time of isfinite.)
        if not fmt.has_nan and hp.numel() and not bool(torch.stack(torch.aminmax(hp)).isfinite().all()):
            codes_of(hp.new_full((1,), torch.nan), fmt)
        return look_up(hp, table)

    return map_chunks(part, x.detach(), container)


def decode(codes: Tensor, fmt: str | Format | Codebook, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of codes as `encode` gives them; float32 holds every format but those of more than 8 exponent bits.

    Raises TypeError: not integers. IndexError: a code that the format does not have.
    """
    fmt = get_format(fmt)
    if codes.is_floating_point():
        raise TypeError(f"codes are integers, got {codes.dtype}; a torch float8 tensor decodes by .float()")
    return map_chunks(decode_part(fmt, codes.device, dtype), codes, dtype)


# --- one tensor -----------------------------------------------------------------------------------------------------


def check(
    x: Tensor,
    fmt: Format | Codebook,
    rounding: Rounding,
    overflow: Overflow,
    seed: int | Tensor | None,
    words: Tensor | None,
) -> None:
    """Arguments of `round_to_format`, which says what is raised."""
    if not x.is_floating_point():
        raise TypeError(f"x is floating point, got {x.dtype}")
    if overflow not in ("saturate", "saturate_inf", "inf", "nan", "error"):
        raise ValueError(f"overflow: 'saturate', 'saturate_inf', 'inf', 'nan' or 'error', got {overflow!r}")
    if overflow == "inf" and not fmt.has_inf:
        raise ValueError(f"overflow: {fmt} has no Inf; use 'nan' or 'saturate'")
    if rounding.mode != "stochastic":
        return
    if (seed is None) == (words is None):
        raise ValueError("stochastic rounding needs a seed, or one random word per element: pass one of the two")
    if words is not None and words.numel() != x.numel():
        raise ValueError(f"words: one per element, got {words.numel()} for {x.numel()}")
    dropped = F32.man - (fmt.man if isinstance(fmt, Format) else 0)
    if random_bits(rounding, fmt) > dropped:
        raise ValueError(f"bits: {fmt} drops {dropped} bits of a float32, so no more of them can be random")


def _holds(dtype: torch.dtype, fmt: Format | Codebook) -> bool:
    if isinstance(fmt, Codebook):
        return dtype in (torch.float32, torch.float64)
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    return 2.0**-fmt.man >= info.eps and fmt.max <= info.max and fmt.tiny >= smallest


def rounder(
    fmt: Format | Codebook,
    dtype: torch.dtype,
    rounding: Rounding,
    overflow: Overflow,
    seed: int | Tensor | None,
    words: Tensor | None,
) -> Part:
    """The function that rounds slices of a `dtype` tensor; its result has the carrier's dtype and their shape."""
    carrier = carrier_of(fmt, dtype)
    if isinstance(fmt, Format) and rounding.mode == "nearest" and carrier is F32:
        if magic_fits(fmt):
            return lambda hp, start, out: _nearest_magic(hp.float(), fmt, overflow, out)
        # Inductor removes a cast to bfloat16 and back, so that compiled code takes the general method.
        eager = not torch.compiler.is_compiling()
        if eager and fmt.torch_dtype_name == "bfloat16" and overflow.startswith("saturate"):
            return lambda hp, start, out: _nearest_bf16(hp.float(), fmt, overflow)
    bits = random_bits(rounding, fmt)
    short = isinstance(fmt, Format) and overflow == "saturate" and carrier is F32
    plain = short and _is_truncated_float32(cast(Format, fmt))
    fixed_point = short and _fixed_point_fits(cast(Format, fmt))
    scratch: list[Tensor] = []

    def part(hp: Tensor, start: int, out: Tensor | None) -> Tensor:
        hp = hp.to(carrier.dtype)
        drawn = None
        if rounding.mode == "stochastic":
            if words is not None:
                drawn = words.reshape(-1)[start : start + hp.numel()] & ((1 << bits) - 1)
            else:
                assert seed is not None  # check()
                drawn = _draw(seed, hp, start, scratch).bitwise_and_((1 << bits) - 1)
            drawn = drawn.view(hp.shape)
            if (plain or fixed_point) and hp.dtype == torch.float32:
                assert isinstance(fmt, Format)
                if bits < F32.man - fmt.man or drawn.dtype != torch.int32:
                    drawn = drawn.to(torch.int32) << (F32.man - fmt.man - bits)
                return (stochastic_truncation if plain else _stochastic_fixed_point)(hp, fmt, drawn, out)
        return _general(hp, fmt, rounding, overflow, drawn)

    return part


def _draw(seed: int | Tensor, x: Tensor, start: int, scratch: list[Tensor]) -> Tensor:
    """A word per element of `x`; on the CPU in `scratch`, which the next slice overwrites: it stays in cache."""
    n = x.numel()
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not n:
        return counter_hash(seed, n, start=start, device=x.device)
    if not scratch:
        scratch += [torch.empty(n, dtype=torch.int32), torch.empty(n, dtype=torch.int32), folded(n)]
    first, second, third = scratch
    return counter_hash(seed, n, start=start, buffers=(first[:n], second[:n], third[:n]))


_CODE_TABLES: dict[tuple[Format | Codebook, str, str, torch.device, bool], Lookup | None] = {}


def code_table(
    fmt: Format | Codebook, mode: str, overflow: str, device: torch.device, *, nonzero: bool = False
) -> Lookup | None:
    """For `look_up`: codes of float32 numbers, rounded as the general method does; None if there is no such table.

    nonzero: what is not 0 gets at least the smallest code of its sign. Where the format has no NaN, non-finite numbers
    have the code of zero (of the value nearest to it).
    """
    key = (fmt, mode, overflow, device, nonzero)
    return _CODE_TABLES[key] if key in _CODE_TABLES else _make_code_table(*key)


def _make_code_table(
    fmt: Format | Codebook, mode: str, overflow: str, device: torch.device, nonzero: bool
) -> Lookup | None:
    table = _build_code_table(fmt, mode, overflow, nonzero)
    if table is not None:
        table = table._replace(words=table.words.to(device))
    return _CODE_TABLES.setdefault((fmt, mode, overflow, device, nonzero), table)


_make_code_table.__dict__["_dynamo_marked_constant"] = True  # as in `codes.value_table`


def _build_code_table(fmt: Format | Codebook, mode: str, overflow: str, nonzero: bool) -> Lookup | None:
    if fmt.bits > 8 or mode == "stochastic" or not (overflow == "saturate" or (overflow == "nan" and fmt.has_nan)):
        return None
    carrier, rounding = carrier_of(fmt, torch.float32), Rounding(mode=cast(Any, mode))

    def codes(x: Tensor) -> Tensor:
        x = x if fmt.has_nan else x.masked_fill(~x.isfinite(), 0.0)
        found = codes_of(_general(x.to(carrier.dtype), fmt, rounding, cast(Overflow, overflow), None), fmt)
        if nonzero:
            lift_zeros(found, x, fmt)
        return found

    with torch.device("cpu"):
        return build(codes)


def decode_part(fmt: Format | Codebook, device: torch.device, dtype: torch.dtype) -> Part:
    """The function that decodes slices of codes by table."""
    table: Tensor = value_table(fmt, device, dtype)

    def part(codes: Tensor, start: int, out: Tensor | None) -> Tensor:
        index = codes.to(torch.int32)
        if codes.dtype == torch.int16:
            index &= 0xFFFF  # the container is signed, the code is not
        if out is None:
            return table.index_select(0, index)
        return torch.index_select(table, 0, index, out=out)

    return part


def map_chunks(part: Part, x: Tensor, dtype: torch.dtype, multiple: int = 1) -> Tensor:
    """`part` over the flattened `x`, into `dtype`: in cache-sized slices on the CPU, in one elsewhere.

    A slice's start and length are multiples of `multiple`, which divides the size of `x`.
    """
    flat = x.reshape(-1)
    size = _CHUNK // multiple * multiple or multiple
    if x.device.type != "cpu" or flat.numel() <= size or torch.compiler.is_compiling():
        return part(flat, 0, None).to(dtype).view(x.shape)
    out = torch.empty_like(flat, dtype=dtype)
    for start in range(0, flat.numel(), size):
        piece = out[start : start + size]
        result = part(flat[start : start + size], start, piece if dtype == torch.float32 else None)
        if result.data_ptr() != piece.data_ptr():
            piece.copy_(result.view(-1))
    return out.view(x.shape)


# --- nearest, by the FPU --------------------------------------------------------------------------------------------


def magic_fits(fmt: Format) -> bool:
    """Whether C stays finite, and the format is plain enough for `_nearest_magic`."""
    return fmt.man >= 1 and fmt.signed and fmt.subnormal != "normal0" and F32.man - fmt.man + fmt.emax + 1 <= F32.bias


def _nearest_magic(x: Tensor, fmt: Format, overflow: Overflow, out: Tensor | None) -> Tensor:
    """Nearest-even of a float32 tensor, into `out` if given (not `x` itself); see the module docstring."""
    magic = 1.5 * 2.0 ** (F32.man - fmt.man)
    low = 2.0**fmt.emin if fmt.subnormal == "gradual" else None
    finite, inside = _looked_over(x, fmt.max) if overflow.startswith("saturate") else (False, False)
    p = (x.contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)
    if low is not None or not inside:
        p.clamp_(low, None if inside else 2.0 ** max(fmt.emax, fmt.emin))
    r = torch.add(x, p, alpha=magic) if out is None else torch.add(x, p, alpha=magic, out=out)
    r.sub_(p, alpha=magic)
    if fmt.subnormal == "flush":
        r.masked_fill_(r.abs() < fmt.min_normal, 0.0)
    if inside:
        pass
    elif overflow.startswith("saturate"):
        r.clamp_(-fmt.max, fmt.max)
    else:
        _mark_overflow(r, r.abs() > fmt.max, x, overflow)
    if fmt.has_negative_zero:
        r.copysign_(x)
    else:
        r.add_(0.0)
    return r.add_(x, alpha=0) if overflow in ("saturate", "error") and not finite else r  # Inf * 0 is NaN


def _looked_over(x: Tensor, largest: float) -> tuple[bool, bool]:
    """Whether all elements are finite, and whether none lies beyond the format: then nothing is marked, or cut off.

    Looked up where the host reads for free, else unknown; it costs a pass that only reads and spares one or two.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not x.numel():
        return False, False
    low, high = (end.item() for end in torch.aminmax(x))
    return math.isfinite(low) and math.isfinite(high), -largest <= low and high <= largest


def _is_truncated_float32(fmt: Format) -> bool:
    """Whether the format is a float32 with fewer mantissa bits, as bfloat16 is."""
    layout = (fmt.exp, fmt.bias, fmt.specials, fmt.subnormal, fmt.signed)
    return layout == (8, 127, "ieee", "gradual", True) and fmt.man >= 1


def stochastic_truncation(x: Tensor, fmt: Format, words: Tensor, out: Tensor | None = None) -> Tensor:
    """Stochastic rounding of float32 to a float32 with fewer mantissa bits, saturating, by one integer addition.

    words: int32 below one unit of the last place, overwritten. out: for the result, not `x`.
    """
    unit = 1 << (F32.man - fmt.man)
    words.add_(x.contiguous().view(torch.int32)).bitwise_and_(-unit)
    r = torch.clamp(words.view(torch.float32), -fmt.max, fmt.max, out=out)
    return r.add_(x, alpha=0)  # Inf * 0 is NaN


def _fixed_point_fits(fmt: Format) -> bool:
    """Whether `_stochastic_fixed_point` has the format: signed, with subnormals that float32 has as normal numbers."""
    return fmt.signed and fmt.subnormal == "gradual" and 2 - F32.bias < fmt.emin <= fmt.emax < F32.bias


def _stochastic_fixed_point(x: Tensor, fmt: Format, words: Tensor, out: Tensor | None = None) -> Tensor:
    """`_general` for stochastic rounding, saturating, in half the passes; words: int32 below one unit, overwritten.

    Below the lowest normal binade the bits that count are those of |x| in fixed point, 2^(23 - emin) |x| cut off to an
    integer. Read as a float of the binade below the lowest, it is the larger of the two there, and |x| itself above.
    """
    drop = F32.man - fmt.man
    base = (fmt.emin + F32.bias - 1) << F32.man
    units = x.contiguous().view(torch.int32) & F32.magnitude
    fixed = (units.view(torch.float32) * 2.0 ** (F32.man - fmt.emin)).clamp_(max=2.0**F32.man).to(torch.int32)
    torch.maximum(units, fixed.add_(base), out=units)
    finite, inside = _looked_over(x, fmt.max)
    units.add_(words).bitwise_and_(-(1 << drop))
    if not inside:
        units.clamp_(max=(fmt.max_code << drop) + base)
    normal = units.view(torch.float32)
    # As in `code_values`: (1 + f) / 2 * 2^emin stands where f * 2^emin is meant.
    r = torch.sub(normal, 2.0**fmt.emin, out=out).clamp_(max=0.0).add_(normal)
    r.copysign_(x)
    if not fmt.has_negative_zero:
        r.add_(0.0)
    return r if finite else r.add_(x, alpha=0)  # Inf * 0 is NaN


def _nearest_bf16(x: Tensor, fmt: Format, overflow: Overflow) -> Tensor:
    """bfloat16 reaches so high that C would overflow; torch's own cast is exact once we have clamped."""
    r = x.clamp(-fmt.max, fmt.max).bfloat16().float()
    return r if overflow == "saturate_inf" else r.add_(x, alpha=0)


# --- general --------------------------------------------------------------------------------------------------------


def _general(
    x: Tensor, fmt: Format | Codebook, rounding: Rounding, overflow: Overflow, words: Tensor | None
) -> Tensor:
    """Every mode of every format. x: in the carrier's dtype; words: masked to the bits in use."""
    if isinstance(fmt, Codebook):
        r = round_to_codebook(x, fmt, rounding, words)
        over = (x < fmt.values[0]) | (x > fmt.values[-1])
    else:
        codes = count_codes(x, fmt, rounding, words)
        over = codes > fmt.max_code
        r = code_values(codes.clamp_(max=fmt.max_code), fmt)
        if not fmt.signed:
            r.masked_fill_(x < fmt.min, fmt.min)
            over |= x < 0 if fmt.has_zero else x < fmt.min / 2
    if not overflow.startswith("saturate"):
        _mark_overflow(r, over, x, overflow)
    if isinstance(fmt, Format) and fmt.signed:
        r.copysign_(x)
        if fmt.specials == "fnuz":
            r += 0.0
    if overflow in ("saturate", "error"):
        return r.add_(x, alpha=0)  # Inf * 0 is NaN
    return r.masked_fill_(x.isnan(), torch.nan)


def _mark_overflow(r: Tensor, over: Tensor, x: Tensor, overflow: Overflow) -> None:
    """Overflow modes other than saturation, in place; the sign of an Inf comes later."""
    if overflow == "error":
        if bool((over & x.isfinite()).any()):
            raise OverflowError("a finite value lies beyond the format; choose another scale, or overflow='saturate'")
    else:
        r.masked_fill_(over, torch.inf if overflow == "inf" else torch.nan)
