# SPDX-License-Identifier: Apache-2.0
"""Number formats as data: `Format` is any sign/exponent/mantissa layout of at most 16 bits, `Codebook` any other set.

A code is `sign | exponent field (e) | mantissa field (f)`, most significant bit first. With `m = man` and `b = bias`:

    e > 0:  (-1)^sign * (1 + f / 2^m) * 2^(e - b)
    e = 0:  gradual   (-1)^sign * f / 2^m * 2^(1 - b)           subnormals, as IEEE 754
            flush     (-1)^sign * 0                             no subnormals; a result that underflows is zero
            normal0   (-1)^sign * (1 + f / 2^m) * 2^(-b)        an ordinary binade, but f = 0 is zero

`specials` says which codes are not numbers: `ieee` (the top exponent field is Inf and NaN), `fn` (only the all-ones
code of either sign is NaN), `fnuz` (only the code of -0 is NaN), `none`. A `normal0` format without mantissa has no
zero, so that E8M0, the scale format of OCP MX v1.0, is `Format(8, 0, 127, "fn", "normal0", signed=False)`.

`Format.encode` and `Format.decode` are the specification, one number at a time and exact; `hf_lowprec.numerics` does
the same for tensors. Names follow `e<exp>m<man>[b<bias>][specials][subnormal][u]`: `get_format("e3m1")` needs no
entry in the catalogue `FORMATS`.
"""

from __future__ import annotations

import difflib
import math
import re
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from hf_lowprec.codebooks import dynamic_tree, linear_unsigned, nf4

Specials = Literal["ieee", "fn", "fnuz", "none"]
Subnormal = Literal["gradual", "flush", "normal0"]


def _exponent(x: float) -> int:
    """floor(log2 |x|), exactly; x is finite and not zero."""
    return math.frexp(x)[1] - 1


@dataclass(frozen=True)
class Format:
    """`exp` exponent bits, `man` mantissa bits; see the module docstring for the rest.

    bias: None means 2^(exp-1) - 1; 0 for exp == 0; 2^(exp-1) for `fnuz`, as every such format in hardware has it.
    name: for messages only; two formats of the same numbers are equal.

    Raises ValueError: more than 16 bits, values beyond float64, or a combination that names no set of numbers.
    """

    exp: int
    man: int
    bias: int | None = None
    specials: Specials = "none"
    subnormal: Subnormal = "gradual"
    signed: bool = True
    name: str | None = field(default=None, compare=False)
    widest: ClassVar[int] = 16

    def __post_init__(self) -> None:
        if self.exp < 0 or self.man < 0 or not 1 <= self.exp + self.man or self.bits > self.widest:
            raise ValueError(
                f"e{self.exp}m{self.man}: a format has 1 to {self.widest} bits, none of its fields negative"
            )
        if self.specials not in ("ieee", "fn", "fnuz", "none"):
            raise ValueError(f"specials: 'ieee', 'fn', 'fnuz' or 'none', got {self.specials!r}")
        if self.subnormal not in ("gradual", "flush", "normal0"):
            raise ValueError(f"subnormal: 'gradual', 'flush' or 'normal0', got {self.subnormal!r}")
        if self.specials == "ieee" and (self.man == 0 or self.exp == 0):
            raise ValueError("specials: 'ieee' needs an exponent field for Inf and a mantissa bit to tell NaN from it")
        if self.specials == "fnuz" and not (self.signed and self.has_zero):
            raise ValueError("specials: 'fnuz' puts NaN at the code of -0, and this format has none")
        if self.subnormal != "gradual" and self.exp == 0:
            raise ValueError(
                f"subnormal: without exponent bits all values are subnormal; {self.subnormal!r} leaves none"
            )
        if self.bias is None:
            # Resolved here, not in a property, so that Format(4, 3) and Format(4, 3, 7) are equal and hash alike.
            object.__setattr__(self, "bias", _default_bias(self.exp, self.specials))
        if self.max_code < 1:
            raise ValueError(f"e{self.exp}m{self.man} with specials {self.specials!r} has no finite value but zero")
        top = self.max_code >> self.man if self.exp else 0
        if self.emin - self.man < -1074 or max(top, 1) - self._bias > 1023:
            raise ValueError(f"e{self.exp}m{self.man}b{self._bias}: its values do not fit float64")

    # --- the set ---------------------------------------------------------------------------------------------------

    @property
    def _bias(self) -> int:
        assert self.bias is not None  # __post_init__ resolves None
        return self.bias

    @property
    def bits(self) -> int:
        return int(self.signed) + self.exp + self.man

    @property
    def max_code(self) -> int:
        """The code of the largest finite value; larger magnitudes are Inf or NaN."""
        count = 1 << (self.exp + self.man)
        return count - {"ieee": 1 << self.man, "fn": 1}.get(self.specials, 0) - 1

    @property
    def emin(self) -> int:
        """Exponent of the lowest normal binade (of the only step, 2^(emin - man), where exp == 0)."""
        return -self._bias if self.subnormal == "normal0" else 1 - self._bias

    @property
    def emax(self) -> int:
        """floor(log2(max))."""
        return _exponent(self.max)

    @property
    def max(self) -> float:
        return self._magnitude(self.max_code)

    @property
    def min(self) -> float:
        """The least finite value: -max, or for an unsigned format its smallest value."""
        return -self.max if self.signed else self._magnitude(0)

    @property
    def min_normal(self) -> float:
        """The smallest positive value with a full mantissa; `tiny` where no value has one (exp == 0)."""
        return math.ldexp(1.0, self.emin) if self.exp and self.subnormal != "normal0" else self.tiny

    @property
    def tiny(self) -> float:
        """The smallest positive value."""
        if self.subnormal == "flush":
            return math.ldexp(1.0, self.emin)
        return self._magnitude(1 if self.has_zero else 0)

    @property
    def has_zero(self) -> bool:
        return self.man > 0 or self.subnormal != "normal0"

    @property
    def has_negative_zero(self) -> bool:
        return self.signed and self.has_zero and self.specials != "fnuz"

    @property
    def has_inf(self) -> bool:
        return self.specials == "ieee"

    @property
    def has_nan(self) -> bool:
        return self.specials != "none"

    @property
    def is_integer(self) -> bool:
        """Whether its values are integers of at most 8 bits times one unit, so that products are sums of integers."""
        return self.exp == 0 and self.signed and self.bits <= 8

    @property
    def inf_code(self) -> int:
        """The code of +Inf. Raises ValueError if the format has none."""
        if not self.has_inf:
            raise ValueError(f"{self} has no Inf")
        return self.max_code + 1

    @property
    def nan_code(self) -> int:
        """The positive quiet NaN (`fnuz`: the only NaN). Raises ValueError if the format has none."""
        if not self.has_nan:
            raise ValueError(f"{self} has no NaN")
        if self.specials == "fnuz":
            return 1 << (self.bits - 1)
        if self.specials == "fn":
            return self.max_code + 1
        return self.max_code + 1 + (1 << (self.man - 1))

    @property
    def torch_dtype_name(self) -> str | None:
        """torch's dtype with exactly these codes, one per element, e.g. `"float8_e4m3fn"`; None if there is none."""
        return _TORCH_DTYPES.get(_NAMES.get(self, ""))

    def values(self) -> tuple[float, ...]:
        """Every finite value once, ascending (zero once, as +0)."""
        first = (1 << self.man) if self.subnormal == "flush" else int(self.has_zero)
        positive = [self._magnitude(code) for code in range(first, self.max_code + 1)]
        zero = [0.0] if self.has_zero else []
        return (*(-v for v in reversed(positive) if self.signed), *zero, *positive)

    # --- codes -----------------------------------------------------------------------------------------------------

    def _magnitude(self, code: int) -> float:
        """The value of a finite code without its sign bit."""
        e, f = code >> self.man, code & ((1 << self.man) - 1)
        if self.subnormal == "normal0":
            if code == 0 and self.has_zero:
                return 0.0
            return math.ldexp((1 << self.man) + f, e - self._bias - self.man)
        if e == 0:
            return 0.0 if self.subnormal == "flush" else math.ldexp(f, self.emin - self.man)
        return math.ldexp((1 << self.man) + f, e - self._bias - self.man)

    def decode(self, code: int) -> float:
        """The value of a code: exact, -0.0 where the code says so. Raises ValueError: code out of range."""
        if not 0 <= code < 1 << self.bits:
            raise ValueError(f"{self} has codes 0 to {(1 << self.bits) - 1}, got {code}")
        magnitude = code & ((1 << (self.exp + self.man)) - 1)
        negative = magnitude != code
        if magnitude > self.max_code:
            return math.copysign(math.inf, -1.0 if negative else 1.0) if self._is_inf(magnitude) else math.nan
        if negative and magnitude == 0 and self.specials == "fnuz":
            return math.nan
        value = self._magnitude(magnitude)
        return -value if negative and (value or self.specials != "fnuz") else value

    def _is_inf(self, magnitude: int) -> bool:
        return self.has_inf and magnitude == self.max_code + 1

    def encode(self, x: float) -> int:
        """The code of the nearest value, ties to the even code; finite values beyond the format saturate.

        A non-finite x becomes NaN. `flush` rounds as if the exponent had no lower bound and then drops what is below
        `min_normal`. Raises ValueError: x is not finite and the format has no NaN.
        """
        if not math.isfinite(x):
            if not self.has_nan:
                raise ValueError(f"{self} has no NaN to hold {x}")
            return self.nan_code
        negative = math.copysign(1.0, x) < 0
        if negative and not self.signed:
            return 0  # the least value of an unsigned format
        code = min(self._nearest(abs(x)), self.max_code)
        if negative and (code or self.specials != "fnuz"):
            code |= 1 << (self.bits - 1)
        return code

    def _nearest(self, x: float) -> int:
        """Code of a finite x >= 0, unbounded above."""
        if x == 0.0:
            return 0
        if self.subnormal == "normal0":
            if self.has_zero and x < self.tiny:  # the hole between zero and the first value; zero is the even code
                return int(x > self.tiny / 2)
            if x < self.tiny:
                return 0
        k = _exponent(x)
        if self.subnormal == "gradual":
            k = max(k, self.emin)
        # Consecutive codes are consecutive integers across binades, so the even code is found without special cases.
        steps = math.ldexp(x, self.man - k)
        whole = math.floor(steps)
        lowest = self.emin + (self.subnormal == "normal0")  # the binade of exponent field 1
        code = whole + (k - lowest) * (1 << self.man)
        code += steps - whole > 0.5 or (steps - whole == 0.5 and code % 2 == 1)
        return 0 if self.subnormal == "flush" and code < 1 << self.man else code

    def __str__(self) -> str:
        return _NAMES.get(self) or self._compose()

    def _compose(self) -> str:
        bias = "" if self._bias == _default_bias(self.exp, self.specials) else f"b{self._bias}"
        subnormal = "" if self.subnormal == "gradual" else self.subnormal
        parts = (f"e{self.exp}m{self.man}{bias}", f"{subnormal}{'' if self.signed else 'u'}")
        short = parts[0] + ("" if self.specials == "none" else self.specials) + parts[1]
        # A catalogue entry owns its short name; the same layout without specials says so.
        return parts[0] + "none" + parts[1] if self.specials == "none" and short in FORMATS else short


@dataclass(frozen=True)
class SumFormat(Format):
    """A format in which numbers are added, not stored: up to 31 bits, less than float32."""

    widest: ClassVar[int] = 31

    __str__ = Format.__str__


@dataclass(frozen=True)
class Codebook:
    """A format whose code is an index into `values` (ascending): anything that is not sign, exponent, mantissa.

    Raises ValueError: fewer than 2 or more than 2^16 values, or not strictly ascending.
    """

    name: str
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.values, self.values[1:], strict=False))
        if not 2 <= len(self.values) <= 1 << 16 or not ascending:
            raise ValueError(f"codebook {self.name!r}: 2 to 65536 finite values, strictly ascending")

    def __hash__(self) -> int:
        return hash(self.name)  # of all the values it would take microseconds, and tables are looked up by format

    @property
    def bits(self) -> int:
        return (len(self.values) - 1).bit_length()

    @property
    def max(self) -> float:
        """The largest magnitude, which scaling maps the amax to."""
        return max(abs(self.values[0]), abs(self.values[-1]))

    @property
    def min(self) -> float:
        return self.values[0]

    @property
    def has_zero(self) -> bool:
        return 0.0 in self.values

    @property
    def is_integer(self) -> bool:
        return all(value == int(value) and abs(value) <= 127 for value in self.values)

    @property
    def emax(self) -> int:
        return _exponent(self.max)

    @property
    def tiny(self) -> float:
        """The smallest positive value."""
        return self.values[bisect_right(self.values, 0.0)]

    @property
    def has_nan(self) -> bool:
        return False

    @property
    def has_inf(self) -> bool:
        return False

    @property
    def torch_dtype_name(self) -> None:
        return None

    def decode(self, code: int) -> float:
        """Raises ValueError: code out of range."""
        if not 0 <= code < len(self.values):
            raise ValueError(f"{self} has codes 0 to {len(self.values) - 1}, got {code}")
        return self.values[code]

    def encode(self, x: float) -> int:
        """The code of the nearest value, ties to the even code, saturating. Raises ValueError: x is not finite."""
        if not math.isfinite(x):
            raise ValueError(f"{self} has no NaN to hold {x}")
        low = min(max(bisect_right(self.values, x) - 1, 0), len(self.values) - 2)
        below, above = x - self.values[low], self.values[low + 1] - x
        return low + int(above < below or (above == below and low % 2 == 1))

    def __str__(self) -> str:
        return self.name


def _default_bias(exp: int, specials: Specials) -> int:
    if exp == 0:
        return 0
    return (1 << (exp - 1)) - (specials != "fnuz")


# --- catalogue ------------------------------------------------------------------------------------------------------

FORMATS: dict[str, Format | Codebook] = {
    str(fmt.name): fmt
    for fmt in (
        Format(5, 10, specials="ieee", name="e5m10"),  # float16
        Format(8, 7, specials="ieee", name="e8m7"),  # bfloat16
        Format(5, 2, specials="ieee", name="e5m2"),  # OCP OFP8; Wang 2018; HFP8 backward
        Format(4, 3, specials="fn", name="e4m3fn"),  # OCP OFP8, MXFP8
        Format(4, 3, specials="ieee", name="e4m3"),
        Format(4, 3, 8, specials="fnuz", name="e4m3b8"),  # Graphcore, AMD
        Format(5, 2, 16, specials="fnuz", name="e5m2b16"),
        Format(4, 3, 11, name="e4m3b11"),  # HFP8 forward
        Format(3, 4, specials="ieee", name="e3m4"),
        Format(3, 2, name="e3m2"),  # MXFP6
        Format(2, 3, name="e2m3"),  # MXFP6
        Format(2, 1, name="e2m1"),  # MXFP4, NVFP4
        Format(3, 1, name="e3m1"),  # eXmY
        Format(0, 7, name="e0m7"),  # MXINT8 without its -2
        Format(0, 8, signed=False, name="e0m8u"),  # uint8
        Format(6, 9, specials="ieee", name="e6m9"),  # IBM's accumulation format
        Format(6, 5, specials="ieee", subnormal="flush", name="e6m5"),  # stochastic-rounding MAC
        Format(8, 0, 127, specials="fn", subnormal="normal0", signed=False, name="e8m0u"),  # MX scale
        Format(0, 1, name="e0m1"),  # ternary: -1, 0, 1
        Codebook("sign", (-1.0, 1.0)),  # BitNet: 0 lies between the two and goes to -1, the even code
        Codebook("nf4", nf4()),
        Codebook("dynamic8", dynamic_tree(signed=True)),
        Codebook("dynamic8u", dynamic_tree(signed=False)),
        Codebook("dynamic4", dynamic_tree(signed=True, decades=3)),
        Codebook("linear4u", linear_unsigned(4)),
    )
}
_NAMES: dict[Format, str] = {fmt: name for name, fmt in FORMATS.items() if isinstance(fmt, Format)}

_TORCH_DTYPES: dict[str, str] = {
    "e5m10": "float16", "e8m7": "bfloat16", "e5m2": "float8_e5m2", "e4m3fn": "float8_e4m3fn",
    "e4m3b8": "float8_e4m3fnuz", "e5m2b16": "float8_e5m2fnuz", "e8m0u": "float8_e8m0fnu",
}  # fmt: skip
# Other spellings: torch, ml_dtypes, OCP MX and accelerate.
_ALIASES: dict[str, str] = {dtype: name for name, dtype in _TORCH_DTYPES.items()} | {
    "fp16": "e5m10", "half": "e5m10", "bf16": "e8m7", "e4m3fnuz": "e4m3b8", "e5m2fnuz": "e5m2b16",
    "float8_e4m3": "e4m3", "float8_e3m4": "e3m4", "float8_e4m3b11fnuz": "e4m3b11fnuz", "float6_e3m2fn": "e3m2",
    "float6_e2m3fn": "e2m3", "float4_e2m1fn": "e2m1", "mxint8": "e0m7",
    "int8": "e0m7", "uint8": "e0m8u",
}  # fmt: skip
_GRAMMAR = re.compile(
    r"e(?P<exp>\d+)m(?P<man>\d+)(?:b(?P<bias>-?\d+))?"
    r"(?P<specials>ieee|fnuz|fn|none)?(?P<subnormal>gradual|flush|normal0)?(?P<unsigned>u)?"
)


_PARSED: dict[str, Format] = {}


def get_format(name: str | Format | Codebook) -> Format | Codebook:
    """A catalogue name, an alias such as `"float8_e4m3fn"`, or the grammar of the module docstring.

    Raises ValueError: unknown (with the nearest names) or a layout that is no format.
    """
    if isinstance(name, (Format, Codebook)):
        return name
    key = str(name).lower().removeprefix("torch.")
    key = _ALIASES.get(key, key)
    if key in FORMATS:
        return FORMATS[key]
    if key in _PARSED:  # torch.compile cannot trace what follows
        return _PARSED[key]
    match = _GRAMMAR.fullmatch(key)
    if match:
        part: dict[str, Any] = match.groupdict()
        bias = None if part["bias"] is None else int(part["bias"])
        specials: Any = part["specials"] or "none"
        subnormal: Any = part["subnormal"] or "gradual"
        signed = part["unsigned"] is None
        return _PARSED.setdefault(
            key, Format(int(part["exp"]), int(part["man"]), bias, specials, subnormal, signed=signed)
        )
    if key in ("fp32", "float32", "float"):
        raise ValueError("float32 is no low-precision format; leave the slot empty (None) for it")
    near = difflib.get_close_matches(key, [*FORMATS, *_ALIASES], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(FORMATS)}, or e<exp>m<man>"
    raise ValueError(f"unknown format {name!r}; {hint}")


# The partial sums of Hopper's FP8 tensor cores, which keep about 14 bits (DeepSeek-V3, arXiv 2412.19437, section 3.3).
_SUM_ALIASES = {"tc14": "e8m13ieee"}


def get_sum_format(name: str | Format) -> Format:
    """The format of a GEMM's sums: `get_format`, up to 31 bits, and `"tc14"`.

    Raises ValueError: as `get_format`; or its sums cannot be rounded in float32: it is unsigned, a codebook, without
    mantissa, not within float32's normal range, or `normal0`.
    """
    if isinstance(name, str):
        key = _SUM_ALIASES.get(name.lower(), name.lower())
        match = _GRAMMAR.fullmatch(key) if key not in _ALIASES and key not in FORMATS else None
        if match and int(match["exp"]) + int(match["man"]) > 15:
            bias = None if match["bias"] is None else int(match["bias"])
            part: dict[str, Any] = {
                "specials": match["specials"] or "none",
                "subnormal": match["subnormal"] or "gradual",
            }
            fmt: Format | Codebook = SumFormat(
                int(match["exp"]), int(match["man"]), bias, **part, signed=match["unsigned"] is None
            )
        else:
            fmt = get_format(key)
    else:
        fmt = name
    if not isinstance(fmt, Format) or not fmt.signed or not 1 <= fmt.man <= 22 or fmt.subnormal == "normal0":
        raise ValueError(f"sums in {fmt}: needs a sign, 1 to 22 mantissa bits, subnormals gradual or flush")
    if fmt.emin < -126 or fmt.emax > 127:
        raise ValueError(
            f"sums in {fmt}: its values are not normal float32 numbers; say 'ieee', or fewer exponent bits"
        )
    return fmt
