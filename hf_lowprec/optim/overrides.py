# SPDX-License-Identifier: Apache-2.0
"""Which parameters get other states than their group: by name, or because they are embeddings.

Names: `overrides={"lm_head": "fp32", "norm$": States(...)}`, regular expressions searched in the names that
`named_parameters()` gives; the first that matches wins. Marks: `mark_embeddings(model)` sets an attribute on the
weights of embeddings, because an optimizer sees Parameters and not the modules that hold them; states with
`embeddings=False` keep float32 moments for those. `convert` marks all Parameters, by `mark_gemm_weights`, for states
with a format of the weights themselves (`States.weight`): who takes no part in a quantised GEMM does not get it.

Attributes of a Parameter do not survive copies, pickles or sharding. So both end up as one plain list in the group:
`group["overrides"][i]` is the name of the states of `group["params"][i]`, or None for those of the group.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from hf_lowprec.optim.states import effective, resolve_states, states_name, with_master
from hf_lowprec.recipe import States

_EMBEDDING = "_hf_lowprec_embedding"  # on a Parameter: it is an embedding's weight
_GEMM = "_hf_lowprec_gemm"  # on a Parameter: whether it is a weight that a recipe's GEMMs quantise

Patterns = tuple[tuple[str, str], ...]  # (regular expression, states name)


def mark_embeddings(model: nn.Module) -> int:
    """Marks the weight of every nn.Embedding (and subclass) in `model`, tied output heads with it; returns how many.

    States with `embeddings=False` (`8bit`, `4bit`) then keep float32 moments for them: rows of rare tokens see few
    gradients, and 8-bit optimizers (arXiv 2110.02861, section 2.3) found them to be where runs become unstable.
    """
    weights = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    for weight in weights.values():
        setattr(weight, _EMBEDDING, True)
    return len(weights)


def is_embedding(param: Tensor) -> bool:
    """Whether `mark_embeddings` marked `param`."""
    return bool(getattr(param, _EMBEDDING, False))


def mark_gemm_weights(model: nn.Module, weights: Iterable[Tensor]) -> None:
    """Marks every Parameter of `model`: whether it is one of `weights`, those of quantised GEMMs."""
    those = {id(weight) for weight in weights}
    for param in model.parameters():
        setattr(param, _GEMM, id(param) in those)


def is_gemm_weight(param: Tensor) -> bool | None:
    """What `mark_gemm_weights` said; None: nothing."""
    found: bool | None = getattr(param, _GEMM, None)
    return found


def parse(overrides: Mapping[str, str | States] | None) -> Patterns:
    """The constructor's argument as plain data. Raises ValueError: no regular expression, unknown states."""
    out = []
    for pattern, states in (overrides or {}).items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"overrides: {pattern!r} is no regular expression: {error}") from None
        out.append((pattern, states_name(states)))
    return tuple(out)


def match(patterns: Patterns, names: Sequence[str] | None, count: int) -> list[str | None]:
    """The states name of each of `count` parameters, None where no pattern matches.

    Raises ValueError: patterns without names to search.
    """
    if not patterns:
        return [None] * count
    if names is None:
        raise ValueError("overrides search the parameters' names: build the optimizer from model.named_parameters()")
    return [next((states for pattern, states in patterns if re.search(pattern, name)), None) for name in names]


def check_used(patterns: Patterns, names: Iterable[str]) -> None:
    """Raises ValueError for a pattern that occurs in no name, with the nearest ones."""
    names = list(names)
    for pattern, _ in patterns:
        if not any(re.search(pattern, name) for name in names):
            words = sorted({part for name in names for part in (name, *name.split("."))})
            near = difflib.get_close_matches(pattern, words, n=3, cutoff=0.5) or names[:3]
            raise ValueError(f"overrides: {pattern!r} occurs in no parameter's name; there are {', '.join(near)}")


def resolve(
    name: str, master: str | None, numel: int, *, embedding: bool = False, vector: bool = False, gemm: bool = True
) -> States:
    """What a parameter of `numel` elements really keeps under states `name`, with the master that was asked for."""
    return effective(with_master(resolve_states(name), master), numel, embedding, vector, gemm)


def of_parameter(
    group: Mapping[str, object],
    position: int,
    numel: int,
    *,
    marked: bool = False,
    vector: bool = False,
    gemm: bool = False,
) -> States:
    """Effective states of `group["params"][position]`.

    marked, gemm: it is an embedding, or a weight of a quantised GEMM, and the group does not know yet.
    vector: `shards.is_vector` of it.
    """
    names = group.get("overrides")
    assert isinstance(names, list)
    name, master = names[position], group["master"]
    assert master is None or isinstance(master, str)
    if name is not None:
        return resolve(name, master, numel, vector=vector)
    return resolve(str(group["states"]), master, numel, embedding=marked, vector=vector, gemm=gemm)


def with_marks(names: Sequence[str | None], group: Mapping[str, object]) -> list[str | None]:
    """A new list for `group["overrides"]`: `names`, and where they say nothing, what marks say."""
    params = group["params"]
    assert isinstance(params, list)
    return [_marked_name(group, p) if n is None else n for n, p in zip(names, params, strict=True)]


def note_mark(group: dict[str, object], position: int, param: Tensor, *, needed: bool = False) -> None:
    """Writes down in `group["overrides"]` what would otherwise be lost with an attribute of the Parameter.

    needed: raises ValueError if nobody has said whether `param` has `States.weight`, and somebody has to.
    """
    names = group["overrides"]
    assert isinstance(names, list)
    if names[position] is not None:
        return
    if (name := _marked_name(group, param)) is not None:  # marked since
        group["overrides"] = [*names[:position], name, *names[position + 1 :]]  # older state dicts share the old one
    elif needed:
        check_marked(group, names, position)


def check_marked(group: Mapping[str, object], names: Sequence[str | None], position: int) -> None:
    """Raises ValueError where states have a format of GEMMs' weights, and nobody has said which those are."""
    if names[position] is None and resolve_states(str(group["states"])).weight is not None:
        raise ValueError(
            f"states {group['states']}: they are about the weights of quantised GEMMs, and an optimizer cannot know "
            "which Parameters are: call hf_lowprec.convert(model, ...) before the first step (and after it, if PEFT "
            "or others have added Parameters: hf_lowprec.attach_optimizer(model, optimizer)), or name them by "
            "overrides="
        )


def _marked_name(group: Mapping[str, object], param: Tensor) -> str | None:
    """The entry of `group["overrides"]` that the marks of `param` ask for; None if they ask for nothing."""
    if is_embedding(param) and (name := embedding_name(group)) is not None:
        return name
    gemm, states = is_gemm_weight(param), resolve_states(str(group["states"]))
    if states.weight is None or gemm is None:
        return None
    return states_name(effective(states, states.min_numel, gemm=gemm))


def embedding_name(group: Mapping[str, object]) -> str | None:
    """The entry of `group["overrides"]` of an embedding that keeps float32 moments. None if it keeps none."""
    plain = resolve_states(str(group["states"]))
    if plain.embeddings:
        return None
    return states_name(effective(plain, plain.min_numel, True, gemm=False))


def names_of_marks(group: Mapping[str, object]) -> set[str | None]:
    """Every entry that marks may have made."""
    states = resolve_states(str(group["states"]))
    kinds = (states_name(effective(states, states.min_numel, gemm=gemm)) for gemm in (True, False))
    return {None, embedding_name(group), *(kinds if states.weight is not None else ())}
