# SPDX-License-Identifier: Apache-2.0
"""What bench_step.py measures: models, contenders and their order, and the arithmetic behind MFU. Data and parsing.

A case is model/batch/contender: `8b/2x4096x1/fp8-lm@bf16+compile` is Llama-8B's widths with 8 layers, micro-batches of
2 x 4096 tokens, one per step, weights loaded in bf16, recipe fp8-lm, under torch.compile. A contender is
`name[@dtype][+option...]`; the weights are float32 where no dtype is given.

names    bf16                      stock accelerate: bf16 autocast, torch's AdamW(fused=True), no package of ours;
                                   `bf16`, with nothing behind it, is the baseline of every ratio
         bf16@bf16                 bf16 weights and states, no master: less than any recipe here keeps, for scale
         torchao, torchao-rowwise  torchao's float8 linears in those two recipes, on the baseline (peers)
         anything else             a recipe of ours
options  liger                     liger-kernel's RMSNorm, SwiGLU, rope and fused loss for Llama (a peer)
         compile                   Accelerator(dynamo_backend="inductor")
         liger-loss                ours with liger-kernel's fused linear cross-entropy alone (HF_LOWPREC_LIGER=1)
         one, none                 ours with that many cached layouts of the low-precision weights instead of both
         remade                    ours with `saved_inputs: remade`
         graphs                    CUDA graphs of the layers whatever they gain, ours or the baseline's
                                   (hf_lowprec.graph_layers); ours without a word takes them where the GPU waits for
                                   the host (HF_LOWPREC_GRAPHS=auto)
         nographs                  ours without them (HF_LOWPREC_GRAPHS=0)
         clip                      accelerator.clip_grad_norm_ to 1, as in the Trainer: by torch for the baseline, in
                                   the step for ours (HF_LOWPREC_CLIP=0: by torch)
         nofuse                    ours without fused norms, GLUs and shared inputs (HF_LOWPREC_FUSE=0)
         8bit, compact, ...        ours with these optimizer states in place of the recipe's
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness import BASELINE

_COMMON = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 8192}
MODELS: dict[str, dict[str, int]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8, **_COMMON},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, **_COMMON},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 128},
    "23m": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6,
            "num_key_value_heads": 6, "vocab_size": 16384, "max_position_embeddings": 512},
}  # fmt: skip
MODELS["1b-lora"], MODELS["tiny-lora"] = MODELS["1b"], MODELS["tiny"]

# In the order of what they decide, since a call may end early (--minutes).
CASES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("8b", "2x4096x1", (
        BASELINE, "fp8-lm@bf16", "fp8-lm", "te-current", "bf16+liger", "torchao+compile", "fp8-lm+compile",
        "te-current@bf16+8bit", "fp8-lm@bf16+liger-loss+one", "te-current@bf16+compact+liger-loss+none",
        "te-current@bf16+8bit+remade+one", "fp8-lm@bf16+remade+liger-loss+one",
        "te-current@bf16+compact+liger-loss+none+remade", "fp8-lm@bf16+compact+liger-loss+none+remade",
        "te-delayed", "fp8-amax", "fp8-lm-o1", "te-current@bf16",
        "fp8-lm@bf16+nofuse", "bf16@bf16", "bf16+compile",
        "torchao", "torchao-rowwise+compile", "torchao-rowwise", "te-current+compile", "bf16@bf16+liger",
        "torchao@bf16+compile", "fp8-lm@bf16+compile", "fp8-lm@bf16+remade", "te-current@bf16+remade",
        "bf16+clip", "fp8-lm@bf16+clip", "fp8-lm+clip",
    )),
    ("1b", "1x2048x4", (BASELINE, "fp8-lm@bf16", "fp8-lm@bf16+nographs", "fp8-lm@bf16+graphs", "bf16+graphs",
                        "fp8-lm", "te-current", "fp8-lm+graphs", "bf16@bf16+graphs", "bf16@bf16",
                        "bf16+liger", "torchao", "torchao+compile", "fp8-lm+compile", "te-delayed", "fp8-amax")),
    ("8b", "1x2048x4", (BASELINE, "fp8-lm@bf16", "fp8-lm@bf16+nographs", "fp8-lm", "te-current", "bf16+liger",
                        "bf16@bf16", "torchao", "torchao+compile", "fp8-lm+compile", "te-delayed", "fp8-amax")),
    ("1b", "2x4096x1", (BASELINE, "fp8-lm@bf16", "fp8-lm@bf16+nographs", "fp8-lm", "te-current", "bf16+liger",
                        "torchao+compile", "fp8-lm+compile", "te-delayed", "fp8-amax")),
    ("1b-lora", "2x4096x1", (BASELINE, "fp8-lm", "bf16@bf16", "fp8-lm@bf16")),
)  # fmt: skip
# What an emulation costs: the model of recipe_study.py, all of its recipes.
RECIPES = (("23m", "16x512x1", (
    BASELINE, "bf16-sr@bf16", "fp16", "fp8-lm", "fp8-lm+nographs", "bf16+graphs", "fp8-lm-o1", "fp8-lm-o3",
    "te-delayed", "te-current", "fp8-amax", "fp8-cscale", "mxfp8", "mxfp6", "mxfp6-e2m3", "mxfp4", "mxint8", "bitnet",
    "bitnet-b1.58", "switchback", "switchback-m", "switchback-q", "unit-scaling", "u-mup", "fp8-flex", "hfp8",
    "fp8-chunked", "sr-mac",
)),)  # fmt: skip
MICRO = (
    ("tiny", "2x64x2", (BASELINE, "bf16@bf16", "fp8-lm", "fp8-lm@bf16+8bit", "torchao", "bf16+liger")),
    ("tiny-lora", "2x64x1", (BASELINE, "fp8-lm")),
)

PEERS = ("torchao", "torchao-rowwise")
_SWITCHES = ("liger", "compile", "liger-loss", "one", "none", "nofuse", "remade", "graphs", "nographs", "clip")
_OWN = ("liger-loss", "one", "none", "nofuse", "remade", "nographs")
# Steps more until layers are captured: three without a change, after scales are known. Where the package decides about
# graphs by itself, it does so in these steps.
GRAPH_WARMUP = 6


@dataclass(frozen=True)
class Contender:
    name: str
    dtype: str  # of the weights as loaded
    options: frozenset[str]
    states: str | None  # optimizer states in place of the recipe's

    @property
    def ours(self) -> bool:
        return self.name not in (BASELINE, *PEERS)

    @property
    def weight_cache(self) -> str | None:
        return next((option for option in ("one", "none") if option in self.options), None)

    @property
    def may_graph(self) -> bool:
        """Whether layers may be captured on a GPU, asked for or not. torch.compile has graphs of its own."""
        decided = self.ours and not {"nographs", "compile"} & self.options
        return decided or "graphs" in self.options

    def environment(self, device: str) -> dict[str, str]:
        """What the package's switches are set to, so that none is inherited. There are no graphs on a CPU."""
        forced = "graphs" in self.options and self.ours and device == "cuda"
        return {
            "HF_LOWPREC_LIGER": str(int("liger-loss" in self.options)),
            "HF_LOWPREC_FUSE": str(int("nofuse" not in self.options)),
            "HF_LOWPREC_GRAPHS": "1" if forced else "0" if "nographs" in self.options else "auto",
        }

    @property
    def changes(self) -> dict[str, str]:
        """Fields of the recipe that the case changes."""
        out = {} if self.weight_cache is None else {"weight_cache": self.weight_cache}
        return out | ({"saved_inputs": "remade"} if "remade" in self.options else {})


def parse(text: str) -> Contender:
    """Raises ValueError for a dtype, or a combination, that means nothing."""
    head, *options = text.split("+")
    name, _, dtype = head.partition("@")
    states = [option for option in options if option not in _SWITCHES]
    contender = Contender(name, dtype or "fp32", frozenset(options) - set(states), states[0] if states else None)
    if contender.dtype not in ("fp32", "bf16") or len(states) > 1:
        raise ValueError(f"{text!r}: weights are loaded in fp32 or bf16, states are named once")
    own = [option for option in _OWN if option in contender.options]
    if (own or states) and not contender.ours:
        raise ValueError(f"{text!r}: {', '.join([*own, *states])} belongs to recipes of ours")
    if "liger" in contender.options and contender.ours:
        raise ValueError(f"{text!r}: liger replaces the norms and MLPs that a recipe fuses; liger-loss is its loss")
    if {"graphs", "compile"} <= contender.options:
        raise ValueError(f"{text!r}: torch.compile has graphs of its own")
    if {"graphs", "nographs"} <= contender.options:
        raise ValueError(f"{text!r}: graphs or nographs")
    return contender


# --- arithmetic ----------------------------------------------------------------------------------------------------

# Dense tensor-core peaks in TFLOP/s: bf16, FP8 (vendor's data sheets of the SXM modules).
PEAKS = {"H100": (989.4, 1978.9), "H200": (989.4, 1978.9), "B200": (2250.0, 4500.0)}


def flops_per_step(model: Any, config: dict[str, int], batch: str) -> float:
    """Multiply-adds counted as two: 6 per weight of a GEMM and token, lm_head included, and causal attention's
    products (forward 2, backward 4). Recomputation and element-wise work do not count."""
    rows, seq, micro_batches = map(int, batch.split("x"))
    tokens = rows * seq * micro_batches
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    attention = 6 * config["num_hidden_layers"] * config["hidden_size"] * seq
    return float(tokens) * (6 * weights + attention)


def utilisation(flops: float, milliseconds: float, gpu: str | None) -> dict[str, float]:
    """TFLOP/s, and shares of the GPU's bf16 and FP8 peaks where they are known."""
    rate = flops / milliseconds / 1e9
    out = {"tflops": round(rate, 1)}
    peaks = next((found for name, found in PEAKS.items() if gpu and name in gpu), None)
    if peaks is not None:
        out |= {"mfu_bf16": round(rate / peaks[0], 4), "mfu_fp8": round(rate / peaks[1], 4)}
    return out
