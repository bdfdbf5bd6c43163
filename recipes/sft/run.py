# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning with TRL, of all weights or of LoRA adapters.

    accelerate launch --mixed_precision fp8-lm recipes/sft/run.py recipes/sft/smollm2.yaml

Examples are questions with answers, of which only the answer is trained, or conversations (a column `messages`).
"""

import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sources import (
    Examples,
    Tokenizer,
    checkpoint_to_resume,
    load_model,
    load_tokenizer,
    parse,
    prompt_of,
    read_examples,
    reply_of,
)


def to_trl(rows: list[dict[str, Any]], arguments: Examples, tokenizer: Tokenizer) -> Dataset:
    if rows and "messages" in rows[0]:
        return Dataset.from_list([{"messages": row["messages"]} for row in rows])
    question, answer = arguments.questions
    return Dataset.from_list(
        [
            {"prompt": prompt_of(tokenizer, row[question]), "completion": reply_of(tokenizer, row[answer])}
            for row in rows
        ]
    )


def main(argv: list[str] | None = None) -> None:
    arguments, config, model_config = parse(Examples, SFTConfig, ModelConfig, argv=argv)
    checkpoint = checkpoint_to_resume(arguments, config.output_dir)
    train_rows, eval_rows = read_examples(arguments, ("messages",), arguments.questions)
    tokenizer = load_tokenizer(model_config.model_name_or_path)
    trainer = SFTTrainer(
        model=load_model(model_config.model_name_or_path, arguments.num_layers, model_config.dtype),
        args=config,
        train_dataset=to_trl(train_rows, arguments, tokenizer),
        eval_dataset=to_trl(eval_rows, arguments, tokenizer) if eval_rows else None,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_config),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if eval_rows:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
