# SPDX-License-Identifier: Apache-2.0
"""Output embedding and loss in one, through liger-kernel: logits of a training step are not stored. Opt-in.

    LowPrecTrainingArguments(lowprec_liger=True), HF_LOWPREC_LIGER=1, LowPrecConfig(..., liger=True), fuse_loss(model)

A causal language model multiplies its hidden states with the output embedding and hands the logits to
`model.loss_function`. Logits are the largest tensor of a step: tokens x vocabulary in 16 bits, once more in float32.
Here the output embedding returns `DeferredLogits`, a tensor without memory that knows its two factors, and a loss
function that is handed one computes loss and gradients from the factors, some thousand tokens at a time. Whoever else
looks at the logits gets them: any operation on them computes them first, as the stock model does, with gradients. So
soft-capped or scaled logits (Gemma 2, Granite), a custom loss, TRL's token accuracy stay correct, but win nothing;
where more than a quarter of the steps are read like that, the stock loss comes back and a warning says so.

Why not by default: liger-kernel synchronises with the host twice a step, and with a large vocabulary over a narrow
hidden size its small GEMMs cost more time than the stock loss. Models are recognised by what they have, not by name:
`get_output_embeddings()` is a plain nn.Linear and `loss_function` is transformers' ForCausalLMLoss.

In effect in training on a GPU, in bfloat16 and float32 (sums in float16 could overflow), in eager mode; torch.compile
fuses the stock loss itself. Not under FSDP, DeepSpeed ZeRO-3 and tensor parallelism, where weights are whole during
the layer's own forward only.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_map
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_lowprec.modules.linear import forward_is_replaced, set_class

LIGER_ENV = "HF_LOWPREC_LIGER"
FUSED = "fused with the output embedding by liger-kernel, logits on demand"
_STATE = "_lowprec_loss"
_DTYPES = (torch.bfloat16, torch.float32)
_steps = 0  # optimizer steps of this process: deferred logits of before would see other weights


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


class LossState:
    """How often the logits of one output embedding were deferred, and how often somebody wanted them."""

    def __init__(self) -> None:
        self.deferred = 0
        self.read = 0
        self.enabled = True

    def note_read(self) -> None:
        self.read += 1
        if self.enabled and 4 * self.read > self.deferred:
            self.enabled = False
            warnings.warn(
                "lowprec_liger: something reads the logits of training steps (soft-capping, a custom loss, TRL's "
                "metrics), so they have to be computed: the stock loss is used from now on",
                UserWarning,
                stacklevel=2,
            )


class _Factors:
    """What the logits are made of: `hidden @ weight.T + bias` in `dtype`."""

    def __init__(self, head: nn.Linear, hidden: Tensor, dtype: torch.dtype) -> None:
        self.hidden, self.weight, self.bias, self.dtype = hidden, head.weight, head.bias, dtype
        self.state: LossState = getattr(head, _STATE)
        self.step = _steps
        self.product: Tensor | None = None

    def multiply(self) -> Tensor:
        """The logits as the stock layer computes them, once."""
        if self.product is None:
            if self.step != _steps:
                raise RuntimeError(
                    "logits of a training step are read after the optimizer's step, which has changed the weights "
                    "that they come from (lowprec_liger computes logits when they are read): read them before"
                )
            hidden, weight, bias = self.cast()
            with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
                self.product = nn.functional.linear(hidden, weight, bias)
            self.state.note_read()
        return self.product

    def cast(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The factors in the dtype in which autocast, if any, multiplies."""
        with torch.enable_grad():
            return self.hidden.to(self.dtype), self.weight.to(self.dtype), _to(self.bias, self.dtype)


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


class DeferredLogits(Tensor):
    """Logits that are computed when somebody looks at a value. Shape, dtype and device cost nothing, nor do `.float()`
    and `.to(dtype)`, which accelerate applies to every output."""

    _factors: _Factors
    _value: Tensor | None

    @staticmethod
    def __new__(cls, factors: _Factors, dtype: torch.dtype) -> DeferredLogits:
        shape = (*factors.hidden.shape[:-1], factors.weight.shape[0])
        self: DeferredLogits = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=factors.hidden.device)
        self._factors, self._value = factors, None
        return self

    def __init__(self, factors: _Factors, dtype: torch.dtype) -> None:
        pass

    def value(self) -> Tensor:
        if self._value is None:
            with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad():
                product, dtype = self._factors.multiply(), self.dtype
            with torch.enable_grad():
                self._value = product.to(dtype)
        return self._value

    def untouched(self) -> bool:
        """Nobody has looked at a value, here or through another dtype, so nobody can have changed one."""
        return self._value is None and self._factors.product is None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is _REQUIRES_GRAD:
            return True  # otherwise the layer would not have deferred them
        if func in _WATCHERS and isinstance(args[0], cls):
            raise RuntimeError(f"{func.__name__} of deferred logits would never see a gradient: {LIGER_ENV}=0")
        if (dtype := _cast_to(func, args, kwargs)) is not None:
            logits = args[0]
            return cls(logits._factors, dtype) if logits.untouched() else logits.value().to(dtype)
        args, kwargs = tree_map(lambda x: x.value() if isinstance(x, cls) else x, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Only C++ code that takes no notice of __torch_function__ gets here, below autograd.
        raise NotImplementedError(
            f"{func} reads deferred logits from C++, where their gradient is lost: {LIGER_ENV}=0"
        )


_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_FREE = frozenset({
    Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__, Tensor.layout.__get__, Tensor.itemsize.__get__, Tensor.is_sparse.__get__,  # type: ignore[attr-defined]
    Tensor.is_meta.__get__, Tensor.is_quantized.__get__, Tensor.is_nested.__get__,  # type: ignore[attr-defined]
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.ndimension, Tensor.is_floating_point,
    Tensor.is_complex, Tensor.element_size, Tensor.get_device, Tensor.__len__, torch.is_floating_point, torch.numel,
    torch.is_complex,
})  # fmt: skip
_WATCHERS = frozenset({Tensor.register_hook, Tensor.retain_grad, Tensor.register_post_accumulate_grad_hook})
_CASTS = {Tensor.float: torch.float32, Tensor.bfloat16: torch.bfloat16, Tensor.double: torch.float64}


def _cast_to(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    """The dtype, where the call is a conversion of its only tensor and nothing else."""
    if not isinstance(args[0] if args else None, DeferredLogits) or kwargs:
        return None
    if len(args) == 1:
        return _CASTS.get(func)
    if func is Tensor.to and len(args) == 2 and isinstance(args[1], torch.dtype):
        return args[1]
    return None


# --- the model -----------------------------------------------------------------------------------------------------


class DeferringHead(nn.Linear):
    """An output embedding that does not multiply in training until somebody asks. Made by `fuse_loss`."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not self._defers(input):
            return super().forward(input)
        state: LossState = getattr(self, _STATE)
        state.deferred += 1
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        return DeferredLogits(_Factors(self, input, dtype), dtype)

    def _defers(self, input: Tensor) -> bool:
        state: LossState = getattr(self, _STATE)
        if not (state.enabled and self.training and torch.is_grad_enabled() and _runs_on(input)):
            return False
        if not (input.requires_grad or self.weight.requires_grad) or self._forward_hooks or self._backward_hooks:
            return False
        if type(self.weight) not in (nn.Parameter, Tensor) or hasattr(self.weight, "ds_id"):  # sharded
            return False
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind) in _DTYPES
        return input.dtype == self.weight.dtype and input.dtype in _DTYPES


def _runs_on(input: Tensor) -> bool:
    return input.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss, from the factors where the logits are deferred and untouched."""
    fused = isinstance(logits, DeferredLogits) and logits.untouched() and logits.shape[-1] == vocab_size
    if not fused or not _tokens_match(logits, labels, shift_labels):
        whole = logits.value() if isinstance(logits, DeferredLogits) else logits
        loss: Tensor = ForCausalLMLoss(
            whole, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
        )
        return loss
    assert isinstance(logits, DeferredLogits)
    if shift_labels is None:  # position i predicts label i + 1
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    hidden, weight, bias = logits._factors.cast()
    if weight.untyped_storage().size() == 0:
        raise RuntimeError(f"the output embedding's weight is sharded again before the loss: {LIGER_ENV}=0")
    target = shift_labels.contiguous().view(-1).to(hidden.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    with torch.autocast(hidden.device.type, enabled=False):
        loss = fused_linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]), weight, target, bias, ignore_index=ignore_index, reduction=reduction
        )
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def _tokens_match(logits: Tensor, labels: Tensor | None, shift_labels: Tensor | None) -> bool:
    """One label per row of logits; otherwise the stock loss says what is wrong."""
    target = labels if shift_labels is None else shift_labels
    return target is not None and target.numel() * logits.shape[-1] == logits.numel()


def fused_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *, ignore_index: int, reduction: str
) -> Tensor:
    """liger-kernel's; the weight's gradient is summed over its chunks in float32, as one GEMM would."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Tensor = liger_fused_linear_cross_entropy(
        hidden, weight, target, bias, ignore_index=ignore_index, reduction=reduction, accum_dtype=torch.float32
    )
    return loss


# --- switching it on and off ---------------------------------------------------------------------------------------

_counting: list[Any] = []  # the handle of the global optimizer hook, while a model is fused
_fused: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def fuse_loss(model: nn.Module) -> str:
    """Defer the logits of every causal language model in `model`. Returns a phrase for the report. Idempotent.

    Raises ImportError where liger-kernel is missing; ValueError where `model` has no such output embedding and loss.
    """
    if not installed():
        raise ImportError("lowprec_liger needs liger-kernel: pip install 'hf-lowprec[gpu]'")
    reasons: list[str] = []
    done = False
    for owner in model.modules():
        getter: Any = getattr(owner, "get_output_embeddings", None)
        head = getter() if callable(getter) else None
        if head is None or not hasattr(owner, "loss_function"):
            continue
        if isinstance(head, DeferringHead):
            done = True
        elif (reason := _unsuited(owner, head)) is not None:
            reasons.append(f"{type(owner).__name__}: {reason}")
        else:
            setattr(head, _STATE, LossState())
            set_class(head, DeferringHead)
            owner.loss_function = causal_lm_loss  # type: ignore[assignment]
            done = True
    if not done:
        raise ValueError("lowprec_liger: " + ("; ".join(reasons) or "the model has no output embedding with a loss"))
    if model not in _fused:
        _fused.add(model)
        weakref.finalize(model, _stop_counting)
    if not _counting:
        _counting.append(register_optimizer_step_post_hook(_count_step))
    return FUSED


def installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def _unsuited(owner: nn.Module, head: Any) -> str | None:
    if type(head) is not nn.Linear:
        return f"its output embedding is a {type(head).__name__}, no plain nn.Linear"
    if forward_is_replaced(head):
        return "the forward of its output embedding was replaced on the instance"
    loss = owner.loss_function
    if loss is not ForCausalLMLoss:
        return f"its loss is {getattr(loss, '__name__', loss)}, not ForCausalLMLoss"
    return None


def unfuse_loss(model: nn.Module) -> None:
    """Undo `fuse_loss`; a model that was never fused is fine."""
    for module in model.modules():
        if isinstance(module, DeferringHead):
            set_class(module, nn.Linear)
            delattr(module, _STATE)
        if module.__dict__.get("_loss_function") is causal_lm_loss:
            del module._loss_function
    _fused.discard(model)
    _stop_counting()


def _stop_counting() -> None:
    if next(iter(_fused), None) is None and _counting:
        _counting.pop().remove()
