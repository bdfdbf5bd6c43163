# SPDX-License-Identifier: Apache-2.0
"""Weights as eXmY files: exactly their bits, exactly dequantise(quantise(w)) in a stock model, and nothing from a file
that is damaged, cut off, or somebody else's."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from core import batch, llama, mlp, same_bits, token_ids
from torch import Tensor, nn

import hf_lowprec
from hf_lowprec.checkpoint import FILE, ExportError, read_exported
from hf_lowprec.numerics import quantize_dequantize
from hf_lowprec.presets.exmy import aligned

pytest.importorskip("safetensors")
FORMATS = ["exmy:e3m1", "exmy:e3m1/row", "exmy:e0m2/row", "exmy:e2m0", "exmy:e4m3/row", "exmy:e5m3", "exmy:e6m0/row"]


def odd(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Widths that fill no byte, and no bias."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, 17), nn.LayerNorm(17), nn.Linear(17, 5, bias=False)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_loads_what_was_quantised(format: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, stock = odd(dtype), odd(dtype)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = hf_lowprec.export_pretrained(model, tmp_path, format=format)
    assert report.file == tmp_path / FILE and report.weights == 2 and report.format == format
    assert all(same_bits(v, before[k]) for k, v in model.state_dict().items()), "export changes nothing"
    for p in stock.parameters():
        p.data.zero_()
    hf_lowprec.load_exported(stock, tmp_path)
    for key, value in stock.state_dict().items():
        packed = key in ("0.weight", "2.weight")
        wanted = quantize_dequantize(before[key].float(), aligned(format)).to(dtype) if packed else before[key]
        assert same_bits(value, wanted), key


def test_exactly_the_bits(tmp_path: Path) -> None:
    from safetensors import safe_open

    for format, bits in (("exmy:e3m1", 5), ("exmy:e2m0/row", 3), ("exmy:e3m3", 7), ("exmy:e4m4", 9)):
        report = hf_lowprec.export_pretrained(odd(), tmp_path, format=format)
        with safe_open(report.file, "pt") as file:
            sizes = {key: file.get_tensor(key).nbytes for key in file.keys()}
        assert sizes["0.weight.planes"] == -(-33 * 17 // 8) * bits and sizes["2.weight.planes"] == -(-85 // 8) * bits
        assert sizes["0.weight.exponents"] == (17 if "row" in format else 1)
        assert report.bytes == sum(sizes.values())
        assert report.bytes_before == sum(p.nbytes for p in odd().parameters()) and str(report.bytes_before)
    assert sorted(p.name for p in tmp_path.iterdir()) == [FILE], "no file half written"


def test_a_converted_model_and_its_exceptions(tmp_path: Path) -> None:
    model = mlp()
    hf_lowprec.convert(model, "fp8-lm")
    assert hf_lowprec.export_pretrained(model, tmp_path, format="exmy:e3m1").weights == 2
    report = hf_lowprec.export_pretrained(model, tmp_path, format="exmy:e3m1", modules_to_not_convert="up")
    assert report.weights == 1
    state = read_exported(tmp_path)
    assert same_bits(state["up.weight"], model.up.weight.detach())
    assert not same_bits(state["down.weight"], model.down.weight.detach())
    hf_lowprec.load_exported(model, tmp_path)  # and the cached casts are gone
    fresh = mlp()
    hf_lowprec.load_exported(fresh, tmp_path)
    hf_lowprec.convert(fresh, "fp8-lm")
    assert same_bits(model(batch(4, 32)).detach(), fresh(batch(4, 32)).detach())


@pytest.mark.parametrize("tied", [False, True])
def test_a_transformers_model_and_its_config(tied: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = llama(tie_word_embeddings=tied)
    report = hf_lowprec.export_pretrained(model, tmp_path, format="exmy:e3m2/row")
    assert report.weights == 14, "no embedding, no head"
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert {**config.to_dict(), "_name_or_path": ""} == model.config.to_dict()
    torch.manual_seed(5)
    stock = transformers.AutoModelForCausalLM.from_config(config)
    hf_lowprec.load_exported(stock, tmp_path)
    for (name, a), b in zip(model.named_parameters(), stock.parameters(), strict=True):
        packed = a.dim() == 2 and "embed" not in name and "lm_head" not in name
        wanted = quantize_dequantize(a.detach(), aligned("exmy:e3m2/row")) if packed else a.detach()
        assert same_bits(b.detach(), wanted), name
    assert (stock.lm_head.weight is stock.model.embed_tokens.weight) == tied
    ids = token_ids(2, 8)
    assert torch.isfinite(stock(input_ids=ids, labels=ids).loss)
    with pytest.raises((OSError, ValueError)):  # a stock loader does not take half of the weights for all
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_two_weights_are_not_loaded_into_one(tmp_path: Path) -> None:
    """A model that ties what the file holds apart would take the last of them for both, and say nothing."""
    pytest.importorskip("transformers")
    model = llama()
    hf_lowprec.export_pretrained(model, tmp_path, format="exmy:e3m2")
    refuses(llama(tie_word_embeddings=True), tmp_path, r"embed_tokens.weight .*are two weights, .*tie_word_embeddings")
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    hf_lowprec.export_pretrained(model, tmp_path, format="exmy:e3m2")
    hf_lowprec.load_exported(llama(tie_word_embeddings=True), tmp_path)  # two of the same values are one


def test_not_a_number_stays_where_nothing_is_packed(tmp_path: Path) -> None:
    model = odd()
    model[1].weight.data[3] = float("nan")
    hf_lowprec.export_pretrained(model, tmp_path, format="exmy:e3m1")
    stock = odd()
    hf_lowprec.load_exported(stock, tmp_path)
    assert same_bits(stock[1].weight.detach(), model[1].weight.detach())


def test_conv1d_has_an_exponent_per_output_feature(tmp_path: Path) -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    model, stock = (nn.Sequential(pytorch_utils.Conv1D(24, 40)) for _ in range(2))
    model[0].weight.data *= torch.exp2(batch(1, 24) * 4)  # outputs of many sizes
    hf_lowprec.export_pretrained(model, tmp_path, format="exmy:e2m2/row")
    hf_lowprec.load_exported(stock, tmp_path)
    wanted = quantize_dequantize(model[0].weight.detach().t().contiguous(), aligned("exmy:e2m2/row")).t()
    assert torch.equal(stock[0].weight.detach(), wanted)


def test_a_wider_model_takes_them_and_a_narrower_one_does_not(tmp_path: Path) -> None:
    hf_lowprec.export_pretrained(odd(torch.bfloat16), tmp_path, format="exmy:e3m1")
    wide = odd(torch.float32)
    hf_lowprec.load_exported(wide, tmp_path)
    assert wide[0].weight.dtype == torch.float32
    assert same_bits(wide[0].weight.detach().bfloat16(), read_exported(tmp_path)["0.weight"])
    hf_lowprec.export_pretrained(odd(), tmp_path, format="exmy:e3m1")
    refuses(odd(torch.bfloat16), tmp_path, "is torch.float32, which torch.bfloat16 does not hold exactly")


def test_on_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from typer.testing import CliRunner

    from hf_lowprec.cli import app

    model = llama()
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    run = CliRunner().invoke(app, ["export", str(tmp_path / "model"), str(out), "--format", "exmy:e3m1/row"])
    assert run.exit_code == 0 and "14 weights as exmy:e3m1/row" in run.output and "no tokenizer found" in run.output
    assert {p.name for p in out.iterdir()} >= {FILE, "config.json", "generation_config.json"}
    other = llama(seed=3)
    hf_lowprec.load_exported(other, out)
    assert same_bits(other.lm_head.weight.detach(), model.lm_head.weight.detach())
    for arguments, words in (
        ([str(tmp_path / "model"), str(out), "--format", "int3"], "what can be exported so far"),
        ([str(tmp_path / "nothing"), str(out), "--format", "exmy:e3m1"], "no model can be loaded"),
    ):
        run = CliRunner().invoke(app, ["export", *arguments])
        assert run.exit_code == 2 and words in run.output


# --- what is refused ------------------------------------------------------------------------------------------------


def refuses(model: nn.Module, folder: Path, match: str) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ExportError, match=match):
        hf_lowprec.load_exported(model, folder)
    assert all(same_bits(v, before[k]) for k, v in model.state_dict().items()), "nothing has changed"


def flip(raw: bytes) -> bytes:
    return raw[:-40] + bytes([raw[-40] ^ 1]) + raw[-39:]


def with_header(raw: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The same tensors under other metadata of ours."""
    (n,) = struct.unpack("<Q", raw[:8])
    head = json.loads(raw[8 : 8 + n])
    ours = json.loads(head["__metadata__"]["hf_lowprec"])
    change(ours)
    head["__metadata__"]["hf_lowprec"] = json.dumps(ours)
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + n :]


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda raw: b"", "is damaged, or no readable safetensors file"),
    "cut": (lambda raw: raw[:-1], "is damaged, or no readable safetensors file"),
    "cut in the header": (lambda raw: raw[:50], "is damaged, or no readable safetensors file"),
    "longer": (lambda raw: raw + b"\0", "is damaged, or no readable safetensors file"),
    "one bit": (flip, "the bytes of .* are not those that were written"),
    "a pickle": (lambda raw: pickle.dumps({"0.weight": [1.0]}), "no readable safetensors file"),
    "version": (lambda raw: with_header(raw, lambda h: h.update(version=2)), "version 2 .* reads 1"),
    "format": (lambda raw: with_header(raw, lambda h: h.update(format="exmy:e9m9")), "eXmY has 2 to 9"),
    "another width": (
        lambda raw: with_header(raw, lambda h: h.update(format="exmy:e3m2")),
        "is damaged: .* bytes and",
    ),
    "shape": (
        lambda raw: with_header(raw, lambda h: h["weights"]["0.weight"].update(shape=[17, 34])),
        "is damaged: .* bytes and",
    ),
    "no shape": (lambda raw: with_header(raw, lambda h: h["weights"]["0.weight"].pop("shape")), "makes no sense"),
    "dtype": (
        lambda raw: with_header(raw, lambda h: h["weights"]["0.weight"].update(dtype="load")),
        "makes no sense",
    ),
    "unknown weight": (
        lambda raw: with_header(raw, lambda h: h["weights"].update(x=h["weights"].pop("0.weight"))),
        "do not belong together",
    ),
    "tied to nothing": (lambda raw: with_header(raw, lambda h: h["tied"].update(a="b")), "do not belong together"),
    "no sums": (lambda raw: with_header(raw, lambda h: h.update(crc32={})), "do not belong together"),
    "no JSON object": (lambda raw: with_header(raw, lambda h: h.clear()), "makes no sense"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_damaged_and_foreign_files(how: str, tmp_path: Path) -> None:
    hf_lowprec.export_pretrained(odd(), tmp_path, format="exmy:e3m1")
    change, match = BROKEN[how]
    (tmp_path / FILE).write_bytes(change((tmp_path / FILE).read_bytes()))
    refuses(odd(), tmp_path, match)


def test_safetensors_of_others_and_no_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    refuses(odd(), tmp_path, "there is no .*exmy.safetensors: hf_lowprec.export_pretrained writes it")
    save_file(odd().state_dict(), tmp_path / FILE)
    refuses(odd(), tmp_path, "was not written by hf_lowprec.export_pretrained")


def test_another_model(tmp_path: Path) -> None:
    hf_lowprec.export_pretrained(odd(), tmp_path, format="exmy:e3m1")
    refuses(mlp(), tmp_path, r"missing \['down.bias'.*unexpected \['0.bias'")
    wider = odd()
    wider[0] = nn.Linear(34, 17)
    with pytest.raises(ExportError, match=r"\.bias of the model is on the meta device"):
        hf_lowprec.load_exported(odd().to("meta"), tmp_path)
    refuses(wider, tmp_path, r"0.weight is \(17, 33\), the model's is \(17, 34\)")


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    def fails(model: nn.Module, match: str, format: str = "exmy:e3m1") -> None:
        with pytest.raises(ExportError, match=match):
            hf_lowprec.export_pretrained(model, tmp_path / "new", format=format)
        assert not (tmp_path / "new").exists()

    fails(odd(), "what can be exported so far is exmy:e<X>m<Y>", "gguf")
    fails(odd(), "what can be exported so far is exmy:e<X>m<Y>", None)  # type: ignore[arg-type]
    fails(odd(), "eXmY has 2 to 9", "exmy:e7m7")
    fails(nn.LayerNorm(4), "no linear to pack")
    fails(odd().to("meta"), "is on the meta device")
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"no folder can be made at .*file: File exists"):
        hf_lowprec.export_pretrained(odd(), tmp_path / "file", format="exmy:e3m1")
    bad = odd()
    bad[0].weight.data[3, 4] = float("nan")
    fails(bad, "0.weight holds NaN or Inf")
    named = odd()
    named.register_buffer("a", torch.zeros(1))
    named._buffers["x.planes"] = named._buffers.pop("a")
    fails(named, "is called like a packed weight")


def test_slices_of_one_memory(tmp_path: Path) -> None:
    model = odd()
    both: Tensor = torch.randn(2, 17)
    model[1].weight.data, model[1].bias.data = both[0], both[1]
    hf_lowprec.export_pretrained(model, tmp_path, format="exmy:e3m1")
    assert torch.equal(read_exported(tmp_path)["1.bias"], both[1])
