# SPDX-License-Identifier: Apache-2.0
"""What a step does with its gradients: clipping, values that are not finite, missing and sparse ones, closures."""

from __future__ import annotations

import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from training import MAKE, bits, held, model_of, parameters, same, set_gradients, small, snapshot, train, weights

from hf_lowprec.optim import AdamW, algorithms, clip_factor
from hf_lowprec.recipe import Quant, Scaling, States

# --- clipping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clip_factor_is_clip_grad_norms(dtype, norm_type):
    used, empty, unused = parameters(dtype=dtype), nn.Parameter(torch.zeros(0)), nn.Parameter(torch.ones(3))
    set_gradients([*used, empty], 0)
    params = [*used, empty, unused]
    for max_norm in (0.5, torch.tensor(0.5), 1e6):
        factor, total = clip_factor(params, max_norm, norm_type)
        twins = [nn.Parameter(p.detach().float()) for p in used]
        for twin, p in zip(twins, used, strict=True):
            twin.grad = p.grad.float()
        before = [twin.grad.clone() for twin in twins]
        norm = torch.nn.utils.clip_grad_norm_(twins, max_norm if isinstance(max_norm, float) else 0.5, norm_type)
        torch.testing.assert_close(total, norm, rtol=1e-5, atol=0)
        for twin, b in zip(twins, before, strict=True):
            torch.testing.assert_close(b * factor, twin.grad, rtol=1e-5, atol=0)
    assert clip_factor([unused], 1.0) == (1.0, 0.0)
    assert clip_factor(iter(params), 1e6)[0] == 1


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("states", ["fp32", "fp8-lm", "8bit"])
def test_a_clipped_step_is_a_step_with_clipped_gradients(name, states):
    results = []
    for how in ("clip", "scaled", "plain"):
        params = parameters([(64, 65), (7,)])
        optimizer = MAKE[name](params, lr=1e-3, states=states)
        for step in range(5):
            set_gradients(params, step)
            norm = torch.cat([p.grad.flatten() for p in params]).norm().item()
            factor, _ = clip_factor(params, 0.3 * norm)
            if how == "scaled":
                for p in params:
                    p.grad = p.grad * factor
            optimizer.step(**({"clip": factor} if how == "clip" else {}))
        results.append(weights(params))
    assert torch.equal(results[0], results[1])
    assert name == "Lion" or not torch.equal(results[0], results[2])  # Lion's first directions do not change


def test_a_factor_that_is_not_finite_skips_the_step():
    param = nn.Parameter(torch.ones(3))
    optimizer = AdamW([param])
    param.grad = torch.ones(3)
    optimizer.step(clip=torch.tensor(math.nan))
    assert (param == 1).all() and optimizer.skipped_steps == 1
    with pytest.raises(TypeError, match="clip_factor"):
        optimizer.step(clip=0.5)


# --- values that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_one_bad_element_of_one_parameter_stops_all_of_them(name, bad):
    model = model_of()
    optimizer = MAKE[name](model.parameters(), lr=1e-3, states=small("8bit"))
    train(model, optimizer, 2)
    before, kept = bits(weights(model)).clone(), snapshot(optimizer)
    model[2].weight.grad[5] = bad
    optimizer.step()
    assert torch.equal(bits(weights(model)), before) and same(snapshot(optimizer), kept)
    assert optimizer.skipped_steps == 1 and optimizer.skipped_elements == 0
    train(model, optimizer, 1)
    assert not torch.equal(bits(weights(model)), before) and optimizer.skipped_steps == 1


BLOCKWISE = ["fp32", "bf16", "8bit", "4bit", "fp8", "fp8-expand", "compact"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", BLOCKWISE)
@pytest.mark.parametrize("name", MAKE)
def test_elementwise_leaves_bad_elements_alone_and_moves_the_others(name, states, dtype):
    params, clean = parameters([(64, 66)], dtype), parameters([(64, 66)], dtype)
    options = {"lr": 1e-2, "states": small(states), "nonfinite": "element"}
    optimizer, other = MAKE[name](params, **options), MAKE[name](clean, **options)
    bad = torch.zeros(64, 66, dtype=torch.bool)
    bad.view(-1)[::97] = True
    values = torch.tensor([math.nan, math.inf, -math.inf, 1e25]).repeat(11)[: int(bad.sum())].to(dtype)
    for step in range(3):
        set_gradients(params, step)
        set_gradients(clean, step)
        if step == 2:
            before, item = params[0].detach().clone(), optimizer._plan_now().items[0]
            moments = {slot: held(optimizer, params[0], slot) for slot in item.moments}
            params[0].grad[bad] = values
        optimizer.step()
        other.step()
    assert optimizer.skipped_elements == bad.sum() and optimizer.skipped_steps == 0
    assert params[0].isfinite().all() and torch.equal(params[0][bad], before[bad])
    assert (params[0][~bad] != before[~bad]).float().mean() > 0.1  # SGD's steps are small for bfloat16
    if name != "StableAdamW" and states in ("fp32", "bf16"):  # others share scales; its update is of the whole tensor
        assert torch.equal(params[0][~bad], clean[0][~bad])
        for slot, value in moments.items():
            assert torch.equal(held(optimizer, params[0], slot)[bad], value[bad])
    assert optimizer.state_dict()["skipped_elements"] == bad.sum()
    twin = pickle.loads(pickle.dumps(optimizer))
    assert twin.nonfinite == "element" and twin.skipped_elements == bad.sum()


def test_elementwise_needs_scales_that_are_not_of_the_whole_tensor():
    param = nn.Parameter(torch.ones(64, 64))
    for states in ("fp8-lm", "fp8-lm-exact", States(exp_avg=Quant(format="e4m3fn", scaling=Scaling()))):
        with pytest.raises(ValueError, match=r"'element'.*the scale of exp_avg is shared"):
            AdamW([param], states=states, nonfinite="element")
    with pytest.raises(ValueError, match="'elements' is not"):
        AdamW([param], nonfinite="elements")
    AdamW([nn.Parameter(torch.ones(3))], states="fp8-lm", nonfinite="element")  # too small for these states


# --- missing, sparse, misplaced -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
def test_a_parameter_without_gradient_is_left_out_of_the_step(name):
    params = parameters([(64, 65), (7,), (64, 64)])
    optimizer = MAKE[name](params, lr=1e-2, states="8bit", weight_decay=0.1)
    optimizer.step()
    assert not optimizer.state and optimizer.skipped_steps == 0, "no gradients, no step"
    counts = [0, 0, 0]
    for step, missing in enumerate([(0, 2), (1,), (), (0, 1), (2,)]):
        set_gradients(params, step)
        for i in missing:
            params[i].grad = None
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for i, p in enumerate(params):
            counts[i] += i not in missing
            assert torch.equal(p, before[i]) == (i in missing)
            assert (p in optimizer.state) == (counts[i] > 0)
            assert counts[i] == 0 or optimizer.state[p]["step"] == counts[i]


def test_the_optimizer_keeps_no_gradient_alive():
    import weakref

    params = parameters([(64, 65)])
    optimizer = AdamW(params)
    for _ in range(2):
        set_gradients(params, 0)
        gradient = weakref.ref(params[0].grad)
        optimizer.step()
        optimizer.zero_grad()
        assert gradient() is None


@pytest.mark.parametrize("name", MAKE)
def test_sparse_gradients_are_refused_before_anything_changed(name):
    embedding, dense = nn.Embedding(4, 2, sparse=True), nn.Parameter(torch.ones(2))
    optimizer = MAKE[name]([dense, *embedding.parameters()])
    for first in (True, False):
        optimizer.zero_grad()
        (embedding(torch.tensor([1])).sum() + dense.sum()).backward()
        with pytest.raises(RuntimeError, match="sparse=False"):
            optimizer.step()
        assert (dense == 1).all() and not optimizer.state, first


@pytest.mark.parametrize("name", MAKE)
def test_a_closure_runs_with_gradients_and_its_loss_comes_back(name):
    param = nn.Parameter(torch.ones(2))
    optimizer = MAKE[name]([param], lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 2 and (param < 1).all()
    assert optimizer.step(closure=closure, clip=torch.tensor(1.0)).item() < 2


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_that_are_not_contiguous(name, dtype):
    """Blocks, seeds and codes count in row-major order, wherever the elements lie."""
    results = []
    for lie in ("contiguous", "transposed", "gradient transposed"):
        base = parameters([(66, 64)], dtype)[0].detach()
        param = nn.Parameter(base.t().contiguous().t() if lie == "transposed" else base.clone())
        optimizer = MAKE[name]([param], lr=1e-2, states="8bit")
        for step in range(3):
            set_gradients([param], step)
            grad = param.grad.clone(memory_format=torch.contiguous_format)
            param.grad = grad.t().contiguous().t() if lie == "gradient transposed" else grad
            optimizer.step()
        assert param.is_contiguous() == (lie != "transposed")
        results.append((bits(param), held(optimizer, param, optimizer.moments(optimizer.param_groups[0])[0])))
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0]) and torch.equal(results[0][1], other[1])


def test_a_parameter_whose_gradient_changes_its_dtype():
    param = nn.Parameter(torch.ones(64, 64))
    optimizer = AdamW([param], lr=1e-2)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
    param.grad = None
    param.data = param.data.bfloat16()
    optimizer.state.clear()
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert param.dtype == torch.bfloat16 and optimizer.state[param]["step"] == 1


def test_states_that_somebody_replaced_or_removed_are_noticed():
    params = parameters([(64, 65), (64, 66)])
    optimizer = AdamW(params, lr=1e-2)
    twins = parameters([(64, 65), (64, 66)])
    twin = AdamW(twins, lr=1e-2)
    for step in range(4):
        for p, o in ((params, optimizer), (twins, twin)):
            set_gradients(p, step)
            o.step()
        if step == 1:
            optimizer.state[params[1]] = {k: v.clone() for k, v in optimizer.state[params[1]].items()}
            for p in params:
                optimizer.state[p]["exp_avg_scale"] = optimizer.state[p]["exp_avg_scale"].clone()
        if step == 2:
            for o, p in ((optimizer, params), (twin, twins)):
                del o.state[p[0]]
    assert torch.equal(weights(params), weights(twins)) and same(snapshot(optimizer), snapshot(twin)[::1])
    assert optimizer.state[params[0]]["step"] == 1 and optimizer.state[params[1]]["step"] == 4


def test_the_largest_of_many_gradients_of_several_dtypes():
    """What runs on a GPU, a few launches for each dtype, beside what runs on the CPU."""
    dtypes = [torch.bfloat16, torch.float32, torch.float64, torch.float16]
    grads = [torch.randn(1 + i, 7).to(dtypes[i % 4]) for i in range(9)]
    grads[2][0, 3], grads[5][1, 1] = torch.nan, -torch.inf
    found = algorithms._infinity_norms(grads)
    assert [norm.dtype for norm in found] == [torch.promote_types(grad.dtype, torch.float32) for grad in grads]
    expected = algorithms.gradient_amax([SimpleNamespace(grad=grad) for grad in grads])
    torch.testing.assert_close(torch.stack([norm.float() for norm in found]), expected, rtol=0, atol=0, equal_nan=True)
