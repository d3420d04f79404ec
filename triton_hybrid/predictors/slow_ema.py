"""``slow_ema``: a base step along the slow gradient EMA.

    displacement = -factor · lr · horizon · slow_ema / (√v̂ + ε)

The slow EMA is preconditioned as the base rule does with a gradient. One predicted step is a
quarter of a base step with it, and more as the learning rate decays. AdEMAMix (arXiv 2409.03137)
mixes the same vector into every step, and so does Muon here, whose matrices no prediction moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from triton_hybrid.config import HybridConfig
from triton_hybrid.kernels.displacement import Displacement
from triton_hybrid.kernels.multi_tensor import TensorSet
from triton_hybrid.kernels.rows import address_row, load_row
from triton_hybrid.kernels.scalars import HYPER, LR, STEPS_AHEAD, Scalars
from triton_hybrid.predictors.predictor import SLOW_EMA as SLOW_EMA_ROW
from triton_hybrid.predictors.predictor import Predictor, Rows
from triton_hybrid.rules.rule import Rule
from triton_hybrid.state import MOVE, PREDICTION, RESIDUE, StateRow

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

    def block(self, tensors: TensorSet, rows: Rows, factors: Sequence[Any], out: Tensor) -> Tensor:
        factor, *numbers = factors
        assert tensors.rule is not None
        moved = tensors.rule.torch_along.along(rows, rows["slow_ema"], numbers, out)
        return moved if factor == 1.0 else moved.mul_(factor)


class SlowEMA(Predictor):
    """Follows the slow gradient EMA."""

    name = "slow_ema"
    mixes = True
    displacement = Displacement(_factors, _block, _Torch(), ("slow_ema",), along_rule=True)

    again = displacement

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.refit_steps = REFIT_STEPS

    def rows_for(self, rule: Rule) -> tuple[StateRow, ...]:
        moving = (RESIDUE, MOVE) if rule.kernels.along is not None else ()
        return (SLOW_EMA_ROW, *moving, PREDICTION)

    @property
    def ready(self) -> bool:
        moving = len(self.left) < len(self.engine.batches)
        return moving and max(self.engine.beta1s) > self.least_beta1
