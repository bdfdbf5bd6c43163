# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer in FP8: one argument more than usual.

python examples/trainer.py                                             # a tiny byte-level Llama, offline
python examples/trainer.py HuggingFaceTB/SmolLM2-135M --lowprec te-current --max_steps 100
"""

import argparse as text_module  # its source is the training text: every machine has it
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer

from hf_lowprec import LowPrecTrainingArguments

TEXT = Path(text_module.__file__).read_text(encoding="utf-8")


def tiny() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def main() -> None:
    name, rest = (sys.argv[1], sys.argv[2:]) if sys.argv[1:2] and sys.argv[1][0] != "-" else (None, sys.argv[1:])
    defaults = "--output_dir outputs/trainer --max_steps 30 --logging_steps 5 --learning_rate 1e-3 --report_to none"
    defaults += " --lowprec fp8-lm" + ("" if torch.cuda.is_available() else " --use_cpu")
    (args,) = HfArgumentParser(LowPrecTrainingArguments).parse_args_into_dataclasses(defaults.split() + rest)

    if name is None:
        model, ids = tiny(), torch.tensor(list(TEXT.encode()))
    else:
        model = AutoModelForCausalLM.from_pretrained(name)
        ids = AutoTokenizer.from_pretrained(name)(TEXT, return_tensors="pt").input_ids[0]
    rows = [{"input_ids": row, "labels": row} for row in ids[: len(ids) // 128 * 128].view(-1, 128)]

    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train()
    trainer.save_model()  # a plain checkpoint: stock transformers loads it


if __name__ == "__main__":
    main()
