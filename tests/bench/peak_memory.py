"""Memory that quantizing takes, beside preflight's prediction, for Llamas with random weights; and
that evaluating takes.

    python tests/bench/peak_memory.py [--models 150m 600m 1.1b] [--runner threads|processes]
                                      [--blocks N] [--windows N] [--shards N]
    python tests/bench/peak_memory.py --evaluate [--models …]

Models are made on the spot; each is quantized by one worker, in a process of its own. A row a
model: predicted and used memory of the process and of the worker. `--blocks` cuts the models: a
block is quantized as if the others were there. For a whole 1.1-billion-parameter model in threads
the peak above the idle process (everything imported) has to stay below half of the BF16 checkpoint
plus the calibration activations; the row says so. `--evaluate` has `dpq evaluate` score 32 windows
of a model: its peak above the idle process, beside the checkpoint, of which it may be half.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file
from transformers import ByT5Tokenizer, LlamaConfig

from dpq_core.model.streaming import empty_model

LENGTH = 512
MODELS = {  # hidden, intermediate, heads, key-value heads, blocks
    "150m": (768, 2048, 12, 12, 12),
    "600m": (1536, 4096, 16, 8, 18),
    "1.1b": (2048, 5632, 32, 4, 22),
}
WITHIN = 0.15  # of the prediction
_IDLE = """
import flows.quantize, flows.release.release, time
print('ready', flush=True)
time.sleep(600)
"""


def make_model(folder: Path, name: str, blocks: int | None) -> int:
    """Random weights, a shard a block; returns the checkpoint's bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    hidden, intermediate, heads, key_value_heads, layers = MODELS[name]
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks or layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=2048,
        dtype=torch.bfloat16,
    ).save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in empty_model(folder).named_parameters():
        shard = ".".join(name.split(".")[:3]) if ".layers." in name else name
        values = torch.randn(parameter.shape, generator=generator) * 0.02
        tensor = torch.ones(parameter.shape) if parameter.ndim == 1 else values
        shards.setdefault(shard, {})[name] = tensor.to(torch.bfloat16)
    return write_shards(folder, shards)


def write_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> int:
    """Shards of tensors by name, and their index; returns the tensors' bytes."""
    weight_map, total = {}, 0
    for number, tensors in enumerate(shards.values(), 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_recipe(folder: Path, runner: str, windows: int, shards: int) -> Path:
    recipe = {
        "model": {"id": str(folder / "model")},
        "calibration": {
            "dataset": {"path": "python_docs"},
            "samples": windows,
            "sequence_length": LENGTH,
            "required_tokens_per_input": 0,
            "batch_size": 1,
        },
        "scheme": {"max_passes": 1},  # for time; a pass needs what the next one needs
        "execution": {
            "store": str(folder / "store"),
            "workers": 1,
            "device": "cpu",
            "runner": runner,
            "shards": shards,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def idle_bytes() -> int:
    """Resident memory with everything imported and nothing done."""
    process = subprocess.Popen([sys.executable, "-c", _IDLE], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    used = int(psutil.Process(process.pid).memory_info().rss)
    process.kill()
    process.wait()
    return used


def memory_of(recipe: Path, home: Path) -> dict[str, int]:
    """What `dpq quantize` says of its memory."""
    program = "from flows.cli.main import main; main()"
    command = [sys.executable, "-c", program, "quantize", str(recipe), "--json"]
    environment = {**os.environ, "DPQ_HOME": str(home), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    memory: dict[str, int] = json.loads(run.stdout)["memory"]
    return memory


def peak_of_evaluation(work: Path) -> int:
    """Most resident memory of `dpq evaluate` on 32 windows, a worker, bytes."""
    text = work / "text.jsonl"
    text.write_text(json.dumps({"text": "some words of a text, " * (32 * LENGTH // 22)}))
    dataset = {"path": "json", "data_files": str(text)}
    content = json.loads((work / "recipe.yaml").read_text())
    content["evaluation"] = {"perplexity": {"dataset": dataset, "sequence_length": LENGTH}}
    (work / "recipe.yaml").write_text(json.dumps(content))
    asked = ["evaluate", str(work / "model"), "--recipe", str(work / "recipe.yaml"), "--json"]
    command = [sys.executable, "-c", "from flows.cli.main import main; main()", *asked]
    environment = {**os.environ, "DPQ_HOME": str(work / "home")}
    run = psutil.Popen(command, env=environment, stdout=subprocess.PIPE)
    peak = 0
    while run.poll() is None:
        with suppress(psutil.NoSuchProcess):
            peak = max(peak, run.memory_info().rss)
        time.sleep(0.05)
    found = json.loads(run.stdout.read())["scores"][0]
    assert found["documents"] >= 31, found
    return peak


def evaluated(names: list[str]) -> bool:
    """A row a model; whether one took more than half of its checkpoint."""
    far, idle = False, idle_bytes()
    print("| model | checkpoint | evaluation above idle | share |")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            checkpoint = make_model(work / "model", name, None)
            write_recipe(work, "threads", 16, 1)
            above = peak_of_evaluation(work) - idle
        far |= above > checkpoint / 2
        shown = f"{checkpoint / 2**20:.0f} MiB | {above / 2**20:.0f} MiB"
        print(f"| {name} | {shown} | {above / checkpoint:.0%} |", flush=True)
    return far


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--runner", choices=["threads", "processes"], default="threads")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--evaluate", action="store_true")
    arguments = parser.parse_args()
    if arguments.evaluate:
        raise SystemExit(evaluated(arguments.models))
    far = False
    print("| model | process predicted | used | off | worker predicted | used | off |")
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            checkpoint = make_model(work / "model", name, arguments.blocks)
            asked = arguments.runner, arguments.windows, arguments.shards
            memory = memory_of(write_recipe(work, *asked), work / "home")
        cells = []
        for predicted, used in (("predicted", "used"), ("worker_predicted", "worker_used")):
            if memory[predicted]:
                off = memory[used] / memory[predicted] - 1
                far |= abs(off) > WITHIN
                shown = [f"{memory[key] / 2**20:.0f} MiB" for key in (predicted, used)]
                cells += [*shown, f"{off:+.1%}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        if name == "1.1b" and arguments.runner == "threads" and not arguments.blocks:
            above = memory["used"] - idle_bytes()
            limit = checkpoint // 2 + arguments.windows * LENGTH * MODELS[name][0] * 2
            print(
                f"  above idle {above / 2**20:.0f} MiB, limit {limit / 2**20:.0f} MiB", flush=True
            )
            far |= above >= limit
    raise SystemExit(far)


if __name__ == "__main__":
    main()
