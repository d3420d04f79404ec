"""``none``: nothing is predicted, and the optimizer is its base rule."""

from __future__ import annotations

from triton_hybrid.predictors.predictor import Predictor
from triton_hybrid.rules.rule import Rule
from triton_hybrid.state import StateRow


class Nothing(Predictor):
    """Keeps no state and is never ready."""

    name = "none"
    predicts = False
    ready = False

    def rows_for(self, rule: Rule) -> tuple[StateRow, ...]:
        return ()
