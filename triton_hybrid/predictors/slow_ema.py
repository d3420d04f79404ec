"""``slow_ema``: a base step along the slow gradient EMA.

    displacement = -factor · lr · horizon · slow_ema / (√v̂ + ε) + pull · (weight_ema - weight)

The slow EMA is preconditioned as the base rule does with a gradient (of Muon: orthogonalised). One
predicted step is a quarter of a base step with it, and more as the learning rate decays. AdEMAMix
(arXiv 2409.03137) mixes the same vector into every step.

The slow EMA is the trend of the weights, the weight EMA their level: noise of the last steps dies
out, and the trend goes on (Holt's linear smoothing, 1957). ``pull`` is zero unless the gradients of
late say that the way back to the level lowers the loss, and fades with age.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_hybrid.config import HybridConfig
from triton_hybrid.kernels.ledger import INDEX, PULL, SLOW_COUNT
from triton_hybrid.kernels.multi_tensor import TensorSet
from triton_hybrid.kernels.predict import Displacement
from triton_hybrid.kernels.rows import address_row, load_row
from triton_hybrid.kernels.scalars import HYPER, LR, PULL_SHARE, STEPS_AHEAD, Scalars
from triton_hybrid.predictors.predictor import Predictor, Rows
from triton_hybrid.rules.rule import Rule
from triton_hybrid.state import WEIGHTS, Home, StateRow

FIRST_HORIZON = 0.25
HORIZON_GAIN = 3.0
"""Base steps that one predicted step stands for at the largest learning rate, and how many
more at rate zero. The measurements are in ``examples/benchmarks/EXPERIMENTS.md``."""
EARLY_STEPS = 256
"""Gradients in which predictions pull towards the average of the weights. After them the pull has
faded to a thirtieth, and is not worth its memory traffic."""
PULL_SHARE_AT_CONSTANT_RATE = 0.5
"""Part of the way to the weight EMA that a predicted step goes while the learning rate is constant.
Such a run begins above the rate it can bear. A rate that decays averages the noise out itself, and
there the same pull only slowed training down, by 0.09 in loss at half of AdamW's best rate."""
PULL_AGE = tl.constexpr(64.0)
"""Gradients after which the pull to the weight EMA fades, by the square of their number."""
REFIT_STEPS = 2
"""Full steps between two stretches: every gradient refits the slow EMA, and the weight EMA needs a
second one to be an average."""

WEIGHT_EMA_ROW = StateRow(
    "weight_ema",
    init=WEIGHTS,
    home=Home.HOST,
    when=lambda plan: plan.early and (plan.gradient or not plan.trajectory),
)
"""Average of the last weights."""
SLOW_EMA = address_row("slow_ema")
WEIGHT_EMA = address_row("weight_ema")


def steps_ahead(decayed: float | Tensor) -> Any:
    """Base steps that one predicted step stands for once the rate has decayed by a part.

    A horizon that grows as the learning rate decays does not pay out early: the predicted
    displacement is largest in the middle of a linear decay.
    """
    return FIRST_HORIZON + HORIZON_GAIN * decayed


@triton.jit
def _factors(ledger, row, rate, factor, PULLED: tl.constexpr):
    pull = 0.0 * factor
    if PULLED:
        fading = tl.minimum(PULL_AGE / tl.maximum(tl.load(ledger + SLOW_COUNT), 1.0), 1.0)
        pull = tl.minimum(tl.load(row + PULL_SHARE) * fading * fading * factor, 1.0)
        pull = tl.where(tl.load(ledger + PULL) > 0, pull, 0.0)
    ahead = tl.load(row + LR) * tl.load(row + STEPS_AHEAD)
    return -factor * ahead * rate, pull


@triton.jit
def _block(
    addresses, tensor, begin, length, w, factor, pull, a, b, c, d, coefficients,
    DENOMINATOR: tl.constexpr, ALONG: tl.constexpr, STATE: tl.constexpr,
    UPDATE_TYPE: tl.constexpr, PULLED: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    denominator = DENOMINATOR(addresses, tensor, begin, length, a, b, c, d, STATE, BLOCK, FULL)
    s = load_row(addresses, SLOW_EMA, tensor, begin, length, STATE, STATE, BLOCK, FULL)
    displacement = factor * ALONG(
        addresses, tensor, begin, length, s, denominator, STATE, UPDATE_TYPE, BLOCK, FULL
    )
    if PULLED:
        average = load_row(addresses, WEIGHT_EMA, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        displacement += pull * (average - w)
    return displacement


class _Torch:
    """The displacement in plain torch."""

    def factors(
        self, tensors: TensorSet, scalars: Scalars, factor: Tensor, ratio: Tensor | None, pull: bool
    ) -> list[Tensor]:
        rule, ledger = tensors.rule, scalars.ledger
        assert rule is not None
        rows = scalars.hyperparameters[tensors.group.long()]
        step = tensors.steps.double().clamp(min=1.0)
        unit = rule.torch.unit((1.0 - (step * rows[:, HYPER["log_beta2"]]).exp()).sqrt())
        pulled = torch.zeros_like(factor)
        if pull:
            fading = (PULL_AGE.value / ledger[INDEX["slow_count"]].clamp(min=1.0)).clamp(max=1.0)
            share = rows[:, HYPER["pull_share"]] * fading * fading * factor
            pulled = torch.where(ledger[INDEX["pull"]] > 0, share.clamp(max=1.0), pulled)
        moved = -factor * (rows[:, HYPER["lr"]] * rows[:, HYPER["horizon"]])
        if tensors.rate_factors is not None:
            moved = moved * tensors.rate_factors
        return [moved * unit, unit * rows[:, HYPER["eps"]], pulled]

    def block(
        self, tensors: TensorSet, rows: Rows, w: Tensor, factors: Sequence[Any], out: Tensor
    ) -> Tensor:
        factor, eps, pull = factors
        assert tensors.rule is not None
        moved = tensors.rule.torch.along(rows, rows["slow_ema"], eps, out).mul_(factor)
        if "weight_ema" in rows and (not isinstance(pull, float) or pull > 0):
            moved += pull * torch.sub(rows["weight_ema"], w, out=out[1])
        return moved


class SlowEMA(Predictor):
    """Follows the slow gradient EMA.

    Without ``along_matrices`` the parameters of rules that need rows for it (Muon) stay.
    """

    name = "slow_ema"
    displacement = Displacement(_factors, _block, _Torch(), ("slow_ema",), along_rule=True)

    def __init__(self, config: HybridConfig, along_matrices: bool = True) -> None:
        super().__init__(config)
        self.refit_steps = REFIT_STEPS
        self._along_matrices = along_matrices

    def rows_for(self, rule: Rule) -> tuple[StateRow, ...]:
        if rule.along_rows and not self._along_matrices:
            return super().rows_for(rule)
        return (*super().rows_for(rule), *(rule.along_rows or (WEIGHT_EMA_ROW,)))

    @property
    def ready(self) -> bool:
        return not all(batch.tensors.frozen for batch in self.engine.batches)
