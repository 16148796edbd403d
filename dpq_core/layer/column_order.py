"""The order in which the column loop takes columns, which is undone before anything is stored."""

import torch
from torch import Tensor

from dpq_core.recipe.scheme import OrderName


def column_order(diagonal: Tensor, order: OrderName, group_size: int) -> Tensor:
    """π: the column handled at each step. `diagonal` is diag(H) [in]; int64 [in].

    gar (Group-Aware Reordering): columns by diag(H) descending inside a group, groups by their
    largest diag(H) descending, both stable; a short last group stays last.
    """
    features = len(diagonal)
    if order == "none":
        return torch.arange(features, device=diagonal.device)
    if order == "activation":
        return diagonal.argsort(descending=True, stable=True)
    whole = features // group_size * group_size
    groups = diagonal[:whole].view(-1, group_size)
    inside = groups.argsort(dim=1, descending=True, stable=True)
    columns = inside + torch.arange(len(groups), device=diagonal.device)[:, None] * group_size
    leading = groups.amax(1).argsort(descending=True, stable=True)
    tail = diagonal[whole:].argsort(descending=True, stable=True) + whole
    return torch.cat([columns[leading].flatten(), tail])
