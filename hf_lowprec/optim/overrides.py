# SPDX-License-Identifier: Apache-2.0
"""Which parameters get other states than their group: by name, or because they are embeddings.

Names: `overrides={"lm_head": "fp32", "norm$": States(...)}`, regular expressions searched in the names that
`named_parameters()` gives; the first that matches wins. Marks: `mark_embeddings(model)` sets an attribute on the
weights of embeddings, because an optimizer sees Parameters and not the modules that hold them; states with
`embeddings=False` keep float32 moments for those.

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


def resolve(name: str, master: str | None, numel: int, *, embedding: bool = False, vector: bool = False) -> States:
    """What a parameter of `numel` elements really keeps under states `name`, with the master that was asked for."""
    return effective(with_master(resolve_states(name), master), numel, embedding, vector)


def of_parameter(
    group: Mapping[str, object], position: int, numel: int, *, marked: bool = False, vector: bool = False
) -> States:
    """Effective states of `group["params"][position]`.

    marked: it is an embedding, and the group does not know yet. vector: `shards.is_vector` of it.
    """
    names = group.get("overrides")
    assert isinstance(names, list)
    name, master = names[position], group["master"]
    assert master is None or isinstance(master, str)
    return resolve(name or str(group["states"]), master, numel, embedding=marked and name is None, vector=vector)


def with_marks(names: Sequence[str | None], group: Mapping[str, object]) -> list[str | None]:
    """A new list for `group["overrides"]`: `names`, and where they say nothing, what marks of embeddings say."""
    params, embedding = group["params"], embedding_name(group)
    assert isinstance(params, list)
    return [embedding if n is None and is_embedding(p) else n for n, p in zip(names, params, strict=True)]


def embedding_name(group: Mapping[str, object]) -> str | None:
    """The entry of `group["overrides"]` of an embedding that keeps float32 moments. None if it keeps none."""
    plain = resolve_states(str(group["states"]))
    if plain.embeddings:
        return None
    return states_name(effective(plain, plain.min_numel, True))
