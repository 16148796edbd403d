"""Generate with a compressed-tensors export: needs transformers and compressed-tensors, no dpq.

python examples/generate.py EXPORT "Once upon a time"
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
tokens = tokenizer(prompt, return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(tokens, max_new_tokens=40, do_sample=False)[0]))
