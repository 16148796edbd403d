"""Some pieces of a large vocabulary in place of all, where many models are compared with one.

With d the difference of two models' logits a and b, up to a constant that falls out,

    KL(p ‖ q) = log E_p[exp(−d)] + E_p[d]        d = a − b

both means over pieces. A piece v is taken with probability π_v, and stands for 1 / π_v pieces then
(Horvitz and Thompson, 1952): with log(1 / π_v) added to its logits, whatever sums exponentials over
pieces has the estimate. One sample serves all tokens and all models, whose differences it leaves
alone. A logarithm of an estimate is a little low: by a thousandth with 4,096 of 49,152 pieces, and
single losses are 0.2 % off (`docs/log.md`). π_v goes with how much piece v weighs for the variance,
over the tokens t at hand:

    π_v = min(1, c √Σ_t p_tv²),        c such that Σ_v π_v is the size of the sample

so that likely pieces are all there (c is found by a few rounds: what is certain leaves the sum).
Systematic sampling: one random number, and no piece twice.
"""

import torch
from torch import Tensor

from dpq_core.evaluation.head import RunningSums, Sample, Tiles, head_tiles
from dpq_core.model.blocks import BlockStream


def sample_pieces(
    stream: BlockStream,
    states: Tensor,  # [tokens, hidden], after the last block
    size: int,
    seed: int = 0,
) -> Sample | None:
    """Pieces by what a 16-bit model predicts after these tokens, in two passes over its head; None
    where it has no more than `size`.

    Raises:
        ValueError: its predictions are not finite.
    """
    head = stream.outside.weight_of(stream.anatomy.parts.head)
    if stream.parameters[f"{head}.weight"][0] <= size:
        return None
    with head_tiles(stream) as tiles:
        weight = _weight(tiles, states)
    if not torch.isfinite(weight).all():
        raise ValueError("the 16-bit model's predictions are not finite")
    chances = _chances(weight, size)
    generator = torch.Generator().manual_seed(seed)
    before = torch.rand((), generator=generator, dtype=torch.float64)
    steps = (chances.cumsum(0) + before).floor()
    pieces = steps.diff(prepend=before.floor()[None]).nonzero().flatten()
    return Sample(pieces, (1 / chances[pieces]).float())


def _weight(tiles: Tiles, states: Tensor) -> Tensor:
    """√Σ_t p_tv² [pieces] float64."""
    total: list[Tensor] = []
    for start in range(0, len(states), tiles.rows):
        more = _squares(tiles, states[start : start + tiles.rows])
        total = [own + each for own, each in zip(total, more, strict=True)] if total else more
    return torch.cat(total).sqrt()


def _squares(tiles: Tiles, states: Tensor) -> list[Tensor]:
    """Σ_t p_tv² of some tokens, tile by tile, float64."""
    sums = RunningSums()
    for first, logits in tiles.logits(states):
        sums.add(first, logits)
    shift = sums.finished().log_sums.float()[:, None]
    return [
        (2 * (logits - shift)).exp_().sum(0).double().cpu() for _, logits in tiles.logits(states)
    ]


def _chances(weight: Tensor, size: int) -> Tensor:
    """π [pieces] float64, of sum `size`; where fewer are ever said, 1 for those."""
    if (weight > 0).sum() <= size:
        return (weight > 0).double()
    certain = torch.zeros(len(weight), dtype=torch.bool)
    while True:
        scale = (size - int(certain.sum())) / weight[~certain].sum()
        chances = torch.where(certain, 1.0, weight * scale)
        if not (more := chances > 1).any():
            return chances
        certain |= more
