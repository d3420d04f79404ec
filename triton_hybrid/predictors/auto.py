"""``auto``: chooses between two predictors by the noise of the gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from triton_hybrid.config import HybridConfig
from triton_hybrid.predictors.linear import Linear
from triton_hybrid.predictors.predictor import Choice, Predictor
from triton_hybrid.predictors.slow_ema import SlowEMA
from triton_hybrid.rules.rule import Rule
from triton_hybrid.state import StateRow

if TYPE_CHECKING:
    from triton_hybrid.engine import Engine

LOW_NOISE = 0.9
"""Signal share of the squared gradient above which the trajectory is taken. Full-batch runs at a
good learning rate oscillate, and stay far below it; there the slow EMA is better too."""


LEAST_BETA1 = 0.5
"""Two nets of a GAN with betas=(0.5, 0.999): predictions led 8 of 8 seeds away from the data."""


class Auto(Choice):
    """Owns one predictor for noisy and one for quiet gradients.

    It leaves groups with a β1 of `LEAST_BETA1` or less alone: who sets it so low (in adversarial
    training mostly) says that momentum hurts, and the slow EMA is more momentum.
    """

    name = "auto"
    mixes = True
    lends_moments = Linear.lends_moments

    def __init__(self, config: HybridConfig) -> None:
        self._noisy, self._quiet = SlowEMA(config), Linear(config)
        self._noisy.least_beta1 = self._quiet.least_beta1 = LEAST_BETA1
        self.active: Predictor = self._noisy

    def rows_for(self, rule: Rule) -> tuple[StateRow, ...]:
        rows = (*self._noisy.rows_for(rule), *self._quiet.rows_for(rule))
        return tuple(dict.fromkeys(rows))

    def bind(self, engine: Engine) -> None:
        self._noisy.bind(engine)
        self._quiet.bind(engine)

    def choose(self, signal: float) -> None:
        wanted = self._quiet if signal > LOW_NOISE else self._noisy
        if wanted is not self.active:
            self.active = wanted
            self._quiet.forget()

    def forget(self) -> None:
        self._quiet.forget()

    def state(self) -> dict[str, Any]:
        return {**self._quiet.state(), "quiet": int(self.active is self._quiet)}

    def restore(self, state: dict[str, Any]) -> None:
        self._quiet.restore(state)
        self.active = self._quiet if state.get("quiet") else self._noisy
