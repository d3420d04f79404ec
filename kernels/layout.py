"""The order of elements in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor


def dense_view(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of its memory, as a 1-D view.

    Raises:
        ValueError: The tensor has gaps or overlaps in memory.
    """
    if tensor.is_contiguous():  # nearly always; thousands of tensors come at once
        return tensor.as_strided((tensor.numel(),), (1,))
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size == 1 or not tensor.numel():
            continue
        if stride != expected:
            raise ValueError(
                f"tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not dense "
                "in memory: allowed are contiguous tensors and permutations of them"
            )
        expected *= size
    return tensor.as_strided((tensor.numel(),), (1,))


def same_layout(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of equal shape keep their elements in the same order."""
    if left.stride() == right.stride() or not left.numel():
        return True
    return all(a == b for a, b, size in zip(left.stride(), right.stride(), left.shape) if size != 1)


class DenseViews(Sequence[Tensor]):
    """Dense views of tensors, made when somebody asks for one: kernels never do."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._views: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, index: Any) -> Any:
        return self._made()[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._made())

    def _made(self) -> list[Tensor]:
        if not self._views:
            self._views += [t.as_strided((t.numel(),), (1,)) for t in self._tensors]
        return self._views


def overlapping(params: Sequence[Tensor]) -> list[int]:
    """For each parameter, 0 where no other shares its memory, else its number among those that do.

    One launch must not update two tensors in the same memory: they get launches of their own.
    """
    places: list[tuple[float, float, int]] = [(math.inf, math.inf, -1)]
    for index, param in enumerate(params):
        span = 1 + sum((size - 1) * step for size, step in zip(param.shape, param.stride()))
        first = param.data_ptr()
        places.append((first, first + span * param.element_size() * (param.numel() > 0), index))
    ranks, until = [0] * len(params), -math.inf
    together: list[int] = []
    for begin, end, index in sorted(places):
        if begin >= until:
            for rank, member in enumerate(together if len(together) > 1 else (), 1):
                ranks[member] = rank
            together = []
        together.append(index)
        until = max(until, end)
    return ranks
