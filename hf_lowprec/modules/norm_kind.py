# SPDX-License-Identifier: Apache-2.0
"""What a normalisation module computes, found out by running its own forward.

Every model of transformers brings a norm class of its own, and most of them are one of four functions: RMSNorm or
LayerNorm, times the weight or 1 + weight. No table of class names: the class' forward runs on made-up inputs and
weights, and what it returns is compared with the candidates. The inputs are chosen so that a difference shows: rows of
many magnitudes (where eps sits, and whether anything is clipped), with a mean, with one outlier, with a NaN.

Two questions, asked at two times. `norm_kind`, when a model is converted: which function is it? On the CPU, in
float32. `rounding_rule`, when it first meets inputs of some dtype: where does it round, what does it return? On the
device where it runs and under the autocast that is on, because both change the answer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_lowprec.modules.linear import forward_is_replaced
from hf_lowprec.numerics.norm import norm as truth
from hf_lowprec.ops.norm import norm

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Where a module hides eps from its attributes, it is one of these (finfo: nn.RMSNorm without an eps).
_USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12, torch.finfo(torch.float32).eps)
_ANY_WIDTH = 64
_SETTINGS = (bool, int, float, str, tuple, type(None))
_LEAST_WIDTH = 4


class NormKind(NamedTuple):
    """y = (x - mean) * rstd * w + bias: RMSNorm or LayerNorm (`center`), w = weight or 1 + weight (`plus_one`).

    width: of the last axis; None: of any width, there is no weight.
    """

    center: bool
    plus_one: bool
    eps: float
    width: int | None


class Rule(NamedTuple):
    """Where a module rounds: the normalised value to `mid`, before the weight multiplies it; the result to `out`."""

    mid: torch.dtype
    out: torch.dtype


_KINDS: dict[tuple[Any, ...], NormKind | None] = {}
_RULES: dict[tuple[Any, ...], Rule | None] = {}


def norm_kind(module: nn.Module) -> NormKind | None:
    """Which norm `module` is, or None: it is another function, takes more than one tensor, or is no plain module.

    Looks at the module's class and attributes, not at the values of its Parameters: they may be sharded, on another
    device, or on none.
    """
    if forward_is_replaced(module) or not _is_plain(module):
        return None
    key = _behaviour(module)
    if key is None:
        return _find_kind(module)
    if key not in _KINDS:
        _KINDS[key] = _find_kind(module)
    return _KINDS[key]


def settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """What the module's class may read from it beside Parameters: eps, flags, a shape."""
    return tuple(
        (name, value)
        for name, value in module.__dict__.items()
        if isinstance(value, float)
        or (isinstance(value, _SETTINGS) and name != "training" and not name.startswith("_"))
    )


def _behaviour(module: nn.Module) -> tuple[Any, ...] | None:
    """Equal for modules that compute the same function: class, its forward, settings and shapes. None: some setting is
    an object whose contents may differ."""
    found: list[tuple[str, Any]] = []
    for name, value in module.__dict__.items():
        if isinstance(value, _SETTINGS):
            found.append((name, repr(value)))
        elif not name.startswith("_"):
            return None
    shapes = [(k, None if p is None else tuple(p.shape)) for k, p in module._parameters.items()]
    own = _own_class(module)
    return (own, own.forward, *(item for item in found if item[0] != "training"), *shapes)


def rounding_rule(
    module: nn.Module,
    kind: NormKind,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    device: torch.device,
) -> Rule | None:
    """How the module treats these dtypes under the autocast that is on now. None: as no rule of ours does.

    Runs the module's own forward once on `device` and waits for the result; then it is known for all of its kind.
    """
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    behaviour = _behaviour(module)
    if behaviour is None:
        return _find_rule(module, kind, x_dtype, weight_dtype, bias_dtype, device)
    key = (behaviour, kind, x_dtype, weight_dtype, bias_dtype, device.type, autocast)
    if key not in _RULES:
        _RULES[key] = _find_rule(module, kind, x_dtype, weight_dtype, bias_dtype, device)
    return _RULES[key]


# --- which function -------------------------------------------------------------------------------------------------


def _own_class(module: nn.Module) -> Any:
    """The module's class as it was before fusing."""
    return getattr(type(module), "_original", type(module))


def _is_plain(module: nn.Module) -> bool:
    """Whether forward(x) is all there is: a gate that is None by default must not be taken for its absence."""
    if module._modules or module._buffers or not set(module._parameters) <= {"weight", "bias"}:
        return False
    shapes = {tuple(p.shape) for p in module._parameters.values() if p is not None}
    if len(shapes) > 1 or any(len(shape) != 1 or shape[0] < _LEAST_WIDTH for shape in shapes):
        return False
    try:
        parameters = list(inspect.signature(_own_class(module).forward).parameters.values())
    except (TypeError, ValueError):
        return False
    return len(parameters) == 2 and parameters[1].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


def _find_kind(module: nn.Module) -> NormKind | None:
    width = next((p.shape[0] for p in module._parameters.values() if p is not None), None)
    shape = getattr(module, "normalized_shape", None)
    if width is None and isinstance(shape, (tuple, list)) and len(shape) == 1:
        width = shape[0]
    probe = _Probe.make(module, _ANY_WIDTH if width is None else width)
    float32 = (torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    # A probe must leave no trace: what is probed may turn out to be a dropout.
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        own = probe.run(*float32, training=False)
        if own is None:
            return None
        for training in (True, False):
            for reshaped in (True, False):
                other = probe.run(*float32, training=training, reshaped=reshaped)
                if other is None or not torch.equal(other.nan_to_num(nan=7.0), own.nan_to_num(nan=7.0)):
                    return None
    for center in (False, True):
        for plus_one in (False, True) if probe.weight is not None else (False,):
            for eps in _eps_candidates(module):
                kind = NormKind(center, plus_one, eps, width)
                y, scale = probe.expected(kind)
                if _agree(own, y, scale, torch.float32):
                    return kind
    return None


def _eps_candidates(module: nn.Module) -> Iterator[float]:
    seen: list[float] = []
    for value in (*module.__dict__.values(), *_USUAL_EPS):
        if isinstance(value, float) and 0 <= value < 1 and value not in seen:
            seen.append(value)
            yield value


def _find_rule(
    module: nn.Module,
    kind: NormKind,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    device: torch.device,
) -> Rule | None:
    if any(dtype not in (None, *_DTYPES) for dtype in (x_dtype, weight_dtype, bias_dtype)):
        return None
    probe = _Probe.make(module, _ANY_WIDTH if kind.width is None else kind.width)
    own = probe.run(x_dtype, weight_dtype, bias_dtype, device)
    if own is None or own.dtype not in _DTYPES:
        return None
    x, weight, bias = probe.operands(x_dtype, weight_dtype, bias_dtype, device)
    _, scale = probe.expected(kind, x, weight, bias)
    for mid in dict.fromkeys((torch.float32, x_dtype, weight_dtype)):
        if mid is not None:
            y, _ = norm(x, weight, bias, kind.eps, kind.center, kind.plus_one, mid, own.dtype)
            if _agree(own, y, scale, mid):
                return Rule(mid, own.dtype)
    return None


# --- the experiment --------------------------------------------------------------------------------------------------


class _Probe(NamedTuple):
    """A module's own forward on inputs and weights of ours. x [rows, width], weight, bias: float32 on the CPU."""

    module: nn.Module
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def make(cls, module: nn.Module, width: int) -> _Probe:
        generator = torch.Generator().manual_seed(width)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        magnitudes = torch.tensor([1, 1, 1, 30, 1e3, 1e6, 0.1, 1e-2, 1e-3, 1e-4, 1e-6, 1, 1, 1, 0, 1])
        x = random(magnitudes.numel(), width) * magnitudes[:, None]
        x[1] += 5
        x[2] -= 0.5
        x[11, width // 2] += 100
        x[15, width // 3] = float("nan")
        # Weights of several binades, so that a clipped result would show.
        spread = torch.exp2(torch.arange(width) % 9 - 4.0)
        given = module._parameters
        weight = random(width) * spread if given.get("weight") is not None else None
        return cls(module, x, weight, random(width) * spread if given.get("bias") is not None else None)

    def operands(
        self,
        x_dtype: torch.dtype,
        weight_dtype: torch.dtype | None,
        bias_dtype: torch.dtype | None,
        device: torch.device,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        limit = torch.finfo(x_dtype).max / 2
        x = self.x.clamp(-limit, limit).to(device, x_dtype)
        weight = None if self.weight is None else self.weight.to(device, weight_dtype)
        return x, weight, None if self.bias is None else self.bias.to(device, bias_dtype)

    def run(
        self,
        x_dtype: torch.dtype,
        weight_dtype: torch.dtype | None,
        bias_dtype: torch.dtype | None,
        device: torch.device,
        *,
        training: bool = False,
        reshaped: bool = False,
    ) -> Tensor | None:
        """What the module's own class returns for [rows, width], or for the same as 4-D (`reshaped`); None: nothing
        of the kind. Hooks do not run."""
        x, weight, bias = self.operands(x_dtype, weight_dtype, bias_dtype, device)
        cls = _own_class(self.module)
        stand_in: Any = cls.__new__(cls)
        stand_in.__dict__.update(self.module.__dict__, training=training)
        stand_in.__dict__["_parameters"] = {
            name: None if p is None else nn.Parameter({"weight": weight, "bias": bias}[name], requires_grad=False)  # type: ignore[arg-type]
            for name, p in self.module._parameters.items()
        }
        shape = (2, x.shape[0] // 4, 2, x.shape[1]) if reshaped else x.shape
        with torch.no_grad():
            try:
                y = cls.forward(stand_in, x.reshape(shape))
            except Exception:  # whatever it is, it does not take what a norm takes
                return None
        if not isinstance(y, Tensor) or y.shape != shape:
            return None
        return y.reshape(x.shape)

    def expected(
        self, kind: NormKind, x: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """float64 on the CPU: y without rounding, and the magnitudes that its rounding errors are relative to."""
        if x is None:
            x, weight, bias = self.x, self.weight, self.bias
        x64 = x.cpu().double()
        w64, b64 = (None if t is None else t.cpu().double() for t in (weight, bias))
        y, stats = truth(
            x64, w64, b64, eps=kind.eps, center=kind.center, plus_one=kind.plus_one,
            mid=torch.float64, out=torch.float64, compute=torch.float64,
        )  # fmt: skip
        n = (x64.abs() + (stats[1].abs()[:, None] if kind.center else 0.0)) * stats[0][:, None]
        factor = 1.0 if w64 is None else (1 + w64 if kind.plus_one else w64).abs() + float(kind.plus_one)
        return y, n * factor + (0.0 if b64 is None else b64.abs())


def _agree(own: Tensor, ours: Tensor, scale: Tensor, mid: torch.dtype) -> bool:
    """Whether two results are the same function with the same roundings.

    Sums in another order move float32 values by some ulp; where such a value is then rounded to a half type, one in
    thousands falls to the other side and is a whole ulp of that type off. A rounding in another place moves a quarter.
    """
    a, b = own.cpu().double(), ours.cpu().double()
    nan = a.isnan()
    if not torch.equal(nan, b.isnan()):
        return False
    infinite = a.isinf() & (a == b)
    error = torch.where(nan | infinite, 0.0, (a - b).abs())
    scale = torch.where(nan, 1.0, scale)
    narrow = max((d for d in (mid, own.dtype) if d.itemsize < 4), key=lambda d: torch.finfo(d).eps, default=None)
    close = error <= 3e-6 * scale + 1e-30
    if narrow is None:
        return bool(close.all())
    near = error <= 2.5 * torch.finfo(narrow).eps * scale + 4 * torch.finfo(narrow).smallest_normal
    if narrow == torch.float16:
        near |= error <= 2.0**-23 * (1 + scale)
    return bool(near.all()) and close.double().mean().item() >= 0.97
