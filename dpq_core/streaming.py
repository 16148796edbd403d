"""Run a transformers model one block at a time, straight from its checkpoint.

The model is built without weights. Each call loads the parts that it needs, lets transformers' own
forward run through them with every other block skipped, and drops them again. Masks, rotary
embeddings and whatever else an architecture does around its blocks are therefore transformers',
and memory is bounded by one block and the hidden states that the caller keeps.

With `images` the blocks are those of the vision tower, its merger, and those of the language model,
in this order. A batch's hidden states are then patches [patches, vision hidden] up to the merger,
which puts what it makes of them among the embedded tokens.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from dpq_core.experts import separate_experts
from dpq_core.families import FAMILIES, Groups, members_of
from dpq_core.inputs import Batch, ModelInputs
from dpq_core.linear import W4A8Linear
from dpq_core.quantize import QuantizedLinear
from dpq_core.reader import (
    CheckpointError,
    CheckpointReader,
    family_of,
    model_type_of,
    read_config,
    stored_type,
)
from dpq_core.sixteen_bit import fit


class _Skip(nn.Module):
    """Stands where a block is not run: hands the hidden states on."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


class StreamedModel:
    """A causal LM whose weights stay on disk.

    Args:
        images: stream the vision tower too. Without, a model that has one runs on text alone.
        trust_remote_code: run the checkpoint's own model code.

    Raises:
        CheckpointError: unreadable checkpoint, an architecture that is not in the model table, or
            images for a model without a vision tower.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device | str = "cpu",
        images: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        self.reader = CheckpointReader(folder)
        self.family = family_of(folder)
        self.device = torch.device(device)
        self.model = empty_model(folder, trust_remote_code)
        self.dtype: torch.dtype = self.model.dtype
        self.images = images
        vision = self.family.vision
        if images and vision is None:
            raise CheckpointError(
                f"{folder}: model_type {model_type_of(folder)!r} has no vision tower, but "
                "calibration.image_column is set: leave it out"
            )
        # Everything but the blocks, by name: what a plan has to account for.
        self.parameters = {name: p.shape for name, p in self.model.named_parameters()}
        self.modules = {name: type(module) for name, module in self.model.named_modules()}
        seen = [*self._children(vision.blocks), vision.merger] if vision else []
        language = self._children(self.family.blocks)
        self._paths = (seen if images else []) + language
        self._first_language = len(self._paths) - len(language)
        self._empty_blocks = {path: self.model.get_submodule(path) for path in seen + language}
        parts = [self.family.embedding, self.family.norm, self.family.head]
        parts += [vision.patches] if vision else []
        self._empty = {path: self.model.get_submodule(path) for path in parts}
        for path in self._empty_blocks:
            self.model.set_submodule(path, _Skip())
        for path in self._empty:
            self.model.set_submodule(path, nn.Identity())
        self._loaded: int | None = None
        self.model.to(self.device)  # what is left: rotary buffers

    @property
    def block_count(self) -> int:
        return len(self._paths)

    def block_name(self, index: int) -> str:
        """Path of a block, which the names of its tensors begin with."""
        return self._paths[index]

    def groups(self, index: int) -> list[tuple[str, ...]]:
        """The linears of a block by full name, those that read the same input together.

        Raises:
            CheckpointError: the block has a linear that the family's row does not name.
        """
        path = self.block_name(index)
        block = self._empty_blocks[path]
        linears = [name for name, m in block.named_modules() if isinstance(m, nn.Linear)]
        groups = list(members_of(self._rows(index), linears))
        unknown = set(linears).symmetric_difference(name for group in groups for name in group)
        if unknown:
            raise CheckpointError(
                f"{self.reader.folder}: {path}.{min(unknown)} is a linear layer of the model or of "
                "its row in dpq_core/families.py, not of both: mend the row's groups"
            )
        return [tuple(f"{path}.{name}" for name in group) for group in groups]

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linears of a block by full name, in the family's order, without weights."""
        path = self.block_name(index)
        block = self._empty_blocks[path]
        return {
            name: block.get_submodule(name.removeprefix(f"{path}."))
            for group in self.groups(index)
            for name in group
        }

    def begin(self, inputs: Iterable[ModelInputs]) -> list[Batch]:
        """Hidden states before the first block."""
        with self.embedding() as begun:
            return [begun(each) for each in inputs]

    @contextmanager
    def embedding(self) -> Iterator[Callable[[ModelInputs], Batch]]:
        """A function from inputs to their hidden states before the first block."""
        vision = self.family.vision
        part = vision.patches if self.images and vision else self.family.embedding

        def begun(inputs: ModelInputs) -> Batch:
            with torch.no_grad():
                return Batch.of(inputs, self._begun(inputs))

        with self._part(part):
            yield begun

    def _begun(self, inputs: ModelInputs) -> Tensor:
        if self.images:
            return self._tower(inputs, inputs["pixel_values"].to(self.dtype)).cpu()
        output = self.model.base_model(input_ids=inputs["input_ids"].to(self.device))
        states: Tensor = output.last_hidden_state.cpu()
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """Of hidden states after the last block. [n, length, hidden] → [n, length, vocabulary]."""
        with self.head() as logits_of:
            return logits_of(hidden).cpu()

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """The final norm and the output head: a function from hidden states after the last block
        to logits, on the model's device. Gradients as in `forward`."""

        def logits_of(hidden: Tensor) -> Tensor:
            with torch.set_grad_enabled(hidden.requires_grad):
                logits: Tensor = self.model(inputs_embeds=hidden.to(self.device)).logits
            return logits

        with self._part(self.family.norm), self._part(self.family.head):
            yield logits_of

    @contextmanager
    def block(
        self,
        index: int,
        replacements: Mapping[str, QuantizedLinear] | None = None,
    ) -> Iterator[nn.Module]:
        """One block with its weights; `replacements` take the place of linears, by full name."""
        path = self.block_name(index)
        block = copy.deepcopy(self._empty_blocks[path])
        for full_name, layer in (replacements or {}).items():
            bias_name = f"{full_name}.bias"
            bias = self.reader.tensor(bias_name) if bias_name in self.reader else None
            member = full_name.removeprefix(f"{path}.")
            block.set_submodule(member, W4A8Linear(layer, bias))
        self._fill(block, path)
        self.model.set_submodule(path, block.eval())
        self._loaded = index
        try:
            with ExitStack() as parts:
                if self.family.vision and path == self.family.vision.merger:
                    parts.enter_context(self._part(self.family.embedding))
                yield block
        finally:
            self.model.set_submodule(path, _Skip())
            self._loaded = None

    def read_ahead(self, index: int) -> None:
        """Have a block read from the disk while something else goes on, if there is such a block;
        see `CheckpointReader.read_ahead`."""
        if index < self.block_count:
            self.reader.read_ahead(self.reader.under(self.block_name(index)))

    def forward(self, batch: Batch) -> Tensor:
        """A batch's hidden states after the block that is loaded now, on their own device."""
        assert self._loaded is not None
        vision, path = self.family.vision, self.block_name(self._loaded)
        with torch.set_grad_enabled(batch.hidden.requires_grad):
            if self._loaded >= self._first_language:
                states = self._language(batch)
            elif vision and path == vision.merger:
                with self._feeding(path, batch.hidden):
                    inputs = {name: x.to(self.device) for name, x in batch.inputs.items()}
                    states = self.model.base_model(**inputs).last_hidden_state
            else:
                with self._feeding(path, batch.hidden):
                    states = self._tower(batch.inputs, batch.inputs["pixel_values"])
        return states.to(batch.hidden.device)

    def advance(self, batches: Sequence[Batch]) -> None:
        """`forward` of each batch in turn, in place of its hidden states."""
        for batch in batches:
            batch.hidden = self.forward(batch)

    def _language(self, batch: Batch) -> Tensor:
        """Through the language model's blocks; positions of image tokens are of their grid."""
        about = {
            name: x.to(self.device)
            for name, x in batch.inputs.items()
            if self.images and name != "pixel_values"
        }
        output = self.model.base_model(**about, inputs_embeds=batch.hidden.to(self.device))
        states: Tensor = output.last_hidden_state
        return states

    def _tower(self, inputs: ModelInputs, patches: Tensor) -> Tensor:
        """Hidden states of the vision tower after the block that is loaded now, if any."""
        assert self.family.vision is not None
        tower = self.model.get_submodule(self.family.vision.tower)
        grid = inputs["image_grid_thw"].to(self.device)
        states: Tensor = tower(patches.to(self.device), grid_thw=grid).last_hidden_state
        return states

    @contextmanager
    def _feeding(self, path: str, hidden: Tensor) -> Iterator[None]:
        """Give a module these hidden states, whatever comes to it. A tower reorders its patches
        before the first block: what was stored has that order already."""

        def feed(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            return (hidden.to(self.device), *arguments[1:])

        handle = self.model.get_submodule(path).register_forward_pre_hook(feed)
        try:
            yield
        finally:
            handle.remove()

    def _children(self, path: str) -> list[str]:
        return [f"{path}.{name}" for name, _ in self.model.get_submodule(path).named_children()]

    def _rows(self, index: int) -> Groups:
        vision = self.family.vision
        if vision is None or index >= self._first_language:
            return self.family.groups
        is_merger = self.block_name(index) == vision.merger
        return vision.merger_groups if is_merger else vision.block_groups

    @contextmanager
    def _part(self, path: str) -> Iterator[None]:
        part = copy.deepcopy(self._empty[path])
        tied = path == self.family.head and f"{path}.weight" not in self.reader
        self._fill(part, self.family.embedding if tied else path)
        self.model.set_submodule(path, part)
        try:
            yield
        finally:
            self.model.set_submodule(path, nn.Identity())

    def _fill(self, module: nn.Module, name: str) -> None:
        fill_parameters(module, f"{name}.", self.reader, self.dtype)
        module.to(self.device)


def fill_parameters(
    module: nn.Module, prefix: str, reader: CheckpointReader, dtype: torch.dtype
) -> None:
    """Give a module's empty parameters the checkpoint's tensors, `prefix` + the parameter's name.

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
    state = {name: tensors[prefix + name].to(dtype) for name in empty}
    with building:
        module.load_state_dict(state, strict=False, assign=True)


# While accelerate makes empty weights, it redirects the parameters that any thread sets: whoever
# builds or fills a model holds this.
building = RLock()


def empty_model(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers model of a checkpoint's configuration, parameters without memory, experts
    one by one.

    Sixteen-bit checkpoints keep their type, that of their tensors where `config.json` names none;
    anything wider is run in BF16.

    Raises:
        CheckpointError: a configuration that transformers does not know, or only with the
            checkpoint's own code.
    """
    config = load_config(folder, trust_remote_code)
    for each in (config, config.get_text_config()):
        if hasattr(each, "quantization_config"):
            del each.quantization_config  # transformers and lm-eval would look it up
    dtype = sixteen_bit_type(config, folder)
    family = FAMILIES.get(config.model_type)
    auto = AutoModelForImageTextToText if family and family.vision else AutoModelForCausalLM
    with building, init_empty_weights(include_buffers=False):
        model = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        if family and family.experts:
            separate_experts(model.get_submodule(family.blocks), family.experts)
    return fit(model).eval()


def sixteen_bit_type(config: Any, folder: Path) -> torch.dtype:
    """The type that a checkpoint's model runs in."""
    half = (torch.bfloat16, torch.float16)
    found: torch.dtype = config.dtype if config.dtype in half else stored_type(folder)
    return found


def as_run(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as it is read, for a model that runs in `dtype`: wider ones of FP16 models are
    narrowed, since these are the numbers that the model multiplies with."""
    return weight.to(dtype) if dtype == torch.float16 else weight


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """transformers' configuration of a checkpoint.

    Raises:
        CheckpointError: as `empty_model`.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        if "auto_map" in read_config(folder) and not trust_remote_code:
            raise CheckpointError(
                f"{folder}: model_type {model_type_of(folder)!r} is code of the checkpoint's own, "
                "which is not run: read it, and set model.trust_remote_code: true to run it"
            ) from error
        raise CheckpointError(
            f"{folder / 'config.json'}: {next(iter(str(error).strip().splitlines()), error)}"
        ) from error
