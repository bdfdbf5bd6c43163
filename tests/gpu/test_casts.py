# SPDX-License-Identifier: Apache-2.0
"""Cast + transpose on the GPU against the plain-torch operator, bit for bit, every tile; and the layers around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_lowprec
from hf_lowprec import ops
from hf_lowprec.ops.quantize import default_cast_transpose, default_quantize
from hf_lowprec.recipe import Quant, Scaling

pytestmark = pytest.mark.gpu

SHAPES = [(1, 16), (7, 32), (257, 129), (500, 4096), (5, 123, 48), (1040, 1000), (4096, 2064), (33, 1)]
SCALINGS = {
    "current": Scaling(),
    "delayed": Scaling(method="delayed", history=16, snap="rceil"),
    "static": Scaling(method="static", exponent=-3),
}
TILES = range(9)


def _input(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(
        torch.randint(-20, 12, shape, generator=generator).float()
    )
    flat = x.view(-1)
    flat[flat.numel() // 3], flat[0] = ((float("nan"), -float("inf")), (3.0e4, -0.0))[seed % 2]
    return x.to(dtype)


def _same(a: torch.Tensor, b: torch.Tensor | None) -> bool:
    if b is None or not b.numel():
        return not a.numel()
    b = b.cpu()
    nan = a.float().isnan() & b.float().isnan()
    return (
        a.shape == b.shape and a.dtype == b.dtype and bool((nan | (a.view(torch.uint8) == b.view(torch.uint8))).all())
    )


def _compare(x: torch.Tensor, quant: Quant, start: float | None, **flags: Any) -> None:
    key, results = ops.quant_key(quant), []
    for device in ("cpu", "cuda"):
        scale = None if start is None else torch.tensor(start, device=device)
        amax = None if start is None else torch.tensor(1.5, device=device)
        counts = torch.ones(4, dtype=torch.int64, device=device)
        on_device = x.to(device) if x.is_contiguous() else x.to(device).as_strided(x.shape, x.stride())
        args = (on_device, key, scale, False, amax, counts, None)
        function = default_cast_transpose if device == "cpu" else torch.ops.hf_lowprec.cast_transpose
        results.append((*function(*args, **flags), amax, counts))
        if device == "cuda":  # without the dispatcher, and with the scale that came out
            fixed = ops.cast_transpose(
                args[0], key, results[1][2], fixed=True, **{k: flags[k] for k in ("rows",) if k in flags}
            )
            assert _same(results[0][0], fixed[0]) and _same(results[0][1], fixed[1])
    truth, got = results
    assert _same(truth[0], got[0]), "rows"
    assert _same(truth[1], got[1]), "columns"
    assert torch.equal(truth[2], got[2].cpu())
    assert start is None or torch.equal(truth[3], got[3].cpu())
    assert torch.equal(truth[4], got[4].cpu()), (truth[4], got[4])


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("format", ["e4m3fn", "e5m2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cast_transpose_is_bit_for_bit(dtype: torch.dtype, format: str, scaling: str) -> None:
    quant = Quant(format=format, scaling=SCALINGS[scaling])
    for seed, shape in enumerate(SHAPES):
        x = _input(shape, dtype, seed)
        for start, ready in ((0.0, False), (0.25, False), (0.25, True)) if scaling == "delayed" else ((None, False),):
            _compare(x, quant, start, ready=ready)
    _compare(_input((300, 260), dtype, 1), quant, 0.25 if scaling == "delayed" else None, rows=False)


@pytest.mark.parametrize("tile", TILES)
def test_every_tile(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_lowprec.kernels.triton import cast_transpose as kernel

    assert len(kernel.TILES) == len(TILES)
    monkeypatch.setattr(kernel, "TILE", kernel.TILES[tile])
    for format, dtype in (("e4m3fn", torch.bfloat16), ("e5m2", torch.float32)):
        for seed, shape in enumerate([(257, 129), (500, 512), (4096, 2064), (16, 16), (200, 5000)]):
            _compare(_input(shape, dtype, seed), Quant(format=format, scaling=SCALINGS["delayed"]), 0.25, ready=True)
    few = Quant(format="e4m3fn", scaling=SCALINGS["current"])
    monkeypatch.setattr(kernel, "MOST_PROGRAMS", 7)
    _compare(_input((1040, 1000), torch.bfloat16, 1), few, None)


def test_rows_that_lie_apart_and_bytes_that_do_not_align() -> None:
    quant = Quant(format="e4m3fn", scaling=SCALINGS["delayed"])
    wide = _input((300, 640), torch.bfloat16, 3)
    for x in (
        wide[:, :512],
        wide[:, 1:257],
        wide[3:, 16:528],
        wide.t(),
        wide.view(-1)[1 : 1 + 250 * 512].view(250, 512),
    ):
        truth = default_cast_transpose(x, ops.quant_key(quant), torch.tensor(0.25), False, None, None, None)
        gpu = wide.cuda()
        there = gpu.as_strided(x.shape, x.stride(), x.storage_offset())
        got = ops.cast_transpose(there, ops.quant_key(quant), torch.tensor(0.25, device="cuda"), ready=True)
        assert _same(truth[0], got[0]) and _same(truth[1], got[1])


@pytest.mark.parametrize("partials", [1, 4])
def test_known_amaxes(partials: int) -> None:
    x = _input((500, 512), torch.bfloat16, 1)
    table = torch.zeros(4, 5, device="cuda")  # addresses that are multiples of 4 only
    table[:, 1] = x.abs().float().max()
    known = table[0, 1] if partials == 1 else table[:, 1].contiguous()
    for scaling, start in (("current", None), ("delayed", 0.0), ("delayed", 0.25)):
        key = ops.quant_key(Quant(format="e4m3fn", scaling=SCALINGS[scaling]))
        scale = None if start is None else torch.tensor(start)
        truth = default_cast_transpose(x, key, scale, False, None, None, None)
        flat = default_quantize(x, key, scale, False, None, None, None)
        given = None if scale is None else scale.cuda()
        got = ops.cast_transpose(x.cuda(), key, given, partials=known)
        assert _same(truth[0], got[0]) and _same(truth[1], got[1]) and torch.equal(truth[2], got[2].cpu())
        assert _same(flat[0], ops.quantize(x.cuda(), key, given, partials=known)[0])


def test_transposed() -> None:
    for shape in [(1, 16), (33, 48), (500, 129), (4096, 2048)]:
        q = torch.randint(0, 127, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
        assert _same(torch.ops.hf_lowprec.transposed(q), ops.transposed(q.cuda()))


def test_scales_become_known_without_waiting() -> None:
    """After a few steps no pass for the amax is launched, and the host never asked for it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)).cuda()
    hf_lowprec.convert(model, "te-delayed")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(48, 64, device="cuda")
    for _ in range(3):
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(x).square().mean().backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    assert all(all(layer._lowprec.ready) for layer in model)


def test_steps_with_known_scales_are_those_without() -> None:
    losses = []
    for forget in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)).cuda()
        hf_lowprec.convert(model, "fp8-lm")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(6):
            x = torch.randn(33, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(step))
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            for layer in model if forget else ():
                layer._lowprec.ready = (False, False, False)
        losses.append(loss.item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("policy", ["both", "one", "none"])
def test_weight_policies_agree(policy: str) -> None:
    outs = []
    for chosen in (policy, "none"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)).cuda().bfloat16()
        hf_lowprec.convert(model, "te-current")
        for layer in model:
            layer._lowprec.weight_cache.policy = chosen
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        for step in range(3):
            for micro in range(2):
                generator = torch.Generator("cuda").manual_seed(2 * step + micro)
                x = torch.randn(48, 64, device="cuda", generator=generator).bfloat16()
                loss = model(x).float().square().mean()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        outs.append(loss.item())
    assert outs[0] == outs[1]
