# SPDX-License-Identifier: Apache-2.0
"""Which norm a module is, by behaviour: classes of transformers, and modules that only look like one of them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lowprec.modules.norm import NormKind, norm_kind
from hf_lowprec.modules.norm_kind import Rule, rounding_rule

B, H, S = torch.bfloat16, torch.float16, torch.float32
WIDTH = 32


def hf(path: str, *args: Any, **kwargs: Any) -> nn.Module:
    model, name = path.split(".")
    module: nn.Module = getattr(import_module(f"transformers.models.{model}.modeling_{model}"), name)(*args, **kwargs)
    return module


# path: center, plus_one, eps
RMS, PLUS_ONE, LAYER = (False, False), (False, True), (True, False)
CLASSES = {
    "llama.LlamaRMSNorm": (*RMS, 1e-6),
    "mistral.MistralRMSNorm": (*RMS, 1e-6),
    "qwen2.Qwen2RMSNorm": (*RMS, 1e-6),
    "qwen3.Qwen3RMSNorm": (*RMS, 1e-6),
    "phi3.Phi3RMSNorm": (*RMS, 1e-6),
    "mixtral.MixtralRMSNorm": (*RMS, 1e-6),
    "olmo2.Olmo2RMSNorm": (*RMS, 1e-6),
    "gpt_oss.GptOssRMSNorm": (*RMS, 1e-6),
    "t5.T5LayerNorm": (*RMS, 1e-6),
    "gemma3n.Gemma3nRMSNorm": (*RMS, 1e-6),
    "gemma.GemmaRMSNorm": (*PLUS_ONE, 1e-6),
    "gemma2.Gemma2RMSNorm": (*PLUS_ONE, 1e-6),
    "gemma3.Gemma3RMSNorm": (*PLUS_ONE, 1e-6),
    "qwen3_next.Qwen3NextRMSNorm": (*PLUS_ONE, 1e-6),
    "cohere.CohereLayerNorm": (*LAYER, 1e-5),
    "nemotron.NemotronLayerNorm1P": (True, True, 1e-5),
    "olmo.OlmoLayerNorm": (*LAYER, 1e-5),
}


@pytest.mark.parametrize("path", CLASSES)
def test_classes_of_transformers(path: str) -> None:
    pytest.importorskip("transformers")
    assert norm_kind(hf(path, WIDTH)) == NormKind(*CLASSES[path], WIDTH)


@pytest.mark.parametrize("eps", [1e-12, 1e-8, 1e-6, 1e-5, 1e-3, 0.1])
def test_eps_is_found(eps: float) -> None:
    for module in (nn.LayerNorm(WIDTH, eps=eps), nn.RMSNorm(WIDTH, eps=eps)):
        kind = norm_kind(module)
        assert kind is not None and kind.eps == eps


def test_layer_norm_without_bias_and_without_parameters() -> None:
    assert norm_kind(nn.LayerNorm(WIDTH, bias=False)) == NormKind(*LAYER, 1e-5, WIDTH)
    assert norm_kind(nn.LayerNorm(WIDTH, elementwise_affine=False)) == NormKind(*LAYER, 1e-5, WIDTH)
    assert norm_kind(nn.LayerNorm((4, WIDTH))) is None


def test_a_norm_without_weight_or_width() -> None:
    pytest.importorskip("transformers")
    assert norm_kind(hf("llama4.Llama4TextL2Norm", 1e-6)) == NormKind(*RMS, 1e-6, None)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [S, B, H, torch.float64])
def test_own_weights_are_not_read(device: str, dtype: torch.dtype) -> None:
    module = nn.LayerNorm(WIDTH, device=device, dtype=dtype)
    if device == "cpu":
        nn.init.constant_(module.weight, float("nan"))
    before = dict(module.__dict__), dict(module._parameters)
    rng = torch.get_rng_state()
    assert norm_kind(module) == NormKind(*LAYER, 1e-5, WIDTH)
    assert (dict(module.__dict__), dict(module._parameters)) == before
    assert torch.equal(torch.get_rng_state(), rng)


class Own(nn.Module):
    """An RMSNorm with `change` somewhere."""

    def __init__(self, change: str = "") -> None:
        super().__init__()
        self.weight, self.change, self.eps = nn.Parameter(torch.ones(WIDTH)), change, 1e-6

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.change == "clipped input":
            x = x.clamp(-1e4, 1e4)
        squares = x.square().mean(-1, keepdim=True)
        rstd = torch.rsqrt(squares + self.eps)
        if self.change == "eps outside the root":
            rstd = 1 / (squares.sqrt() + self.eps)
        if self.change == "sum instead of mean":
            rstd = torch.rsqrt(squares * WIDTH + self.eps)
        if self.change == "over the sequence too":
            rstd = torch.rsqrt(x.square().mean(tuple(range(x.dim() - 2, x.dim())), keepdim=True) + self.eps)
        y = self.weight * (x * rstd)
        if self.change == "clipped output":
            y = y.clamp(-50, 50)
        if self.change == "without NaN":
            y = y.nan_to_num()
        if self.change == "scaled":
            y = y * 1.0001
        if self.change == "dropout":
            y = F.dropout(y, 0.5, self.training)
        return y.to(torch.float64) if self.change == "float64" else y


def test_own_class_unchanged() -> None:
    assert norm_kind(Own()) == NormKind(*RMS, 1e-6, WIDTH)


CHANGES = [
    "clipped input", "eps outside the root", "sum instead of mean", "over the sequence too", "clipped output",
    "without NaN", "scaled", "dropout",
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_almost_a_norm_is_none(change: str) -> None:
    assert norm_kind(Own(change)) is None
    assert norm_kind(Own(change).eval()) is None


class Gated(Own):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if gate is None else y * F.silu(gate)


class Noted(Own):
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return super().forward(x)


class Child(Own):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Identity()


class Buffered(Own):
    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Buffer(torch.zeros(()))


OTHERS: list[Callable[[], nn.Module]] = [
    Gated, Noted, Child, Buffered, nn.Identity, nn.SiLU, nn.Softmax, nn.Dropout,
    lambda: nn.Linear(WIDTH, WIDTH), lambda: nn.BatchNorm1d(WIDTH), lambda: nn.GroupNorm(1, WIDTH),
    lambda: nn.GroupNorm(4, WIDTH), lambda: nn.PReLU(WIDTH), lambda: nn.Embedding(8, WIDTH),
    lambda: nn.InstanceNorm1d(WIDTH, affine=True), lambda: nn.ReLU(), lambda: nn.Tanh(),
]  # fmt: skip


@pytest.mark.parametrize("make", OTHERS)
def test_other_modules_are_none(make: Callable[[], nn.Module]) -> None:
    assert norm_kind(make()) is None


def test_gated_norms_of_transformers_are_none() -> None:
    pytest.importorskip("transformers")
    assert norm_kind(hf("mamba2.MambaRMSNormGated", WIDTH, WIDTH)) is None
    assert norm_kind(hf("qwen3_next.Qwen3NextRMSNormGated", WIDTH)) is None
    assert norm_kind(hf("convnext.ConvNextLayerNorm", WIDTH, data_format="channels_first")) is None
    assert norm_kind(hf("convnext.ConvNextLayerNorm", WIDTH)) is not None
    assert norm_kind(hf("chameleon.ChameleonLayerNorm", (4, WIDTH))) is None


def test_a_replaced_forward_is_none() -> None:
    module = nn.LayerNorm(WIDTH)
    module.forward = lambda x: x  # type: ignore[method-assign]
    assert norm_kind(module) is None


def test_a_parametrized_norm_is_none() -> None:
    module = Own()
    torch.nn.utils.parametrize.register_parametrization(module, "weight", nn.Softplus(), unsafe=True)
    assert norm_kind(module) is None


def test_settings_tell_modules_of_one_class_apart() -> None:
    kinds = {norm_kind(Own(change)) for change in ("", "scaled")}
    assert kinds == {None, NormKind(*RMS, 1e-6, WIDTH)}


# --- where it rounds -------------------------------------------------------------------------------------------------

# (x, weight): (mid, out)
LLAMA = {(B, B): (B, B), (B, S): (B, S), (S, B): (S, S), (H, H): (H, H), (H, B): (H, S), (S, S): (S, S)}
GEMMA = {(B, B): (S, B), (B, S): (S, B), (S, B): (S, S), (H, H): (S, H), (H, B): (S, H), (S, S): (S, S)}
T5 = {(B, B): (B, B), (B, S): (S, S), (S, B): (B, B), (H, H): (H, H), (H, B): (B, B), (S, S): (S, S)}
ROUNDINGS = {
    "llama.LlamaRMSNorm": LLAMA,
    "qwen3.Qwen3RMSNorm": LLAMA,
    "gemma.GemmaRMSNorm": GEMMA,
    "olmo2.Olmo2RMSNorm": GEMMA,
    "t5.T5LayerNorm": T5,
    "cohere.CohereLayerNorm": GEMMA,
}


@pytest.mark.parametrize("path", ROUNDINGS)
def test_where_it_rounds(path: str) -> None:
    pytest.importorskip("transformers")
    module = hf(path, WIDTH)
    kind = norm_kind(module)
    assert kind is not None
    for (x, weight), rule in ROUNDINGS[path].items():
        assert rounding_rule(module, kind, x, weight, None, torch.device("cpu")) == Rule(*rule), (x, weight)


def test_what_the_module_refuses_has_no_rule() -> None:
    module = nn.LayerNorm(WIDTH)
    kind = norm_kind(module)
    assert kind is not None
    assert rounding_rule(module, kind, B, B, B, torch.device("cpu")) == Rule(S, B)
    assert rounding_rule(module, kind, S, B, B, torch.device("cpu")) is None  # torch: mixed dtypes
    assert rounding_rule(module, kind, torch.float64, S, S, torch.device("cpu")) is None


def test_a_rounding_of_its_own_has_no_rule() -> None:
    """1 + weight in the weight's dtype: the same in float32, another function in bf16."""
    module = nn.LayerNorm(WIDTH)

    class Rounded(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)

    module = Rounded(WIDTH)
    kind = norm_kind(module)
    assert kind == NormKind(True, True, 1e-5, WIDTH)
    assert rounding_rule(module, kind, S, S, S, torch.device("cpu")) == Rule(S, S)
    assert rounding_rule(module, kind, B, B, B, torch.device("cpu")) is None


def test_settings_inside_objects_are_looked_at_each_time() -> None:
    """A module that keeps its whole config: two of its kind may differ in what the config says."""

    class Config:
        eps = 1e-5

    class Configured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.weight = Config(), nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(x, (WIDTH,), self.weight, self.config.eps)

    first, second = Configured(), Configured()
    second.config.eps = 1e-6
    assert [norm_kind(m) for m in (first, second, first)] == [NormKind(*RMS, e, WIDTH) for e in (1e-5, 1e-6, 1e-5)]
