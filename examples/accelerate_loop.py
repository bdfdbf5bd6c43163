# SPDX-License-Identifier: Apache-2.0
"""A plain accelerate training loop: a small Llama learns the source text of Python's argparse, byte by byte.

    accelerate launch --mixed_precision bf16   examples/accelerate_loop.py
    accelerate launch --mixed_precision fp8-lm examples/accelerate_loop.py

The script knows nothing of low precision; the second command is all it takes.
"""

import argparse
import inspect

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM


def blocks(length: int) -> list[torch.Tensor]:
    text = torch.tensor(list(inspect.getsource(argparse).encode()), dtype=torch.long)
    return list(text[: len(text) // length * length].view(-1, length))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()

    accelerator = Accelerator()
    accelerator.print(accelerator.state)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=args.hidden, intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=args.steps)
    data = DataLoader(blocks(64), batch_size=8, shuffle=True, drop_last=True)
    model, optimizer, data, scheduler = accelerator.prepare(model, optimizer, data, scheduler)

    for step, batch in zip(range(args.steps), data, strict=False):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            accelerator.print(f"step {step:4d}  loss {accelerator.gather(loss.detach()).mean().item():.4f}")


if __name__ == "__main__":
    main()
