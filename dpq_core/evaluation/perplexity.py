"""Perplexity per token of a causal language model over windows that do not overlap.

    perplexity = exp( − Σ_w Σ_{t=1}^{N−1} log p(x_{w,t} | x_{w,0} … x_{w,t−1}) / (W (N − 1)) )

for W windows of N tokens each: a window's first token is read and not predicted. This is the
papers' number (GPTQ, section 5; DPQ, tables of WikiText-2). It is normalised by tokens, so it can
be compared only between models that share a tokenizer, and never with lm-evaluation-harness's
`word_perplexity`. `perplexity_token` says it of a whole model, in plain torch, and the scorer
(`dpq_core.evaluation.scorer`) is held against it.
"""

import hashlib

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from dpq_core.evaluation.scores import PERPLEXITY, Scores


@torch.inference_mode()
def perplexity_token(
    model: PreTrainedModel,
    windows: Tensor,  # [windows, sequence_length] int64
    batch_size: int,
    metric: str = PERPLEXITY,
) -> Scores:
    """Score `windows`, `batch_size` at a time, on the model's device; the model is put into `eval`.

    The result has an entry a window: its nats, and the tokens that were predicted. Its value is not
    finite when any logit that counts is NaN, or the loss overflows. It does not depend on
    `batch_size` but by the rounding of the model's own products. Log-softmax runs in float32, one
    window at a time (its logits take sequence_length × vocabulary × 4 bytes); sums run in float64.
    `metric`: what the result is called, `scores.AFTER_BOS` where every window begins with the
    begin-of-text token: the two are never compared with one another.

    Raises:
        ValueError: no windows, or windows of fewer than two tokens.
    """
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise ValueError(
            f"windows of shape {list(windows.shape)}: needed are [windows, sequence_length]"
            " with at least one window of at least two tokens"
        )
    model.eval()
    nats: list[float] = []
    for batch in windows.split(batch_size):
        tokens = batch.to(model.device)
        logits = model(input_ids=tokens, use_cache=False).logits  # [batch, sequence, vocabulary]
        nats += [_nats(*row) for row in zip(logits, tokens, strict=True)]
    return window_scores(windows, nats, metric)


def window_scores(
    windows: Tensor,  # [windows, sequence_length] int64
    nats: list[float],
    metric: str,
) -> Scores:
    """Scores of windows, each named by its tokens, from the nats of each."""
    count, length = windows.shape
    return Scores(
        metric=metric,
        documents=window_names(windows),
        parts=[""] * count,
        groups=[""] * count,
        values=nats,
        weights=[float(length - 1)] * count,
    )


def window_names(
    windows: Tensor,  # [windows, sequence_length] int64
) -> list[str]:
    """SHA-256 of each window's tokens."""
    return [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in windows.cpu()]


def _nats(
    logits: Tensor,  # [sequence, vocabulary]
    tokens: Tensor,  # [sequence] int64
) -> float:
    losses = functional.cross_entropy(logits[:-1].float(), tokens[1:], reduction="none")
    return losses.cpu().double().sum().item()
