# SPDX-License-Identifier: Apache-2.0
"""`hf-lowprec`, in process: what it says is true, and what is wrong comes with exit status and remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from hf_lowprec import cli, describe, doctor, optim, summary
from hf_lowprec.conversion import native_nowhere, native_problem
from hf_lowprec.optim.table import named
from hf_lowprec.presets import ALIASES, PRESETS
from hf_lowprec.recipe import Quant, Recipe, Residual, Rounding, Scaling, States

ROOT = Path(__file__).parents[1]


def invoke(*arguments: str, status: int = 0) -> str:
    done = CliRunner().invoke(cli.app, list(arguments))
    assert done.exit_code == status, done.output + repr(done.exception)
    return done.output


# --- recipes ---------------------------------------------------------------------------------------------------------


def rows(output: str) -> dict[str, str]:
    """First word of a line -> second word."""
    return {words[0]: words[1] for line in output.splitlines() if len(words := line.split()) > 1}


def test_recipes_lists_every_name_and_how_it_runs_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = rows(invoke("recipes"))
    for name, recipe in PRESETS.items():
        assert here[name] == ("emulated" if recipe.quantises_gemms else "native")
    assert set(ALIASES) <= set(here) and here["exmy:e<X>m<Y>"] == "emulated"


@pytest.mark.parametrize(("capability", "word"), [((9, 0), "native"), ((8, 0), "refused")])
def test_recipes_on_a_gpu(monkeypatch, capability, word):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    output = invoke("recipes")
    here = rows(output)
    assert here["fp8-lm"] == word and here["bf16"] == "native"
    assert ("sm_80" in output) == (word == "refused")


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_needs_agrees_with_what_convert_refuses(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    mx = Quant(format="e4m3fn", scaling=Scaling(granularity="block", block=(32,), snap="ocp", store="e8m0"))
    e3m1, plain, e5m2 = (Quant(format=name) for name in ("e3m1", "e4m3fn", "e5m2"))
    pairs = [(mx, mx), (e3m1, e3m1), (mx, plain), (e5m2, e5m2), (e5m2, plain)]
    own = [Recipe(name="own", fprop={"input": a, "weight": b}) for a, b in pairs]
    since = {"sm_80 or newer": (8, 0), "sm_89 or newer": (8, 9), "sm_100 or newer": (10, 0), "nowhere yet": (99, 0)}
    native = {words: capability >= least for words, least in since.items()}
    for recipe in [*PRESETS.values(), *own]:
        if recipe.quantises_gemms:
            found = native_problem(recipe, torch.device("cuda", 0)) is None
            assert found == native[describe.needs(recipe)], recipe.name
    needs = [describe.needs(recipe) for recipe in own]
    assert needs == ["sm_100 or newer", *["nowhere yet"] * 3, "sm_89 or newer"]
    assert [" ".join(native_nowhere(r).split()[2:]) for r in own[1:4]] == [
        "uses e3m1 per tensor, native nowhere yet",
        "has a GEMM of operands that are scaled in different ways, native nowhere yet",
        "multiplies e5m2 by e5m2, native nowhere yet",
    ]


def test_a_line_says_what_tells_a_recipe_from_the_others():
    lines = {name: summary.one_line(recipe) for name, recipe in PRESETS.items()}
    assert len(set(lines.values())) == len(lines) and max(map(len, lines.values())) <= 140
    for word, names in {
        "int8": {"mxint8", "bitnet", "bitnet-b1.58", "switchback", "switchback-m", "switchback-q"},
        "ternary": {"bitnet-b1.58"},
        "1-bit": {"bitnet"},
        "in blocks of 32": {name for name in PRESETS if name.startswith("mx")},
        "chunks of 64": {"hfp8", "fp8-chunked"},
        "13 random bits": {"sr-mac"},
        "bf16 weight gradients": {"switchback", "switchback-m", "switchback-q"},
        "e0m": set(),
    }.items():
        assert {name for name, line in lines.items() if word in line} == names, word
    own = Quant(format="e0m4u", scaling=Scaling(granularity="tile", block=(1, 128), snap="rceil"))
    plain = Quant(format="e2m1")
    recipe = Recipe(
        name="own",
        fprop={"input": own, "weight": plain},
        dgrad={"grad_output": plain, "weight": plain},
        wgrad={"input": Quant(format="e0m7")},
        states=States(exp_avg=Quant(format="e4m3fn"), master=Residual(bits=8)),
    )
    assert summary.one_line(recipe) == (
        "uint4 x e2m1 forward, e2m1 input gradients, bf16 weight gradients of int8 inputs; current scales, input in "
        "tiles of 1 x 128; states 8 + 32 + 8 bits"
    )


def test_documentation_holds_the_tables():
    table = invoke("recipes", "--markdown")
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")
    assert table in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    command = [sys.executable, str(ROOT / "scripts" / "update_docs.py"), "--check"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --- explain ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_explain_ends_with_the_recipe_as_a_file(name, tmp_path):
    output = invoke("explain", name)
    text = output.split("# as a file", 1)[1].split("\n", 1)[1]
    assert Recipe.from_dict(yaml.safe_load(text)) == PRESETS[name]
    (tmp_path / "my.yaml").write_text(text)
    assert invoke("explain", str(tmp_path / "my.yaml")).splitlines()[1:] == output.splitlines()[1:]


def test_explain_says_what_is_in_each_slot():
    output = invoke("explain", "fp8-lm")
    fprop, dgrad, wgrad = (output.split(f"{gemm}  ", 1)[1].split("\n\n", 1)[0] for gemm in describe.GEMMS)
    assert "e4m3fn" in fprop and "e5m2" not in fprop and "16 steps" in fprop
    assert "e5m2" in dgrad and "e5m2" in wgrad and "powers of two" in wgrad
    for words in ("2310.18313", "e5m10", "stochastic", "mu", "output embeddings", "sm_89"):
        assert words in output


def test_explain_says_what_is_kept_of_mlps_and_weights(tmp_path):
    said = {}
    for policy in ("both", "one", "none"):
        (tmp_path / f"{policy}.yaml").write_text(
            Recipe.from_dict({**PRESETS["fp8-lm"].to_dict(), "weight_cache": policy}).to_yaml()
        )
        output = invoke("explain", str(tmp_path / f"{policy}.yaml"))
        said[policy] = next(line for line in output.splitlines() if line.startswith("weight casts"))
        saved = next(line for line in output.splitlines() if line.startswith("saved by MLPs"))
        assert "e4m3fn, per tile of 16 x 256, its own amax" in saved
    assert len(set(said.values())) == 3 and "2 bytes" in said["both"] and "1 byte" in said["one"]
    assert "gate and up as they are computed" in invoke("explain", "te-current")
    assert "weight casts" not in invoke("explain", "bf16")
    (tmp_path / "learned.yaml").write_text(Recipe.from_dict({**PRESETS["fp8-flex"].to_dict(), "weight_cache": "both",
        "fprop": {"input": (o := {"format": "e2m3", "scaling": {"method": "learned"}}), "weight": o},
        "dgrad": {"weight": o}, "wgrad": {"input": o}}).to_yaml())  # fmt: skip
    assert "nothing kept" in invoke("explain", str(tmp_path / "learned.yaml")), "its range trains with the weight"


def test_words_tell_apart_what_differs():
    scalings = [
        Scaling(), Scaling(snap="rceil"), Scaling(snap="ocp"), Scaling(snap="ocp", store="e8m0"), Scaling(margin=1),
        Scaling(method="none"), Scaling(method="static", exponent=3), Scaling(granularity="row"),
        Scaling(granularity="block", block=(32,)), Scaling(granularity="tile", block=(1, 128)),
        Scaling(method="delayed", history=16), Scaling(method="delayed", history=16, algorithm="most_recent"),
        Scaling(method="predicted"), Scaling(store="float16"), Scaling(store="bfloat16"),
    ]  # fmt: skip
    assert len({describe.scaling_words(s) for s in scalings}) == len(scalings)
    roundings = [Rounding(mode=m) for m in ("nearest", "away", "zero", "stochastic")]
    roundings.append(Rounding(mode="stochastic", bits=8))
    assert len({describe.rounding_words(r) for r in roundings}) == len(roundings)
    block = Scaling(granularity="block", block=(32,))
    quants = [Quant(format="e0m7", scaling=block, compand=c) for c in ("none", "softsign", "sqrt", "expand")]
    quants.append(Quant(format="e0m7", scaling=block, nonzero=True))
    assert len({describe.quant_words(q, "") for q in quants}) == len(quants)
    masters = [
        None,
        "float32",
        Residual(bits=8),
        Residual(bits=8, rounding=roundings[3]),
        Residual(bits=16),
        quants[0],
    ]
    states = [States(master=m) for m in masters] + [States(update=roundings[3])]
    assert len({describe.master_words(s) for s in states}) == len(states)


@pytest.mark.parametrize("name", [name for name in named() if name not in PRESETS])
def test_explain_states(name):
    """Every slot in words, and the bytes that one parameter of two million elements takes."""
    output = invoke("explain", name)
    states = named()[name]
    kept = rows(output)
    assert {"exp_avg", "exp_avg_sq", "master"} <= kept.keys()
    if states.exp_avg is not None:
        assert states.exp_avg.format in output
    for dtype in (torch.float32, torch.bfloat16):
        param = torch.nn.Parameter(torch.ones(2**21, dtype=dtype))
        param.grad = torch.ones_like(param)
        optimizer = optim.AdamW([param], states=states)
        optimizer.step()
        held = sum(t.numel() * t.element_size() for t in optimizer.state[param].values())
        assert f" {held / 2**21:.2f}" in output.split("Adam's,")[1]
    assert name in (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "message"),
    [("fp8-ml", "did you mean 'fp8-lm'"), ("nothere.yaml", "does not exist")],
)
def test_a_bad_recipe_is_refused(name, message):
    for command in (["explain", name], ["inspect", "some-model", "--recipe", name]):
        assert message in invoke(*command, status=2)


# --- inspect ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A Llama of three layers whose MLP no FP8 GEMM takes."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 120,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
        "dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return path


def test_inspect_folds_equal_layers_and_gives_reasons(config, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = invoke("inspect", str(config.parent), "--recipe", "fp8-lm")
    lines = {line.split()[0]: line for line in output.splitlines() if line.strip()}
    q = lines["model.layers.*.self_attn.q_proj"]
    assert q.split()[1:] == ["3", "64", "x", "64", "12,288", "24,576", "converted"]
    assert "left alone on a GPU" in lines["model.layers.*.mlp.up_proj"]
    assert "left alone: output embedding or head" in lines["lm_head"]
    assert "converted 21 of 22 linears" in output
    # 9 bytes; 5 more for k_proj, v_proj and norms, which are small and keep float32 moments: 12,736 of 122,816
    assert "exp_avg e4m3fn" in output and "9.52 bytes per parameter" in output


def test_inspect_every_layer_of_a_config_file(config):
    pytest.importorskip("transformers")
    output = invoke("inspect", str(config), "--recipe", "te-current", "--all")
    assert sum(line.startswith("model.layers.") for line in output.splitlines()) == 3 * 7
    assert "model.layers.2.mlp.down_proj" in output


def test_inspect_shows_what_runs_together(config):
    pytest.importorskip("transformers")
    output = invoke("inspect", str(config))
    for line in (
        "one input: 3 x model.layers.*.self_attn.q_proj + k_proj + v_proj",
        "fused norm: 3 x model.layers.*.post_attention_layernorm -> model.layers.*.mlp.gate_proj + up_proj",
        "fused MLP: 3 x model.layers.*.mlp = down_proj(silu(gate_proj(x)) * up_proj(x))",
        "fused: 7 of 7 norms, 3 of 3 MLPs, 3 of 3 rotary embeddings, 6 shared inputs",
        "fused rotary embedding: 3 x model.layers.*.self_attn: apply_rotary_pos_emb",
    ):
        assert line in output


def test_inspect_refuses_what_is_no_model(tmp_path):
    pytest.importorskip("transformers")
    assert "there is no file" in invoke("inspect", str(tmp_path / "config.json"), status=2)
    (tmp_path / "config.json").write_text("{}")
    assert "no model can be built" in invoke("inspect", str(tmp_path), status=2)


# --- doctor ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def healthy(monkeypatch):
    """The import hook is on, no variable is set, versions suffice."""
    for name in ("HF_LOWPREC_RECIPE", "HF_LOWPREC_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor, "import_hook", lambda: doctor.Fact("import hook", "on"))


def test_doctor_reports_a_healthy_machine(healthy):
    output = invoke("doctor")
    assert torch.__version__ in output and "no problems found" in output
    assert all(name in output for name in PRESETS)


def test_doctor_finds_a_bad_recipe_and_an_old_library(healthy, monkeypatch):
    monkeypatch.setenv("HF_LOWPREC_RECIPE", "fp8-ml")
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=99.1", "rich>=13"])
    output = invoke("doctor", status=1)
    assert "HF_LOWPREC_RECIPE: unknown recipe 'fp8-ml'" in output and "older than 99.1" in output


def test_doctor_says_why_the_hook_is_off(monkeypatch):
    others = [finder for finder in sys.meta_path if type(finder).__module__ != "hf_lowprec._autoload"]
    monkeypatch.setattr(sys, "meta_path", others)
    monkeypatch.delenv("HF_LOWPREC_RECIPE", raising=False)
    monkeypatch.setenv("HF_LOWPREC_AUTOLOAD", "0")
    fact = doctor.import_hook()
    assert fact.problem is None and "HF_LOWPREC_AUTOLOAD=0" in fact.value
    monkeypatch.setenv("HF_LOWPREC_RECIPE", "fp8-lm")
    for variable in ("HF_LOWPREC_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"):
        monkeypatch.setenv(variable, "0")
        assert f"HF_LOWPREC_RECIPE=fp8-lm is ignored while {variable}=0" in str(doctor.import_hook().problem)
        monkeypatch.delenv(variable)
    monkeypatch.delenv("HF_LOWPREC_RECIPE")
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    assert "pip install" in str(doctor.import_hook().problem)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [metadata.EntryPoint("hf_lowprec", "x:y", group)])
    assert "torch did not run" in str(doctor.import_hook().problem)


# --- run -------------------------------------------------------------------------------------------------------------


def test_run_hands_recipe_and_arguments_to_the_script(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import os, sys\nprint('saw', os.environ['HF_LOWPREC_RECIPE'], sys.argv[1:])\nsys.exit(3)\n")
    command = [sys.executable, "-m", "hf_lowprec.cli", "run", "--recipe", "fp8-lm", str(script), "--recipe", "x", "-m"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    assert "saw fp8-lm ['--recipe', 'x', '-m']" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "fp8-ml", "train.py"], "did you mean"),
        (["--recipe", "fp8-lm", "nothere.py"], "does not exist"),
        (["train.py"], "name a recipe"),
    ],
)
def test_run_refuses(arguments, message, monkeypatch):
    monkeypatch.delenv("HF_LOWPREC_RECIPE", raising=False)
    assert message in invoke("run", *arguments, status=2)


def test_the_documented_recipe_file_is_valid():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    recipe = Recipe.from_yaml(text.split("```yaml\n", 1)[1].split("```", 1)[0])
    assert recipe.quantises_gemms and recipe.modules_to_not_convert == ("down_proj",)
