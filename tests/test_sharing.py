# SPDX-License-Identifier: Apache-2.0
"""One quantised input for several linears, and inputs that come quantised: nobody can tell."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from core import assert_same_state, batch, same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hf_lowprec
import hf_lowprec.modules.sharing as sharing
from hf_lowprec import ops
from hf_lowprec.conversion import session_of
from hf_lowprec.modules.sharing import HandOver, hand_over, share_input
from hf_lowprec.operands import Quantized
from hf_lowprec.recipe import Gemm, Quant, Recipe, Scaling

RECIPES = ["fp8-lm", "te-delayed", "te-current", "fp8-cscale"]


class Block(nn.Module):
    """Three linears that read one tensor, in an order that can be chosen, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v = nn.Linear(32, 48), nn.Linear(32, 16, bias=False), nn.Linear(32, 48)
        self.out = nn.Linear(48, 32)
        self.order = "qkv"

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        made = {name: getattr(self, name)(h) for name in self.order}
        return x + self.out(made["q"] * made["k"].mean(-1, keepdim=True) + made["v"].tanh())


def blocks(recipe: Any = "fp8-lm", prepare: Callable[[Block], Any] = lambda block: None) -> tuple[Block, Block]:
    """Equal blocks, one as it is and one that shares. Fusion by the conversion itself is not what is tested here."""
    out = []
    for shared in (False, True):
        torch.manual_seed(0)
        block = Block()
        prepare(block)
        hf_lowprec.convert(block, recipe, fuse=False)
        if shared:
            share_input(states(block))
        out.append(block)
    return out[0], out[1]


def states(block: Block) -> list[Any]:
    return [layer._lowprec for layer in (block.q, block.k, block.v)]


class Counted:
    """How often a tensor of this width is quantised."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.transposed = 0
        cast, transposed = ops.cast_transpose, ops.transposed

        def counting(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls += x.dim() == 3 and x.shape[-1] == 32 and not kwargs.get("fixed", False)
            return cast(x, *args, **kwargs)

        def counting_transposed(qdata: Tensor) -> Tensor:
            self.transposed += 1
            return transposed(qdata)

        monkeypatch.setattr(ops, "cast_transpose", counting)
        monkeypatch.setattr(ops, "transposed", counting_transposed)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def scaling_without_counts(block: Block) -> dict[str, Any]:
    """Of what is noted, the counts alone depend on how often somebody looked."""
    state = session_of(block).scaling.state_dict()
    return {n: {r: {k: v for k, v in t.items() if k != "counts"} for r, t in e.items()} for n, e in state.items()}


def assert_alike(
    plain: Block, shared: Block, run: Callable[[Block, Tensor], Tensor], steps: int = 3, one_state: bool = True
) -> None:
    """one_state: the members saw the same tensors, so that what they share is what each would have."""
    optimizers = [torch.optim.SGD(block.parameters(), lr=0.1) for block in (plain, shared)]
    for step in range(steps):
        x = batch(2, 9, 32, seed=step)
        outs, grads = [], []
        for block in (plain, shared):
            leaf = x.clone().requires_grad_()
            out = run(block, leaf)
            out.square().mean().backward()
            outs.append(out.detach())
            grads.append(leaf.grad)
        assert same_bits(*outs) and same_bits(*grads), step
        if one_state:
            assert_same_state(scaling_without_counts(plain), scaling_without_counts(shared))
        for (name, a), b in zip(plain.named_parameters(), shared.parameters(), strict=True):
            assert (a.grad is None and b.grad is None) or same_bits(a.grad, b.grad), name
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("recipe", RECIPES)
def test_shared_is_unshared(recipe: str, counted: Counted) -> None:
    plain, shared = blocks(recipe)
    assert_alike(plain, shared, lambda block, x: block(x))
    counted.calls = 0
    x = batch(2, 9, 32).requires_grad_()  # q, k and v once; `out` has a width of its own, its gradient has not
    shared(x).sum().backward()
    with_shared, counted.calls = counted.calls, 0
    plain(x).sum().backward()
    assert counted.calls - with_shared == 2 and with_shared >= 1


def test_one_state_and_counts_of_one_look() -> None:
    _, shared = blocks()
    assert len({id(state.operands[0].counts) for state in states(shared)}) == 1
    assert len({id(state.operands[2].counts) for state in states(shared)}) == 3, "gradients are each their own"
    shared(batch(2, 9, 32))
    assert int(states(shared)[0].operands[0].counts[0]) == 2 * 9 * 32


@pytest.mark.parametrize("order", ["vkq", "kqvq", "qqkv", "qkvqkv"])
def test_any_order_and_number(order: str) -> None:
    def choose(block: Block) -> None:
        block.order = order

    assert_alike(*blocks(prepare=choose), lambda block, x: block(x))


def test_members_alone_and_on_other_tensors() -> None:
    def run(block: Block, x: Tensor) -> Tensor:
        h, other = block.norm(x), 2 * block.norm(x)
        return block.q(h).sum(-1) + block.k(other).sum(-1) + block.v(h + 0).sum(-1) + block.q(other).sum(-1)

    assert_alike(*blocks(), run, steps=1, one_state=False)
    plain, shared = blocks("te-current")
    assert_alike(plain, shared, run)


def test_written_in_between() -> None:
    """The same tensor object is another tensor after `add_`."""

    def run(block: Block, x: Tensor) -> Tensor:
        h = block.norm(x) + 0
        first = block.q(h)
        h.add_(1.0)
        return first + block.v(h)

    assert_alike(*blocks("te-current"), run)  # no amax: the members do not see the same tensors


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    plain, shared = blocks()
    assert_alike(plain, shared, lambda block, x: checkpoint(block, x, use_reentrant=reentrant))


def test_no_grad_then_grad_on_the_same_tensor(counted: Counted) -> None:
    """A copy made without gradients has noted nothing and is not transposed."""
    plain, shared = blocks()
    h = batch(2, 9, 32)
    for block in (plain, shared):
        with torch.no_grad():
            block.q(h)
        assert not float(states(block)[0].operands[0].amax)
        (block.k(h).sum() + block.v(h).sum()).backward()
        assert float(states(block)[1].operands[0].amax) == float(h.abs().max())
    assert same_bits(plain.k.weight.grad, shared.k.weight.grad)
    assert same_bits(plain.v.weight.grad, shared.v.weight.grad)


def test_grad_then_no_grad_reuses(counted: Counted) -> None:
    _, shared = blocks()
    h = batch(2, 9, 32)
    shared.q(h)
    with torch.no_grad():
        shared.k(h)
    shared.v(h)
    assert counted.calls == 1


def test_frozen_member_first_then_one_that_trains(counted: Counted) -> None:
    """The first asks for one layout, the second needs the other, too."""

    def freeze(block: Block) -> None:
        block.q.weight.requires_grad_(False)

    plain, shared = blocks(prepare=freeze)
    assert_alike(plain, shared, lambda block, x: block(x))
    assert counted.transposed == 3, "once a step, for k and v"


def test_high_precision_members_leave_it_alone() -> None:
    plain, shared = blocks()
    x = batch(2, 9, 32)
    with hf_lowprec.high_precision(shared):
        torch.manual_seed(0)
        assert same_bits(shared(x), Block()(x))
    assert states(shared)[0].shared._slot.value is None
    assert_alike(plain, shared, lambda block, x: block(x))


def test_dropped_when_the_last_has_taken_it_or_the_tensor_dies() -> None:
    _, shared = blocks()
    group = states(shared)[0].shared
    h = batch(2, 9, 32)
    with torch.no_grad():
        shared.q(h)
        shared.k(h)
        codes = weakref.ref(group._slot.value.qdata)
        shared.v(h)
        assert codes() is None and group._slot.value is None
        shared.q(h)
        codes = weakref.ref(group._slot.value.qdata)
        del h
        gc.collect()
    assert codes() is None


def test_a_step_drops_it() -> None:
    """The scale of the next step is another."""
    plain, shared = blocks("te-delayed")
    h = batch(2, 9, 32)
    outs = []
    for block in (plain, shared):
        optimizer = torch.optim.SGD(block.parameters(), lr=0.0)
        big = batch(2, 9, 32, seed=1) * 100
        for layer in (block.q, block.k, block.v):
            layer(big).sum().backward()
        block.q(h)  # is not taken by the others
        optimizer.step()
        outs.append(block.k(h).detach())
    assert same_bits(*outs)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_share_among_themselves(how: str) -> None:
    plain, shared = blocks()
    if how == "deepcopy":
        copied = copy.deepcopy(shared)
    else:
        file = io.BytesIO()
        torch.save(shared, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    group = states(copied)[0].shared
    assert group is not states(shared)[0].shared
    assert group.members == states(copied)
    assert len({id(state.operands[0].counts) for state in states(copied)}) == 1
    assert states(copied)[0].operands[0].counts is not states(shared)[0].operands[0].counts
    assert_alike(plain, copied, lambda block, x: block(x))


def test_moves_together() -> None:
    _, shared = blocks()
    before = states(shared)[0].operands[0].counts
    for state in states(shared):
        state.to(torch.device("cpu"))
    assert len({id(state.operands[0].counts) for state in states(shared)}) == 1
    assert states(shared)[0].operands[0].counts is before
    states(shared)[1].to(torch.device("meta"))
    assert all(state.operands[0].counts.is_meta for state in states(shared))
    assert not states(shared)[0].operands[2].counts.is_meta


def test_state_dict_fits_both() -> None:
    plain, shared = blocks("te-delayed")
    for block in (plain, shared):
        optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
        block(batch(2, 9, 32)).sum().backward()
        optimizer.step()
    session_of(plain).scaling.load_state_dict(session_of(shared).scaling.state_dict())
    session_of(shared).scaling.load_state_dict(session_of(plain).scaling.state_dict())
    assert_same_state(scaling_without_counts(plain), scaling_without_counts(shared))
    assert float(states(shared)[0].operands[0].scale) > 0


def test_what_cannot_be_shared() -> None:
    _, shared = blocks()
    share_input(states(shared))  # as it is already
    with pytest.raises(ValueError, match="share their input with others already"):
        share_input([states(shared)[0], shared.out._lowprec])
    other, _ = blocks("te-current")
    with pytest.raises(ValueError, match="quantise their input differently"):
        share_input([states(other)[0], shared.out._lowprec])
    columns = Quant(format="e4m3fn", scaling=Scaling(granularity="column"))
    by_column = Recipe(name="columns", fprop=Gemm(input=columns, weight=Quant(format="e4m3fn")))
    alone, also = blocks(by_column)
    assert states(also)[0].shared is None
    assert_alike(alone, also, lambda block, x: block(x))


def test_compiled_members_quantise_for_themselves() -> None:
    plain, shared = blocks()
    torch.compiler.reset()
    compiled = torch.compile(shared, fullgraph=True, backend="aot_eager")
    x = batch(2, 9, 32)
    assert same_bits(compiled(x), plain(x))
    assert states(shared)[0].shared._slot.value is None


# --- producers ------------------------------------------------------------------------------------------------------


def produce(state: Any, x: Tensor, *, transposed: bool) -> Quantized:
    operand = state.input_operand()
    noted = (operand.state.amax, operand.state.counts) if torch.is_grad_enabled() else (None, None)
    rows, columns, scale = ops.cast_transpose(
        x, operand.quant, operand.state.scale, amax=noted[0], counts=noted[1], columns=transposed
    )
    return Quantized(rows, scale, columns if transposed else None)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_handed_over(recipe: str, transposed: bool, counted: Counted) -> None:
    plain, shared = blocks(recipe)
    calls = []

    def run(block: Block, x: Tensor) -> Tensor:
        h = block.norm(x)
        if block is shared:
            hand_over(states(block)[1], h, produce(states(block)[1], h, transposed=transposed))
            counted.calls = 0
        q, k, v = block.q(h), block.k(h), block.v(h)
        if block is shared:
            calls.append(counted.calls)
        return q * k.mean(-1, keepdim=True) + v

    assert_alike(plain, shared, run)
    assert calls == [0, 0, 0]
    assert counted.transposed == (0 if transposed else 3)


def counted_rows(block: Block) -> int:
    return int(block.out._lowprec.operands[0].counts[0])


def test_handed_over_to_a_layer_of_no_group() -> None:
    plain, other = blocks()

    def run(block: Block, x: Tensor) -> Tensor:
        h = block.norm(x).repeat(1, 1, 2)[..., :48]
        if block is other:
            hand_over(block.out._lowprec, h, produce(block.out._lowprec, h, transposed=False))
        return block.out(h) + block.out(2 * h)

    assert_alike(plain, other, run)
    assert counted_rows(other) == counted_rows(plain)


def test_what_is_handed_over_is_not_read_again() -> None:
    plain, other = blocks()
    state = other.out._lowprec
    h = batch(2, 9, 48)
    nowhere = torch.full((), float("nan")).expand(2, 9, 48)
    hand_over(state, nowhere, produce(state, h, transposed=True))
    out, expected = other.out(nowhere), plain.out(h)
    out.sum().backward()
    expected.sum().backward()
    assert same_bits(out, expected) and same_bits(other.out.weight.grad, plain.out.weight.grad)
    assert other.out(nowhere).isnan().all(), "taken once"


def test_operands_of_layers_that_take_none() -> None:
    _, shared = blocks()
    state = states(shared)[0]
    assert state.input_operand().quant == state.spec.fprop_input and not state.input_operand().ready
    with hf_lowprec.high_precision(shared):
        assert state.input_operand() is None
    x, g = Quant(format="e4m3fn"), Quant(format="e5m2")
    differ = Recipe(name="differ", fprop=Gemm(input=x, weight=x), dgrad=Gemm(grad_output=g, weight=x),
                    wgrad=Gemm(input=replace(x, format="e5m2"), grad_output=replace(g, format="e4m3fn")))  # fmt: skip
    model = nn.Sequential(nn.Linear(32, 32))
    hf_lowprec.convert(model, differ, fuse=False)
    assert model[0]._lowprec.input_operand() is None


def test_slots_forget_in_copies() -> None:
    slot = HandOver()
    x = batch(2)
    slot.put(x, Quantized(x, x.sum()))
    assert slot.get(x) is not None and copy.deepcopy(slot).get(x) is None
    x.add_(1)
    assert slot.get(x) is None
    slot.put(x, Quantized(x, x.sum()))
    x.data = batch(2, seed=1)
    assert slot.get(x) is None
    square = batch(3, 3)
    slot.put(square, Quantized(square, square.sum()))
    square.data = square.data.t()
    assert slot.get(square) is None
    slot.put(square, Quantized(square, square.sum()))
    square.data = square.data[:2]
    assert slot.get(square) is None


def test_other_data_in_between() -> None:
    """The same tensor object is another tensor after `h.data = ...`."""

    def run(block: Block, x: Tensor) -> Tensor:
        h = block.norm(x).detach()
        first = block.q(h)
        h.data = h.data * 3 + 1
        return first + block.v(h) + 0 * x.sum()

    assert_alike(*blocks("te-current"), run)


def test_backward_keeps_one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a shared input only what wgrad reads stays alive, although autograd keeps a record of each call."""
    _, shared = blocks()
    made: list[weakref.ref[Tensor]] = []
    real = sharing.quantize_input

    def watched(*args: Any, **kwargs: Any) -> Any:
        quantized = real(*args, **kwargs)
        made.append(weakref.ref(quantized.qdata))
        return quantized

    monkeypatch.setattr(sharing, "quantize_input", watched)
    out = shared(batch(2, 9, 32).requires_grad_())
    gc.collect()
    assert made and all(reference() is None for reference in made)
    out.sum().backward()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parametrized_weights_and_biases_are_read_as_they_are_now(name: str) -> None:
    """Forward looks Parameters up without `nn.Module.__getattr__`, where parametrizations live."""

    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    torch.manual_seed(0)
    layer, doubled = nn.Linear(32, 48), nn.Linear(32, 48)
    doubled.load_state_dict(layer.state_dict())
    with torch.no_grad():
        getattr(doubled, name).mul_(2)
    for each in (layer, doubled):
        hf_lowprec.convert(each, "te-current")
    nn.utils.parametrize.register_parametrization(layer, name, Doubled())
    x = batch(4, 32)
    assert torch.equal(layer(x), doubled(x))
    layer(x).sum().backward()
    doubled(x).sum().backward()
    original = layer.parametrizations[name].original
    assert torch.equal(original.grad, 2 * getattr(doubled, name).grad)
