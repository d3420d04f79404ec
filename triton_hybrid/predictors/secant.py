"""``secant``: a quasi-Newton move from the last moves and gradient changes.

    displacement = -γ D (g - Y α) - S δ,   D = lr / (√v + ε)

S and Y are the last `history` moves and the gradient changes along them; α and δ come from the two
loops of L-BFGS with γ D as the first inverse Hessian. v is the mean square of the gradients that
the pairs remember, g less the changes, newest first (``kernels/pairs.py``). The pairs are reached
by inner products alone (Chen, Wang and Zhou, "Large-scale L-BFGS using MapReduce", 2014); as v
changes with every gradient, so do those in its metric, and all of them are taken anew in one pass.

Matrices are worked on in the eigenbases of these gradients, in which D is diagonal, as in SOAP
(``bases.py``).

The gradient that judges a move makes the next one: no step of the base rule lies between them,
whose moments go on being updated. The phases are those of every predictor:

* Full: base steps, whose moves and gradient changes are the first pairs. The last gradient makes no
  base step but the move.
* Predict: the move. Several in a row would be unverified, so `correction_interval` and
  `max_predict_steps` do not apply.
* Correct: accepted, the pair is noted, and Predict follows; shortened, no pair is noted, Correct
  follows, and the shorter move is judged; or rolled back bit for bit, and the pairs are dropped: a
  Full phase of `full_steps`, twice as many with each rollback in a row.

Weight decay is no part of the objective, as in AdamW: accepted moves contain it, once a gradient,
as far as it costs them a hundredth of their slope. Clipping limits what the moments see; the pairs
are of the gradients as they came, and the trust radius limits the moves. Where no loss is observed,
the slopes before and after a move judge it.

Bytes a parameter in FP32, for h pairs: 12 to judge the gradient, 32 to note it, 8 h + 16 for the
inner products, 8 h + 20 for the move, and a base step whose rate is 0, 32. With h = 10: 272, ten
times an AdamW step; 12 more where the trust radius shortens the move. Bases add 24 for what is
brought there and back, 16 to add the move to the weights, and 16 h + 8 every tenth move.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from triton_hybrid.config import HybridConfig
from triton_hybrid.kernels.ledger import INDEX
from triton_hybrid.kernels.pairs import LONGEST_HISTORY
from triton_hybrid.kernels.secant import products_size
from triton_hybrid.kernels.trial import ORDERS, TRIAL, judge, limit, new_trial, solve
from triton_hybrid.kernels.update_rule import UpdateRule
from triton_hybrid.predictors.bases import BASES, Passes
from triton_hybrid.predictors.predictor import Predictor
from triton_hybrid.rules.rule import Rule
from triton_hybrid.state import PREDICTION, SNAPSHOT, Batch, Home, StateRow

if TYPE_CHECKING:
    from triton_hybrid.engine import Engine


def _row(name: str) -> StateRow:
    return StateRow(name, home=Home.HOST, when=lambda plan: plan.pairs)


LAST_GRADIENT = _row("last_gradient")
"""The gradient at the snapshot: where the move on trial began."""
MOVES = tuple(_row(f"move_{slot}") for slot in range(LONGEST_HISTORY))
CHANGES = tuple(_row(f"change_{slot}") for slot in range(LONGEST_HISTORY))


def has_metric(kernels: UpdateRule | None) -> bool:
    """Whether a rule keeps a second moment."""
    return kernels is not None and "exp_avg_sq" in kernels.reads_along


class Secant(Predictor):
    """Moves by what the last moves have shown of the curvature."""

    name = "secant"
    keeps_pairs = True

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.refit_steps, self.slow_beta = 0, 0.0

    def rows_for(self, rule: Rule) -> tuple[StateRow, ...]:
        if not has_metric(rule.kernels):
            return ()
        history = self.config.history
        return (SNAPSHOT, PREDICTION, LAST_GRADIENT, *MOVES[:history], *CHANGES[:history], *BASES)

    def check_rule(self, rule: Rule) -> None:
        if not has_metric(rule.kernels):
            raise ValueError(
                f"base={rule.name!r} with predictor='secant': must be 'adamw', whose second moment "
                "begins the metric of the moves"
            )

    def bind(self, engine: Engine) -> None:
        super().bind(engine)
        self._trial = new_trial(engine.device)
        wide: dict[str, Any] = {"dtype": torch.float64, "device": engine.device}
        self._products = torch.zeros(products_size(self.config.history), **wide)
        self._passes = Passes(engine, self.config.history)

    @property
    def ready(self) -> bool:
        # Overlapping parameters cannot be moved together, nor apart from the others.
        return not any(map(self.leaves, self.engine.batches))

    @property
    def noise(self) -> Tensor:
        """1 where a loss was another one when it was told a second time at the same weights."""
        return self._trial[TRIAL.index("noise")].view(1)

    def leaves(self, batch: Batch) -> bool:
        return batch.aliased

    def base_rates(self) -> Tensor:
        """0 where the coming move contains the base step, else 1; 0-dim."""
        return 1.0 - self._trial[TRIAL.index("ready")]

    def verify(self, last: bool) -> None:
        engine, scalars, history = self.engine, self.engine.scalars, self.config.history
        for batch in engine.batches:
            engine.backend.slopes(batch.tensors, scalars)
        engine.over_ranks(scalars.sums)
        orders = judge(
            scalars.ledger, self._trial, scalars.sums,
            last=last and self.ready, cooldown=float(self.config.full_steps), history=history,
        )  # fmt: skip
        self._passes.settle(orders, self._trial)

    def predict(self, in_row: int) -> None:
        engine, scalars, passes = self.engine, self.engine.scalars, self._passes
        self._trial[TRIAL.index("ready")] *= scalars.ledger[INDEX["written"]] == 0
        passes.renew(self._trial)
        self._products.zero_()
        engine.add_up(lambda batch, own: passes.products(batch, self._trial, own), self._products)
        solution = solve(self._products, self._trial, self.config.history)
        cooldown, placed = float(self.config.full_steps), False
        try:
            for batch in engine.batches:
                passes.move(batch, self._trial, solution)
            engine.over_ranks(scalars.sums)
            orders = limit(scalars.ledger, self._trial, scalars.sums, self._products, cooldown)
            for batch in engine.batches:
                passes.place(batch, orders)
            placed = True
        finally:
            if not placed and bool(solution[0] > 0):
                self._take_back()  # interrupted: a move that nothing has limited would stay

    def _take_back(self) -> None:
        """Puts the weights back to the snapshot, whatever of a move is in them."""
        ledger = self.engine.scalars.ledger
        orders = torch.zeros(len(ORDERS), dtype=torch.float64, device=ledger.device)
        for batch in self.engine.batches:
            self._passes.place(batch, orders)
        self._trial[TRIAL.index("ready")] = 0.0
        for name in ("moved", "stretch", "jump_square"):
            ledger[INDEX[name]] = 0.0

    def forget(self) -> None:
        for name in ("slot", "pairs", "based", "again", "turned"):
            self._trial[TRIAL.index(name)] = 0.0

    def state(self) -> dict[str, float]:
        return dict(zip(TRIAL, self._trial.tolist()))

    def restore(self, state: dict[str, float]) -> None:
        self._trial.copy_(new_trial(self.engine.device, state))
        if state.get("turned") and not self._passes.agree():
            self.forget()
