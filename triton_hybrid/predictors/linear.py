"""``linear``: the last cycle's displacement once more.

Times the ratio of each displacement to the one before it that best explains the past cycles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triton_hybrid.config import HybridConfig
from triton_hybrid.predictors.slow_ema import STEP_LIMIT
from triton_hybrid.predictors.trajectory import Trajectory

REGRESSION_DECAY = 0.5
"""Weight of past cycles in the least squares."""
LINEAR_HISTORY = 2


class Linear(Trajectory):
    """Continues the motion of the last cycle."""

    name = "linear"

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config, LINEAR_HISTORY)

    def share(self, planned: int) -> float:
        return 1.0 / self.config.full_steps

    def jump_limit(self, steps_in_row: int) -> float:
        return STEP_LIMIT * steps_in_row

    def fit(self, product: Tensor, regression: Tensor) -> tuple[Tensor, Tensor]:
        newest = torch.zeros(len(product), 1, dtype=torch.float64, device=product.device)
        known = torch.zeros((), dtype=torch.float64, device=product.device)
        if product.shape[1] < 2:
            regression.zero_()
            return known, newest
        cross, past = product[:, 0, 1], product[:, 1, 1]
        fitted = regression[:, 1] > 0
        ratio = torch.where(fitted, regression[:, 0] / regression[:, 1].clamp(min=1e-300), 1.0)
        residual = product[:, 0, 0] - 2.0 * ratio * cross + ratio * ratio * past
        known = (product[:, 0, 0] - residual).sum().clamp(min=0.0)
        regression.mul_(REGRESSION_DECAY)
        regression[:, 0] += cross
        regression[:, 1] += past
        newest[:, 0] = regression[:, 0] / regression[:, 1].clamp(min=1e-300)
        return known, newest
