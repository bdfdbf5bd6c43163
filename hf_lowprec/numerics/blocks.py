# SPDX-License-Identifier: Apache-2.0
"""Optimizer states in blocks: codes and scales of a flattened float32 tensor, under a compand, and back.

    encode   scale = rule(amax of the block);  z = compand(x, scale);  code = round(z)
    decode   x = inverse(value of code, scale)

`compand` has the functions. Blocks count over the flattened tensor; the last may be short. The stored scale, whatever
its dtype, is the one that both directions use. A block of zeros has scale 1, or 0 where the format has no code for
zero (`linear4u`), so that it reads as zeros. With `nonzero`, what is not 0 never becomes 0.

Nothing here reads a value on the host, so that a step on a GPU waits for nobody; codes of NaN are some codes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_lowprec.formats import Codebook, Format, get_format
from hf_lowprec.numerics import compand
from hf_lowprec.numerics.codes import F32, carrier_of, codes_of, count_codes, random_bits, value_table
from hf_lowprec.numerics.containers import code_dtype, integer_unit, lift_zeros, native_dtype
from hf_lowprec.numerics.hashing import counter_hash
from hf_lowprec.numerics.lookup import Lookup, look_up
from hf_lowprec.numerics.roots import sqrt_rn
from hf_lowprec.numerics.rounding import code_table, rounder
from hf_lowprec.numerics.scaling import scale_from_amax, store_scale
from hf_lowprec.recipe import Quant, Rounding

_CHUNK = 1 << 16  # elements per pass on the CPU: a slice and its scratch buffers stay in the second-level cache


def parameter_names(quant: Quant) -> tuple[str, ...]:
    """What a block has besides its codes."""
    return ("scale", "power", "center") if quant.compand == "expand" else ("scale",)


def encode_blocks(
    x: Tensor, quant: Quant, *, scale: Tensor | None = None, seed: int | Tensor | None = None, start: int = 0
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(codes [n], (scale (, power, center))) of the flattened `x`.

    scale: 0-d, used instead of one from the amax. seed: for stochastic rounding, by the index in the flattened tensor,
        of which `x` is a slice that begins at `start`.
    """
    fmt = get_format(quant.format)
    flat = x.detach().reshape(-1)
    pieces = list(_pieces(flat.numel(), quant, flat.device))
    if quant.scaling.granularity != "block" and scale is None:
        scale = _scale(flat.float().view(1, -1), quant, fmt).reshape(())
    found: list[tuple[Tensor, ...]] = []
    codes = torch.empty(0 if len(pieces) == 1 else flat.numel(), dtype=code_dtype(fmt), device=flat.device)
    for here, size in pieces:
        rows = flat[here].float().view(-1, size)
        new, parameters = _encode_rows(rows, quant, scale, start + here.start, seed)
        if len(pieces) == 1:
            return new.view(-1), parameters if scale is None else (scale,)
        codes[here].copy_(new.view(-1))
        found.append(parameters)
    if scale is not None:
        return codes, (scale,)
    if not found:
        nothing = torch.empty(0, device=flat.device)
        return codes, (store_scale(nothing, quant.scaling), *(nothing.clone() for _ in parameter_names(quant)[1:]))
    return codes, tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def decode_blocks(codes: Tensor, parameters: tuple[Tensor, ...], quant: Quant) -> Tensor:
    """float32 [n] of flat codes and the scale (, power, center) of `encode_blocks`."""
    out = torch.empty(codes.numel(), dtype=torch.float32, device=codes.device)
    first = 0
    for here, size in _pieces(codes.numel(), quant, codes.device):
        rows = out[here].view(-1, size)
        given = [p.float() if p.dim() == 0 else p[first : first + rows.shape[0], None].float() for p in parameters]
        _decode_rows(codes[here].view(-1, size), given, quant, rows)
        first += rows.shape[0]
    return out


def _pieces(n: int, quant: Quant, device: torch.device) -> Iterator[tuple[slice, int]]:
    """(elements, their block size): whole blocks, as many as a cache holds on the CPU, then a short one."""
    block = quant.scaling.block[0] if quant.scaling.granularity == "block" else max(n, 1)
    if quant.scaling.granularity != "block" and device.type == "cpu":
        block = _CHUNK  # they have one scale
    whole = n // block * block
    chunk = max(_CHUNK // block, 1) * block
    if device.type != "cpu" or torch.compiler.is_compiling():
        chunk = max(whole, 1)
    for start in range(0, whole, chunk):
        yield slice(start, min(start + chunk, whole)), block
    if whole < n:
        yield slice(whole, n), n - whole


# --- rows are blocks -----------------------------------------------------------------------------------------------


def _encode_rows(
    x: Tensor, quant: Quant, scale: Tensor | None, start: int, seed: int | Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(codes [blocks, size], parameters) of float32 blocks that begin at flat index `start`."""
    fmt = get_format(quant.format)
    curve = x
    extra: tuple[Tensor, ...] = ()
    if quant.compand == "sqrt":
        curve = sqrt_rn(x)
    elif quant.compand == "expand":
        power, center = extra = compand.expansion(x, fmt)
        curve = compand.expand(x, power, center)
    stored = _scale(curve, quant, fmt) if scale is None else scale
    factor = stored.float()
    factor = 1.0 / factor if _has_zero(fmt) else torch.where(factor > 0, 1.0 / factor, 0.0)
    z = curve * (factor[:, None] if factor.dim() else factor)
    if quant.compand == "softsign":
        z = compand.softsign(z)
    if quant.compand in ("softsign", "sqrt"):
        z *= fmt.max
    table = _table(quant, fmt, z.device)
    if table is None:
        codes = _round(z, quant, fmt, start, seed)
        if quant.nonzero:
            lift_zeros(codes, x, fmt)
    else:
        codes = look_up(_positive(z, x, factor) if quant.nonzero else z, table).to(torch.uint8)
        codes = codes.view(code_dtype(fmt))
    return codes, (stored, *(p.view(-1) for p in extra))


def _decode_rows(codes: Tensor, parameters: list[Tensor], quant: Quant, out: Tensor) -> None:
    """Values of blocks [blocks, size] into `out`; parameters [blocks, 1], or a 0-d scale."""
    fmt, scale = get_format(quant.format), parameters[0]
    unit = integer_unit(fmt)
    by_itself = codes.is_floating_point() and (codes.itemsize > 1 or codes.device.type != "cpu")
    if unit or by_itself:
        out.copy_(codes)
    else:  # torch converts float8 an element at a time on the CPU
        index = (codes.view(torch.uint8) if codes.is_floating_point() else codes).to(torch.int32).view(-1)
        if codes.dtype == torch.int16:
            index &= 0xFFFF
        torch.index_select(value_table(fmt, codes.device, torch.float32), 0, index, out=out.view(-1))
    unit = unit or 1.0
    if quant.compand in ("softsign", "sqrt"):
        unit /= fmt.max  # to z, for int8 and uint8 by 1 / 127 and 1 / 255
    if unit != 1.0:
        out *= unit
    if quant.compand == "softsign":
        torch.mul(compand.softsign_inverse(out), scale, out=out)
        return
    out *= scale
    if quant.compand == "sqrt":
        out *= out
    elif quant.compand == "expand":
        out.copy_(compand.expand_inverse(out, *parameters[1:]))


def _table(quant: Quant, fmt: Format | Codebook, device: torch.device) -> Lookup | None:
    """By which values, divided by their scale, become codes; None if there is none, or a faster way."""
    native = native_dtype(fmt) is not None and (device.type != "cpu" or torch.compiler.is_compiling())
    if integer_unit(fmt) or native or (quant.nonzero and fmt.min < 0):
        return None
    return code_table(fmt, quant.rounding.mode, quant.overflow, device, nonzero=quant.nonzero)


def _positive(z: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """z = x * factor, but not 0 where x > 0 and the product has underflowed; neither is negative."""
    if z.device.type == "cpu" and not torch.compiler.is_compiling() and bool((factor >= 1).all()):
        return z
    return torch.maximum(z, x.clamp(max=2.0**-149))


def _has_zero(fmt: Format | Codebook) -> bool:
    return fmt.has_zero if isinstance(fmt, Format) else 0.0 in fmt.values


def _scale(curve: Tensor, quant: Quant, fmt: Format | Codebook) -> Tensor:
    """The stored scale of each row."""
    if quant.scaling.method in ("none", "static") or not curve.shape[1]:
        amax = torch.ones(curve.shape[0], device=curve.device)
    else:
        amax = compand.row_amax(curve)
    if quant.compand in ("softsign", "sqrt"):  # the amax itself: z reaches 1, whatever the format
        scale = torch.where(amax > 0, amax.clamp(2.0**-126, 2.0**126), 1.0)
    else:
        scale = scale_from_amax(amax, fmt, quant.scaling)
    if not _has_zero(fmt):
        scale = torch.where(amax == 0, 0.0, scale)
    return store_scale(scale, quant.scaling)


def _round(z: Tensor, quant: Quant, fmt: Format | Codebook, start: int, seed: int | Tensor | None) -> Tensor:
    """Codes of scaled values. Integers have a short way to nearest; stochastic codes need not become values first."""
    unit, native = integer_unit(fmt), native_dtype(fmt)
    if unit and quant.rounding.mode == "nearest" and quant.overflow == "saturate":
        return (z * (1 / unit)).round_().clamp_(fmt.min / unit, fmt.max / unit).to(code_dtype(fmt))
    drawn = quant.rounding.mode == "stochastic" and quant.overflow == "saturate"
    if drawn and seed is not None and isinstance(fmt, Format) and carrier_of(fmt, torch.float32) is F32:
        return _stochastic(z, fmt, quant.rounding, start, seed)
    values = rounder(fmt, torch.float32, quant.rounding, quant.overflow, seed, None)(z, start, None)
    if unit:
        return (values * (1 / unit)).to(code_dtype(fmt))
    return codes_of(values, fmt, checked=False) if native is None else values.to(native)


def _stochastic(z: Tensor, fmt: Format, rounding: Rounding, start: int, seed: int | Tensor) -> Tensor:
    """Codes of `rounder`'s values, saturated."""
    words = counter_hash(seed, z.numel(), start=start, device=z.device).view(z.shape)
    words &= (1 << random_bits(rounding, fmt)) - 1
    codes = count_codes(z if fmt.signed else z.clamp(min=0), fmt, rounding, words).clamp_(max=fmt.max_code)
    if fmt.signed and integer_unit(fmt):
        codes = torch.where(z < 0, -codes, codes)
    elif fmt.signed:
        negative = z.signbit() if fmt.has_negative_zero else (z < 0).logical_and_(codes)
        codes |= negative.to(codes.dtype) << (fmt.bits - 1)
    native = native_dtype(fmt)
    if native is None:
        return codes.to(code_dtype(fmt))
    return codes.to(torch.uint8 if fmt.bits == 8 else torch.int16).view(native)
