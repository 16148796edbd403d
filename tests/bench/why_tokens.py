"""How much each token counts in a Hessian: the weightings that `why.py` compares.

none        as they are: GPTQ's, and the product's until this was measured
drop        without each window's first eight tokens, where the attention sinks are
first S     the first token has the share S of its window
cap         inputs' norms capped at twice their median: sinks do not own H
unit        all norms equal
unit S      all norms equal, and the first token has the share S of its window: the product's
fisher      by the squared gradient of the loss for the layer's output: what a token's error costs
            the model, and not the layer (GuidedQuant, arXiv 2505.07004, without its groups)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.token_weights import equal_norms, raise_first


def weighted(x: Tensor, weighting: str) -> Tensor:
    """Inputs [windows, length, in] times the square roots of their tokens' weights in H."""
    if weighting == "none":
        return x
    if weighting == "drop":
        return x[:, 8:]
    if weighting == "unit":
        return equal_norms(x)
    kind, _, share = weighting.partition(" ")
    if share:
        return raise_first(equal_norms(x) if kind == "unit" else x, float(share))
    norms = x.float().norm(dim=-1, keepdim=True).clamp(min=1e-12)
    limit = 2 * norms.median()
    return x * (limit / norms).clamp(max=1)


def fisher_statistics(
    model: Any, windows: Tensor, batch: int, groups: Sequence[Sequence[str]]
) -> dict[str, InputStatistics]:
    """Of all linears: H = mean of 2 g x xᵀ, g a token's squared gradient norm at the outputs of the
    linears that read x."""
    with torch.inference_mode(False), torch.enable_grad():
        found, watched = {}, []
        for index, block in enumerate(model.model.layers):
            for group in groups:
                linears = [block.get_submodule(name) for name in group]
                own = InputStatistics.empty(linears[0].in_features, model.device)
                found |= {f"model.layers.{index}.{name}": own for name in group}
                watched.append((linears, own))
        for part in windows.split(batch):
            _count_batch(model, part.to(model.device), watched)
    return found


def _count_batch(model: Any, rows: Tensor, watched: list[Any]) -> None:
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, list[Tensor]] = {number: [] for number in range(len(watched))}
    handles = []
    for number, (linears, _) in enumerate(watched):
        for linear in linears:

            def keep(_: Any, taken: Any, output: Tensor, number: int = number) -> None:
                inputs[number] = taken[0].detach()
                outputs[number].append(output)

            handles.append(linear.register_forward_hook(keep))
    embedded = model.get_input_embeddings()(rows).detach().requires_grad_()
    loss = model(inputs_embeds=embedded, labels=rows, use_cache=False).loss
    flat = [each for number in outputs for each in outputs[number]]
    gradients = iter(torch.autograd.grad(loss * rows.numel(), flat))
    for handle in handles:
        handle.remove()
    for number, (_, own) in enumerate(watched):
        weights = torch.stack(
            [next(gradients).float().square().sum(-1, keepdim=True) for _ in outputs[number]]
        ).sum(0)
        own.add_hessian(inputs[number].float() * weights.sqrt())
