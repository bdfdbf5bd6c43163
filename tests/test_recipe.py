# SPDX-License-Identifier: Apache-2.0
"""Recipes are data: frozen, short, equal after a round trip, and refused with the name of the field that is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_lowprec.formats import get_format
from hf_lowprec.presets import ALIASES, DECOUPLING, FP8_LM_STATES, PRESETS, get_recipe, known_names
from hf_lowprec.recipe import Gemm, Quant, Recipe, RecipeError, Residual, Rounding, Scaling, States

BLOCK = {"granularity": "block", "block": [32], "snap": "rceil", "store": "e8m0"}
MINE: dict[str, Any] = {
    "name": "mine",
    "base": "fp16",
    "fprop": {
        "input": {"format": "e3m2", "scaling": BLOCK, "rounding": {"mode": "stochastic", "bits": 8}},
        "weight": {"format": "float8_e4m3fn", "overflow": "nan"},
    },
    "dgrad": {
        "grad_output": {"format": "e5m2", "scaling": {"method": "none"}},
        "weight": {"format": "e5m2", "scaling": {"granularity": "row"}},
        "accumulation": {"format": "e6m5", "chunk": 64, "outer": "e6m9"},
    },
    "states": {"exp_avg": {"format": "e4m3fn"}, "update": {"mode": "stochastic"}},
    "modules_to_not_convert": ["down_proj"],
}


# --- presets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_round_trips(name: str, tmp_path: Path) -> None:
    recipe = PRESETS[name]
    assert recipe.name == name and recipe.paper
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    for suffix, text in ((".yaml", recipe.to_yaml()), (".yml", recipe.to_yaml()), (".json", recipe.to_json())):
        path = tmp_path / f"mine{suffix}"
        path.write_text(text)
        assert get_recipe(path) == get_recipe(str(path)) == recipe
    plain = json.loads(json.dumps(recipe.to_dict()))
    assert plain == recipe.to_dict(), "to_dict holds plain data"


def test_names() -> None:
    assert get_recipe("fp8-lm-o2") is get_recipe("FP8_LM") is get_recipe(PRESETS["fp8-lm"]) is PRESETS["fp8-lm"]
    assert set(known_names()) == {*PRESETS, *ALIASES}
    design = ["bf16", "bf16-sr", "fp16", "fp8-lm", "fp8-lm-o1", "te-delayed", "te-current", "fp8-amax", "fp8-cscale",
              "fp8-lm-o3", "bitnet", "bitnet-b1.58", "switchback", "switchback-m", "switchback-q", "mxfp8", "mxfp6",
              "mxfp6-e2m3", "mxfp4", "mxint8", "hfp8", "fp8-chunked", "sr-mac", "unit-scaling", "u-mup",
              "fp8-flex"]  # fmt: skip
    assert set(PRESETS) == set(design), "every name of the design is known"


@pytest.mark.parametrize("name", ["fp8-lm", "fp8-lm-o1", "te-delayed", "te-current", "fp8-amax", "fp8-cscale"])
def test_fp8_presets_are_e4m3_forward_and_e5m2_backward(name: str) -> None:
    r = PRESETS[name]
    assert [r.fprop.input.format, r.fprop.weight.format, r.dgrad.weight.format, r.wgrad.input.format] == ["e4m3fn"] * 4
    assert [r.dgrad.grad_output.format, r.wgrad.grad_output.format] == ["e5m2"] * 2
    fast = [gemm.accumulation.fast for gemm in (r.fprop, r.dgrad, r.wgrad)]
    assert fast == [True, False, False] and r.quantises_gemms and r.base == "bf16"


def test_scalings_are_those_of_the_design() -> None:
    fp8_lm = PRESETS["fp8-lm"]
    delayed = Scaling(method="delayed", history=16, algorithm="max", snap="rceil")
    assert fp8_lm.fprop.input.scaling == fp8_lm.dgrad.grad_output.scaling == delayed
    assert fp8_lm.fprop.weight.scaling == Scaling(method="current", snap="rceil")
    assert fp8_lm.communication.auto_scale and fp8_lm.communication.gradient.format == "e4m3fn"
    assert (fp8_lm.communication.saturation, fp8_lm.communication.growth) == (1e-5, 1000)
    assert [getattr(fp8_lm.states, s).format for s in ("exp_avg", "exp_avg_sq", "master")] == ["e4m3fn"] + 2 * [
        "e5m10"
    ]
    assert fp8_lm.states.master.rounding.mode == "stochastic"
    assert PRESETS["fp8-lm-o1"] == dataclasses.replace(fp8_lm, name="fp8-lm-o1", states=None)
    te = PRESETS["te-delayed"].fprop.weight.scaling
    assert (te.method, te.history, te.algorithm, te.margin, te.snap) == ("delayed", 1024, "max", 0, "exact")
    assert PRESETS["te-current"].fprop.weight.scaling == Scaling()
    assert PRESETS["fp8-amax"].fprop.weight.scaling == Scaling(snap="rceil")
    assert PRESETS["fp8-cscale"].fprop.weight.scaling.method == "static"
    assert PRESETS["fp16"].loss_scale.method == "dynamic" and PRESETS["fp16"].base == "fp16"
    assert PRESETS["bf16-sr"].states.update.mode == "stochastic"
    assert not any(PRESETS[name].quantises_gemms for name in ("bf16", "bf16-sr", "fp16"))


def test_decoupling_study() -> None:
    paper, exact = DECOUPLING["#2a"], Scaling(snap="rceil")
    assert paper == States(
        exp_avg=Quant(format="e4m3fn", scaling=exact),
        exp_avg_sq=Quant(format="e5m10", scaling=exact),
        master=Quant(format="e5m10", scaling=exact, rounding=Rounding(mode="stochastic")),
    )
    for slot in ("exp_avg", "exp_avg_sq", "master"):
        ours = getattr(FP8_LM_STATES, slot)
        assert ours.format == getattr(paper, slot).format, "what we run has the paper's formats"
        assert (ours.scaling.method, ours.scaling.snap) == ("predicted", "rceil")
    formats = {k: [None if q is None else q.format for q in (s.exp_avg, s.exp_avg_sq, s.master)]
               for k, s in DECOUPLING.items()}  # fmt: skip
    assert formats["#2b"] == ["e4m3fn", "e5m10", "e8m7"] and formats["#3"] == ["e4m3fn", "e5m10", "e4m3fn"]
    with pytest.raises(ValueError, match=r"exp_avg_sq: 8 bits .*diverges \(FP8-LM, arXiv 2310\.18313, table 6"):
        States(exp_avg_sq=Quant(format="e4m3fn"))
    States(exp_avg_sq=Quant(format="e4m3fn", scaling=Scaling(granularity="block", block=(256,))))


def test_recipes_are_frozen_and_hashable() -> None:
    recipe = PRESETS["fp8-lm"]
    for part, name in ((recipe, "base"), (recipe.fprop, "input"), (recipe.fprop.input, "format")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, None)
    assert len({*PRESETS.values(), Recipe.from_dict(recipe.to_dict())}) == len(PRESETS)


def test_a_recipe_of_ones_own() -> None:
    recipe = get_recipe(MINE)
    assert recipe.fprop.input.scaling.block == (32,) and recipe.modules_to_not_convert == ("down_proj",)
    assert recipe.fprop.weight.format == "e4m3fn", "formats are kept by their canonical name"
    assert not recipe.wgrad.quantised and recipe.quantises_gemms
    assert Recipe.from_yaml(yaml.safe_dump(MINE)) == recipe == Recipe.from_dict(recipe.to_dict())
    assert get_format(recipe.dgrad.accumulation.format).man == 5


def test_what_mlps_save_per_tensor_as_recipes_said_before_tiles() -> None:
    preset = PRESETS["fp8-lm"]
    assert preset.saved.scaling.block == (16, 256) and Recipe.from_yaml(preset.to_yaml()) == preset
    assert preset.saved == PRESETS["fp8-lm-o1"].saved == PRESETS["fp8-lm-o3"].saved
    before = {**preset.to_dict(), "saved": {"format": "e4m3fn", "scaling": {"snap": "rceil"}}}
    recipe = Recipe.from_dict(before)
    assert recipe.saved.scaling == Scaling(snap="rceil") and recipe != preset
    assert Recipe.from_yaml(yaml.safe_dump(before)) == recipe == Recipe.from_yaml(recipe.to_yaml())


def test_states_of_ones_own() -> None:
    block = {"granularity": "block", "block": [32], "store": "bfloat16"}
    data = {
        "name": "mine",
        "states": {
            "exp_avg": {"format": "int8", "scaling": block, "compand": "softsign"},
            "exp_avg_sq": {"format": "uint8", "scaling": block, "compand": "sqrt", "nonzero": True},
            "master": {"bits": 8, "rounding": {"mode": "stochastic"}},
            "min_numel": 4096,
            "embeddings": False,
        },
    }
    recipe = Recipe.from_dict(data)
    states = recipe.states
    assert (states.exp_avg.format, states.exp_avg_sq.format) == ("e0m7", "e0m8u")
    assert states.master == Residual(bits=8, rounding=Rounding(mode="stochastic"))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe == Recipe.from_json(recipe.to_json())
    data["states"]["master"] = "float32"
    plain = Recipe.from_dict(data)
    assert plain.states.master == "float32" and Recipe.from_yaml(plain.to_yaml()) == plain


# --- errors ---------------------------------------------------------------------------------------------------------


def changed(*path: str | int, to: Any) -> dict[str, Any]:
    data = json.loads(json.dumps(MINE))
    part = data
    for key in path[:-1]:
        part = part.setdefault(key, {})
    part[path[-1]] = to
    return data


QUANT = {"format": "e4m3fn"}
DELAYED = {"format": "e4m3fn", "scaling": {"method": "delayed", "history": 4}}
WRONG: dict[str, tuple[Any, str]] = {
    "no name": ({"base": "bf16"}, r"name: "),
    "a list": ([1, 2], r"\(recipe\): "),
    "nothing": (None, r"\(recipe\): "),
    "unknown field": (changed("fprob", to={}), r"fprob: no such field"),
    "unknown field inside": (
        changed("fprop", "input", "scaling", "blocks", to=[1]),
        r"fprop\.input\.scaling\.blocks: no",
    ),
    "unknown format": (changed("fprop", "input", "format", to="e4m3fnx"), r"fprop\.input\.format: .*e4m3fn"),
    "unknown accumulator": (changed("dgrad", "accumulation", "format", to="e99"), r"dgrad\.accumulation\.format: "),
    "unknown rounding": (changed("fprop", "input", "rounding", "mode", to="up"), r"fprop\.input\.rounding\.mode: "),
    "unknown base": (changed("base", to="fp8"), r"base: .*'bf16'"),
    "unknown transform": (changed("transform", to="hadamard"), r"transform: "),
    "too many bits": (
        changed("fprop", "input", "rounding", "bits", to=24),
        r"fprop\.input\.rounding: bits: .*1 to 23",
    ),
    "bits without a use": (changed("fprop", "input", "rounding", to={"bits": 3}), r"bits: only for mode 'stochastic'"),
    "block without size": (changed("fprop", "input", "scaling", "block", to=[]), r"block: 'block' takes 1 positive"),
    "tile of one size": (changed("fprop", "input", "scaling", "granularity", to="tile"), r"block: 'tile' takes 2 "),
    "size of zero": (changed("fprop", "input", "scaling", "block", to=[0]), r"block: 'block' takes 1 positive sizes"),
    "size without block": (changed("fprop", "input", "scaling", "granularity", to="tensor"), r"'tensor' takes 0 "),
    "history of zero": (
        changed("fprop", "weight", "scaling", to={"method": "delayed", "history": 0}),
        r"fprop\.weight\.scaling: history: at least 1",
    ),
    "delayed blocks": (changed("fprop", "input", "scaling", "method", to="delayed"), r"granularity: delayed scaling"),
    "history of current": (changed("fprop", "weight", "scaling", to={"history": 4}), r"history, algorithm: only for"),
    "exponent of current": (changed("fprop", "weight", "scaling", to={"exponent": 4}), r"exponent: only for method"),
    "e8m0 of exact": (changed("fprop", "weight", "scaling", to={"store": "e8m0"}), r"store: e8m0 holds powers of two"),
    "sums in a codebook": (
        changed("dgrad", "accumulation", "format", to="nf4"),
        r"dgrad\.accumulation\.format: .*nf4",
    ),
    "chunks of float32": (changed("dgrad", "accumulation", to={"chunk": 64}), r"dgrad\.accumulation: rounding, chunk"),
    "outer without chunks": (changed("dgrad", "accumulation", "chunk", to=None), r"dgrad\.accumulation: outer: adds"),
    "chunk of zero": (changed("dgrad", "accumulation", "chunk", to=0), r"dgrad\.accumulation: chunk: at least 1"),
    "fast narrow sums": (changed("dgrad", "accumulation", "fast", to=True), r"dgrad\.accumulation: fast: "),
    "too many random bits": (
        changed("dgrad", "accumulation", "rounding", to={"mode": "stochastic", "bits": 17}),
        r"dgrad\.accumulation: rounding: 17 random bits",
    ),
    "narrow sums of blocks": (
        changed("fprop", "accumulation", to={"format": "e6m9"}),
        r"fprop: accumulation: a scale per block changes",
    ),
    "narrow sums of the base precision": (
        {"name": "x", "fprop": {"accumulation": {"format": "e6m9"}}},
        r"fprop: accumulation: products of the base precision .*format: e5m10",
    ),
    "narrow sums of inexact products": (
        changed("dgrad", "weight", "format", to="e8m7"),
        r"dgrad: accumulation: products of e8m7 and e5m2 are",
    ),
    "narrow sums of a codebook": (
        changed("dgrad", "weight", "format", to="nf4"),
        r"dgrad: accumulation: the products of a codebook",
    ),
    "foreign operand": (changed("wgrad", to={"weight": QUANT}), r"wgrad\.weight: wgrad does not read weight"),
    "8-bit second moment": (changed("states", "exp_avg_sq", to=QUANT), r"states: exp_avg_sq: 8 bits "),
    "second slot delayed otherwise": (
        changed("wgrad", to={"input": DELAYED, "grad_output": QUANT}),
        r"wgrad\.input: delayed scaling needs the format and scaling of fprop\.input",
    ),
    "second slot of another format": (
        {
            "name": "x",
            "dgrad": {"weight": QUANT, "grad_output": {**DELAYED, "format": "e5m2"}},
            "wgrad": {"input": QUANT, "grad_output": DELAYED},
        },
        r"wgrad\.grad_output: delayed scaling needs the format and scaling of dgrad\.grad_output",
    ),
    "number for a name": (changed("name", to=[3]), r"name: "),
    "companded operand": (
        changed(
            "fprop",
            "input",
            to={"format": "e0m7", "compand": "softsign", "scaling": {"granularity": "block", "block": [32]}},
        ),
        r"fprop: input: compand='softsign' is for optimizer states",
    ),
    "operand that is never zero": (
        changed("fprop", "weight", "nonzero", to=True),
        r"fprop: weight: nonzero is for optimizer states",
    ),
    "predicted operand": (
        changed("fprop", "weight", "scaling", to={"method": "predicted"}),
        r"fprop: weight: method 'predicted' is for optimizer states",
    ),
    "16-bit scales of an operand": (
        changed("fprop", "weight", "scaling", to={"store": "float16"}),
        r"fprop: weight: store 'float16' is for optimizer states",
    ),
    "predicted gradients": (
        {"name": "x", "communication": {"gradient": {"format": "e4m3fn", "scaling": {"method": "predicted"}}}},
        r"communication: gradient: method 'predicted' is for optimizer states",
    ),
    "companded saved tensors": (
        {"name": "x", "saved": {"format": "e4m3fn", "nonzero": True}},
        r"saved: nonzero is for optimizer states",
    ),
    "predicted rows": (
        changed("states", "exp_avg", "scaling", to={"granularity": "row", "method": "predicted"}),
        r"states\.exp_avg\.scaling: granularity: predicted scaling bounds",
    ),
    "predicted codebook": (
        changed("states", "exp_avg", to={"format": "dynamic8", "scaling": {"method": "predicted"}}),
        r"states\.exp_avg: method: predicted scaling needs a format",
    ),
    "companded tensor": (
        changed("states", "exp_avg", "compand", to="softsign"),
        r"states\.exp_avg: compand: 'softsign' needs blocks",
    ),
    "unsigned first moment": (
        changed("states", "exp_avg", to={"format": "dynamic8u"}),
        r"states: exp_avg: a first moment has two signs",
    ),
    "reading every overflow": (
        changed("states", "exp_avg", "overflow", to="error"),
        r"states: exp_avg: overflow 'error' reads every result back",
    ),
    "negative size": (changed("states", "min_numel", to=-1), r"states: min_numel: at least 0"),
    "residual of 12 bits": (
        changed("states", "master", to={"bits": 12}),
        r"states\.master\.residual\.bits: Input should be 8 or 16\s*$",
    ),
    "rounded exact residual": (
        changed("states", "master", to={"bits": 16, "rounding": {"mode": "stochastic"}}),
        r"states\.master\.residual: rounding: a residual of 16 bits is exact",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_field(case: str) -> None:
    data, message = WRONG[case]
    with pytest.raises(RecipeError, match=message) as error:
        Recipe.from_dict(data)
    assert "pydantic" not in str(error.value)


def test_every_wrong_field_is_named() -> None:
    data = changed("fprop", "input", "format", to="e4m3fnx")
    data["base"] = "fp8"
    with pytest.raises(RecipeError, match=r"(?s)recipe 'mine' is not valid:.*base: .*fprop\.input\.format: "):
        Recipe.from_dict(data)


@pytest.mark.parametrize(
    ("read", "text"), [(Recipe.from_json, "{"), (Recipe.from_yaml, "a: ["), (Recipe.from_json, "[]")]
)
def test_text_that_is_no_recipe(read: Any, text: str) -> None:
    with pytest.raises(RecipeError):
        read(text)


def test_slots_of_one_operand_may_differ_where_no_history_is_shared() -> None:
    delayed = Quant(format="e4m3fn", scaling=Scaling(method="delayed", history=4))
    current, gradient = Quant(format="e5m2"), Quant(format="e5m2")
    recipe = Recipe(
        name="x", fprop=Gemm(input=delayed, weight=delayed), wgrad=Gemm(input=current, grad_output=gradient)
    )
    assert recipe.wgrad.input.scaling.method == "current"
    stochastic = dataclasses.replace(delayed, rounding=Rounding(mode="stochastic"))
    Recipe(name="x", fprop=Gemm(input=delayed, weight=delayed), wgrad=Gemm(input=stochastic, grad_output=gradient))
