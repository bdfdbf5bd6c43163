# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimisation with TRL on pairs whose preference can be checked.

    accelerate launch --mixed_precision fp8-lm recipes/rlhf/dpo.py recipes/rlhf/dpo.yaml

From questions with right answers: chosen is the answer, rejected the same answer with its last number changed, which
is wrong for certain. Data that already has the columns `prompt`, `chosen` and `rejected` is taken as it is.
"""

import random
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer, ModelConfig, get_peft_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sources import (
    Examples,
    InputError,
    Tokenizer,
    checkpoint_to_resume,
    corrupt,
    load_model,
    load_tokenizer,
    parse,
    prompt_of,
    read_examples,
    reply_of,
)

PAIRS = ("prompt", "chosen", "rejected")


def make_pairs(rows: list[dict[str, Any]], arguments: Examples) -> list[dict[str, Any]]:
    """Rows with PAIRS; from questions with answers the rejected reply is made here."""
    if rows and "chosen" in rows[0]:
        return [{column: row[column] for column in PAIRS} for row in rows]
    question, answer = arguments.questions
    pairs = []
    for row in rows:
        wrong = corrupt(row[answer], random.Random(row["index"]))
        if wrong is None:
            raise InputError(f"no number in the answer {row[answer]!r} to {row[question]!r}: cannot make it wrong")
        pairs.append({"prompt": row[question], "chosen": row[answer], "rejected": wrong})
    return pairs


def to_trl(pairs: list[dict[str, Any]], tokenizer: Tokenizer) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": prompt_of(tokenizer, pair["prompt"]),
                "chosen": reply_of(tokenizer, pair["chosen"]),
                "rejected": reply_of(tokenizer, pair["rejected"]),
            }
            for pair in pairs
        ]
    )


def main(argv: list[str] | None = None) -> None:
    arguments, config, model_config = parse(Examples, DPOConfig, ModelConfig, argv=argv)
    checkpoint = checkpoint_to_resume(arguments, config.output_dir)
    train_rows, eval_rows = read_examples(arguments, PAIRS, arguments.questions)
    train_pairs, eval_pairs = make_pairs(train_rows, arguments), make_pairs(eval_rows, arguments)

    tokenizer = load_tokenizer(model_config.model_name_or_path)
    source = (model_config.model_name_or_path, arguments.num_layers, model_config.dtype)
    peft_config = get_peft_config(model_config)
    trainer = DPOTrainer(
        model=load_model(*source),
        ref_model=None if peft_config else load_model(*source),  # with LoRA the base without adapters is the reference
        args=config,
        train_dataset=to_trl(train_pairs, tokenizer),
        eval_dataset=to_trl(eval_pairs, tokenizer) if eval_pairs else None,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if eval_pairs:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
