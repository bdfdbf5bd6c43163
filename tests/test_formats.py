# SPDX-License-Identifier: Apache-2.0
"""Formats as data: the catalogue's numbers, names that read back, identities, refusals. Codes: numerics/test_codes."""

import dataclasses
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch

from hf_lowprec.codebooks import nearest_boundaries
from hf_lowprec.formats import FORMATS, Codebook, Format, get_format

CATALOGUE = [
    # name, bias, max, min_normal, tiny, bits
    ("e5m10", 15, 65504, 2**-14, 2**-24, 16),
    ("e8m7", 127, 3.3895313892515355e38, 2**-126, 2**-133, 16),
    ("e5m2", 15, 57344, 2**-14, 2**-16, 8),
    ("e4m3fn", 7, 448, 2**-6, 2**-9, 8),
    ("e4m3", 7, 240, 2**-6, 2**-9, 8),
    ("e4m3b8", 8, 240, 2**-7, 2**-10, 8),
    ("e5m2b16", 16, 57344, 2**-15, 2**-17, 8),
    ("e4m3b11", 11, 30, 2**-10, 2**-13, 8),
    ("e3m4", 3, 15.5, 2**-2, 2**-6, 8),
    ("e3m2", 3, 28, 2**-2, 2**-4, 6),
    ("e2m3", 1, 7.5, 1, 2**-3, 6),
    ("e2m1", 1, 6, 1, 0.5, 4),
    ("e3m1", 3, 24, 0.25, 0.125, 5),
    ("e0m7", 0, 1.984375, 2**-6, 2**-6, 8),
    ("e0m1", 0, 1, 1, 1, 2),
    ("e0m8u", 0, 1.9921875, 2**-7, 2**-7, 8),
    ("e6m9", 31, 4290772992, 2**-30, 2**-39, 16),
    ("e6m5", 31, 4227858432, 2**-30, 2**-30, 12),
    ("e8m0u", 127, 2.0**127, 2**-127, 2**-127, 8),
]


@pytest.mark.parametrize(("name", "bias", "top", "min_normal", "tiny", "bits"), CATALOGUE)
def test_catalogue(name: str, bias: int, top: float, min_normal: float, tiny: float, bits: int) -> None:
    fmt = FORMATS[name]
    assert isinstance(fmt, Format)
    assert (fmt.bias, fmt.max, fmt.min_normal, fmt.tiny, fmt.bits) == (bias, top, min_normal, tiny, bits)
    assert fmt.min == {"e8m0u": tiny, "e0m8u": 0.0}.get(name, -top)
    assert fmt.emax == np.frexp(top)[1] - 1


def test_catalogue_is_complete() -> None:
    assert {row[0] for row in CATALOGUE} == {n for n, f in FORMATS.items() if isinstance(f, Format)}
    assert all(name == str(fmt) == fmt.name for name, fmt in FORMATS.items())


@pytest.mark.parametrize("name", list(FORMATS))
def test_names_read_back(name: str) -> None:
    assert get_format(name) is FORMATS[name]
    assert get_format(name.upper()) is FORMATS[name]


def test_every_layout_has_a_name_that_reads_back() -> None:
    seen: dict[str, Format] = {}
    for exp, man in [(0, 7), (2, 1), (3, 1), (4, 3), (5, 2), (5, 10), (6, 5), (6, 9), (8, 0), (8, 7)]:
        for bias in (None, 7, 8, 11, 16, 127, -3):
            for specials in ("none", "fn", "ieee", "fnuz"):
                for subnormal in ("gradual", "flush", "normal0"):
                    for signed in (True, False):
                        try:
                            fmt = Format(exp, man, bias, specials, subnormal, signed)
                        except ValueError:
                            continue
                        assert get_format(str(fmt)) == fmt
                        assert seen.setdefault(str(fmt), fmt) == fmt
    assert len(seen) > 300


def test_aliases() -> None:
    for alias, name in {
        "fp16": "e5m10",
        "bfloat16": "e8m7",
        "float8_e4m3fn": "e4m3fn",
        "torch.float8_e5m2": "e5m2",
        "float8_e4m3fnuz": "e4m3b8",
        "float8_e8m0fnu": "e8m0u",
        "float4_e2m1fn": "e2m1",
        "mxint8": "e0m7",
        "int8": "e0m7",
        "uint8": "e0m8u",
    }.items():
        assert get_format(alias) is FORMATS[name]
    assert get_format(Format(4, 3, specials="fn")) == FORMATS["e4m3fn"]


def test_unknown_names_get_a_hint() -> None:
    with pytest.raises(ValueError, match="'e4m3fn'"):
        get_format("e4m3f")
    with pytest.raises(ValueError, match="known: "):
        get_format("posit")
    with pytest.raises(ValueError, match="None"):
        get_format("float32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exp": 8, "man": 8}, "16 bits"),
        ({"exp": -1, "man": 4}, "negative"),
        ({"exp": 0, "man": 0}, "1 to 16"),
        ({"exp": 4, "man": 0, "specials": "ieee"}, "ieee"),
        ({"exp": 4, "man": 3, "specials": "nan"}, "specials"),
        ({"exp": 4, "man": 3, "subnormal": "denormal"}, "subnormal"),
        ({"exp": 4, "man": 3, "specials": "fnuz", "signed": False}, "fnuz"),
        ({"exp": 0, "man": 7, "subnormal": "flush"}, "subnormal"),
        ({"exp": 12, "man": 3}, "float64"),
        ({"exp": 4, "man": 3, "bias": 2000}, "float64"),
        ({"exp": 1, "man": 0, "specials": "fn"}, "finite"),
    ],
)
def test_layouts_that_are_no_format(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Format(**arguments)  # type: ignore[arg-type]


def test_formats_are_values() -> None:
    assert Format(4, 3) == Format(4, 3, 7) and hash(Format(4, 3)) == hash(Format(4, 3, 7))
    assert Format(4, 3, name="mine") == Format(4, 3)
    assert Format(4, 3) != FORMATS["e4m3"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        FORMATS["e2m1"].man = 2  # type: ignore[misc, union-attr]


def test_torch_dtypes() -> None:
    for name, fmt in FORMATS.items():
        if fmt.torch_dtype_name is None:
            continue
        info = torch.finfo(getattr(torch, fmt.torch_dtype_name))
        assert info.max == fmt.max and info.bits == fmt.bits, name
    assert FORMATS["e4m3"].torch_dtype_name is None  # torch's e4m3 has no Inf
    assert Format(5, 10, specials="ieee").torch_dtype_name == "float16"


@pytest.mark.parametrize(
    "dtype", ["float8_e4m3b11fnuz", "float8_e4m3", "float8_e3m4", "float6_e2m3fn", "float6_e3m2fn"]
)
def test_ml_dtypes_decodes_alike(dtype: str) -> None:
    fmt = get_format(dtype)
    assert isinstance(fmt, Format)
    ours = np.array([fmt.decode(code) for code in range(1 << fmt.bits)])
    theirs = np.arange(1 << fmt.bits, dtype=np.uint8).view(getattr(ml_dtypes, dtype)).astype(np.float64)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(np.signbit(ours)[~np.isnan(ours)], np.signbit(theirs)[~np.isnan(ours)])


def test_identities() -> None:
    """arXiv 2405.13938: e1mY is e0m(Y+1) up to scale, e0m7 is MXINT8 without its -2, eXm0 is powers of two and 0."""
    for man in range(1, 8):
        with_exp, without = Format(1, man, 0), Format(0, man + 1, 0)
        assert [v / 2 for v in with_exp.values()] == list(without.values())
    assert [v * 64 for v in FORMATS["e0m7"].values()] == list(range(-127, 128))  # type: ignore[operator]
    assert Format(3, 0).values() == tuple(sorted([0.0] + [s * 2.0**k for s in (-1, 1) for k in range(-2, 5)]))


def test_scalar_encode_states_its_edges() -> None:
    fmt = FORMATS["e4m3fn"]
    assert isinstance(fmt, Format)
    assert fmt.encode(1e9) == 0x7E and fmt.encode(-1e9) == 0xFE  # finite values saturate
    assert fmt.encode(float("inf")) == fmt.encode(float("nan")) == fmt.nan_code == 0x7F
    assert fmt.encode(-0.0) == 0x80 and fmt.encode(2**-10) == 0 and fmt.encode(1.5 * 2**-9) == 2
    assert FORMATS["e4m3b8"].encode(-0.0) == 0 and FORMATS["e4m3b8"].encode(float("nan")) == 0x80
    with pytest.raises(ValueError, match="no NaN"):
        FORMATS["e2m1"].encode(float("nan"))
    with pytest.raises(ValueError, match="codes 0 to 15"):
        FORMATS["e2m1"].decode(16)
    with pytest.raises(ValueError, match="no Inf"):
        _ = fmt.inf_code


def test_nf4_is_the_published_table() -> None:
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    np.testing.assert_allclose(FORMATS["nf4"].values, published, atol=1e-6)  # type: ignore[arg-type]


def test_dynamic_tree() -> None:
    signed, unsigned = FORMATS["dynamic8"], FORMATS["dynamic8u"]
    assert isinstance(signed, Codebook) and isinstance(unsigned, Codebook)
    assert len(signed.values) == len(unsigned.values) == 256
    assert signed.values[-1] == unsigned.values[-1] == 1.0 and unsigned.values[0] == 0.0
    assert signed.tiny == pytest.approx(5.5e-7) and unsigned.tiny == pytest.approx(3.25e-7)
    assert {-v for v in signed.values} - set(signed.values) == {-1.0}


def test_codebooks_are_those_of_torchao() -> None:
    """To a float32 ulp: torchao (as bitsandbytes) forms midpoints and powers of ten in float32, we round once."""
    from torchao.optim.quant_utils import create_dynamic_map

    for name, arguments in (("dynamic4", (True, 3, 4)), ("dynamic8", (True, 7, 8)), ("dynamic8u", (False, 7, 8))):
        np.testing.assert_allclose(FORMATS[name].values, create_dynamic_map(*arguments), rtol=2e-7, atol=0)  # type: ignore[arg-type]
    assert FORMATS["linear4u"].values == tuple(torch.linspace(0, 1, 17)[1:].tolist()), "torchao's AdamW4bit"


@pytest.mark.parametrize("name", ["nf4", "dynamic8", "dynamic8u", "dynamic4", "linear4u"])
def test_boundaries_are_where_the_nearest_code_changes(name: str) -> None:
    book = FORMATS[name]
    assert isinstance(book, Codebook)
    boundaries = nearest_boundaries(book.values)
    assert len(boundaries) == len(book.values) - 1
    for code, b in enumerate(boundaries):
        below = float(np.nextafter(np.float32(b), np.float32(-np.inf)))
        assert b == np.float32(b) and (book.encode(below), book.encode(b)) == (code, code + 1)


def test_codebooks_are_checked() -> None:
    with pytest.raises(ValueError, match="ascending"):
        Codebook("bad", (0.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="no NaN"):
        FORMATS["nf4"].encode(float("nan"))


def test_formats_import_the_standard_library_only() -> None:
    code = "import sys; import hf_lowprec.formats; print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"], capture_output=True
    )
    assert out.stdout.strip() == b"set()", out.stderr.decode()
