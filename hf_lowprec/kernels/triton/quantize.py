# SPDX-License-Identifier: Apache-2.0
"""Rounding to any signed format within float32, nearest or stochastic, bit for bit as `numerics.rounding`.

    round_to_format   q = round(x)                       values, in the dtype of x
    encode            code of round(x * (1 / scale))     bytes, viewed as torch's float8 where torch has the format

Both go through the code: |x| as an integer in units of codes, plus the rounding term, without the low bits. Integers
are the same in the interpreter, on every GPU and in torch, and no float8 cast of a compiler is involved, so saturation
and NaN are ours: finite values saturate, a non-finite element becomes NaN. Random words come from
`numerics.counter_hash(seed, i)`, i the element's index in row-major order, whatever the launch looks like.

The device functions `count_codes`, `code_values` and `random_words` serve fused kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowprec.formats import Codebook, Format, get_format
from hf_lowprec.kernels.triton.launch import on_its_device
from hf_lowprec.numerics.codes import F32, carrier_of, random_bits
from hf_lowprec.numerics.rounding import NEAREST, check
from hf_lowprec.recipe import Rounding

_BLOCK = 2048


@triton.jit
def _mix(h):
    """lowbias32 of uint32."""
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= h >> 15
    h *= 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def random_words(seed, index):
    """`numerics.counter_hash(seed, index)`: seed int64 scalar, index int64 -> int32."""
    k0 = _mix(seed.to(tl.uint32) ^ 0x9E3779B9)
    k1 = _mix((seed >> 32).to(tl.uint32) ^ k0)
    h = index.to(tl.uint32) ^ k0
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= k1 ^ _mix((index >> 32).to(tl.uint32))
    h ^= h >> 15
    h *= 0x846CA68B
    return (h ^ (h >> 16)).to(tl.int32, bitcast=True)


@triton.jit
def count_codes(x, words, MAN: tl.constexpr, EMIN: tl.constexpr, MAX_CODE: tl.constexpr, BITS: tl.constexpr):
    """Codes of |x| (float32) without sign, saturating; for Inf and NaN MAX_CODE. BITS 0: nearest, else stochastic."""
    LOW: tl.constexpr = EMIN + 127  # exponent field of the format's lowest binade
    DROP: tl.constexpr = 23 - MAN
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    field = magnitude >> 23
    significand = (magnitude & 0x7FFFFF) | tl.where(field > 0, 0x800000, 0)
    shift = LOW - tl.where(field > 1, field, 1)
    shift = tl.where(shift < 0, 0, tl.where(shift > 25, 25, shift))
    shifted = significand >> shift
    if BITS == 0:
        shifted |= tl.where((shifted << shift) != significand, 1, 0)
    units = tl.where(field >= LOW, magnitude - ((LOW - 1) << 23), shifted)
    if BITS == 0:
        units += ((units >> DROP) & 1) + ((1 << (DROP - 1)) - 1)
    else:
        units += (words & ((1 << BITS) - 1)) << (DROP - BITS)
    codes = units >> DROP
    return tl.where(codes > MAX_CODE, MAX_CODE, codes)


@triton.jit
def code_values(codes, MAN: tl.constexpr, EMIN: tl.constexpr, STEP: tl.constexpr):
    """float32 values of codes without sign; STEP = 2^(EMIN - MAN)."""
    normal = ((codes << (23 - MAN)) + ((EMIN + 126) << 23)).to(tl.float32, bitcast=True)
    return tl.where(codes < (1 << MAN), codes.to(tl.float32) * STEP, normal)


@triton.jit
def _round_to_format_kernel(
    x_ptr, out_ptr, seed_ptr, n,
    MAN: tl.constexpr, EMIN: tl.constexpr, MAX_CODE: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr,
    NEGATIVE_ZERO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    x = tl.load(x_ptr + index, mask=inside, other=0.0).to(tl.float32)
    words = random_words(tl.load(seed_ptr), index) if BITS > 0 else 0
    codes = count_codes(x, words, MAN, EMIN, MAX_CODE, BITS)
    bits = x.to(tl.int32, bitcast=True)
    sign = bits & -0x80000000
    if not NEGATIVE_ZERO:
        sign = tl.where(codes == 0, 0, sign)
    value = code_values(codes, MAN, EMIN, STEP).to(tl.int32, bitcast=True) | sign
    value = tl.where((bits & 0x7F800000) == 0x7F800000, 0x7FC00000, value)
    tl.store(out_ptr + index, value.to(tl.float32, bitcast=True).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _encode_kernel(
    x_ptr, out_ptr, scale_ptr, seed_ptr, n,
    MAN: tl.constexpr, EMIN: tl.constexpr, MAX_CODE: tl.constexpr, NAN_CODE: tl.constexpr, SIGN: tl.constexpr,
    BITS: tl.constexpr, NEGATIVE_ZERO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    inverse = tl.div_rn(1.0, tl.load(scale_ptr))
    x = tl.load(x_ptr + index, mask=inside, other=0.0).to(tl.float32) * inverse
    words = random_words(tl.load(seed_ptr), index) if BITS > 0 else 0
    codes = count_codes(x, words, MAN, EMIN, MAX_CODE, BITS)
    bits = x.to(tl.int32, bitcast=True)
    sign = tl.where(bits < 0, SIGN, 0)
    if not NEGATIVE_ZERO:
        sign = tl.where(codes == 0, 0, sign)
    codes = tl.where((bits & 0x7F800000) == 0x7F800000, NAN_CODE, codes | sign)
    tl.store(out_ptr + index, codes.to(out_ptr.dtype.element_ty), mask=inside)


# --- launchers ------------------------------------------------------------------------------------------------------


def supports(fmt: str | Format | Codebook) -> bool:
    """Whether the kernels cover the format: signed, a mantissa, gradual subnormals, within float32's range."""
    fmt = get_format(fmt)
    if not isinstance(fmt, Format) or not fmt.signed or fmt.man == 0 or fmt.subnormal != "gradual":
        return False
    return carrier_of(fmt, torch.float32) is F32


def _prepared(
    fmt: str | Format | Codebook, x: Tensor, rounding: Rounding, seed: int | Tensor | None
) -> tuple[Format, int]:
    fmt = get_format(fmt)
    if not isinstance(fmt, Format) or not supports(fmt):
        raise ValueError(f"no kernel for {fmt}; use hf_lowprec.numerics, which covers every format")
    if rounding.mode not in ("nearest", "stochastic"):
        raise ValueError(f"no kernel for rounding {rounding.mode!r}; use hf_lowprec.numerics")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"x is float32, bfloat16 or float16, got {x.dtype}")
    check(x, fmt, rounding, "saturate", seed, None)
    return fmt, random_bits(rounding, fmt) if rounding.mode == "stochastic" else 0


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor):
        return seed
    return torch.full((), 0 if seed is None else seed, dtype=torch.int64, device=device)


@on_its_device
def round_to_format(
    x: Tensor, fmt: str | Format | Codebook, rounding: Rounding = NEAREST, *, seed: int | Tensor | None = None
) -> Tensor:
    """`numerics.round_to_format(x, fmt, rounding, seed=seed)` in one pass over `x` (float32, bfloat16, float16).

    seed: an int, or a 0-dim int64 tensor on the device of `x`.
    Raises ValueError: a format or mode without kernel, or as numerics. TypeError: another dtype.
    """
    fmt, bits = _prepared(fmt, x, rounding, seed)
    x = x.detach().contiguous()
    out = torch.empty_like(x)
    n = x.numel()
    if n:
        _round_to_format_kernel[(triton.cdiv(n, _BLOCK),)](
            x, out, _seed_tensor(seed, x.device), n,
            MAN=fmt.man, EMIN=fmt.emin, MAX_CODE=fmt.max_code, STEP=2.0 ** (fmt.emin - fmt.man), BITS=bits,
            NEGATIVE_ZERO=fmt.has_negative_zero, BLOCK=_BLOCK,
        )  # fmt: skip
    return out


@on_its_device
def encode(
    x: Tensor,
    fmt: str | Format | Codebook,
    scale: Tensor,
    rounding: Rounding = NEAREST,
    *,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Codes of x * (1 / scale), `scale` a 0-dim float32 tensor on the device of `x`, in one pass over `x`.

    Returns: torch's dtype of the format where it has one of 8 bits, else uint8 (int16 above 8 bits).
    Raises: as `round_to_format`; ValueError: a format without NaN, a scale that is not one float32.
    """
    fmt, bits = _prepared(fmt, x, rounding, seed)
    if not fmt.has_nan:
        raise ValueError(f"{fmt} has no code for a non-finite element; use hf_lowprec.numerics")
    if scale.numel() != 1 or scale.dtype != torch.float32:
        raise ValueError(f"scale: one float32, got {tuple(scale.shape)} of {scale.dtype}")
    x = x.detach().contiguous()
    out = torch.empty_like(x, dtype=torch.uint8 if fmt.bits <= 8 else torch.int16)
    n = x.numel()
    if n:
        _encode_kernel[(triton.cdiv(n, _BLOCK),)](
            x, out, scale, _seed_tensor(seed, x.device), n,
            MAN=fmt.man, EMIN=fmt.emin, MAX_CODE=fmt.max_code, NAN_CODE=fmt.nan_code, SIGN=1 << (fmt.bits - 1),
            BITS=bits, NEGATIVE_ZERO=fmt.has_negative_zero, BLOCK=_BLOCK,
        )  # fmt: skip
    native = fmt.torch_dtype_name
    return out.view(getattr(torch, native)) if native is not None and fmt.bits == 8 else out
