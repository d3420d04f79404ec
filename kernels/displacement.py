"""A predicted displacement: what weights are moved by, made of rows of state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.multi_tensor import TensorSet
from triton_hybrid.kernels.rows import address_row, load_row
from triton_hybrid.kernels.scalars import Scalars
from triton_hybrid.kernels.together_torch import Cells

SLOW_EMA = address_row("slow_ema")


@triton.jit
def scaled_row(
    addresses, row, tensor, begin, length, factor, coefficients,
    STATE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """A block of a row, times a number of its tensor; 0 where no gradient was other than 0."""
    along = load_row(addresses, row, tensor, begin, length, STATE, STATE, BLOCK, FULL)
    s = load_row(addresses, SLOW_EMA, tensor, begin, length, STATE, STATE, BLOCK, FULL)
    return factor * (tl.load(coefficients + tensor).to(STATE) * tl.where(s != 0, along, 0.0))


class TorchDisplacement(Protocol):
    """A displacement in plain torch."""

    def factors(
        self,
        tensors: TensorSet,
        scalars: Scalars,
        factor: Tensor,
        coefficients: Tensor | None,
    ) -> list[Tensor]:
        """FP64 columns ``[tensors]``: what `block` needs of each tensor.

        ``factor`` is the share of the whole displacement to make, FP64 ``[tensors]``.
        """

    def block(
        self,
        tensors: TensorSet,
        rows: Mapping[str, Tensor],
        factors: Sequence[Any],
        out: Tensor,
    ) -> Tensor:
        """The displacement of a block in the first row of ``out``.

        Its second row is scratch. ``factors`` of a tensor are floats on the CPU, else 0-dim.
        """


class ScaledRow:
    """`scaled_row` in plain torch, without its factors."""

    def __init__(self, row: str) -> None:
        self._row = row

    def block(
        self,
        tensors: TensorSet,
        rows: Mapping[str, Tensor],
        factors: Sequence[Any],
        out: Tensor,
    ) -> Tensor:
        """As `TorchDisplacement.block`."""
        factor, coefficient = factors
        moved = torch.mul(rows[self._row], coefficient, out=out[0]).mul_(factor)
        return moved.masked_fill_(rows["slow_ema"] == 0, 0.0)


@dataclass(frozen=True, eq=False)  # itself alone, and so quickly hashed
class Displacement:
    """A predicted displacement as the kernels see it.

    The two ``@triton.jit`` functions are handed to the kernel as compile-time constants.
    """

    factors: Any
    """``(row, factor)``: the number that `block` needs, computed once a chunk."""
    block: Any
    """``(addresses, tensor, begin, length, that number, four of the rule, coefficients, ...)``:
    the displacement of a block."""
    torch: TorchDisplacement
    reads: tuple[str, ...]
    """Rows that `block` reads, beside the weight and the rule's ``reads_along``."""
    along_rule: bool = False
    """Whether the rule says where a gradient would lead (``rule.along``)."""
    again: bool = False
    """Whether nothing that it is made of changes until the next base step. Then it is computed
    again where the weights before the move are needed (``residue.py``); of any other a snapshot is
    kept."""


def computed_again(
    tensors: TensorSet, again: Displacement | None, moved: bool = True
) -> dict[str, Any]:
    """What tells a kernel how to compute a displacement again."""
    if again is None or not moved:
        return {"DISPLACEMENT": None, "DENOMINATOR": None, "ALONG": None, "AGAIN": False}
    rule = tensors.rule
    assert rule is not None
    functions = {"DENOMINATOR": rule.denominator, "ALONG": rule.along}
    return {"DISPLACEMENT": again.block, "AGAIN": True, **functions}


def basis_torch(
    cells: Cells, displacement: Displacement, factors: Sequence[Any], out: Tensor
) -> Tensor:
    """The displacement of some elements, in the first row of ``out``, which may be longer."""
    tensors, rule = cells.tensors, cells.tensors.rule
    assert rule is not None
    names = (*displacement.reads, *(rule.reads_along if displacement.along_rule else ()))
    rows = {name: cells.joined(name) for name in names}
    return displacement.torch.block(tensors, rows, factors, out[:, : cells.total])


def again_torch(cells: Cells, again: Displacement, moves: Tensor, out: Tensor) -> Tensor:
    """The displacement that stands in some elements; ``moves``: their set's table, in its dtype."""
    factor, _, *numbers = [cells.spread(column) for column in moves.unbind(1)]
    return basis_torch(cells, again, (1.0, *numbers), out).mul_(factor)
