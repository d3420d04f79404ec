"""``linear``: the last cycle's displacement once more.

    displacement = ratio · (weights at the end of the last cycle - weights at its beginning)

Times the ratio of each displacement to the one before it that best explains the past cycles, by
least squares for each tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_hybrid.config import HybridConfig
from triton_hybrid.kernels.displacement import Displacement
from triton_hybrid.kernels.gram import DISPLACEMENT
from triton_hybrid.kernels.ledger import INDEX
from triton_hybrid.kernels.multi_tensor import TensorSet
from triton_hybrid.kernels.rows import address_row, load_row
from triton_hybrid.kernels.scalars import HYPER, LR, Scalars
from triton_hybrid.kernels.update_rule import UpdateRule
from triton_hybrid.predictors.predictor import Predictor, Rows
from triton_hybrid.rules.rule import Rule
from triton_hybrid.state import Batch, Home, StateRow, fixed

REGRESSION_DECAY = 0.5
"""Weight of past cycles in the least squares."""
LARGEST_RATIO = 2.0
"""No cycle moves the weights further than twice the one before, or it was another kind of cycle."""
CYCLES = 2
"""Cycles after which there is a ratio."""

LAST_DISPLACEMENT = StateRow(
    "displacement",
    home=Home.HOST,
    when=lambda plan: plan.trajectory and (plan.edge or not plan.gradient),
)
REGRESSION = StateRow("regression", fixed(torch.float64), shape=(3,))
"""Of a tensor: products of successive displacements, squares of the earlier ones, both decaying;
the square of the last displacement."""
RATIO = StateRow("ratio", fixed(torch.float32), shape=())


SLOW_EMA = address_row("slow_ema")


@triton.jit
def _factors(row, factor):
    return tl.where(tl.load(row + LR) != 0, factor, 0.0)


@triton.jit
def _block(
    addresses, tensor, begin, length, factor, a, b, c, d, coefficients,
    DENOMINATOR: tl.constexpr, ALONG: tl.constexpr, STATE: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    last = load_row(addresses, DISPLACEMENT, tensor, begin, length, STATE, STATE, BLOCK, FULL)
    # What never had a gradient was moved by weight decay alone, which nobody predicts.
    s = load_row(addresses, SLOW_EMA, tensor, begin, length, STATE, STATE, BLOCK, FULL)
    return factor * (tl.load(coefficients + tensor).to(STATE) * tl.where(s != 0, last, 0.0))


class _Torch:
    """The displacement in plain torch."""

    def factors(
        self, tensors: TensorSet, scalars: Scalars, factor: Tensor, ratio: Tensor | None
    ) -> list[Tensor]:
        assert ratio is not None
        lr = scalars.hyperparameters[tensors.group.long(), HYPER["lr"]]
        return [torch.where(lr != 0, factor, 0.0), ratio.double()]

    def block(self, rule: UpdateRule, rows: Rows, factors: Sequence[Any], out: Tensor) -> Tensor:
        factor, ratio = factors
        moved = torch.mul(rows["displacement"], ratio, out=out[0]).mul_(factor)
        return moved.masked_fill_(rows["slow_ema"] == 0, 0.0)


class Linear(Predictor):
    """Continues the motion of the last cycle."""

    name = "linear"
    lends_moments = True
    follows_trajectory = True
    displacement = Displacement(_factors, _block, _Torch(), ("displacement", "slow_ema"))

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.share = 1.0 / config.full_steps
        self.cycles = -1
        """Cycles that were observed in a row, at most `CYCLES`; -1 before the first begins."""
        self._cycles_before = self.cycles

    def rows_for(self, rule: Rule) -> tuple[StateRow, ...]:
        return (*super().rows_for(rule), LAST_DISPLACEMENT, REGRESSION, RATIO)

    @property
    def ready(self) -> bool:
        return self.cycles >= CYCLES

    def coefficients(self, batch: Batch) -> Tensor:
        return batch.tables[RATIO.name]

    def move_held(self) -> None:
        self.cycles = 0

    def forget(self) -> None:
        self.cycles = -1

    def end_cycle(self) -> None:
        engine, begins, ledger = self.engine, self.cycles < 0, self.engine.scalars.ledger
        self._cycles_before, self.cycles = self.cycles, min(self.cycles + 1, CYCLES)
        applied = ledger[INDEX["nonfinite"]] == 0
        wide: dict[str, Any] = {"dtype": torch.float64, "device": engine.device}
        motion = torch.zeros(2, **wide)
        for batch in engine.batches:
            sums = torch.zeros(len(batch.params), 2, **wide)
            engine.backend.gram(batch.tensors, ledger, sums)
            engine.over_ranks(sums, batch.tensors.share)
            if not begins:
                motion += torch.stack(self._fit(batch, applied, *sums.unbind(1)))
        if not begins:
            engine.over_all(motion)
            explained, total = motion
            confidence = (explained / total.clamp(min=1e-300)).clamp(0.0, 1.0).sqrt()
            entry = ledger[INDEX["confidence"]]
            entry.copy_(torch.where(applied, confidence, entry))

    def reopen_cycle(self) -> None:
        self.cycles = self._cycles_before

    def _fit(
        self, batch: Batch, applied: Tensor, square: Tensor, cross: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sets the ratios; returns explained and total squared motion of the cycle.

        ``applied``: 0-dim bool, whether the cycle ends at all. FP64 ``[tensors]``: the squared
        newest displacement, its product with the one before.
        """
        table, ratios = batch.tables[REGRESSION.name], batch.tables[RATIO.name]
        products, squares, past = table.unbind(1)
        if self.cycles < CYCLES:
            fresh = torch.zeros_like(square)
            known, products, squares, ratio = fresh.sum(), fresh, fresh, fresh
        else:
            fitted = torch.where(squares > 0, products / squares.clamp(min=1e-300), 1.0)
            residual = square - 2.0 * fitted * cross + fitted * fitted * past
            known = (square - residual).sum().clamp(min=0.0)
            products = REGRESSION_DECAY * products + cross
            squares = REGRESSION_DECAY * squares + past
            ratio = (products / squares.clamp(min=1e-300)).clamp(-LARGEST_RATIO, LARGEST_RATIO)
            ratio = torch.where(squares > 0, ratio, 0.0)
        table.copy_(torch.where(applied, torch.stack([products, squares, square], 1), table))
        ratios.copy_(torch.where(applied, ratio.to(ratios.dtype), ratios))
        return known, square.sum()

    def state(self) -> dict[str, Any]:
        return {"cycles": self.cycles}

    def restore(self, state: dict[str, Any]) -> None:
        self.cycles = int(state.get("cycles", -1))  # a checkpoint may be another predictor's
