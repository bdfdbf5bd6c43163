# SPDX-License-Identifier: Apache-2.0
"""The optimizers alone, in plain PyTorch: 8-bit states for a bfloat16 model, saved, and resumed bit for bit.

python examples/optimizer_8bit.py --states compact          # or 8bit, 4bit, fp8, fp8-lm, fp32: docs/optimizers.md
"""

import argparse
import io
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowprec import optim

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")  # every machine has it
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(states: str) -> tuple[LlamaForCausalLM, optim.AdamW]:
    torch.manual_seed(0)
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).to(DEVICE, torch.bfloat16)
    optim.mark_embeddings(model)  # 8bit and 4bit keep 32-bit states for them; the Trainer and `convert` do it for you
    return model, optim.AdamW(model.parameters(), lr=3e-3, states=states)


def train(model: LlamaForCausalLM, optimizer: optim.AdamW, first: int, last: int) -> float:
    ids = torch.tensor(list(TEXT.encode()), device=DEVICE)
    rows = ids[: len(ids) // 128 * 128].view(-1, 128)
    for step in range(first, last):
        batch = rows[step * 8 % (len(rows) - 8) :][:8]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        factor, _ = optim.clip_factor(model.parameters(), 1.0)  # clipping without a pass over the gradients
        optimizer.step(clip=factor)
        optimizer.zero_grad()
        if step % 10 == 0 or step == last - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}")
    return loss.item()


parser = argparse.ArgumentParser()
parser.add_argument("--states", default="8bit")
parser.add_argument("--steps", type=int, default=40)
args = parser.parse_args()

model, optimizer = build(args.states)
train(model, optimizer, 0, args.steps // 2)
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer := io.BytesIO())
final = train(model, optimizer, args.steps // 2, args.steps)
size = sum(optimizer.state_bytes().values()) / sum(p.numel() for p in model.parameters())
print(f"states {args.states}: {size:.2f} bytes per parameter (small tensors and embeddings included); float32: 8")

model, optimizer = build(args.states)
saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
model.load_state_dict(saved["model"])
optimizer.load_state_dict(saved["optimizer"])
assert train(model, optimizer, args.steps // 2, args.steps) == final, "resuming is bit-identical"
