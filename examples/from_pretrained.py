# SPDX-License-Identifier: Apache-2.0
"""Load a model ready to train in FP8, train it in plain PyTorch, save a plain checkpoint.

python examples/from_pretrained.py                                     # a tiny byte-level Llama, offline
python examples/from_pretrained.py HuggingFaceTB/SmolLM2-135M          # or any hub or folder name
"""

import argparse as text_module  # its source is the training text: every machine has it
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_lowprec import LowPrecConfig, high_precision
from hf_lowprec.optim import AdamW

TEXT = Path(text_module.__file__).read_text(encoding="utf-8")


def tiny(folder: str) -> str:
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def main() -> None:
    folder = tempfile.mkdtemp()
    name = sys.argv[1] if len(sys.argv) > 1 else tiny(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=LowPrecConfig("fp8-lm")).to(device)
    optimizer = AdamW(model.parameters(), lr=1e-3, states="fp8-lm")

    ids = AutoTokenizer.from_pretrained(name)(TEXT).input_ids if len(sys.argv) > 1 else list(TEXT.encode())
    batches = torch.tensor(ids[: len(ids) // 512 * 512], device=device).view(-1, 4, 128)
    for step, batch in enumerate(batches[:30]):
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")

    with torch.no_grad(), high_precision(model):
        print(f"the same weights in {model.dtype}: loss {model(batch, labels=batch).loss.item():.3f}")
    model.save_pretrained(f"{folder}/saved")
    stock = AutoModelForCausalLM.from_pretrained(f"{folder}/saved")
    print(f"saved {stock.num_parameters()} plain weights, read back as {type(stock).__name__}")


if __name__ == "__main__":
    main()
