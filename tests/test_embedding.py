# SPDX-License-Identifier: Apache-2.0
"""StableEmbedding: what the 8-bit optimizers paper asks of it, the mark for 32-bit states, and what copies keep."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from hf_lowprec import StableEmbedding, optim
from hf_lowprec.modules import embedding
from hf_lowprec.optim.overrides import is_embedding

TOLERANCE = 1e-6  # float32, a norm of 64 elements against torch's own


@pytest.fixture
def layer() -> StableEmbedding:
    torch.manual_seed(0)
    layer = StableEmbedding(100, 64)
    with torch.no_grad():
        layer.norm.weight.uniform_(0.5, 2)
        layer.norm.bias.uniform_(-1, 1)
    return layer


def test_initialised_xavier_uniform():
    torch.manual_seed(0)
    weight = StableEmbedding(1000, 512).weight.detach()
    bound = math.sqrt(6 / (1000 + 512))
    assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)


def test_norm_after_the_lookup(layer):
    ids = torch.randint(0, 100, (2, 7))
    rows = layer.weight[ids]
    centred = rows - rows.mean(-1, keepdim=True)
    expected = centred / (rows.var(-1, unbiased=False, keepdim=True) + layer.norm.eps).sqrt()
    expected = expected * layer.norm.weight + layer.norm.bias
    assert layer(ids).shape == (2, 7, 64)
    torch.testing.assert_close(layer(ids), expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("autocast", [False, True])
def test_norm_in_float32_whatever_the_weight(layer, autocast):
    ids = torch.randint(0, 100, (2, 7))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    wide = copy.deepcopy(half).float()  # the same values
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = half(ids)
    assert out.dtype == torch.bfloat16 and torch.equal(out, wide(ids).bfloat16())


def test_padding_row_stays_and_gradients_reach_the_rest():
    layer = StableEmbedding(10, 8, padding_idx=3)
    assert not layer.weight[3].any()
    layer(torch.tensor([3, 5])).square().sum().backward()
    assert not layer.weight.grad[3].any() and layer.weight.grad[5].any() and layer.norm.weight.grad.any()


def test_state_dict_as_bitsandbytes(layer):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    theirs = bitsandbytes.nn.StableEmbedding(100, 64)
    theirs.load_state_dict(layer.state_dict())
    ids = torch.randint(0, 100, (5,))
    torch.testing.assert_close(theirs(ids), layer(ids), atol=TOLERANCE, rtol=TOLERANCE)


# --- 32-bit states --------------------------------------------------------------------------------------------------


def test_marked_as_mark_embeddings_does(layer):
    plain = nn.Embedding(10, 8)
    assert not is_embedding(plain.weight)
    optim.mark_embeddings(plain)
    assert getattr(plain.weight, embedding.MARK) is True and is_embedding(layer.weight)
    assert not is_embedding(layer.norm.weight)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "assign", "bfloat16"])
def test_mark_survives(layer, how):
    copies: dict[str, Any] = {
        "deepcopy": lambda: copy.deepcopy(layer),
        "pickle": lambda: pickle.loads(pickle.dumps(layer)),
        "bfloat16": lambda: layer.to(torch.bfloat16),
    }
    if how == "assign":
        other = StableEmbedding(100, 64, device="meta")
        other.load_state_dict(layer.state_dict(), assign=True)
    else:
        other = copies[how]()
    assert is_embedding(other.weight)


@pytest.mark.parametrize("stable", [True, False])
def test_states_of_32_bits_without_a_word(stable):
    layer = StableEmbedding(100, 64) if stable else nn.Linear(100, 64)
    optimizer = optim.AdamW(layer.parameters(), states="8bit")
    layer(torch.randint(0, 100, (9,)) if stable else torch.randn(9, 100)).square().sum().backward()
    optimizer.step()
    assert ("exp_avg" in optimizer.state[layer.weight]) is stable
    assert ("exp_avg_qdata" in optimizer.state[layer.weight]) is not stable
