"""The parameters of GPT-2, without needing transformers."""

from __future__ import annotations

from dataclasses import dataclass

PARAMETERS = 124_439_808
VOCABULARY, POSITIONS = 50257, 1024


@dataclass(frozen=True)
class Matrix:
    """A hidden matrix as it lies in memory, rows being inputs, and the blocks that it is.

    Attributes:
        shape: Rows and columns.
        grid: Equal blocks along rows and columns, orthogonalised each by itself.
    """

    shape: tuple[int, int]
    grid: tuple[int, int] = (1, 1)

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        return self.shape[0] // self.grid[0], self.shape[1] // self.grid[1]


@dataclass(frozen=True)
class Gpt2Size:
    """One of the published sizes.

    Attributes:
        name: Of the size.
        width: Of the residual stream.
        layers: How many.
    """

    name: str
    width: int
    layers: int

    @property
    def parameters(self) -> int:
        """All of them; the output layer shares the embedding's."""
        block = 12 * self.width**2 + 13 * self.width
        return (VOCABULARY + POSITIONS + 2) * self.width + self.layers * block

    def matrices(self) -> list[Matrix]:
        """The hidden matrices, in the model's order: what Muon orthogonalises."""
        width = self.width
        layer = [
            Matrix((width, 3 * width), (1, 3)),
            Matrix((width, width)),
            Matrix((width, 4 * width)),
            Matrix((4 * width, width)),
        ]
        return layer * self.layers


GPT2_SIZES = (Gpt2Size("small", 768, 12), Gpt2Size("medium", 1024, 24), Gpt2Size("xl", 1600, 48))


def gpt2_small_shapes() -> list[tuple[int, ...]]:
    """The 148 shapes, in the model's order; the output layer shares the first one."""
    width, vocabulary, positions, layers = 768, VOCABULARY, POSITIONS, 12
    block: list[tuple[int, ...]] = [
        (width,), (width,),
        (width, 3 * width), (3 * width,), (width, width), (width,),
        (width,), (width,),
        (width, 4 * width), (4 * width,), (4 * width, width), (width,),
    ]  # fmt: skip
    return [(vocabulary, width), (positions, width), *(block * layers), (width,), (width,)]
