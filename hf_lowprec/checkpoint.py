# SPDX-License-Identifier: Apache-2.0
"""Weights in fewer bits as files: `export_pretrained` writes them, `load_exported` puts their values into a model.

eXmY (arXiv 2405.13938): `exmy.safetensors` holds, for the weight `NAME` of every linear that a recipe would convert,

    NAME.planes       uint8, the codes of the flattened weight in the planes of `numerics.packing`: exactly their bits
    NAME.exponents    uint8, E8M0: one for the weight, or one per output feature (`/row`)

and every other tensor of the state dict as it is. The header's metadata, under `hf_lowprec`, is JSON: the format, the
shape and dtype of each packed weight, tensors that are one (tied), and a CRC-32 of each tensor. The file has a name of
its own: a stock loader that met only half of the weights would fill in the rest at random.

Nothing is unpickled, and a file is checked as a whole before a single weight changes.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowprec import files
from hf_lowprec.conversion import invalidate, unwrapped
from hf_lowprec.formats import get_format
from hf_lowprec.modules.linear import LowPrecMixin
from hf_lowprec.numerics import ScaledTensor, dequantize, packing, quantize
from hf_lowprec.presets.exmy import PREFIX, aligned, exmy_recipe
from hf_lowprec.recipe import Quant, RecipeError
from hf_lowprec.selection import Choice, matches, select

FILE = "exmy.safetensors"
_KEY, _VERSION = "hf_lowprec", 1
_PLANES, _EXPONENTS = ".planes", ".exponents"


class ExportError(ValueError):
    """A model that cannot be exported as asked, or a file that cannot be loaded. Nothing was changed."""


@dataclass(frozen=True)
class ExportReport:
    """file: what was written. weights: how many are packed; of all tensors, bytes now and as the model holds them."""

    file: Path
    format: str
    weights: int
    bytes: int
    bytes_before: int

    def __str__(self) -> str:
        return (
            f"{self.file}: {self.weights} weights as {self.format}; {self.bytes:,} bytes in all instead of "
            f"{self.bytes_before:,}"
        )


def export_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    format: str,
    modules_to_not_convert: Sequence[str] | str = (),
) -> ExportReport:
    """Write the model's weights, those of its linears as `format`, and its config where it has one, into `folder`.

    Args:
        model: converted or not; its weights are not touched. One process holds all of it.
        format: `exmy:e<X>m<Y>` (one exponent per weight) or `exmy:e<X>m<Y>/row` (one per output feature).
        modules_to_not_convert: as for `convert`. Embeddings, heads, norms and biases keep their dtype in any case.

    Raises:
        ExportError: another format, no linear to pack, a weight that is not finite, sharded, or on the meta device; a
            folder that cannot be made.
        ImportError: safetensors is not installed.
    """
    files.require()
    quant, spelling = _policy(format)
    model = unwrapped(model)
    patterns = (modules_to_not_convert,) if isinstance(modules_to_not_convert, str) else tuple(modules_to_not_convert)
    linears = _linears(model, spelling, patterns)
    tensors: dict[str, Tensor] = {}
    header: dict[str, Any] = {"version": _VERSION, "format": spelling, "weights": {}, "tied": {}}
    known: dict[tuple[Any, ...], str] = {}
    before = 0
    for key, value in model.state_dict().items():
        value = _plain(key, value)
        if value.numel() and (first := known.setdefault(_memory(value), key)) != key:
            header["tied"][key] = first
            continue
        before += value.nbytes
        if key not in linears:
            if key.endswith((_PLANES, _EXPONENTS)):
                raise ExportError(f"{key} is called like a packed weight")
            value = value.cpu().contiguous()
            # safetensors takes no slices of a larger memory.
            _add(tensors, key, value if value.untyped_storage().nbytes() == value.nbytes else value.clone())
            continue
        transposed = linears[key]
        planes, exponents = _pack(key, value.t() if transposed else value, quant)
        _add(tensors, key + _PLANES, planes)
        _add(tensors, key + _EXPONENTS, exponents)
        header["weights"][key] = {
            "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch."), "transposed": transposed,
        }  # fmt: skip
    header["crc32"] = {key: _crc(value) for key, value in tensors.items()}
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"no folder can be made at {target}: {error.strerror}") from None
    for name in ("config", "generation_config"):
        save = getattr(getattr(model, name, None), "save_pretrained", None)
        if save is not None:
            save(target)
    files.write(tensors, target / FILE, {_KEY: json.dumps(header)})
    after = sum(value.nbytes for value in tensors.values())
    return ExportReport(target / FILE, spelling, len(header["weights"]), after, before)


def load_exported(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Put the weights that `export_pretrained` wrote into a model of the same architecture, in place.

    What was packed becomes dequantise(quantise(weight)) in its old dtype, exactly; everything else is bit-equal. A
    model of another dtype takes them if it holds them exactly (float32 does).

    Raises ExportError, before anything changes: no such file, damaged, truncated, written by somebody else or by a
    newer version; names, shapes or dtypes that are not the model's; two weights that the model has in one memory
    (tied) and the file does not; a model without memory (the meta device).
    """
    state = read_exported(folder)
    model = unwrapped(model)
    mine = model.state_dict()
    missing, extra = sorted(set(mine) - set(state)), sorted(set(state) - set(mine))
    if missing or extra:
        raise ExportError(f"{folder}: weights of another model: missing {missing[:3]}, unexpected {extra[:3]}")
    tied: dict[tuple[Any, ...], str] = {}
    for key, value in state.items():
        own = mine[key]
        if own.shape != value.shape:
            raise ExportError(f"{folder}: {key} is {tuple(value.shape)}, the model's is {tuple(own.shape)}")
        if own.is_meta:
            raise ExportError(f"{key} of the model is on the meta device: build it on the CPU, or on a GPU")
        if torch.promote_types(own.dtype, value.dtype) != own.dtype:
            raise ExportError(
                f"{folder}: {key} is {value.dtype}, which {own.dtype} does not hold exactly: build the model in "
                f"{value.dtype}"
            )
        first = tied.setdefault(_memory(own), key) if own.numel() else key
        other = state[first]
        if value is not other and not torch.equal(value.to(own.dtype), other.to(own.dtype)):
            # The last one to be copied would be both.
            raise ExportError(
                f"{folder}: {first} and {key} are two weights, the model has one for both: build it from the config "
                "that was exported with them (tie_word_embeddings)"
            )
    model.load_state_dict(state)
    invalidate(model)


def read_exported(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict that `load_exported` loads, on the CPU. `folder`: or the file itself. Raises ExportError."""
    path = Path(folder)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise ExportError(f"there is no {path}: hf_lowprec.export_pretrained writes it")
    try:
        tensors, metadata = files.read(path)
    except ValueError as error:
        raise ExportError(f"{path} is damaged, or {error}") from None
    quant, weights, tied = _check_header(path, metadata, tensors)
    out = {key: value for key, value in tensors.items() if not key.endswith((_PLANES, _EXPONENTS))}
    for key, (shape, dtype, transposed) in weights.items():
        value = _unpack(path, key, tensors, torch.Size(shape[::-1] if transposed else shape), quant)
        out[key] = (value.t() if transposed else value).to(dtype)
    out.update({key: out[first] for key, first in tied.items()})
    return out


# --- one weight -----------------------------------------------------------------------------------------------------


def _pack(key: str, weight: Tensor, quant: Quant) -> tuple[Tensor, Tensor]:
    """(planes, exponents) of [out, in]."""
    weight = weight.detach().cpu()
    if not bool(weight.isfinite().all()):
        raise ExportError(f"{key} holds NaN or Inf, which {quant.format} cannot say")
    codes, scale = quantize(weight, quant)
    return packing.pack(codes.reshape(-1), get_format(quant.format).bits), scale.view(torch.uint8).reshape(-1)


def _unpack(path: Path, key: str, tensors: Mapping[str, Tensor], shape: torch.Size, quant: Quant) -> Tensor:
    """float32 [out, in]. Raises ExportError: sizes that do not fit, an exponent that is NaN."""
    planes, exponents = tensors[key + _PLANES], tensors[key + _EXPONENTS]
    bits = get_format(quant.format).bits
    per_row = quant.scaling.granularity == "row"
    wanted = ((packing.packed_size(shape.numel(), bits),), (shape[0] if per_row else 1,))
    if (tuple(planes.shape), tuple(exponents.shape)) != wanted or {planes.dtype, exponents.dtype} != {torch.uint8}:
        raise ExportError(f"{path} is damaged: {key} has {tuple(planes.shape)} bytes and {tuple(exponents.shape)} "
                          f"exponents, not {wanted[0]} and {wanted[1]}")  # fmt: skip
    if bool((exponents == 255).any()):
        raise ExportError(f"{path} is damaged: an exponent of {key} is not a number")
    codes = packing.unpack(planes, bits, shape.numel()).view(shape)
    scale = exponents.view(torch.float8_e8m0fnu)
    return dequantize(ScaledTensor(codes, scale.view(-1, 1) if per_row else scale.view(())), quant)


def _crc(value: Tensor) -> int:
    array: Any = value.reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(array)


# --- what goes in ---------------------------------------------------------------------------------------------------


def _policy(text: str) -> tuple[Quant, str]:
    """The policy of a format's name, and its canonical spelling."""
    try:
        if isinstance(text, str) and text.lower().startswith(PREFIX):
            name = text.lower()
            return aligned(name), exmy_recipe(name).name
    except RecipeError as error:
        raise ExportError(f"format: {error}") from None
    raise ExportError(f"format {text!r}: what can be exported so far is {PREFIX}e<X>m<Y> and {PREFIX}e<X>m<Y>/row")


def _linears(model: nn.Module, name: str, patterns: tuple[str, ...]) -> dict[str, bool]:
    """Keys of the weights to pack -> whether they are stored [in, out]. Raises ExportError: there are none."""
    report, chosen = select(model, exmy_recipe(name), Choice(patterns))
    for path, module in model.named_modules():
        if isinstance(module, LowPrecMixin) and not any(matches(pattern, path) for pattern in patterns):
            chosen[path] = module  # type: ignore[assignment]
    if not chosen:
        raise ExportError(f"the model has no linear to pack:\n{report}")
    return {f"{path}.weight" if path else "weight": not isinstance(m, nn.Linear) for path, m in chosen.items()}


def _plain(key: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise ExportError(f"{key} is a {type(value).__name__}, no tensor: safetensors cannot hold it")
    if type(value) not in (Tensor, nn.Parameter):
        raise ExportError(f"{key} is a {type(value).__name__}: gather the whole model on one process first")
    if value.is_meta:
        raise ExportError(f"{key} is on the meta device: load the weights first")
    return value.detach()


def _memory(value: Tensor) -> tuple[Any, ...]:
    """What tensors that are one have in common."""
    return value.device, value.data_ptr(), value.shape, value.stride(), value.dtype


def _add(tensors: dict[str, Tensor], key: str, value: Tensor) -> None:
    if key in tensors:
        raise ExportError(f"two tensors would be called {key}")
    tensors[key] = value


# --- what comes out -------------------------------------------------------------------------------------------------

_Weights = dict[str, tuple[list[int], torch.dtype, bool]]


def _check_header(
    path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> tuple[Quant, _Weights, dict[str, str]]:
    """(policy, packed weights, tied names) of a file whose tensors are those that were written."""
    if _KEY not in metadata:
        raise ExportError(f"{path} was not written by hf_lowprec.export_pretrained")
    try:
        header = json.loads(metadata[_KEY])
        version = header["version"]
        if version != _VERSION:
            raise ExportError(f"{path} has version {version} of the format; this hf_lowprec reads {_VERSION}")
        quant, _ = _policy(header["format"])
        weights: _Weights = {}
        for key, entry in header["weights"].items():
            shape, dtype = [int(n) for n in entry["shape"]], getattr(torch, entry["dtype"])
            if len(shape) != 2 or min(shape) < 0 or not dtype.is_floating_point:
                raise ValueError(key)
            weights[key] = shape, dtype, bool(entry["transposed"])
        tied, sums = dict(header["tied"]), dict(header["crc32"])
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"{path} is damaged: its header makes no sense ({type(error).__name__}: {error})") from None
    packed = {key + end for key in weights for end in (_PLANES, _EXPONENTS)}
    found = {key for key in tensors if key.endswith((_PLANES, _EXPONENTS))}
    names = (set(tensors) - found) | set(weights)
    if set(sums) != set(tensors) or packed != found or names & set(tied) or not set(tied.values()) <= names:
        raise ExportError(f"{path} is damaged: its header and its tensors do not belong together")
    for key, value in tensors.items():
        if _crc(value) != sums[key]:
            raise ExportError(f"{path} is damaged: the bytes of {key} are not those that were written")
    return quant, weights, tied


__all__ = ["ExportError", "ExportReport", "export_pretrained", "load_exported", "read_exported"]
