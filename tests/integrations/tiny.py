# SPDX-License-Identifier: Apache-2.0
"""Models, a tokenizer and data that need no network and train in a second."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
VOCAB = 128
_LLAMA = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip
LINEARS = 2 * 7  # q, k, v, o, gate, up, down in each of two layers


def llama_config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**_LLAMA, **changes})


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(**changes)).to(dtype)


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64))


def rows(n: int = 32, length: int = 16, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Counting modulo 100 from a random start: a task whose loss falls within a few steps."""
    start = torch.randint(0, 100, (n, 1), generator=torch.Generator().manual_seed(seed))
    ids = 3 + (start + torch.arange(length)) % 100
    return [{"input_ids": row, "labels": row} for row in ids]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, with a chat template."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    specials = ["<s>", "</s>", "<pad>", "<unk>"]
    vocab = {token: i for i, token in enumerate(specials + [chr(c) for c in range(32, 127)])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    names = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), specials, strict=True))
    tokens = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokens.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return tokens


def converted(model: torch.nn.Module) -> set[str]:
    """Names of the modules that hf_lowprec runs."""
    from hf_lowprec.modules.linear import LowPrecMixin

    return {name for name, module in model.named_modules() if isinstance(module, LowPrecMixin)}


def stock_python(code: str, *argv: str) -> str:
    """Run `code` in a process without hf_lowprec; its standard output."""
    guard = "import sys, importlib.abc\nclass No(importlib.abc.MetaPathFinder):\n"
    guard += "    def find_spec(self, name, path=None, target=None):\n"
    guard += "        if name.split('.')[0] == 'hf_lowprec': raise ImportError('hf_lowprec is not here')\n"
    guard += "sys.meta_path.insert(0, No())\nsys.modules.pop('hf_lowprec', None)\n"
    return python(guard + code, *argv, HF_LOWPREC_AUTOLOAD="0", TORCH_DEVICE_BACKEND_AUTOLOAD="0")


def python(code: str, *argv: str, **environment: str) -> str:
    """Run `code` in a new process; its standard output. Fails with its standard error."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code, *argv], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
