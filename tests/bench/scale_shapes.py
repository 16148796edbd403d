"""Llama shapes, for arithmetic about models that are not here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama family."""

    name: str
    blocks: int
    hidden: int
    intermediate: int
    key_value: int  # rows of k and v
    other: int  # parameters that are not quantized

    def inputs(self) -> list[tuple[int, list[int]]]:
        """Distinct inputs of a block: features, and rows of the layers that read them."""
        hidden, inner = self.hidden, self.intermediate
        return [
            (hidden, [hidden, self.key_value, self.key_value]),
            (hidden, [hidden]),
            (hidden, [inner, inner]),
            (inner, [hidden]),
        ]

    @property
    def weights(self) -> int:
        return self.blocks * sum(n * sum(rows) for n, rows in self.inputs())


SHAPES = (
    Shape("Llama-3.1-8B", 32, 4096, 14336, 1024, 2 * 128256 * 4096),
    Shape("Llama-3.1-70B", 80, 8192, 28672, 1024, 2 * 128256 * 8192),
    Shape("Llama-3.1-405B", 126, 16384, 53248, 1024, 2 * 128256 * 16384),
)
