"""Where the parts of a language model are, by the model's own interfaces.

    embedding, head   `get_input_embeddings()`, `get_output_embeddings()`
    blocks            the longest list of modules beside the embedding, itself in no other list

What no interface tells (which linears of a block read the same input, what is read before and after
the blocks) is seen in a forward of a small instance: `dpq_core.model.observation`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from dpq_core.model.experts import SeparateExperts
from dpq_core.model.families import Groups
from dpq_core.model.reader import CheckpointError


class ArchitectureError(CheckpointError):
    """A model that is not quantized, with one line that names the module in the way."""

    @classmethod
    def of(cls, model: Any, why: str) -> "ArchitectureError":
        name = f"{type(model).__name__} (model_type {model.config.model_type!r})"
        return cls(f"{name}: {why}: this architecture is not quantized")


@dataclass(frozen=True)
class Parts:
    """Paths of a model's parts. blocks: of their list."""

    embedding: str
    blocks: str
    head: str


@dataclass(frozen=True)
class Anatomy:
    """A model as blocks.

    before, after: modules with parameters that a text reads outside the blocks, but for embedding
    and head. groups: of each block, the linears that read one input together, in the order in which
    they are called. tuple_length: of what a block returns; None: hidden states alone.
    """

    parts: Parts
    before: tuple[str, ...]
    after: tuple[str, ...]
    groups: tuple[Groups, ...]
    tuple_length: int | None


def parts_of(model: Any) -> Parts:
    """The parts of a transformers model.

    Raises:
        ArchitectureError: one of them is not there.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        found = f"embedding {type(embedding).__name__}, output head {type(head).__name__}"
        raise ArchitectureError.of(
            model, f"{found}, where an nn.Embedding and nn.Linear are needed"
        )
    above = path_of(model, embedding)
    while above:
        above = above.rpartition(".")[0]
        if lists := _lists_under(model, above):
            blocks = max(lists, key=lambda name: lists[name])  # the first of the longest
            return Parts(path_of(model, embedding), blocks, path_of(model, head))
    raise ArchitectureError.of(model, "no list of blocks, an nn.ModuleList, beside the embedding")


def _lists_under(model: nn.Module, path: str) -> dict[str, int]:
    """Lengths of the module lists below a path, but for lists in lists (experts, heads' norms)."""
    found: dict[str, int] = {}
    for name, module in model.get_submodule(path).named_modules(prefix=path):
        inside = any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.ModuleList) and not inside:
            found[name] = len(module)
    return found


def path_of(model: nn.Module, part: nn.Module) -> str:
    """A part's name in the model."""
    return str(next(name for name, module in model.named_modules() if module is part))


def linears_of(block: nn.Module) -> list[str]:
    """Names of a block's linears."""
    return [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]


def experts_of(block: nn.Module) -> list[str]:
    """Paths of a block's experts."""
    return [name for name, each in block.named_modules() if isinstance(each, SeparateExperts)]


def wildcarded(experts: list[str], name: str) -> str:
    """The name of a linear in a block with these experts, `*` for an expert's number."""
    for path in experts:
        if name.startswith(f"{path}."):
            return f"{path}.*.{name.removeprefix(f'{path}.').partition('.')[2]}"
    return name


def kinds_of(model: Any, parts: Parts) -> list[tuple[str, ...]]:
    """What tells each block from those that compute otherwise: its class, its kind of attention
    where the configuration names one, its linears."""
    kinds, types = [], getattr(model.config.get_text_config(), "layer_types", None)
    for number, block in enumerate(model.get_submodule(parts.blocks)):
        experts = experts_of(block)
        names = sorted({wildcarded(experts, name) for name in linears_of(block)})
        kinds.append((type(block).__name__, str(types[number]) if types else "", *names))
    return kinds


def check_blocks(model: Any, parts: Parts) -> None:
    """Refuse what cannot be quantized linear by linear, before anything is run.

    Raises:
        ArchitectureError: naming the first module that stands in the way.
    """
    for path, module in in_blocks(model, parts):
        if reason := _in_the_way(module):
            raise ArchitectureError.of(model, f"{path} ({type(module).__name__}) {reason}")


def in_blocks(model: Any, parts: Parts) -> Iterator[tuple[str, nn.Module]]:
    """All modules of all blocks by full name."""
    yield from model.get_submodule(parts.blocks).named_modules(prefix=parts.blocks)


def _in_the_way(module: nn.Module) -> str | None:
    own = [p for p in module.parameters(recurse=False) if p.ndim > 1]
    if isinstance(module, Conv1D):
        return "is a product with a transposed weight, which is no linear layer"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolves along the text, as state space and gated delta layers do"
    if isinstance(module, nn.Linear | nn.Embedding) or not own:
        return None
    if any(p.ndim > 2 for p in own):
        return "holds matrices of several experts in one tensor, in a layout of its own"
    if any(True for _ in module.children()):
        return "multiplies by a matrix of its own beside its linears"
    return None
