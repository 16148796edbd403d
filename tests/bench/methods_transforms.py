"""Equivalent 16-bit models that `methods_table.py` quantizes: `transforms` on a model in memory.

Gemma 3 has its norms' weights stored minus one, and another name for the norm before the MLP; the
norms behind its writers keep its residual stream from being rotated.
"""

from collections.abc import Mapping
from typing import Any

import torch
import transforms
from methods_model import GROUPS, Statistics, Subject, full_name
from prototypes import rotated, scale_factor
from torch import Tensor

_AS_LLAMA = (
    ("post_attention_layernorm", "norm_behind_attention"),
    ("pre_feedforward_layernorm", "post_attention_layernorm"),
)


@torch.inference_mode()
def transform(subject: Subject, what: str, statistics: Statistics) -> None:
    """Change the model in place. `scaled SITE …`, `shifted SITE …` (scaled by powers of two, which
    changes no bit of what a Llama computes), `rotated values SEED`, `rotated stream SEED`;
    statistics [of 16-bit inputs] say how channels are scaled."""
    model = subject.model
    config = model.config.to_dict()
    heads = transforms.Heads.of(config)
    gemma = "gemma" in config["model_type"]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = {_renamed(n, gemma): _plain(n, p.float(), gemma) for n, p in parameters.items()}
    kind, *arguments = what.split()
    if kind in ("scaled", "shifted"):
        factors = _factors(subject, heads, arguments, statistics)
        if kind == "shifted":
            factors = {site: factor.log2().round().exp2() for site, factor in factors.items()}
        tensors = transforms.scale_channels(tensors, heads, factors)
    else:
        place, seed = arguments
        tensors = rotated(tensors, heads, int(seed), place == "stream", place == "values")
    for name, parameter in parameters.items():
        new = tensors[_renamed(name, gemma)]
        parameter.data.copy_(new - 1 if gemma and "norm" in name else new)


def _renamed(name: str, gemma: bool) -> str:
    for old, new in _AS_LLAMA if gemma else ():
        if old in name:
            return name.replace(old, new)
    return name


def _plain(name: str, tensor: Tensor, gemma: bool) -> Tensor:
    return tensor + 1 if gemma and "norm" in name else tensor


def _factors(
    subject: Subject, heads: transforms.Heads, sites: list[str], statistics: Statistics
) -> Mapping[str, Tensor]:
    """Of each site's inputs in every block, by the path of the first linear that reads them."""
    factors: dict[str, Any] = {}
    for index in range(subject.blocks):
        for group in GROUPS:
            name = full_name(index, group[0])
            if group[0].split(".")[1] in sites:
                weights = [w.float() for w in subject.weights(index, group).values()]
                folded = heads if group[0].endswith("o_proj") else None
                factors[name] = scale_factor(weights, statistics[name].hessian(), folded)
    return factors
