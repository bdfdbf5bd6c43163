# SPDX-License-Identifier: Apache-2.0
"""Group relative policy optimisation with TRL and a reward that is checked, not learned.

    accelerate launch --mixed_precision fp8-lm recipes/rlhf/grpo.py recipes/rlhf/grpo.yaml

The reward of a reply is what reasoning-gym's verifier says; for other data it is 1 if the reply's last number is the
answer's. Replies come from transformers' `generate`.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sources import (
    Examples,
    InputError,
    ReasoningGym,
    Tokenizer,
    checkpoint_to_resume,
    last_number,
    load_model,
    load_tokenizer,
    parse,
    prompt_of,
    read_examples,
)


def to_trl(rows: list[dict[str, Any]], arguments: Examples, tokenizer: Tokenizer) -> Dataset:
    question, answer = arguments.questions
    return Dataset.from_list(
        [{"prompt": prompt_of(tokenizer, row[question]), "answer": row[answer], "index": row["index"]} for row in rows]
    )


def text_of(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def make_reward(arguments: Examples) -> Callable[..., list[float]]:
    """The reward function for TRL: one number from 0 to 1 for each completion."""
    if arguments.dataset_name == "reasoning-gym":
        gym = ReasoningGym(arguments, arguments.train_size + arguments.eval_size)

        def verified(completions: list[Any], index: list[int], **_: Any) -> list[float]:
            return [gym.score(text_of(reply), row) for reply, row in zip(completions, index, strict=True)]

        return verified

    def same_number(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
        replies = (last_number(text_of(completion)) for completion in completions)
        return [float(reply == last_number(right)) for reply, right in zip(replies, answer, strict=True)]

    return same_number


def check(rows: list[dict[str, Any]], arguments: Examples) -> None:
    if arguments.dataset_name != "reasoning-gym":
        question, answer = arguments.questions
        for row in rows:
            if last_number(row[answer]) is None:
                raise InputError(f"no number in the answer {row[answer]!r} to {row[question]!r}: cannot be checked")


def main(argv: list[str] | None = None) -> None:
    arguments, config, model_config = parse(Examples, GRPOConfig, ModelConfig, argv=argv)
    checkpoint = checkpoint_to_resume(arguments, config.output_dir)
    train_rows, eval_rows = read_examples(arguments, arguments.questions)
    check(train_rows + eval_rows, arguments)
    tokenizer = load_tokenizer(model_config.model_name_or_path)
    trainer = GRPOTrainer(
        model=load_model(model_config.model_name_or_path, arguments.num_layers, model_config.dtype),
        reward_funcs=make_reward(arguments),
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
