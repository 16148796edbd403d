"""Give a model without memory the tensors of a checkpoint, part by part."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from dpq_core.model.empty import building
from dpq_core.model.reader import CheckpointError


class Tensors(Protocol):
    """What a stream reads: a `CheckpointReader`, or tensors at hand."""

    folder: Path

    def __contains__(self, name: str) -> bool: ...
    def tensor(self, name: str) -> Tensor: ...
    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]: ...
    def under(self, prefix: str) -> list[str]: ...
    def read_ahead(self, names: Iterable[str]) -> None: ...


def fill_parameters(module: nn.Module, prefix: str, reader: Tensors, dtype: torch.dtype) -> None:
    """Give a module's empty parameters the checkpoint's tensors, `prefix` + the parameter's name,
    and its buffers those that are stored. What the architecture keeps in FP32 stays, all else is
    of `dtype`.

    Raises:
        CheckpointError: a tensor is missing or not of the shape that `config.json` asks for.
    """
    empty = {name: p for name, p in module.named_parameters() if p.is_meta}
    tensors = reader.tensors(prefix + name for name in empty)
    for name, parameter in empty.items():
        found = tensors[prefix + name].shape
        if found != parameter.shape:
            raise CheckpointError(
                f"{reader.folder}: tensor {prefix}{name} is {list(found)}, "
                f"but config.json asks for {list(parameter.shape)}"
            )
    state = {
        name: tensors[prefix + name].to(torch.float32 if p.dtype == torch.float32 else dtype)
        for name, p in empty.items()
    }
    for name, buffer in _stored_buffers(module):
        if prefix + name in reader:
            state[name] = reader.tensor(prefix + name).to(buffer.dtype)
    with building:
        module.load_state_dict(state, strict=False, assign=True)


def _stored_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What checkpoints hold besides parameters (a router's correction): of transformers' modules,
    ours having been given theirs."""
    stored = module.state_dict(keep_vars=True)
    for path, owner in module.named_modules():
        if type(owner).__module__.partition(".")[0] != "dpq_core":
            for name, buffer in owner.named_buffers(prefix=path, recurse=False):
                if name in stored:
                    yield name, buffer
