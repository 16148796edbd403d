"""Experts of a mixture, one linear a matrix, as checkpoints hold them.

transformers 5 keeps all experts of a block in two fused parameters, [experts, 2·ffn, hidden] and
[experts, hidden, ffn], which hold no linear layer to calibrate or to replace. `separate_experts`
puts this module in their place; it computes what transformers' own loop over experts does.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpq_core.model.families import Experts


class SeparateExperts(nn.ModuleList):
    """y[t] = Σ_e weight[t, e] · down_e(act(gate_e(x[t])) · up_e(x[t])) over the experts of a token.

    Experts without a token are not run.
    """

    def __init__(self, fused: Any, row: Experts) -> None:
        hidden, ffn = fused.hidden_dim, fused.intermediate_dim
        like = {"dtype": fused.down_proj.dtype, "device": fused.down_proj.device}

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, **like)

        members = {
            row.gate: linear(hidden, ffn),
            row.up: linear(hidden, ffn),
            row.down: linear(ffn, hidden),
        }
        one = nn.ModuleDict(members)  # initialised once: a model has thousands
        super().__init__(copy.deepcopy(one) for _ in range(fused.num_experts))
        self._act, self._row = fused.act_fn, row

    def forward(
        self,
        hidden_states: Tensor,  # [tokens, hidden]
        top_k_index: Tensor,  # [tokens, k] int64, experts
        top_k_weights: Tensor,  # [tokens, k]
    ) -> Tensor:
        """[tokens, hidden]."""
        output = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            tokens, places = torch.where(top_k_index == number)
            expert, x = self[number], hidden_states[tokens]
            inner = self._act(expert[self._row.gate](x)) * expert[self._row.up](x)
            y = expert[self._row.down](inner) * top_k_weights[tokens, places, None]
            output.index_add_(0, tokens, y.to(output.dtype))
        return output


def separate_experts(model: nn.Module, row: Experts) -> None:
    """Replace all fused experts of a model, those that compute what `SeparateExperts` does by their
    attributes. Others stay, and are found to stand in the way."""
    for name, module in list(model.named_modules()):
        if _is_fused(module):
            model.set_submodule(name, SeparateExperts(module, row))


def _is_fused(module: Any) -> bool:
    if any(not hasattr(module, name) for name in ("gate_up_proj", "hidden_dim", "act_fn")):
        return False
    shape = (module.num_experts, 2 * module.intermediate_dim, module.hidden_dim)
    return tuple(module.gate_up_proj.shape) == shape


def fused(tensors: Mapping[str, Tensor], path: str, row: Experts) -> dict[str, Tensor]:
    """The two fused parameters of the experts at a path, from tensors that hold them one by one."""
    count = len({name for name in tensors if name.startswith(f"{path}.")}) // 3

    def stacked(member: str) -> Tensor:  # [experts, out, in]
        return torch.stack([tensors[f"{path}.{n}.{member}.weight"] for n in range(count)])

    return {
        f"{path}.gate_up_proj": torch.cat([stacked(row.gate), stacked(row.up)], 1),
        f"{path}.down_proj": stacked(row.down),
    }
