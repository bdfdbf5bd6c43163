# SPDX-License-Identifier: Apache-2.0
"""A step that repeats the last one takes a short way on the host; whatever a user may do in between is noticed.

The kernels are replaced by a record of what they would have been given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import hf_lowprec
from hf_lowprec import optim
from hf_lowprec.modules import weight_cache
from hf_lowprec.optim import GradientQuantizer, GradientSwap, base, fused
from hf_lowprec.recipe import Communication, Quant, Scaling

CPU = torch.device("cpu")


class Tables:
    """Of the last one made: what it was made from, and what each step was told."""

    made: ClassVar[list[Tables]] = []

    def __init__(
        self, algorithm: str, rows: Sequence[Any], grads: list[int], groups: list[Any], device: Any, **more: Any
    ) -> None:
        self.rows, self.grads, self.groups, self.more = rows, list(grads), groups, more
        self.steps = self.looks = 0
        self.factor = torch.tensor(0.5)
        self.weight_amax = torch.arange(len(rows), dtype=torch.float32) + 100 * len(Tables.made)
        Tables.made.append(self)

    def set_grads(self, grads: list[int]) -> None:
        self.grads = list(grads)

    def set_groups(self, groups: list[Any]) -> None:
        self.groups = groups

    def look(self, limit: Any) -> tuple[Tensor, Tensor]:
        self.looks, self.limit = self.looks + 1, limit
        return torch.tensor(2.0), self.factor

    def step(self, **arguments: Any) -> Tensor:
        self.steps, self.arguments = self.steps + 1, arguments
        return torch.ones((), dtype=torch.bool)


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parameters on the CPU count as those of a GPU."""
    meet = base.LowPrecOptimizer._meet

    def covered(self: Any, plan: Any, item: Any) -> None:
        meet(self, plan, item)
        item.route = plan.route(item.param.device, True)

    monkeypatch.setattr(base.LowPrecOptimizer, "_meet", covered)
    monkeypatch.setattr(fused, "Tables", Tables)
    Tables.made = []
    yield


Made = tuple[list[nn.Parameter], optim.AdamW]


def made(states: str = "fp8-lm", count: int = 5, **options: Any) -> Made:
    params = [nn.Parameter(torch.randn(64, 65).bfloat16()) for _ in range(count)]
    optimizer = optim.AdamW(params, states=states, **options)
    for _ in range(2):
        step(params, optimizer)
    return params, optimizer


def step(params: list[nn.Parameter], optimizer: optim.AdamW) -> None:
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()


def again(optimizer: optim.AdamW) -> bool:
    assert optimizer._plan is not None
    return optimizer._plan.again is not None


def test_one_table_and_new_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = made()
    monkeypatch.setattr(optimizer, "_collect", lambda *_, **__: pytest.fail("it looked at each parameter"))
    for _ in range(3):
        step(params, optimizer)
        assert Tables.made[0].grads == [p.grad.data_ptr() for p in params]
    assert len(Tables.made) == 1 and Tables.made[0].steps == 5


def test_hyperparameters(monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = made()
    monkeypatch.setattr(optimizer, "_collect", lambda *_, **__: pytest.fail("it looked at each parameter"))
    for changes in ({"lr": 3e-4}, {"betas": [0.8, 0.9]}, {"eps": 1e-6}, {"weight_decay": 0.3}, {"maximize": True}):
        before = Tables.made[0].groups
        optimizer.param_groups[0].update(changes)
        step(params, optimizer)
        assert Tables.made[0].groups != before, changes
    betas, before = optimizer.param_groups[0]["betas"], Tables.made[0].groups
    betas[1] = 0.95  # in place
    step(params, optimizer)
    assert Tables.made[0].groups != before
    optimizer.param_groups[0]["betas"] = (0.99, 0.9)
    with pytest.raises(ValueError, match="beta1"):
        step(params, optimizer)


def test_a_learning_rate_in_a_tensor_of_the_cpu_is_read_anew() -> None:
    rate = torch.tensor(1e-3)
    params, optimizer = made(lr=rate)
    before = Tables.made[0].groups
    rate.fill_(5e-3)
    step(params, optimizer)
    assert Tables.made[0].groups[0][:2] != before[0][:2] and Tables.made[0].groups[0][2:] == before[0][2:]


def test_clip_and_counters() -> None:
    _, optimizer = made()
    clip = torch.tensor(0.5)
    optimizer.step(clip=clip)
    told = Tables.made[0].arguments
    assert torch.equal(told["clip"], clip) and told["skipped_steps"] is optimizer.skipped_steps
    with pytest.raises(TypeError, match="clip"):
        optimizer.step(clip=0.5)  # type: ignore[arg-type]


def test_a_clip_looks_and_the_step_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = made()
    monkeypatch.setattr(optimizer, "_collect", lambda *_, **__: pytest.fail("it looked at each parameter"))
    for looks in (1, 2):
        for p in params:
            p.grad = torch.randn_like(p)
        assert optimizer.clip_grad_norm_(0.25) == 2
        optimizer.param_groups[0]["lr"] = 1e-4 * looks
        optimizer.step()
        table = Tables.made[0]
        told = table.arguments
        assert told["clip"] is table.factor and told["looked"] and told["trusted"] and told["finite"] is None
        assert table.looks == looks and table.limit == 0.25
        assert table.grads == [p.grad.data_ptr() for p in params]  # type: ignore[union-attr]
    step(params, optimizer)
    assert Tables.made[0].arguments["clip"] is None and not Tables.made[0].arguments["looked"]
    assert len(Tables.made) == 1 and Tables.made[0].looks == 2


def test_a_clip_before_the_first_step() -> None:
    params = [nn.Parameter(torch.randn(64, 65).bfloat16()) for _ in range(3)]
    optimizer = optim.AdamW(params)
    for _ in range(2):
        for p in params[1:]:
            p.grad = torch.randn_like(p)
        optimizer.clip_grad_norm_(torch.tensor(0.25))
        optimizer.step()
        assert Tables.made[0].arguments["looked"] and Tables.made[0].limit == 0.25
    assert len(Tables.made) == 1 and Tables.made[0].looks == 2


def test_edits_of_parameters_between_clip_and_step_are_noticed() -> None:
    params, optimizer = made()
    for edit in (lambda: params[1].fill_(7.0), lambda: setattr(params[1], "data", params[1].data.clone())):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.clip_grad_norm_(0.25)
        with torch.no_grad():
            edit()
        optimizer.step()
        assert not Tables.made[-1].arguments["trusted"]
    assert [table.arguments["looked"] for table in Tables.made] == [True, False], "new tables have not looked"


def test_a_look_is_of_the_gradients_of_its_step() -> None:
    params, optimizer = made()
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.clip_grad_norm_(0.25)
    params[2].grad = None
    optimizer.step()
    assert len(Tables.made) == 2 and not Tables.made[1].arguments["looked"]
    assert Tables.made[1].arguments["clip"] is Tables.made[0].factor
    for p in params:
        p.grad = torch.randn_like(p)
    params[1].grad = torch.randn(65, 64).bfloat16().t()
    optimizer.clip_grad_norm_(0.25)
    optimizer.step()  # of a copy of that gradient, at an address of its own
    assert Tables.made[0].arguments["clip"] is Tables.made[0].factor


def a_gradient_is_missing(params: list[nn.Parameter], optimizer: Any) -> None:
    params[2].grad = None


def one_is_moved(params: list[nn.Parameter], optimizer: Any) -> None:
    params[2].data = params[2].data.clone()


def a_state_is_moved(params: list[nn.Parameter], optimizer: Any) -> None:
    for value in optimizer.state[params[2]].values():
        value.data = value.data.clone()


def a_state_is_replaced(params: list[nn.Parameter], optimizer: Any) -> None:
    optimizer.state[params[2]]["step"] = optimizer.state[params[2]]["step"].clone()


def a_state_dict_is_replaced(params: list[nn.Parameter], optimizer: Any) -> None:
    optimizer.state[params[2]] = dict(optimizer.state[params[2]])


def a_state_is_emptied(params: list[nn.Parameter], optimizer: Any) -> None:
    optimizer.state[params[2]].clear()


def a_group_comes(params: list[nn.Parameter], optimizer: Any) -> None:
    new = nn.Parameter(torch.zeros(5))
    new.grad = torch.zeros(5)
    optimizer.add_param_group({"params": [new]})


def a_parameter_goes(params: list[nn.Parameter], optimizer: Any) -> None:
    optimizer.param_groups[0]["params"].pop()


@pytest.mark.parametrize(
    "change",
    [
        a_gradient_is_missing, one_is_moved, a_state_is_moved, a_state_is_replaced, a_state_dict_is_replaced,
        a_state_is_emptied, a_group_comes, a_parameter_goes,
    ],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_new_tables(change: Callable[..., None]) -> None:
    params, optimizer = made()
    for p in params:
        p.grad = torch.randn_like(p)
    change(params, optimizer)
    optimizer.step()
    assert len(Tables.made) == 2 and Tables.made[1].steps == 1
    present = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    rows = [row.numbers for row in Tables.made[1].rows]
    assert [row[0] for row in rows] == [p.data_ptr() for p in present]
    assert [row[7] for row in rows] == [optimizer.state[p]["step"].data_ptr() for p in present]
    optimizer.step()
    assert len(Tables.made) == 2 and again(optimizer)


def test_a_gradient_comes_back() -> None:
    params, optimizer = made()
    for missing in (True, False, True, True):
        for p in params:
            p.grad = torch.randn_like(p)
        if missing:
            params[1].grad = None
        optimizer.step()
        assert len(Tables.made[-1 if missing and len(Tables.made) > 1 else 0].rows) == (4 if missing else 5)
    assert len(Tables.made) == 2, "both lists are known"


def test_an_edited_parameter_widens_its_master() -> None:
    params, optimizer = made()
    with torch.no_grad():
        params[1].fill_(77.0)
    step(params, optimizer)
    assert float(optimizer.state[params[1]]["master_amax"]) == 77
    assert again(optimizer) and len(Tables.made) == 1


@pytest.mark.parametrize("states, master", [("fp8-lm", "default"), ("8bit", "fp32"), ("8bit", "fp16-scaled")])
def test_parameters_that_torch_saw_edited_are_not_trusted(states: str, master: str) -> None:
    """Where a master alone says what they hold; the step after that trusts them again."""
    params, optimizer = made(states, master=master)

    def trusted() -> bool:
        step(params, optimizer)
        return Tables.made[-1].arguments["trusted"]

    assert trusted()
    edits: list[Callable[[], Any]] = [
        lambda: params[1].copy_(torch.ones(64, 65)),
        lambda: params[1].detach().mul_(2),
        lambda: torch._foreach_add_(params[:2], 1.0),
        lambda: params[3][2:5].zero_(),
        lambda: nn.ParameterList(params).load_state_dict(nn.ParameterList(params).state_dict()),
        lambda: setattr(params[1], "data", params[1].data.clone()),
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
        optimizer.parameters_edited,
        lambda: params.__setitem__(2, params[2]) or optimizer.state[params[2]].update(step=torch.tensor(2.0)),
    ]
    for number, edit in enumerate(edits):
        with torch.no_grad():
            edit()
        assert not trusted(), number
        assert trusted() and trusted(), number
    with torch.inference_mode():
        params[1].mul_(2)
    assert not trusted() and trusted()


def test_an_edit_is_not_forgotten_by_lists_of_gradients_that_come_and_go() -> None:
    params, optimizer = made()
    trusts = []
    for missing, edit in ((1, False), (None, False), (1, False), (1, True), (1, False), (None, False), (None, False)):
        if edit:
            with torch.no_grad():
                params[0].mul_(2)
        for p in params:
            p.grad = torch.randn_like(p)
        if missing is not None:
            params[missing].grad = None
        optimizer.step()
        trusts.append(
            next(t for t in Tables.made if len(t.rows) == (5 if missing is None else 4)).arguments["trusted"]
        )
    # The first step of the list without one; the edit, for that list and then for the whole one.
    assert trusts == [False, True, True, False, True, False, True]


def test_a_step_that_raised_or_was_captured_settles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = made()

    def fails(self: Tables, **arguments: Any) -> Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Tables, "step", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            step(params, optimizer)
    step(params, optimizer)
    assert not Tables.made[0].arguments["trusted"]
    with monkeypatch.context() as patch:
        patch.setattr(fused, "capturing", lambda device: True)
        step(params, optimizer)
    step(params, optimizer)
    assert not Tables.made[0].arguments["trusted"]
    step(params, optimizer)
    assert Tables.made[0].arguments["trusted"]


def test_residuals_and_parameters_without_masters_are_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = made("compact")
    monkeypatch.setattr(optimizer, "_collect", lambda *_, **__: pytest.fail("it looked at each parameter"))
    with torch.no_grad():
        params[1].mul_(2)
    step(params, optimizer)


def test_other_gradients_are_looked_at() -> None:
    params, optimizer = made(states="8bit")
    for p in params:
        p.grad = torch.randn_like(p)
    params[1].grad = params[1].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()
    params[1].grad = torch.randn(65, 64).bfloat16().t()
    optimizer.step()
    table = Tables.made[0]
    assert table.grads[0] == params[0].grad.data_ptr() and table.grads[1] != params[1].grad.data_ptr()


def test_a_gradient_without_memory_is_refused() -> None:
    from hf_lowprec.optim.freed import FreedGradient

    params, optimizer = made(states="8bit")
    params[1].grad = FreedGradient(params[1])
    with pytest.raises(RuntimeError, match=r"without memory|freed"):
        optimizer.step()


def test_a_parameter_that_is_not_contiguous_is_copied_every_time() -> None:
    params = [nn.Parameter(torch.randn(64, 65).t())]
    optimizer = optim.AdamW(params)
    for _ in range(3):
        step(params, optimizer)
        assert not again(optimizer)
    assert Tables.made[0].steps == 3


# --- communication formats ------------------------------------------------------------------------------------------


def swap_of(params: list[nn.Parameter], gradient: Quant | None = None) -> GradientSwap:
    communication = Communication(
        gradient=gradient or Quant(format="e4m3fn", scaling=Scaling(snap="rceil")), auto_scale=True
    )
    quantizer = GradientQuantizer(communication, len(params), world_size=1)
    return GradientSwap(quantizer, {p: i for i, p in enumerate(params) if i != 1})


def test_kernels_are_told_the_wires_and_nobody_else_quantises(monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = made()
    swap = swap_of(params)
    quantizer = swap.quantizer
    monkeypatch.setattr(quantizer, "quantize_all", lambda grads: pytest.fail("op by op"))
    for _ in range(3):  # told at every step anew, as a recipe does
        swap.pre_step(optimizer, (optimizer,), {})
        step(params, optimizer)
        swap.post_step(optimizer, (optimizer,), {})
        optimizer.state_bytes()
    assert len(Tables.made) == 2 and Tables.made[1].steps == 3
    wires = Tables.made[1].more["wires"]
    assert [wire and wire.place for wire in wires] == [0, None, 2, 3, 4]
    assert all(wire.k is quantizer.k and wire.count is quantizer.count for wire in wires if wire)
    step(params, optimizer)
    assert len(Tables.made) == 3 and not Tables.made[2].more["wires"]


def test_a_clip_keeps_the_wires_of_the_last_step() -> None:
    """Which a recipe tells when the step begins: the tables of the clip would be made anew by each step."""
    params, optimizer = made()
    swap = swap_of(params)
    for number in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.clip_grad_norm_(0.25)
        swap.pre_step(optimizer, (optimizer,), {})
        optimizer.step()
        swap.post_step(optimizer, (optimizer,), {})
        assert Tables.made[-1].arguments["looked"] == (number > 0)
    assert len(Tables.made) == 2 and Tables.made[1].looks == 2


def test_wires_follow_the_quantizers_state() -> None:
    params, optimizer = made()
    swap = swap_of(params)
    swap.attach(optimizer)
    step(params, optimizer)
    swap.quantizer.load_state_dict(swap.quantizer.state_dict())
    step(params, optimizer)
    assert len(Tables.made) == 2
    swap.quantizer.k = swap.quantizer.k.clone()
    step(params, optimizer)
    swap.quantizer.world_size = 2
    step(params, optimizer)
    assert len(Tables.made) == 4 and Tables.made[3].more["wires"][0].upper == 16_000
    assert Tables.made[3].more["wires"][0].k is swap.quantizer.k


@pytest.mark.parametrize("gradient", [Quant(format="e5m2"), None], ids=["no kernel", "two formats"])
def test_other_ways_are_taken_before_the_kernels(gradient: Quant | None) -> None:
    params, optimizer = made()
    swaps = [swap_of(params, gradient)] if gradient else [swap_of(params), swap_of(params)]
    for swap in swaps:
        swap.attach(optimizer)
    for _ in range(2):
        step(params, optimizer)
        table = Tables.made[-1]
        assert not table.more["wires"]
        own = [a == p.grad.data_ptr() for a, p in zip(table.grads, params, strict=True)]
        assert own == [False, True, False, False, False]
    assert all(swap.quantizer.count.tolist() == [2, 0, 2, 2, 2] for swap in swaps)


# --- the amax of new weights ----------------------------------------------------------------------------------------


def test_the_amax_of_a_weight_is_that_of_its_last_step() -> None:
    params, optimizer = made()
    assert optimizer.weight_amax(params[0]) is None
    optimizer.note_amax()
    assert optimizer.weight_amax(params[0]) is None, "no step has noted it yet"
    step(params, optimizer)
    assert [float(optimizer.weight_amax(p)) for p in params] == [100, 101, 102, 103, 104]  # type: ignore[arg-type]
    params[0].grad = None
    optimizer.step()
    assert [float(optimizer.weight_amax(p)) for p in params] == [100, 200, 201, 202, 203]  # type: ignore[arg-type]
    step(params, optimizer)
    assert [float(optimizer.weight_amax(p)) for p in params] == [100, 101, 102, 103, 104]  # type: ignore[arg-type]
    assert len(Tables.made) == 3 and Tables.made[0].more["amax"] is False
    assert optimizer.weight_amax(torch.zeros(3)) is None


def test_steps_without_a_kernel_know_no_amax() -> None:
    params, optimizer = made()
    optimizer.note_amax()
    step(params, optimizer)
    assert optimizer._plan is not None
    item = optimizer._plan.items[1]
    item.route = optimizer._plan.route(CPU, False)
    optimizer._plan.again = None
    step(params, optimizer)
    assert optimizer.weight_amax(params[1]) is None and optimizer.weight_amax(params[0]) is not None


def test_a_recipe_hands_the_amax_to_the_cache_of_weights() -> None:
    """Its weights are scaled by their own amax; what the kernels have noted of them saves a pass."""
    model = nn.Sequential(nn.Linear(64, 80), nn.Linear(80, 16)).bfloat16()
    hf_lowprec.convert(model, "fp8-lm", emulate=True)
    optimizer = hf_lowprec.attach_optimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert [table.more["amax"] for table in Tables.made] == [True], "from the first step on"
    by_param = {p: float(optimizer.weight_amax(p)) for p in model.parameters()}
    assert sorted(by_param.values()) == [0, 1, 2, 3]
    for layer in model:
        key, amax = layer._lowprec.weight_cache._amax
        assert float(amax) == by_param[layer.weight] and key[:2] == (layer.weight.data_ptr(), layer.weight._version)
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1).step()
    assert key != weight_cache._key(model[1].weight), "any optimizer's step outdates it"
