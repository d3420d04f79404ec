"""Hyperparameters of parameter groups, on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from triton_hybrid.kernels.multi_tensor import upload
from triton_hybrid.kernels.scalars import HYPER
from triton_hybrid.predictors.slow_ema import PULL_SHARE_AT_CONSTANT_RATE, steps_ahead
from triton_hybrid.rules import RULES

LARGEST_LR, LAST_LR = "largest_lr", "last_lr"
"""What is remembered of a group's learning rate, in the group, for checkpoints."""
FRESH_RATES: dict[str, Any] = {LARGEST_LR: 0.0, LAST_LR: -1.0}
"""Before the first step; -1 stands for the rate of that step."""


class Hyperparameters:
    """Keeps the device's table up to date.

    Args:
        table: FP64 ``[groups, len(HYPER)]``, changed in place.
    """

    def __init__(self, table: Tensor) -> None:
        self._table = table
        self._rows: list[list[float]] = []

    def refresh(self, groups: Sequence[dict[str, Any]]) -> None:
        """Brings learning rates, betas and so on to the device, if they changed.

        A learning rate that is a tensor on the device stays there.
        """
        on_device: dict[int, Tensor] = {}
        rows = []
        for index, group in enumerate(groups):
            lr = group["lr"]
            if isinstance(lr, Tensor) and lr.device.type != "cpu":
                on_device[index] = lr
                rows.append(_row(group, 0.0, 0.0, 0.0))
                continue
            lr = float(lr)
            last = float(group.get(LAST_LR, -1.0))
            group[LARGEST_LR] = max(float(group.get(LARGEST_LR, 0.0)), lr)
            group[LAST_LR] = lr
            rows.append(_row(group, lr, group[LARGEST_LR], lr if last < 0 else last))
        if rows != self._rows or on_device:
            self._rows = rows
            self._table.copy_(upload(torch.tensor(rows, dtype=torch.float64), self._table.device))
        for index, lr in on_device.items():
            _take_from_device(groups[index], self._table[index], lr)


def _row(group: dict[str, Any], lr: float, largest: float, last: float) -> list[float]:
    betas = RULES[group["base"]].betas(group)
    values = {
        "lr": lr,
        "beta1": betas.beta1,
        "beta2": betas.beta2,
        "log_exp_avg": _log(betas.exp_avg),
        "log_beta2": _log(betas.beta2),
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
        "sign": -1.0 if group["maximize"] else 1.0,
        "horizon": steps_ahead(1.0 - lr / largest if largest > 0 else 0.0),
        "pull_share": PULL_SHARE_AT_CONSTANT_RATE * (lr == last),
        "nesterov_mix": betas.nesterov_mix,
    }
    return [values[name] for name in HYPER]


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _take_from_device(group: dict[str, Any], row: Tensor, lr: Tensor) -> None:
    """The same for a learning rate on the device, without reading it on the host."""
    now = lr.detach().double().reshape(())
    for name in (LARGEST_LR, LAST_LR):
        if not (isinstance(group.get(name), Tensor) and group[name].device == now.device):
            known = group.get(name, -1.0)
            known = now if not isinstance(known, Tensor) and known < 0 else known
            group[name] = torch.as_tensor(known, dtype=now.dtype).to(now.device, copy=True)
    largest, last = group[LARGEST_LR], group[LAST_LR]
    torch.maximum(largest, now, out=largest)
    row[HYPER["lr"]].copy_(now)
    row[HYPER["horizon"]].copy_(steps_ahead(1.0 - now / largest.clamp(min=1e-300)))
    row[HYPER["pull_share"]].copy_(PULL_SHARE_AT_CONSTANT_RATE * (last == now))
    last.copy_(now)
