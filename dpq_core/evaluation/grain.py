"""How much is computed at a time, by the kind of device."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Grain:
    """pack: tokens that run through a block together. span: queries that attend together, at most;
    None: each alone, by a kernel of ours. tile: logits that are there at a time."""

    pack: int
    span: int | None
    tile: int


CPU = Grain(1 << 10, None, 1 << 21)  # what caches hold: 8 MiB of logits
ACCELERATOR = Grain(1 << 14, 1 << 10, 1 << 24)  # few kernels with much to do: each is launched


def grain_on(device: torch.device) -> Grain:
    """Scores of a device have the same bits whoever computes them, since its grain is one."""
    return CPU if device.type == "cpu" else ACCELERATOR
