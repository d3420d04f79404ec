"""``auto``: `slow_ema`, and `secant` where training is found deterministic.

Found by the trapezoid test (``kernels/trapezoid.py``) of the base steps of Warmup and Full phases
that a base step follows. Rows for the pairs of `secant` are made when it is taken, in the place of
those of `slow_ema`; when noise begins it is the other way round. That shows after a rollback, where
the loss is told a second time at the very same weights.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from triton_hybrid.config import HybridConfig
from triton_hybrid.kernels.ledger import INDEX
from triton_hybrid.kernels.trapezoid import WATCH, begin_step, compare, end_step, new_watch
from triton_hybrid.predictors.predictor import Choice, Predictor
from triton_hybrid.predictors.secant import Secant, has_metric
from triton_hybrid.predictors.slow_ema import SlowEMA
from triton_hybrid.rules.adamw import ADAMW
from triton_hybrid.rules.rule import Rule
from triton_hybrid.state import Member, State, StateRow

if TYPE_CHECKING:
    from triton_hybrid.engine import Engine

LEAST_BETA1 = 0.5
"""Two nets of a GAN with betas=(0.5, 0.999): predictions led 8 of 8 seeds away from the data."""
LEAST_STEPS = 8
"""Steps that are compared before training is called deterministic; twice as many after each time
that it was not so after all."""
QUIET = 0.5
"""Training is deterministic where the trapezoid explains more than this share of the steps."""
REST = 8
"""Steps that are not looked at after one was found noisy, once enough are known: the two passes for
one step of each Full phase took 9% of the processor time of a small network, on a busy machine."""
AVERAGES = (
    "norm_count", "loss_count", "losses", "update_count", "gradient_square", "slow_count",
    "slow_noise", "update_slow", "update_update", "slow_slow",
)  # fmt: skip
"""What begins anew with the slow EMA, which `secant` does not keep up."""


class Auto(Choice):
    """Owns one predictor for noisy and one for deterministic training.

    It leaves groups with a β1 of `LEAST_BETA1` or less alone: who sets it so low (in adversarial
    training mostly) says that momentum hurts, and the slow EMA is more momentum.
    """

    name = "auto"
    mixes = True
    noted = (*WATCH, "noise")
    _engine: Engine | None = None

    def __init__(self, config: HybridConfig) -> None:
        self._noisy, self._quiet = SlowEMA(config), Secant(config)
        self._noisy.least_beta1 = LEAST_BETA1
        self.active: Predictor = self._noisy
        self._returns = 0  # how often noise began after all
        self._pending = False  # whether a base step waits for its second slope
        self._rest = 0  # steps that it leaves out
        self._known = (0.0, 0.0)  # steps looked at and quiet share when it chose last
        self._no_room = False  # whether there was no memory for the pairs

    def foresee(self, saved: Mapping[str, Any]) -> None:
        self.active = self._quiet if saved.get("secant") else self._noisy
        self._no_room = bool(saved.get("no_room"))

    def do_without(self) -> bool:
        left, self.active, self._no_room = self.active, self._noisy, True
        return left is self._quiet

    def saved(self) -> dict[str, int]:
        return {"secant": int(self.active is self._quiet), "no_room": int(self._no_room)}

    def kind_of(self, rule: Rule, member: Member) -> Hashable:
        return self.active.kind_of(rule, member)

    def rows_for(self, rule: Rule) -> tuple[StateRow, ...]:
        return self.active.rows_for(rule)

    def rows_of_kind(self, rule: Rule, kind: Hashable) -> tuple[StateRow, ...]:
        return self.active.rows_of_kind(rule, kind)

    def bind(self, engine: Engine) -> None:
        self._engine = engine
        self._noisy.bind(engine)
        self._quiet.bind(engine)
        self._watch = new_watch(engine.device)
        self._rates = torch.zeros_like(engine.scalars.hyperparameters)

    @property
    def _obstacle(self) -> str:
        """Why `secant` cannot serve, whatever training is like."""
        engine = self._engine
        if self._no_room:
            return "there was no memory for the pairs of secant"
        if engine is None:
            return ""
        if engine.settings.capturable:
            return "capturable=True: nobody reads what is measured"
        if not all(has_metric(batch.tensors.rule) for batch in engine.batches):
            return "secant serves base='adamw' alone, and a group has another"
        if any(batch.aliased for batch in engine.batches):
            return "parameters share memory"
        if min(engine.beta1s) <= LEAST_BETA1:
            return f"a group has a beta1 of {LEAST_BETA1} or less"
        return ""

    @property
    def _bound(self) -> Engine:
        assert self._engine is not None
        return self._engine

    @property
    def _measures(self) -> bool:
        return self.active is self._noisy and not self._obstacle

    def _slope(self) -> Tensor:
        """Of the gradient at hand along the last base step."""
        engine = self._bound
        slopes = [
            engine.backend.base_slope(batch.tensors, engine.scalars, self._rates)
            * (batch.tensors.share if engine.reduce is not None else 1.0)
            for batch in engine.batches
        ]
        total = torch.stack(slopes).sum(0, keepdim=True)
        return (total if engine.reduce is None else engine.reduce(total)).squeeze(0)

    def before_step(self, followed: bool) -> None:
        ledger = self._bound.scalars.ledger
        if self._pending:
            compare(self._watch, ledger, self._slope())
        self._pending = followed and self._measures and not self._rest
        self._rest -= followed and self._rest > 0
        if self._pending:
            begin_step(self._watch, ledger)

    def after_step(self) -> None:
        if self._pending:
            scalars = self._bound.scalars
            self._rates.copy_(scalars.hyperparameters)
            end_step(self._watch, scalars.ledger, self._slope())

    def numbers(self) -> Tensor:
        return torch.cat([self._watch, self._quiet.noise])

    @property
    def _needed(self) -> int:
        return LEAST_STEPS << min(self._returns, 10)

    def choose(self, entries: Mapping[str, float]) -> None:
        if self.active is self._quiet:
            if entries["noise"] > 0 or self._obstacle:
                self._returns += 1
                self._take(self._noisy)
            return
        (before, last), now = self._known, (entries["looked_at"], entries["quiet_share"])
        self._known = now
        if now[0] >= max(self._needed, before + 1) and now[1] <= min(last, QUIET):
            self._rest = REST
        known = entries["quiet_steps"] >= self._needed and not self._obstacle
        if known and now[1] > QUIET:
            self._take(self._quiet)

    def _take(self, predictor: Predictor) -> None:
        """Goes on with another predictor, after a Full phase and with rows of its own."""
        self.active, self.changed, self._pending = predictor, True, False
        ledger = self._bound.scalars.ledger
        fresh = ("rejections", "cooldown", *(AVERAGES if predictor is self._noisy else ()))
        ledger[[INDEX[name] for name in fresh]] = 0.0
        ledger[INDEX["horizon"]] = 1.0
        self._watch.copy_(new_watch(ledger.device))
        self._rest, self._known = 0, (0.0, 0.0)
        self._quiet.restore({})

    def release(self, state: State) -> None:
        kept = {row.name for row in self.active.rows_for(ADAMW)}
        for row in (*self._noisy.rows_for(ADAMW), *self._quiet.rows_for(ADAMW)):
            for entry in state.values() if row.name not in kept else ():
                entry.pop(row.name, None)

    def forget(self) -> None:
        self._quiet.forget()

    def state(self) -> dict[str, Any]:
        return {
            **self._quiet.state(),
            **dict(zip(WATCH, self._watch.tolist())),
            **self.saved(),
            "returns": self._returns,
            "pending": int(self._pending),
            "rest": self._rest,
            "known_steps": self._known[0],
            "known_share": self._known[1],
            "rates": self._rates.flatten().tolist(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._quiet.restore(state)
        self._watch.copy_(new_watch(self._bound.device, state))
        self._returns, self._rest = int(state.get("returns", 0)), int(state.get("rest", 0))
        self._known = state.get("known_steps", 0.0), state.get("known_share", 0.0)
        rates = state.get("rates", ())
        self._pending = bool(state.get("pending")) and len(rates) == self._rates.numel()
        if self._pending:
            known = torch.tensor(rates, dtype=torch.float64, device="cpu")
            self._rates.copy_(known.view_as(self._rates))
        if self.active is self._quiet and self._obstacle:
            self._take(self._noisy)

    def explain(self, state: Mapping[str, float]) -> tuple[bool | None, str]:
        steps, obstacle = int(state.get("quiet_steps", 0)), self._obstacle
        if self.active is self._quiet:
            return True, "losses change as the trapezoid of two gradients says"
        if obstacle:
            return None, obstacle
        if not steps and state.get("looked_at", 0):
            return None, "no loss was observed: use a closure or observe_loss"
        if steps < self._needed and state.get("returns", 0):
            return False, "a loss was another one at the same weights"
        if steps < self._needed:
            return None, f"{steps} of the {self._needed} steps needed were compared"
        share = 100.0 * state["quiet_share"]
        return False, f"the trapezoid explains the losses of {share:.0f}% of the steps"
