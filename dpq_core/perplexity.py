"""Perplexity per token of a causal language model over windows that do not overlap.

    perplexity = exp( − Σ_w Σ_{t=1}^{N−1} log p(x_{w,t} | x_{w,0} … x_{w,t−1}) / (W (N − 1)) )

for W windows of N tokens each: a window's first token is read and not predicted. This is the
papers' number (GPTQ, section 5; DPQ, tables of WikiText-2). It is normalised by tokens, so it can
be compared only between models that share a tokenizer, and never with lm-evaluation-harness's
`word_perplexity`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Perplexity:
    """`value` is not finite when any logit that counts is NaN, or the loss overflows."""

    value: float
    nll_per_window: list[float]  # mean nats per predicted token
    tokens: int  # predicted tokens: windows × (sequence length − 1)


@torch.inference_mode()
def perplexity_token(
    model: PreTrainedModel,
    windows: Tensor,  # [windows, sequence_length] int64
    batch_size: int,
    on_progress: Callable[[int], None] | None = None,
) -> Perplexity:
    """Score `windows`, `batch_size` at a time, on the model's device; the model is put into `eval`.

    `on_progress` is called after every batch with the number of windows scored so far. The result
    does not depend on `batch_size` but by the rounding of the model's own products. Log-softmax
    runs in float32, one window at a time (its logits take sequence_length × vocabulary × 4 bytes);
    sums over windows run in float64.

    Raises:
        ValueError: no windows, or windows of fewer than two tokens.
    """
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise ValueError(
            f"windows of shape {list(windows.shape)}: needed are [windows, sequence_length]"
            " with at least one window of at least two tokens"
        )
    model.eval()
    nll_per_window: list[float] = []
    for batch in windows.split(batch_size):
        tokens = batch.to(model.device)
        logits = model(input_ids=tokens, use_cache=False).logits  # [batch, sequence, vocabulary]
        nll_per_window += [_mean_nll(*row) for row in zip(logits, tokens, strict=True)]
        if on_progress is not None:
            on_progress(len(nll_per_window))
    # Windows are equally long: the mean over tokens is the mean of the windows' means.
    mean = torch.tensor(nll_per_window, dtype=torch.float64).mean()
    return Perplexity(
        value=mean.exp().item(),
        nll_per_window=nll_per_window,
        tokens=windows.shape[0] * (windows.shape[1] - 1),
    )


def _mean_nll(
    logits: Tensor,  # [sequence, vocabulary]
    tokens: Tensor,  # [sequence] int64
) -> float:
    losses = functional.cross_entropy(logits[:-1].float(), tokens[1:], reduction="none")
    return losses.cpu().double().mean().item()
