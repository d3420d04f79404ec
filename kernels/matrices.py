"""The matrices of a tensor set: which blocks are orthogonalised, and where their scratch lies.

A Muon parameter is one matrix or a grid of equal blocks (fused query, key and value), each
orthogonalised by itself. In memory a block is ``rows`` lines of ``columns`` elements,
``pitch`` apart. Scratch memory holds it wide (no more rows than columns; orthogonalising and
transposing commute) and padded with zeros to whole tiles, which no product ever notices, so
the matrix kernels need neither masks nor a second orientation.

Matrices of all shapes share the launches: a table says where each lies, another which tile of
which matrix a program computes. What does not fit into the scratch memory waits for the next
wave.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.launch import require_power_of_two
from triton_hybrid.kernels.multi_tensor import TensorSet
from triton_hybrid.kernels.rows import number

SCRATCH_BYTES = 1 << 28
"""Scratch memory of a wave. GPT-2 small takes two waves of it, GPT-2 xl 39; a wave
of this size is some hundred tiles for each multiprocessor, so the last round of a launch costs
little."""
SCRATCH_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""Dtypes in which matrices can be orthogonalised; products accumulate in FP32."""

Coefficients = tuple[tuple[float, float, float], ...]

FIELD: dict[str, int] = {}
"""Columns of the table of matrices, int64, by name."""
_field = functools.partial(number, FIELD)
TENSOR = _field("tensor")  # index in the tensor set
OFFSET = _field("offset")  # element of the tensor at which the block begins
ROWS_IN_MEMORY = _field("rows")
COLUMNS_IN_MEMORY = _field("columns")
PITCH = _field("pitch")  # elements from one row to the next
TALL = _field("tall")  # 1: scratch holds the transpose
EVEN = _field("even")  # 1: offset and pitch are multiples of 8
HEIGHT = _field("height")  # in scratch, padded
WIDTH = _field("width")
PLACE = _field("place")  # element at which it begins among the matrices of the wave
GRAM_PLACE = _field("gram_place")  # element at which its Gram matrix begins
FIRST_TILE = _field("first_tile")  # in the table of tiles
TILES = _field("tiles")
MATRIX_COLUMNS = tl.constexpr(len(FIELD))


@triton.jit
def tile_at(matrices, tiles):
    """The matrix of this program's tile, and the tile's row and column in it."""
    entry = tiles + 3 * tl.program_id(0)
    return matrices + tl.load(entry) * MATRIX_COLUMNS, tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def in_scratch(matrix, TILE: tl.constexpr):
    """Where a matrix and its Gram matrix begin in scratch memory, its height and its width."""
    place = tl.multiple_of(tl.load(matrix + PLACE), TILE)
    gram = tl.multiple_of(tl.load(matrix + GRAM_PLACE), TILE)
    height = tl.multiple_of(tl.load(matrix + HEIGHT), TILE)
    return place, gram, height, tl.multiple_of(tl.load(matrix + WIDTH), TILE)


@triton.jit
def in_memory(matrix, WHOLE: tl.constexpr):
    """Where a matrix begins in its tensor, the distance of its rows, and its rows and columns.

    Loaded where they are used: a hint belongs to the load, and so to all who use it.
    """
    offset = tl.load(matrix + OFFSET)
    pitch = tl.load(matrix + PITCH)
    if WHOLE:
        offset = tl.multiple_of(offset, 8)
        pitch = tl.multiple_of(pitch, 8)
    return offset, pitch, tl.load(matrix + ROWS_IN_MEMORY), tl.load(matrix + COLUMNS_IN_MEMORY)


@triton.jit
def tile_in_memory(matrix, i, j, extents, TILE: tl.constexpr):
    """Of a tile: its tensor, first row and column in memory, whether scratch holds it turned.

    Last, whether it is whole: all its elements are there, in lines of 16 aligned bytes.
    """
    tensor = tl.load(matrix + TENSOR)
    tall = tl.load(matrix + TALL) != 0
    row = tl.where(tall, j, i) * TILE
    column = tl.where(tall, i, j) * TILE
    _, _, rows, columns = in_memory(matrix, False)
    whole = (row + TILE <= rows) & (column + TILE <= columns)
    whole = whole & (tl.load(matrix + EVEN) != 0) & ((tl.load(extents + tensor) & 1) != 0)
    return tensor, row, column, tall, whole


@dataclass(frozen=True)
class MatrixTiling:
    """How the matrix products are cut."""

    tile: int  # rows and columns of the tile that a program computes; a power of two
    depth: int  # elements of the inner dimension that it multiplies at a time
    strip: int  # rows of a tile that are copied at a time
    warps: int  # of a program

    def __post_init__(self) -> None:
        for name in ("tile", "depth", "strip"):
            require_power_of_two(name, getattr(self, name))
        if self.tile % self.depth or self.tile % self.strip:
            raise ValueError(
                f"depth={self.depth}, strip={self.strip}: must divide tile={self.tile}"
            )


def matrix_tiling(dtype: torch.dtype, device: torch.device) -> MatrixTiling:
    """The tiling for a scratch dtype on a device.

    FP32 products are exact ones, without tensor cores, and a smaller tile keeps their
    accumulators in registers. On the CPU (the interpreter) little is padded.
    """
    if device.type == "cpu":
        return MatrixTiling(32, 32, 32, 4)
    return MatrixTiling(128, 64, 32, 8) if dtype == torch.bfloat16 else MatrixTiling(64, 32, 32, 8)


@dataclass(frozen=True)
class Block:
    """One matrix to be orthogonalised, as it lies in memory."""

    tensor: int  # index of its tensor
    offset: int  # element of the tensor at which it begins
    rows: int
    columns: int
    pitch: int  # elements from one row to the next
    whole: bool  # whether it is all of its tensor

    @property
    def tall(self) -> bool:
        """Whether scratch memory holds its transpose."""
        return self.rows > self.columns

    @property
    def shape(self) -> tuple[int, int]:
        """Its wide shape."""
        return min(self.rows, self.columns), max(self.rows, self.columns)

    def padded(self, tile: int) -> tuple[int, int]:
        """Height and width in scratch memory."""
        high, wide = self.shape
        return -(-high // tile) * tile, -(-wide // tile) * tile

    def view(self, flat: Tensor) -> Tensor:
        """The wide matrix, in the memory of its tensor's dense view."""
        size, stride = (self.rows, self.columns), (self.pitch, 1)
        matrix = flat.as_strided(size, stride, flat.storage_offset() + self.offset)
        return matrix.t() if self.tall else matrix


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a matrix, or of a filter: a row for each output, as Muon takes it."""
    return shape[0], math.prod(shape[1:])


def has_rows(tensor: Tensor) -> bool:
    """Whether a dense tensor is a matrix, or its first dimension is the outermost in memory."""
    if tensor.ndim < 3:
        return tensor.ndim == 2
    return tensor.stride(0) * tensor.shape[0] == tensor.numel()


def blocks_of(index: int, tensor: Tensor, grid: tuple[int, int]) -> list[Block]:
    """The blocks of a dense tensor, number ``index`` of its set, cut into equal parts.

    A filter is the matrix of its rows, whose columns are in the order of memory.

    Raises:
        ValueError: Not a matrix, or not divisible.
    """
    if not has_rows(tensor):
        raise ValueError(f"tensor {index} has shape {tuple(tensor.shape)}: must be a matrix")
    size = as_matrix(tensor.shape)
    if any(part < 1 or length % part for length, part in zip(size, grid)):
        raise ValueError(f"tensor {index} of shape {size}: cannot be cut into blocks {grid}")
    if not tensor.numel():
        return []
    whole = grid == (1, 1)
    if tensor.ndim == 2 and 1 not in size and tensor.stride(1) != 1:
        size, grid = size[::-1], grid[::-1]
    rows, columns = size[0] // grid[0], size[1] // grid[1]
    return [
        Block(index, row * size[1] + column, rows, columns, size[1], whole)
        for row in range(0, size[0], rows)
        for column in range(0, size[1], columns)
    ]


class Wave:
    """Blocks that are orthogonalised together, with the tables of their launches."""

    def __init__(
        self,
        blocks: Sequence[Block],
        coefficients: Coefficients,
        tiling: MatrixTiling,
        device: torch.device,
    ) -> None:
        self.blocks = list(blocks)
        self.by_shape: dict[tuple[int, int], list[Block]] = {}
        """Wide shapes, and the blocks that have them."""
        for block in blocks:
            self.by_shape.setdefault(block.shape, []).append(block)
        self.coefficients = coefficients
        self.elements = self.gram_elements = 0
        rows: list[list[int]] = []
        tiles: list[tuple[int, int, int]] = []
        halves: list[tuple[int, int, int]] = []
        for index, block in enumerate(blocks):
            high, wide = block.padded(tiling.tile)
            down, across = high // tiling.tile, wide // tiling.tile
            even = block.offset % 8 == 0 and block.pitch % 8 == 0
            memory = (block.tensor, block.offset, block.rows, block.columns, block.pitch)
            scratch = (high, wide, self.elements, self.gram_elements, len(tiles), down * across)
            rows.append([*memory, int(block.tall), int(even), *scratch])
            tiles.extend((index, i, j) for i in range(down) for j in range(across))
            halves.extend((index, i, j) for i in range(down) for j in range(i + 1))
            self.elements += high * wide
            self.gram_elements += high * high
        self.table = torch.tensor(rows, dtype=torch.int64, device=device)
        self.tiles = torch.tensor(tiles, dtype=torch.int32, device=device)
        self.halves = torch.tensor(halves, dtype=torch.int32, device=device)


class MatrixSet:
    """The matrices of a tensor set, their tables, and scratch memory for them.

    Args:
        tensors: With rows ``grad``, ``exp_avg`` and ``update``, and ``slow_ema`` where it takes
            part in the momentum; or with another row that is orthogonalised.
        grids: Of each tensor, equal parts along its two dimensions.
        coefficients: Of each tensor, for each step.
        tiling: How products are cut; the default for their dtype when None.
        limit: Bytes of scratch memory; one matrix alone may exceed it.
        dtype: Of the products; that of ``update`` when None.
    """

    def __init__(
        self,
        tensors: TensorSet,
        grids: Sequence[tuple[int, int]],
        coefficients: Sequence[Coefficients],
        tiling: MatrixTiling | None = None,
        limit: int = SCRATCH_BYTES,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.tensors = tensors
        self.dtype = dtype or tensors.dtype["update"]
        self.tiling = tiling or matrix_tiling(self.dtype, tensors.device)
        by_steps: dict[Coefficients, list[Block]] = {}
        for index, (tensor, grid) in enumerate(zip(tensors.shapes, grids)):
            by_steps.setdefault(coefficients[index], []).extend(blocks_of(index, tensor, grid))
        self.waves = [
            Wave(blocks, schedule, self.tiling, tensors.device)
            for schedule, every in by_steps.items()
            for blocks in self._parted(every, limit)
        ]
        self._scratch: tuple[Tensor, ...] = ()

    def _parted(self, blocks: Sequence[Block], limit: int) -> list[list[Block]]:
        parts: list[list[Block]] = []
        room = 0
        for block in blocks:
            high, wide = block.padded(self.tiling.tile)
            # The matrix twice, its Gram matrix and that one's polynomial.
            needed = 2 * high * (wide + high) * self.dtype.itemsize
            if not parts or needed > room:
                parts.append([])
                room = limit
            parts[-1].append(block)
            room -= needed
        return parts

    def scratch(self) -> tuple[Tensor, ...]:
        """Two buffers for matrices, two for Gram matrices, FP32 squares of tiles.

        Allocated once, for the largest wave.
        """
        if not self._scratch:
            elements = max((wave.elements for wave in self.waves), default=0)
            grams = max((wave.gram_elements for wave in self.waves), default=0)
            tiles = max((len(wave.tiles) for wave in self.waves), default=0)
            like = torch.empty(0, dtype=self.dtype, device=self.tensors.device)
            buffers = map(like.new_zeros, (elements, elements, grams, grams))
            self._scratch = (*buffers, like.new_zeros(tiles, dtype=torch.float32))
        return self._scratch
