# SPDX-License-Identifier: Apache-2.0
"""transformers' Conv1D (GPT-2): a linear layer whose weight is stored [in, out]. Imported only beside transformers."""

from __future__ import annotations

from transformers.pytorch_utils import Conv1D

from hf_lowprec.modules.flexible import FlexibleMixin
from hf_lowprec.modules.linear import LowPrecMixin


class LowPrecConv1D(LowPrecMixin, Conv1D):  # type: ignore[misc]
    """`Conv1D` whose GEMMs run in a recipe's formats. Made by `hf_lowprec.convert`, not by hand."""

    def extra_repr(self) -> str:
        return super().extra_repr().removeprefix(", ")


class FlexibleConv1D(FlexibleMixin, LowPrecConv1D):
    """`Conv1D` with searched or learned ranges (`modules.flexible`)."""
