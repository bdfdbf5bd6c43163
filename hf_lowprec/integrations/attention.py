# SPDX-License-Identifier: Apache-2.0
"""sdpa's backend: which one torch takes for this model and GPU, said in the report, and kept off a known wrong result.

From 2.11 on torch itself puts cuDNN first on Hopper and Blackwell (sm_90, sm_100) where the cuDNN beside it is newer
than 9.15, which is what a training step wants: 1.8 times the speed of flash attention on an H100. With an older cuDNN
torch leaves it last because of errors that were fixed then. So no priority is changed here. What is added, while a
converted model with sdpa lives on such a GPU, is a look at each call that transformers makes:

- an attention mask and a length that is an odd multiple of 64: cuDNN's backward returns NaN for the queries' gradient
  where all scores of a row are far below zero (pytorch/pytorch#196678, cuDNN 9.19 and 9.20; "massive activations" of
  small models reach it). Such calls leave cuDNN out, and torch takes its next backend that can do masks.
- one query token, i.e. decoding: cuDNN builds a plan of tens to hundreds of milliseconds for every new length, so
  `generate` would spend its time there. Left out as well.

Everything else, and everything on other GPUs, goes the way that torch chooses. The look sits in transformers' table of
attention functions under "sdpa", so it holds for every sdpa model of the process, until the last converted model is
reverted. `HF_LOWPREC_ATTENTION=0`, or `lowprec_attention=False`, leaves the table alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION_ENV = "HF_LOWPREC_ATTENTION"
_SDPA = "sdpa"
_NAMES = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN", SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient", SDPBackend.MATH: "math",
}  # fmt: skip
_WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

_guarded: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_original: Callable[..., Any] | None = None


def backend(model: nn.Module, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> SDPBackend | None:
    """What torch takes for unmasked self-attention of `model`'s heads on `device`; None: no sdpa, or heads unknown.

    dtype: of queries and keys, the base precision under autocast. Asks torch itself, with tensors of one short row.
    """
    config = next((c for m in model.modules() if (c := _sdpa_config(m)) is not None), None)
    if config is None or device.type != "cuda":
        return None
    heads, size = getattr(config, "num_attention_heads", None), getattr(config, "head_dim", None)
    hidden = getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(size or hidden, int):
        return None
    width = size or hidden // heads  # type: ignore[operator]
    with torch.enable_grad():
        row = torch.zeros(1, 1, 128, width, device=device, dtype=dtype, requires_grad=True)
        return SDPBackend(torch._fused_sdp_choice(row, row, row, is_causal=True))


def _sdpa_config(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config if getattr(config, "_attn_implementation", None) == _SDPA else None


def watch(model: nn.Module, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Look at the process's sdpa calls while `model` is converted. Returns a phrase for the report. Idempotent."""
    found = backend(model, device, dtype)
    if found is None:
        return None
    name = f"sdpa ({_NAMES.get(found, found.name.lower())})"
    if found is not SDPBackend.CUDNN_ATTENTION:
        return name
    _guarded.add(model)
    _install()
    return name


def unwatch(model: nn.Module) -> None:
    """The end of `watch`; the table is transformers' own again once no watched model is left."""
    global _original
    _guarded.discard(model)
    if _guarded or _original is None:
        return
    if ALL_ATTENTION_FUNCTIONS[_SDPA] is attention_forward:
        del ALL_ATTENTION_FUNCTIONS[_SDPA]  # the entry of this instance; the class's own shows again
        if ALL_ATTENTION_FUNCTIONS[_SDPA] is not _original:
            ALL_ATTENTION_FUNCTIONS[_SDPA] = _original
    _original = None


def _install() -> None:
    global _original
    if _original is None:
        _original = ALL_ATTENTION_FUNCTIONS[_SDPA]
        ALL_ATTENTION_FUNCTIONS[_SDPA] = attention_forward


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """transformers' function for sdpa, without cuDNN where that must not run. Same signature, same result."""
    forward = _original or ALL_ATTENTION_FUNCTIONS._global_mapping[_SDPA]
    masked = attention_mask is not None or kwargs.get("position_bias") is not None
    length = key.shape[2]
    if not ((masked and length % 128 == 64) or query.shape[2] == 1):
        return forward(module, query, key, value, attention_mask, **kwargs)
    if torch.compiler.is_compiling():
        with sdpa_kernel(_WITHOUT_CUDNN):
            return forward(module, query, key, value, attention_mask, **kwargs)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)  # two flags; sdpa_kernel reads and writes ten
    try:
        return forward(module, query, key, value, attention_mask, **kwargs)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
