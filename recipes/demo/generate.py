# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint with nothing but transformers and let it go on with a line: `generate.py FOLDER PROMPT`."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

logging.set_verbosity_error()
folder, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
torch.manual_seed(0)
ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
output = model.generate(**ids, max_new_tokens=40, do_sample=True, top_k=20)
print(tokenizer.decode(output[0], skip_special_tokens=True))
