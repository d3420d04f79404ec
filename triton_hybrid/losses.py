"""The losses that are observed for the coming gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from triton_hybrid.capturing import refuse_number
from triton_hybrid.checks import check_loss
from triton_hybrid.kernels.ledger import INDEX


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
        self.device, self.read = ledger.device, False

    def observe(self, loss: Tensor | float) -> None:
        """Notes one, without waiting for it."""
        if self._sign is None:
            return
        known = loss.detach().reshape(()) if isinstance(loss, Tensor) else float(loss)
        value = torch.as_tensor(known, dtype=torch.float64, device=self.device)
        # NaN in the ledger means "not observed"; an observed NaN is a divergence.
        value = torch.where(value.isnan(), torch.full_like(value, math.inf), self._sign * value)
        entry, seen = self._entry, self._count
        if seen:
            mean = (entry * seen + value) / (seen + 1)
            value = torch.where(entry.isnan(), value, mean)  # `forget_infinite`
        entry.copy_(value, non_blocking=True)
        self._count += 1

    def end(self) -> None:
        """A step has read them, and their gradients."""
        self._count, self.read = 0, True

    def forget(self) -> None:
        """No step will read the gradients that they belong to."""
        if self._count:
            self._entry.fill_(math.nan)
            self._count = 0

    def forget_infinite(self) -> None:
        """The same where one was not finite; nobody waits to learn whether."""
        if self._count:
            unknown = torch.full_like(self._entry, math.nan)
            self._entry.copy_(torch.where(self._entry.isfinite(), self._entry, unknown))

    def go_on(self, last: Losses) -> None:
        """Goes on from the losses of another ledger, whose entries this one has."""
        self._count, self.read = last._count, last.read


class Observed:
    """What a loop says of its losses, whether there is a ledger yet or not."""

    def __init__(self) -> None:
        self._early: list[Tensor | float] = []
        self._losses: Losses | None = None
        self._last: Losses | None = None  # before the engine was let go

    def observe(self, loss: Tensor | float) -> None:
        """Notes a loss."""
        check_loss(loss)
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
            for loss in self._early:
                losses.observe(loss)
            self._early.clear()

    def forget(self) -> None:
        """Forgets what was observed since the last gradient step."""
        self._early.clear()
        if self._losses is not None:
            self._losses.forget()

    def forget_unread(self) -> None:
        """Where gradients are dropped that no step has read: their loss, if it is not finite.

        A GradScaler leaves a step out, or the loop does. Of a finite loss nobody knows whether its
        gradient is dropped or yet to come; averaged into the next it does little.
        """
        losses = self._losses or self._last
        if losses is None:
            return
        if not losses.read:
            losses.forget_infinite()
        losses.read = False
