# SPDX-License-Identifier: Apache-2.0
"""calibrate: what it chooses, what it refuses, files; 8 flexible bits beat 8 fixed ones where theory says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from core import assert_same_state, batch, llama, mlp, same_bits, token_ids
from torch import Tensor, nn

import hf_lowprec
from hf_lowprec import numerics
from hf_lowprec.calibration import CalibrationError
from hf_lowprec.conversion import recipe_of, session_of
from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import Quant

save_file = pytest.importorskip("safetensors.torch").save_file


def recipe(format: str = "e4m3none", split: str = "fixed", weights: str = "row") -> dict[str, Any]:
    a = {"format": format, "scaling": {"method": "search"}, "split": split}
    w = {**a, "scaling": {"method": "search", "granularity": weights}}
    slots = {"fprop": {"input": a, "weight": w}, "dgrad": {"weight": w}, "wgrad": {"input": a}}
    return {"name": f"{format}-{split}", **slots}


def batches(n: int = 4) -> list[dict[str, Tensor]]:
    return [{"input_ids": token_ids(2, 16, seed=seed)} for seed in range(n)]


def with_outliers(seed: int = 0) -> nn.Module:
    """A Llama in which four features are 40 times as large between each norm and its readers, which undo it: the same
    function, with the activations that large language models have."""
    model = llama(seed, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    for layer in model.model.layers:
        for norm, readers in (
            (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
            (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
        ):
            factor = torch.ones(64)
            factor[[3, 17, 18, 40]] = 40.0
            norm.weight.data.mul_(factor)
            for reader in readers:
                reader.weight.data.div_(factor)
    return model


def output_error(how: Any, estimator: str = "output") -> float:
    """Relative error of the hidden states on data that calibration did not see."""
    model = with_outliers()
    hf_lowprec.calibrate(model, batches(), how, estimator=estimator)
    ids = token_ids(4, 16, seed=99)
    with torch.no_grad():
        quantised = model.model(input_ids=ids).last_hidden_state
        with hf_lowprec.high_precision(model):
            exact = model.model(input_ids=ids).last_hidden_state
    return float(numerics.relative_error(exact, quantised))


def test_quality_where_there_are_outliers() -> None:
    """Which of its bits a tensor spends on the exponent, and where its range ends, is worth a factor of two."""
    flex, e4m3, int8 = recipe(split="free"), recipe("e4m3none", weights="tensor"), recipe("e0m7", weights="tensor")
    best = output_error(flex)
    fixed = output_error(e4m3)
    assert best < 0.6 * fixed and fixed < 0.6 * output_error(int8)


def test_estimators_in_the_order_that_theory_has() -> None:
    """The large features make up nearly all of an input's squared error, and the others the output's."""
    flex, int8 = recipe(split="free"), recipe("e0m7")
    assert output_error(flex) < 0.6 * output_error(flex, "mse")
    assert output_error(int8) < 0.7 * output_error(int8, "minmax"), "an integer's range is dear"
    e4m3 = recipe("e4m3none")
    assert 0.7 < output_error(e4m3, "minmax") / output_error(e4m3) < 1.4, "which four exponent bits forgive"


# --- what is chosen -------------------------------------------------------------------------------------------------


def test_the_forward_is_that_of_the_formats_in_the_report() -> None:
    model = mlp()
    x = batch(64, 32)
    report = hf_lowprec.calibrate(model, [x[:32], x[32:]])
    assert report.recipe == PRESETS["fp8-flex"] and recipe_of(model) == report.recipe
    flexible = model.up._lowprec.flexible
    names = report.formats["up"]
    values = []
    for name, operand, tensor in zip(names, (flexible.input, flexible.weight), (x, model.up.weight), strict=True):
        fmt = operand.format
        assert str(fmt) == name and fmt.bits == 8
        granularity = operand.quant.scaling.granularity
        plain = Quant(format=name, scaling={"granularity": granularity})  # type: ignore[arg-type]
        values.append(numerics.quantize_dequantize(tensor.detach(), plain, scale=operand.maxval.detach() / fmt.max))
    expected = nn.functional.linear(values[0], values[1], model.up.bias)
    assert torch.allclose(model.up(x), expected, rtol=1e-6, atol=1e-6)


def test_the_report_counts_the_formats() -> None:
    report = hf_lowprec.calibrate(llama(), batches(2), recipe("e3m4none"))
    assert "; calibrated by output on 2 batches: inputs 14 x e3m4none; weights 14 x e3m4none" in report.summary()
    assert "calibrated 2 x model.layers.*.mlp.down_proj: input e3m4none, weight e3m4none" in str(report)
    percentile = hf_lowprec.calibrate(mlp(), [batch(8, 32)], estimator="percentile", percentile=99.5)
    assert "by percentile 99.5 on 1 batch: inputs" in percentile.summary()


def test_minmax_and_percentile_take_the_quantiles() -> None:
    x = batch(256, 32)
    for estimator, share in (("minmax", 1.0), ("percentile", 0.99)):
        model = nn.Sequential(nn.Linear(32, 16))
        hf_lowprec.calibrate(model, x.split(64), recipe(), estimator=estimator, percentile=99.0)  # type: ignore[arg-type]
        flexible = model[0]._lowprec.flexible
        expected = x.abs().flatten().sort().values[int(share * x.numel()) - 1]
        assert float(flexible.input.maxval.detach()) == pytest.approx(float(expected), rel=2**-7)
        rows = model[0].weight.detach().abs().sort(1).values[:, -1 if share == 1.0 else int(0.99 * 32)]
        assert torch.equal(flexible.weight.maxval[:, 0].detach(), rows)


@pytest.mark.parametrize("kind", ["tensors", "tuples", "mappings", "forward"])
def test_batches_of_every_kind_give_the_same_in_any_order(kind: str) -> None:
    ids = [token_ids(2, 16, seed=seed) for seed in range(3)]
    data: Any = {"tensors": ids, "tuples": [(i,) for i in ids], "forward": ids[::-1]}
    data["mappings"] = ({"input_ids": i} for i in ids)
    data = data[kind]
    forward = (lambda model, batch: model.model(input_ids=batch)) if kind == "forward" else None
    model = llama(num_hidden_layers=1)
    model.train()
    hf_lowprec.calibrate(model, data, forward=forward)
    assert all(module.training for module in model.modules()) and all(p.grad is None for p in model.parameters())
    reference = llama(num_hidden_layers=1)
    hf_lowprec.calibrate(reference, [{"input_ids": i} for i in ids])
    for name, layer in session_of(model).scaling.layers.items():
        other = session_of(reference).scaling.layers[name].flexible
        assert torch.equal(layer.flexible.input.maxval, other.input.maxval)
        assert torch.equal(layer.flexible.weight.maxval, other.weight.maxval)


def test_conv1d_is_calibrated_by_output_channel() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    linear, conv = nn.Sequential(nn.Linear(32, 48)), nn.Sequential(pytorch_utils.Conv1D(48, 32))
    conv[0].weight.data, conv[0].bias.data = linear[0].weight.data.t().contiguous(), linear[0].bias.data.clone()
    x = batch(16, 32)
    for model in (linear, conv):
        hf_lowprec.calibrate(model, [x])
    assert conv[0]._lowprec.flexible.weight.maxval.shape == (48, 1)
    assert same_bits(linear(x), conv(x))


def test_revert_gives_the_model_back_and_training_goes_on_from_the_ranges() -> None:
    model = mlp()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hf_lowprec.calibrate(model, [batch(16, 32)], estimator="minmax")
    maxval = model.up._lowprec.flexible.input.maxval
    found = float(maxval.detach())
    model(batch(16, 32)).square().mean().backward()
    assert float(maxval.detach()) == found and maxval.grad is not None, "the first batch does not search again"
    hf_lowprec.revert(model)
    assert type(model.up) is nn.Linear
    assert_same_state(model.state_dict(), before)


def test_a_converted_model_is_calibrated_as_it_is() -> None:
    model = mlp()
    report = hf_lowprec.convert(model, recipe(split="free"))
    assert hf_lowprec.calibrate(model, [batch(8, 32)]) is report
    model(batch(2, 32))
    with pytest.raises(CalibrationError, match=r"is converted with recipe 'e4m3none-free', not 'e0m7-fixed'"):
        hf_lowprec.calibrate(model, [batch(8, 32)], recipe("e0m7"))


# --- what is refused ------------------------------------------------------------------------------------------------


class Branch(nn.Module):
    """Half of it is never reached."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        (mlp, [], {}, "no data: calibrate needs at least one batch"),
        (Branch, [torch.ones(2, 32)], {}, r"1 layers saw no data \(idle\): .*modules_to_not_convert"),
        (
            Branch,
            [torch.full((2, 32), torch.inf)],
            {"modules_to_not_convert": "idle"},
            "input of used holds Inf or NaN",
        ),
        (
            mlp,
            [torch.ones(2, 32)],
            {"recipe": "fp8-lm"},
            "recipe 'fp8-lm' .* has nothing to calibrate: use 'fp8-flex'",
        ),
        (
            mlp,
            [torch.ones(2, 32)],
            {"estimator": "max"},
            "estimator: one of mse, output",
        ),
        (mlp, [torch.ones(2, 32)], {"percentile": 0.0}, "percentile: above 0"),
    ],
)
def test_what_cannot_be_calibrated_is_left_alone(model: Any, data: Any, options: Any, message: str) -> None:
    model = model()
    with pytest.raises(ValueError, match=message):
        hf_lowprec.calibrate(model, data, **options)
    assert recipe_of(model) is None and not any("lowprec" in k for m in model.modules() for k in m.__dict__)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("data", [torch.ones(2, 32), {"x": torch.ones(2, 32)}, None, 3])
def test_one_batch_is_no_data(data: Any) -> None:
    model = mlp()
    with pytest.raises(TypeError, match=r"data: batches.*not one \w+: \[batch\] is a list of one"):
        hf_lowprec.calibrate(model, data)
    assert recipe_of(model) is None


def test_weights_that_are_not_finite_have_no_range() -> None:
    model = mlp()
    with torch.no_grad():
        model.down.weight[0, 0] = torch.nan  # what reads its output is not calibrated
    with pytest.raises(CalibrationError, match="the weight of down holds Inf or NaN"):
        hf_lowprec.calibrate(model, [torch.ones(2, 32)])
    assert recipe_of(model) is None


def test_an_error_in_the_model_leaves_it_as_it_was() -> None:
    model = mlp()
    with pytest.raises(RuntimeError):
        hf_lowprec.calibrate(model, [batch(4, 32), batch(4, 31)])
    assert recipe_of(model) is None and type(model.up) is nn.Linear


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path]:
    model = llama(num_hidden_layers=1)
    hf_lowprec.calibrate(model, batches(2))
    hf_lowprec.save_calibration(model, tmp_path / "ranges.safetensors")
    return model, tmp_path / "ranges.safetensors"


def test_files_give_the_same_forward(saved: tuple[nn.Module, Path]) -> None:
    model, path = saved
    assert path.stat().st_size < 40_000
    fresh, converted = llama(num_hidden_layers=1), llama(num_hidden_layers=1)
    hf_lowprec.convert(converted, "fp8-flex")
    ids = token_ids(2, 8)
    for other in (fresh, converted):
        report = hf_lowprec.load_calibration(other, path)
        assert "calibrated read from ranges.safetensors: inputs" in report.summary()
        assert same_bits(other(input_ids=ids).logits, model(input_ids=ids).logits)


def rewrite(path: Path, change: Any) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


KEY = "model.layers.0.mlp.up_proj.input.maxval"
MAN = "model.layers.0.mlp.up_proj.weight.man"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop(KEY), "of other layers than the model's"),
        (lambda t, m: t.update(extra=torch.ones(())), "of other layers than the model's"),
        (lambda t, m: t.update({KEY: torch.tensor(-1.0)}), "up_proj.input.maxval is out of range"),
        (lambda t, m: t.update({KEY: torch.tensor(float("nan"))}), "up_proj.input.maxval is out of range"),
        (lambda t, m: t.update({MAN: torch.tensor(9.0)}), "up_proj.weight.man is out of range"),
        (lambda t, m: t.update({KEY: torch.ones(3)}), r"is torch.float32 \(3,\), not \(\)"),
        (lambda t, m: m.update(version="99"), "not a calibration of this version"),
        (lambda t, m: m.update(recipe="{"), "recipe is not JSON"),
        (lambda t, m: m.update(recipe=json.dumps({"name": "bf16"})), "has no ranges"),
    ],
)
def test_damaged_files_are_refused(saved: tuple[nn.Module, Path], change: Any, message: str) -> None:
    _, path = saved
    rewrite(path, change)
    fresh = llama(num_hidden_layers=1)
    with pytest.raises(CalibrationError, match=message):
        hf_lowprec.load_calibration(fresh, path)
    assert recipe_of(fresh) is None


def test_files_that_are_none(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    path = saved[1]
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-7])
    for bad in (cut, tmp_path / "missing.safetensors"):
        with pytest.raises(CalibrationError, match="no readable safetensors file"):
            hf_lowprec.load_calibration(llama(num_hidden_layers=1), bad)
    other = llama(num_hidden_layers=1)
    hf_lowprec.convert(other, recipe("e0m7"))
    with pytest.raises(CalibrationError, match="calibrated with recipe 'fp8-flex', the model is converted with"):
        hf_lowprec.load_calibration(other, path)
    for unfit in (mlp(), other):
        with pytest.raises(CalibrationError, match="calibrate"):
            hf_lowprec.save_calibration(unfit, tmp_path / "x.safetensors")
