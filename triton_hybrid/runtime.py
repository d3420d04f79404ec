"""What the rooms of the optimizer share during a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from triton_hybrid.config import HybridConfig
from triton_hybrid.kernels.chunks import upload
from triton_hybrid.kernels.hyper import HYPER, HYPER_FIELDS
from triton_hybrid.kernels.ledger import INDEX, new_ledger, read_ledger, write_ledger
from triton_hybrid.memory import StateMemory

FIRST_HORIZON = 0.25
HORIZON_GAIN = 3.0
"""Base steps that one predicted step stands for at the largest learning rate, and how many
more at rate zero. The measurements are in ``examples/benchmarks/EXPERIMENTS.md``."""
LEVEL_SHARE = 0.5
"""Part of the way to the weight EMA that a predicted step of a young run goes while the
learning rate is constant. Such a run begins above the rate it can bear. A rate that decays
averages the noise out itself, and there the same pull only slowed training down, by 0.09 in
loss at half of AdamW's best rate."""

LARGEST_LR, LAST_LR = "largest_lr", "last_lr"
"""What is remembered of a group's learning rate, in the group, for checkpoints."""
FRESH_RATES: dict[str, Any] = {LARGEST_LR: 0.0, LAST_LR: -1.0}
"""Before the first step; -1 stands for the rate of that step."""


def steps_ahead(decayed: float | Tensor) -> Any:
    """Base steps that one predicted step of the slow EMA stands for.

    A horizon that grows as the learning rate decays does not pay out early: the predicted
    displacement is largest in the middle of a linear decay.

    Args:
        decayed: By which part of its largest value the learning rate has decayed.
    """
    return FIRST_HORIZON + HORIZON_GAIN * decayed


class Runtime:
    """Bound state, ledger and hyperparameters on one device.

    Args:
        memory: The state.
        config: The phase machine's configuration.
        backend: ``"triton"`` or ``"torch"``.
        slow_beta: Largest decay of the slow EMA; 0 when nothing predicts.
        groups: How many parameter groups there are.
    """

    def __init__(
        self,
        memory: StateMemory,
        config: HybridConfig,
        backend: str,
        slow_beta: float,
        groups: int,
    ) -> None:
        self.memory = memory
        self.config = config
        self.triton = backend == "triton"
        self.slow_beta = slow_beta
        self.ledger = new_ledger(memory.device)
        self._rows: list[list[float]] = []
        self.hyper = torch.zeros(groups, len(HYPER_FIELDS), dtype=torch.float64).to(memory.device)

    def read(self) -> dict[str, float]:
        """The ledger on the host. Waits for the device."""
        values: dict[str, float] = read_ledger(self.ledger)
        return values

    def borrow_scale(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Takes over what a GradScaler says of the coming gradient."""
        if grad_scale is not None:
            self.ledger[INDEX["loss_scale"]].copy_(torch.as_tensor(grad_scale).reshape(()))
        if found_inf is not None:
            self.ledger[INDEX["found_inf"]].copy_(torch.as_tensor(found_inf).reshape(()))

    def return_scale(self) -> None:
        """Ends what `borrow_scale` began."""
        self.ledger[INDEX["loss_scale"]].fill_(1.0)
        self.ledger[INDEX["found_inf"]].fill_(0.0)

    def restore(self, values: dict[str, float]) -> None:
        """Writes entries that were read before; the others stay as they are."""
        known = {**self.read(), **values}
        self.ledger.copy_(write_ledger(known, self.memory.device))

    @property
    def wants_slopes(self) -> bool:
        """Whether the corrector will look at slopes.

        It does not where noise dominates. Where reading the signal share is free, the
        plain-torch kernels then leave the slopes out; the Triton kernels measure them in
        passing.
        """
        return self.ledger.device.type != "cpu" or float(self.ledger[INDEX["signal"]]) > 0.5

    def observe_loss(self, loss: Tensor | float) -> None:
        """Notes the loss that belongs to the coming gradient, without waiting for it."""
        value = torch.as_tensor(loss, dtype=torch.float64).detach().to(self.memory.device)
        # NaN in the ledger means "not observed"; an observed NaN is a divergence.
        value = torch.where(value.isnan(), torch.full_like(value, math.inf), value)
        self.ledger[INDEX["loss"]].copy_(value.reshape(()), non_blocking=True)

    def refresh_hyperparameters(self, groups: Sequence[dict[str, Any]]) -> None:
        """Brings learning rates, betas and so on to the device, if they changed.

        A learning rate that is a tensor on the device stays there.
        """
        rows = []
        on_device: dict[int, Tensor] = {}
        for index, group in enumerate(groups):
            lr = group["lr"]
            largest = last = 0.0
            if isinstance(lr, Tensor) and lr.device.type != "cpu":
                on_device[index] = lr
                lr = 0.0
            else:
                lr = float(lr)
                largest = max(float(group.get(LARGEST_LR, 0.0)), lr)
                last = float(group.get(LAST_LR, -1.0))
                last = lr if last < 0 else last
                group[LARGEST_LR], group[LAST_LR] = largest, lr
            beta1, beta2 = group["betas"]
            look_ahead = 1.0
            if group["base"] == "muon":
                beta1 = group["momentum"]
                look_ahead = beta1 if group["nesterov"] else 1.0
            logs = [math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2)]
            decay = group["weight_decay"]
            sign = -1.0 if group["maximize"] else 1.0
            horizon = steps_ahead(1.0 - lr / largest if largest > 0 else 0.0)
            level = LEVEL_SHARE * (lr == last)
            row = [lr, beta1, beta2, *logs, group["eps"], decay, sign, horizon, level, look_ahead]
            rows.append(row)
        if rows != self._rows or on_device:
            self._rows = rows
            self.hyper.copy_(upload(torch.tensor(rows, dtype=torch.float64), self.memory.device))
        for index, lr in on_device.items():
            self._take_from_device(groups[index], self.hyper[index], lr)

    def _take_from_device(self, group: dict[str, Any], row: Tensor, lr: Tensor) -> None:
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
        row[HYPER["level"]].copy_(LEVEL_SHARE * (last == now))
        last.copy_(now)
