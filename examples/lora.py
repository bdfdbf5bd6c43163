# SPDX-License-Identifier: Apache-2.0
"""LoRA on an FP8 base: the frozen weights are quantised, the adapters are not; the merged model is a plain one.

python examples/lora.py                                                # a tiny byte-level Llama, offline
python examples/lora.py HuggingFaceTB/SmolLM2-135M                     # or any hub or folder name
"""

import argparse as text_module  # its source is the training text: every machine has it
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer

from hf_lowprec import LowPrecTrainingArguments

TEXT = Path(text_module.__file__).read_text(encoding="utf-8")


def tiny() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def main() -> None:
    if len(sys.argv) > 1:
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        ids = AutoTokenizer.from_pretrained(sys.argv[1])(TEXT, return_tensors="pt").input_ids[0]
    else:
        model, ids = tiny(), torch.tensor(list(TEXT.encode()))
    rows = [{"input_ids": row, "labels": row} for row in ids[: len(ids) // 128 * 128].view(-1, 128)]

    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    args = LowPrecTrainingArguments(
        "outputs/lora", lowprec="fp8-lm", max_steps=30, logging_steps=5, learning_rate=1e-2, report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    Trainer(model, args, train_dataset=rows).train()

    merged = model.merge_and_unload()
    print("merged:", merged.generate(ids[None, :8].to(merged.device), max_new_tokens=8, do_sample=False)[0].tolist())
    merged.save_pretrained("outputs/lora/merged")  # stock transformers loads it


if __name__ == "__main__":
    main()
