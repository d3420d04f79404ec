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
from triton_hybrid.kernels.layout import dense_view
from triton_hybrid.state import Batch, Home, State, StateRow, StepPlan, buffer_like

COPY_ON_CPU = False
"""Whether state of CPU parameters is copied too, from host memory to host memory. There is nothing
to gain by it; the tests do it, to run the code that serves a GPU."""

LONG_STRETCH = 4
"""Predicted steps without a gradient for which moving the moments out is worth the copies."""


def moves(config: HybridConfig, device: torch.device) -> bool:
    """Whether rows move between host memory and the device where the kernels run."""
    return config.offload != "none" and (device.type != "cpu" or COPY_ON_CPU)


class MovingRow:
    """One row of one batch, and where its memory is."""

    def __init__(self, row: StateRow, memory: list[Tensor], batch: Batch) -> None:
        self.row, self.name, self.home = row, row.name, row.home
        self.tensors, self.params, self.dtype = batch.tensors, batch.params, memory[0].dtype
        # In host memory, views of one buffer; None where it is never there.
        self.host = memory if self.home is Home.HOST else None
        # On the device; None while it is away.
        self.here = memory if self.home is Home.LENT else None


class Offload:
    """Moves rows of state between host memory and the device.

    The optimizer's state always holds the tensors that are current, except for rows at home in host
    memory while they visit the device: `synchronise` first. ``unread`` says that later predictions
    in a row do not read the moments.
    """

    def __init__(
        self, batches: Sequence[Batch], state: State, config: HybridConfig, unread: bool
    ) -> None:
        self._rows = [MovingRow(*row, batch) for batch in batches for row in batch.travelling]
        self.moves = bool(self._rows)
        self._state, self._device = state, batches[0].tensors.device
        stretch = min(config.correction_interval, config.max_predict_steps)
        self._lends = unread and not config.inline and stretch - 1 >= LONG_STRETCH
        for row in self._rows:
            if row.home is Home.LENT and self._lends:
                # Now, and not when they first leave: memory does not grow after the first step.
                pinned = config.offload == "pinned"
                row.host = buffer_like(row.params, row.dtype, torch.device("cpu"), pinned)
        self.installs = 0
        """How often the optimizer's state was given other tensors."""
        self._expected: StepPlan | None = None
        self._calls = self._calls_before = 0
        self._stream: Any = None
        self._main: Any = None
        if self._rows and self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        alive = weakref.ref(self)

        def arrived(_: Tensor) -> None:
            offload = alive()
            if offload is not None:
                offload.gradient_arrived()

        params: dict[int, Any] = {id(p): p for row in self._rows for p in row.params}
        self._hooks = [p.register_post_accumulate_grad_hook(arrived) for p in params.values()]
        weakref.finalize(self, _remove, self._hooks).atexit = False

    def fetch(self, plan: StepPlan) -> None:
        """Brings rows to the device, or lets the step wait for those that are under way."""
        if self._capturing():
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

        Of that step there is a plan; with it so many predictions in a row come next.
        """
        self._remember_stream()
        self._expected = plan
        if plan.gradient:
            # Forward and backward pass come first.
            self._calls_before, self._calls = self._calls or self._calls_before, 0
        lend = self._lends and predictions >= LONG_STRETCH and not plan.gradient
        leaving = [
            row
            for row in self._rows
            if row.here is not None
            and (plan.gradient or not row.row.when(plan))
            and (row.home is not Home.LENT or lend)
        ]
        self._write_back(leaving)
        for row in leaving:
            if row.home is Home.LENT:
                self._install(row, row.host)
            self._leave(row)

    def gradient_arrived(self) -> None:
        """Called for each gradient of a backward pass: begins to fetch in the last one's middle.

        A window of several passes is as long as the one before it was. If it is longer, the
        rows come early; if it is shorter, the step itself fetches them.
        """
        self._calls += 1
        middle = self._calls == self._calls_before - len(self._hooks) // 2
        if middle and self._expected is not None and not self._capturing():
            try:
                self._bring(self._expected)
            except torch.OutOfMemoryError:
                # There is no room yet; the step fetches what is missing.
                return

    def synchronise(self) -> None:
        """Brings host memory up to date, and waits for it; everything stays where it is."""
        self._write_back([row for row in self._rows if row.home is Home.HOST and row.here])
        if self._stream is not None:
            self._stream.synchronize()

    def close(self, save: bool = True) -> None:
        """Sends rows at home in host memory there, or drops what visits, and ends all visits."""
        if save:
            self.synchronise()
        for row in self._rows:
            if row.here and row.home is Home.HOST:
                self._leave(row)
        _remove(self._hooks)

    def visiting_bytes(self) -> int:
        """Device bytes of rows that are at home elsewhere."""
        visiting = [row.here or () for row in self._rows if row.home is not Home.LENT]
        return sum(tensor.nbytes for tensors in visiting for tensor in tensors)

    def is_away(self, name: str) -> bool:
        """Whether the moments of this name are not on the device."""
        lent = [row for row in self._rows if row.name == name and row.home is Home.LENT]
        return any(row.here is None for row in lent)

    def _capturing(self) -> bool:
        return self._stream is not None and torch.cuda.is_current_stream_capturing()

    def _remember_stream(self) -> None:
        if self._stream is not None:
            self._main = torch.cuda.current_stream(self._device)

    def _bring(self, plan: StepPlan) -> None:
        coming = [row for row in self._rows if row.here is None and row.row.when(plan)]
        if not coming:
            return
        # Memory comes from the stream of the steps, which will use it and give it back.
        with nullcontext() if self._main is None else torch.cuda.stream(self._main):
            buffers = [buffer_like(row.params, row.dtype, self._device) for row in coming]
        for row, buffer in zip(coming, buffers):
            row.here = buffer
        self._copy(coming, to_device=True)
        for row, buffer in zip(coming, buffers):
            row.tensors.set_row(row.name, buffer)
            if row.home is Home.LENT:
                self._install(row, buffer)

    def _leave(self, row: MovingRow) -> None:
        row.here = None
        row.tensors.release(row.name)

    def _install(self, row: MovingRow, tensors: Iterable[Tensor] | None) -> None:
        assert tensors is not None
        self.installs += 1
        for param, tensor in zip(row.params, tensors):
            self._state[param][row.name] = tensor

    def _write_back(self, rows: Sequence[MovingRow]) -> None:
        self._copy(rows, to_device=False)

    def _copy(self, rows: Sequence[MovingRow], to_device: bool) -> None:
        stream = self._stream
        if not rows:
            return
        if stream is not None:
            stream.wait_stream(self._main)
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            for row in rows:
                assert row.host is not None
                assert row.here is not None
                for host, here in zip(*_joined(row.host, row.here)):
                    goal, source = (here, host) if to_device else (host, here)
                    goal.copy_(source, non_blocking=stream is not None)
                    if stream is not None:
                        # The allocator must not hand this memory out before the copy has run.
                        here.record_stream(stream)


def _joined(left: list[Tensor], right: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Two lists of tensors, as whole buffers where both are views of one, elsewhere flat."""
    wholes = []
    for tensors in (left, right):
        storage = tensors[0].untyped_storage()
        if any(t.untyped_storage().data_ptr() != storage.data_ptr() for t in tensors):
            break
        count = storage.nbytes() // tensors[0].element_size()
        wholes.append(tensors[0].as_strided((count,), (1,), 0))
    if len(wholes) == 2 and len(wholes[0]) == len(wholes[1]):
        return wholes[:1], wholes[1:]
    return [dense_view(t) for t in left], [dense_view(t) for t in right]


def _remove(hooks: list[Any]) -> None:
    while hooks:
        hooks.pop().remove()
