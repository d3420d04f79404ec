"""The phase machine: plain Python, no tensors."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from triton_hybrid.config import HybridConfig


class Phase(enum.Enum):
    """What the next `step()` does."""

    WARMUP = "warmup"
    FULL = "full"
    PREDICT = "predict"
    CORRECT = "correct"

    @property
    def needs_gradient(self) -> bool:
        """False for PREDICT alone."""
        return self is not Phase.PREDICT


PHASES = tuple(Phase)


@dataclass(frozen=True)
class Report:
    """What the host learns of a gradient step, when it asks.

    Attributes:
        skipped: The gradient was not finite, and nothing was changed.
        rejected: The prediction was taken back.
        confident: The model's confidence reaches the threshold.
        cooldown: Gradient steps that must pass before the next prediction.
        missed: Gradients since the last look that were not finite, and were counted as steps
            because nobody looked.
    """

    skipped: bool = False
    rejected: bool = False
    confident: bool = True
    cooldown: int = 0
    missed: int = 0


class PhaseController:
    """Decides which phase comes next.

    Warmup → Full → (Predict × correction_interval → Correct) until max_predict_steps,
    low confidence or a rejection → Full → ...

    Args:
        config: Lengths of the phases.
    """

    def __init__(self, config: HybridConfig) -> None:
        self._config = config
        self.phase = Phase.WARMUP
        self.remaining = config.warmup_steps
        self.predicted = 0
        self.in_row = 0
        self.reported = False
        if self.remaining == 0:
            self._enter_full(config.full_steps)

    @property
    def wants_report(self) -> bool:
        """Whether the step under way may lead to a prediction that nobody has cleared yet.

        A Correct step reports; the short Full phase after it does not ask again. So the
        host waits for the device at most once a cycle, and the device's own gate stands
        between a stale report and the weights.
        """
        if self.phase is Phase.CORRECT:
            return True
        return self.phase is Phase.FULL and self.remaining == 1 and not self.reported

    @property
    def ends_gradients(self) -> bool:
        """Whether the step under way is the last of its Full phase."""
        return self.phase is Phase.FULL and self.remaining == 1

    @property
    def may_predict(self) -> bool:
        """Whether the step under way touches what is touched once a cycle."""
        return self.phase is Phase.CORRECT or self.ends_gradients

    @property
    def measures(self) -> bool:
        """Whether the step under way measures how well the model follows the updates.

        In every Warmup step, for the baseline; later at the end of each Full phase.
        """
        return self.phase is Phase.WARMUP or self.ends_gradients

    @property
    def planned(self) -> int:
        """Predicted steps in the row that begins or is under way."""
        left = self._config.max_predict_steps - self.predicted + self.in_row
        return min(self._config.correction_interval, left)

    @property
    def left_in_row(self) -> int:
        """Predicted steps that come next, if a prediction does."""
        return self.planned - self.in_row

    def after_gradient(self, report: Report, ready: bool, refit_steps: int) -> None:
        """Moves on after a Warmup, Full or Correct step.

        Args:
            report: What the step reported; the default report when nobody asked.
            ready: Whether the dynamics model can predict.
            refit_steps: Full steps that the model needs after a stretch that held.
        """
        if report.skipped:
            return
        if self.phase is Phase.WARMUP:
            self.remaining -= 1
            if self.remaining == 0:
                self._enter_full(self._config.full_steps)
        elif self.phase is Phase.FULL:
            self.remaining -= 1
            if self.remaining == 0 and report.missed:
                self._enter_full(report.missed)
            elif self.remaining == 0:
                if ready and report.confident and report.cooldown == 0:
                    self._enter_predict(new_stretch=True)
                else:
                    self._enter_full(max(report.cooldown, self._config.full_steps))
        elif report.rejected or report.cooldown > 0:
            self._enter_full(max(report.cooldown, 1))
        elif self.predicted >= self._config.max_predict_steps or not ready:
            self._enter_full(refit_steps)
            self.reported = report.confident
        elif report.confident:
            self._enter_predict(new_stretch=False)
        else:
            self._enter_full(self._config.full_steps)

    def after_prediction(self) -> None:
        """Moves on after a Predict step."""
        self.predicted += 1
        self.in_row += 1
        row_is_full = self.in_row >= self._config.correction_interval
        if row_is_full or self.predicted >= self._config.max_predict_steps:
            self.phase = Phase.CORRECT

    def _enter_full(self, steps: int) -> None:
        self.phase = Phase.FULL
        self.remaining = steps
        self.reported = False

    def _enter_predict(self, new_stretch: bool) -> None:
        self.phase = Phase.PREDICT
        self.in_row = 0
        self.reported = False
        if new_stretch:
            self.predicted = 0

    def state(self) -> dict[str, int]:
        """Everything that must survive a checkpoint, as integers."""
        return {
            "phase": PHASES.index(self.phase),
            "remaining": self.remaining,
            "predicted": self.predicted,
            "in_row": self.in_row,
            "reported": int(self.reported),
        }

    def restore(self, state: dict[str, int]) -> None:
        """The inverse of `state`."""
        self.phase = PHASES[int(state["phase"])]
        self.remaining = int(state["remaining"])
        self.predicted = int(state["predicted"])
        self.in_row = int(state["in_row"])
        self.reported = bool(state["reported"])

    def need_gradient(self) -> None:
        """Leaves a Predict phase that a stepped run was saved in, for an inline one.

        Inline, every step has a gradient: it judges what was predicted so far.
        """
        if self.phase is Phase.PREDICT:
            if self.in_row:
                self.phase = Phase.CORRECT
            else:
                self._enter_full(1)
