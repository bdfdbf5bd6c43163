# SPDX-License-Identifier: Apache-2.0
"""What a recipe brings besides low-precision linears, and how each of it is switched.

| | argument of LowPrec...Arguments | of LowPrecConfig | environment | default |
|---|---|---|---|---|
| norms, GLUs, rotary embeddings, shared inputs (`convert(fuse=)`) | lowprec_fuse | fuse | HF_LOWPREC_FUSE | on |
| a look at sdpa's backend (integrations/attention.py) | lowprec_attention | attention | HF_LOWPREC_ATTENTION | on |
| output embedding and loss in one (integrations/loss.py) | lowprec_liger | liger | HF_LOWPREC_LIGER | off |
| CUDA graphs of the layers (`hf_lowprec.graph_layers`) | lowprec_graphs | graphs | HF_LOWPREC_GRAPHS | auto |

An argument that is None leaves the word to the environment, where 0 is off, 1 is on, and another
value an error. `auto`: where the GPU waits for the host (graphs/rehearsal.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from hf_lowprec.conversion import recipe_of, report_of, session_of
from hf_lowprec.flags import read_automatic, read_switch
from hf_lowprec.graphs import GraphError, LayerGraphs, graph_layers, ungraph_layers

ATTENTION_ENV, LIGER_ENV = "HF_LOWPREC_ATTENTION", "HF_LOWPREC_LIGER"
GRAPHS_ENV = "HF_LOWPREC_GRAPHS"
SWITCHES = "_hf_lowprec_switches"  # on an Accelerator: what its Trainer's arguments said; on a model: LowPrecConfig's
_SHARDING = ("FSDP", "DEEPSPEED")  # the output embedding's weight is whole during its own forward only
_BASES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Switches(NamedTuple):
    """None: not said."""

    fuse: bool | None = None
    attention: bool | None = None
    liger: bool | None = None
    graphs: bool | None = None

    def over(self, other: Switches) -> Switches:
        """This, and where it says nothing, the other."""
        return Switches(*(mine if mine is not None else theirs for mine, theirs in zip(self, other, strict=True)))


def settle(model: nn.Module, switches: Switches, device: torch.device, engine: str = "NO") -> None:
    """Switch on around a converted model what is to be on, and put it into its report. Idempotent.

    device: where the model will run; it may still be on the CPU. engine: accelerate's DistributedType. Raises
    ImportError where liger-kernel is asked for and missing, ValueError where the model has no loss to fuse, GraphError
    where graphs are asked for and there is no CUDA device, or no layers that they could be of.
    """
    session, report, recipe = session_of(model), report_of(model), recipe_of(model)
    if session is None or report is None or recipe is None:
        return
    wants_attention = read_switch(ATTENTION_ENV, True) if switches.attention is None else switches.attention
    wants_liger = read_switch(LIGER_ENV, False) if switches.liger is None else switches.liger
    wants_graphs = read_automatic(GRAPHS_ENV) if switches.graphs is None else switches.graphs
    if wants_attention and report.attention is None and device.type == "cuda":
        from hf_lowprec.integrations import attention

        root = session.root
        report.attention = attention.watch(root, device, _BASES.get(recipe.base, torch.bfloat16))
        session.on_end(lambda: attention.unwatch(root))
    if wants_liger and report.loss is None and engine in _SHARDING:
        report.loss = f"stock ({LIGER_ENV} has no effect under {engine})"
    elif wants_liger and report.loss is None:
        from hf_lowprec.integrations import loss

        root = session.root
        report.loss = loss.fuse_loss(root)
        session.on_end(lambda: loss.unfuse_loss(root))
    asked = isinstance(report.graphs, LayerGraphs) and not report.graphs.automatic
    if wants_graphs is None and report.graphs is None and device.type == "cuda" and engine not in _SHARDING:
        try:
            graph_layers(session.root, when="waiting")  # writes itself into the report
        except GraphError as error:
            report.graphs = f"none ({error})"
    elif wants_graphs is False and isinstance(report.graphs, LayerGraphs) and report.graphs.automatic:
        ungraph_layers(session.root)
    elif wants_graphs and not asked:
        if engine in _SHARDING:
            report.graphs = f"none ({GRAPHS_ENV} has no effect under {engine})"
        elif device.type == "cuda":
            graph_layers(session.root)  # writes itself into the report
        elif torch.cuda.is_available():
            report.graphs = f"none (on the {device.type.upper()})"
        else:
            raise GraphError("graphs of layers need a CUDA device, and torch.cuda.is_available() is False")
