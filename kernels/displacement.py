"""A predicted displacement: what weights are moved by, made of rows of state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from triton_hybrid.kernels.multi_tensor import TensorSet
from triton_hybrid.kernels.scalars import Scalars
from triton_hybrid.kernels.together_torch import Cells
from triton_hybrid.kernels.update_rule import UpdateRule


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
        rule: UpdateRule,
        rows: Mapping[str, Tensor],
        factors: Sequence[Any],
        out: Tensor,
    ) -> Tensor:
        """The displacement of a block in the first row of ``out``.

        Its second row is scratch. ``factors`` of a tensor are floats on the CPU, else 0-dim.
        """


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

    def rows(self, rule: UpdateRule) -> tuple[str, ...]:
        """All rows that it is made of, for tensors of a base rule."""
        return (*self.reads, *(rule.reads_along if self.along_rule else ()))

    def standing(self, rule: UpdateRule, rows: Mapping[str, Tensor], numbers: Tensor) -> Tensor:
        """The displacement that stands in some elements, where it is computed `again`.

        Args:
            rule: Of their tensor.
            rows: Those of `rows`, 1-D.
            numbers: The tensor's row of the table of moves.
        """
        like = rows[self.reads[0]]
        factor, _, *others = numbers.to(like.device, like.dtype).unbind()
        out = like.new_empty(2, len(like))
        return self.torch.block(rule, rows, (1.0, *others), out).mul_(factor)


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
    rule = cells.tensors.rule
    assert rule is not None
    rows = {name: cells.joined(name) for name in displacement.rows(rule)}
    return displacement.torch.block(rule, rows, factors, out[:, : cells.total])


def again_torch(cells: Cells, again: Displacement, moves: Tensor, out: Tensor) -> Tensor:
    """The displacement that stands in some elements; ``moves``: their set's table, in its dtype."""
    factor, _, *numbers = [cells.spread(column) for column in moves.unbind(1)]
    return basis_torch(cells, again, (1.0, *numbers), out).mul_(factor)
