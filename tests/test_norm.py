# SPDX-License-Identifier: Apache-2.0
"""Fused norms as modules: the module's own result and gradients, and everything around the module goes on working.

The CPU runs the operator's plain-torch implementation here (`emulate=True`); the kernels are held to that.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from core import batch
from test_norm_kind import CLASSES, hf
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lowprec import numerics
from hf_lowprec.modules.norm import LowPrecLayerNorm, LowPrecNorm, LowPrecRMSNorm, fuse_norm, norm_kind, unfuse_norm
from hf_lowprec.numerics import norm as truth
from hf_lowprec.ops.norm import norm

B, H, S = torch.bfloat16, torch.float16, torch.float32
WIDTH = 32
DTYPES = [(S, S), (B, B), (B, S), (S, B), (H, H)]


def make(path: str, dtype: torch.dtype = S, width: int = WIDTH) -> nn.Module:
    module = nn.LayerNorm(width) if path == "LayerNorm" else hf(path, width)
    for name, p in module.named_parameters():
        nn.init.normal_(p, std=0.5, mean=0.0 if name == "bias" else 0.5)
    return module.to(dtype)


def fused(module: nn.Module) -> nn.Module:
    out = copy.deepcopy(module)
    kind = norm_kind(out)
    assert kind is not None
    fuse_norm(out, kind, emulate=True)
    return out


def run(module: nn.Module, x: Tensor, grad: Tensor | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(torch.cos(torch.arange(y.numel())).reshape(y.shape).to(y.dtype) if grad is None else grad)
    assert x.grad is not None
    return y.detach(), x.grad, [p.grad for p in module.parameters() if p.grad is not None]


# --- the operators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("plus_one", [False, True])
def test_backward_is_the_derivative(center: bool, plus_one: bool) -> None:
    x, weight, bias = (batch(*s, seed=i).double() for i, s in enumerate([(3, 7), (7,), (7,)]))
    options: dict[str, Any] = {"plus_one": plus_one, "mid": torch.float64, "compute": torch.float64}
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y, stats = truth.norm(*leaves, eps=1e-3, center=center, out=torch.float64, **options)
    grad = batch(3, 7, seed=9).double()
    expected = torch.autograd.grad(y, leaves, grad)
    got = truth.norm_backward(grad, x.detach(), stats.detach(), weight.detach(), **options)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("center", [False, True])
def test_truth_is_torchs_norm(center: bool) -> None:
    x, weight, bias = (batch(*s, seed=i).double() for i, s in enumerate([(3, 5, 7), (7,), (7,)]))
    options: dict[str, Any] = {"plus_one": False, "mid": torch.float64, "out": torch.float64, "compute": torch.float64}
    y, stats = truth.norm(x, weight, bias if center else None, eps=1e-3, center=center, **options)
    expected = F.layer_norm(x, (7,), weight, bias, 1e-3) if center else F.rms_norm(x, (7,), weight, 1e-3)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert stats.shape == (2 if center else 1, 15)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_opcheck(center: bool, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, weight = batch(4, 6, 16, dtype=dtypes[0]), batch(16, dtype=dtypes[1])
    args = (x, weight, weight if center else None, 1e-5, center, True, dtypes[0], dtypes[1])
    torch.library.opcheck(torch.ops.hf_lowprec.norm.default, args)
    y, stats = norm(*args)
    for wanted in ((True, S, None), (False, None, B), (True, None, None)):
        args = (y, x, stats, weight, True, S, *wanted)
        torch.library.opcheck(torch.ops.hf_lowprec.norm_backward.default, args)


# --- the module's own result -----------------------------------------------------------------------------------------

PATHS = ["LayerNorm", *(path for path in CLASSES if path != "nemotron.NemotronLayerNorm1P")]


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"x {d[0]} w {d[1]}".replace("torch.", ""))
@pytest.mark.parametrize("path", PATHS)
def test_result_and_gradients(path: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Equal to the module's own but for the order of sums, and for what it rounds to half types in between."""
    pytest.importorskip("transformers")
    module, x = make(path, dtypes[1]), batch(2, 30, WIDTH, dtype=dtypes[0]) * 3
    if path == "LayerNorm" and dtypes in ((B, S), (S, B)):
        pytest.skip("torch refuses mixed dtypes outside autocast")
    ours = fused(module)
    y, gx, gp = run(module, x)
    fy, fgx, fgp = run(ours, x)
    assert ours._lowprec_norm.rules and all(ours._lowprec_norm.rules.values())
    assert (fy.dtype, fgx.dtype, [g.dtype for g in fgp]) == (y.dtype, gx.dtype, [g.dtype for g in gp])
    if fy.dtype != S or (x.dtype != S and path != "t5.T5LayerNorm"):  # rounded to a half type somewhere
        assert (fy != y).double().mean() <= 0.01
    torch.testing.assert_close(fy, y, rtol=2 * torch.finfo(y.dtype).eps, atol=1e-5 if S in dtypes else 1e-2)
    for a, b in zip([fgx, *fgp], [gx, *gp], strict=True):
        half = any(dtype != S for dtype in (a.dtype, *dtypes))
        torch.testing.assert_close(a.float(), b.float(), rtol=0.05 if half else 1e-4, atol=0.05 if half else 1e-5)


@pytest.mark.parametrize("path", ["llama.LlamaRMSNorm", "gemma.GemmaRMSNorm", "LayerNorm"])
@pytest.mark.parametrize("dtypes", [(B, S), (S, S), (B, B)])
def test_under_autocast(path: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    pytest.importorskip("transformers")
    module, x = make(path, dtypes[1]), batch(4, 5, WIDTH, dtype=dtypes[0])
    ours = fused(module)
    with torch.autocast("cpu", torch.bfloat16):
        y, fy = module(x), ours(x)
    assert any(ours._lowprec_norm.rules.values()) or path == "LayerNorm"
    assert fy.dtype == y.dtype
    torch.testing.assert_close(fy, y, rtol=2 * torch.finfo(y.dtype).eps, atol=1e-5)


def test_a_rule_holds_for_one_autocast_only() -> None:
    """A module that asks torch whether autocast is on is asked again under it."""

    class Asks(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y.bfloat16() if torch.is_autocast_enabled("cpu") else y

    ours = fused(Asks(WIDTH))
    x = batch(4, WIDTH)
    assert ours(x).dtype == S
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == B
    assert ours(x).dtype == S
    assert len(ours._lowprec_norm.rules) == 2 and all(ours._lowprec_norm.rules.values())


@pytest.mark.parametrize("path", ["llama.LlamaRMSNorm", "LayerNorm"])
def test_gradients_no_worse_than_the_modules_own(path: str) -> None:
    """bf16, many rows: the module adds up the weight's gradient of rounded products."""
    pytest.importorskip("transformers")
    module, x = make(path, B, 64), batch(500, 64, dtype=B) * 2 + 1
    ours, grad = fused(module), batch(500, 64, seed=3, dtype=B)
    _, gx, gp = run(module, x, grad)
    _, fgx, fgp = run(ours, x, grad)
    kind = norm_kind(module)
    assert kind is not None
    weight, bias = module.weight, getattr(module, "bias", None)
    options: dict[str, Any] = {"plus_one": False, "mid": S, "compute": torch.float64}
    _, stats = truth.norm(x, weight, bias, eps=kind.eps, center=kind.center, out=S, **options)
    best = truth.norm_backward(grad, x, stats, weight, **options)
    for a, b, exact in zip([fgx, *fgp], [gx, *gp], best, strict=False):
        assert numerics.relative_error(exact, a.double()) <= 1.01 * numerics.relative_error(exact, b.double())


# --- around it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["llama.LlamaRMSNorm", "LayerNorm"])
def test_frozen_parameters(path: str) -> None:
    pytest.importorskip("transformers")
    ours, x = fused(make(path)), batch(4, WIDTH)
    full = run(ours, x)
    ours.weight.requires_grad_(False)
    y, gx, gp = run(ours, x)
    assert torch.equal(gx, full[1]) and len(gp) == len(full[2]) - 1 and ours.weight.grad is None
    ours.requires_grad_(False)
    assert torch.equal(run(ours, x)[1], full[1])
    ours.requires_grad_(True)
    y = ours(x)
    y.sum().backward()
    assert all(p.grad is not None for p in ours.parameters())
    with torch.no_grad():
        assert torch.equal(ours(x), y) and not ours(x).requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    ours, x = fused(make("LayerNorm")), batch(4, WIDTH)
    expected = run(ours, x)
    x = x.requires_grad_()
    ours.zero_grad()
    checkpoint(ours, x, use_reentrant=reentrant).backward(torch.cos(torch.arange(x.numel())).reshape(x.shape))
    assert x.grad is not None and torch.equal(x.grad, expected[1])
    assert all(torch.equal(p.grad, g) for p, g in zip(ours.parameters(), expected[2], strict=True))


def test_what_is_kept_for_backward() -> None:
    """The input and two numbers a row, where the module's own forward keeps float32 copies."""
    pytest.importorskip("transformers")
    x = batch(64, 256, dtype=B).requires_grad_()
    sizes = {}
    own = make("llama.LlamaRMSNorm", B, 256)
    for name, module in (("own", own), ("fused", fused(own))):
        kept: dict[int, int] = {}

        def keep(t: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[t.data_ptr()] = t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = module(x)
        del y
        sizes[name] = sum(kept.values())
    assert sizes["fused"] == 2 * x.numel() + 2 * 256 + 4 * 64
    assert sizes["own"] > 2.9 * sizes["fused"]


def test_own_forward_where_it_is_not_fused() -> None:
    module, x = make("LayerNorm"), batch(4, WIDTH)
    ours = copy.deepcopy(module)
    kind = norm_kind(ours)
    assert kind is not None
    state = fuse_norm(ours, kind)  # no emulation: a CPU tensor
    assert torch.equal(ours(x), module(x)) and not state.rules
    state.emulate, state.enabled = True, False
    assert torch.equal(ours(x), module(x)) and not state.rules
    state.enabled = True
    assert torch.equal(ours(input=x), module(input=x)) and not state.rules
    with pytest.raises(RuntimeError, match="normalized_shape"):
        ours(batch(4, WIDTH + 1))
    with pytest.raises(TypeError):
        ours()
    x64 = x.double()
    assert torch.equal(ours.double()(x64), module.double()(x64))  # no rule: not fused


@pytest.mark.parametrize("path", ["llama.LlamaRMSNorm", "LayerNorm"])
def test_another_eps_than_when_it_was_fused(path: str) -> None:
    pytest.importorskip("transformers")
    module, x = make(path), batch(4, WIDTH) * 1e-2
    ours = fused(module)
    y = ours(x)
    name = "eps" if hasattr(module, "eps") else "variance_epsilon"
    for each in (ours, module):
        setattr(each, name, 0.5)
    for other in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x), module(x)) and not torch.equal(other(x), y)
    setattr(ours, name, dict(ours._lowprec_norm.settings)[name])
    assert torch.equal(ours(x), y)


def test_an_eps_that_was_left_to_the_dtype() -> None:
    module, x = nn.RMSNorm(WIDTH), batch(4, WIDTH) * 1e-2
    ours = fused(module)
    ours.eps = module.eps = 0.5
    assert torch.equal(ours(x), module(x))


def test_a_class_whose_forward_was_replaced_since(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    ours, x = fused(Mine(WIDTH)), batch(4, WIDTH)
    ours(x)
    assert ours._lowprec_norm.rules
    plain = Mine.forward
    monkeypatch.setattr(Mine, "forward", lambda self, input: 2 * plain(self, input))
    for other in (ours, copy.deepcopy(ours)):
        assert torch.equal(other(x), 2 * nn.LayerNorm(WIDTH)(x))
    assert norm_kind(Mine(WIDTH)) is None, "found out again"
    unfuse_norm(ours)
    assert type(ours) is Mine


def test_small_inputs_are_left_to_torchs_own_norms() -> None:
    """They are one C++ call each way."""
    for module, least in ((nn.LayerNorm(WIDTH), True), (nn.RMSNorm(WIDTH), True), (make("llama.LlamaRMSNorm"), False)):
        kind = norm_kind(module)
        assert kind is not None
        state = fuse_norm(module, kind)
        assert (state.least > 0) == least
        state.emulate, state.least = True, 5 * WIDTH
        x = batch(4, WIDTH)
        assert state.rule(module, x, module.weight, None) is None
        assert state.rule(module, batch(5, WIDTH), module.weight, getattr(module, "bias", None)) is not None


def test_parameters_of_another_shape_are_the_modules_own_affair() -> None:
    """A sharding library may leave an empty weight behind: torch says so, a kernel would read beyond it."""
    ours = fused(make("LayerNorm"))
    ours.weight.data = torch.empty(0)
    with pytest.raises(RuntimeError):
        ours(batch(4, WIDTH))
    assert not ours._lowprec_norm.rules


def test_tensor_subclasses_run_the_modules_own_forward() -> None:
    class Mine(Tensor):
        pass

    module = make("LayerNorm")
    ours = fused(module)
    x = batch(4, WIDTH).as_subclass(Mine)
    assert type(ours(x)) is Mine and torch.equal(ours(x), module(x)) and not ours._lowprec_norm.rules


def test_compiled_it_is_the_modules_own_forward() -> None:
    pytest.importorskip("transformers")
    module = make("llama.LlamaRMSNorm", B)
    ours, x = fused(module), batch(4, WIDTH, dtype=B)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), module(x))
    (graph,) = graphs
    names = {str(node.target) for node in graph.graph.nodes}
    assert not any("hf_lowprec" in name for name in names) and any("rsqrt" in name for name in names)


def test_swap_and_back() -> None:
    pytest.importorskip("transformers")
    for path, mixin in (("llama.LlamaRMSNorm", LowPrecRMSNorm), ("LayerNorm", LowPrecLayerNorm)):
        module = make(path)
        original, keys, attributes = type(module), list(module.state_dict()), set(module.__dict__)
        parameters = [id(p) for p in module.parameters()]
        kind = norm_kind(module)
        assert kind is not None
        fuse_norm(module, kind)
        assert isinstance(module, mixin) and isinstance(module, original) and isinstance(module, LowPrecNorm)
        assert type(module).__name__ == f"LowPrec{original.__name__}" and "fused" in repr(module)
        assert list(module.state_dict()) == keys and [id(p) for p in module.parameters()] == parameters
        assert norm_kind(module) == kind  # found again, for who asks
        unfuse_norm(module)
        assert type(module) is original and set(module.__dict__) == attributes
        unfuse_norm(module)
        unfuse_norm(nn.Linear(2, 2))


def test_copies_and_pickles() -> None:
    pytest.importorskip("transformers")
    for path in ("llama.LlamaRMSNorm", "LayerNorm"):
        ours, x = fused(make(path)), batch(4, WIDTH)
        y = ours(x)
        buffer = io.BytesIO()
        torch.save(nn.Sequential(ours), buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)[0]
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), loaded):
            assert type(other) is type(ours) and other._lowprec_norm is not ours._lowprec_norm
            assert torch.equal(other(x), y) and other.weight is not ours.weight
            unfuse_norm(other)
            assert isinstance(ours, LowPrecNorm)


def test_hooks_run() -> None:
    ours, x = fused(make("LayerNorm")), batch(4, WIDTH)
    seen: list[str] = []
    ours.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    ours.register_forward_hook(lambda m, args, out: seen.append("post"))
    ours.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    run(ours, x)
    assert seen == ["pre", "post", "backward"]


def test_accelerates_device_hooks() -> None:
    """`device_map` keeps the bound forward: it has to become the new class' one, and the old one again."""
    hooks = pytest.importorskip("accelerate.hooks")
    module, x = make("LayerNorm"), batch(4, WIDTH)
    y = module(x)
    hooks.add_hook_to_module(module, hooks.ModelHook())
    kind = norm_kind(module)
    assert kind is not None
    state = fuse_norm(module, kind, emulate=True)
    torch.testing.assert_close(module(x), y)
    assert state.rules
    unfuse_norm(module)
    assert torch.equal(module(x), y)
    hooks.remove_hook_from_module(module)
    assert torch.equal(module(x), y) and type(module) is nn.LayerNorm


def test_a_subclass_made_since_is_refused() -> None:
    ours = fused(make("LayerNorm"))
    ours.__class__ = type("Mine", (type(ours),), {})
    with pytest.raises(TypeError, match="Mine"):
        unfuse_norm(ours)


def test_second_derivatives_are_refused() -> None:
    ours, x = fused(make("LayerNorm")), batch(4, WIDTH).requires_grad_()
    (grad,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_shapes() -> None:
    module = make("LayerNorm")
    ours = fused(module)
    for shape in [(WIDTH,), (0, WIDTH), (2, 0, WIDTH), (1, 2, 3, WIDTH)]:
        torch.testing.assert_close(run(ours, batch(*shape))[:2], run(module, batch(*shape))[:2])
    x = batch(WIDTH, 6).t()
    torch.testing.assert_close(run(ours, x)[:2], run(module, x)[:2])
