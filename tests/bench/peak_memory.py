"""Peak memory of `dpq quantize` on a 1.1-billion-parameter Llama with random weights.

    python tests/bench/peak_memory.py [--folder FOLDER]

The model is made on the spot (hidden 2048, 22 layers, intermediate 5632, 4 key-value heads, BF16),
quantized in a process of its own, and that process's resident memory is sampled. Reported: the peak
above the idle process (the same program with everything imported), beside half of the BF16
checkpoint plus the calibration activations, which it must stay below.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file
from transformers import ByT5Tokenizer, LlamaConfig

from dpq_core.streaming import empty_model

WINDOWS, LENGTH = 16, 512
_IDLE = "import flows.quantize, flows.release, time; print('ready', flush=True); time.sleep(600)"


def make_model(folder: Path) -> int:
    """Random weights, a shard a block; returns the checkpoint's bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        dtype=torch.bfloat16,
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in empty_model(folder).named_parameters():
        shard = ".".join(name.split(".")[:3]) if ".layers." in name else name
        values = torch.randn(parameter.shape, generator=generator) * 0.02
        tensor = torch.ones(parameter.shape) if parameter.ndim == 1 else values
        shards.setdefault(shard, {})[name] = tensor.to(torch.bfloat16)
    weight_map, total = {}, 0
    for number, tensors in enumerate(shards.values(), 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_recipe(folder: Path) -> Path:
    recipe = {
        "model": {"id": str(folder / "model")},
        "calibration": {
            "dataset": {"path": "python_docs"},
            "samples": WINDOWS,
            "sequence_length": LENGTH,
            "batch_size": 1,
        },
        "scheme": {"max_passes": 1},  # for time; a pass needs what the next one needs
        "execution": {"store": str(folder / "store"), "workers": 1, "device": "cpu"},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def idle_bytes() -> tuple[int, int]:
    """Resident memory with everything imported and nothing done."""
    process = subprocess.Popen([sys.executable, "-c", _IDLE], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    used = resident_bytes(psutil.Process(process.pid))
    process.kill()
    process.wait()
    return used


def resident_bytes(process: psutil.Process) -> tuple[int, int]:
    """Resident memory, and the part of it that is no file's (mapped files can be dropped)."""
    memory = process.memory_info()
    return int(memory.rss), int(memory.rss - memory.shared)


def peak_bytes(recipe: Path, home: Path) -> tuple[int, int, float]:
    """Highest resident and private memory of `dpq quantize`, and its seconds."""
    command = [sys.executable, "-c", "from flows.cli import main; main()", "quantize", str(recipe)]
    started = time.monotonic()
    run = subprocess.Popen(command, env={**os.environ, "DPQ_HOME": str(home)})
    process, peaks = psutil.Process(run.pid), (0, 0)
    while run.poll() is None:
        try:
            now = resident_bytes(process)
            peaks = max(peaks[0], now[0]), max(peaks[1], now[1])
        except psutil.NoSuchProcess:
            break
        time.sleep(0.02)
    if run.wait():
        raise SystemExit(f"dpq quantize failed with {run.returncode}")
    return *peaks, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="kept afterwards; default: a temporary one")
    folder = parser.parse_args().folder
    work = folder or Path(tempfile.mkdtemp())
    try:
        checkpoint = make_model(work / "model")
        idle = idle_bytes()
        resident, private, seconds = peak_bytes(write_recipe(work), work / "home")
    finally:
        if not folder:
            shutil.rmtree(work)
    activations = WINDOWS * LENGTH * 2048 * 2
    limit = checkpoint // 2 + activations
    mib = 1 << 20
    print(
        f"checkpoint {checkpoint / mib:.0f} MiB, activations {activations / mib:.0f} MiB, "
        f"idle {idle[0] / mib:.0f} MiB; peak above idle {(resident - idle[0]) / mib:.0f} MiB "
        f"({(private - idle[1]) / mib:.0f} MiB of it no mapped file), limit {limit / mib:.0f} MiB; "
        f"{seconds:.0f} s"
    )
    raise SystemExit(resident - idle[0] >= limit)


if __name__ == "__main__":
    main()
