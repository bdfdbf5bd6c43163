# SPDX-License-Identifier: Apache-2.0
"""The optimizers' kernels in Triton's interpreter, on any machine: bit for bit what `optim/algorithms.py` gives.

The interpreter must be chosen before Triton is imported, and would then run everybody's kernels. So the cases run in a
process of their own, one for the whole file, which is told their names; it is this file, run as a script.
"""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import interpreter
import pytest
import torch
from torch import nn

B, F, H = torch.bfloat16, torch.float32, torch.float16
STATES = ("8bit", "fp32", "fp8-lm", "compact", "bf16", "fp8", "4bit")
DTYPES = {"bf16": B, "fp32": F, "fp16": H}

# Name of the case: arguments of `check`. Tensors of fewer than 4096 elements have float32 moments; 4100 is no multiple
# of 8 or of a block; 5120 is one of the tiles (1024), 4608 of 512 and of nothing more.
CASES: dict[str, dict[str, Any]] = {
    **{f"AdamW {s} {name}": {"states": s, "dtypes": [dtype]} for s in STATES for name, dtype in DTYPES.items()},
    **{f"master {m}": {"states": "8bit", "master": m} for m in ("fp32", "fp16-scaled", "bf16+8", "bf16+16", None)},
    "master fp32 beside fp16": {"states": "fp32", "master": "fp32", "dtypes": [H]},
    "mixed dtypes and groups": {"sizes": [4100, 1, 17, 0], "dtypes": [B, F], "groups": True},
    "clip": {"clip": 0.37},
    "clip fp8-lm": {"states": "fp8-lm", "clip": 0.37},
    "clip that is NaN": {"clip": float("nan")},
    "one NaN": {"spoil": 1},
    "one NaN fp8-lm": {"states": "fp8-lm", "spoil": 1},
    "by element": {"spoil": 1, "nonfinite": "element", "dtypes": [B, F]},
    "by element compact": {"states": "compact", "spoil": 1, "nonfinite": "element"},
    "not contiguous": {"strided": True},
    "not aligned": {"skew": True},
    "maximize": {"maximize": True},
    "lr is a tensor": {"states": "fp8-lm", "lr": torch.tensor(1e-3)},
    "small eps": {"states": "fp8-lm", "eps": 1e-30},
    "betas of 0": {"betas": (0.0, 0.0)},
    "Adam L2": {"make": "Adam", "weight_decay": 0.1},
    "Adam L2 fp8-lm": {"make": "Adam", "states": "fp8-lm", "weight_decay": 0.1},
    **{f"Lion {s}": {"make": "Lion", "states": s, "sizes": [4100, 33]} for s in STATES},
    **{f"StableAdamW {s}": {"make": "StableAdamW", "states": s, "sizes": [4100, 33]} for s in STATES},
    **{
        f"SGD {s}": {"make": "SGD", "states": s, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01, "lr": 0.1}
        for s in STATES
    },
    "SGD nesterov": {"make": "SGD", "momentum": 0.9, "nesterov": True, "lr": 0.1},
    "SGD nesterov fp8-lm": {"make": "SGD", "states": "fp8-lm", "momentum": 0.9, "nesterov": True, "lr": 0.1},
    "SGD plain": {"make": "SGD", "lr": 0.1, "weight_decay": 0.1},
    "SGD plain fp8-lm": {"make": "SGD", "states": "fp8-lm", "lr": 0.1, "weight_decay": 0.1},
    # Gradients through the communication format, every other one.
    **{f"wired fp8-lm {name}": {"states": "fp8-lm", "wire": 1, "dtypes": [dtype]} for name, dtype in DTYPES.items()},
    "wired, several ranks, clip": {"states": "fp8-lm", "wire": 2, "clip": 0.37, "sizes": [5120, 4100, 33, 0]},
    "wired, one NaN": {"states": "fp8-lm", "wire": 1, "spoil": 1, "sizes": [5120, 4100, 33]},
    "wired, by element": {"wire": 1, "spoil": 1, "nonfinite": "element", "dtypes": [B, F]},
    "wired, not aligned": {"wire": 1, "skew": True},
    "wired, clip that is NaN": {"states": "fp8-lm", "wire": 1, "clip": float("nan")},
    "wired Lion": {"make": "Lion", "states": "fp8-lm", "wire": 1},
    "wired SGD": {"make": "SGD", "wire": 1, "momentum": 0.9, "lr": 0.1},
    "wired StableAdamW": {"make": "StableAdamW", "states": "fp8-lm", "wire": 1},
    # Shards: random words go by the place in the whole tensor, scales by its gradient's amax.
    "part": {"start": 5000},
    "part of a large tensor": {"start": 2**32 - 2000, "dtypes": [B, F]},
    **{f"part {s}": {"states": s, "start": 5120 * 2**21} for s in ("fp8-lm", "compact", "bf16")},
    "part fp8-lm, not aligned": {"states": "fp8-lm", "start": 777},
    # The new Parameters' amax.
    **{f"amax {s}": {"states": s, "amax": True, "dtypes": [B, F, H], "sizes": [4100, 33]} for s in ("8bit", "fp8-lm")},
    "amax compact": {"states": "compact", "amax": True, "wire": 1},
    "amax master fp32": {"master": "fp32", "amax": True, "dtypes": [B, H]},
    "amax, one NaN": {"amax": True, "spoil": 1, "dtypes": [B, F]},
    # Parameters that somebody edits before the second step, all of them sampled and not just the large ones.
    **{
        f"edited by {how}, {master}": {"states": states, "master": master, "edit": how, **options}
        for how in ("copy_", "item", "data", "row", "unseen", "nobody")
        for master, states, options in (
            ("default", "fp8-lm", {}),
            ("fp32", "8bit", {"dtypes": [B, H]}),
            ("fp16-scaled", "8bit", {"skew": True}),
        )
    },
    "edited by item in a skipped step": {"states": "fp8-lm", "edit": "item", "spoil": 1},
    "edited by data in a skipped step": {"states": "fp8-lm", "edit": "data", "spoil": 1},
    "edited by row, by element": {"master": "fp32", "edit": "row", "nonfinite": "element", "spoil": 2},
    "edited by item, by element": {"master": "fp32", "edit": "item", "nonfinite": "element", "spoil": 1},
    "edited by data, wired": {"states": "fp8-lm", "edit": "data", "wire": 1, "amax": True},
    "edited by data, L2": {"make": "Adam", "states": "fp8-lm", "edit": "data", "weight_decay": 0.1},
    "edited by data, strided": {"states": "fp8-lm", "edit": "data", "strided": True},
    "edited by data, Lion": {"make": "Lion", "states": "fp8-lm", "edit": "data"},
    "edited by data, part": {"states": "fp8-lm", "edit": "data", "start": 5120},
    "edited by item, large and small": {"states": "fp8-lm", "edit": "item", "sizes": [65537, 300], "above": 1 << 16},
    "amax Lion, eps of 0": {"make": "Lion", "amax": True},
    # Gradients clipped to a norm, which the look before the step finds.
    **{f"norm {name}": {"norm": 0.02, "sizes": [40000, 33], "dtypes": [dtype]} for name, dtype in DTYPES.items()},
    "norm, mixed": {"norm": torch.tensor(0.02), "sizes": [16384, 1, 0, 16385], "dtypes": [B, F], "groups": True},
    "norm, none": {"norm": 0.02, "sizes": [0]},
    "norm, beyond": {"norm": 1e300},
    "norm, not aligned": {"norm": 0.02, "sizes": [33000, 17], "skew": True},
    "norm, not contiguous": {"norm": 0.02, "strided": True},
    "norm, one NaN": {"norm": 0.02, "spoil": 1, "states": "fp8-lm"},
    "norm, by element": {"norm": 0.02, "spoil": 1, "nonfinite": "element", "dtypes": [B, F]},
    "norm fp8-lm, amax": {"norm": 0.02, "states": "fp8-lm", "amax": True},
    "norm StableAdamW": {"norm": 0.02, "make": "StableAdamW", "sizes": [4100, 33]},
    "norm Lion": {"norm": 0.02, "make": "Lion", "states": "compact"},
    "norm SGD": {"norm": 0.02, "make": "SGD", "momentum": 0.9, "lr": 0.1},
    "norm, wired": {"norm": 0.02, "states": "fp8-lm", "wire": 2, "sizes": [5120, 4100, 33, 0], "amax": True},
    "norm, wired, by element": {"norm": 0.02, "wire": 1, "spoil": 1, "nonfinite": "element", "dtypes": [B, F]},
    **{
        f"norm, edited by {how}": {"norm": 0.02, "states": "fp8-lm", "edit": how} for how in ("item", "data", "unseen")
    },
    "norm, more sums than a row": {"norm": 0.02, "sizes": [5 * 16384 + 5, 2 * 16384], "states": "fp32", "rows": 2},
}
CASES["AdamW compact fp16"]["master"] = "sr"  # a residual needs bfloat16
# The same for optimizers without kernels: arguments of `check_exchange`.
EXCHANGES: dict[str, dict[str, Any]] = {
    "exchange": {},
    "exchange, several ranks": {"ranks": 2},
    "exchange, one NaN": {"spoil": 1},
    "exchange, not aligned": {"skew": True},
    "exchange, one size at the maximum": {"flat": True},
    "exchange, halves on two ranks": {"ranks": 2, "halves": True},
}
QUICK = (
    *(f"AdamW {s} bf16" for s in STATES), "AdamW 8bit fp32", "AdamW 8bit fp16", "master bf16+16",
    "mixed dtypes and groups", "clip", "one NaN", "by element", "not contiguous", "not aligned", "Adam L2",
    "Lion 8bit", "StableAdamW 8bit", "SGD 8bit", "SGD plain", "wired fp8-lm bf16", "wired, several ranks, clip",
    "wired, one NaN", "wired, by element", "part", "part fp8-lm", "amax 8bit", "amax compact", "amax, one NaN",
    *(f"edited by {how}, default" for how in ("copy_", "item", "data", "row", "unseen")), "edited by row, fp32",
    "edited by item in a skipped step", "edited by item, by element", "edited by data, wired",
    *(f"norm {name}" for name in DTYPES), "norm, mixed", "norm, one NaN", "norm, wired", "norm, edited by data",
)  # fmt: skip


# --- the process that interprets ------------------------------------------------------------------------------------


def parameters(
    sizes: list[int], dtypes: list[torch.dtype], *, strided: bool = False, skew: bool = False
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    out = []
    for size in sizes:
        values = torch.randn(size + skew, generator=generator) * 0.02
        out += [nn.Parameter(values.to(dtype)[int(skew) :]) for dtype in dtypes]
    if strided:
        out.append(nn.Parameter((torch.randn(65, 70, generator=generator) * 0.02).to(dtypes[0]).t()))
    return out


def set_gradients(params: list[nn.Parameter], step: int, spoil: int | None) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        grad = torch.randn(p.shape, generator=generator) * 0.01
        p.grad = (grad * 10.0 ** torch.randn(p.shape, generator=generator)).to(p.dtype)
    if spoil == step:
        params[0].grad.view(-1)[5] = float("nan")
        params[-1].grad.view(-1)[3] = float("inf")


def check(
    make: str = "AdamW", states: str = "8bit", *, sizes: list[int] | None = None,
    dtypes: list[torch.dtype] | None = None, clip: float | None = None, spoil: int | None = None,
    groups: bool = False, strided: bool = False, skew: bool = False, wire: int = 0, amax: bool = False, start: int = 0,
    edit: str = "", above: int = 0, norm: Any = None, rows: int = 0, **options: Any,
) -> None:  # fmt: skip
    """Two steps of the truth and of the kernels; AssertionError names what differs.

    wire: gradients pass through the communication format, as of one of so many ranks. amax: of the new Parameters.
    start: where the tensors lie in whole ones, whose gradients are ten times as large elsewhere.
    edit: see `edited`; three steps then, and tensors of more than `above` elements are sampled.
    norm: what gradients are clipped to. rows: sums of chunks that are added at a time.
    """
    from hf_lowprec import optim
    from hf_lowprec.kernels import optimizer as tables_module
    from hf_lowprec.kernels.optimizer import Tables
    from hf_lowprec.kernels.triton import prepare
    from hf_lowprec.optim import clipping, fused

    made, quantizers = [], []
    sets = []
    for _ in range(2):
        params = parameters(sizes or [5120, 4100], dtypes or [B], strided=strided, skew=skew)
        halves: list[Any] = [{"params": params[::2], "weight_decay": 0.0}, {"params": params[1::2], "lr": 3e-3}]
        sets.append((params, getattr(optim, make)(halves if groups else params, states=states, **options)))
        if wire:
            quantizers.append(wired(*sets[-1], wire))
    kernels = fused.Fused(sets[1][1])
    if amax:
        sets[1][1].note_amax()
    factor = None if clip is None else torch.tensor(clip)
    if edit:
        tables_module.SAMPLED_ABOVE = above
    if norm is not None:
        tables_module.NORM_BLOCK = clipping.ROW = rows or 8192
    for step in range(3 if edit else 2):
        for which, (params, _) in enumerate(sets):
            if step == 1:
                edited(params, edit, kernels=which == 1)
            set_gradients(params, step, spoil)
        amaxes = None
        if norm is not None:
            total = sets[0][1].clip_grad_norm_(norm)
            assert sets[0][1]._waiting is not None
            share = sets[0][1]._waiting.look.factor
        if start:
            amaxes = step_of_parts(sets[0][1], start)
        else:
            sets[0][1].step(clip=factor)
        optimizer = sets[1][1]
        items = optimizer._collect()
        for item in items:
            item.start = start
        with mock.patch.object(fused, "Tables", lambda *args, **more: made.append(Tables(*args, **more)) or made[-1]):
            if norm is not None:
                look = kernels.look(optimizer.algorithm, items, optim.base._limit(norm, torch.device("meta")))
                same_bits(look.norm, total, f"step {step}: norm")
                same_bits(look.factor, share, f"step {step}: factor")
                kernels.step(optimizer.algorithm, items, look.factor, None, None, look)
                assert made[0]._last is not None, "launches with a factor of ours are kept"
                assert not any(one.bound._kernel is prepare.amax_kernel for one in made[0]._last[1]), "a second look"
            else:
                kernels.step(optimizer.algorithm, items, factor, torch.tensor(True) if start else None, amaxes)
        optimizer._release(items)
        compare(*sets, where=f"step {step}")
        if amax:
            found = [p.detach().float() for p in sets[1][0]]
            largest = [x[x.isfinite()].abs().amax().item() if x.isfinite().any() else 0.0 for x in found]
            noted = [kernels.weight_amax(p) for p in sets[1][0]]
            assert noted == largest, f"step {step}: {noted}, not {largest}"
        for name in ("k", "saturated", "count") if wire else ():
            a, b = (getattr(quantizer, name).tolist() for quantizer in quantizers)
            assert a == b, f"step {step}: {name} is {b}, not {a}"
    assert len(made) == 1 and made[0].wired == bool(wire)


def same_bits(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert found.dtype == expected.dtype == torch.float32 and found.shape == expected.shape == ()
    both = bool(found.isnan() & expected.isnan())
    assert both or torch.equal(found.view(torch.int32), expected.view(torch.int32)), f"{what} {found}, not {expected}"


def edited(params: list[nn.Parameter], how: str, *, kernels: bool) -> None:
    """Writes to Parameters. item: one element, outside of the sample, by an operator that torch counts. unseen: the
    same through `.data`, which goes unnoticed: the truth, which would see it, is not told, and has the same bits."""
    with torch.no_grad():
        for p in params:
            if how == "copy_":
                p.copy_(p * 1.5)
            elif how == "item":
                p.view(-1)[40:41] = 0.0625
            elif how == "data":
                p.data.mul_(1.5)
            elif how == "row":
                p.data.view(-1)[1000:2121] = 0.0625
            elif how == "unseen" and kernels:
                p.data.view(-1)[40] = 0.0625


def step_of_parts(optimizer: Any, start: int) -> torch.Tensor:
    """A step of the truth of tensors that begin there in whole ones; returns the amaxes of the gradients of those."""
    from hf_lowprec.optim import algorithms

    items = optimizer._collect()
    for item in items:
        item.start = start
    amaxes = 10.0 * algorithms.gradient_amax(items)
    algorithms.step(optimizer.algorithm, items, amax=amaxes, clip=None, finite=torch.tensor(True))
    optimizer._release(items)
    return amaxes


def wired(params: list[nn.Parameter], optimizer: Any, ranks: int) -> Any:
    """Has every other gradient quantised; mu is somewhere on its way."""
    from hf_lowprec.optim.gradient import GradientQuantizer, GradientSwap
    from hf_lowprec.presets import PRESETS

    index = {p: i for i, p in enumerate(params[::2])}
    communication = PRESETS["fp8-lm"].communication
    assert communication is not None
    quantizer = GradientQuantizer(communication, len(index), world_size=ranks)
    quantizer.k += torch.arange(len(index), dtype=torch.int32) * 377 - 5 if ranks == 1 else 1234
    GradientSwap(quantizer, index).attach(optimizer)
    return quantizer


def check_exchange(
    *, ranks: int = 1, spoil: int | None = None, skew: bool = False, flat: bool = False,
    halves: bool = False,
) -> None:  # fmt: skip
    """Three rounds of `Exchange` and of `quantize_all`, op by op. halves: the former has the first halves only, and is
    told what there is to be seen of the others."""
    from hf_lowprec.kernels.wires import AMAX, EXTREMES, FINITE, SEEN, Exchange

    params = parameters([4608, 4100, 0, 1, 33], [B, F, H], skew=skew)
    truth, found = (wired([p for p in params for _ in "ab"], mock.Mock(swaps=[]), ranks) for _ in range(2))
    found.load_state_dict(truth.state_dict())
    count = len(params)
    wires = [found.wire(i, p.numel()) for i, p in enumerate(params)]
    other = wired([p for p in params for _ in "ab"], mock.Mock(swaps=[]), ranks)  # a rank that has it all
    whole = Exchange([p.detach() for p in params], [other.wire(i, p.numel()) for i, p in enumerate(params)])
    exchange = Exchange([cut(p.detach(), halves) for p in params], wires)
    seen = torch.zeros(count, SEEN, dtype=torch.int32)

    def between(mine: torch.Tensor) -> None:
        assert bool((mine <= seen).all())
        mine[:, [AMAX, FINITE]] = seen[:, [AMAX, FINITE]]

    def after(mine: torch.Tensor) -> None:
        assert bool((mine[:, EXTREMES] <= seen[:, EXTREMES]).all())
        mine[:, EXTREMES] = seen[:, EXTREMES]

    meeting = {"between": between, "after": after} if halves else {}
    for step in range(3):
        set_gradients(params, step, spoil)
        if flat:  # the paper's reason to halve mu, and twice a gradient of zeros
            params[0].grad.fill_(448.0)
            params[1].grad.zero_()
        grads = [p.grad for p in params]
        whole.run(grads, after=seen.copy_)
        mine = [cut(grad, halves) for grad in grads]
        ours = exchange.run([grad.clone() for grad in mine] if step == 1 and not skew else mine, **meeting)
        theirs = {i: cut(grad, halves) for i, grad in truth.quantize_all(dict(enumerate(grads))).items()}
        for i, grad in enumerate(ours):
            assert grad.dtype == theirs[i].dtype and grad.shape == theirs[i].shape
            assert torch.equal(grad.isnan(), theirs[i].isnan()), f"step {step}, gradient {i}: NaN elsewhere"
            a, b = (x.nan_to_num(0.5).view(torch.int32 if x.itemsize == 4 else torch.int16) for x in (theirs[i], grad))
            wrong = (a != b).nonzero().flatten().tolist()
            assert not wrong, f"step {step}, gradient {i} {grad.dtype}: {len(wrong)} differ, at {wrong[:3]}"
        for name in ("k", "saturated", "count"):
            assert torch.equal(getattr(truth, name), getattr(found, name)), f"step {step}: {name}"
    assert bool(found.saturated.any()) == flat or ranks > 1


def cut(grad: torch.Tensor, halves: bool) -> torch.Tensor:
    return grad[: grad.numel() // 2] if halves else grad


def compare(truth: Any, found: Any, where: str) -> None:
    for i, (a, b) in enumerate(zip(truth[0], found[0], strict=True)):
        theirs, ours = {"param": a, **truth[1].state[a]}, {"param": b, **found[1].state[b]}
        assert theirs.keys() == ours.keys()
        for name, x in theirs.items():
            x, y = x.detach().contiguous(), ours[name].detach().contiguous()
            integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]
            wrong = (x.view(integer) != y.view(integer)).flatten().nonzero().flatten()
            assert not len(wrong), (
                f"{where}, tensor {i} {tuple(a.shape)} {a.dtype}, {name}: {len(wrong)} of {x.numel()} differ, "
                f"at {wrong[:3].tolist()}: {y.float().flatten()[wrong[:3]].tolist()}, "
                f"not {x.float().flatten()[wrong[:3]].tolist()}"
            )
    for name in ("skipped_steps", "skipped_elements"):
        assert int(getattr(truth[1], name)) == int(getattr(found[1], name)), f"{where}: {name}"


def serve() -> None:
    """Reads names of cases, answers with an error or null, until there is no more input."""
    from hf_lowprec.kernels import optimizer

    interpreter.mend()
    torch.set_num_threads(1)
    sampled_above = optimizer.SAMPLED_ABOVE
    for line in sys.stdin:
        error = None
        try:
            name = json.loads(line)
            optimizer.SAMPLED_ABOVE = sampled_above
            if name in EXCHANGES:
                check_exchange(**EXCHANGES[name])
            else:
                check(**CASES[name])
        except Exception:
            error = traceback.format_exc()
        print(json.dumps(error), flush=True)


# --- the tests ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[[str], str | None]]:
    """Runs a case in the interpreter; its error, or None."""
    pytest.importorskip("triton")
    command = [sys.executable, __file__]
    with subprocess.Popen(
        command,
        env=interpreter.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def ask(name: str) -> str | None:
            process.stdin.write(json.dumps(name) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            return json.loads(answer) if answer else f"the interpreting process died: {process.wait()}"

        yield ask
        process.stdin.close()


@pytest.mark.parametrize(
    "case", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_kernels_give_the_bits_of_the_truth(interpreted: Callable[[str], str | None], case: str) -> None:
    error = interpreted(case)
    assert error is None, error


@pytest.mark.parametrize("case", EXCHANGES)
def test_gradients_for_other_optimizers(interpreted: Callable[[str], str | None], case: str) -> None:
    error = interpreted(case)
    assert error is None, error


def test_every_quick_case_exists() -> None:
    assert set(QUICK) <= CASES.keys()


if __name__ == "__main__":
    serve()
