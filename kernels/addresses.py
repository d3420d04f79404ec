"""Where the tensors of a set lie, on the host and in device memory.

The tables of a set are made once. What moves later (gradients, with every backward pass) is written
into them: a column of addresses, through pinned memory, in the order of the stream.
"""

from __future__ import annotations

import array
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from triton_hybrid.kernels.capture import NEVER_RUN, refuse_capture
from triton_hybrid.kernels.rows import MOST_ROWS

MOST_COLUMNS = 2
"""Columns that are uploaded one by one; of more, the whole table is."""
_LOWEST = slice(0 if sys.byteorder == "little" else 7, None, 8)  # bytes of int64 numbers
_EVEN = bytes(range(0, 256, 16))  # what they are in multiples of 16


class AddressTable:
    """``addresses`` and ``extents`` of a tensor set (see ``multi_tensor.py``).

    Args:
        lengths: Elements of each tensor.
        device: Where the kernels run.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self._lengths = torch.tensor(lengths, dtype=torch.int64, device="cpu")
        self._device = device
        self.places: dict[int, list[int]] = {}
        self._host: dict[int, Tensor] = {}  # the same, int64
        self._odd: set[int] = set()  # rows with an address that is no multiple of 16 bytes
        self._moved: set[int] = set()  # rows that the device does not know yet
        self._realigned = False  # whether `extents` may have changed since it knew them
        self._tables: tuple[Tensor, Tensor] | None = None
        self._columns: dict[int, Tensor] = {}

    def put(self, row: int, places: list[int]) -> None:
        """Takes the addresses of a row, 0 of empty tensors; nothing happens if they are known."""
        if places == self.places.get(row):
            return
        numbers = array.array("q", places)
        odd = len(numbers.tobytes()[_LOWEST].translate(None, _EVEN)) > 0
        self.places[row], self._host[row] = places, torch.frombuffer(numbers, dtype=torch.int64)
        self._moved.add(row)
        self._realigned = self._realigned or odd or row in self._odd
        (self._odd.add if odd else self._odd.discard)(row)

    def tables(self) -> tuple[Tensor, Tensor]:
        """``addresses`` and ``extents`` on the device; only what changed is uploaded."""
        if self._tables is None:
            refuse_capture(self._device, NEVER_RUN)
            self._tables = self._whole().to(self._device), self._extents().to(self._device)
            self._columns = dict(enumerate(self._tables[0].unbind(1)))
        elif not self._moved:
            return self._tables
        else:
            if len(self._moved) > MOST_COLUMNS:
                refill(self._tables[0], self._whole())
            else:
                for row in self._moved:
                    refill(self._columns[row], self._host[row])
            if self._realigned:
                refill(self._tables[1], self._extents())
        self._moved.clear()
        self._realigned = False
        return self._tables

    def _whole(self) -> Tensor:
        whole = torch.zeros(len(self._lengths), MOST_ROWS, dtype=torch.int64, device="cpu")
        for row, column in self._host.items():
            whole[:, row] = column
        return whole

    def _extents(self) -> Tensor:
        aligned = torch.ones_like(self._lengths)
        for row in self._odd:
            aligned &= self._host[row] % 16 == 0
        return 2 * self._lengths + aligned


def refill(goal: Tensor, host: Tensor) -> None:
    """Copies a small host tensor into one on the device without waiting for it.

    Raises:
        RuntimeError: A CUDA graph is being captured, whose replays would bring the same numbers.
    """
    refuse_capture(
        goal.device,
        "a replay would bring learning rates or addresses as they are now. Gradients must stay in "
        "their memory, in the memory order of their parameters (zero_grad(set_to_none=False)), and "
        "a step must run after learning rates were changed, before one is captured",
    )
    # A fresh pinned buffer each time: its allocator does not hand it out again before the
    # copy has run, so no earlier copy is overwritten in flight.
    asynchronous = goal.device.type == "cuda"
    goal.copy_(host.pin_memory() if asynchronous else host, non_blocking=asynchronous)
