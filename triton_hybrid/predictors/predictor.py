"""What a predictor declares, and the predicted step that all of them share."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from triton_hybrid.config import HybridConfig
from triton_hybrid.kernels.predict import Displacement
from triton_hybrid.rules.rule import Rule
from triton_hybrid.state import PREDICTION, SNAPSHOT, Batch, Home, StateRow

if TYPE_CHECKING:
    from triton_hybrid.engine import Engine

SLOW_EMA = StateRow(
    "slow_ema", home=Home.HOST, when=lambda plan: plan.gradient or not plan.trajectory
)
"""Slow EMA of the gradient. Every predictor keeps it: confidence and noise are measured by it."""


class Choice(abc.ABC):
    """What an engine keeps: a predictor, or several of which one is active at a time.

    It is made before the state, whose rows it names; `bind` hands it what it works on.
    """

    name: ClassVar[str]

    @property
    def lends_moments(self) -> bool:
        """Whether the later predictions in a row do not read the moments."""
        return False

    @property
    @abc.abstractmethod
    def active(self) -> Predictor:
        """The predictor in use."""

    @abc.abstractmethod
    def rows_for(self, rule: Rule) -> tuple[StateRow, ...]:
        """The rows that it keeps of parameters of a base rule."""

    @abc.abstractmethod
    def bind(self, engine: Engine) -> None:
        """Takes the engine whose weights it moves."""

    def choose(self, signal: float) -> None:  # noqa: B027 - most have no choice
        """Takes note of the signal share of the squared gradient."""

    def state(self) -> dict[str, int]:
        """Everything that must survive a checkpoint, as integers."""
        return {}

    def restore(self, state: dict[str, int]) -> None:  # noqa: B027 - most have no state
        """The inverse of `state`."""


class Predictor(Choice):
    """A model of where training goes: its rows, when it is ready, how it fits, what it moves.

    Args:
        config: The phase machine's configuration.
    """

    predicts: bool = True
    """Whether it ever moves anything."""
    follows_trajectory: bool = False
    """Whether the basis is made of cycle displacements."""
    displacement: Displacement

    def __init__(self, config: HybridConfig) -> None:
        self.config = config
        self._slopes_known = False

    @property
    def active(self) -> Predictor:
        return self

    def rows_for(self, rule: Rule) -> tuple[StateRow, ...]:
        return (SLOW_EMA, SNAPSHOT, PREDICTION)

    def bind(self, engine: Engine) -> None:
        self.engine = engine

    # ------------------------------------------------------------------- between the steps

    @property
    @abc.abstractmethod
    def ready(self) -> bool:
        """Whether enough was observed to predict."""

    @property
    @abc.abstractmethod
    def refit_steps(self) -> int:
        """Full steps needed after a stretch that held."""

    def end_cycle(self) -> None:
        """Ends a cycle of gradient steps: notes its displacement and refits."""

    def move_held(self) -> None:
        """Takes note that the weights stay where the prediction led."""

    # ------------------------------------------------------------------------- predicting

    @abc.abstractmethod
    def share(self, planned: int) -> float:
        """Part of the whole displacement that each of the planned steps makes."""

    @abc.abstractmethod
    def jump_limit(self, steps_in_row: int) -> float:
        """Longest plausible distance from the snapshot, in usual base updates."""

    def coefficients(self, batch: Batch) -> Tensor | None:
        """Coefficients of the basis; None where there is none."""
        return None

    def leaves(self, batch: Batch, first: bool) -> bool:
        """Whether a batch stays where it is; where the row begins, its snapshot is kept."""
        return False

    def predict(self, planned: int, first: bool, early: bool) -> None:
        """Moves the weights by one predicted step.

        Args:
            planned: Predicted steps in this row.
            first: Whether this is the first of them, which keeps the snapshot.
            early: Whether the average of the weights has been kept up to date.
        """
        engine = self.engine
        sums = engine.scalars.sums
        # A trajectory makes the same step again, along the same slopes, bit for bit.
        known = self.follows_trajectory and not first and self._slopes_known
        measured = not known and engine.wants_slopes
        self._slopes_known = True
        if not known and not measured:
            sums[:, 0].zero_()
        for batch in engine.batches:
            if self.leaves(batch, first):
                sums[batch.tensors.place].zero_()
                continue
            engine.backend.predict(
                batch.tensors,
                engine.scalars,
                self.displacement,
                self.coefficients(batch),
                threshold=self.config.confidence_threshold,
                share=self.share(planned),
                save=first and not self.follows_trajectory,
                pull=early,
                with_slopes=measured,
            )
