# SPDX-License-Identifier: Apache-2.0
"""act(gate) * up, forward: h, its codes, and the codes of gate and up, in one pass.

    amax       partial[k, p] = largest finite magnitude of h, gate, up in the tiles of program p      reads gate, up
    forward    whatever is asked for; finishes the amaxes into scales                                 reads gate, up

The amax pass runs where a scale comes from the tensor itself, or where a delayed scale may not exist yet: its programs
look, and leave h alone if it does. The forward pass takes the tiles in the opposite order, so that the last ones of
the amax pass are still in the cache. Scales of gate and up per tile need no such pass: a program has the whole tile in
registers before it writes the codes, and its scale is its own.

Few programs with several tiles each: they finish the scales, note the amax and count once. Arithmetic is float32; h is
rounded to the tensors' dtype before it is quantised, so that its codes are those of the h that somebody else may read.
Tensors are [rows, cols] with a row stride (halves of a packed tensor), or one row of everything. Atomics are on
integers, a maximum or a sum, so that no result depends on their order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowprec.kernels.triton.activations import activation
from hf_lowprec.kernels.triton.cast import FormatConstants, _scale_of, integer_key, raise_amax
from hf_lowprec.kernels.triton.elementwise import (
    encode,
    larger,
    pointers,
    stored,
    tally,
    tile_at,
    within,
)
from hf_lowprec.kernels.triton.launch import Launcher

PARTIALS = 512
PROGRAMS = 2048
SAMPLES = 512
WARPS = 8
TILE = 4096

# Device memory of one number, of whatever alignment.
SCALARS = ["given_ptr", "scale_ptr", "gate_scale_ptr", "up_scale_ptr", "amax_ptr", "counts_ptr"]
COUNTS = ["partials", "tiles", "per_program", "rows", "samples", "sample_stride"]


@triton.jit
def _hidden(x, u, inside, ACT: tl.constexpr, GATED: tl.constexpr, DTYPE: tl.constexpr):
    """act(x) * u as it is stored in DTYPE, float32; 0 beyond the end, where x and u are 0."""
    y = activation(x, ACT, DTYPE == tl.float32)
    if GATED:
        y = y * u
    y = stored(y, DTYPE)
    if ACT == "sigmoid" and not GATED:  # the only one that is not 0 there by itself
        y = tl.where(inside, y, 0.0)
    return y


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=SCALARS)
def _amax_kernel(
    gate_ptr, up_ptr, given_ptr, partial_ptr, tiles, per_program, rows, cols, stride,
    ACT: tl.constexpr, HIDDEN: tl.constexpr, SAVED: tl.constexpr, PARTIALS: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """HIDDEN: the amax of h is wanted; with given_ptr only where there is no delayed scale yet."""
    DTYPE: tl.constexpr = gate_ptr.dtype.element_ty
    GATED: tl.constexpr = up_ptr is not None
    pid = tl.program_id(0)
    wanted = HIDDEN
    start = pid * per_program
    stop = tl.minimum(start + per_program, tiles)
    if given_ptr is not None:
        wanted = (tl.load(given_ptr) > 0.0) == 0
        if not SAVED:
            stop = tl.where(wanted, stop, start)
    of_h = tl.zeros([ROWS, COLS], dtype=tl.float32)
    of_gate = tl.zeros([ROWS, COLS], dtype=tl.float32)
    of_up = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for number in range(start, stop):
        row, col = tile_at(number, cols, ROWS, COLS)
        inside = within(row, col, rows, cols, ROWS, COLS)
        x = tl.load(pointers(gate_ptr, row, col, stride, ROWS, COLS), mask=inside, other=0.0).to(tl.float32)
        u = x
        if GATED:
            u = tl.load(pointers(up_ptr, row, col, stride, ROWS, COLS), mask=inside, other=0.0).to(tl.float32)
        if SAVED:
            of_gate = larger(of_gate, x)
            if GATED:
                of_up = larger(of_up, u)
        if HIDDEN:
            if wanted:
                of_h = larger(of_h, _hidden(x, u, inside, ACT, GATED, DTYPE))
    if HIDDEN:
        tl.store(partial_ptr + pid, tl.max(of_h))
    if SAVED:
        tl.store(partial_ptr + PARTIALS + pid, tl.max(of_gate))
        if GATED:
            tl.store(partial_ptr + 2 * PARTIALS + pid, tl.max(of_up))


@triton.jit
def finished(partial_ptr, partials, PLACE: tl.constexpr, PARTIALS: tl.constexpr, FMT_MAX: tl.constexpr,
             TOP_EXP: tl.constexpr, TOP_MAN: tl.constexpr, MARGIN: tl.constexpr, POW2: tl.constexpr):  # fmt: skip
    """The scale from the amaxes that the programs of an amax pass have found."""
    which = tl.arange(0, PARTIALS)
    amax = tl.max(tl.load(partial_ptr + PLACE * PARTIALS + which, mask=which < partials, other=0.0), 0)
    return _scale_of(amax, FMT_MAX, TOP_EXP, TOP_MAN, MARGIN, POW2)


@triton.jit
def scale_for(given_ptr, partial_ptr, partials, PLACE: tl.constexpr, PARTIALS: tl.constexpr, SCALE: tl.constexpr,
              CONSTANT: tl.constexpr, FMT_MAX: tl.constexpr, TOP_EXP: tl.constexpr, TOP_MAN: tl.constexpr,
              MARGIN: tl.constexpr, POW2: tl.constexpr):  # fmt: skip
    """SCALE: "constant", "current", "delayed" (0: none yet) or "ready" (delayed, and there)."""
    if SCALE == "constant":
        scale = tl.full((), CONSTANT, tl.float32)
    elif SCALE == "ready":
        scale = tl.load(given_ptr)
    elif SCALE == "delayed":
        given = tl.load(given_ptr)
        if given > 0.0:
            scale = given
        else:
            scale = finished(partial_ptr, partials, PLACE, PARTIALS, FMT_MAX, TOP_EXP, TOP_MAN, MARGIN, POW2)
    else:
        tl.static_assert(SCALE == "current")
        scale = finished(partial_ptr, partials, PLACE, PARTIALS, FMT_MAX, TOP_EXP, TOP_MAN, MARGIN, POW2)
    return scale


@triton.jit
def _tile_scale(x, FMT_MAX: tl.constexpr, TOP_EXP: tl.constexpr, TOP_MAN: tl.constexpr, MARGIN: tl.constexpr,
                POW2: tl.constexpr):  # fmt: skip
    """The scale from the finite amax of this tile, 0 beyond the end."""
    return _scale_of(tl.max(larger(tl.zeros_like(x), x)), FMT_MAX, TOP_EXP, TOP_MAN, MARGIN, POW2)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=SCALARS)
def _forward_kernel(
    gate_ptr, up_ptr, h_ptr, q_ptr, gate_q_ptr, up_q_ptr, given_ptr, partial_ptr, scale_ptr,
    gate_scale_ptr, up_scale_ptr, amax_ptr, counts_ptr,
    partials, tiles, rows, samples, sample_stride, cols, stride,
    ACT: tl.constexpr, SCALE: tl.constexpr, CONSTANT: tl.constexpr, FMT_MAX: tl.constexpr, HALF_TINY: tl.constexpr,
    TOP_EXP: tl.constexpr, TOP_MAN: tl.constexpr, MARGIN: tl.constexpr, POW2: tl.constexpr,
    SAVED: tl.constexpr, KEPT_CONSTANT: tl.constexpr, KEPT_MAX: tl.constexpr, KEPT_TOP_EXP: tl.constexpr,
    KEPT_TOP_MAN: tl.constexpr, KEPT_MARGIN: tl.constexpr, KEPT_POW2: tl.constexpr,
    REVERSE: tl.constexpr, PARTIALS: tl.constexpr, SAMPLES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """SCALE of h, SAVED of gate and up: where a scale comes from (`scale_for`); SAVED may be "tile", one for each."""
    DTYPE: tl.constexpr = gate_ptr.dtype.element_ty
    GATED: tl.constexpr = up_ptr is not None
    OBSERVE: tl.constexpr = amax_ptr is not None
    pid = tl.program_id(0)
    inverse = 1.0
    gate_inverse = 1.0
    up_inverse = 1.0
    if q_ptr is not None:
        scale = scale_for(given_ptr, partial_ptr, partials, 0, PARTIALS, SCALE, CONSTANT, FMT_MAX, TOP_EXP, TOP_MAN,
                          MARGIN, POW2)  # fmt: skip
        inverse = tl.div_rn(1.0, scale)
        if pid == 0:
            tl.store(scale_ptr, scale)
    if gate_q_ptr is not None and SAVED != "tile":
        scale = scale_for(None, partial_ptr, partials, 1, PARTIALS, SAVED, KEPT_CONSTANT, KEPT_MAX, KEPT_TOP_EXP,
                          KEPT_TOP_MAN, KEPT_MARGIN, KEPT_POW2)  # fmt: skip
        gate_inverse = tl.div_rn(1.0, scale)
        if pid == 0:
            tl.store(gate_scale_ptr, scale)
        if GATED:
            scale = scale_for(None, partial_ptr, partials, 2, PARTIALS, SAVED, KEPT_CONSTANT, KEPT_MAX, KEPT_TOP_EXP,
                              KEPT_TOP_MAN, KEPT_MARGIN, KEPT_POW2)  # fmt: skip
            up_inverse = tl.div_rn(1.0, scale)
            if pid == 0:
                tl.store(up_scale_ptr, scale)

    largest = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for step in range(pid, tiles, tl.num_programs(0)):
        number = step
        if REVERSE:
            number = tiles - 1 - step
        row, col = tile_at(number, cols, ROWS, COLS)
        inside = within(row, col, rows, cols, ROWS, COLS)
        x = tl.load(pointers(gate_ptr, row, col, stride, ROWS, COLS), mask=inside, other=0.0).to(tl.float32)
        u = x
        if GATED:
            u = tl.load(pointers(up_ptr, row, col, stride, ROWS, COLS), mask=inside, other=0.0).to(tl.float32)
        h = _hidden(x, u, inside, ACT, GATED, DTYPE)
        if h_ptr is not None:
            tl.store(pointers(h_ptr, row, col, cols, ROWS, COLS), h.to(DTYPE), mask=inside)
        if q_ptr is not None:
            codes = encode(h, inverse, q_ptr.dtype.element_ty, FMT_MAX)
            tl.store(pointers(q_ptr, row, col, cols, ROWS, COLS), codes, mask=inside)
        if OBSERVE:
            largest = larger(largest, h)
        if gate_q_ptr is not None:
            factor = gate_inverse
            if SAVED == "tile":
                own = _tile_scale(x, KEPT_MAX, KEPT_TOP_EXP, KEPT_TOP_MAN, KEPT_MARGIN, KEPT_POW2)
                tl.store(gate_scale_ptr + number, own)
                factor = tl.div_rn(1.0, own)
            codes = encode(x, factor, gate_q_ptr.dtype.element_ty, KEPT_MAX)
            tl.store(pointers(gate_q_ptr, row, col, cols, ROWS, COLS), codes, mask=inside)
            if GATED:
                factor = up_inverse
                if SAVED == "tile":
                    own = _tile_scale(u, KEPT_MAX, KEPT_TOP_EXP, KEPT_TOP_MAN, KEPT_MARGIN, KEPT_POW2)
                    tl.store(up_scale_ptr + number, own)
                    factor = tl.div_rn(1.0, own)
                codes = encode(u, factor, up_q_ptr.dtype.element_ty, KEPT_MAX)
                tl.store(pointers(up_q_ptr, row, col, cols, ROWS, COLS), codes, mask=inside)

    if OBSERVE:
        raise_amax(amax_ptr, tl.max(largest))
    if counts_ptr is not None:
        for first in range(pid * SAMPLES, samples, tl.num_programs(0) * SAMPLES):
            which = first + tl.arange(0, SAMPLES)
            seen = which < samples
            element = which.to(tl.int64) * sample_stride
            offset = (element // cols) * stride + element % cols
            x = tl.load(gate_ptr + offset, mask=seen, other=0.0).to(tl.float32)
            u = x
            if GATED:
                u = tl.load(up_ptr + offset, mask=seen, other=0.0).to(tl.float32)
            magnitude = tl.abs(_hidden(x, u, seen, ACT, GATED, DTYPE)) * inverse
            tally(counts_ptr, magnitude, seen, first, samples, FMT_MAX, HALF_TINY)


# --- launchers ------------------------------------------------------------------------------------------------------


class Policy(NamedTuple):
    """How one tensor is quantised; scale as in `scale_for`, constant: where it is "constant". `number` tells formats
    and rules apart quickly. tile, of gate and up only: (rows, columns) that share a scale, where `scale` is "tile"."""

    number: int
    dtype: torch.dtype
    constants: FormatConstants
    scale: str
    constant: float
    tile: tuple[int, int] | None = None


class Hidden(NamedTuple):
    """What happens to the codes of h; tensors as `ops.glu` takes them."""

    policy: Policy
    given: Tensor | None
    amax: Tensor | None
    counts: Tensor | None
    sample_stride: int


class Layout(NamedTuple):
    rows: int
    cols: int
    stride: int


NO_POLICY = Policy(-1, torch.float32, FormatConstants.of(1.0, 1.0, 0, False), "none", 1.0)
_amax = Launcher(_amax_kernel)
_forward = Launcher(_forward_kernel)


def layout_of(gate: Tensor, up: Tensor | None, matrix: bool = False) -> tuple[Tensor, Tensor | None, Layout]:
    """gate and up as the kernels take them: one row of everything where memory allows it and no `matrix` is needed."""
    width = gate.shape[-1]
    if (up is not None and gate.stride() != up.stride()) or gate.stride(-1) != 1:
        gate, up = gate.contiguous(), None if up is None else up.contiguous()
    if gate.is_contiguous():
        rows = gate.numel() // width if matrix else 1
        cols = gate.numel() // rows
        return gate, up, Layout(rows, cols, cols)
    try:
        view = gate.view(-1, width)
    except RuntimeError:  # leading dimensions that no single stride describes
        return layout_of(gate.contiguous(), None if up is None else up.contiguous(), matrix)
    return gate, up, Layout(view.shape[0], width, view.stride(0))


def flat_tile(layout: Layout) -> tuple[int, int]:
    """(rows, columns) of a tile that follows memory."""
    if layout.rows == 1:
        return 1, TILE
    cols = min(TILE, max(128, 1 << (layout.cols - 1).bit_length()))
    while cols > 256 and layout.cols % cols:  # no tile half beyond the end of its row
        cols //= 2
    return TILE // cols, cols


def is_tile(rows: int, cols: int) -> bool:
    """Whether programs take such tiles of gate and up."""
    powers = rows & (rows - 1) == 0 and cols & (cols - 1) == 0
    return powers and TILE // 4 <= rows * cols <= TILE


def warps_of(tile: tuple[int, int], tiled: bool) -> int:
    """Of a program. `tiled`, gate and up have a scale per tile: 8 elements a thread, as with 16 the forward kernel
    needs 128 registers (sm_90), with 8 half of them, and moves nothing between the layouts of loads and stores."""
    return tile[0] * tile[1] // 256 if tiled else WARPS


def tiles_of(rows: int, cols: int, tile: tuple[int, int]) -> int:
    return -(-rows // tile[0]) * -(-cols // tile[1])


def alignment(*tensors: Tensor | None) -> tuple[bool | None, ...]:
    return tuple(None if t is None else t.data_ptr() % 16 == 0 for t in tensors)


def forward(
    gate: Tensor, up: Tensor | None, act: str, *, write: bool, hidden: Hidden | None, kept: Policy | None
) -> list[Tensor]:
    """`ops.glu` on a GPU, for non-empty tensors and policies that `Policy` can express."""
    shape, device, numel, where = gate.shape, gate.device, gate.numel(), gate.get_device()
    policy = NO_POLICY if hidden is None else hidden.policy
    keep = NO_POLICY if kept is None else kept
    gate, up, layout = layout_of(gate, up, matrix=keep.tile is not None)
    rows, cols, stride = layout
    common = (act, gate.dtype, *alignment(gate, up), integer_key(cols), integer_key(stride))
    partial, partials = None, 0
    given = None if hidden is None else hidden.given
    delayed = policy.scale == "delayed"
    finds = delayed or policy.scale == "current"
    tile = keep.tile or flat_tile(layout)
    tiles = tiles_of(rows, cols, tile)
    if finds or keep.scale == "current":
        partials = min(PARTIALS, tiles)
        partial = torch.empty(3 * PARTIALS, dtype=torch.float32, device=device)
        saved = keep.scale == "current"
        _amax(
            (*common, tile, delayed, finds, saved), where, (partials, 1, 1),
            (gate, up, given if delayed else None, partial, tiles, -(-tiles // partials), rows, cols, stride,
             act, finds, saved, PARTIALS, *tile),
            num_warps=WARPS,
        )  # fmt: skip

    h = q = scale = gate_q = gate_scale = up_q = up_scale = amax = counts = None
    out: list[Tensor] = []
    sample_stride = 1
    if write:
        out.append(h := torch.empty(shape, dtype=gate.dtype, device=device))
    if hidden is not None:
        q = torch.empty((numel // shape[-1], shape[-1]), dtype=policy.dtype, device=device)
        out.extend((q, scale := torch.empty((), dtype=torch.float32, device=device)))
        amax, counts, sample_stride = hidden.amax, hidden.counts, hidden.sample_stride
    if kept is not None:
        gate_q = torch.empty(shape, dtype=kept.dtype, device=device)
        scales = () if kept.tile is None else (-(-rows // tile[0]), -(-cols // tile[1]))
        out.extend((gate_q, gate_scale := torch.empty(scales, dtype=torch.float32, device=device)))
        if up is not None:
            up_q = torch.empty(shape, dtype=kept.dtype, device=device)
            out.extend((up_q, up_scale := torch.empty(scales, dtype=torch.float32, device=device)))
    reverse = keep.scale == "current" or policy.scale == "current"
    _forward(
        (*common, tile, write, policy.number, policy.scale, keep.number, keep.scale, amax is None,
         counts is None, reverse),
        where, (min(tiles, PROGRAMS), 1, 1),
        (gate, up, h, q, gate_q, up_q, given, partial, scale, gate_scale, up_scale, amax, counts,
         partials, tiles, rows, -(-numel // sample_stride), sample_stride, cols, stride,
         act, policy.scale, policy.constant, *policy.constants, keep.scale, keep.constant, keep.constants.fmt_max,
         *keep.constants[2:], reverse, PARTIALS, SAMPLES, *tile),
        num_warps=warps_of(tile, keep.tile is not None),
    )  # fmt: skip
    return out
