"""Which tensors the coming predictions move, and that nothing is noted of any."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from triton_hybrid.kernels.capture import capturing
from triton_hybrid.kernels.ledger import PART_COLUMN
from triton_hybrid.kernels.scalars import HYPER

if TYPE_CHECKING:
    from triton_hybrid.engine import Engine


class Stretches:
    """Begins stretches of predictions; one that begins as the last did is a copy of how that did.

    Args:
        engine: Whose tensors take part.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._parts = engine.scalars.prediction[:, PART_COLUMN.value :]
        self._start = self._parts.clone()
        self._start_of: Any = None  # what `_start` was made of

    def _reason(self) -> Any:
        """What decides, as far as the host knows; None where a learning rate is on the device."""
        engine, rates, betas = self._engine, HYPER["lr"], HYPER["beta1"]
        if engine.rates_on_device:
            return None
        predictor, least = engine.predictor, engine.predictor.least_beta1
        moving = [(row[rates] != 0, row[betas] > least) for row in engine.hyperparameters]
        return predictor, moving, [batch.tensors.present for batch in engine.batches]

    @property
    def known(self) -> bool:
        """Whether the next one begins as the last did."""
        reason = self._reason()
        return bool(reason is not None and reason == self._start_of)

    def begin(self) -> None:
        """Takes those that had a gradient in the step that ends, at a learning rate that is not 0.

        What AdamW would leave alone, predictions leave alone.
        """
        engine, start = self._engine, self._parts
        if self.known:
            start.copy_(self._start)
            return
        predictor, rates, betas = engine.predictor, HYPER["lr"], HYPER["beta1"]
        start.zero_()
        if not predictor.recomputes:
            engine.scalars.moves[:, 0].fill_(math.nan)  # a snapshot is kept instead
        for batch in engine.batches:
            tensors = batch.tensors
            rows = engine.scalars.hyperparameters[tensors.group.long()]
            moves = (rows[:, rates] != 0) & tensors.has_gradient()
            moves &= rows[:, betas] > predictor.least_beta1
            part = start[tensors.place, 0]
            part.copy_(torch.zeros_like(moves) if batch in predictor.left else moves)
        if not capturing(engine.device):  # then nothing is copied yet
            self._start.copy_(start)
            self._start_of = self._reason()
