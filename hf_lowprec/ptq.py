# SPDX-License-Identifier: Apache-2.0
"""Weight-only post-training quantisation with error diffusion: greedy path-following quantisation, GPFQ.

Rounding a weight to nearest treats its elements alone. Here the columns of a layer's weight are quantised one after
another, and each takes up what the earlier ones have left undone on the calibration inputs. With X the inputs as the
original model has them and X~ as the quantised part of the model before this layer gives them, column by column:

    u += w_t X_t;   q_t = Q(<X~_t, u> / |X~_t|^2);   u -= q_t X~_t

(GPFQ, arXiv 2010.15979.) Q is any `recipe.Quant` whose scales come from the weight itself: MX blocks, rows, a tensor,
a searched range. They are taken from the original weight and stay, so that what is written fits the format.

`u` is not kept: with C = X.T X~ and G = X~.T X~ the same number is

    <X~_t, u> = sum over j <= t of w_j C[j, t]  -  sum over j < t of q_j G[j, t]

so that memory does not grow with the data: three K x K float64 matrices for the layer at work. A layer of N x K costs
2 N K^2 multiply-adds, and 3 K^2 for each calibration token. `gpfq_model` runs the blocks of a model in order; for each
group of layers that read one input (four in a Llama block) the block runs twice, once with the original weights and
once as far as it is quantised, and twice more at the end: ten forward passes over the data for a Llama.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_lowprec import numerics
from hf_lowprec.calibration import check_data, moved, run_batch
from hf_lowprec.conversion import ConversionError, session_of
from hf_lowprec.formats import Codebook, Format, get_format
from hf_lowprec.numerics.flexible import format_of, mans_of
from hf_lowprec.numerics.search import magnitudes_of, search
from hf_lowprec.presets import get_recipe
from hf_lowprec.recipe import Quant
from hf_lowprec.selection import Choice, select, weight_of

_COLUMNS = 64  # whose products with all earlier columns are made in one matrix product


class Moments:
    """A = X.T X, C = X.T X~ and G = X~.T X~, float64 [K, K], summed over batches of X and X~, both [..., K]."""

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        self.own, self.cross, self.gram = (
            torch.zeros(width, width, dtype=torch.float64, device=device) for _ in range(3)
        )

    @torch.no_grad()
    def add(self, inputs: Tensor, quantized_inputs: Tensor | None = None) -> None:
        """One batch; without `quantized_inputs` X~ is X. Raises ValueError: shapes differ, or not finite."""
        x = inputs.detach().reshape(-1, inputs.shape[-1]).double()
        y = x if quantized_inputs is None else quantized_inputs.detach().reshape(-1, inputs.shape[-1]).double()
        if x.shape != y.shape:
            raise ValueError(f"inputs {tuple(x.shape)} and quantized_inputs {tuple(y.shape)} are of the same tokens")
        if not bool(x.isfinite().all() & y.isfinite().all()):
            raise ValueError("the calibration inputs hold Inf or NaN")
        self.own += x.t() @ x
        self.cross += x.t() @ y
        self.gram += y.t() @ y

    def error(self, weight: Tensor, quantized: Tensor) -> float:
        """|X W.T - X~ Q.T| / |X W.T|, Frobenius norms: how far the layer's output is off on this data."""
        w, q = weight.detach().double(), quantized.detach().double()
        signal = ((w @ self.own) * w).sum()
        noise = signal - 2 * ((w @ self.cross) * q).sum() + ((q @ self.gram) * q).sum()
        return float((noise.clamp(min=0) / signal).sqrt()) if float(signal) > 0 else 0.0


class _Grid(NamedTuple):
    """Of each element of a weight [N, K] its scale, float64, and the format of all."""

    fmt: Format | Codebook
    scale: Tensor


@torch.no_grad()
def gpfq(weight: Tensor, quant: Quant, inputs: Tensor | Moments, quantized_inputs: Tensor | None = None) -> Tensor:
    """The weight [N, K], quantised with error diffusion: values of `quant`'s format times its scales, float32.

    inputs: X, [..., K], or moments of many batches. quantized_inputs: X~; None: X. Columns of which X~ has nothing are
    rounded to nearest.

    Raises ValueError: a scaling that does not follow from the weight, stochastic rounding, or inputs that do not fit.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight: a matrix, got shape {tuple(weight.shape)}")
    if isinstance(inputs, Moments):
        moments = inputs
    else:
        moments = Moments(inputs.shape[-1], inputs.device)
        moments.add(inputs, quantized_inputs)
    k = weight.shape[1]
    if moments.gram.shape[0] != k:
        raise ValueError(f"the inputs have {moments.gram.shape[0]} features, the weight takes {k}")
    fmt, scale = _grid(weight, quant)
    w, cross, gram = weight.detach().double(), moments.cross, moments.gram
    power, least = gram.diagonal(), torch.finfo(torch.float64).tiny
    q = torch.zeros_like(w)
    for start in range(0, k, _COLUMNS):
        here = slice(start, min(start + _COLUMNS, k))
        before = slice(0, start)
        due = w[:, before] @ cross[before, here] - q[:, before] @ gram[before, here]
        for t in range(here.start, here.stop):
            i = t - start
            due[:, i:] += w[:, t, None] * cross[t, None, t : here.stop]
            wanted = torch.where(power[t] > 0, due[:, i] / power[t].clamp(min=least), w[:, t])
            q[:, t] = _rounded(wanted, fmt, scale[:, t], quant)
            due[:, i:] -= q[:, t, None] * gram[t, None, t : here.stop]
    return q.float()


@torch.no_grad()
def nearest(weight: Tensor, quant: Quant) -> Tensor:
    """The weight rounded element by element on the same grid as `gpfq`, float32: what diffusion is compared with."""
    fmt, scale = _grid(weight, quant)
    return _rounded(weight.detach().double(), fmt, scale, quant).float()


def _rounded(x: Tensor, fmt: Format | Codebook, scale: Tensor, quant: Quant) -> Tensor:
    """Q(x / scale) * scale of float64; as in `numerics.quantize`, the quotient is a float32 product."""
    inverse = (1.0 / scale.float()).double()
    codes = numerics.round_to_format((x * inverse).float(), fmt, quant.rounding, "saturate")
    return codes.double() * scale


def _grid(weight: Tensor, quant: Quant) -> _Grid:
    if quant.rounding.mode == "stochastic":
        raise ValueError("rounding: error diffusion rounds to nearest; stochastic rounding would undo it")
    if quant.overflow != "saturate":
        raise ValueError(f"overflow: error diffusion saturates, got {quant.overflow!r}")
    method = quant.scaling.method
    weight = weight.detach().float()
    if method in ("delayed", "predicted"):
        raise ValueError(
            f"method {method!r}: the scales of a weight that stays follow from it: current, search, static"
        )
    fmt = get_format(quant.format)
    if quant.flexible:
        assert isinstance(fmt, Format)
        rows = quant.scaling.granularity == "row"
        found = search(magnitudes_of(weight, rows=rows), fmt.bits, mans_of(fmt, free=quant.split == "free"))
        fmt = format_of(int(found.man), fmt.bits)
        scale = torch.where(found.maxval > 0, found.maxval, 1.0) / fmt.max
    else:
        scale = numerics.expand_scale(
            numerics.quantize(weight, quant).scale.float(), tuple(weight.shape), quant.scaling
        )
    return _Grid(fmt, scale.double().expand(weight.shape))


# --- a whole model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerError:
    """Relative errors of a layer's output on the calibration data, the layers before it quantised already."""

    nearest: float
    diffused: float


class _Call(NamedTuple):
    """How a block was called with one batch; the hidden states are its first argument."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Any:
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def of(self, hidden: Any) -> _Call:
        if self.args:
            return _Call((hidden, *self.args[1:]), self.kwargs)
        return _Call((), {**self.kwargs, "hidden_states": hidden})


def gpfq_model(
    model: nn.Module,
    data: Iterable[Any],
    quant: Quant,
    *,
    modules_to_not_convert: Sequence[str] | str = (),
    module_filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> dict[str, LayerError]:
    """Quantise the weights of a model's linears in place, layer after layer; they keep their dtype and names.

    The linears are those that `convert` would take and that lie in the model's blocks, the children of the ModuleList
    that holds most of them (a transformers decoder's layers); without one the model is one block. Blocks pass the
    hidden states on as their first argument and their first result.

    Args:
        data: batches, as `calibrate` takes them; kept while this runs. Cost: module docstring.

    Returns: of each layer how far its output is off, beside what rounding to nearest would have given there.

    Raises:
        ConversionError: a converted model (quantise first, then convert or calibrate), or nothing to quantise.
        ValueError: no data, inputs or weights that are not finite, or a Quant that `gpfq` does not take. Inputs that
            overflow within the model are found where they occur, and the message says that it is changed by then.
        TypeError: `data` is one batch, or nothing that can be iterated.
    """
    check_data(data)
    if session_of(model) is not None:
        raise ConversionError(
            "the model is converted: call hf_lowprec.revert(model), quantise its weights, then convert"
        )
    patterns = (modules_to_not_convert,) if isinstance(modules_to_not_convert, str) else tuple(modules_to_not_convert)
    _, chosen = select(model, get_recipe("te-current"), Choice(patterns, module_filter_fn))
    blocks = _blocks(model, chosen)
    linears = [
        {name: chosen[name] for name in chosen if any(chosen[name] is m for m in block.modules())} for block in blocks
    ]
    if not any(linears):
        raise ConversionError("nothing to quantise: no linear qualified")
    for layers in linears:
        for module in layers.values():
            _grid(_nk(module, weight_of(module))[:1], quant)  # refused now, not halfway
    broken = [name for layers in linears for name in layers if not bool(weight_of(layers[name]).isfinite().all())]
    if broken:
        raise ValueError(f"the weight of {broken[0]} holds Inf or NaN")
    errors: dict[str, LayerError] = {}
    training = {module: module.training for module in model.modules()}
    config: Any = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    try:
        model.eval()
        if cache is not None:
            config.use_cache = False  # a block that runs again would append to it
        with torch.no_grad():
            calls = _calls(model, blocks, data)
            exact = [call.hidden for call in calls[0]] if blocks[0] is not model else []
            after = list(exact)
            for block, layers, own in zip(blocks, linears, calls, strict=True):
                whole = block is model
                one = own if whole else [call.of(h) for call, h in zip(own, exact, strict=True)]
                two = own if whole else [call.of(h) for call, h in zip(own, after, strict=True)]
                exact, after = _quantize_block(block, layers, one, two, quant, errors, last=block is blocks[-1])
    except ValueError as error:
        if not errors:
            raise
        raise ValueError(f"{error}; {len(errors)} layers are quantised already: load the model again") from error
    finally:
        if cache is not None:
            config.use_cache = cache
        for module, mode in training.items():
            module.training = mode
    return errors


def _blocks(model: nn.Module, chosen: Mapping[str, nn.Module]) -> list[nn.Module]:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    ids = {id(m) for m in chosen.values()}
    held = [sum(id(m) in ids for m in some.modules()) for some in lists]
    if not held or max(held) == 0:
        return [model]
    return list(lists[held.index(max(held))])


def _calls(model: nn.Module, blocks: list[nn.Module], data: Iterable[Any]) -> list[list[_Call]]:
    """How each block is called with each batch, by the original model."""
    calls: list[list[_Call]] = [[] for _ in blocks]
    device = next(model.parameters()).device
    batches = [moved(batch, device) for batch in data]
    if not batches:
        raise ValueError("no data: error diffusion needs at least one batch")
    if blocks == [model]:
        wrapped = [(batch,) if not isinstance(batch, Mapping | list) else batch for batch in batches]
        return [[_Call((), dict(b)) if isinstance(b, Mapping) else _Call(tuple(b), {}) for b in wrapped]]

    def record(index: int) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Of the later blocks only what comes beside the hidden states is wanted.
            call = _Call(args, kwargs)
            calls[index].append(call if index == 0 else call.of(None))

        return see

    handles = [block.register_forward_pre_hook(record(i), with_kwargs=True) for i, block in enumerate(blocks)]
    try:
        for batch in batches:
            run_batch(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if any(len(of_block) != len(batches) for of_block in calls):
        raise ConversionError("the model's blocks do not run once per batch, in order: quantise its layers with gpfq")
    return calls


def _quantize_block(
    block: nn.Module,
    layers: dict[str, nn.Module],
    exact: list[_Call],
    after: list[_Call],
    quant: Quant,
    errors: dict[str, LayerError],
    *,
    last: bool,
) -> tuple[list[Any], list[Any]]:
    """Quantise a block's layers; hidden states behind it, by its original weights and by its quantised ones."""
    original = {name: weight_of(module).detach().clone() for name, module in layers.items()}
    current = dict(original)

    def use(weights: dict[str, Tensor]) -> None:
        for name, module in layers.items():
            weight_of(module).data.copy_(weights[name])

    for group in _groups(block, layers, exact[0]):
        widths = {name: _nk(layers[name], original[name]).shape[1] for name in group}
        moments = {name: Moments(width, original[name].device) for name, width in widths.items()}
        for one, two in zip(exact, after, strict=True):
            use(original)
            xs = _inputs(block, {name: layers[name] for name in group}, one)
            use(current)
            ys = _inputs(block, {name: layers[name] for name in group}, two)
            for name in group:
                for x, y in zip(xs[name], ys[name], strict=True):
                    moments[name].add(x, y)
        for name in group:
            w = _nk(layers[name], original[name])
            q = gpfq(w, quant, moments[name]).to(w.dtype)
            plain = nearest(w, quant).to(w.dtype)
            errors[name] = LayerError(moments[name].error(w, plain), moments[name].error(w, q))
            current[name] = _nk(layers[name], q)
    out_exact: list[Any] = []
    if not last:
        use(original)
        out_exact = [_hidden(block(*call.args, **call.kwargs)) for call in exact]
    use(current)
    return out_exact, [] if last else [_hidden(block(*call.args, **call.kwargs)) for call in after]


def _groups(block: nn.Module, layers: dict[str, nn.Module], call: _Call) -> list[list[str]]:
    """Layers that read the same tensor together, in the order in which they run; those that do not run last."""
    order: list[tuple[str, Tensor]] = []
    _watched(block, layers, call, lambda name, x: order.append((name, x)))
    groups: list[tuple[Tensor, list[str]]] = []
    for name, x in order:
        if any(name in group for _, group in groups):
            continue
        if groups and groups[-1][0] is x:
            groups[-1][1].append(name)
        else:
            groups.append((x, [name]))
    found = [group for _, group in groups]
    idle = [name for name in layers if not any(name in group for group in found)]
    return [*found, *([idle] if idle else [])]


def _inputs(block: nn.Module, layers: dict[str, nn.Module], call: _Call) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    _watched(block, layers, call, lambda name, x: seen[name].append(x))
    return seen


def _watched(
    block: nn.Module, layers: dict[str, nn.Module], call: _Call, see: Callable[[str, Tensor], object]
) -> None:
    def watch(name: str) -> Any:
        return lambda module, args, kwargs: (see(name, args[0] if args else kwargs["input"]), None)[1]

    handles = [m.register_forward_pre_hook(watch(name), with_kwargs=True) for name, m in layers.items()]
    try:
        block(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()


def _hidden(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output


def _nk(module: nn.Module, weight: Tensor) -> Tensor:
    """[N, K] of a weight in the module's layout, or back."""
    return weight if isinstance(module, nn.Linear) else weight.t()
