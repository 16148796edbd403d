"""The parts outside the blocks that can be quantized: the output head and the embedding.

A head is a linear like any other. An embedding stays the module that the architecture has (one may
scale what it looks up), with Ŵ16 in the model's type for its weight: what is looked up are decoded
rows. A head that stores no weight is tied to the embedding; then one layer is both, which has the
embedding's name, under which checkpoints store the weight, and the head's inputs for its Hessian.
"""

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from dpq_core.layer.linear import MakeLinear, W4A8Linear, decoded
from dpq_core.layer.records import QuantizedLinear
from dpq_core.model.anatomy import Parts
from dpq_core.model.empty import building
from dpq_core.model.filling import Tensors


class Outside:
    """Head and embedding of a model whose tensors `reader` has."""

    def __init__(self, parts: Parts, reader: Tensors) -> None:
        self._parts, self._reader = parts, reader
        self._layers: dict[str, Callable[[], QuantizedLinear]] = {}  # by the part's path

    def weight_of(self, path: str) -> str:
        """The module under whose name the head's weight, or the embedding's, is stored."""
        own = any(f"{path}.{kind}" in self._reader for kind in ("weight", "weight_packed"))
        return path if own else self._parts.embedding

    def quantize(self, names: Container[str], layer: Callable[[str], QuantizedLinear]) -> None:
        """Take quantized layers from now on, for those whose weights are among `names`."""
        for path in (self._parts.embedding, self._parts.head):
            if (name := self.weight_of(path)) in names:
                self._layers[path] = partial(layer, name)

    def quantized(self, path: str) -> bool:
        return path in self._layers

    @contextmanager
    def trying(self, name: str, layer: QuantizedLinear) -> Iterator[None]:
        """`quantize` with one layer, while this lasts."""
        before = dict(self._layers)
        self.quantize({name}, lambda _: layer)
        try:
            yield
        finally:
            self._layers = before

    def filled(
        self, path: str, part: nn.Module, dtype: torch.dtype, linear: MakeLinear = W4A8Linear
    ) -> nn.Module:
        """An empty part with what `fill_parameters` would not find: a quantized layer (of a head
        what `linear` makes of it), or the weight that it is tied to. Any other part as it is."""
        if made := self._layers.get(path):
            layer = made()
            if not isinstance(part, nn.Embedding):
                bias = f"{path}.bias"
                return linear(layer, self._reader.tensor(bias) if bias in self._reader else None)
            with building:
                part.weight = nn.Parameter(decoded(layer, dtype), requires_grad=False)
            return part
        if path == self._parts.head and self.weight_of(path) != path:
            embedded = self._reader.tensor(f"{self._parts.embedding}.weight").to(dtype)
            with building:
                part.weight = nn.Parameter(embedded, requires_grad=False)
        return part
