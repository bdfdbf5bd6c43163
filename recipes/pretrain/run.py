# SPDX-License-Identifier: Apache-2.0
"""Train a small Llama from scratch on text: a plain accelerate loop.

    accelerate launch --mixed_precision fp8-lm recipes/pretrain/run.py recipes/pretrain/llama-1m.yaml

Writes to `output_dir`: the model and its tokenizer (`AutoModelForCausalLM.from_pretrained` loads them),
`metrics.jsonl`, `summary.json` and the folders `checkpoint-N`, from the newest of which `--resume` goes on.

The data order depends on the seed alone, so runs that differ in precision see the same batches.
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_scheduler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sources import InputError, parse, read_texts

END = "<|endoftext|>"


@dataclass
class Settings:
    """All settings of a run; the yaml file beside this script and the command line fill them in."""

    output_dir: str
    text: str = "python"  # "python", a folder, a file, or a hub dataset (see recipes/sources.py)
    dataset_config: str | None = None
    dataset_split: str = "train"
    text_column: str = "text"
    max_characters: int = 8_000_000
    tokenizer: str | None = None  # folder or hub name; None trains a byte-level BPE on the text
    vocab_size: int = 2048
    sequence_length: int = 128
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    steps: int = 200
    batch_size: int = 32  # sequences a step and process
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup_steps: int = 20
    max_grad_norm: float = 1.0
    seed: int = 1
    eval_every: int = 50
    eval_sequences: int = 256
    log_every: int = 10
    save_every: int = 0  # 0: only the final model
    resume: bool = False


class Windows(Dataset[torch.Tensor]):
    """Windows of `length` tokens cut from one stream. The seed alone fixes their order; without one they are spread
    evenly over the stream."""

    def __init__(self, tokens: torch.Tensor, length: int, size: int, seed: int | None) -> None:
        self.windows = tokens[: len(tokens) // length * length].view(-1, length)
        if seed is None:
            self.order = torch.linspace(0, len(self.windows) - 1, min(size, len(self.windows))).long()
        else:
            epochs = math.ceil(size / len(self.windows))
            seeds = [torch.Generator().manual_seed(seed * 1_000 + epoch) for epoch in range(epochs)]
            self.order = torch.cat([torch.randperm(len(self.windows), generator=seed) for seed in seeds])[:size]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.windows[self.order[index]]


def load_tokenizer(settings: Settings, texts: list[str]) -> PreTrainedTokenizerFast:
    if settings.tokenizer:
        return AutoTokenizer.from_pretrained(settings.tokenizer)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def load_data(
    settings: Settings, texts: list[str], tokenizer: PreTrainedTokenizerFast, world: int
) -> tuple[Windows, Windows]:
    """(training windows, held-out windows). What is held out does not depend on the seed."""
    if len(texts) >= 20:
        train_texts = [text for index, text in enumerate(texts) if index % 20]
        valid_texts = texts[::20]
    else:  # a few long files: hold out the end of each
        train_texts = [text[: int(0.95 * len(text))] for text in texts]
        valid_texts = [text[int(0.95 * len(text)) :] for text in texts]

    def stream(documents: list[str]) -> torch.Tensor:
        encoded = tokenizer(documents, add_special_tokens=False)["input_ids"]
        return torch.tensor([token for ids in encoded for token in (*ids, tokenizer.eos_token_id)])

    train, valid = stream(train_texts), stream(valid_texts)
    if min(len(train), len(valid)) < settings.sequence_length:
        raise InputError(
            f"too little text: {len(train):,} tokens to train on and {len(valid):,} held out, "
            f"but one window takes {settings.sequence_length}"
        )
    return (
        Windows(train, settings.sequence_length, settings.steps * settings.batch_size * world, settings.seed),
        Windows(valid, settings.sequence_length, settings.eval_sequences, None),
    )


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 16) * 16,  # tensor cores want multiples of 16
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        max_position_embeddings=settings.sequence_length,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def nbytes(value: Any) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(nbytes, value.values()))
    return sum(map(nbytes, value)) if isinstance(value, list | tuple) else 0


def bytes_per_parameter(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What one parameter costs at the end of a step, measured on the tensors that are there."""
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    return {
        "weights": nbytes(parameters) / count,
        "gradients": nbytes([parameter.grad for parameter in parameters]) / count,
        "optimizer": nbytes(dict(optimizer.state)) / count,
    }


class Log:
    """`metrics.jsonl`: one line a measurement. A resumed run drops the lines that it is about to write again."""

    def __init__(self, path: Path, step: int, active: bool) -> None:
        self.path, self.active = path, active
        if active:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.rows = [json.loads(line) for line in path.read_text().splitlines()] if step else []
            self.rows = [row for row in self.rows if row["step"] <= step]
            path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, **row: float) -> None:
        if self.active:
            self.rows.append(row)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def newest_checkpoint(output: Path) -> Path:
    found = list(output.glob("checkpoint-*[0-9]"))
    if not found:
        raise InputError(f"--resume: no checkpoint in {output}; train with --save_every N first")
    return max(found, key=step_of)


def save_checkpoint(accelerator: Accelerator, path: Path) -> None:
    """Complete or absent: a run killed while saving leaves `.partial`, which --resume does not take."""
    partial = path.with_suffix(".partial")
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        partial.rename(path)


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: torch.nn.Module, batches: DataLoader[torch.Tensor]) -> float:
    model.eval()
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        losses.append(accelerator.gather_for_metrics(loss.repeat(len(ids))))
    model.train()
    return torch.cat(losses).mean().item()


def train(
    accelerator: Accelerator,
    settings: Settings,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    train_batches: DataLoader[torch.Tensor],
    valid_batches: DataLoader[torch.Tensor],
    done: int,
) -> dict[str, Any]:
    """Train from step `done` to `settings.steps`; the returned summary also goes to summary.json."""
    output, first = Path(settings.output_dir), accelerator.is_main_process
    log = Log(output / "metrics.jsonl", done, first)
    tokens_per_step = settings.batch_size * settings.sequence_length * accelerator.num_processes
    memory, eval_loss, speeds = {}, math.nan, []
    started, since, total = time.perf_counter(), done, torch.zeros((), device=accelerator.device)
    bar = tqdm(total=settings.steps, initial=done, disable=not first, mininterval=1, desc=output.name)
    for step, ids in enumerate(train_batches, done + 1):
        last = step == settings.steps
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        if last:
            memory = bytes_per_parameter(model, optimizer)
        optimizer.zero_grad()
        bar.update()
        total += loss.detach()
        if step % settings.log_every == 0 or last:
            value = accelerator.gather(total).mean().item() / (step - since)
            speeds.append((step - since) * tokens_per_step / (time.perf_counter() - started))
            log.write(step=step, loss=value, learning_rate=schedule.get_last_lr()[0], tokens_per_second=speeds[-1])
            bar.set_postfix_str(f"loss {value:.3f}, {speeds[-1]:,.0f} tokens/s")
            started, since, total = time.perf_counter(), step, torch.zeros_like(total)
        paused = time.perf_counter()
        if step % settings.eval_every == 0 or last:
            eval_loss = evaluate(accelerator, model, valid_batches)
            log.write(step=step, eval_loss=eval_loss)
        if settings.save_every and step % settings.save_every == 0:
            save_checkpoint(accelerator, output / f"checkpoint-{step}")
        started += time.perf_counter() - paused
    bar.close()
    return {
        "eval_loss": eval_loss,
        "tokens_per_second": median(speeds[1:] or speeds),  # the first measurement holds the warm-up
        "bytes_per_parameter": memory,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": str(accelerator.device),
        "settings": asdict(settings),
    }


def main(argv: list[str] | None = None) -> None:
    (settings,) = parse(Settings, argv=argv)
    output = Path(settings.output_dir)
    checkpoint = newest_checkpoint(output) if settings.resume else None
    done = step_of(checkpoint) if checkpoint else 0
    if done >= settings.steps:
        raise InputError(f"--resume: {checkpoint} has all {settings.steps} steps; ask for more with --steps")
    texts = read_texts(
        settings.text, settings.dataset_config, settings.dataset_split, settings.text_column, settings.max_characters
    )
    accelerator = Accelerator()
    world = accelerator.num_processes  # accelerate moves the schedule by one for each process at every step
    tokenizer = load_tokenizer(settings, texts)
    train_windows, valid_windows = load_data(settings, texts, tokenizer, world)

    set_seed(settings.seed)
    model = build_model(settings, tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    schedule = get_scheduler("cosine", optimizer, settings.warmup_steps * world, settings.steps * world)
    train_batches = DataLoader(train_windows, settings.batch_size, drop_last=True)
    valid_batches = DataLoader(valid_windows, settings.batch_size)
    model, optimizer, schedule, train_batches, valid_batches = accelerator.prepare(
        model, optimizer, schedule, train_batches, valid_batches
    )
    if checkpoint:
        accelerator.load_state(str(checkpoint))
        train_batches = accelerator.skip_first_batches(train_batches, done)
    summary = train(accelerator, settings, model, optimizer, schedule, train_batches, valid_batches, done)

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(output)
        tokenizer.save_pretrained(output)
        (output / "summary.json").write_text(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
