"""Guarded memory of the kernel tests, and what is asserted about tensors in it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where the kernel tests run, as the fixture ``device``; strategies are made before fixtures."""

CANARY = 0xA5
GUARD = 64
"""Bytes of poison before and after each tensor."""


class Arena:
    """Poisoned buffers; tensors are views into them with canary bytes between them."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, Tensor]] = []
        """Each with a mask of the bytes that belong to tensors."""
        self.end = self.size = 0

    def carve(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        order: Sequence[int] | None = None,
        shift: int = 0,
    ) -> Tensor:
        """A dense tensor of NaN (of -1 for integers).

        Its dimensions lie in ``order``, slowest first; it misses the next 16-byte boundary by
        ``shift`` elements.
        """
        strides = [1] * len(shape)
        count = 1
        for dimension in reversed(order if order is not None else range(len(shape))):
            strides[dimension] = count
            count *= max(shape[dimension], 1)
        length = math.prod(shape) * dtype.itemsize
        begin = -(-self.end // 16) * 16 + shift * dtype.itemsize
        if begin + length + GUARD > self.size:
            begin = GUARD + shift * dtype.itemsize
            self.size = max(1 << 17, -(-(begin + length + GUARD) // 16) * 16)
            buffer = torch.full((self.size,), CANARY, dtype=torch.uint8, device=DEVICE)
            self.buffers.append((buffer, torch.zeros_like(buffer, dtype=torch.bool)))
        buffer, owned = self.buffers[-1]
        self.end = begin + length + GUARD
        owned[begin : begin + length] = True
        typed = buffer.view(dtype)
        tensor = typed.as_strided(tuple(shape), tuple(strides), begin // dtype.itemsize)
        return tensor.fill_(math.nan if dtype.is_floating_point else -1)

    def put(self, values: Tensor) -> Tensor:
        """A contiguous copy of ``values`` inside the arena."""
        return self.carve(values.shape, values.dtype).copy_(values)

    def check(self) -> None:
        """Asserts that no byte outside the tensors was written."""
        for buffer, owned in self.buffers:
            spoiled = (buffer != CANARY) & ~owned
            if bool(spoiled.any()):
                where = spoiled.nonzero().flatten()[:8].tolist()
                raise AssertionError(f"bytes written outside every tensor, at {where}")


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, in the order of its elements."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """Asserts equality of every bit; NaN equals itself."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} against {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} against {expected.dtype}"
    if torch.equal(bits(actual), bits(expected.to(actual.device))):
        return
    left, right = actual.detach().cpu().flatten(), expected.detach().cpu().flatten()
    rows = bits(left).view(len(left), -1) != bits(right).view(len(left), -1)
    where = rows.any(1).nonzero().flatten()
    shown = [(i, left[i].item(), right[i].item()) for i in where[:5].tolist()]
    raise AssertionError(f"{what}: {len(where)} of {len(left)} elements differ: {shown}")


def assert_near(
    actual: Tensor, expected: Tensor, what: str, rtol: float = 2e-6, atol: float = 1e-7
) -> None:
    """Asserts closeness in FP64, naming what differs."""
    torch.testing.assert_close(
        actual.detach().double(),
        expected.detach().to(actual.device).double(),
        rtol=rtol,
        atol=atol,
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )
