# SPDX-License-Identifier: Apache-2.0
"""One forward pass without arithmetic: which linear reads which tensor, and which module made it.

The pass runs on a *skeleton*: for each module of the model an object of the same class with the same attributes, but
with Parameters and buffers on the meta device, without hooks, and with stand-ins for linears. So nothing is computed
and the model itself not touched: what the pass writes, breaks or leaves behind is the skeleton's. That the model is
sharded by FSDP2, spread over devices, quantised on loading or wrapped by PEFT makes no difference to its skeleton.

Two things follow from there being no values. Where the forward pass asks for one (`if mask.any()`), it is told zero.
And dropout would be the identity in evaluation: it makes a new tensor here, as it does in training.
"""

from __future__ import annotations

import builtins
import copy
import dis
import functools
import inspect
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import BuiltinFunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_TOKENS = 8
_ATTENTION = ("eager", "sdpa")  # the others are kernels, which run on a GPU only
# Of a module's own attributes, what belongs to the object and not to its structure.
_DROPPED = ("forward", "_old_forward", "_hf_hook", "_compiled_call_impl", "_hf_lowprec", "_lowprec")


class NotTraceable(Exception):
    """The model has no skeleton; the message says why."""


@dataclass
class Trace:
    """What the forward passes showed. A tensor is known by a number, another one after each write in place.

    reads: linear -> the tensors that entered it, call by call.
    makers: tensor -> the module without children that returned it.
    viewed: tensor -> the module whose whole output it shows in another shape.
    failures: model or sub-model -> why its forward pass could not be followed.
    """

    reads: dict[str, list[int]] = field(default_factory=dict)
    makers: dict[int, str] = field(default_factory=dict)
    viewed: dict[int, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def trace(model: nn.Module, linears: Mapping[str, nn.Module]) -> Trace:
    """Follow the forward pass of `model` and, where that does not reach them, of the models inside it.

    Models are what transformers makes of its configs: modules with `config` and `main_input_name`. Never raises.
    """
    recorder = Recorder({id(module): name for name, module in linears.items()})
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    out = recorder.trace
    models = [m for m in model.modules() if hasattr(type(m), "main_input_name") and hasattr(m, "config")]
    if not models:
        out.failures[""] = f"{type(model).__name__} has no config that says what its inputs are"
    for part in models:
        inside = [name for module in part.modules() if (name := recorder.linears.get(id(module))) is not None]
        if not inside or any(name in out.reads for name in inside):
            continue
        problem = follow(model, part, recorder)
        if problem:
            out.failures[names[id(part)]] = problem
    return out


def follow(model: nn.Module, part: nn.Module, recorder: Recorder) -> str:
    """Have `recorder` watch one forward pass of `part`, a model inside `model`; why that cannot be, or empty."""
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    try:
        with torch.inference_mode(False):  # tensors made in that mode do not count what is written to them
            return _run(_Skeleton(names, recorder).of(part), recorder)
    except Exception as error:
        return _words(error)


def skeleton_of(module: nn.Module) -> nn.Module:
    """`module` without values and hooks. Raises NotTraceable."""
    return _Skeleton({}, None).of(module)


# --- the skeleton ---------------------------------------------------------------------------------------------------


class _Skeleton:
    def __init__(self, names: dict[int, str], recorder: Recorder | None) -> None:
        self.names = names
        self.recorder = recorder
        self.twins: dict[int, nn.Module] = {}
        self.copies: dict[int, Any] = {}  # of configs, by copy.deepcopy

    def of(self, module: nn.Module) -> nn.Module:
        if id(module) in self.twins:
            return self.twins[id(module)]
        compiled = module._modules.get("_orig_mod")
        if compiled is not None:
            return self.twins.setdefault(id(module), self.of(compiled))
        twin: nn.Module = object.__new__(type(module))
        nn.Module.__init__(twin)
        self.twins[id(module)] = twin
        own = [key for key in module.__dict__ if key not in twin.__dict__ and key not in _DROPPED]
        twin.__dict__.update({key: self._value(module.__dict__[key]) for key in own})
        self._bind_forward(module, twin)
        twin.training = False
        twin._parameters = {
            name: None if p is None else nn.Parameter(_meta(p), requires_grad=False)
            for name, p in module._parameters.items()
        }
        twin._buffers = {name: None if b is None else _meta(b) for name, b in module._buffers.items()}
        twin._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        twin._modules = {name: None if m is None else self.of(m) for name, m in module._modules.items()}
        if self.recorder is not None:
            self.recorder.watch(module, twin, self.names.get(id(module), ""))
        return twin

    def _bind_forward(self, module: nn.Module, twin: nn.Module) -> None:
        own = module.__dict__.get("forward")
        if own is None or "_old_forward" in module.__dict__:  # accelerate's device hooks call the class's
            return
        if not isinstance(own, MethodType) or own.__self__ is not module:
            name = self.names.get(id(module)) or "the model"
            raise NotTraceable(f"the forward of {name} was replaced by a function")
        twin.__dict__["forward"] = MethodType(own.__func__, twin)

    def _value(self, value: Any) -> Any:
        """A module's attribute: containers one level deep, so that a cache that it fills is the skeleton's."""
        if isinstance(value, dict):
            return copy.copy(value) if not value else {k: self._element(v) for k, v in value.items()}
        if isinstance(value, list):
            return [self._element(v) for v in value]
        return copy.copy(value) if isinstance(value, set) else self._element(value)

    def _element(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            return self.of(value)
        if isinstance(value, Tensor):
            return _meta(value)
        if hasattr(value, "_attn_implementation"):
            config = copy.deepcopy(value, self.copies)
            if config._attn_implementation not in (None, *_ATTENTION):
                config._attn_implementation = _ATTENTION[-1]
            if hasattr(config, "_experts_implementation"):
                config._experts_implementation = "eager"
            return config
        return value


def _meta(tensor: Tensor) -> Tensor:
    """Of the full size also where this rank holds a shard (DeepSpeed keeps that size beside an empty tensor)."""
    return torch.empty(getattr(tensor, "ds_shape", tensor.shape), dtype=tensor.dtype, device="meta")


# --- straight-line code ---------------------------------------------------------------------------------------------
#
# One graph stands for a forward only if every call of it runs the same operations and does nothing else. That is read
# off its bytecode, which may hold no jump, no block and no store outside of its own variables, and whose names must
# each be a function of tensors, a child, a constant, or a method of the same kind.

_MOVES = {"NOP", "RESUME", "PRECALL", "PUSH_NULL", "KW_NAMES", "POP_TOP", "COPY", "SWAP", "COPY_FREE_VARS", "CALL",
          "CALL_KW", "LOAD_CONST", "RETURN_VALUE", "RETURN_CONST", "UNPACK_SEQUENCE", "BINARY_OP", "BINARY_SUBSCR",
          "BINARY_SLICE", "BUILD_TUPLE", "BUILD_SLICE", "UNARY_NEGATIVE", "DELETE_FAST"}  # fmt: skip
_STORED = {"STORE_FAST": 1, "STORE_FAST_LOAD_FAST": 1, "STORE_FAST_STORE_FAST": 2}  # how many of the names
_LOADS = {"LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_LOAD_FAST", *_STORED}
_ATTRIBUTES = {"LOAD_ATTR", "LOAD_METHOD"}
_REFUSED = {"STORE_ATTR": "stores attributes", "DELETE_ATTR": "stores attributes", "STORE_SUBSCR": "stores items",
            "DELETE_SUBSCR": "stores items", "STORE_SLICE": "stores items", "STORE_GLOBAL": "stores globals",
            "STORE_DEREF": "has functions inside", "MAKE_CELL": "has functions inside",
            "MAKE_FUNCTION": "has functions inside", "BEFORE_WITH": "has a with block",
            "BEFORE_ASYNC_WITH": "has a with block", "LOAD_SUPER_ATTR": "calls super", "FOR_ITER": "has a loop",
            "JUMP_BACKWARD": "has a loop"}  # fmt: skip
_PURE = (len, int, float, tuple, slice, min, max, abs)
_CONSTANTS = (bool, int, float, str, type(None), torch.dtype)


def straight_line(module: nn.Module) -> str | None:
    """None where the forward of `module` is straight-line code; else what it is or does, to follow "its forward"."""
    own = module.__dict__.get("forward")
    return _code(own.__func__ if isinstance(own, MethodType) else type(module).forward, module, set())


def _code(function: Any, module: nn.Module, known: set[Any]) -> str | None:
    code = getattr(function, "__code__", None)
    if code is None:
        return "is no Python function"
    if code in known:
        return "calls itself"
    steps = list(dis.get_instructions(code))
    for step in steps:
        if step.opname in _REFUSED:
            return _REFUSED[step.opname]
    if any(step.opcode in dis.hasjrel or step.opcode in dis.hasjabs for step in steps):
        return "has branches"
    if code.co_exceptiontable:
        return "has a try block"
    this = code.co_varnames[0] if code.co_argcount else None
    outer = {**vars(builtins), **function.__globals__}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        outer[name] = cell.cell_contents
    at = 0
    while at < len(steps):
        step, problem = steps[at], None
        at += 1
        path: list[str] = []
        while at + len(path) < len(steps) and steps[at + len(path)].opname in _ATTRIBUTES:
            path.append(str(steps[at + len(path)].argval))
        if step.opname in _LOADS:
            names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
            if this in names and (names[-1] != this or not path or this in names[: _STORED.get(step.opname, 0)]):
                return f"uses {this} as a whole"
            if names[-1] == this:
                problem = _value(module, path, module, {*known, code})
                at += len(path)
        elif step.opname in ("LOAD_GLOBAL", "LOAD_DEREF"):
            if step.argval not in outer:
                return f"uses {step.argval}"
            problem = _value(outer[step.argval], path, module, {*known, code}) and f"calls {step.argval}"
            if problem and path:
                problem = f"calls {'.'.join((str(step.argval), *path))}"
            at += len(path)
        elif step.opname in _ATTRIBUTES:  # of a tensor, as far as is known
            problem = None if hasattr(Tensor, step.argval) else f"uses {step.argval}"
        elif step.opname not in _MOVES:
            problem = f"is no straight line ({step.opname})"
        if problem is not None:
            return problem
    return None


def _value(value: Any, path: list[str], module: nn.Module, known: set[Any]) -> str | None:
    """Why an attribute may not be used, or None. `known`: the code that uses it."""
    name = ".".join(path)
    mine = value is module
    for key in path:
        if isinstance(inspect.getattr_static(type(value), key, None), property | functools.cached_property):
            return f"uses {name}"
        try:
            value = getattr(value, key)
        except AttributeError:
            return f"uses {name}"
    if isinstance(value, MethodType) and value.__self__ is module:
        inner = _code(value.__func__, module, known)
        return None if inner is None else f"calls {name}, which {inner}"
    if isinstance(value, functools.partial) and not any(map(callable, (*value.args, *value.keywords.values()))):
        value = value.func
    if isinstance(value, _CONSTANTS) or (mine and isinstance(value, nn.Module)) or _is_pure(value):
        return None
    return f"{'calls' if callable(value) else 'uses'} {name}"


def _is_pure(value: Any) -> bool:
    """A function of tensors, or of numbers."""
    if any(value is function for function in _PURE) or (isinstance(value, BuiltinFunctionType) and
                                                        vars(math).get(value.__name__) is value):  # fmt: skip
        return True
    return id(value) in _tensor_functions()


@functools.cache
def _tensor_functions() -> frozenset[int]:
    """Of torch: those that work on tensors, and so can be overridden; not what sets modes, seeds or checkpoints."""
    listed = torch.overrides.get_overridable_functions()
    return frozenset(id(function) for functions in listed.values() for function in functions)


# --- recording ------------------------------------------------------------------------------------------------------


class Recorder:
    """Watches the linears, given as id -> name, and the modules without children; subclasses look at more."""

    def __init__(self, linears: dict[int, str]) -> None:
        self.linears = linears
        self.trace = Trace()
        self._numbers: dict[tuple[int, int], int] = {}
        self._whole: dict[tuple[int, int], str] = {}  # (storage, elements) -> who made it
        self._alive: list[Tensor] = []  # or ids would be used again

    def start(self) -> None:
        """A forward pass begins, perhaps again with other inputs."""

    def watch(self, module: nn.Module, twin: nn.Module, name: str) -> None:
        """Give `twin` what reports to us: a stand-in for linears, a hook for others without children."""
        width = _width(module) if id(module) in self.linears or _is_linear(module) else None
        if width is not None:
            twin.__dict__["forward"] = self.stand_in(self.linears.get(id(module)), width)
        elif not twin._modules:
            twin.register_forward_hook(self.hook(name))

    def stand_in(self, name: str | None, width: int) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            input: Tensor = args[0] if args else next(iter(kwargs.values()))
            if name is not None:
                self.trace.reads.setdefault(name, []).append(self.seen(input))
            return torch.empty(*input.shape[:-1], width, dtype=input.dtype, device="meta")

        return forward

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and not any(output is arg for arg in args):
                self.trace.makers[self.seen(output)] = name
                self._whole[_storage(output)] = name

        return hook

    def seen(self, tensor: Tensor) -> int:
        key = (id(tensor), tensor._version)
        if key not in self._numbers:
            self._alive.append(tensor)
            number = self._numbers[key] = len(self._numbers)
            maker = self._whole.get(_storage(tensor))
            if maker is not None and tensor._version == 0:
                self.trace.viewed[number] = maker
        return self._numbers[key]


def _storage(tensor: Tensor) -> tuple[int, int]:
    return tensor.untyped_storage()._cdata, tensor.numel()


def _width(module: nn.Module) -> int:
    """Of what a linear returns; `nf` is what transformers' Conv1D calls it."""
    attributes = module.__dict__
    return int(attributes["out_features"] if "out_features" in attributes else attributes["nf"])


def _is_linear(module: nn.Module) -> bool:
    """A linear that stays as it is, so that only its width matters: also one whose weight is packed."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not isinstance(module.__dict__.get("out_features"), int):
        return False
    return type(module).forward is nn.Linear.forward or not weight.is_floating_point()


# --- running it -----------------------------------------------------------------------------------------------------


def _run(skeleton: nn.Module, recorder: Recorder) -> str:
    """One forward pass with the first inputs that it takes; why there are none, or an empty string."""
    problem = "its inputs are of no known kind"
    for inputs in _inputs(skeleton):
        before = {name: list(tensors) for name, tensors in recorder.trace.reads.items()}
        recorder.start()
        try:
            with _elsewhere(), _NoValues():
                skeleton(**inputs)
            return ""
        except Exception as error:
            problem = _words(error)
            recorder.trace.reads = before
    return problem


def _inputs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """What `model` may be called with: its main input alone, then everything that its config describes."""
    config: Any = model.config
    accepted = inspect.signature(type(model).forward).parameters
    main = str(model.main_input_name)
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    known = {name: make for name, make in _MAKERS.items() if name in accepted or (name == main and anything)}
    fixed: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        fixed["decoder_input_ids"] = _ids(config)
    tried = []
    for names in ([main] if main in known else [], list(known), ["inputs_embeds"]):
        if names and names not in tried and all(name in known for name in names):
            tried.append(names)
            yield {**{name: known[name](config) for name in names if name != "inputs_embeds" or len(names) == 1},
                   **fixed}  # fmt: skip


def _first(config: Any, *names: str, default: int) -> int:
    for source in (config, *(getattr(config, f"{kind}_config", None) for kind in ("text", "vision", "audio"))):
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int):
                return value
    return default


def _ids(config: Any) -> Tensor:
    return torch.empty(1, _TOKENS, dtype=torch.long, device="meta")


def _embeds(config: Any) -> Tensor:
    return torch.empty(1, _TOKENS, _first(config, "hidden_size", "d_model", "n_embd", default=0), device="meta")


def _pixels(config: Any) -> Tensor:
    vision: Any = config if hasattr(config, "image_size") else getattr(config, "vision_config", None)
    size: Any = getattr(vision, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = _first(config, "num_channels", default=3)
    frames = getattr(config, "num_frames", None)
    shape = (1, channels, height, width) if frames is None else (1, frames, channels, height, width)
    return torch.empty(shape, device="meta")


def _audio(config: Any) -> Tensor:
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length") and hasattr(config, "patch_size"):
        return torch.empty(1, config.max_length, config.num_mel_bins, device="meta")  # a spectrogram in patches
    return torch.empty(1, 16000, device="meta")  # a second of sound


def _features(config: Any) -> Tensor:
    frames = 2 * _first(config, "max_source_positions", default=4 * _TOKENS)
    return torch.empty(1, _first(config, "num_mel_bins", default=80), frames, device="meta")


_MAKERS: dict[str, Callable[[Any], Tensor]] = {
    "input_ids": _ids,
    "pixel_values": _pixels,
    "input_values": _audio,
    "input_features": _features,
    "inputs_embeds": _embeds,
}


@contextmanager
def _elsewhere() -> Iterator[None]:
    """On the meta device. Generators are left as they were: a forward pass may draw, say, which layers to drop."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("meta"):
            yield
    finally:
        random.setstate(state)


class _NoValues(TorchFunctionMode):
    """Answers for tensors without values."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            input, p = _arguments(func, args, kwargs, "input", "p")
            return torch.empty_like(input) if p else input
        if func in _READS and isinstance(args[0], Tensor) and args[0].is_meta:
            return _READS[func](args[0])
        return func(*args, **kwargs)


def _arguments(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> list[Any]:
    call = inspect.signature(func).bind(*args, **kwargs)
    call.apply_defaults()
    return [call.arguments[name] for name in names]


def _nothing_is_nonzero(tensor: Tensor, **kwargs: Any) -> Tensor:
    return torch.empty(0, tensor.dim(), dtype=torch.long, device="meta")


_READS: dict[Any, Callable[[Tensor], Any]] = {
    Tensor.__bool__: lambda tensor: False,
    Tensor.__int__: lambda tensor: 0,
    Tensor.__index__: lambda tensor: 0,
    Tensor.__float__: lambda tensor: 0.0,
    Tensor.item: lambda tensor: False if tensor.dtype == torch.bool else 0,
    Tensor.tolist: lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu").tolist(),
    Tensor.nonzero: _nothing_is_nonzero,
    torch.nonzero: _nothing_is_nonzero,
}


def _words(error: Exception) -> str:
    text = str(error).strip().splitlines()
    first = text[0][:160] if text else ""
    return first if isinstance(error, NotTraceable) else f"{type(error).__name__}: {first}"
