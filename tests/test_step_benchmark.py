# SPDX-License-Identifier: Apache-2.0
"""bench_step.py and its kin: which cases run, what their numbers mean, and what is drawn from them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


def test_contenders() -> None:
    from step_cases import CASES, MICRO, RECIPES, parse

    from hf_lowprec.presets import PRESETS

    assert {parse(name).name for name in RECIPES[0][2]} == set(PRESETS)
    for _, _, names in (*CASES, *RECIPES, *MICRO):
        assert names[0] == "bf16" and len(set(names)) == len(names)
        for name in names:
            parse(name)
    ours = parse("te-current@bf16+compact+liger-loss+none")
    assert (ours.name, ours.dtype, ours.states, ours.weight_cache, ours.ours) == (
        "te-current", "bf16", "compact", "none", True)  # fmt: skip
    assert parse("fp8-lm@bf16+one+remade").changes == {"weight_cache": "one", "saved_inputs": "remade"}
    assert not parse("torchao-rowwise+compile").ours and not parse("bf16@bf16+liger").ours
    assert parse("fp8-lm@bf16+nofuse").environment("cuda") == {
        "HF_LOWPREC_LIGER": "0", "HF_LOWPREC_FUSE": "0", "HF_LOWPREC_GRAPHS": "auto"}  # fmt: skip
    for name, graphs, may in (("fp8-lm", "auto", True), ("fp8-lm+graphs", "1", True), ("fp8-lm+nographs", "0", False),
                              ("fp8-lm+compile", "auto", False), ("bf16+graphs", "auto", True),
                              ("bf16", "auto", False), ("torchao", "auto", False)):  # fmt: skip
        assert (parse(name).environment("cuda")["HF_LOWPREC_GRAPHS"], parse(name).may_graph) == (graphs, may), name
    assert parse("fp8-lm+graphs").environment("cpu")["HF_LOWPREC_GRAPHS"] == "auto", "there are none on a CPU"
    assert not parse("bf16+graphs").ours and parse("fp8-lm@bf16+graphs").ours
    assert not parse("bf16+clip").ours and parse("fp8-lm@bf16+8bit+clip").states == "8bit"
    wrongs = ("fp8-lm@fp16", "bf16+8bit", "torchao+liger-loss", "bf16+remade", "fp8-lm+liger", "fp8-lm+8bit+4bit",
              "bf16+graphs+compile", "bf16+nographs", "fp8-lm+graphs+nographs")  # fmt: skip
    for wrong in wrongs:
        with pytest.raises(ValueError, match=wrong.replace("+", r"\+")):
            parse(wrong)


def test_flops_and_utilisation() -> None:
    import torch
    from step_cases import flops_per_step, utilisation

    layers = {"embed_tokens": (100, 8), "q": (8, 8), "lm_head": (100, 8), "norm": (8,)}
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in layers.items()})
    found = flops_per_step(model, {"num_hidden_layers": 3, "hidden_size": 8}, "2x10x4")
    assert found == 80 * (6 * (64 + 800) + 6 * 3 * 8 * 10)
    assert utilisation(98.94e12, 1000, "NVIDIA H100 80GB HBM3") == {"tflops": 98.9, "mfu_bf16": 0.1, "mfu_fp8": 0.05}
    assert utilisation(1e12, 1000, "some GPU") == {"tflops": 1.0}


def test_every_call_measures_its_baseline_again(tmp_path: Path) -> None:
    from argparse import Namespace

    from bench_step import plan

    def args(only: list[str], **more: Any) -> Namespace:
        base = {"device": "cuda", "warmup": 3, "steps": 7, "micro": False, "recipes": False,
                "again": False, "any_source": False}  # fmt: skip
        return Namespace(only=only, **{**base, **more})

    here = {"gpu": "a", "libraries": {"torch": "1"}, "package_sha256": "x"}
    settings = {"device": "cuda", "warmup": 3, "steps": 7, "status": "ok"}
    stored = [
        {"model_name": "8b", "batch": "2x4096x1", "recipe": recipe, **settings, "environment": {**here, **source}}
        for recipe, source in (("bf16", {}), ("fp8-lm", {}), ("te-current", {"package_sha256": "y"}),
                               ("bf16+liger", {"package_sha256": "y"}))
    ]  # fmt: skip
    only = [f"8b/2x4096x1/{name}$" for name in ("bf16", "fp8-lm", "te-current", "bf16+liger")]
    wanted, kept, waiting = plan(args(only), stored, here)
    assert [case["recipe"] for case in wanted] == ["bf16", "fp8-lm", "te-current", "bf16+liger"]
    assert set(kept) == {f"8b/2x4096x1/{name}" for name in ("bf16", "fp8-lm", "bf16+liger")}
    assert [case["recipe"] for case in waiting] == ["bf16", "te-current"], "other source; the baseline once more"
    assert plan(args(only[:2]), stored, here)[2] == []
    _, _, waiting = plan(args(["1b/1x2048x4/te", "8b/1x2048x4/te-current$"]), stored, here)
    assert [(c["model_name"], c["recipe"]) for c in waiting] == [
        ("1b", "bf16"), ("1b", "te-current"), ("1b", "te-delayed"), ("8b", "bf16"), ("8b", "te-current")]  # fmt: skip


def test_ratios_are_to_the_baseline_of_the_same_shape() -> None:
    from bench_step import add_ratios, table

    def case(model: str, recipe: str, ms: float, peak: float | None = 10.0) -> dict[str, Any]:
        return {"model_name": model, "batch": "b", "recipe": recipe, "status": "ok", "step_ms": ms, "peak_gib": peak,
                "reserved_gib": 1.25 * peak + 5}  # fmt: skip

    cases = [
        case("8b", "bf16", 200),
        case("8b", "x", 100, 4.0),
        case("1b", "x", 100),
        {**case("8b", "y", 1), "status": "no"},
    ]
    del cases[0]["reserved_gib"]
    add_ratios(cases)
    assert "reserved_ratio" not in cases[1], "an older row has none"
    cases[0]["reserved_gib"] = 17.5
    add_ratios(cases)
    assert [c.get("ratio") for c in cases] == [1.0, 0.5, None, None]
    assert (cases[1]["peak_ratio"], cases[1]["reserved_ratio"]) == (0.4, 0.571)
    rows = table(cases).splitlines()
    assert rows[0].split()[-3:] == ["reserved", "ratio", "graphs"] and rows[2].split()[-3:] == ["10", "0.571", "-"]


def test_what_became_of_graphs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench_step import graphs_of
    from graph_cases import FakeCapturer, FakeGauge, stack

    from hf_lowprec.graphs import graph_layers, rehearsal

    monkeypatch.setattr(rehearsal, "KNOWN", (*rehearsal.KNOWN, "graph_cases"))
    model = stack()
    assert graphs_of(model) == {}
    graph_layers(model, when="waiting", capturer=FakeCapturer, gauge=FakeGauge(), device_type="cpu")
    assert graphs_of(model)["graphs"] == "layers if the GPU waits for the host"
    assert graphs_of(model)["graphs_captured"] == graphs_of(model)["graphs_replays"] == 0


def test_the_step_benchmark_runs_at_toy_size(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "results" / "step.json"
    command = [sys.executable, str(BENCHMARKS / "bench_step.py"), "--micro", "--device", "cpu", "--steps", "1",
               "--warmup", "1", "--only", "tiny/2x64x2/fp8-lm@bf16+8bit", "liger", "--out", str(out)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    cases = {case["recipe"]: case for case in json.loads(out.read_text())["cases"]}
    assert set(cases) == {"bf16", "fp8-lm@bf16+8bit", "bf16+liger"}
    ours = cases["fp8-lm@bf16+8bit"]
    assert ours["ratio"] == pytest.approx(ours["step_ms"] / cases["bf16"]["step_ms"], abs=1e-3)
    assert "dynamic8" in ours["summary"] and "mfu_bf16" not in ours and ours["host_ms"] > 0
    if cases["bf16+liger"]["status"] != "ok":
        assert "SKIPPED: tiny/2x64x2/bf16+liger: not installed: liger_kernel" in done.stdout


def gpu_case(recipe: str, ms: float, **more: Any) -> dict[str, Any]:
    libraries = {"torch": "2", "transformers": "5"}
    return {
        "model_name": "8b", "batch": "2x4096x1", "recipe": recipe, "status": "ok", "step_ms": ms, "ratio": ms / 200,
        "peak_gib": 40.0, "peak_ratio": 1.0, "mfu_bf16": 0.4, "weights_gib": 8.0, "states_gib": 15.0, "held_gib": 24.0,
        "environment": {"gpu": "H100", "commit": "0" * 40, "libraries": libraries}, **more,
    }  # fmt: skip


def test_figures_of_steps_kernels_and_break_even(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from plot import draw

    environment = gpu_case("bf16", 1)["environment"]
    cells = [[w, t, 2.0, 2.0 * r] for w, r in ((1024, 1.4), (4096, 0.6)) for t in (512, 8192)]
    share = {"status": "ok", "copy_share": 0.93, "gb_per_s": 2800.0, "environment": environment}
    results: dict[str, Any] = {
        "step": [*(gpu_case(*pair) for pair in (("bf16", 200), ("fp8-lm@bf16", 108), ("torchao", 360))),
                 gpu_case("fp8-lm", 90, graphs_captured=8, reserved_gib=45.0, reserved_ratio=0.9)],
        "breakeven": [{"recipe": "te-current", "cells": cells, "environment": environment}],
        "kernels": [{"kernel": "quantise, 8192 x 4096", **share}, {"kernel": "small, 16 x 16", **share}],
    }  # fmt: skip
    for name, cases in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"benchmark": name, "cases": cases}))
    for name in ("step", "memory", "breakeven", "kernels"):
        assert draw(name, tmp_path, tmp_path), name
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000
    old = [{k: v for k, v in case.items() if k != "held_gib"} for case in results["step"]]
    (tmp_path / "step.json").write_text(json.dumps({"benchmark": "step", "cases": old}))
    assert draw("step", tmp_path, tmp_path) and not draw("memory", tmp_path, tmp_path)
    assert "no case of step.json has held_gib" in capsys.readouterr().out


def test_every_kernel_case_runs(tmp_path: Path) -> None:
    """On the CPU, through the plain-torch operators: that names, arguments and bytes hold together."""
    from bench_kernels import calls_in_turn
    from kernel_cases import FAMILIES

    names = []
    for family, cases in FAMILIES.items():
        for case in cases(32, 64, "cpu"):
            calls_in_turn(case, "cpu")()
            assert (case.moved > 0) != (case.operations > 0)
            names.append(f"{family} {case.name}")
    assert len(set(names)) == len(names) >= 40


def test_the_break_even_map_runs_at_toy_size(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "breakeven.json"
    command = [sys.executable, str(BENCHMARKS / "bench_breakeven.py"), "--micro", "--device", "cpu", "--recipes",
               "te-current", "--out", str(out)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    (case,) = json.loads(out.read_text())["cases"]
    assert [cell[:2] for cell in case["cells"]] == [[64, 32], [64, 64], [128, 32], [128, 64]]
    assert [cell[:2] for cell in case["linears"]] == [cell[:2] for cell in case["cells"]]
    assert all(base > 0 and ours > 0 for _, _, base, ours in case["cells"] + case["linears"])


def test_the_break_even_rule_is_written_as_the_package_reads_it(tmp_path: Path) -> None:
    from bench_breakeven import RULE, write_rule

    from hf_lowprec import break_even

    assert RULE == break_even.PATH
    path = tmp_path / "rule.json"
    path.write_text('{"about": "", "gpus": {"other": {"te-current": {"least_tokens": [[4, 1]]}}}}')
    here = {"gpu": "NVIDIA H100", "commit": "0" * 40, "cpu": "some", "platform": "left out"}
    write_rule(path, "fp8-lm", [[4, 8, 2.0, 3.0], [4, 16, 2.0, 1.0], [8, 8, 2.0, 1.0], [8, 16, 2.0, 1.0]], here)
    write_rule(path, "te-current", [[4, 8, 2.0, 3.0]], here)
    gpus = json.loads(path.read_text())["gpus"]
    assert set(gpus) == {"other", "NVIDIA H100"} and gpus["NVIDIA H100"]["fp8-lm"]["environment"]["gpu"] == here["gpu"]
    assert break_even.find(gpus, "NVIDIA H100", "fp8-lm").steps == ((16, 16), (64, 8))
    assert break_even.find(gpus, "NVIDIA H100", "te-current").steps == ((16, None),)
    with pytest.raises(SystemExit, match="there is none"):
        write_rule(path, "fp8-lm", [], {"gpu": None})


def test_kernels_are_grouped_by_what_they_do() -> None:
    from profile_step import group_of, tally

    known = {
        "nvjet_sm90_qrtst_128x160_128x5_2x1_v_bz_coopA_algo2_TNT": "GEMM fp8",
        "nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_NTT": "GEMM 16/32 bit",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26": "attention",
        "step_kernel": "optimizer",
        "_cast_kernel": "quantise, transpose",
        "void at::native::bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)": "copies, casts",
        "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<float>": "other elementwise",
    }
    assert {name: group_of(name) for name in known} == known
    groups = tally([(name, 2, 1.5) for name in known] + [("_amax_kernel", 1, 3.0)])
    assert next(iter(groups)) == "quantise, transpose" and groups["quantise, transpose"]["ms"] == 4.5
    assert sum(group["launches"] for group in groups.values()) == 15


def test_who_launches_what() -> None:
    import torch
    from profile_step import callers
    from torch.profiler import ProfilerActivity, profile

    a = torch.ones(2, 2, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        (a @ a).sum().backward()
    events = trace.events()
    assert callers(events, "Memset") == {}
    for event in events:
        if event.name == "aten::mm":
            event.append_kernel("nvjet_sm90_tst", 0, 1.0)
            event.append_kernel("Memset (Device)", 0, 1.0)
    found = callers(events, "Memset")
    inside = "MmBackward0 < autograd::engine::evaluate_function: MmBackward0"
    assert found == {"aten::mm < " + inside: 2, "aten::mm < aten::matmul": 1}
