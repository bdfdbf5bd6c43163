# SPDX-License-Identifier: Apache-2.0
"""What goes wrong says so, says what to do, and changes nothing."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core import QUANTISING, assert_same_state, batch, bits_of, mlp, same_bits, train_step
from torch import Tensor, nn

import hf_lowprec
from hf_lowprec import describe
from hf_lowprec.conversion import ConversionError, NothingConvertedError, native_problem, session_of
from hf_lowprec.modules import LowPrecLinear
from hf_lowprec.monitor import statistics
from hf_lowprec.ops import quant_key
from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import Quant, RecipeError
from hf_lowprec.stepping import STATE_KEY, attach_optimizer


def assert_untouched(model: nn.Module) -> None:
    assert not any(isinstance(module, LowPrecLinear) for module in model.modules())
    assert not any("lowprec" in key for module in model.modules() for key in module.__dict__)


# --- convert --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"), [("fp8lm", "fp8-lm"), ("te-curent", "te-current"), ("FP8-AMX", "fp8-amax"), ("bf-16", "bf16")]
)
def test_unknown_recipe_names_the_nearest(name: str, nearest: str) -> None:
    model = mlp()
    with pytest.raises(RecipeError, match=rf"unknown recipe '{name}'; did you mean .*'{nearest}'"):
        hf_lowprec.convert(model, name)
    assert_untouched(model)


def test_unknown_recipe_like_no_other_lists_what_there_is() -> None:
    with pytest.raises(RecipeError, match=r"unknown recipe 'zzzzzzzz'; available: bf16, .*fp8-cscale"):
        hf_lowprec.convert(mlp(), "zzzzzzzz")


@pytest.mark.parametrize("content", [None, "name: [", "name: x\nfprop: 3", "- a"])
def test_recipe_files(content: str | None, tmp_path: Any) -> None:
    path = tmp_path / "my.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RecipeError, match="does not exist" if content is None else "not valid|not YAML"):
        hf_lowprec.convert(mlp(), path)


def test_nothing_converted_lists_every_reason() -> None:
    model = mlp()
    with pytest.raises(NothingConvertedError) as error:
        hf_lowprec.convert(model, "fp8-lm", modules_to_not_convert=["up"], module_filter_fn=lambda *_: False)
    assert isinstance(error.value, ConversionError)
    message = str(error.value)
    assert "nothing could be converted" in message
    assert "named by modules_to_not_convert (up): up" in message and "refused by module_filter_fn: down" in message
    assert_untouched(model)
    with pytest.raises(NothingConvertedError):
        hf_lowprec.convert(nn.Sequential(nn.Embedding(4, 16)), "te-current")


def test_two_different_recipes() -> None:
    model = mlp()
    hf_lowprec.convert(model, "fp8-lm")
    state = model.up._lowprec
    for other in ("fp8-lm-o1", "bf16", {**PRESETS["fp8-lm"].to_dict(), "base": "fp16"}):
        with pytest.raises(ConversionError, match=r"already converted with recipe 'fp8-lm', not .*revert\(model\)"):
            hf_lowprec.convert(model, other)
    assert model.up._lowprec is state and session_of(model).recipe is PRESETS["fp8-lm"]


@pytest.mark.parametrize("before", [False, True])
def test_data_parallel(before: bool) -> None:
    model = mlp()
    if before:
        hf_lowprec.convert(model, "fp8-lm")
    with pytest.raises(ConversionError, match=r"DataParallel copies the model .*accelerate launch"):
        hf_lowprec.convert(nn.DataParallel(model), "fp8-lm")
    if not before:
        assert_untouched(model)


def test_malformed_arguments_leave_the_model_alone() -> None:
    model = mlp()
    with pytest.raises(ZeroDivisionError):
        hf_lowprec.convert(model, "fp8-lm", module_filter_fn=lambda *_: 1 / 0)
    assert_untouched(model)


# --- hardware -------------------------------------------------------------------------------------------------------


class OnGpu(nn.Sequential):
    """A model that says its Parameters are on a GPU."""

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        yield SimpleNamespace(device=torch.device("cuda", 0), numel=lambda: 1, element_size=lambda: 4)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def set_capability(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Oldtimer")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return set_capability


SM_89 = "sm_89 or newer"
FP8 = [name for name in QUANTISING if describe.needs(PRESETS[name]) == SM_89]


@pytest.mark.parametrize("name", FP8)
def test_gpu_without_fp8(name: str, gpu: Callable[[int, int], None]) -> None:
    gpu(8, 0)
    model = OnGpu(nn.Linear(32, 32))
    wanted = rf"recipe '{name}' needs FP8 tensor cores \(sm_89 or newer\), NVIDIA Oldtimer is sm_80; pass emulate=True"
    with pytest.raises(ConversionError, match=wanted):
        hf_lowprec.convert(model, name)
    assert_untouched(model)
    report = hf_lowprec.convert(model, name, emulate=True)
    assert report.emulated and "emulated GEMMs" in report.summary()
    assert model[0]._lowprec.spec.emulate


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
def test_gpu_with_fp8(capability: tuple[int, int], gpu: Callable[[int, int], None]) -> None:
    gpu(*capability)
    report = hf_lowprec.convert(OnGpu(nn.Linear(32, 32)), "fp8-lm")
    assert not report.emulated and "native GEMMs" in report.summary()


def test_recipes_that_no_gpu_has(gpu: Callable[[int, int], None]) -> None:
    gpu(9, 0)
    blocks = {"granularity": "block", "block": [32]}
    quant = {"format": "e4m3fn", "scaling": blocks}
    recipe = hf_lowprec.Recipe.from_dict({"name": "mine", "fprop": {"input": quant, "weight": quant}})
    assert native_problem(recipe, torch.device("cuda")) == "recipe 'mine' uses e4m3fn per block, native nowhere yet"
    report = hf_lowprec.convert(model := OnGpu(nn.Linear(32, 32)), recipe)
    assert "emulated GEMMs" in report.summary() and model[0]._lowprec.spec.emulate
    assert "no kernels for device type 'mps'" in str(native_problem(PRESETS["fp8-lm"], torch.device("mps")))


@pytest.mark.parametrize(
    "name", [n for n in QUANTISING if describe.needs(PRESETS[n]) not in (SM_89, "sm_80 or newer")]
)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_recipes_beyond_fp8_tensor_cores_are_emulated_unasked(
    name: str, capability: tuple[int, int], gpu: Callable[[int, int], None]
) -> None:
    """MXFP8 is native from sm_100 on; the others nowhere. The summary says which, and why."""
    gpu(*capability)
    report = hf_lowprec.convert(model := OnGpu(nn.Linear(32, 32)), name)
    native = describe.needs(PRESETS[name]) == "sm_100 or newer" and capability == (10, 0)
    assert report.emulated == model[0]._lowprec.spec.emulate == (not native)
    if native:
        assert "native GEMMs" in report.summary()
    elif describe.needs(PRESETS[name]) == "sm_100 or newer":
        why = rf"emulated GEMMs \(recipe '{name}' needs MX tensor cores \(sm_100 or newer\), NVIDIA Oldtimer is sm_"
        assert re.search(why, report.summary())
    else:
        assert "emulated GEMMs (recipe" in report.summary()


def test_a_model_on_its_way_to_an_older_gpu(gpu: Callable[[int, int], None]) -> None:
    gpu(9, 0)
    report = hf_lowprec.convert(model := nn.Sequential(nn.Linear(32, 32)), "mxfp8")
    assert report.emulated and model[0]._lowprec.spec.emulate
    assert not hf_lowprec.convert(nn.Sequential(nn.Linear(32, 32)), "fp8-lm").emulated


def test_recipes_without_gemms_need_no_fp8(gpu: Callable[[int, int], None]) -> None:
    gpu(7, 0)
    hf_lowprec.convert(OnGpu(nn.Linear(32, 32)), "bf16")


def test_gemm_on_a_gpu_without_fp8(gpu: Callable[[int, int], None]) -> None:
    """A model may move to the GPU after it was converted."""
    pytest.importorskip("triton")
    from hf_lowprec.kernels import scaled_mm

    gpu(8, 6)
    key = quant_key(Quant(format="e4m3fn"))
    with pytest.raises(RuntimeError, match=r"NVIDIA Oldtimer has no FP8 tensor cores .*emulate=True"):
        scaled_mm._supported(torch.device("cuda"), key, key)
    mx = quant_key(PRESETS["mxfp8"].fprop.input)
    with pytest.raises(RuntimeError, match=r"NVIDIA Oldtimer has no MX tensor cores .*emulate=True"):
        scaled_mm._supported(torch.device("cuda", 1), mx, mx)
    gpu(10, 0)
    assert scaled_mm._supported(torch.device("cuda", 2), mx, mx) == "scaled_mm MX e4m3fn x e4m3fn"
    with pytest.raises(RuntimeError, match=r"no native GEMM for e4m3fn x e4m3fn with these scalings"):
        scaled_mm._supported(torch.device("cuda", 3), mx, key)


# --- optimizers and checkpoints -------------------------------------------------------------------------------------


def test_optimizer_of_other_parameters() -> None:
    model = mlp()
    hf_lowprec.convert(model, "fp8-lm")
    for make in (torch.optim.SGD, torch.optim.AdamW):
        with pytest.raises(ValueError, match="holds none of the model's parameters: build it from"):
            attach_optimizer(model, make(mlp().parameters(), lr=0.1))


def test_attach_before_convert() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="convert the model before"):
        attach_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))


def trained(kind: str = "SGD", recipe: str = "fp8-lm", seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = mlp(seed)
    hf_lowprec.convert(model, recipe)
    make = {"SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "AdamW": torch.optim.AdamW}[kind]
    optimizer = attach_optimizer(model, make(model.parameters()))
    for step in range(2):
        train_step(model, optimizer, batch(5, 32, seed=10 * seed + step))
    return model, optimizer


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = optimizer.state_dict()
    groups = {str(i): {k: v for k, v in g.items()} for i, g in enumerate(state["param_groups"])}
    return bits_of({"model": model.state_dict(), "state": state["state"], "groups": groups, "ours": state[STATE_KEY]})


def refused(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], match: str) -> None:
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(state)
    assert_same_state(before, everything(model, optimizer))
    train_step(model, optimizer, batch(5, 32))


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_checkpoint_of_another_recipe(kind: str) -> None:
    saved = trained(kind, "fp8-lm", seed=1)[1].state_dict()
    model, optimizer = trained(kind, "fp8-lm")
    for other in ("fp8-lm-o1", "te-delayed"):
        state = {**saved, STATE_KEY: trained(kind, other)[1].state_dict()[STATE_KEY]}
        wanted = rf"written with recipe '{other}', the model trains with 'fp8-lm'; resume with the same"
        refused(model, optimizer, state, wanted)


def _drop(*path: str) -> Callable[[dict[str, Any]], None]:
    def damage(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return damage


def _set(value: Any, *path: str) -> Callable[[dict[str, Any]], None]:
    def damage(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return damage


INPUT = ("layers", "down", "input")
DAMAGES = {
    "no version": _drop("version"),
    "other version": _set(99, "version"),
    "no recipe": _drop("recipe"),
    "recipe is nonsense": _set({"name": "fp8-lm", "fprop": 3}, "recipe"),
    "no layers": _drop("layers"),
    "layers are no table": _set([1, 2], "layers"),
    "layer missing": _drop("layers", "down"),
    "layer too many": _set({}, "layers", "other"),
    "layer is no table": _set(torch.zeros(3), "layers", "down"),
    "role missing": _drop(*INPUT),
    "role is no table": _set(None, *INPUT),
    "scale missing": _drop(*INPUT, "scale"),
    "scale is NaN": _set(torch.tensor(float("nan")), *INPUT, "scale"),
    "scale is infinite": _set(torch.tensor(float("inf")), *INPUT, "scale"),
    "scale is negative": _set(torch.tensor(-1.0), *INPUT, "scale"),
    "scale of another shape": _set(torch.ones(2), *INPUT, "scale"),
    "scale of another dtype": _set(torch.ones((), dtype=torch.bfloat16), *INPUT, "scale"),
    "scale is a number": _set(1.0, *INPUT, "scale"),
    "history is short": _set(torch.zeros(15), *INPUT, "history"),
    "history is NaN": _set(torch.full((16,), float("nan")), *INPUT, "history"),
    "counts are negative": _set(torch.full((4,), -1), *INPUT, "counts"),
    "no gradients": _drop("gradients"),
    "gradients are no table": _set(3, "gradients"),
    "mu missing": _drop("gradients", "k"),
    "mu of other layers": _set(torch.zeros(3, dtype=torch.int32), "gradients", "k"),
    "mu out of range": _set(torch.full((2,), 10**6, dtype=torch.int32), "gradients", "k"),
    "mu counters negative": _set(torch.full((2,), -1), "gradients", "count"),
}


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_state_is_refused_and_nothing_changes(damage: str, kind: str) -> None:
    state = copy.deepcopy(trained(kind, seed=1)[1].state_dict())
    DAMAGES[damage](state[STATE_KEY])
    refused(*trained(kind), state, "low-precision state|gradient quantizer|recipe")


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("damage", ["ours is no table", "group missing", "state missing"])
def test_damaged_optimizer_state_leaves_ours_alone(damage: str, kind: str) -> None:
    state = copy.deepcopy(trained(kind, seed=1)[1].state_dict())
    if damage == "ours is no table":
        state[STATE_KEY] = "nonsense"
    elif damage == "group missing":
        state["param_groups"] = []
    else:
        del state["state"]
    model, optimizer = trained(kind)
    before = everything(model, optimizer)
    with pytest.raises((ValueError, KeyError)):
        optimizer.load_state_dict(state)
    assert_same_state(before, everything(model, optimizer))


def test_truncated_file() -> None:
    buffer = io.BytesIO()
    torch.save(trained()[1].state_dict(), buffer)
    with pytest.raises((RuntimeError, EOFError, ValueError)):
        torch.load(io.BytesIO(buffer.getvalue()[:-100]), weights_only=True)


# --- values ---------------------------------------------------------------------------------------------------------


def one_layer(recipe: str) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16))
    hf_lowprec.convert(model, recipe)
    return model


def run(model: Any, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    out.backward(grad)
    return {"out": out.detach(), "input": x.grad, "weight": model[0].weight.grad, "bias": model[0].bias.grad}


def scale_state(model: Any) -> dict[str, Any]:
    state = bits_of(session_of(model).scaling.state_dict())
    return {key: value for key, value in state.items() if not key.endswith("counts")}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", FP8)
def test_non_finite_input_spoils_its_own_row_only(name: str, bad: float, steps: int) -> None:
    """Row 3, feature 7 is not finite. Everything else is bit-equal to a run in which that element is 0."""
    spoiled, clean = one_layer(name), one_layer(name)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.0) for m in (spoiled, clean)]
    for step in range(steps):  # with and without a delayed scale
        for model, optimizer in zip((spoiled, clean), optimizers, strict=True):
            run(model, batch(6, 32, seed=step), batch(6, 16, seed=9))
            optimizer.step()
    x, grad = batch(6, 32, seed=5), batch(6, 16, seed=6)
    x[3, 7] = 0.0
    expected = run(clean, x, grad)
    x[3, 7] = bad
    result = run(spoiled, x, grad)
    rows, columns = torch.arange(6) != 3, torch.arange(32) != 7
    assert result["out"][3].isnan().all()
    assert same_bits(result["out"][rows], expected["out"][rows])
    assert same_bits(result["input"], expected["input"]) and same_bits(result["bias"], expected["bias"])
    assert result["weight"][:, 7].isnan().all(), "it is in the sum of this gradient"
    assert same_bits(result["weight"][:, columns], expected["weight"][:, columns])
    assert_same_state(scale_state(spoiled), scale_state(clean))
    assert statistics(spoiled)["lowprec/input_nonfinite"] == 1.0
    assert statistics(clean)["lowprec/input_nonfinite"] == 0.0
    # The next step is as if nothing had happened.
    for model, optimizer in zip((spoiled, clean), optimizers, strict=True):
        model.zero_grad()
        optimizer.step()
    assert_same_state(scale_state(spoiled), scale_state(clean))
    assert_same_state(run(spoiled, batch(6, 32), grad), run(clean, batch(6, 32), grad))


@pytest.mark.parametrize("name", FP8)
def test_non_finite_gradient_and_weight(name: str) -> None:
    spoiled, clean = one_layer(name), one_layer(name)
    x, grad = batch(6, 32), batch(6, 16, seed=1)
    grad[2, 5] = 0.0
    expected = run(clean, x, grad)
    grad[2, 5] = float("inf")
    result = run(spoiled, x, grad)
    rows, outputs = torch.arange(6) != 2, torch.arange(16) != 5
    assert same_bits(result["out"], expected["out"])
    # A gradient that no slot quantises goes on as it is, and its products are infinite.
    lost = torch.isnan if PRESETS[name].dgrad.grad_output else lambda t: ~t.isfinite()
    assert lost(result["input"][2]).all() and same_bits(result["input"][rows], expected["input"][rows])
    assert lost(result["weight"][5]).all() and same_bits(result["weight"][outputs], expected["weight"][outputs])
    assert_same_state(scale_state(spoiled), scale_state(clean))
    assert statistics(spoiled)["lowprec/grad_output_nonfinite"] == 1.0

    spoiled, clean = one_layer(name), one_layer(name)
    clean[0].weight.data[5, 7], spoiled[0].weight.data[5, 7] = 0.0, float("nan")
    grad[2, 5] = 0.0
    expected, result = run(clean, x, grad), run(spoiled, x, grad)
    assert result["out"][:, 5].isnan().all() and same_bits(result["out"][:, outputs], expected["out"][:, outputs])
    assert_same_state(scale_state(spoiled), scale_state(clean))


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_non_finite_weight_gradient_does_not_move_mu(kind: str) -> None:
    model, optimizer = trained(kind)
    k = session_of(model).gradients.k.clone()
    model.up.weight.grad[0, 0] = float("nan")
    weights = bits_of(model.state_dict())
    optimizer.step()
    assert int(session_of(model).gradients.k[0]) == int(k[0])
    if kind == "AdamW":
        assert_same_state(weights, model.state_dict())
        assert int(optimizer.skipped_steps) == 1


@pytest.mark.parametrize("zero", ["input", "weight", "gradient", "everything"])
@pytest.mark.parametrize("name", QUANTISING)
def test_all_zero_tensors(name: str, zero: str) -> None:
    model = one_layer(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, grad = batch(6, 32), batch(6, 16, seed=1)
    if zero in ("input", "everything"):
        x = torch.zeros(6, 32)
    if zero in ("weight", "everything"):
        model[0].weight.data.zero_()
    if zero in ("gradient", "everything"):
        grad = torch.zeros(6, 16)
    for _ in range(2):
        result = run(model, x, grad)
        if zero != "gradient":
            assert same_bits(result["out"], model[0].bias.detach().expand(6, 16).contiguous())
        assert all(bool(value.isfinite().all()) for value in result.values())
        assert bool((result["weight"] == 0).all()) is (zero != "weight")
        optimizer.step()
    assert all(bool(v.isfinite().all()) for v in scale_state(model).values())
    stochastic = PRESETS[name].fprop.accumulation.rounding.mode == "stochastic"  # words change with the step
    if zero == "everything" and not stochastic:  # a layer whose first tensors were zero has learnt nothing from them
        fresh, x, grad = one_layer(name), 1e3 * batch(6, 32, seed=3), 1e-5 * batch(6, 16, seed=4)
        model.load_state_dict(fresh.state_dict())
        assert_same_state(run(model, x, grad), run(fresh, x, grad))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "fp16"}, "loss_scale: gradients in float16 need one"),
    ],
)
def test_a_field_that_nothing_carries_out_is_refused(change, message):
    model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    with pytest.raises(ConversionError, match=message):
        hf_lowprec.convert(model, {"name": "mine", **change})
    assert type(model[0]) is torch.nn.Linear
