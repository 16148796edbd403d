"""Train the quickstart model: a byte-level Llama on the prose of the Python installation.

    python recipes/quickstart/train.py --output recipes/quickstart/model

Writes the checkpoint with the lowest held-out loss (BF16 safetensors, tokenizer) and
`training.json`, the loss curve. Muon for the matrices, AdamW for the rest; the learning rate rises
over the first steps, stays, and falls linearly to zero over the last part (`--decay-share`).
Training ends early when the held-out loss has not fallen for `PATIENCE` evaluations.
`--resume FOLDER` begins from a checkpoint's weights, with a curve that is continued.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from dpq_core.data import python_corpus

SEED = 0
WINDOW = 512
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1
EVALUATE_EVERY = 100
PATIENCE = 4


def config(tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def token_stream(tokenizer: PreTrainedTokenizerBase, split: str) -> Tensor:
    """All documents of a split, each closed by the end-of-text token. Shape [tokens]."""
    ids: list[int] = []
    for text in python_corpus.documents(split):
        ids += [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return torch.tensor(ids)


def mean_loss(model: LlamaForCausalLM, windows: Tensor) -> float:
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        losses = [model(input_ids=b, labels=b).loss.item() * len(b) for b in windows.split(16)]
    model.train()
    return sum(losses) / len(windows)


def learning_rate_share(step: int, steps: int, decay_share: float) -> float:
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (decay_share * steps))


def train(
    output: Path,
    steps: int,
    batch: int,
    learning_rate: float,
    decay_share: float,
    resume: Path | None,
) -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    curve: list[dict[str, float]] = []
    if resume:
        model = LlamaForCausalLM.from_pretrained(resume, dtype=torch.float32)
        curve = json.loads((resume / "training.json").read_text())
    done = int(curve[-1]["step"]) if curve else 0
    torch.manual_seed(SEED + done)
    if not resume:
        model = LlamaForCausalLM(config(tokenizer))
    stream = token_stream(tokenizer, "train")
    held_out = token_stream(tokenizer, "validation")
    held_out = held_out[: len(held_out) // WINDOW * WINDOW].view(-1, WINDOW)

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(
            matrices,
            lr=learning_rate,
            weight_decay=WEIGHT_DECAY,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(
            o, lambda step: learning_rate_share(step, steps, decay_share)
        )
        for o in optimizers
    ]
    forward = torch.compile(model)  # three times eager on two cores
    output.mkdir(parents=True, exist_ok=True)
    started, running = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        offsets = torch.randint(len(stream) - WINDOW, (batch,))
        tokens = torch.stack([stream[o : o + WINDOW] for o in offsets])
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        running += loss.item()
        if step % EVALUATE_EVERY == 0 or step == steps:
            point = {
                "step": done + step,
                "bytes": (done + step) * batch * WINDOW,
                "seconds": round(time.monotonic() - started, 1),
                "train_loss": round(running / (step % EVALUATE_EVERY or EVALUATE_EVERY), 4),
                "held_out_loss": round(mean_loss(model, held_out), 4),
            }
            running = 0.0
            print(json.dumps(point), flush=True)
            if all(point["held_out_loss"] < earlier["held_out_loss"] for earlier in curve):
                save(model, tokenizer, output)
            curve.append(point)
            (output / "training.json").write_text(json.dumps(curve, indent=0) + "\n")
            best = min(curve, key=lambda p: p["held_out_loss"])
            if len(curve) - curve.index(best) > PATIENCE:
                break


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--batch", type=int, default=16, help="windows of 512 bytes a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--decay-share", type=float, default=0.5)
    arguments = parser.parse_args()
    train(**vars(arguments))
