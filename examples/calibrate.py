# SPDX-License-Identifier: Apache-2.0
"""Post-training quantisation of a language model: 8 bits by calibration, MXFP4 weights by error diffusion, offline.

python examples/calibrate.py                                  # a tiny byte-level Llama, trained here first
python examples/calibrate.py HuggingFaceTB/SmolLM2-135M       # or any hub or folder name
"""

import argparse  # its source is the text: every machine has it
import copy
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import hf_lowprec
from hf_lowprec import ptq
from hf_lowprec.recipe import Quant, Scaling

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")
MXFP4 = Quant(format="e2m1", scaling=Scaling(granularity="block", block=(32,), snap="ocp", store="e8m0"))


def trained(rows: torch.Tensor) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).to(rows.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        batch = rows[step * 8 % (len(rows) - 8) :][:8]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = sys.argv[1] if len(sys.argv) > 1 else None
    ids = AutoTokenizer.from_pretrained(name)(TEXT).input_ids if name else list(TEXT.encode())
    rows = torch.tensor(ids[: len(ids) // 128 * 128], device=device).view(-1, 128)
    model = AutoModelForCausalLM.from_pretrained(name).to(device) if name else trained(rows)
    data, held_out = rows[:32].split(8), rows[-32:]

    def loss(some: torch.nn.Module) -> float:
        return some(held_out, labels=held_out).loss.item()

    print(f"as it is                        loss {loss(model):.4f}")
    for estimator in ("output", "minmax"):
        report = hf_lowprec.calibrate(some := copy.deepcopy(model), data, estimator=estimator)
        print(f"fp8-flex, ranges by {estimator:11s} loss {loss(some):.4f}   {report.calibration}")
    errors = ptq.gpfq_model(some := copy.deepcopy(model), data, MXFP4)
    print(f"MXFP4 weights, error diffusion  loss {loss(some):.4f}")
    for weight in (model.get_submodule(layer).weight for layer in errors):
        weight.data.copy_(ptq.nearest(weight, MXFP4))
    print(f"MXFP4 weights, nearest          loss {loss(model):.4f}")


if __name__ == "__main__":
    main()
