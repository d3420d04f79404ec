"""How the frontier's loop drives an optimizer, whatever it is made of, under a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from triton_hybrid import HybridOptimizer, Phase

SCHEDULES = ("linear", "cosine", "constant")
# A tenth of the run. With a twentieth, and 20 steps at most, AdamW on `lm` was unstable above a
# rate of 2e-3 and ended at 1.84 after 1,000 steps; with a tenth at 1.75, at 6e-3.
WARM_UP_STEPS = 100
WARM_UP_SHARE = 0.1
SETTINGS = ("betas", "eps", "weight_decay", "momentum", "adjust_lr_fn", "alpha", "base")

Closure = Callable[[], Tensor]


def warm_up_steps(budget: int) -> int:
    """Returns how many steps the learning rate rises."""
    return max(1, min(WARM_UP_STEPS, round(WARM_UP_SHARE * budget)))


def rate_factor(schedule: str, index: int, budget: int) -> float:
    """Returns the learning rate of a step, counted from zero, relative to its peak.

    After a short rise ``"linear"`` and ``"cosine"`` decay to zero, ``"constant"`` does not.
    """
    warm_up = warm_up_steps(budget)
    if index < warm_up:
        return (index + 1) / warm_up
    done = (index - warm_up) / max(1, budget - warm_up)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - done
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    raise ValueError(f"schedule={schedule!r}: must be one of {SCHEDULES}")


class Driver:
    """One or several optimizers that step together under one learning-rate schedule.

    HybridOptimizer is in its inline drive: one gradient a step. Its weights are judged as they are
    after the last step, which may have ended in a prediction that no gradient has judged.

    Args:
        optimizers: What steps, one after the other. Their learning rates are the peaks.
        scheduled: Whether the loop's schedule applies; otherwise rates stay as they are.
    """

    def __init__(self, *optimizers: Optimizer, scheduled: bool = True) -> None:
        self.optimizers = optimizers
        self.scheduled = scheduled
        self.hybrid = next((o for o in optimizers if isinstance(o, HybridOptimizer)), None)
        self._peaks = [float(group["lr"]) for group in self.param_groups]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def schedule(self, factor: float) -> None:
        """Sets every learning rate to its peak times a factor."""
        if self.scheduled:
            for group, peak in zip(self.param_groups, self._peaks, strict=True):
                group["lr"] = peak * factor

    def step(self, closure: Closure | None = None) -> None:
        """One step of each optimizer; with a closure only where there is just one."""
        if closure is not None:
            (optimizer,) = self.optimizers
            optimizer.step(closure)  # type: ignore[arg-type]  # LBFGS takes tensors
            return
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def observe_loss(self, loss: Tensor) -> None:
        """Tells the loss of the coming step to an optimizer that wants to know it."""
        if self.hybrid is not None:
            self.hybrid.observe_loss(loss)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Puts the weights in place that are to be judged: schedule-free optimizers hold two."""
        self._switch("eval")
        yield
        self._switch("train")

    def _switch(self, mode: str) -> None:
        for optimizer in self.optimizers:
            getattr(optimizer, mode, lambda: None)()

    def stats(self) -> dict[str, Any] | None:
        """Returns `HybridStats` as a dictionary where there are any."""
        return self.hybrid.stats().to_dict() if self.hybrid else None

    def settings(self) -> dict[str, Any]:
        """Returns what the optimizer was set to, defaults included, beside rate and schedule."""
        groups = [
            {"optimizer": type(optimizer).__name__}
            | {name: group[name] for name in SETTINGS if name in group}
            for optimizer in self.optimizers
            for group in optimizer.param_groups[:1]
        ]
        hybrid = {"hybrid": self.hybrid.hybrid.to_dict()} if self.hybrid else {}
        return {"groups": groups} | hybrid


class RandomMoves(Driver):
    """The control for the direction: each predicted move becomes a random one of equal norm.

    The stepped drive gives the chance to replace the move of each Predict step, tensor by
    tensor, before the next gradient judges it. Everything else is the mechanism as it is. The
    optimizer was built with ``inline=False``, and random directions start at a seed.
    """

    def __init__(self, optimizer: HybridOptimizer, seed: int) -> None:
        super().__init__(optimizer)
        self._optimizer = optimizer
        device = optimizer.param_groups[0]["params"][0].device
        self._generator = torch.Generator(device).manual_seed(seed)

    def step(self, closure: Closure | None = None) -> None:
        """A gradient step and the predicted steps that follow it."""
        super().step(closure)
        while not self._optimizer.needs_backward:
            params = [p for group in self._optimizer.param_groups for p in group["params"]]
            before = [param.detach().clone() for param in params]
            self._optimizer.step()
            for param, start in zip(params, before, strict=True):
                self._replace_move(param, start)

    @torch.no_grad()
    def _replace_move(self, param: nn.Parameter, start: Tensor) -> None:
        norm = torch.linalg.vector_norm(param - start)
        direction = torch.randn(param.shape, generator=self._generator, device=param.device)
        param.copy_(start + direction * (norm / torch.linalg.vector_norm(direction)))


class TailOff(Driver):
    """The control for the tail: no predictions in the last part of the budget.

    At the first verified point after so many gradients AdamW takes over, with the moments as they
    are; without predictions the two are the same rule.
    """

    def __init__(self, optimizer: HybridOptimizer, gradients: int) -> None:
        super().__init__(optimizer)
        self._optimizer, self._left = optimizer, gradients

    def step(self, closure: Closure | None = None) -> None:
        due = self._left <= 0 and self.optimizers == (self._optimizer,)
        # While the weights are a prediction, the coming gradient judges it first.
        if due and self._optimizer.phase not in (Phase.CORRECT, Phase.PREDICT):
            self._hand_over()
        super().step(closure)
        self._left -= 1

    def _hand_over(self) -> None:
        kept = ("params", "lr", "betas", "eps", "weight_decay")
        groups = [{name: group[name] for name in kept} for group in self._optimizer.param_groups]
        successor = torch.optim.AdamW(groups, fused=True)
        for param, state in self._optimizer.state.items():
            successor.state[param] = {
                "step": torch.as_tensor(state["step"], dtype=torch.float32, device=param.device),
                "exp_avg": state["exp_avg"].clone(),
                "exp_avg_sq": state["exp_avg_sq"].clone(),
            }
        self.optimizers = (successor,)
