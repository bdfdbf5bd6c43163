# SPDX-License-Identifier: Apache-2.0
"""BitNet and SwitchBack against their papers' formulas in float64, and the parts of the model that they brought.

Codes are compared exactly, gradients with autograd's through straight-through estimators, the optimizer by its steps.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from core import batch, close_in, mlp, same_bits, train_step
from torch import Tensor, nn

import hf_lowprec
from hf_lowprec import numerics, ops, optim
from hf_lowprec.conversion import native_nowhere, native_problem, session_of
from hf_lowprec.describe import needs
from hf_lowprec.kernels.scaled_mm import scaled_mm as gpu_scaled_mm
from hf_lowprec.numerics.integers import in_float32, integer_product
from hf_lowprec.ops.scaled_mm import default_scaled_mm
from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import Gemm, InputNorm, Quant, Recipe, RecipeError, Scaling, States
from hf_lowprec.stepping import attach_optimizer

NAMES = ["bitnet", "bitnet-b1.58", "switchback", "switchback-m", "switchback-q"]
SWITCHBACKS = NAMES[2:]
TERNARY, SIGNS = PRESETS["bitnet-b1.58"].fprop.weight, PRESETS["bitnet"].fprop.weight
TOKENS, ROWS = PRESETS["bitnet-b1.58"].fprop.input, PRESETS["switchback"].fprop.input


def layer(name: Any, k: int = 32, n: int = 48, bias: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, n, bias=bias)).to(dtype)
    hf_lowprec.convert(model, name)
    return model[0]


def run(module: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.detach().requires_grad_()
    module.zero_grad()
    out = module(x)
    out.backward(grad)
    return out.detach(), x.grad, module.weight.grad


def int8(x: Tensor, largest: float, top: float = 127.0, dim: int | None = -1) -> tuple[Tensor, Tensor]:
    """(codes, scale) in float64: round(x * top / max|x|), at most `largest`; zeros have scale 1."""
    x = x.double()
    amax = x.abs().max() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = torch.where(amax > 0, amax / top, 1.0)
    return (x / scale).round().clamp(-largest, largest), scale


# --- scales ---------------------------------------------------------------------------------------------------------


def test_ternary_codes_are_the_papers() -> None:
    """arXiv 2402.17764, section 2: RoundClip(W / gamma, -1, 1), gamma the mean magnitude."""
    w = 0.02 * batch(64, 96)
    qdata, factor = numerics.quantize(w, TERNARY)
    gamma = w.double().abs().mean()
    assert torch.equal(numerics.decode(qdata, "e0m1").double(), (w.double() / gamma).round().clamp(-1, 1))
    assert abs(float(factor) * float(gamma) - 1) < 1e-6, "the stored factor multiplies on the way in"
    shares = [(numerics.decode(qdata, "e0m1") == v).double().mean() for v in (-1, 0, 1)]
    assert all(abs(float(share) - known) < 0.02 for share, known in zip(shares, (0.345, 0.31, 0.345), strict=True))


def test_signs_are_the_papers() -> None:
    """arXiv 2310.11453, section 2.1: +1 where W > mean, else -1; the scale is the uncentred mean magnitude."""
    w = 0.02 * batch(64, 96) + 0.005
    w[0, 0] = 0.0
    w[0, 0] = 64 * 96 / (64 * 96 - 1) * w.mean()  # now that element is the mean, or next to it
    qdata, beta = numerics.quantize(w, SIGNS)
    assert torch.equal(numerics.decode(qdata, "sign"), torch.where(w > w.mean(), 1.0, -1.0))
    assert float(beta) == float(w.abs().mean())
    zeros, _ = numerics.quantize(torch.zeros(4, 4), SIGNS)
    assert bool((numerics.decode(zeros, "sign") == -1).all()), "Sign(0) is -1"
    assert float(numerics.quantize_dequantize(torch.zeros(4, 4), SIGNS).abs().max()) < 1e-37, "and stands for nothing"


def test_a_factor_that_divides_never_reaches_minus_128() -> None:
    """AutoBitLinear clamps to [-128, 127]; the symmetric clamp is the same, since the amax is scaled to 127."""
    amax = torch.cat([torch.logspace(-5, 30, 20000), torch.rand(20000) + 0.5])
    products = amax * (127 / amax.clamp(min=1e-5))
    assert float(products.max()) < 127.5
    factor = numerics.scale_from_amax(amax, "e0m7", TOKENS.scaling)
    assert same_bits(64 * factor, 127 / amax.clamp(min=1e-5)), "two roundings, in their order"


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (dict(statistic="mean", granularity="block", block=(32,)), "'mean' is over a tensor, a row or a column"),
        (dict(statistic="mean", snap="rceil"), "no snap, no margin"),
        (dict(inverse=True, margin=1), "no snap, no margin"),
        (dict(inverse=True, store="float16"), "inverse: the factor is stored as float32"),
        (dict(floor=1e-5, method="delayed"), "only for method 'current'"),
        (dict(target=0.0), "target: above 0"),
    ],
)
def test_scalings_that_mean_nothing_are_refused(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scaling(**scaling)


def test_what_only_gemms_can_have_is_refused_elsewhere() -> None:
    for quant in (SIGNS, TOKENS, Quant(format="e4m3fn", scaling=Scaling(statistic="mean"))):
        with pytest.raises(ValueError, match=r"exp_avg: .* for operands of GEMMs only"):
            States(exp_avg=quant)
        with pytest.raises(RecipeError, match=r"saved: .* for operands of GEMMs only"):
            Recipe.from_dict({**PRESETS["fp8-lm"].to_dict(), "saved": Recipe.from_dict(
                {"name": "x", "fprop": {"input": quant}}).to_dict()["fprop"]["input"]})  # fmt: skip
    with pytest.raises(ValueError, match="center: needs a tensor, rows or columns"):
        Quant(format="sign", center=True, scaling=Scaling(granularity="block", block=(32,)))
    with pytest.raises(ValueError, match="accumulation: a product with one quantised operand"):
        Gemm(weight=TERNARY, accumulation={"fast": True})
    with pytest.raises(ValueError, match="a factor with 'inverse' divides"):
        Gemm(input=TOKENS, weight=TERNARY, accumulation={"format": "e6m9"})
    with pytest.raises(ValueError, match="input_norm: nothing is converted"):
        Recipe(name="norm-only", input_norm=InputNorm())


# --- integer products -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(5, 7, 3), (33, 4100, 9), (1, 1, 1), (17, 1, 33), (2, 2, 5), (0, 8, 4), (4, 0, 4), (17, 64, 31)]
)
def test_integer_products_are_exact(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-127, 128, (size, k), dtype=torch.int8, generator=generator) for size in (m, n))
    if m == 33:
        a, b = a.abs().clamp(min=126), b.abs().clamp(min=126)  # beyond 2^24, with odd numbers among the sums
    expected = (a.long() @ b.long().t()).int()
    assert torch.equal(integer_product(a, b), expected) and torch.equal(in_float32(a, b), expected)
    if m == 33:
        assert not torch.equal((a.float() @ b.float().t()).long(), expected.long()), "or float32 would do"
    with pytest.raises(OverflowError, match="may leave int32"):
        integer_product(
            torch.empty(1, (1 << 17) + 1, dtype=torch.int8), torch.empty(1, (1 << 17) + 1, dtype=torch.int8)
        )


def test_every_code_has_its_integer() -> None:
    for name in ("e0m1", "e0m3", "e0m7", "sign"):
        codes = numerics.encode(torch.tensor([*values_of(name)]), name)
        values = numerics.integers(codes, name).double() * numerics.integer_unit_of(name)
        assert torch.equal(values, numerics.decode(codes, name).double()), name


def values_of(name: str) -> tuple[float, ...]:
    from hf_lowprec.formats import Codebook, get_format

    fmt = get_format(name)
    return fmt.values if isinstance(fmt, Codebook) else fmt.values()


@pytest.mark.parametrize("name", ["bitnet", "bitnet-b1.58", "switchback", "switchback-q"])
def test_native_product_is_the_emulated_one(name: str) -> None:
    """The GPU's implementation on the CPU: bit for bit, but where the factors divide, which emulation does first."""
    gemm = PRESETS[name].fprop
    a_key, b_key = ops.quant_key(gemm.input), ops.quant_key(gemm.weight)
    a, a_scale = ops.quantize(batch(9, 300), a_key)
    b, b_scale = ops.quantize(batch(21, 300, seed=1), b_key)
    args = (a, a_scale, a_key, b, b_scale, b_key, batch(21, seed=2), torch.float32, False, False)
    native, emulated = gpu_scaled_mm(*args), default_scaled_mm(*args)
    if name == "bitnet-b1.58":
        close_in(native, emulated, ulps=64)
    else:
        assert same_bits(native, emulated)


def test_where_they_are_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Oldtimer")
    for capability, native in (((8, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, c=capability: c)
        for name in NAMES:
            problem = native_problem(PRESETS[name], torch.device("cuda", 0))
            assert (problem is None) is native and native_nowhere(PRESETS[name]) is None
            assert native or "needs int8 tensor cores (sm_80 or newer), NVIDIA Oldtimer is sm_75" in problem
            assert needs(PRESETS[name]) == "sm_80 or newer"
    model = nn.Sequential(nn.Linear(33, 17))
    assert hf_lowprec.convert(model, "switchback").converted == ["0"], "integer operands are padded"


# --- the papers' equations, in float64 ------------------------------------------------------------------------------


def test_bitnet_is_its_linear() -> None:
    """y = W~ Quant(LN(x)) beta gamma / Q_b (arXiv 2310.11453, section 2.1); gradients read the same operands."""
    module, x, grad = layer("bitnet"), 3 * batch(2, 9, 32) + 0.5, batch(2, 9, 48, seed=1)
    out, grad_input, grad_weight = run(module, x, grad)
    w, b, xs = module.weight.detach(), module.bias.detach().double(), x.reshape(-1, 32)
    normal = F.layer_norm(xs, (32,), eps=1e-5)
    codes, gamma_over_q = int8(normal, 127, top=128.0, dim=None)
    wide = xs.double()
    centred = wide - wide.mean(-1, keepdim=True)
    r = (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert float((normal.double() - centred * r).abs().max()) < 1e-6
    signs = torch.where(w > w.mean(), 1.0, -1.0).double() * w.double().abs().mean()
    x_q = codes * gamma_over_q
    assert int(codes.abs().max()) == 127, "what scales to 128 is clipped"
    close_in(out.reshape(-1, 48), (x_q @ signs.t() + b).float())
    g = grad.reshape(-1, 48).double()
    close_in(grad_weight, (g.t() @ x_q).float(), ulps=8)
    dn = g @ signs
    n = centred * r
    expected = r * (dn - dn.mean(-1, keepdim=True) - n * (dn * n).mean(-1, keepdim=True))
    close_in(grad_input.reshape(-1, 32), expected.float(), ulps=16)


def test_b158_is_the_straight_through_estimator() -> None:
    """x + (Q(x) - x).detach(): the gradients of both operands read the other one quantised, whatever was clipped."""
    module, x, grad = layer("bitnet-b1.58"), 3 * batch(2, 9, 32), batch(2, 9, 48, seed=1)
    out, grad_input, grad_weight = run(module, x, grad)
    w, leaf = module.weight.detach().clone().requires_grad_(), x.clone().requires_grad_()
    codes, scale = int8(x, 127)
    gamma = w.detach().abs().mean()
    x_q = leaf + ((codes * scale).float() - leaf).detach()
    w_q = w + ((w.detach() / gamma).round().clamp(-1, 1) * gamma - w).detach()
    expected = F.linear(x_q, w_q, module.bias)
    expected.backward(grad)
    close_in(out, expected.detach(), ulps=8)
    close_in(grad_input, leaf.grad, ulps=8)
    close_in(grad_weight, w.grad, ulps=8)


@pytest.mark.parametrize("name", SWITCHBACKS)
def test_switchback_is_its_algorithm(name: str) -> None:
    """arXiv 2304.13013, in float64."""
    module, x, grad = layer(name), 3 * batch(2, 9, 32), 1e-3 * batch(2, 9, 48, seed=1)
    x[1, 2] = 0.0
    grad[0, 4] = 0.0
    out, grad_input, grad_weight = run(module, x, grad)
    w, b = module.weight.detach(), module.bias.detach().double()
    xs, g = x.reshape(-1, 32), grad.reshape(-1, 48)
    by_row = name == "switchback-q"
    (qx, sx), (qw, sw) = int8(xs, 127), int8(w, 127, dim=-1 if by_row else None)
    close_in(out.reshape(-1, 48), ((qx @ qw.t()) * sx * sw.reshape(1, -1) + b).float(), ulps=2)
    (qg, sg), (qt, st) = int8(g, 127), int8(w, 127, dim=0 if by_row else None)
    close_in(grad_input.reshape(-1, 32), ((qg @ qt) * sg * st.reshape(1, -1)).float(), ulps=4)
    read = (qx * sx).float().double() if name == "switchback-m" else xs.double()
    close_in(grad_weight, (g.double().t() @ read).float(), ulps=8)


def test_codes_of_tokens_are_the_papers() -> None:
    x = 7 * batch(64, 96)
    for quant in (ROWS, TOKENS):
        qdata, _ = numerics.quantize(x, quant)
        assert torch.equal(64 * numerics.decode(qdata, "e0m7").double(), int8(x, 127)[0])


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_within_its_bound(name: str) -> None:
    """Under autocast products of quantised operands round once, and base-precision ones round their operands, too."""
    module, x, grad = layer(name), 3 * batch(9, 32), batch(9, 48, seed=1)
    out, grad_input, grad_weight = run(module, x, grad)
    low = x.detach().requires_grad_()
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        result = module(low)
    result.backward(grad.bfloat16())
    assert result.dtype == torch.bfloat16
    assert bool(((result.float() - out).abs() <= 2.0**-8 * out.abs() + 1e-6).all()), "one rounding"
    for got, want in ((low.grad, grad_input), (module.weight.grad, grad_weight)):
        assert float((got - want).norm()) <= 2.0**-6 * float(want.norm())


# --- what is kept ---------------------------------------------------------------------------------------------------


def saved_by(module: nn.Module, x: Tensor) -> list[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(x)
    return [t for t in saved if t.numel() > 1]


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_saved_instead_of_values(name: str) -> None:
    module = layer(name)
    x = batch(9, 32).requires_grad_()
    saved = {(t.dtype, tuple(t.shape)) for t in saved_by(module, x) if t.data_ptr() != module.weight.data_ptr()}
    codes, tokens = (torch.uint8, (9, 32)), (torch.float32, (9, 1))
    assert (
        saved
        == {
            "bitnet": {codes, tokens, (torch.float32, (9, 32))},  # the norm keeps its input itself
            "bitnet-b1.58": {codes, tokens},
            "switchback-m": {codes, tokens},
            "switchback": {(torch.float32, (9, 32))},
            "switchback-q": {(torch.float32, (9, 32))},
        }[name]
    )
    if name == "bitnet":
        assert any(t.data_ptr() == x.data_ptr() for t in saved_by(module, x)), "no copy of it"


@pytest.mark.parametrize("name", NAMES)
def test_readers_of_one_tensor_share_its_codes(name: str) -> None:
    pytest.importorskip("transformers")
    from core import llama, token_ids

    ids = token_ids(2, 8)
    shared, alone = llama(), llama()
    report = hf_lowprec.convert(shared, name)
    hf_lowprec.convert(alone, name, fuse=False)
    assert (len(report.shared), len(report.unshared)) == ((0, 4) if name == "bitnet" else (4, 0))
    assert ("one input, not shared, each linear normalises it first" in str(report)) is (name == "bitnet")
    for model in (shared, alone):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    # The layers alone: fused norms and MLPs round differently from the model's own.
    ours, theirs = (m.model.layers[0].self_attn for m in (shared, alone))
    x = batch(3, 5, 32).requires_grad_()
    theirs.load_state_dict(ours.state_dict())
    for one, other in ((ours.q_proj, theirs.q_proj), (ours.k_proj, theirs.k_proj), (ours.v_proj, theirs.v_proj)):
        assert same_bits(one(x), other(x))
        one.zero_grad(), other.zero_grad()
        one(x).sum().backward(), other(x).sum().backward()
        assert same_bits(one.weight.grad, other.weight.grad)
    x = batch(3, 5, 32, seed=1).requires_grad_()
    saved = [t for m in (ours.q_proj, ours.k_proj, ours.v_proj) for t in saved_by(m, x) if t.dtype == torch.uint8]
    copies = len({t.data_ptr() for t in saved})
    assert copies == {"bitnet": 3, "bitnet-b1.58": 1, "switchback-m": 1}.get(name, 0)


def test_weights_are_cast_once_a_step() -> None:
    for name, kept in (("bitnet", True), ("bitnet-b1.58", True), ("switchback", True), ("switchback-q", False)):
        model = mlp()
        hf_lowprec.convert(model, name)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        train_step(model, optimizer, batch(4, 32))
        first = model(batch(4, 32))
        cached = model.up._lowprec.weight_cache.quantized
        assert (cached is not None) is kept
        if cached is not None:
            assert cached.qdata.dtype == torch.uint8 and cached.transposed is None, "one byte a parameter"
        model.eval()
        assert same_bits(first, model(batch(4, 32))), "eval casts afresh, to the same codes"


# --- zeros, NaN, Inf ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_non_finite_values_are_seen(name: str, bad: float) -> None:
    """Integers have no NaN: the scale of the group says it, a token's or, where there is one scale, the tensor's."""
    spoiled, clean = layer(name), layer(name)
    x, grad = batch(6, 32), batch(6, 48, seed=1)
    x[3, 7] = 0.0
    expected = run(clean, x, grad)
    x[3, 7] = bad
    out, grad_input, grad_weight = run(spoiled, x, grad)
    rows = torch.arange(6) != 3
    assert out[3].isnan().all() and not grad_weight[:, 7].isfinite().any()
    if name == "bitnet":
        assert out.isnan().all(), "one scale for all tokens, in training"
        assert int(spoiled._lowprec.operands[0].counts[3]) == 32, "the norm spreads it over its token"
    else:
        assert same_bits(out[rows], expected[0][rows]) and same_bits(grad_input, expected[1])
        assert int(spoiled._lowprec.operands[0].counts[3]) == 1
    spoiled.weight.data[5, 7] = bad
    broken = run(spoiled, batch(6, 32), grad)[0]
    assert broken[:, 5].isnan().all() and (name == "switchback-q" or broken.isnan().all())


@pytest.mark.parametrize("name", NAMES)
def test_zero_tokens_and_zero_rows(name: str) -> None:
    module = layer(name)
    out, grad_input, grad_weight = run(module, torch.zeros(0, 32), torch.zeros(0, 48))
    assert out.shape == (0, 48) and grad_input.shape == (0, 32) and not grad_weight.any()
    x = batch(4, 32)
    x[2] = 0.0
    out, grad_input, grad_weight = run(module, x, batch(4, 48))
    assert same_bits(out[2], module.bias.detach()) and all(bool(t.isfinite().all()) for t in (grad_input, grad_weight))


@pytest.mark.parametrize("name", ["bitnet-b1.58", "switchback", "switchback-m", "switchback-q"])
def test_tokens_do_not_know_each_other(name: str) -> None:
    module, x = layer(name), batch(6, 32)
    mixed = x.clone()
    mixed[0] *= 1e4
    assert same_bits(module(mixed)[1:], module(x)[1:])


# --- input norm -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_input_norm_is_exact_in_both_directions(kind: str) -> None:
    recipe = Recipe(name="normed", input_norm=InputNorm(kind=kind, eps=1e-3), fprop=Gemm(weight=TERNARY))
    module, x, grad = layer(recipe), 3 * batch(5, 32) + 1, batch(5, 48, seed=1)
    out, grad_input, _ = run(module, x, grad)
    leaf = x.double().requires_grad_()
    centred = leaf - leaf.mean(-1, keepdim=True) if kind == "layer" else leaf
    normal = centred * (centred.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
    w = numerics.quantize_dequantize(module.weight, TERNARY).double()
    close_in(out, (normal @ w.t() + module.bias.double()).detach().float(), ulps=8)
    (normal @ module.weight.detach().double().t()).backward(grad.double())  # dgrad in the base precision
    close_in(grad_input, leaf.grad.float(), ulps=16)
    with hf_lowprec.high_precision(module):
        assert same_bits(module(x), F.linear(x, module.weight, module.bias)), "as before conversion: no norm"


# --- StableAdamW by recipe ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_a_recipe_can_name_stable_adamw(kind: Any) -> None:
    model, other = mlp(), mlp()
    report = hf_lowprec.convert(model, "switchback")
    hf_lowprec.convert(other, "switchback")
    options = dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1 if kind is torch.optim.AdamW else 0.0)
    old = kind(model.parameters(), **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(old, lambda step: 1 / (1 + step))
    new = attach_optimizer(model, old)
    assert type(new) is optim.StableAdamW and new.param_groups is old.param_groups
    assert f"optimizer StableAdamW in place of {kind.__name__}, with float32 states" in report.summary()
    assert attach_optimizer(model, old) is new
    reference = optim.StableAdamW(other.parameters(), eps=1e-8, states="fp32", **options)
    theirs = torch.optim.lr_scheduler.LambdaLR(reference, lambda step: 1 / (1 + step))
    for step in range(3):
        for m, o, s in ((model, new, schedule), (other, reference, theirs)):
            train_step(m, o, 100 * batch(4, 32, seed=step))
            s.step()
    assert all(map(same_bits, model.parameters(), other.parameters()))


def test_moments_of_adam_are_debiased_when_taken_over() -> None:
    """StableAdamW corrects the betas instead of the moments; both say the same of the past."""
    torch.manual_seed(0)
    a, b = (nn.Parameter(torch.ones(3, 5)) for _ in range(2))
    old = torch.optim.AdamW([a], lr=0.0, betas=(0.9, 0.95))
    whole = optim.StableAdamW([b], lr=0.0, betas=(0.9, 0.95), eps=1e-8, states="fp32")
    gradients = [torch.randn(3, 5) for _ in range(4)]
    for g in gradients[:3]:
        a.grad, b.grad = g.clone(), g.clone()
        old.step(), whole.step()
    new = optim.AdamW.adopt(old, States(algorithm="stable-adamw"))
    a.grad, b.grad = gradients[3].clone(), gradients[3].clone()
    new.step(), whole.step()
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.allclose(new.state[a][name], whole.state[b][name], rtol=1e-5)


def test_what_stable_adamw_cannot_take_over() -> None:
    states = States(algorithm="stable-adamw")
    with pytest.raises(ValueError, match=r"use torch\.optim\.AdamW, or weight_decay=0"):
        optim.AdamW.adopt(torch.optim.Adam(mlp().parameters(), weight_decay=0.1), states)
    with pytest.raises(ValueError, match=r"eps: 0\.0 is not > 0"):
        optim.AdamW.adopt(torch.optim.AdamW(mlp().parameters(), eps=0.0), states)
    with pytest.raises(ValueError, match="those of algorithm stable-adamw, not AdamW"):
        optim.AdamW(mlp().parameters(), states=states)
    optim.StableAdamW(mlp().parameters(), states="switchback")
    model = mlp()
    hf_lowprec.convert(model, "switchback")
    attach_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert "SGD kept (stable-adamw takes over from Adam and AdamW only)" in session_of(model).report.summary()


# --- one-sided products ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_dtypes(name: str) -> None:
    for shape, bias, dtype in itertools.product(
        [(32,), (1, 32), (2, 3, 32)], [True, False], [torch.float32, torch.bfloat16]
    ):
        module = layer(name, bias=bias, dtype=dtype)
        x = batch(*shape, dtype=dtype)
        out, grad_input, grad_weight = run(module, x, batch(*shape[:-1], 48, dtype=dtype))
        assert (out.dtype, grad_input.dtype, grad_weight.dtype) == (dtype,) * 3
        assert (out.shape, grad_input.shape) == ((*shape[:-1], 48), shape)


def test_a_frozen_weight_needs_no_codes() -> None:
    for name in NAMES:
        module = layer(name)
        module.weight.requires_grad_(False)
        x = batch(5, 32).requires_grad_()
        kept = [t for t in saved_by(module, x) if t.dtype == torch.uint8]
        assert not kept, name
        expected = run(layer(name), x, batch(5, 48))
        out = module(x)
        out.backward(batch(5, 48))
        assert same_bits(out, expected[0]) and same_bits(x.grad, expected[1]) and module.weight.grad is None
