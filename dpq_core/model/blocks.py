"""Run a transformers model one block at a time, straight from its checkpoint.

The model is built without weights. Each call loads the parts that it needs, lets transformers' own
forward run through them with every other block skipped, and drops them again. Masks, rotary
embeddings and whatever else an architecture does around its blocks are therefore transformers',
and memory is bounded by one block and the hidden states that the caller keeps.

With `images` the blocks are those of the vision tower, its merger, and those of the language model,
in this order. A batch's hidden states are then patches [patches, vision hidden] up to the merger,
which puts what it makes of them among the embedded tokens.

After the last block comes the output head, which counts as a block where its inputs are asked for:
`block(block_count)`. It and the embedding can be quantized (`dpq_core.model.outside`).
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dpq_core.layer.linear import MakeLinear, W4A8Linear
from dpq_core.layer.records import QuantizedLinear
from dpq_core.model.anatomy import linears_of
from dpq_core.model.empty import keeps_wide
from dpq_core.model.experts import SeparateExperts
from dpq_core.model.families import Groups, family_of, members_of
from dpq_core.model.filling import Tensors, fill_parameters
from dpq_core.model.inputs import Batch, Call, ModelInputs
from dpq_core.model.observation import anatomy_of
from dpq_core.model.outside import Outside
from dpq_core.model.reader import CheckpointError
from dpq_core.model.stand_ins import NoEmbedding, Skip

_OF_TEXT = ("input_ids", "position_ids")


class BlockStream:
    """A causal LM whose weights stay where `reader` has them.

    Args:
        model: of `empty.empty_of`; its parts are taken out.
        images: stream the vision tower too. Without, a model that has one runs on text alone.

    Raises:
        ArchitectureError: see `dpq_core.model`.
        CheckpointError: images for a model without a vision tower.
    """

    def __init__(
        self,
        model: Any,
        reader: Tensors,
        device: torch.device | str = "cpu",
        images: bool = False,
    ) -> None:
        self.reader, self.model, self.images = reader, model, images
        self.anatomy = anatomy_of(model)
        self.vision = family_of(model.config.model_type).vision
        self.device = torch.device(device)
        self.dtype: torch.dtype = model.dtype
        if images and self.vision is None:
            raise CheckpointError(
                f"{reader.folder}: model_type {model.config.model_type!r} has no vision tower that"
                " is streamed, but calibration.image_column is set: leave it out"
            )
        # Everything but the blocks, by name: what a plan has to account for.
        self.parameters = {name: p.shape for name, p in model.named_parameters()}
        self.modules = {name: type(module) for name, module in model.named_modules()}
        self.wide = frozenset(keeps_wide(model, model.state_dict()))
        self._take_out()
        self._loaded: int | None = None
        self.kept: dict[str, nn.Module] | None = None  # parts that stay once they were read
        self.outside = Outside(self.anatomy.parts, reader)
        self.linear: MakeLinear = W4A8Linear  # what a quantized layer of a block becomes
        for module in model.modules():  # what is left: rotary buffers, towers without memory
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))

    def _take_out(self) -> None:
        """Put stand-ins for all parts whose weights come and go."""
        vision, parts, model = self.vision, self.anatomy.parts, self.model
        seen = [*self._children(vision.blocks), vision.merger] if vision else []
        language = self._children(parts.blocks)
        self._paths = (seen if self.images else []) + language
        self._first_language = len(self._paths) - len(language)
        self._empty_blocks = {path: model.get_submodule(path) for path in seen + language}
        self._stand_ins: dict[str, nn.Module] = {path: Skip() for path in seen}
        for path in language:
            self._stand_ins[path] = Skip(self.anatomy.tuple_length)
        for path in [*self.anatomy.after, parts.head, *([vision.patches] if vision else [])]:
            self._stand_ins[path] = Skip()
        width = model.get_submodule(parts.embedding).embedding_dim
        self._stand_ins[parts.embedding] = NoEmbedding(width, self.dtype)
        outside = self._stand_ins.keys() - self._empty_blocks.keys()
        self._empty = {path: model.get_submodule(path) for path in outside}
        for path, stand_in in self._stand_ins.items():
            model.set_submodule(path, stand_in)

    def keep_all(self) -> None:
        """The model came with its weights: all parts stay, and nothing is read."""
        self.kept = {**self._empty_blocks, **self._empty}

    @property
    def block_count(self) -> int:
        return len(self._paths)

    def block_name(self, index: int) -> str:
        """Path of a block, which the names of its tensors begin with; after the last, of the
        head."""
        return self._paths[index] if index < self.block_count else self.anatomy.parts.head

    def empty_block(self, index: int) -> nn.Module:
        """What `block` fills a copy of."""
        block: nn.Module = self._empty_blocks[self.block_name(index)]
        return block

    def groups(self, index: int) -> list[tuple[str, ...]]:
        """The linears of a block by full name, those that read the same input together.

        Raises:
            CheckpointError: a linear of a vision tower that the family's row does not name.
        """
        return [group for step in self.steps(index) for group in step]

    def steps(self, index: int) -> list[list[tuple[str, ...]]]:
        """`groups` in the order of calls, those together of which none feeds another: experts'."""
        path = self.block_name(index)
        if index == self.block_count:
            return [[(path,)]]
        linears = linears_of(self.empty_block(index))
        steps = [list(members_of((row,), linears)) for row in self._rows(index)]
        named = [name for step in steps for group in step for name in group]
        if wrong := set(linears).symmetric_difference(named):
            raise CheckpointError(
                f"{self.reader.folder}: {path}.{min(wrong)} is a linear layer of the model or of "
                "its row in dpq_core/model/families.py, not of both: mend the row's groups"
            )
        return [[tuple(f"{path}.{name}" for name in group) for group in step] for step in steps]

    def gate_rows(self, index: int) -> int:
        """Up to so many outputs a linear of a block with experts is a gate, which chooses or weighs
        them; 0 without experts."""
        modules = self.empty_block(index).modules()
        return max((len(each) for each in modules if isinstance(each, SeparateExperts)), default=0)

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linears of a block by full name, in the order of `groups`, without weights."""
        path, names = self.block_name(index), sum(self.groups(index), ())
        if index == self.block_count:
            return {path: self._empty[path]}
        block = self._empty_blocks[path]
        return {name: block.get_submodule(name.removeprefix(f"{path}.")) for name in names}

    def begin(self, inputs: Iterable[ModelInputs]) -> list[Batch]:
        """Hidden states before the first block."""
        with self.embedding() as begun:
            return [begun(each) for each in inputs]

    @contextmanager
    def embedding(self, remembered: bool = False) -> Iterator[Callable[[ModelInputs], Batch]]:
        """A function from inputs to their hidden states before the first block. remembered: what
        the model calls its blocks with (rotary embeddings, masks) is kept with them, and `forward`
        runs a block alone; else the model makes it anew for each."""
        part = self.vision.patches if self.images and self.vision else self.anatomy.parts.embedding

        def begun(inputs: ModelInputs) -> Batch:
            with torch.no_grad():
                calls = dict[str, Call]()
                batch = Batch.of(inputs, self._begun(inputs, calls))
                batch.calls = calls if remembered else {}
                return batch

        with self._running(), self._part(part):
            yield begun

    def _begun(self, inputs: ModelInputs, calls: dict[str, Call]) -> Tensor:
        if self.images:
            return self._tower(inputs, inputs["pixel_values"].to(self.dtype)).cpu()
        text = {n: x for n, x in inputs.items() if n in _OF_TEXT}
        return self._before_language(text, calls).cpu()

    def _before_language(self, inputs: ModelInputs, calls: dict[str, Call]) -> Tensor:
        """What comes to the first block of the language model. calls: gets what comes to each,
        besides hidden states."""
        given: list[Tensor] = []

        def caught(path: str) -> Callable[..., None]:
            def catch(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
                given.append(arguments[0] if arguments else named["hidden_states"])
                calls[path] = Call(arguments, named).of(given[0].new_empty(0))

            return catch

        with ExitStack() as hooks:
            for path in self._paths[self._first_language :]:
                block = self.model.get_submodule(path)
                hooks.enter_context(block.register_forward_pre_hook(caught(path), with_kwargs=True))
            self._run(inputs)
        return given[0]

    def _run(self, inputs: ModelInputs, **told: Any) -> None:
        on_device = {name: x.to(self.device) for name, x in inputs.items()}
        self.model.base_model(**on_device, **told, use_cache=False)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states after the last block. [n, length, hidden] → [n, length,
        vocabulary]."""
        with self.head() as logits_of:
            return logits_of(hidden).cpu()

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """The final norm and the output head: a function from hidden states after the last block
        to logits, on the model's device. Gradients as in `forward`."""
        with self._running(), ExitStack() as parts:
            for path in (*self.anatomy.after, self.anatomy.parts.head):
                parts.enter_context(self._part(path))
            yield self._logits

    def _logits(self, hidden: Tensor) -> Tensor:
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)
        feeding = self._feeding(self._paths[-1], hidden)
        with torch.set_grad_enabled(hidden.requires_grad), feeding:
            logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits

    @contextmanager
    def block(
        self,
        index: int,
        replacements: Mapping[str, QuantizedLinear] | None = None,
    ) -> Iterator[nn.Module]:
        """One block with its weights; `replacements` take the place of linears, by full name."""
        if index < self.block_count:
            with self.placed(index, self.made(index, replacements)) as block:
                yield block
            return
        with self.head():
            self._loaded = index
            try:
                yield self.model.get_submodule(self.anatomy.parts.head)
            finally:
                self._loaded = None

    def made(self, index: int, replacements: Mapping[str, QuantizedLinear] | None) -> nn.Module:
        """What `block` puts in its place."""
        path = self.block_name(index)
        block: nn.Module = copy.deepcopy(self._empty_blocks[path])
        for full_name, layer in (replacements or {}).items():
            bias_name = f"{full_name}.bias"
            bias = self.reader.tensor(bias_name) if bias_name in self.reader else None
            member = full_name.removeprefix(f"{path}.")
            bias = None if bias is None else bias.to(self.device)
            block.set_submodule(member, self.linear(layer.to(self.device), bias))
        self._fill(block, path)
        return block.eval()

    @contextmanager
    def placed(self, index: int, block: nn.Module) -> Iterator[nn.Module]:
        """A block of `made`, in its place while this lasts."""
        path = self.block_name(index)
        self.model.set_submodule(path, block)
        self._loaded = index
        try:
            with self._running(), ExitStack() as parts:
                if self.vision and path == self.vision.merger:
                    parts.enter_context(self._part(self.anatomy.parts.embedding))
                yield block
        finally:
            self.model.set_submodule(path, self._stand_ins[path])
            self._loaded = None

    def read_ahead(self, index: int) -> None:
        """Have a block read from the disk while something else goes on, if there is such a block;
        see `CheckpointReader.read_ahead`."""
        if index < self.block_count:
            self.reader.read_ahead(self.reader.under(self.block_name(index)))

    def forward(self, batch: Batch) -> Tensor:
        """A batch's hidden states after the block that is loaded now, on their own device; after
        the head, logits."""
        assert self._loaded is not None
        if self._loaded == self.block_count:
            return self._logits(batch.hidden).to(batch.hidden.device)
        path = self.block_name(self._loaded)
        if call := batch.calls.get(path):
            return self._alone(call, batch, path)
        with torch.set_grad_enabled(batch.hidden.requires_grad), self._feeding(path, batch.hidden):
            if self._loaded >= self._first_language:
                states = self._language(batch, path)
            elif self.vision and path == self.vision.merger:
                states = self._before_language(batch.inputs, {})
            else:
                states = self._tower(batch.inputs, batch.inputs["pixel_values"])
        return states.to(batch.hidden.device)

    def _alone(self, call: Call, batch: Batch, path: str) -> Tensor:
        """What a block gives, called as the model would."""
        given = call.of(batch.hidden.to(self.device))
        with torch.set_grad_enabled(batch.hidden.requires_grad):
            output = self.model.get_submodule(path)(*given.arguments, **given.named, **batch.told)
        return self._states(output).to(batch.hidden.device)

    def _states(self, output: Any) -> Tensor:
        """Of what a block of the language model returns."""
        states: Tensor = output if self.anatomy.tuple_length is None else output[0]
        return states

    def advance(self, batches: Sequence[Batch]) -> None:
        """`forward` of each batch in turn, in place of its hidden states."""
        for batch in batches:
            batch.hidden = self.forward(batch)

    def _language(self, batch: Batch, path: str) -> Tensor:
        """What a block of the language model gives; positions of image tokens are of their grid."""
        given: list[Any] = []
        about = {
            name: x
            for name, x in batch.inputs.items()
            if name in _OF_TEXT or (self.images and name != "pixel_values")
        }
        block = self.model.get_submodule(path)
        handle = block.register_forward_hook(lambda _, __, output: given.append(output))
        try:
            self._run(about, **batch.told)
        finally:
            handle.remove()
        return self._states(given[0])

    def _tower(self, inputs: ModelInputs, patches: Tensor) -> Tensor:
        """Hidden states of the vision tower after the block that is loaded now, if any."""
        assert self.vision is not None
        tower = self.model.get_submodule(self.vision.tower)
        grid = inputs["image_grid_thw"].to(self.device)
        states: Tensor = tower(patches.to(self.device), grid_thw=grid).last_hidden_state
        return states

    @contextmanager
    def _feeding(self, path: str, hidden: Tensor) -> Iterator[None]:
        """Give a module these hidden states, whatever comes to it: what is done before the first
        block (scaled embeddings, positions, a tower's order of patches) is in them already."""
        states = hidden.to(self.device)

        def feed(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            call = Call(arguments, named).of(states)
            return call.arguments, call.named

        module = self.model.get_submodule(path)
        handle = module.register_forward_pre_hook(feed, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _running(self) -> Iterator[None]:
        """With the parts before the blocks but the embedding: a model runs through them whatever
        block it is run for. Small ones (positions, a norm), which stay."""
        for path in self.anatomy.before:
            part = self.model.get_submodule(path)
            if any(parameter.is_meta for parameter in part.parameters()):
                self._fill(part, path)
        yield

    def _children(self, path: str) -> list[str]:
        return [f"{path}.{name}" for name, _ in self.model.get_submodule(path).named_children()]

    def _rows(self, index: int) -> Groups:
        if self.vision is None or index >= self._first_language:
            return self.anatomy.groups[index - self._first_language]
        is_merger = self.block_name(index) == self.vision.merger
        return self.vision.merger_groups if is_merger else self.vision.block_groups

    @contextmanager
    def _part(self, path: str) -> Iterator[None]:
        part = (self.kept or {}).get(path) or self._read(path)
        if self.kept is not None:
            self.kept[path] = part
        before = self.model.get_submodule(path)
        self.model.set_submodule(path, part)
        try:
            yield
        finally:
            self.model.set_submodule(path, before)

    def _read(self, path: str) -> nn.Module:
        part = self.outside.filled(path, copy.deepcopy(self._empty[path]), self.dtype)
        self._fill(part, path)
        return part

    def _fill(self, module: nn.Module, name: str) -> None:
        fill_parameters(module, f"{name}.", self.reader, self.dtype)
        module.to(self.device)
