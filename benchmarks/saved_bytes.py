# SPDX-License-Identifier: Apache-2.0
"""What one Llama block keeps for backward, by saved-tensor hooks, in units of U = tokens x hidden x 2 bytes.

    python benchmarks/saved_bytes.py                 8B widths on the CPU (a minute, 3 GiB), JSON to results/
    python benchmarks/saved_bytes.py --width 1024 --cases fp8-lm@bf16 bf16@bf16

The accounting of COAT (arXiv 2410.19313, table 2): activations of one block; every memory counts once, however many
autograd nodes refer to it; weights, their low-precision copies and the rotary tables of the whole model do not count.
The number of tokens plays no part (beyond padding to 16). The CPU keeps what a GPU keeps: the same autograd functions
run, norms through their plain-torch truth; attention is torch's flash kernel for the CPU, which keeps q, k, v, its
output and one float32 number per row and head, as flash and cuDNN on a GPU do.

Cases are name@dtype of the weights; bf16 is stock transformers under bf16 autocast; `+saved=bf16` is the recipe with
gate and up kept as they are instead of in its `saved` format, `+remade` the recipe with `saved_inputs: remade`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from environment import environment
from harness import BASELINE, RESULTS, parse_recipe, write_results

CASES = (
    "bf16@bf16", "bf16", "te-current@bf16", "te-current+remade@bf16", "fp8-lm+saved=bf16@bf16",
    "fp8-lm+saved=bf16+remade@bf16", "fp8-lm@bf16", "fp8-lm+remade@bf16", "fp8-lm", "fp8-lm+remade",
)  # fmt: skip
TOKENS = 64


def build(width: int, dtype: Any) -> Any:
    """One block with Llama-8B's proportions: FFN 3.5 x, heads of 128, a quarter as many for keys and values."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    heads = max(4, width // 128)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=7 * width // 2, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=heads // 4, vocab_size=16, max_position_embeddings=TOKENS, use_cache=False,
        attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaModel(config).to(dtype).train()


def convert(model: Any, recipe: Any) -> None:
    import hf_lowprec
    from hf_lowprec.fusion import fused_states

    hf_lowprec.convert(model, recipe)
    for state in fused_states(model):
        if hasattr(state, "emulate"):
            state.emulate = True  # norms: as on a GPU, not their own forward


def formula(ffn: float, kv: float, head: int, stream: int, hidden: float, remade: bool = False) -> float:
    """What a recipe's block keeps, in U. ffn: FFN / hidden; kv: key-value heads / heads; head: elements of a head;
    stream: bytes of the residual stream's elements; hidden: bytes of gate's and up's as they are kept; remade: no
    linear keeps its input."""
    norms = 2 * stream / 2  # their inputs
    inputs = 0 if remade else 3 * 1 / 2 + ffn / 2  # of q/k/v, o, gate/up and down, one byte each
    attention = 2 + 2 * kv + 4 / (2 * head)  # q, output, k, v, and a float32 per row and head
    return norms + inputs + attention + 2 * ffn * hidden / 2


class Saved:
    """The memory that a block's autograd nodes keep. Use once, as hooks of the block."""

    def __init__(self, block: Any) -> None:
        self.found: dict[int, tuple[Any, str]] = {}
        self._excluded = {p.untyped_storage().data_ptr() for p in block.parameters()}
        shapes = [tuple(p.shape) for p in block.parameters() if p.dim() == 2]
        self._copies = {*shapes, *(shape[::-1] for shape in shapes)}  # of weights: no activation has such a shape
        block.register_forward_pre_hook(self._enter, with_kwargs=True)
        block.register_forward_hook(self._leave)

    def _enter(self, block: Any, args: Any, kwargs: dict[str, Any]) -> None:
        import torch

        tables = kwargs.get("position_embeddings") or ()
        self._excluded |= {table.untyped_storage().data_ptr() for table in tables}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()

    def _leave(self, *_: Any) -> None:
        self._hooks.__exit__(None, None, None)

    def _pack(self, tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if tuple(tensor.shape) in self._copies:
            return tensor
        if storage.data_ptr() not in self._excluded and storage.data_ptr() not in self.found:
            name = f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape)) or 'scalar'}"
            self.found[storage.data_ptr()] = storage, name  # held, so that no other memory gets this address
        return tensor


def measure(case: str, width: int) -> dict[str, Any]:
    """U in all, and of every tensor in the order in which they are kept."""
    import torch

    from hf_lowprec.presets import get_recipe

    name, dtype = parse_recipe(case)
    name, *options = name.split("+")
    if not set(options) <= {"saved=bf16", "remade"}:
        raise ValueError(f"{case!r}: options are saved=bf16 and remade")
    model = build(width, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    if name != BASELINE:
        changes: dict[str, Any] = {"saved": None} if "saved=bf16" in options else {}
        changes |= {"saved_inputs": "remade"} if "remade" in options else {}
        convert(model, replace(get_recipe(name), **changes))
    block = model.layers[0]
    kept = Saved(block)
    x = torch.randn(1, TOKENS, width, dtype=next(model.parameters()).dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(inputs_embeds=x).last_hidden_state
    unit = TOKENS * width * 2
    tensors = [[name, round(storage.nbytes() / unit, 4)] for storage, name in kept.found.values()]
    total = sum(storage.nbytes() for storage, _ in kept.found.values()) / unit
    out.float().sum().backward()  # what was kept is enough
    assert all(p.grad is not None for p in block.parameters())
    return {"case": case, "width": width, "total_u": round(total, 3), "tensors": tensors}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=RESULTS / "saved_bytes.json")
    args = parser.parse_args()
    here = environment()
    cases = []
    for name in args.cases:
        case = measure(name, args.width)
        cases.append({**case, "environment": here})
        print(
            f"{name:>24}: {case['total_u']:6.2f} U  " + ", ".join(f"{n} {u}" for n, u in case["tensors"]), flush=True
        )
    write_results(args.out, {"benchmark": "saved_bytes", "unit": "tokens x hidden x 2 bytes", "cases": cases})
    return 0


if __name__ == "__main__":
    sys.exit(main())
