# SPDX-License-Identifier: Apache-2.0
"""AdamW.adopt: the user's optimizer goes on under new management; its schedulers and hooks notice nothing."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from training import held as slot
from training import small

from hf_lowprec.optim import Adam, AdamW, mark_embeddings
from hf_lowprec.optim import states as st

FP8_LM = small("fp8-lm")


def built(cls=torch.optim.AdamW, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Linear(8, 4).to(dtype)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}]
    return model, cls(groups, **{"lr": 1e-2, "weight_decay": 0.1, **options})


def backward(model: nn.Module, seed: int) -> None:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed)).to(model.weight.dtype)
    model.zero_grad()
    (model(x) - x[:, :4]).square().mean().backward()


SCHEDULERS = {
    "lambda": lambda o: LambdaLR(o, lambda step: 0.5**step),
    "onecycle": lambda o: OneCycleLR(o, max_lr=0.1, total_steps=20),  # moves betas, too
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("repoint", [False, True])
def test_schedulers_built_before_go_on_driving(make, repoint):
    model, old = built()
    scheduler = make(old)
    reference_model, reference = built(foreach=False)
    reference_scheduler = make(reference)
    new = AdamW.adopt(old, "fp32")
    assert new.param_groups is old.param_groups
    if repoint:  # what an integration does when it sees the scheduler
        scheduler.optimizer = new
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no "step overridden", no "scheduler before optimizer"
        for seed in range(5):
            new.load_state_dict(new.state_dict())  # AcceleratedOptimizer does; the groups must survive it
            for m, o, s in ((model, new, scheduler), (reference_model, reference, reference_scheduler)):
                backward(m, seed)
                o.step()
                s.step()
    assert new.param_groups[0]["lr"] == reference.param_groups[0]["lr"] != 1e-2
    assert new.param_groups[0]["betas"] == reference.param_groups[0]["betas"]
    torch.testing.assert_close(model.weight, reference_model.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.bias, reference_model.bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("on", ["new", "old"])
def test_schedulers_built_after_adoption_work_too(on):
    model, old = built()  # Trainer prepares the optimizer first
    new = AdamW.adopt(old, "fp8-lm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = LambdaLR({"new": new, "old": old}[on], lambda step: 0.5**step)
        for seed in range(3):
            backward(model, seed)
            new.step()
            scheduler.step()
    assert new.param_groups[0]["lr"] == pytest.approx(1e-2 / 8) and new.state[model.weight]["step"] == 3


@pytest.mark.parametrize("theirs, ours", [(torch.optim.AdamW, AdamW), (torch.optim.Adam, Adam)])
@pytest.mark.parametrize("fused", [None, True])
def test_a_stepped_optimizer_is_carried_over(theirs, ours, fused):
    model, old = built(theirs, fused=fused)
    twin, twin_optimizer = built(theirs, foreach=False)
    for seed in range(3):
        for m, o in ((model, old), (twin, twin_optimizer)):
            backward(m, seed)
            o.step()
    new = AdamW.adopt(old, FP8_LM)
    assert type(new) is ours and old.state is new.state
    for group in (*new.param_groups, new.defaults):
        assert not {"fused", "foreach", "capturable", "amsgrad", "differentiable"} & set(group)
    assert not hasattr(new, "_step_supports_amp_scaling")
    state, truth = new.state[model.weight], twin_optimizer.state[twin.weight]
    assert state["exp_avg_qdata"].dtype == torch.float8_e4m3fn and state["step"] == 3
    m, v = (slot(new, model.weight, name) for name in ("exp_avg", "exp_avg_sq"))
    torch.testing.assert_close(m, truth["exp_avg"], rtol=1 / 16, atol=state["exp_avg_scale"].item() / 512)
    torch.testing.assert_close(v, truth["exp_avg_sq"], rtol=1e-3, atol=1e-10)
    for seed in range(3, 6):
        for mod, o in ((model, new), (twin, twin_optimizer)):
            backward(mod, seed)
            o.step()
    torch.testing.assert_close(model.weight, twin.weight, rtol=0, atol=5e-3)


def test_adam_becomes_adam_with_its_l2_decay():
    model, old = built(torch.optim.Adam, weight_decay=0.5)
    twin, twin_optimizer = built(torch.optim.Adam, weight_decay=0.5, foreach=False)
    new = AdamW.adopt(old, "fp32")
    assert type(new) is Adam and new.param_groups[0]["decoupled_weight_decay"] is False
    for seed in range(4):
        for m, o in ((model, new), (twin, twin_optimizer)):
            backward(m, seed)
            o.step()
    torch.testing.assert_close(model.weight, twin.weight, rtol=1e-5, atol=1e-6)
    states = new.state[model.weight], twin_optimizer.state[twin.weight]
    torch.testing.assert_close(states[0]["exp_avg_sq"], states[1]["exp_avg_sq"], rtol=1e-5, atol=0)


def test_a_16_bit_parameter_gets_its_master():
    model, old = built(dtype=torch.bfloat16)
    backward(model, 0)
    old.step()
    weight = model.weight.detach().clone()
    new = AdamW.adopt(old, "fp8-lm")
    state = new.state[model.weight]
    assert torch.equal(model.weight, weight)
    assert torch.equal((state["master_qdata"].float() * state["master_scale"]).bfloat16(), weight)


def test_the_old_step_still_steps_once_and_with_the_same_hooks():
    model, old = built()
    calls = []
    old.register_step_pre_hook(lambda *_: calls.append("pre"))
    old.register_step_post_hook(lambda *_: calls.append("post"))
    new = AdamW.adopt(old, "fp8-lm")
    backward(model, 0)
    old.step()
    new.step()
    assert calls == ["pre", "post"] * 2 and new.state[model.weight]["step"] == 2


def test_a_script_that_keeps_the_old_reference_saves_and_loads_through_it():
    model, old = built()
    new = AdamW.adopt(old, FP8_LM)
    new.register_state_dict_post_hook(lambda _, state_dict: state_dict.update(extra=42))
    for seed in range(3):
        old.zero_grad()
        backward(model, seed)
        old.step()
    saved = copy.deepcopy(old.state_dict())
    assert len(saved["state"]) == 2 and saved["extra"] == 42 and saved["skipped_steps"] == 0
    assert saved["state"][0]["exp_avg_qdata"].dtype == torch.float8_e4m3fn

    other, held = built()
    used = AdamW.adopt(held, FP8_LM)
    held.load_state_dict(saved)
    assert held.state is used.state and used.state[other.weight]["step"] == 3
    held.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert used.param_groups[-1]["states"] == st.states_name(FP8_LM)
    backward(other, 3)
    held.step()
    assert used.state[other.weight]["step"] == 4
    held.zero_grad()
    assert other.weight.grad is None


def test_adopting_twice_gives_the_same_optimizer():
    model, old = built()
    new = AdamW.adopt(old, "fp8-lm")
    backward(model, 0)
    new.step()
    assert AdamW.adopt(old, "fp8-lm") is new and new.state[model.weight]["step"] == 1
    with pytest.raises(ValueError, match="was adopted with states fp8-lm; build a new one for fp32"):
        AdamW.adopt(old, "fp32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_loaded_before_adoption_says_to_load_it_after(dtype):
    model, old = built(dtype=dtype)
    new = AdamW.adopt(old, FP8_LM)
    backward(model, 0)
    new.step()
    _, resumed = built(dtype=dtype)
    resumed.load_state_dict(new.state_dict())
    with pytest.raises(ValueError, match="load the checkpoint after prepare"):
        AdamW.adopt(resumed, FP8_LM)


def test_an_adopted_optimizer_copies_and_takes_new_groups():
    model, old = built()
    new = AdamW.adopt(old, "fp8-lm")
    backward(model, 0)
    new.step()
    twin_model, twin = copy.deepcopy((model, new))
    backward(model, 1)
    backward(twin_model, 1)
    new.step()
    twin.step()
    assert torch.equal(model.weight, twin_model.weight)
    new.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert new.param_groups[-1]["states"] == "fp8-lm" and len(old.param_groups) == 3


def test_coupled_decay_takes_exact_scales_instead_of_predicted_ones():
    """A predicted scale does not know how large the decayed gradient is; the optimizer's own constructor refuses."""
    _, old = built(torch.optim.Adam)
    new = AdamW.adopt(old, "fp8-lm")
    assert new.param_groups[0]["states"] == "fp8-lm-exact" and AdamW.adopt(old, "fp8-lm") is new
    _, old = built(torch.optim.Adam, weight_decay=0.0)
    old.param_groups[1]["weight_decay"] = 0.0
    assert AdamW.adopt(old, "fp8-lm").param_groups[0]["states"] == "fp8-lm"
    with pytest.raises(ValueError, match=r"coupled weight decay.*fp8-lm-exact"):
        Adam(old.param_groups[0]["params"], weight_decay=0.1, states=FP8_LM)


def test_small_tensors_and_embeddings_keep_float32_moments():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(128, 64), nn.Linear(64, 64))
    mark_embeddings(model)
    old = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(torch.arange(128)).square().sum().backward()
        old.step()
    moments = {p: old.state[p]["exp_avg"].clone() for p in model.parameters()}
    new = AdamW.adopt(old, "8bit")
    for param, plain in [(model[0].weight, True), (model[1].weight, False), (model[1].bias, True)]:
        assert ("exp_avg" in new.state[param]) == plain and ("exp_avg_qdata" in new.state[param]) != plain
        assert not plain or torch.equal(new.state[param]["exp_avg"], moments[param])
    new.load_state_dict(new.state_dict())
    new.step()


class Custom(torch.optim.AdamW):
    pass


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "not a SGD"),
        (lambda p: Custom(p), "not a Custom"),
        (lambda p: AdamW(p), "not a AdamW"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad=True.*recipe fp8-lm-o1 or te-delayed, which keep"),
        (lambda p: torch.optim.AdamW(p, differentiable=True), "differentiable=True"),
    ],
)
def test_what_cannot_be_adopted_stays_untouched(make, message):
    optimizer = make([nn.Parameter(torch.ones(2))])
    before = copy.deepcopy(optimizer.param_groups[0])
    with pytest.raises(TypeError, match=message):
        AdamW.adopt(optimizer, "fp8-lm")
    assert optimizer.param_groups[0].keys() == before.keys()


def test_accelerated_scheduler_and_optimizer():
    accelerate = pytest.importorskip("accelerate")
    model, old = built()
    scheduler = LambdaLR(old, lambda step: 0.5**step)
    new = AdamW.adopt(old, "fp8-lm")
    accelerator = accelerate.Accelerator(cpu=True)
    model, new, scheduler = accelerator.prepare(model, new, scheduler)
    for seed in range(3):
        backward(model, seed)
        new.step()
        scheduler.step()
    assert new.param_groups[0]["lr"] == pytest.approx(1e-2 / 8)


def test_stable_adamw_takes_over_an_adam_whose_decay_is_decoupled():
    from hf_lowprec.optim import StableAdamW
    from hf_lowprec.recipe import States

    weight = torch.nn.Parameter(torch.ones(4))
    decoupled = torch.optim.Adam([weight], weight_decay=0.1, decoupled_weight_decay=True)
    assert type(AdamW.adopt(decoupled, States(algorithm="stable-adamw"))) is StableAdamW
    with pytest.raises(ValueError, match="decays weights apart from the gradient"):
        AdamW.adopt(torch.optim.Adam([weight], weight_decay=0.1), States(algorithm="stable-adamw"))
