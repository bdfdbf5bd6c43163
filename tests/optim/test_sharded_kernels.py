# SPDX-License-Identifier: Apache-2.0
"""Rows of FSDP2's shards in the kernels, beside others that run op by op: the bits of the truth, on two processes.

The kernels run in Triton's interpreter, so the processes are started with it, and Parameters on the CPU count as those
of a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import interpreter
import pytest
import torch
import torch.distributed as dist
from sharding import Pair, differing, everything, set_gradients, sharded
from torch import Tensor
from training import MAKE

from hf_lowprec.optim import GradientQuantizer, GradientSwap, base, fused
from hf_lowprec.presets import PRESETS

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")

BF16, F32 = torch.bfloat16, torch.float32
# Whole blocks, evenly and unevenly divided, all on one rank; rows that end within a block; a vector; few elements.
SHAPES = [(32, 256), (17, 256), (1, 4352), (41, 100), (5001,), (7, 13)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pytest.importorskip("triton")
    with mock.patch.dict("os.environ", {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}):
        pair = Pair(str(tmp_path_factory.mktemp("pair")))
        yield pair  # which starts its processes when it is called
    pair.stop()


_meet = base.LowPrecOptimizer._meet
_patched = False


def meet(self: Any, plan: Any, item: Any) -> None:
    _meet(self, plan, item)
    item.route = plan.route(item.param.device, fused.takes(self.algorithm, item))


def stepped(
    kernels: bool, name: str, dtype: torch.dtype, wired: bool, **options: Any
) -> tuple[dict[str, Tensor], int, list[bool]]:
    """Weights, states and mu after some steps, one with a bad gradient; skipped steps; whom kernels stepped."""
    global _patched
    if not _patched:
        interpreter.mend()
        _patched = True
    patches = [
        mock.patch.object(fused, "available", lambda device: True),
        mock.patch.object(base.LowPrecOptimizer, "_meet", meet if kernels else _meet),
        mock.patch.object(GradientQuantizer, "_have_kernels", lambda self, grads: kernels),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        bag = sharded(dtype, SHAPES)
        optimizer = MAKE[name](bag.parameters(), **options)
        quantizer = GradientQuantizer(PRESETS["fp8-lm"].communication, len(SHAPES))
        quantizer.k += torch.arange(len(SHAPES), dtype=torch.int32) * 400 - 500  # beyond 0 mu saturates
        if wired:
            GradientSwap(quantizer, {p: i for i, p in enumerate(bag.weights) if i != 1}).attach(optimizer)
        for step in range(4):
            set_gradients(bag, step)
            if step == 2 and dist.get_rank() == 1:
                bag.weights[0].grad.to_local()[-1, -1] = torch.nan
            optimizer.step()
        plan = optimizer._plan
        assert plan is not None
        routes = [plan.routes[item.route][1] for item in plan.items]
        return {**everything(bag, optimizer), **quantizer.state_dict()}, int(optimizer.skipped_steps), routes


BLOCKS = [True, True, True, False, True, True]  # where rows have whole ones


CASES = [
    ("AdamW", F32, {"states": "8bit"}, BLOCKS),
    ("AdamW", BF16, {"states": "8bit", "nonfinite": "element"}, BLOCKS),
    ("AdamW", BF16, {"states": "compact"}, BLOCKS),
    ("AdamW", BF16, {"states": "fp8-lm"}, [True] * 6),
    ("Lion", BF16, {"states": "fp8-lm"}, [True] * 6),
    ("SGD", F32, {"states": "bf16"}, [True] * 6),
    ("StableAdamW", F32, {"states": "8bit"}, [False] * 6),
]
QUICK = [(2, False), (3, True)]


@pytest.mark.parametrize(
    ("name", "dtype", "options", "routes", "wired"),
    [
        pytest.param(
            *case, wired, id="-".join([case[0], *case[2].values(), *["wired"][:wired]]),
            marks=() if (i, wired) in QUICK else pytest.mark.slow,
        )
        for i, case in enumerate(CASES)
        for wired in (False, True)
    ],
)  # fmt: skip
def test_two_ranks(
    pair: Pair, name: str, dtype: torch.dtype, options: dict[str, Any], routes: list[bool], wired: bool
) -> None:
    truth = pair(stepped, False, name, dtype, wired, **options)
    found = pair(stepped, True, name, dtype, wired, **options)
    for (expected, skipped, _), (values, also, taken) in zip(truth, found, strict=True):
        assert taken == routes
        assert not differing(expected, values)
        assert skipped == also == (0 if "nonfinite" in options else 1)
        assert values["count"].tolist() == ([4, 0, 4, 4, 4, 4] if wired else [0] * 6)
