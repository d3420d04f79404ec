"""``slow_ema``: a base step along the slow gradient EMA; of matrices, along their momentum.

    displacement = -factor · lr · horizon · slow_ema / (√v̂ + ε)

The slow EMA is preconditioned as the base rule does with a gradient. One predicted step is a
quarter of a base step with it, and more as the learning rate decays. AdEMAMix (arXiv 2409.03137)
mixes the same vector into every step, and so does Muon here, whose matrices no prediction moves.
Those of AdamW and Lion move along their orthogonalised momentum (``orthogonal.py``), and keep
its direction in the place of a slow EMA.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from torch import Tensor

from triton_hybrid.config import HybridConfig
from triton_hybrid.kernels.displacement import Displacement
from triton_hybrid.kernels.multi_tensor import TensorSet
from triton_hybrid.kernels.rows import address_row, load_row
from triton_hybrid.kernels.scalars import HYPER, LR, STEPS_AHEAD, Scalars
from triton_hybrid.kernels.update_rule import UpdateRule
from triton_hybrid.predictors.orthogonal import TURNED, Turned, is_turned
from triton_hybrid.predictors.predictor import SLOW_EMA as SLOW_EMA_ROW
from triton_hybrid.predictors.predictor import Predictor, Rows
from triton_hybrid.rules.rule import Rule
from triton_hybrid.state import DIRECTION, MOVE, PREDICTION, RESIDUE, Batch, Member, StateRow

if TYPE_CHECKING:
    from triton_hybrid.engine import Engine

FIRST_HORIZON = 0.25
HORIZON_GAIN = 3.0
"""Base steps that one predicted step stands for at the largest learning rate, and how many
more at rate zero. The measurements are in ``examples/benchmarks/EXPERIMENTS.md``."""
REFIT_STEPS = 2
"""Full steps between two stretches; every gradient refits the slow EMA."""

SLOW_EMA = address_row("slow_ema")


def steps_ahead(decayed: float | Tensor) -> Any:
    """Base steps that one predicted step stands for once the rate has decayed by a part.

    A horizon that grows as the learning rate decays does not pay out early: the predicted
    displacement is largest in the middle of a linear decay.
    """
    return FIRST_HORIZON + HORIZON_GAIN * decayed


def is_other_run(last: float | Tensor, now: float | Tensor) -> Any:
    """Whether a learning rate is not that of the run of the last one; both positive.

    One that rises to more than twice the last, or falls to less than a twentieth, was set by
    somebody: for another stage, or after a search for a learning rate.
    """
    return (now > 2.0 * last) | (now < last / 20.0)


@triton.jit
def _factors(row, factor):
    return -factor * (tl.load(row + LR) * tl.load(row + STEPS_AHEAD))


@triton.jit
def _block(
    addresses, tensor, begin, length, factor, a, b, c, d, coefficients,
    DENOMINATOR: tl.constexpr, ALONG: tl.constexpr, STATE: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    denominator = DENOMINATOR(addresses, tensor, begin, length, a, b, c, d, STATE, BLOCK, FULL)
    s = load_row(addresses, SLOW_EMA, tensor, begin, length, STATE, STATE, BLOCK, FULL)
    return factor * ALONG(addresses, tensor, begin, length, s, denominator, STATE, BLOCK, FULL)


class _Torch:
    """The displacement in plain torch."""

    def factors(
        self, tensors: TensorSet, scalars: Scalars, factor: Tensor, ratio: Tensor | None
    ) -> list[Tensor]:
        rows = scalars.hyperparameters[tensors.group.long()]
        return [-factor * (rows[:, HYPER["lr"]] * rows[:, HYPER["horizon"]])]

    def block(self, rule: UpdateRule, rows: Rows, factors: Sequence[Any], out: Tensor) -> Tensor:
        factor, *numbers = factors
        moved = rule.torch_along.along(rows, rows["slow_ema"], numbers, out)
        return moved if factor == 1.0 else moved.mul_(factor)


class SlowEMA(Predictor):
    """Follows the slow gradient EMA."""

    name = "slow_ema"
    mixes = recomputes = True
    turned: Turned
    displacement = Displacement(_factors, _block, _Torch(), ("slow_ema",), True, again=True)

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.refit_steps = REFIT_STEPS

    def kind_of(self, rule: Rule, member: Member) -> Hashable:
        """Whether a parameter moves along its orthogonalised momentum."""
        return is_turned(rule, member)

    def rows_for(self, rule: Rule) -> tuple[StateRow, ...]:
        moving = (RESIDUE, MOVE, DIRECTION) if rule.kernels.along is not None else ()
        return (SLOW_EMA_ROW, *moving, PREDICTION)

    def rows_of_kind(self, rule: Rule, kind: Hashable) -> tuple[StateRow, ...]:
        rows = self.rows_for(rule)
        without = SLOW_EMA_ROW if kind and DIRECTION in rows else DIRECTION
        return tuple(row for row in rows if row is not without)

    def displacement_of(self, batch: Batch) -> Displacement:
        return TURNED if batch.tensors.has(DIRECTION.name) else self.displacement

    def bind(self, engine: Engine) -> None:
        super().bind(engine)
        moving = (batch for batch in engine.batches if batch not in self.left)
        self.turned = Turned(batch for batch in moving if batch.tensors.has(DIRECTION.name))

    def move(self, first: bool) -> None:
        if first:
            self.turned.direct(self.engine.backend, self.engine.scalars)
        super().move(first)

    @property
    def ready(self) -> bool:
        moving = len(self.left) < len(self.engine.batches)
        return moving and max(self.engine.beta1s) > self.least_beta1
