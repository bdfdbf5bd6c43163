# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of a model's repeated layers, in eager training (docs/graphs.md).

calls      what a call of a layer is, and when any call must run eagerly
snapshot   what a layer is like, and whether it is still so
record     when to capture
rehearsal  whether to capture what nobody asked to be
gauge      what that asks of a GPU
order      when a graph may be replayed, given that graphs share memory
memory     the tensors at fixed addresses
capture    CUDA graphs themselves
layer      one captured layer as a function of autograd
lists      a model's layers
"""

from hf_lowprec.graphs.capture import GraphError
from hf_lowprec.graphs.lists import LayerGraphs, graph_layers, ungraph_layers

__all__ = ["GraphError", "LayerGraphs", "graph_layers", "ungraph_layers"]
