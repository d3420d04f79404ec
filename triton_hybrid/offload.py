"""State in host memory, on the device only while a step needs it.

What AdamW does not have is at home in host memory: a step fetches what it touches, and what the
next forward and backward pass does not need goes back after it. The moments are at home on the
device, and leave it for the length of a long stretch of predictions that do not read them. Which
row is which, and which step touches it, is part of its declaration (`StateRow`).

Copies run on a stream of their own. What a gradient step touches is fetched while the backward
pass before it is still running, from its middle on, when most activations are gone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from triton_hybrid.config import HybridConfig
from triton_hybrid.kernels.multi_tensor import TensorSet, dense_view
from triton_hybrid.state import Batch, Home, State, StateRow, StepPlan, buffer_like

COPY_ON_CPU = False
"""Whether state of CPU parameters is copied too, from host memory to host memory. There is nothing
to gain by it; the tests do it, to run the code that serves a GPU."""

LONG_STRETCH = 4
"""Predicted steps without a gradient for which moving the moments out is worth the copies."""


def moves(offload: str, device: torch.device) -> bool:
    """Whether rows move between host memory and the device.

    Args:
        offload: As in HybridConfig.
        device: Where the kernels run.
    """
    return offload != "none" and (device.type != "cpu" or COPY_ON_CPU)


def lends_moments(config: HybridConfig, unread: bool) -> bool:
    """Whether the moments leave the device in stretches of predictions that do not read them.

    Args:
        config: Says how long these are.
        unread: Whether the predictor reads them in its first prediction in a row only.
    """
    row = min(config.correction_interval, config.max_predict_steps)
    return unread and not config.inline and row - 1 >= LONG_STRETCH


class MovingRow:
    """One row of one batch, and where its memory is.

    Args:
        row: The row.
        tensors: The batch's tensors.
        params: Its parameters.
        memory: The row's tensors, at home; of scratch only the dtype is used.

    Attributes:
        host: The tensors in host memory, views of one buffer; None where it is never there.
        here: The tensors on the device; None while they are away.
    """

    def __init__(
        self, row: StateRow, tensors: TensorSet, params: Sequence[Tensor], memory: list[Tensor]
    ) -> None:
        self.row, self.name, self.home = row, row.name, row.home
        self.tensors, self.params = tensors, params
        self.dtype = memory[0].dtype
        self.host = memory if self.home is Home.HOST else None
        self.here = memory if self.home is Home.LENT else None


class Offload:
    """Moves rows of state between host memory and the device.

    Args:
        batches: The batches whose rows move.
        state: The optimizer's state; it always holds the tensors that are current, except for
            rows at home in host memory while they visit the device: `synchronise` first.
        device: Where the kernels run.
        pinned: Whether host memory is page-locked.
        lends: Whether there are stretches so long that the moments leave the device.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        state: State,
        device: torch.device,
        pinned: bool,
        lends: bool,
    ) -> None:
        rows = [
            MovingRow(row, batch.tensors, batch.params, memory)
            for batch in batches
            for row, memory in batch.travelling
        ]
        self._rows = rows
        self._state = state
        self._device = device
        self._lends = lends
        for row in rows:
            if row.home is Home.LENT and lends:
                # Now, and not when they first leave: memory does not grow after the first step.
                row.host = buffer_like(row.params, row.dtype, torch.device("cpu"), pinned)
        self._expected: StepPlan | None = None
        self._calls = 0
        self._calls_before = 0
        on_gpu = device.type == "cuda" and bool(rows)
        self._stream: Any = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._main: Any = None
        params = {id(param): param for row in rows for param in row.params}
        self._count = len(params)
        self._hooks = _watch_gradients(params.values(), weakref.ref(self))
        weakref.finalize(self, _remove, self._hooks).atexit = False

    # ---------------------------------------------------------------- around a step

    def fetch(self, plan: StepPlan) -> None:
        """Brings rows to the device, or lets the step wait for those that are under way.

        Raises:
            RuntimeError: A CUDA graph is being captured; it would keep addresses that move.
        """
        if not self._rows:
            return
        if self._stream is not None and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "offloaded state and graph capture: a graph keeps the addresses of state, which "
                "moves; use HybridConfig(offload='none')"
            )
        self._remember_stream()
        self._bring(plan)
        if self._stream is not None:
            self._main.wait_stream(self._stream)

    def place(self, plan: StepPlan, predictions: int) -> None:
        """Puts every row where it should be until the next step, without waiting.

        Args:
            plan: What the next step does.
            predictions: How many predicted steps come next.
        """
        if not self._rows:
            return
        self._remember_stream()
        self._expected = plan
        if plan.gradient:
            # Forward and backward pass come first.
            self._calls_before, self._calls = self._calls or self._calls_before, 0
        leave = self._lends and predictions >= LONG_STRETCH and not plan.gradient
        self._send_home(
            row
            for row in self._rows
            if row.here is not None
            and (plan.gradient or not row.row.when(plan))
            and (row.home is not Home.LENT or leave)
        )

    def gradient_arrived(self) -> None:
        """Called for each gradient of a backward pass: begins to fetch in the last one's middle.

        A window of several passes is as long as the one before it was. If it is longer, the
        rows come early; if it is shorter, the step itself fetches them.
        """
        self._calls += 1
        if self._calls != self._calls_before - self._count // 2:
            return
        if self._stream is not None and torch.cuda.is_current_stream_capturing():
            return
        try:
            if self._expected is not None:
                self._bring(self._expected)
        except torch.OutOfMemoryError:
            # There is no room yet; the step fetches what is missing.
            return

    # ---------------------------------------------------------------- for checkpoints

    def synchronise(self) -> None:
        """Brings host memory up to date, and waits for it; everything stays where it is."""
        self._write_back(
            [row for row in self._rows if row.home is Home.HOST and row.here is not None]
        )
        if self._stream is not None:
            self._stream.synchronize()

    def close(self, save: bool = True) -> None:
        """Ends all visits.

        Args:
            save: Whether what visits the device is current; else it is dropped.
        """
        if save:
            self.synchronise()
        self._drop(Home.HOST, Home.SCRATCH)
        _remove(self._hooks)

    def end_visits(self) -> None:
        """Sends rows at home in host memory there: before others write to these."""
        self.synchronise()
        self._drop(Home.HOST)

    # ---------------------------------------------------------------- what is where

    def visiting_bytes(self) -> int:
        """Device bytes of rows that are at home elsewhere."""
        return sum(
            tensor.numel() * tensor.element_size()
            for row in self._rows
            if row.home is not Home.LENT
            for tensor in row.here or ()
        )

    def is_away(self, name: str) -> bool:
        """Whether a row of this name is not on the device."""
        return any(
            row.name == name and row.home is Home.LENT and row.here is None for row in self._rows
        )

    # ---------------------------------------------------------------- inside

    def _remember_stream(self) -> None:
        if self._stream is not None:
            self._main = torch.cuda.current_stream(self._device)

    def _bring(self, plan: StepPlan) -> None:
        coming = [row for row in self._rows if row.here is None and row.row.when(plan)]
        if not coming:
            return
        # Memory comes from the stream of the steps, which will use it and give it back.
        with torch.cuda.stream(self._main) if self._main is not None else nullcontext():
            buffers = [buffer_like(row.params, row.dtype, self._device) for row in coming]
        for row, buffer in zip(coming, buffers):
            row.here = buffer
        self._copy([row for row in coming if row.home is not Home.SCRATCH], to_device=True)
        for row in coming:
            assert row.here is not None
            row.tensors.set_row(row.name, row.here)
            if row.home is Home.LENT:
                self._install(row, row.here)

    def _send_home(self, rows: Iterable[MovingRow]) -> None:
        leaving = list(rows)
        self._write_back([row for row in leaving if row.home is not Home.SCRATCH])
        for row in leaving:
            if row.home is Home.LENT:
                assert row.host is not None
                self._install(row, row.host)
            self._leave(row)

    def _drop(self, *homes: Home) -> None:
        for row in self._rows:
            if row.home in homes and row.here is not None:
                self._leave(row)

    def _leave(self, row: MovingRow) -> None:
        row.here = None
        row.tensors.release(row.name)

    def _install(self, row: MovingRow, tensors: list[Tensor]) -> None:
        for param, tensor in zip(row.params, tensors):
            self._state[param][row.name] = tensor

    def _write_back(self, rows: Sequence[MovingRow]) -> None:
        self._copy(rows, to_device=False)

    def _copy(self, rows: Sequence[MovingRow], to_device: bool) -> None:
        pairs: list[tuple[Tensor, Tensor]] = []
        for row in rows:
            assert row.host is not None
            assert row.here is not None
            pairs.extend(zip(*_joined(row.host, row.here)))
        if self._stream is None or not pairs:
            for host, here in pairs:
                here.copy_(host) if to_device else host.copy_(here)
            return
        self._stream.wait_stream(self._main)
        with torch.cuda.stream(self._stream):
            for host, here in pairs:
                if to_device:
                    here.copy_(host, non_blocking=True)
                else:
                    host.copy_(here, non_blocking=True)
                # The allocator must not hand this memory out before the copy has run.
                here.record_stream(self._stream)


def _joined(left: list[Tensor], right: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Two lists of tensors, as whole buffers where both are views of one, elsewhere flat."""
    wholes = []
    for tensors in (left, right):
        storage = tensors[0].untyped_storage()
        if any(t.untyped_storage().data_ptr() != storage.data_ptr() for t in tensors):
            return [dense_view(t) for t in left], [dense_view(t) for t in right]
        count = storage.nbytes() // tensors[0].element_size()
        wholes.append([tensors[0].as_strided((count,), (1,), 0)])
    if wholes[0][0].numel() != wholes[1][0].numel():
        return [dense_view(t) for t in left], [dense_view(t) for t in right]
    return wholes[0], wholes[1]


def _watch_gradients(
    params: Iterable[Tensor], offload: weakref.ref[Offload]
) -> list[torch.utils.hooks.RemovableHandle]:
    def arrived(_: Tensor) -> None:
        alive = offload()
        if alive is not None:
            alive.gradient_arrived()

    watched: list[Any] = list(params)
    return [param.register_post_accumulate_grad_hook(arrived) for param in watched]


def _remove(hooks: list[torch.utils.hooks.RemovableHandle]) -> None:
    while hooks:
        hooks.pop().remove()
