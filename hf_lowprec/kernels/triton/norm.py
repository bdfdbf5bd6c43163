# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and LayerNorm in one pass each way: a program holds whole rows in registers.

Forward reads x and writes y and one or two float32 numbers a row. Backward reads the gradient and x, writes the
gradient of x, and adds up those of weight and bias in registers, over the rows that its program walks through; the
programs' float32 sums are then added in the order of the programs. No atomics, so a run repeats bit for bit.

The linears behind a norm quantise its output themselves, once for all of them and in both layouts. Codes written here
would save them one byte of four, while the store of single bytes makes Triton choose another layout for the sums: y
would have other bits once the scale is known, and a resumed run would show when it learned that.

Needed bytes of n elements of b bytes: forward 2nb, backward 3nb. The programs' sums stay in the L2 cache. Wider rows
than MAX_WIDTH do not fit into registers: `kernels/norm.py` leaves them to plain torch.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowprec.kernels.triton.elementwise import stored
from hf_lowprec.kernels.triton.launch import Launcher

MAX_WIDTH = 16384
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_SUM_COLUMNS = 32
_SUM_ROWS = 32


@triton.jit
def _factor(weight_ptr, column, inside, PLUS_ONE: tl.constexpr):
    """What the normalised values are multiplied by, [1, BLOCK] float32."""
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    return 1.0 + weight if PLUS_ONE else weight


@triton.jit(do_not_specialize=["rows", "per_program"])
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, stats_ptr, rows, per_program, eps,
    WIDTH: tl.constexpr, CENTER: tl.constexpr, PLUS_ONE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    MID: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y and stats of `per_program` rows from program_id * per_program on, ROWS at a time."""
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < WIDTH
    if WEIGHT:
        times = _factor(weight_ptr, column, inside, PLUS_ONE)
    if BIAS:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    first = tl.program_id(0) * per_program
    for i in tl.range(0, per_program, ROWS, num_stages=STAGES):
        row = first + i + tl.arange(0, ROWS)[:, None]
        there = row < rows
        offset = row.to(tl.int64) * WIDTH + column
        x = tl.load(x_ptr + offset, mask=there & inside, other=0.0).to(tl.float32)
        if CENTER:
            mean = tl.div_rn(tl.sum(x, 1, keep_dims=True), WIDTH * 1.0)
            tl.store(stats_ptr + rows + row, mean, mask=there)
            x = tl.where(inside, x - mean, 0.0)
        variance = tl.div_rn(tl.sum(x * x, 1, keep_dims=True), WIDTH * 1.0)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
        tl.store(stats_ptr + row, rstd, mask=there)
        y = stored(x * rstd, MID)
        if WEIGHT:
            y = y * times
        if BIAS:
            y = y + bias
        tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=there & inside)


@triton.jit(do_not_specialize=["rows", "per_program"])
def _backward_kernel(
    grad_ptr, x_ptr, stats_ptr, weight_ptr, grad_x_ptr, sums_ptr, rows, per_program,
    WIDTH: tl.constexpr, CENTER: tl.constexpr, PLUS_ONE: tl.constexpr, WEIGHT: tl.constexpr, MID: tl.constexpr,
    NEEDS_X: tl.constexpr, NEEDS_WEIGHT: tl.constexpr, NEEDS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of x, and sums [NEEDS_WEIGHT + NEEDS_BIAS, programs, WIDTH] of this program's rows."""
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < WIDTH
    if WEIGHT and NEEDS_X:
        times = _factor(weight_ptr, column, inside, PLUS_ONE)
    if NEEDS_WEIGHT:
        grad_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    if NEEDS_BIAS:
        grad_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    program = tl.program_id(0)
    first = program * per_program
    for i in tl.range(0, per_program, ROWS, num_stages=STAGES):
        row = first + i + tl.arange(0, ROWS)[:, None]
        there = row < rows
        offset = row.to(tl.int64) * WIDTH + column
        g = tl.load(grad_ptr + offset, mask=there & inside, other=0.0).to(tl.float32)
        n = tl.load(x_ptr + offset, mask=there & inside, other=0.0).to(tl.float32)
        rstd = tl.load(stats_ptr + row, mask=there, other=0.0)
        if CENTER:
            n = n - tl.load(stats_ptr + rows + row, mask=there, other=0.0)
        n = n * rstd
        # Beyond the row's end g is 0, so n may be anything there.
        if NEEDS_WEIGHT:
            grad_weight += g * stored(n, MID)
        if NEEDS_BIAS:
            grad_bias += g
        if NEEDS_X:
            if WEIGHT:
                g = g * times
            inner = g - n * tl.div_rn(tl.sum(g * n, 1, keep_dims=True), WIDTH * 1.0)
            if CENTER:
                inner = inner - tl.div_rn(tl.sum(g, 1, keep_dims=True), WIDTH * 1.0)
            tl.store(grad_x_ptr + offset, (inner * rstd).to(grad_x_ptr.dtype.element_ty), mask=there & inside)
    column = tl.arange(0, BLOCK)
    out = sums_ptr + program * WIDTH + column
    if NEEDS_WEIGHT:
        tl.store(out, tl.sum(grad_weight, 0), mask=column < WIDTH)
        out += tl.num_programs(0) * WIDTH
    if NEEDS_BIAS:
        tl.store(out, tl.sum(grad_bias, 0), mask=column < WIDTH)


@triton.jit(do_not_specialize=["programs"])
def _sum_kernel(
    sums_ptr, first_ptr, second_ptr, programs, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Column sums of sums [1 or 2, programs, WIDTH], in the order of the programs: the first to `first`, ..."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    table = tl.program_id(1)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(0, programs, ROWS):
        row = i + tl.arange(0, ROWS)[:, None]
        inside = (row < programs) & (column < WIDTH)
        total += tl.load(sums_ptr + (table * programs + row) * WIDTH + column, mask=inside, other=0.0)
    out = tl.sum(total, 0)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if table == 0:
        tl.store(first_ptr + column, out.to(first_ptr.dtype.element_ty), mask=column < WIDTH)
    else:
        tl.store(second_ptr + column, out.to(second_ptr.dtype.element_ty), mask=column < WIDTH)


class Launch(NamedTuple):
    """How a width is spread over a GPU.

    rows, block: rows of a tile, elements of each. stages: tiles under way at once.
    resident: programs per multiprocessor that share the rows; 0: one program per tile.
    """

    rows: int
    block: int
    stages: int
    warps: int
    resident: int


@cache
def forward_launch(width: int) -> Launch:
    block = triton.next_power_of_2(width)
    rows = max(1, 2048 // block)
    return Launch(rows, block, 1, _warps(rows * block, 16), 0)


@cache
def backward_launch(width: int) -> Launch:
    block = triton.next_power_of_2(width)
    rows = max(1, 2048 // block)
    warps = _warps(rows * block, 16)
    # Tiles under way lie in shared memory: of the widest rows only the one that is computed.
    return Launch(rows, block, 2 if block <= 8192 else 1, warps, max(1, 16 // warps))


def _warps(elements: int, per_thread: int) -> int:
    return max(1, min(32, elements // (32 * per_thread)))


@cache
def _multiprocessors(device: torch.device) -> int:
    # The interpreter's tensors lie in the CPU's memory; a few programs show that their sums are put together.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _share(rows: int, launch: Launch, device: torch.device) -> tuple[int, int]:
    """(programs, rows of each): as many programs as run at once, each a multiple of the tile."""
    tiles = -(-rows // launch.rows)
    each = -(-tiles // (_multiprocessors(device) * launch.resident)) if launch.resident else 1
    return -(-tiles // each), each * launch.rows


_forward, _backward, _sum = Launcher(_forward_kernel), Launcher(_backward_kernel), Launcher(_sum_kernel)


def _alignment(*tensors: Tensor) -> bool | tuple[bool, ...]:
    """Which of the addresses Triton takes for divisible by 16; True for all. Its vector loads depend on it."""
    bits = 0
    for tensor in tensors:
        bits |= tensor.data_ptr()
    return bits % 16 == 0 or tuple(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def _index(device: torch.device) -> int:
    return -1 if device.index is None else device.index


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    plus_one: bool,
    mid: torch.dtype,
    out: torch.dtype,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.norm` of contiguous tensors, at most MAX_WIDTH wide. launch: for measurements."""
    width = x.shape[-1]
    rows = x.numel() // width
    launch = forward_launch(width) if launch is None else launch
    y = torch.empty(x.shape, dtype=out, device=x.device)
    stats = torch.empty((2 if center else 1, rows), dtype=torch.float32, device=x.device)
    if rows:
        programs, per_program = _share(rows, launch, x.device)
        # Pointers that a variant does not use are passed as x.
        w, b = x if weight is None else weight, x if bias is None else bias
        has = (weight is not None, bias is not None)
        key = (x.dtype, w.dtype, b.dtype, out, _alignment(x, w, b), width, center, plus_one, has, mid, launch)
        _forward(
            key, _index(x.device), (programs, 1, 1),
            (x, w, b, y, stats, rows, per_program, eps, width, center, plus_one, *has, _DTYPES[mid], *launch[:3]),
            num_warps=launch.warps,
        )  # fmt: skip
    return y, stats


def norm_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    plus_one: bool,
    mid: torch.dtype,
    needs_x: bool,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.norm_backward` of contiguous tensors, at most MAX_WIDTH wide. launch: for measurements."""
    width = x.shape[-1]
    rows = x.numel() // width
    launch = backward_launch(width) if launch is None else launch
    programs, per_program = _share(max(1, rows), launch, x.device)
    needs = (needs_x, weight_dtype is not None, bias_dtype is not None)
    tables = needs[1] + needs[2]
    nothing = x.new_empty(0) if False in needs else x
    grad_x = torch.empty_like(x) if needs_x else nothing
    grad_weight = torch.empty(width, dtype=weight_dtype, device=x.device) if needs[1] else nothing
    grad_bias = torch.empty(width, dtype=bias_dtype, device=x.device) if needs[2] else nothing
    sums = torch.empty((tables, programs, width), dtype=torch.float32, device=x.device) if tables else stats
    w = x if weight is None else weight
    center = stats.shape[0] == 2
    aligned = _alignment(grad, x, stats, w)
    key = (grad.dtype, x.dtype, w.dtype, aligned, width, center, plus_one, weight is None, mid, needs, launch)
    _backward(
        key, _index(x.device), (programs, 1, 1),
        (grad, x, stats, w, grad_x if needs_x else x, sums, rows, per_program, width, center, plus_one,
         weight is not None, _DTYPES[mid], *needs, *launch[:3]),
        num_warps=launch.warps,
    )  # fmt: skip
    if tables:
        first, second = grad_weight if needs[1] else grad_bias, grad_bias if needs[2] else grad_weight
        _sum(
            (first.dtype, second.dtype, width), _index(x.device), (-(-width // _SUM_COLUMNS), tables, 1),
            (sums, first, second, programs, width, _SUM_ROWS, _SUM_COLUMNS), num_warps=4,
        )  # fmt: skip
    return grad_x, grad_weight, grad_bias
