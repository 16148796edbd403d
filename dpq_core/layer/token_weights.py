"""How much each token counts in a Hessian."""

import torch
from torch import Tensor


def raise_first(x: Tensor, share: float) -> Tensor:
    """Windows' inputs [windows, length, in] of any float type, each window's first token times the
    root that makes it count as `share` of its window in H; the others are equal. x's type.

    The first token is where attention goes that has nowhere else to go (Xiao et al., "Efficient
    Streaming Language Models with Attention Sinks", 2024): an error of its value is in all tokens'
    outputs, and H has it as one token of hundreds. It is one direction, which costs the others
    little.
    """
    raised = x.clone()
    raised[:, 0] = (x[:, 0].float() * first_root(share, x.shape[1])).to(x.dtype)
    return raised


def first_root(share: float, length: int) -> float:
    """What `raise_first` multiplies the first of `length` tokens with."""
    return float((share / (1 - share) * (length - 1)) ** 0.5)


def equal_norms(x: Tensor) -> Tensor:
    """Inputs [..., in] of any float type, each token's divided by its norm; zeros stay. x's type.

    So every token has the same say in H, whose objective is then the mean over tokens of
    ‖ΔW x‖² / ‖x‖². As they are, an attention sink's inputs are too large or too small: before
    SmolLM2-135M's `down_proj` of layer 11 they have 500 times the median norm and 99.8 % of H, and
    before its `v_proj` 0.3 to 0.5 times, although every token reads what becomes of them
    (`docs/log.md`).
    """
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (x.float() / norms.clamp(min=torch.finfo(torch.float32).tiny)).to(x.dtype)
