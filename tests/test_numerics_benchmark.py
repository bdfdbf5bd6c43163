# SPDX-License-Identifier: Apache-2.0
"""benchmarks/bench_numerics.py: its gates stop wrong values, and its table says where the target is missed."""

from __future__ import annotations

import pytest
import torch

from hf_lowprec.numerics import round_to_format
from hf_lowprec.recipe import Rounding

pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


def test_every_contender_that_is_there_passes_its_gate() -> None:
    from numerics_peers import groups, ready

    x = torch.randn(8, 2048, generator=torch.Generator().manual_seed(0))
    for contenders in groups(x).values():
        plain = {name: c for name, c in contenders.items() if "compile" not in name and not name.startswith("qtorch")}
        functions, missing = ready(plain, x)
        assert next(iter(functions)).startswith("ours") and functions.keys().isdisjoint(missing)


def test_gates_stop_wrong_values() -> None:
    from numerics_peers import Contender, neighbours, ours, ready, same, same_but_ties

    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    off = ours(x)
    off[0, 0] *= 1.5
    for gate in (same(ours), same_but_ties("e4m3fn", 448), neighbours("e4m3fn")):
        with pytest.raises(AssertionError, match="peer"):
            ready({"peer": Contender(lambda: lambda x: off, gate)}, x)
    with pytest.raises(AssertionError, match="mean error"):  # truncation is a neighbour each, but biased
        neighbours("e4m3fn")(x, round_to_format(x, "e4m3fn", Rounding(mode="zero")))


def test_absent_peers_are_named_and_ours_are_not_excused() -> None:
    from numerics_peers import Contender, ready

    def absent():
        raise ImportError("No module named 'peer'\nmore")

    functions, missing = ready({"peer": Contender(absent)}, torch.ones(1, 32))
    assert not functions and missing == {"peer": "ImportError: No module named 'peer'"}
    with pytest.raises(ImportError):
        ready({"ours": Contender(absent)}, torch.ones(1, 32))


def test_the_table_and_what_misses_the_target() -> None:
    from bench_numerics import missed, rows

    table = {"g": rows({"ours": [1.0, 2.0, 3.0], "qtorch: x": [8.0, 8.0, 8.0], "torchao: y": [20.0] * 3}, 4_000_000)}
    assert table["g"]["qtorch: x"]["times_ours"] == 4.0 and table["g"]["ours"]["melem_per_s"] == 2.0
    assert table["g"]["ours"]["spread"] == pytest.approx(1.0)
    assert [line.split(" takes")[0] for line in missed(table)] == ["g: qtorch: x"]
