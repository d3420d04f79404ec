"""Weights at the part of a predicted displacement that verification decided for.

At 0 they are where they were before, at 1 where the prediction put them, bit for bit, and between
on the way. A rollback is a pass of its own (``verify.py``). Where a prediction stands in 16-bit
parameters alone and is accepted, the masters follow as the base update of the same step loads them:
what the displacement is made of (`residue`) is loaded there too, so it moves no byte.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.displacement import Displacement, again_torch
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
from triton_hybrid.kernels.together_torch import Cells

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
        self._again, compute = again, tensors.compute_dtype
        self._moves = scalars.moves[tensors.place].to(compute)
        self._out = torch.empty(2, TORCH_BLOCK, dtype=compute, device=tensors.device)
        prediction = scalars.prediction[tensors.place]
        self._parts = prediction[:, PART_COLUMN.value]
        self._fractions = prediction[:, FRACTION_COLUMN.value].to(compute)
        decision = scalars.ledger[INDEX["decision"]]
        self._accepted = (self._parts != 0) & (decision == ACCEPTED.value)

    def of(self, cells: Cells, fraction: Any = None) -> Tensor:
        """Where a fraction puts the weights; None: the decision."""
        if self._again is None:
            start, w = cells.joined("snapshot"), cells.weight()
        else:
            moved = again_torch(cells, self._again, self._moves, self._out)
            # What is taken back at once, nobody can have written.
            written = False if fraction is not None else cells.spread(self._parts) < 0
            start, w = load_moved_torch(cells, moved, written)
        share = cells.spread(self._fractions) if fraction is None else fraction
        return at_fraction_torch(start, w, share)

    def weights(self, cells: Cells) -> Tensor:
        """As `TensorSet.weight`, once the decision were carried out (`load_placed`)."""
        return torch.where(cells.spread(self._accepted), self.of(cells), cells.weight())

    def place(self, cells: Cells, where: Any, fraction: Any = None) -> Tensor:
        """Places weights where a 0-dim bool, or True, says so; returns where they would be."""
        placed = self.of(cells, fraction)
        # What stands there, which is not a weight where a prediction stands in the parameter alone.
        names = [n for n in ("weight", "param", "remainder") if n in cells.tensors.flat]
        kept = {name: cells.joined(name).clone() for name in names if where is not True}
        cells.put_weight(placed)
        for name, old in kept.items():
            cells.put(name, torch.where(where, cells.joined(name), old))
        return placed
