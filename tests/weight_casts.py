# SPDX-License-Identifier: Apache-2.0
"""Weights of every kind for tables that cast many at once, and what a cast of each gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_lowprec import ops
from hf_lowprec.ops.cast_weights import WeightCast, new_copies
from hf_lowprec.ops.quantize import parse_quant
from hf_lowprec.recipe import Quant, Scaling

CURRENT, SNAPPED = Scaling(), Scaling(snap="rceil", margin=1)
DELAYED, STATIC = Scaling(method="delayed", history=4), Scaling(method="static", exponent=-3)
SHAPES = ((64, 128), (130, 48), (16, 16), (33, 20), (1, 16), (129, 1), (260, 520))


def weights(shapes: tuple[tuple[int, int], ...] = SHAPES) -> list[tuple[Tensor, Quant, float | None, bool]]:
    """(weight, policy, delayed scale, both layouts): every dtype, shape and method, some of them not finite."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for i, shape in enumerate(shapes):
        for j, (dtype, scaling) in enumerate(
            ((torch.bfloat16, CURRENT), (torch.float32, DELAYED), (torch.float16, STATIC), (torch.float32, SNAPPED))
        ):
            if (i + j) % 2 and i > 1:
                continue
            x = (torch.randn(shape, generator=generator) * 100).to(dtype)
            x.view(-1)[x.numel() // 3] = (float("nan"), float("inf"), 3e4, 0.0)[(i + j) % 4]
            given = (0.0, 0.25)[i % 2] if scaling is DELAYED else None
            out.append((x, Quant(format="e5m2" if scaling is STATIC else "e4m3fn", scaling=scaling), given, i != 3))
    odd = torch.randn(20 * 32 + 1, generator=generator)[1:].view(20, 32)  # an address that is a multiple of 4 only
    return [*out, (odd, Quant(format="e4m3fn"), None, True), (torch.zeros(32, 32), Quant(format="e4m3fn"), None, True)]


def finite_amax(x: Tensor) -> Tensor:
    x = x.float()
    return torch.where(x.isfinite(), x, 0.0).abs().max()


def casts_of(cases: list[Any], device: torch.device | str = "cpu") -> list[WeightCast]:
    out = []
    for here, quant, given, both in cases:
        key = ops.quant_key(quant)
        whole = here.untyped_storage().nbytes() // here.itemsize  # what is less aligned here is it there
        x = here.as_strided((whole,), (1,), 0).to(device).as_strided(here.shape, here.stride(), here.storage_offset())
        copies = new_copies(x, key, transposed=both)
        for copy in copies[:2]:
            if copy is not None:
                copy.view(torch.uint8).fill_(77)
        scale = None if given is None else torch.tensor(given, device=device)
        out.append(WeightCast(x, key, scale, finite_amax(x), *copies))
    return out


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal bits, any NaN for any NaN; a layout that nobody asked for is None or empty."""
    if a is None or b is None:
        return a is None and (b is None or not b.numel())
    nan = a.float().isnan()
    same = a.view(torch.uint8) == b.view(torch.uint8)
    return a.dtype == b.dtype and a.shape == b.shape and bool((same | (nan & b.float().isnan())).all())


def check(table: Any, cases: list[Any], device: torch.device | str = "cpu") -> int:
    """Against `ops.cast_transpose` of each, thrice: the last time at other addresses."""
    casts = casts_of(cases, device)
    for run in range(3):
        casts = casts_of(cases, device) if run == 2 else casts
        counts = torch.full((len(casts), 4), 9, device=device)
        seen = torch.full((len(casts),), 9.0, device=device)
        table.run(casts, counts, seen)
        for cast, count, amax in zip(casts, counts, seen, strict=True):
            delayed = parse_quant(cast.quant).scaling.method == "delayed"
            expected_counts = torch.zeros(4, dtype=torch.int64, device=device)
            expected_amax = torch.zeros((), device=device)
            rows, columns, scale = ops.cast_transpose(
                cast.weight, cast.quant, cast.given, amax=expected_amax if delayed else None, counts=expected_counts,
                columns=cast.transposed is not None,
            )  # fmt: skip
            where = (run, cast.weight.shape, cast.weight.dtype, parse_quant(cast.quant).scaling.method)
            assert same(cast.qdata, rows) and same(cast.transposed, columns), where
            assert torch.equal(cast.scale, scale), (where, cast.scale, scale)
            assert torch.equal(count, expected_counts), (where, count, expected_counts)
            assert not delayed or torch.equal(amax, expected_amax), where
        for cast in casts:
            cast.weight.mul_(-1.5)
            if cast.amax is not None:
                cast.amax.copy_(finite_amax(cast.weight))
    return len(casts)
