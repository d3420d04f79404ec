"""What a predictor declares, and the predicted step that all of them share."""

from __future__ import annotations

import abc
import math
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from triton_hybrid.config import HybridConfig
from triton_hybrid.kernels.displacement import Displacement
from triton_hybrid.rules.rule import Rule
from triton_hybrid.state import PREDICTION, SNAPSHOT, Batch, Home, Member, State, StateRow

if TYPE_CHECKING:
    from triton_hybrid.engine import Engine

Rows = Mapping[str, Tensor]

SLOW_EMA = StateRow("slow_ema", home=Home.HOST, when=lambda plan: not plan.pairs)
"""Slow EMA of the gradient: confidence and noise are measured by it. Only `secant` has none."""
STEP_LIMIT = 10.0
"""A displacement this many times the usual base update, for each predicted step in a row, is out of
proportion."""


class Choice(abc.ABC):
    """What an engine keeps: a predictor, or several of which one is active at a time.

    It is made before the state, whose rows it names; `bind` hands it what it works on.

    Attributes:
        name: Value of ``HybridConfig.predictor``.
        lends_moments: Whether the later predictions in a row do not read the moments.
        mixes: Whether Muon's momentum takes in the slow EMA.
        active: The predictor in use.
        noted: Names of its `numbers`.
        changed: Whether another predictor was chosen, whose rows are not there yet.
    """

    name: ClassVar[str]
    lends_moments: ClassVar[bool] = False
    mixes: ClassVar[bool] = False
    noted: ClassVar[tuple[str, ...]] = ()
    active: Predictor
    changed: bool = False

    @abc.abstractmethod
    def rows_for(self, rule: Rule) -> tuple[StateRow, ...]:
        """The rows that it keeps of parameters of a base rule."""

    def kind_of(self, rule: Rule, member: Member) -> Hashable:
        """What it takes a parameter for; those of one batch are of one kind."""
        return None

    def rows_of_kind(self, rule: Rule, kind: Hashable) -> tuple[StateRow, ...]:
        """`rows_for`, of parameters that it takes for such ones."""
        return self.rows_for(rule)

    def check_rule(self, rule: Rule) -> None:  # noqa: B027 - most follow any rule
        """Refuses a base rule that it cannot follow with a ValueError."""

    @abc.abstractmethod
    def bind(self, engine: Engine) -> None:
        """Takes the engine whose weights it moves."""

    def foresee(self, saved: Mapping[str, Any]) -> None:  # noqa: B027 - most have no choice
        """Chooses as a state of `state` had chosen, before there are rows."""

    def do_without(self) -> bool:
        """Takes a predictor of fewer rows, for which there is room; False where there is none."""
        return False

    def saved(self) -> dict[str, int]:
        """What `foresee` reads of a state."""
        return {}

    def before_step(self, followed: bool) -> None:  # noqa: B027 - most do not measure
        """A base step begins; ``followed``: the next step is one, too, from where it leads."""

    def after_step(self) -> None:  # noqa: B027
        """It was made, and its gradient is still there."""

    def numbers(self) -> Tensor:
        """What `choose` wants to know beside the ledger: FP64, one for each name in `noted`."""
        raise NotImplementedError

    def choose(self, entries: Mapping[str, float]) -> None:  # noqa: B027 - most have no choice
        """Takes another predictor, if ledger and `numbers` say so."""

    def release(self, state: State) -> None:  # noqa: B027
        """Lets go of the rows that nobody needs after a change."""

    def explain(self, state: Mapping[str, float]) -> tuple[bool | None, str]:
        """Whether a state of `state` says that training is deterministic, and why it chose so."""
        return None, ""

    def forget(self) -> None:  # noqa: B027 - most follow no trajectory
        """Begins anew: the weights are not where the run had brought them."""

    def state(self) -> dict[str, Any]:
        """Everything that must survive a checkpoint, as numbers."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:  # noqa: B027 - most have no state
        """The inverse of `state`."""


class Predictor(Choice):
    """A model of where training goes: its rows, when it is ready, how it fits, what it moves.

    Attributes:
        predicts: Whether it ever moves anything.
        follows_trajectory: Whether it moves along the displacements of cycles.
        displacement: What it moves the weights by.
        recomputes: Whether the weights before a prediction are found by its displacement, computed
            again; else a snapshot of them is kept.
        share: Part of that which each predicted step makes.
        refit_steps: Full steps needed after a stretch that held; 0: none, and it goes on.
        least_beta1: Tensors of groups with no larger β1 stay where they are.
        keeps_pairs: Whether it notes moves and gradient changes, in every step after Warmup.
        slow_beta: Largest decay of the slow EMA; 0 without one.
        left: Batches that it never moves (`leaves`).
    """

    predicts: bool = True
    follows_trajectory: bool = False
    displacement: Displacement
    recomputes: bool = False
    share: float = 1.0
    least_beta1: float = -1.0
    keeps_pairs: bool = False

    def __init__(self, config: HybridConfig) -> None:
        self.config = config
        self.slow_beta = config.slow_beta if self.predicts else 0.0
        # Gradient steps after a first rejection; each further one in a row doubles them. A single
        # rejection is mostly an odd batch, so it costs a quarter of a Full phase.
        self.cooldown = float(math.ceil(config.full_steps / 4))
        self.active = self
        self.refit_steps = config.full_steps
        self._slopes_known = False
        self._deferred: list[Displacement] | None = None

    def rows_for(self, rule: Rule) -> tuple[StateRow, ...]:
        return (SLOW_EMA, SNAPSHOT, PREDICTION)

    def bind(self, engine: Engine) -> None:
        self.engine = engine
        self.left = {batch for batch in engine.batches if self.predicts and self.leaves(batch)}

    @property
    @abc.abstractmethod
    def ready(self) -> bool:
        """Whether enough was observed to predict."""

    def end_cycle(self) -> None:
        """Ends a cycle of gradient steps: notes its displacement and refits."""

    def reopen_cycle(self) -> None:
        """Goes on with the cycle just ended: its last gradient was not finite."""

    def move_held(self) -> None:
        """Takes note that the weights stay where the prediction led."""

    def rates_changed(self) -> None:
        """Takes note that other learning rates are 0 now: what stays has no slope."""
        self._slopes_known = False

    def coefficients(self, batch: Batch) -> Tensor | None:
        """A number for each tensor that the displacement takes, FP32 ``[tensors]``, or None."""
        return None

    def displacement_of(self, batch: Batch) -> Displacement:
        """What the weights of a batch are moved by."""
        return self.displacement

    def leaves(self, batch: Batch) -> bool:
        """Whether it never moves the tensors of a batch."""
        return batch.aliased or (self.displacement.along_rule and batch.tensors.frozen)

    def base_rates(self) -> Tensor | None:
        """A factor on the learning rates of the base step under way, 0-dim, or None."""
        return None

    def verify(self, last: bool) -> None:
        """Decides on the prediction by the gradient at hand, and places the weights.

        ``last``: a prediction may follow this gradient.
        """
        engine, backend, scalars = self.engine, self.engine.backend, self.engine.scalars
        again = [self._again(batch) for batch in engine.batches]
        self._deferred = [*map(self.displacement_of, engine.batches)] if self.recomputes else None
        for batch, displacement in zip(engine.batches, again):
            # Where nothing predicts, a checkpoint may have brought what another one has moved.
            moved = self.predicts and self._may_move(batch)
            backend.slopes(batch.tensors, scalars, displacement, moved)
        engine.over_ranks(scalars.sums)
        backend.decide(scalars, self.config.divergence_threshold, self.cooldown)
        for batch, displacement in zip(engine.batches, again):
            if self._may_move(batch):
                backend.correct(
                    batch.tensors,
                    scalars,
                    restart=self.follows_trajectory,
                    again=displacement,
                    deferred=self.recomputes,
                )

    def _may_move(self, batch: Batch) -> bool:
        """Whether a prediction may stand in tensors of a batch."""
        if self.recomputes:
            return batch not in self.left
        return not self.predicts or batch.tensors.has(SNAPSHOT.name)

    def _again(self, batch: Batch) -> Displacement | None:
        """The displacement of a batch, where it is computed again."""
        return self.displacement_of(batch) if self.recomputes else None

    def take_deferred(self) -> list[Displacement] | None:
        """Of each batch, where `verify` has left masters for the base step to place along them."""
        again, self._deferred = self._deferred, None
        return again

    def predict(self, in_row: int) -> None:
        """Moves the weights by one predicted step, or undoes all of a row where that fails."""
        engine = self.engine
        self.move(first=in_row == 0)
        limit = self.config.divergence_threshold * (STEP_LIMIT * (in_row + 1))
        for batch in engine.batches:
            engine.backend.check_move(
                batch.tensors,
                engine.scalars,
                threshold=self.config.confidence_threshold,
                limit=limit,
                cooldown=self.cooldown,
                last=batch is engine.batches[-1],
                again=None if batch in self.left else self._again(batch),
            )

    def move(self, first: bool) -> None:
        """Moves the weights by one predicted step."""
        engine, sums = self.engine, self.engine.scalars.sums
        # A trajectory makes the same step again, along the same slopes, bit for bit.
        known = self.follows_trajectory and not first and self._slopes_known
        self._slopes_known = not engine.rates_on_device
        for batch in engine.batches:
            if batch in self.left:
                sums[batch.tensors.place].zero_()
                continue
            engine.backend.predict(
                batch.tensors,
                engine.scalars,
                self.displacement_of(batch),
                self.coefficients(batch),
                threshold=self.config.confidence_threshold,
                share=self.share,
                first=first,
                with_slopes=not known,
            )
        engine.over_ranks(sums[:, 1:] if known else sums)
