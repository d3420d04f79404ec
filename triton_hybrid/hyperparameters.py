"""Hyperparameters of a group as a row of numbers on the device, and what is remembered of rates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from triton_hybrid.kernels.scalars import HYPER
from triton_hybrid.predictors.slow_ema import is_other_run, steps_ahead
from triton_hybrid.rules import RULES

LARGEST_LR, LAST_LR = "largest_lr", "last_lr"
"""What is remembered of a group's learning rate, in the group, for checkpoints."""
FRESH_RATES: dict[str, Any] = {LARGEST_LR: 0.0, LAST_LR: -1.0}
"""Before the first step; -1 stands for no rate yet."""
_NUMBERS = ("eps", "weight_decay", "maximize", "momentum", "nesterov", "max_momentum", *FRESH_RATES)


def numbers_of(group: dict[str, Any]) -> tuple[Any, ...]:
    """All that a group's row of hyperparameters is made of; an empty one if it is on the device."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.device.type != "cpu":
            return ()
        lr = lr.item()
    return (lr, *group["betas"], *map(group.get, _NUMBERS))


def row_of(group: dict[str, Any], lr: float, largest: float, mixes: bool) -> list[float]:
    """A group's row, for its learning rate now and the largest one of the run."""
    betas = RULES[group["base"]].betas(group, mixes)
    beta1, beta2 = betas.pair
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in (betas.exp_avg, beta2)]
    values = {
        "lr": lr,
        "beta1": beta1,
        "beta2": beta2,
        "log_exp_avg": logs[0],
        "log_beta2": logs[1],
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
        "sign": -1.0 if group["maximize"] else 1.0,
        "horizon": steps_ahead(1.0 - lr / largest if largest > 0 else 0.0),
        "nesterov_mix": betas.nesterov_mix,
        "slow_mix": betas.slow_mix,
    }
    return [values[name] for name in HYPER]


def take_from_device(group: dict[str, Any], row: Tensor, lr: Tensor) -> None:
    """The same for a learning rate on the device, without reading it on the host."""
    now = lr.detach().double().reshape(())
    for name, fresh in FRESH_RATES.items():
        known = group.get(name, fresh)
        if not isinstance(known, Tensor) or known.device != now.device:
            group[name] = torch.full_like(now, float(known))
    largest, last = group[LARGEST_LR], group[LAST_LR]
    highest = torch.where(is_other_run(last, now), now, torch.maximum(largest, now))
    largest.copy_(torch.where(now > 0, highest, largest))
    last.copy_(torch.where(now > 0, now, last))
    row[HYPER["lr"]].copy_(now)
    row[HYPER["horizon"]].copy_(steps_ahead(1.0 - now / largest.clamp(min=1e-300)))
