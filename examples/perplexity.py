"""Perplexity per token of a compressed-tensors export, as `dpq_core.evaluation.perplexity` defines
it: needs transformers and compressed-tensors, no dpq.

python examples/perplexity.py EXPORT texts.jsonl.gz 512
"""

import gzip
import json
import math
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, texts, length = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
with gzip.open(texts, "rt", encoding="utf-8") as file:
    text = "\n\n".join(json.loads(line)["text"] for line in file)
tokens = torch.tensor(AutoTokenizer.from_pretrained(folder)(text, verbose=False).input_ids)
windows = tokens[: len(tokens) // length * length].view(-1, length)
nats = 0.0
with torch.inference_mode():
    for batch in windows.split(8):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        loss = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum")
        nats += loss.item()
print(f"{math.exp(nats / (len(windows) * (length - 1))):.4f}")
