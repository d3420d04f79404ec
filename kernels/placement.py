"""Weights at the part of a predicted displacement that verification decided for.

At 0 they are where they were before, at 1 where the prediction put them, bit for bit, and between
on the way. A rollback is a pass of its own (``verify.py``). Where a prediction stands in 16-bit
parameters alone and is accepted, the masters follow as the base update of the same step loads them:
what the displacement is made of (`residue`) is loaded there too, so it moves no byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.displacement import Displacement, again_torch, numbers_torch
from triton_hybrid.kernels.ledger import (
    DECISION,
    FRACTION_COLUMN,
    INDEX,
    PART_COLUMN,
    PREDICTION_COLUMNS,
)
from triton_hybrid.kernels.multi_tensor import TORCH_BLOCK, TensorSet
from triton_hybrid.kernels.residue import (
    load_moved,
    load_moved_torch,
    move_numbers,
    stands_in_parameter,
)
from triton_hybrid.kernels.scalars import Scalars
from triton_hybrid.kernels.together_torch import Part, Together

ACCEPTED = tl.constexpr(1)
"""The decision after which the base update is certain to be made."""


@triton.jit
def at_fraction(before, after, fraction):
    """A point on the way; the bits of its ends at exactly 0 and 1, also where one is not finite."""
    placed = before + fraction * (after - before)
    return tl.where(fraction == 0.0, before, tl.where(fraction == 1.0, after, placed))


@triton.jit
def accepted_move(ledger, prediction, moves, tensor, STATE: tl.constexpr):
    """Of a tensor: its fraction, whether others have written it, and its numbers of the table.

    Where nothing was accepted, the factor of the displacement is NaN: it stands nowhere.
    """
    own = prediction + PREDICTION_COLUMNS * tensor
    part = tl.load(own + PART_COLUMN)
    accepted = (tl.load(ledger + DECISION) == ACCEPTED) & (part != 0.0)
    fraction = tl.where(accepted, tl.load(own + FRACTION_COLUMN), 1.0)
    factor, a, b, c, d = move_numbers(moves, tensor, STATE)
    factor = tl.where(accepted, factor, float("nan"))
    return fraction.to(STATE), part < 0.0, factor, a, b, c, d


@triton.jit
def load_placed(
    addresses, tensor, begin, length, fraction, written, factor, a, b, c, d, moves,
    DISPLACEMENT: tl.constexpr, DENOMINATOR: tl.constexpr, ALONG: tl.constexpr,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """A block of masters as `load_weight` would find it once what was accepted were placed."""
    moved = DISPLACEMENT(
        addresses, tensor, begin, length, factor, a, b, c, d, moves,
        DENOMINATOR, ALONG, STATE, BLOCK, FULL,
    )  # fmt: skip
    before, after = load_moved(
        addresses, tensor, begin, length, moved, written, PARAM_TYPE, STATE, KEPT, BLOCK, FULL
    )
    # No fraction of what is accepted is 0.
    return tl.where(fraction == 1.0, after, before + fraction * (after - before))


# ------------------------------------------------------------------------------------ plain torch


def placed_by_update(tensors: TensorSet) -> bool:
    """Whether the base update places what was accepted: masters of predictions along their rule."""
    return stands_in_parameter(tensors) and not tensors.frozen


def at_fraction_torch(start: Tensor, end: Tensor, fraction: Any) -> Tensor:
    """`at_fraction` in plain torch."""
    share = torch.as_tensor(fraction, dtype=start.dtype, device=start.device)
    placed = torch.where(share == 1.0, end, start + share * (end - start))
    return torch.where(share == 0.0, start, placed)


class Places:
    """Puts weights of a set at a fraction of the displacement that stands, in plain torch."""

    def __init__(self, tensors: TensorSet, scalars: Scalars, again: Displacement | None) -> None:
        self._again, (self._table, self._numbers) = again, numbers_torch(tensors, scalars)
        self._tensors, compute = tensors, tensors.compute_dtype
        self._on_cpu = tensors.device.type == "cpu"
        self._out = torch.empty(2, TORCH_BLOCK, dtype=compute, device=tensors.device)
        prediction = scalars.prediction[tensors.place]
        self._parts = prediction[:, PART_COLUMN.value]
        self._fractions = prediction[:, FRACTION_COLUMN.value].to(compute)
        decision = scalars.ledger[INDEX["decision"]]
        self._accepted = (self._parts != 0) & (decision == ACCEPTED.value)

    def _ends(
        self, cells: Part | Together, its: Sequence[Any], length: int, written: Any
    ) -> tuple[Tensor, Tensor]:
        """The weights before and after the displacement."""
        if self._again is None:
            return cells.joined("snapshot"), cells.weight()
        moved = again_torch(cells, self._again, its, self._out[:, :length])
        return load_moved_torch(cells, moved, written)

    def of(self, party: Together) -> Tensor:
        """Where the decision puts short tensors."""
        its = [party.spread(column) for column in self._table.unbind(1)] if self._again else []
        start, w = self._ends(party, its, party.total, party.spread(self._parts) < 0)
        return at_fraction_torch(start, w, party.spread(self._fractions))

    def weight(self, index: int, part: slice) -> Tensor:
        """As `TensorSet.weight`, once the decision were carried out (`load_placed`)."""
        tensors, here = self._tensors, self._accepted[index]
        cells = Part(tensors, index, part)
        if self._on_cpu and not bool(here):
            return tensors.weight(index, part)
        length, written = len(cells.joined("param")), self._parts[index] < 0
        start, w = self._ends(cells, self._numbers[index], length, written)
        placed = at_fraction_torch(start, w, self._fractions[index])
        if self._on_cpu:
            return cells.joined("weight").copy_(placed)
        weight = tensors.weight(index, part)
        return weight.copy_(torch.where(here, placed, weight))

    def weights(self, party: Together) -> Tensor:
        """The same of short tensors."""
        return torch.where(party.spread(self._accepted), self.of(party), party.weight())

    def place(
        self, cells: Part, index: int, fraction: Any, where: Any, written: Any = False
    ) -> Tensor:
        """Places a block of a tensor; returns the weights. ``where``: 0-dim bool, or True."""
        length = len(cells.joined("param"))
        start, w = self._ends(cells, self._numbers[index], length, written)
        placed = at_fraction_torch(start, w, fraction)
        if where is True:
            cells.put_weight(placed)
            return placed
        tensors = cells.tensors
        # What stands there, which is not `w` where a prediction stands in the parameter alone.
        names = [n for n in ("weight", "param", "remainder") if n in tensors.flat]
        kept = {name: cells.joined(name).clone() for name in names}
        cells.put_weight(placed)
        for name, old in kept.items():
            cells.put(name, torch.where(where, cells.joined(name), old))
        return torch.where(where, placed, w)
