# SPDX-License-Identifier: Apache-2.0
"""Which states a parameter gets: names, marks, size, master, predicted scales; and arguments that are refused."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from training import (
    MAKE,
    NAMES,
    held,
    parameters,
    same,
    set_gradients,
    small,
    snapshot,
    weights,
)

from hf_lowprec.formats import get_format
from hf_lowprec.optim import SGD, Adam, AdamW, Lion, StableAdamW, mark_embeddings
from hf_lowprec.presets import FP8_LM_STATES
from hf_lowprec.recipe import States


class Tied(nn.Module):
    """An embedding that is the output head too, two hidden layers, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 100, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(self.norm(x))


def tied(dtype: torch.dtype = torch.float32) -> Tied:
    torch.manual_seed(0)
    return Tied().to(dtype)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        ids = torch.randint(0, 100, (4, 16), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids).flatten(0, 1).float(), ids.flatten()).backward()
        optimizer.step()


def quantised(optimizer: torch.optim.Optimizer, param: torch.Tensor) -> bool:
    keys = optimizer.state[param].keys()
    assert ("exp_avg_qdata" in keys) != ("exp_avg" in keys)
    return "exp_avg_qdata" in keys


# --- names ----------------------------------------------------------------------------------------------------------


def test_overrides_by_name():
    model = tied()
    optimizer = AdamW(
        model.named_parameters(),
        states="8bit",
        overrides={
            r"layers\.0\.weight": "fp32",
            r"layers\..*weight": small("compact"),
            "norm": States(),
        },
    )
    steps(model, optimizer, range(2))
    first, second = (layer.weight for layer in model.layers)
    assert not quantised(optimizer, first), "the first pattern that matches wins"
    assert optimizer.state[second]["exp_avg_qdata"].dtype == torch.int8
    assert optimizer.state[model.embed.weight]["exp_avg_qdata"].dtype == torch.uint8, "8bit, as nothing was marked"
    assert not quantised(optimizer, model.norm.weight)
    assert optimizer.param_groups[0]["overrides"][1:3] == ["fp32", None]

    twin_model, twin = pickle.loads(pickle.dumps((model, optimizer)))
    for m, o in ((model, optimizer), (twin_model, twin)):
        steps(m, o, range(2, 4))
        extra = nn.Parameter(torch.ones(64, 64))
        o.add_param_group({"params": [("late.layers.0.weight", extra)]})
        assert o.param_groups[1]["overrides"] == ["fp32"], "patterns hold for what is added later"
    assert torch.equal(weights(model), weights(twin_model))


def test_overrides_travel_in_the_checkpoint_and_must_agree():
    model = tied()
    optimizer = AdamW(model.named_parameters(), overrides={r"layers\.0": small("fp8")})
    steps(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    other_model = copy.deepcopy(model)
    other = AdamW(other_model.named_parameters(), overrides={r"layers\.0": small("fp8")})
    other.load_state_dict(saved)
    steps(model, optimizer, range(2, 4))
    steps(other_model, other, range(2, 4))
    assert torch.equal(weights(model), weights(other_model)) and same(snapshot(optimizer), snapshot(other))
    without = AdamW(copy.deepcopy(model).named_parameters())
    with pytest.raises(ValueError, match=r"parameter layers\.0\.weight: .*e4m3fn.*has '8bit'.*overrides"):
        without.load_state_dict(saved)


def test_overrides_that_cannot_be():
    model = tied()
    with pytest.raises(ValueError, match=r"named_parameters\(\)"):
        AdamW(model.parameters(), overrides={"head": "fp32"})
    with pytest.raises(ValueError, match="'embedd' occurs in no parameter's name; there are embed"):
        AdamW(model.named_parameters(), overrides={"embed": "fp32", "embedd": "fp32"})
    with pytest.raises(ValueError, match="is no regular expression"):
        AdamW(model.named_parameters(), overrides={"layers.(": "fp32"})
    with pytest.raises(ValueError, match="unknown states 'fp9'"):
        AdamW(model.named_parameters(), overrides={"layers": "fp9"})
    with pytest.raises(ValueError, match="of the whole optimizer"):
        AdamW([{"params": list(model.named_parameters()), "overrides": {"layers": "fp32"}}])


# --- marks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("states, plain", [("8bit", True), ("4bit", True), ("fp8-lm", False), ("compact", False)])
def test_marked_embeddings_keep_float32_moments_where_the_states_say_so(states, plain, when):
    model = tied()
    if when == "before":
        assert mark_embeddings(model) == 1
    optimizer = AdamW(model.parameters(), states=states)
    if when == "after":
        optimizer.state_bytes()
        mark_embeddings(model)
    steps(model, optimizer, range(1))
    assert quantised(optimizer, model.embed.weight) != plain
    assert quantised(optimizer, model.layers[0].weight)
    assert (optimizer.param_groups[0]["overrides"][0] is not None) == plain


def test_marks_survive_copies_and_checkpoints_though_parameters_lose_them():
    model = tied(torch.bfloat16)
    mark_embeddings(model)
    optimizer = AdamW(model.parameters(), states="8bit")
    steps(model, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    twins = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    fresh = tied(torch.bfloat16)
    loaded = AdamW(fresh.parameters(), states="8bit")
    fresh.load_state_dict(model.state_dict())
    loaded.load_state_dict(before)
    assert not any(hasattr(m.embed.weight, "_hf_lowprec_embedding") for m in (twins[0][0], fresh))
    steps(model, optimizer, range(2, 5))
    for twin_model, twin in [*twins, (fresh, loaded)]:
        steps(twin_model, twin, range(2, 5))
        assert torch.equal(weights(model), weights(twin_model))


def test_a_mark_does_not_change_what_was_trained_unmarked():
    model = tied()
    optimizer = AdamW(model.parameters(), states="8bit")
    steps(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    mark_embeddings(model)
    steps(model, optimizer, range(2, 3))
    assert quantised(optimizer, model.embed.weight)
    marked = AdamW(model.parameters(), states="8bit")
    marked.load_state_dict(saved)
    assert quantised(marked, model.embed.weight) and marked.param_groups[0]["overrides"][0] is None


def test_an_override_beats_a_mark():
    model = tied()
    mark_embeddings(model)
    optimizer = AdamW(model.named_parameters(), overrides={"embed": "8bit"})
    steps(model, optimizer, range(1))
    assert quantised(optimizer, model.embed.weight)


# --- size -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", NAMES)
def test_small_tensors(states):
    params = [nn.Parameter(torch.randn(n)) for n in (4095, 4096)]
    optimizer = AdamW(params, states=states)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    wanted = {"fp32": [False, False], "bf16": [True, True]}.get(states, [False, True])
    assert [quantised(optimizer, p) for p in params] == wanted


# --- master ---------------------------------------------------------------------------------------------------------

KEYS = {
    "fp32": {"master"},
    "fp16-scaled": {"master_qdata", "master_scale", "master_amax"},
    "bf16+8": {"master_residual"},
    "bf16+16": {"master_residual"},
    "sr": set(),
    None: set(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("master", KEYS)
def test_masters_exist_beside_16_bits_only(master, dtype):
    param = nn.Parameter(torch.randn(8, 8).to(dtype))
    if dtype == torch.float16 and master in ("bf16+8", "bf16+16"):
        with pytest.raises(ValueError, match=r"bfloat16 Parameter.*use master 'fp32', 'fp16-scaled', 'sr' or None"):
            AdamW([param], master=master)
        return
    optimizer = AdamW([param], states="8bit", master=master)
    param.grad = torch.ones_like(param)
    optimizer.step()
    kept = {key for key in optimizer.state[param] if key.startswith("master")}
    assert kept == (set() if dtype == torch.float32 else KEYS[master])


def test_a_group_has_its_own_master_and_a_refused_group_is_not_kept():
    full, half = nn.Parameter(torch.randn(4).bfloat16()), nn.Parameter(torch.randn(4).bfloat16())
    optimizer = AdamW([{"params": [full], "master": "fp32"}, {"params": [half]}], states="8bit")
    with pytest.raises(ValueError, match="bfloat16 Parameter"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2).half())], "master": "bf16+8"})
    with pytest.raises(ValueError, match="unknown master 'fp33'"):
        AdamW([full], master="fp33")
    for p in (full, half):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert len(optimizer.param_groups) == 2
    assert "master" in optimizer.state[full] and "master" not in optimizer.state[half]


# --- predicted scales -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*MAKE, "Nesterov", "no momentum"])
def test_bounds_hold_and_are_not_far_off(name, dtype):
    """Every value that a step wrote lay within the bound from which its scale was made; and it was of its size."""
    make = {
        **MAKE,
        "Nesterov": lambda p, **o: SGD(p, momentum=0.9, nesterov=True, **o),
        "no momentum": lambda p, **o: SGD(p, **o),
    }[name]
    params = parameters([(64, 65), (5,)], dtype)
    optimizer = make(params, lr=1e-2, states=replace(FP8_LM_STATES, min_numel=0), weight_decay=0.0)
    for step in range(30):
        set_gradients(params, step)
        optimizer.step()
        for item in optimizer._plan_now().items:
            for slot in item.predicted:
                quant = item.slots[slot]
                amax, scale = item.state[f"{slot}_amax"], item.state[f"{slot}_scale"]
                top = scale * 2.0**-quant.scaling.margin * get_format(quant.format).max
                assert amax <= top, (step, slot)
                # powers of two lose a factor of 2, the first steps and changing gradients of this test the rest
                assert top <= amax * (4 if slot == "master" else 2000) + 1e-30, (step, slot)


def test_where_there_is_no_bound():
    param = nn.Parameter(torch.ones(64, 64))
    half = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"coupled weight decay.*fp8-lm-exact"):
        Adam([param], weight_decay=0.1, states="fp8-lm")
    with pytest.raises(ValueError, match=r"coupled weight decay.*fp8-lm-exact"):
        SGD([half], momentum=0.9, weight_decay=0.1, states="fp8-lm", master="sr")
    for cls in (AdamW, StableAdamW):
        with pytest.raises(ValueError, match=r"beta1\^2 < beta2.*fp8-lm-exact"):
            cls([half], betas=(0.99, 0.95), states="fp8-lm")
        cls([param], betas=(0.99, 0.95), states="fp8-lm")  # a float32 Parameter has no master to bound
    optimizer = Adam([param], states="fp8-lm")
    param.grad = torch.ones_like(param)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match="coupled"):
        optimizer.step()
    assert (param == 1).all() and not optimizer.state


def test_coupled_decay_where_the_masters_size_is_known():
    results = []
    for states in ("fp8-lm", "fp8-lm-exact"):
        params = parameters([(64, 65)], torch.bfloat16)
        optimizer = Adam(params, lr=1e-3, weight_decay=0.5, states=states)
        for step in range(10):
            set_gradients(params, step)
            params[0].grad *= 1e-3  # the decay is most of it
            optimizer.step()
        results.append((weights(params).float(), held(optimizer, params[0], "exp_avg_sq")))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2**-7, atol=2e-3)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=2e-2, atol=1e-6)


# --- hyperparameters and arguments of others ------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
def test_arguments_of_torch_that_have_no_meaning_here(name):
    param = nn.Parameter(torch.ones(3))
    cls = type(MAKE[name]([param]))
    for option in ({"fused": True}, {"foreach": False}):
        with pytest.raises(TypeError, match="a few kernels; drop the argument"):
            cls([param], **option)
    for option in ({"amsgrad": True}, {"differentiable": True}):
        with pytest.raises(TypeError, match=r"no such mode.*torch\.optim"):
            cls([param], **option)
    with pytest.raises(TypeError, match="unexpected keyword argument 'moment'"):
        cls([param], moment=0.9)
    cls([param], fused=None, amsgrad=False, differentiable=False, capturable=True)


OUT_OF_RANGE = [
    (AdamW, {"lr": -1.0}),
    (Lion, {"lr": math.nan}),
    (AdamW, {"lr": torch.ones(2)}),
    (StableAdamW, {"betas": (0.9, 1.0)}),
    (Lion, {"betas": (-0.1, 0.9)}),
    (StableAdamW, {"eps": 0.0}),
    (SGD, {"momentum": -0.1}),
    (SGD, {"weight_decay": -0.1}),
    (SGD, {"nesterov": True}),
    (SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
]


@pytest.mark.parametrize("cls, options", OUT_OF_RANGE, ids=lambda x: str(getattr(x, "__name__", x)))
def test_hyperparameters_out_of_range(cls, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        cls([nn.Parameter(torch.zeros(2))], **options)
