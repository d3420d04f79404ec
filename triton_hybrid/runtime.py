"""What the rooms of the optimizer share during a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from triton_hybrid.config import HybridConfig
from triton_hybrid.kernels.adamw import HYPER, HYPER_FIELDS
from triton_hybrid.kernels.chunks import upload
from triton_hybrid.kernels.ledger import INDEX, new_ledger, read_ledger, write_ledger
from triton_hybrid.memory import StateMemory

FIRST_HORIZON = 0.25
LONGEST_HORIZON = 2.0
"""Base steps that one predicted step stands for, at the largest learning rate and at most.
On a small language model (1,000 steps of 256 tokens, AdamW's best rate 1.5e-3: loss 2.165)
0.25, 0.5 and 1 at the start gave 2.136, 2.141 and 2.194; at half the rate (AdamW: 2.220)
2.185, 2.166 and 2.136 (one seed). On GPT-2 small at its 50-step rate 0.5 once led to a loss
of 10.2 after 7.5, and had to be taken back."""


def steps_ahead(largest_lr: float, lr: float) -> float:
    """Base steps that one predicted step of the slow EMA stands for."""
    return min(FIRST_HORIZON * largest_lr / lr, LONGEST_HORIZON) if lr > 0 else FIRST_HORIZON


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
        self._largest_lr: dict[int, Tensor] = {}

    def read(self) -> dict[str, float]:
        """The ledger on the host. Waits for the device."""
        values: dict[str, float] = read_ledger(self.ledger)
        return values

    def restore(self, values: dict[str, float]) -> None:
        """Writes a ledger that was read before."""
        self.ledger.copy_(write_ledger(values, self.memory.device))

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

        A learning rate that is a tensor on the device stays there. A predicted step stands
        for 0.25 · lr_max / lr base steps, up to 2: the predicted displacement keeps its size while
        the learning rate decays, so the horizon does not pay out early.
        """
        rows = []
        on_device: dict[int, Tensor] = {}
        for index, group in enumerate(groups):
            lr = group["lr"]
            if isinstance(lr, Tensor) and lr.device.type != "cpu":
                on_device[index] = lr
                lr = 0.0
            lr = float(lr)
            group["largest_lr"] = max(float(group.get("largest_lr", 0.0)), lr)
            horizon = steps_ahead(group["largest_lr"], lr)
            beta1, beta2 = group["betas"]
            logs = [math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2)]
            sign = -1.0 if group["maximize"] else 1.0
            rows.append(
                [lr, beta1, beta2, *logs, group["eps"], group["weight_decay"], sign, horizon]
            )
        if rows != self._rows or on_device:
            self._rows = rows
            self.hyper.copy_(upload(torch.tensor(rows, dtype=torch.float64), self.memory.device))
        for index, lr in on_device.items():
            now = lr.detach().double().reshape(())
            largest = self._largest_lr.setdefault(index, torch.zeros_like(now))
            torch.maximum(largest, now, out=largest)
            self.hyper[index, HYPER["lr"]].copy_(now)
            ahead = FIRST_HORIZON * largest / now.clamp(min=1e-300)
            self.hyper[index, HYPER["horizon"]].copy_(ahead.clamp(max=LONGEST_HORIZON))
