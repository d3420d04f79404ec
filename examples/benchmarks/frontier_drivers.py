"""How the frontier's loop drives an optimizer, whatever it is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from triton_hybrid import HybridConfig, HybridOptimizer, Phase

Closure = Callable[[], Tensor]


class Driver:
    """One or several optimizers that step together under one learning-rate schedule.

    Args:
        optimizers: What steps, one after the other. Their learning rates are the peaks.
        scheduled: Whether the loop's schedule applies; otherwise rates stay as they are.
    """

    def __init__(self, *optimizers: Optimizer, scheduled: bool = True) -> None:
        self.optimizers = optimizers
        self.scheduled = scheduled
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
        """Tells the loss of the coming step to optimizers that want to know it."""

    def before_evaluation(self) -> None:
        """Puts the weights in place that are to be judged."""

    def after_evaluation(self) -> None:
        """Takes them out again, so that training can go on."""

    def stats(self) -> dict[str, Any] | None:
        """Returns `HybridStats` as a dictionary where there are any."""
        return None

    def settings(self) -> dict[str, Any]:
        """Returns what the optimizer was set to, defaults included, beside rate and schedule."""
        kept = ("betas", "eps", "weight_decay", "momentum", "adjust_lr_fn", "alpha", "base")
        groups = [
            {"optimizer": type(optimizer).__name__}
            | {name: group[name] for name in kept if name in group}
            for optimizer in self.optimizers
            for group in optimizer.param_groups[:1]
        ]
        return {"groups": groups}


class ScheduleFreeDriver(Driver):
    """Schedule-free optimizers hold two sets of weights: one to train at, one to judge."""

    def before_evaluation(self) -> None:
        """See `Driver.before_evaluation`."""
        for optimizer in self.optimizers:
            optimizer.eval()  # type: ignore[attr-defined]

    def after_evaluation(self) -> None:
        """See `Driver.after_evaluation`."""
        for optimizer in self.optimizers:
            optimizer.train()  # type: ignore[attr-defined]


class HybridDriver(Driver):
    """HybridOptimizer in its inline drive: one gradient a step.

    The weights are judged as they are after the last step, which may have ended in a
    prediction that no gradient has judged.
    """

    def __init__(self, optimizer: HybridOptimizer) -> None:
        super().__init__(optimizer)
        self.hybrid = optimizer

    def observe_loss(self, loss: Tensor) -> None:
        """See `Driver.observe_loss`."""
        self.hybrid.observe_loss(loss)

    def stats(self) -> dict[str, Any] | None:
        """See `Driver.stats`."""
        return self.hybrid.stats().to_dict()

    def settings(self) -> dict[str, Any]:
        """See `Driver.settings`."""
        return super().settings() | {"hybrid": self.hybrid.hybrid.to_dict()}


class RandomMoves(HybridDriver):
    """The control for the direction: each predicted move becomes a random one of equal norm.

    The stepped drive gives the chance to replace the move of each Predict step, tensor by
    tensor, before the next gradient judges it. Everything else is the mechanism as it is.

    Args:
        optimizer: Built with ``inline=False``.
        seed: Where the random directions start.
    """

    def __init__(self, optimizer: HybridOptimizer, seed: int) -> None:
        super().__init__(optimizer)
        device = optimizer.param_groups[0]["params"][0].device
        self._generator = torch.Generator(device).manual_seed(seed)

    def step(self, closure: Closure | None = None) -> None:
        """A gradient step and the predicted steps that follow it."""
        self.hybrid.step(closure) if closure is not None else self.hybrid.step()
        while not self.hybrid.needs_backward:
            params = [p for group in self.hybrid.param_groups for p in group["params"]]
            before = [param.detach().clone() for param in params]
            self.hybrid.step()
            for param, start in zip(params, before, strict=True):
                self._replace_move(param, start)

    @torch.no_grad()
    def _replace_move(self, param: nn.Parameter, start: Tensor) -> None:
        norm = torch.linalg.vector_norm(param - start)
        direction = torch.randn(param.shape, generator=self._generator, device=param.device)
        param.copy_(start + direction * (norm / torch.linalg.vector_norm(direction)))


class TailOff(HybridDriver):
    """The control for the tail: no predictions in the last part of the budget.

    At the first verified point of the tail AdamW takes over, with the moments as they are;
    without predictions the two are the same rule.

    Args:
        optimizer: Built with ``inline=True``.
        last: Gradients after which predictions end.
    """

    def __init__(self, optimizer: HybridOptimizer, last: int) -> None:
        super().__init__(optimizer)
        self._last = last
        self._steps = 0
        self._handed_over = False

    def step(self, closure: Closure | None = None) -> None:
        """See `Driver.step`."""
        if self._steps >= self._last and not self._handed_over:
            self._hand_over()
        super().step(closure)
        self._steps += 1

    def _hand_over(self) -> None:
        if self.hybrid.phase in (Phase.CORRECT, Phase.PREDICT):
            return  # the weights are a prediction: the coming gradient judges it first
        groups = [
            {name: group[name] for name in ("params", "lr", "betas", "eps", "weight_decay")}
            for group in self.hybrid.param_groups
        ]
        successor = torch.optim.AdamW(groups, fused=True)
        for param, state in self.hybrid.state.items():
            successor.state[param] = {
                "step": torch.as_tensor(state["step"], dtype=torch.float32, device=param.device),
                "exp_avg": state["exp_avg"].clone(),
                "exp_avg_sq": state["exp_avg_sq"].clone(),
            }
        self.optimizers = (successor,)
        self._handed_over = True


def hybrid_config(options: dict[str, Any], predictor: str | None, inline: bool) -> HybridConfig:
    """Returns the present defaults with a predictor and further fields set."""
    fields = {name: value for name, value in options.items() if name in HYBRID_OPTIONS}
    if predictor is not None:
        fields["predictor"] = predictor
    return HybridConfig.from_dict(fields | {"inline": inline})


HYBRID_OPTIONS: Sequence[str] = tuple(
    name for name in HybridConfig().to_dict() if name not in ("inline", "offload")
)
"""The fields of HybridConfig that a run may set."""
