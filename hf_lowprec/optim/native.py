# SPDX-License-Identifier: Apache-2.0
"""Steps on the CPU in C++: `8bit` states, one block after another (`native.cpp`), with the bits of the truth.

What torch.compile makes of the truth takes its time in look-ups: it loads the elements of a vector one at a time, and
goes over a slice ten times. A loop that a C++ compiler sees as a whole gathers, and a block never leaves the cache:
half the time. It is compiled where it runs, in half a second, for each combination of dtypes and options that a step
of blocks has; scalars are arguments. Threads are Python's: a call of C waits for nobody.

It has the codes of `inplace` (8 bits in blocks, rounded to nearest by a table) under `adam`, `lion` and `sgd`, on
float32 Parameters and on bfloat16 ones that are rounded stochastically. The rest is torch.compile's.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_lowprec.numerics.hashing import seed_keys
from hf_lowprec.optim import inplace
from hf_lowprec.optim import states as st
from hf_lowprec.optim.bounds import coupled
from hf_lowprec.recipe import Rounding

if TYPE_CHECKING:
    from hf_lowprec.optim.algorithms import Item

_SOURCE = Path(__file__).with_suffix(".cpp")
# Nothing that changes a result: no contraction, no other order, and subnormal numbers stay.
_OPTIONS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC")
_EXACT = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_DTYPES = {torch.float32: "FLOAT", torch.bfloat16: "BFLOAT16"}
_SCALARS = ("sign", "wd", "decay", "lr", "b2", "omb1", "omb2", "alpha", "rbc2", "eps", "momentum", "damped")
_ALL_BITS = Rounding(mode="stochastic")
_SHARE = 1 << 15  # elements, 0.1 ms, below which another thread does not pay


class _Scalars(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in _SCALARS]


class _Moment(ctypes.Structure):
    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("words", ctypes.c_void_p),
        ("top", ctypes.c_float),
        ("nonzero", ctypes.c_int32),
    ]


def compilers() -> list[str]:
    """Names that a C++ compiler may have, as torch.compile has them."""
    return [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++", "cl"]


def compiler() -> str | None:
    """The first of them that is there."""
    return next((name for name in compilers() if shutil.which(name)), None)


def covers(algorithm: str, item: Item) -> bool:
    """Whether `stepper` has this item, where all its gradients are finite."""
    if not item.moments or not inplace.covers(algorithm, item) or os.name == "nt":  # `cl` has other options
        return False
    codecs = [quant and inplace.codec_of(quant) for quant in map(item.quant, item.moments)]
    if None in codecs or len({codec.block for codec in codecs if codec}) > 1:
        return False
    param, grad = item.param.dtype, item.grad.dtype
    rounded = param == torch.bfloat16 and "master" not in item.slots and item.states.update == _ALL_BITS
    return grad in _DTYPES and (param == torch.float32 or rounded)


def stepper(algorithm: str, item: Item, s: dict[str, Any], clip: Tensor | None) -> Callable[[Item], None]:
    """What `algorithms.update` does with slices of `item`, which are whole blocks and contiguous."""
    group = item.group
    codecs = [codec for quant in map(item.quant, item.moments) if quant and (codec := inplace.codec_of(quant))]
    block = codecs[0].block
    function = _function(
        f"ALGORITHM={algorithm.upper()}",
        f"BLOCK={block}",
        f"WEIGHT={_DTYPES[item.param.dtype]}",
        f"GRADIENT={_DTYPES[item.grad.dtype]}",
        f"COUPLED={int(coupled(algorithm, group) and group['weight_decay'] != 0)}",
        f"NESTEROV={int(group.get('nesterov', False))}",
    )
    scalars = _Scalars(**{name: float(value) for name, value in s.items() if name in _SCALARS})
    scalars.sign = (-1.0 if group["maximize"] else 1.0) * (1.0 if clip is None else float(clip))
    if not group["weight_decay"] or not group.get("decoupled_weight_decay", True):
        scalars.decay = 1.0
    seed = st.stream_seed(item.states.update, item.index, "parameter", item.state["step"] + 1)
    keys = (0, 0) if seed is None else seed_keys(int(seed))
    threads = torch.get_num_threads()

    def step(part: Item) -> None:
        numel, grad = part.param.numel(), part.grad.contiguous()
        moments = (_Moment * 2)(*map(functools.partial(_moment, part), part.moments, codecs))
        shares = max(1, min(threads, numel // _SHARE))
        cuts = [numel // block * i // shares for i in range(shares + 1)]

        def run(first: int, last: int) -> None:
            function(part.param.data_ptr(), grad.data_ptr(), moments, scalars, first, last, part.start, *keys)

        others = [_pool(threads - 1).submit(run, *cut) for cut in pairwise(cuts[1:])]
        run(*cuts[:2])
        for other in others:
            other.result()
        torch.autograd.graph.increment_version(part.param)  # so that a backward that saved it complains

    return step


def _moment(part: Item, name: str, codec: inplace.Codec) -> _Moment:
    tensors = part.state[f"{name}_qdata"], part.state[f"{name}_scale"], codec.values, codec.words.words
    return _Moment(*(tensor.data_ptr() for tensor in tensors), codec.top, codec.nonzero)


@functools.cache
def _function(*defines: str) -> Any:
    """`step` of native.cpp. Raises RuntimeError: it does not compile."""
    options = [*_OPTIONS, *_EXACT]
    if platform.machine().lower() in ("x86_64", "amd64"):  # there, gathers of 8 are faster than of 16
        options.append("-mprefer-vector-width=256")
    with tempfile.TemporaryDirectory(prefix="hf_lowprec_") as folder:
        library = os.path.join(folder, "step.so")
        command = [str(compiler()), *options, *(f"-D{define}" for define in defines), str(_SOURCE), "-o", library]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            raise RuntimeError(f"compile=True: {' '.join(command)} failed:\n{built.stderr}")
        function = ctypes.CDLL(library).step  # the file may go, the mapping stays
    function.restype = None
    function.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(_Moment), ctypes.POINTER(_Scalars),
        ctypes.c_int64, ctypes.c_int64, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32,
    ]  # fmt: skip
    return function


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="hf_lowprec")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # its threads are the parent's
