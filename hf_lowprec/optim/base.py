# SPDX-License-Identifier: Apache-2.0
"""What all optimizers here have in common: a torch.optim.Optimizer whose states are data.

One parameter at a time (`optim/algorithms.py`, the truth) or many in one launch (`optim/fused.py`, the same bits): its
slots (`optim/states.py`) are read to float32, updated, and written back. Which tensor is the master depends on how the
Parameter was loaded:

    float32 Parameter                  the Parameter is the master, updated in float32
    16-bit Parameter, a master         the master lives in the state; Parameter = cast(master) after every step
    bfloat16 Parameter, a residual     the Parameter is the upper half of its master, the state holds low bits
    16-bit Parameter, no master        the Parameter is updated in place, rounded as `states.update` says

A 2-byte master cannot take an update below half its ulp: with learning rates of fine-tuning, nearest rounding freezes
it altogether. Named states therefore round such masters stochastically unless a paper says otherwise.

An element of a Parameter that somebody edited (loading weights, merging an adapter) no longer equals cast(master);
there the Parameter wins and the master follows. (With a residual it is off by at most half an ulp of bfloat16.)

A step in which any gradient holds NaN or Inf (or a value whose square overflows float32) only counts itself in
`skipped_steps`. Nothing in a step waits for the device, to which counts and that decision belong; loading does wait.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_lowprec.optim import algorithms, checkpoints, compiled, shards
from hf_lowprec.optim import overrides as by_name
from hf_lowprec.optim import states as st
from hf_lowprec.optim.algorithms import Item
from hf_lowprec.optim.bounds import check_predictable
from hf_lowprec.optim.checkpoints import BEFORE_CHECKPOINT as BEFORE_CHECKPOINT
from hf_lowprec.optim.clipping import Look, Waiting, clip_factor, factor_of, norm_of
from hf_lowprec.optim.plan import Plan, make_item, quantise
from hf_lowprec.recipe import Quant, States

if TYPE_CHECKING:
    from hf_lowprec.optim.gradient import GradientSwap

_HERE = "torch's other code paths do not exist here: on CUDA every step runs in a few kernels; drop the argument"
_NO_MODE = "low-precision states have no such mode; drop the argument, or use torch.optim"
# amsgrad=False and differentiable=False say what is true here, capturable what holds for every step.
_REFUSED = {"foreach": _HERE, "fused": _HERE, "amsgrad": _NO_MODE, "differentiable": _NO_MODE}
_NO_STATE: Mapping[str, Any] = {}


class LowPrecOptimizer(Optimizer):
    """Base of the optimizers of this package. Subclasses name their algorithm, its moments and hyperparameters.

    compile: steps on the CPU run in compiled C++ (`optim/compiled.py`): the same bits, faster; needs a C++ compiler.
    states: a name (`optim/named.py`) or a `recipe.States`; a group may have its own.
    master: of 16-bit Parameters: "default" (what the states say), "fp32", "fp16-scaled", "bf16+8", "bf16+16" (low bits
        beside a bfloat16 Parameter), "sr" (none, stochastic rounding) or None (none, rounding to nearest).
    overrides: states by parameter name, see `optim/overrides.py`.
    nonfinite: "step": a non-finite gradient anywhere skips the step. "element": it skips that element of weight and
        states, counted in `skipped_elements`; a step then needs no look at the gradients before its first write.

    state per parameter: `step` float32 0-d, and the slots of `states.layout`. A float32 slot stands under its name; a
    quantised one is `<slot>_qdata`, codes, with `<slot>_scale` and what else its Quant asks for, so that torch's own
    optimizers, loading this state, stop with a KeyError instead of reading codes as moments.

    skipped_steps, skipped_elements: int64 0-d on the device.

    Raises ValueError for hyperparameters out of range and for states that diverge (`#4`), do not exist or do not fit;
    TypeError for parameters that are not floating point, and for code paths of torch that do not exist here;
    RuntimeError in `step` for sparse gradients.

    Parameters may be FSDP2's shards (`optim/shards.py`): `state` then holds this rank's rows.
    """

    algorithm: str = ""
    compile: bool = False
    regroups: bool = False  # whether `step` finds other param groups than there are outside of it (`optim/rates.py`)

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        states: str | States,
        master: str | None,
        overrides: Mapping[str, str | States] | None,
        nonfinite: str,
        options: Mapping[str, Any],
    ) -> None:
        self._refuse(options)
        if nonfinite not in ("step", "element"):
            raise ValueError(f"nonfinite: {nonfinite!r} is not 'step' or 'element'")
        lr = defaults["lr"]
        if isinstance(lr, Tensor):
            if lr.numel() != 1:
                raise ValueError(f"lr: a tensor of {lr.numel()} elements; one is needed")
        elif not lr >= 0:
            raise ValueError(f"lr: {lr} is not >= 0")
        if not defaults["weight_decay"] >= 0:
            raise ValueError(f"weight_decay: {defaults['weight_decay']} is not >= 0")
        self.nonfinite, self.compile = nonfinite, bool(options.get("compile"))
        if self.compile:
            compiled.check_compiler()
        self._patterns = by_name.parse(overrides)
        self._begin()
        super().__init__(
            params, {**defaults, "states": st.states_name(states), "master": master, "algorithm": self.algorithm}
        )
        by_name.check_used(self._patterns, (n for g in self.param_groups for n in g.get("param_names", ())))
        self._start_counters()

    def _refuse(self, options: Mapping[str, Any]) -> None:
        for name, value in options.items():
            if name in _REFUSED and (value or (value is not None and _REFUSED[name] is _HERE)):
                raise TypeError(f"{type(self).__name__}({name}={value!r}): {_REFUSED[name]}")
            if name not in _REFUSED and name not in ("capturable", "compile"):
                raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}")

    def _begin(self) -> None:
        """What a step keeps for the next one, and no checkpoint holds."""
        self._plan: Plan | None = None
        self._fused: Any = None
        self.swaps: list[GradientSwap] = []  # through whose formats gradients pass
        self.notes_amax = False
        self._waiting: Waiting | None = None  # a clip for the next step

    def _start_counters(self) -> None:
        first = next(self._parameters(), None)
        device = None if first is None else first.device
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_elements = torch.zeros((), dtype=torch.int64, device=device)

    def _parameters(self) -> Iterator[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

    def moments(self, group: Mapping[str, Any], state: Mapping[str, Any] = _NO_STATE) -> tuple[str, ...]:
        """The moments that a parameter of `group` has, or already has in `state`."""
        raise NotImplementedError

    def from_foreign(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A parameter's state of torch's optimizer of this algorithm as `step` and moments; ValueError: none."""
        raise ValueError(
            f"the checkpoint was not written by hf_lowprec.optim.{type(self).__name__} (its groups name no `states`), "
            "and torch has no such optimizer whose states could be taken over"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group's own `states`, if any, may be a name or a `recipe.States`. All or nothing."""
        if isinstance(param_group, dict):
            if isinstance(param_group.get("overrides"), Mapping):
                raise ValueError("overrides: of the whole optimizer; a group names its own `states`")
            if "states" in param_group:
                param_group["states"] = st.states_name(param_group["states"])
            param_group["algorithm"] = self.algorithm
        self.apply_clip()  # it is none of the new group's
        super().add_param_group(param_group)
        try:
            self._admit(self.param_groups[-1])
        except BaseException:
            self.param_groups.pop()
            raise
        self._invalidate()

    def _admit(self, group: dict[str, Any]) -> None:
        """Writes the group's overrides down. Raises where a parameter cannot have the states it would get."""
        params = group["params"]
        wanted = st.resolve_states(group["states"]).algorithm
        if wanted is not None and wanted != self.algorithm.replace("_adam", "-adamw"):
            raise ValueError(f"states {group['states']!r} are those of algorithm {wanted}, not {type(self).__name__}")
        names = by_name.match(self._patterns, group.get("param_names"), len(params))
        group["overrides"] = by_name.with_marks(names, group)
        for position, param in enumerate(params):
            st.check_parameter(param)
            item = make_item(self, group, position, param, position)
            check_predictable(self.algorithm, item)
            if self.nonfinite == "element":
                _check_elementwise(item)
            if self.compile:
                compiled.check(self.algorithm, item)

    def _invalidate(self) -> None:
        """Forgets what was prepared for the parameters and states as they were."""
        self._plan = None
        self._forget()

    def _forget(self) -> None:
        """Forgets the tables of kernels."""
        if self._plan is not None:
            self._plan.again = None
        if self._fused is not None:
            self._fused.invalidate()

    def state_bytes(self) -> dict[int, int]:
        """Bytes of all state tensors by `id(param)`, whether they exist already or not; of shards on all ranks."""
        plan = self._plan_now()
        return {
            id(item.key): st.state_bytes(
                item.states, item.param.dtype, tuple(item.key.shape), item.moments, sharded=item.shard is not None
            )
            for item in plan.items
        }

    # --- the step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, clip: Tensor | None = None) -> Any:
        """One update of every parameter that has a gradient; none of any, if one gradient is not finite.

        clip: a 0-d tensor that multiplies every gradient (`optim.clip_factor`), without a pass of its own.

        Returns the closure's value. Raises, before anything changed, RuntimeError on sparse gradients, and ValueError
        on hyperparameters under which predicted scales have no bound.
        """
        try:
            return self._step(closure, clip)
        finally:
            for swap in tuple(self.swaps):  # torch calls no post-hook of a step that raised
                swap.forget(self)

    def _step(self, closure: Callable[[], Any] | None, clip: Tensor | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan = self._plan_of_step()
        self._check_clip(clip)
        look: Look | None = None
        if self._waiting is not None:
            look = self._waiting.look
            clip = look.factor if clip is None else look.factor * _factor(clip, look.factor.device)
            if not self._waiting.unchanged():
                look = None
        if not self._again(plan, clip, look):
            items = self._collect(plan=plan)
            try:
                if items or plan.sharded:  # other ranks wait for this one
                    self._update(items, clip, look, all_of_them=True)
            finally:
                self._release(items)
        self._waiting = None
        return loss

    # --- clipping --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float | Tensor, norm_type: float = 2.0) -> Tensor:
        """Has the next `step` scale all gradients by min(1, max_norm / (norm + 1e-6)), and returns their norm.

        As `torch.nn.utils.clip_grad_norm_`, but **`p.grad` stays as it is**: the step applies the factor as it does
        `clip=`. On CUDA the look at all gradients that a step begins with is taken here and gives the norm on the way;
        the step then takes none. A norm that is not finite skips the step, which counts itself. `zero_grad` and `step`
        forget the clip; a second one first does `apply_clip`.

        max_norm: a number, or a tensor of one element. norm_type: any of torch's. Norms other than 2, shards,
        parameters on several devices, states without kernels on CUDA, and learning rates per weight take
        `optim.clip_factor`, torch's norm, and the step looks itself. In a CUDA graph clip and step belong together.

        Returns the norm before clipping, float32 0-d on the device of the gradients; nobody waits for it. The order
        of its summation: `optim/clipping.py`.

        Raises RuntimeError on sparse gradients, and `step` does where a gradient was written or set anew in between.
        """
        if self._waiting is not None and not self._waiting.gone():
            self.apply_clip()
        self._waiting = None
        look = self._look(max_norm, norm_type)
        self._waiting = Waiting(list(self._parameters()), look)
        return look.norm

    @torch.no_grad()
    def apply_clip(self) -> None:
        """Multiplies the gradients in place by the factor that waits for the next step, as torch would have: for code
        that reads or writes `p.grad` after `clip_grad_norm_`. Nothing happens where none waits.

        Raises RuntimeError where a gradient was written or set anew before."""
        if self._waiting is not None:
            self._waiting.apply()
            self._waiting = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; what `clip_grad_norm_` left for the next step is forgotten."""
        super().zero_grad(set_to_none)
        self._waiting = None

    def _look(self, max_norm: float | Tensor, norm_type: float) -> Look:
        """Norm and factor, and what the step may use of the look at all gradients."""
        plan = self._plan_now() if norm_type == 2 and not self.regroups else None
        if plan is not None and not plan.sharded:
            if plan.again is not None and (found := plan.again.gradients()) is not None:
                batch = plan.again.batch
                return self._fused.look_at(batch, *found, _limit(max_norm, batch.device), unchanged=True)  # type: ignore[no-any-return]
            items = self._collect(plan=plan)
            try:
                look = self._look_at(plan, items, max_norm)
            finally:
                self._release(items)
            if look is not None:
                return look
        factor, norm = clip_factor(self._parameters(), max_norm, norm_type)
        return Look(norm, factor)

    def _look_at(self, plan: Plan, items: list[Item], max_norm: float | Tensor) -> Look | None:
        """`_look` at items by kernels, or on the CPU; None: neither."""
        routes = {item.route for item in items}
        if len(routes) != 1:
            return None
        device, covered = plan.routes[routes.pop()]
        if covered:
            if self._fused is None:
                self._fused = _kernels().Fused(self)
            return self._fused.look(self.algorithm, items, _limit(max_norm, device))
        if device.type != "cpu":
            return None
        norm = norm_of(item.grad for item in items)
        amax = None if self.nonfinite == "element" else algorithms.gradient_amax(items)
        return Look(norm, factor_of(norm, max_norm), amax, [item.key for item in items])

    def _plan_now(self) -> Plan:
        if self._plan is None or not self._plan.current(self):
            self._invalidate()
            self._plan = Plan(self)
        return self._plan

    def _plan_of_step(self) -> Plan:
        """`_plan_now`, and every gradient's way into the step."""
        plan = self._plan_now()
        if plan.follow(self.swaps):
            self._forget()
        return plan

    def _again(self, plan: Plan, clip: Tensor | None, look: Look | None) -> bool:
        """The step, if it is the last one over again but for values: by kernels, without a look at each parameter."""
        if plan.again is None or (found := plan.again.gradients()) is None:
            return False
        plan.check(self.algorithm)
        batch = plan.again.batch
        self._count_on(batch.device)
        self._fused.run(batch, *found, _factor(clip, batch.device), None, look=look, unchanged=True)
        return True

    def _collect(self, params: Iterable[Tensor] | None = None, *, plan: Plan | None = None) -> list[Item]:
        """Items of the parameters (all by default) that have a gradient, which they now hold; with their states.

        plan: one that is known to be current.
        """
        plan = plan or self._plan_of_step()
        items = []
        try:
            for item in plan.items if params is None else map(plan.of, params):
                grad = item.key.grad
                if grad is None:
                    continue
                if grad.layout is not torch.strided:
                    raise RuntimeError(
                        f"{grad.layout} gradient: low-precision states are dense; "
                        "build the embedding with sparse=False"
                    )
                item.grad = grad if item.shard is None else shards.rows_of(item, grad)
                items.append(item)
                if grad.dtype is not item.grad_dtype:
                    self._meet(plan, item)
                elif item.version >= 0 and item.param._version != item.version:
                    self._widen(item)
            plan.check(self.algorithm)
        except BaseException:
            self._release(items)
            raise
        new = [item for item in items if not item.state]
        for item in new:
            self._start(item)
        if new:
            plan.note_states(self, new)
        return items

    def _meet(self, plan: Plan, item: Item) -> None:
        """Looks at a parameter whose gradient comes for the first time, or in another dtype."""
        if not item.state:  # marked since the plan was made
            by_name.note_mark(item.group, item.position, item.key, needed=True)
            item.states = make_item(self, item.group, item.position, item.key, item.index).states
        item.slots, item.grad_dtype = st.layout(item.states, item.param.dtype, item.moments), item.grad.dtype
        plan.watch(item)
        covered = item.param.is_cuda and _kernels().takes(self.algorithm, item)
        item.route = plan.route(item.param.device, covered)
        held = item.state.keys()
        if held and ("master" in item.slots) != any(key.startswith("master") for key in held):
            raise RuntimeError(
                f"a Parameter of shape {tuple(item.param.shape)} is {item.param.dtype} now, its state was made for "
                "another dtype: change a model's dtype before its first step, or build a new optimizer"
            )
        if "master" in item.predicted:
            item.version = item.param._version
            if held:
                self._widen(item)
        if held and any(name not in held and f"{name}_qdata" not in held for name in item.moments):
            # SGD: momentum that was switched on later
            for key, value in st.init_state(item.param, item.states, item.moments, shard=item.shard).items():
                item.state.setdefault(key, value)

    @staticmethod
    def _widen(item: Item) -> None:
        """A Parameter that was edited wins over its master: the bound that gives the master's scale must cover it.

        Edits through `.data` raise no version: there the scale's margin, 16 times the largest weight so far, is all.
        """
        if item.param.numel():
            amax, found = item.state["master_amax"], item.param.detach().abs().amax().float()
            edited = found.isfinite() & (found > amax * 1.01)  # what is more than rounding to 16 bits
            amax.copy_(torch.where(edited, found, amax))

    def _start(self, item: Item) -> None:
        """Gives a parameter its state."""
        item.state.update(st.init_state(item.param, item.states, item.moments, shard=item.shard))
        self.state[item.key] = item.state

    def note_embeddings(self) -> None:
        """Writes marks down that were set since. To be called before FSDP2 shards: new Parameters have no marks."""
        for item in self._plan_now().items:
            if not item.state:
                by_name.note_mark(item.group, item.position, item.key)

    @staticmethod
    def _release(items: Iterable[Item]) -> None:
        for item in items:
            item.grad = None  # or the plan would keep gradients alive that `zero_grad` drops
            if item.version >= 0:
                item.version = item.param._version

    def _check_clip(self, clip: Any) -> None:
        if clip is not None and not isinstance(clip, Tensor):
            raise TypeError(f"clip: a 0-d tensor (optim.clip_factor), not a {type(clip).__name__}")

    def _count_on(self, home: torch.device) -> None:
        """Has the counters on the device where they are raised."""
        for name in ("skipped_steps", "skipped_elements"):
            if getattr(self, name).device != home:
                setattr(self, name, getattr(self, name).to(home))

    def _update(
        self, items: list[Item], clip: Tensor | None = None, look: Look | None = None, *, all_of_them: bool = False
    ) -> None:
        """One step of `items`, which hold their gradients: kernels where there are some, else the truth.

        look: the last one, where no gradient has changed since. all_of_them: these are all the parameters with a
        gradient.
        """
        plan = self._plan
        assert plan is not None
        routes = {item.route for item in items}
        home = (items or plan.sharded)[0].param.device
        self._count_on(home)
        alone = len(routes) == 1 and plan.routes[items[0].route][1] and not plan.sharded
        if not (alone and plan.fused):
            quantise(items)
            look = None if plan.wired else look
        if alone:
            self._fused_step(items, _factor(clip, home), None, look=look)
            plan.again = self._fused.again(plan.items, items) if all_of_them and plan.fused else None
            return

        plan.again = None
        split: dict[int, list[Item]] = {route: [] for route in routes}
        for item in items:
            split[item.route].append(item)
        elementwise = self.nonfinite == "element"
        amaxes = {} if elementwise else {route: _amax(part, look) for route, part in split.items()}
        flags = [algorithms.all_finite(amax).to(home) for amax in amaxes.values()]
        if clip is not None:
            flags.append(clip.detach().to(home).isfinite().all())
        finite = torch.stack(flags).all() if flags else torch.ones((), dtype=torch.bool, device=home)
        if plan.sharded and not elementwise:
            amaxes, finite = _agree(plan.sharded, split, amaxes, finite)
        for route, part in split.items():
            device, covered = plan.routes[route]
            flag, factor = finite.to(device), _factor(clip, device)
            if covered:
                self._fused_step(part, factor, flag, amaxes.get(route))
            else:
                if self._fused is not None:
                    self._fused.unknown(part)
                skipped = algorithms.step(
                    self.algorithm, part, amax=amaxes.get(route), clip=factor, finite=flag, elementwise=elementwise,
                    compile=self.compile,
                )  # fmt: skip
                self.skipped_elements += skipped.to(home)
        self.skipped_steps += finite.logical_not()

    def _fused_step(
        self, items: list[Item], clip: Tensor | None, finite: Tensor | None, amaxes: Tensor | None = None,
        look: Look | None = None,
    ) -> None:  # fmt: skip
        if self._fused is None:
            self._fused = _kernels().Fused(self)
        self._fused.step(self.algorithm, items, clip, finite, amaxes, look)

    def parameters_edited(self) -> None:
        """Says that Parameters were written in a way that torch does not count (in place through `.data`, by kernels
        of others): the next step looks at every element. Without it a few edited elements of a large tensor with a
        separate master may go unnoticed (docs/optimizers.md, Masters)."""
        self._forget()

    def note_amax(self) -> None:
        """From now on steps note what `weight_amax` gives."""
        if not self.notes_amax:
            self.notes_amax = True
            self._forget()

    def weight_amax(self, param: Tensor) -> Tensor | None:
        """Largest finite magnitude in `param` after the last step, float32 0-d: to cast it to FP8 in one pass.

        None without `note_amax`, for shards, and where no kernel has stepped `param`. The next step overwrites it.
        """
        return None if self._fused is None else self._fused.weight_amax(param)

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's, plus `skipped_steps` (and `skipped_elements` where they are counted). States keep their dtypes;
        each group names its `states`, `master`, `overrides` and `algorithm`.

        Of sharded parameters (FSDP2) it holds DTensors, which torch.distributed.checkpoint saves and reshards; float8
        and int16 as bytes, which every process group can move. All ranks call it together then.
        """
        checkpoints.before(self)
        state_dict = super().state_dict()
        state_dict["skipped_steps"] = self.skipped_steps
        if self.nonfinite == "element":
            state_dict["skipped_elements"] = self.skipped_elements
        if shards.is_sharded(self._parameters()):
            checkpoints.share(self._plan_now(), state_dict)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, bit for bit, or the states of torch's optimizer, quantised (it warns).

        Everything is checked first: ValueError says what is wrong, and nothing has changed (pre-hooks have run: what
        restores other things belongs in a post-hook). torch's own method would cast every state to its parameter's
        dtype, and would replace the group dicts that schedulers share.
        """
        checkpoints.load(self, state_dict)
        self._invalidate()

    def __getstate__(self) -> dict[str, Any]:
        # Plain pickle writes float8 tensors and cannot read them (torch 2.13, `_legacy_load`: UntypedStorage has no
        # dtype); as (bytes, dtype) they pass. torch.save of the state_dict needs none of this.
        state = {param: {k: st.to_bytes(v) for k, v in values.items()} for param, values in self.state.items()}
        own = ("nonfinite", "compile", "_patterns", "skipped_steps", "skipped_elements")
        return {**super().__getstate__(), "state": state, **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        loaded = {param: {k: st.from_bytes(v) for k, v in values.items()} for param, values in self.state.items()}
        self.state = defaultdict(dict, loaded)
        self._begin()


def _kernels() -> Any:
    from hf_lowprec.optim import fused

    return fused


def _agree(
    members: list[Item], split: dict[int, list[Item]], amaxes: dict[int, Tensor], finite: Tensor
) -> tuple[dict[int, Tensor], Tensor]:
    """The amaxes of every route, and `finite`, of all ranks."""
    known = {
        item.index: amax
        for route, part in split.items()
        for item, amax in zip(part, amaxes[route].unbind(), strict=True)
    }
    known, finite = shards.agree(members, known, finite)
    return {route: torch.stack([known[item.index] for item in part]) for route, part in split.items()}, finite


def _amax(items: list[Item], look: Look | None) -> Tensor:
    """`algorithms.gradient_amax`, or what the look found."""
    found = None if look is None else look.amax_of([item.key for item in items])
    return algorithms.gradient_amax(items) if found is None else found


def _factor(clip: Tensor | None, device: torch.device) -> Any:
    if clip is None or (clip.dim() == 0 and clip.dtype == torch.float32 and clip.device == device):
        return clip  # itself: kernels know its address
    return clip.detach().to(device, torch.float32).reshape(())


def _limit(max_norm: float | Tensor, device: torch.device) -> float | Tensor:
    """What kernels take: a number, or float32 0-d on the device, without waiting for its value."""
    if isinstance(max_norm, Tensor) and max_norm.device.type != "cpu":
        return _factor(max_norm, device)  # type: ignore[no-any-return]
    return float(max_norm)


def _check_elementwise(item: Item) -> None:
    for name, quant in item.slots.items():
        if isinstance(quant, Quant) and quant.scaling.granularity == "tensor":
            if quant.scaling.method in ("current", "predicted"):
                raise ValueError(
                    f"nonfinite='element': the scale of {name} is shared by the whole tensor, so no element can be "
                    "left alone; choose block-wise states (8bit, compact, ...), or nonfinite='step'"
                )
