"""State that is touched once a cycle, in host memory between its uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_hybrid.kernels.chunks import TensorSet

CYCLE_KEYS = ("snapshot", "history_")
"""Beginnings of the state keys that are touched once a cycle only: at the end of a Full phase,
in Predict and in Correct."""


def is_cycle_state(key: str) -> bool:
    """Whether state of this name can live in host memory."""
    return key.startswith(CYCLE_KEYS)


class Offload:
    """Copies cycle state to the device before it is needed, and back afterwards.

    The tensors in host memory are the optimizer's state; those on the device exist only from
    `fetch` to `stash`, so that forward and backward passes have their memory. Between the two,
    in the middle of a stepped stretch, the state is out of date until ``state_dict()``.

    Copies run on a stream of their own: `stash` returns at once, and a `fetch` waits for the
    stash before it.

    Args:
        rows: For each tensor set, its host tensors by the name of their row.
        sets: The tensor sets.
        device: Where the kernels run.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, list[Tensor]]],
        sets: Sequence[TensorSet],
        device: torch.device,
    ) -> None:
        self._rows = rows
        self._sets = sets
        self._device = device
        self._fetched: list[dict[str, list[Tensor]]] = []
        on_gpu = device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]

    @property
    def resident(self) -> bool:
        """Whether the state is on the device at the moment."""
        return bool(self._fetched)

    def fetch(self) -> None:
        """Brings the state to the device; does nothing where it is there."""
        if self.resident or not any(self._rows):
            return
        self._fetched = [
            {
                name: [torch.empty_like(host, device=self._device) for host in hosts]
                for name, hosts in rows.items()
            }
            for rows in self._rows
        ]
        self._copy(to_device=True)
        for tensors, rows in zip(self._sets, self._fetched):
            for name, here in rows.items():
                tensors.set_row(name, here)

    def stash(self) -> None:
        """Takes the state back to host memory, without waiting for it."""
        if not self.resident:
            return
        self._copy(to_device=False)
        for tensors, rows in zip(self._sets, self._fetched):
            for name in rows:
                tensors.release(name)
        self._fetched = []

    def finish(self) -> None:
        """Stashes, and waits until host memory holds the state: before somebody reads it."""
        self.stash()
        if self._stream is not None:
            self._stream.synchronize()

    def _copy(self, to_device: bool) -> None:
        pairs = [
            (host, here)
            for rows, fetched in zip(self._rows, self._fetched)
            for name, hosts in rows.items()
            for host, here in zip(hosts, fetched[name])
        ]
        if self._stream is None:
            for host, here in pairs:
                here.copy_(host) if to_device else host.copy_(here)
            return
        current: Any = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for host, here in pairs:
                if to_device:
                    here.copy_(host, non_blocking=True)
                else:
                    host.copy_(here, non_blocking=True)
                # The allocator must not hand this memory out before the copy has run.
                here.record_stream(self._stream)
        if to_device:
            current.wait_stream(self._stream)


def host_like(tensor: Tensor, pinned: bool) -> Tensor:
    """Zeros in host memory, in the memory order of a tensor.

    Args:
        tensor: On any device.
        pinned: Whether the memory is page-locked; only where there is a GPU to copy to.
    """
    fresh = torch.zeros_like(tensor, device="cpu", memory_format=torch.preserve_format)
    return fresh.pin_memory() if pinned and tensor.device.type == "cuda" else fresh
