"""What the kernels know of a base rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Numbers(NamedTuple):
    """What the step of a tensor needs: floats on the CPU, 0-dim tensors elsewhere."""

    clip: Any
    decay: Any
    beta1: Any
    beta2: Any
    root_correction2: Any
    eps: Any
    size: Any
    """Learning rate over the first bias correction."""
    lr: Any
    weight_decay: Any


@dataclass
class Block:
    """One block of one tensor, for a rule in plain torch.

    Attributes:
        w: Weights, changed in place.
        g: Gradient, clipped.
        rows: The block of every other row that the tensor has.
        numbers: Of its tensor.
        step: FP32, 0-dim: base updates with this one.
        scratch: ``[2, elements]``.
    """

    w: Tensor
    g: Tensor
    rows: Mapping[str, Tensor]
    numbers: Numbers
    step: Tensor
    scratch: Tensor


class TorchUpdate(Protocol):
    """A base rule in plain torch."""

    def update(self, block: Block) -> None:
        """Updates the block's moments and weights in place."""

    def compare(self, block: Block) -> tuple[Tensor, Tensor, Any]:
        """The update just made, that for the slow EMA, and the square of their common unit."""

    def along(self, rows: Mapping[str, Tensor], x: Tensor, eps: Any, out: Tensor) -> Tensor:
        """The direction for a gradient ``x``, times `unit`; ``out`` is ``[2, elements]``.

        Args:
            rows: As in `Block`.
            x: The gradient.
            eps: The group's, over `unit`.
            out: Takes the result in its first row; the second is scratch.
        """

    def unit(self, root_correction2: Tensor) -> Tensor:
        """What `along` is multiplied with to be a direction; FP64 ``[tensors]``."""


@dataclass(frozen=True)
class UpdateRule:
    """A base rule as the kernels see it: what it does with a block of a tensor.

    The four ``@triton.jit`` functions are handed to the kernels as compile-time constants.

    Attributes:
        constants: ``(row, step, rate, STATE)``: what a tensor's step needs, computed once a chunk:
            the step size for a learning rate, and four numbers of the rule's own.
        direction: ``(addresses, tensor, begin, length, g, four numbers, ...)``: updates the rule's
            moments with the gradient; returns the direction of the update and a denominator.
        denominator: ``(addresses, tensor, begin, length, four numbers, ...)``: the same denominator
            without an update, for predictions.
        along: ``(addresses, tensor, begin, length, x, denominator, ...)``: the direction that the
            rule would take for a gradient ``x``.
        torch: The same in plain torch.
        reads: Rows that `direction` reads, beside weight and gradient.
        writes: Rows that it writes, beside the weight.
        reads_along: Rows that `denominator` and `along` read, beside ``x``.
        uses_gradient: Whether `direction` reads the gradient, and `along` its ``x``; False where
            `prepare` has done so.
        prepare: ``(tensors, scalars, compare, max_norm)``: launches between the statistics and the
            update, or None.
        prepare_torch: ``(tensors, scalars, compare, clip, skip)``: the same in plain torch.
        prepare_along: ``(tensors, scalars)``: launches before `along` serves a prediction, or None.
        prepare_along_torch: The same in plain torch.
    """

    constants: Any
    direction: Any
    denominator: Any
    along: Any
    torch: TorchUpdate
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    reads_along: tuple[str, ...] = ()
    uses_gradient: bool = True
    prepare: Callable[..., None] | None = None
    prepare_torch: Callable[..., None] | None = None
    prepare_along: Callable[..., None] | None = None
    prepare_along_torch: Callable[..., None] | None = None
