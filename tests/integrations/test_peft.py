# SPDX-License-Identifier: Apache-2.0
"""PEFT LoRA around a converted model, or a conversion around a LoRA model: the base converts, the adapters do not."""

from __future__ import annotations

import pytest
import torch
from tiny import LINEARS, converted, gpt2, llama, rows, stock_python
from torch import nn
from transformers import Trainer

import hf_lowprec
from hf_lowprec import LowPrecTrainingArguments

peft = pytest.importorskip("peft")

ADAPTED = 2 * 7


def lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def adapters(model: nn.Module) -> list[nn.Module]:
    return [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lora_" in name]


def before() -> nn.Module:
    model = lora(llama())
    hf_lowprec.convert(model, "fp8-lm")
    return model


def after() -> nn.Module:
    model = llama()
    hf_lowprec.convert(model, "fp8-lm")
    return lora(model)


def arguments(folder, **changes) -> LowPrecTrainingArguments:
    return LowPrecTrainingArguments(
        str(folder / "out"), use_cpu=True, max_steps=4, per_device_train_batch_size=4, logging_steps=1,
        learning_rate=1e-2, save_strategy="no", report_to="none", disable_tqdm=True, lowprec="fp8-lm", **changes,
    )  # fmt: skip


@pytest.mark.parametrize("build", [before, after])
def test_base_converts_and_adapters_do_not(build):
    model = build()
    names = converted(model)
    assert len(names) == LINEARS and all(name.endswith("base_layer") for name in names)
    assert len(adapters(model)) == 2 * ADAPTED and all(type(m) is nn.Linear for m in adapters(model))


def test_the_order_does_not_matter():
    ids = torch.arange(3, 19)[None]
    first, second = before(), after()
    for model in (first, second):
        model(input_ids=ids, labels=ids).loss.backward()
    grads = [{n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (first, second)]
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 2 * ADAPTED
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name
    assert all(p.grad is None for p in first.parameters() if not p.requires_grad)


def test_conv1d():
    model = peft.get_peft_model(gpt2(), peft.LoraConfig(r=16, target_modules=["c_attn"], fan_in_fan_out=True))
    hf_lowprec.convert(model, "fp8-lm")
    assert len(converted(model)) == 2 * 4 and all(type(m) is nn.Linear for m in adapters(model))


def test_trains_merges_and_loads_in_stock(tmp_path):
    model = lora(llama())
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows())
    trainer.train()
    assert len(converted(model)) == LINEARS and all(type(m) is nn.Linear for m in adapters(model))
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    assert any(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)

    ids = torch.arange(3, 19)[None]
    model.eval()
    quantised = model(input_ids=ids).logits
    with hf_lowprec.high_precision(model):
        wanted = model(input_ids=ids, labels=ids).loss.item()
    merged = model.merge_and_unload()
    assert len(converted(merged)) == LINEARS
    # The adapter's product is now quantised with the weight: near, and not the weight cached before the merge.
    assert (merged(input_ids=ids).logits - quantised).norm() < 0.25 * quantised.norm()
    with hf_lowprec.high_precision(merged):
        assert merged(input_ids=ids, labels=ids).loss.item() == pytest.approx(wanted, rel=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    code = "import sys, torch; from transformers import AutoModelForCausalLM as A\n"
    code += "m, info = A.from_pretrained(sys.argv[1], output_loading_info=True); assert not any(info.values()), info\n"
    code += "ids = torch.arange(3, 19)[None]; print('loss', m(ids, labels=ids).loss.item())"
    assert float(stock_python(code, str(tmp_path / "merged")).split()[-1]) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("build", [before, after])
def test_merge_and_unmerge_drop_the_cached_weight(build):
    model = build().eval()
    ids = torch.arange(3, 19)[None]
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.5)
    with torch.no_grad():
        apart = model(input_ids=ids).logits
        model.merge_adapter()
        together = model(input_ids=ids).logits
        model.unmerge_adapter()
        again = model(input_ids=ids).logits
    with torch.no_grad(), model.disable_adapter():
        alone = model(input_ids=ids).logits
    assert (together - apart).norm() < 0.3 * (alone - apart).norm()  # the merged weight was used, not the cached one
    assert (again - apart).norm() < 0.05 * apart.norm()


@pytest.mark.parametrize("build", [before, after])
def test_generates(build):
    model = build().eval()
    ids = torch.arange(3, 11)[None]
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert out.shape[1] > 8
    merged = model.merge_and_unload()
    out = merged.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert out.shape[1] > 8


def test_adapter_checkpoint_resumes(tmp_path):
    args = arguments(tmp_path, lr_scheduler_type="constant")
    args.save_strategy, args.save_steps = "steps", 2

    def run(resume=None):
        trainer = Trainer(lora(llama()), args, train_dataset=rows())
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight, resumed = run(), run(str(tmp_path / "out/checkpoint-2"))
    for (name, a), b in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def held_for_backward(model: nn.Module) -> int:
    """Bytes that a forward pass leaves behind for backward beside the Parameters, low-precision copies included."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.arange(3, 67).remainder(100).view(4, 16)
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        for module in model.modules():
            kept = module._lowprec.weight_cache.quantized if hasattr(module, "_lowprec") else None
            for tensor in kept or ():
                if tensor is not None:
                    keep(tensor)
    loss.backward()
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_holds_no_more_than_bf16_lora(dtype):
    """float32 base: one FP8 copy of a frozen weight instead of autocast's bf16 one. bf16 base: no copy at all."""
    plain, ours = lora(llama(dtype=dtype)), lora(llama(dtype=dtype))
    hf_lowprec.convert(ours, "fp8-lm")
    baseline, held = held_for_backward(plain), held_for_backward(ours)
    assert held <= baseline + 8 * LINEARS, (held, baseline)  # a float32 scale of each weight
    frozen = [m._lowprec.weight_cache.quantized for m in ours.modules() if hasattr(m, "_lowprec")]
    if dtype == torch.float32:
        weights = sum(m.weight.numel() for m in ours.modules() if hasattr(m, "_lowprec"))
        assert all(copy is not None for copy in frozen) and baseline - held >= 0.7 * weights
    else:
        assert not any(frozen)
