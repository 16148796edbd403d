"""Continued training for `why.py`: a model whose weights lie on no 4-bit grid."""

import time
from typing import Any

import torch
from torch import Tensor, nn
from why_model import linears_of


def continue_training(
    model: Any, tokens: Tensor, steps: int, rate: float, noise: float, seed: int, batch: int
) -> dict[str, Any]:
    """Train the model in place, so that its weights leave the 4-bit grid that they came from.

    First each weight of the blocks' linears moves by a uniform number of `noise` old steps at most;
    then `steps` of AdamW over random windows [512] of `tokens`; then weights are rounded to BF16.
    Losses are of each tenth of the steps; distances in steps of the old grid, of groups of 32: 0 is
    on the grid, a mean of 0.25 is anywhere.
    """
    generator, started = torch.Generator().manual_seed(seed), time.perf_counter()
    linears, device = linears_of(model), model.device
    old = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    for linear in linears.values():
        weight = linear.weight.data
        moves = torch.rand(weight.shape, generator=generator).to(device) * 2 - 1
        weight += (moves * noise).view(len(weight), -1, 32).mul(_step(weight)).view_as(weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0)
    losses: list[float] = []
    for step in range(steps):
        # Up within a tenth, then down in a straight line.
        share = min((step + 1) / max(steps // 10, 1), (steps - step) / steps)
        optimizer.param_groups[0]["lr"] = rate * share
        starts = torch.randint(0, len(tokens) - 513, (batch,), generator=generator)
        rows = torch.stack([tokens[start : start + 512] for start in starts]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.to(torch.bfloat16))
    means = [float(torch.stack(part).mean()) for part in _tenths(losses)]
    seconds = time.perf_counter() - started
    apart = [_distance(linear.weight.data, old[name]) for name, linear in linears.items()]
    settings = {"steps": steps, "rate": rate, "noise": noise, "seed": seed, "tokens": steps * batch}
    settings["tokens"] *= 512
    return {**settings, "losses": means, "distance": sum(apart) / len(apart), "seconds": seconds}


def _tenths(losses: list[Any]) -> list[list[Any]]:
    size = max(len(losses) // 10, 1)
    return [losses[start : start + size] for start in range(0, len(losses), size)]


def _step(weight: Tensor) -> Tensor:
    """Of the old grid: a fifteenth of each group's range. [out, in / 32, 1]"""
    groups = weight.view(len(weight), -1, 32)
    return (groups.amax(2, keepdim=True) - groups.amin(2, keepdim=True)) / 15


def _distance(weight: Tensor, old: Tensor) -> float:
    """Mean distance to the nearest point of the old grid, in its steps."""
    low = old.view(len(old), -1, 32).amin(2, keepdim=True)
    at = (weight.view(len(old), -1, 32) - low) / _step(old).clamp(min=1e-12)
    return float((at - at.round()).abs().mean())
