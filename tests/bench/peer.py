"""One peer, in the environment that `peers.py` made for it: knows nothing of this project.

    python peer.py TOOL SCHEME MODEL TOKENS OUT BATCH

TOKENS is a safetensors file with `tokens` [windows, length] int64; SCHEME is a name that the tool
knows, `W4AFP8` say, or `W4AFP8/64` with another group size. Prints a line of JSON: seconds
(wall and CPU) of loading, quantizing (calibration included) and saving, threads, and the version.
"""

import json
import sys
import time
from functools import partial
from importlib.metadata import version
from itertools import pairwise

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def llm_compressor(model, tokenizer, tokens, scheme, folder, batch, **settings):
    from llmcompressor.modifiers.quantization import GPTQModifier

    modifier = GPTQModifier(config_groups=groups_of(scheme), ignore=["lm_head"], **settings)
    return one_shot(model, tokenizer, tokens, modifier, folder, batch)


def llm_compressor_awq(model, tokenizer, tokens, scheme, folder, batch):
    from llmcompressor.modifiers.awq import AWQModifier

    if not torch.accelerator.is_available():  # it pins its inputs' memory without asking
        torch.Tensor.pin_memory = lambda tensor: tensor
    modifier = AWQModifier(config_groups=groups_of(scheme), ignore=["lm_head"])
    return one_shot(model, tokenizer, tokens, modifier, folder, batch)


def groups_of(scheme):
    from compressed_tensors.quantization import preset_name_to_scheme

    name, _, size = scheme.partition("/")
    found = preset_name_to_scheme(name, ["Linear"])
    if size:
        found.weights.group_size = int(size)
    return {"group_0": found}


def one_shot(model, tokenizer, tokens, modifier, folder, batch):
    from datasets import Dataset
    from llmcompressor import oneshot

    rows = Dataset.from_dict(
        {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    )
    yield
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=rows,
        recipe=modifier,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
        batch_size=batch,
    )
    yield
    model.save_pretrained(folder, save_compressed=True)


def auto_round(model, tokenizer, tokens, scheme, folder, batch, **settings):
    from auto_round import AutoRound

    batches = [{"input_ids": part} for part in tokens.split(batch)]
    scheme, _, size = scheme.partition("/")
    if size:
        settings["group_size"] = int(size)
    yield
    quantizer = AutoRound(
        model,
        tokenizer=tokenizer,
        scheme=scheme,
        dataset=batches,
        **settings,
        seqlen=tokens.shape[1],
        nsamples=len(tokens),
        batch_size=batch,
        device_map="cuda" if torch.cuda.is_available() else "cpu",
        enable_torch_compile=False,
    )
    quantizer.quantize()
    yield
    quantizer.save_quantized(folder, format="auto_gptq")


PEERS = {
    "llm-compressor": (llm_compressor, "llmcompressor"),  # columns in the order of their inputs
    "llm-compressor-unordered": (partial(llm_compressor, actorder=None), "llmcompressor"),
    "llm-compressor-awq": (llm_compressor_awq, "llmcompressor"),
    "auto-round": (partial(auto_round, iters=50, lr=5e-3), "auto-round"),  # its light recipe
    "auto-round-200": (partial(auto_round, iters=200), "auto-round"),  # its default
}
STEPS = "load", "quantize", "save"


def main():
    name, scheme, source, tokens, folder, batch = sys.argv[1:]
    torch.manual_seed(0)
    moments = [now()]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(source)
    function, package = PEERS[name]
    tokens = load_file(tokens)["tokens"]
    for _ in function(model, tokenizer, tokens, scheme, folder, int(batch)):
        moments.append(now())
    moments.append(now())
    tokenizer.save_pretrained(folder)
    wall, cpu = (
        {step: b - a for step, (a, b) in zip(STEPS, pairwise(times), strict=True)}
        for times in zip(*moments, strict=True)
    )
    threads = torch.get_num_threads()
    print(json.dumps({"wall": wall, "cpu": cpu, "threads": threads, "version": version(package)}))


def now():
    """Wall and CPU seconds."""
    return time.perf_counter(), time.process_time()


if __name__ == "__main__":
    main()
