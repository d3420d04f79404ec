"""The losses that are observed for the coming gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from triton_hybrid.capturing import refuse_number
from triton_hybrid.checks import check_loss
from triton_hybrid.kernels.ledger import INDEX
from triton_hybrid.shards import is_dtensor


class Losses:
    """Keeps their mean in the ledger.

    Args:
        ledger: On the device; changed in place.
        sign: -1 where an objective is maximised: the ledger has what falls as training succeeds.
            None where some groups minimise and others maximise: then it has nothing.

    Attributes:
        read: Whether a step has read the gradients since they were dropped last.
    """

    def __init__(self, ledger: Tensor, sign: float | None) -> None:
        self._entry, self._sign, self._count = ledger[INDEX["loss"]], sign, 0
        self._left: Tensor | None = None  # how many of these the mean is of; None: all
        self.device, self.read = ledger.device, False

    def observe(self, loss: Tensor | float) -> None:
        """Notes one, without waiting for it."""
        if self._sign is None:
            return
        known = loss.detach().reshape(()) if isinstance(loss, Tensor) else float(loss)
        value = torch.as_tensor(known, dtype=torch.float64, device=self.device)
        # NaN in the ledger means "not observed"; an observed NaN is a divergence.
        value = torch.where(value.isnan(), torch.full_like(value, math.inf), self._sign * value)
        entry, seen = self._entry, self._seen
        if self._count:
            mean = (entry * seen + value) / (seen + 1)
            value = torch.where(entry.isnan(), value, mean)  # `forget_infinite`
        entry.copy_(value, non_blocking=True)
        self._count += 1
        self._left = None if self._left is None else self._left + 1

    @property
    def _seen(self) -> int | Tensor:
        """How many the mean is of."""
        return self._count if self._left is None else self._left

    def end(self) -> None:
        """A step has read them, and their gradients."""
        self._count, self._left, self.read = 0, None, True

    def forget(self) -> None:
        """No step will read the gradients that they belong to."""
        if self._count:
            self._entry.fill_(math.nan)
            self._count, self._left = 0, None

    def forget_infinite(self) -> None:
        """The same where one was not finite; nobody waits to learn whether."""
        if self._count:
            finite = self._entry.isfinite()
            self._left = finite * self._seen
            unknown = torch.full_like(self._entry, math.nan)
            self._entry.copy_(torch.where(finite, self._entry, unknown))

    @property
    def count(self) -> int:
        """How many the mean is of. Waits for the device where one was not finite."""
        return int(self._seen)

    def begin_with(self, count: int) -> None:
        """Goes on from a mean in the ledger of as many."""
        self._count = count

    def go_on(self, last: Losses) -> None:
        """Goes on from the losses of another ledger, whose entries this one has."""
        self._count, self._left, self.read = last._count, last._left, last.read


class Observed:
    """What a loop says of its losses, whether there is a ledger yet or not."""

    def __init__(self) -> None:
        self._early: list[Tensor | float] = []
        self._unread = 0  # of these, whose gradients were dropped
        self._losses: Losses | None = None
        self._last: Losses | None = None  # before the engine was let go
        self._loaded = 0  # how many the mean of a checkpoint is of
        self._doubted = False  # whether gradients were dropped since it was loaded

    def observe(self, loss: Tensor | float) -> None:
        """Notes a loss."""
        check_loss(loss)
        if is_dtensor(loss):  # of ``loss_parallel``; every rank observes it
            its: Any = loss
            loss = its.detach().full_tensor()
        if self._losses is None:
            self._early.append(loss.detach() if isinstance(loss, Tensor) else loss)
        else:
            refuse_number(self._losses.device, loss)
            self._losses.observe(loss)

    def bind(self, losses: Losses | None) -> None:
        """From now on they go there, also what was observed before; None: they wait."""
        self._last, self._losses = self._losses or self._last, losses
        if losses is not None:
            if self._last is not None:
                losses.go_on(self._last)
            elif self._loaded:
                losses.begin_with(self._loaded)
                if self._doubted:
                    losses.forget_infinite()
            self._loaded, self._doubted = 0, False
            for number, loss in enumerate(self._early, 1):
                losses.observe(loss)
                if number == self._unread:
                    losses.forget_infinite()
            self._forget_early()

    @property
    def count(self) -> int:
        """How many the mean in the ledger is of. Waits for the device, where that knows."""
        losses = self._losses or self._last
        return self._loaded if losses is None else losses.count

    def restore(self, count: int, params: Sequence[Tensor]) -> None:
        """Goes on from a loaded mean of as many, where their gradients are there, too."""
        kept = any(param.grad is not None for param in params)
        self._last, self._losses = None, None
        self._loaded, self._doubted = count if kept else 0, False

    def _forget_early(self) -> None:
        self._early.clear()
        self._unread = 0

    def forget(self) -> None:
        """Forgets what was observed since the last gradient step."""
        self._forget_early()
        self._loaded = 0
        if self._losses is not None:
            self._losses.forget()

    def forget_unread(self) -> None:
        """Where gradients are dropped that no step has read: their loss, if it is not finite.

        A GradScaler leaves a step out, or the loop does. Of a finite loss nobody knows whether its
        gradient is dropped or yet to come; averaged into the next it does little.
        """
        losses = self._losses or self._last
        if losses is not None and losses.read:
            losses.read = False
            return
        self._unread, self._doubted = len(self._early), True
        if losses is not None:
            losses.forget_infinite()
