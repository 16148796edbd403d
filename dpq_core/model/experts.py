"""Experts of a mixture, one linear a matrix, as checkpoints hold them.

transformers 5 keeps all experts of a block in two fused parameters, [experts, 2·ffn, hidden] and
[experts, hidden, ffn], which hold no linear layer to calibrate or to replace. `separate_experts`
puts this module in their place; it computes what transformers' own loop over experts does.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpq_core.errors import CheckpointError
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


@dataclass(frozen=True)
class Given:
    """What a linear was given: x [..., in], of all tokens, or of these [n] int64, ascending."""

    x: Tensor
    tokens: Tensor | None

    def as_given(self, other: "Given | None", linear: str) -> Tensor:
        """What another model gives the same linear, for the tokens of this one's x [tokens, in].
        Where it sends a token to other experts, what this one gives stands for it.

        Raises:
            CheckpointError: which tokens the models gave it is not known.
        """
        mine = self.x.reshape(-1, self.x.shape[-1])
        if self.tokens is not None:
            found = mine.clone()
            if other is not None and other.tokens is not None and len(other.tokens):
                at = torch.searchsorted(other.tokens, self.tokens).clamp_(max=len(other.tokens) - 1)
                same = other.tokens[at] == self.tokens
                found[same] = other.x.reshape(-1, self.x.shape[-1])[at[same]]
            return found
        if other is None or other.x.shape != self.x.shape:
            got = "none" if other is None else f"inputs {[*other.x.shape]}"
            raise CheckpointError(
                f"{linear}: the quantized model gives it inputs {[*self.x.shape]}, the 16-bit model"
                f" {got}, and which belong together is not known: leave calibration.correction out"
            )
        return other.x.reshape(mine.shape)


class Routing:
    """Which tokens each expert of a block is given, as of the last time that the block was run.

    path: the block's.
    """

    def __init__(self, block: nn.Module, path: str) -> None:
        self._chosen: dict[str, Tensor] = {}  # path of experts → [tokens, k] int64, experts
        self._experts = {
            f"{path}.{name}.": module
            for name, module in block.named_modules()
            if isinstance(module, SeparateExperts)
        }

    def tokens(self, linear: str) -> Tensor | None:
        """Those that a linear was given, by full name, [n] int64 ascending; None where it is no
        expert's: all of them."""
        for path, chosen in self._chosen.items():
            if linear.startswith(path):
                number = int(linear.removeprefix(path).partition(".")[0])
                return torch.where(chosen == number)[0]
        return None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While the block is run."""

        def see(path: str, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._chosen[path] = named["top_k_index"] if "top_k_index" in named else arguments[1]

        handles = [
            module.register_forward_pre_hook(partial(see, path), with_kwargs=True)
            for path, module in self._experts.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


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
