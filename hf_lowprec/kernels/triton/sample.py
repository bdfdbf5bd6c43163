# SPDX-License-Identifier: Apache-2.0
"""Parameters that follow a master, and whether somebody edited them where no host can see it.

A step need not read such a Parameter: it is its master's cast, unless it was edited. Edits that torch counts
(`_version`) the host knows of. For all others, one run of 32 elements of every 1024, 64 bytes of a 16-bit Parameter,
is compared with the master's cast before the step; where one differs, the step reads the whole tensor. Runs move from
tile to tile, so that columns of a matrix meet them, too: the next one begins at most 1120 elements further.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_lowprec.kernels.triton.codecs import from_float
from hf_lowprec.kernels.triton.columns import (
    S_COLUMNS,
    S_EDITED,
    T_COLUMNS,
    T_FOLLOWS,
    T_MASTER,
    T_MASTER_SCALE,
    T_PARAM,
    chunk_of,
    left_of,
)
from hf_lowprec.kernels.triton.tiles import cast_to

_TILE, _RUN = tl.constexpr(1024), tl.constexpr(32)


@triton.jit
def note_edited(row, scalars, number, left, CHUNK: tl.constexpr):
    """Raises S_EDITED of a tensor if a sampled element of this chunk is not the cast of its master, bit for bit.

    scalars: the tensor's. To be called before `prepare_kernel` gives the master its new scale."""
    how = tl.load(row + T_FOLLOWS).to(tl.int32) - 1
    if how >= 0:
        tile = tl.arange(0, CHUNK // _TILE)[:, None]
        whole = number * (CHUNK // _TILE) + tile
        run = ((whole + (whole >> 5) + (whole >> 10)) & (_TILE // _RUN - 1)).to(tl.int32)
        inside = tile * _TILE + run * _RUN + tl.arange(0, _RUN)[None, :]
        there = inside < left
        param = tl.load(row + T_PARAM).to(tl.pointer_type(tl.int16)) + number * CHUNK
        found = tl.load(param + inside, mask=there, other=0).to(tl.int32)
        base = tl.load(row + T_MASTER)
        if how < 2:
            master = tl.load(base.to(tl.pointer_type(tl.float32)) + number * CHUNK + inside, mask=there, other=0.0)
        else:
            codes = base.to(tl.pointer_type(tl.int16)) + number * CHUNK
            scale = tl.load(tl.load(row + T_MASTER_SCALE).to(tl.pointer_type(tl.float32)))
            master = from_float(tl.load(codes + inside, mask=there, other=0).to(tl.int32), "fp16") * scale
        cast = tl.where((how & 1) != 0, cast_to(master, "fp16"), cast_to(master, "bf16"))
        edited = tl.where(there, (found ^ cast) & 0xFFFF, 0)
        if tl.max(tl.max(edited, 1), 0) != 0:
            tl.store(scalars + S_EDITED, 1)


@triton.jit
def sample_kernel(chunks, table, scalars, CHUNK: tl.constexpr):
    """`note_edited` of one chunk, for steps without a look at all gradients, which does the same by the way."""
    tensor, _careful, number = chunk_of(chunks)
    row = table + tensor * T_COLUMNS
    note_edited(row, scalars + tensor * S_COLUMNS, number, left_of(row, number, CHUNK), CHUNK)
