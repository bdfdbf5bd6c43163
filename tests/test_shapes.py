# SPDX-License-Identifier: Apache-2.0
"""The shape adviser: which sizes miss the tensor cores' multiples, and what padding would help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_lowprec import cli
from hf_lowprec.shapes import NEEDED, PREFERRED, Gemm, advise


def test_gpt2_vocabulary() -> None:
    """50257 -> 50304, as everybody pads it: a multiple of 64 and of 128, 0.09 % more."""
    (advice,) = advise([Gemm("lm_head", 768, 50257, 16)])
    assert (advice.size, advice.missed, advice.serious, advice.padded) == (50257, 8, True, 50304)
    assert str(advice) == "no multiple of 8: pad to 50304 (+0.094 %)" and advice.where == ("lm_head (out)",)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_multiples(bits: int) -> None:
    needed, preferred = NEEDED[bits], PREFERRED[bits]
    assert advise([Gemm("x", 8 * preferred, preferred, bits)]) == []
    for size in (preferred + 1, 2 * preferred + needed, 40 * preferred + needed, 100 * preferred - 1):
        (advice,) = advise([Gemm("x", size, preferred, bits)])
        assert advice.serious == bool(size % needed)
        if advice.padded is not None:
            assert advice.padded % needed == 0 and size < advice.padded < size + preferred
        else:
            assert not advice.serious and advice.growth > 0.02


def test_a_small_size_is_padded_to_what_it_needs_only() -> None:
    (small,) = advise([Gemm("x", 100, 64, 16)])
    assert small.padded == 104 and "no multiple of 8: pad to 104 (+4 %)" in str(small)
    (half,) = advise([Gemm("x", 576, 128, 8)])
    assert half.padded is None and not half.serious and "the next is 11.1 % larger" in str(half)


def test_sizes_are_said_once_the_serious_first() -> None:
    gemms = [
        Gemm("q", 576, 576, 8),
        Gemm("up", 576, 1537, 8),
        Gemm("down", 1537, 576, 8),
        Gemm("head", 576, 49152, 16),
    ]
    found = advise(gemms)
    assert [(a.size, a.bits) for a in found] == [(1537, 8), (576, 8)]
    assert found[0].where == ("up (out)", "down (in)") and found[1].where[:2] == ("q (in)", "q (out)")


def inspect(folder: Path, recipe: str, **changes: object) -> str:
    config = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 192, "n_layer": 2, "n_head": 4,
        "vocab_size": 50257, "n_inner": 700, **changes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    done = CliRunner().invoke(cli.app, ["inspect", str(folder), "--recipe", recipe])
    assert done.exit_code == 0, done.output
    return done.output


def test_inspect_advises(tmp_path: Path) -> None:
    """transformers' Conv1D, whose weight is [in, out]; the vocabulary, though its layer is left alone; by recipe."""
    pytest.importorskip("transformers")
    bf16 = inspect(tmp_path, "bf16")
    assert "50257  16    lm_head (out)" in bf16 and "pad to 50304 (+0.094 %)" in bf16
    assert "model.resize_token_embeddings(50304)" in bf16
    assert "700    16    transformer.h.*.mlp.c_fc (out), transformer.h.*.mlp.c_proj (in)" in bf16
    assert "no multiple of 8: pad to 704 (+0.57 %)" in bf16 and "batch x sequence" in bf16
    fp8 = inspect(tmp_path, "fp8-lm")
    assert "700    8 " in fp8 and "no multiple of 16: pad to 704" in fp8
    assert "192    8 " in fp8 and "192    16 " not in fp8 and "lm_head (out)" in fp8


def test_inspect_of_a_model_that_fits(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    output = inspect(tmp_path, "bf16", vocab_size=1024, n_inner=768)
    assert "shapes: all in and out features are multiples" in output and "pad to" not in output
