"""Short tensors together: plain torch pays a microsecond an operation, whatever the length.

Where tensors are worked on alike, their rows are copied into one buffer, worked on there, and
copied back. Element by element the results are the same bits. Sums are not, in another order: they
are taken of each tensor by itself, which begins at a multiple of `ALIGNED` elements for it, as its
own memory would.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from triton_hybrid.kernels.multi_tensor import (
    TORCH_BLOCK,
    TensorSet,
    assembled,
    remainder_of,
)
from triton_hybrid.kernels.rows import NONE, OWN, SPLIT

SHORT = 1 << 13
"""Elements up to which a tensor is worked on together with others."""
ALIGNED = 32
MOST_PATTERNS = 8
"""Groupings that a set remembers."""


class Places:
    """Which tensors are worked on as one, and where they lie in a joined row."""

    def __init__(self, indices: Sequence[int], lengths: Sequence[int]) -> None:
        self.members = indices
        self.lengths = [lengths[index] for index in indices]
        self.whole = len(indices) == len(lengths)
        # In tables: all of one is a view, and a list would become a tensor each time.
        some = torch.tensor(indices, dtype=torch.int64, device="cpu")
        self.indices: slice | Tensor = slice(None) if self.whole else some
        self.gaps = [-length % ALIGNED for length in self.lengths]
        self.pieces = [piece for pair in zip(self.lengths, self.gaps) for piece in pair]
        padded = [sum(pair) for pair in zip(self.lengths, self.gaps)]
        self.repeats = torch.tensor(padded, dtype=torch.int64, device="cpu")
        self.total = sum(self.pieces)
        self._zeros: dict[torch.dtype, list[Tensor]] = {}

    def zeros(self, dtype: torch.dtype) -> list[Tensor]:
        """What fills the gaps; made once, for a slice costs as much as any operation."""
        if dtype not in self._zeros:
            row = torch.zeros(ALIGNED, dtype=dtype, device="cpu")
            self._zeros[dtype] = [row[:gap] for gap in self.gaps]
        return self._zeros[dtype]


class Together:
    """Some tensors of a set, as one."""

    def __init__(self, tensors: TensorSet, places: Places) -> None:
        self.tensors, self._places = tensors, places
        self.indices, self.total, self.members = places.indices, places.total, places.members
        self.first = self.members[0]

    def rows(self, name: str) -> list[Tensor]:
        """The tensors of a row."""
        flat = list(self.tensors.flat[name])
        return flat if self._places.whole else [flat[index] for index in self.members]

    def _pieces(self, name: str) -> list[Tensor]:
        """The tensors of a row, with zeros in the gaps between them."""
        rows = self.rows(name)
        if not any(self._places.gaps):
            return rows
        return [x for pair in zip(rows, self._places.zeros(rows[0].dtype)) for x in pair]

    def joined(self, name: str) -> Tensor:
        """A row in one piece, with zeros in the gaps."""
        return torch.cat(self._pieces(name))

    def stacked(self, names: Sequence[str]) -> Tensor:
        """Several rows, ``[names, total]``."""
        pieces = [piece for name in names for piece in self._pieces(name)]
        return torch.cat(pieces).view(len(names), -1)

    def parts(self, whole: Tensor) -> list[Tensor]:
        """Views of the tensors in a row that is in one piece."""
        if not any(self._places.gaps):
            return list(whole.split(self._places.lengths))
        return list(whole.split(self._places.pieces)[::2])

    def spread(self, numbers: Tensor) -> Tensor:
        """A number of each tensor of the set, for each element of the joined ones."""
        return numbers[self.indices].repeat_interleave(self._places.repeats, output_size=self.total)

    def put(self, name: str, whole: Tensor) -> None:
        """Copies a row back."""
        torch._foreach_copy_(self.rows(name), self.parts(whole))

    def weight(self) -> Tensor:
        """As `TensorSet.weight`, which says how weights are kept; a copy in each case."""
        kept = self.tensors.kept
        if kept == OWN and not self.tensors.has_master:
            return self.joined("weight")
        param = self.joined("param")
        if kept == NONE:
            return param.float()
        if kept == SPLIT:
            return assembled(param, self.joined("remainder"))
        weight = self.joined("weight")
        return torch.where(weight.to(param.dtype) == param, weight, param.to(weight.dtype))

    def put_weight(self, weight: Tensor) -> Tensor:
        """Keeps the weights, and rounds the parameters; returns them, joined."""
        if self.tensors.kept == OWN:
            self.put("weight", weight)
        if not self.tensors.has_master:
            return weight
        param = weight.to(self.tensors.dtype["param"])
        self.put("param", param)
        if self.tensors.kept == SPLIT:
            self.put("remainder", remainder_of(weight, param))
        return param


class Part:
    """A block of one tensor of a set, as `Together` is several tensors."""

    def __init__(self, tensors: TensorSet, index: int, part: slice) -> None:
        self.tensors, self.first, self._place = tensors, index, (index, part)
        self.indices, self.total = slice(index, index + 1), part.stop - part.start

    def rows(self, name: str) -> list[Tensor]:
        """The block of a row."""
        return [self.joined(name)]

    def joined(self, name: str) -> Tensor:
        """The block of a row, in place."""
        index, part = self._place
        return self.tensors.flat[name][index][part]

    def stacked(self, names: Sequence[str]) -> Tensor:
        """The blocks of several rows, ``[names, total]``."""
        return torch.stack([self.joined(name) for name in names])

    def parts(self, whole: Tensor) -> list[Tensor]:
        """A block of its own is all that there is."""
        return [whole]

    def spread(self, numbers: Tensor) -> Tensor:
        """The tensor's number, 0-dim."""
        return numbers[self.first]

    def put(self, name: str, values: Tensor) -> None:
        """Copies the block of a row back, if it is not in place."""
        goal = self.joined(name)
        if goal.data_ptr() != values.data_ptr():
            goal.copy_(values)

    def weight(self) -> Tensor:
        """As `TensorSet.weight`: where weights have a row of their own, the very row."""
        return self.tensors.weight(*self._place)

    def put_weight(self, weight: Tensor) -> Tensor:
        """Keeps the weights, and rounds the parameters; returns them."""
        if self.tensors.kept == OWN:
            self.put("weight", weight)
        self.tensors.put_weight(*self._place, weight)
        return self.joined("param") if self.tensors.has_master else weight


Cells = Part | Together
"""What plain torch works on at a time; both have the same methods."""


def gradients(cells: Cells) -> list[Tensor]:
    """Those of the tensors, in the dtype of the mathematics."""
    compute = cells.tensors.compute_dtype
    if cells.tensors.dtype["grad"] == compute:
        return cells.rows("grad")
    return cells.parts(cells.joined("grad").to(compute))


def dots(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """The inner product of each pair."""
    return torch.stack([*map(torch.dot, left, right)])


def cells_of(
    tensors: TensorSet, keys: Sequence[Hashable | None], block: int = TORCH_BLOCK
) -> Iterator[Cells]:
    """All elements of the tensors whose key is not None: short ones together, others in blocks.

    A tensor's blocks come one after the other. ``indices`` says whose elements they are, as rows of
    a table (perhaps a view of it); ``first`` is the first of them.
    """
    parties, done = together(tensors, keys), set[int]()
    for index, key in enumerate(keys):
        if index in parties:
            yield parties[index]
            done.update(parties[index].members)
        elif key is not None and index not in done:
            for part in tensors.torch_blocks(index, block):
                yield Part(tensors, index, part)


def together(tensors: TensorSet, keys: Sequence[Hashable | None]) -> dict[int, Together]:
    """Which tensors of a set are worked on as one, by the first of them.

    On the CPU, short ones of equal keys; none whose key is None.
    """
    if tensors.device.type != "cpu":
        return {}
    numbers: dict[Any, int | None] = {None: None}
    pattern = tuple([numbers.setdefault(key, len(numbers)) for key in keys])
    known = tensors.together
    if pattern not in known:
        if len(known) == MOST_PATTERNS:
            known.clear()
        known[pattern] = _places(pattern, tensors.lengths)
    return {places.members[0]: Together(tensors, places) for places in known[pattern]}


def _places(pattern: Sequence[int | None], lengths: Sequence[int]) -> list[Places]:
    alike: dict[int, list[list[int]]] = {}
    room: dict[int, int] = {}
    for index, (key, length) in enumerate(zip(pattern, lengths)):
        if key is None or length > SHORT:
            continue
        padded = length + -length % ALIGNED
        if room.get(key, -1) < padded:
            alike.setdefault(key, []).append([])
            room[key] = TORCH_BLOCK
        alike[key][-1].append(index)
        room[key] -= padded
    parties = (party for parties in alike.values() for party in parties)
    return [Places(party, lengths) for party in parties if len(party) > 1]
