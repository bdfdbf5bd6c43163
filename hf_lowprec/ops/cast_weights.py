# SPDX-License-Identifier: Apache-2.0
"""Many weights cast at once into memory that is there: after an optimizer step, for all layers (`modules.emission`).

No operator: nobody traces it. `PlainTable` is the truth, in plain torch; `kernels.cast_weights.WeightTable`, of the
same methods, runs in a launch or two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowprec.ops.quantize import default_cast_transpose, padded, parse_quant, storage_dtype


class WeightCast(NamedTuple):
    """One weight and where its cast goes, all on one device.

    weight: [R, C] contiguous. quant: the policy (`quant_key`). given: the delayed scale, 0-dim float32, or None as in
    `ops.quantize`. amax: the weight's finite amax, 0-dim float32, where somebody knows it.
    qdata: [R, C], transposed: [C, R rounded up to 16] or None, scale: 0-dim float32, as `ops.cast_transpose` returns
    them.
    """

    weight: Tensor
    quant: str
    given: Tensor | None
    amax: Tensor | None
    qdata: Tensor
    transposed: Tensor | None
    scale: Tensor


def new_copies(weight: Tensor, quant: str, *, transposed: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Memory for `qdata`, `transposed` and `scale`."""
    (r, c), dtype = weight.shape, storage_dtype(parse_quant(quant).format)
    return (
        torch.empty((r, c), dtype=dtype, device=weight.device),
        torch.empty((c, padded(r)), dtype=dtype, device=weight.device) if transposed else None,
        torch.empty((), dtype=torch.float32, device=weight.device),
    )


class PlainTable:
    """The truth. finds_amax: casts need not name theirs."""

    finds_amax = True

    @staticmethod
    def takes(weight: Tensor, quant: str) -> bool:
        """Whether `run` casts such a weight [R, C] by this policy, whose granularity is the tensor."""
        policy = parse_quant(quant)
        return (
            weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and weight.is_contiguous()
            and storage_dtype(policy.format).is_floating_point
            and policy.scaling.store == "float32"
            and policy.rounding.mode == "nearest"
        )

    def run(self, casts: Sequence[WeightCast], counts: Tensor, seen: Tensor) -> None:
        """Casts all. counts: int64 [casts, 4], seen: float32 [casts]: what each cast adds to its layer's counters, and
        with delayed scaling the weight's finite amax; overwritten."""
        counts.zero_()
        for cast, count, amax in zip(casts, counts.unbind(), seen.zero_().unbind(), strict=True):
            delayed = parse_quant(cast.quant).scaling.method == "delayed"
            qdata, transposed, scale = default_cast_transpose(
                cast.weight, cast.quant, cast.given, False, amax if delayed else None, count, None, False, cast.amax,
                True, cast.transposed is not None,
            )  # fmt: skip
            cast.qdata.copy_(qdata)
            cast.scale.copy_(scale)
            if cast.transposed is not None:
                cast.transposed.copy_(transposed)
