# SPDX-License-Identifier: Apache-2.0
"""Every launch that the kernels choose between: tables of settings, tiles by shape, tiles by width. Each one on tiles
that are whole and on such that are cut short, in both directions, against the plain-torch truth; in Triton's
interpreter, and what is the same bits there on a GPU, where registers, warps and stages come to it.

Each check notes which settings ran, so that one which is added without a shape that reaches it fails here. (Tiles of
the optimizers' steps: test_triton_optimizer.py; of casts with a transpose: test_triton_cast.py.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import interpreter
import pytest
import test_triton_accumulate as narrow
import test_triton_any_cast as casts
import test_triton_flexible as ranges
import test_triton_norm as norms
import torch
from torch import Tensor

from hf_lowprec import numerics
from hf_lowprec.numerics.flexible import layout, scale_of
from hf_lowprec.ops import flexible as flexible_ops
from hf_lowprec.ops.rotary import default_rotary, default_rotary_backward
from hf_lowprec.recipe import NONE, Accumulation, Quant, Rounding, Scaling

F, B, H = torch.float32, torch.bfloat16, torch.float16
SR, ZERO, AWAY = narrow.SR, Rounding(mode="zero"), Rounding(mode="away")


def run(part: str) -> Callable[[str], None]:
    return globals()[f"check_{part}"]  # type: ignore[no-any-return]


# --- narrow sums ----------------------------------------------------------------------------------------------------

# (way of rounding, stochastic, chunks): formats of the operands, sums.
NARROW: dict[tuple[int, bool, bool], tuple[str, str, Accumulation | None]] = {
    (0, False, False): ("e5m2", "e4m3fn", None),
    (1, False, False): ("e5m2", "e5m2", Accumulation(format="e6m9")),
    (1, False, True): ("e5m2", "e5m2", Accumulation(format="e6m9", chunk=8, outer="e6m9")),
    (2, False, False): ("e4m3b11normal0", "e4m3fn", Accumulation(format="e5m10", rounding=AWAY)),
    (2, False, True): ("e5m2", "e5m2", Accumulation(format="e6m5", rounding=ZERO, chunk=7, outer="e6m5")),
    (2, True, False): ("e5m2", "e5m2", Accumulation(format="e6m5", rounding=SR[13])),
    (2, True, True): ("e5m2", "e5m2", Accumulation(format="e6m5", rounding=SR[9], chunk=8, outer="e6m9")),
    (3, False, False): ("e5m2", "e5m2", Accumulation(format="e5m10", rounding=AWAY)),
    (3, False, True): ("e5m2", "e5m2", Accumulation(format="e5m9", rounding=ZERO, chunk=25)),
    (3, True, False): ("e3m1", "e6m9", Accumulation(format="e6m9", rounding=SR[None])),
    (3, True, True): ("e5m2", "e5m2", Accumulation(format="e5m9", rounding=SR[9], chunk=25, outer="e5m9")),
}


def check_accumulate(device: str) -> None:
    from hf_lowprec.kernels.triton import accumulate as kernels

    assert NARROW.keys() == kernels.SETTINGS.keys()
    for way, (first, second, how) in NARROW.items():
        constants = kernels._constants(first, second, how)
        assert (constants["WAY"], constants["STOCHASTIC"], constants["CHUNKED"]) == way
        tile = kernels.SETTINGS[way]
        for m, n, k in ((tile.rows + 5, 2 * tile.cols + 3, 21), (tile.rows, tile.cols, 70), (3, 2, 1)):
            a, b = narrow.operand(m, k, first, 0, device), narrow.operand(n, k, second, 1, device, strided=True)
            got = kernels.accumulate(a, first, b, second, how, torch.tensor(narrow.SEED, device=device)).cpu()
            x, y = narrow.values(a, first), narrow.values(b, second)
            if how is None:
                truth = torch.zeros(m, n)
                for i in range(k):
                    truth = truth + x[:, i, None] * y[:, i]
            else:
                truth = numerics.accumulate(x, y, how, seed=narrow.SEED)
            wrong = (got.view(torch.int32) != truth.view(torch.int32)).nonzero().tolist()
            assert not wrong, (way, (m, n, k), len(wrong), wrong[:3])


# --- casts to any format --------------------------------------------------------------------------------------------


def blocked(name: str, size: int) -> Quant:
    return Quant(format=name, scaling=Scaling(granularity="block", block=(size,), snap="rceil"))


# What is cast: (how its elements lie, policy); the names are those of `any_cast.DEFAULTS`.
ROW = Scaling(granularity="row")
LYING = [
    ("flat", Quant(format="e4m3", rounding=AWAY)),
    ("flat", Quant(format="e6m9", scaling=NONE, rounding=SR[9])),
    ("lying", blocked("e4m3fn", 32)),
    ("lying", blocked("e2m1", 512)),  # wider than the tile
    ("lying", blocked("e5m10", 16)),
    ("turned", Quant(format="e6m5", scaling=NONE, rounding=SR[13])),
    ("turned", blocked("e6m9", 32)),
    ("turned", Quant(format="e0m7", scaling=ROW)),
    ("turned words", blocked("e4m3fn", 32)),
    ("turned words", blocked("e2m1", 4)),
    ("turned words", blocked("e3m2", 512)),
    ("row", Quant(format="e0m7", scaling=ROW, rounding=SR[None])),
    ("row", Quant(format="e5m10", scaling=ROW)),
    ("long row", Quant(format="e4m3fn", scaling=ROW)),
    ("long row", Quant(format="e6m9", scaling=ROW)),
]


def check_any_cast(device: str) -> None:
    from hf_lowprec.kernels.triton import any_cast

    met: set[tuple[str, int, int]] = set()
    whole: set[tuple[str, bool]] = set()
    shape_of = any_cast._shape

    def spied(plan: Any, rows: int, cols: int, row: int, col: int, dense: bool, dtype: torch.dtype, size: int,
              codes: bool) -> Any:  # fmt: skip
        found = shape_of(plan, rows, cols, row, col, dense, dtype, size, codes)
        met.add((found.kind, dtype.itemsize, size))
        whole.add((found.kind, found.constants["EVEN"]))
        return found

    def check(x: Tensor, quant: Quant, kind: str) -> None:
        plan, host = any_cast.plan_of(quant), x.cpu().contiguous()
        assert plan is not None
        drawn = {"seed": casts.SEED} if quant.rounding.mode == "stochastic" else {}
        seed = torch.tensor(casts.SEED, device=device) if drawn else None
        q, s = any_cast.quantize(x, plan, seed=seed)
        truth = numerics.quantize(host, quant, **drawn)
        casts.same(s, truth.scale, ("scale", kind, quant))
        casts.same(q, truth.qdata, (kind, quant, x.shape, x.dtype))
        if x.dtype != B:
            return
        values, _ = any_cast.quantize(x, plan, seed=seed, values=True)
        casts.same(values, numerics.quantize_dequantize(host, quant, **drawn), ("values", kind, quant, x.dtype))

    with mock.patch.object(any_cast, "_shape", spied), mock.patch.object(any_cast, "LONGEST_ROW", 512):
        for kind, quant in LYING:
            for dtype in (F, B, H):
                setting = any_cast.SETTINGS.get((kind, dtype.itemsize, 1), any_cast.DEFAULTS[kind])
                cols = max(setting.cols, quant.scaling.block[0] if quant.scaling.granularity == "block" else 1)
                rows = max(1, setting.elements // cols)
                if kind in ("row", "long row"):
                    cols, rows = {"row": (64, 32), "long row": (1024, 2)}[kind]
                for m, n in ((2 * rows, 2 * cols), (rows + 8, cols + 36)):
                    x = casts.inputs(max(m, 9), n, dtype, "cpu", spoiled=True)[-m:].to(device)
                    if kind.startswith("turned"):
                        x = x.t().contiguous().t()
                    elif kind == "lying":
                        x = torch.nn.functional.pad(x, (0, 8))[:, :n] if n % 2 == 0 and m % 2 == 0 else x
                    check(x, quant, kind)
    kinds = {kind for kind, _, _ in met}
    assert kinds == set(any_cast.DEFAULTS), kinds
    assert set(any_cast.SETTINGS) <= met, set(any_cast.SETTINGS) - met
    assert whole == {(kind, even) for kind in kinds for even in (False, True)}, whole
    check_decode(device)


def check_decode(device: str) -> None:
    """Tiles of 64 by 32 and of 8 by 256."""
    from hf_lowprec.kernels.triton import any_decode

    for quant in (blocked("e4m3fn", 32), Quant(format="e6m9", scaling=ROW), Quant(format="e0m7")):
        for shape in ((16, 512), (129, 300)):
            q, s = numerics.quantize(casts.inputs(max(9, shape[0]), shape[1], F, "cpu", False)[: shape[0]], quant)
            truth = numerics.dequantize(numerics.ScaledTensor(q, s), quant)
            for given in (q, q.t().contiguous().t()):
                casts.same(any_decode.decode(given.to(device), s.to(device), quant), truth, ("decode", quant, shape))


# --- formats with ranges as tensors ---------------------------------------------------------------------------------


def check_flexible(device: str) -> None:
    from hf_lowprec.kernels.triton import flexible as kernels

    met = set()

    def same(got: Tensor, expected: Tensor, what: Any) -> None:
        ranges.assert_same(got.cpu(), expected, what)

    tile_of = kernels._tile
    with mock.patch.object(kernels, "_tile", lambda *args: met.add(tile_of(*args)) or tile_of(*args)):
        for cols in (16, 13, 32, 29, 64, 61, 128, 99, 256, 200, 512, 450, 1100):
            tall = tile_of(cols, 2 * cols, 1).rows + 3
            for turn, (rows, turned) in enumerate(((tall, False), (2 * tall - 6, False), (130, True), (128, True))):
                dtype, out, bits = (F, B, H)[(cols + turn) % 3], (F, B)[turn % 2], (8, 5)[turn // 2]
                shape = (rows, min(cols, 96) if turned else cols)
                x, grad = (ranges.noise((*shape, 2), t, cols, special=not turned) for t in (dtype, F))
                x, grad = x[..., 0], grad[..., 1]
                if turned:
                    x = x.t().contiguous().t()
                man = torch.tensor(float(2 + turn % 3))
                for maxval in ranges.ranges_of(shape, cols + turn):
                    what = (shape, turned, maxval.shape, dtype, out)
                    there = [t.to(device) for t in (maxval, man)]
                    # `.to` keeps strides only of what is dense: the others begin as they are.
                    mine = x.to(device) if turned else torch.stack([x, x], -1).to(device)[..., 0]
                    best = flexible_ops.default_flexible(x, maxval, man, bits, out)
                    same(kernels.flexible(mine, *there, bits, out), best, what)
                    got = kernels.gradients(grad.to(device), mine, *there, bits, out)
                    expected = flexible_ops.default_flexible_gradients(grad, x, maxval, man, bits, out)
                    same(got[0], expected[0], what)
                    # A scale per column, as the weight's rows have one.
                    sums, w = ranges.noise(shape, F, turn, special=False), maxval.reshape(-1)[0].expand(shape[1], 1)
                    w = w * torch.arange(1, shape[1] + 1)[:, None]
                    bias = ranges.noise((shape[1],), F, 9, special=False)
                    args = sums, torch.tensor(3.7), man, bits, w, man, bits, bias
                    got_sums = kernels.finish(*(t.to(device) if isinstance(t, Tensor) else t for t in args), out)
                    form = layout(man, bits)
                    best = sums * scale_of(args[1], form) * scale_of(w, form).reshape(1, -1) + bias
                    same(got_sums, best.to(out), ("finish", what))
    wide = {kernels.Tile(kernels._TILE >> i, 1 << i) for i in range(4, 10)}
    assert met == {*wide, kernels.Tile(64, 32)}, met


# --- norms and rotary embeddings ------------------------------------------------------------------------------------


def check_norm(device: str) -> None:
    """A launch for each power of two up to the widest, rows of that width and a narrower one; sums in another order
    than the truth's, so within the bounds that `test_triton_norm` has."""
    from hf_lowprec.kernels.triton import norm as kernels

    launches = set()
    for power in range(kernels.MAX_WIDTH.bit_length()):
        block = 1 << power
        for width in {block, block - block // 4}:
            forward, backward = kernels.forward_launch(width), kernels.backward_launch(width)
            assert forward.block == backward.block == block
            launches |= {forward, backward}
            # A program of the backward has two tiles, the last of them one, which is nearly empty.
            rows = 2 * backward.resident * backward.rows + 1
            # Sums over programs take 32 columns each, here all at once: the interpreter goes one by one.
            columns = mock.patch.object(kernels, "_SUM_COLUMNS", 32 if width < 1024 else block)
            with columns, mock.patch.object(kernels, "_multiprocessors", lambda device: 2):
                norms.check((rows, width), width > 4, F if width == block else H, F, True, slack=1e-6)
    assert len(launches) == 2 * kernels.MAX_WIDTH.bit_length()


def check_rotary(device: str) -> None:
    """Heads that fit into one program, with warps of 1 to 8, and such that several share."""
    from hf_lowprec.kernels.rotary import rotary, rotary_backward
    from hf_lowprec.kernels.triton.rotary import launch_for

    met = set()
    for heads, size in (((4, 2), 32), ((8, 2), 128), ((16, 4), 128), ((32, 8), 128), ((64, 8), 128), ((40, 40), 128),
                        ((71, 1), 64), ((6, 6), 256)):  # fmt: skip
        met.add(launch_for(*heads, size))
        for dtype in (F, B):
            generator = torch.Generator().manual_seed(size)
            q, k = (torch.randn((2, n, 3, size), generator=generator).to(device, dtype) for n in heads)
            cos, sin = (torch.randn((1, 3, size), generator=generator).to(device, dtype) for _ in "cs")
            args = (q, k, cos, sin, 1, dtype, dtype, True)
            for a, b in zip(rotary(*args), default_rotary(*args), strict=True):
                casts.same(a, b, ("rotary", heads, size))
            args = (q, k, cos, sin, 1, dtype, dtype, q.stride(), k.stride())
            for a, b in zip(rotary_backward(*args), default_rotary_backward(*args), strict=True):
                casts.same(a, b, ("rotary backward", heads, size))
    assert {launch.warps for launch in met} == {1, 2, 4, 8} and max(launch.parts for launch in met) > 1, met


@pytest.mark.parametrize("part", ["accumulate", "any_cast", "flexible", "norm", "rotary"])
def test_every_setting_in_the_interpreter(part: str) -> None:
    assert interpreter.run(__file__, part).split() == ["checked", part]


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["accumulate", "any_cast", "flexible", "rotary"])
def test_every_setting_on_a_gpu(part: str) -> None:
    run(part)("cuda")


if __name__ == "__main__":
    torch.set_num_threads(1)
    interpreter.mend()
    interpreter.few_programs()
    run(sys.argv[1])("cpu")
    print("checked", sys.argv[1])
