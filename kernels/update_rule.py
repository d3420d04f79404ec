"""What the kernels know of a base rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor


class Numbers(NamedTuple):
    """What the step of a tensor needs: floats on the CPU, 0-dim tensors elsewhere."""

    clip: Any
    decay: Any
    beta1: Any
    beta2: Any
    rate1: Any  # 1 - beta1, which FP32 would not know well enough
    rate2: Any
    root_correction2: Any
    eps: Any
    size: Any
    """Learning rate over the first bias correction."""
    lr: Any
    weight_decay: Any


@dataclass
class Block:
    """Elements of a tensor, or of several, for a rule in plain torch: tensors, or lists of them."""

    w: Any  # weights, changed in place
    g: Any  # gradient, clipped
    rows: Mapping[str, Any]  # what the rule reads and writes, and the slow EMA
    numbers: Numbers  # of these tensors
    step: Any  # FP32, 0-dim: base updates with this one; of lists alone
    scratch: Tensor  # ``[2, elements]``


class TorchUpdate(Protocol):
    """A base rule in plain torch."""

    takes_lists: bool
    """Whether `update` takes lists of tensors on the CPU, in place of one tensor each."""

    def update(self, block: Block) -> None:
        """Updates the block's moments and weights in place."""


class TorchAlong(TorchUpdate, Protocol):
    """One that says where a gradient would lead."""

    def compare(self, block: Block) -> tuple[Tensor, Tensor, Any]:
        """The update just made, that for the slow EMA, and the square of their common unit."""

    def numbers(self, rows: Tensor, step: Tensor) -> list[Tensor]:
        """The four numbers of `constants` in FP64; ``rows`` of hyperparameters, ``[tensors]``."""

    def along(self, rows: Mapping[str, Tensor], x: Tensor, numbers: Any, out: Tensor) -> Tensor:
        """The direction for a gradient ``x``, the kernel's very bits, in the first row of ``out``.

        The second row of ``out`` is scratch; ``numbers`` are a tensor's.
        """


@dataclass(frozen=True)
class UpdateRule:
    """A base rule as the kernels see it: what it does with a block of a tensor.

    The four ``@triton.jit`` functions are handed to the kernels as compile-time constants.
    """

    constants: Any
    """``(row, step, rate, STATE)``: what a tensor's step needs, computed once a chunk: the step
    size for a learning rate, and four numbers of the rule's own."""
    direction: Any
    """``(addresses, tensor, begin, length, g, four numbers, ...)``: updates the rule's moments with
    the gradient; returns the direction of the update and a denominator."""
    denominator: Any
    """``(addresses, tensor, begin, length, four numbers, ...)``: the same denominator without an
    update, for predictions."""
    along: Any
    """``(addresses, tensor, begin, length, x, denominator, ...)``: the direction that the rule
    would take for a gradient ``x``; None: the slow EMA moves nothing."""
    torch: TorchUpdate  # the same in plain torch
    reads: tuple[str, ...]  # rows that `direction` reads, beside weight and gradient
    writes: tuple[str, ...]  # rows that it writes, beside the weight
    reads_along: tuple[str, ...] = ()  # rows that `denominator` and `along` read, beside ``x``
    uses_gradient: bool = True
    """Whether `direction` reads the gradient; False where `prepare` has."""
    prepare: Callable[..., None] | None = None
    """``(tensors, scalars, max_norm)``: launches between statistics and update."""
    prepare_torch: Callable[..., None] | None = None
    """``(tensors, scalars, clip, skip)``: the same in plain torch."""

    @property
    def torch_along(self) -> TorchAlong:
        """`torch` of a rule that has `along`."""
        return cast(TorchAlong, self.torch)
