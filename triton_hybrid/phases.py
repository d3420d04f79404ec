"""The phase machine: plain Python, no tensors."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from triton_hybrid.config import HybridConfig


class Phase(enum.Enum):
    """What the next `step()` does."""

    WARMUP = "warmup"
    FULL = "full"
    PREDICT = "predict"
    CORRECT = "correct"

    __hash__ = object.__hash__  # that of enum is written in Python

    @property
    def needs_gradient(self) -> bool:
        """False for PREDICT alone."""
        return self is not Phase.PREDICT


PHASES = tuple(Phase)
_COUNTS = ("remaining", "predicted", "in_row", "reported")
"""What else a `PhaseController` knows."""


@dataclass(frozen=True)
class Report:
    """What the host learns of a gradient step, when it asks."""

    skipped: bool = False  # the gradient was not finite, and nothing was changed
    rejected: bool = False  # the prediction was rolled back
    shortened: bool = False  # the prediction was shortened, and is to be verified anew
    written: bool = False  # somebody else wrote weights since the prediction was made
    confident: bool = True  # the model's confidence reaches the threshold
    cooldown: int = 0  # gradient steps that must pass before the next prediction
    missed: int = 0  # gradients since the last look that were not finite but counted as steps


NOBODY_ASKED = Report()


class PhaseController:
    """Decides which phase comes next.

    Warmup → Full → (Predict × correction_interval → Correct) until max_predict_steps,
    low confidence or a rejection → Full → ...
    """

    def __init__(self, config: HybridConfig) -> None:
        self._config = config
        self.phase = Phase.WARMUP
        self.remaining = config.warmup_steps
        self.predicted = self.in_row = 0
        self.reported = False
        if self.remaining == 0:
            self._enter_full(config.full_steps)

    @property
    def stands(self) -> bool:
        """Whether a prediction stands in the weights that no gradient has verified yet."""
        return self.phase is Phase.CORRECT or (self.phase is Phase.PREDICT and self.in_row > 0)

    @property
    def ends_gradients(self) -> bool:
        """Whether the step under way is the last of its Full phase."""
        return self.phase is Phase.FULL and self.remaining == 1

    @property
    def wants_report(self) -> bool:
        """Whether the step under way may lead to a prediction that nobody has cleared yet.

        A Correct step reports; the short Full phase after it does not ask again. So the
        host waits for the device at most once a cycle, and the device's own gate stands
        between a stale report and the weights.
        """
        return self.phase is Phase.CORRECT or (self.ends_gradients and not self.reported)

    @property
    def measures(self) -> bool:
        """Whether the step under way measures how well the model follows the updates.

        In every Warmup step, for the baseline; later at the end of each Full phase.
        """
        return self.phase is Phase.WARMUP or self.ends_gradients

    @property
    def base_step_follows(self) -> bool:
        """Whether the step after the one under way is a base step from where that leads."""
        return self.phase is Phase.WARMUP or (self.phase is Phase.FULL and self.remaining > 1)

    @property
    def left_in_row(self) -> int:
        """Predicted steps that come next, if a prediction does."""
        left = self._config.max_predict_steps - self.predicted
        return min(self._config.correction_interval - self.in_row, left)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal where the coming steps do the same up to the next that reads a gradient.

        That is, where nobody asks the device (`NOBODY_ASKED`), and beside what the predictor knows.
        """
        if self.phase is Phase.PREDICT:
            return self.phase, self.in_row
        if self.phase is Phase.CORRECT:
            left = self._config.max_predict_steps - self.predicted
            return self.phase, max(0, min(left, self._config.correction_interval))
        return self.phase, min(self.remaining, 2)

    def after_gradient(self, report: Report, ready: bool, refit_steps: int) -> None:
        """Moves on after a Warmup, Full or Correct step."""
        if report.skipped or report.shortened:
            return
        full_steps, may_go_on = self._config.full_steps, ready and report.confident
        if self.phase is not Phase.CORRECT:
            self.remaining -= 1
            if self.remaining > 0:
                return
            if self.phase is Phase.WARMUP:
                self._enter_full(full_steps)
            elif report.missed:
                self._enter_full(report.missed)
            elif may_go_on and report.cooldown == 0:
                self.predicted = 0
                self._enter_predict()
            else:
                self._enter_full(max(report.cooldown, full_steps))
        elif report.rejected or report.cooldown > 0:
            self._enter_full(max(report.cooldown, 1))
        elif report.written:
            self._enter_full(full_steps)
        elif (refit_steps and self.predicted >= self._config.max_predict_steps) or not ready:
            self._enter_full(refit_steps)
            self.reported = report.confident
        elif may_go_on:
            self._enter_predict()
        else:
            self._enter_full(full_steps)

    def after_prediction(self, alone: bool = False) -> None:
        """Moves on after a Predict step; ``alone``: it is verified before there is another."""
        self.predicted += 1
        self.in_row += 1
        if alone or self.left_in_row <= 0:
            self.phase = Phase.CORRECT

    def _enter_full(self, steps: int) -> None:
        self.phase, self.remaining, self.reported = Phase.FULL, steps, False

    def _enter_predict(self) -> None:
        self.phase, self.in_row, self.reported = Phase.PREDICT, 0, False

    def need_gradient(self) -> None:
        """Leaves a Predict phase that a stepped run was saved in, for an inline one.

        Inline, every step has a gradient: it verifies what was predicted so far.
        """
        if self.phase is Phase.PREDICT and self.in_row:
            self.phase = Phase.CORRECT
        elif self.phase is Phase.PREDICT:
            self._enter_full(1)

    def state(self) -> dict[str, int]:
        """Everything that must survive a checkpoint, as integers."""
        counts = {name: int(getattr(self, name)) for name in _COUNTS}
        return {"phase": PHASES.index(self.phase), **counts}

    def restore(self, state: dict[str, int]) -> None:
        """The inverse of `state`."""
        self.phase = PHASES[int(state["phase"])]
        for name in _COUNTS:
            setattr(self, name, int(state[name]))
