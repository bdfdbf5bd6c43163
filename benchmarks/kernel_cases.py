# SPDX-License-Identifier: Apache-2.0
"""What bench_kernels.py times: every element-wise kernel on fresh tensors, with the bytes that its passes must move.

A family is a function `(rows, columns, device) -> cases`; a case is a name, a maker of calls on tensors of their own,
and bytes (or, for GEMMs, operations). Bytes count what each pass reads and writes once: a pass that has to read its
input a second time, as current scaling does, counts it twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Case(NamedTuple):
    name: str
    make: Callable[[], Callable[[], Any]]
    moved: int  # bytes; 0 for a GEMM
    operations: int = 0  # multiply-adds counted as two


def _keys() -> tuple[str, str, str]:
    from hf_lowprec import ops
    from hf_lowprec.recipe import Quant, Scaling

    delayed = Scaling(method="delayed", history=16, snap="rceil")
    return (
        ops.quant_key(Quant(format="e4m3fn", scaling=delayed)),
        ops.quant_key(Quant(format="e4m3fn", scaling=Scaling(snap="rceil"))),
        ops.quant_key(Quant(format="e5m2", scaling=delayed)),
    )


def _noted(device: str) -> dict[str, Any]:
    """A delayed scale with what is noted beside it, as every layer has them."""
    import torch

    counts = torch.zeros(4, dtype=torch.int64, device=device)
    return {"amax": torch.zeros((), device=device), "counts": counts, "ready": True}


def copy(rows: int, columns: int, device: str) -> Iterator[Case]:
    """What the others are compared with."""
    import torch

    def make() -> Callable[[], Any]:
        x = torch.randn(rows, columns, device=device).bfloat16()
        y = torch.empty_like(x)
        return lambda: y.copy_(x)

    yield Case("device copy", make, 4 * rows * columns)


def cast(rows: int, columns: int, device: str) -> Iterator[Case]:
    import torch

    from hf_lowprec import ops

    delayed, current, gradient = _keys()
    n = rows * columns

    def case(name: str, moved: int, call: Callable[..., Any], dtype: torch.dtype = torch.bfloat16) -> Case:
        def make() -> Callable[[], Any]:
            x = torch.randn(rows, columns, device=device).to(dtype)
            noted, scale = _noted(device), torch.tensor(1 / 16, device=device)
            return lambda: call(x, scale, noted)

        return Case(name, make, moved * n)

    yield case("quantise, delayed", 3, lambda x, s, k: ops.quantize(x, delayed, s, **k))
    yield case("quantise, delayed, nothing noted", 3, lambda x, s, k: ops.quantize(x, delayed, s, ready=True))
    yield case("quantise, current", 5, lambda x, s, k: ops.quantize(x, current))
    yield case("quantise, current, float32", 9, lambda x, s, k: ops.quantize(x, current), torch.float32)
    yield case("scale alone (amax)", 2, lambda x, s, k: ops.current_scale(x, current))
    yield case("cast + transpose, delayed", 4, lambda x, s, k: ops.cast_transpose(x, delayed, s, **k))
    yield case("cast + transpose, delayed, E5M2", 4, lambda x, s, k: ops.cast_transpose(x, gradient, s, **k))
    yield case("cast + transpose, current", 6, lambda x, s, k: ops.cast_transpose(x, current))
    yield case("cast + transpose, current, float32", 10, lambda x, s, k: ops.cast_transpose(x, current), torch.float32)
    yield case("cast + transpose, delayed, columns only", 3,
               lambda x, s, k: ops.cast_transpose(x, delayed, s, rows=False, **k))  # fmt: skip
    yield case("transpose of codes", 2, lambda x, s, k: ops.transposed(x), torch.float8_e4m3fn)


def norm(rows: int, columns: int, device: str) -> Iterator[Case]:
    import torch

    from hf_lowprec.ops import norm as ops_norm

    n = rows * columns
    for dtype in (torch.bfloat16, torch.float32):
        size = dtype.itemsize
        for center in (False, True):
            kind = f"{'LayerNorm' if center else 'RMSNorm'} {{}}{', float32' if size == 4 else ''}"

            def operands(dtype: torch.dtype = dtype, center: bool = center) -> tuple[Any, ...]:
                x = torch.randn(rows, columns, device=device).to(dtype)
                w = torch.ones(columns, dtype=dtype, device=device)
                return x, w, (w if center else None), 1e-5, center, False, torch.float32 if center else dtype, dtype

            def forward(operands: Any = operands) -> Callable[[], Any]:
                args = operands()
                return lambda: ops_norm.norm(*args)

            def backward(operands: Any = operands, dtype: torch.dtype = dtype) -> Callable[[], Any]:
                args = operands()
                x, w, b, _, _, plus_one, mid, _ = args
                stats = ops_norm.norm(*args)[1]
                grad = torch.randn_like(x)
                return lambda: ops_norm.norm_backward(
                    grad, x, stats, w, plus_one, mid, True, dtype, None if b is None else dtype
                )

            yield Case(kind.format("forward"), forward, 2 * size * n)
            yield Case(kind.format("backward"), backward, 3 * size * n)


def rotary(rows: int, columns: int, device: str) -> Iterator[Case]:
    """Two texts of rows / 2 tokens; columns of q, a quarter of them of k, in heads of 128, as linears leave them."""
    import torch

    from hf_lowprec.ops import rotary as ops_rotary

    size = min(128, columns // 4)
    bf16, fp32 = torch.bfloat16, torch.float32

    def case(name: str, x_dtype: torch.dtype, table: torch.dtype, out: torch.dtype, backward: bool) -> Case:
        def make() -> Callable[[], Any]:
            def view(wide: int, dtype: torch.dtype) -> torch.Tensor:
                x = torch.randn(2, rows // 2, wide, device=device).to(dtype)
                return x.view(2, rows // 2, -1, size).transpose(1, 2)

            cos, sin = (torch.randn(1, rows // 2, size, device=device).to(table) for _ in range(2))
            if not backward:
                q, k = view(columns, x_dtype), view(columns // 4, x_dtype)
                return lambda: ops_rotary.rotary(q, k, cos, sin, 1, out, out, False)
            q, k = view(columns, out), view(columns // 4, out)
            strides = q.stride(), k.stride()
            return lambda: ops_rotary.rotary_backward(q, k, cos, sin, 1, x_dtype, x_dtype, *strides)

        turned = rows * (columns + columns // 4) * (x_dtype.itemsize + out.itemsize)
        return Case(f"rotary {name}", make, turned + rows * size * table.itemsize)

    for way in ("forward", "backward"):
        yield case(way, bf16, bf16, bf16, way == "backward")
        yield case(f"{way}, cosines and results float32", bf16, fp32, fp32, way == "backward")
        yield case(f"{way}, float32", fp32, fp32, fp32, way == "backward")


def glu(rows: int, columns: int, device: str) -> Iterator[Case]:
    import torch

    from hf_lowprec import PRESETS, ops
    from hf_lowprec.ops import glu as ops_glu

    delayed, current, _ = _keys()
    tiles = ops.quant_key(PRESETS["fp8-lm"].saved)
    n = rows * columns

    def halves() -> tuple[Any, Any]:
        return tuple(torch.randn(rows, columns, device=device).bfloat16() for _ in range(2))  # type: ignore[return-value]

    def forward(name: str, moved: int, act: str = "silu", **how: Any) -> Case:
        def make() -> Callable[[], Any]:
            gate, up = halves()
            more = (
                {"scale": torch.tensor(1 / 16, device=device), **_noted(device)} if how.get("quant") == delayed else {}
            )
            return lambda: ops_glu.glu(gate, up, act, **how, **more)

        return Case(f"GLU {name}", make, moved * n)

    def backward(name: str, moved: int, act: str = "silu", saved: str | None = None) -> Case:
        def make() -> Callable[[], Any]:
            (gate, up), grad = halves(), torch.randn(rows, columns, device=device).bfloat16()
            scales: dict[str, Any] = {}
            if saved is not None:
                kept = ops_glu.glu(gate, up, act, saved=saved)
                (gate, gate_scale), (up, up_scale) = kept.gate, kept.up
                scales = {"gate_scale": gate_scale, "up_scale": up_scale, "saved": saved}
            a, b = torch.empty_like(grad), torch.empty_like(grad)
            return lambda: ops_glu.glu_backward(grad, gate, up, act, a, b, **scales)

        return Case(f"GLU {name}", make, moved * n)

    yield forward("forward", 6)
    yield forward("forward + quantise", 5, write=False, quant=delayed)
    yield forward("forward + quantise, current", 9, write=False, quant=current)
    yield forward("forward + quantise, inputs saved in E4M3", 11, write=False, quant=delayed, saved=current)
    yield forward("forward + quantise, inputs saved in E4M3 tiles", 7, write=False, quant=delayed, saved=tiles)
    yield forward("forward written + quantised, inputs saved in E4M3", 13, quant=delayed, saved=current)
    yield forward("forward written + quantised, inputs saved in E4M3 tiles", 9, quant=delayed, saved=tiles)
    yield forward("forward + quantise, GELU (tanh)", 5, act="gelu_tanh", write=False, quant=delayed)
    yield backward("backward", 10)
    yield backward("backward, inputs saved in E4M3", 8, saved=current)
    yield backward("backward, inputs saved in E4M3 tiles", 8, saved=tiles)
    yield backward("backward, GELU (tanh)", 10, act="gelu_tanh")


def gemm(rows: int, columns: int, device: str) -> Iterator[Case]:
    """rows tokens; the matrices of a Llama layer of this width and, as peer, torch's bf16 GEMM."""
    import torch

    from hf_lowprec import ops

    delayed, _, gradient = _keys()
    wide = 7 * columns // 2

    def make(k: int, n: int, dtype: str, fast: bool) -> Callable[[], Any]:
        if dtype == "bf16":
            a, b = torch.randn(rows, k, device=device).bfloat16(), torch.randn(n, k, device=device).bfloat16()
            return lambda: torch.mm(a, b.t())
        key = delayed if dtype == "e4m3fn" else gradient
        one = torch.ones((), device=device)
        a8 = torch.randn(rows, k, device=device).to(ops.quantize(one[None], key, one, fixed=True)[0].dtype)
        b8 = torch.randn(n, k, device=device).to(torch.float8_e4m3fn)
        return lambda: ops.scaled_mm(a8, one, key, b8, one, delayed, dtype=torch.bfloat16, fast=fast)

    for k, n in ((columns, columns), (columns, wide), (wide, columns)):
        for dtype, fast in (("bf16", False), ("e4m3fn", True), ("e4m3fn", False), ("e5m2", False)):
            how = "" if dtype == "bf16" else ", fast accumulation" if fast else ", split accumulation"
            yield Case(f"GEMM {dtype} {rows} x {k} x {n}{how}", lambda k=k, n=n, d=dtype, f=fast: make(k, n, d, f), 0,
                       2 * rows * k * n)  # fmt: skip


FAMILIES: dict[str, Callable[[int, int, str], Iterator[Case]]] = {
    "copy": copy, "cast": cast, "norm": norm, "rotary": rotary, "glu": glu, "gemm": gemm,
}  # fmt: skip
SHAPES = {"copy": ((8192, 14336),), "cast": ((8192, 4096), (8192, 14336), (2048, 2048)),
          "norm": ((8192, 4096), (8192, 2048)), "rotary": ((8192, 4096), (2048, 2048)),
          "glu": ((8192, 14336), (2048, 8192)), "gemm": ((8192, 4096), (2048, 2048))}  # fmt: skip
