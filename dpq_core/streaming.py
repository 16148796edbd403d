"""Run a transformers model one decoder block at a time, straight from its checkpoint.

The model is built without weights. Each call loads the parts that it needs, lets transformers' own
forward run through them with every other block skipped, and drops them again. Masks, rotary
embeddings and whatever else an architecture does around its blocks are therefore transformers',
and memory is bounded by one block and the hidden states that the caller keeps.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dpq_core.families import family_of
from dpq_core.linear import W4A8Linear
from dpq_core.quantize import QuantizedLinear
from dpq_core.reader import CheckpointError, CheckpointReader, read_config


class _Skip(nn.Module):
    """Stands where a block is not run: hands the hidden states on."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


class StreamedModel:
    """A causal LM whose weights stay on disk.

    Raises:
        CheckpointError: unreadable checkpoint, or an architecture that is not in the model table.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self.reader = CheckpointReader(folder)
        self.family = family_of(str(read_config(folder).get("model_type")))
        self.device = torch.device(device)
        self.model = empty_model(folder)
        self.dtype: torch.dtype = self.model.dtype
        blocks = self.model.get_submodule(self.family.blocks)
        self._empty_blocks = list(blocks)
        for index in range(len(self._empty_blocks)):
            blocks[index] = _Skip()
        self._empty = {
            path: self.model.get_submodule(path)
            for path in (self.family.embedding, self.family.norm, self.family.head)
        }
        for path in self._empty:
            self.model.set_submodule(path, nn.Identity())
        self.model.to(self.device)  # what is left: rotary buffers

    @property
    def block_count(self) -> int:
        return len(self._empty_blocks)

    def block_name(self, index: int) -> str:
        """Path of a block, which the names of its tensors begin with."""
        return f"{self.family.blocks}.{index}"

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linears of a block by full name, in the family's order, without weights."""
        return {
            f"{self.block_name(index)}.{member}": self._empty_blocks[index].get_submodule(member)
            for group in self.family.shared_inputs
            for member in group
        }

    def embed(self, windows: Tensor, batch_size: int) -> Tensor:
        """Hidden states before the first block. [n, length] int64 → [n, length, hidden]."""
        with self._part(self.family.embedding), torch.no_grad():
            batches = [
                self.model.base_model(input_ids=batch.to(self.device)).last_hidden_state.cpu()
                for batch in windows.split(batch_size)
            ]
        return torch.cat(batches)

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
        name = self.block_name(index)
        block = copy.deepcopy(self._empty_blocks[index])
        for full_name, layer in (replacements or {}).items():
            bias_name = f"{full_name}.bias"
            bias = self.reader.tensor(bias_name) if bias_name in self.reader else None
            member = full_name.removeprefix(f"{name}.")
            block.set_submodule(member, W4A8Linear(layer, bias))
        self._fill(block, name)
        path = f"{self.family.blocks}.{index}"
        self.model.set_submodule(path, block.eval())
        try:
            yield block
        finally:
            self.model.set_submodule(path, _Skip())

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states through the blocks that are loaded now. [n, length, hidden], same out.
        Gradients are followed where `hidden` requires them."""
        with torch.set_grad_enabled(hidden.requires_grad):
            output = self.model.base_model(inputs_embeds=hidden.to(self.device))
        states: Tensor = output.last_hidden_state
        return states.to(hidden.device)

    def advance(self, hidden: Tensor, batch_size: int) -> None:
        """`forward` in place, batch by batch: the hidden states exist once."""
        for batch in hidden.split(batch_size):
            batch.copy_(self.forward(batch))

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


def check_tensors(folder: Path) -> None:
    """Every parameter that `config.json` asks for is in the checkpoint, of that shape.

    Raises:
        CheckpointError: naming the first tensor that is not.
    """
    reader, model = CheckpointReader(folder), empty_model(folder)
    head = model.get_output_embeddings()
    for name, parameter in model.named_parameters():
        if name not in reader:
            if parameter is head.weight and model.config.tie_word_embeddings:
                continue
            raise CheckpointError(f"{folder}: tensor {name} is missing")
        found, expected = reader.shape_and_type(name)[0], list(parameter.shape)
        if found != expected:
            raise CheckpointError(
                f"{folder}: tensor {name} is {found}, but config.json asks for {expected}"
            )


# While accelerate makes empty weights, it redirects the parameters that any thread sets: whoever
# builds or fills a model holds this.
building = RLock()


def empty_model(folder: Path) -> Any:
    """The transformers model of a checkpoint's configuration, parameters without memory.

    Sixteen-bit checkpoints keep their type; anything wider is run in BF16.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # ours: transformers and lm-eval would look it up
    half = (torch.bfloat16, torch.float16)
    dtype = config.dtype if config.dtype in half else torch.bfloat16
    with building, init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
