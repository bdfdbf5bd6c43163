# SPDX-License-Identifier: Apache-2.0
"""The stable embedding layer of the 8-bit optimizers paper (arXiv 2110.02861, section 2.3).

Rows of an embedding are updated as often as their token occurs, so its gradients are the most uneven of a model. Three
things keep 8-bit training steady: Xavier-uniform initialisation, whose variance does not grow with the vocabulary;
a layer norm after the lookup, before positions are added, which keeps the variance of what follows near one; and
32-bit optimizer states, which the mark on the weight asks for (`optim.mark_embeddings` says what it does).

A model that was trained without the layer norm does not continue with it: this layer is for training from scratch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MARK = "_hf_lowprec_embedding"  # the attribute that optim.mark_embeddings sets; `optim` is no layer below this one


class StableEmbedding(nn.Embedding):
    """nn.Embedding with Xavier-uniform weights, a layer norm after the lookup, and 32-bit states by mark.

    Takes nn.Embedding's arguments. input: integer tensor of any shape; output: input's shape + [embedding_dim] in the
    weight's dtype; the norm is computed in float32. A sparse gradient (`sparse=True`) is refused by our optimizers.

    norm: nn.LayerNorm(embedding_dim), in the state dict as `norm.weight` and `norm.bias` (as bitsandbytes has it).
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, *args, **kwargs)
        self.norm = nn.LayerNorm(embedding_dim, device=self.weight.device, dtype=self.weight.dtype)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()

    def forward(self, input: Tensor) -> Tensor:
        looked_up = super().forward(input).float()
        weight, bias = self.norm.weight.float(), self.norm.bias.float()
        with torch.autocast(looked_up.device.type, enabled=False):
            normed = F.layer_norm(looked_up, self.norm.normalized_shape, weight, bias, self.norm.eps)
        return normed.to(self.weight.dtype)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Marks every Parameter that becomes the weight, also by `load_state_dict(assign=True)`."""
        super().register_parameter(name, param)
        if name == "weight" and param is not None:
            setattr(param, MARK, True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        setattr(self.weight, MARK, True)  # copying a Parameter drops its attributes
