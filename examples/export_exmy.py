# SPDX-License-Identifier: Apache-2.0
"""Train in eXmY with moments of as many bits, then write the weights at 5 bits each and read them back.

python examples/export_exmy.py                    # a tiny byte-level Llama, offline
python examples/export_exmy.py exmy:e4m2/row      # another format
"""

import argparse as text_module  # its source is the training text: every machine has it
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_lowprec
from hf_lowprec.optim import AdamW
from hf_lowprec.recipe import Quant, Rounding, Scaling, States

BLOCKS = Scaling(granularity="block", block=(32,), snap="rceil", store="e8m0")
SR = Rounding(mode="stochastic")
FIVE_BITS = States(
    exp_avg=Quant(format="e2m2", scaling=BLOCKS, rounding=SR),
    exp_avg_sq=Quant(format="e4m1u", scaling=BLOCKS, rounding=SR, nonzero=True),
)


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "exmy:e3m1/row"
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    )
    print(hf_lowprec.convert(model, name).summary())
    optimizer = AdamW(model.parameters(), lr=1e-3, states=FIVE_BITS)
    ids = list(Path(text_module.__file__).read_bytes())
    batches = torch.tensor(ids[: len(ids) // 512 * 512]).view(-1, 4, 128)
    for step, batch in enumerate(batches[:30]):
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    print(f"states: {held / model.num_parameters():.2f} bytes per parameter instead of 8")

    with tempfile.TemporaryDirectory() as folder:
        print(hf_lowprec.export_pretrained(model, folder, format=name))
        stock = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        hf_lowprec.load_exported(stock, folder)
    with torch.no_grad():
        losses = [m(batch, labels=batch).loss.item() for m in (model, stock)]
    print(f"loss {losses[0]:.3f} by the recipe, {losses[1]:.3f} of the stock model with the exported weights")


if __name__ == "__main__":
    main()
