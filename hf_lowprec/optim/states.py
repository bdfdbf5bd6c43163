# SPDX-License-Identifier: Apache-2.0
"""What an optimizer remembers of a parameter, and in which precision.

A parameter has *slots*: the moments that its algorithm keeps (`exp_avg`, `exp_avg_sq`, `momentum_buffer`) and, where
the Parameter is held in 16 bits, perhaps a `master`. `recipe.States` says what each of them is, by data alone:

    named         the states with a name, and what of them a parameter really keeps
    slots         one slot: float32 in, codes and scales out, and back
    weights       all slots of one parameter, and where its weight is
    state_dicts   checkpoints: checks, torch's own states

Between two steps nothing but codes and scales exists. `numerics.blocks`, `numerics.compand` and `numerics.residual`
hold the arithmetic. Layout, names and dtypes follow from `States`, the Parameter's dtype and the algorithm alone.
"""

from __future__ import annotations

from hf_lowprec.optim.named import NAMED, effective, resolve_states, states_name, with_master
from hf_lowprec.optim.slots import (
    hp_dtype,
    is_predicted,
    matrix,
    read,
    rounding_bound,
    select_,
    stored_amax,
    stream_seed,
    write,
)
from hf_lowprec.optim.state_dicts import check_adoptable, check_state, from_bytes, from_torch, to_bytes
from hf_lowprec.optim.weights import (
    ADAM,
    check_parameter,
    init_state,
    layout,
    on_grid,
    read_weight,
    round_result,
    state_bytes,
    write_weight,
)

__all__ = [
    "ADAM",
    "NAMED",
    "check_adoptable",
    "check_parameter",
    "check_state",
    "effective",
    "from_bytes",
    "from_torch",
    "hp_dtype",
    "init_state",
    "is_predicted",
    "layout",
    "matrix",
    "on_grid",
    "read",
    "read_weight",
    "resolve_states",
    "round_result",
    "rounding_bound",
    "select_",
    "state_bytes",
    "states_name",
    "stored_amax",
    "stream_seed",
    "to_bytes",
    "with_master",
    "write",
    "write_weight",
]
